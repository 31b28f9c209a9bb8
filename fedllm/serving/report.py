"""Counts by version, sent to the coordinator: how the version that it made is doing where it is served.

Of a request, only the alias, the version and numbers leave the endpoint: no text, no key, not who asked. A report
is one window of time; it is posted again under its number until the coordinator has it, with growing pauses, and no
request ever waits for it.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from fedllm.clock import Clock
from fedllm.errors import AuthenticationError, ConfigError, FedllmError, NotFound, PeerUnavailable
from fedllm.ids import Digest, check_alias, check_name
from fedllm.registry.observed import MAX_OBSERVATIONS, TTFT_BOUNDS_S, Observation, Report, ttft_bucket
from fedllm.rng import Rng
from fedllm.serving.records import RequestRecord
from fedllm.serving.tenants import BASE_ACCESS
from fedllm.telemetry import event

_LOG = logging.getLogger("fedllm.serving.report")
WINDOW_S = 30.0
MAX_WAITING = 20
"""Closed windows kept while the coordinator cannot be reached; the one after them stays open until there is room."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 120.0
_TIMEOUT_S = 10.0
_RUN_BYTES = 8
_REFUSED = frozenset({400, 404, 409, 413, 422})
"""Answers that the same report would get again."""


@dataclass
class _Cell:
    requests: int = 0
    errors_4xx: int = 0
    errors_5xx: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    up: int = 0
    down: int = 0
    ttft: list[int] = field(default_factory=lambda: [0] * (len(TTFT_BOUNDS_S) + 1))


