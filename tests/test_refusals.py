"""What cannot work is refused by the plan, with its key and line; what is beside it works in a whole chain."""

import pytest
import tiny
from test_equalities import run
from trl import GRPOConfig

from pipeline import planner
from pipeline.chain import preflight, run_folder
from pipeline.config import precision
from pipeline.config.lineage import start_of
from pipeline.config.load import load
from pipeline.records import manifest
from pipeline.system.device import Device
from pipeline.system.errors import UserError

STAGES = {"sft": tiny.SFT, "reward": tiny.REWARD, "ppo": tiny.PPO, "dpo": tiny.DPO}
GRPO = {"data": "demonstrations", "training": {"max_completion_length": 8, "num_generations": 4, "beta": 0.04}}


def refused(path, *overrides):
    """The message of the config's refusal."""
    with pytest.raises(UserError) as refusal:
        load(path, overrides)
    return str(refusal.value)


def refused_by_plan(path, *overrides):
    """The message of the plan's refusal; the config alone passes."""
    config = load(path, overrides)
    with pytest.raises(UserError) as refusal:
        planner.show_plan(config, None)
    return str(refusal.value)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny.make_run(tmp_path_factory.mktemp("refusals"), STAGES | {"rloo": GRPO, "grpo": GRPO})


@pytest.mark.parametrize("start", ["pissa", "olora", "orthogonal", "loftq", "corda", "eva", "false"])
def test_adapters_that_do_not_start_at_zero(path, start):
    message = refused(path, f"lora.init_lora_weights={start}")
    assert "lora.init_lora_weights: " in message and "starts a stage as another model than its parent" in message


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("bias", "all", "cannot differ from stage to stage"),
        ("bias", "lora_only", "cannot differ from stage to stage"),
        ("trainable_token_indices", "[1]", "cannot differ from stage to stage"),
        ("layer_replication", "[[0, 1], [1, 2]]", "cannot differ from stage to stage"),
        ("target_parameters", "[weight]", "cannot differ from stage to stage"),
        ("loftq_config", "{loftq_bits: 4}", "changes the base's weights"),
        ("alora_invocation_tokens", "[1]", "several adapters on one base"),
        ("use_qalora", "true", "several adapters on one base"),
        ("lora_bias", "true", "cannot be merged"),
        ("base_model_name_or_path", "other", "lies on the run's base"),
    ],
)
def test_lora_options_that_a_chain_cannot_carry(path, option, value, reason):
    message = refused(path, f"lora.{option}={value}")
    assert f"lora.{option}: is set by the pipeline" in message and reason in message


def test_a_default_of_peft_may_be_written_out(path):
    assert load(path, ("lora.bias=none",)).stages["sft"].lora["bias"] == "none"
    one_stage = load(path, (f"stages.dpo.lora={tiny.LORA | {'bias': 'none'}}",))
    assert not start_of(one_stage, "dpo").merge


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("sft.training.fsdp=full_shard", "give the stage or the run an `accelerate_config`"),
        ("dpo.training.deepspeed=ds.json", "give the stage or the run an `accelerate_config`"),
        ("reward.training.bf16_full_eval=true", "it rounds the weights themselves before they are saved"),
        ("reward.training.use_liger_kernel=true", "it changes the model between the checks of a stage"),
        ("grpo.training.cast_lm_head_to_fp32=true", "log-probabilities are computed in float32 already"),
        ("grpo.training.max_completion_length=null", "must be a number of tokens, got null"),
        ("ppo.training.total_episodes=-5", "must be at least 1, got -5"),
        ("rloo.training.steps_per_generation=0", "must be at least 1, got 0"),
    ],
)
def test_options_that_would_change_what_a_stage_is(path, option, words):
    message = refused(path, f"stages.{option}")
    assert f"stages.{option.partition('=')[0]}: " in message and words in message


def test_an_adapter_of_rank_0(path):
    assert "lora.r: must be at least 1, got 0" in refused(path, "lora.r=0")


@pytest.mark.parametrize(
    ("modules", "words"),
    [
        ("[q_proj, embed_tokens]", "target_modules: 'model.embed_tokens' is no linear layer"),
        ("[q_proj, lm_head]", "target_modules: 'lm_head' is the output layer, which a reward model does not have"),
    ],
)
def test_adapters_on_embeddings(path, modules, words):
    message = refused_by_plan(path, f"lora.target_modules={modules}")
    assert all(f"stages.{name}: lora: {words}" in message for name in STAGES)


