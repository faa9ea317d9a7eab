"""What people do with a chat model that carries a guard. Each test names the mutations that it kills."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    CHATML,
    KINDS,
    PATHS,
    forward,
    guard_for,
    make_guard,
    make_model,
    make_tokenizer,
    score,
    user,
)
from torch import nn
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

import checkpoint
from chat import encode
from errors import UserError
from model import GuardConfig, GuardedChat
from train import checkpoint_gradients

ROWS = [[5, 6, 7, 8, 9, 10], [11, 12, 13]]


def test_a_chat_model_carries_one_guard():
    """Kills: a second guard inside the first one's layers, half an injection that spoils the first guard."""
    guard = make_guard()
    before, names = score(guard, ROWS), list(guard.adapter())
    with pytest.raises(ValueError, match="already carries a guard"):
        guard_for(guard.chat_model)
    assert torch.equal(score(guard, ROWS), before) and list(guard.adapter()) == names
    assert all(parameter.requires_grad for parameter in guard.adapter().values())


def test_the_adapter_alone_is_saved(tmp_path):
    """Kills: an adapter with frozen weights, a model folder whose names from_pretrained does not know."""
    guard = make_guard()
    names = list(guard.adapter())
    guard.chat_model.requires_grad_(True)
    assert list(guard.adapter()) == names and all("lora_" in n or "guard_head" in n for n in names)
    with pytest.raises(ValueError, match="carries a guard"):
        guard.chat_model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- which layers learn


def with_vision():
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = text | {"image_size": 8, "patch_size": 4}
    text |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 320}
    options = {"mm_tokens_per_image": 4, "image_token_index": 319}
    config = Gemma3Config(text_config=text, vision_config=vision, **options)
    torch.manual_seed(0)
    return Gemma3ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", [*KINDS, "with vision"])
def test_every_lora_tensor_gets_a_gradient_within_two_steps(kind, path):
    """Kills: LoRA in a vision tower or a side projection that a text never reaches."""
    chat_model = with_vision() if kind == "with vision" else make_model(kind)
    chat_model.base_model.side = nn.Linear(32, 32)  # no text reaches it
    guard = guard_for(chat_model, guard_path=path)
    optimizer, moved = torch.optim.SGD(guard.adapter().values(), lr=1.0), set()
    for _ in range(2):  # B is zero at first, so A gets its gradient in the second step
        forward(guard, ROWS).square().sum().backward()
        moved |= {name for name, p in guard.adapter().items() if p.grad is not None and p.grad.any()}
        optimizer.step()
        optimizer.zero_grad()
    assert moved == set(guard.adapter()) and len(moved) > 8
    assert not any("vision" in name or "lm_head" in name for name in moved)


@pytest.mark.parametrize("target", ["fc1", "vision_tower", "lm_head"])
def test_a_target_that_no_text_reaches_is_refused_by_name(target):
    """Kills: a target in a vision tower that is injected and never learns."""
    with pytest.raises(ValueError, match=rf"{target}.*q_proj"):
        guard_for(with_vision(), lora_targets=[target])


def keep(kept, tensor):
    kept.append(tensor.numel())
    return tensor


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3", "mpt"])
def test_gradients_are_equal_with_and_without_checkpointing(kind):
    """Kills: a gate that is shut while layers are computed again, dropout of the frozen model, no saving."""
    found = []
    for checkpointing in (False, True):
        guard = make_guard(kind, guard_path="full", lora_dropout=0.2)
        if checkpointing:
            checkpoint_gradients(guard)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(partial(keep, kept), lambda x: x):
            torch.manual_seed(0)
            loss = forward(guard.train(), ROWS).square().sum()
        loss.backward()
        found.append(({name: p.grad for name, p in guard.adapter().items()}, sum(kept)))
    (plain, much), (checkpointed, little) = found
    assert all(torch.allclose(plain[name], checkpointed[name], atol=1e-5) for name in plain)
    assert any(gradient.any() for gradient in plain.values()) and little < much / 2


# ---------------------------------------------------------------- dates

DATED = "{% if strftime_now is defined %}{{ 'Today is ' + strftime_now ( '%d %b %Y' ) }}{% endif %}" + CHATML


def test_a_template_sees_the_date_of_the_config():
    """Kills: a score that changes from day to day, a first guard's date in a shared tokenizer's template."""
    tokenizer, verdicts = make_tokenizer(), []
    tokenizer.chat_template = DATED
    for date, shown in (("2024-07-26", "26 Jul 2024"), ("2025-01-01", "01 Jan 2025")):
        guard = GuardedChat(make_model(), tokenizer, GuardConfig(date=date))
        assert guard.tokenizer.decode(encode(guard.tokenizer, user("hi")).ids).startswith(f"Today is {shown}")
        verdicts.append(guard.classify([{"prompt": "hi"}]))
    assert verdicts[0] != verdicts[1]


@pytest.mark.parametrize(
    "live", ["{% set form = '%d' %}{{ strftime_now(form) }}", "{% set f = strftime_now %}"]
)
def test_a_date_that_cannot_be_fixed_is_refused(live):
    """Kills: a template that asks for today in another way, and changes every day after all."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = live + CHATML
    with pytest.raises(ValueError, match="asks for the date"):
        GuardedChat(make_model(), tokenizer, GuardConfig())


# ---------------------------------------------------------------- processes


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch):
    """Kills: four processes that each write every row."""
    monkeypatch.setattr(checkpoint, "Accelerator", lambda: SimpleNamespace(num_processes=1))
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match="4 processes were started, and each believes there is 1"):
        checkpoint.start_accelerator()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert checkpoint.start_accelerator().num_processes == 1
