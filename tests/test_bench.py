"""The measurements measure what they say."""

import json
import sys
from unittest.mock import Mock

import pytest
import torch
from conftest import PATHS, forward, make_guard, make_model

from chat import Text, encode
from tools import bench
from tools.bench import BATCH, PRODUCTS, SCORED, VERDICT_EVERY


def replace_turns(monkeypatch, seconds=None, calls=1):
    """Contestants run `calls` times and take the given seconds. Returns what they returned."""
    returned = {}

    def fake(what, contestants, rounds):
        returned.update({name: [call() for _ in range(calls)] for name, call in contestants.items()})
        return seconds or {name: [1.0] for name in contestants}

    monkeypatch.setattr(bench, "turns", fake)
    return returned


def test_contestants_take_turns_and_the_median_counts(monkeypatch, capsys):
    """Kills: one contestant after the other, a warm-up that counts, a mean, a ratio of medians."""
    clock, calls = [0.0], []
    seconds = {"a": iter([20, 1, 2, 30]), "b": iter([8, 0.25, 0.25, 0.0625, 0.0625, 0.5, 0.5])}

    def contestant(name):
        calls.append(name)
        clock[0] += next(seconds[name])

    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])
    found = bench.turns("names", {name: lambda name=name: contestant(name) for name in seconds}, 9)
    assert "".join(calls) == "ab" + "abb" + "abbb" + "ab"  # then more than a minute has passed
    assert found == {"a": [1, 2, 30], "b": [0.25, 0.0625, 0.5]}
    assert bench.ratio(found, "a", "b") == 32 and bench.ratio(found, "b", "a") == 1 / 32
    assert capsys.readouterr() == ("", "measuring names\n")  # standard output is for the JSON object


def test_a_verdict_is_timed_beside_a_decode_step_and_a_fresh_pass(monkeypatch):
    """Kills: a prefill that is timed, a gate left open or shut, a ratio upside down."""
    computed, guards = [], {path: make_guard(guard_path=path) for path in PATHS}
    for guard in guards.values():

        def note(_, args, named, gate=guard.gate):
            computed.append((named["input_ids"].shape[1], gate.is_open))

        guard.chat_model.base_model.register_forward_pre_hook(note, with_kwargs=True)
    seconds = {"decode step": [1.0, 2.0, 3.0], "activated": [2.0, 8.0, 6.0], "full": [20.0, 16.0, 30.0]}
    returned = replace_turns(monkeypatch, seconds, calls=2)
    fields = bench.measure_verdict(*guards.values(), 20, 3)
    question = guards["activated"].guard_prompt_ids.shape[1]
    assert computed == [(20, False), *[(1, False)] * 2, *[(question, True)] * 2, *[(20, True)] * 2]
    ids = (encode(guard.tokenizer, bench.MESSAGES).ids * 20)[:20]
    for path, guard in guards.items():
        assert all(torch.allclose(logits, forward(guard, [ids]), atol=1e-5) for logits in returned[path])
    assert fields.pop("milliseconds_20") == {"decode step": 2000, "activated": 6000, "full": 20000}
    assert fields == {"verdict_speedup_20": 5, "verdict_over_decode_step_20": 2}


def test_equal_answers_are_timed_with_and_without_verdicts(monkeypatch):
    """Kills: an untouched model with weights of its own, a missing verdict, another answer."""
    guard, untouched = make_guard(), make_model(seed=3)
    for model in (guard.chat_model, untouched):
        model.generation_config.eos_token_id = None
    monkeypatch.setattr(bench, "load_chat_model", lambda name: (untouched, None))
    returned = replace_turns(monkeypatch, {"plain": [2.0], "off": [2.5], 16: [3.0], 8: [4.0], 32: [2.0]})
    fields = bench.measure_answers("tiny", guard, 1, tokens=40)
    answer = returned["plain"][0][0, -40:].tolist()
    assert returned["off"][0][0, -40:].tolist() == answer
    for every in VERDICT_EVERY:
        pairs = returned[every][0]
        assert [len(ids) for ids, _ in pairs] == sorted({*range(0, 41, every), 40}) and pairs[-1][0] == answer
    ratios = {"stream_over_plain": 1.5, "stream_over_plain_every_8": 2, "stream_over_plain_every_32": 1}
    assert fields == {"plain_seconds": 2, "off_over_plain": 1.25, **ratios}


def test_rows_are_measured_beside_a_peer_and_the_fastest_product(model_folder, monkeypatch):
    """Kills: the slowest product, one limit for all rounds, a mean, rows counted twice, other batches."""
    found = {size: [2 * size**3 / speed for speed in (1, 2, 4)] for size in PRODUCTS}
    found[PRODUCTS[1]] = [seconds / 10 for seconds in found[PRODUCTS[1]]]
    found |= {"ours": [1, 4, 0.25], "peer": [2, 2, 2], "score": [2, 2, 2], "peer score": [4, 9, 6]}
    replace_turns(monkeypatch, found, calls=0)
    counted = Mock(side_effect=lambda guard, batches, training: 20 if training else 40)
    monkeypatch.setattr(bench, "operations", counted)
    texts = [Text([5] * 10, 0, True)] * 64
    fields = bench.measure_rows(model_folder, make_guard(), texts, torch.zeros(64, 3), 3)
    assert [list(map(len, call.args[1])) for call in counted.call_args_list] == [[BATCH] * 4, [SCORED] * 2]
    wanted = {"limit_gflops": 20e-9, "train_rows_per_second": 64, "train_speedup": 2 * 64 / (BATCH // 4)}
    wanted |= {"train_fraction_of_limit": 2, "score_speedup": 3, "score_tokens_per_second": 320}
    assert fields == pytest.approx(wanted | {"score_fraction_of_limit": 1})


@pytest.mark.slow
def test_every_field_of_the_table_is_measured(model_folder, tmp_path, monkeypatch, capsys):
    """Kills: a field left out or renamed, a plot of nothing, a number that JSON does not have."""
    replace_turns(monkeypatch)
    monkeypatch.setattr(bench, "LENGTHS", (16, 32, 64, 128))
    monkeypatch.setattr(bench, "GROWTH", {"rows": (1,)})
    monkeypatch.setattr(bench, "measure_answers", lambda model, guard, rounds: {"off_over_plain": 1.25})
    plots = [tmp_path / "verdict.png", tmp_path / "growth.png"]
    arguments = [model_folder, "--quick", "--json", "--plot", plots[0], "--plot-growth", plots[1]]
    monkeypatch.setattr(sys, "argv", ["bench.py", *map(str, arguments)])
    bench.main()
    result = json.loads(capsys.readouterr().out)
    assert result["off_over_plain"] == 1.25 and result["dtype"] == result["chat_dtype"] == "float32"
    measured = ["train_speedup", "train_fraction_of_limit", "score_fraction_of_limit", "lora_over_peft"]
    measured += ["verdict_over_decode_step", *(f"verdict_speedup_{length}" for length in (16, 32, 64))]
    assert all(0 < result[name] < float("inf") for name in measured)
    assert max(result[f"logits_from_peft_{path}"] for path in PATHS) < 1e-4
    for what in ("train", "score"):
        [(rows, seconds, memory)] = result["growth"]["rows"][what]
        assert rows == 1 and 0 < seconds < 60 and memory > 10**8
    assert all(plot.stat().st_size > 1000 for plot in plots)
