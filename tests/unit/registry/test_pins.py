"""Pins: one version found by number or digest, verified alone, and never another one than was asked for."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from fedllm.adapter import AdapterSpec, AdapterState
from fedllm.clock import FakeClock
from fedllm.errors import DecodeError, DigestMismatch, SignatureInvalid
from fedllm.identity import SigningIdentity, VerifyKey
from fedllm.ids import Digest
from fedllm.messages.plan import Recipe
from fedllm.registry.model import AdapterVersion, PrivacyRecord
from fedllm.registry.pins import VersionFinder, find_version
from fedllm.registry.remote import HttpVersionSource, LocalVersionSource, manifest_to_json
from fedllm.registry.store import Registry, VersionDraft
from fedllm.rng import SeededRng

SPEC = AdapterSpec(Digest("ab" * 32), 2, 4, {"q_proj": (6, 4)}, (0, 1))
KEY = SigningIdentity.from_seed(b"\x01" * 32)
OTHER = SigningIdentity.from_seed(b"\x02" * 32)


def add(registry: Registry, number: int, federation: str = "tools") -> AdapterVersion:
    """Add a version."""
    draft = VersionDraft(
        federation=federation, base_name="base", parent=None, round=number, method="ffa",
        recipe=Recipe("sgd", 1.0, 2, 8, 8, 160), metrics={},
        privacy=PrivacyRecord("record", "add-or-remove-one", None, 1e-5, "all", "advisory"),
        cohort_size=4, survivors=3, plan=Digest("cd" * 32),
    )  # fmt: skip
    return registry.add(AdapterState.initial(SPEC, SeededRng(f"{federation}{number}")), draft, KEY)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """Return a registry of five versions of one federation and one of another."""
    made = Registry(tmp_path / "registry", KEY.public, FakeClock())
    for number in range(1, 6):
        add(made, number)
    add(made, 1, "legal")
    return made


class Listing:
    """A registry over HTTP: by its index as now, or by listing everything whatever is asked, as before."""

    def __init__(self, registry: Registry, *, index: bool) -> None:
        self.registry = registry
        self.index = index
        self.asked: list[dict[str, str]] = []
        self.change: Any = lambda row: row

    def __call__(self, request: httpx.Request) -> httpx.Response:
        """Answer one read."""
        asked = dict(request.url.params)
        self.asked.append(asked)
        found = self.registry.signed_versions()
        if self.index and asked:
            one = self.registry.find_signed(asked["federation"], asked["pin"])
            found = [] if one is None else [one]
        rows = [manifest_to_json(each, AdapterVersion.of(each.open(KEY.public))) for each in found]
        return httpx.Response(200, json={"versions": [self.change(row) for row in rows]})


def over_http(listing: Listing, key: VerifyKey = KEY.public) -> HttpVersionSource:
    """Return a source that reads a listing."""
    client = httpx.AsyncClient(transport=httpx.MockTransport(listing), base_url="http://test")
    return HttpVersionSource("http://test", key, client=client)


class OnlyLists:
    """A source that cannot find: the naive twin."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry

    async def versions(self) -> list[AdapterVersion]:
        """Return all versions."""
        return self.registry.versions()


@pytest.mark.parametrize("kind", ["index", "old", "folder"])
def test_every_source_finds_what_a_search_of_all_finds(registry: Registry, tmp_path: Path, kind: str) -> None:
    """Against listing all versions and matching: the same version, or none, for every federation and pin."""
    source: Any
    if kind == "folder":
        source = LocalVersionSource(tmp_path / "registry", KEY.public, FakeClock())
    else:
        source = over_http(Listing(registry, index=kind == "index"))
    assert isinstance(source, VersionFinder)
    naive: Any = OnlyLists(registry)
    assert not isinstance(naive, VersionFinder)
    digests = [v.digest for v in registry.versions()]
    pins = ["v1", "v3", "v003", "v9", "v", "", "V1", "v1 ", "%" * 8, "________", "v1234567890", "0" * 8, digests[0][:7]]
    pins += [digest[:length] for digest in digests for length in (8, 20, 64)] + [digests[0] + "0", digests[0].upper()]

    async def scenario() -> None:
        found = 0
        for federation in ("tools", "legal", "nope"):
            for pin in pins:
                expected = await find_version(naive, federation, pin)
                assert await find_version(source, federation, pin) == expected, (federation, pin)
                found += expected is not None
        assert found == (2 + 1 + 5 * 3) + (1 + 3)

    asyncio.run(scenario())


