"""PPO on GRPOTrainer gives PPOTrainer's figures on equal rollouts: of tokens, of micro-batches, and in its log."""

import json
import re
import sys
from collections import defaultdict
from types import SimpleNamespace

import by_hand
import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from trl.experimental.ppo import PPOTrainer, ppo_trainer

from pipeline import stage
from pipeline.config.load import load
from pipeline.data import run_tokenizer
from pipeline.records import manifest
from pipeline.rl import critic_rollout, critic_trainer
from pipeline.rl.critic_trainer import CriticTrainer
from pipeline.training import rollouts

# Prompts of several lengths; the first one twice.
TASKS = [
    {"prompt": f"What {'on earth ' * (i % 3)}of {t}?", "completion": f"{t}."} for i, t in enumerate(tiny.TOPICS[:11])
]
TASKS += [{"prompt": TASKS[0]["prompt"], "completion": "Something else."}]
TRAINING = {"total_episodes": 24, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
TRAINING |= {"num_ppo_epochs": 2, "num_mini_batches": 1, "response_length": 6, "temperature": 0.9}
TRAINING |= {"local_rollout_forward_batch_size": 4, "learning_rate": 1e-3, "missing_eos_penalty": 3.0}
# One micro-batch makes a step, so that there are two in a pass.
STEPS = TRAINING | {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "num_mini_batches": 2}
EOS_BEHIND_PADDING = "eos behind padding"
CASES = {
    "plain": {},
    "sft mean": {"prompt_baseline": "sft_mean", "added_shift": 2.0},
    "greedy": {"prompt_baseline": "greedy"},
    "reference": {"prompt_baseline": "reference"},
    "leave one out": {"prompt_baseline": "leave_one_out", "added_shift": 2.0},
    "many mini-batches": {"training": STEPS},
    "clipped gradients": {"training": STEPS | {"max_grad_norm": 0.01}},
    "one pass, k3": {"training": TRAINING | {"num_ppo_epochs": 1, "kl_estimator": "k3", "kl_coef": 0.5}},
    "discounted": {"training": TRAINING | {"gamma": 0.9, "lam": 0.7, "missing_eos_penalty": None}},
    "whitened rewards": {"training": TRAINING | {"whiten_rewards": True}},
    EOS_BEHIND_PADDING: {},
    "narrow clips": {"training": TRAINING | {"cliprange": 1e-3, "cliprange_value": 1e-3, "vf_coef": 0.7}},
}
PPO = {"type": "ppo", "data": "tasks", "training": TRAINING}
OF_TOKENS = ("rewards", "advantages", "returns", "values", "log_probs", "real", "valued")
OF_LOSSES = ("pg_loss", "vf_loss", "loss")
OF_MICRO_BATCHES = (*OF_LOSSES, "entropy")
OWN_LOGS = {"eps"}  # episodes per second
TRAINER_LOGS = {"loss", "grad_norm", "learning_rate", "step_time"}


def slug(case):
    return re.sub(r"\W+", "-", case)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose policy ends some of its completions, and pads some."""
    stages = {"sft": tiny.SFT, "reward": tiny.REWARD}
    for name, options in CASES.items():
        spec = PPO | options
        stages |= {f"{slug(name)}-ppo": spec, f"{slug(name)}-grpo": spec | {"trainer": "grpo"}}
    return by_hand.make(tmp_path_factory.mktemp("critic"), stages, {"tasks": TASKS}, varied=True)


def history(run, name):
    return json.loads((run.run_dir / name / "log_history.json").read_text())


def seen_of_ppotrainer(monkeypatch):
    """What PPOTrainer's loop has in its local variables, where it calls functions that take them."""
    seen = SimpleNamespace(prompts=[], responses=[], tokens=defaultdict(list), micro=defaultdict(list), gradients={})
    whiten, backward = ppo_trainer.masked_whiten, None

    def whitened(values, mask, shift_mean=True):
        result = whiten(values, mask, shift_mean)
        local = sys._getframe(1).f_locals
        if not shift_mean:
            return result
        seen.prompts += [
            [i for i in row if i != local["processing_class"].pad_token_id] for row in local["queries"].tolist()
        ]
        seen.responses.append(local["responses"].clone())
        found = {
            "rewards": local["rewards"],
            "advantages": result.masked_fill(~mask, 0),
            "returns": local["returns"],
            "values": local["values"],
            "log_probs": local["logprobs"],
            "real": ~local["padding_mask"],
            "valued": ~local["padding_mask_p1"],
        }
        for key, value in found.items():
            seen.tokens[key].append(value.clone())
        return result

    init = PPOTrainer.__init__

    def watched(self, *args, **options):
        nonlocal backward
        init(self, *args, **options)
        backward = self.accelerator.backward

        def look(loss, **kwargs):
            local = sys._getframe(1).f_locals
            for key in OF_LOSSES:
                seen.micro[key].append(local[key].item())
            seen.micro["entropy"].append(entropy_of_tokens(local))
            backward(loss, **kwargs)
            if len(seen.micro["loss"]) == self.args.gradient_accumulation_steps:
                seen.gradients |= gradients_of_policy(self.model)

        monkeypatch.setattr(self.accelerator, "backward", look)

    monkeypatch.setattr(ppo_trainer, "masked_whiten", whitened)
    monkeypatch.setattr(PPOTrainer, "__init__", watched)
    return seen


def sample_eos_behind_padding(monkeypatch, tokenizer):
    """The first completion of a chunk goes on behind a padding token, and ends then."""
    sample = rollouts._sample_chunk

    def sampled(*args):
        width = TRAINING["response_length"]
        ids, log_probs = (torch.nn.functional.pad(x, (0, width - x.shape[1])) for x in sample(*args))
        ids[0, 1:] = tokenizer.pad_token_id
        ids[0, 3] = tokenizer.eos_token_id
        return ids, log_probs

    monkeypatch.setattr(rollouts, "_sample_chunk", sampled)


def entropy_of_tokens(local):
    """The mean entropy of a micro-batch's tokens in nats, from the variables of PPOTrainer's loop."""
    log_probs = local["logits"].detach().log_softmax(-1)
    real = ~local["padding_mask"][local["micro_batch_inds"]][:, : log_probs.shape[1]]
    return -(log_probs.exp() * log_probs).sum(-1)[real].mean().item()


def gradients_of_policy(model):
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and name.startswith("policy.")
    }


