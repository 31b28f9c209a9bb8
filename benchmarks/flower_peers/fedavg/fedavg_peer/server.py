"""The coordinator: Flower's own strategy, and a watch from a round's first step to its new model."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from benchmarks.flower_peers.nodes import wait_for_nodes
from benchmarks.round_updates import OWNERS, Recorder

app = ServerApp()


class Timed(FedAvg):
    """FedAvg, timed."""

    def __init__(self, recorder: Recorder, **settings: Any) -> None:
        super().__init__(**settings)
        self._recorder = recorder

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Start the watch."""
        self._recorder.begin()
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Stop the watch, then look at the model."""
        arrays, metrics = super().aggregate_train(server_round, replies)
        seconds = self._recorder.lap()
        if arrays is not None:
            self._recorder.end(arrays.to_numpy_ndarrays()[0], seconds)
        return arrays, metrics


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds."""
    dim, rounds = int(context.run_config["dim"]), int(context.run_config["rounds"])
    recorder = Recorder(Path(str(context.run_config["records"])))
    strategy = Timed(recorder, fraction_evaluate=0.0, min_train_nodes=OWNERS, min_available_nodes=OWNERS)
    wait_for_nodes(grid)
    strategy.start(grid, ArrayRecord([np.zeros(dim, dtype=np.float32)]), num_rounds=rounds)