def test_layers_that_are_not_there_are_told_with_those_that_are(path):
    message = refused_by_plan(path, "lora.target_modules=[q_prj]")
    layers = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    assert "q_prj" in message and f" It has {layers}, and `all-linear` names them all" in message


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True, "init_lora_weights": "gaussian"},
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 4}},
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    ],
    ids=["dora", "rslora, patterns", "some layers"],
)
def test_other_lora_options_run_through_the_chain(tmp_path, options):
    stages = STAGES | {"grpo": GRPO}
    found = run(tiny.make_run(tmp_path, stages, lora=tiny.LORA | options), *stages).stages
    assert found["ppo"].metrics["initial_kl"] == found["grpo"].metrics["initial_kl"] == 0
    assert found["dpo"].metrics["initial_loss"] == pytest.approx(0.693147, abs=1e-6)
    for name, record in found.items():
        manifest.verify(tmp_path / "run", name, record)


@pytest.mark.parametrize("name", ["rloo", "grpo", "dpo"])
def test_dropout_in_policy_and_reference(path, name):
    message = refused(path, f"stages.{name}.training.disable_dropout=false")
    assert "disable_dropout: is set by the pipeline: policy and reference" in message


@pytest.mark.parametrize("name", ["rloo", "grpo"])
def test_dropout_of_adapters_is_off_in_rl(tmp_path, name):
    """With dropout the old policy would be another than the new one: terms clipped and a KL at a step of nothing."""
    still = {"learning_rate": 1e-12, "num_iterations": 2}
    stages = {"sft": tiny.SFT, "reward": tiny.REWARD, name: GRPO | {"training": GRPO["training"] | still}}
    run(tiny.make_run(tmp_path, stages, lora=tiny.LORA | {"lora_dropout": 0.5}), *stages)
    history = manifest.json.loads((tmp_path / "run" / name / "log_history.json").read_text())
    logged = [entry for entry in history if "kl" in entry]
    assert len(logged) >= 2  # RLOO logs it when it samples
    for entry in logged:
        assert entry["kl"] == pytest.approx(0, abs=1e-6)
        assert entry["clip_ratio/region_mean"] == 0


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((4, 3, 2), "a mini-batch of 6 is cut into micro-batches of 4 and 2"),
        ((4, 3, 4), "an update has 4 micro-batches and takes a step every 3"),
        ((4, 3, 5), "must be a multiple of num_mini_batches"),
        ((0, 2, 1), "must be at least 1, got 0"),
    ],
)
def test_sizes_for_which_gradients_leak_into_the_next_update(path, sizes, words):
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_mini_batches")
    overrides = [f"stages.ppo.training.{name}={size}" for name, size in zip(names, sizes, strict=True)]
    message = refused(path, *overrides)
    assert "stages.ppo.training" in message and words in message


@pytest.mark.parametrize("sizes", [(4, 2, 1), (4, 4, 2), (64, 1, 4), (4, 3, 3), (2, 2, 4)])
def test_sizes_that_make_whole_updates(path, sizes):
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_mini_batches")
    assert load(path, tuple(f"stages.ppo.training.{n}={size}" for n, size in zip(names, sizes, strict=True)))


def test_whitening_of_few_rows(path):
    assert "mini-batches of at least 8, and these have 4" in refused(
        path, "stages.ppo.training.whiten_rewards=true", "stages.ppo.training.num_mini_batches=2"
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["sft", "reward", "ppo", "dpo"])
def test_all_weights_in_half_precision(path, dtype, name):
    message = refused(path, f"model.dtype={dtype}", f"stages.{name}.lora=null")
    assert f"stages.{name}.lora: all weights would train in {dtype}, which rounds" in message


@pytest.mark.parametrize("version", ["flash_attention_2", "flash_attention_3"])
def test_flash_attention_in_float32(path, version, monkeypatch):
    words = "model.attn_implementation: flash attention does not compute in float32"
    assert words in refused(path, f"model.attn_implementation={version}", "model.dtype=float32")
    assert words in refused(path, f"model.attn_implementation={version}", "stages.sft.lora=null")
    assert "flash attention needs a GPU" in refused_by_plan(path, f"model.attn_implementation={version}")
    gpu = Device("cuda", "Some GPU", "it is there", "native", tf32=True)
    monkeypatch.setattr(precision, "device_of", lambda *_: gpu)
    assert words in refused_by_plan(path, f"model.attn_implementation={version}")  # the base's files are float32
    assert load(path, (f"model.attn_implementation={version}", "model.dtype=bfloat16"))


def test_shrinkage_by_an_icc_of_another_temperature(path):
    shift = ("stages.reward-shift.data=comparisons", "stages.reward-shift.temperature=1.0")
    on = ("gate=warn", *shift, "stages.ppo.prompt_baseline=sft_mean", "stages.ppo.baseline_shrinkage=true")
    message = refused(path, *on, "stages.ppo.training.temperature=0.7")
    assert "'reward-shift' measures the ICC at temperature 1, PPO samples at 0.7" in message
    assert load(path, (*on, "stages.ppo.training.temperature=1.0"))


