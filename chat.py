"""The chat path: how a conversation becomes token ids, and how the frozen model answers it.

This module holds all that is specific to transformers' tokenizers, decoding and caches.
"""

import contextlib
import copy
import functools
import inspect
import re
import sys
import threading
from dataclasses import dataclass, field
from datetime import datetime

import torch
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation import GenerationMode

from common import UserError, explain, refuse
from lora import linear_size

TOKENIZER_LOCK = threading.Lock()
WINDOW = 192  # tokens, as long as most training rows: in longer windows a harmful passage goes unnoticed
WORTH_SHARING = 128  # the smallest saving, in tokens, that pays for the extra pass


def encode(tokenizer, messages):
    """Messages [{"role", "content"}, ...] -> (token ids, where the answer starts), in the chat template.

    An assistant's message at the end is the answer. It is left open, without an end-of-turn token, so a
    finished answer and one that is still being written are judged in the same form. Control tokens that are
    spelled out in a text ("<|im_end|>") stay plain text.
    Raises UserError if the template does not show the texts whole, or a text would become a control token.
    """
    answered = messages[-1]["role"] == "assistant"
    before = render(tokenizer, messages[: len(messages) - answered], add_generation_prompt=True)
    if not answered:
        return before, len(before)
    ids = render(tokenizer, messages, continue_final_message=True)
    return ids, shared_length([before, ids])


def render(tokenizer, messages, **options):
    """Token ids of messages. Raises UserError as `encode` does."""
    # transformers removes these two characters from texts. Without them, all renderings read the same text.
    messages = [m | {"content": re.sub("[\U000f0000\U000f0001]", "", m["content"])} for m in messages]
    marked = [m | {"content": f"mark{n}mark" * bool(m["content"].strip())} for n, m in enumerate(messages)]
    # Templates drop reasoning from earlier answers, and the chat model does not read it either.
    exempt = [m["role"] == "assistant" for m in messages[:-1]] + [False]
    visible = [mark if skip else m for m, mark, skip in zip(messages, marked, exempt, strict=True)]
    # Every added token counts, because a template may build one from parts. Runs of spaces are text (Gemma).
    control = {t: n for t, n in tokenizer.get_added_vocab().items() if t.replace("\u2581", " ").strip()}
    with explain("the chat template cannot write this conversation"), TOKENIZER_LOCK:
        shown = tokenizer.apply_chat_template(visible, tokenize=False, **options)
        skeleton = tokenizer.apply_chat_template(marked, tokenize=False, **options)
        # Sanitizing switches how the tokenizer treats control tokens, for all threads.
        tokenizer.chat_control_tokens = list(control)
        options |= {"sanitize_control_tokens": True, "return_dict": False}
        ids = tokenizer.apply_chat_template(messages, **options)
        skeleton_ids = tokenizer(skeleton, add_special_tokens=False).input_ids
    check_shown(shown, skeleton, visible, exempt)
    check_control_tokens(ids, skeleton_ids, set(control.values()))
    return ids


def fix_date(template, date):
    """The chat template with this date for today's; the same text would have another verdict every day."""
    today = datetime.fromisoformat(date)
    call = r"strftime_now\s*\(\s*(['\"])(.*?)\1\s*\)"
    fixed = re.sub(call, lambda found: repr(today.strftime(found[2])), template)
    live = re.search(r"strftime_now(?!\s+is\s+(not\s+)?defined)", fixed)
    refuse(live, "the chat template asks for the date without a literal format; it would change every day")
    return fixed


def check_shown(shown, skeleton, messages, exempt):
    """Raise UserError if the template drops part of a text, which the guard would then not see."""
    needed = [n for n, m in enumerate(messages) if m["content"].strip() and not exempt[n]]
    filled = re.sub("mark([0-9]+)mark", lambda mark: messages[int(mark[1])]["content"], skeleton)
    missing = any(f"mark{n}mark" not in skeleton for n in needed)
    differs = "".join(shown.split()) != "".join(filled.split())
    refuse(
        missing or differs,
        "the chat template drops a part of this conversation, so the guard would not see it",
    )


def check_control_tokens(ids, skeleton_ids, control):
    """Raise UserError if a text became a control token, as some tokenizers' normalisers can cause."""
    changed = [n for n in ids if n in control] != [n for n in skeleton_ids if n in control]
    refuse(changed, "a text of this conversation would become a control token of the chat template")


@dataclass
class Past:
    """What a chat has read so far. Given to the next `stream`, only what is new is read."""

    ids: list[int] = field(default_factory=list)
    cache: DynamicCache | None = None

    def rewind(self, ids, config):
        """Go back to what this has in common with `ids`. A cache that cannot be cropped starts anew."""
        common = shared_length([self.ids, ids[:-1]])  # the last token is always read: its logits are needed
        kept, self.ids = self.ids, []  # so the next turn reads all again if this is interrupted
        shrinks = common < len(kept)
        if not common or (shrinks and any(type(layer) is not DynamicLayer for layer in self.cache.layers)):
            self.cache, common = DynamicCache(config=config.get_text_config(decoder=True)), 0
        elif shrinks:
            self.cache.crop(common - len(kept))  # a negative number of tokens to remove
        self.ids = kept[:common]


