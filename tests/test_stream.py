"""Answers under guard, and chats that keep their cache. Each test names the mutations that it kills."""

import gc
import weakref
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


# ---------------------------------------------------------------- the answer is plain generate's


def options_of(name, answer):
    """Options for `generate` that change this greedy answer."""
    tokenizer = make_tokenizer()
    readable = [text for token in answer[5:15] if "\ufffd" not in (text := tokenizer.decode([token]))]
    return {
        "sampled": {"do_sample": True},
        "nucleus": {"do_sample": True, "temperature": 0.8, "top_p": 0.9},
        "repetition penalty": {"repetition_penalty": 3.0},
        "end": {"eos_token_id": answer[9]},
        "several ends": {"eos_token_id": [answer[12], answer[7], 2]},
        "end at once": {"eos_token_id": answer[0]},
        "minimum": {"min_new_tokens": 11, "eos_token_id": answer[4]},
        "stop strings": {"stopping_criteria": [StopStringCriteria(tokenizer, readable[:2] or ["a"])]},
        "time": {"max_time": 1e-9},
        "sampled with ends": {"do_sample": True, "eos_token_id": answer[:3], "repetition_penalty": 1.5},
    }[name]


NAMES = ["sampled", "nucleus", "repetition penalty", "end", "several ends", "end at once", "minimum"]
NAMES += ["stop strings", "time", "sampled with ends"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", WINDOWS)
def test_answer_is_plain_generates(kind, name):
    """Kills: an open gate, processors that see new tokens only, ignored criteria, a token more or less."""
    greedy = plain(kind, prompt())
    options = options_of(name, greedy)
    wanted = plain(kind, prompt(), **options)
    assert wanted != greedy, "these options change nothing, so this test shows nothing"
    ends = options.get("eos_token_id", 2)
    wanted = wanted[:-1] if wanted[-1] in (ends if isinstance(ends, list) else [ends]) else wanted
    pairs = stream(make_guard(kind), prompt(), verdict_every=3, **options)
    assert [answer for answer, _ in pairs] == [wanted[: verdict.tokens] for _, verdict in pairs]
    assert [verdict.tokens for _, verdict in pairs] == [*range(0, len(wanted), 3), len(wanted)]


def test_sampling_draws_no_more_than_plain_generate():
    """Kills: a token that is drawn after the last one, which changes the next answer under the same seed."""
    stream(make_guard(), prompt(), do_sample=True)
    ours = torch.rand(1)
    plain("llama", prompt(), do_sample=True)
    assert torch.equal(ours, torch.rand(1))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_new_tokens": CONTEXT}, "room"),
        ({"verdict_every": -1}, "at least 0"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"num_beams": 2}, "beams"),
        ({"do_sample": True, "num_return_sequences": 2}, "beams"),
        ({"prompt_lookup_num_tokens": 2}, "assistant"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else value,
)
def test_what_cannot_be_streamed_is_refused(options, message):
    """Kills: a check that is left out, options that are silently ignored, a chat that is lost."""
    guard, past = make_guard(), Past()
    with pytest.raises(ValueError, match=message):
        stream(guard, prompt(), past, **options)
    assert stream(guard, prompt(), past)[-1][0] == plain("llama", prompt())


# ---------------------------------------------------------------- verdicts


@pytest.mark.parametrize("kind, path", GUARDS)
def test_verdict_is_the_score_of_the_conversation_so_far(kind, path):
    """Kills: a verdict one token early or late, an end without one, one of `full` in the middle."""
    guard = make_guard(kind, guard_path=path)
    for length, at in ((12, 7), (31, 20)):
        ids = prompt(length)
        end = [*plain(kind, ids), 2][at:][:1]  # the answer has at most `at` tokens
        pairs = stream(guard, ids, eos_token_id=end or 2)
        last = len(pairs[-1][0])
        steps = sorted({0, last} if path == "full" else {*range(0, last, 4), last})
        assert [verdict.tokens for _, verdict in pairs] == [len(answer) for answer, _ in pairs] == steps
        wanted = score(guard, [ids + answer for answer, _ in pairs]).double().sigmoid()
        assert torch.allclose(values(pairs), wanted, atol=1e-5)
        assert last <= at
        ends = [verdict.tokens for _, verdict in stream(guard, ids, eos_token_id=end or 2, verdict_every=0)]
        assert ends == sorted({0, last})


