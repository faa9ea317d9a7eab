"""What a guard refuses: settings that make no sense, and chat models that the two paths do not fit.

Many families of models compute in ways of their own: they attend to what follows, count positions from the
padding, or keep no cache. Their verdicts would be wrong, and nobody would know. So a new guard first judges
and answers two short texts as a trial.
"""

import math
import re
import sys
from datetime import date, datetime

import torch
from transformers import DynamicCache

import chat
from errors import refuse
from lora import LoRALinear

# Largest distance |a - b| / |b| between hidden states of equal computations.
TOLERANCE = {torch.bfloat16: 0.06, torch.float16: 0.02}  # and 1e-4 in fp32


def check_settings(config):
    """Raise ValueError for a GuardConfig that makes no sense."""
    for name in ("lora_r", "lora_alpha", "lora_dropout", "threshold", "prompt_threshold"):
        number = getattr(config, name)
        if type(number) not in (int, float) or not math.isfinite(number):
            raise ValueError(f"{name} is {number!r}, and must be a finite number")
    names = config.categories
    different = type(names) is list and len(set(names)) == len(names)
    for is_right, message in (
        (config.lora_r >= 1 and config.lora_alpha > 0, "LoRA needs r of at least 1 and alpha above 0"),
        (0 <= config.lora_dropout < 1, "LoRA's dropout must be at least 0 and below 1"),
        (config.guard_path in ("activated", "full"), "the guard path must be activated or full"),
        (different, "categories must be a list of different names"),
        (type(config.verdict_every) is int and config.verdict_every >= 0, "verdict_every must be 0 or more"),
        (config.unsafe_head or names, "without the unsafe output, rows need categories"),
    ):
        if not is_right:
            raise ValueError(message)
    date.fromisoformat(config.date)


def lm_head_of(chat_model):
    """The language-model head. Raises ValueError for a model that has none, or nothing below it."""
    lm_head = chat_model.get_output_embeddings()
    if chat_model.base_model is chat_model or lm_head is None:
        raise ValueError(f"a {type(chat_model).__name__} has no base model below a language-model head")
    return lm_head


def check_guard_prompt(question, room, is_full):
    """Raise ValueError for no guard prompt, or one that leaves no room. question: its token ids."""
    if room < 1 or not (is_full or question):
        raise ValueError(f"a guard prompt of {len(question)} tokens does not fit this model's context")


def check_request(room, max_new_tokens, verdict_every, options):
    """Raise ValueError for an answer that `stream` cannot write. room: tokens that the context has left."""
    if max_new_tokens < 1 or verdict_every < 0:
        raise ValueError("max_new_tokens must be at least 1, and verdict_every at least 0")
    if room < max_new_tokens:
        raise ValueError(f"the context has room for {room} more tokens, not {max_new_tokens}")
    if options.get("streamer") is not None:
        raise ValueError("stream takes no streamer: it yields the answer itself")


def try_out(guard):
    """Raise ValueError, and put the chat model's layers back, unless it passes `compare`."""
    model = guard.chat_model
    try:
        compare(guard)
    except Exception as error:
        for name, module in list(model.named_modules()):
            if isinstance(module, LoRALinear):
                model.set_submodule(name, module.base)
        raise ValueError(f"a {type(model).__name__} cannot be guarded in this way: {error}") from error


