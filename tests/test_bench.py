"""The measurements measure what they say. Each test names the mutations that it kills."""

import json
import sys
from unittest.mock import Mock

import pytest
import torch
from conftest import PATHS, forward, make_guard, make_model, make_tokenizer
from torch.utils.flop_counter import FlopCounterMode

from chat import Text, encode
from errors import UserError
from tools import bench
from tools.bench import BATCH, PRODUCTS, SCORED, VERDICT_EVERY, load


def replace_turns(monkeypatch, seconds=None, calls=1):
    """Contestants run `calls` times and take the given seconds. Returns what they returned."""
    returned = {}

    def fake(what, contestants, rounds):
        returned.update({name: [call() for _ in range(calls)] for name, call in contestants.items()})
        return seconds or {name: [1.0] for name in contestants}

    monkeypatch.setattr(bench, "turns", fake)
    return returned


def spy_on(model, note):
    """Call note(input_ids, mask) for everything that the model's base reads."""
    model.base_model.register_forward_pre_hook(
        lambda _, args, named: note(named["input_ids"], named.get("attention_mask")), with_kwargs=True
    )


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


def test_the_limit_is_the_fastest_product_of_the_same_round(model_folder, monkeypatch):
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


def test_a_verdict_is_timed_beside_a_decode_step_and_a_fresh_pass(monkeypatch):
    """Kills: a cache that grows from call to call, a prefill that is timed, a gate left open or shut."""
    computed, guards = [], {path: make_guard(guard_path=path) for path in PATHS}
    for guard in guards.values():
        spy_on(
            guard.chat_model, lambda ids, _, gate=guard.gate: computed.append((ids.shape[1], gate.is_open))
        )
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


@pytest.mark.parametrize("kind", ["llama", "llama2", "gpt2"])
def test_equal_answers_are_timed_with_and_without_verdicts(kind, monkeypatch):
    """Kills: an untouched model with weights of its own, a missing verdict, a short answer."""
    guard, untouched = make_guard(kind), make_model(kind, seed=3)
    for model in (guard.chat_model, untouched):
        model.generation_config.eos_token_id = None
    monkeypatch.setattr(bench, "load_chat_model", lambda name: (untouched, None))
    returned = replace_turns(monkeypatch, {"plain": [2.0], "off": [2.5], 16: [3.0], 8: [4.0], 32: [2.0]})
    fields = bench.measure_answers("tiny", guard, 1, tokens=40)
    places = {parameter.data_ptr() for parameter in guard.chat_model.parameters()}
    assert all(parameter.data_ptr() in places for parameter in untouched.parameters())
    answer = returned["plain"][0][0, -40:].tolist()
    assert returned["off"][0][0, -40:].tolist() == answer
    for every in VERDICT_EVERY:
        pairs = returned[every][0]
        assert [len(ids) for ids, _ in pairs] == sorted({*range(0, 41, every), 40}) and pairs[-1][0] == answer
    ratios = {"stream_over_plain": 1.5, "stream_over_plain_every_8": 2, "stream_over_plain_every_32": 1}
    assert fields == {"plain_seconds": 2, "off_over_plain": 1.25, **ratios}
    monkeypatch.setattr(untouched, "generate", lambda ids, **options: ids)
    with pytest.raises(UserError, match="the answer of tiny ends before 40 tokens"):
        bench.measure_answers("tiny", guard, 1, tokens=40)


def test_operations_are_those_that_torch_counts():
    """Kills: a layer left out or counted twice, products without additions, a backward into the chat path."""
    guard, batches, length = make_guard(), [[Text([5] * 40, 0, True)]], 40
    question = guard.guard_prompt_ids.shape[1]
    attention = 2 * 64 * length**2, 4 * 64 * question * (length + question / 2)  # 2 layers, 4 heads of 8
    with torch.no_grad(), FlopCounterMode(display=False) as judged:  # it does not count attention on a CPU
        forward(guard, [[5] * 40])
    head, ours = 2 * 32 * 3, bench.operations(guard, batches, training=False)
    assert ours - sum(attention) == judged.get_total_flops() - head
    with FlopCounterMode(display=False) as learnt:
        forward(guard, [[5] * 40]).sum().backward()
    ours = bench.operations(guard, batches, training=True) - attention[0] - 2 * attention[1]
    counted = learnt.get_total_flops() - 3 * head
    assert counted < ours < 1.03 * counted  # torch skips the gradient of the first layer's input


