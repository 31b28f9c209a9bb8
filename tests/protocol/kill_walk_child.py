"""One owner's daemon in processes that kill themselves around a chosen change of a file.

Run as a program this is a warm process: it imports, prices and scripts once, then forks a child for every line of
JSON on its stdin, in which a real daemon answers a scripted round on real files. `Trap` counts what the child does to
files and sends it SIGKILL before, in the middle of, or after the step it was told.
"""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import dataclasses
import functools
import io
import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

from unit.client.owner_fakes import DP, IDENTITIES, OWNERS, POLICY, ToyTrainer, begin, daemon, plan
from unit.client.test_attempts import Attempt, retry
from unit.client.test_owner_unit import COUNTED, NOISED, noised, second

from fedllm.client.policy import OwnerPolicy
from fedllm.clock import FakeClock
from fedllm.ids import sha256
from fedllm.messages.envelope import COORDINATOR, unseal
from fedllm.messages.mechanism import Mechanism
from fedllm.messages.plan import RoundPlan
from fedllm.privacy.ledger import Ledger

NORTH = "north"
EARLIER = sha256(b"a plan of another federation")
HOLD_S = 30.0
_REAL = {name: getattr(os, name) for name in ("open", "write")}
_WRITES = frozenset("wax+")
_OPENS = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_CHANGES = (
    "rename",
    "replace",
    "unlink",
    "remove",
    "truncate",
    "ftruncate",
    "chmod",
    "mkdir",
    "rmdir",
    "link",
    "utime",
)
_AUDITED = ("open", "os.rename", "os.remove", "os.truncate", "os.chmod", "os.mkdir", "os.link", "os.utime")


@dataclasses.dataclass(frozen=True)
class Scenario:
    """A round that an owner takes part in, and what it had spent before.

    Attributes
    ----------
    policy : OwnerPolicy
    earlier : Mechanism
        Of the one round that its ledger holds already.
    attempts : tuple[RoundPlan, ...]
        Each charged on its own if the noise is made of shares, else all with the first.
    """

    policy: OwnerPolicy
    earlier: Mechanism
    attempts: tuple[RoundPlan, ...]

    def prepare(self, home: Path) -> Path:
        """Fill an owner's folder with a ledger that was charged for an earlier round."""
        home.mkdir(parents=True)
        ledger = Ledger.open(
            home / "ledger.jsonl", IDENTITIES[NORTH], FakeClock(), dataset=ToyTrainer.dataset,
            limit_epsilon=self.policy.limit_epsilon, delta=self.policy.delta, unit=self.policy.unit,
        )  # fmt: skip
        ledger.reserve(federation="before", round_number=7, plan_digest=EARLIER, mechanism=self.earlier)
        ledger.settle(EARLIER, "completed")
        return home


SCENARIOS = {
    "record": Scenario(POLICY, dataclasses.replace(DP, noise_multiplier=3.0), (plan(),)),
    "owner": Scenario(
        COUNTED, dataclasses.replace(NOISED, noise_multiplier=9.0),
        (noised(), second()),
    ),
}  # fmt: skip