@torch.no_grad()
def compare(guard):
    """Judge and answer two short texts. Raises ValueError that says what differs."""
    hello = {"role": "user", "content": "Hello"}
    bread = {"role": "user", "content": "How do I keep bread fresh? " * 12}
    short = chat.encode(guard.tokenizer, [hello])
    long = chat.encode(guard.tokenizer, [bread])
    model = guard.chat_model
    long_ids = long.ids[: guard.max_tokens]
    ids = guard.tensor(long_ids)  # (1, T)
    half = len(long_ids) // 2
    if sees_what_follows(model, ids, half):
        raise ValueError("what follows a text changes its hidden states")
    if not guard.is_full:
        chat.fork(guard.read(ids))  # raises for a cache that the guard cannot share
    whole = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (1, T, H)
    cache = DynamicCache(config=model.config)
    guard.read(ids[:, :half], cache)
    second = model.base_model(input_ids=ids[:, half:], past_key_values=cache, use_cache=True)
    expect_equal("read in two parts", second.last_hidden_state, whole[:, half:])
    judge_at_once(guard, short.ids, long_ids)
    options = {"max_new_tokens": 3, "min_new_tokens": 3}
    options |= {"num_beams": 1, "stop_strings": None, "return_dict_in_generate": False}
    *_, (answer, _) = guard.stream(short, verdict_every=2, **options)
    ids = guard.tensor(short.ids)
    options |= {"attention_mask": torch.ones_like(ids), "pad_token_id": guard.tokenizer.pad_token_id}
    generated = model.generate(ids, do_sample=False, **options)
    plain = generated[0, ids.shape[1] :].tolist()
    if answer != plain[: len(answer)]:  # an end token is no part of the answer
        raise ValueError("its answers under guard are not those of `generate`")


def judge_at_once(guard, short, long):
    """Judge two conversations at two cuts each. Raises ValueError if neighbours in a batch matter.

    Some models take a token's place in the cache for its position. On `activated` they are asked in turn.
    """
    cuts = [[2, len(short)], [2, len(long)]]
    guard.window = 0  # makes the activated path ask in turn
    alone = torch.cat([guard.states([short], cuts[:1]), guard.states([long], cuts[1:])])  # (2, 2, H)
    guard.window = window_of(guard.chat_model.config.get_text_config())
    try:
        together = guard.states([short, long], cuts)
        expect_equal("beside a longer text", together, alone)
    except Exception:
        if guard.is_full:
            raise
        guard.window = 0  # from now on it asks in turn, where neighbours cannot matter


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
    (gradient,) = torch.autograd.grad(hidden, leaves[0], torch.randn_like(hidden))
    return gradient[:, end:].any().item()


def expect_equal(where, states, wanted):
    """Raise ValueError unless all hidden states (..., H) are those of one computation."""
    distances = (states - wanted).float().norm(dim=-1)
    lengths = wanted.float().norm(dim=-1)
    apart = (distances / lengths).max().item()
    if not apart <= TOLERANCE.get(wanted.dtype, 1e-4):
        raise ValueError(f"a text has other hidden states {where} ({apart:.2g} of their length apart)")


def context_length(config):
    """Longest conversation in tokens.

    Beyond longrope's original length a model rotates all tokens of a batch in another way, so a verdict would
    depend on its neighbours.
    """
    names = ("max_position_embeddings", "max_seq_len")  # the last one is MPT's
    limits = [getattr(config, name, None) for name in names]
    rope = getattr(config, "rope_parameters", None) or {}
    for part in (rope, *rope.values()):  # some models have a rope for each kind of layer
        if isinstance(part, dict) and part.get("rope_type") == "longrope":
            limits.append(part["original_max_position_embeddings"])
    return min(filter(None, limits), default=sys.maxsize)


def window_of(config):
    """How many tokens every layer can look back, the token itself included."""
    names = ("sliding_window", "attention_chunk_size", "window_size")  # the last one is GPT-Neo's
    windows = [getattr(config, name, None) for name in names]
    return min(filter(None, windows), default=sys.maxsize)


def fix_date(template, date):
    """The chat template with this date for today's; the same text would have another verdict every day."""
    today = datetime.fromisoformat(date)
    call = r"strftime_now\s*\(\s*(['\"])(.*?)\1\s*\)"
    fixed = re.sub(call, lambda match: repr(today.strftime(match[2])), template)
    live = re.search(r"strftime_now(?!\s+is\s+(not\s+)?defined)", fixed)
    refuse(live, "the chat template asks for the date without a literal format; it would change every day")
    return fixed


def make_contiguous(_, inputs):
    """Copies a slice of hidden states. Without this, torch copies the lm_head weight for every prompt."""
    return tuple(x.clone(memory_format=torch.contiguous_format) for x in inputs)


def refuse_to_save(*_, **__):
    raise ValueError("this model carries a guard; load it again to save it. train.py saves the adapter")
