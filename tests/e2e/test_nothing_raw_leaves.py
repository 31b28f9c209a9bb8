"""Nothing raw leaves: every message of a whole round is kept, decoded, searched, and held against what it hides.

Four real daemons train a real (tiny) model under DP; once over a carrier in memory, once over real Flower processes.
The bound on a correlation is five standard deviations, 5/sqrt(d): for honest uniform masks one comparison is beyond it
with probability 6e-7 (normal approximation); a run of one carrier makes 43 comparisons, so it raises a false alarm
once in about 40 000 runs. The chi-square tests (4 a carrier, two-sided at 1e-7 a side) add one in a million.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import itertools
import math
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from captured_round import (
    OWNERS,
    CapturedRound,
    KeepingTrainer,
    Message,
    in_memory,
    make_private_data,
    over_flower,
)
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from leaks import (
    Patterns,
    Search,
    centred,
    correlation,
    leaves,
    private_texts,
    ring_patterns,
    scalar_patterns,
    text_forms,
    text_patterns,
    token_patterns,
    uniformity,
    unpack,
    vector_patterns,
    views,
)

from fedllm.aggregation.plain import plain_sum
from fedllm.aggregation.secagg.keys import KEY_BYTES, SEALED_BYTES, SIGNATURE_BYTES
from fedllm.aggregation.secagg.shamir import SHARE_BYTES
from fedllm.client.dataset import ChatTokenizer, open_dataset
from fedllm.client.sandbox import probe
from fedllm.client.trainer import Trained, Trainer
from fedllm.errors import DataError, DecodeError
from fedllm.messages.envelope import COORDINATOR
from fedllm.messages.round import BODIES, HelloReply, Masked, Refused, decode_body
from fedllm.messages.secagg import PURPOSE_EVALUATION, PURPOSE_UPDATE, MaskedVector
from fedllm.server.ports import RoundState

pytestmark = pytest.mark.timeout(200)
DOWN = {
    "Hello", "Begin", "Retry", "FetchAdvertise", "ShareKeys", "SendMasked", "Confirm", "Unmask", "Evaluate",
    "FetchScores", "Close",
}  # fmt: skip
UP = {
    "HelloReply", "Started", "Pending", "Advertised", "SharedKeys", "Masked", "Complained", "Confirmed", "Unmasked",
    "Scoring", "Closed", "Refused",
}  # fmt: skip
RARELY = {"Retry", "FetchAdvertise", "FetchScores", "Started", "Scoring", "Pending", "Complained"}
"""What a round without failures, on a machine that is quick enough, does not need."""
SUMS = ("update", "evaluation")
BYTES_UP = {
    "HelloReply.challenge": 32,
    **{f"Advertised.{s}.{k}": KEY_BYTES for s in SUMS for k in ("cipher_key", "mask_key")},
    **{f"Advertised.{s}.signature": SIGNATURE_BYTES for s in SUMS},
    **{f"SharedKeys.{s}.seed_commitment": KEY_BYTES for s in SUMS},
    **{f"SharedKeys.{s}.ciphertexts{{}}": SEALED_BYTES for s in SUMS},
    "Masked.vector.chunks[]": 32,
    "Confirmed.signature.signature": SIGNATURE_BYTES,
    "Unmasked.shares.seed_shares{}": SHARE_BYTES,
    "Unmasked.shares.key_shares{}": SHARE_BYTES,
}
"""Every byte string that goes up, and its one length; only the parts of `Masked` are longer, by the plan."""
PUBLIC_UP = {
    "HelloReply.owner", "HelloReply.release", "Pending.stage",
    *(f"{m}.{s}.{f}" for m in ("Advertised", "SharedKeys") for s in SUMS for f in ("owner", "purpose")),
    *(f"SharedKeys.{s}.ciphertexts{{key}}" for s in SUMS),
    *(f"Masked.vector.{f}" for f in ("owner", "purpose", "entries", "entry_bytes")),
    *(f"Confirmed.signature.{f}" for f in ("owner", "purpose")),
    *(f"Unmasked.shares.{f}" for f in ("owner", "purpose", "seed_shares{key}", "key_shares{key}")),
}  # fmt: skip
"""Names and lengths that the plan says anyway."""
MEASURED_UP = {
    "Advertised.train_s", "Started.expected_s", "Scoring.expected_s", "Pending.done", "Pending.total",
    "Pending.retry_after_s",
}  # fmt: skip
"""The numbers in clear that an owner's machine makes: how long training took, last took, and how far it is."""
LONGEST_USUAL_WORD = 8
"""Names and numbers of the records are longer than this; words such as "please" and "start" are not."""
FLOWER = pytest.param("flower", marks=pytest.mark.flower)
CARRIERS = ("memory", FLOWER)
only_flower = pytest.mark.parametrize("captured", [FLOWER], indirect=True)


