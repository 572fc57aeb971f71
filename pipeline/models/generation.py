"""Completions of a policy, sampled once and kept in the run folder: reports, evaluations and baselines share them."""

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, set_seed

from pipeline.models import scoring
from pipeline.system.digests import hash64

Ids = list[int]  # token ids; a completion's end with eos unless it was cut off


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn; temperature 0 takes the likeliest token.

    Every batch has its own random numbers, so that it does not matter which others are sampled, or by which process,
    and policies that are equal give equal completions.
    """

    temperature: float
    max_new_tokens: int
    batch_size: int
    seed: int = 0

    def config(self, tokenizer: Any) -> GenerationConfig:
        ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        if self.temperature == 0:
            return GenerationConfig(do_sample=False, max_new_tokens=self.max_new_tokens, **ids)
        ids |= {"do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": 1.0}
        return GenerationConfig(max_new_tokens=self.max_new_tokens, **ids)


@contextlib.contextmanager
def same_random_numbers() -> Iterator[None]:
    """Leave the random number generators of python, numpy and torch as they were before the block."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count()), device_type="cuda"):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@torch.no_grad()
def generate(model: Any, prompts: list[Ids], sampling: Sampling, tokenizer: Any, draw: int = 0) -> list[Ids]:
    """One completion of each prompt, as one batch."""
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    inputs = scoring.padded(prompts, pad, next(model.parameters()).device, "left")
    with same_random_numbers():
        set_seed(hash64(str([sampling.seed, draw, prompts])) % 2**32)
        output = model.generate(**inputs, generation_config=sampling.config(tokenizer))
    output = output[:, inputs["input_ids"].shape[1] :]
    return [row[: row.index(eos) + 1] if eos in row else row for row in output.tolist()]


def batches(prompts: list[Ids], size: int) -> Iterator[list[Ids]]:
    for start in range(0, len(prompts), size):
        yield prompts[start : start + size]
