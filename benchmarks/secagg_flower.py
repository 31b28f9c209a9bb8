"""Flower's SecAgg+ as a provider: its own functions of the client mod and the workflow, called directly.

`flwr.client.mod.secure_aggregation` gives the owner's four stages. The coordinator's stages are methods of a workflow
that cannot run without Flower's processes, so `open` repeats the lines of its ``unmask_stage`` with the same
functions. Vectors are added as they come in, which the workflow does not do; that only helps it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from flwr.client.mod.secure_aggregation.secaggplus_mod import (
    SecAggPlusState,
    _collect_masked_vectors,
    _setup,
    _share_keys,
    _unmask,
)
from flwr.common import bytes_to_ndarray, ndarrays_to_parameters
from flwr.common.secure_aggregation.crypto.shamir import combine_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
from flwr.common.secure_aggregation.ndarrays_arithmetic import (
    factor_combine,
    factor_extract,
    get_parameters_shape,
    parameters_addition,
    parameters_mod,
    parameters_multiply,
    parameters_subtraction,
)
from flwr.common.secure_aggregation.quantization import dequantize, quantize
from flwr.common.secure_aggregation.secaggplus_constants import Key
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
from flwr.supercore.primitives.asymmetric import bytes_to_private_key, bytes_to_public_key
from numpy.typing import NDArray

from benchmarks.document import check
from fedllm.messages.plan import honest_threshold

F32 = NDArray[np.float32]
TARGET_RANGE = 1 << 22
MOD_RANGE = 1 << 32
"""The defaults of Flower's workflow."""
MAX_WEIGHT = 1000.0
EXAMPLES = 1000


