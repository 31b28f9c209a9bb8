"""From settings to mechanisms: what each kind of plan promises, and what is refused before anybody is asked."""

from __future__ import annotations

from pathlib import Path

import pytest
from round_world import OWNERS, SPEC, World
from unit.server.test_plan_and_gate import ALL, plan_of

from fedllm.aggregation.methods import METHODS, NOT_SUMS
from fedllm.aggregation.methods.support import CONDITIONS, RANKS, refusal, table
from fedllm.errors import ConfigError, FedllmError, PolicyRefused
from fedllm.messages.mechanism import DP_FTRL, DP_SGD, SKELLAM
from fedllm.server.rounds.attempts import update_vector

KINDS = {DP_SGD: "unit record", DP_FTRL: "unit record", SKELLAM: "unit owner"}
ASKED = {"privacy": True, "acknowledge_noise": True, "noise_multiplier": 2.0}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [*METHODS, *NOT_SUMS])
@pytest.mark.parametrize("mixed", [False, True], ids=["one rank", "mixed ranks"])
def test_plans_are_refused_as_the_table_says(tmp_path: Path, method: str, kind: str, mixed: bool) -> None:
    """Every method, unit and choice of ranks: the planner and the printed table agree, sentence by sentence."""
    asked = [CONDITIONS[0], KINDS[kind], *([RANKS] if mixed else [])]
    reasons = [why for each in asked if (why := refusal(method, each)) is not None]
    ranks = {"east": SPEC.rank + 1} if mixed else {}
    settings = {**ASKED, "mechanism": kind, "method": method, "ranks": ranks}
    if not reasons:
        assert plan_of(World(tmp_path), ALL, **settings).mechanism.kind == kind
        return
    with pytest.raises(PolicyRefused) as caught:
        plan_of(World(tmp_path), ALL, **settings)
    assert reasons[0] in caught.value.message


def test_the_table_has_a_verdict_for_every_method_and_condition() -> None:
    """No cell is left open, and each refusal is one sentence."""
    rows = dict(table())
    assert set(rows) == {*METHODS, *NOT_SUMS}
    for cells in rows.values():
        assert len(cells) == len(CONDITIONS)
        assert all(why is None or (why and "." not in why and "\n" not in why) for why in cells)


def test_noise_shares_are_made_for_the_smallest_sum_that_is_opened(tmp_path: Path) -> None:
    """Four owners, one of whom may be lost and one collude: three survive at least, two honest shares count."""
    plan = plan_of(World(tmp_path), ALL, mechanism=SKELLAM, **ASKED)
    assert plan.mechanism.shares is not None
    assert (plan.min_survivors, plan.mechanism.shares.honest) == (3, 2)
    assert plan.mechanism.shares.dimension == SPEC.layout(("B",)).size
    assert plan.weights == dict.fromkeys(OWNERS, 1.0)
    update_vector(plan)  # raises if the ring has no room


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"mechanism": "laplace"}, ConfigError, "dp-sgd, dp-ftrl or skellam allowed"),
        ({"mechanism": SKELLAM, "acknowledge_noise": False}, PolicyRefused, "noise over signal is .* 1 at most"),
        ({"mechanism": SKELLAM, "corruption": 0.7}, PolicyRefused, "holds no noise to count on"),
        ({"mechanism": SKELLAM, "value_bits": 28, "noise_multiplier": 50.0}, PolicyRefused, "need a ring of"),
        ({"mechanism": DP_FTRL, "stream_band": 32, "stream_separation": 16}, ConfigError, "separation no less than"),
        ({"mechanism": DP_FTRL, "stream_steps": 1, "local_steps": 2}, ConfigError, "a stream of at least as many"),
        (
            {"mechanism": DP_SGD, "clip_quantile": 0.5, "clip_count_noise": 4.0, "noise_multiplier": 8.0},
            ConfigError,
            "count noise must be",
        ),
        ({"mechanism": DP_SGD, "clip_quantile": 1.5}, ConfigError, "quantile in"),
    ],
)
def test_settings_that_promise_nothing_are_refused_when_planned(
    tmp_path: Path, settings: dict[str, object], error: type[FedllmError], words: str
) -> None:
    """Each with the number found and what is allowed; nobody was asked yet."""
    with pytest.raises(error, match=words):
        plan_of(World(tmp_path), ALL, **{**ASKED, **settings})


def test_a_stream_is_named_after_its_federation(tmp_path: Path) -> None:
    """Another name is another stream, which is charged anew; another federation's is never touched."""
    stream = plan_of(World(tmp_path), ALL, mechanism=DP_FTRL, stream="spring", **ASKED).mechanism.stream
    assert stream is not None
    assert stream.name == "tools/spring"


def test_adaptive_clipping_is_off_unless_asked_for(tmp_path: Path) -> None:
    """A quantile turns it on; the gradients' noise then makes room for the count's."""
    plain = plan_of(World(tmp_path), ALL, **ASKED).mechanism
    assert (plain.adaptive, plain.gradient_noise) == (None, 2.0)
    adaptive = plan_of(World(tmp_path), ALL, clip_quantile=0.5, clip_count_noise=4.0, **ASKED).mechanism
    assert adaptive.gradient_noise == pytest.approx((1 / 4 - 1 / 64) ** -0.5)
