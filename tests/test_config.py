"""How a config is resolved: numbers, defaults, references, order, and how weights follow from stage to stage."""

import pytest
import tiny
from accelerate.commands.config.config_args import load_config_from_file

from pipeline.config.lineage import Place, place_of, root, shares_backbone, start_of
from pipeline.config.load import load
from pipeline.show.plan import describe_reference, describe_start
from pipeline.system.errors import UserError

OTHER_SHAPE = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
FULL = {"stages.sft.lora": None}


@pytest.fixture
def resolve(write_config, tmp_path):
    """`resolve(**changes)`: the tiny run's config with changes, loaded."""

    def call(*overrides, **changes):
        return load(write_config(tmp_path, **changes), overrides)

    return call


@pytest.mark.parametrize(("text", "value"), [("1e-4", 1e-4), ("2e-4", 2e-4), ('"1e-4"', 1e-4), ("3.0e-5", 3e-5)])
def test_numbers_as_people_write_them(write_config, tmp_path, text, value):
    path = write_config(tmp_path, **{"stages.sft.training.learning_rate": "HERE", "training.weight_decay": "HERE"})
    path.write_text(path.read_text().replace("HERE", text))
    training = load(path).stages["sft"].training
    for key in ("learning_rate", "weight_decay"):
        assert isinstance(training[key], float)
        assert training[key] == value


ELSEWHERE = {
    "training.max_length": "unknown option of TrainingArguments; move it to `stages.NAME.training` of a stage of "
    "type pretrain, sft, reward, dpo or kto",
    "learning_rate": "unknown key; move it to `training`",
    "stages.sft.learning_rate": "unknown key; move it to `stages.sft.training`",
    "stages.sft.training.lora_alpha": "unknown option of SFTConfig; move it to `stages.sft.lora`",
    "stages.sft.training.eval_data": "unknown option of SFTConfig; move it to `stages.sft`",
    "stages.sft.too_long": "unknown key; move it to the top level",
    "stages.sft.prompt_baseline": "unknown key; move it to `stages.NAME` of a stage of type ppo",
    "stages.sft.training.held_out": "unknown option of SFTConfig; move it to `checks`",
    "stages.sft.path": "unknown key; move it to `data.NAME`",
    "model.load_in_4bit": "unknown key; move it to `quantization`",
    "stages.sft.training.learning_rat": "unknown option of SFTConfig; did you mean 'learning_rate'?",
}


@pytest.mark.parametrize("key", ELSEWHERE)
def test_a_key_of_another_level_is_told_where_it_belongs(resolve, key):
    with pytest.raises(UserError) as caught:
        resolve(f"{key}=1")
    assert f"{key}: {ELSEWHERE[key]}" in str(caught.value)


def test_of_a_dataset_no_other_level_is_named(resolve):
    """A file's columns and subsets have names of their own."""
    with pytest.raises(UserError) as caught:
        resolve("data.demonstrations.name=1")
    assert "move it" not in str(caught.value)


@pytest.mark.parametrize(("text", "value"), [("1e-4", 1e-4), ("2e-4", 2e-4)])
def test_override(resolve, text, value):
    training = resolve(f"stages.sft.training.learning_rate={text}").stages["sft"].training
    assert training["learning_rate"] == value


def test_override_of_a_section_that_is_not_there(resolve):
    assert resolve("tokenizer.chat_template=chatml").tokenizer.chat_template == "chatml"
    assert resolve("stages.sft.seed=7").seed_of("sft") == 7


def test_override_of_a_stage_with_a_dot_in_its_name(resolve):
    stage = {"type": "dpo", "data": "comparisons", "training": {"beta": 0.1}}
    config = resolve("stages.dpo-0.3.training.beta=0.3", stages={"sft": {"data": "demos"}, "dpo-0.3": stage},
                     model={"path": "some/model"})  # fmt: skip
    assert config.stages["dpo-0.3"].training["beta"] == 0.3


@pytest.mark.parametrize("loss_type", ["sigmoid", ["sigmoid"]])
def test_one_loss_type_or_several(resolve, loss_type):
    training = resolve(**{"stages.dpo.training.loss_type": loss_type}).stages["dpo"].training
    assert training["loss_type"] in ("sigmoid", ["sigmoid"])


def test_default_references(resolve):
    stages = resolve().stages
    inits = {name: stage.init for name, stage in stages.items() if name != "evaluate"}
    assert inits == {"pretrain": "base", "sft": "pretrain", "reward": "sft", "ppo": "sft", "dpo": "sft"}
    assert stages["ppo"].reward == "reward"
    assert stages["evaluate"].reward == "reward"
    assert stages["evaluate"].baseline == "sft"
    assert stages["evaluate"].policies == ["ppo", "dpo"]


