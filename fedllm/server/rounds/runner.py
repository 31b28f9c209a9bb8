"""The round loop of one federation: plan, run, judge, publish; resume or abort what a crash left behind."""

from __future__ import annotations

import asyncio

from fedllm.aggregation.methods import get_method
from fedllm.aggregation.rules import FedAvg, Rule
from fedllm.aggregation.vector import ScoreSum
from fedllm.clock import Clock
from fedllm.errors import FedllmError, IntegrityError, NotReady, RoundAborted
from fedllm.identity import SigningIdentity
from fedllm.ids import OwnerId
from fedllm.messages.plan import SignedPlan
from fedllm.registry.store import Registry
from fedllm.rng import Rng
from fedllm.server.federation import Federation
from fedllm.server.journal import Journal, RoundRecord
from fedllm.server.plan import make_plan
from fedllm.server.ports import EpsilonOf, Gate, Progress, RoundEvent, RoundState
from fedllm.server.roster import Fault, Roll, Traffic
from fedllm.server.rounds.aggregating import add_version, aggregate, privacy_record
from fedllm.server.rounds.attempts import Opened, machines, open_sum, update_vector
from fedllm.server.rounds.closing import close
from fedllm.server.rounds.context import RoundContext
from fedllm.server.rounds.judging import judge, publish
from fedllm.server.rounds.scoring import score

ROLL_CALL_S = 30.0
"""How long a round waits for the whole roster before it is planned with those that are there."""
_ROLL_PAUSE_S = 1.0


def ignore(_event: RoundEvent) -> None:
    """Take no notice of progress."""


