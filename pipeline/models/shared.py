"""Hold policies in memory: each distinct set of full weights once, with the adapters of several stages on it."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import load_peft_weights
from transformers import PreTrainedConfig, PreTrainedModel

from pipeline.base import base_model
from pipeline.models import ppo
from pipeline.models.loading import Model, ScoreHead, Weights, bare
from pipeline.models.views import Backbone, ScoreView

NO_ADAPTER = "none"  # no adapter has this name: under it the full weights answer alone


class Shared:
    """Full weights, in memory once, and the adapters of all stages that lie on them."""

    def __init__(self, model: PreTrainedModel):
        self.model: Model = model
        self.owners: list[str] = []  # the stages that use the weights
        self._backbone: Backbone | None = None
        self._count = 0

    @property
    def positions(self) -> int | None:
        """Return how many positions the model has; None if it names no limit."""
        config = bare(self.model).config
        assert isinstance(config, PreTrainedConfig)
        return base_model.num_positions(config)

    @contextlib.contextmanager
    def using(self, adapter: str) -> Iterator[Model]:
        """Run what is inside with an adapter, or with `NO_ADAPTER`. Such blocks may lie in one another."""
        if self._backbone is None:
            yield self.model
        else:
            with self._backbone.using(adapter):
                yield self.model

    def policy(self, weights: Weights) -> "Policy":
        """Return the policy of these weights, whose full weights these are; load its adapter, if it has one."""
        return Policy(self, NO_ADAPTER if weights.adapter is None else self.add_policy(weights.adapter))

    def add_policy(self, folder: str) -> str:
        """Load a policy's adapter; return its name in this model."""
        name = self._new_name()
        if isinstance(self.model, PeftModel):
            self.model.load_adapter(folder, name)
        else:
            self.model = PeftModel.from_pretrained(self.model, folder, adapter_name=name)
        self._note()
        _assert_loaded(self.model, name, load_peft_weights(folder, device="cpu"))
        return name

    def add_reward(self, folder: str) -> ScoreView:
        """Load a reward model's adapter and its score head."""
        name = self._new_name()
        adapter = ppo.read_reward_adapter(folder)
        if isinstance(self.model, PeftModel):
            self.model.add_adapter(name, adapter.config)
        else:
            self.model = cast(PeftModel, get_peft_model(self.model, adapter.config, adapter_name=name))
        ppo.fill_reward_adapter(self.model, name, adapter)
        backbone = self._note()
        _assert_loaded(self.model, name, adapter.state)
        head = ScoreHead(adapter.head.to(next(self.model.parameters()).device))
        return ScoreView(backbone, name, head, trainable=False).eval()

    def _new_name(self) -> str:
        self._count += 1
        return f"stage{self._count:04d}"  # stages' own names may have dots, which no module of torch may have

    def _note(self) -> Backbone:
        """Make the model ready after an adapter was added."""
        assert isinstance(self.model, PeftModel)
        self.model.eval().requires_grad_(False)
        if self._backbone is None:
            self._backbone = Backbone(self.model)
        self._backbone.find_layers()
        return self._backbone


def _assert_loaded(model: PeftModel, name: str, files: dict[str, torch.Tensor]) -> None:
    """Compare an adapter in memory with its file, whose checksum is that of its stage."""
    kept = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    assert kept, f"adapter {name} has no weights in memory"
    for key, value in kept.items():
        assert torch.equal(value.cpu().to(files[key].dtype), files[key]), f"adapter {name}: {key} is not its file's"


@dataclass(frozen=True)
class Policy:
    """A policy: weights that others may share, and its adapter among those on them."""

    shared: Shared
    adapter: str

    def active(self) -> contextlib.AbstractContextManager[Model]:
        """Let the shared model be this policy inside the block."""
        return self.shared.using(self.adapter)

    def __call__(self, **inputs: Any) -> Any:
        """Return what the model gives out as this policy."""
        with self.active() as model:
            return model(**inputs)
