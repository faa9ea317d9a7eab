"""Answers under guard, and chats that keep their cache. Each test names the mutations that it kills."""

from contextlib import contextmanager

import pytest
import torch
from conftest import CONTEXT, KINDS, asked, make_guard, make_model, make_tokenizer, plain, score
from transformers import StopStringCriteria

from chat import Past, Text

WINDOWS = ["llama", "mistral"]  # a cache that can be cropped, and one whose window of 8 tokens has slid
GUARDS = [*((kind, "activated") for kind in KINDS), *((kind, "full") for kind in WINDOWS)]


def prompt(length=31):
    """Token ids. A prompt of 31 tokens is longer than the sliding windows."""
    return torch.randint(3, 320, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def stream(guard, ids, past=None, seed=0, **options):
    """All pairs of a stream."""
    torch.manual_seed(seed)
    return list(guard.stream(asked(ids), past, **{"max_new_tokens": 20, "verdict_every": 4} | options))


def values(pairs):
    return torch.tensor([[v.unsafe, *v.categories.values()] for _, v in pairs], dtype=torch.double)


def holds(past, kind):
    """Whether a Past's cache is that of a model that never had a guard and read the same ids in one pass."""
    with torch.no_grad():
        wanted = make_model(kind)(torch.tensor([past.ids]), use_cache=True).past_key_values
    pairs = list(zip(past.cache.layers, wanted.layers, strict=True))
    same = [torch.allclose(a.keys, b.keys, atol=1e-5) for a, b in pairs]
    same += [torch.allclose(a.values, b.values, atol=1e-5) for a, b in pairs]
    return all(same) and past.cache.get_seq_length() == len(past.ids)


@contextmanager
def passes(guard):
    """A list that gets (number of tokens, whether the gate was open) of each pass through the model."""
    seen = []

    def hook(module, args, inputs):
        ids = args[0] if args else inputs["input_ids"]  # (1, tokens)
        seen.append((ids.shape[1], guard.gate.is_open))

    handle = guard.chat_model.base_model.register_forward_pre_hook(hook, with_kwargs=True)
    yield seen
    handle.remove()


def changes(answer):
    """Options for `generate` that change this greedy answer."""
    tokenizer = make_tokenizer()
    readable = [text for token in answer[5:15] if "\ufffd" not in (text := tokenizer.decode([token]))]
    return [
        {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.5},
        {"eos_token_id": [answer[12], answer[7], 2]},
        {"eos_token_id": [answer[0]]},
        {"min_new_tokens": 11, "eos_token_id": [answer[4]]},
        {"stopping_criteria": [StopStringCriteria(tokenizer, readable[:2] or ["a"])]},
    ]


@pytest.mark.parametrize("kind", WINDOWS)
def test_answer_is_plain_generates(kind):
    """Kills: an open gate, processors that see new tokens only, ignored criteria, a token more or less."""
    greedy, guard = plain(kind, prompt()), make_guard(kind)
    for options in changes(greedy):
        wanted = plain(kind, prompt(), **options)
        drawn = torch.rand(1)  # the next answer under the same seed depends on it
        assert wanted != greedy, "these options change nothing, so this test shows nothing"
        wanted = wanted[:-1] if wanted[-1] in options.get("eos_token_id", [2]) else wanted
        pairs = stream(guard, prompt(), verdict_every=3, **options)
        assert torch.equal(torch.rand(1), drawn)
        assert [answer for answer, _ in pairs] == [wanted[: verdict.tokens] for _, verdict in pairs]
        assert [verdict.tokens for _, verdict in pairs] == [*range(0, len(wanted), 3), len(wanted)]


def test_what_cannot_be_streamed_is_refused():
    """Kills: a check that is left out, options that are silently ignored, a chat that is lost."""
    guard, past = make_guard(), Past()
    for options, message in (
        ({"max_new_tokens": CONTEXT}, "room"),
        ({"verdict_every": -1}, "at least 0"),
        ({"num_beams": 2}, "beams"),
        ({"prompt_lookup_num_tokens": 2}, "assistant"),
    ):
        with pytest.raises(ValueError, match=message):
            stream(guard, prompt(), past, **options)
        assert stream(guard, prompt(), past)[-1][0] == plain("llama", prompt())


@pytest.mark.parametrize("kind, path", GUARDS)
def test_verdict_is_the_score_of_the_conversation_so_far(kind, path):
    """Kills: a verdict early, late or left out, one of `full` on the way, a prompt judged at its end."""
    guard, text = make_guard(kind, guard_path=path, verdict_every=8), Text(prompt(), 3, False)
    on_the_way = guard.verdicts([text])[0]
    options = {"max_new_tokens": 7, "min_new_tokens": 7}
    with passes(guard) as seen:
        pairs = list(guard.stream(text, verdict_every=4, **options))
    found = pairs[0][1]
    assert (found.unsafe, found.highest) == (pytest.approx(on_the_way.unsafe, abs=1e-5), on_the_way.highest)
    steps = [0, 7] if path == "full" else [0, 4, 7]
    assert [verdict.tokens for _, verdict in pairs] == [len(answer) for answer, _ in pairs] == steps
    if path == "activated" and guard.window > CONTEXT:  # one pass judges the prompt at all its cuts
        size = guard.guard_prompt_ids.shape[1]
        assert [tokens for tokens, is_open in seen if is_open] == [4 * size, size, size]
    assert [verdict.tokens for _, verdict in guard.stream(text, verdict_every=0, **options)] == [0, 7]
    guard.config.verdict_every = 0
    wanted = score(guard, [text.ids + answer for answer, _ in pairs[1:]]).double().sigmoid()
    assert torch.allclose(values(pairs[1:]), wanted, atol=1e-5)


def test_streams_can_be_read_in_turn():
    """Kills: state in the guard that the next stream overwrites."""
    guard, lengths = make_guard(), (31, 12)
    streams = [guard.stream(asked(prompt(length)), max_new_tokens=20, verdict_every=4) for length in lengths]
    [*_, last] = zip(*streams, strict=True)
    assert [answer for answer, _ in last] == [plain("llama", prompt(length)) for length in lengths]


@pytest.mark.parametrize("length", [0, 7, 8])
@pytest.mark.parametrize("kind", WINDOWS)
def test_every_token_is_read_once_and_the_cache_holds_the_answer(kind, length):
    """Kills: an open gate, a second pass for a verdict, a guard prompt or an end token left in the cache."""
    guard, past, ids = make_guard(kind), Past(), prompt()
    options = {"max_new_tokens": 20, "verdict_every": 4, "eos_token_id": plain(kind, ids)[length]}
    steps = []
    with passes(guard) as seen:
        for answer, verdict in guard.stream(asked(ids), past, **options):
            assert past.ids == ids + answer and holds(past, kind)
            assert not guard.gate.is_open and torch.is_grad_enabled()
            steps.append(verdict.tokens)
    assert steps == sorted({*range(0, length, 4), length})
    question = guard.guard_prompt_ids.shape[1]
    assert [tokens for tokens, is_open in seen if not is_open] == [len(ids)] + [1] * length
    assert [tokens for tokens, is_open in seen if is_open] == [question] * len(steps)


NEW = prompt(9)
NEXT = [  # (what the next prompt is, after a prompt and its answer; how many of its tokens are read)
    (lambda ids, answer: ids + answer + NEW, 9),
    (lambda ids, answer: ids + answer + NEW, 9),
    (lambda ids, answer: ids + answer[:-3] + NEW, 9),
    (lambda ids, answer: ids, 1),
    (lambda ids, answer: [*NEW, *ids[9:], *answer], None),
]


@pytest.mark.parametrize("kind, path", GUARDS)
def test_chat_that_keeps_its_cache_answers_and_judges_the_same(kind, path):
    """Kills: a wrong crop, new tokens at old positions, a lost answer, a turn that reads all again."""
    guard, past, ids = make_guard(kind, guard_path=path), Past(), prompt()
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "repetition_penalty": 1.2, "do_sample": True}
    answer = stream(guard, ids, past, **options)[-1][0]
    for seed, (change, tokens) in enumerate(NEXT):
        ids = change(ids, answer)
        with passes(guard) as seen:
            kept = stream(guard, ids, past, seed, verdict_every=2, **options)
        alone = stream(guard, ids, None, seed, verdict_every=2, **options)
        assert [answer for answer, _ in kept] == [answer for answer, _ in alone]
        assert torch.allclose(values(kept), values(alone), atol=1e-5)
        answer = kept[-1][0]
        assert len(answer) == 4 and past.ids == ids + answer
        if kind == "llama":  # a cache of other kinds may start anew
            assert seen[0] == (tokens or len(ids), False)


@pytest.mark.parametrize("is_open, number", [(False, 1), (False, 4), (True, 2)])
@pytest.mark.parametrize("kind", WINDOWS)
def test_broken_turn_leaves_the_gate_shut_and_a_past_that_is_right(kind, is_open, number):
    """Kills: a gate without `finally`, a verdict on the chat's own cache, a Past with half a pass in it."""
    guard, past, seen = make_guard(kind), Past(), []
    ids = prompt() + stream(guard, prompt(), past, max_new_tokens=8)[-1][0] + NEW
    wanted = stream(guard, ids)

    def interrupt(module, args):
        seen.append(guard.gate.is_open)
        if seen[-1] == is_open and seen.count(is_open) == number:
            raise KeyboardInterrupt

    handle = guard.chat_model.base_model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        stream(guard, ids, past)
    handle.remove()
    assert not guard.gate.is_open
    if is_open:  # between two tokens: nothing is lost
        assert past.ids == ids + wanted[-1][0][:4] and holds(past, kind)
    found = stream(guard, ids, past)
    assert found[-1][0] == wanted[-1][0]
    assert torch.allclose(values(found), values(wanted), atol=1e-5)