def seen_of_ours(monkeypatch, given):
    """What PPO on GRPOTrainer computes from the prompts and completions that PPOTrainer had."""
    seen = SimpleNamespace(tokens=defaultdict(list), micro=defaultdict(list), losses=[], gradients={})
    rows = [
        (prompt, ids.tolist()) for prompt, ids in zip(given.prompts, torch.cat(pad_all(given.responses)), strict=True)
    ]
    drawn = iter(rows)

    def sampled(model, prompts, sampling, tokenizer, draw=0):
        found = [next(drawn) for _ in prompts]
        assert [prompt for prompt, _ in found] == prompts
        eos = tokenizer.eos_token_id
        return [ids[: ids.index(eos) + 1] if eos in ids else ids for _, ids in found]

    def in_order(prompts, num_updates, batch, seed):
        group = len(given.prompts) // (num_updates * batch)
        by_ids = {tuple(ids): number for number, ids in enumerate(prompts["input_ids"][:])}
        return prompts.select([by_ids[tuple(prompt)] for prompt in given.prompts[::group]])

    rewards, make, close = critic_rollout.token_rewards, critic_rollout.Rollouts.make, CriticTrainer._close

    def given_rewards(*args):
        result = rewards(*args)
        seen.tokens["rewards"].append(result.rewards.clone())
        return result

    def made(self, *args):
        rollout, stats = make(self, *args)
        for key in OF_TOKENS[1:]:
            seen.tokens[key].append(getattr(rollout, key).clone())
        return rollout, stats

    def closed(self, stats):
        of_policy, of_value = (torch.cat(self._of_groups[f"loss/{of}_avg"]) for of in ("policy", "value"))
        seen.micro["pg_loss"] += of_policy.tolist()
        seen.micro["vf_loss"] += of_value.tolist()
        seen.micro["loss"] += (of_policy + self.args.vf_coef * of_value).tolist()
        seen.micro["entropy"] += torch.cat(self._of_groups["policy/entropy_avg"]).tolist()
        close(self, stats)

    def accumulated(self, model, batches):
        loss = accumulate(self, model, batches)
        seen.losses.append(loss.item())
        if len(seen.losses) == 1:
            seen.gradients |= gradients_of_policy(self.model)
        return loss

    accumulate = CriticTrainer._accumulate
    monkeypatch.setattr(CriticTrainer, "_accumulate", accumulated)
    monkeypatch.setattr(critic_rollout, "generate", sampled)
    monkeypatch.setattr(critic_trainer, "in_order_of_training", in_order)
    monkeypatch.setattr(critic_rollout, "token_rewards", given_rewards)
    monkeypatch.setattr(critic_rollout.Rollouts, "make", made)
    monkeypatch.setattr(CriticTrainer, "_close", closed)
    return seen


