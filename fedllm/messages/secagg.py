"""The five messages of ``fedllm-secagg/1``: advertise, share keys, masked input, consistency, unmask.

Bonawitz et al. 2017 (eprint 2017/281) with the consistency round; one instance per *purpose* (the update sum
and the evaluation sum are independently keyed, their set-up travels together).
"""

from __future__ import annotations

from dataclasses import dataclass

from fedllm.ids import OwnerId

PROTOCOL = "fedllm-secagg/1"
PURPOSE_UPDATE = "update"
PURPOSE_EVALUATION = "evaluation"


@dataclass(frozen=True)
class KeyBundle:
    """M0 advertise: fresh X25519 public keys of one owner for one sum, signed by its pinned identity.

    Attributes
    ----------
    cipher_key, mask_key : bytes
        32-byte X25519 public keys (RFC 7748): share encryption, pairwise masks.
    signature : bytes
        Ed25519 over plan digest, purpose, owner and both keys.
    """

    owner: OwnerId
    purpose: str
    cipher_key: bytes
    mask_key: bytes
    signature: bytes


@dataclass(frozen=True)
class ShareMessage:
    """M1 share keys: for each peer one AEAD ciphertext holding a share of the self-mask seed and of the mask key.

    On the complete graph the peers are all of U1; on a sparse one they are the k that this owner picked itself.

    Attributes
    ----------
    seed_commitment : bytes
        SHA-256 of the self-mask seed, so that a wrong share is noticed and attributed.
    ciphertexts : dict[str, bytes]
        Peer name to sealed shares.
    """

    owner: OwnerId
    purpose: str
    seed_commitment: bytes
    ciphertexts: dict[str, bytes]


@dataclass(frozen=True)
class ShareDelivery:
    """What one owner receives before it masks: who shared keys (U2), and the ciphertexts addressed to it."""

    purpose: str
    sharers: tuple[OwnerId, ...]
    ciphertexts: dict[str, bytes]


@dataclass(frozen=True)
class MaskedVector:
    """M2 masked input: the only form in which an owner's numbers leave it.

    This is its head; the packed vector itself travels behind it, in chunks that the head names by digest.

    Attributes
    ----------
    entries : int
        Number of ring entries.
    entry_bytes : int
        Bytes of one entry, little endian.
    chunks : tuple[bytes, ...]
        SHA-256 of each chunk of the packed vector, in order; a chunk has 1 to 4 MiB, the last may have less, and
        together they have ``entries * entry_bytes`` bytes.
    """

    owner: OwnerId
    purpose: str
    entries: int
    entry_bytes: int
    chunks: tuple[bytes, ...]


@dataclass(frozen=True)
class Complaint:
    """M2 instead of a vector: shares of these dealers did not open here, so this owner takes no part in the sum.

    Either the dealer or the one who complains is wrong; more complaints than the protocol assumes colluders prove
    it is the dealer.
    """

    owner: OwnerId
    purpose: str
    dealers: tuple[OwnerId, ...]


@dataclass(frozen=True)
class SurvivorSignature:
    """M3 consistency: one owner's signature over the survivor set U3 it was shown, given once per sum."""

    owner: OwnerId
    purpose: str
    signature: bytes


@dataclass(frozen=True)
class UnmaskRequest:
    """M4 request: the survivor set and the signatures of at least t owners over it."""

    purpose: str
    survivors: tuple[OwnerId, ...]
    signatures: tuple[SurvivorSignature, ...]


@dataclass(frozen=True)
class UnmaskShares:
    """M4 reply: self-mask shares for survivors, mask-key shares for dropouts; never both of one peer."""

    owner: OwnerId
    purpose: str
    seed_shares: dict[str, bytes]
    key_shares: dict[str, bytes]
