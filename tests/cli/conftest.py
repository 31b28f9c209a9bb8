"""A federation set up with files only: a coordinator's folder, four owners', a tenants file."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from cli.command_line import fedllm

OWNERS = ("east", "north", "south", "west")


@dataclass(frozen=True)
class Scene:
    """Folders of one set-up federation.

    Attributes
    ----------
    root, base : Path
    data : dict
        Owner to data folder.
    """

    root: Path
    base: Path
    data: dict[str, Path]

    @property
    def home(self) -> Path:
        """The coordinator's folder."""
        return self.root / "home"

    @property
    def join_file(self) -> Path:
        """What the operator sent."""
        return self.root / "tools.join"

    @property
    def tenants(self) -> Path:
        """The endpoint's tenants."""
        return self.root / "tenants.toml"

    def owner(self, name: str) -> Path:
        """Return an owner's folder."""
        return self.root / name

    def join(self, owner: str, **changed: object) -> tuple[object, ...]:
        """Return the arguments with which an owner joins."""
        data = self.data.get(owner, self.root)
        options = {"owner": owner, "home": self.owner(owner), "data": data, "base": self.base, **changed}
        file = options.pop("file", self.join_file)
        return ("client", "join", file, *(part for k, v in options.items() for part in (f"--{k}", v)))


@pytest.fixture(scope="session")
def _made(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, owners_data: dict[str, Path]) -> Scene:
    """Set the federation up once, with the commands."""
    scene = Scene(tmp_path_factory.mktemp("scene"), tiny_base, owners_data)
    assert fedllm("init", scene.home, "--base", tiny_base, "--port", "1").exit_code == 0
    config = scene.home / "fedllm.toml"
    alias = 'alias = "acme/tools"\n'
    text = config.read_text(encoding="utf-8").replace(alias, alias + "last_layers = 2\n")
    config.write_text(text, encoding="utf-8")
    for owner in OWNERS:
        key = fedllm("client", "key", "--home", scene.owner(owner)).out.strip()
        assert fedllm("owner", "add", owner, key, "--records", 40, "--home", scene.home).exit_code == 0
    scene.join_file.write_text(fedllm("owner", "join-file", "--home", scene.home).out, encoding="utf-8")
    for owner in OWNERS:
        said = fedllm(*scene.join(owner))
        assert said.exit_code == 0, said
    assert fedllm("tenant", "add", "acme", "--allow", "acme/tools", "--tenants", scene.tenants).exit_code == 0
    (scene.home / "operator.token").write_text("0" * 64 + "\n", encoding="utf-8")
    return scene


@pytest.fixture
def scene(_made: Scene, tmp_path: Path) -> Scene:
    """Return a copy of the federation that a test may break."""
    root = tmp_path / "scene"
    shutil.copytree(_made.root, root)
    return Scene(root, _made.base, _made.data)