@pytest.fixture(scope="module", params=CARRIERS)
def captured(request: pytest.FixtureRequest, tiny_base: Path) -> Iterator[CapturedRound]:
    """Return a whole round with every message of it, over each carrier."""
    root = Path(tempfile.mkdtemp(prefix="nr", dir="/tmp"))  # short enough for sockets
    try:
        data = {owner: make_private_data(root / "data" / owner, owner) for owner in OWNERS}
        found = CapturedRound(root, data)
        with pytest.MonkeyPatch.context() as patch:
            found.hidden.spy(patch)
            asyncio.run((over_flower if request.param == "flower" else in_memory)(found, tiny_base))
        assert found.record is not None
        assert found.record.state is RoundState.JUDGED, found.record.reason
        yield found
    finally:
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="module")
def secrets(captured: CapturedRound, tiny_base: Path) -> Search:
    """Return everything that must not be found, of every owner, in every form."""
    found: Patterns = {}
    tokenizer = ChatTokenizer(tiny_base)
    for owner in OWNERS:
        found |= text_patterns(private_texts(captured.data[owner]), f"text of {owner}")
        dataset = open_dataset(captured.data[owner], tokenizer, max_tokens=200)
        found |= token_patterns([e.input_ids for e in (*dataset.train, *dataset.heldout)], f"record of {owner}")
        found |= vector_patterns(captured.hidden.updates[owner], f"update of {owner}")
        for purpose in (PURPOSE_UPDATE, PURPOSE_EVALUATION):
            found |= ring_patterns(captured.hidden.vectors[owner, purpose], f"plain {purpose} of {owner}")
        for loss in captured.hidden.losses[owner]:
            found |= scalar_patterns(loss, f"held-out loss of {owner}")
        key = captured.identities[owner]._key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())
        named = {"home": str(captured.root / owner), "data": str(captured.data[owner]), "dataset": dataset.digest}
        for what, text in named.items():
            found |= {form: f"{what} of {owner} as {name}" for name, form in text_forms(text)}
        found |= {key: f"key of {owner}", key.hex().encode(): f"key of {owner}"}
        found |= {bytes.fromhex(dataset.digest): f"dataset of {owner}"}
    return Search(found)


def _haystacks(messages: list[Message]) -> dict[str, bytes]:
    return {
        f"{i} {m.owner} {m.envelope.kind} {name}": data
        for i, m in enumerate(messages)
        for name, data in views(m.raw, m.body, m.parts).items()
    }


def _files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@dataclasses.dataclass(frozen=True)
class Sent:
    """A masked vector with the chunks that its head names."""

    head: MaskedVector
    chunks: tuple[bytes, ...]
    entry_bytes: int


def _masked(captured: CapturedRound, purpose: str) -> dict[str, Sent]:
    return {
        m.owner: Sent(m.body.vector, m.parts, m.body.vector.entry_bytes)
        for m in captured.messages
        if m.up and isinstance(m.body, Masked) and m.body.vector.purpose == purpose
    }


def test_every_message_is_of_an_allowed_kind_and_direction(captured: CapturedRound) -> None:
    """What crosses is a signed envelope whose body decodes strictly as a known type, each in its direction."""
    assert set(BODIES) == UP | DOWN, "a new kind of message must be given its direction here"
    assert not UP & DOWN
    kinds: dict[bool, set[str]] = {True: set(), False: set()}
    for message in captured.messages:
        envelope = message.envelope
        kinds[message.up].add(envelope.kind)
        assert type(message.body).__name__ == envelope.kind
        ends = (envelope.sender, envelope.receiver)
        assert ends == (message.owner, COORDINATOR) if message.up else ends in {
            (COORDINATOR, message.owner), (COORDINATOR, ""),
        }  # fmt: skip
    assert DOWN - RARELY <= kinds[False] <= DOWN, "a whole round was captured"
    assert UP - RARELY - {"Refused"} <= kinds[True] <= UP - {"Refused"}
    with pytest.raises(DecodeError):
        decode_body("Update", captured.messages[0].envelope.body)