@pytest.mark.parametrize(
    ("override", "stage", "words"),
    [
        ("stages.ppo.training.response_length=125", "ppo", "`training.response_length` = 125 make"),
        ("stages.grpo.training.max_completion_length=125", "grpo", "`training.max_completion_length` = 125 make"),
        ("stages.evaluate.max_new_tokens=125", "evaluate", "`max_new_tokens` = 125 make"),
        ("stages.pretrain.training.max_length=129", "pretrain", "pieces have 129 tokens"),
    ],
)
def test_more_tokens_than_positions(tmp_path, override, stage, words):
    """The tiny model has 128 positions."""
    stages = STAGES | {"pretrain": {"data": "texts", "training": {"max_length": 64}}, "grpo": GRPO}
    stages |= {"evaluate": {"data": "held_out", "max_new_tokens": 8}}
    path = tiny.make_run(tmp_path, stages)
    tiny.write_rows(tmp_path / "texts.jsonl", [{"text": row["chosen"]} for row in tiny.comparisons()])
    tiny.write_rows(tmp_path / "held_out.jsonl", [{"prompt": f"What of {topic}?"} for topic in tiny.TOPICS])
    names = ("comparisons", "demonstrations", "texts", "held_out")
    tiny.edit(path, {"data": {name: {"path": f"{name}.jsonl"} for name in names}})
    message = refused_by_plan(path, override)
    assert f"stages.{stage}: " in message and words in message
    assert "but the model has 128 positions" in message and message.count("positions (") == 1


def test_a_row_of_more_tokens_than_positions(tmp_path):
    path = tiny.make_run(tmp_path, {"sft": tiny.SFT, "dpo": tiny.DPO | {"training": {"max_length": 1024}}})
    long = {"prompt": "Once more?", "chosen": "tea and rain " * 40, "rejected": "No."}
    tiny.write_rows(tmp_path / "comparisons.jsonl", [*tiny.comparisons(), long])
    message = refused_by_plan(path)
    assert "stages.dpo: comparisons: its longest row has " in message and "lower `training.max_length`" in message
    assert "stages.sft" not in message


def test_texts_without_a_limit(tmp_path):
    """Pieces need one; whole texts are compared with the model's positions."""
    path = tiny.make_run(tmp_path, {"pretrain": {"data": "texts", "training": {"max_length": None}}})
    tiny.write_rows(tmp_path / "texts.jsonl", [{"text": "tea and rain " * 3}, {"text": "wool and salt " * 80}])
    tiny.edit(path, {"data": {"texts": {"path": "texts.jsonl"}}})
    assert "training.max_length: is the length of packed pieces; give a number" in refused(path)
    message = refused_by_plan(path, "stages.pretrain.training.packing=false")
    assert "stages.pretrain: texts: its longest row has " in message and "but the model has 128 positions" in message


def test_answers_of_the_rows_are_not_sampled(tmp_path):
    """With `prompt_baseline: reference` rows are prompts with an answer; a sample has the place of the answer."""
    ppo = tiny.PPO | {"prompt_baseline": "reference"}
    path = tiny.make_run(tmp_path, {"sft": tiny.SFT, "reward": tiny.REWARD, "ppo": ppo})
    rows = [row | {"completion": "tea and rain " * 14} for row in tiny.demonstrations()]
    tiny.write_rows(tmp_path / "demonstrations.jsonl", rows)
    tiny.edit(path, {"checks": {"too_long": None}})
    config = load(path, ("stages.ppo.training.response_length=90",))
    tokenizer, record = run_folder.tokenizer_of(config, manifest.Manifest(name="tiny"))
    facts = preflight.check(config, ["ppo"], tokenizer, record.fingerprint)
    (audit,) = facts["ppo"].audits.values()
    prompt, row = audit.lengths["prompt"][-1], audit.lengths["row"][-1]
    assert row <= 128 and prompt + 90 <= 128 < row + 90


@pytest.mark.parametrize(("value", "expected"), [(True, "group"), (False, "none"), ("batch", "batch")])
def test_rewards_are_scaled_as_grpo_reads_truth_values(tmp_path, value, expected):
    """`false` is the recipe of Dr. GRPO."""
    grpo = {"data": "demonstrations", "init": "base", "reward_functions": ["judge:score"]}
    config = load(
        tiny.make_run(tmp_path, {"grpo": grpo | {"training": {"scale_rewards": value, "num_generations": 4}}})
    )
    assert config.stages["grpo"].training["scale_rewards"] == expected
    assert GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, scale_rewards=value).scale_rewards == expected


def test_options_that_peft_writes_out(tmp_path):
    """As they stand in every adapter_config.json."""
    lora = tiny.LORA | {"rank_pattern": None, "alpha_pattern": None, "loftq_config": {}}
    assert load(tiny.make_run(tmp_path, {"sft": tiny.SFT}, lora=lora)).stages["sft"].lora["r"] == 4
