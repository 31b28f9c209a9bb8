"""Takes read access to data, keys and ledger away from the relay's processes, by Landlock where there is one.

Run as a script it restricts itself and then becomes another program; restrictions hold for that program and
everything it starts, and cannot be undone. It uses the standard library alone, so that it starts at once.
See ``man 7 landlock``; connecting to a unix socket is not restricted, and debugging a process outside is.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_RULE_PATH_BENEATH = 1
_VERSION_FLAG = 1
_PR_SET_NO_NEW_PRIVS = 38

# rights of a file, then of a folder (linux/landlock.h)
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_REFER, _TRUNCATE, _IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
_FIRST_ABI = (1 << 13) - 1
_ADDED = ((2, _REFER), (3, _TRUNCATE), (5, _IOCTL_DEV))
_OF_A_FILE = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
_READ = _EXECUTE | _READ_FILE | _READ_DIR

SYSTEM_READS = tuple(map(Path, ("/usr", "/lib", "/lib64", "/bin", "/sbin", "/etc", "/proc", "/dev", "/sys")))
_DEVICES = tuple(map(Path, ("/dev/null", "/dev/zero", "/dev/tty")))
EXIT_UNRESTRICTED = 125
"""Exit code of the launcher when it could not restrict itself: the program is not started then."""


@dataclass(frozen=True)
class Isolation:
    """What keeps the relay's processes from data, keys and ledger.

    Attributes
    ----------
    kind : str
        ``landlock`` or ``none``.
    why : str
        One sentence for people.
    """

    kind: str
    why: str


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


def _syscall(number: int, *arguments: object) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    result = int(libc.syscall(ctypes.c_long(number), *arguments))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def _abi() -> int:
    if not sys.platform.startswith("linux"):
        return 0
    try:
        return _syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(_VERSION_FLAG))
    except OSError:
        return 0


def probe(protected: Iterable[Path] = (), reads: Iterable[Path] | None = None) -> Isolation:
    """Return what this system offers.

    Parameters
    ----------
    protected : Iterable[Path]
        Folders that the relay must not read; one that lies in a folder every program needs cannot be kept from it.
    reads : Iterable[Path], optional
        What the relay may read; `python_reads` by default.
    """
    abi = _abi()
    if abi < 1:
        return Isolation("none", "this kernel has no Landlock: the relay runs as the same user and could read data")
    allowed = [path.resolve() for path in (python_reads() if reads is None else reads) if path.exists()]
    for path in protected:
        inside = [str(a) for a in allowed if path.resolve().is_relative_to(a)]
        if inside:
            return Isolation("none", f"{path} lies inside {inside[0]}, which every program must be able to read")
    return Isolation("landlock", f"Landlock ABI {abi}: SuperNode and relay cannot open data, keys or ledger")


def python_reads() -> tuple[Path, ...]:
    """Return the folders that a Python program needs to start, this environment's included."""
    return (*SYSTEM_READS, Path(sys.prefix), Path(sys.base_prefix))


def confined(argv: Sequence[str], *, read: Iterable[Path], write: Iterable[Path]) -> list[str]:
    """Return the command that runs `argv` with access to nothing but the given files and folders.

    Parameters
    ----------
    argv : Sequence[str]
    read : Iterable[Path]
        May be read and executed.
    write : Iterable[Path]
        May be read, written, made and removed; must exist.
    """
    launcher = [sys.executable, "-I", "-S", __file__]
    for option, paths in (("--read", read), ("--write", write)):
        for path in paths:
            launcher += [option, str(path)]
    return [*launcher, "--", *argv]


def restrict(read: Iterable[Path], write: Iterable[Path]) -> None:
    """Restrict this process, for good, to the given files and folders.

    Raises
    ------
    OSError
        If the kernel refuses; nothing is restricted then.
    """
    abi = _abi()
    if abi < 1:
        raise OSError("this kernel has no Landlock")
    handled = _FIRST_ABI
    for since, right in _ADDED:
        handled |= right if abi >= since else 0
    attribute = ctypes.c_uint64(handled)
    ruleset = _syscall(_CREATE_RULESET, ctypes.byref(attribute), ctypes.c_size_t(8), ctypes.c_uint32(0))
    try:
        for path in read:
            _allow(ruleset, path, _READ & handled)
        for path in write:
            _allow(ruleset, path, handled)
        for path in _DEVICES:
            _allow(ruleset, path, (_READ_FILE | _WRITE_FILE | _TRUNCATE | _IOCTL_DEV) & handled)
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "no_new_privs was refused")
        _syscall(_RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint32(0))
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: Path, rights: int) -> None:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return  # not every system has every folder; what is not there needs no rule
    try:
        mine = rights if path.is_dir() else rights & _OF_A_FILE
        rule = _PathBeneath(mine, descriptor)
        _syscall(
            _ADD_RULE, ctypes.c_int(ruleset), ctypes.c_int(_RULE_PATH_BENEATH), ctypes.byref(rule), ctypes.c_uint32(0)
        )
    finally:
        os.close(descriptor)


def main(arguments: Sequence[str]) -> int:
    """Restrict this process and become the given program; return only if that failed."""
    parser = argparse.ArgumentParser(prog="fedllm-sandbox")
    parser.add_argument("--read", action="append", default=[], type=Path)
    parser.add_argument("--write", action="append", default=[], type=Path)
    parser.add_argument("command", nargs="+")
    options = parser.parse_args(arguments)
    try:
        restrict(options.read, options.write)
        os.execvp(options.command[0], options.command)  # noqa: S606 - no shell: that is the point
    except OSError as error:
        sys.stderr.write(f"not started: {error}\n")
    return EXIT_UNRESTRICTED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
