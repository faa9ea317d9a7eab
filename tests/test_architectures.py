"""Which families of chat models can be guarded. Each test names the mutations that it kills."""

import json
from dataclasses import asdict

import pytest
import torch
from conftest import (
    CONTEXT,
    GROUPED,
    KINDS,
    REFUSED,
    ids_of,
    make_guard,
    make_model,
    make_tokenizer,
    plain,
    until,
    user,
)
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, LlamaConfig, TorchAoConfig

from chat import context_length
from checkpoint import (
    adapter_header,
    build_guard,
    fingerprint,
    load_chat_model,
    load_guard,
    save_adapter,
    use_fast_dtype,
)
from common import UserError
from lora import LoRALinear
from model import GuardConfig, GuardedChat
from tools.train_cached import keep_caches

PATHS = ["activated", "full"]
LLAMA = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
NEOX = {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
LIKE_LLAMA = ("llama", "llama2", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "smollm3", "olmo2")
TARGETS = dict.fromkeys(LIKE_LLAMA, LLAMA) | {  # the linear layers that "all-linear" has to find
    "phi3": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
    "gpt2": {"c_attn", "c_proj", "c_fc"},
    "gpt_neox": NEOX,
    "falcon": NEOX,
    "opt": {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "project_in", "project_out"},
    "starcoder2": {"q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"},
    "mixtral": {"q_proj", "k_proj", "v_proj", "o_proj"},  # its experts are 3-dimensional tensors, not layers
    "mpt": {"Wqkv", "out_proj", "up_proj", "down_proj"},
    "gpt_neo": {"q_proj", "k_proj", "v_proj", "out_proj", "c_fc", "c_proj"},
}
TURNS = [("how is the bread?" * 2, "harmful"), ("hi", "safe"), ("the answer is harmful", "or not")]
ROWS = [{"prompt": prompt, "response": response} for prompt, response in TURNS]
ROWS += [{"messages": [*user("hi"), {"role": "assistant", "content": "safe"}]}, {"prompt": TURNS[0][0]}]


def conversations(tokenizer):
    return [ids_of(tokenizer, *turn) for turn in TURNS]


def learn(model, adapter, rows, steps=12):
    """The losses of a few steps. The first conversation is harmful, and the others are not."""
    optimizer = torch.optim.AdamW(adapter.values(), lr=3e-3)
    target = torch.zeros(len(rows), 3)
    target[0] = 1
    model.train()
    losses = []
    for _ in range(steps):
        logits = model(rows, [len(ids) for ids in rows])
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, target)
        loss.backward()
        if not losses:  # B starts at zero, so in the first step A has no gradient, and every B has one
            without = [name for name, p in adapter.items() if "lora_A" not in name and not p.grad.any()]
            assert not without, "the guard's own pass does not reach these"
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def save(guard, kind, folder):
    """Write the chat model and the guard as train.py does. Returns config.json and adapter.safetensors."""
    config, adapter = folder / "config.json", folder / "adapter.safetensors"
    make_model(kind).save_pretrained(folder / "chat-model")
    guard.tokenizer.save_pretrained(folder / "chat-model")
    base = {"base_model": str(folder / "chat-model"), "dtype": "float32"}
    base["base_fingerprint"] = fingerprint(guard.chat_model, guard.tokenizer)
    config.write_text(json.dumps(base | {"guard": asdict(guard.config)}))
    save_adapter(adapter, guard.adapter(), adapter_header(base["base_fingerprint"], guard.config))
    return config, adapter


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", KINDS)
def test_architecture_is_guarded_from_training_to_answers(kind, path, tmp_path):
    """Kills: a target that is left out, a base that learns or changes, hidden states from below the final
    projection, positions that count padding, a file that changes the adapter, an open gate while tokens
    are computed, verdicts on rows in the wrong order."""
    guard = make_guard(kind, trained=False, guard_path=path)
    layers = {name.rpartition(".")[2] for name, m in guard.named_modules() if isinstance(m, LoRALinear)}
    assert layers == TARGETS[kind]
    rows = conversations(guard.tokenizer)
    losses = learn(guard, guard.adapter(), rows)
    assert losses[-1] < losses[0] / 2

    scores = guard.score(rows)
    loaded = load_guard(*save(guard, kind, tmp_path), device_id=-1)
    assert torch.equal(loaded.score(rows), scores)

    verdicts = loaded.classify(ROWS)
    wanted = loaded.score([*rows, rows[1], ids_of(loaded.tokenizer, ROWS[4]["prompt"])]).sigmoid()
    found = torch.tensor([[verdict.unsafe, *verdict.categories.values()] for verdict in verdicts])
    assert torch.allclose(found, wanted, atol=1e-6)
    assert [verdict.tokens > 0 for verdict in verdicts] == [True] * 4 + [False]

    ids = rows[0]
    [*_, (answer, verdict)] = loaded.stream(ids, max_new_tokens=20, verdict_every=8)
    assert answer == until(plain(kind, ids), 2)
    alone = loaded.score([ids + answer])[0].sigmoid().tolist()
    assert [verdict.unsafe, *verdict.categories.values()] == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize("path", PATHS)
