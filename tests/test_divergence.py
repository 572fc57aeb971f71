"""KL of language models: equal to what is computed all at once, and small in memory, counted in bytes."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from pipeline.training import assertions, divergence

VOCABULARY = 150_000
PROMPT, COMPLETION = 200, 64  # tokens
ONE_COPY = (COMPLETION + 1) * VOCABULARY * 4  # bytes of the logits of a completion's positions in float32


class Storages(TorchDispatchMode):
    """Counts the bytes of storages that come to life inside: the most at a time, and the number of large ones."""

    def __init__(self, large, *models):
        super().__init__()
        self.peak, self.most_large = 0, 0
        self._large, self._alive = large, {}
        self._weights = {p.untyped_storage()._cdata for model in models for p in model.parameters()}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage):
        key = storage._cdata
        if key not in self._alive and key not in self._weights:
            self._alive[key] = storage.nbytes()
            weakref.finalize(storage, self._alive.pop, key, None)
            self.peak = max(self.peak, sum(self._alive.values()))
            self.most_large = max(self.most_large, sum(size >= self._large for size in self._alive.values()))


def llama(seed, vocabulary=VOCABULARY, **options):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, initializer_range=0.5, **(sizes | options))).eval()


def ids(number, vocabulary, seed):
    return torch.randint(1, vocabulary, (number,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def test_kl_of_completions_keeps_one_copy_of_logits_per_model():
    """Four rows with prompts of 200 tokens; one copy of all logits would be 0.6 GB."""
    policy, reference = llama(0), llama(1)
    prompts = [ids(PROMPT, VOCABULARY, i) for i in range(4)]
    completions = [ids(COMPLETION, VOCABULARY, 10 + i) for i in range(4)]
    with Storages(ONE_COPY // 2, policy, reference) as storages:
        found = divergence.kl_of_completions(policy, reference, prompts, completions)
    assert len(found) == 4 and min(found) > 0
    assert storages.most_large == 2  # the policy's logits and the reference's, of one row
    assert storages.peak < 2 * ONE_COPY + 2**25


@torch.no_grad()
def test_checks_keep_as_little():
    policy, reference = llama(0), llama(0)
    row = ids(COMPLETION + 1, VOCABULARY, 0)
    with Storages(ONE_COPY // 2, policy, reference) as storages:
        assert assertions.reference_is_parent(policy, reference, [row] * 3) == 0
    assert storages.most_large == 2 and storages.peak < 2 * ONE_COPY + 2**25
    with Storages(ONE_COPY // 2, policy, reference) as storages:
        expected = assertions.parent_log_probs(policy, [row] * 3)
        assertions.policy_is_parent(policy, [row] * 3, expected)
    assert storages.most_large == 1 and storages.peak < ONE_COPY + 2**25
    with Storages(2 * VOCABULARY * 4, policy) as storages:  # more than one position's
        divergence.likeliest_next(policy, [row])
    assert storages.most_large == 0


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("limit", [1, 3000, 2**24], ids=["one row a time", "a few", "all"])
@torch.no_grad()
def test_kl_is_that_of_all_logits_at_once(monkeypatch, kind, limit):
    """Also where rows of different lengths share a forward pass; an empty completion has none."""
    monkeypatch.setattr(divergence, "MAX_LOGITS", limit)
    monkeypatch.setattr(divergence, "MAX_COMPARED", 200)
    vocabulary = 50
    if kind == "llama":
        policy, reference = (llama(seed, vocabulary) for seed in (0, 1))
    else:
        models = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            config = GPT2Config(vocab_size=vocabulary, n_embd=8, n_layer=1, n_head=1, initializer_range=0.5)
            models.append(GPT2LMHeadModel(config).eval())
        policy, reference = models
    prompts = [ids(n, vocabulary, n) for n in (3, 9, 1, 5)]
    completions = [ids(n, vocabulary, 20 + n) for n in (4, 0, 12, 7)]
    found = divergence.kl_of_completions(policy, reference, prompts, completions, temperature=0.7)
    for prompt, completion, kl in zip(prompts, completions, found, strict=True):
        row = torch.tensor([prompt + completion])
        p, q = ((m(row).logits[0].double() / 0.7).log_softmax(-1) for m in (policy, reference))
        expected = (p.exp() * (p - q)).sum(-1)[len(prompt) - 1 : -1].sum().item()
        assert kl == pytest.approx(expected, rel=1e-4, abs=1e-6)


@torch.no_grad()
def test_log_probs_are_those_of_the_tokens():
    model, row = llama(0, 50), ids(9, 50, 0)
    logs = model(torch.tensor([row])).logits[0].log_softmax(-1)
    expected = [logs[t, token].item() for t, token in enumerate(row[1:])]
    assert divergence.log_probs(model, row).tolist() == pytest.approx(expected, abs=1e-6)