def test_the_carrier_carried_nothing_else(captured: CapturedRound) -> None:
    """Both ends of the carrier saw the same bytes: there is no message beside those that are checked here."""
    assert {data for _, data in captured.sent} >= {data for _, data in captured.arrived}
    assert {reply for _, reply in captured.answered} >= {reply for _, reply in captured.received}
    assert len({node for node, _ in captured.sent}) == len(OWNERS)
    assert captured.received


def test_no_private_text_tokens_vectors_or_names_are_in_any_message(captured: CapturedRound, secrets: Search) -> None:
    """Words, records, token ids, updates, plain vectors, losses, keys and paths: in no message, in no form."""
    assert len(secrets.patterns) > 50_000
    assert secrets.find(_haystacks(captured.messages)) == []


def test_the_search_finds_what_is_planted(captured: CapturedRound, secrets: Search, tiny_base: Path) -> None:
    """The control: one record, in each form it could leave in, hidden in messages that are otherwise honest."""
    (text,) = private_texts(captured.data["west"])[4:5]
    ids = open_dataset(captured.data["west"], ChatTokenizer(tiny_base), max_tokens=200).heldout[0].input_ids
    update, plain = captured.hidden.updates["west"][100:140], captured.hidden.vectors["west", PURPOSE_UPDATE]
    word = text.split()[-1].encode()
    honest = next(m for m in captured.messages if m.up and isinstance(m.body, Masked))
    noise = b"".join(_masked(captured, PURPOSE_UPDATE)["west"].chunks)
    planted = {
        "a word": word, "base64": base64.b64encode(b"x" + text.encode()), "hex": text.encode().hex().encode(),
        "utf-16": text.encode("utf-16"), "zlib": zlib.compress(text.encode()),
        "int32 tokens": np.asarray(ids, "<i4").tobytes(), "int64 tokens": np.asarray(ids, "<i8").tobytes(),
        "float32": update.tobytes(), "float16": update.astype("<f2").tobytes(),
        "bfloat16": (update.view("<u4") >> 16).astype("<u2").tobytes(),
        "plain ring": plain[:40].astype("<u4").tobytes(),
        "plain packed": plain[:40].astype("<u4").view(np.uint8).reshape(-1, 4)[:, :3].tobytes(),
        "a byte plane": np.insert(np.frombuffer(noise[:900], np.uint8).reshape(-1, 2)[: len(text)], 0,
                                  np.frombuffer(text.encode(), np.uint8), axis=1).tobytes(),
        "a loss": np.float64(captured.hidden.losses["west"][0]).astype(">f8").tobytes(),
    }  # fmt: skip
    for name, data in planted.items():
        # as a field of its own, as compressed data would be; and in the middle of one
        chunks = (noise[:300], data, noise[300:]) if name == "zlib" else (noise[:300] + data + noise[300:],)
        vector = MaskedVector(honest.body.vector.owner, PURPOSE_UPDATE, 1, 3, chunks)  # type: ignore[union-attr]
        assert secrets.find(views(noise, Masked(vector))), name
        assert secrets.find(views(noise, honest.body, chunks)), name
    refused = Refused("failed", f"could not parse {text!r}", None)
    assert secrets.find(views(b"", refused))
    clean = _masked(captured, PURPOSE_UPDATE)["west"]
    assert secrets.find(views(noise, Masked(clean.head), clean.chunks)) == []


