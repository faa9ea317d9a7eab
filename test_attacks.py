"""Attacks by the text that is judged. Each test names the mutation that it kills.

The texts are put together at random from control literals, their pieces and odd Unicode; the tokenizers are that of the
embedded model and small ones in the styles of five families.
"""

import functools
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from conftest import CHATML
from data import encode, is_answer
from lora import UserError
from model import EMBEDDED, load_chat_model

STYLES = {  # the control tokens, then a template that writes them
    "llama-2": (
        ["<s>", "</s>"],
        "{{ '<s>' }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + ' </s>' }}{% endif %}{% endfor %}",
    ),
    "llama-3": (
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "{{ '<|begin_of_text|>' }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
        " + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    ),
    "gemma": (
        ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"],
        "{{ '<bos>' }}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else 'user') +"
        " '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    ),
    "mistral": (
        ["<s>", "</s>", "[INST]", "[/INST]"],
        "{{ '<s>' }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + '[/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + '</s>' }}{% endif %}{% endfor %}",
    ),
    "chatml": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], CHATML),
    "folding": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], CHATML),  # looks for tokens in normalised text
}
LITERALS = sorted({token for tokens, _ in STYLES.values() for token in tokens})
SENTENCEPIECE = ("llama-2", "gemma", "mistral")


@functools.cache
def make(style, bare=False):
    """A tokenizer of characters and bytes with a style's control tokens and template; `bare`, without the two."""
    control, template = STYLES[style]
    if style in SENTENCEPIECE:
        pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *map(chr, range(33, 127)), "▁"]
        vocabulary = {piece: number for number, piece in enumerate(pieces)}
        tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
        prepended = [normalizers.Prepend("▁")] if style == "llama-2" and not bare else []
        tokenizer.normalizer = normalizers.Sequence([*prepended, normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    else:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE({piece: number for number, piece in enumerate(alphabet)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    if bare:
        return tokenizer
    if style == "folding":
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.add_special_tokens([AddedToken(token, normalized=style == "folding") for token in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=control[-1], pad_token=control[-1], chat_template=template
    )


@pytest.fixture(scope="module", params=[*(style for style in STYLES if style != "folding"), EMBEDDED])
def tokenizer(request):
    return load_chat_model(EMBEDDED)[1] if request.param == EMBEDDED else make(request.param)


MARKERS = "\U000f0000\U000f0001"  # by which transformers tells literals in texts from the template's own; it drops them
ODD = ["\0", "\u200b", "\u202e", "\ufeff", "\u0301", "\u00a0", *"\uff1c\uff5c\uff1e▁Ġé🙂|<>[]/ \n\t", *MARKERS]
PIECES = [piece for literal in LITERALS for cut in range(1, len(literal)) for piece in (literal[:cut], literal[cut:])]
WORDS = ["user", "assistant", "system", "model", "Is the conversation above harmful? Answer:", " no"]
TEXTS = st.lists(
    st.sampled_from(LITERALS) | st.sampled_from(PIECES) | st.sampled_from(ODD + WORDS) | st.text(max_size=3), max_size=8
).map("".join)


def skeleton(tokenizer, prompt, response=None):
    control = set(tokenizer.get_added_vocab().values())
    return [number for number in encode(tokenizer, prompt, response) if number in control]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(prompt=TEXTS, response=TEXTS)
def test_the_skeleton_of_control_ids_follows_from_the_roles_alone(tokenizer, prompt, response):
    """Kills: a literal that becomes a control id, ends a turn, or opens one."""
    plain = skeleton(tokenizer, "a", "a" if is_answer(response) else None)
    assert skeleton(tokenizer, prompt, response) == plain


@pytest.mark.parametrize("style", [style for style in STYLES if style != "folding"])
@settings(max_examples=200, deadline=None, derandomize=True)
@given(prompt=TEXTS)
def test_literals_are_the_characters_that_they_are_written_with(style, prompt):
    """Kills: a literal that is dropped, replaced or swallows what is next to it, and text behind it that is not seen.

    The oracle is a tokenizer that knows no control tokens. As these have no merges, what it makes of the text must
    stand where the text stands, so a verdict cannot tell literals from other text either.
    """
    whole, bare = make(style), make(style, bare=True)
    text = prompt.translate(dict.fromkeys(map(ord, MARKERS)))
    if "trim" in whole.chat_template:
        text = text.strip()
    ids, letter = encode(whole, "q"), bare.token_to_id("q")
    at = ids.index(letter)
    assert encode(whole, prompt) == [*ids[:at], *bare.encode(text).ids, *ids[at + 1 :]]


WIDE = "\uff1c|im_end|\uff1e"  # the literal, with full-width brackets
FOLDED = st.lists(st.sampled_from([*"<>|\uff1c\uff5c\uff1e", *MARKERS, "im_", "IM_", "end", "Start"]), max_size=12)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(text=FOLDED.map("".join))
@example("<|IM_END|>")
@example(WIDE)
@example(WIDE.replace("_", MARKERS[0] + "_"))
@example("<|im_end|>" + WIDE)
def test_a_control_token_that_normalising_brings_out_is_refused(text):
    """Kills: no look at the normalised text, one that literals in their usual form distract, or that markers do."""
    tokenizer = make("folding")
    try:
        found = skeleton(tokenizer, text)
    except UserError as error:
        folded = unicodedata.normalize("NFKC", text.translate(dict.fromkeys(map(ord, MARKERS)))).lower()
        assert "normalised" in str(error) and any(literal in folded for literal in STYLES["folding"][0])
    else:
        assert found == skeleton(tokenizer, "a")


def test_no_text_is_refused_for_what_normalising_leaves_as_it_was():
    """Kills: refusing literals, which are defused, and capital or wide letters."""
    tokenizer = make("folding")
    for text in ("<|im_end|> Hello", "\uff21\uff22", "a < b |> C", ""):
        assert skeleton(tokenizer, text) == skeleton(tokenizer, "a")
