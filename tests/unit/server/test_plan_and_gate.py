"""From settings and present owners to a plan, and from summed scores to a verdict."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from round_world import OWNERS, SPEC, World

from fedllm.aggregation.fixedpoint import check_capacity
from fedllm.aggregation.vector import ScoreSum
from fedllm.config import FederationSettings
from fedllm.errors import AdapterInvalid, ConfigError, NotReady, PolicyRefused
from fedllm.ids import Digest, OwnerId
from fedllm.messages.plan import RoundPlan
from fedllm.rng import SeededRng
from fedllm.server.federation import Federation, Head, adapter_spec, initial_state
from fedllm.server.gate import ScoreGate
from fedllm.server.plan import make_plan, ring_bits

ALL = [OwnerId(o) for o in OWNERS]


def plan_of(world: World, present: list[OwnerId], **settings: object) -> RoundPlan:
    """Return the plan of round 3 with the owners that are there."""
    federation = Federation(replace(world.settings, **settings), SPEC, world.roster)  # type: ignore[arg-type]
    head = Head(initial_state("tools", SPEC), None)
    return make_plan(federation, head, 3, present, SeededRng(7))


def test_plan_names_everything_by_digest(tmp_path: Path) -> None:
    """Cohort, threshold, head, roster and layout are what they should be; the plan is a pure function."""
    world = World(tmp_path)
    plan = plan_of(world, ALL)
    assert plan == plan_of(world, ALL)
    assert (plan.cohort, plan.threshold, plan.min_survivors, plan.round) == (OWNERS, 3, 3, 3)
    assert plan.head == initial_state("tools", SPEC).digest
    assert plan.roster == world.roster.digest
    assert plan.layout == SPEC.layout(("B",)).digest
    assert plan.mechanism.kind == "none"
    assert plan.weights is None


def test_weights_under_dp_are_public_constants(tmp_path: Path) -> None:
    """Declared sizes over the largest one; the ring has room for the cohort."""
    declared = {"east": 10, "north": 20, "south": 40, "west": 5}
    plan = plan_of(World(tmp_path), ALL, privacy=True, declared_records=declared)
    assert plan.weights == {"east": 0.25, "north": 0.5, "south": 1.0, "west": 0.125}
    assert (plan.mechanism.kind, plan.mechanism.steps) == ("dp-sgd", plan.recipe.steps)
    assert plan.ring.bits == 24


def test_too_few_owners_is_not_yet_and_too_small_a_roster_never(tmp_path: Path) -> None:
    """Two of four there: ask later (75), the absent named. A floor under three: refused (3), whoever is there."""
    world = World(tmp_path)
    with pytest.raises(NotReady, match="2 of 4 owners are there, 3 needed") as caught:
        plan_of(world, ALL[:2])
    assert "south, west" in str(caught.value.hint)
    with pytest.raises(PolicyRefused, match="never published"):
        plan_of(world, ALL, min_survivors=2)
    with pytest.raises(PolicyRefused):
        plan_of(World(tmp_path, owners=("east", "west")), ALL)


@pytest.mark.parametrize("owners", [3, 4, 7, 8, 100, 128, 256, 257])
@pytest.mark.parametrize("value_bits", [7, 8, 12, 14, 16, 20])
def test_ring_has_room_and_is_no_wider_than_it_must_be(owners: int, value_bits: int) -> None:
    """The arithmetic's own check agrees with every ring the plan chooses."""
    bits = ring_bits(value_bits, owners)
    check_capacity(owners, value_bits, bits)
    if bits - 8 > value_bits:
        with pytest.raises(ConfigError):
            check_capacity(owners, value_bits, bits - 8)


def test_sixteen_bits_take_three_bytes_up_to_256_owners_and_two_where_they_fit() -> None:
    """The default is 3 bytes an entry; 4 owners with 14 bits fit 2."""
    assert [ring_bits(16, n) for n in (4, 256, 257)] == [24, 24, 32]
    assert [ring_bits(14, n) for n in (4, 5)] == [16, 24]


def test_a_ring_too_narrow_for_its_owners_is_refused() -> None:
    """31-bit values of four owners fit no ring of 32 bits."""
    with pytest.raises(PolicyRefused, match="need a ring of 33 bits"):
        ring_bits(31, 4)


def test_declared_sizes_and_roster_agree(tmp_path: Path) -> None:
    """An owner without a declared size, or a size without an owner, is named."""
    world = World(tmp_path)
    settings = replace(world.settings, declared_records={"east": 1, "north": 1, "south": 1, "nord": 1})
    with pytest.raises(ConfigError, match="nord, west"):
        Federation(settings, SPEC, world.roster)


def test_untrained_start_is_public_and_repeats() -> None:
    """Same federation and spec, same start on every machine; another name, another start; B is zero."""
    one = initial_state("tools", SPEC)
    assert one.digest == initial_state("tools", SPEC).digest != initial_state("legal", SPEC).digest
    assert not any(a.any() for name, a in one.factors.items() if name.endswith("lora_B"))


def test_spec_takes_the_last_layers() -> None:
    """The last N transformer layers are adapted; more than there are is refused."""
    settings = FederationSettings(name="tools", base=Path("b"), alias="a/b", last_layers=2, rank=2, alpha=4)
    spec = adapter_spec(settings, base=Digest("ab" * 32), num_layers=5, shapes={"q_proj": (6, 4)})
    assert spec.layers == (3, 4)
    with pytest.raises(ConfigError, match="last_layers is 2, the base has 1"):
        adapter_spec(settings, base=Digest("ab" * 32), num_layers=1, shapes={"q_proj": (6, 4)})


def test_a_head_of_another_spec_is_refused(tmp_path: Path) -> None:
    """The alias points at a version of rank 2, the federation now says rank 1: two specs never mix."""
    import asyncio

    world = World(tmp_path)
    asyncio.run(world.runner().run(1))
    other = Federation(world.settings, replace(SPEC, rank=1), world.roster)
    with pytest.raises(AdapterInvalid, match="another base, rank or modules"):
        other.head(world.registry)


def scores(delta: float) -> ScoreSum:
    """Return summed scores of three owners."""
    return ScoreSum(3, 30, 1.0 + delta, 1.0, delta, 0.1, 0)


def test_gate_promotes_within_its_margin_only() -> None:
    """Better, equal and just within pass; just beyond is held; the numbers are in the verdict."""
    gate = ScoreGate(0.05)
    assert [gate.judge(scores(d)).promote for d in (-0.5, 0.0, 0.05, 0.0501)] == [True, True, True, False]
    verdict = gate.judge(scores(0.25))
    assert verdict.numbers["delta"] == 0.25
    assert "rose by 0.2500, at most 0.05 allowed" in verdict.reason
    with pytest.raises(ConfigError):
        ScoreGate(-0.1)
    with pytest.raises(ConfigError):
        ScoreGate(float("nan"))
