"""The chat path: how a conversation becomes token ids, how the frozen model answers it, and its cache."""

import copy
import functools
import re
import secrets
import threading
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation import GenerationMode

from errors import explain, from_json, refuse, undisguised

NAMES = ("prompt", "response", "messages", "category", "is_safe")  # the columns of a row that mean something
LETTERS = {"system": "s", "user": "u", "assistant": "a"}
CONVERT = "tools/convert.py writes our columns from those of other data sets"
MARK = secrets.token_hex(8)  # stands for a text; random, so no text or template contains it
TOKENIZER_LOCK = threading.Lock()  # reading texts switches how the tokenizer treats control tokens


def conversation(row):
    """The messages of a row, [{"role", "content"}, ...], without a blank answer.

    row: {"prompt", "response"} or {"messages"}. Raises UserError if it is no conversation of texts.
    """
    refuse(not isinstance(row, dict), "a row must be an object with names")
    near = [name for name in row if name not in NAMES and str(name).strip().lower() in NAMES]
    if "response" not in row and not row.get("messages"):
        near += [name for name in row if str(name).startswith("response") and isinstance(row[name], str)]
    refuse(near, f"is {near[:1]} meant to be `response` or another of our columns? Rename it; {CONVERT}")
    texts = {"user": row.get("prompt"), "assistant": row.get("response")}
    pair = [{"role": role, "content": text} for role, text in texts.items() if text is not None]
    messages = from_json(row.get("messages"))
    refuse(messages and any(texts.values()), "a row has either `messages`, or `prompt` and `response`")
    with explain("a message is {role, content}, and both are text"):
        # Parquet fills absent fields with null.
        messages = [{name: m[name] for name in m if m[name] is not None} for m in messages or pair]
        roles = "".join(LETTERS[m["role"]] for m in messages)
        "".join(m["content"].strip() for m in messages).encode()  # fails for what was not UTF-8
        other = set().union(*messages) - {"role", "content"}
        refuse(other, f"the guard would not see these fields of a message: {', '.join(sorted(other))}")
    form = "`messages` with perhaps a system message, and then user and assistant in turn"
    in_turn = re.fullmatch("s?u(au)*a?", roles)
    refuse(not in_turn, f"a row needs text as `prompt` (and `response`), or {form}; {CONVERT}")
    return messages[:-1] if roles.endswith("a") and not messages[-1]["content"].strip() else messages


class Text(NamedTuple):
    """A conversation as token ids. What is judged is its answer, or without one its last prompt."""

    ids: list[int]
    start: int  # where the judged part starts
    is_answer: bool
    undisguised: tuple = ()  # one Text: the same conversation in plain letters, if that differs

    def cuts(self, every, shift=0):
        """Where it is judged: every so many tokens, all `shift` tokens earlier, and its end."""
        end = len(self.ids)
        return [*range(self.start + every - shift, end, every), end] if every else [end]


def encode(tokenizer, messages) -> Text:
    """Messages [{"role", "content"}, ...] in the chat template.

    An assistant's message at the end is the answer. Its tokens follow the generation prompt, as if the model
    had written them, and no end-of-turn token follows. Control tokens that are spelled out in a text
    ("<|im_end|>") stay plain text.
    Raises UserError if the template does not show the texts whole, or a text would become a control token.
    """
    plain = [message | {"content": undisguised(message["content"])} for message in messages]
    other = () if plain == messages else (encode(tokenizer, plain),)
    *earlier, last = messages
    if last["role"] == "user":
        ids = render(tokenizer, messages)
        dot = read(tokenizer, [*earlier, last | {"content": "."}])  # differs from the text on
        return Text(ids, common_beginning(ids, dot), False, other)
    ids = render(tokenizer, earlier)
    answer_ids = read(tokenizer, [last], chat_template="{{ messages[0]['content'] }}")
    control, _ = control_tokens(tokenizer, len(tokenizer))
    refuse(control.keys() & answer_ids, "a text of this conversation would become a control token")
    return Text(ids + answer_ids, len(ids), True, other)


def common_beginning(ids, other_ids):
    """How many tokens two lists have in common at their beginnings."""
    ends = range(min(len(ids), len(other_ids)))
    return next((n for n in ends if ids[n] != other_ids[n]), len(ends))


