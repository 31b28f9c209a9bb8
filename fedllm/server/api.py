"""The coordinator's HTTP API: the registry for endpoints, and control for the operator.

Reads of versions, blobs and aliases need no token: manifests and the alias table are signed, adapters are
public to whoever serves them. Control needs the operator's bearer token, which is in a file of mode 0600. Endpoints
report with the observer's token, which can do nothing else.
"""

from __future__ import annotations

import asyncio
import hmac
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict

from fedllm.errors import AliasConflict, AuthenticationError, ConfigError, DecodeError, FedllmError, RequestInvalid
from fedllm.identity import SigningIdentity
from fedllm.ids import Digest, check_alias, check_digest
from fedllm.messages.plan import honest_threshold
from fedllm.registry.model import AdapterVersion
from fedllm.registry.remote import aliases_to_json, manifest_to_json
from fedllm.registry.store import Registry
from fedllm.server.journal import Journal, RoundRecord
from fedllm.server.observations import MAX_BODY_BYTES, read_report, summary_json
from fedllm.server.ports import RoundState
from fedllm.server.schedule import Schedule

MAX_WAIT_S = 60.0
_STATUS = {2: 400, 3: 403, 4: 401, 5: 404, 69: 503, 75: 503}


@dataclass(frozen=True)
class ApiState:
    """What the API is handed by the composition root; an empty `observer_token` is nobody's."""

    registry: Registry
    journal: Journal
    schedule: Schedule
    identity: SigningIdentity
    token: str = field(repr=False)
    stopping: asyncio.Event
    observer_token: str = field(default="", repr=False)


class RoundsWanted(BaseModel):
    """Body of ``POST /v1/federations/{federation}/rounds``."""

    model_config = ConfigDict(extra="forbid", strict=True)
    rounds: int


class AbortAsked(BaseModel):
    """Body of ``POST .../rounds/{number}/abort``."""

    model_config = ConfigDict(extra="forbid", strict=True)
    reason: str = "aborted by the operator"


