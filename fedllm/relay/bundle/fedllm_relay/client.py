"""The owner's end: one process per message hands the bytes to the owner's daemon and returns its answer.

It holds no key, no data and no model, and runs without read access to them.
"""

import grpc
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

DELIVER = "/fedllm.Relay/Deliver"
UNLIMITED = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))
TIMEOUT_S = 600.0

app = ClientApp()


def _identity(data: bytes) -> bytes:
    return data


def _array(data: bytes) -> Array:
    return Array(dtype="uint8", shape=(len(data),), stype="bytes", data=data)


@app.train("relay")  # type: ignore[untyped-decorator]
def relay(message: Message, context: Context) -> Message:
    """Deliver one sealed envelope to the daemon and return its reply: the head as bytes, one array for each part."""
    request = message.content["envelope"]["head"]
    with grpc.insecure_channel(f"unix:{context.node_config['socket']}", options=UNLIMITED) as channel:
        call = channel.unary_stream(DELIVER, request_serializer=_identity, response_deserializer=_identity)
        head, *parts = call(request, timeout=TIMEOUT_S)
    # Flower stores and fetches each record, array and chunk by itself: an envelope is a record's value to be few
    content = RecordDict({"envelope": ConfigRecord({"head": head})})
    if parts:
        content["parts"] = ArrayRecord({f"{i:05d}": _array(part) for i, part in enumerate(parts)})
    return Message(content, reply_to=message)
