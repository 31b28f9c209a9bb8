"""An independent second implementation of ``fedllm-secagg/1`` that writes the known answers beside it.

It imports nothing of fedllm: protocol text, key schedule, Shamir, masks and packing are written again from
docs, with HKDF from ``hmac`` and Lagrange by fractions. Only X25519, Ed25519, AES and ChaCha20-Poly1305 come from
the same library. Run it with a folder to write to; without one it rewrites the files beside it::

    python tests/vectors/secagg1/generate.py [folder]
"""

from __future__ import annotations

import hashlib
import hmac
import json
import sys
from fractions import Fraction
from math import comb
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

P = 2**256 + 297
PROTOCOL = b"fedllm-secagg/1"
PURPOSE = b"update"
NAMES = ("east", "far", "mid", "north", "south", "west", "yard")
LOST = "far"  # deposits its shares, never sends its vector
THRESHOLD = 3
ENTRIES = 9
COMPLETE_PLAN = "20ade8833fc3b320064839426c919070722d72c46bac9bccdc98876c6de7f234"
SPARSE_PLAN = "032ca71be127ea427971ac183edeb92490f67a073291c5254fd7c5f1d1242809"
"""Digests of the two plans: four owners on the complete graph, seven with four neighbours each."""


class Feed:
    """The random bytes of one party: SHA-256 of a label and a counter, block after block."""

    def __init__(self, label: str) -> None:
        self.label, self.counter, self.left = label.encode(), 0, b""

    def token(self, size: int) -> bytes:
        """Return the next bytes."""
        while len(self.left) < size:
            self.left += hashlib.sha256(self.label + b"/" + str(self.counter).encode()).digest()
            self.counter += 1
        out, self.left = self.left[:size], self.left[size:]
        return out


def frame(*parts: bytes) -> bytes:
    """Length-prefixed concatenation."""
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def sha(data: bytes) -> bytes:
    """SHA-256."""
    return hashlib.sha256(data).digest()


def hkdf(secret: bytes, salt: bytes, info: bytes) -> bytes:
    """RFC 5869 with SHA-256 and one block of output."""
    extracted = hmac.new(salt, secret, hashlib.sha256).digest()
    return hmac.new(extracted, info + b"\x01", hashlib.sha256).digest()


def sign(name: str, label: bytes, message: bytes) -> bytes:
    """Ed25519 over label, zero byte and hash, with the identity seeded by the owner's place."""
    return identity(name).sign(label + b"\x00" + sha(message))


def identity(name: str) -> Ed25519PrivateKey:
    """Return the owner's pinned identity."""
    return Ed25519PrivateKey.from_private_bytes(bytes([NAMES.index(name) + 1] * 32))


def public(private: bytes) -> bytes:
    """X25519 public key."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def dh(private: bytes, peer: bytes) -> bytes:
    """X25519 shared secret."""
    return X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(peer))


def polynomial(secret: bytes, feed: Feed) -> list[int]:
    """Coefficients, constant first; the highest is drawn first, by rejection from 257 bits."""
    drawn: list[int] = []
    while len(drawn) < THRESHOLD - 1:
        value = int.from_bytes(feed.token(33), "big") >> 7
        if value < P:
            drawn.append(value)
    return [int.from_bytes(secret, "big"), *reversed(drawn)]


def at(coefficients: list[int], x: int) -> int:
    """Value of a polynomial, power by power."""
    return sum(c * pow(x, k, P) for k, c in enumerate(coefficients)) % P


def words(key: bytes, count: int) -> list[int]:
    """AES-256-CTR words from counter zero, little endian."""
    stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(4 * count))
    return [int.from_bytes(stream[4 * i : 4 * i + 4], "little") for i in range(count)]


def pick(candidates: list[str], count: int, feed: Feed) -> list[str]:
    """Draw places without replacement: swap each in front with one at or behind it, by rejection of 32-bit words."""
    pool = list(candidates)
    for front in range(count):
        left = len(pool) - front
        word = 2**32
        while word >= 2**32 // left * left:
            word = int.from_bytes(feed.token(4), "big")
        chosen = front + word % left
        pool[front], pool[chosen] = pool[chosen], pool[front]
    return sorted(pool[:count])


def party(name: str) -> dict[str, object]:
    """Draw one owner's secrets in the order of the protocol."""
    feed = Feed(f"secagg1/{name}")
    cipher, mask, seed = feed.token(32), feed.token(32), feed.token(32)
    return {"feed": feed, "cipher": cipher, "mask": mask, "seed": seed}


