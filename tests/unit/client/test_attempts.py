"""Several attempts at one sum: what is kept for them, over restarts too, and what ends them for good."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from unit.client.owner_fakes import IDENTITIES, OWNERS, ROSTER, ToyTrainer, begin, daemon, opened, plan, sealed

from fedllm.aggregation.secagg.coordinator import SecAggCoordinator
from fedllm.client.daemon import Daemon
from fedllm.client.kept import Answers, Kept, LocalUpdate, UpdateStore
from fedllm.client.pipeline import update_codec
from fedllm.errors import IntegrityError, TwoViews
from fedllm.ids import OwnerId, sha256
from fedllm.messages.envelope import COORDINATOR
from fedllm.messages.plan import RoundPlan, SignedPlan, honest_threshold
from fedllm.messages.round import (
    Advertised,
    Body,
    Confirm,
    FetchAdvertise,
    Masked,
    Refused,
    Retry,
    SendMasked,
    ShareKeys,
    Unmask,
    Unmasked,
)
from fedllm.relay.carrier import Reply
from fedllm.rng import SeededRng


def again(cohort: Sequence[OwnerId] = OWNERS, **changes: Any) -> RoundPlan:
    """Return the plan of a second attempt with these owners."""
    first = plan()
    fields: dict[str, Any] = {
        "attempt": 2, "nonce": b"2" * 32, "cohort": tuple(cohort), "threshold": honest_threshold(len(cohort)),
        "neighbours": len(cohort) - 1, "weights": dict.fromkeys(cohort, 1.0),
        "declared_records": dict.fromkeys(cohort, 40),
    }  # fmt: skip
    return dataclasses.replace(first, **{**fields, **changes})


def retry(made: RoundPlan) -> Retry:
    """Return the message that begins an attempt."""
    return Retry(SignedPlan.sign(made, IDENTITIES[COORDINATOR]))


class Attempt:
    """A coordinator's side of the update sum of one attempt, by hand."""

    def __init__(self, made: RoundPlan, daemons: dict[str, Daemon]) -> None:
        self.plan, self.daemons = made, daemons
        self.codec = update_codec(made)
        sums = {"plan": made, "roster": ROSTER}
        self.update = SecAggCoordinator(**sums, purpose="update", ring_bits=made.ring.bits, entries=self.codec.entries)

    async def ask(self, owner: str, body: Body) -> tuple[Any, Reply]:
        """Return one owner's reply, opened, and as it came."""
        reply = await self.daemons[owner].handle(sealed(body, owner, tag=str(self.plan.attempt)))
        return opened(reply, owner), reply

    async def each(self, body: Body) -> dict[Any, Any]:
        """Ask the whole cohort the same."""
        return {owner: (await self.ask(owner, body))[0] for owner in self.plan.cohort}

    async def to_unmask(self, first: Body) -> dict[OwnerId, Unmask]:
        """Run up to the requests that open the sum."""
        keys = await self.each(first)
        assert {type(k) for k in keys.values()} == {Advertised}, keys
        u1 = self.update.advertised({o: k.update for o, k in keys.items()})
        shared = await self.each(ShareKeys(u1, tuple(k.evaluation for _, k in sorted(keys.items()))))
        update = self.update.shared({o: s.update for o, s in shared.items()})
        for owner, delivery in update.items():
            empty = dataclasses.replace(delivery, purpose="evaluation", ciphertexts={})
            masked, reply = await self.ask(owner, SendMasked(delivery, empty))
            assert isinstance(masked, Masked), masked
            self.update.add_masked(owner, masked.vector, reply.parts)
        signed = await self.each(Confirm("update", self.update.masked()))
        requests = self.update.confirmed({o: s.signature for o, s in signed.items()})
        return {owner: Unmask(request) for owner, request in requests.items()}

    async def open(self, first: Body) -> Any:
        """Run the whole sum and return it decoded."""
        answers = {o: (await self.ask(o, body))[0].shares for o, body in (await self.to_unmask(first)).items()}
        return self.codec.decode(self.update.unmasked(answers), len(self.plan.cohort))


def federation(home: Path, trainers: dict[str, ToyTrainer] | None = None) -> dict[str, Daemon]:
    """Return four daemons, each with an update of its own."""
    made = trainers if trainers is not None else {o: ToyTrainer(0.125 * (i + 1)) for i, o in enumerate(OWNERS)}
    return {o: daemon(o, home / o, trainer=made[o]) for o in OWNERS}


