"""Known answers of ``fedllm-secagg/1``, good and bad, written by an independent implementation."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from secagg_world import IDENTITIES, NAMES, World, make_plan

from fedllm import wire
from fedllm.aggregation.secagg import graph, keys
from fedllm.aggregation.secagg.masking import check_chunks
from fedllm.aggregation.secagg.shamir import share_from_bytes
from fedllm.errors import FedllmError
from fedllm.ids import OwnerId
from fedllm.messages.secagg import (
    KeyBundle,
    MaskedVector,
    ShareDelivery,
    SurvivorSignature,
    UnmaskRequest,
    UnmaskShares,
)

FOLDER = Path(__file__).parents[2] / "vectors" / "secagg1"
EAST, FAR, MID, _ = NAMES[:4]
Vector = dict[str, Any]


def load(name: str) -> Vector:
    """Return one vector file."""
    found: Vector = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return found


def generator() -> ModuleType:
    """Return the independent implementation as a module."""
    spec = importlib.util.spec_from_file_location("secagg1_generate", FOLDER / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def world(bits: int, sparse: bool = False) -> World:
    """Return owners whose randomness is the vectors'."""
    feed = generator().Feed
    made = World(7, bits, 9, graph=(4, 3)) if sparse else World(4, bits, 9)
    made.owners = {name: made.owner(name, rng=feed(f"secagg1/{name}")) for name in made.names}
    return made


def bundle_of(owner: str, data: Vector) -> KeyBundle:
    """Return a vector's key bundle."""
    raw = {k: bytes.fromhex(data[k]) for k in ("cipher_key", "mask_key", "signature")}
    return KeyBundle(OwnerId(owner), "update", raw["cipher_key"], raw["mask_key"], raw["signature"])


def unhex(table: dict[str, str]) -> dict[str, bytes]:
    """Return a table of bytes."""
    return {k: bytes.fromhex(v) for k, v in table.items()}


@pytest.mark.parametrize("name", ["sum_8", "sum_16", "sum_24", "sum_32", "sparse_24"])
def test_every_message_of_a_sum_is_the_known_answer(name: str) -> None:
    """Bundles, shares, masked vectors, signatures and unmask shares agree byte for byte, and so does the sum."""
    vector = load(name)
    w = world(vector["ring_bits"], sparse=name.startswith("sparse"))
    owners: dict[OwnerId, Vector] = vector["owners"]
    assert w.plan.digest == vector["plan_digest"]
    assert keys.context(w.plan, "update").hex() == vector["context"]
    u1 = w.advertise()
    assert {b.owner: b for b in u1} == {n: bundle_of(n, owners[n]["bundle"]) for n in w.names}
    assert keys.transcript(keys.context(w.plan, "update"), u1).hex() == vector["v1"]
    shared = {n: w.owners[n].share_keys(u1) for n in w.names}
    for owner, message in shared.items():
        assert message.seed_commitment.hex() == owners[owner]["shares"]["seed_commitment"]
        assert message.ciphertexts == unhex(owners[owner]["shares"]["ciphertexts"])
    deliveries = w.coordinator.shared(shared)
    for n in vector["survivors"]:
        made = w.owners[n].mask(deliveries[n], np.array(owners[n]["values"], dtype=np.uint32))
        assert [chunk.hex() for chunk in made.chunks] == [owners[n]["masked"]]
        assert [digest.hex() for digest in made.head.chunks] == owners[n]["chunks"]
        w.coordinator.add_masked(n, *made)
    survivors = w.coordinator.masked()
    confirmed = {n: w.owners[n].confirm(survivors) for n in survivors}
    assert {n: c.signature.hex() for n, c in confirmed.items()} == {n: owners[n]["confirmation"] for n in survivors}
    requests = w.coordinator.confirmed(confirmed)
    assert {n: [s.owner for s in r.signatures] for n, r in requests.items()} == {
        n: owners[n]["shown"] for n in survivors
    }
    answers = {n: w.owners[n].unmask(requests[n]) for n in survivors}
    for owner, answer in answers.items():
        assert answer.seed_shares == unhex(owners[owner]["seed_shares"])
        assert answer.key_shares == unhex(owners[owner]["key_shares"])
    assert w.coordinator.unmasked(answers).tolist() == vector["sum"]


def test_the_graph_is_the_one_that_exact_fractions_give() -> None:
    """The search in floats finds the k and t that the second implementation finds without rounding."""
    for row in load("graphs")["rows"]:
        found = graph.search(row["owners"], row["corruption"], row["dropout"])
        assert found == graph.Graph(row["neighbours"], row["threshold"])


def test_the_files_are_what_the_generator_writes(tmp_path: Path) -> None:
    """Nobody edited a vector by hand, and none is left over."""
    generator().main(tmp_path)
    written = {p.name: p.read_bytes() for p in tmp_path.glob("*.json")}
    assert written == {p.name: p.read_bytes() for p in FOLDER.glob("*.json")}
    assert len(written) == 25


@pytest.mark.parametrize("name", sorted(p.stem for p in FOLDER.glob("*_bad_*.json")))
def test_a_bad_vector_is_refused_with_its_code(name: str) -> None:
    """Each negative vector goes in where it would arrive and raises the named error."""
    vector = load(name)
    with pytest.raises(FedllmError) as caught:
        feed_bad(vector)
    assert caught.value.code == vector["error"]