class Reporter:
    """Adds requests up by version and alias, and posts one report a window.

    Parameters
    ----------
    url : str
        Address of the coordinator's API.
    token_file : Path
        Holds the observer's token; read for every post, so that a changed one is taken up.
    endpoint : str
        This endpoint's name, as the coordinator shows it.
    clock, rng
        For windows and pauses; for the number of this run.
    client : httpx.AsyncClient, optional
        For tests; by default one is made for `url`.

    Attributes
    ----------
    lost : int
        Requests and ratings in no report: more versions were asked for than a report holds, or it was refused.

    Raises
    ------
    ConfigError, NotFound
        If the name is none, or the token cannot be read.
    """

    def __init__(
        self,
        url: str,
        token_file: Path,
        endpoint: str,
        clock: Clock,
        rng: Rng,
        *,
        client: httpx.AsyncClient | None = None,
    ) -> None:
        self._endpoint = check_name(endpoint, what="endpoint")
        self._token_file = token_file
        _read_token(token_file)
        self._client = client or httpx.AsyncClient(base_url=url, trust_env=False)
        self._clock = clock
        self._rng = rng
        self._run = rng.token(_RUN_BYTES).hex()
        self._sequence = 0
        self._cells: dict[tuple[Digest, str], _Cell] = {}
        self._opened_s, self._start = clock.monotonic(), clock.now()
        self._waiting: deque[Report] = deque()
        self._failing = False
        self.lost = 0

    def observe(self, record: RequestRecord) -> None:
        """Count an ended request; one that was bound to no version, or to the base, is not reported."""
        if record.version is None:
            return
        cell = self._cell(record.version, record.alias)
        if cell is None:
            return
        cell.requests += 1
        cell.errors_4xx += 400 <= record.status < 500
        cell.errors_5xx += record.status >= 500
        cell.prompt_tokens += max(0, record.prompt_tokens)
        cell.completion_tokens += max(0, record.completion_tokens)
        if record.ttft_s is not None:
            cell.ttft[ttft_bucket(record.ttft_s)] += 1

    def note_feedback(self, version: Digest, alias: str, good: bool, *, changed: bool = False) -> None:
        """Count a rating.

        Parameters
        ----------
        good : bool
        changed : bool
            The answer was rated the other way before: that rating is taken back.
        """
        cell = self._cell(version, alias)
        if cell is None:
            return
        if good:
            cell.up += 1
            cell.down -= changed
        else:
            cell.down += 1
            cell.up -= changed

    async def run(self) -> None:
        """Post what there is until cancelled."""
        pause_s = _FIRST_PAUSE_S
        while True:
            self._close_if_over()
            if not self._waiting:
                await self._clock.sleep(self._opened_s + WINDOW_S - self._clock.monotonic())
            elif await self._post(self._waiting[0]):
                self._waiting.popleft()
                pause_s = _FIRST_PAUSE_S
            else:
                # endpoints that lost their coordinator together do not come back together
                await self._clock.sleep(pause_s * (0.5 + self._rng.token(1)[0] / 510))
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def aclose(self) -> None:
        """Post all that has been counted, until one post fails, and close the connections; after `run` has ended."""
        while self._waiting or self._cells:
            if not self._waiting:
                self._close()
            if not await self._post(self._waiting[0]):
                break
            self._waiting.popleft()
        await self._client.aclose()

    def _cell(self, version: Digest, name: str) -> _Cell | None:
        alias = name.partition("@")[0]
        if alias in ("", BASE_ACCESS):
            return None
        self._close_if_over()
        key = (version, alias)
        cell = self._cells.get(key)
        if cell is not None:
            return cell
        if len(self._cells) >= MAX_OBSERVATIONS:
            self._close()
        try:
            check_alias(alias)
        except ConfigError:
            return None
        if len(self._cells) >= MAX_OBSERVATIONS:
            self.lost += 1
            return None
        return self._cells.setdefault(key, _Cell())

    def _close_if_over(self) -> None:
        if self._clock.monotonic() - self._opened_s >= WINDOW_S:
            self._close()

    def _close(self) -> None:
        """Make a report of the open window and open the next, if there is room for it."""
        if len(self._waiting) >= MAX_WAITING:
            return
        end = max(self._start, self._clock.now())  # the machine's time may be set back
        if self._cells:
            self._sequence += 1
            seen = tuple(
                Observation(version, alias, self._start, end, **{**vars(cell), "ttft": tuple(cell.ttft)})
                for (version, alias), cell in self._cells.items()
            )
            self._waiting.append(Report(self._endpoint, self._run, self._sequence, seen))
        self._cells = {}
        self._opened_s, self._start = self._clock.monotonic(), self._clock.now()

    async def _post(self, report: Report) -> bool:
        """Return whether a report is done with: taken in, or refused for good."""
        try:
            headers = {"Authorization": f"Bearer {_read_token(self._token_file)}"}
            body = report.to_json()
            answer = await self._client.post("/v1/observations", json=body, headers=headers, timeout=_TIMEOUT_S)
            if answer.status_code in _REFUSED:
                self.lost += sum(seen.requests + seen.up + seen.down for seen in report.observations)
                event(_LOG, "report refused", level=logging.ERROR, status=answer.status_code, sequence=report.sequence)
            elif answer.status_code != httpx.codes.OK:
                raise _unanswered(answer.status_code)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with the way there, requests are served
            if not self._failing:
                code = error.code if isinstance(error, FedllmError) else type(error).__name__
                event(_LOG, "reports wait for the coordinator", level=logging.WARNING, code=code)
            self._failing = True
            return False
        if self._failing:
            event(_LOG, "coordinator takes reports again", lost=self.lost)
        self._failing = False
        return True


def _unanswered(status: int) -> FedllmError:
    if status in (401, 403):
        return AuthenticationError("the coordinator does not know the observer's token")
    return PeerUnavailable(f"the coordinator answered {status} to a report")


def _read_token(path: Path) -> str:
    try:
        token = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        raise NotFound(
            f"no observer's token at {path}", hint="copy observer.token from the coordinator's home, mode 600"
        ) from None
    if not token or not token.isascii() or not token.isprintable():
        raise ConfigError(f"{path} holds no token", hint="copy observer.token from the coordinator's home")
    return token
