"""Documents say what the code does now."""

from __future__ import annotations

import importlib.util
import re
import shlex
import tomllib
from collections import Counter
from pathlib import Path

import click
import pytest
import typer

from fedllm.serving.tenant_file import Tenant, parse_table

ROOT = Path(__file__).parents[2]


def _generator() -> object:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _walk() -> Counter[str]:
    """Return the files of the walk: a bare name lies in the folder of the full path before it."""
    text = (ROOT / "docs" / "structures.md").read_text(encoding="utf-8")
    folder, named = "", Counter[str]()
    for name in re.findall(r"`([\w/]+\.py)`", text.partition("\n## An update")[2].partition("\n## The floors")[0]):
        if "/" in name:
            folder = name.rpartition("/")[0]
        named[name if "/" in name else f"{folder}/{name}"] += 1
    return named


def _blocks(page: str, language: str = "") -> list[str]:
    """Return a page's blocks of code of one language; of none by default, which is what a shell is given."""
    text = (ROOT / page).read_text(encoding="utf-8")
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [block for found, block in fenced if found == language]


def _commands(page: str) -> list[list[str]]:
    """Return the words of every ``fedllm`` command in a page's blocks, without redirections and comments."""
    lines = "\n".join(_blocks(page)).replace("\\\n", " ").splitlines()
    found = [re.search(r"^(?:[A-Z_]+=\S+ |[A-Z]+=\$\()*fedllm ([^)]*)", line.partition(" #")[0]) for line in lines]
    return [shlex.split(command[1].partition(">")[0]) for command in found if command]


@pytest.mark.parametrize("page", ["errors.md", "configuration.md", "help.md"])
def test_generated_pages_are_fresh(page: str) -> None:
    """A new key or error code must be documented: run ``python docs/generate.py``."""
    made = _generator().PAGES[page]()  # type: ignore[attr-defined]
    assert (ROOT / "docs" / page).read_text(encoding="utf-8") == made


def test_every_error_code_is_unique_and_drawn_in_the_tree() -> None:
    """The tree in the docstring of `fedllm.errors` holds every class, with its code and exit code."""
    from fedllm import errors

    drawn = dict(re.findall(r"[├└─│ ]*(\w+) +\d+ +([a-z-]+)$", errors.__doc__ or "", flags=re.MULTILINE))
    codes = {n: c.code for n, c in vars(errors).items() if isinstance(c, type) and issubclass(c, errors.FedllmError)}
    assert drawn == codes
    assert len(set(codes.values())) == len(codes)


def test_every_file_has_its_one_place_in_the_structure_walk() -> None:
    """`docs/structures.md` walks file by file: a file that moves, or that is new, needs its place in the story.

    The command line, the demo and the simulation are left out: they are named as folders.
    """
    named, package = _walk(), ROOT / "fedllm"
    files = {path.relative_to(ROOT).as_posix() for path in package.rglob("*.py") if not path.stem.startswith("__")}
    told_as_folders = ("fedllm/cli/", "fedllm/demo/", "fedllm/simulate/")
    assert sorted(set(named) - files) == []
    assert sorted(name for name in files - set(named) if not name.startswith(told_as_folders)) == []
    assert [name for name, count in named.items() if count > 1] == []


def test_the_tenants_file_of_the_guide_is_one() -> None:
    """Who copies the example of `docs/serving.md` gets what its comments say, and it shows every setting there is."""
    (example,) = _blocks("docs/serving.md", "toml")
    table = parse_table(tomllib.loads(example), "the example")
    (tenant,) = table.tenants
    assert (tenant.weight, tenant.retention_days, tenant.keys[0].state(0.0)) == (2.0, 14, "valid")
    assert table.shared == {"acme/tools"}
    assert None not in vars(tenant.limits).values()
    assert [name for name in Tenant.__dataclass_fields__ if name != "name" and name not in example] == []


@pytest.mark.parametrize("page", ["README.md", "docs/serving.md"])
def test_commands_of_the_guides_exist(page: str) -> None:
    """Every command and every flag that a page prints is one."""
    from fedllm.cli import app

    root = typer.main.get_command(app)
    assert isinstance(root, click.Group)
    commands = _commands(page)
    assert len(commands) > 10
    for words in commands:
        command: click.Command = root
        left = list(words)
        while isinstance(command, click.Group):
            assert left, words
            assert left[0] in command.commands, words
            command = command.commands[left.pop(0)]
        known = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
        assert [word for word in left if word.startswith("--") and word not in known] == [], words


def test_readme_names_the_two_commands() -> None:
    """A stranger finds `make demo` and `make test`."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "make demo" in text
    assert "make test" in text
