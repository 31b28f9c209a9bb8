"""A warm start for Flower's ClientApp processes: imported once, forked for every message.

Flower's SuperNode starts the program ``flwr-clientapp`` for each message, which imports for more than a second
of processor time. This module puts a program of that name first in the SuperNode's ``PATH``. It hands its
arguments to a host process that has loaded the entry point of Flower's own ``flwr-clientapp`` already and forks
for each message; where no host answers, it becomes Flower's program. What runs in the fork is Flower's code
with Flower's arguments. Standard library alone, so that launching costs milliseconds.

Usage: ``warm.py serve SOCKET`` or ``warm.py launch SOCKET FALLBACK [ARGUMENT ...]``.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

PROGRAM = "flwr-clientapp"
SOCKET = "warm.sock"
_LARGEST = 1 << 16
_OK = b"+"


def install(folder: Path, run_dir: Path, python: str, program: str) -> list[str]:
    """Write the launcher into `folder`, which goes first in ``PATH``; return the command of the host.

    Both run from a copy of this file, which is all of fedllm that they need to read. The confined processes may
    not write `folder`: what is written here at the next start must not be steered by a link of theirs.

    Parameters
    ----------
    folder : Path
        Where the program lies; read-only to what runs it.
    run_dir : Path
        The SuperNode's private folder.
    python, program : str
        Interpreter, and Flower's own program to fall back to.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    script = folder / "warm.py"
    script.write_bytes(Path(__file__).read_bytes())
    launcher = folder / PROGRAM
    command = [python, "-I", "-S", str(script), "launch", str(run_dir / SOCKET), program]
    launcher.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n', encoding="utf-8")
    launcher.chmod(0o700)
    return [python, str(script), "serve", str(run_dir / SOCKET)]


def launch(path: str, fallback: str, arguments: Sequence[str]) -> int:
    """Have the host run the program with `arguments`; become `fallback` if there is no host."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as host:
        host.settimeout(5.0)
        host.connect(path)
        host.sendall(json.dumps(list(arguments)).encode())
        host.shutdown(socket.SHUT_WR)
        if host.recv(1) == _OK:
            return 0
    return os.execv(fallback, [fallback, *arguments])  # noqa: S606 - no shell: that is the point


def serve(path: Path, entry: Callable[[], object]) -> None:
    """Fork for every launch, until killed."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks: the SuperNode hears from them itself
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(16)
        while True:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError, ValueError):
                connection.settimeout(5.0)
                arguments = json.loads(_read(connection))
                if os.fork() == 0:
                    listener.close()
                    connection.close()
                    _become(entry, [PROGRAM, *map(str, arguments)])
                connection.sendall(_OK)


def _read(connection: socket.socket) -> bytes:
    data = b""
    while (more := connection.recv(_LARGEST)) and len(data) < _LARGEST:
        data += more
    return data


def _become(entry: Callable[[], object], argv: list[str]) -> None:
    """Run the program in the fork and end with its exit code; never returns."""
    code = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        sys.argv[:] = argv
        entry()
        code = 0
    except SystemExit as done:
        code = done.code if isinstance(done.code, int) else int(done.code is not None)
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def main(arguments: Sequence[str]) -> int:
    """Run as host or as launcher."""
    if arguments[0] == "launch":
        return launch(arguments[1], arguments[2], arguments[3:])
    from importlib.metadata import entry_points

    (program,) = entry_points(group="console_scripts", name=PROGRAM)
    serve(Path(arguments[1]), program.load())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
