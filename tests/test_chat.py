"""How a conversation becomes token ids, and an answer text. Each test names the mutations that it kills."""

import pytest
from conftest import ids_of, make_guard, make_tokenizer, user, verdict_on
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from chat import encode, moderate_turn, shown_text

CHANNELS = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] }}"
    "{% if m['role'] == 'assistant' %}{{ '<|channel|>final' }}{% endif %}"
    "{{ '<|message|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
THOUGHT = "<|channel|>analysis<|message|>Say hi.<|end|><|start|>assistant<|channel|>final<|message|>Hello!"
CONTROL = ["<|start|>", "<|channel|>", "<|message|>", "<|end|>"]


def tokenizer_of_channels():
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": CONTROL})
    tokenizer.chat_template = CHANNELS
    return tokenizer


def test_a_given_answer_reads_as_a_written_one():
    """Kills: a channel or an end token that only a given answer has."""
    tokenizer = tokenizer_of_channels()
    answer = tokenizer(" bread is safe", add_special_tokens=False).input_ids
    ids, start, *_ = encode(tokenizer, [*user("hi"), {"role": "assistant", "content": " bread is safe"}])
    assert ids == ids_of(tokenizer, "hi") + answer and start == len(ids) - len(answer)


def test_only_the_final_channel_is_shown():
    """Kills: reasoning or the names of channels on the screen, a final text that comes late."""
    tokenizer = tokenizer_of_channels()
    ids = tokenizer(THOUGHT, add_special_tokens=False).input_ids
    guard = make_guard()
    guard.tokenizer = tokenizer
    pairs = [(ids[:end], verdict_on(guard, [-9.0] * 3, end)) for end in range(len(ids) + 1)]
    guard.stream = lambda *_, **__: pairs
    shown = [text for text, _ in moderate_turn(guard, user("hi"))]
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
@pytest.mark.parametrize("text", ["今日はとても良い天気ですね。", "🐈‍⬛👩‍🚀🏳️‍🌈🙂🙃", "so \ufffd it is"])
def test_text_is_shown_character_by_character(text, make):
    """Kills: half a character on the screen, a text held back until a space or by a literal U+FFFD."""
    tokenizer = make()
    ids = tokenizer(text, add_special_tokens=False).input_ids
    shown = [shown_text(tokenizer, ids[:end]) for end in range(len(ids) + 1)]
    assert shown[-1] == text and all(text.startswith(part) for part in shown)
    for end, part in enumerate(shown):
        assert len(tokenizer(text[len(part) :]).input_ids) <= len(ids) - end + 3