@pytest.mark.parametrize("kind, path", GUARDS)
def test_a_prompt_is_judged_on_its_way_from_the_same_reading(kind, path):
    """Kills: a prompt that is judged at its end alone, or read again where one pass can judge it."""
    guard, text = make_guard(kind, guard_path=path, verdict_every=8), Text(prompt(), 3, False)
    wanted = guard.verdicts([text])[0]
    with passes(guard) as seen:
        _, found = next(guard.stream(text, max_new_tokens=2))
    assert (found.unsafe, found.highest) == (pytest.approx(wanted.unsafe, abs=1e-5), wanted.highest)
    if path == "activated" and guard.window > CONTEXT:
        assert [tokens for tokens, is_open in seen if is_open] == [4 * guard.guard_prompt_ids.shape[1]]


def test_streams_can_be_read_in_turn():
    """Kills: state in the guard that the next stream overwrites."""
    guard, lengths = make_guard(), (31, 12)
    streams = [guard.stream(asked(prompt(length)), max_new_tokens=20, verdict_every=4) for length in lengths]
    [*_, last] = zip(*streams, strict=True)
    assert [answer for answer, _ in last] == [plain("llama", prompt(length)) for length in lengths]


def test_cache_of_an_answer_goes_with_it(monkeypatch):
    """Kills: a reference cycle around the stream, which keeps every cache until Python looks for cycles."""
    guard, alive = make_guard(), []
    ask = guard.ask
    monkeypatch.setattr(
        guard, "ask", lambda cache, cuts: alive.append(weakref.ref(cache)) or ask(cache, cuts)
    )
    gc.collect()
    gc.disable()
    try:
        for _, verdict in guard.stream(asked(prompt()), max_new_tokens=12, verdict_every=4):
            assert alive[0]() is not None
            if verdict.tokens:
                break
        assert len(alive) == 2 and not any(cache() for cache in alive)
    finally:
        gc.enable()


# ---------------------------------------------------------------- the cache


@pytest.mark.parametrize("length", [0, 7, 8, 20])
@pytest.mark.parametrize("kind", WINDOWS)
def test_every_token_is_read_once_and_the_cache_holds_the_answer(kind, length):
    """Kills: an open gate, a second pass for a verdict, a guard prompt or an end token left in the cache."""
    guard, past, ids = make_guard(kind), Past(), prompt()
    end = [*plain(kind, ids), 2][length]
    steps = []
    with passes(guard) as seen:
        for answer, verdict in guard.stream(
            asked(ids), past, max_new_tokens=20, verdict_every=4, eos_token_id=end
        ):
            assert past.ids == ids + answer and holds(past, kind)
            assert not guard.gate.is_open and torch.is_grad_enabled()
            steps.append(verdict.tokens)
    assert steps == sorted({*range(0, length, 4), length})
    question = guard.guard_prompt_ids.shape[1]
    assert [tokens for tokens, is_open in seen if not is_open] == [len(ids)] + [1] * length
    assert [tokens for tokens, is_open in seen if is_open] == [question] * len(steps)


# ---------------------------------------------------------------- a chat

