"""Which packages each of the three programs needs, and what to install when one is missing."""

from __future__ import annotations

from collections.abc import Sequence

from fedllm.errors import MissingExtra

PARTS = {
    "client": (
        "torch", "transformers", "peft", "opacus", "flwr", "grpc", "dp_accounting", "gguf", "huggingface_hub",
        "tokenizers", "jinja2",
    ),
    "coordinator": ("flwr", "grpc", "fastapi", "uvicorn", "sqlalchemy", "dp_accounting"),
    "serve": (
        "torch", "tokenizers", "fastapi", "uvicorn", "jinja2", "sqlalchemy", "prometheus_client", "opentelemetry",
    ),
}  # fmt: skip
_EVERYTHING = ",".join(PARTS)
_PART_OF = {
    "adapter": "coordinator", "coordinator": "coordinator", "round": "coordinator", "serve": "serve",
    "tenant": "serve", "route": "serve", "usage": "serve", "demo": _EVERYTHING,
}  # fmt: skip


def missing_extra(error: ModuleNotFoundError, arguments: Sequence[str]) -> MissingExtra | None:
    """Return the error for a package that one of the extras installs; None for any other module.

    Parameters
    ----------
    error : ModuleNotFoundError
    arguments : Sequence[str]
        Of the command line: the same package may come with several extras, the one of the command is named.
    """
    module = (error.name or "").partition(".")[0]
    parts = [part for part, modules in PARTS.items() if module in modules]
    if not parts:
        return None
    wanted = _PART_OF.get(arguments[0] if arguments else "", "client")
    return MissingExtra(wanted if wanted in parts or wanted == _EVERYTHING else parts[0], module)