def run(ring_bits: int, names: tuple[str, ...] = NAMES[:4], neighbours: int = 3) -> dict[str, object]:
    """Run one whole sum and return everything that crosses the line."""
    complete = neighbours == len(names) - 1
    plan = COMPLETE_PLAN if complete else SPARSE_PLAN
    ctx = sha(frame(PROTOCOL, bytes.fromhex(plan), PURPOSE))
    parties = {name: party(name) for name in names}
    out: dict[str, dict[str, object]] = {name: {} for name in names}
    v1 = advertise(ctx, parties, out)
    for name in names:
        share(ctx, v1, name, parties, out, neighbours)
    survivors = [name for name in names if name != LOST]
    total = [0] * ENTRIES
    for name in survivors:
        values = [(7919 * (names.index(name) + 1) * (i + 1) ** 5) % 2**ring_bits for i in range(ENTRIES)]
        packed = mask(ctx, v1, name, values, parties, ring_bits)
        out[name] |= {"values": values, "masked": packed.hex(), "chunks": [sha(packed).hex()]}
        total = [(a + b) % 2**ring_bits for a, b in zip(total, values, strict=True)]
    u2 = sha(frame(*[name.encode() for name in names]))
    u3 = sha(frame(*[name.encode() for name in survivors]))
    for name in survivors:
        x = NAMES.index(name) + 1
        held = [dealer for dealer in names if name in parties[dealer]["holders"]]
        among = survivors if complete else [peer for peer in parties[name]["holders"] if peer in survivors]
        out[name]["confirmation"] = sign(name, PROTOCOL + b"/survivors", frame(ctx, v1, u2, u3)).hex()
        out[name]["shown"] = among[:THRESHOLD]
        polys = {True: "seed_poly", False: "key_poly"}
        shares = {p: at(parties[p][polys[p in survivors]], x).to_bytes(33, "big").hex() for p in held}
        out[name]["seed_shares"] = {p: shares[p] for p in held if p in survivors}
        out[name]["key_shares"] = {p: shares[p] for p in held if p not in survivors}
    return {
        "protocol": PROTOCOL.decode(), "plan_digest": plan, "purpose": PURPOSE.decode(),
        "ring_bits": ring_bits, "entries": ENTRIES, "neighbours": neighbours, "threshold": THRESHOLD,
        "context": ctx.hex(), "v1": v1.hex(), "owners": out, "survivors": survivors, "sum": total,
    }  # fmt: skip


def advertise(ctx: bytes, parties: dict[str, dict], out: dict[str, dict]) -> bytes:
    """Sign everybody's keys; return the hash of the list."""
    listed: list[bytes] = [ctx]
    for name, own in parties.items():
        cipher_key, mask_key = public(own["cipher"]), public(own["mask"])
        signature = sign(name, PROTOCOL + b"/advertise", frame(ctx, name.encode(), cipher_key, mask_key))
        listed += [name.encode(), cipher_key, mask_key, signature]
        own["cipher_key"], own["mask_key"] = cipher_key, mask_key
        out[name]["bundle"] = {
            "cipher_key": cipher_key.hex(), "mask_key": mask_key.hex(), "signature": signature.hex(),
        }  # fmt: skip
    return sha(frame(*listed))