def render(tokenizer, messages):
    """Token ids of messages up to a prompt, with the generation prompt. Raises UserError as `encode` does."""
    # transformers removes these two characters from texts. Remove them, so all renderings see the same text.
    messages = [m | {"content": re.sub("[\U000f0000\U000f0001]", "", m["content"])} for m in messages]
    marked, visible = [], []
    for n, m in enumerate(messages):
        twin = m | {"content": f"{MARK}{n}{MARK}" if m["content"].strip() else ""}
        marked.append(twin)
        # Templates drop reasoning from earlier answers, and the chat model does not read it either.
        visible.append(twin if m["role"] == "assistant" else m)
    ids, wanted_ids = read(tokenizer, messages), read(tokenizer, marked)
    shown = write(tokenizer, visible, add_generation_prompt=True)
    skeleton = write(tokenizer, marked, add_generation_prompt=True)
    # The skeleton with the texts in their places must be what the template wrote.
    filled = re.sub(f"{MARK}([0-9]+){MARK}", lambda mark: visible[int(mark[1])]["content"], skeleton)
    missing = any(m["content"] not in skeleton for m in marked if m["role"] != "assistant")
    drops = missing or "".join(shown.split()) != "".join(filled.split())
    refuse(drops, "the chat template drops a part of this conversation, so the guard would not see it")
    control, _ = control_tokens(tokenizer, len(tokenizer))
    written, wanted = ([n for n in part if n in control] for part in (ids, wanted_ids))
    refuse(written != wanted, "a text of this conversation would become a control token")
    return ids


def read(tokenizer, messages, **options):
    """Token ids of messages in a chat template, with the control tokens in their texts as plain text."""
    control, literal = control_tokens(tokenizer, len(tokenizer))
    options |= {"add_generation_prompt": True, "return_dict": False}
    options["sanitize_control_tokens"] = any(literal.search(m["content"]) for m in messages)
    with explain("the chat template cannot write this conversation"), TOKENIZER_LOCK:
        if options["sanitize_control_tokens"]:
            tokenizer.chat_control_tokens = list(control.values())
        return tokenizer.apply_chat_template(messages, **options)


def write(tokenizer, messages, **options):
    """Messages in a chat template, as text."""
    with explain("the chat template cannot write this conversation"):
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)


@functools.lru_cache(maxsize=8)
def control_tokens(tokenizer, size):
    """({id: control token} of a tokenizer, a pattern that finds one spelled out in a text).

    Every added token counts, because a template may build one from parts. Gemma's runs of spaces are text.
    size: len(tokenizer), so tokens that are added later count as well.
    """
    added = tokenizer.get_added_vocab().items()
    control = {n: token for token, n in added if token.replace("\u2581", " ").strip()}
    return control, re.compile("|".join(map(re.escape, control.values())) or "(?!)")


def answer_opening(tokenizer, messages):
    """Token ids that the template writes between its generation prompt and an answer; usually none.

    GPT-OSS's writes the name of a channel there, Qwen3's an empty thinking block.
    """
    marked = [m | {"content": MARK} for m in (*messages, {"role": "assistant"})]
    prompt, whole = write(tokenizer, marked[:-1], add_generation_prompt=True), write(tokenizer, marked)
    opening = whole.removeprefix(prompt).partition(MARK)[0] if whole.startswith(prompt) else ""
    with TOKENIZER_LOCK:
        return tokenizer(opening, add_special_tokens=False).input_ids


def shown_text(tokenizer, ids, opening=()):
    """The text of an answer, without a last character that lacks some of its tokens.

    opening: what answer_opening returned. If it has special tokens, the answer comes in channels. Then only
    the text behind its last occurrence is for the user, and the template keeps only that.
    """
    if set(opening) & set(tokenizer.all_special_ids):
        ends = [n for n in range(len(opening), len(ids) + 1) if ids[n - len(opening) : n] == opening]
        ids = ids[ends[-1] :] if ends else []
    for missing in range(4):  # a character has up to four tokens
        text = tokenizer.decode(ids[: len(ids) - missing], skip_special_tokens=True)
        if not text.endswith("\ufffd"):
            return text
    return tokenizer.decode(ids, skip_special_tokens=True).rstrip("\ufffd")


