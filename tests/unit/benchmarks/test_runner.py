"""``python -m benchmarks``: what failed and what could not be measured are told apart."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

import benchmarks.__main__ as runner
from benchmarks.document import GATE_FAILED, NOT_MEASURED


def test_what_is_not_measured_is_named_and_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last line tells the two apart; only a failed gate is in the status."""
    statuses = {"secagg": 0, "kernels": NOT_MEASURED, "serving": GATE_FAILED}
    monkeypatch.setattr(runner, "NAMES", tuple(statuses))
    monkeypatch.setattr(runner, "one", lambda name, flags: (statuses[name], {"benchmark": name}))
    monkeypatch.setattr(runner, "show", lambda document, table: None)
    assert runner.main(["--quick"]) == abs(GATE_FAILED)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "failed: serving; not measured, which is no failure: kernels"


def test_a_benchmark_that_prints_no_document_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even the status of what could not be measured excuses it: an unknown flag has the same."""
    done = SimpleNamespace(returncode=NOT_MEASURED, stdout="")
    monkeypatch.setattr(runner.subprocess, "run", lambda *_, **__: done)
    status, document = runner.one("secagg", ["--no-such-flag"])
    assert status == GATE_FAILED
    assert document["gate"] is False
