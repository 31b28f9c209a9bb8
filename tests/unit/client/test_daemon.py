"""The daemon at its line to the outside: one whole round, and everything that is refused."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from patience import NEVER_S, PATIENCE_S
from unit.client.owner_fakes import (
    DP,
    HEAD,
    OWNERS,
    POLICY,
    PRIVATE_TEXT,
    ROSTER,
    ToyTrainer,
    begin,
    daemon,
    opened,
    plan,
    sealed,
)

from fedllm.aggregation.secagg.coordinator import SecAggCoordinator
from fedllm.client.daemon import Daemon
from fedllm.client.pipeline import score_codec, update_codec
from fedllm.errors import AuthenticationError, DataError, IntegrityError
from fedllm.ids import RoundNumber
from fedllm.messages.mechanism import Mechanism
from fedllm.messages.plan import RoundPlan
from fedllm.messages.round import (
    Advertised,
    Body,
    Close,
    Closed,
    Confirm,
    Confirmed,
    Evaluate,
    FetchAdvertise,
    FetchScores,
    Hello,
    HelloReply,
    Masked,
    Pending,
    Refused,
    SendMasked,
    SharedKeys,
    ShareKeys,
    Started,
    Unmask,
)
from fedllm.relay.carrier import Reply


class Federation:
    """Daemons and the requests a coordinator makes of them.

    Parameters
    ----------
    home : Path
    changes
        Passed to every `daemon`.
    """

    def __init__(self, home: Path, **changes: Any) -> None:
        self.home = home
        self.daemons = {
            o: daemon(o, home / o, trainer=ToyTrainer(0.125 * (i + 1)), **changes) for i, o in enumerate(OWNERS)
        }
        self.sent: list[tuple[str, Reply]] = []

    async def ask(self, owner: str, body: Body, *, round_number: int = 1, tag: str = "") -> Body:
        """Return one owner's verified reply."""
        reply = await self.daemons[owner].handle(sealed(body, owner, round_number=round_number, tag=tag))
        self.sent.append((owner, reply))
        return opened(reply, owner)

    async def vectors(self, machine: SecAggCoordinator, asked: dict[str, Body]) -> None:
        """Ask owners for their masked vectors, which travel behind the reply, and add them."""
        for owner, body in asked.items():
            reply = await self.ask(owner, body)
            assert isinstance(reply, Masked), reply
            machine.add_masked(owner, reply.vector, self.sent[-1][1].parts)  # type: ignore[arg-type]

    async def each(self, owners: Sequence[str], body: Body, kind: type) -> dict[Any, Any]:
        """Ask several owners the same and require one kind of answer."""
        replies = {o: await self.ask(o, body) for o in owners}
        for owner, reply in replies.items():
            assert isinstance(reply, kind), (owner, reply)
        return replies

    async def round(self, made: RoundPlan, *, lose: str | None = None) -> tuple[Any, Any]:
        """Run a whole round by hand, losing one owner before it masks; return both opened sums."""
        update_codec_, scores_codec = update_codec(made), score_codec(made)
        update = SecAggCoordinator(
            plan=made, purpose="update", roster=ROSTER, ring_bits=made.ring.bits, entries=update_codec_.entries
        )
        scores = SecAggCoordinator(
            plan=made, purpose="evaluation", roster=ROSTER, ring_bits=scores_codec.ring.bits,
            entries=scores_codec.entries,
        )  # fmt: skip
        keys = await self.each(OWNERS, begin(made), Advertised)
        u1 = update.advertised({o: k.update for o, k in keys.items()})
        e1 = scores.advertised({o: k.evaluation for o, k in keys.items()})
        shared = await self.each(OWNERS, ShareKeys(u1, e1), SharedKeys)
        u2 = update.shared({o: s.update for o, s in shared.items()})
        e2 = scores.shared({o: s.evaluation for o, s in shared.items()})
        there = [o for o in OWNERS if o != lose]
        await self.vectors(update, {o: SendMasked(u2[o], e2[o]) for o in there})
        total = await self._open(update, "update", there)
        await self.vectors(scores, dict.fromkeys(there, Evaluate(HEAD.to_bytes())))
        scores.bind(bytes.fromhex(HEAD.digest))
        scored = await self._open(scores, "evaluation", there)
        await self.each(there, Close("judged", None), Closed)
        return update_codec_.decode(total, len(there)), scores_codec.decode(scored, len(there))

    async def _open(self, sums: SecAggCoordinator, purpose: str, there: Sequence[str]) -> Any:
        survivors = sums.masked()
        signed = await self.each(there, Confirm(purpose, survivors), Confirmed)
        requests = sums.confirmed({o: s.signature for o, s in signed.items()})
        shares = {o: await self.ask(o, Unmask(requests[o])) for o in requests}
        return sums.unmasked({o: s.shares for o, s in shares.items()})  # type: ignore[union-attr]


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_round_opens_the_sum_and_nothing_else(tmp_path: Path) -> None:
    """Four daemons, both sums: the mean of the updates and of the scores, and the owners' own records of it."""
    federation = Federation(tmp_path)
    update, scores = asyncio.run(federation.round(plan()))
    assert update.owners == 4
    assert np.allclose(update.mean, 0.125 * 2.5, atol=1e-3)
    assert scores.owners == 4
    assert scores.candidate_loss == pytest.approx(scores.head_loss)
    (mine,) = _lines(tmp_path / "north" / "rounds.jsonl")
    assert (mine["round"], mine["outcome"]) == (1, "judged")
    assert mine["head_loss"] == pytest.approx(2.0 - HEAD.flat.mean(), abs=1e-6)
    assert 0 < mine["epsilon"] <= 8


