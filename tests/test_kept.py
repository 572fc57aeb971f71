"""What was found to be right is not looked at again while nothing has changed that it depends on."""

import io
import json
import os

import datasets
import pytest
import tiny
from rich.console import Console

from pipeline.base import base_model
from pipeline.chain import preflight, run_folder
from pipeline.config import load as loading
from pipeline.config import options
from pipeline.config.load import load
from pipeline.config.stage_types import KINDS, config_class
from pipeline.records import manifest
from pipeline.show import facts
from pipeline.show.screen import show
from pipeline.system import kept
from pipeline.system.cache import cache_folder
from pipeline.system.errors import UserError

JUDGED = {"data": "demonstrations", "policies": [], "judge": "judge:score", "max_new_tokens": 4}
DATA = {name: {"path": f"{name}.jsonl", "heldout": 0.5} for name in ("comparisons", "demonstrations")}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of what is kept."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rlhf-pipeline" / "kept"


@pytest.fixture
def path(tmp_path, cache):
    """The config of a run with an adapter, a choice among words and a judge."""
    training = {"lr_scheduler_type": "cosine", "learning_rate": "1e-3", "max_steps": 1}
    path = tiny.make_run(tmp_path, {"sft": tiny.SFT | {"training": training}, "evaluate": JUDGED}, data=DATA)
    (tmp_path / "judge.py").write_text("import helper\ndef score(prompt, completion):\n    return helper.NUMBER\n")
    (tmp_path / "helper.py").write_text("NUMBER = 1\n")
    return path


@pytest.fixture
def checks(monkeypatch):
    """The configs that are checked and the stages that are looked at, in order."""
    done = []
    check, look = loading._check, preflight.check

    def counted_check(path, overrides):
        done.append(overrides)
        return check(path, overrides)

    def counted_look(config, names, *rest):
        done.append(names)
        return look(config, names, *rest)

    monkeypatch.setattr(loading, "_check", counted_check)
    monkeypatch.setattr(preflight, "check", counted_look)
    return done


def test_the_same_config_is_checked_once(path, checks):
    first = load(path)
    assert load(path) == first and load(path).model_dump() == first.model_dump()
    assert load(path).stages["sft"].model_fields_set == first.stages["sft"].model_fields_set
    assert list(load(path).stages) == list(first.stages)
    assert checks == [()]
    assert load(path, ("seed=1",)).seed == load(path, ("seed=1",)).seed == 1
    assert checks == [(), ("seed=1",)]


def touch_file(path, monkeypatch):
    path.write_text(path.read_text() + "# another word\n")


def change_base(path, monkeypatch):
    file = path.parent / "model" / "config.json"
    file.write_text(file.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))


def change_variable(path, monkeypatch):
    monkeypatch.setenv("TRL_OF_THIS_TEST", "true")


def change_version(path, monkeypatch):
    folder = path.parent / "site"
    (folder / "trl-9.9.dist-info").mkdir(parents=True)
    monkeypatch.syspath_prepend(str(folder))
    kept.installation.cache_clear()


def change_gpu(path, monkeypatch):
    monkeypatch.setattr(kept, "_accelerators", lambda: ["nvidia0"])
    kept.installation.cache_clear()


@pytest.mark.parametrize("change", [touch_file, change_base, change_variable, change_version, change_gpu])
def test_a_config_is_checked_again_when_it_may_have_become_wrong(path, checks, monkeypatch, change):
    before = load(path)
    change(path, monkeypatch)
    assert load(path) == before
    assert checks == [(), ()]
    monkeypatch.undo()
    kept.installation.cache_clear()


def test_mistakes_are_not_kept(path, cache, checks):
    for _ in range(2):
        with pytest.raises(UserError, match="did you mean 'learning_rate'"):
            load(path, ("stages.sft.training.learning_rat=1",))
    assert len(checks) == 2 and not list(cache.rglob("configs/*.json"))


def test_a_run_folder_that_cannot_be_made_is_told_although_the_config_is_kept(path):
    config = load(path)
    config.run_path.write_text("a file\n")
    with pytest.raises(UserError, match="is no folder"):
        load(path)


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"digest": 1}', '{"value": {}, "digest": "0"}', "\0"])
def test_a_damaged_entry_is_found_out_again(path, cache, checks, damage):
    before = load(path)
    (entry,) = cache.rglob("configs/*.json")
    whole = entry.read_text()
    entry.write_text(damage)
    assert load(path) == before and len(checks) == 2
    assert entry.read_text() == whole
    changed = json.loads(whole)
    changed["value"]["config"]["seed"] = 7
    entry.write_text(json.dumps(changed))
    assert load(path).seed == 0 and len(checks) == 3


def test_a_cache_that_cannot_be_written_does_no_harm(path, cache, checks):
    cache.parent.mkdir(parents=True)
    cache.write_text("a file in its place\n")
    assert load(path) == load(path)
    assert len(checks) == 2


def test_a_pipe_as_a_config_is_read_once(path, tmp_path):
    """As the shell's <(...) gives one."""
    read, write = os.pipe()
    os.write(write, path.read_bytes().replace(b"path: model", f"path: {tmp_path / 'model'}".encode()))
    os.close(write)
    config = load(f"/dev/fd/{read}")
    os.close(read)
    assert list(config.stages) == ["sft", "evaluate"]


def looked(path, names=None):
    config = load(path)
    return facts.look(config, run_folder.open_run(config), names or list(config.stages))


