"""Write the code that loads an export and uses it; it stands on the card, and is what was read back."""

from pathlib import Path

from pipeline.export.job import Job
from pipeline.show.loading_code import Loading, loading_code, quoted

QUESTION = "Why is the sea salty?"
_GENERATE = f"""
messages = [{{"role": "user", "content": "{QUESTION}"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
ids = model.generate(**inputs, max_new_tokens=64)
completion = tokenizer.decode(ids[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
print(completion)
"""
_SCORE = f"""
messages = [{{"role": "user", "content": "{QUESTION}"}}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
completion = "Rivers carry salt into it."
inputs = tokenizer(prompt + completion + tokenizer.eos_token, add_special_tokens=False, return_tensors="pt")
score = model.eval()(**inputs).logits[0, 0].item()  # compare scores of completions of one prompt
print(score)
"""
_GGUF = """from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
tokenizer = AutoTokenizer.from_pretrained({folder}, gguf_file={file})
model = AutoModelForCausalLM.from_pretrained(
    {folder}, gguf_file={file}, quantization_config=GgufConfig(dequantize=True), dtype="{dtype}"
)
model.generation_config.eos_token_id = tokenizer.eos_token_id
model.generation_config.pad_token_id = tokenizer.pad_token_id"""


def code(job: Job, folder: str) -> str:
    """Return code that defines `tokenizer`, `model` and `completion` or `score`.

    `folder` is the export's folder as its reader has it, or its id on the hub.
    """
    return loading(job, folder) + "\n" + (_SCORE if job.scores else _GENERATE).rstrip("\n")


def loading(job: Job, folder: str) -> str:
    """Return code that defines `tokenizer` and `model`."""
    if job.form == "gguf":
        return _GGUF.format(folder=quoted(folder), file=quoted(job.file), dtype=job.dtype)
    trust = job.base["trust_remote_code"]
    if job.form == "merged":
        return loading_code(Loading(folder, job.scores, trust, dtype=job.dtype))
    on_base = job.full == job.base["base"]
    return loading_code(
        Loading(
            folder,
            job.scores,
            trust,
            dtype=job.base["dtype"],
            base=job.full,
            revision=job.base["revision"] if on_base and not Path(job.full).is_dir() else None,
            quantization=job.base["quantization"] if on_base else None,
            settings=True,
        )
    )