def feed_bad(vector: Vector) -> None:
    """Hand a negative vector to the code that receives such input."""
    good = load("sum_24")
    ctx, v1 = bytes.fromhex(good["context"]), bytes.fromhex(good["v1"])
    step = vector["step"]
    if step == "bundle":
        w = world(24)
        bundles = {n: o.advertise() for n, o in w.owners.items()}
        w.owners[EAST].share_keys([*[b for n, b in bundles.items() if n != FAR], bundle_of("far", vector)])
    elif step == "wire":
        wire.decode(KeyBundle, bytes.fromhex(vector["bytes"]))
    elif step == "sealed":
        w = world(24)
        mine = w.share(w.advertise())[EAST]
        sealed = {**mine.ciphertexts, "far": bytes.fromhex(vector["sealed"])}
        w.owners[EAST].mask(ShareDelivery("update", mine.sharers, sealed), np.zeros(9, np.uint32))
    elif step == "masked":
        check_chunks(head_of(good), [bytes.fromhex(chunk) for chunk in vector["chunks"]])
    elif step == "share":
        share_from_bytes(bytes.fromhex(vector["share"]))
    elif step == "open":
        open_with(world(24), good, bytes.fromhex(vector["share"]))
    elif step == "confirmation":
        label, message = keys.survivors_message(ctx, v1, NAMES[:4], good["survivors"])
        IDENTITIES[MID].public.verify(label, message, bytes.fromhex(vector["signature"]))
    elif step == "graph":
        names = tuple(OwnerId(f"o{i:03d}") for i in range(vector["owners"]))
        plan = make_plan(names, **{k: vector[k] for k in ("neighbours", "threshold", "corruption", "dropout")})
        graph.check(len(plan.cohort), plan.neighbours, plan.threshold, plan.corruption, plan.dropout)
    else:
        feed_sparse(vector)


def feed_sparse(vector: Vector) -> None:
    """Hand a negative vector to east on the sparse graph."""
    w = world(24, sparse=True)
    east = w.owners[EAST]
    u1 = w.advertise()
    shown = u1
    if vector["step"] == "dealer":  # only east is shown it, and shares: whom it did not pick it does not check yet
        shown = tuple(bundle_of(b.owner, vector) if b.owner == vector["owner"] else b for b in u1)
    messages = {n: w.owners[n].share_keys(shown if n == EAST else u1) for n in w.names}
    deliveries = w.coordinator.shared(messages)
    if vector["step"] == "dealer":
        east.mask(deliveries[EAST], np.zeros(9, np.uint32))
    if vector["step"] == "sharers":
        sharers = tuple(vector["sharers"])
        sealed = {k: v for k, v in deliveries[EAST].ciphertexts.items() if k in sharers}
        east.mask(ShareDelivery("update", sharers, sealed), np.zeros(9, np.uint32))
    survivors = w.mask(deliveries)
    signed = {n: w.owners[n].confirm(survivors) for n in survivors}
    east.unmask(UnmaskRequest("update", survivors, tuple(signed[OwnerId(n)] for n in vector["signers"])))


def head_of(vector: Vector) -> MaskedVector:
    """Return the head of east's masked vector."""
    digests = tuple(bytes.fromhex(digest) for digest in vector["owners"]["east"]["chunks"])
    return MaskedVector(EAST, "update", vector["entries"], vector["ring_bits"] // 8, digests)


def open_with(w: World, good: Vector, share: bytes) -> None:
    """Open the known sum with one of east's shares replaced: three answers at threshold three have no spare."""
    survivors = w.mask(w.share(w.advertise()), missing=[FAR])
    w.confirm(survivors)
    answers = {
        n: UnmaskShares(n, "update", unhex(good["owners"][n]["seed_shares"]), unhex(good["owners"][n]["key_shares"]))
        for n in survivors
    }
    answers[EAST].seed_shares["mid"] = share
    w.coordinator.unmasked(answers)


def test_the_good_neighbours_of_the_bad_vectors_are_accepted() -> None:
    """The control: the same inputs unchanged pass, so the bad ones fail for what is bad about them."""
    good = load("sum_24")
    w = world(24)
    bundles = [bundle_of(n, good["owners"][n]["bundle"]) for n in w.names]
    w.owners[EAST].advertise()
    w.owners[EAST].share_keys(bundles)
    assert wire.decode(KeyBundle, wire.encode(bundles[1])) == bundles[1]
    assert wire.encode(bundles[1]) + b"\0" == bytes.fromhex(load("bundle_bad_trailing")["bytes"])
    check_chunks(head_of(good), [bytes.fromhex(good["owners"]["east"]["masked"])])
    share_from_bytes(bytes.fromhex(good["owners"]["east"]["seed_shares"]["mid"]))
    open_with(world(24), good, bytes.fromhex(good["owners"]["east"]["seed_shares"]["mid"]))
    v1 = bytes.fromhex(good["v1"])
    label, message = keys.survivors_message(bytes.fromhex(good["context"]), v1, NAMES[:4], good["survivors"])
    signed = SurvivorSignature(MID, "update", bytes.fromhex(good["owners"]["mid"]["confirmation"]))
    IDENTITIES[MID].public.verify(label, message, signed.signature)
    sparse = load("sparse_24")["owners"]["east"]
    feed_sparse({"step": "signers", "signers": sparse["shown"]})
    bad = load("graph_bad_threshold")
    graph.check(bad["owners"], bad["neighbours"], bad["threshold"] + 1, bad["corruption"], bad["dropout"])
