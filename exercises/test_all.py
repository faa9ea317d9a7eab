"""Each test fails until you solve its exercise. Run `pytest exercises`; solutions/ has the answers."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import MistralConfig, MistralForCausalLM

from lora import Gate, inject_lora


def load(path):
    """Import a file by its path, because a name that starts with a digit cannot be imported."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def exercise(request):
    """What you wrote in the file that the test is named after."""
    return load(Path(__file__).with_name(request.function.__name__.removeprefix("test_") + ".py"))


def test_1_lora(exercise):
    """Fails: no scaling or r / alpha, a B that is not zero at first, a gate as a factor, a W that learns."""
    gate, base, x = Gate(), nn.Linear(6, 5), torch.randn(4, 2, 6)
    layer = exercise.LoRALinear(base, (6, 5), r=3, lora_alpha=7.0, gate=gate)
    trained = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B"}, "train lora_A and lora_B alone, not the base"
    shapes = (layer.lora_A.shape, layer.lora_B.shape)
    assert shapes == ((3, 6), (5, 3)) and layer.lora_A.any(), "A is (r, in), not zero; B is (out, r)"
    with gate.opened():
        assert torch.equal(layer(x), base(x)), "a new layer must not change its base"
        nn.init.normal_(layer.lora_B)
        update = 7.0 / 3 * x @ (layer.lora_B @ layer.lora_A).T
        assert torch.allclose(layer(x), base(x) + update, atol=1e-5), "open: W x + (alpha / r) B (A x)"
        layer(x).sum().backward()
    assert layer.lora_A.grad is not None and layer.lora_B.grad is not None, "A and B get gradients"
    nn.init.constant_(layer.lora_B, math.inf)
    assert torch.equal(layer(x), base(x)), "shut: W x alone, because 0 times infinity is NaN"


def test_2_gate(exercise):
    """Fails: one state for all threads, a gate that an inner block shuts or an error leaves open."""
    gate, plain = exercise.Gate(), load(Path(__file__).with_name("2_gate.py")).PlainGate()
    assert exercise.leaks(plain), "open the gate, and let a second thread find a PlainGate open"
    assert not exercise.leaks(gate), "another thread must find the gate shut"
    with pytest.raises(RuntimeError), gate.opened():
        with gate.opened():
            assert gate.is_open
        assert gate.is_open, "the inner block must put back what it found"
        raise RuntimeError
    assert not gate.is_open, "an error must not leave the gate open"


@torch.no_grad()
def test_3_cache(exercise):
    """Fails: a cache that grows, layers that are shared, a deep copy, cropping, a gate that stays shut."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MistralConfig(vocab_size=99, num_key_value_heads=2, sliding_window=8, **shape)
    chat_model = MistralForCausalLM(config).eval()
    gate = inject_lora(chat_model, ["q_proj", "v_proj"], 4, 8.0)
    for layer in (m for m in chat_model.modules() if hasattr(m, "lora_B")):
        nn.init.normal_(layer.lora_B)
    ids, guard_prompt_ids = torch.randint(99, (1, 12)), torch.tensor([[5, 6, 7]])
    cache, other = (chat_model.base_model(ids, use_cache=True).past_key_values for _ in range(2))
    before = sum(((layer.keys, layer.values) for layer in cache.layers), ())
    forked = exercise.fork(cache)
    pairs = zip(forked.layers, cache.layers, strict=True)
    assert all(x.keys is y.keys and x.values is y.values for x, y in pairs), "a fork shares the tensors"
    hidden = exercise.ask(chat_model, gate, cache, guard_prompt_ids)
    assert cache.get_seq_length() == 12 and not gate.is_open, "the cache must not grow; shut the gate again"
    after = sum(((layer.keys, layer.values) for layer in cache.layers), ())
    assert all(map(torch.equal, before, after)), "the chat's cache must keep its tensors"
    with gate.opened():
        wanted = chat_model.base_model(guard_prompt_ids, past_key_values=other).last_hidden_state[:, -1]
    assert hidden.shape == (1, 32), "return the state of the last token, (1, H)"
    assert torch.allclose(hidden, wanted, atol=1e-5), (
        "gate open? last token? every attribute of a layer kept?"
    )


def test_4_loss(exercise):
    """Fails: unknown labels that count as safe, weights upside down, NaN gradients, one mean over all."""
    unknown, weights = float("nan"), [3.0, 2.0, 0.5]
    labels = torch.tensor([[1, 1, unknown], [0, 0, 1], [0, unknown, 1], [0, 0, 0]])
    assert torch.allclose(exercise.pos_weight_of(labels), torch.tensor(weights))
    logits = torch.tensor([[2.0, -1, 0.5], [-0.5, 1, 3], [1, 0.2, -2], [0.7, -3, 1]], requires_grad=True)
    total = [0.0, 0.0, 0.0]
    for row, answers in zip(logits.tolist(), labels.tolist(), strict=True):
        for k, (z, y) in enumerate(zip(row, answers, strict=True)):
            p = 1 / (1 + math.exp(-z))
            total[k] -= 0 if math.isnan(y) else weights[k] * y * math.log(p) + (1 - y) * math.log(1 - p)
    categories = (total[1] + total[2]) / 4 / 2
    for unsafe_head, wanted in ((True, total[0] / 4 / 2 + categories / 2), (False, categories)):
        logits.grad = None
        loss = exercise.guard_loss(logits, labels, torch.tensor(weights), unsafe_head)
        assert loss.item() == pytest.approx(wanted)
        loss.backward()
        assert logits.grad.isfinite().all() and not logits.grad[labels.isnan()].any()


def test_5_threshold(exercise):
    """Fails: a quantile of the harmless scores, a rate of all rows, rows of equal score told apart."""
    random = np.random.default_rng(0)
    for _ in range(50):
        labels = np.append([0, 1], random.integers(0, 2, 40))
        scores = np.round(np.clip(random.normal(0.4 + 0.2 * labels, 0.2), 0, 1), 1)
        for rate in (0.02, 0.1, 0.25):
            best = (0.0, 0.0, scores > 1)
            for threshold in np.unique(scores):
                flagged = scores >= threshold
                recall, fpr = flagged[labels == 1].mean(), flagged[labels == 0].mean()
                if fpr <= rate:
                    best = max(best, (recall, -fpr, flagged), key=lambda found: found[:2])
            threshold, recall = exercise.threshold_at_fpr(labels, scores, rate)
            assert recall == pytest.approx(best[0]) and np.array_equal(scores >= threshold, best[2])
