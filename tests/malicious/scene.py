"""Honest owners' real daemons, and in the coordinator's seat, with the coordinator's real key, an attacker."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from malicious.removals import Removal
from numpy.typing import NDArray
from unit.client.owner_fakes import (
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

from fedllm.adapter import AdapterState
from fedllm.aggregation.secagg.coordinator import SecAggCoordinator
from fedllm.client.daemon import Daemon
from fedllm.client.pipeline import score_codec, update_codec
from fedllm.client.policy import OwnerPolicy
from fedllm.client.round import InlineWorker
from fedllm.client.trainer import Trained
from fedllm.identity import Roster
from fedllm.ids import OwnerId
from fedllm.messages.envelope import COORDINATOR
from fedllm.messages.plan import Ring, RoundPlan, SignedPlan, honest_threshold
from fedllm.messages.round import (
    Body,
    Confirm,
    Evaluate,
    FetchScores,
    Refused,
    Retry,
    SendMasked,
    SharedKeys,
    ShareKeys,
    Unmask,
)
from fedllm.messages.secagg import KeyBundle, MaskedVector, ShareDelivery, SurvivorSignature, UnmaskRequest
from fedllm.relay.carrier import Reply
from fedllm.rng import OsRng

EAST, NORTH, SOUTH, WEST = OWNERS
EXACT = Ring(24, 16, 32767 * 2.0**-13)
"""A ring whose step is 2^-13: multiples of it are rounded to themselves, so a difference of sums is exact."""
PURPOSES = ("update", "evaluation")
Verdicts = dict[OwnerId, str]
"""What each honest owner said: the code of its refusal, or the kind of its answer."""
Play = Callable[[Path], Awaitable[Verdicts]]


@dataclass(frozen=True)
class Attack:
    """One row of a table.

    Attributes
    ----------
    name : str
    play : Play
        Performs it on fresh owners in a folder.
    code : str
        What every honest owner refuses it with.
    removed : tuple[Removal, ...]
        Take out every check that refuses it with that code.
    then : str
        What the owners answer without them: the attack succeeds, or meets the next line of defence.
    """

    name: str
    play: Play
    code: str
    removed: tuple[Removal, ...]
    then: str


class PrivateTrainer(ToyTrainer):
    """Moves every entry of B by a multiple of 2^-13 of its own: what an attacker wants to read.

    Parameters
    ----------
    owner : str
    """

    def __init__(self, owner: str) -> None:
        super().__init__()
        self._draw = np.random.default_rng(list(owner.encode()))
        self.update: NDArray[np.float32] = np.zeros(0, np.float32)

    def fit(
        self,
        head: AdapterState,
        plan: RoundPlan,
        factors: tuple[str, ...],
        rng: Any,
        progress: Any,
        *,
        charged: int = 0,
    ) -> Trained:
        """Train, and remember what came of it."""
        trained = super().fit(head, plan, factors, rng, progress)
        layout = head.spec.layout(factors)
        steps = self._draw.integers(-8000, 8000, layout.size)
        self.update = (steps * 2.0**-13).astype(np.float32)
        moved = layout.unflatten(layout.flatten(head.factors) + self.update)
        return dataclasses.replace(trained, state=head.replace(moved))


def again(cohort: Sequence[OwnerId] = OWNERS, **changes: Any) -> RoundPlan:
    """Return the plan of a second attempt with these owners."""
    fields: dict[str, Any] = {
        "attempt": 2, "nonce": b"2" * 32, "cohort": tuple(cohort), "threshold": honest_threshold(len(cohort)),
        "neighbours": len(cohort) - 1, "weights": dict.fromkeys(cohort, 1.0),
        "declared_records": dict.fromkeys(cohort, 40),
    }  # fmt: skip
    return plan(**{**fields, **changes})


def retry(made: RoundPlan) -> Retry:
    """Return the message that begins an attempt."""
    return Retry(SignedPlan.sign(made, IDENTITIES[COORDINATOR]))


def verdict(body: Body) -> str:
    """Return the code of a refusal, or the kind of an answer."""
    return body.code if isinstance(body, Refused) else type(body).__name__


class Scene:
    """The owners of one federation, and what the attacker has got from them so far.

    Each step of a sum is a method that does the steps before it, honestly, if they are not done.

    Parameters
    ----------
    home : Path
    policy : OwnerPolicy
        Of all owners.
    roster : Roster
        Pinned by all owners.
    worker : Executor, optional
        Trains and scores; at once by default.

    Attributes
    ----------
    keys : dict[str, dict[OwnerId, KeyBundle]]
        Advertised, by purpose.
    dealt : dict[OwnerId, SharedKeys]
    vectors : dict[str, dict[OwnerId, tuple[MaskedVector, tuple[bytes, ...]]]]
    signed : dict[str, dict[OwnerId, SurvivorSignature]]
    secret : dict[OwnerId, list[NDArray[uint32]]]
        What the owners masked; the attacker does not see it.
    """

    def __init__(
        self,
        home: Path,
        *,
        policy: OwnerPolicy = POLICY,
        roster: Roster = ROSTER,
        worker: Executor | None = None,
    ) -> None:
        self._home, self._policy, self._roster = home, policy, roster
        self._worker = worker or InlineWorker()
        self.plan = plan()
        self.trainers = {owner: PrivateTrainer(owner) for owner in OWNERS}
        self.secret: dict[OwnerId, list[NDArray[np.uint32]]] = {owner: [] for owner in OWNERS}
        self.daemons: dict[OwnerId, Daemon] = {}
        self.restart()
        self._asked = 0
        self.parts: dict[OwnerId, tuple[bytes, ...]] = {}
        self._new_sum(self.plan)

    def restart(self, *owners: OwnerId) -> None:
        """Kill daemons, all by default, and start them on what they left on disk."""
        for owner in owners or OWNERS:
            self.daemons[owner] = daemon(
                owner, self._home / owner, trainer=self.trainers[owner], policy=self._policy, roster=self._roster,
                rng=OsRng(), worker=self._worker,
                observer=lambda owner, vector: self.secret[owner].append(vector.copy()),
            )  # fmt: skip

    def _new_sum(self, made: RoundPlan) -> None:
        self.plan = made
        self.keys: dict[str, dict[OwnerId, KeyBundle]] = {}
        self.dealt: dict[OwnerId, SharedKeys] = {}
        self.vectors: dict[str, dict[OwnerId, tuple[MaskedVector, tuple[bytes, ...]]]] = {}
        self.signed: dict[str, dict[OwnerId, SurvivorSignature]] = {}

    async def ask(self, owner: OwnerId, asked: Body, **envelope: Any) -> Body:
        """Return one owner's answer to a request under an id of its own, with fields of its envelope replaced."""
        self._asked += 1
        data = sealed(asked, owner, **{"tag": str(self._asked), "round_number": self.plan.round, **envelope})
        return (await self.deliver(owner, data))[0]

    async def deliver(self, owner: OwnerId, data: bytes) -> tuple[Body, Reply]:
        """Return one owner's answer to bytes, opened, and as it came."""
        reply = await self.daemons[owner].handle(data)
        self.parts[owner] = reply.parts
        return opened(reply, owner), reply

    async def each(
        self, body: Body | Mapping[OwnerId, Body], owners: Iterable[OwnerId] | None = None
    ) -> dict[Any, Any]:
        """Return the answers of some owners, the cohort by default, to one request, or to one of each owner's own."""
        if isinstance(body, Mapping):
            return {owner: await self.ask(owner, body[owner]) for owner in body}
        return {owner: await self.ask(owner, body) for owner in owners or self.owners}

    async def verdicts(self, body: Body | Mapping[OwnerId, Body], owners: Iterable[OwnerId] | None = None) -> Verdicts:
        """Return what some owners said to a request."""
        return {owner: verdict(answer) for owner, answer in (await self.each(body, owners)).items()}

    async def verdict(self, owner: OwnerId, asked: Body, **envelope: Any) -> str:
        """Return what one owner said to a request."""
        return verdict(await self.ask(owner, asked, **envelope))

    @property
    def owners(self) -> tuple[OwnerId, ...]:
        """The honest owners of the cohort."""
        return tuple(owner for owner in OWNERS if owner in self.plan.cohort)

    async def begin(self, made: RoundPlan | None = None) -> None:
        """Begin the round, and get everybody's keys: training is done at once."""
        self._new_sum(made or plan())
        self._advertised(await self.each(begin(self.plan)))

    async def retry(self, made: RoundPlan) -> Verdicts:
        """Begin another attempt; if it is accepted, go on in that."""
        answers = await self.each(retry(made), [owner for owner in OWNERS if owner in made.cohort])
        said = {owner: verdict(answer) for owner, answer in answers.items()}
        if set(said.values()) == {"Advertised"}:
            self._new_sum(made)
            self._advertised(answers)
        return said

    def _advertised(self, answers: Mapping[OwnerId, Any]) -> None:
        self.keys = {purpose: {o: getattr(a, purpose) for o, a in answers.items()} for purpose in PURPOSES}

    def key_list(self, **changes: Iterable[KeyBundle]) -> ShareKeys:
        """Return U1 of both sums, that of some purposes replaced."""
        lists = {purpose: self.keys[purpose].values() for purpose in PURPOSES} | changes
        return ShareKeys(*(tuple(sorted(lists[purpose], key=lambda b: b.owner)) for purpose in PURPOSES))

    async def share(self) -> None:
        """Get everybody's sealed shares."""
        if not self.keys:
            await self.begin()
        if not self.dealt:
            self.dealt = await self.each(self.key_list())

    def delivery(self, owner: OwnerId, purpose: str = "update", **changes: Any) -> ShareDelivery:
        """Return the sealed shares addressed to an owner, with some fields replaced."""
        dealt = {o: getattr(message, purpose).ciphertexts for o, message in self.dealt.items()}
        sealed_shares = {o: each[owner] for o, each in sorted(dealt.items()) if o != owner}
        return dataclasses.replace(ShareDelivery(purpose, self.owners, sealed_shares), **changes)

    def send_masked(self, owner: OwnerId, **changes: Any) -> SendMasked:
        """Return what asks an owner for its masked update, the update's delivery changed."""
        return SendMasked(self.delivery(owner, **changes), self.delivery(owner, "evaluation"))

    async def mask(self) -> None:
        """Get everybody's masked update."""
        await self.share()
        if "update" not in self.vectors:
            answers = await self.each({owner: self.send_masked(owner) for owner in self.owners})
            self._keep("update", answers)

    def _keep(self, purpose: str, answers: Mapping[OwnerId, Any]) -> None:
        self.vectors[purpose] = {o: (answer.vector, self.parts[o]) for o, answer in answers.items()}

    async def evaluate(self, candidates: Mapping[OwnerId, AdapterState]) -> None:
        """Get everybody's masked scores of a candidate."""
        await self.mask()
        await self.each({owner: Evaluate(candidates[owner].to_bytes()) for owner in self.owners})
        self._keep("evaluation", await self.each(FetchScores()))

    async def confirm(self, survivors: Sequence[OwnerId] | None = None, purpose: str = "update") -> None:
        """Get the signatures of a survivor set's members over it."""
        await self.mask()
        chosen = tuple(survivors or self.owners)
        answers = await self.each(Confirm(purpose, chosen), chosen)
        self.signed[purpose] = {owner: answer.signature for owner, answer in answers.items()}

    def request(self, *signers: OwnerId, survivors: Sequence[OwnerId] | None = None, purpose: str = "update") -> Unmask:
        """Return the request that opens a sum, with the signatures of t owners or of those named."""
        signed = self.signed[purpose]
        chosen = signers or tuple(signed)[: self.plan.threshold]
        return Unmask(UnmaskRequest(purpose, tuple(survivors or self.owners), tuple(signed[o] for o in chosen)))

    async def open(
        self, survivors: Sequence[OwnerId] | None = None, purpose: str = "update", subject: bytes = b""
    ) -> NDArray[np.uint32]:
        """Confirm and unmask a survivor set, and return its sum, shape ``(entries,)``."""
        chosen = tuple(survivors or self.owners)
        await self.confirm(chosen, purpose)
        answers = await self.each(self.request(survivors=chosen, purpose=purpose), chosen)
        machine = self.machine(purpose)
        machine.advertised(self.keys[purpose])
        machine.shared({o: getattr(message, purpose) for o, message in self.dealt.items()})
        for owner in chosen:
            machine.add_masked(owner, *self.vectors[purpose][owner])
        machine.masked()
        machine.bind(subject)
        machine.confirmed(self.signed[purpose])
        return machine.unmasked({owner: answer.shares for owner, answer in answers.items()})

    def machine(self, purpose: str = "update") -> SecAggCoordinator:
        """Return the arithmetic of an honest coordinator for one sum."""
        codec = update_codec(self.plan) if purpose == "update" else score_codec(self.plan)
        bits = self.plan.ring.bits if purpose == "update" else score_codec(self.plan).ring.bits
        return SecAggCoordinator(
            plan=self.plan, purpose=purpose, roster=self._roster, ring_bits=bits, entries=codec.entries
        )
