"""Answers under guard, and chats that keep their cache. Each test names the mutations that it kills."""

import gc
import weakref
from contextlib import contextmanager

import pytest
import torch
from conftest import CONTEXT, KINDS, make_guard, make_model, make_tokenizer, plain
from transformers import StopStringCriteria

from chat import Past
from common import UserError

WINDOWS = ["llama", "mistral"]  # a cache that can be cropped, and one whose window of 8 tokens has slid
GUARDS = [*((kind, "activated") for kind in KINDS), *((kind, "full") for kind in WINDOWS)]


def prompt(length=31):
    """Token ids. A prompt of 31 tokens is longer than the sliding windows."""
    return torch.randint(3, 320, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def stream(guard, ids, past=None, seed=0, **options):
    """All pairs of a stream."""
    torch.manual_seed(seed)
    return list(guard.stream(ids, past, **{"max_new_tokens": 20, "verdict_every": 4} | options))


def values(verdicts):
    return torch.tensor([[v.unsafe, *v.categories.values()] for v in verdicts], dtype=torch.double)


def scores(guard, conversations):
    return guard.score(conversations).double().sigmoid()


def layers_of(chat_model):
    return next(m for m in chat_model.base_model.modules() if isinstance(m, torch.nn.ModuleList))


def cache_of(kind, ids):
    """The cache of a model that never had a guard, after it read `ids` in one pass."""
    with torch.no_grad():
        return make_model(kind)(torch.tensor([ids]), use_cache=True).past_key_values


def same_cache(ours, theirs):
    pairs = list(zip(ours.layers, theirs.layers, strict=True))
    return all(
        a.get_seq_length() == b.get_seq_length()
        and torch.allclose(a.keys, b.keys, atol=1e-5)
        and torch.allclose(a.values, b.values, atol=1e-5)
        for a, b in pairs
    )


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


def chat_passes(seen):
    return [tokens for tokens, is_open in seen if not is_open]


def flag_at(guard, monkeypatch, number):
    """Make the verdict of this number, counted from 1, the only flagged one. Returns the list of all."""
    made = []

    def judge(cache, mask=None):
        made.append(cache)
        return torch.full((1, 3), 4.0 if len(made) == number else -4.0)

    monkeypatch.setattr(guard, "judge", judge)
    return made


# ---------------------------------------------------------------------------
# The answer is plain generate's


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
        "forced end": {"forced_eos_token_id": 2},
        "time": {"max_time": 1e-9},
        "criterion": {"stopping_criteria": [lambda ids, scores: torch.tensor([ids.shape[1] >= 31 + 6])]},
        "sampled with ends": {"do_sample": True, "eos_token_id": answer[:3], "repetition_penalty": 1.5},
    }[name]


NAMES = ["sampled", "repetition penalty", "end", "several ends", "end at once", "minimum", "stop strings"]
NAMES += ["forced end", "time", "criterion"]


@pytest.mark.parametrize(
    "kind, name",
    [(kind, name) for kind in KINDS for name in ("greedy", "nucleus", "sampled with ends")]
    + [(kind, name) for kind in WINDOWS for name in NAMES],
)
def test_answer_is_plain_generates(kind, name):
    """Kills: an open gate while tokens are computed, a verdict on the cache itself, processors that see new
    tokens only, ignored criteria, an end token in the answer, one end of several, a token more or less."""
    greedy = wanted = plain(kind, prompt())
    options = {}
    if name != "greedy":
        options = options_of(name, greedy)
        wanted = plain(kind, prompt(), **options)
        assert wanted != greedy, "these options change nothing, so this test shows nothing"
    ends = options.get("eos_token_id", 2)
    wanted = wanted[:-1] if wanted[-1] in (ends if isinstance(ends, list) else [ends]) else wanted
    pairs = stream(make_guard(kind), prompt(), verdict_every=3, **options)
    assert [answer for answer, _ in pairs] == [wanted[: verdict.tokens] for _, verdict in pairs]
    assert [verdict.tokens for _, verdict in pairs] == [*range(0, len(wanted), 3), len(wanted)]


