"""An owner: its update is known, Flower's mod masks it."""

from typing import Any

from flwr.app import Context
from flwr.client import Client, NumPyClient
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp

from benchmarks.round_updates import update

EXAMPLES = 1000
"""All of the workflow's largest weight: the scaling that costs no precision."""


class Owner(NumPyClient):
    """Adds a known update to the model, in place of training."""

    def __init__(self, owner: int) -> None:
        self._owner = owner

    def fit(self, parameters: list[Any], config: dict[str, Any]) -> tuple[list[Any], int, dict[str, Any]]:  # noqa: ARG002
        """Return the model this owner would have trained."""
        return [parameters[0] + update(self._owner, parameters[0].size)], EXAMPLES, {}


def client_fn(context: Context) -> Client:
    """Return the owner of this node's partition."""
    return Owner(int(context.node_config["partition-id"])).to_client()


app = ClientApp(client_fn, mods=[secaggplus_mod])
