"""A base whose weights do not fit its config, or cannot be read, is refused before anything is trained."""

import json
import pickle
import shutil

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, DogeConfig, Mamba2Config

from pipeline.config import architecture
from pipeline.models.loading import Loader
from pipeline.system.errors import UserError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a config and its base model; copy it."""
    folder = tmp_path_factory.mktemp("weights")
    tiny.make_run(folder, {"sft": tiny.SFT})
    return folder


@pytest.fixture
def base(made, tmp_path):
    """The folder of a base model of two layers, for the config in `tmp_path`."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    tiny.edit(tmp_path / "tiny.yaml", {"run_dir": str(tmp_path / "run")})
    return tmp_path / "model"


def rename(base, new_name):
    file = base / "model.safetensors"
    save_file({new_name(name): value for name, value in load_file(file).items()}, file, metadata={"format": "pt"})


def change_config(base, **changes):
    file = base / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def as_pickle(base, content):
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(content)


def cut_off(base):
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


FAULTS = {
    "prefix": (lambda base: rename(base, lambda name: f"module.{name}"), "are missing, and would be random numbers"),
    "other model": (lambda base: change_config(base, model_type="gpt2"), "are missing, and would be random numbers"),
    "one tensor": (
        lambda base: rename(base, lambda name: name.replace("layers.1.mlp.up", "layers.1.mlp.other")),
        "model.layers.1.mlp.up_proj.weight are missing",
    ),
    "shape": (
        lambda base: change_config(base, intermediate_size=48),
        "down_proj.weight has the shape (64, 64), expected (64, 48)",
    ),
    "fewer layers": (lambda base: change_config(base, num_hidden_layers=1), "belong to layers that the model does not"),
    "more layers": (lambda base: change_config(base, num_hidden_layers=3), "model.layers.2.input_layernorm.weight"),
    "smaller embedding": (lambda base: change_config(base, vocab_size=300), "has the shape (320, 64), expected (300"),
    "none": (lambda base: (base / "model.safetensors").unlink(), "no model at 'model'"),
    "cut off": (cut_off, "model.safetensors cannot be read: "),
    "pointer": (lambda base: (base / "model.safetensors").write_bytes(POINTER), "run `git lfs pull`"),
    "empty": (lambda base: (base / "model.safetensors").write_bytes(b""), "safetensors cannot be read: "),
    "code": (lambda base: as_pickle(base, pickle.dumps(print)), "or holds code beside them, which is not run"),
    "no pickle": (lambda base: as_pickle(base, b"what is this"), "pytorch_model.bin cannot be read: "),
    "empty bin": (lambda base: as_pickle(base, b""), "pytorch_model.bin cannot be read: EOFError"),
    "page": (lambda base: as_pickle(base, b"hello world, html page"), "pytorch_model.bin cannot be read: "),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_base_that_does_not_fit_is_refused(base, cli, fault):
    break_it, words = FAULTS[fault]
    break_it(base)
    exit_code, out, err = cli("run", "tiny.yaml")
    assert exit_code == 2, out + err
    assert err.startswith("error: model.path: ") and words in err, err
    assert len(err.splitlines()) == 1
    assert not (base.parent / "run").exists()


def test_a_pickle_of_weights_is_read(base, cli):
    weights = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    torch.save(weights, base / "pytorch_model.bin")
    assert cli("plan", "tiny.yaml")[0] == 0


def test_tokens_beyond_the_embedding_that_no_run_uses(base, cli):
    """Gemma 3's smallest models have an image's token beyond their embedding."""
    add_token(base, "<image_soft_token>")
    assert cli("plan", "tiny.yaml")[0] == 0
    exit_code, _, err = cli("plan", "tiny.yaml", "tokenizer.pad_token=<image_soft_token>")
    assert exit_code == 2
    assert "1 tokens have no embedding: '<image_soft_token>' is number 320, and the embedding of 'model' has 320" in err


def test_weights_that_are_quantised_already_are_left_to_the_loading(base, cli):
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    model.save_pretrained(base)
    assert json.loads((base / "config.json").read_text())["quantization_config"]["load_in_4bit"]
    exit_code, out, err = cli("plan", "tiny.yaml")
    assert exit_code == 0, out + err


def add_token(base, content):
    file = base / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    added = {**tokenizer["added_tokens"][0], "id": len(tokenizer["model"]["vocab"]), "content": content}
    tokenizer["added_tokens"].append(added)
    file.write_text(json.dumps(tokenizer))


def test_more_tokens_than_the_embedding_has_rows(base, cli):
    add_token(base, "<new>")
    template = base / "chat_template.jinja"
    template.write_text("<new>" + template.read_text())
    exit_code, _, err = cli("plan", "tiny.yaml")
    assert exit_code == 2
    assert "1 tokens have no embedding: '<new>' is number" in err


def test_where_they_are_loaded_too(base):
    """A hub model is downloaded after the plan."""
    rename(base, lambda name: f"module.{name}")
    with pytest.raises(UserError, match="are missing, and would be random numbers"):
        Loader(str(base)).causal(str(base))
    with pytest.raises(UserError, match="are missing, and would be random numbers"):
        Loader(str(base)).score(str(base))


def test_what_published_configs_hold(base, cli, tmp_path):
    """No experts in a dense model of a family that has them, and numbers without end."""
    change_config(base, num_local_experts=0, router_limit=float("inf"))
    assert cli("plan", "tiny.yaml")[0] == 0
    for config_class in (Mamba2Config, DogeConfig):
        config_class().save_pretrained(tmp_path / "other")
        assert architecture.fault_of_file(tmp_path / "other" / "config.json") is None
