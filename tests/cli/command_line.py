"""The command line as tests use it: in this process where that is fast, in one of its own where it matters."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from patience import PATIENCE_S

from fedllm.cli import main

Files = dict[str, bytes]


@dataclass(frozen=True)
class Said:
    """What a command printed, and how it ended."""

    exit_code: int
    out: str
    err: str

    def json(self) -> Any:
        """Return stdout as the one JSON document that it must be."""
        return json.loads(self.out)

    def fails(self, exit_code: int, code: str, *parts: str) -> Said:
        """Check the form of an error: code, exit code, a hint, nothing on stdout, no traceback, these words in it."""
        assert self.exit_code == exit_code, self
        assert self.err.startswith(f"error[{code}]: "), self.err
        assert "\nhint: " in self.err, self.err
        assert "Traceback" not in self.err, self.err
        assert self.out == "", self.out
        for part in parts:
            assert part in self.err, self.err
        return self


def fedllm(*arguments: object) -> Said:
    """Run a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["fedllm", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as end:
            exit_code = int(end.code or 0)
        else:
            exit_code = 0
    return Said(exit_code, out.getvalue(), err.getvalue())


def process(*arguments: object, first: str = "", before: Callable[[], None] | None = None) -> Said:
    """Run a command in a process of its own; `first` is Python that runs there before it."""
    program = f"{first}\nimport sys\nfrom fedllm.cli import main\nsys.argv[0] = 'fedllm'\nmain()"
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True, text=True, check=False, timeout=PATIENCE_S, preexec_fn=before,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return Said(done.returncode, done.stdout, done.stderr)


def files(folder: Path) -> Files:
    """Return every file below a folder with its content: a failed command must leave it as it was."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
