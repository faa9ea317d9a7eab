"""The measurements measure what they say. Each test names the mutations that it kills."""

import json
import sys
import time

import pytest
import torch
from conftest import make_guard, make_model, make_tokenizer
from torch.utils.flop_counter import FlopCounterMode

from chat import encode
from common import UserError
from tools import bench
from tools.bench import (
    BATCH,
    PRODUCTS,
    SCORED,
    VERDICT_EVERY,
    load,
    measure_answers,
    measure_peft,
    measure_rows,
    measure_verdict,
    operations,
    ratio,
    turns,
)


def replace_turns(monkeypatch, seconds=None, calls=1):
    """Contestants run `calls` times and take the given seconds. Returns what they returned."""
    returned = {}

    def fake(what, contestants, rounds):
        for name, contestant in contestants.items():
            returned[name] = [contestant() for _ in range(calls)]
        return seconds or {name: [1.0] for name in contestants}

    monkeypatch.setattr(bench, "turns", fake)
    return returned


def test_contestants_take_turns_and_the_median_counts(monkeypatch):
    """Kills: one contestant after the other, a warm-up that counts, a mean, a ratio of medians."""
    clock, calls = [0.0], []
    seconds = {"a": iter([8, 1, 2, 30]), "b": iter([8, 0.25, 0.25, 0.0625, 0.0625, 0.5, 0.5])}

    def contestant(name):
        def call():
            calls.append(name)
            clock[0] += next(seconds[name])

        return call

    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])
    found = turns("names", {name: contestant(name) for name in seconds}, 3)
    assert "".join(calls) == "ab" + "abb" + "abbb" + "ab"
    assert found == {"a": [1, 2, 30], "b": [0.25, 0.0625, 0.5]}
    assert ratio(found, "a", "b") == 32 and ratio(found, "b", "a") == 1 / 32


def test_a_slow_machine_gets_fewer_rounds(monkeypatch):
    """Kills: a run that takes as many rounds however long one takes, a contestant without its last turn."""
    monkeypatch.setattr(bench, "SECONDS", 0)
    found = turns("sleep", {"a": lambda: time.sleep(0.26), "b": lambda: time.sleep(0.51)}, 5)
    assert [len(seconds) for seconds in found.values()] == [1, 1]


def test_progress_goes_to_standard_error(capsys):
    """Kills: a section that is measured in silence, progress in the middle of the JSON object."""
    turns("the weather", {}, 1)
    assert capsys.readouterr() == ("", "measuring the weather\n")