def test_a_round_survives_the_loss_of_one_owner(tmp_path: Path) -> None:
    """The owner is lost after it shared its keys: the others' shares cancel its masks."""
    update, scores = asyncio.run(Federation(tmp_path).round(plan(), lose="south"))
    assert (update.owners, scores.owners) == (3, 3)
    assert np.allclose(update.mean, 0.125 * (1 + 2 + 4) / 3, atol=1e-3)


def test_every_message_that_left_is_in_the_audit_log(tmp_path: Path) -> None:
    """Kind, size and digest of exactly what was sent, in order."""
    from fedllm.ids import sha256

    federation = Federation(tmp_path)
    asyncio.run(federation.round(plan()))
    mine = [reply for owner, reply in federation.sent if owner == "north"]
    log = _lines(tmp_path / "north" / "audit.jsonl")
    assert [(e["bytes"], e["sha256"]) for e in log] == [(reply.size, sha256(reply.head)) for reply in mine]
    assert [e["kind"] for e in log][:3] == ["Advertised", "SharedKeys", "Masked"]
    assert [e.get("parts", 0) for e in log][:3] == [0, 0, 1]


def test_hello_is_answered_with_the_challenge_by_whoever_is_there(tmp_path: Path) -> None:
    """It is the one message that need not name its receiver."""
    north = daemon("north", tmp_path)
    reply = asyncio.run(north.handle(sealed(Hello(b"c" * 32), "", round_number=0)))
    assert opened(reply, "north") == HelloReply("north", b"c" * 32, "test")  # type: ignore[arg-type]
    refused = opened(asyncio.run(north.handle(sealed(FetchAdvertise(), ""))), "north")
    assert isinstance(refused, Refused)


def _tampered() -> bytes:
    data = bytearray(sealed(begin(plan()), "north"))
    data[len(data) // 2] ^= 1
    return bytes(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00" * 50,
        _tampered(),
        sealed(begin(plan()), "north", signer="stranger"),
        sealed(begin(plan()), "north", signer="south"),
        sealed(begin(plan()), "south"),
        sealed(begin(plan()), "north", sender="north"),
    ],
    ids=["empty", "zeros", "bit flipped", "other coordinator", "another owner", "for another", "not from coordinator"],
)
def test_bytes_that_are_not_the_coordinators_learn_nothing(tmp_path: Path, data: bytes) -> None:
    """One and the same refusal, whatever was wrong: no oracle, no work, no budget."""
    north = daemon("north", tmp_path)
    reply = opened(asyncio.run(north.handle(data)), "north")
    assert reply == Refused("authentication", "not a request of the pinned coordinator to this owner", None)
    assert north.round_number is None
    assert "reserve" not in (tmp_path / "ledger.jsonl").read_text()


