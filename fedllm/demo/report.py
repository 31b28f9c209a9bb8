"""What the demo found: one document, and the same as tables for people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class HeldOut:
    """Mean answer-token loss on one owner's held-out part; None where not measured."""

    base: float
    alone_home: float | None
    alone_everywhere: float | None
    federated: float


@dataclass(frozen=True)
class PrivacyClaim:
    """Epsilon of the worst owner over all rounds; None without DP."""

    unit: str
    epsilon: float | None
    delta: float


@dataclass(frozen=True)
class DemoReport:
    """Names and types of ``fedllm demo --json``."""

    owners: int
    rounds: int
    secagg: bool
    privacy: PrivacyClaim
    heldout_loss: dict[str, HeldOut]
    epsilon_by_owner: dict[str, float | None]
    swaps: int
    requests: int
    failed: int
    mixed_version: int
    round_overhead_s: float
    bytes_up_per_owner: int
    bytes_down_per_owner: int
    phase_s: dict[str, float]
    loop_s: float
    versions: list[dict[str, Any]]
    example: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return the document."""
        return asdict(self)


def print_report(report: DemoReport, console: Console) -> None:
    """Print the tables a person reads."""
    console.print(_loss_table(report))
    claim = report.privacy
    if claim.epsilon is None:
        console.print("privacy: none was asked for; nothing bounds what a version remembers of a record")
    else:
        console.print(
            f"privacy: ε = {claim.epsilon:.2f} per {claim.unit} (add-or-remove-one) at δ = {claim.delta:g}, "
            "worst owner, all rounds;\n"
            "         covers training records. Held-out scores leave only as masked sums, outside ε."
        )
    if any(loss.alone_home is not None for loss in report.heldout_loss.values()):
        console.print("an owner may do better alone at home: the table says where")
    console.print(_facts_table(report))
    console.print(f"\nasked: {report.example['prompt']}", markup=False)
    console.print(f"before: {report.example['before']}", markup=False)
    console.print(f"after:  {report.example['after']}", markup=False)
    console.print(f"wanted: {report.example['wanted']}", markup=False)


def _loss_table(report: DemoReport) -> Table:
    alone = any(h.alone_home is not None for h in report.heldout_loss.values())
    columns = ["owner", "base", *(["alone, at home", "alone, everywhere"] if alone else []), "federated", "fall", "ε"]
    table = Table(title="held-out loss (mean over answer tokens; lower is better)", title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column == "owner" else "right")
    for owner, loss in report.heldout_loss.items():
        table.add_row(owner, *_loss_cells(loss, alone), _epsilon(report.epsilon_by_owner[owner]))
    table.add_section()
    table.add_row("mean", *_loss_cells(mean_loss(report.heldout_loss), alone), "")
    return table


def mean_loss(losses: Mapping[str, HeldOut]) -> HeldOut:
    """Return the mean over owners, column by column."""
    rows = list(losses.values())

    def mean(values: list[float | None]) -> float | None:
        known = [v for v in values if v is not None]
        return sum(known) / len(known) if known else None

    return HeldOut(
        base=sum(r.base for r in rows) / len(rows),
        alone_home=mean([r.alone_home for r in rows]),
        alone_everywhere=mean([r.alone_everywhere for r in rows]),
        federated=sum(r.federated for r in rows) / len(rows),
    )


def _loss_cells(loss: HeldOut, alone: bool) -> list[str]:
    cells = [f"{loss.base:.3f}"]
    if alone:
        cells += [f"{loss.alone_home:.3f}", f"{loss.alone_everywhere:.3f}"]
    return [*cells, f"{loss.federated:.3f}", f"{100 * (1 - loss.federated / loss.base):.0f} %"]


def _epsilon(value: float | None) -> str:
    return "∞" if value is None else f"{value:.2f}"


def _facts_table(report: DemoReport) -> Table:
    table = Table(title="the loop", title_justify="left", show_header=False)
    table.add_column("what")
    table.add_column("value", justify="right")
    rows: list[tuple[str, str]] = [
        ("rounds, owners", f"{report.rounds}, {report.owners}"),
        ("secure aggregation", "on" if report.secagg else "off"),
        ("swaps under load", str(report.swaps)),
        ("requests, failed, mixed versions", f"{report.requests}, {report.failed}, {report.mixed_version}"),
        ("bytes up / down per owner, all rounds", f"{report.bytes_up_per_owner:,} / {report.bytes_down_per_owner:,}"),
        ("round overhead (round less slowest training)", f"{report.round_overhead_s:.1f} s"),
        *((f"  {phase}, mean", f"{seconds:.1f} s") for phase, seconds in report.phase_s.items()),
        ("the whole loop", f"{report.loop_s:.0f} s"),
    ]
    for name, value in rows:
        table.add_row(name, value)
    return table
