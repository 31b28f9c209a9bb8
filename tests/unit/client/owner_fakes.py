"""Small plans, a trainer without a model, and a coordinator that speaks to daemons by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import numpy as np

from fedllm import wire
from fedllm.adapter import AdapterSpec, AdapterState
from fedllm.aggregation.methods import get_method
from fedllm.client.daemon import Daemon
from fedllm.client.policy import OwnerPolicy
from fedllm.client.round import InlineWorker
from fedllm.client.trainer import Scores, Trained
from fedllm.clock import FakeClock
from fedllm.identity import Roster, SigningIdentity, VerifyKey
from fedllm.ids import Digest, FederationName, OwnerId, RoundNumber, sha256
from fedllm.messages.envelope import COORDINATOR, ENVELOPE_VERSION, Envelope, request_id, seal, unseal
from fedllm.messages.mechanism import Mechanism
from fedllm.messages.plan import NONCE_BYTES, PLAN_VERSION, Recipe, Ring, RoundPlan, SignedPlan, honest_threshold
from fedllm.messages.round import Begin, Body, decode_body
from fedllm.privacy.ledger import Ledger
from fedllm.relay.carrier import Reply
from fedllm.rng import Rng, SeededRng

FEDERATION = FederationName("tools")
OWNERS = tuple(OwnerId(o) for o in ("east", "north", "south", "west"))
BASE = Digest("b" * 64)
SPEC = AdapterSpec(base=BASE, rank=2, alpha=4, modules={"q_proj": (6, 5)}, layers=(0, 1))
HEAD = AdapterState.initial(SPEC, SeededRng("head"))
PRIVATE_TEXT = "the patient's name is Mallory"


def identities() -> dict[str, SigningIdentity]:
    """Return fixed keys of the coordinator, the owners and one stranger."""
    names = [COORDINATOR, "stranger", *OWNERS]
    return {n: SigningIdentity.from_seed(bytes.fromhex(sha256(n.encode()))) for n in names}


IDENTITIES = identities()
ROSTER = Roster.of({o: IDENTITIES[o].public for o in OWNERS})
DP = Mechanism("dp-sgd", "record", "add-or-remove-one", 2.0, 0.05, 0.25, 2, 1e-5)
POLICY = OwnerPolicy(max_epsilon=8.0, delta=1e-5, allowed_bases=(BASE,))


def plan(**changes: Any) -> RoundPlan:
    """Return a plan that `POLICY` accepts, with some fields changed."""
    fields: dict[str, Any] = {
        "version": PLAN_VERSION, "federation": FEDERATION, "round": RoundNumber(1), "attempt": 1,
        "nonce": bytes(NONCE_BYTES), "cohort": OWNERS, "threshold": honest_threshold(len(OWNERS)),
        "neighbours": len(OWNERS) - 1, "corruption": 0.05, "dropout": 0.05, "min_survivors": 3, "roster": ROSTER.digest,
        "spec": SPEC, "head": HEAD.digest, "head_version": None,
        "layout": SPEC.layout(get_method("ffa").trainable(1)).digest, "method": "ffa",
        "weights": dict.fromkeys(OWNERS, 1.0), "declared_records": dict.fromkeys(OWNERS, 40),
        "recipe": Recipe("sgd", 1.0, 2, 8, 4, 160), "mechanism": DP, "ring": Ring(24, 16, 4.0),
        "train_deadline_s": 60.0, "phase_deadline_s": 30.0,
    }  # fmt: skip
    return RoundPlan(**{**fields, **changes})


class ToyTrainer:
    """Moves B by a constant; knows one private sentence that must never be told.

    Parameters
    ----------
    step : float
        What training adds to every entry of B.
    error : Exception, optional
        Raised instead of training.
    """

    base = BASE
    dataset = Digest("d" * 64)
    records = 40

    def __init__(self, step: float = 0.25, error: Exception | None = None) -> None:
        self.step = step
        self.error = error
        self.trained: list[int] = []
        self.scored = 0

    def fit(
        self,
        head: AdapterState,
        plan: RoundPlan,
        factors: tuple[str, ...],
        rng: Rng,
        progress: Callable[[int, int], None],
        *,
        charged: int = 0,
    ) -> Trained:
        """Return the head with the trainable factors moved."""
        self.trained.append(plan.round)
        if self.error is not None:
            raise self.error
        for done in range(plan.recipe.steps):
            progress(done + 1, plan.recipe.steps)
        moved = {
            name: array + np.float32(self.step)
            for name, array in head.factors.items()
            if name.rsplit("lora_", 1)[1] in factors
        }
        return Trained(
            state=head.replace(moved), records=self.records, mean_loss=1.5, steps=plan.recipe.steps, seconds=0.1
        )

    def score(self, state: AdapterState) -> Scores:
        """Return a loss that falls as the adapter moves."""
        self.scored += 1
        return Scores(mean_loss=float(2.0 - state.flat.mean()), records=10, tokens=100)


class Never(Executor):
    """A worker that never gets to its work: what a process that is killed in mid-training has done."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Return a future that stays open."""
        return Future()


def daemon(owner: str, home: Path, *, clock: FakeClock | None = None, **changes: Any) -> Daemon:
    """Return a daemon with a real ledger and a toy trainer, working in the caller's thread."""
    home.mkdir(parents=True, exist_ok=True)
    clock = clock or FakeClock()
    trainer = changes.pop("trainer", None) or ToyTrainer()
    policy = changes.pop("policy", POLICY)
    ledger = Ledger.open(
        home / "ledger.jsonl", IDENTITIES[owner], clock, dataset=trainer.dataset,
        limit_epsilon=policy.limit_epsilon, delta=policy.delta, unit=policy.unit,
    )  # fmt: skip
    fields: dict[str, Any] = {
        "owner": OwnerId(owner), "federation": FEDERATION, "home": home, "identity": IDENTITIES[owner],
        "roster": ROSTER, "coordinator": IDENTITIES[COORDINATOR].public, "policy": policy, "ledger": ledger,
        "trainer": trainer, "clock": clock, "rng": SeededRng(owner), "release": "test", "worker": InlineWorker(),
    }  # fmt: skip
    return Daemon(**{**fields, **changes})


def sealed(
    body: Body, owner: str, *, round_number: int = 1, signer: str = COORDINATOR, tag: str = "", **changes: Any
) -> bytes:
    """Return a request as the coordinator sends it; `tag` makes the same body another request."""
    data = wire.encode(body)
    kind = type(body).__name__
    envelope = Envelope(
        ENVELOPE_VERSION, kind, FEDERATION, round_number, COORDINATOR, owner,
        request_id(kind, owner, round_number, data, tag), data,
    )  # fmt: skip
    return seal(dataclasses.replace(envelope, **changes), IDENTITIES[signer])


def opened(reply: Reply, owner: str, key: VerifyKey | None = None) -> Body:
    """Return the body of a daemon's reply, verified."""
    envelope = unseal(reply.head, key or IDENTITIES[owner].public, sender=owner, receiver=COORDINATOR)
    return decode_body(envelope.kind, envelope.body)


def begin(made: RoundPlan, signer: str = COORDINATOR, head: AdapterState = HEAD) -> Begin:
    """Return the first message of a round."""
    return Begin(SignedPlan.sign(made, IDENTITIES[signer]), head.to_bytes(), None)
