"""Load models: the run's one base, one adapter per stage, and how a stage's weights follow from its parent's.

An adapter of the parent's shape is continued; everything else first becomes a folder of full weights. So a stage
meets two kinds of parents only, a full folder or an adapter on one, and the reference is always the parent.
"""

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from accelerate import PartialState
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import load_peft_weights
from torch import nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import CausalLMOutput
from transformers.trainer_utils import set_seed

from pipeline.base.weights import quiet_loading, unfit
from pipeline.system.errors import UserError

Options = dict[str, Any]  # of LoRA, of a quantisation, of an architecture: their libraries check them
Model = PreTrainedModel | PeftModel
M = TypeVar("M", bound=nn.Module)


class ScoreHead(nn.Linear):
    """Map a hidden state to a score; weights and arithmetic are float32, whatever the model's.

    A bfloat16 weight of 0.02 has steps of 1.2e-4, so steps of an optimizer at 1e-5 would round to nothing, and a score
    of 5 would have steps of 0.03.
    """

    def __init__(self, weight: torch.Tensor):
        """`weight` has the shape (1, hidden size)."""
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")  # draws no random numbers
        self.weight = nn.Parameter(weight.detach().to(torch.float32, copy=True))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return scores of hidden states: (..., hidden size) of any precision -> (..., 1) in float32."""
        with torch.autocast(input.device.type, enabled=False):
            return functional.linear(input.float(), self.weight.float())


@dataclass(frozen=True)
class Weights:
    """Say where the weights of a model lie: in a full folder (or under a hub id), and perhaps an adapter on it."""

    full: str
    adapter: str | None = None


@dataclass(frozen=True)
class Loader:
    """Load full weights as this run does: precision, quantisation, token ids; the same in every stage.

    `base` is the run's base model, the only one that is quantised and that has a revision.
    """

    base: str
    dtype: str = "float32"
    revision: str | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    quantization: Options | None = None
    pad_token_id: int | None = None
    eos_token_id: int | None = None

    @property
    def is_rounded(self) -> bool:
        """Tell whether weights have less than the precision of float32."""
        return self.dtype != "float32" or bool(self.quantization)

    # `auto_class`: transformers' auto classes have no class in common that has `from_pretrained`.
    def _load(self, auto_class: Any, full: str, **extra: Any) -> PreTrainedModel:
        # What a stage puts out in full carries the base's own code, if it has any.
        options = extra | {"dtype": getattr(torch, self.dtype), "trust_remote_code": self.trust_remote_code}
        if full == self.base:
            options["revision"] = self.revision
            if self.quantization:
                options["quantization_config"] = BitsAndBytesConfig(**self.quantization)
                options["device_map"] = {"": PartialState().device}
        if self.attn_implementation:
            options["attn_implementation"] = self.attn_implementation
        model, info = auto_class.from_pretrained(full, output_loading_info=True, **options)
        if fault := unfit(model, info):
            raise UserError(f"{full}: its weights are not those of its config.json: {fault}")
        for module in model.modules():
            # upstream: bitsandbytes packs 4-bit weights for CPU inference at the first forward in eval mode, and never
            # unpacks them for training: whatever trains after that gets no gradient, in silence.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        model.config.pad_token_id = self.pad_token_id
        model.config.eos_token_id = self.eos_token_id
        return model

    def causal(self, full: str) -> PreTrainedModel:
        """Load a causal language model, to be sampled from as it is."""
        model = self._load(AutoModelForCausalLM, full)
        # What it was shipped with (repetition penalty, min_p) would be laid under every sampling config, and the
        # policy would not be sampled as its log-probabilities are computed.
        model.generation_config = GenerationConfig(pad_token_id=self.pad_token_id, eos_token_id=self.eos_token_id)
        return model

    def score(self, full: str) -> PreTrainedModel:
        """Load a model with one score per sequence. Its head is float32, and new where `full` is a language model."""
        with quiet_loading():  # it would report the missing head as a fault
            model = self._load(AutoModelForSequenceClassification, full, num_labels=1)
        model.score = ScoreHead(model.get_parameter("score.weight"))
        return model


def from_scratch(architecture: Options, tokenizer: PreTrainedTokenizerBase, dtype: str, seed: int) -> PreTrainedModel:
    """Make a causal language model with random weights, for this tokenizer."""
    set_seed(seed)
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "eos_token_id")}
    config = AutoConfig.for_model(**(architecture | ids | {"vocab_size": len(tokenizer), "bos_token_id": None}))
    return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))


def lora_config(options: Options, task_type: str) -> LoraConfig:
    """Make PEFT's config of a `lora:` section; a reward model's adapter keeps the score head whole."""
    return LoraConfig(**options, task_type=task_type, modules_to_save=["score"] if task_type == "SEQ_CLS" else None)


def load_policy(loader: Loader, weights: Weights, trainable: bool = False) -> Model:
    """Load a policy as some stage left it: a PeftModel where it is an adapter, else the plain model."""
    return on_base(loader.causal(weights.full), weights, trainable)


def on_base(model: PreTrainedModel, weights: Weights, trainable: bool = False) -> Model:
    """Put the adapter of `weights`, if there is one, on its full weights, which are loaded already."""
    if weights.adapter is None:
        return model
    with_adapter = PeftModel.from_pretrained(model, weights.adapter, is_trainable=trainable)
    # As saved it is relative to the adapter's folder; PEFT looks it up from the working directory.
    with_adapter.peft_config["default"].base_model_name_or_path = weights.full
    return with_adapter


def continue_policy(loader: Loader, parent: Weights, lora: Options | None, seed: int) -> Model:
    """Load the policy a stage trains: its parent, with a new adapter where the parent has none and `lora` is given."""
    set_seed(seed)
    if lora is None:
        return load_policy(loader, parent, trainable=True)
    if parent.adapter is None:
        return cast(PeftModel, get_peft_model(loader.causal(parent.full), lora_config(lora, "CAUSAL_LM")))
    model = load_policy(loader, parent, trainable=True)
    for module in model.modules():
        # The stage's own dropout, on the parent's adapter.
        if isinstance(dropouts := getattr(module, "lora_dropout", None), nn.ModuleDict):
            dropouts["default"] = nn.Dropout(lora.get("lora_dropout", 0.0))
    return model


def load_reward(loader: Loader, weights: Weights, trainable: bool = False) -> Model:
    """Load a trained reward model, head included."""
    model = on_base(loader.score(weights.full), weights, trainable)
    return model if weights.adapter else model.requires_grad_(trainable)


def new_reward(loader: Loader, parent: Weights, lora: Options | None, seed: int) -> Model:
    """Make a reward model that starts from a policy's weights, with a new score head, or from a reward model's.

    With LoRA its adapter starts from the parent's adapter, of a reward model with its head.
    """
    set_seed(seed)
    full = loader.score(parent.full)
    if lora is None:
        return full
    model = cast(PeftModel, get_peft_model(full, lora_config(lora, "SEQ_CLS")))
    if parent.adapter is not None:
        # upstream: PEFT 0.21 refuses a state without the head's key, so the parent's weights are laid over the model's.
        state = get_peft_model_state_dict(model)
        inherited = load_peft_weights(parent.adapter, device="cpu")
        foreign = inherited.keys() - state.keys()
        assert not foreign, f"the parent's adapter has weights the reward model has no place for: {sorted(foreign)[:3]}"
        set_peft_model_state_dict(model, state | inherited)
    return model


def merge(
    loader: Loader, weights: Weights, folder: Path, tokenizer: PreTrainedTokenizerBase, scores: bool = False
) -> Weights:
    """Write an adapter merged into its base as a full folder. Never done on a quantised base.

    `scores`: it is a reward model's, whose score head goes with it.
    """
    quantised = loader.quantization and weights.full == loader.base
    assert not quantised, "the config refuses merging into quantised weights"
    model = load_reward(loader, weights) if scores else load_policy(loader, weights)
    assert isinstance(model, PeftModel), "only an adapter is merged"
    model.merge_and_unload().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Weights(str(folder))


def float32_logits(model: Model) -> None:
    """Let a policy give its logits in float32, so that log-probabilities are computed in it, whatever the weights are.

    The sum of a completion's log-probabilities is hundreds of nats, where bfloat16 has steps of one nat.

    Trainers ask for the logits of the last positions alone. The output layer gets a copy of their hidden states: for a
    slice it takes ten times as long on a CPU.
    """
    bare(model).register_forward_hook(_logits_to_float32)
    outputs = cast(PreTrainedModel, bare(model)).get_output_embeddings()
    if outputs is not None:
        outputs.register_forward_pre_hook(_in_one_piece)


def _in_one_piece(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(states.contiguous() for states in args)


def _logits_to_float32(_: nn.Module, __: object, output: CausalLMOutput) -> CausalLMOutput:
    logits = getattr(output, "logits", None)
    if logits is not None:  # trainers of TRL 1.16 ask for log-probabilities instead, which are float32
        output.logits = logits.float()
    return output


def bare(model: nn.Module) -> nn.Module:
    """Return the language model without PEFT around it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def can_leave_out_logits(model: nn.Module) -> bool:
    """Tell whether a policy can compute the logits of its last positions alone (`logits_to_keep`)."""
    return "logits_to_keep" in inspect.signature(bare(model).forward).parameters