def test_a_plan_signed_by_another_key_is_refused_inside_a_good_envelope(tmp_path: Path) -> None:
    """The plan has its own signature, under its own context."""
    north = daemon("north", tmp_path)
    reply = opened(asyncio.run(north.handle(sealed(begin(plan(), signer="stranger"), "north"))), "north")
    assert isinstance(reply, Refused)
    assert reply.code == "signature-invalid"


@pytest.mark.parametrize(
    ("made", "code"),
    [
        (plan(mechanism=Mechanism.none(), weights=None), "policy-refused"),
        (plan(spec=dataclasses.replace(plan().spec, base="e" * 64)), "base-mismatch"),
        (plan(mechanism=dataclasses.replace(DP, noise_multiplier=0.45)), "budget-exhausted"),
        (plan(head="f" * 64), "digest-mismatch"),
    ],
    ids=["no dp", "base", "budget", "head"],
)
def test_a_refused_plan_spends_and_starts_nothing(tmp_path: Path, made: RoundPlan, code: str) -> None:
    """The refusal is sealed and names its code; the ledger has no reservation; the round may be planned anew."""
    north = daemon("north", tmp_path)
    reply = opened(asyncio.run(north.handle(sealed(begin(made), "north"))), "north")
    assert isinstance(reply, Refused)
    assert reply.code == code
    assert "reserve" not in (tmp_path / "ledger.jsonl").read_text()
    better = opened(asyncio.run(north.handle(sealed(begin(plan()), "north"))), "north")
    assert isinstance(better, Advertised)


def test_another_federation_is_none_of_this_daemons_business(tmp_path: Path) -> None:
    """Several federations share a carrier: an owner answers for its own."""
    north = daemon("north", tmp_path)
    data = sealed(Hello(b"c" * 32), "north", round_number=0, federation="others")
    reply = opened(asyncio.run(north.handle(data)), "north")
    assert isinstance(reply, Refused)
    assert reply.code == "policy-refused"


def test_the_same_request_is_answered_from_the_record(tmp_path: Path) -> None:
    """A lost reply is sent again bit for bit: one training, one reservation, and no second masking."""
    federation = Federation(tmp_path)
    request = sealed(begin(plan()), "north")
    north = federation.daemons[OWNERS[1]]

    async def scenario() -> None:
        first = await north.handle(request)
        assert await north.handle(request) == first
        assert await asyncio.gather(north.handle(request), north.handle(request)) == [first, first]

    asyncio.run(scenario())
    assert (tmp_path / "north" / "ledger.jsonl").read_text().count('"reserve"') == 1
    assert [e["kind"] for e in _lines(tmp_path / "north" / "audit.jsonl")] == ["Advertised", "again", "again", "again"]


def test_a_request_id_cannot_be_used_for_another_content(tmp_path: Path) -> None:
    """The record is an answer to one question only."""
    north = daemon("north", tmp_path)

    async def scenario() -> Body:
        await north.handle(sealed(begin(plan()), "north", request=bytes(16)))
        return opened(await north.handle(sealed(begin(plan(nonce=b"n" * 32)), "north", request=bytes(16))), "north")

    reply = asyncio.run(scenario())
    assert isinstance(reply, Refused)
    assert reply.code == "request-reused"


def test_a_newer_begin_replaces_an_unfinished_round(tmp_path: Path) -> None:
    """One round at a time: the old one's secrets are closed and it is written down as replaced."""
    federation = Federation(tmp_path)

    async def scenario() -> tuple[Body, Body]:
        await federation.ask("north", begin(plan()))
        await federation.ask("north", FetchAdvertise())
        second = await federation.ask("north", begin(plan(round=RoundNumber(2))), round_number=2)
        return second, await federation.ask("north", FetchAdvertise(), tag="late")

    second, late = asyncio.run(scenario())
    assert isinstance(second, Advertised)
    assert isinstance(late, Refused)
    (old,) = _lines(tmp_path / "north" / "rounds.jsonl")
    assert (old["round"], old["outcome"]) == (1, "replaced")


@pytest.mark.parametrize(
    ("body", "code"),
    [(FetchAdvertise(), "step-mismatch"), (ShareKeys((), ()), "step-mismatch"), (Started(0.0), "step-mismatch"),
     (FetchScores(), "step-mismatch"), (Evaluate(b""), "step-mismatch"), (Close("judged", None), "step-mismatch")],
)  # fmt: skip
def test_steps_without_a_round_are_refused(tmp_path: Path, body: Body, code: str) -> None:
    """Replies and steps out of order are not requests; none of them raises."""
    reply = opened(asyncio.run(daemon("north", tmp_path).handle(sealed(body, "north"))), "north")
    assert isinstance(reply, Refused)
    assert reply.code == code