class Counting(VerifyKey):
    """A pinned key that notes on which thread it is used."""

    def verify(self, context: str, message: bytes, signature: bytes) -> None:
        """Verify and note."""
        USED_ON.append(threading.get_ident())
        super().verify(context, message, signature)


USED_ON: list[int] = []


@pytest.mark.parametrize("index", [True, False])
def test_one_version_is_verified_and_not_on_the_event_loop(registry: Registry, index: bool) -> None:
    """Even where all versions are listed, one signature is checked, by another thread."""
    USED_ON.clear()
    version = asyncio.run(over_http(Listing(registry, index=index), Counting(KEY.public.raw)).find("tools", "v4"))
    assert version is not None
    assert version.name == "tools@v4"
    assert len(USED_ON) == 1
    assert USED_ON[0] != threading.get_ident()


def test_two_versions_of_one_beginning_are_none(registry: Registry) -> None:
    """A pin that two digests begin with means nothing; nobody picks for the app."""
    digest = registry.versions()[0].digest
    listing = Listing(registry, index=False)
    listing.change = lambda row: {**row, "digest": digest[:8] + row["digest"][8:]}
    assert asyncio.run(over_http(listing).find("tools", digest[:8])) is None


def test_a_registry_cannot_pass_one_version_for_another(registry: Registry) -> None:
    """What a row says of itself picks it, and is not believed: name, federation, digest and signature are checked."""
    by_number = {v.number: v for v in registry.versions() if v.manifest.federation == "tools"}

    def claims(**said: Any) -> Any:
        return lambda row: {**row, **said} if row["name"] == "tools@v2" else {**row, "number": 99, "digest": "0" * 64}

    async def find(pin: str, said: dict[str, Any], key: VerifyKey = KEY.public, federation: str = "tools") -> Any:
        listing = Listing(registry, index=False)
        listing.change = claims(**said)
        return await over_http(listing, key).find(federation, pin)

    assert asyncio.run(find("v2", {})).name == "tools@v2"
    with pytest.raises(DigestMismatch, match=r"tools@v4 asked for, tools@v2"):
        asyncio.run(find("v4", {"number": 4}))
    with pytest.raises(DigestMismatch):
        asyncio.run(find(by_number[4].digest[:12], {"digest": by_number[4].digest}))
    with pytest.raises(DigestMismatch):
        asyncio.run(find("v2", {"federation": "legal"}, federation="legal"))
    with pytest.raises(SignatureInvalid):
        asyncio.run(find("v2", {}, key=OTHER.public))


@pytest.mark.parametrize("body", ["[]", "{}", '{"versions": {}}', '{"versions": [1]}', "nonsense", "[" * 10_000])
def test_an_answer_that_is_no_list_is_said_so(body: str) -> None:
    """Whatever a registry answers, a malformed list is one kind of error."""
    client = httpx.AsyncClient(
        transport=httpx.MockTransport(lambda _request: httpx.Response(200, text=body)), base_url="http://test"
    )
    source = HttpVersionSource("http://test", KEY.public, client=client)
    for call in (source.find("tools", "v1"), source.versions()):
        with pytest.raises(DecodeError):
            asyncio.run(call)


def test_what_is_no_pin_is_not_asked_for(registry: Registry) -> None:
    """A tenant's text that can mean no version does not reach the registry."""
    listing = Listing(registry, index=True)
    for pin in ("", "latest", "abc", "../..", "v-1", "0" * 65):
        assert asyncio.run(find_version(over_http(listing), "tools", pin)) is None
    assert listing.asked == []