def test_sft_starts_from_the_base_without_pretraining(resolve):
    config = resolve(model={"path": "some/model"}, **{"stages.pretrain": tiny.REMOVED})
    assert config.stages["sft"].init == "base"
    assert root(config) == Place()


def test_stages_are_ordered_by_what_they_need(resolve, tmp_path):
    assert list(resolve().stages) == ["pretrain", "sft", "reward", "ppo", "dpo", "evaluate"]
    moved = {"evaluate": {"data": "prompts"}, "dpo": {"data": "comparisons"}, "ppo": {"data": "prompts"}}
    moved |= {"reward": {"data": "comparisons"}, "sft": {"data": "demos"}}
    config = resolve(model={"path": "some/model"}, stages=moved)
    # As near to the file's order as the references allow.
    assert list(config.stages) == ["sft", "dpo", "reward", "ppo", "evaluate"]


def test_lora_is_inherited_unless_it_is_given(resolve):
    stages = resolve(**{"stages.reward.lora": OTHER_SHAPE, "stages.dpo.lora": None}).stages
    assert stages["pretrain"].lora is None
    assert stages["sft"].lora["r"] == 4
    assert stages["reward"].lora == OTHER_SHAPE
    assert stages["dpo"].lora is None
    assert all(stage.lora is None for name, stage in resolve(lora=None).stages.items() if name != "evaluate")


def test_ppo_makes_checkpoints_by_updates(resolve):
    """What the stages share may say otherwise: it is about the others then."""
    with pytest.raises(UserError, match=r"ppo\.training\.save_strategy: expected one of no, steps, got 'epoch'"):
        resolve(**{"stages.ppo.training.save_strategy": "epoch"})
    stages = resolve(training={"save_strategy": "epoch"}).stages
    assert stages["sft"].training["save_strategy"] == "epoch" and "save_strategy" not in stages["ppo"].training
    assert resolve(training={"save_strategy": "no"}).stages["ppo"].training["save_strategy"] == "no"


def test_shared_training_options(resolve):
    shared = {"bf16": False, "logging_steps": 5, "save_steps": 7, "weight_decay": 0.1}
    stages = resolve(training=shared, **{"stages.sft.training": {"logging_steps": 1}}).stages
    assert stages["sft"].training == shared | {"logging_steps": 1}
    assert stages["dpo"].training == shared | {"max_steps": 1}
    # PPO takes no mixed precision, and its own options stay.
    assert "bf16" not in stages["ppo"].training
    assert stages["ppo"].training["save_steps"] == 7
    assert stages["ppo"].training["weight_decay"] == 0.1
    assert stages["ppo"].training["total_episodes"] == 4


def test_several_stages_of_one_type(resolve):
    again = {"type": "dpo", "data": "comparisons", "training": {"beta": 0.3}}
    stages = resolve(**{"stages.strong": again, "stages.further": again | {"init": "dpo"}}).stages
    assert stages["strong"].training["beta"] == 0.3
    assert stages["strong"].init == "sft"
    assert stages["further"].init == "dpo"
    assert stages["evaluate"].policies == ["ppo", "dpo", "strong", "further"]


def test_seed_of_a_stage(resolve):
    config = resolve(seed=3, **{"stages.dpo.seed": 0})
    assert config.seed_of("sft") == 3
    assert config.seed_of("dpo") == 0


def test_paths_start_at_the_config(resolve, tmp_path, monkeypatch):
    config = resolve()
    monkeypatch.chdir("/")
    assert config.resolve("corpus.jsonl") == str(tmp_path / "corpus.jsonl")
    assert config.resolve("some/model") == "some/model"


# The table "One base, one adapter per stage" of the design. dpo starts from sft; sft from pretrain, a full model.


@pytest.mark.parametrize(
    ("stage", "changes", "start", "place"),
    [
        ("pretrain", {}, "new weights", Place("pretrain/output")),
        ("sft", {}, "pretrain + new adapter", Place("pretrain/output", "sft/output")),
        ("sft", FULL, "pretrain, all weights", Place("sft/output")),
        ("dpo", {}, "adapter of sft, continued", Place("pretrain/output", "dpo/output")),
        ("dpo", {"stages.dpo.lora": None}, "sft (adapter merged), all weights", Place("dpo/output")),
        ("dpo", {"stages.dpo.lora": OTHER_SHAPE}, "sft (adapter merged) + new adapter",
         Place("dpo/merged", "dpo/output")),
        ("dpo", FULL, "sft + new adapter", Place("sft/output", "dpo/output")),
        ("dpo", FULL | {"stages.dpo.lora": None}, "sft, all weights", Place("dpo/output")),
    ],
)  # fmt: skip
def test_how_weights_follow(resolve, stage, changes, start, place):
    config = resolve(**changes)
    assert describe_start(config, stage) == start
    assert place_of(config, stage) == place
    assert start_of(config, stage).merge == ("merged" in start)
    assert describe_reference(config, stage) == ("frozen copy of sft" if stage == "dpo" else "-")


