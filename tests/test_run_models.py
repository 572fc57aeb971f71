"""How the models of a run folder are loaded: with its tokenizer, its attention, and on the device of its stages."""

import pytest
import tiny
from transformers import AutoTokenizer, LlamaConfig

from pipeline.base import base_model
from pipeline.models import run_models
from pipeline.records.manifest import Manifest, Origin, TokenizerRecord
from pipeline.system.errors import UserError


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A folder with a tokenizer, as a run has it."""
    folder = tmp_path_factory.mktemp("run")
    tiny.make_model(folder / "tokenizer")
    return folder


def test_the_tokenizer_is_the_one_on_record(run_dir):
    record = TokenizerRecord(source="", fingerprint="another", pad_token="", eos_token="", template="")
    with pytest.raises(UserError, match="is not the tokenizer that this run was started with; restore it"):
        run_models.tokenizer(run_dir, Manifest(name="tiny", tokenizer=record))


def test_weights_are_loaded_as_the_run_loads_them(run_dir):
    """Its precision, the commit that it has used, its attention; but flash attention needs a GPU."""
    opened = AutoTokenizer.from_pretrained(run_dir / "tokenizer")
    model = {"path": "some/base", "dtype": "bfloat16", "revision": "main", "commit": "abc"}
    for asked, expected in ((None, None), ("eager", "eager"), ("flash_attention_2", None)):
        loader = run_models.loader(Manifest(name="tiny", model=model | {"attn_implementation": asked}), opened)
        assert (loader.base, loader.dtype, loader.revision) == ("some/base", "bfloat16", "abc")
        assert loader.attn_implementation == expected
        assert (loader.pad_token_id, loader.eos_token_id) == (opened.pad_token_id, opened.eos_token_id)


def test_a_stage_that_ran_on_the_cpu_is_loaded_there():
    """A stage that was taken from another run was trained there."""
    on_cpu = tiny.make_record(config={"training.use_cpu": True})
    origin = Origin(run="../one", path="/one", name="one", stage="policy", stages={"policy": on_cpu})
    stages = {"sft": on_cpu, "taken": tiny.make_record(origin=origin), "free": tiny.make_record()}
    recorded = Manifest(name="tiny", stages=stages)
    for names in (["sft"], ["taken"], ["free", "sft"]):
        assert str(run_models.choose_device(recorded, names)) == "CPU (`use_cpu: true` in the run)"
    assert "use_cpu" not in str(run_models.choose_device(recorded, ["free"]))


@pytest.mark.parametrize(("named", "expected"), [(128, 128), (0, None), (-1, None)])
def test_positions(named, expected):
    assert base_model.num_positions(LlamaConfig(max_position_embeddings=named)) == expected
