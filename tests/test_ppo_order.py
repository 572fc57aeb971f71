"""PPOTrainer calls its parts in the order that `rl/centred_reward.py` lists and relies on."""

import tiny
import torch
from trl.experimental.ppo import ppo_trainer
from trl.experimental.utils import get_reward

from pipeline import stage
from pipeline.config.load import load
from pipeline.rl import centred_reward
from pipeline.rl.centred_reward import ORDER, CentredReward


def test_an_update_of_ppo_is_in_the_order_that_we_rely_on(tmp_path, monkeypatch):
    """Two updates of two chunks and two optimizer steps each; what is scored is whose turn the rollout says it is."""
    calls: list[str] = []
    gradients: list[bool] = []
    rows_per_call: list[int] = []

    def record_reward(model, sequences, pad, start):
        calls.append("reward" if isinstance(model, CentredReward) else "value")
        gradients.append(torch.is_grad_enabled())
        rows_per_call.append(len(sequences))
        return get_reward(model, sequences, pad, start)

    plain_forward = ppo_trainer.forward

    def record_forward(model, ids, pad):
        calls.append("train" if torch.is_grad_enabled() else "reference")
        return plain_forward(model, ids, pad)

    def recording(original, name):
        def call(self, batch):
            calls.append(name)
            return original(self, batch)

        return call

    rollout = centred_reward.Rollout
    monkeypatch.setattr(rollout, "see", recording(rollout.see, "batch"))
    monkeypatch.setattr(rollout, "forget", recording(rollout.forget, "eval batch"))
    observe = CentredReward.observe
    monkeypatch.setattr(CentredReward, "observe", lambda self: (calls.append("log"), observe(self))[1])
    monkeypatch.setattr(ppo_trainer, "get_reward", record_reward)
    monkeypatch.setattr(ppo_trainer, "forward", record_forward)

    training = tiny.PPO["training"] | {
        "total_episodes": 16,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "local_rollout_forward_batch_size": 4,
        "num_ppo_epochs": 1,
        "num_mini_batches": 1,
        "num_sample_generations": 2,
    }
    stages = {"sft": tiny.SFT, "reward": tiny.REWARD, "ppo": tiny.PPO | {"training": training}}
    config = load(tiny.make_run(tmp_path, stages))
    for name in stages:
        stage.run(config, name)
    assert tuple(calls) == ORDER * 2
    assert not any(gradients)
    assert set(rows_per_call[:4]) == {4}