def share(ctx: bytes, v1: bytes, name: str, parties: dict[str, dict], out: dict[str, dict], neighbours: int) -> None:
    """Deal one owner's two secrets: to all and itself, or to the peers it picks."""
    own, names = parties[name], list(parties)
    others = [peer for peer in names if peer != name]
    own["holders"] = names if neighbours == len(others) else pick(others, neighbours, own["feed"])
    own["seed_poly"], own["key_poly"] = polynomial(own["seed"], own["feed"]), polynomial(own["mask"], own["feed"])
    sealed: dict[str, str] = {}
    for peer in own["holders"]:
        if peer == name:
            continue
        x = NAMES.index(peer) + 1
        plain = at(own["seed_poly"], x).to_bytes(33, "big") + at(own["key_poly"], x).to_bytes(33, "big")
        pair = (name.encode(), peer.encode())
        key = hkdf(dh(own["cipher"], parties[peer]["cipher_key"]), v1, frame(b"share", ctx, *pair))
        nonce = own["feed"].token(12)
        sealed[peer] = (nonce + ChaCha20Poly1305(key).encrypt(nonce, plain, frame(ctx, v1, *pair))).hex()
    out[name]["shares"] = {"seed_commitment": sha(own["seed"]).hex(), "ciphertexts": sealed}