def test_8_bit_base_is_guarded_by_adapters_in_fp32(path, tmp_path):
    """Kills: adapters in the base's type, a base that has to be plain tensors, a fingerprint of quantised
    matrices."""
    make_model().save_pretrained(tmp_path / "plain")
    make_tokenizer().save_pretrained(tmp_path / "8-bit")
    options = {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig()), "dtype": torch.float32}
    AutoModelForCausalLM.from_pretrained(tmp_path / "plain", **options).save_pretrained(tmp_path / "8-bit")
    chat_model, tokenizer = load_chat_model(str(tmp_path / "8-bit"))
    assert chat_model.model.layers[0].mlp.up_proj.weight.dequantize().unique().numel() < 48 * 32
    assert fingerprint(chat_model, tokenizer) == fingerprint(make_model(), make_tokenizer())
    guard = GuardedChat(chat_model, tokenizer, GuardConfig(["theft", "hate"], path, "?", lora_r=4))
    assert {parameter.dtype for parameter in guard.adapter().values()} == {torch.float32}
    if path == "activated":
        keep_caches(guard, tmp_path / "caches")
    rows = conversations(tokenizer)
    losses = learn(guard, guard.adapter(), rows)
    assert losses[-1] < losses[0] / 2
    use_fast_dtype(guard)
    [*_, (answer, _)] = guard.stream(rows[0], max_new_tokens=8)
    assert len(answer) == 8 and not guard.gate.is_open


@pytest.mark.parametrize("kind", KINDS)
def test_the_context_of_every_family_is_known(kind):
    """Kills: a length that stands under another name, so a longer text is not cut into windows."""
    assert context_length(make_model(kind).config) == CONTEXT


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", REFUSED)
def test_architecture_that_cannot_be_guarded_says_why(name, path):
    """Kills: a layer whose update never reaches the hidden states, a state that the guard prompt changes."""
    config, reasons = REFUSED[name]
    settings = {"lora_r": 4, "guard_path": path}
    chat_model = AutoModelForCausalLM.from_config(config)
    if reasons[path]:
        with pytest.raises(UserError, match=reasons[path]):
            build_guard(chat_model, make_tokenizer(), settings, "cpu")
    else:
        guard = build_guard(chat_model, make_tokenizer(), settings, "cpu")
        guard([[5, 6, 7], [8, 9]]).sum().backward()
        assert all(p.grad.any() for name, p in guard.adapter().items() if "lora_A" not in name)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_verdict_is_a_texts_own_where_rotary_frequencies_change(kind, path):
    """Kills: rows of a batch that are rotated as the longest of them is."""
    rope = {"rope_type": kind, "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [8.0] * 4} if kind == "longrope" else {}
    config = LlamaConfig(vocab_size=320, max_position_embeddings=256, rope_parameters=rope, **GROUPED)
    torch.manual_seed(0)
    chat_model = AutoModelForCausalLM.from_config(config)
    guard = GuardedChat(chat_model, make_tokenizer(), GuardConfig(guard_path=path, lora_r=4))
    for parameter in guard.adapter().values():
        torch.nn.init.normal_(parameter, std=0.3)
    rows = [[5 + n % 300 for n in range(length)] for length in (40, 150, 200, 230)]
    alone = torch.cat([guard.score([row]) for row in rows])
    assert torch.allclose(guard.score(rows), alone, atol=1e-4)