def printed(known):
    console = Console(file=io.StringIO(), width=200)
    for table in known.tables:
        show(table, console)
    return console.file.getvalue()


def test_the_same_data_is_looked_at_once(path, checks, monkeypatch):
    monkeypatch.chdir(path.parent)
    first = looked(path)
    again = looked(path)
    assert again.stages == first.stages and first.stages["sft"]["steps"] == "1\n72 tokens"
    assert printed(again) == printed(first) and "demonstrations" in printed(first)
    assert checks == [(), ["sft", "evaluate"]]


def change_rows(folder):
    with (folder / "demonstrations.jsonl").open("a") as file:
        file.write('{"prompt": "One more?", "completion": "Yes."}\n')


def change_weights(folder):
    tiny.make_model(folder / "model", seed=1)


def change_helper(folder):
    (folder / "helper.py").write_text("NUMBER = 2\n")


@pytest.mark.parametrize("change", [change_rows, change_weights, change_helper])
def test_what_changed_is_looked_at_again(path, checks, monkeypatch, change):
    monkeypatch.chdir(path.parent)
    looked(path)
    change(path.parent)
    looked(path)
    assert checks.count(["sft", "evaluate"]) == 2


def test_what_is_evaluated_on_beside_counts_too(tmp_path, cache, checks, monkeypatch):
    """Prompts of the evaluation are left out of training, also when only the training is looked at."""
    data = {name: {"path": f"{name}.jsonl"} for name in ("demonstrations", "prompts")}
    stages = {"sft": tiny.SFT, "evaluate": JUDGED | {"data": "prompts"}}
    path = tiny.make_run(tmp_path, stages, data=data)
    (tmp_path / "judge.py").write_text("def score(prompt, completion):\n    return 1.0\n")
    rows = tiny.demonstrations()
    monkeypatch.chdir(tmp_path)
    for number in (1, 5):
        tiny.write_rows(tmp_path / "prompts.jsonl", rows[:number])
        shown = looked(path, ["sft"]).stages["sft"]["data"]
        assert shown.startswith(f"demonstrations: {len(rows) - number},") and f"({number} left out)" in shown
    tiny.write_rows(tmp_path / "prompts.jsonl", rows)
    with pytest.raises(UserError, match="no row is left"):
        looked(path, ["sft"])


def test_functions_are_tried_every_time(path, monkeypatch):
    """They may need what nobody knows of: here a variable."""
    monkeypatch.chdir(path.parent)
    monkeypatch.setenv("JUDGE_KEY", "1")
    (path.parent / "helper.py").write_text("import os\nNUMBER = float(os.environ['JUDGE_KEY'])\n")
    looked(path)
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(UserError, match="JUDGE_KEY"):
        looked(path)


def test_nothing_is_kept_that_changed_while_it_was_found_out(cache):
    states = iter(["a", "b", "b", "b"])
    found = [kept.remembered("word", lambda: next(states), lambda word=word: word) for word in ("old", "new")]
    assert found == ["old", "new"]
    assert kept.recall("word", "a") is None
    assert kept.remembered("word", lambda: "b", lambda: "other") == "new"
    assert [kept.remembered("word", lambda: None, lambda word=word: word) for word in ("1", "2")] == ["1", "2"]


def test_a_commit_counts_for_its_own_model_only(tmp_path, cache):
    """Another hub model than that of the manifest has no commit yet, so that nothing of it can be kept."""
    (tmp_path / "run").mkdir()
    config = load(tiny.make_run(tmp_path, {"sft": tiny.SFT}))
    model = {"path": "owner/old", "revision": None, "commit": "1" * 40}
    recorded = manifest.Manifest(name="run", model=model)
    states = []
    for name in ("owner/old", "owner/new"):
        other = config.model_copy(update={"model": config.model.model_copy(update={"path": name})})
        states.append(base_model.settled_state(other, recorded))
    assert states[0] is not None and states[1] is None


def test_stages_use_the_config_that_their_launcher_has_checked(path, checks, monkeypatch):
    load(path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    load(path)
    assert checks == [()]


def test_a_function_that_was_spoilt_is_refused(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    looked(path)
    (path.parent / "helper.py").write_text("NUMBER = 'two'\n")
    with pytest.raises(UserError, match="gives 'two'"):
        looked(path)


@pytest.mark.parametrize("kind", [name for name, row in KINDS.items() if row.trl_config])
def test_defaults_of_trl_are_the_same_kept(cache, kind):
    compute = options._defaults_of_trl.__wrapped__
    first = compute(kind)
    assert (cache / "defaults").is_dir() and compute(kind) == first
    fields = config_class(kind).__dataclass_fields__
    assert first and all(fields[name].default == value for name, value in first.items())
    assert first["learning_rate"] == fields["learning_rate"].default


@pytest.mark.parametrize("set_there", [{}, {"HF_DATASETS_CACHE": "/d/e"}, {"HF_HOME": "~/h"}, {"XDG_CACHE_HOME": "/x"}])
def test_the_cache_is_that_of_the_datasets_library(monkeypatch, set_there):
    """Its rule is read from its own module, run again."""
    for name in ("HF_DATASETS_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in set_there.items():
        monkeypatch.setenv(name, value)
    source = datasets.config.__spec__.loader.get_code("datasets.config")
    names = {"__name__": "datasets.config", "__file__": datasets.config.__file__}
    exec(source, names)
    assert cache_folder() == names["HF_DATASETS_CACHE"] / "rlhf-pipeline"