def test_a_second_attempt_sums_the_same_updates_without_training(tmp_path: Path) -> None:
    """One owner fewer, fresh keys, the very updates of the first training, one charge in every ledger."""

    async def scenario() -> tuple[Any, dict[str, ToyTrainer]]:
        trainers = {o: ToyTrainer(0.125 * (i + 1)) for i, o in enumerate(OWNERS)}
        daemons = federation(tmp_path, trainers)
        await Attempt(plan(), daemons).each(begin(plan()))
        made = again(OWNERS[:3])
        return await Attempt(made, daemons).open(retry(made)), trainers

    opened_sum, trainers = asyncio.run(scenario())
    assert np.allclose(opened_sum.mean, 0.125 * 2, atol=1e-3)
    assert all(trainer.trained == [1] for trainer in trainers.values())
    for owner in OWNERS:
        assert (tmp_path / owner / "ledger.jsonl").read_text().count('"reserve"') == 1


def test_a_daemon_killed_after_training_is_in_the_next_attempt(tmp_path: Path) -> None:
    """A new process finds the update, and never trains; in the attempt it was killed in it takes no further part."""

    async def scenario() -> tuple[Body, Any, list[int]]:
        daemons = federation(tmp_path)
        await Attempt(plan(), daemons).each(begin(plan()))
        fresh = ToyTrainer(99.0)
        daemons["north"] = daemon("north", tmp_path / "north", trainer=fresh, rng=SeededRng("restarted"))
        late, _ = await Attempt(plan(), daemons).ask("north", FetchAdvertise())
        made = again()
        return late, await Attempt(made, daemons).open(retry(made)), fresh.trained

    late, opened_sum, trained = asyncio.run(scenario())
    assert isinstance(late, Refused)
    assert late.code == "two-views", "it advertised other keys for that attempt before it was killed"
    assert np.allclose(opened_sum.mean, 0.125 * 2.5, atol=1e-3)
    assert trained == []


@pytest.mark.parametrize("killed", [False, True], ids=["same process", "after a kill"])
def test_who_helped_to_open_a_sum_never_masks_that_update_again(tmp_path: Path, killed: bool) -> None:
    """Finish, claim failure, leave one owner out, subtract: refused, by a restarted daemon as well."""

    async def scenario() -> Body:
        daemons = federation(tmp_path)
        first = Attempt(plan(), daemons)
        requests = await first.to_unmask(begin(plan()))
        await first.ask("north", requests[OwnerId("north")])
        if killed:
            daemons["north"] = daemon("north", tmp_path / "north")
        reply, _ = await Attempt(again(), daemons).ask("north", retry(again(OWNERS[:3])))
        return reply  # type: ignore[no-any-return]

    reply = asyncio.run(scenario())
    assert isinstance(reply, Refused)
    assert reply.code == "already-unmasked"


@pytest.mark.parametrize(
    ("made", "code"),
    [
        (again(attempt=1), "round-replayed"),
        (again(attempt=9), "plan-changed"),
        (again(nonce=bytes(32)), "plan-changed"),
        (again(head=sha256(b"another head")), "plan-changed"),
        (again(recipe=dataclasses.replace(plan().recipe, steps=3)), "plan-changed"),
        (again(weights=dict.fromkeys(OWNERS, 0.5)), "plan-changed"),
        (again(declared_records=dict.fromkeys(OWNERS, 41)), "plan-changed"),
        (again(OWNERS[:2]), "cohort-refused"),
        (again(threshold=2), "threshold-refused"),
        (again([o for o in OWNERS if o != "north"]), "cohort-refused"),
    ],
    ids=[
        "not later",
        "too many",
        "nonce",
        "head",
        "recipe",
        "weights",
        "sizes",
        "two owners",
        "threshold",
        "without me",
    ],
)
def test_an_attempt_may_change_its_owners_and_nothing_else(tmp_path: Path, made: RoundPlan, code: str) -> None:
    """Everything else needs a round of its own: another charge, another training."""

    async def scenario() -> Body:
        daemons = federation(tmp_path)
        await Attempt(plan(), daemons).each(begin(plan()))
        return (await Attempt(plan(nonce=b"x" * 32), daemons).ask("north", retry(made)))[0]  # type: ignore[no-any-return]

    reply = asyncio.run(scenario())
    assert isinstance(reply, Refused)
    assert reply.code == code


def test_owners_that_were_not_in_the_first_attempt_do_not_join_the_second(tmp_path: Path) -> None:
    """A cohort only shrinks: who joins later was not named when this owner agreed."""

    async def scenario() -> Body:
        daemons = federation(tmp_path)
        three = OWNERS[:3]
        fewer = {"cohort": three, "threshold": 3, "neighbours": 2, "weights": dict.fromkeys(three, 1.0)}
        first = plan(**fewer, declared_records=dict.fromkeys(three, 40))
        await Attempt(first, daemons).each(begin(first))
        return (await Attempt(again(), daemons).ask("north", retry(again())))[0]  # type: ignore[no-any-return]

    reply = asyncio.run(scenario())
    assert isinstance(reply, Refused)
    assert (reply.code, "adds 'west'" in reply.message) == ("cohort-refused", True)


