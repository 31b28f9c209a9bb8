"""What is asked of the Hub, on a stand-in for its client library."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedllm.basemodel import hub
from fedllm.basemodel.inspect import RECORD_FILE, verify
from fedllm.basemodel.pull import pull
from fedllm.errors import BaseUnsupported, NotFound, PeerUnavailable

MakeBase = Callable[..., Path]


class HTTPError(Exception):
    """The library's network error."""


class RepositoryNotFoundError(HTTPError):
    """The library's 404."""


class FakeHub:
    """One repository, or an error for every call."""

    def __init__(self, files: dict[str, bytes], error: Exception | None = None) -> None:
        self.files, self.error = files, error
        self.asked: list[list[str]] = []

    def HfApi(self) -> FakeHub:  # noqa: N802 - the library's name
        """Return the API object."""
        return self

    def model_info(self, hub_id: str, *, files_metadata: bool, timeout: float) -> Any:
        """Describe the repository."""
        if self.error:
            raise self.error
        siblings = [SimpleNamespace(rfilename=name, size=len(data)) for name, data in self.files.items()]
        card = SimpleNamespace(to_dict=lambda: {"license": "apache-2.0"})
        return SimpleNamespace(siblings=siblings, sha="c0ffee", card_data=card)

    def snapshot_download(self, hub_id: str, *, local_dir: Path, allow_patterns: list[str], **_: Any) -> None:
        """Write the allowed files, and the cache folder that the real one leaves."""
        self.asked.append(allow_patterns)
        (local_dir / ".cache").mkdir(parents=True, exist_ok=True)
        for name in allow_patterns:
            (local_dir / name).write_bytes(self.files[name])


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[FakeHub], FakeHub]:
    """Return a function that puts a fake in the library's place."""
    errors = SimpleNamespace(HTTPError=HTTPError, RepositoryNotFoundError=RepositoryNotFoundError)

    def put(fake: FakeHub) -> FakeHub:
        monkeypatch.setattr(hub, "_library", lambda: (fake, errors))
        return fake

    return put


def test_only_data_files_are_taken(tmp_path: Path, make_base: MakeBase, install: Callable[[FakeHub], FakeHub]) -> None:
    """Code, pickles and files in subfolders stay on the Hub; the commit is in the record."""
    files = {p.name: p.read_bytes() for p in make_base(tmp_path / "b").iterdir()}
    junk = {"modeling.py": b"x", "pytorch_model.bin": b"x", "onnx/model.safetensors": b"x", "README.md": b"x"}
    fake = install(FakeHub({**files, **junk}))
    folder = pull("some/model", tmp_path / "models")
    assert fake.asked == [["config.json"], sorted(files)]
    assert {p.name for p in folder.iterdir()} == {*files, RECORD_FILE}
    record = json.loads((folder / RECORD_FILE).read_text())
    assert (record["source"], record["commit"], record["license"]) == ("hub", "c0ffee", "apache-2.0")
    verify(folder)


def test_wrong_architecture_costs_one_small_file(tmp_path: Path, install: Callable[[FakeHub], FakeHub]) -> None:
    """The configuration is read before the weights are fetched."""
    fake = install(FakeHub({"config.json": b'{"model_type": "gpt2"}', "model.safetensors": b"huge"}))
    with pytest.raises(BaseUnsupported, match="'gpt2'"):
        pull("some/model", tmp_path)
    assert fake.asked == [["config.json"]]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RepositoryNotFoundError(), NotFound),
        (HTTPError(), PeerUnavailable),
        (ConnectionError(), PeerUnavailable),
        (TimeoutError(), PeerUnavailable),
    ],
)
def test_errors_of_the_library_become_ours(
    error: Exception, expected: type[Exception], install: Callable[[FakeHub], FakeHub]
) -> None:
    """A missing repository is not the same as an absent network."""
    install(FakeHub({}, error))
    with pytest.raises(expected, match="some/model"):
        hub.describe("some/model")