class Flower:
    """All parties of one masked sum; the methods are those of `benchmarks.secagg.Provider`.

    Parameters
    ----------
    owners, dim, dropouts : int
        Size of the cohort, entries of a vector, owners who never mask (the last ones).
    clip_range : float
        Flower's clipping range.
    """

    def __init__(self, *, owners: int, dim: int, dropouts: int, clip_range: float) -> None:
        self._count, self._survivors, self._clip_range = owners, owners - dropouts, clip_range
        self._shapes = [(1,), (dim,)]
        self._states: list[Any] = []
        self._keys: dict[int, tuple[bytes, bytes]] = {}
        self._dealt: list[dict[str, Any]] = []
        self._inbox: list[dict[str, Any]] = []
        self._sum: list[Any] = [np.zeros(shape, dtype=np.int64) for shape in self._shapes]
        self._plain: list[Any] = [np.zeros(shape, dtype=np.int64) for shape in self._shapes]
        self._answers: list[dict[str, Any]] = []
        self._update: F32 = np.zeros(0, dtype=np.float32)
        self._opened: list[Any] = []
        self.upload_bytes = 0

    def setup(self, owner: int) -> None:
        """Make two key pairs."""
        state = SecAggPlusState()
        state.nid = owner + 1
        made = _setup(state, {
            Key.SAMPLE_NUMBER: self._count, Key.SHARE_NUMBER: self._count,
            Key.THRESHOLD: honest_threshold(self._count), Key.CLIPPING_RANGE: self._clip_range,
            Key.TARGET_RANGE: TARGET_RANGE, Key.MOD_RANGE: MOD_RANGE, Key.MAX_WEIGHT: MAX_WEIGHT,
        })  # fmt: skip
        self._states.append(state)
        self._keys[state.nid] = (made[Key.PUBLIC_KEY_1], made[Key.PUBLIC_KEY_2])
        self._sent(owner, self._keys[state.nid])

    def list_keys(self) -> None:
        """Nothing to check in this protocol."""

    def share(self, owner: int) -> None:
        """Deal and encrypt shares."""
        dealt = _share_keys(self._states[owner], {str(nid): pair for nid, pair in self._keys.items()})
        self._dealt.append(dealt)
        self._sent(owner, dealt[Key.CIPHERTEXT_LIST])

    def forward(self) -> None:
        """Sort the ciphertexts by receiver."""
        self._inbox = [{Key.CIPHERTEXT_LIST: [], Key.SOURCE_LIST: []} for _ in range(self._count)]
        for sender, dealt in enumerate(self._dealt):
            for receiver, sealed in zip(dealt[Key.DESTINATION_LIST], dealt[Key.CIPHERTEXT_LIST], strict=True):
                self._inbox[receiver - 1][Key.CIPHERTEXT_LIST].append(sealed)
                self._inbox[receiver - 1][Key.SOURCE_LIST].append(sender + 1)

    def mask(self, owner: int, update: F32) -> list[bytes]:
        """Quantise, decrypt the peers' shares, agree on masks, add them, serialise."""
        self._update = update
        np.random.seed(owner)  # noqa: NPY002 - Flower rounds with numpy's global generator; the gate repeats it
        parameters = ndarrays_to_parameters([update])
        sent = _collect_masked_vectors(self._states[owner], self._inbox[owner], EXAMPLES, parameters)
        vectors: list[bytes] = sent[Key.MASKED_PARAMETERS]
        return vectors

    def collect(self, owner: int, vector: list[bytes]) -> None:
        """Add the vector; and, for the gate, what it hides."""
        self._sent(owner, vector)
        self._sum = parameters_addition(self._sum, [bytes_to_ndarray(part) for part in vector])
        np.random.seed(owner)  # noqa: NPY002 - the same rounding again
        weight = round(EXAMPLES / MAX_WEIGHT * TARGET_RANGE)
        scaled = parameters_multiply([self._update], weight / TARGET_RANGE)
        hidden = factor_combine(weight, quantize(scaled, self._clip_range, TARGET_RANGE))
        self._plain = parameters_addition(self._plain, hidden)

    def confirm(self, owner: int) -> None:
        """Nothing: owners never agree on who survived."""

    def settle(self) -> None:
        """Reduce the sum, as the workflow does."""
        self._sum = parameters_mod(self._sum, MOD_RANGE)

    def reveal(self, owner: int) -> None:
        """Return shares of whatever is asked."""
        active = list(range(1, self._survivors + 1))
        dead = list(range(self._survivors + 1, self._count + 1))
        answer = _unmask(self._states[owner], {Key.ACTIVE_NODE_ID_LIST: active, Key.DEAD_NODE_ID_LIST: dead})
        self._answers.append(answer)
        self._sent(owner, answer[Key.SHARE_LIST])

    def open(self) -> None:
        """Combine shares and take the masks off: the lines of Flower's ``unmask_stage``."""
        collected: dict[int, list[bytes]] = {nid: [] for nid in self._keys}
        for answer in self._answers:
            for nid, share in zip(answer[Key.NODE_ID_LIST], answer[Key.SHARE_LIST], strict=True):
                collected[nid].append(share)
        masked = self._sum
        for nid, shares in collected.items():
            secret = combine_shares(shares)
            if nid <= self._survivors:
                mask = pseudo_rand_gen(secret, MOD_RANGE, get_parameters_shape(masked))
                masked = parameters_subtraction(masked, mask)
                continue
            # The workflow goes through dropped neighbours as well; only the survivors' masks are in the sum.
            for other in range(1, self._survivors + 1):
                shared = generate_shared_key(bytes_to_private_key(secret), bytes_to_public_key(self._keys[other][0]))
                mask = pseudo_rand_gen(shared, MOD_RANGE, get_parameters_shape(masked))
                combine = parameters_addition if nid > other else parameters_subtraction
                masked = combine(masked, mask)
        self._opened = parameters_mod(masked, MOD_RANGE)

    def check(self, updates: Sequence[F32]) -> None:
        """Gate: the opened sum is the plain sum, and decodes to the float sum within a grid step an owner."""
        plain = parameters_mod(self._plain, MOD_RANGE)
        wrong = sum(int(np.count_nonzero(a != b)) for a, b in zip(plain, self._opened, strict=True))
        check(wrong == 0, f"flower: {wrong} entries of the opened sum differ from the plain sum")
        _, body = factor_extract(self._opened)
        decoded = dequantize(body, self._clip_range, TARGET_RANGE)[0] - (self._survivors - 1) * self._clip_range
        exact = np.zeros(decoded.shape)
        for owner in range(self._survivors):
            exact += updates[owner]
        off = float(np.abs(decoded - exact).max())
        allowed = self._survivors * 2 * self._clip_range / TARGET_RANGE + 1e-6  # it rounds in float32
        check(off <= allowed, f"flower: the decoded sum is {off:.3g} off the float sum, {allowed:.3g} allowed")

    def _sent(self, owner: int, parts: Any) -> None:
        if owner == 0:
            self.upload_bytes += sum(len(part) for part in parts)
