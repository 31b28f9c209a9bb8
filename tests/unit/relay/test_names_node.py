"""How the proxy and the relay know whose request passes: a node's id in the bytes that Flower writes."""

from __future__ import annotations

import pytest
from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.proto.node_pb2 import Node

from fedllm.relay.proxy import names_node


@pytest.mark.parametrize("node", [1, 127, 128, 300, 2**32 + 5, 2**63 + 1, 2**64 - 1])
def test_a_nodes_request_is_recognised(node: int) -> None:
    """As Flower itself writes it; another node's is not."""
    body = PullMessagesRequest(node=Node(node_id=node)).SerializeToString(deterministic=True)
    assert names_node(body, str(node))
    assert not names_node(body, str(node ^ 0x5555_5555_5555))
