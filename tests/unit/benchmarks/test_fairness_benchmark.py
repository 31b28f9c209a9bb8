"""The fairness benchmark's figures by hand, and its gate can fail."""

from __future__ import annotations

import asyncio
import json

import pytest

from benchmarks import fairness
from benchmarks.document import GATE_FAILED, GateFailed
from benchmarks.fairness import Bench, Load, Turn, bound, gap, make_document
from benchmarks.hotswap_model import VOCAB
from fedllm.rng import SeededRng
from fedllm.serving.native.engine import open_engine


def test_the_gap_is_the_largest_over_any_interval() -> None:
    """Ahead by 5, then behind by 4 of it: in between, the other had 9 more. Nobody served: no gap."""
    served = [("a", 3.0), ("a", 2.0), ("b", 4.0), ("b", 5.0), ("a", 1.0)]
    assert gap(served, "a") == gap(served, "b") == 9.0
    assert gap([], "a") == 0.0
    assert gap([("a", 1.0), ("b", 1.0)] * 50, "a") == 1.0


def test_the_bound_is_the_papers() -> None:
    """Twice the larger of the longest prompt, and two for each token of a full batch of the longest request."""
    loads = [Load("a", 30, 5, 1, 1), Load("b", 10, 40, 1, 1)]
    assert bound(loads, 3) == 2 * max(1 * 30, 2 * 3 * 50)
    assert bound([Load("a", 300, 0, 1, 1)], 0) == 2 * 300


def test_figures_and_targets_are_of_the_printed_turns() -> None:
    """The ratio is the median of pairs; a must that is missed is told."""
    turns = {
        "vtc": [Turn(seconds, 1.0, 7, 100, {"polite": [0.1]}) for seconds in (2.0, 4.0, 1.0)],
        "fcfs": [Turn(seconds, 2.0, 7, 100, {"polite": [0.4]}) for seconds in (1.0, 4.0, 0.9)],
    }
    found = make_document({"vtc": 5.0, "fcfs": 50.0}, 20.0, turns)
    assert found["throughput_vs_fcfs_all"] == [0.5, 1.0, 0.9]
    assert found["throughput_vs_fcfs"] == 0.9
    assert found["polite_ttft_p99_s"] == {"vtc": 0.1, "fcfs": 0.4}
    assert (found["service_gap_tokens"], found["bound_tokens"]) == (5.0, 20.0)
    assert found["cpu_s_1k"] == {"vtc": 10.0, "fcfs": 20.0}
    assert [target["met"] for target in found["targets"]] == [False, True]


def test_a_little_of_it_runs_on_the_tiny_model(tiny_base) -> None:
    """A few requests of each tenant: answers are those that they have alone, and a wrong one fails the gate."""

    async def body() -> None:
        engine = await open_engine(
            tiny_base, base=fairness.BASE, limits=fairness.LIMITS, rng=SeededRng(1), dtype="float32"
        )
        try:
            bench = Bench(engine, VOCAB)
            loads = (Load("flood", 12, 4, 8, 12), Load("polite", 5, 3, 1, 2))
            await bench.alone(loads)
            for order in fairness.ORDERS:
                turn = await bench.turn(loads, order)
                assert turn.tokens == 12 * 4 + 2 * 3
                assert {name: len(waits) for name, waits in turn.ttft_s.items()} == {"flood": 12, "polite": 2}
                assert 0 < sum(cost for _, cost in turn.served) <= 12 * (12 + 2 * 4) + 2 * (5 + 2 * 3)
            prompt = loads[1].prompts(VOCAB)[0]
            bench._alone[prompt] = [*bench._alone[prompt][:-1], -1]
            with pytest.raises(GateFailed, match="vtc: an answer to polite is not what it is alone"):
                await bench.turn(loads, "vtc")
        finally:
            await engine.close()

    asyncio.run(body())


def test_a_gap_beyond_the_bound_fails_the_gate(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """A bound so small that no order keeps it: the error names both numbers, and no figure is printed."""
    monkeypatch.setattr(fairness, "both_wait", lambda _: (Load("long", 40, 8, 10, 20), Load("short", 2, 1, 10, 20)))
    monkeypatch.setattr(fairness, "flood_and_polite", lambda _: (Load("flood", 4, 1, 2, 2), Load("polite", 2, 1, 1, 1)))
    monkeypatch.setattr(fairness, "bound", lambda *_: 10.0)
    assert fairness.main(["--tiny", "--quick", "--json"]) == GATE_FAILED
    found = json.loads(capsys.readouterr().out)
    assert "10 allowed" in found["error"]
    assert "throughput_vs_fcfs" not in found