@contextlib.contextmanager
def precision_kept(model: Model) -> Iterator[None]:
    """Keep the precision of what trains on a quantised base while a trainer is made of the model."""
    # upstream: TRL casts it to bfloat16, rounded, where small steps of the optimizer are lost; and TRL does not cast
    # the reference's copy of it, so that policy and reference would differ from the first step.
    saved = {}
    if is_quantised(model):
        saved = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    yield
    for name, parameter in model.named_parameters():
        if name in saved:
            parameter.data = saved[name].to(parameter.device)


def to_device(model: M) -> M:
    """Put a model in eval mode and on this process's device, where a quantised one is already; return it."""
    if not is_quantised(model):
        model.to(PartialState().device)
    return model.eval()


def is_quantised(model: nn.Module) -> bool:
    """Tell whether a model's weights are packed; PEFT's models hand on what transformers sets on them."""
    return getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)


def num_parameters(*models: nn.Module) -> dict[str, int]:
    """Count trainable and total parameters; what models share counts once, 4-bit weights (two packed to a byte) as two.

    PEFT counts those of one model only, and what views of one backbone share would count several times.
    """
    unique = {id(parameter): parameter for model in models for parameter in model.parameters()}
    trainable = 0
    total = 0
    for parameter in unique.values():
        count = parameter.numel() * (2 if type(parameter).__name__ == "Params4bit" else 1)
        total += count
        if parameter.requires_grad:
            trainable += count
    return {"trainable": trainable, "total": total}