@pytest.mark.parametrize("kind", WINDOWS)
def test_sampling_draws_no_more_than_plain_generate(kind):
    """Kills: a token that is drawn after the last one, which changes the next answer under the same seed."""
    stream(make_guard(kind), prompt(), do_sample=True)
    ours = torch.rand(1)
    plain(kind, prompt(), do_sample=True)
    assert torch.equal(ours, torch.rand(1))


def test_stop_strings_of_the_models_own_config_are_refused():
    """Kills: looking at the call's options alone, a traceback of transformers, which loses the tokenizer."""
    guard = make_guard()
    guard.chat_model.generation_config.stop_strings = ["a"]
    with pytest.raises(UserError, match="stop_strings"):
        stream(guard, prompt())


def test_option_of_none_is_transformers_own_default():
    """Kills: a crash for values that `generate` itself accepts."""
    guard = make_guard()
    guard.chat_model.generation_config.return_dict_in_generate = True
    options = {"stopping_criteria": None, "logits_processor": None, "generation_config": None}
    assert stream(guard, prompt(), **options)[-1][0] == plain("llama", prompt())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_new_tokens": CONTEXT}, "room"),
        ({"verdict_every": 0}, "at least 1"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"num_beams": 2}, "beams"),
        ({"num_beams": 2, "do_sample": True}, "beams"),
        ({"do_sample": True, "num_return_sequences": 2}, "beams"),
        ({"prompt_lookup_num_tokens": 2}, "assistant"),
        ({"assistant_model": make_model()}, "assistant"),
        ({"stop_strings": ["a"]}, "stop_strings"),
        ({"streamer": object()}, "streamer"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else value,
)
def test_what_cannot_be_streamed_is_refused(options, message):
    """Kills: a check that is left out, options that are silently ignored, a traceback of transformers."""
    guard, past = make_guard(), Past()
    with pytest.raises(UserError, match=message):
        stream(guard, prompt(), past, **options)
    assert not guard.gate.is_open
    assert stream(guard, prompt(), past)[-1][0] == plain("llama", prompt())


# ---------------------------------------------------------------------------
# Verdicts


@pytest.mark.parametrize("kind, path", GUARDS)
def test_verdict_is_the_score_of_the_conversation_so_far(kind, path):
    """Kills: a verdict one token early or late, or on the end token; an end without a verdict; a verdict of
    `full` in the middle of an answer."""
    guard = make_guard(kind, guard_path=path)
    for length, at in ((12, 7), (31, 20)):
        ids = prompt(length)
        end = [*plain(kind, ids), 2][at:][:1]  # the answer has at most `at` tokens
        pairs = stream(guard, ids, eos_token_id=end or 2)
        last = len(pairs[-1][0])
        steps = sorted({0, last} if path == "full" else {*range(0, last, 4), last})
        assert [verdict.tokens for _, verdict in pairs] == [len(answer) for answer, _ in pairs] == steps
        found = values([verdict for _, verdict in pairs])
        assert torch.allclose(found, scores(guard, [ids + answer for answer, _ in pairs]), atol=1e-5)
        assert last <= at


def test_prompt_and_answer_are_flagged_by_their_own_thresholds():
    """Kills: the answer's threshold for the prompt, the prompt's for the answer, a threshold read once."""
    guard = make_guard(threshold=0.0, prompt_threshold=2.0)
    flags = [verdict.flagged for _, verdict in stream(guard, prompt(), max_new_tokens=6)]
    assert flags == [False, True, True]
    guard.config.threshold, guard.config.prompt_threshold = 2.0, 0.0
    flags = [verdict.flagged for _, verdict in stream(guard, prompt(), max_new_tokens=6)]
    assert flags == [True, False, False]


def test_threshold_flags_from_its_own_value():
    """Kills: > in place of >=; a threshold below 0 that does not flag all, or above 1 that flags anything."""
    guard, flags = make_guard(), []
    [exact, *_] = [verdict.unsafe for _, verdict in stream(guard, prompt())]
    for threshold in (-1.0, exact, exact + 1e-9, 2.0):
        guard.config.prompt_threshold = threshold
        flags.append(stream(guard, prompt())[0][1].flagged)
    assert flags == [True, True, False, False]