@torch.no_grad()
def decode(chat_model, input_ids, logits_processor, stopping_criteria, generation_config, past, **inputs):
    """Transformers' sampling loop as a generator: yield (answer ids, done) for every token.

    A token enters the cache when the next one is computed. The answer that is yielded is in the cache.
    Raises UserError for beams.
    """
    modes = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
    by_token = len(input_ids) == 1 and generation_config.get_generation_mode() in modes
    refuse(not by_token, "stream writes one answer token by token; it takes no beams and no assistant")
    eos_ids = generation_config.eos_token_id
    eos_ids = eos_ids if isinstance(eos_ids, list) else [eos_ids]
    keep = {name: n for name, n in inputs.items() if name == "logits_to_keep"}  # where the model knows it
    ids, stopped = input_ids, False  # (1, T)
    while True:
        new = ids[:, len(past.ids) :]  # (1, tokens that the cache does not hold yet)
        if "position_ids" in inputs:  # a model whose first layer has no attention would count them wrongly
            keep["position_ids"] = torch.arange(len(past.ids), ids.shape[1], device=ids.device)[None]
        past.ids = []  # so the next turn reads all again if this pass is interrupted
        output = chat_model(new, past_key_values=past.cache, use_cache=True, **keep)
        past.ids = ids[0].tolist()
        if stopped:
            yield past.ids[input_ids.shape[1] :], True
            return
        scores = logits_processor(ids, output.logits[:, -1].float())  # (1, vocabulary)
        if generation_config.do_sample:
            token = torch.multinomial(scores.softmax(-1), 1)  # (1, 1)
        else:
            token = scores.argmax(-1, keepdim=True)
        done = token.item() in eos_ids
        yield past.ids[input_ids.shape[1] :], done
        if done:
            return
        ids = torch.cat([ids, token], dim=1)
        stopped = bool(stopping_criteria(ids, scores).all())


def shared_length(conversations):
    """How many token ids all conversations have in common at their start."""
    first, last = min(conversations), max(conversations)  # in the order of their ids, so these differ first
    shorter = min(len(first), len(last))
    return next((n for n in range(shorter) if first[n] != last[n]), shorter)


def shared_tokens(chat_model, conversations):
    """How many tokens at the start of B conversations to read once. Each keeps a token to read.

    0 if a pass of its own would cost more, or if padding inside a row would change what the model computes:
    with sliding windows, local attention (GPT-Neo's attention_types) or positions that it counts itself.
    """
    shared = shared_length([ids[:-1] for ids in conversations])
    if shared * (len(conversations) - 1) < WORTH_SHARING:
        return 0
    takes_positions = "position_ids" in inspect.signature(chat_model.base_model.forward).parameters
    config = chat_model.config.get_text_config(decoder=True)
    plain = all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)
    return shared if plain and takes_positions and not hasattr(config, "attention_types") else 0


@torch.no_grad()
def read_shared(chat_model, conversations):
    """Read once what B conversations begin with, such as a system prompt -> (cache of B rows, its P tokens).

    Returns (None, 0) if nothing is shared.
    """
    shared = shared_tokens(chat_model, conversations)
    if shared == 0:
        return None, 0
    ids = torch.tensor([conversations[0][:shared]], device=chat_model.device)
    cache = chat_model.base_model(input_ids=ids, use_cache=True).past_key_values
    cache.batch_repeat_interleave(len(conversations))
    return cache, shared


def fork(cache):
    """A cache that starts with the same tensors and grows alone, so the original stays whole.

    Cropping the guard's tokens off again would not do: a sliding-window layer drops old tokens.
    Raises UserError for other kinds of cache.
    """
    kinds = {type(part) for part in (cache.layers if type(cache) is DynamicCache else [cache])}
    kinds -= {DynamicLayer, DynamicSlidingWindowLayer}
    odd = "it has none" if cache is None else ", ".join(kind.__name__ for kind in kinds)
    refuse(kinds, f"the activated path cannot use this model's cache ({odd}); train with --guard-path full")
    forked = copy.copy(cache)
    forked.layers = [copy.copy(layer) for layer in cache.layers]
    return forked


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


def split_windows(ids, context):
    """A text as it is, or if it exceeds the context, in windows of WINDOW tokens that overlap by half."""
    if len(ids) <= context:
        return [ids]
    size = min(context, WINDOW)
    return [ids[start : start + size] for start in range(0, len(ids) - size // 2, size - size // 2)]


@torch.no_grad()
def reached_layers(chat_model, ids):
    """Names of the linear layers below the language-model head that a text passes through.

    ids: any tokens of a text. A router may send them past some experts, but experts are alike.
    """
    layers, called = {name: m for name, m in chat_model.named_modules() if linear_size(m)}, set()
    hooks = [m.register_forward_hook(lambda *_, n=name: called.add(n)) for name, m in layers.items()]
    chat_model.base_model(input_ids=torch.tensor([ids], device=chat_model.device), use_cache=False)
    for hook in hooks:
        hook.remove()
    kind = functools.partial(re.sub, r"experts\.\d+", "experts")
    kinds = {kind(name) for name in called}
    return {name for name in layers if kind(name) in kinds}


def checkpoint_gradients(chat_model, gate):
    """Keep only what enters each layer of the full path; the backward pass computes the rest again."""
    from transformers.modeling_layers import GradientCheckpointingLayer  # slow to import, and seldom needed

    options = {"use_reentrant": False, "context_fn": lambda: (contextlib.nullcontext(), gate.opened())}
    layers = [m for m in chat_model.modules() if isinstance(m, GradientCheckpointingLayer)]
    refuse(not layers, f"a {type(chat_model).__name__} has no layers for gradient checkpointing")
    for module in layers:
        module.forward = functools.partial(checkpoint, module.forward, **options)


def refuse_to_save(*_, **__):
    raise UserError("this model has a guard inside; the guard saves its adapter, the model stays as it was")


def make_contiguous(_, inputs):
    """Copies a slice of hidden states. Without this, torch copies the lm_head weight for every prompt."""
    return tuple(x.clone(memory_format=torch.contiguous_format) for x in inputs)
