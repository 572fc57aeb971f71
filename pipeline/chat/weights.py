"""Hold the policies in memory: each distinct set of full weights once, with the adapters of all stages on it."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import load_peft_weights
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from pipeline.base import base_model
from pipeline.chat import selection
from pipeline.chat.selection import Run
from pipeline.config.schema import BASE
from pipeline.export import source
from pipeline.models import ppo, run_models
from pipeline.models.loading import Model, ScoreHead, Weights, bare, load_reward, to_device
from pipeline.models.run_models import readable
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


class Models:
    """Load policies and reward models of a run as its stages do, each when it is first asked for."""

    def __init__(self, run: Run, tokenizer: PreTrainedTokenizerFast, say: Callable[[str], None]):
        self._run = run
        self._say = say
        self._loader = run_models.loader(run.recorded, tokenizer)
        self._shared: dict[str, Shared] = {}  # by the place of the full weights
        self._policies: dict[str, Policy] = {}

    def load(self, names: Sequence[str]) -> None:
        """Load what is not in memory yet, and say what lies on what.

        Raises:
            UserError: if files are not those on record, or cannot be read.
        """
        for name in names:
            if name not in self._policies:
                self._policies[name] = self._load(name)

    def policy(self, name: str) -> Policy:
        """Return a policy that was loaded."""
        return self._policies[name]

    def reward(self, name: str) -> nn.Module:
        """Load a reward model: on the weights that policies share if it is an adapter, else apart.

        Raises:
            UserError: if its files are not those on record, or cannot be read.
        """
        found = self._run.source(name)
        with source.held(found):
            source.verify(found)
            if found.adapter is not None and self._is_policy(found.full):
                shared = self._full(found.full)
                shared.owners.append(name)
                return shared.add_reward(found.adapter)
            with readable(found.full):
                self._say(f"loading {found.full}: the reward model {name}, apart from the policies")
                return to_device(load_reward(self._loader, Weights(found.full, found.adapter)))

    def accounts(self) -> list[str]:
        """Say for each set of full weights in memory who uses it."""
        lines = []
        for full, shared in self._shared.items():
            users = f"{', '.join(shared.owners)} use{'s' if len(shared.owners) == 1 else ''} it"
            lines.append(f"{full} is in memory once: {users}")
        return lines

    def _load(self, name: str) -> Policy:
        if name == BASE:
            selection.verify_base(self._run)
            shared = self._full(self._loader.base)
            shared.owners.append(name)
            return Policy(shared, NO_ADAPTER)
        found = self._run.source(name)
        with source.held(found):
            source.verify(found)
            shared = self._full(found.full)
            shared.owners.append(name)
            return Policy(shared, NO_ADAPTER if found.adapter is None else shared.add_policy(found.adapter))

    def _is_policy(self, full: str) -> bool:
        """Say whether full weights are a policy's; those of a reward model have no vocabulary head."""
        finished = [name for name in self._run.policies if name != BASE]
        return full == self._loader.base or full in {self._run.source(name).full for name in finished}

    def _full(self, full: str) -> Shared:
        """Return the full weights at a place, loaded once."""
        if full not in self._shared:
            self._say(f"loading {full}")
            with readable(full):
                self._shared[full] = Shared(to_device(self._loader.causal(full)).requires_grad_(False))
        return self._shared[full]
