"""The measurements measure what they say. Each test names the mutation that it kills."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench
from bench import (
    PRODUCTS,
    fraction_of_limit,
    load,
    load_in_peft,
    operations,
    ratio,
    time_forward,
    time_training,
    time_verdicts,
    turns,
)
from conftest import make_guard, make_model


def test_contestants_take_turns_and_the_median_counts(monkeypatch):
    """Kills: one contestant after the other, a warm-up that counts, a mean for the median, a ratio of medians."""
    clock, calls = [0.0], []
    seconds = {"a": iter([8, 1, 2, 30]), "b": iter([8, 0.25, 0.25, 0.0625, 0.0625, 0.5, 0.5])}

    def contestant(name):
        def call():
            calls.append(name)
            clock[0] += next(seconds[name])

        return call

    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])
    found = turns({name: contestant(name) for name in seconds}, 3)
    assert "".join(calls) == "ab" + "abb" + "abbb" + "ab"
    assert found == {"a": [1, 2, 30], "b": [0.25, 0.0625, 0.5]}
    assert ratio(found, "a", "b") == 32 and ratio(found, "b", "a") == 1 / 32


def test_the_limit_is_that_of_the_fastest_product_in_the_same_round():
    """Kills: the slowest product, one limit for all rounds, a share that is no median."""
    found = {size: [2 * size**3 / speed for speed in (1, 2, 4)] for size in PRODUCTS}
    found[PRODUCTS[1]] = [seconds / 10 for seconds in found[PRODUCTS[1]]]
    assert fraction_of_limit(found | {"work": [1, 4, 0.25]}, "work", 20) == pytest.approx(2.0)


def test_a_verdict_is_timed_beside_one_decode_step_and_a_fresh_pass(monkeypatch):
    """Kills: a cache that grows from call to call, a prefill that is timed, a gate left open or shut."""
    computed, guards = [], {path: make_guard(guard_path=path) for path in ("activated", "full")}
    for guard in guards.values():
        guard.chat_model.base_model.register_forward_pre_hook(
            lambda module, args, kwargs, guard=guard: computed.append(
                (kwargs["input_ids"].shape[1], guard.gate.is_open)
            ),
            with_kwargs=True,
        )
    monkeypatch.setattr(bench, "turns", lambda contestants, rounds: {n: (c(), c()) for n, c in contestants.items()})
    times = time_verdicts(guards["activated"], guards["full"], 20, 1)
    question = guards["activated"].guard_prompt_ids.shape[1]
    assert computed == [(20, False), *[(1, False)] * 2, *[(question, True)] * 2, *[(20, True)] * 2]
    assert (times["activated"][0] == times["activated"][1]).all()


@pytest.mark.parametrize("kind", ["llama", "llama2", "gpt2"])
def test_the_untouched_model_has_the_guards_tensors(kind):
    """Kills: weights that are left its own, a model that computes something else."""
    guard, untouched = make_guard(kind), make_model(kind, seed=3)
    bench.share_weights(guard, untouched)
    places = {parameter.data_ptr() for parameter in guard.chat_model.parameters()}
    assert all(parameter.data_ptr() in places for parameter in untouched.parameters())
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(untouched(ids).logits, guard.chat_model(ids).logits)


@pytest.fixture
def args(model_folder):
    return SimpleNamespace(model=model_folder, quick=False)


@pytest.mark.parametrize("length", [7, 40])
def test_operations_are_those_that_torch_counts(length):
    """Kills: a layer left out or counted twice, multiplications without additions, a backward through the chat path."""
    guard = make_guard()
    question = guard.guard_prompt_ids.shape[1]
    attention = 2 * 64 * length**2, 4 * 64 * question * (length + question / 2)  # 2 layers, 4 heads of 8
    with torch.no_grad(), FlopCounterMode(display=False) as judged:  # which does not count attention on a CPU
        guard([[5] * length])
    head = 2 * 32 * 3
    assert operations(guard, [length], training=False) - sum(attention) == judged.get_total_flops() - head
    with FlopCounterMode(display=False) as learnt:
        guard([[5] * length]).sum().backward()
    ours = operations(guard, [length], training=True) - attention[0] - 2 * attention[1]
    counted = learnt.get_total_flops() - 3 * head
    assert counted < ours < 1.03 * counted  # torch leaves out what the first layer's input would need
    assert operations(guard, [length] * 3, training=True) == 3 * operations(guard, [length], training=True)


def test_the_peer_pads_every_row_to_the_longest_and_ours_does_not(args, monkeypatch):
    """Kills: a peer that is spared the padding or the mask, rows that are counted but not learnt, frozen parameters."""
    guard, seen = load(args), []
    forward = type(guard.chat_model.base_model).forward

    def spy(self, *positional, **named):
        seen.append((tuple(named["input_ids"].shape), named.get("attention_mask") is not None))
        return forward(self, *positional, **named)

    monkeypatch.setattr(type(guard.chat_model.base_model), "forward", spy)
    monkeypatch.setattr(
        bench, "turns", lambda contestants, rounds: {name: len([c()]) for name, c in contestants.items()}
    )
    texts = [[5] * (1 + row) for row in range(64)]
    targets = torch.zeros(64, 15)
    before = {name: parameter.clone() for name, parameter in guard.named_parameters()}
    found, rows = time_training(args, guard, texts, targets, 1)
    question = guard.guard_prompt_ids.shape[1]
    ours = [(bench.BATCH, length) for end in (16, 32, 48, 64) for length in (end, question)]
    assert [shape for shape, _ in seen] == [*ours, (bench.BATCH, 64)] and seen[-1][1]
    assert found.keys() == {"ours", "peer", *PRODUCTS}
    assert sorted(rows["ours"]) == list(range(64)) and rows["peer"] == rows["ours"][:16]
    changed = {name for name, parameter in guard.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed and all("lora_" in name or name.startswith("head") for name in changed)


@pytest.mark.parametrize("path", ["activated", "full"])
def test_a_saved_adapter_means_in_peft_what_it_means_here(path, args):
    """Kills: names or a scale that peft reads otherwise, an invocation that it finds elsewhere."""
    guard = load(args, guard_path=path)
    for name, parameter in guard.adapter().items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    assert load_in_peft(args, guard) < 1e-4
    if path == "full":
        found, difference = time_forward(args, guard, [[5, 6, 7], [8, 9]], 1)
        assert difference < 1e-4 and found.keys() == {"ours", "peer"}


@pytest.mark.slow
def test_every_field_of_the_table_is_measured(model_folder, tmp_path, monkeypatch, capsys):
    """Kills: a field left out or renamed, a plot of nothing, a number that JSON does not have."""
    monkeypatch.setattr(bench, "LENGTHS", (16, 32, 64, 128))
    monkeypatch.setattr(bench, "GROWTH", {"rows": (1, 2)})
    monkeypatch.setattr(bench, "time_stream", lambda *_: {"plain": [2.0], "off": [2.5], 16: [3.0], 8: [4.0], 32: [2.0]})
    plot = tmp_path / "growth.png"
    arguments = [model_folder, "--quick", "--json", "--plot-growth", plot]
    monkeypatch.setattr(sys, "argv", ["bench.py", *map(str, arguments)])
    bench.main()
    result = json.loads(capsys.readouterr().out)
    wanted = {"off_over_plain": 1.25, "stream_over_plain": 1.5, "stream_over_plain_every_8": 2.0, "dtype": "float32"}
    assert result.items() >= wanted.items()
    measured = ["train_speedup", "train_fraction_of_limit", "score_fraction_of_limit", "lora_over_peft"]
    measured += ["verdict_over_decode_step", *(f"verdict_speedup_{length}" for length in (16, 32, 64))]
    assert all(0 < result[name] < float("inf") for name in measured)
    assert [[value for value, *_ in points] for points in result["growth"]["rows"].values()] == [[1, 2]] * 2
    assert all(memory > 10**8 for _, _, memory in result["growth"]["rows"]["train"]) and plot.stat().st_size > 1000
