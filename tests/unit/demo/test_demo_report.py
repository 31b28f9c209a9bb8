"""The demo's document has the promised names and types, and its tables say the same."""

from __future__ import annotations

import io
import json

from rich.console import Console

from fedllm.demo.recipe import DELTA, MAX_EPSILON, recipe
from fedllm.demo.report import DemoReport, HeldOut, PrivacyClaim, mean_loss, print_report
from fedllm.messages.mechanism import Mechanism
from fedllm.privacy.accountant import epsilon


def report(**changes: object) -> DemoReport:
    """Return a report of two owners."""
    fields: dict[str, object] = {
        "owners": 2, "rounds": 3, "secagg": True, "privacy": PrivacyClaim("record", 7.98, 1e-5),
        "heldout_loss": {"a": HeldOut(2.0, None, None, 1.0), "b": HeldOut(1.0, None, None, 0.5)},
        "epsilon_by_owner": {"a": 7.98, "b": 7.5}, "swaps": 3, "requests": 40, "failed": 0, "mixed_version": 0,
        "round_overhead_s": 50.0, "bytes_up_per_owner": 1000, "bytes_down_per_owner": 2000,
        "phase_s": {"TRAINING": 30.0}, "loop_s": 300.0, "versions": [],
        "example": {"prompt": "[x]", "before": "?", "after": "f()", "wanted": "f()"},
    }  # fmt: skip
    return DemoReport(**{**fields, **changes})  # type: ignore[arg-type]


def printed(what: DemoReport) -> str:
    """Return what a person reads."""
    console = Console(file=io.StringIO(), width=120, no_color=True)
    print_report(what, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_document_is_json_with_the_promised_fields() -> None:
    """Exact names of the issue; losses are null where they were not measured."""
    document = json.loads(json.dumps(report().to_json()))
    assert {"owners", "rounds", "secagg", "privacy", "heldout_loss", "swaps", "requests", "failed", "mixed_version",
            "round_overhead_s", "bytes_up_per_owner", "bytes_down_per_owner", "loop_s"} <= set(document)  # fmt: skip
    assert document["privacy"] == {"unit": "record", "epsilon": 7.98, "delta": 1e-5}
    assert document["heldout_loss"]["a"] == {
        "base": 2.0, "alone_home": None, "alone_everywhere": None, "federated": 1.0,
    }  # fmt: skip


def test_epsilon_is_printed_with_unit_delta_and_what_it_covers() -> None:
    """Never a bare number; and without DP the table says that nothing bounds memory."""
    text = printed(report())
    assert "ε = 7.98 per record" in text
    assert "δ = 1e-05" in text
    assert "outside ε" in text
    without = report(privacy=PrivacyClaim("record", None, 1e-5), epsilon_by_owner={"a": None, "b": None})
    assert "nothing bounds" in printed(without)


def test_comparison_columns_appear_only_when_measured() -> None:
    """With --compare an owner sees where it would do better alone."""
    assert "alone" not in printed(report()).split("epsilon")[0].splitlines()[1]
    both = {"a": HeldOut(2.0, 0.9, 1.2, 1.0)}
    assert "alone, at home" in printed(report(heldout_loss=both, owners=1))


def test_means_are_over_owners() -> None:
    """Each owner counts once, whatever its size."""
    assert mean_loss(report().heldout_loss) == HeldOut(1.5, None, None, 0.75)


def test_the_recipe_spends_its_budget_and_not_more() -> None:
    """The noise is solved with the ledger's own accountant: all rounds together stay under epsilon."""
    keys = recipe(MAX_EPSILON, 3).federation
    steps = Mechanism(
        "dp-sgd", "record", "add-or-remove-one", keys["noise_multiplier"], keys["clip_norm"], keys["sample_rate"],
        keys["local_steps"], DELTA,
    )  # fmt: skip
    spent = epsilon([steps] * 3, DELTA)
    assert 0.97 * MAX_EPSILON < spent <= MAX_EPSILON
    assert recipe(None, 3).federation["privacy"] is False
