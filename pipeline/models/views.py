"""Show one backbone as PPO's four models: policy, reference, reward model and value model.

The backbone is one PeftModel with an adapter for each role. A view is a small module that makes its role's adapter
active around a forward pass and holds nothing but its own score head; the backbone is not a submodule of a view, so
no parameter is in the optimizer or in DDP twice. The policy is the PeftModel itself, its adapter being the one at rest.

Three traps are met here. `set_adapter` of PEFT flips `requires_grad`, so adapters are switched without it. Under
gradient checkpointing the backward pass computes layers again, and must see the adapter of the first time. And
PPOTrainer asks for all hidden states but reads the last, so a view returns that one only.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput, SequenceClassifierOutput

# The roles' adapters; TRL and PEFT know the policy's by this name.
POLICY = "default"
REFERENCE = "ref"
REWARD = "reward"
VALUE = "value"


class Backbone:
    """Switch the active adapter of one PeftModel without touching what trains."""

    def __init__(self, model: PeftModel):
        self.model = model
        self.active = POLICY
        self.find_layers()

    def find_layers(self) -> None:
        """Note which layers have adapters; to be called again when an adapter was added, which may have others."""
        self._layers = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]

    def _activate(self, adapter: str) -> None:
        for layer in self._layers:
            # upstream: BaseTunerLayer.set_adapter, which TRL's `use_adapter` calls too, does this and also sets
            # `requires_grad` of all adapters.
            layer._active_adapter = [adapter]
        self.active = adapter

    @contextlib.contextmanager
    def using(self, adapter: str) -> Iterator[None]:
        """Run what is inside with another adapter."""
        before = self.active
        self._activate(adapter)
        try:
            yield
        finally:
            self._activate(before)

    def hidden_states(self, adapter: str, **inputs: Any) -> torch.Tensor:
        """Return the last hidden state, shape (batch, length, hidden), after the final norm."""
        transformer = cast(PreTrainedModel, self.model.get_base_model()).base_model
        with self.using(adapter):
            # `output_hidden_states` would keep every layer's; the last one is `last_hidden_state` already.
            return transformer(**(inputs | {"output_hidden_states": False})).last_hidden_state

    def _checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Return the contexts of a layer's forward pass and of its recomputation."""
        return contextlib.nullcontext(), self.using(self.active)

    def keep_adapter_in_recomputation(self) -> None:
        """Make gradient checkpointing, whoever enables it, recompute a layer with the adapter it ran with."""
        base = cast(PreTrainedModel, self.model.get_base_model())
        enable: Callable[..., None] = base.gradient_checkpointing_enable

        def enable_with_contexts(gradient_checkpointing_kwargs: dict[str, Any] | None = None, **_: object) -> None:
            options = {"use_reentrant": False, "context_fn": self._checkpoint_contexts}
            enable(gradient_checkpointing_kwargs=(gradient_checkpointing_kwargs or {}) | options)

        # upstream: trainers call this method with the user's options; there is no other place for `context_fn`.
        base.gradient_checkpointing_enable = enable_with_contexts


class _Hidden(nn.Module):
    """Run the backbone under one adapter, in the form PPOTrainer calls a score model's transformer."""

    def __init__(self, backbone: Backbone, adapter: str):
        super().__init__()
        self._forward = partial(backbone.hidden_states, adapter)  # a closure: the backbone is no submodule

    def forward(self, **inputs: Any) -> BaseModelOutput:
        return BaseModelOutput(hidden_states=(self._forward(**inputs),))


class ScoreView(nn.Module):
    """Be the reward model or the value model: an adapter of the backbone, and this view's own score head.

    PPOTrainer finds the transformer through `base_model_prefix` and applies `score` to its hidden states.
    """

    base_model_prefix = "transformer"

    def __init__(self, backbone: Backbone, adapter: str, score: nn.Linear, trainable: bool):
        super().__init__()
        self.transformer = _Hidden(backbone, adapter)
        self.score = score.requires_grad_(trainable)

    def forward(self, attention_mask: torch.Tensor, **inputs: Any) -> SequenceClassifierOutput:
        """Return one score per sequence, read at its last token: `logits` of shape (batch, 1)."""
        hidden = self.transformer(attention_mask=attention_mask, **inputs).hidden_states[-1]
        last = attention_mask.shape[1] - 1 - attention_mask.flip(1).long().argmax(1)
        return SequenceClassifierOutput(logits=self.score(hidden[torch.arange(len(last), device=last.device), last]))


class ReferenceView(nn.Module):
    """Be the reference policy: the frozen copy of the parent's adapter."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self._backbone = (backbone,)  # in a tuple, so that it is no submodule

    def forward(self, **inputs: Any) -> CausalLMOutput:
        (backbone,) = self._backbone
        with backbone.using(REFERENCE):
            return backbone.model(**(inputs | {"output_hidden_states": False}))