def test_the_peer_pads_every_row_to_the_longest_and_ours_does_not(model_folder, monkeypatch):
    """Kills: a peer without padding or mask, rows that are counted but not learnt, frozen adapters."""
    guard, peer, seen = load(model_folder, "train"), make_model(), []

    def note(ids, mask):
        seen.append((tuple(ids.shape), [] if mask is None else mask.sum(1).tolist()))

    for model in (guard.chat_model, peer):
        spy_on(model, note)
    monkeypatch.setattr(bench, "load_chat_model", lambda name: (peer, None))
    monkeypatch.setattr(guard, "judge", score := Mock())
    texts = [Text([row] + [5] * row, 0, True) for row in range(64)]
    before = [p.clone() for p in guard.adapter().values()]
    returned = replace_turns(monkeypatch)
    fields = bench.measure_rows(model_folder, guard, texts, torch.zeros(64, 15), 1)
    question = guard.guard_prompt_ids.shape[1]
    asked = {16: question, 32: question, 48: 2 * question, 64: 2 * question}  # at token 32 and at the end
    ours = [(BATCH, length) for end in asked for length in (end, asked[end])]
    (learnt, lengths), *judged = seen[len(ours) :]  # the peer's one batch of training, and its two of scoring
    assert [shape for shape, _ in seen[: len(ours)]] == ours
    assert learnt == (BATCH // 4, 64) and sorted(lengths) == [1, 2, 3, 4]
    assert sorted(judged[0][1] + judged[1][1]) == list(range(1, 65))  # in no order, padded to their longest
    assert all(shape == (32, max(lengths)) for shape, lengths in judged)
    assert returned.keys() == {"ours", "peer", "score", "peer score", *PRODUCTS}
    assert fields["train_rows_per_second"] == 64 and fields["train_speedup"] == 16
    assert fields["score_tokens_per_second"] == sum(range(65))
    score.assert_called_with(sorted(texts, key=len))
    assert not any(torch.equal(p, old) for p, old in zip(guard.adapter().values(), before, strict=True))


def test_a_saved_adapter_means_in_peft_what_it_means_here(model_folder, monkeypatch):
    """Kills: names or a scale that peft reads in another way, a guard prompt that it finds elsewhere."""
    guard, full = load(model_folder, "train"), load(model_folder, "score", guard_path="full")
    for name, parameter in [*guard.adapter().items(), *full.adapter().items()]:
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    returned = replace_turns(monkeypatch, {"ours": [1.0], "peer": [2.0]})
    fields = bench.measure_peft(model_folder, guard, full, [[5, 6, 7], [8, 9]], 1)
    assert fields.pop("lora_over_peft") == 0.5
    assert fields.keys() == {"logits_from_peft_activated", "logits_from_peft_full", "logits_apart"}
    assert max(fields.values()) < 1e-4
    assert torch.allclose(returned["ours"][0], returned["peer"][0], atol=1e-4)


def test_a_measured_guard_is_prepared_as_in_use(monkeypatch):
    """Kills: adapters at zero, a cast that rounds what trains, a chat in the dtype of training."""
    monkeypatch.setattr(bench, "load_chat_model", lambda name: (make_model().bfloat16(), make_tokenizer()))
    monkeypatch.setattr(bench, "use_fast_dtype", fast := Mock())
    guards = [load("tiny", "train"), load("tiny", "score", guard_path="full"), load("tiny", "chat")]
    assert [call.args[0] for call in fast.call_args_list] == guards[:2]
    parameters = [parameter for guard in guards for parameter in guard.adapter().values()]
    assert all(parameter.dtype == torch.float32 and parameter.any() for parameter in parameters)


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
    assert result.keys() >= {"processor", "threads", "versions", "rows", "longest_row", "full_dtype"}
    measured = ["train_speedup", "train_fraction_of_limit", "score_fraction_of_limit", "lora_over_peft"]
    measured += ["verdict_over_decode_step", *(f"verdict_speedup_{length}" for length in (16, 32, 64))]
    assert all(0 < result[name] < float("inf") for name in measured)
    for what in ("train", "score"):
        [(rows, seconds, memory)] = result["growth"]["rows"][what]
        assert rows == 1 and 0 < seconds < 60 and memory > 10**8
    assert all(plot.stat().st_size > 1000 for plot in plots)
