"""What a guard refuses: settings that make no sense, and chat models that the two paths do not fit.

Many families of models compute in ways of their own: they attend to what follows, count positions from the
padding, or keep no cache. Their verdicts would be wrong, and nobody would know. So a new guard first judges
and answers two short texts as a trial.
"""

import math
import sys
from datetime import date

import torch
from transformers import DynamicCache

import chat
from lora import LoRALinear

# Largest distance |a - b| / |b| between hidden states of equal computations.
TOLERANCE = {torch.bfloat16: 0.06, torch.float16: 0.02}  # and 1e-4 in fp32


def check_settings(config):
    """Raise ValueError for a GuardConfig that makes no sense."""
    numbers = [config.lora_r, config.lora_alpha, config.lora_dropout]
    numbers += [config.threshold, config.prompt_threshold]
    if not all(type(number) in (int, float) and math.isfinite(number) for number in numbers):
        raise ValueError("a number is not a finite one")
    names = config.categories
    different = type(names) is list and len(set(names)) == len(names)
    for is_right, message in (
        (config.lora_r >= 1 and config.lora_alpha > 0, "LoRA needs r of at least 1 and alpha above 0"),
        (0 <= config.lora_dropout < 1, "LoRA's dropout must be at least 0 and below 1"),
        (config.guard_path in ("activated", "full"), "the guard path must be activated or full"),
        (different, "categories must be a list of different names"),
        (config.unsafe_head or names, "without the unsafe output, rows need categories"),
    ):
        if not is_right:
            raise ValueError(message)
    date.fromisoformat(config.date)


def try_out(guard):
    """Raise ValueError, and put the chat model's layers back, unless it passes `compare`."""
    try:
        compare(guard)
    except Exception as error:
        for name, module in list(guard.chat_model.named_modules()):
            if isinstance(module, LoRALinear):
                guard.chat_model.set_submodule(name, module.base)
        kind = type(guard.chat_model).__name__
        raise ValueError(f"a {kind} cannot be guarded in this way: {error}") from error


@torch.no_grad()
def compare(guard):
    """Judge and answer two short texts. Raises ValueError that says what differs."""
    texts = ("Hello", "How do I keep bread fresh? " * 3)
    short, long = (chat.encode(guard.tokenizer, [{"role": "user", "content": text}])[0] for text in texts)
    long = long[: guard.max_tokens]
    model, half = guard.chat_model, len(long) // 2
    if sees_what_follows(model, guard.tensor(long), half):
        raise ValueError("what follows a text changes its hidden states")
    expect_equal("beside a longer text", guard.states([short, long])[:1], guard.states([short]))
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    whole, _, second = (  # each of (1, T, H)
        model.base_model(input_ids=guard.tensor(ids), past_key_values=past, use_cache=past is not None)
        for ids, past in ((long, None), (long[:half], cache), (long[half:], cache))
    )
    expect_equal("read in two parts", second.last_hidden_state, whole.last_hidden_state[:, half:])
    options = {"max_new_tokens": 3, "min_new_tokens": 3}
    options |= {"num_beams": 1, "stop_strings": None, "return_dict_in_generate": False}
    *_, (answer, _) = guard.stream(short, verdict_every=2, **options)
    ids = guard.tensor(short)
    options |= {"attention_mask": torch.ones_like(ids), "pad_token_id": guard.tokenizer.pad_token_id}
    plain = model.generate(ids, do_sample=False, **options)[0, len(short) :].tolist()
    if answer != plain[: len(answer)]:  # an end token is no part of the answer
        raise ValueError("its answers under guard are not those of `generate`")


@torch.enable_grad()
def sees_what_follows(model, ids, end):
    """Whether the states of the first `end` tokens have a gradient in a later one; exact in any dtype."""
    leaves = []

    def watch(_, __, embedded):
        leaves.append(embedded.detach().requires_grad_())
        return leaves[0].clone()  # some models scale it in place, which a leaf forbids

    hook = model.get_input_embeddings().register_forward_hook(watch)
    try:
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :end]
    finally:
        hook.remove()
    (gradient,) = torch.autograd.grad((hidden * torch.randn_like(hidden)).sum(), leaves[0])
    return gradient[:, end:].any().item()


def expect_equal(where, states, wanted):
    """Raise ValueError unless both hidden states (..., H) are those of one computation."""
    apart = ((states - wanted).float().norm() / wanted.float().norm()).item()
    if not apart <= TOLERANCE.get(wanted.dtype, 1e-4):
        raise ValueError(f"a text has other hidden states {where} ({apart:.2g} of their length apart)")


def context_length(config):
    """Longest conversation in tokens.

    Beyond longrope's original length a model rotates all tokens of a batch in another way, so a verdict would
    depend on its neighbours.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    parts = [part for part in (rope, *rope.values()) if isinstance(part, dict)]
    limits = [p["original_max_position_embeddings"] for p in parts if p.get("rope_type") == "longrope"]
    limits += [getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len")]  # MPT's
    return min(filter(None, limits), default=sys.maxsize)


def refuse_to_save(*_, **__):
    raise ValueError("this model carries a guard; load it again to save it. train.py saves the adapter")
