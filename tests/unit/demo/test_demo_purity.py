"""The demo can tell mixed versions from pure ones, by the tokens themselves."""

from __future__ import annotations

import json

from fedllm.demo.load import Stream, read_event
from fedllm.demo.purity import TOLERANCE, mixed

# Three "models" of four tokens: the logits each gives at every step, whatever came before.
LOGITS = {"v1": (9.0, 1.0, 0.0, 0.0), "v2": (1.0, 9.0, 0.0, 0.0), "v3": (20.0, 1.0, 0.0, 0.0)}


def regret(version: str, stream: Stream) -> float:
    """Return the regret of the stream's tokens under a version."""
    logits = LOGITS[version]
    return sum(max(logits) - logits[token] for token in stream.tokens)


def stream(tokens: list[int], *digests: str) -> Stream:
    """Return a finished stream."""
    return Stream("acme/tools", digests=set(digests), tokens=tokens, finished=True)


def test_an_answer_of_the_version_it_names_is_pure() -> None:
    """Zero regret under its own version; a more confident version that agrees is no reason for suspicion."""
    assert mixed([stream([0, 0, 0], "v1")], list(LOGITS), regret) == []


def test_a_stream_that_names_two_digests_is_mixed() -> None:
    """Labels alone give it away."""
    suspect = stream([0, 0], "v1", "v2")
    assert mixed([suspect], list(LOGITS), regret) == [suspect]


def test_an_answer_that_another_version_explains_better_is_mixed() -> None:
    """A wrong label is found by the tokens: v2 explains what v1 claims."""
    suspect = stream([1, 1, 1, 0], "v1")
    assert mixed([suspect, stream([1, 1], "v2")], list(LOGITS), regret) == [suspect]


def test_rounding_of_batches_is_no_mixture() -> None:
    """A regret within the tolerance is what another batch shape does to bfloat16."""
    near = {"v1": TOLERANCE / 2, "v2": 0.0, "v3": 0.0}
    assert mixed([stream([0], "v1")], list(LOGITS), lambda version, _: near[version]) == []


def test_events_add_up_to_a_stream() -> None:
    """Chunks carry digest, token ids and text; an error event is a failure; the end mark is required."""
    seen = Stream("m")
    chunk = {"system_fingerprint": "d1", "prompt_token_ids": [5, 6], "choices": [{"delta": {"content": "a"}}]}
    chunk["choices"][0]["token_ids"] = [7]  # type: ignore[index]
    read_event(seen, json.dumps(chunk))
    assert (seen.digests, seen.tokens, seen.prompt_tokens, seen.text) == ({"d1"}, [7], [5, 6], "a")
    assert not seen.finished
    read_event(seen, "[DONE]")
    assert seen.finished
    failed = Stream("m")
    read_event(failed, json.dumps({"error": {"code": "overloaded"}}))
    assert failed.error == "overloaded"
