"""PPO's memory does not grow with its batch, sampling ends when all completions have, and gradients are clipped."""

import contextlib
import copy
import json
import math

import by_hand
import pytest
import tiny
import torch
from storages import Storages
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, LlamaModel
from trl.experimental.ppo import PPOTrainer, ppo_trainer

from pipeline import stage
from pipeline.config.load import load
from pipeline.models.loading import float32_logits
from pipeline.records import manifest
from pipeline.rl.critic_trainer import CriticTrainer
from pipeline.training import rollouts, trainers
from pipeline.training.rollouts import LogProbs, lean

EOS, PAD, VOCABULARY = 2, 0, 11


@pytest.fixture(scope="module")
def model():
    """A model that ends about every fifth token."""
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    made = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes)).eval()
    made.generation_config = GenerationConfig()
    return made


def sampled(model, size: int, length: int):
    """What PPOTrainer samples by itself and what it samples when it is lean, from the same random numbers."""
    queries = torch.tensor([[PAD, 5, 6], [4, 5, 6], [PAD, PAD, 9], [7, 7, 8], [3, 4, 3]])
    config = GenerationConfig(max_new_tokens=length, temperature=0.7 + 1e-7, top_k=0, top_p=1.0, do_sample=True)
    found = []
    for context in (None, lean(ppo_trainer, [], EOS)):
        torch.manual_seed(7)
        if context is None:
            ids, logits = ppo_trainer.batch_generation(model, queries, size, PAD, copy.copy(config))
            log_probs = ppo_trainer.selective_log_softmax(logits, ids[:, 3:])
        else:
            with context:
                ids, values = ppo_trainer.batch_generation(model, queries, size, PAD, copy.copy(config))
                assert isinstance(values, LogProbs)
                parts = [values[start : start + size] for start in range(0, len(queries), size)]
                log_probs = torch.cat([ppo_trainer.selective_log_softmax(part, ids[:, 3:]) for part in parts])
        found.append((ids[:, 3:], log_probs, torch.random.get_rng_state()))
    return found


@pytest.mark.parametrize("size", [1, 2, 5, 64])
def test_completions_and_log_probs_are_those_of_ppotrainer(model, size):
    (plain, expected, state), (ids, log_probs, own_state) = sampled(model, size, 40)
    assert torch.equal(state, own_state)
    ended = 0
    for row in range(len(plain)):
        tokens = plain[row].tolist()
        length = tokens.index(EOS) + 1 if EOS in tokens else len(tokens)
        ended += EOS in tokens
        assert ids[row, :length].tolist() == tokens[:length]
        assert set(ids[row, length:].tolist()) <= {PAD}
        torch.testing.assert_close(log_probs[row, :length], expected[row, :length])
    assert ended == len(plain)
    longest = max(row.tolist().index(EOS) + 1 for row in plain)
    assert ids.shape[1] == longest + 1 < 40


def test_completions_that_do_not_end(model):
    (plain, expected, _), (ids, log_probs, _) = sampled(model, 2, 2)
    assert ids.shape == plain.shape == (5, 2)
    kept = ids != PAD
    assert torch.equal(ids[kept], plain[kept])
    torch.testing.assert_close(log_probs[kept], expected[kept])


def run(folder, *names, vocabulary=None, lora=tiny.LORA, trainer="ppo", longest=1, ends=False, **options):
    folder.mkdir(exist_ok=True)
    ppo = tiny.PPO | {"training": tiny.PPO["training"] | options, "lora": lora, "trainer": trainer}
    stages = {"sft": tiny.SFT, "reward": tiny.REWARD, "ppo": ppo}
    path = tiny.make_run(folder, stages, gate="off")
    tiny.make_model(folder / "model", vocabulary=vocabulary)
    if ends:
        by_hand.make_eos_likely(folder / "model")
    rows = [
        {"prompt": f"Tell me of {number}." + " Please." * (number % longest), "completion": "It is good."}
        for number in range(10, 90)
    ]
    tiny.write_rows(folder / "demonstrations.jsonl", rows)
    config = load(path)
    for name in names:
        stage.run(config, name)
    return manifest.read(config.run_path).stages


VOCABULARY_SIZE = 50_000


@pytest.fixture
def counted(monkeypatch):
    """`counted(folder, trainer, **options)`: a ppo stage of one update, and the storages that its training made."""

    def run_one(folder, trainer: str, **options) -> Storages:
        count = Storages()
        trainer_class = {"ppo": PPOTrainer, "grpo": CriticTrainer}[trainer]
        train = trainer_class.train

        def counted_train(self, **given):
            with count:
                train(self, **given)

        with monkeypatch.context() as patch:
            patch.setattr(trainer_class, "train", counted_train)
            run(folder, "ppo", vocabulary=VOCABULARY_SIZE, trainer=trainer, num_ppo_epochs=1, **options)
        return count

    return run_one


@pytest.mark.parametrize("trainer", ["ppo", "grpo"])
def test_memory_does_not_grow_with_the_batch(tmp_path, counted, trainer):
    """Beyond the figures of the rollout's own tokens: no logits of a rollout are ever alive."""
    run(tmp_path, "sft", "reward", vocabulary=VOCABULARY_SIZE)
    small, large = (
        counted(
            tmp_path,
            trainer,
            total_episodes=4 * accumulation,
            gradient_accumulation_steps=accumulation,
            local_rollout_forward_batch_size=4,
        )
        for accumulation in (4, 16)
    )
    tokens = (64 - 16) * (64 + 12)  # the longest prompts have fewer than 64
    assert large.largest == small.largest == VOCABULARY_SIZE * 64 * 4  # the embeddings: hidden size 64, float32
    assert large.peak - small.peak < tokens * 40  # ids, masks, five figures of each token