def test_nan_is_flagged(monkeypatch):
    """Kills: `unsafe >= threshold`, which lets a guard that computes NaN pass everything."""
    guard = make_guard()
    monkeypatch.setattr(guard, "judge", lambda cache, mask=None: torch.full((1, 3), torch.nan))
    assert all(verdict.flagged for _, verdict in stream(guard, prompt()))


# ---------------------------------------------------------------------------
# The caller's loop


@pytest.mark.parametrize("kind", WINDOWS)
def test_caller_stops_by_leaving_the_loop(kind, monkeypatch):
    """Kills: tokens computed ahead of their verdict or after the last one, a verdict that comes late, a guard
    that is left unusable."""
    guard, wanted = make_guard(kind), plain(kind, prompt())
    with passes(guard) as seen, monkeypatch.context() as patched:
        made = flag_at(guard, patched, 3)
        for answer, verdict in guard.stream(prompt(), max_new_tokens=20, verdict_every=4):
            assert not guard.gate.is_open and torch.is_grad_enabled()
            assert sum(chat_passes(seen)) == 31 + len(answer)
            if verdict.flagged:
                break
        assert answer == wanted[:8] and verdict.tokens == 8 and len(made) == 3
        assert sum(chat_passes(seen)) == 31 + 8
    assert stream(guard, prompt())[-1][0] == wanted
    assert torch.allclose(scores(guard, [prompt()]), scores(make_guard(kind), [prompt()]))


def test_streams_can_be_read_in_turn():
    """Kills: state in the guard that the next stream overwrites."""
    guard, lengths = make_guard(), (31, 12)
    streams = [guard.stream(prompt(length), max_new_tokens=20, verdict_every=4) for length in lengths]
    [*_, last] = zip(*streams, strict=True)
    assert [answer for answer, _ in last] == [plain("llama", prompt(length)) for length in lengths]


@pytest.mark.parametrize("leaves", [False, True])
def test_cache_of_an_answer_goes_with_it(leaves, monkeypatch):
    """Kills: a reference cycle around the stream, which keeps every cache until Python looks for cycles."""
    guard, alive = make_guard(), []
    judge = guard.judge
    monkeypatch.setattr(guard, "judge", lambda cache: alive.append(weakref.ref(cache)) or judge(cache))
    gc.collect()
    gc.disable()
    try:
        for _, verdict in guard.stream(prompt(), max_new_tokens=12, verdict_every=4):
            assert alive[0]() is not None
            if leaves and verdict.tokens:
                break
        assert len(alive) == (2 if leaves else 4) and not any(cache() for cache in alive)
    finally:
        gc.enable()


# ---------------------------------------------------------------------------
# The cache


@pytest.mark.parametrize("length", [0, 7, 8, 20])
@pytest.mark.parametrize("kind", WINDOWS)
def test_every_token_is_read_once_and_the_cache_holds_the_answer(kind, length):
    """Kills: an open gate while tokens are computed, a second pass over the prompt for a verdict, a guard
    prompt or an end token that stays in the cache, two verdicts at one token."""
    guard, past, ids = make_guard(kind), Past(), prompt()
    end = [*plain(kind, ids), 2][length]
    steps = []
    with passes(guard) as seen:
        for answer, verdict in guard.stream(ids, past, max_new_tokens=20, verdict_every=4, eos_token_id=end):
            assert past.ids == ids + answer and not guard.gate.is_open
            assert same_cache(past.cache, cache_of(kind, past.ids))
            steps.append(verdict.tokens)
    assert steps == sorted({*range(0, length, 4), length})
    assert chat_passes(seen) == [len(ids)] + [1] * length
    question = guard.guard_prompt_ids.shape[1]
    assert [tokens for tokens, is_open in seen if is_open] == [question] * len(steps)