def pad_all(tensors):
    width = max(tensor.shape[1] for tensor in tensors)
    return [torch.nn.functional.pad(tensor, (0, width - tensor.shape[1])) for tensor in tensors]


def same_orders(monkeypatch):
    """Both go through a rollout in the same orders."""
    generator = np.random.default_rng(5)
    monkeypatch.setattr(np.random, "permutation", generator.permutation)


@pytest.mark.parametrize("case", CASES)
def test_figures_are_those_of_ppotrainer(run, monkeypatch, case):
    """On three updates with the same completions, at 1e-5; the trained weights are near one another too."""
    with monkeypatch.context() as patch:
        given = seen_of_ppotrainer(patch)
        same_orders(patch)
        if case == EOS_BEHIND_PADDING:
            sample_eos_behind_padding(patch, run_tokenizer.open_saved(run.run_dir / "tokenizer"))
        stage.run(load(run.config), f"{slug(case)}-ppo")
    with monkeypatch.context() as patch:
        seen = seen_of_ours(patch, given)
        same_orders(patch)
        stage.run(load(run.config), f"{slug(case)}-grpo")
    assert len(given.responses) == 3
    for key in OF_TOKENS:
        assert len(seen.tokens[key]) == 3
        for expected, found in zip(given.tokens[key], seen.tokens[key], strict=True):
            torch.testing.assert_close(
                found, expected, rtol=1e-5, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
            )
    for key in OF_MICRO_BATCHES:
        assert len(given.micro[key]) >= 3 * (1 if "one pass" in case else 2)
        assert seen.micro[key] == pytest.approx(given.micro[key], rel=1e-5, abs=1e-5)
    # What goes into the backward pass: of a step, the mean over its micro-batches.
    steps = np.reshape(given.micro["loss"], (len(seen.losses), -1)).mean(1)
    assert seen.losses == pytest.approx(steps.tolist(), rel=1e-5, abs=1e-5)
    assert len(given.gradients) > 8 and given.gradients.keys() == seen.gradients.keys()
    for name, expected in given.gradients.items():
        torch.testing.assert_close(seen.gradients[name], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    lengths = torch.cat([mask.sum(1) for mask in given.tokens["real"]])
    assert len(set(lengths.tolist())) > 1
    records = manifest.read(run.run_dir).stages
    plain, ours = records[f"{slug(case)}-ppo"].metrics, records[f"{slug(case)}-grpo"].metrics
    assert ours.pop("alarms") == plain.pop("alarms")
    assert ours == pytest.approx(plain, rel=1e-4, abs=1e-4)
    logs = [history(run, f"{slug(case)}-{trainer}") for trainer in ("ppo", "grpo")]
    entries = [[entry for entry in log if "objective/kl" in entry] for log in logs]
    # PPOTrainer's entropy is of padding too. And it counts an eos that it samples behind padding.
    other = OWN_LOGS | {"policy/entropy_avg"} | ({"val/num_eos_tokens"} if case == EOS_BEHIND_PADDING else set())
    for expected, found in zip(*entries, strict=True):
        assert expected.keys() - found.keys() == OWN_LOGS
        assert found.keys() - expected.keys() == TRAINER_LOGS
        assert {key: found[key] for key in expected if key not in other} == pytest.approx(
            {key: value for key, value in expected.items() if key not in other}, rel=1e-4, abs=1e-4
        )
    weights = [
        load_file(run.run_dir / f"{slug(case)}-{t}" / "output" / "adapter_model.safetensors") for t in ("ppo", "grpo")
    ]
    assert weights[0].keys() == weights[1].keys()
    for key, expected in weights[0].items():
        torch.testing.assert_close(weights[1][key], expected, rtol=1e-3, atol=2e-4)
