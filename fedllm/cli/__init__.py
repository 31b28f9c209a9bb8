"""The command line: noun, then verb; data on stdout, everything else on stderr.

Exit codes: 0 ok, 1 failed, 2 usage or configuration, 3 refused by policy, budget or gate, 4 authentication,
5 not found, 69 peer unavailable, 75 not ready (retry), 130 interrupted.
"""

from __future__ import annotations

import sys

import typer

from fedllm.cli import adapter, client, coordinator, demo, federation, info, model, privacy, rounds, serve
from fedllm.cli.output import print_error
from fedllm.errors import FedllmError, MissingExtra

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fine-tune a shared LoRA adapter across owners who cannot share data; serve every new version live.",
)
federation.register(app)
info.register(app)
serve.register(app)
demo.register(app)
app.add_typer(coordinator.app, name="coordinator")
app.add_typer(federation.owners, name="owner")
app.add_typer(rounds.app, name="round")
app.add_typer(privacy.app, name="privacy")
app.add_typer(adapter.app, name="adapter")
app.add_typer(client.app, name="client")
app.add_typer(serve.tenants, name="tenant")
app.add_typer(model.app, name="model")
app.add_typer(info.config, name="config")

_EXTRAS = {
    "dp_accounting": "client",
    "fastapi": "serve",
    "flwr": "coordinator",
    "gguf": "client",
    "grpc": "client",
    "huggingface_hub": "client",
    "jinja2": "serve",
    "opacus": "client",
    "peft": "client",
    "sqlalchemy": "coordinator",
    "tokenizers": "serve",
    "torch": "client",
    "transformers": "client",
    "uvicorn": "serve",
}


def main() -> None:
    """Run the command line; the only place where errors become exit codes."""
    try:
        app()
    except FedllmError as error:
        print_error(error)
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRAS:
            raise
        print_error(MissingExtra(_EXTRAS[missing], missing))
        sys.exit(MissingExtra.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