def test_a_damaged_update_is_set_aside_and_the_owner_sits_the_round_out(tmp_path: Path) -> None:
    """What cannot be read is removed: the daemon starts, and is a dropout of the round."""

    async def scenario() -> Body:
        daemons = federation(tmp_path)
        await Attempt(plan(), daemons).each(begin(plan()))
        kept = tmp_path / "north" / "update.npz"
        kept.write_bytes(kept.read_bytes()[:-40])
        daemons["north"] = daemon("north", tmp_path / "north")
        assert not kept.exists()
        return (await Attempt(again(), daemons).ask("north", retry(again())))[0]  # type: ignore[no-any-return]

    reply = asyncio.run(scenario())
    assert isinstance(reply, Refused)
    assert reply.code == "step-mismatch"


def test_what_is_kept_is_private_and_goes_when_the_round_ends(tmp_path: Path) -> None:
    """Mode 0600 while the round is under way, gone when the next one begins."""
    from fedllm.ids import RoundNumber
    from fedllm.messages.round import Close

    async def scenario() -> int:
        north = daemon("north", tmp_path)
        await north.handle(sealed(begin(plan()), "north"))
        mode = (tmp_path / "update.npz").stat().st_mode & 0o777
        await north.handle(sealed(Close("aborted", None), "north"))
        assert not (tmp_path / "update.npz").exists()
        await north.handle(sealed(begin(plan(round=RoundNumber(2))), "north", round_number=2))
        assert (tmp_path / "update.npz").exists()
        return mode

    assert asyncio.run(scenario()) == 0o600


def test_an_update_is_kept_bit_for_bit(tmp_path: Path) -> None:
    """What comes back is what training made."""
    store = UpdateStore(tmp_path / "update.npz")
    signed = SignedPlan.sign(plan(), IDENTITIES[COORDINATOR])
    local = LocalUpdate(np.linspace(-1, 1, 7, dtype=np.float32), 40, None, 1.5)
    store.save(Kept(signed, b"head", local))
    found = store.load()
    assert found is not None
    assert found.plan == signed
    assert found.head == b"head"
    assert found.local.update.tobytes() == local.update.tobytes()
    assert (found.local.records, found.local.mean_loss, found.local.train_s) == (40, None, 1.5)


def test_answers_outlive_the_process_and_are_given_once(tmp_path: Path) -> None:
    """The same question again is fine, another one is not, in this process and in the next."""
    path = tmp_path / "answers.jsonl"
    asked, other = sha256(b"U3"), sha256(b"another U3")
    Answers(path).once("update", b"sum", "confirm", asked)
    for answers in (Answers(path), Answers(path)):
        answers.once("update", b"sum", "confirm", asked)
        answers.once("update", b"another sum", "confirm", other)
        with pytest.raises(TwoViews):
            answers.once("update", b"sum", "confirm", other)
        assert not answers.unmasked
    Answers(path).once("update", b"sum", "unmask", asked)
    restarted = Answers(path)
    assert restarted.unmasked
    restarted.clear()
    assert not Answers(path).unmasked


def test_an_answer_that_was_cut_off_by_a_crash_had_not_left(tmp_path: Path) -> None:
    """The torn line is dropped, what is whole counts, and the next answer gets a line of its own."""
    path = tmp_path / "answers.jsonl"
    asked, other = sha256(b"U3"), sha256(b"another U3")
    Answers(path).once("update", b"sum", "confirm", asked)
    with path.open("ab") as file:
        file.write(b'{"asked": "')
    Answers(path).once("update", b"sum", "unmask", other)
    answers = Answers(path)
    assert answers.unmasked
    with pytest.raises(TwoViews):
        answers.once("update", b"sum", "confirm", other)


def test_an_answer_outlives_an_audit_log_that_cannot_be_written(tmp_path: Path) -> None:
    """Nothing leaves that is not written down; when it can be, the very answer leaves that was given once."""

    async def scenario() -> Body:
        daemons = federation(tmp_path)
        first = Attempt(plan(), daemons)
        request = (await first.to_unmask(begin(plan())))[OwnerId("north")]
        log = tmp_path / "north" / "audit.jsonl"
        log.rename(log.with_suffix(".away"))
        log.mkdir()
        with pytest.raises(IntegrityError):
            await first.ask("north", request)
        log.rmdir()
        assert not (tmp_path / "north" / "update.npz").exists(), "it is never masked again"
        return (await first.ask("north", request))[0]  # type: ignore[no-any-return]

    assert isinstance(asyncio.run(scenario()), Unmasked)


def test_a_damaged_record_of_answers_stops_the_daemon(tmp_path: Path) -> None:
    """Without it the owner could be asked twice."""
    (tmp_path / "answers.jsonl").write_text('{"sum": "aa"}\n')
    with pytest.raises(IntegrityError, match=r"answers\.jsonl is damaged"):
        Answers(tmp_path / "answers.jsonl")
