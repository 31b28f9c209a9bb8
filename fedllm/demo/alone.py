"""One owner's own adapter, trained at home with the federation's recipe and budget: what ``--compare`` shows.

Runs as a process of its own (``python -m fedllm.demo.alone``), prints one JSON document with the loss of the
finished adapter on every owner's held-out part.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any


def train_alone(
    owner: str, data: dict[str, Path], base_path: Path, keys: dict[str, Any], rounds: int
) -> dict[str, float]:
    """Train one adapter on one owner's records and score it on every owner's held-out part.

    Parameters
    ----------
    owner : str
    data : dict[str, Path]
        Every owner's data folder.
    base_path : Path
    keys : dict
        Keys of ``[federation.tools]``.
    rounds : int
        As many rounds of local steps as the federation runs.

    Returns
    -------
    dict[str, float]
        Owner to mean held-out loss.
    """
    from fedllm.adapter import AdapterState
    from fedllm.aggregation.methods import get_method
    from fedllm.basemodel.inspect import open_base
    from fedllm.client.train import LoraTrainer
    from fedllm.config import FederationSettings
    from fedllm.identity import Roster, SigningIdentity
    from fedllm.ids import OwnerId
    from fedllm.rng import OsRng, SeededRng
    from fedllm.server.federation import Federation, Head, adapter_spec
    from fedllm.server.plan import make_plan

    base = open_base(base_path)
    me = OwnerId(owner)
    trainer = LoraTrainer(base_path, base.digest, data[owner], max_tokens=keys["max_tokens"], owner=me)
    declared = dict.fromkeys(data, trainer.records)
    settings = FederationSettings(name="alone", base=base_path, alias="alone/alone", declared_records=declared, **keys)
    shapes = {module: base.module_shapes(module) for module in settings.target_modules}
    spec = adapter_spec(settings, base=base.digest, num_layers=base.num_layers, shapes=shapes)
    # A plan names a cohort; nobody is asked, the keys are made up, and only this owner trains by it.
    owners = [OwnerId(each) for each in data]
    federation = Federation(settings, spec, Roster.of({each: SigningIdentity.generate().public for each in owners}))
    method = get_method(settings.method)
    state = AdapterState.initial(spec, SeededRng(f"{owner}/{spec.digest}"))
    for number in range(1, rounds + 1):
        plan = make_plan(federation, Head(state, None), number, owners, OsRng())
        state = trainer.fit(state, plan, method.trainable(number), OsRng(), _silent).state
    return {each: trainer.rescore(state, folder) for each, folder in data.items()}


def _silent(_done: int, _total: int) -> None:
    """Show no progress."""


def main() -> None:
    """Read the task from arguments, print the losses."""
    parser = argparse.ArgumentParser()
    parser.add_argument("task", type=Path, help="JSON file: owner, data, base, keys, rounds, threads")
    task = json.loads(parser.parse_args().task.read_text(encoding="utf-8"))
    os.environ["OMP_NUM_THREADS"] = str(task["threads"])
    data = {owner: Path(folder) for owner, folder in task["data"].items()}
    losses = train_alone(task["owner"], data, Path(task["base"]), task["keys"], task["rounds"])
    sys.stdout.write(json.dumps(losses) + "\n")


if __name__ == "__main__":
    main()