def mask(ctx: bytes, v1: bytes, name: str, values: list[int], parties: dict[str, dict], ring_bits: int) -> bytes:
    """Add an owner's own mask and those of its neighbours, whom it picked or who picked it; pack."""
    own_key = hkdf(parties[name]["seed"], v1, frame(b"self", ctx, name.encode()))
    lanes = [a + b for a, b in zip(values, words(own_key, ENTRIES), strict=True)]
    for peer, other in parties.items():
        if peer != name and (peer in parties[name]["holders"] or name in other["holders"]):
            pair = sorted((name.encode(), peer.encode()))
            shared = dh(parties[name]["mask"], other["mask_key"])
            stream = words(hkdf(shared, v1, frame(b"mask", ctx, *pair)), ENTRIES)
            lanes = [a + b if name < peer else a - b for a, b in zip(lanes, stream, strict=True)]
    return b"".join((lane % 2**ring_bits).to_bytes(ring_bits // 8, "little") for lane in lanes)


def tail(others: int, marked: int, drawn: int, least: int) -> Fraction:
    """P[at least `least` of `drawn` without replacement are marked], exactly."""
    ways = [comb(marked, x) * comb(others - marked, drawn - x) for x in range(max(least, 0), min(marked, drawn) + 1)]
    return Fraction(sum(ways), comb(others, drawn))


def graph(owners: int, corruption: str, dropout: str) -> dict[str, object]:
    """Return the least k, and its least t, by exact fractions: privacy 2^-40, abort 2^-20, union over the owners."""
    corrupt, dead = int(Fraction(corruption) * owners), int(Fraction(dropout) * owners)
    for k in range(1, owners - 1):
        for t in range(k // 2 + 1, k + 1):
            if owners * tail(owners - 1, corrupt, k, 2 * t - k) <= Fraction(1, 2**40):
                if owners * tail(owners - 1, dead, k, k - t + 1) <= Fraction(1, 2**20):
                    return {
                        "owners": owners, "corruption": float(corruption), "dropout": float(dropout),
                        "neighbours": k, "threshold": t,
                    }  # fmt: skip
                break
    raise ValueError("no graph")


def flip(text: str) -> str:
    """Change the last bit of hex digits."""
    return text[:-2] + f"{int(text[-2:], 16) ^ 1:02x}"


def negatives(good: dict[str, object], sparse: dict[str, object]) -> dict[str, dict[str, object]]:
    """Return inputs that must be refused: where each goes in, and the error code it must raise."""
    ctx = bytes.fromhex(good["context"])
    east = good["owners"]["east"]
    bundle = {"owner": "far", **good["owners"]["far"]["bundle"]}
    sealed = good["owners"]["far"]["shares"]["ciphertexts"]["east"]
    zero = bytes(32)
    low = {"owner": "far", "cipher_key": zero.hex(), "mask_key": (b"\x01" + bytes(31)).hex()}
    message = frame(ctx, b"far", zero, b"\x01" + bytes(31))
    low["signature"] = sign("far", PROTOCOL + b"/advertise", message).hex()
    other = sign("mid", PROTOCOL + b"/survivors", b"another set").hex()
    share = east["seed_shares"]["mid"]
    edge = graph(200, "0.1", "0.1")
    edge["threshold"] -= 1
    # On the sparse graph: signatures of which too few are east's picks; keys of somebody who dealt to east unasked.
    picks = set(sparse["owners"]["east"]["shares"]["ciphertexts"])
    strangers = sorted([*(set(sparse["survivors"]) - picks), *sorted(picks - {LOST})[: THRESHOLD - 1]])
    dealer = min(name for name in sparse["owners"]["east"]["seed_shares"] if name not in picks)
    forged = sparse["owners"][dealer]["bundle"]
    few = sorted([*(set(NAMES) - picks), *sorted(picks)[: THRESHOLD - 1]])
    # A definite map with its keys in another than the canonical order (length first, then bytes).
    canonical = ("owner", "purpose", "mask_key", "signature", "cipher_key")
    fields = {"owner": b"\x63far", "purpose": b"\x66update"}
    fields |= {k: b"\x58" + bytes([len(bytes.fromhex(bundle[k]))]) + bytes.fromhex(bundle[k]) for k in canonical[2:]}
    item = {k: bytes([0x60 + len(k)]) + k.encode() + fields[k] for k in canonical}
    shuffled = b"\xa5" + b"".join(item[k] for k in reversed(canonical))
    trailing = b"\xa5" + b"".join(item.values()) + b"\x00"
    return {
        "bundle_bad_signature": {
            "step": "bundle", "error": "signature-invalid", **bundle,
            "signature": flip(bundle["signature"]),
        },
        "bundle_bad_length": {"step": "bundle", "error": "keys-invalid", **bundle, "mask_key": bundle["mask_key"][2:]},
        "bundle_bad_low_order": {"step": "bundle", "error": "low-order-key", **low},
        "bundle_bad_double": {"step": "bundle", "error": "keys-invalid", **bundle, "mask_key": bundle["cipher_key"]},
        "bundle_bad_noncanonical": {
            "step": "wire", "error": "decode", "bytes": shuffled.hex(),
        },
        "bundle_bad_trailing": {
            "step": "wire", "error": "decode", "bytes": trailing.hex(),
        },
        "sealed_bad_tag": {"step": "sealed", "error": "shares-unopenable", "sealed": flip(sealed)},
        "sealed_bad_length": {"step": "sealed", "error": "shares-unopenable", "sealed": sealed[:-2]},
        "masked_bad_length": {"step": "masked", "error": "digest-mismatch", "chunks": [east["masked"][:-2]]},
        "masked_bad_chunks": {
            "step": "masked", "error": "digest-mismatch", "chunks": [east["masked"][:6], east["masked"][6:]],
        },
        "masked_bad_digest": {"step": "masked", "error": "digest-mismatch", "chunks": [flip(east["masked"])]},
        "share_bad_unreduced": {"step": "share", "error": "decode", "share": P.to_bytes(33, "big").hex()},
        "share_bad_length": {"step": "share", "error": "decode", "share": share[2:]},
        "share_bad_value": {"step": "open", "error": "round-aborted", "share": flip(share)},
        "confirmation_bad_set": {"step": "confirmation", "error": "signature-invalid", "signature": other},
        "graph_bad_threshold": {"step": "graph", "error": "threshold-refused", **edge},
        "sparse_bad_signers": {"step": "signers", "error": "signatures-missing", "signers": strangers},
        "sparse_bad_dealer": {
            "step": "dealer", "error": "signature-invalid", "owner": dealer, **forged,
            "signature": flip(forged["signature"]),
        },
        "sparse_bad_sharers": {"step": "sharers", "error": "set-refused", "sharers": few},
    }  # fmt: skip


def main(folder: Path) -> None:
    """Write every vector as JSON."""
    sums = {bits: run(bits) for bits in (8, 16, 24, 32)}
    sparse = run(24, NAMES, 4)
    graphs = [
        graph(64, "0.33", "0.1"),
        graph(200, "0.05", "0.05"),
        graph(200, "0.1", "0.1"),
        graph(1000, "0.05", "0.05"),
    ]
    files = {f"sum_{bits}": vector for bits, vector in sums.items()} | {"sparse_24": sparse, "graphs": {"rows": graphs}}
    files |= negatives(sums[24], sparse)
    for name, vector in files.items():
        (folder / f"{name}.json").write_text(json.dumps(vector, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