class AliasMoveAsked(BaseModel):
    """Body of ``POST /v1/aliases/{tenant}/{name}``: compare-and-swap from `expected` to `digest`.

    Without `digest` the alias goes back to where it pointed before its last move.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    digest: str | None = None
    expected: str | None = None
    reason: str = "moved by the operator"


def make_api(state: ApiState) -> FastAPI:
    """Return the application; every path is under ``/v1`` but ``/health``."""
    app = FastAPI(title="fedllm coordinator", docs_url=None, redoc_url=None, openapi_url="/v1/openapi.json")
    app.state.fedllm = state
    app.add_exception_handler(FedllmError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    _add_reads(app, state)
    _add_rounds(app, state)
    _add_aliases(app, state)
    _add_observations(app, state)
    return app


def _bears(request: Request, token: str) -> bool:
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    return bool(token) and scheme.lower() == "bearer" and hmac.compare_digest(given.encode(), token.encode())


def _operator(request: Request) -> None:
    state: ApiState = request.app.state.fedllm
    if not _bears(request, state.token):
        raise AuthenticationError(
            "the operator's token is missing or wrong", hint="it is in operator.token in the coordinator's home"
        )


def _observer(request: Request) -> None:
    state: ApiState = request.app.state.fedllm
    if not (_bears(request, state.observer_token) or _bears(request, state.token)):
        raise AuthenticationError(
            "the observer's token is missing or wrong", hint="it is in observer.token in the coordinator's home"
        )


Seconds = Annotated[float, Query(allow_inf_nan=False)]
"""No NaN: a timer that is due at no time stands before the timers of everybody else."""
Operator = Annotated[None, Depends(_operator)]
Observer = Annotated[None, Depends(_observer)]


async def _on_error(_request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, FedllmError):
        raise error
    status = _STATUS.get(error.exit_code, 500)
    if isinstance(error, AliasConflict):
        status = 409
    elif isinstance(error, DecodeError):  # of something in the request: a digest that is none
        status = 400
    body = {"code": error.code, "message": error.message, "hint": error.hint}
    return JSONResponse({"error": body}, status_code=status)


async def _on_invalid(_request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, RequestValidationError):
        raise error
    fields = ", ".join(".".join(str(part) for part in found["loc"]) for found in error.errors())
    return JSONResponse(
        {"error": {"code": "config", "message": f"request field wrong or unknown: {fields}", "hint": None}},
        status_code=422,
    )


def _add_reads(app: FastAPI, state: ApiState) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/blobs/{digest}")
    async def blob(digest: str) -> Response:
        data = await asyncio.to_thread(state.registry.blobs.get, check_digest(digest, what="blob name"))
        return Response(data, media_type="application/octet-stream")

    @app.get("/v1/versions")
    async def versions(federation: str | None = None, pin: str | None = None) -> dict[str, Any]:
        if (federation is None) != (pin is None):
            raise ConfigError("federation and pin are given together: they name one version")
        return await asyncio.to_thread(_versions_json, state, federation, pin)

    @app.get("/v1/versions/{digest}")
    async def version(digest: str) -> dict[str, Any]:
        return manifest_to_json(state.registry.signed(digest), state.registry.get(digest))

    @app.get("/v1/aliases")
    async def aliases(since: int = -1, wait_s: Seconds = 0.0) -> dict[str, Any]:
        # a waiting reader must not hold up a coordinator that is stopping
        waiting = asyncio.ensure_future(state.registry.aliases_after(since, min(max(wait_s, 0.0), MAX_WAIT_S)))
        stopping = asyncio.ensure_future(state.stopping.wait())
        await asyncio.wait({waiting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not waiting.done():
            waiting.cancel()
            return aliases_to_json(state.registry.aliases(), state.identity)
        return aliases_to_json(waiting.result(), state.identity)

    @app.get("/v1/status")
    async def status(_operator: Operator) -> dict[str, Any]:
        return {
            "key": str(state.identity.public),
            "federations": [federation_json(state, name) for name in state.schedule.federations],
        }


def _add_rounds(app: FastAPI, state: ApiState) -> None:
    @app.post("/v1/federations/{federation}/rounds", status_code=202)
    async def request_rounds(federation: str, body: RoundsWanted, _operator: Operator) -> dict[str, Any]:
        return {"federation": federation, "wanted": state.schedule.request(federation, body.rounds)}

    @app.get("/v1/federations/{federation}/rounds")
    async def rounds(federation: str, _operator: Operator) -> dict[str, Any]:
        state.schedule.runner(federation)
        found = [round_json(state, record) for record in state.journal.rounds(federation)]
        return {"rounds": found, "wanted": state.journal.wanted(federation)}

    @app.get("/v1/federations/{federation}/rounds/{number}")
    async def one_round(federation: str, number: int, _operator: Operator) -> dict[str, Any]:
        return round_json(state, state.journal.round(federation, number))

    @app.post("/v1/federations/{federation}/rounds/{number}/abort", status_code=202)
    async def abort(federation: str, number: int, body: AbortAsked, _operator: Operator) -> dict[str, Any]:
        state.schedule.abort(federation, number, body.reason)
        return {"federation": federation, "round": number}


def _add_aliases(app: FastAPI, state: ApiState) -> None:
    @app.post("/v1/aliases/{tenant}/{name}")
    async def move(tenant: str, name: str, body: AliasMoveAsked, _operator: Operator) -> dict[str, Any]:
        alias = check_alias(f"{tenant}/{name}")
        if body.digest is None and body.expected is not None:
            raise ConfigError("expected is given without digest: a rollback goes to where the alias was before")
        if body.digest is None:
            table = state.registry.rollback(alias, actor="operator", reason=body.reason)
        else:
            new = check_digest(body.digest, what="digest")
            expected = None if body.expected is None else Digest(body.expected)
            table = state.registry.promote(alias, new, expected=expected, actor="operator", reason=body.reason)
        return aliases_to_json(table, state.identity)

    @app.get("/v1/lines")
    async def lines(_operator: Operator) -> dict[str, Any]:
        return {"lines": state.registry.lines()}

    @app.get("/v1/aliases/{tenant}/{name}/history")
    async def history(tenant: str, name: str, _operator: Operator) -> dict[str, Any]:
        moves = state.registry.history(check_alias(f"{tenant}/{name}"))
        return {"moves": [vars(move) for move in moves]}


def _add_observations(app: FastAPI, state: ApiState) -> None:
    registry = state.registry

    @app.post("/v1/observations")
    async def observe(request: Request, _observer: Observer) -> dict[str, Any]:
        report = read_report(await _body(request))
        return {"new": await asyncio.to_thread(registry.observe, report)}

    @app.get("/v1/observations")
    async def observed(_operator: Operator) -> dict[str, Any]:
        found = await asyncio.to_thread(registry.observed)
        return {"versions": {digest: summary_json(seen) for digest, seen in found.items()}}

    @app.get("/v1/versions/{digest}/observations")
    async def observed_of(digest: str, _operator: Operator) -> dict[str, Any]:
        version = registry.get(check_digest(digest, what="version")).digest
        found = await asyncio.to_thread(registry.observed, version)
        return summary_json(found.get(version, {}))


async def _body(request: Request) -> bytes:
    """Return the body, which nobody may make longer than a report is."""
    data = bytearray()
    async for piece in request.stream():
        data += piece
        if len(data) > MAX_BODY_BYTES:
            raise RequestInvalid(f"a report of over {MAX_BODY_BYTES} bytes", hint="report fewer versions at once")
    return bytes(data)


def _versions_json(state: ApiState, federation: str | None, pin: str | None) -> dict[str, Any]:
    if federation is None or pin is None:
        found = state.registry.signed_versions()
    else:
        one = state.registry.find_signed(federation, pin)
        found = [] if one is None else [one]
    key = state.identity.public
    return {"versions": [manifest_to_json(each, AdapterVersion.of(each.open(key))) for each in found]}


def federation_json(state: ApiState, name: str) -> dict[str, Any]:
    """Return a federation as status shows it: who is connected, what runs, what it waits for."""
    schedule, runner = state.schedule, state.schedule.runner(name)
    present = set(schedule.present(name))
    event = schedule.last_event(name)
    running = runner.running
    return {
        "name": name,
        "alias": runner.federation.alias,
        "state": event.state.value if running is not None and event is not None else "IDLE",
        "round": running,
        "wanted": state.journal.wanted(name),
        "waiting": schedule.waiting(name),
        "owners": [
            {
                "owner": member.owner,
                "connected": member.owner in present,
                "release": runner.roll.releases.get(member.owner),
            }
            for member in runner.federation.roster.members
        ],
        "faults": [vars(fault) for fault in runner.roll.faults],
    }


def round_json(state: ApiState, record: RoundRecord) -> dict[str, Any]:
    """Return one round: state, reason, verdict, version, seconds by phase, bytes by owner."""
    plan, measures = record.plan, record.measures
    event = state.schedule.last_event(record.federation)
    detail = None
    if event is not None and event.round == record.number and not record.state.final and event.total:
        detail = (
            f"{event.owner}: {event.done}/{event.total}" if event.owner else f"{event.done} of {event.total} owners"
        )
    verdict = record.verdict
    return {
        "federation": record.federation,
        "number": record.number,
        "state": record.state.value,
        "detail": detail,
        "code": record.code,
        "reason": record.reason,
        "promoted": record.state is RoundState.JUDGED and bool(measures.get("published", False)),
        "verdict": None if verdict is None else vars(verdict),
        "version": record.version,
        "plan": plan.digest,
        "cohort": list(plan.cohort),
        "threshold": plan.threshold,
        "neighbours": plan.neighbours,
        "method": plan.method,
        # a version was made, and at least the threshold of owners put a masked vector into its sum
        "secagg": record.version is not None and measures.get("survivors", 0) >= honest_threshold(len(plan.cohort)),
        "mechanism": plan.mechanism.to_fields(),
        "survivors": measures.get("survivors", 0),
        "saturated": measures.get("saturated"),
        "attempt": plan.attempt,
        "attempts": measures.get("attempts", []),
        "timings": measures.get("timings", {}),
        "wall_s": measures.get("wall_s", 0.0),
        "train_s": measures.get("train_s", 0.0),
        "overhead_s": measures.get("overhead_s", 0.0),
        "bytes_up": measures.get("bytes_up", {}),
        "bytes_down": measures.get("bytes_down", {}),
        "faults": measures.get("faults", []),
        "refusals": measures.get("refusals", {}),
        "started": record.started,
        "ended": record.ended,
    }
