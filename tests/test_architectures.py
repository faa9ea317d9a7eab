"""What families of chat models can be guarded, on tiny random ones. Each test names the mutation that it kills."""

import pytest
import torch
from test_generate import guard_of, plain, until
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, Lfm2Config, LlamaConfig, MambaConfig, RwkvConfig, TorchAoConfig

from checkpoint import load_chat_model
from common import UserError
from conftest import GROUPED, KINDS, make_guard, make_model, make_tokenizer
from data import encode
from lora import LoRALinear
from model import NEVER, GuardedChat, fingerprint

LLAMA = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
NEOX = {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
TARGETS = dict.fromkeys(("llama", "llama2", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "smollm3", "olmo2"), LLAMA)
TARGETS |= {
    "phi3": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
    "gpt2": {"c_attn", "c_proj", "c_fc"},
    "gpt_neox": NEOX,
    "falcon": NEOX,
    "opt": {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "project_in", "project_out"},
    "starcoder2": {"q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"},
    "mixtral": {"q_proj", "k_proj", "v_proj", "o_proj"},  # the experts are three-dimensional tensors, not layers
}
TURNS = [("how is the bread?" * 2, "harmful"), ("hi", "safe"), ("the answer is harmful", "or not")]


def learn(guard, conversations, steps=12):
    """The losses of a few steps towards: the first conversation is harmful, the others are not."""
    optimizer = torch.optim.AdamW(guard.adapter().values(), lr=3e-3)
    target = torch.zeros(len(conversations), 3)
    target[0] = 1
    guard.train()
    losses = []
    for _ in range(steps):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(guard(conversations), target)
        loss.backward()
        if not losses:  # B starts at zero, so at the first step the gradient of A is zero, and that of every B is not
            without = [name for name, p in guard.adapter().items() if "lora_A" not in name and not p.grad.any()]
            assert not without, "what the guard's own pass does not reach"
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("path", ["activated", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_architecture_is_guarded_from_training_to_generation(kind, path, tmp_path):
    """Kills: a target that is left out, a base that learns or changes, a hidden state below the final projection,
    positions without the padding, a file that loads otherwise than it was saved, a gate left open while generating."""
    guard = make_guard(kind, trained=False, guard_path=path)
    assert {name.rpartition(".")[2] for name, m in guard.named_modules() if isinstance(m, LoRALinear)} == TARGETS[kind]
    conversations = [encode(guard.tokenizer, *turn) for turn in TURNS]
    losses = learn(guard, conversations)
    assert losses[-1] < losses[0] / 2

    scores = guard.score(conversations)
    guard.save_adapter(tmp_path / "adapter.safetensors")
    loaded = guard_of(kind, guard_path=path)
    loaded.load_adapter(tmp_path / "adapter.safetensors")
    assert torch.equal(loaded.score(conversations), scores)

    answers = loaded.generate(conversations, NEVER, max_new_tokens=20, verdict_every=8)
    assert [answer.ids for answer in answers] == [until(row, 2) for row in plain(loaded, conversations)]
    for conversation, answer in zip(conversations, answers, strict=True):
        tokens, verdict = answer.verdicts[-1]
        alone = loaded.score([conversation + answer.ids[:tokens]]).sigmoid()[0]
        assert torch.allclose(torch.tensor(verdict, dtype=torch.float), alone, atol=1e-4)


@pytest.mark.parametrize("path", ["activated", "full"])
def test_a_base_in_8_bit_is_guarded_by_adapters_in_fp32(path, tmp_path):
    """Kills: adapters in the base's type, a base that has to be plain tensors, a fingerprint of quantised matrices."""
    make_model().save_pretrained(tmp_path / "plain")
    make_tokenizer().save_pretrained(tmp_path / "8-bit")
    options = {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig()), "dtype": torch.float32}
    AutoModelForCausalLM.from_pretrained(tmp_path / "plain", **options).save_pretrained(tmp_path / "8-bit")
    chat_model, tokenizer = load_chat_model(str(tmp_path / "8-bit"))
    assert chat_model.model.layers[0].mlp.up_proj.weight.dequantize().unique().numel() < 48 * 32
    assert fingerprint(chat_model, tokenizer) == fingerprint(make_model(), make_tokenizer())
    guard = GuardedChat(chat_model, tokenizer, categories=["theft", "hate"], lora_r=4, guard_path=path)
    if path == "activated":
        guard.keep_caches(tmp_path / "caches")
    conversations = [encode(tokenizer, *turn) for turn in TURNS]
    assert {parameter.dtype for parameter in guard.adapter().values()} == {torch.float32}
    losses = learn(guard, conversations)
    assert losses[-1] < losses[0] / 2
    guard.use_fast_dtype()
    guard.cast_for_use()
    [answer] = guard.generate(conversations[:1], NEVER, max_new_tokens=8)
    assert len(answer.ids) == 8 and not guard.gate.is_open


REFUSED = {  # what is there to be said about them, by path
    "hybrid of convolution and attention": (
        Lfm2Config(vocab_size=320, layer_types=["conv", "full_attention"], **GROUPED),
        {"activated": "cannot borrow a LinearAttentionLayer; train with --guard-path full", "full": None},
    ),
    "state space": (
        MambaConfig(vocab_size=320, hidden_size=32, num_hidden_layers=2),
        dict.fromkeys(("activated", "full"), "past the layer, so it cannot be guarded"),
    ),
    "recurrent": (
        RwkvConfig(vocab_size=320, hidden_size=32, num_hidden_layers=2),
        dict.fromkeys(("activated", "full"), "past the layer, so it cannot be guarded"),
    ),
}


@pytest.mark.parametrize("path", ["activated", "full"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_an_architecture_cannot_do_is_refused_with_the_reason(name, path):
    """Kills: a layer whose update never gets into what is computed, a state that the guard's tokens would change."""
    config, reasons = REFUSED[name]
    guard = GuardedChat(AutoModelForCausalLM.from_config(config), make_tokenizer(), lora_r=4, guard_path=path)
    if reasons[path]:
        with pytest.raises(UserError, match=reasons[path]):
            guard([[5, 6, 7]])
    else:
        guard([[5, 6, 7], [8, 9]]).sum().backward()
        assert all(p.grad.any() for name, p in guard.adapter().items() if "lora_A" not in name)


@pytest.mark.parametrize("path", ["activated", "full"])
@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_verdict_is_a_texts_own_where_the_rotary_frequencies_change_with_the_length(kind, path):
    """Kills: rows of a batch that turn as the longest of them does."""
    rope = {"rope_type": kind, "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [8.0] * 4} if kind == "longrope" else {}
    config = LlamaConfig(vocab_size=320, max_position_embeddings=256, rope_parameters=rope, **GROUPED)
    torch.manual_seed(0)
    guard = GuardedChat(AutoModelForCausalLM.from_config(config), make_tokenizer(), lora_r=4, guard_path=path)
    for parameter in guard.adapter().values():
        torch.nn.init.normal_(parameter, std=0.3)
    rows = [[5 + n % 300 for n in range(length)] for length in (40, 150, 200, 230)]
    alone = torch.cat([guard.score([row]) for row in rows])
    assert torch.allclose(guard.score(rows), alone, atol=1e-4)
