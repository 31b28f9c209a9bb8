"""Files that commands write: all of them or none, and what the system says when it cannot."""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedllm.errors import AuthenticationError, ConfigError, DiskFull, FedllmError, NotFound, PortBusy

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""A full disk, a spent quota, a limit on the size of files."""


@contextmanager
def drafts(folder: Path) -> Iterator[Path]:
    """Yield an empty folder; what is written there replaces the same names in `folder`, together or not at all.

    Parameters
    ----------
    folder : Path
        Made, for its owner only, when it does not exist; not left behind empty by a failure.

    Raises
    ------
    DiskFull
        If there was no room: `folder` is as it was.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    done = False
    try:
        scratch = Path(tempfile.mkdtemp(prefix=".draft-", dir=folder))
        try:
            yield scratch
            for path in sorted(p for p in scratch.rglob("*") if p.is_file()):
                target = folder / path.relative_to(scratch)
                target.parent.mkdir(exist_ok=True)
                path.replace(target)
            done = True
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise of_system(error, writing=folder) from None
    finally:
        if made and not done:
            shutil.rmtree(folder, ignore_errors=True)


def of_system(error: OSError, *, writing: Path | None = None) -> FedllmError:
    """Return what an `OSError` means to the person at the command line; names the file, never what is in it."""
    where = writing or error.filename or "what was being written"
    why = f"{where}: {error.strerror or type(error).__name__}"
    if error.errno in _NO_ROOM:
        return DiskFull(f"no room to write {where}: {error.strerror}", hint="free some space, then do it again")
    if isinstance(error, FileNotFoundError):
        return NotFound(why)
    if isinstance(error, PermissionError):
        return AuthenticationError(why, hint="run this as the user who owns it")
    if isinstance(error, FileExistsError | IsADirectoryError | NotADirectoryError):
        return ConfigError(why, hint="choose another path")
    if error.errno == errno.EADDRINUSE:
        return PortBusy(why, hint="choose another port")
    return FedllmError(why)
