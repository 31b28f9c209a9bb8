"""The coordinator: Flower's own rounds with its SecAgg+ workflow, and a watch around that workflow."""

from pathlib import Path

import numpy as np
from flwr.app import Context
from flwr.common import ndarrays_to_parameters
from flwr.server import LegacyContext, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_PARAMS_RECORD
from flwr.serverapp import Grid, ServerApp

from benchmarks.flower_peers.nodes import wait_for_nodes
from benchmarks.round_updates import OWNERS, Recorder

THRESHOLD = 3

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds."""
    dim, rounds = int(context.run_config["dim"]), int(context.run_config["rounds"])
    recorder = Recorder(Path(str(context.run_config["records"])))
    protocol = SecAggPlusWorkflow(num_shares=OWNERS, reconstruction_threshold=THRESHOLD)

    def timed(grid: Grid, context: Context) -> None:
        recorder.begin()
        protocol(grid, context)
        seconds = recorder.lap()
        (model,) = context.state.array_records[MAIN_PARAMS_RECORD].to_numpy_ndarrays()
        recorder.end(model, seconds)

    strategy = FedAvg(
        fraction_evaluate=0.0, min_fit_clients=OWNERS, min_available_clients=OWNERS,
        initial_parameters=ndarrays_to_parameters([np.zeros(dim, dtype=np.float32)]),
    )  # fmt: skip
    wait_for_nodes(grid)
    legacy = LegacyContext(context=context, config=ServerConfig(num_rounds=rounds), strategy=strategy)
    DefaultWorkflow(fit_workflow=timed)(grid, legacy)
