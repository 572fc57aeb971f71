"""Sample completions from a policy, by token ids; nothing here knows of a run."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, set_seed
from transformers.generation.streamers import BaseStreamer

from pipeline.models import scoring
from pipeline.models.loading import Model
from pipeline.system.digests import hash64
from pipeline.system.random_states import random_states, set_random_states

Ids = list[int]  # token ids; a completion's end with eos unless it was cut off


@dataclass(frozen=True)
class Sampling:
    """Say how completions are drawn; temperature 0 takes the likeliest token.

    Every batch has its own random numbers, so that it does not matter which others are sampled, or by which process,
    and policies that are equal give equal completions.
    """

    temperature: float
    max_new_tokens: int
    batch_size: int
    seed: int = 0

    def config(self, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
        """Return the settings as transformers takes them; sampling is from the full distribution."""
        settings = {
            "max_new_tokens": self.max_new_tokens,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        if self.temperature == 0:
            return GenerationConfig(do_sample=False, **settings)
        return GenerationConfig(do_sample=True, temperature=self.temperature, top_k=0, top_p=1.0, **settings)


@contextlib.contextmanager
def same_random_numbers() -> Iterator[None]:
    """Leave the random number generators of python, numpy and torch as they were before the block."""
    states = random_states()
    try:
        yield
    finally:
        set_random_states(states)


class _Follower(BaseStreamer):
    """Hand on the tokens of one completion as they are drawn."""

    def __init__(self, follow: Callable[[Ids], None]):
        self._follow = follow
        self._is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, and then each token."""
        if not self._is_prompt:
            self._follow(value.flatten().tolist())
        self._is_prompt = False

    def end(self) -> None:
        """Do nothing: whoever follows gets the whole completion."""


@torch.no_grad()
def generate(
    model: Model,
    prompts: list[Ids],
    sampling: Sampling,
    tokenizer: PreTrainedTokenizerBase,
    draw: int = 0,
    follow: Callable[[Ids], None] | None = None,
) -> list[Ids]:
    """Sample one completion of each prompt, as one batch; another `draw` has other random numbers.

    `follow` gets the tokens of a single prompt's completion as they are drawn; what it raises ends the sampling.
    """
    eos = tokenizer.eos_token_id
    assert isinstance(tokenizer.pad_token_id, int), "the run's tokenizer has a padding token"
    streamer = None if follow is None else _Follower(follow)
    inputs = scoring.padded(prompts, tokenizer.pad_token_id, next(model.parameters()).device, "left")
    with same_random_numbers():
        set_seed(hash64(str([sampling.seed, draw, prompts])) % 2**32)
        # Any: `generate` is a mixin of every causal model, which the common class does not have.
        config = sampling.config(tokenizer)
        output = cast(Any, model).generate(**inputs, generation_config=config, streamer=streamer)
    rows = output[:, inputs["input_ids"].shape[1] :].tolist()
    return [row[: row.index(eos) + 1] if eos in row else row for row in rows]


def batches(prompts: list[Ids], size: int) -> Iterator[list[Ids]]:
    """Cut prompts into batches; the last one may be smaller."""
    for start in range(0, len(prompts), size):
        yield prompts[start : start + size]
