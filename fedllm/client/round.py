"""One round at one owner: training and scoring in a worker, and the steps of its two masked sums.

All secrets of an attempt live in this object's memory: when the daemon restarts in mid-attempt, this owner is a
dropout of it, and the others' shares let the sum be opened without it. The update it trained is kept on its disk,
for the next attempt if there is one.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

from fedllm import telemetry
from fedllm.adapter import AdapterState, Factor
from fedllm.aggregation.methods import get_method
from fedllm.aggregation.secagg.masking import MaskedInput
from fedllm.aggregation.vector import OwnerScores
from fedllm.client.kept import LocalUpdate
from fedllm.client.pipeline import OwnerSums, local_update
from fedllm.client.trainer import Scores, Trained, Trainer
from fedllm.clock import Clock
from fedllm.errors import AdapterInvalid, NonFiniteUpdate, SharesUnopenable, StepMismatch, TwoViews
from fedllm.ids import Digest, OwnerId
from fedllm.messages.mechanism import UNIT_OWNER
from fedllm.messages.plan import RoundPlan
from fedllm.messages.round import (
    Advertised,
    Body,
    Complained,
    Confirm,
    Confirmed,
    Evaluate,
    FetchAdvertise,
    FetchScores,
    Masked,
    Pending,
    Scoring,
    SendMasked,
    SharedKeys,
    ShareKeys,
    Started,
    Unmask,
    Unmasked,
)
from fedllm.messages.secagg import PURPOSE_EVALUATION, PURPOSE_UPDATE
from fedllm.rng import Rng

_LOG = logging.getLogger(__name__)
T = TypeVar("T")
_FIRST_RETRY_S = 2.0
_LONGEST_RETRY_S = 30.0
_REMEMBERED_SCORES = 4


class InlineWorker(Executor):
    """A worker that does the work at once, in the caller's thread: for simulations on a fake clock."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Run `fn` and return its finished future."""
        future: Future[T] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 - a future carries whatever its work raised
            future.set_exception(error)
        return future


class _AbandonedError(Exception):
    """Raised inside the worker to stop the training of a round that is over."""


class ScoreBook:
    """Scores of the last few adapters by digest: the next round's head is usually this round's candidate.

    Parameters
    ----------
    trainer : Trainer
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._known: dict[Digest, Scores] = {}

    def score(self, state: AdapterState) -> Scores:
        """Return the scores of an adapter on this owner's held-out records."""
        if state.digest not in self._known:
            self._known[state.digest] = self._trainer.score(state)
            while len(self._known) > _REMEMBERED_SCORES:
                del self._known[next(iter(self._known))]
        return self._known[state.digest]


class Answer(NamedTuple):
    """A reply, and the chunks of a masked vector that its head names."""

    body: Body
    parts: tuple[bytes, ...] = ()


@dataclass
class _Progress:
    stage: str
    began_s: float
    done: int = 0
    total: int = 0

    def pending(self, now_s: float) -> Pending:
        """Return the reply that says how far the work is, and when asking again is sensible."""
        retry_s = _FIRST_RETRY_S
        if self.done:
            retry_s = (now_s - self.began_s) / self.done * (self.total - self.done)
        return Pending(self.stage, self.done, self.total, min(max(retry_s, 0.2), _LONGEST_RETRY_S))