@pytest.mark.parametrize(
    ("error", "code"), [(ValueError(PRIVATE_TEXT), "failed"), (DataError(f"line 3: {PRIVATE_TEXT}"), "data")]
)
def test_what_goes_wrong_inside_stays_inside(tmp_path: Path, error: Exception, code: str) -> None:
    """An exception's text may quote a record: the coordinator is told a code, or a type's name, and no more."""
    north = daemon("north", tmp_path, trainer=ToyTrainer(error=error))

    async def scenario() -> list[Reply]:
        return [await north.handle(sealed(body, "north")) for body in (begin(plan()), FetchAdvertise())]

    for data in asyncio.run(scenario()):
        reply = opened(data, "north")
        assert isinstance(reply, Refused)
        assert reply.code == code
        assert PRIVATE_TEXT.encode() not in data.head
    assert PRIVATE_TEXT not in (tmp_path / "audit.jsonl").read_text()


def test_training_does_not_hold_up_the_line(tmp_path: Path) -> None:
    """Begin returns soon; until the worker is done the answer is Pending, and Pending is never recorded."""
    import threading

    release = threading.Event()

    class Slow(ToyTrainer):
        def fit(self, *arguments: Any, **named: Any) -> Any:
            release.wait(NEVER_S)
            return super().fit(*arguments, **named)

    async def scenario() -> tuple[Body, Body]:
        north: Daemon = daemon("north", tmp_path, trainer=Slow(), worker=None, hold_s=0.1)
        await north.handle(sealed(begin(plan()), "north"))
        fetch = sealed(FetchAdvertise(), "north")
        pending = opened(await north.handle(fetch), "north")
        release.set()
        reply = pending
        async with asyncio.timeout(PATIENCE_S):
            while isinstance(reply, Pending):
                reply = opened(await north.handle(fetch), "north")
        await north.close()
        return pending, reply

    pending, done = asyncio.run(scenario())
    assert isinstance(pending, Pending)
    assert (pending.stage, pending.total) == ("training", 2)
    assert isinstance(done, Advertised)


def test_nothing_leaves_that_cannot_be_written_down(tmp_path: Path) -> None:
    """An audit log that cannot be written stops the daemon from speaking."""
    north = daemon("north", tmp_path)
    (tmp_path / "audit.jsonl").mkdir()
    with pytest.raises(IntegrityError):
        asyncio.run(north.handle(sealed(Hello(b"c" * 32), "north", round_number=0)))


def test_a_candidate_before_the_update_is_refused(tmp_path: Path) -> None:
    """Scores are given for a sum that this owner took part in, not on demand."""
    federation = Federation(tmp_path)

    async def scenario() -> Body:
        made = plan()
        await federation.ask("north", begin(made))
        return await federation.ask("north", Evaluate(HEAD.to_bytes()))

    early = asyncio.run(scenario())
    assert isinstance(early, Refused)
    assert early.code == "step-mismatch"


def test_a_key_that_the_roster_does_not_pin_cannot_serve(tmp_path: Path) -> None:
    """Found at the start, not in the first round."""
    from unit.client.owner_fakes import IDENTITIES

    with pytest.raises(AuthenticationError):
        daemon("north", tmp_path, identity=IDENTITIES["stranger"])


def test_the_budget_ends_and_says_so(tmp_path: Path) -> None:
    """Rounds are accepted until one would pass the limit; that one is refused and the ledger unchanged."""
    north = daemon("north", tmp_path, policy=dataclasses.replace(POLICY, max_epsilon=1.5))

    async def scenario() -> list[Body]:
        return [
            opened(await north.handle(sealed(begin(plan(round=RoundNumber(n))), "north", round_number=n)), "north")
            for n in range(1, 30)
        ]

    kinds = [type(reply).__name__ for reply in asyncio.run(scenario())]
    accepted = kinds.index("Refused")
    assert accepted >= 1
    assert set(kinds[accepted:]) == {"Refused"}
    assert (tmp_path / "ledger.jsonl").read_text().count('"reserve"') == accepted
