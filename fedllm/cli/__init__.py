"""The command line: noun, then verb; data on stdout, everything else on stderr.

Exit codes: 0 ok, 1 failed, 2 usage or configuration, 3 refused by policy, budget or gate, 4 authentication,
5 not found, 69 peer unavailable, 75 not ready (retry), 130 interrupted.
"""

from __future__ import annotations

import sys

import click
from click.exceptions import NoArgsIsHelpError

from fedllm.cli import (
    adapter,
    client,
    coordinator,
    demo,
    federation,
    info,
    model,
    privacy,
    rounds,
    route,
    serve,
    simulate,
    tenant,
)
from fedllm.cli.extras import missing_extra
from fedllm.cli.files import of_system
from fedllm.cli.output import print_error, say
from fedllm.cli.plain import Noun
from fedllm.cli.usage import app as usage
from fedllm.errors import ConfigError, FedllmError

app = Noun("Fine-tune a shared LoRA adapter across owners who cannot share data; serve every new version live.")
federation.register(app)
info.register(app)
serve.register(app)
route.register(app)
demo.register(app)
simulate.register(app)
app.add_typer(coordinator.app, name="coordinator")
app.add_typer(federation.owners, name="owner")
app.add_typer(rounds.app, name="round")
app.add_typer(privacy.app, name="privacy")
app.add_typer(adapter.app, name="adapter")
app.add_typer(client.app, name="client")
app.add_typer(tenant.app, name="tenant")
app.add_typer(model.app, name="model")
app.add_typer(info.config, name="config")
app.add_typer(usage, name="usage")

INTERRUPTED = 130


def main() -> None:
    """Run the command line; the only place where errors become exit codes."""
    try:
        code = app(prog_name="fedllm", standalone_mode=False)
        sys.stdout.flush()
    except FedllmError as error:
        _fail(error)
    except NoArgsIsHelpError as error:
        say(error.format_message())
        sys.exit(ConfigError.exit_code)
    except click.ClickException as error:
        _fail(_usage(error))
    except (click.Abort, KeyboardInterrupt):
        sys.exit(INTERRUPTED)
    except ModuleNotFoundError as error:
        known = missing_extra(error, sys.argv[1:])
        if known is None:
            raise
        _fail(known)
    except OSError as error:
        _fail(of_system(error))
    sys.exit(code if isinstance(code, int) else 0)


def _fail(error: FedllmError) -> None:
    print_error(error)
    sys.exit(error.exit_code)


def _usage(error: click.ClickException) -> ConfigError:
    context = error.ctx if isinstance(error, click.UsageError) else None
    # typer and click both look for the nearest name; it is said once
    said = list(dict.fromkeys(part.strip() for part in error.format_message().split("Did you mean ")))
    return ConfigError(" Did you mean ".join(said), hint=f"{context.command_path if context else 'fedllm'} --help")
