"""Load the policies and reward models of a run, to be talked to."""

from collections.abc import Callable, Sequence

from torch import nn
from transformers import PreTrainedTokenizerFast

from pipeline.chat import selection
from pipeline.chat.selection import Run
from pipeline.config.schema import BASE
from pipeline.export import source
from pipeline.models import run_models
from pipeline.models.loading import Weights, load_reward, to_device
from pipeline.models.run_models import readable
from pipeline.models.shared import Policy, Shared


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
            return shared.policy(Weights(self._loader.base))
        found = self._run.source(name)
        with source.held(found):
            source.verify(found)
            shared = self._full(found.full)
            shared.owners.append(name)
            return shared.policy(Weights(found.full, found.adapter))

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