@dataclass
class Past:
    """What a chat has read so far. Given to the next `stream`, only what is new is read."""

    ids: list[int] = field(default_factory=list)
    cache: DynamicCache | None = None

    def rewind(self, ids, config):
        """Go back to what this has in common with `ids`. A cache that cannot be cropped starts anew."""
        kept, self.ids = self.ids, []  # so the next turn reads all again if this is interrupted
        common = common_beginning(kept, ids[:-1])  # the last token is always read: its logits are needed
        surplus = len(kept) - common
        if not common or (surplus and any(type(layer) is not DynamicLayer for layer in self.cache.layers)):
            self.cache = DynamicCache(config=config)
            common = 0
        elif surplus:
            self.cache.crop(-surplus)
        self.ids = kept[:common]


@torch.no_grad()
def decode(chat_model, input_ids, logits_processor, stopping_criteria, generation_config, past, **inputs):
    """Transformers' sampling loop as a generator: yield (answer ids, done) for every token.

    A token enters the cache when the next one is computed. The answer that is yielded is in the cache.
    Raises UserError for beams and assistants.
    """
    modes = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
    by_token = len(input_ids) == 1 and generation_config.get_generation_mode() in modes
    refuse(not by_token, "stream writes one answer token by token: no beams, no assistant")
    eos_ids = generation_config.eos_token_id
    eos_ids = eos_ids if isinstance(eos_ids, list) else [eos_ids]
    keep = {name: n for name, n in inputs.items() if name == "logits_to_keep"}  # if the model accepts it
    ids, done, stopped = input_ids, False, False  # ids (1, T)
    while not done:
        new = ids[:, len(past.ids) :]  # (1, tokens that the cache does not hold yet)
        if "position_ids" in inputs:  # without them, a first layer without attention counts from 0
            keep["position_ids"] = torch.arange(len(past.ids), ids.shape[1], device=ids.device)[None]
        past.ids = []  # so the next turn reads all again if this pass is interrupted
        output = chat_model(new, past_key_values=past.cache, use_cache=True, **keep)
        past.ids = ids[0].tolist()
        answer = past.ids[input_ids.shape[1] :]
        if stopped:
            yield answer, True
            return
        scores = logits_processor(ids, output.logits[:, -1].float())  # (1, vocabulary)
        if generation_config.do_sample:
            token = torch.multinomial(scores.softmax(-1), 1)  # (1, 1)
        else:
            token = scores.argmax(-1, keepdim=True)
        done = token.item() in eos_ids
        yield answer, done
        ids = torch.cat([ids, token], dim=1)
        stopped = stopping_criteria(ids, scores).all()


def fork(cache):
    """A cache that starts with the same tensors and grows alone, so the original stays whole.

    Raises UserError for other kinds of cache.
    """
    parts = cache.layers if type(cache) is DynamicCache else [cache]
    kinds = set(map(type, parts)) - {DynamicLayer, DynamicSlidingWindowLayer}
    names = ", ".join(kind.__name__ for kind in kinds)
    refuse(kinds, f"the activated path cannot use this model's cache ({names}); train with --guard-path full")
    forked = copy.copy(cache)
    forked.layers = [copy.copy(layer) for layer in parts]
    return forked


def moderate_turn(guard, messages, past=None, max_new_tokens=128, **options):
    """Judge a prompt and answer it: yield (answer so far, Verdict), and end after the first flagged pair.

    The flagged text is yielded too, for the record: look at the verdict before you show a text.
    messages: a conversation up to the prompt. past, options: as for GuardedChat.stream.
    Without room for an answer in the context, only (None, Verdict) on the prompt is yielded.
    """
    prompt = encode(guard.tokenizer, messages)
    if len(prompt.ids) + max_new_tokens > guard.max_tokens:
        yield None, guard.verdicts([prompt])[0]
        return
    opening = answer_opening(guard.tokenizer, messages)
    for answer, verdict in guard.stream(prompt, past, max_new_tokens=max_new_tokens, **options):
        yield shown_text(guard.tokenizer, answer, opening), verdict
        if verdict.flagged:
            return