def test_dropout_and_initialisation_do_not_change_an_adapters_shape(resolve):
    lora = {
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.1,
        "init_lora_weights": "gaussian",
        "target_modules": "all-linear",
    }
    assert not start_of(resolve(**{"stages.dpo.lora": lora}), "dpo").merge
    assert start_of(resolve(**{"stages.dpo.lora": lora | {"lora_alpha": 16}}), "dpo").merge


def test_weights_on_a_merged_parent(resolve):
    """The adapter of a stage after a merging one belongs to the merged model."""
    further = {"type": "dpo", "data": "comparisons", "init": "dpo", "lora": OTHER_SHAPE}
    config = resolve(**{"stages.dpo.lora": OTHER_SHAPE, "stages.further": further})
    assert place_of(config, "further") == Place("dpo/merged", "further/output")
    assert describe_start(config, "further") == "adapter of dpo, continued"
    assert describe_reference(config, "further") == "frozen copy of dpo"


def test_weights_on_a_pretrained_base(resolve):
    config = resolve(model={"path": "some/model"}, **{"stages.pretrain": tiny.REMOVED})
    assert place_of(config, "sft") == Place(None, "sft/output")
    assert place_of(config, "ppo") == Place(None, "ppo/output")
    assert describe_start(config, "sft") == "base model + new adapter"
    assert describe_start(config, "evaluate") == "base, sft, ppo, dpo"
    assert describe_reference(config, "evaluate").startswith("sft ")


def test_reference_of_a_stage_that_starts_from_the_base(resolve):
    changes = {"stages.pretrain": tiny.REMOVED, "stages.dpo.init": "base"}
    config = resolve(model={"path": "some/model"}, **changes)
    assert describe_reference(config, "dpo") == "frozen copy of base model"


@pytest.mark.parametrize(
    ("changes", "shared"),
    [
        ({}, True),
        (FULL, True),  # policy and reward model each have an adapter on sft/output
        (FULL | {"stages.reward.lora": OTHER_SHAPE}, True),  # new adapters on one base may differ in shape
        ({"stages.reward.lora": None}, False),
        ({"stages.reward.lora": OTHER_SHAPE}, False),
        ({"stages.ppo.lora": None}, False),
        ({"stages.ppo.lora": OTHER_SHAPE}, False),
        ({"lora": None}, False),
    ],
)
def test_ppo_shares_one_backbone(resolve, changes, shared):
    assert shares_backbone(resolve(**changes), "ppo") == shared


# What is shipped


def test_shipped_configs_load(repo):
    paths = sorted((repo / "configs").glob("*.yaml"))
    assert len(paths) >= 4
    problems = []
    for path in paths:
        try:
            files = [stage.accelerate_config for stage in load(path).stages.values() if stage.accelerate_config]
        except UserError as error:
            problems.append(str(error))
        else:
            problems += [f"{path}: no {file}" for file in files if not (path.parent / file).is_file()]
    assert not problems, "\n".join(problems)


def test_shipped_accelerate_configs_load(repo):
    paths = sorted((repo / "accelerate_configs").glob("*.yaml"))
    assert len(paths) == 6
    for path in paths:
        assert load_config_from_file(str(path)).num_processes >= 1, path


@pytest.mark.parametrize("other", ["*own", "{<<: *own}"])
def test_an_override_of_a_section_with_an_anchor_is_of_one_place(write_config, tmp_path, other):
    path = write_config(tmp_path)
    own = "&own {type: dpo, data: comparisons, training: {max_steps: 1}}"
    path.write_text(path.read_text().replace("stages:\n", f"stages:\n  first: {own}\n  second: {other}\n"))
    for changed, same in (("first", "second"), ("second", "first")):
        stages = load(path, (f"stages.{changed}.training.beta=0.5",)).stages
        assert stages[changed].training["beta"] == 0.5
        assert stages[changed].training["max_steps"] == 1
        assert "beta" not in stages[same].training
