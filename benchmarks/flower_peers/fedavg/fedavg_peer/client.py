"""An owner: its update is known, and sent as it is."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from benchmarks.round_updates import update

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Return the model this owner would have trained."""
    (model,) = message.content["arrays"].to_numpy_ndarrays()
    trained = model + update(int(context.node_config["partition-id"]), model.size)
    content = RecordDict({"arrays": ArrayRecord([trained]), "metrics": MetricRecord({"num-examples": 1000})})
    return Message(content, reply_to=message)
