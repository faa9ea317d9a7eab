"""The measurements measure what they say. Each test names the mutation that it kills."""

import bench
from bench import medians, time_verdicts
from conftest import make_guard


def test_contestants_take_turns_and_the_median_counts(monkeypatch):
    """Kills: one contestant after the other, a warm-up that counts, a mean for the median."""
    clock, calls, seconds = [0.0], [], {"a": iter([8, 1, 2, 30]), "b": iter([8, 0.25, 0.375, 0.25, 0.25, 0.25, 0.375])}

    def contestant(name):
        def call():
            calls.append(name)
            clock[0] += next(seconds[name])

        return call

    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])
    times = medians({name: contestant(name) for name in seconds}, 3)
    assert "".join(calls) == "ab" + "abb" * 3
    assert times == {"a": 2, "b": 0.25}


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
    monkeypatch.setattr(bench, "medians", lambda contestants, rounds: {n: (c(), c()) for n, c in contestants.items()})
    times = time_verdicts(guards["activated"], guards["full"], 20, 1)
    question = guards["activated"].guard_prompt_ids.shape[1]
    assert computed == [(20, False), *[(1, False)] * 2, *[(question, True)] * 2, *[(20, True)] * 2]
    assert (times["activated"][0] == times["activated"][1]).all()