# ---------------------------------------------------------------------------
# A chat

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
    """Kills: a cache that is not cropped, or by the wrong number of tokens; a crop after the window has slid;
    new tokens at old positions; processors that see new tokens only; a Past without the answer."""
    guard, past, ids = make_guard(kind, guard_path=path), Past(), prompt()
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "repetition_penalty": 1.2, "do_sample": True}
    for turn, follows in enumerate([*CHATS[chat], None]):
        kept = stream(guard, ids, past, seed=turn, verdict_every=2, **options)
        alone = stream(guard, ids, seed=turn, verdict_every=2, **options)
        assert [answer for answer, _ in kept] == [answer for answer, _ in alone]
        assert torch.allclose(values([v for _, v in kept]), values([v for _, v in alone]), atol=1e-5)
        assert len(kept[-1][0]) == 4 and past.ids == ids + kept[-1][0]
        ids = follows and NEXT[follows](ids, kept[-1][0])


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3", "gpt_neox"])
def test_fifth_turn_reads_its_own_tokens_only(kind):
    """Kills: a turn or a verdict that reads the whole conversation, an answer that is read twice."""
    guard, past, ids = make_guard(kind), Past(), prompt()
    for _ in range(4):
        for answer, _ in guard.stream(ids, past, max_new_tokens=8, verdict_every=4):
            if answer:
                break  # the Past also keeps an answer whose loop was left early
        ids = ids + answer + NEW
    with passes(guard) as seen:
        answer = stream(guard, ids, past, max_new_tokens=8)[-1][0]
    assert len(ids) == 31 + 4 * (4 + 9) and len(answer) == 8
    question = guard.guard_prompt_ids.shape[1]
    judged = (question, True)
    tokens = [(1, False)] * 4
    assert seen == [(len(NEW), False), judged, *tokens, judged, *tokens, judged]


@pytest.mark.parametrize("follows", NEXT)
def test_only_what_is_behind_the_common_prefix_is_read(follows):
    """Kills: a cache that is started anew where it could be cropped, a prompt of which no token is read."""
    guard, past = make_guard(), Past()
    answer = stream(guard, prompt(), past, max_new_tokens=8)[-1][0]
    ids = NEXT[follows](prompt(), answer)
    read = {"goes on": 9, "answer differs": 9, "same prompt": 1, "goes back": 1}
    with passes(guard) as seen:
        stream(guard, ids, past, max_new_tokens=2)
    assert chat_passes(seen) == [read.get(follows, len(ids)), 1, 1]


def breaks(guard, where, error):
    """Let the second layer raise `error` in the pass that `where` names. Returns the hook's handle."""
    counts = {"prompt": 0, "token": 0, "verdict": 0}
    last = {"prompt": 1, "token": 3, "verdict": 2}

    def hook(module, args):
        found = "verdict" if guard.gate.is_open else "token" if args[0].shape[1] == 1 else "prompt"
        counts[found] += 1
        if found == where and counts[found] == last[found]:
            raise error

    return layers_of(guard.chat_model)[1].register_forward_pre_hook(hook)


@pytest.mark.parametrize("error", [KeyboardInterrupt, BrokenPipeError, RuntimeError])
@pytest.mark.parametrize("where", ["prompt", "token", "verdict", "loop"])
@pytest.mark.parametrize("kind", WINDOWS)
def test_broken_turn_leaves_the_gate_shut_and_a_past_that_is_right(kind, where, error):
    """Kills: a gate without `finally`, a verdict on the chat path's own cache, a Past that goes on with a
    cache whose layers have read different numbers of tokens."""
    guard, past = make_guard(kind), Past()
    ids = prompt() + stream(guard, prompt(), past, max_new_tokens=8)[-1][0] + NEW
    wanted = stream(guard, ids)
    handle = breaks(guard, where, error)
    with pytest.raises(error):
        for _, verdict in guard.stream(ids, past, max_new_tokens=20, verdict_every=4):
            if where == "loop" and verdict.tokens == 4:
                raise error
    handle.remove()
    assert not guard.gate.is_open
    if where in ("verdict", "loop"):  # between two tokens: nothing is lost
        answer = wanted[-1][0][:4]
        assert past.ids == ids + answer and same_cache(past.cache, cache_of(kind, past.ids))
    found = stream(guard, ids, past)
    assert found[-1][0] == wanted[-1][0]
    assert torch.allclose(values([v for _, v in found]), values([v for _, v in wanted]), atol=1e-5)


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
