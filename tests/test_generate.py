"""Answers under guard. Each test names the mutation that it kills."""

import gc
import weakref

import pytest
import torch
from transformers import TextStreamer

from common import UserError
from conftest import CONTEXT, make_guard, make_model
from model import Thresholds, probabilities

KINDS = ["llama", "qwen3", "mistral", "gemma3", "phi3", "gpt_neox"]
NEVER = Thresholds(2.0, 2.0)  # judge, never stop


def prompts(guard):
    """Three conversations of unequal lengths; a random model answers them differently where their ends differ."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 320, (length,), generator=generator).tolist() for length in (12, 3, 31)]


def plain(guard, conversations, seed=0, **options):
    """What the chat model alone answers: transformers' own generate on a model that never had a guard."""
    model = make_model(guard.kind)
    width = max(map(len, conversations))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in conversations])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in conversations])
    torch.manual_seed(seed)
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 2, **options}
    return model.generate(ids, attention_mask=mask, **options)[:, width:].tolist()


def guard_of(kind="llama", **settings):
    guard = make_guard(kind, **settings)
    guard.kind = kind
    return guard


def until(row, end):
    return row[: row.index(end)] if end in row else row


@pytest.fixture
def caches(monkeypatch):
    """watch(guard) -> the list of the caches that verdicts were made on."""

    def watch(guard):
        judge, seen = guard.judge, []
        monkeypatch.setattr(guard, "judge", lambda cache, mask=None: (seen.append(cache), judge(cache, mask))[1])
        return seen

    return watch


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_under_guard_is_plain_generates(kind, rows):
    """Kills: an open gate while generating, a verdict on the cache itself, lost padding, a token more or less."""
    guard = guard_of(kind)
    asked = prompts(guard)[:rows]
    without_end = plain(guard, asked)
    end = without_end[0][9]  # so that one answer ends early and the others go on
    for options in ({}, {"eos_token_id": end}, {"do_sample": True, "temperature": 0.8, "top_p": 0.9}):
        wanted = plain(guard, asked, **options)
        torch.manual_seed(0)
        answers = guard.generate(asked, NEVER, max_new_tokens=20, verdict_every=3, **options)
        assert [answer.ids for answer in answers] == [until(row, options.get("eos_token_id", 2)) for row in wanted]
        assert all(answer.stopped is None for answer in answers)
    assert len(set(map(tuple, without_end))) == rows