class MarkedTrainer(ToyTrainer):
    """Adds a byte to a file when it begins to train, by a system call that no trap counts."""

    def __init__(self, marker: Path) -> None:
        super().__init__(0.03)
        self.marker = marker

    def fit(self, *given: Any, **named: Any) -> Any:
        """Say that it began, then train."""
        descriptor = _REAL["open"](self.marker, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        _REAL["write"](descriptor, b"t")
        os.close(descriptor)
        return super().fit(*given, **named)


class Trap:
    """Counts every step that changes a file, or makes a change last, and kills this process around one of them.

    Parameters
    ----------
    home : Path
        Changes of files below it that are not counted are noted in `missed`.
    at : int
        From 1; 0 for never.
    moment : str
        ``before``, ``half`` (of a write), or ``after``.
    """

    def __init__(self, home: Path, at: int, moment: str) -> None:
        self.home, self.at, self.moment = str(home), at, moment
        self.steps: list[str] = []
        self.missed: list[str] = []
        self._inside = False
        self._set = False

    def around(self, call: Callable[..., Any], name: str, subject: object, *given: Any, **named: Any) -> Any:
        """Make one counted call."""
        self.steps.append(f"{name} {self._named(subject)}")
        now = self.moment if len(self.steps) == self.at else ""
        if now == "before":
            _die()
        self._inside = True
        if now == "half":
            data = memoryview(given[-1])
            if len(data) < 2:
                _die()
            call(*given[:-1], data[: len(data) // 2])
            _die()
        try:
            return call(*given, **named)
        finally:
            self._inside = False
            if now == "after":
                _die()

    def _named(self, subject: object) -> str:
        path = Path(f"/proc/self/fd/{subject}").readlink() if isinstance(subject, int) else subject
        return str(path).removeprefix(self.home).strip("/") or "."

    @contextlib.contextmanager
    def set(self) -> Iterator[None]:
        """Patch everything that changes files."""
        sys.addaudithook(self._audit)
        trap = self

        class Watched(io.FileIO):
            def write(self, data: Any) -> int:  # type: ignore[override]
                return int(trap.around(super().write, "write", self.name, data))

        def opened(file: Any, mode: str = "r", *given: Any, **named: Any) -> Any:
            if not _WRITES & set(mode):
                return real_open(file, mode, *given, **named)
            assert "+" not in mode, "nothing here writes and reads through one file object"
            raw_mode = mode.replace("b", "").replace("t", "")
            if isinstance(file, int):
                raw = Watched(file, raw_mode)
            else:
                raw = trap.around(Watched, "open", file, file, raw_mode)
            buffered = io.BufferedWriter(raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, "utf-8")

        def on_path(name: str) -> Callable[..., Any]:
            real = getattr(os, name)

            def call(first: Any, *given: Any, **named: Any) -> Any:
                if name == "open" and not given[0] & _OPENS:
                    return real(first, *given, **named)
                return self.around(real, name, first, first, *given, **named)

            return call

        real_open = io.open
        with contextlib.ExitStack() as patches:
            for name in ("open", "write", "fsync", "fdatasync", *_CHANGES):
                patches.enter_context(mock.patch.object(os, name, on_path(name)))
            patches.enter_context(mock.patch.object(io, "open", opened))
            patches.enter_context(mock.patch.object(builtins, "open", opened))
            self._set = True
            yield
            self._set = False

    def _audit(self, event: str, given: tuple[Any, ...]) -> None:
        if not self._set or self._inside or event not in _AUDITED:
            return
        path = str(given[0])
        reads = event == "open" and not given[2] & _OPENS
        if path.startswith(self.home) and not reads:
            self.missed.append(f"{event} {path}")


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def script_of(scenario: Scenario, folder: Path) -> list[tuple[str, bytes]]:
    """Run a round of four daemons and return what one of them was asked, with the plan that each request is under."""
    script: list[tuple[str, bytes]] = []
    now = [""]

    class Recorded:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        async def handle(self, data: bytes) -> Any:
            script.append((now[0], data))
            return await self.inner.handle(data)

    daemons: dict[str, Any] = {
        o: daemon(o, folder / o, trainer=ToyTrainer(0.03), policy=scenario.policy) for o in OWNERS if o != NORTH
    }
    daemons[NORTH] = Recorded(
        daemon(NORTH, scenario.prepare(folder / NORTH), trainer=ToyTrainer(0.03), policy=scenario.policy)
    )

    async def run() -> None:
        for made in scenario.attempts:
            now[0] = made.digest if made.mechanism.shares is not None else scenario.attempts[0].digest
            attempt = Attempt(made, daemons)
            last = made is scenario.attempts[-1]
            await (attempt.open if last else attempt.to_unmask)(begin(made) if made.attempt == 1 else retry(made))

    asyncio.run(run())
    return script


def answer(scenario: Scenario, script: list[tuple[str, bytes]], home: Path, marker: Path, out: int) -> None:
    """Let a daemon answer the script, and say on `out` what kind of reply left to which request."""
    worker = ThreadPoolExecutor(1)

    async def run() -> None:
        north = daemon(
            NORTH, home, trainer=MarkedTrainer(marker), policy=scenario.policy, worker=worker, hold_s=HOLD_S
        )  # fmt: skip
        for number, (_, request) in enumerate(script):
            reply = await north.handle(request)
            kind = unseal(reply.head, IDENTITIES[NORTH].public, sender=NORTH, receiver=COORDINATOR).kind
            _REAL["write"](out, f"{json.dumps([number, kind])}\n".encode())

    asyncio.run(run())


def reserve_late() -> None:
    """Break this process: charge a round only once it was trained."""
    reserve, fit = Ledger.reserve, ToyTrainer.fit
    owed: list[Callable[[], Any]] = []

    def later(self: Ledger, **asked: Any) -> None:
        owed.append(functools.partial(reserve, self, **asked))

    def fit_and_charge(self: ToyTrainer, *given: Any, **named: Any) -> Any:
        trained = fit(self, *given, **named)
        while owed:
            owed.pop()()
        return trained

    Ledger.reserve = later  # type: ignore[assignment, method-assign]
    ToyTrainer.fit = fit_and_charge  # type: ignore[method-assign]


def child(asked: dict[str, Any], script: list[tuple[str, bytes]], out: int) -> None:
    """Answer the script with a trap set; ends this process."""
    if asked["late"]:
        reserve_late()
    home = Path(asked["home"])
    trap = Trap(home, asked["at"], asked["moment"])
    with trap.set():
        answer(SCENARIOS[asked["scenario"]], script, home, Path(asked["marker"]), out)
    _REAL["write"](out, f"{json.dumps({'steps': trap.steps, 'missed': trap.missed})}\n".encode())
    os._exit(0)


def main() -> None:
    """Fork a child for every line of stdin, and print what came of it."""
    with tempfile.TemporaryDirectory() as folder:
        scripts = {name: script_of(scenario, Path(folder) / name) for name, scenario in SCENARIOS.items()}
    for name, script in scripts.items():
        print(json.dumps({name: [[digest, data.hex()] for digest, data in script]}), flush=True)  # noqa: T201
    for line in sys.stdin:
        asked = json.loads(line)
        back, out = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                child(asked, scripts[asked["scenario"]], out)
            except BaseException:  # noqa: BLE001 - a forked child never goes on as its parent would
                traceback.print_exc()
                os._exit(1)
        os.close(out)
        with open(back, encoding="utf-8") as pipe:  # noqa: PTH123
            said = [json.loads(each) for each in pipe.read().splitlines()]
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"signal": os.WTERMSIG(status), "code": os.WEXITSTATUS(status), "said": said}), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
