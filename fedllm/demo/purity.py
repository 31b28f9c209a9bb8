"""Did any answer mix two versions? Asked of the tokens themselves, not only of the labels.

Answers are greedy, so a version explains its own answer with no regret: at each token the logit it chose is
the largest. Regret of an answer under a version is the sum over its tokens of (largest logit minus the
token's logit). An answer is mixed if it names two digests, or if some other version explains it with clearly
less regret than the one it names. Log-likelihood would not do: a more confident version can give a higher
likelihood to another's greedy answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fedllm.demo.load import Stream

TOLERANCE = 0.5
"""Logits. bfloat16 batches of other shapes move a logit by up to about 0.1 a token; ties flip within that."""

RegretOf = Callable[[str, Stream], float]
"""(version digest, stream) to regret of the stream's answer under that version."""


def mixed(streams: Sequence[Stream], versions: Sequence[str], regret: RegretOf) -> list[Stream]:
    """Return the streams that mix versions.

    Parameters
    ----------
    streams : Sequence[Stream]
        Finished streams.
    versions : Sequence[str]
        Digests of everything that was served, the base model's included.
    regret : RegretOf
    """
    return [s for s in streams if len(s.digests) != 1 or _better_explained(s, versions, regret)]


def _better_explained(stream: Stream, versions: Sequence[str], regret: RegretOf) -> bool:
    (named,) = stream.digests
    own = regret(named, stream)
    return own > TOLERANCE and any(regret(v, stream) < own - TOLERANCE for v in versions if v != named)