class OwnerRound:
    """The state of one accepted round, over all attempts at its sum.

    Parameters
    ----------
    plan : RoundPlan
        Verified and within the owner's policy; its budget is reserved. `retry` replaces it.
    head : AdapterState
        The global adapter that the plan names.
    owner : OwnerId
    sums : OwnerSums
        Of the first attempt.
    trainer : Trainer
    scores : ScoreBook
    worker : Executor
        Runs training and scoring, one after the other.
    clock, rng
    keep : Callable[[LocalUpdate], None]
        Called once with what training made, before any of it is used.
    charged : int
        Steps of the plan's stream, if it has one, that other plans were charged for before.
    local : LocalUpdate, optional
        What an earlier process trained for this round: it is not trained again.
    """

    def __init__(
        self,
        plan: RoundPlan,
        head: AdapterState,
        owner: OwnerId,
        *,
        sums: OwnerSums,
        trainer: Trainer,
        scores: ScoreBook,
        worker: Executor,
        clock: Clock,
        rng: Rng,
        keep: Callable[[LocalUpdate], None],
        charged: int = 0,
        local: LocalUpdate | None = None,
    ) -> None:
        self.plan = plan
        self.begun = plan.digest
        self.charged: list[Digest] = []
        self._head = head
        self._owner = owner
        self._sums = sums
        self._trainer = trainer
        self._scores = scores
        self._worker = worker
        self._clock = clock
        self._rng = rng
        self._keep = keep
        self._charged_before = charged
        self._over = threading.Event()
        self._closing = threading.Lock()
        self._progress = _Progress("training", clock.monotonic(), 0, plan.recipe.steps)
        self._candidate: Digest | None = None
        self._scoring: Future[tuple[Scores, Scores]] | None = None
        self._prescored = False
        self._training: Future[LocalUpdate] = Future()
        if local is None:
            self._training = worker.submit(self._train)
        else:
            self._training.set_result(local)

    def __repr__(self) -> str:
        plan = self.plan
        return f"OwnerRound({plan.federation!r}, round {plan.round}, attempt {plan.attempt}, secrets redacted)"

    def retry(self, plan: RoundPlan, sums: OwnerSums) -> None:
        """Go on to the next attempt at the sum of the same update; the secrets of the one before are overwritten."""
        if self._scoring is not None:
            raise StepMismatch("a candidate was scored in this round: its sum of updates was opened, by what it says")
        self._sums.close()
        self.plan, self._sums = plan, sums
        if plan.mechanism.shares is not None:
            self.charged.append(plan.digest)

    def working(self, body: Body) -> Future[Any] | None:
        """Return the work that a reply says is under way, None if there is none or it is done."""
        future: Future[Any] | None = None
        if isinstance(body, Started):
            future = self._training
        elif isinstance(body, Scoring):
            future = self._scoring
        elif isinstance(body, Pending):
            future = self._scoring or self._training
        return future if future is not None and not future.done() else None

    def answer(self, body: Body) -> Answer:
        """Return the reply to one step.

        Raises
        ------
        FedllmError
            If the step is out of order, malformed or refused.
        """
        step = self._STEPS.get(type(body))
        if step is None:
            raise StepMismatch(f"{type(body).__name__} is not a step that an owner answers")
        made = step(self, body)
        return made if isinstance(made, Answer) else Answer(made)

    def finished(self, reply: Body) -> Body | None:
        """Return the step that asks for the end of the work that `reply` announces, None if it announces none."""
        if isinstance(reply, Started | Pending) and self._scoring is None:
            return FetchAdvertise() if self._training.done() else None
        if isinstance(reply, Scoring | Pending) and self._scoring is not None:
            return FetchScores() if self._scoring.done() else None
        return None

    @property
    def train_s(self) -> float | None:
        """Seconds of training, None if it did not end well."""
        return self._local.train_s if self._trained else None

    def result(self) -> dict[str, Any]:
        """Return this owner's own numbers of the round, None where it did not come so far; private."""
        scored = self._scoring is not None and self._scoring.done() and self._scoring.exception() is None
        head, candidate = self._scoring.result() if scored and self._scoring is not None else (None, None)
        return {
            "federation": self.plan.federation,
            "round": self.plan.round,
            "attempt": self.plan.attempt,
            "plan": self.plan.digest,
            "train_s": self.train_s,
            "train_records": self._local.records if self._trained else None,
            "train_loss": self._local.mean_loss if self._trained else None,
            "heldout_records": candidate.records if candidate else None,
            "head_loss": head.mean_loss if head else None,
            "candidate_loss": candidate.mean_loss if candidate else None,
        }

    def close(self) -> None:
        """Overwrite the secrets; training still under way stops at its next step."""
        with self._closing:
            self._over.set()
        self._sums.close()

    def _train(self) -> LocalUpdate:
        self._check_wanted()
        began_s = self._progress.began_s = self._clock.monotonic()
        plan = self.plan
        factors = get_method(plan.method).trainable(plan.round)
        trained = self._fitted(factors)
        local = local_update(plan, head=self._head, trained=trained, train_s=self._clock.monotonic() - began_s)
        with self._closing:  # else an update could be written after the round, and what was kept of it, is gone
            self._check_wanted()
            self._keep(local)
        return local

    def _fitted(self, factors: tuple[Factor, ...]) -> Trained:
        try:
            return self._trainer.fit(
                self._head, self.plan, factors, self._rng, self._step_done, charged=self._charged_before
            )
        except (NonFiniteUpdate, AdapterInvalid) as error:
            if self.plan.mechanism.unit != UNIT_OWNER:
                raise
            # To refuse would tell something of this owner's data outside the noise: it adds nothing to the sum instead.
            telemetry.event(_LOG, "training diverged", level=logging.WARNING, round=self.plan.round, code=error.code)
            return Trained(self._head, self._trainer.records, None, 0, 0.0)

    def _score(self, candidate: AdapterState) -> tuple[Scores, Scores]:
        self._check_wanted()
        head = self._scores.score(self._head)
        self._progress.done = 1
        self._check_wanted()
        scored = self._scores.score(candidate)
        self._progress.done = 2
        return head, scored

    def _score_head(self) -> None:
        if not self._over.is_set():
            self._scores.score(self._head)

    def _step_done(self, done: int, total: int) -> None:
        self._progress.done, self._progress.total = done, total
        self._check_wanted()

    def _check_wanted(self) -> None:
        if self._over.is_set():
            raise _AbandonedError

    @property
    def _trained(self) -> bool:
        return self._training.done() and self._training.exception() is None

    @property
    def _local(self) -> LocalUpdate:
        if not self._training.done():
            raise StepMismatch("this owner is still training")
        return self._training.result()

    def _advertise(self, _body: FetchAdvertise) -> Body:
        if not self._training.done():
            return self._progress.pending(self._clock.monotonic())
        train_s = self._local.train_s
        update, evaluation = self._sums.advertise()
        return Advertised(update, evaluation, train_s)

    def _share(self, body: ShareKeys) -> Body:
        return SharedKeys(*self._sums.share_keys(body.update, body.evaluation))

    def _mask(self, body: SendMasked) -> Answer:
        masked = self._masked(PURPOSE_UPDATE, lambda: self._sums.mask_update(self._local, body.update, body.evaluation))
        if not self._prescored:
            # everybody has trained by now: score the head while the others' messages are on their way
            self._prescored = True
            self._worker.submit(self._score_head)
        return masked

    def _masked(self, purpose: str, mask: Callable[[], MaskedInput]) -> Answer:
        try:
            masked = mask()
        except SharesUnopenable as error:
            if not error.dealers:
                raise
            return Answer(Complained(self._sums.complaint(purpose, error.dealers)))
        return Answer(Masked(masked.head), masked.chunks)

    def _confirm(self, body: Confirm) -> Body:
        return Confirmed(self._sums.confirm(body.purpose, body.survivors))

    def _unmask(self, body: Unmask) -> Body:
        return Unmasked(self._sums.unmask(body.request))

    def _evaluate(self, body: Evaluate) -> Body:
        if not self._prescored:
            raise StepMismatch("a candidate came before this owner's update was asked for")
        candidate = AdapterState.from_bytes(self.plan.spec, body.candidate)
        if self._candidate not in (None, candidate.digest):
            raise TwoViews("another candidate was scored in this round, and one round scores one")
        if self._scoring is None:
            self._candidate = candidate.digest
            self._sums.bind_candidate(candidate.digest)
            self._progress = _Progress("scoring", self._clock.monotonic(), 0, 2)
            self._scoring = self._worker.submit(self._score, candidate)
        return Scoring(0.0)

    def _fetch_scores(self, _body: FetchScores) -> Body | Answer:
        if self._scoring is None:
            raise StepMismatch("scores are asked for before a candidate came")
        if not self._scoring.done():
            return self._progress.pending(self._clock.monotonic())
        head, candidate = self._scoring.result()
        scores = OwnerScores(records=candidate.records, candidate_loss=candidate.mean_loss, head_loss=head.mean_loss)
        return self._masked(PURPOSE_EVALUATION, lambda: self._sums.mask_scores(scores))

    _STEPS: ClassVar[dict[type, Callable[[OwnerRound, Any], Body | Answer]]] = {
        FetchAdvertise: _advertise,
        ShareKeys: _share,
        SendMasked: _mask,
        Confirm: _confirm,
        Unmask: _unmask,
        Evaluate: _evaluate,
        FetchScores: _fetch_scores,
    }
