"""Unit owner: each update is clipped, noised and charged as one, and every attempt at its sum is a release."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from unit.client.owner_fakes import (
    BASE,
    IDENTITIES,
    OWNERS,
    POLICY,
    ROSTER,
    ToyTrainer,
    begin,
    daemon,
    opened,
    plan,
    sealed,
)
from unit.client.test_attempts import Attempt, again, retry

from fedllm.client.daemon import Daemon
from fedllm.client.kept import LocalUpdate
from fedllm.client.pipeline import encode_update, update_codec
from fedllm.client.policy import OwnerPolicy, check_plan, check_retry
from fedllm.errors import ConfigError, FedllmError, NonFiniteUpdate, PlanChanged, PolicyRefused
from fedllm.messages.mechanism import RELATION_ZERO_OUT, SKELLAM, UNIT_OWNER, Mechanism, NoiseShares
from fedllm.messages.plan import Recipe, Ring, RoundPlan
from fedllm.messages.round import Refused, Started
from fedllm.privacy.ledger import Ledger
from fedllm.rng import OsRng, SeededRng

CLIP = 0.5
STEPS = 1 << 15
SIZE = 24
NOISED = Mechanism(SKELLAM, UNIT_OWNER, RELATION_ZERO_OUT, 2.0, CLIP, 1.0, 1, 1e-5, shares=NoiseShares(2, SIZE, STEPS))
COUNTED = dataclasses.replace(POLICY, unit=UNIT_OWNER, max_epsilon=9.0)


def noised(**changes: Any) -> RoundPlan:
    """Return a plan of unit owner that `COUNTED` accepts, with some fields changed."""
    fields: dict[str, Any] = {
        "mechanism": NOISED,
        "ring": Ring(32, 16, CLIP),
        "recipe": Recipe("adamw", 0.1, 3, 8, 4, 160),
    }
    return plan(**{**fields, **changes})


def check(made: RoundPlan, policy: OwnerPolicy = COUNTED) -> None:
    """Check a plan as the first owner does."""
    check_plan(made, policy, roster=ROSTER, base=BASE, owner=OWNERS[0], last_round=0)


def daemons(home: Path, policy: OwnerPolicy = COUNTED) -> dict[str, Daemon]:
    """Return four daemons whose ledgers count by owner."""
    return {o: daemon(o, home / o, trainer=ToyTrainer(0.03 * (i + 1)), policy=policy) for i, o in enumerate(OWNERS)}


def ledger(home: Path, owner: str) -> Ledger:
    """Return an owner's ledger as it is on disk."""
    return Ledger.read(home / owner / "ledger.jsonl", IDENTITIES[owner].public)


def second(**changes: Any) -> RoundPlan:
    """Return the second attempt at the sum of `noised`, with three owners."""
    return again(OWNERS[:3], mechanism=NOISED, ring=Ring(32, 16, CLIP), recipe=noised().recipe, **changes)


def test_a_sum_holds_the_clipped_updates_and_everybodys_noise(tmp_path: Path) -> None:
    """Real daemons, real masks: the opened sum is near the sum of clipped updates, and never on it."""

    async def scenario() -> Any:
        return await Attempt(noised(), daemons(tmp_path)).open(begin(noised()))

    total = asyncio.run(scenario()).update
    clipped = sum(min(1.0, CLIP / (0.03 * (i + 1) * SIZE**0.5)) * 0.03 * (i + 1) for i in range(4))
    std = NOISED.sum_std(4) * CLIP / STEPS
    assert not np.allclose(total, clipped, atol=std / 100)
    assert np.abs(total - clipped).max() < 6 * std
    assert ((total - clipped) ** 2).sum() / std**2 == pytest.approx(SIZE, abs=6 * (2 * SIZE) ** 0.5)


@pytest.mark.parametrize("rng", [OsRng(), SeededRng("noise")], ids=["os", "seeded"])
def test_a_share_of_an_update_of_zeros_has_the_variance_that_is_charged(rng: Any) -> None:
    """A loss cannot tell noise from none: its variance can (z C)^2 / h an entry, to six standard errors."""
    local = LocalUpdate(np.zeros(SIZE, np.float32), 40, None, 0.1)
    codec = update_codec(noised())
    drawn = np.stack(
        [codec.decode(encode_update(noised(), OWNERS[0], local, rng), 1).update for _ in range(200)]
    ) / (CLIP / STEPS)  # fmt: skip
    promised = (2.0 * STEPS) ** 2 / 2
    assert drawn.var() / promised == pytest.approx(1.0, abs=6 * (2 / drawn.size) ** 0.5)
    assert abs(drawn.mean()) < 6 * (promised / drawn.size) ** 0.5


def test_each_attempt_is_charged_and_its_noise_is_drawn_anew(tmp_path: Path) -> None:
    """The others may have opened the first sum without this owner's help: the second one is another release."""

    async def scenario() -> dict[str, Daemon]:
        made = daemons(tmp_path)
        await Attempt(noised(), made).each(begin(noised()))
        await Attempt(second(), made).open(retry(second()))
        return made

    made = asyncio.run(scenario())
    charged = ledger(tmp_path, OWNERS[0]).reservations()
    assert [r.plan_digest for r in charged] == [noised().digest, second().digest]
    assert len(ledger(tmp_path, OWNERS[3]).reservations()) == 1
    trained = {o: made[o]._trainer.trained for o in OWNERS}  # type: ignore[attr-defined]
    assert set(map(tuple, trained.values())) == {(1,)}, "one training for both"


