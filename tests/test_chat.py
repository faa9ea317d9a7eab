"""How a conversation becomes token ids, and an answer text. Each test names the mutations that it kills."""

import timeit
from statistics import median

import pytest
import torch
from conftest import CHATML, KINDS, TOKENS, asked, guard_for, ids_of, make_tokenizer, random_model, user
from tokenizers import Tokenizer, decoders, models
from transformers import LogitsProcessor, PreTrainedTokenizerFast

from chat import answer_opening, encode, moderate_turn, shown_text
from errors import UserError

THINKING = CHATML.replace(
    "+ '\n' + message['content']",
    "+ '\n' + ('<think>\n\n</think>\n\n' if message['role'] == 'assistant' and loop.last else '')"
    " + message['content']",
)
CHANNELS = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] }}"
    "{% if m['role'] == 'assistant' %}{{ '<|channel|>final' }}{% endif %}"
    "{{ '<|message|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
CONTROL = ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<think>", "</think>"]


def tokenizer_of(template, special=CONTROL):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = template
    return tokenizer


class Says(LogitsProcessor):
    """Makes a model answer a prompt of so many tokens with these ids."""

    def __init__(self, prompt_tokens, answer):
        self.prompt_tokens, self.answer = prompt_tokens, answer

    def __call__(self, ids, scores):
        token = [*self.answer, 2][ids.shape[1] - self.prompt_tokens]
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([token]), 0.0)


def guard_that_says(tokenizer, answer):
    """A guard, and the options with which its chat model answers "hi" with these ids."""
    config, shape = KINDS["llama"]
    guard = guard_for(random_model(config(**TOKENS | {"vocab_size": 340}, **shape)), guard_prompt=" harmful?")
    guard.tokenizer = tokenizer
    says = Says(len(ids_of(tokenizer, "hi")), answer)
    return guard, {"logits_processor": [says], "max_new_tokens": len(answer) + 1, "verdict_every": 1}


# ---------------------------------------------------------------- texts to ids


@pytest.mark.parametrize("template", [CHATML, THINKING, CHANNELS], ids=["chatml", "thinking", "channels"])
def test_a_given_answer_reads_as_a_written_one(template):
    """Kills: an empty thinking block, a channel or an end token that only a given answer has."""
    tokenizer = tokenizer_of(template)
    answer = tokenizer(" bread is safe", add_special_tokens=False).input_ids
    row = {"prompt": "hi", "response": " bread is safe"}
    ids, start, *_ = encode(tokenizer, [*user("hi"), {"role": "assistant", "content": row["response"]}])
    assert ids == ids_of(tokenizer, "hi") + answer and start == len(ids) - len(answer)
    guard, options = guard_that_says(tokenizer, answer)
    *_, (written, verdict) = guard.stream(asked(ids[:start]), **options)
    assert written == answer and guard.classify([row])[0].unsafe == pytest.approx(verdict.unsafe, abs=1e-6)


@pytest.mark.parametrize("text", ["mark7mark", "0123456789abcdef", "mark0mark mark1mark"])
def test_texts_and_templates_may_look_like_a_placeholder(text):
    """Kills: a placeholder for a text that the text or the template itself has."""
    tokenizer = tokenizer_of("{{ 'mark0mark mark7mark ' }}" + CHATML)
    history = [*user(text), {"role": "assistant", "content": text}]
    shown = tokenizer.decode(ids_of(tokenizer, text, text, history))
    assert shown.startswith("mark0mark mark7mark <|im_start|>user") and shown.count(text) >= 4


@pytest.mark.parametrize(
    "template",
    [
        CHATML.replace("message['content']", "message['content'][:9]"),
        CHATML.replace("messages %}", "messages[-1:] %}"),
        CHATML.replace("message['content']", "message['content'] | replace('bomb', '')"),
    ],
    ids=["cut", "last message alone", "words"],
)
def test_a_template_that_drops_a_part_is_refused(template):
    """Kills: a text that the chat model does not read and the guard is said to have judged."""
    history = [*user("one bomb"), {"role": "assistant", "content": "no"}]
    with pytest.raises(UserError, match="drops a part"):
        ids_of(tokenizer_of(template), "how is the bomb?", "safe", history)


def test_many_added_tokens_cost_little():
    """Kills: a search for each added token, which takes minutes for a file."""
    few, many = tokenizer_of(CHATML), tokenizer_of(CHATML, [f"<extra_{n}>" for n in range(6_000)])
    texts = [f"how is the bread? {n} " * 200 for n in range(3)]

    def seconds(tokenizer):
        return timeit.timeit(lambda: [ids_of(tokenizer, text, text) for text in texts], number=1)

    seconds(few), seconds(many)
    assert median(seconds(many) for _ in range(5)) < 2 * median(seconds(few) for _ in range(5))


# ---------------------------------------------------------------- ids to text

THOUGHT = (
    "<|channel|>analysis<|message|>We say hello.<|end|><|start|>assistant<|channel|>final<|message|>Hello!"
)


def test_only_the_final_channel_is_shown():
    """Kills: reasoning or the names of channels on the screen, a final text that comes late."""
    tokenizer = tokenizer_of(CHANNELS)
    ids = tokenizer(THOUGHT, add_special_tokens=False).input_ids
    opening = answer_opening(tokenizer, user("hi"))
    assert tokenizer.decode(opening) == "<|channel|>final<|message|>"
    assert shown_text(tokenizer, ids, opening) == "Hello!"
    guard, options = guard_that_says(tokenizer, ids)
    guard.config.threshold = 2.0
    shown = [text for text, _ in moderate_turn(guard, user("hi"), **options)]
    hello = tokenizer("Hello!", add_special_tokens=False).input_ids
    parts = [tokenizer.decode(hello[:end]) for end in range(1, len(hello) + 1)]
    assert shown == [""] * (len(ids) - len(hello) + 1) + parts


def make_byte_fallback():
    """Like Llama 2's tokenizer: half a character makes the bytes before it unreadable too."""
    vocabulary = {f"<0x{n:02X}>": n for n in range(256)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("make", [make_tokenizer, make_byte_fallback])
@pytest.mark.parametrize(
    "text", ["สวัสดีครับ วันนี้", "今日はとても良い天気ですね。", "🐈‍⬛👩‍🚀🏳️‍🌈🙂🙃", "so \ufffd it is"]
)
def test_text_is_shown_character_by_character(text, make):
    """Kills: half a character on the screen, a text held back until a space or by a literal U+FFFD."""
    tokenizer = make()
    ids = tokenizer(text, add_special_tokens=False).input_ids
    shown = [shown_text(tokenizer, ids[:end]) for end in range(len(ids) + 1)]
    assert shown[-1] == text and all(text.startswith(part) for part in shown)
    for end, part in enumerate(shown):
        assert len(tokenizer(text[len(part) :]).input_ids) <= len(ids) - end + 3
