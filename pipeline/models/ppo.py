"""Build PPO's four models: policy, reference, reward model and value model.

With adapters on one base they are views of one backbone; otherwise they are separate models. The value model starts
from the reward model in both.
"""

from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from peft.utils import load_peft_weights
from torch import nn

from pipeline.models.loading import Loader, Model, ScoreHead, Weights, float32_logits, load_policy, load_reward
from pipeline.models.views import POLICY, REFERENCE, REWARD, VALUE, Backbone, ReferenceView, ScoreView


@dataclass(frozen=True)
class Models:
    """Hold PPO's four models, in the form PPOTrainer takes them."""

    policy: Model
    reference: Model | ReferenceView
    reward: Model | ScoreView
    value: Model | ScoreView


def shared_models(policy: PeftModel, reward: Weights) -> Models:
    """Build the four models as views of one backbone, the policy's."""
    assert reward.adapter is not None, "a reward model in full has a backbone of its own"
    _add_copy(policy, POLICY, REFERENCE)
    adapter = read_reward_adapter(reward.adapter)
    head = adapter.head
    for role in (REWARD, VALUE):
        policy.add_adapter(role, adapter.config)
        fill_reward_adapter(policy, role, adapter)
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(f".{POLICY}." in name or f".{VALUE}." in name)
    backbone = Backbone(policy)
    backbone.keep_adapter_in_recomputation()
    return Models(
        policy=policy,
        reference=ReferenceView(backbone),
        reward=ScoreView(backbone, REWARD, ScoreHead(head.to(policy.device)), trainable=False),
        value=ScoreView(backbone, VALUE, ScoreHead(head.to(policy.device)), trainable=True),
    )


@dataclass(frozen=True)
class RewardAdapter:
    """Hold a reward model's adapter as one of a language model: its options, its weights, and apart the score head."""

    config: LoraConfig
    state: dict[str, torch.Tensor]
    head: torch.Tensor


def read_reward_adapter(folder: str) -> RewardAdapter:
    """Read a reward model's adapter, to be put on a backbone that policies share."""
    state = load_peft_weights(folder, device="cpu")
    (head_name,) = (name for name in state if name.endswith(".score.weight"))
    head = state.pop(head_name)
    config = LoraConfig.from_pretrained(folder)
    assert isinstance(config, LoraConfig)
    config.task_type = "CAUSAL_LM"
    config.modules_to_save = None
    config.inference_mode = False
    return RewardAdapter(config, state, head)


def fill_reward_adapter(model: PeftModel, name: str, adapter: RewardAdapter) -> None:
    """Give the adapter `name`, which was made with the reward adapter's options, its weights."""
    result = set_peft_model_state_dict(model, adapter.state, adapter_name=name)
    assert not result.unexpected_keys, f"the reward adapter does not fit the backbone: {result.unexpected_keys[:3]}"


def _add_copy(model: PeftModel, adapter: str, copy: str) -> None:
    """Add a copy of an adapter under another name."""
    model.add_adapter(copy, model.peft_config[adapter])
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if f".{adapter}." in name:
            parameters[name.replace(f".{adapter}.", f".{copy}.")].data.copy_(parameter.data)


def separate_models(loader: Loader, policy: Model, parent: Weights, reward: Weights) -> Models:
    """Build the four models one by one, as full fine-tuning and reward models on another base need them."""
    reference = load_policy(loader, parent).requires_grad_(False)
    float32_logits(reference)
    return Models(
        policy=policy,
        reference=reference,
        reward=load_reward(loader, reward).requires_grad_(False),
        value=load_reward(loader, reward, trainable=True),
    )


def start_from_zero(value: nn.Module) -> None:
    """Let the value model foretell 0 everywhere before training, as PPO with a baseline needs it.

    The value model starts from the reward model, with whatever level the reward model has learnt for a prompt. But it
    foretells the score less b(x), whose mean is about 0 for every prompt: with the reward model's head it would start
    wrong by that level.
    """
    head = value.get_submodule("score")
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
