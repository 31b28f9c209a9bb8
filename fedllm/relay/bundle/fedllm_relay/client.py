"""The owner's end: one process per message hands the bytes to the owner's daemon and returns its answer.

It holds no key, no data and no model, and runs without read access to them.
"""

import grpc
import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

DELIVER = "/fedllm.Relay/Deliver"
UNLIMITED = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))
TIMEOUT_S = 600.0

app = ClientApp()


def _identity(data: bytes) -> bytes:
    return data


@app.train("relay")  # type: ignore[untyped-decorator]
def relay(message: Message, context: Context) -> Message:
    """Deliver one sealed envelope to the daemon's socket and return its sealed reply."""
    request = message.content["envelope"]["bytes"].numpy().tobytes()
    with grpc.insecure_channel(f"unix:{context.node_config['socket']}", options=UNLIMITED) as channel:
        call = channel.unary_unary(DELIVER, request_serializer=_identity, response_deserializer=_identity)
        reply = call(request, timeout=TIMEOUT_S)
    record = ArrayRecord({"bytes": Array(np.frombuffer(reply, dtype=np.uint8))})
    return Message(RecordDict({"envelope": record}), reply_to=message)
