"""Documents say what the code does now."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _generator() -> object:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


def test_every_file_named_in_the_structure_walk_exists() -> None:
    """`docs/structures.md` walks the data path file by file; a moved file breaks the walk."""
    text = (ROOT / "docs" / "structures.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(fedllm/[\w/]+\.py)`", text))
    assert len(named) > 25
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def test_readme_names_the_two_commands() -> None:
    """A stranger finds `make demo` and `make test`."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "make demo" in text
    assert "make test" in text