def test_a_masked_vector_tells_nothing_of_the_update_it_hides(captured: CapturedRound) -> None:
    """No sent vector, byte plane, or sum of sent vectors correlates with what it hides; without masks all do."""
    bits = captured.plan.ring.bits
    size = len(captured.hidden.updates["east"])
    bound = 5 / math.sqrt(size)
    sent = {o: unpack(v.chunks, v.entry_bytes)[:size] for o, v in _masked(captured, PURPOSE_UPDATE).items()}
    plain = {o: captured.hidden.vectors[o, PURPOSE_UPDATE][:size] for o in OWNERS}
    assert set(sent) == set(OWNERS)
    for masked_of, hidden_of in itertools.product(OWNERS, OWNERS):
        update = captured.hidden.updates[hidden_of]
        assert abs(correlation(centred(sent[masked_of], bits), update)) <= bound, (masked_of, hidden_of)
    for owner, plane in itertools.product(OWNERS, range(bits // 8)):
        of_sent, of_plain = ((v[owner] >> np.uint32(8 * plane)) & np.uint32(255) for v in (sent, plain))
        assert abs(correlation(of_sent, of_plain)) <= bound, (owner, plane)
    for count in range(1, len(OWNERS) + 1):  # pairwise masks cancel in sums, self masks do not
        for subset in itertools.combinations(OWNERS, count):
            hidden = plain_sum([plain[o] for o in subset], bits).astype(np.float64)
            added = centred(plain_sum([sent[o] for o in subset], bits), bits)
            assert abs(correlation(added, hidden)) <= bound, subset
    for owner in OWNERS:  # the control: the same vectors with masking off
        assert correlation(centred(plain[owner], bits), captured.hidden.updates[owner]) > 0.9


def test_masked_bytes_are_uniform(captured: CapturedRound) -> None:
    """Chi-square over the 256 values of a byte: masked vectors pass, and so does no plain one."""
    for owner, vector in _masked(captured, PURPOSE_UPDATE).items():
        assert 1e-7 < uniformity(b"".join(vector.chunks)) < 1 - 1e-7, owner
        plain = captured.hidden.vectors[owner, PURPOSE_UPDATE].astype("<u4").view(np.uint8).reshape(-1, 4)[:, :3]
        assert uniformity(plain.tobytes()) < 1e-100
    for owner, vector in _masked(captured, PURPOSE_EVALUATION).items():  # nine entries: too few to correlate
        hidden = captured.hidden.vectors[owner, PURPOSE_EVALUATION]
        assert not np.any(unpack(vector.chunks, vector.entry_bytes) == hidden), owner


def test_what_an_owner_says_in_clear_is_listed(captured: CapturedRound) -> None:
    """Every field that goes up is a public name, a number of the plan, keys of fixed length, or a duration."""
    public = {*OWNERS, PURPOSE_UPDATE, PURPOSE_EVALUATION, "test", "training", "scoring"}
    entries = {len(v): 4 if purpose == PURPOSE_EVALUATION else captured.plan.ring.entry_bytes
               for (_, purpose), v in captured.hidden.vectors.items()}  # fmt: skip
    for message in (m for m in captured.messages if m.up):
        body = message.body
        for path, value in ((f"{message.envelope.kind}.{p}", v) for p, v in leaves(body)):
            if isinstance(value, bytes):
                assert len(value) == BYTES_UP[path], path
            elif path in PUBLIC_UP:
                assert value in public | set(entries) | set(entries.values()), path
            else:
                assert path in MEASURED_UP, f"{path} goes up in clear and is not listed"
                assert isinstance(value, int | float)
        if isinstance(body, Masked):
            vector = body.vector
            assert len(b"".join(message.parts)) == vector.entries * entries[vector.entries]
        else:
            assert message.parts == ()
    started = [m.body for m in captured.messages if m.envelope.kind in {"Started", "Scoring"}]
    assert {body.expected_s for body in started} <= {0.0}  # type: ignore[union-attr]


def test_no_array_of_an_updates_size_has_another_way_out(captured: CapturedRound) -> None:
    """No list of numbers goes up at all, and no byte string but a masked vector has room for half a byte an entry."""
    entries = captured.hidden.updates["east"].size
    for message in (m for m in captured.messages if m.up):
        fields = list(leaves(message.body))
        assert not [path for path, value in fields if "[]" in path and not isinstance(value, bytes)]
        assert sum(isinstance(value, int | float) for _, value in fields) <= 3
        if not isinstance(message.body, Masked):
            assert len(message.raw) < entries / 2
    for purpose in (PURPOSE_UPDATE, PURPOSE_EVALUATION):  # a length that differs between owners would tell something
        sent = _masked(captured, purpose).values()
        assert len({(v.head.entries, v.entry_bytes, *map(len, v.chunks)) for v in sent}) == 1


def test_the_opened_sums_are_the_plain_sums_bit_for_bit(captured: CapturedRound) -> None:
    """What the coordinator opens is the sum of the four vectors that were hidden, and nothing else."""
    update, scores = captured.hidden.opened
    for opened, purpose, bits in (
        (update, PURPOSE_UPDATE, captured.plan.ring.bits),
        (scores, PURPOSE_EVALUATION, 32),
    ):
        expected = plain_sum([captured.hidden.vectors[owner, purpose] for owner in OWNERS], bits)
        assert opened.tobytes() == expected.tobytes()


@only_flower
@pytest.mark.skipif(probe().kind != "landlock", reason=f"the relay cannot be isolated here: {probe().why}")
def test_the_relay_cannot_read_what_it_must_not(captured: CapturedRound) -> None:
    """Under the very restrictions of the running SuperNode, key, ledger and data cannot be opened; it holds none."""
    for owner in OWNERS:
        found = captured.isolation[owner]
        for process in ("app host", "supernode"):
            for name in ("owner.pem", "ledger.jsonl", "train.jsonl", "heldout.jsonl"):
                assert found[f"{process} {name}"] == "PermissionError", (owner, process, name)
            assert found[f"{process} own.txt"] == "read", "the control: its own folder can be read"
            running = {k: v for k, v in found.items() if k.startswith(f"{process} no_new_privs ")}
            assert running
            assert set(running.values()) == {"1"}, "every process below is under a restriction"
        assert {v for k, v in found.items() if " holds " in k} == {"nothing"}


@only_flower
def test_flower_keeps_nothing_private_on_disk(captured: CapturedRound, secrets: Search) -> None:
    """The SuperLink's database, Flower's homes and all logs of its processes hold nothing of an owner's either."""
    link = captured.root / "c" / "f"
    assert (link / "superlink.db").is_file()
    # logs have words of their own, such as "start": only what is long enough to be an owner's is looked for
    secret = Search({p: what for p, what in secrets.patterns.items() if len(p) > LONGEST_USUAL_WORD})
    assert secret.find(_files(link)) == []
    # on the owner's own machine its paths are no secret
    local = Search({p: w for p, w in secret.patterns.items() if not w.startswith(("home of", "data of"))})
    for owner in OWNERS:
        home = captured.root / owner
        assert local.find(_files(home / "flower") | {"log": (home / "supernode.log").read_bytes()}) == []


@dataclass(frozen=True)
class TalkativeTrainer(KeepingTrainer):
    """A trainer that fails with a record in its error, as a careless library might."""

    kind: type[Exception]
    texts: list[str]

    def fit(self, *_arguments: object, charged: int = 0) -> Trained:  # type: ignore[override]
        """Fail."""
        raise self.kind(f"cannot train on {self.texts}")


@pytest.mark.parametrize("kind", [DataError, ValueError])
def test_an_error_that_quotes_a_record_does_not_carry_it_out(
    kind: type[Exception], tmp_path: Path, tiny_base: Path
) -> None:
    """Training fails with the record's text in its error: the refusal that leaves does not hold a word of it."""
    data = {owner: make_private_data(tmp_path / "data" / owner, owner) for owner in OWNERS}
    failed = CapturedRound(tmp_path / "r", data)

    def trainer_of(owner: str, trainer: Trainer) -> Trainer:
        return TalkativeTrainer(trainer, owner, failed.hidden, kind, private_texts(data[owner]))

    asyncio.run(in_memory(failed, tiny_base, trainer_of=trainer_of))
    assert failed.record is not None
    assert failed.record.state is RoundState.ABORTED
    refusals = [m for m in failed.messages if isinstance(m.body, Refused)]
    assert len({m.owner for m in refusals}) == len(OWNERS)
    patterns: Patterns = {}
    for owner in OWNERS:
        patterns |= text_patterns(private_texts(data[owner]), f"text of {owner}")
    assert Search(patterns).find(_haystacks(failed.messages)) == []
    long = Search({p: what for p, what in patterns.items() if len(p) > LONGEST_USUAL_WORD})
    assert long.find(_files(failed.root / "c")) == []
    assert not any(isinstance(m.body, Masked) for m in failed.messages)


def test_a_reply_names_its_owner_and_nothing_of_its_machine(captured: CapturedRound) -> None:
    """The answer to Hello is a name of the roster, the challenge, and a release."""
    replies = [m.body for m in captured.messages if isinstance(m.body, HelloReply)]
    assert {body.owner for body in replies if isinstance(body, HelloReply)} == set(OWNERS)
    assert {body.release for body in replies if isinstance(body, HelloReply)} == {"test"}
