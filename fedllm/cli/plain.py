"""Help as plain text, the same on every terminal, and with what every argument means."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import click
import typer
from typer.core import TyperArgument, TyperCommand


class Command(TyperCommand):
    """A command whose help shows what was written about its arguments.

    click 8.5 has a help text of its own for arguments and sets it to None where typer has set one; typer escapes
    brackets for rich even where rich prints nothing.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        written = inspect.signature(self.callback).parameters if self.callback else {}
        for parameter in self.params:
            if isinstance(parameter, TyperArgument) and parameter.name in written:
                parameter.help = parameter.help or getattr(written[parameter.name].default, "help", None)

    def format_arguments(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write nothing: typer's options begin with the arguments already."""

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the help without rich's escapes."""
        super().format_help(ctx, formatter)
        formatter.buffer[:] = [part.replace("\\[", "[") for part in formatter.buffer]


class Noun(typer.Typer):
    """A group of commands, the verbs of one noun.

    Parameters
    ----------
    about : str
        One line of help.
    """

    def __init__(self, about: str) -> None:
        super().__init__(
            no_args_is_help=True,
            add_completion=False,
            pretty_exceptions_enable=False,
            rich_markup_mode=None,
            help=about,
        )

    def command(self, name: str | None = None, **settings: Any) -> Callable[[Any], Any]:
        """Return typer's decorator, for a `Command`."""
        return super().command(name, **{"cls": Command, **settings})
