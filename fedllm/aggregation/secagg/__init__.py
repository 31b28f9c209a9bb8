"""``fedllm-secagg/1``: the coordinator learns the sum of the survivors' vectors and nothing else about them.

Bonawitz et al. 2017 (eprint 2017/281) with signed keys and the signed consistency step, on the complete graph up to
128 owners and above that on one where each owner picks its neighbours itself (`graph`; docs/adr/0006).
Two state machines without input or output: `SecAggOwner` and `SecAggCoordinator`.

::

    owner                       coordinator
    advertise()  ── KeyBundle ──────►  advertised()          U1: keys with valid signatures
    share_keys() ◄─ bundles of U1 ──
                 ── ShareMessage ───►  shared()              U2: everybody's shares are deposited
    mask()       ◄─ ShareDelivery ──
                 ── MaskedInput ────►  add_masked()/masked() U3: vectors that are in the sum
      or complaint() ─ Complaint ───►  complained()
    confirm()    ◄─ U3 ─────────────
                 ── signature ──────►  confirmed()           t owners saw the same U3
    unmask()     ◄─ UnmaskRequest ──
                 ── UnmaskShares ───►  unmasked()            the ring sum over U3

Threshold t of the holders of one owner's shares, enforced by every owner: ``floor(2n/3) + 1`` of n on the complete
graph, where each keeps a share of its own secrets. What this does not give: a check of what an owner puts in, or of
the sum that the coordinator publishes.
"""

from fedllm.aggregation.secagg.coordinator import SecAggCoordinator
from fedllm.aggregation.secagg.owner import SecAggOwner

__all__ = ["SecAggCoordinator", "SecAggOwner"]
