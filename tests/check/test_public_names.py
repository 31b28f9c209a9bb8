"""The public surface is what `fedllm.__all__` says, and every name is there."""

from __future__ import annotations

import fedllm


def test_every_public_name_can_be_imported_and_says_what_it_is() -> None:
    """No name of the list is missing, and each has a docstring."""
    for name in fedllm.__all__:
        assert getattr(fedllm, name).__doc__, name


def test_unknown_names_are_attribute_errors() -> None:
    """A typo does not import something by accident."""
    assert not hasattr(fedllm, "Daemonn")
