"""What both apps wait for: no system's figures have the coming up of its nodes in them."""

import time

from flwr.serverapp import Grid

from benchmarks.round_updates import OWNERS

WAIT_S = 120.0


def wait_for_nodes(grid: Grid) -> None:
    """Return once every owner's node is connected.

    Raises
    ------
    TimeoutError
        If that takes longer than `WAIT_S`.
    """
    end_s = time.monotonic() + WAIT_S
    while len(list(grid.get_node_ids())) < OWNERS:
        if time.monotonic() > end_s:
            raise TimeoutError(f"fewer than {OWNERS} nodes after {WAIT_S:g} s")
        time.sleep(0.5)