class RoundRunner:
    """Runs the rounds of one federation, one at a time.

    Parameters
    ----------
    federation : Federation
    identity : SigningIdentity
        The coordinator's key.
    roll : Roll
    journal : Journal
    registry : Registry
    gate : Gate
    epsilon_of : EpsilonOf
        Composes public mechanisms to the advisory epsilon of manifests.
    clock, rng
    rule : Rule
        The server rule.
    progress : Progress
        Called with every event of a round.
    opened : Opened, optional
        For simulations, see `fedllm.server.rounds.attempts.Opened`.
    """

    def __init__(
        self,
        federation: Federation,
        identity: SigningIdentity,
        roll: Roll,
        journal: Journal,
        registry: Registry,
        *,
        gate: Gate,
        epsilon_of: EpsilonOf,
        clock: Clock,
        rng: Rng,
        rule: Rule | None = None,
        progress: Progress = ignore,
        opened: Opened | None = None,
    ) -> None:
        self.federation = federation
        self.roll = roll
        self._identity = identity
        self._journal = journal
        self._registry = registry
        self._gate = gate
        self._epsilon_of = epsilon_of
        self._clock = clock
        self._rng = rng
        self._rule = rule or FedAvg()
        self._progress = progress
        self._opened = opened
        self._task: asyncio.Task[object] | None = None
        self._running: int | None = None
        self._abort_reason: str | None = None

    @property
    def running(self) -> int | None:
        """Number of the round in progress."""
        return self._running

    def check(self) -> None:
        """Return if the federation's settings allow a round with its whole roster, else raise.

        Raises
        ------
        PolicyRefused, ConfigError
        """
        members = [member.owner for member in self.federation.roster.members]
        plan = make_plan(self.federation, self.federation.head(self._registry), 1, members, self._rng)
        get_method(plan.method).check(plan)
        update_vector(plan)

    async def run(self, rounds: int) -> list[RoundRecord]:
        """Resume what was left, then run `rounds` new rounds; return how each ended."""
        left = await self.resume()
        done = [] if left is None else [left]
        return done + [await self.run_one() for _ in range(rounds)]

    async def run_one(self) -> RoundRecord:
        """Plan a round with the owners that are there and take it to its end, good or bad.

        Raises
        ------
        NotReady
            If too few owners are there; no round was planned.
        PolicyRefused, ConfigError
            If the federation's settings allow no round.
        PeerUnavailable
            If the carrier is lost before a round was planned.
        """
        present = await self._roll_call()
        head = self.federation.head(self._registry)
        number = self._journal.next_number(self.federation.name)
        plan = make_plan(self.federation, head, number, present, self._rng)
        get_method(plan.method).check(plan)
        signed = SignedPlan.sign(plan, self._identity)
        self._journal.open_round(plan, signed, started=self._clock.now())
        return await self._drive(self._journal.round(plan.federation, number))

    async def resume(self) -> RoundRecord | None:
        """Take the round that a crash left unfinished to its end; None if there is none."""
        record = self._journal.unfinished(self.federation.name)
        return None if record is None else await self._drive(record)

    def abort(self, number: int, reason: str) -> None:
        """End the round in progress at its next await; owners are told.

        Raises
        ------
        NotReady
            If that round is not in progress, or is judged already.
        """
        judged = self._running is not None and self._journal.round(self.federation.name, number).state.final
        if self._running != number or self._task is None or judged:
            raise NotReady(f"round {number} of {self.federation.name} is not in progress")
        self._abort_reason = reason
        self._task.cancel()

    async def _roll_call(self) -> tuple[OwnerId, ...]:
        members = self.federation.roster.members
        end = self._clock.monotonic() + ROLL_CALL_S
        while True:
            left = end - self._clock.monotonic()
            present = await self.roll.call(deadline_s=max(left, _ROLL_PAUSE_S))
            if len(present) == len(members) or left <= _ROLL_PAUSE_S:
                return present
            await self._clock.sleep(_ROLL_PAUSE_S)

    async def _drive(self, record: RoundRecord) -> RoundRecord:
        self.roll.traffic = Traffic(
            dict(record.measures.get("bytes_up", {})), dict(record.measures.get("bytes_down", {}))
        )
        self.roll.faults.clear()
        try:
            context = self._context(record)
        except FedllmError as error:  # the roster, the spec or the head changed under an unfinished round
            self._journal.abort(record.federation, record.number, code=error.code, reason=error.message)
            self._journal.end(record.federation, record.number, ended=self._clock.now())
            return self._journal.round(record.federation, record.number)
        self._running, self._task, self._abort_reason = record.number, asyncio.current_task(), None
        try:
            await self._to_verdict(context, record)
        except asyncio.CancelledError:
            if self._abort_reason is None:
                raise  # the coordinator is stopping: the journal knows where to go on
            if self._task is not None:
                self._task.uncancel()
            self._abort(context, "operator-abort", self._abort_reason)
        except FedllmError as error:
            self._abort(context, _common_code(context) or error.code, error.message)
        finally:
            self._task = None
        record = self._journal.round(record.federation, record.number)
        if record.state is RoundState.ABORTED or not self._journal.wanted(context.name):
            # else the next round's plan tells them, which saves an exchange
            await close(context, record.state.value.lower(), record.reason)
        context.save_measures()
        self._journal.end(record.federation, record.number, ended=self._clock.now())
        self._running = None
        return self._journal.round(record.federation, record.number)

    def _abort(self, context: RoundContext, code: str, reason: str) -> None:
        context.stop_watch()
        context.save_measures()
        self._journal.abort(context.name, context.number, code=code, reason=reason)
        self._progress(RoundEvent(context.name, context.number, RoundState.ABORTED))

    async def _to_verdict(self, context: RoundContext, record: RoundRecord) -> None:
        if record.state is RoundState.ABORTED:
            return
        if record.state is RoundState.JUDGED and record.verdict is not None and record.version is not None:
            context.published = publish(context, self._registry.get(record.version), record.verdict)
            return
        opened, survivors = await open_sum(context, rng=self._rng, opened=self._opened)
        candidate = aggregate(context, opened, self._rule)
        scores: ScoreSum | None = None
        shortfall = ""
        try:
            scores = await score(context, candidate, survivors)
        except (RoundAborted, IntegrityError) as error:  # a good sum without scores is a version that is held
            shortfall = error.message
        privacy = await privacy_record(context, self._epsilon_of)
        # From here to the alias nothing waits: readers see the round before its verdict or after its move.
        version = add_version(context, candidate, opened, scores, privacy)
        verdict = judge(context, scores, shortfall, self._gate)
        context.published = publish(context, version, verdict)
        context.save_measures()
        self._progress(RoundEvent(context.name, context.number, RoundState.JUDGED))

    def _context(self, record: RoundRecord) -> RoundContext:
        plan = record.plan
        update, evaluation = machines(plan, self.federation.roster)
        context = RoundContext(
            federation=self.federation,
            identity=self._identity,
            plan=plan,
            signed=record.signed,
            head=self.federation.load_head(self._registry, plan.head_version),
            roll=self.roll,
            journal=self._journal,
            registry=self._registry,
            clock=self._clock,
            progress=self._progress,
            update=update,
            evaluation=evaluation,
            attempts=list(record.measures.get("attempts", [])),
            known_faults=[Fault(**each) for each in record.measures.get("faults", [])],
            phase_s=dict(record.measures.get("timings", {})),
            state=record.state,
            started=record.started,
            train_s=float(record.measures.get("train_s", 0.0)),
            survivors=int(record.measures.get("survivors", 0)),
            saturated=record.measures.get("saturated"),
            published=bool(record.measures.get("published", False)),
        )
        context.stop_watch()
        return context


def _common_code(context: RoundContext) -> str | None:
    """Return the code that all refusing owners gave, if their refusals alone explain the abort."""
    if len(context.plan.cohort) - len(context.refusals) >= context.plan.min_survivors:
        return None
    codes = {refusal.code for refusal in context.refusals.values()}
    return codes.pop() if len(codes) == 1 else None