def test_an_attempt_beyond_the_budget_is_refused_and_charges_nothing(tmp_path: Path) -> None:
    """The first attempt fits under the limit, two do not."""
    once = asyncio.run(_spent_by_one(tmp_path / "probe"))
    tight = dataclasses.replace(COUNTED, max_epsilon=once * 1.1)

    async def scenario() -> Any:
        made = daemons(tmp_path, tight)
        await Attempt(noised(), made).each(begin(noised()))
        return await Attempt(second(), made).each(retry(second()))

    answers = asyncio.run(scenario())
    assert {type(a) for a in answers.values()} == {Refused}
    assert {a.code for a in answers.values()} == {"budget-exhausted"}
    assert ledger(tmp_path, OWNERS[0]).spent() == once


async def _spent_by_one(home: Path) -> float:
    await Attempt(noised(), daemons(home)).each(begin(noised()))
    return ledger(home, OWNERS[0]).spent()


def test_an_opened_sum_is_priced_with_the_noise_that_is_in_it(tmp_path: Path) -> None:
    """Four survive where three were counted on: who helped to open the sum has proof of it and pays for less."""

    async def scenario() -> tuple[float, float]:
        made = daemons(tmp_path)
        attempt = Attempt(noised(), made)
        requests = await attempt.to_unmask(begin(noised()))
        before = ledger(tmp_path, OWNERS[0]).spent()
        for owner, body in requests.items():
            await attempt.ask(owner, body)
        return before, ledger(tmp_path, OWNERS[0]).spent()

    before, after = asyncio.run(scenario())
    assert after < before
    found = ledger(tmp_path, OWNERS[0]).reservations()[0]
    assert found.plan_digest == noised().digest


def _shares(**changes: int) -> Mechanism:
    return dataclasses.replace(NOISED, shares=dataclasses.replace(NOISED.shares, **changes))


REFUSED: dict[str, tuple[dict[str, Any], OwnerPolicy, type[FedllmError], str]] = {
    "more honest shares than are sure to be there": (
        {"mechanism": _shares(honest=3)}, COUNTED, PolicyRefused, "counts on 3 honest shares .* at most 2",
    ),
    "colluders that the owner fears and the plan does not": (
        {}, dataclasses.replace(COUNTED, min_corruption=0.4), PolicyRefused, "with 2 of 4 who may collude",
    ),
    "noise for a shorter update": ({"mechanism": _shares(dimension=12)}, COUNTED, PolicyRefused, "noise is for 12"),
    "a finer grid than the ring's": ({"mechanism": _shares(clip_steps=999)}, COUNTED, PolicyRefused, "999 grid steps"),
    "a grid that rounding would fill": (
        {"mechanism": _shares(clip_steps=8), "ring": Ring(32, 4, CLIP)}, COUNTED, ConfigError, "24 entries",
    ),
    "a ring that the noise would wrap": ({"ring": Ring(24, 16, CLIP), "mechanism": dataclasses.replace(
        NOISED, noise_multiplier=100.0)}, COUNTED, ConfigError, "need a ring of"),
    "weights that are not 1": ({"weights": dict.fromkeys(OWNERS, 0.5)}, COUNTED, PolicyRefused, "not 1 each"),
    "record noise in a ledger of owners": (
        {"mechanism": plan().mechanism, "recipe": plan().recipe, "ring": plan().ring}, COUNTED, PolicyRefused,
        "protects one record, this ledger counts by owner",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_plan_whose_noise_would_not_be_there_is_refused(case: str) -> None:
    """Each by its own sentence; the plan without the change is accepted."""
    changes, policy, error, words = REFUSED[case]
    check(noised())
    with pytest.raises(error, match=words):
        check(noised(**changes), policy)


def test_an_attempt_may_not_open_a_smaller_sum_than_was_agreed() -> None:
    """Its noise is made for the number of survivors that the first attempt named."""
    wide = noised(min_survivors=4, mechanism=_shares(honest=3))
    check(wide)
    smaller = dataclasses.replace(wide, attempt=2, nonce=b"2" * 32, min_survivors=3)
    with pytest.raises(PlanChanged, match="opens a sum of 3 owners, 4 at least were agreed"):
        check_retry(smaller, wide, COUNTED, roster=ROSTER, owner=OWNERS[0])


def test_training_that_diverged_adds_nothing_instead_of_telling(tmp_path: Path) -> None:
    """A refusal would be a bit about this owner's data outside the noise; with unit record it is one."""

    async def scenario(made: RoundPlan, policy: OwnerPolicy, home: Path) -> Any:
        broken = ToyTrainer(error=NonFiniteUpdate("step 1: a gradient is not finite"))
        one = daemon(OWNERS[0], home, trainer=broken, policy=policy)
        await one.handle(sealed(begin(made), OWNERS[0]))
        from fedllm.messages.round import FetchAdvertise

        return opened(await one.handle(sealed(FetchAdvertise(), OWNERS[0])), OWNERS[0])

    told = asyncio.run(scenario(noised(), COUNTED, tmp_path / "owner"))
    refused = asyncio.run(scenario(plan(), POLICY, tmp_path / "record"))
    assert not isinstance(told, Refused | Started)
    assert isinstance(refused, Refused)