def test_the_limit_is_the_fastest_product_of_the_same_round(model_folder, monkeypatch):
    """Kills: the slowest product, one limit for all rounds, a mean, rows counted more than once,
    operations of batches other than those that are timed."""
    found = {size: [2 * size**3 / speed for speed in (1, 2, 4)] for size in PRODUCTS}
    found[PRODUCTS[1]] = [seconds / 10 for seconds in found[PRODUCTS[1]]]
    found |= {"ours": [1, 4, 0.25], "peer": [2, 2, 2], "score": [2, 2, 2], "peer score": [4, 9, 6]}
    replace_turns(monkeypatch, found, calls=0)
    counted = {}

    def count(guard, batches, training):
        counted[training] = [len(batch) for batch in batches]
        return 20 if training else 40

    monkeypatch.setattr(bench, "operations", count)
    fields = measure_rows(model_folder, make_guard(), [[5] * 10] * 64, torch.zeros(64, 3), 3)
    assert counted == {True: [BATCH] * 4, False: [SCORED] * 2}
    assert fields == pytest.approx(
        {
            "limit_gflops": 20e-9,
            "train_rows_per_second": 64,
            "train_speedup": 2 * 64 / (BATCH // 4),
            "train_fraction_of_limit": 2.0,
            "score_speedup": 3,
            "score_tokens_per_second": 320,
            "score_fraction_of_limit": 1.0,
        }
    )


def test_a_verdict_is_timed_beside_a_decode_step_and_a_fresh_pass(monkeypatch):
    """Kills: a cache that grows from call to call, a prefill that is timed, a gate left open or shut."""
    computed, guards = [], {path: make_guard(guard_path=path) for path in ("activated", "full")}
    for guard in guards.values():
        guard.chat_model.base_model.register_forward_pre_hook(
            lambda module, args, kwargs, guard=guard: computed.append(
                (kwargs["input_ids"].shape[1], guard.gate.is_open)
            ),
            with_kwargs=True,
        )
    seconds = {"decode step": [1.0, 2.0, 3.0], "activated": [2.0, 8.0, 6.0], "full": [20.0, 16.0, 30.0]}
    returned = replace_turns(monkeypatch, seconds, calls=2)
    fields = measure_verdict(guards["activated"], guards["full"], 20, 3)
    question = guards["activated"].guard_prompt_ids.shape[1]
    assert computed == [(20, False), *[(1, False)] * 2, *[(question, True)] * 2, *[(20, True)] * 2]
    ids = (encode(guard.tokenizer, bench.MESSAGES)[0] * 20)[:20]
    for path, guard in guards.items():
        assert all(torch.allclose(logits, guard([ids]), atol=1e-5) for logits in returned[path])
    assert fields == {
        "milliseconds_20": {"decode step": 2000, "activated": 6000, "full": 20000},
        "verdict_speedup_20": 5,
        "verdict_over_decode_step_20": 2,
    }


@pytest.mark.parametrize("kind", ["llama", "llama2", "gpt2"])
def test_the_untouched_model_has_the_guards_tensors(kind, monkeypatch):
    """Kills: an untouched model that keeps its own weights, or that computes something else."""
    guard, untouched = make_guard(kind), make_model(kind, seed=3)
    for model in (guard.chat_model, untouched):
        model.generation_config.eos_token_id = None
    monkeypatch.setattr(bench, "load_chat_model", lambda name: (untouched, None))
    replace_turns(monkeypatch)
    measure_answers(kind, guard, 1, tokens=5)
    places = {parameter.data_ptr() for parameter in guard.chat_model.parameters()}
    assert all(parameter.data_ptr() in places for parameter in untouched.parameters())
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(untouched(ids).logits, guard.chat_model(ids).logits)


def test_equal_answers_are_timed_with_and_without_verdicts(monkeypatch):
    """Kills: a wrong number of verdicts or tokens, a verdict with the gate shut, ratios of other names."""
    guard, untouched = make_guard(), make_model()
    for model in (guard.chat_model, untouched):
        model.generation_config.eos_token_id = None
    monkeypatch.setattr(bench, "load_chat_model", lambda name: (untouched, None))
    seconds = {"plain": [2.0], "off": [2.5], 16: [3.0], 8: [4.0], 32: [2.0]}
    returned = replace_turns(monkeypatch, seconds)
    fields = measure_answers("tiny", guard, 1, tokens=40)
    answer = returned["plain"][0][0, -40:].tolist()
    assert returned["off"][0][0, -40:].tolist() == answer
    for every in VERDICT_EVERY:
        pairs = returned[every][0]
        assert [len(ids) for ids, _ in pairs] == sorted({*range(0, 41, every), 40})
        assert pairs[-1][0] == answer
    assert fields == {
        "plain_seconds": 2.0,
        "off_over_plain": 1.25,
        "stream_over_plain": 1.5,
        "stream_over_plain_every_8": 2.0,
        "stream_over_plain_every_32": 1.0,
    }


def test_an_answer_that_ends_early_is_not_measured(monkeypatch):
    """Kills: answers of different lengths as if they were of one."""
    untouched = make_model()
    monkeypatch.setattr(bench, "load_chat_model", lambda name: (untouched, None))
    monkeypatch.setattr(untouched, "generate", lambda ids, **options: ids)
    with pytest.raises(UserError, match="the answer of tiny ends before 128 tokens"):
        measure_answers("tiny", make_guard(), 1)


@pytest.mark.parametrize("length", [7, 40])
def test_operations_are_those_that_torch_counts(length):
    """Kills: a layer left out or counted twice, products without additions, a backward into the chat path."""
    guard = make_guard()
    question = guard.guard_prompt_ids.shape[1]
    attention = 2 * 64 * length**2, 4 * 64 * question * (length + question / 2)  # 2 layers, 4 heads of 8
    with torch.no_grad(), FlopCounterMode(display=False) as judged:  # it does not count attention on a CPU
        guard([[5] * length])
    head, alone = 2 * 32 * 3, [[[5] * length]]
    assert operations(guard, alone, training=False) - sum(attention) == judged.get_total_flops() - head
    with FlopCounterMode(display=False) as learnt:
        guard([[5] * length]).sum().backward()
    ours = operations(guard, alone, training=True) - attention[0] - 2 * attention[1]
    counted = learnt.get_total_flops() - 3 * head
    assert counted < ours < 1.03 * counted  # torch skips the gradient of the first layer's input
    assert operations(guard, alone * 3, training=True) == 3 * operations(guard, alone, training=True)


def test_operations_count_a_shared_beginning_once():
    """Kills: a shared part that counts for each row, or for none."""
    guard, rows = make_guard(), [[5] * 80 + [n] * 4 for n in (6, 7, 8)]
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        guard(rows)
    question = guard.guard_prompt_ids.shape[1]
    attention = 2 * 64 * (3 * 84**2 - 2 * 80**2) + 3 * 4 * 64 * question * (84 + question / 2)
    ours = operations(guard, [rows], training=False) - attention
    assert ours == counted.get_total_flops() - 3 * 2 * 32 * 3


def test_the_peer_pads_every_row_to_the_longest_and_ours_does_not(model_folder, monkeypatch):
    """Kills: a peer without padding or mask, rows that are counted but not learnt, frozen adapters."""
    guard, seen = load(model_folder, "train"), []
    forward = type(guard.chat_model.base_model).forward

    def spy(self, *positional, **named):
        mask = named.get("attention_mask")
        seen.append((tuple(named["input_ids"].shape), None if mask is None else mask.sum(1).tolist()))
        return forward(self, *positional, **named)

    monkeypatch.setattr(type(guard.chat_model.base_model), "forward", spy)
    monkeypatch.setattr(guard, "score", lambda texts: scored.extend(texts))
    scored, texts, targets = [], [[row] + [5] * row for row in range(64)], torch.zeros(64, 15)
    before = {name: parameter.clone() for name, parameter in guard.named_parameters()}
    returned = replace_turns(monkeypatch)
    fields = measure_rows(model_folder, guard, texts, targets, 1)
    question = guard.guard_prompt_ids.shape[1]
    ours = [(BATCH, length) for end in (16, 32, 48, 64) for length in (end, question)]
    learnt, *judged = seen[len(ours) :]  # the peer's one batch of training, and its two of scoring
    assert [shape for shape, _ in seen[: len(ours)]] == ours and learnt[0] == (BATCH // 4, 64)
    assert sorted(learnt[1]) == list(range(1, 5))
    assert sorted(judged[0][1] + judged[1][1]) == list(range(1, 65))  # in no order, padded to their longest
    assert [shape for shape, _ in judged] == [(32, max(lengths)) for _, lengths in judged]
    assert returned.keys() == {"ours", "peer", "score", "peer score", *PRODUCTS}
    assert fields["train_rows_per_second"] == 64 and fields["train_speedup"] == 16
    assert scored == sorted(texts, key=len) and fields["score_tokens_per_second"] == sum(range(65))
    changed = {
        name for name, parameter in guard.named_parameters() if not torch.equal(parameter, before[name])
    }
    assert changed and all("lora_" in name or name.startswith("head") for name in changed)


def test_a_saved_adapter_means_in_peft_what_it_means_here(model_folder, monkeypatch):
    """Kills: names or a scale that peft reads in another way, a guard prompt that it finds elsewhere."""
    guard, full = load(model_folder, "train"), load(model_folder, "score", guard_path="full")
    for name, parameter in [*guard.adapter().items(), *full.adapter().items()]:
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    returned = replace_turns(monkeypatch, {"ours": [1.0], "peer": [2.0]})
    fields = measure_peft(model_folder, guard, full, [[5, 6, 7], [8, 9]], 1)
    assert fields.pop("lora_over_peft") == 0.5
    assert fields.keys() == {"logits_from_peft_activated", "logits_from_peft_full", "logits_apart"}
    assert max(fields.values()) < 1e-4
    assert torch.allclose(returned["ours"][0], returned["peer"][0], atol=1e-4)


def test_a_measured_guard_is_prepared_as_in_use(monkeypatch):
    """Kills: adapters at zero, a cast that rounds what trains, a chat in the dtype of training."""
    monkeypatch.setattr(bench, "load_chat_model", lambda name: (make_model().bfloat16(), make_tokenizer()))
    fast = []
    monkeypatch.setattr(bench, "use_fast_dtype", fast.append)
    guards = [load("tiny", "train"), load("tiny", "score", guard_path="full"), load("tiny", "chat")]
    assert fast == guards[:2]
    for guard in guards:
        assert {parameter.dtype for parameter in guard.adapter().values()} == {torch.float32}
        assert all(parameter.any() for parameter in guard.adapter().values())


@pytest.mark.slow
def test_every_field_of_the_table_is_measured(model_folder, tmp_path, monkeypatch, capsys):
    """Kills: a field left out or renamed, a plot of nothing, a number that JSON does not have."""
    monkeypatch.setattr(bench, "LENGTHS", (16, 32, 64, 128))
    monkeypatch.setattr(bench, "GROWTH", {"rows": (1, 2)})
    monkeypatch.setattr(bench, "measure_answers", lambda model, guard, rounds: {"off_over_plain": 1.25})
    plots = [tmp_path / "verdict.png", tmp_path / "growth.png"]
    arguments = [model_folder, "--quick", "--json", "--plot", plots[0], "--plot-growth", plots[1]]
    monkeypatch.setattr(sys, "argv", ["bench.py", *map(str, arguments)])
    bench.main()
    output = capsys.readouterr()
    result = json.loads(output.out)
    assert result.items() >= {"off_over_plain": 1.25, "dtype": "float32", "chat_dtype": "float32"}.items()
    assert result.keys() >= {"processor", "threads", "versions", "rows", "longest_row", "full_dtype"}
    assert output.err.count("measuring") == 2 + 3 + 4  # sections, lengths, points of growth
    measured = ["train_speedup", "train_fraction_of_limit", "score_fraction_of_limit", "lora_over_peft"]
    measured += ["verdict_over_decode_step", *(f"verdict_speedup_{length}" for length in (16, 32, 64))]
    assert all(0 < result[name] < float("inf") for name in measured)
    assert [[value for value, *_ in points] for points in result["growth"]["rows"].values()] == [[1, 2]] * 2
    assert all(memory > 10**8 for _, _, memory in result["growth"]["rows"]["train"])
    assert all(plot.stat().st_size > 1000 for plot in plots)
