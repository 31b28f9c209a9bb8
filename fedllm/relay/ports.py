"""Loopback ports of processes that this one starts."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from pathlib import Path

LOOPBACK = "127.0.0.1"


def accepts(port: int) -> bool:
    """Whether a program listens on a loopback port."""
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex((LOOPBACK, port)) == 0


async def listening(port: int, timeout_s: float) -> bool:
    """Wait until a program listens on a loopback port; return whether one does."""
    for _ in range(int(timeout_s / 0.2)):
        if accepts(port):
            return True
        await asyncio.sleep(0.2)
    return False


async def new_port(file: Path) -> int:
    """Return a free loopback port, after whoever got the last one has left it.

    Parameters
    ----------
    file : Path
        Remembers the port: a program of a process that was killed takes a moment to go, and may hold more than
        its port.
    """
    with contextlib.suppress(FileNotFoundError, ValueError):
        last = int(file.read_text(encoding="ascii"))  # noqa: ASYNC240 - one quick call
        for _ in range(50):
            if not accepts(last):
                break
            await asyncio.sleep(0.2)
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port = int(probe.getsockname()[1])
    file.write_text(str(port), encoding="ascii")  # noqa: ASYNC240 - one quick call
    return port