NEW = prompt(9)
NEXT = {  # what the next prompt is, after a prompt and its answer
    "goes on": lambda ids, answer: ids + answer + NEW,
    "answer differs": lambda ids, answer: ids + answer[:-3] + NEW,
    "same prompt": lambda ids, answer: ids,
    "goes back": lambda ids, answer: ids[:-4],
    "starts differently": lambda ids, answer: [*NEW, *ids[9:], *answer],
}
CHATS = {"goes on": ["goes on"] * 4, "changes": [name for name in NEXT if name != "goes on"]}


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("kind, path", GUARDS)
def test_chat_that_keeps_its_cache_answers_and_judges_the_same(kind, path, chat):
    """Kills: a wrong crop, a crop after the window has slid, new tokens at old positions, a lost answer."""
    guard, past, ids = make_guard(kind, guard_path=path), Past(), prompt()
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "repetition_penalty": 1.2, "do_sample": True}
    for turn, follows in enumerate([*CHATS[chat], None]):
        kept = stream(guard, ids, past, seed=turn, verdict_every=2, **options)
        alone = stream(guard, ids, seed=turn, verdict_every=2, **options)
        assert [answer for answer, _ in kept] == [answer for answer, _ in alone]
        assert torch.allclose(values(kept), values(alone), atol=1e-5)
        assert len(kept[-1][0]) == 4 and past.ids == ids + kept[-1][0]
        ids = follows and NEXT[follows](ids, kept[-1][0])


@pytest.mark.parametrize("follows", NEXT)
def test_only_what_is_behind_the_common_prefix_is_read(follows):
    """Kills: a turn that reads the whole conversation, an answer that is read twice, no token to read."""
    guard, past = make_guard(), Past()
    for answer, _ in guard.stream(asked(prompt()), past, max_new_tokens=12, verdict_every=4):
        if len(answer) == 8:
            break  # the Past also keeps an answer whose loop was left early
    ids = NEXT[follows](prompt(), answer)
    read = {"goes on": 9, "answer differs": 9, "same prompt": 1, "goes back": 1}
    with passes(guard) as seen:
        stream(guard, ids, past, max_new_tokens=2)
    assert [tokens for tokens, is_open in seen if not is_open] == [read.get(follows, len(ids)), 1, 1]


def breaks(guard, where):
    """Interrupt the second layer in the pass that `where` names. Returns the hook's handle."""
    counts = {"prompt": 0, "token": 0, "verdict": 0}
    last = {"prompt": 1, "token": 3, "verdict": 2}

    def hook(module, args):
        found = "verdict" if guard.gate.is_open else "token" if args[0].shape[1] == 1 else "prompt"
        counts[found] += 1
        if found == where and counts[found] == last[found]:
            raise KeyboardInterrupt

    return guard.chat_model.base_model.layers[1].register_forward_pre_hook(hook)


@pytest.mark.parametrize("where", ["prompt", "token", "verdict"])
@pytest.mark.parametrize("kind", WINDOWS)
def test_broken_turn_leaves_the_gate_shut_and_a_past_that_is_right(kind, where):
    """Kills: a gate without `finally`, a verdict on the chat's own cache, a Past with half a pass in it."""
    guard, past = make_guard(kind), Past()
    ids = prompt() + stream(guard, prompt(), past, max_new_tokens=8)[-1][0] + NEW
    wanted = stream(guard, ids)
    handle = breaks(guard, where)
    with pytest.raises(KeyboardInterrupt):
        stream(guard, ids, past)
    handle.remove()
    assert not guard.gate.is_open
    if where == "verdict":  # between two tokens: nothing is lost
        assert past.ids == ids + wanted[-1][0][:4] and holds(past, kind)
    found = stream(guard, ids, past)
    assert found[-1][0] == wanted[-1][0]
    assert torch.allclose(values(found), values(wanted), atol=1e-5)


def test_broken_crop_leaves_a_past_that_is_right(monkeypatch):
    """Kills: a Past that goes on with a cache of which only one layer was cropped."""
    guard, past = make_guard(), Past()
    answer = stream(guard, prompt(), past, max_new_tokens=8)[-1][0]
    ids = prompt() + answer[:-3] + NEW

    def crop(tokens):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patched:
        patched.setattr(past.cache.layers[1], "crop", crop)
        stream(guard, ids, past)
    assert stream(guard, ids, past)[-1][0] == plain("llama", ids)