@pytest.mark.parametrize("trainer", ["ppo", "grpo"])
def test_the_logits_of_a_chunk_are_there_once(tmp_path, counted, trainer):
    """Policy and reference compute theirs one after the other, and no copy is made of them."""
    run(tmp_path, "sft", "reward", vocabulary=VOCABULARY_SIZE)
    sizes = {"gradient_accumulation_steps": 16, "local_rollout_forward_batch_size": 64}
    count = counted(tmp_path, trainer, total_episodes=64, **sizes)
    # Of 12 tokens; PPOTrainer asks for what comes after the last of them too.
    logits = 64 * {"ppo": 13, "grpo": 12}[trainer] * VOCABULARY_SIZE * 4
    assert count.largest == logits
    assert count.peak < 1.5 * logits


# These count the padding behind each completion too, of which lean rollouts have less.
OF_PADDING = ("policy/approxkl_avg", "policy/entropy_avg", "val/ratio", "val/ratio_var", "val/num_eos_tokens", "eps")


@pytest.mark.parametrize("lora", [tiny.LORA, None], ids=["shared", "separate"])
def test_training_is_that_of_ppotrainer(tmp_path, monkeypatch, lora):
    """With the same completions, log-probabilities and losses; padding of other prompts was left out."""
    logs = {}
    kept = []
    extent = rollouts.extent
    monkeypatch.setattr(rollouts, "extent", lambda ids, *rest: kept.append((ids, extent(ids, *rest))) or kept[-1][1])
    for name in ("lean", "plain"):
        if name == "plain":
            monkeypatch.setattr(trainers, "lean", lambda *_: contextlib.nullcontext())
        folder = tmp_path / name
        options = {"lora": lora, "gradient_checkpointing": True, "missing_eos_penalty": 0.5}
        options |= {"longest": 5, "ends": True, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
        run(folder, "sft", "reward", "ppo", **options)
        logs[name] = json.loads((folder / "run" / "ppo" / "log_history.json").read_text())
    assert len(logs["lean"]) == 3
    assert any(columns.start > 0 for _, columns in kept)
    assert any(columns.stop < ids.shape[1] for ids, columns in kept)
    for lean_entry, entry in zip(logs["lean"], logs["plain"], strict=True):
        names = entry.keys() - set(OF_PADDING)
        assert {name: lean_entry[name] for name in names} == pytest.approx(
            {name: entry[name] for name in names}, rel=1e-4, abs=1e-5
        )


def test_columns_that_are_padding_in_all_rows():
    ids = torch.tensor([[PAD, PAD, 5, 6, PAD, PAD], [PAD, 4, 5, PAD, PAD, PAD]])
    assert rollouts.extent(ids, 3, PAD) == slice(1, 4)
    assert rollouts.extent(ids, 4, PAD) == slice(1, 5)  # no completion has a token, and one column is kept
    assert rollouts.extent(ids + 1, 3, PAD) == slice(0, 6)


def test_a_completion_without_a_token_leaves_the_weights_finite(tmp_path, monkeypatch):
    """It begins with the pad token, and is alone in its micro-batch."""
    sample = rollouts._sample_chunk

    def first_is_empty(model, queries, pad_token_id, config):
        ids, log_probs = sample(model, queries, pad_token_id, config)
        ids[0] = pad_token_id
        return ids, log_probs

    monkeypatch.setattr(rollouts, "_sample_chunk", first_is_empty)
    record = run(tmp_path, "sft", "reward", "ppo", per_device_train_batch_size=1, gradient_accumulation_steps=8)["ppo"]
    log = json.loads((tmp_path / "run" / "ppo" / "log_history.json").read_text())
    assert all(math.isfinite(value) for entry in log for value in entry.values())
    assert record.metrics["alarms"] == []


@pytest.mark.parametrize("trainer", ["ppo", "grpo"])
def test_no_padding_of_other_prompts_goes_through_the_models(tmp_path, monkeypatch, trainer):
    """A micro-batch is as wide as its longest prompt needs, not as wide as its rollout."""
    widths = {"rollout": set(), "micro-batch": set()}
    forward = LlamaModel.forward

    def seen(self, input_ids=None, attention_mask=None, **options):
        if torch.is_grad_enabled():
            widths["micro-batch"].add(input_ids.shape[1])
            assert attention_mask[:, 0].any()
        else:
            widths["rollout"].add(input_ids.shape[1])
        return forward(self, input_ids=input_ids, attention_mask=attention_mask, **options)

    run(tmp_path, "sft", "reward", trainer=trainer, longest=5)
    monkeypatch.setattr(LlamaModel, "forward", seen)
    run(tmp_path, "ppo", trainer=trainer, longest=5, gradient_checkpointing=False)
    widest = max(widths["rollout"])
    if trainer == "grpo":
        widest -= 1  # the last token goes through the reward model alone
    assert min(widths["micro-batch"]) < max(widths["micro-batch"]) == widest


def test_the_output_layer_gets_no_slice(model):
    """For a slice of the hidden states it is slow, with the same result."""
    ids = torch.tensor([[3, 4, 5, 6, 7], [7, 6, 5, 4, 3]])
    expected = model(ids, logits_to_keep=3).logits
    changed = copy.deepcopy(model)
    float32_logits(changed)
    seen = []
    changed.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].is_contiguous()))
    assert torch.equal(changed(ids, logits_to_keep=3).logits, expected)
    assert seen == [True]