@pytest.mark.parametrize("path", ["activated", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_verdict_at_a_token_is_the_score_of_the_conversation_cut_there(kind, path):
    """Kills: a verdict one token early or late, on padding, on the answer's end token, or on a cache that has it; a
    last token that no verdict has read; a schedule that `full` does not have; a verdict that is not calibrated."""
    guard = guard_of(kind, guard_path=path)
    guard.calibration = {"shift": [0.5, -1.0, 2.0], "temperature": [2.0, 0.5, 1.0]}
    asked = prompts(guard)
    ends = plain(guard, asked)[0][9:10]
    for end in (2, *ends):
        answers = guard.generate(asked, NEVER, max_new_tokens=20, verdict_every=4, eos_token_id=end)
        for ids, answer in zip(asked, answers, strict=True):
            last = len(answer.ids)
            assert [n for n, _ in answer.verdicts] == ([0, last] if path == "full" else [*range(0, last, 4), last])
            cut = [ids + answer.ids[:n] for n, _ in answer.verdicts]
            found = torch.tensor([verdict for _, verdict in answer.verdicts], dtype=torch.double)
            assert torch.allclose(found, probabilities(guard.score(cut), guard.calibration), atol=1e-5)
    assert len(answers[0].ids) <= 9


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_a_flagged_answer_stops_there_and_in_its_own_row_alone(kind, monkeypatch):
    """Kills: a stop a verdict late, one that stops the batch, tokens beyond the verdict, an answer to a bad prompt."""
    guard = guard_of(kind)
    asked, count = prompts(guard), []

    def judge(cache, mask=None):
        count.append(1)
        logits = torch.full((3, 3), -4.0)
        logits[0 if len(count) == 3 else 2 if len(count) == 1 else 1] = 4.0 if len(count) in (1, 3) else -4.0
        return logits

    monkeypatch.setattr(guard, "judge", judge)
    bad_answer, good, bad_prompt = guard.generate(asked, Thresholds(0.5, 0.5), max_new_tokens=20, verdict_every=4)
    wanted = plain(guard, asked)
    assert (bad_answer.ids, bad_answer.stopped) == (wanted[0][:8], "response")
    assert (good.ids, good.stopped) == (wanted[1], None)
    assert (bad_prompt.ids, bad_prompt.stopped) == ([], "prompt")
    assert [[n for n, _ in answer.verdicts] for answer in (bad_answer, bad_prompt)] == [[0, 4, 8], [0]]
    assert len(count) == 6


def test_prompts_and_answers_have_thresholds_of_their_own():
    """Kills: the prompt's threshold for the answer, or the answer's for the prompt, in stopping or in saying why."""
    guard = guard_of()
    asked = prompts(guard)
    assert all(answer.stopped == "prompt" for answer in guard.generate(asked, Thresholds(0.0, 2.0), max_new_tokens=6))
    answers = guard.generate(asked, Thresholds(2.0, 0.0), max_new_tokens=6, verdict_every=2)
    assert all((answer.stopped, len(answer.verdicts)) == ("response", 2) for answer in answers)


def test_a_threshold_outside_0_to_1_means_always_or_never():
    """Kills: > for >=, a threshold that is not read."""
    guard = guard_of()
    asked = prompts(guard)
    assert all(answer.stopped == "prompt" for answer in guard.generate(asked, Thresholds(-1.0, -1.0)))
    exact = guard.generate(asked[:1], NEVER, max_new_tokens=4)[0].verdicts[0][1][0]
    assert guard.generate(asked[:1], Thresholds(exact, 2.0), max_new_tokens=4)[0].stopped == "prompt"
    assert guard.generate(asked[:1], NEVER, max_new_tokens=4)[0].stopped is None


@pytest.mark.parametrize("length", [7, 8, 20])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_every_token_is_computed_once_and_the_cache_ends_as_the_conversation(kind, length, caches):
    """Kills: a second prefill for a verdict, a verdict that stays in the cache, a verdict twice at the same token."""
    guard = guard_of(kind)
    [ids], seen, computed = prompts(guard)[:1], caches(guard), []
    end = (plain(guard, [ids])[0] + [2])[length]
    hook = guard.chat_model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: computed.append((kwargs["input_ids"].shape[1], guard.gate.is_open)),
        with_kwargs=True,
    )
    [answer] = guard.generate([ids], NEVER, max_new_tokens=20, verdict_every=4, eos_token_id=end)
    hook.remove()
    conversation = ids + answer.ids
    assert len(answer.ids) == length and [n for n, _ in answer.verdicts] == sorted({*range(0, length, 4), length})
    assert sum(tokens for tokens, is_open in computed if not is_open) == len(conversation)
    question = guard.guard_prompt_ids.shape[1]
    assert [tokens for tokens, is_open in computed if is_open] == [question] * len(answer.verdicts)
    assert len(seen) == len(answer.verdicts) and all(cache is seen[0] for cache in seen)
    assert seen[0].get_seq_length() == len(conversation)
    with torch.no_grad():
        wanted = make_model(kind)(torch.tensor([conversation]), use_cache=True).past_key_values
    for ours, theirs in zip(seen[0].layers, wanted.layers, strict=True):
        assert torch.allclose(ours.keys, theirs.keys, atol=1e-5) and torch.allclose(
            ours.values, theirs.values, atol=1e-5
        )


def test_an_answers_cache_goes_with_the_answer():
    """Kills: a cycle of references around generate, which keeps every cache until Python looks for cycles."""
    guard, alive = guard_of(), []
    judge = guard.judge
    guard.judge = lambda cache, mask=None: alive.append(weakref.ref(cache)) or judge(cache, mask)
    gc.collect()
    gc.disable()
    try:
        guard.generate(prompts(guard)[:1], NEVER, max_new_tokens=3)
        assert alive and not any(cache() for cache in alive)
    finally:
        gc.enable()


class Tape:
    """A streamer that keeps what it gets, and fails at the given token."""

    def __init__(self, fails_at=None, error=None):
        self.tokens, self.verdicts, self.fails_at, self.error = [], [], fails_at, error

    def put(self, value):
        self.tokens.append(value.flatten().tolist())
        if len(self.tokens) == self.fails_at:
            raise self.error

    def put_verdict(self, tokens, probabilities):
        self.verdicts.append((tokens, probabilities))

    def end(self):
        pass


@pytest.mark.parametrize("error", [KeyboardInterrupt, BrokenPipeError, RuntimeError])
@pytest.mark.parametrize("where", ["stream", "guard"])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_a_stream_that_breaks_leaves_the_gate_shut_and_the_cache_whole(kind, where, error, caches, monkeypatch):
    """Kills: a gate without `finally`, a verdict that works on the chat path's own cache."""
    guard = guard_of(kind)
    [ids], seen = prompts(guard)[:1], caches(guard)
    if where == "guard":
        layer, calls = guard.chat_model.base_model.layers[1], []

        def breaks(*arguments):
            calls.append(guard.gate.is_open)
            if sum(calls) == 3:
                raise error

        layer.register_forward_pre_hook(breaks)
    with pytest.raises(error):
        guard.generate([ids], NEVER, verdict_every=2, streamer=Tape(6 if where == "stream" else None, error))
    assert not guard.gate.is_open
    lengths = {layer.keys.shape[2] for layer in seen[0].layers}
    assert len(lengths) == 1 and seen[0].get_seq_length() == len(ids) + 4
    if where == "stream":
        return
    layer._forward_pre_hooks.clear()
    conversation = ids + plain(guard, [ids])[0][:4]
    with torch.no_grad():
        wanted = make_model(kind)(torch.tensor([conversation]), use_cache=True).past_key_values
    assert torch.allclose(seen[0].layers[1].values, wanted.layers[1].values, atol=1e-5)


def test_a_streamer_gets_plain_generates_tokens_and_every_verdict(capsys):
    """Kills: a stream that is a token behind or ahead of the answer, a verdict that is not passed on."""
    guard = guard_of()
    [ids] = prompts(guard)[:1]
    tape = Tape()
    [answer] = guard.generate([ids], NEVER, max_new_tokens=10, verdict_every=4, streamer=tape)
    assert tape.tokens == [ids, *([token] for token in answer.ids), [2]]
    assert tape.verdicts == answer.verdicts and [n for n, _ in tape.verdicts] == [0, 4, 8, 10]
    streamer = TextStreamer(guard.tokenizer, skip_prompt=True, skip_special_tokens=True)
    guard.generate([ids], NEVER, max_new_tokens=10, streamer=streamer)
    ours = capsys.readouterr().out
    plain(guard, [ids], max_new_tokens=10, streamer=streamer)
    assert capsys.readouterr().out == ours != ""


def test_no_number_for_a_verdict_stops_the_answer(monkeypatch):
    """Kills: >= threshold, which lets a guard that computes nan pass everything."""
    guard = guard_of()
    monkeypatch.setattr(guard, "judge", lambda cache, mask=None: torch.full((1, 3), torch.nan))
    assert guard.generate(prompts(guard)[:1], Thresholds(0.5, 0.5))[0].stopped == "prompt"


def test_none_for_an_option_is_transformers_own_default():
    """Kills: a traceback for what generate itself takes."""
    guard = guard_of()
    guard.chat_model.generation_config.return_dict_in_generate = True
    options = {"stopping_criteria": None, "logits_processor": None}
    [answer] = guard.generate(prompts(guard)[:1], NEVER, max_new_tokens=5, **options)
    assert answer.ids == plain(guard, prompts(guard)[:1], max_new_tokens=5)[0]


def test_a_stopping_criterion_of_the_users_ends_its_row_with_a_verdict():
    """Kills: criteria that are dropped, an end without a verdict, an end of the other rows."""
    guard = guard_of()
    asked = prompts(guard)
    width = max(map(len, asked))

    def second_row_after_6(ids, scores):
        return torch.tensor([False, ids.shape[1] - width >= 6, False])

    answers = guard.generate(asked, NEVER, max_new_tokens=9, stopping_criteria=[second_row_after_6])
    assert [len(answer.ids) for answer in answers] == [9, 6, 9]
    assert [answer.verdicts[-1][0] for answer in answers] == [9, 6, 9]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_new_tokens": CONTEXT}, "leaves no room"),
        ({"verdict_every": 0}, "at least 1"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"num_beams": 2}, "beams"),
        ({"do_sample": True, "num_return_sequences": 2}, "beams"),
        ({"prompt_lookup_num_tokens": 2}, "assistant"),
        ({"stop_strings": ["a"]}, "stopping_criteria"),
        ({"max_time": 1.0}, "stopping_criteria"),
        ({"generation_config": None}, "stopping_criteria"),
    ],
)
def test_what_cannot_be_moderated_is_refused(options, message):
    """Kills: a check left out. Beams would be judged on one another, and some ends by nobody."""
    guard = guard_of()
    with pytest.raises(UserError, match=message):
        guard.generate(prompts(guard)[:1], NEVER, **options)
    assert not guard.gate.is_open


def test_an_end_that_the_models_own_generation_config_names_is_refused():
    """Kills: looking at the call's options alone, and a traceback of transformers."""
    guard = guard_of()
    guard.chat_model.generation_config.stop_strings = ["a"]
    with pytest.raises(UserError, match="stop_strings"):
        guard.generate(prompts(guard)[:1], NEVER)
