"""The GGUF file of a real chat model, by the command alone: read back by transformers it says the same tokens."""

import json

import pytest
import torch
from test_chain import rlhf
from test_real import CONFIG, SHARED, model  # noqa: F401  (a fixture)

from pipeline.records import manifest
from pipeline.show import results

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real model and data, which are not part of the project"),
]
NUM_POSITIONS = 200


def test_the_gguf_file_of_smollm2_gives_the_same_likeliest_tokens(model, tmp_path):  # noqa: F811
    run_dir = tmp_path / "run"
    own = (
        "stages.sft.init=base",
        "training.bf16=false",
        "training.learning_rate=1e-3",
        "stages.sft.training.max_steps=4",
    )
    rlhf("run", CONFIG, f"model.path={model}", f"run_dir={run_dir}", *own, "--until", "sft")
    rlhf("export", run_dir, "sft", "--to", tmp_path / "policy", "--as", "gguf")
    exact = json.loads((tmp_path / "policy" / "rlhf_export.json").read_text())["figures"]["exact"]
    assert exact["positions"] >= NUM_POSITIONS
    assert exact["same_token"] == 1
    # Once more by what users are shown: the code of `rlhf status` and the code on the card.
    recorded = manifest.read(run_dir)
    stage: dict = {}
    exec(results.snippet(run_dir, recorded, recorded.stages["sft"]), stage)
    (code,) = (tmp_path / "policy" / "README.md").read_text().split("```python\n")[1:]
    exported: dict = {}
    folder = json.dumps(str(tmp_path / "policy"))
    exec(code.split("messages =")[0].replace('"policy"', folder), exported)
    rows = json.loads((SHARED / "data" / "alpaca_en_demo.json").read_text())[-6:]
    text = "\n".join(row["instruction"] + "\n" + row["output"] for row in rows)
    inputs = stage["tokenizer"](text, return_tensors="pt")
    assert inputs["input_ids"].tolist() == exported["tokenizer"](text, return_tensors="pt")["input_ids"].tolist()
    ids = inputs["input_ids"][:, : NUM_POSITIONS + 50]
    assert ids.shape[1] >= NUM_POSITIONS
    with torch.no_grad():
        ours, theirs = (loaded["model"].eval()(input_ids=ids).logits[0].float() for loaded in (exported, stage))
    assert (ours.argmax(-1) == theirs.argmax(-1)).all()
    assert (ours - theirs).abs().max() < 0.01
