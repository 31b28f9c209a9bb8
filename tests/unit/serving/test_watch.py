"""Hot load: what is served follows the aliases, and a bad version or a lost source changes nothing."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from unit.serving.registry_fake import FakeSource, make_version, with_manifest_of
from unit.serving.tiny_llama import BASE, make_adapter, make_forcing_adapter, running_engine

from fedllm.clock import FakeClock
from fedllm.errors import DecodeError, DigestMismatch, NotFound, PeerUnavailable, ProcessDied, SignatureInvalid
from fedllm.serving.engine import GenerationRequest, SamplingParams
from fedllm.serving.metrics import Counters
from fedllm.serving.tenants import Tenant
from fedllm.serving.versions import Versions
from fedllm.serving.watch import AliasWatcher

ALIAS = "acme/tools"
ACME = Tenant("acme", "0" * 64, (ALIAS, "base"))


@asynccontextmanager
async def watching(folder, **sizes):
    """Run an engine, a fake source and a watcher that the test polls by hand."""
    async with running_engine(folder, **sizes) as engine:
        source = FakeSource()
        versions = Versions(engine, source, "tiny")
        yield engine, source, versions, AliasWatcher(source, engine, versions, Counters(), FakeClock())


async def say(engine, lease, count: int = 8) -> list[int]:
    """Generate under a lease and end it."""
    with lease:
        stream = engine.generate(lease, GenerationRequest((1, 2), SamplingParams(max_tokens=count)))
        try:
            return [t async for chunk in stream for t in chunk.token_ids]
        finally:
            await stream.aclose()


def test_a_swap_keeps_running_requests_on_their_version(tiny_folder, drive) -> None:
    """Requests admitted before a flip end on the old version, later ones use the new; the old slot is freed."""

    async def body():
        async with watching(tiny_folder, slots=2) as (engine, source, versions, watcher):
            tokens = []
            for number in range(1, 7):
                source.publish(ALIAS, make_version(make_forcing_adapter(tiny_folder, 40 + number), number))
                polling = asyncio.create_task(watcher.poll())
                if number > 1:
                    lease = await versions.lease(ALIAS, ACME)
                    tokens.append(set(await say(engine, lease, 60)))
                await polling
                tokens.append(set(await say(engine, await versions.lease(ALIAS, ACME))))
                await watcher.drained()
            assert len(engine.loaded()) == 1
            assert versions.served.epoch == 6
            return tokens

    tokens = drive(body())
    assert all(len(said) == 1 for said in tokens)
    assert tokens[-1] == {46}


def test_a_bad_version_is_refused_and_the_old_one_serves_on(tiny_folder, drive) -> None:
    """Too big a rank, another base, another state, NaN logits: refused with a reason, counted, not retried."""

    async def body():
        async with watching(tiny_folder, max_rank=4) as (engine, source, versions, watcher):
            good = source.publish(ALIAS, make_version(make_adapter(1), 1))
            await watcher.poll()
            other = make_version(make_adapter(2), 2)
            bad = [
                (make_version(make_adapter(3, rank=8), 2), "adapter-invalid"),
                (make_version(make_adapter(3, base="a" * 64), 3), "base-mismatch"),
                (with_manifest_of(make_version(make_adapter(4), 4), other), "adapter-invalid"),
                (make_version(make_adapter(5, scale=1e18), 5), "adapter-invalid"),
                (replace(other, files={}), "adapter-invalid"),
            ]
            for version, code in bad:
                digest = source.publish(ALIAS, version)
                await watcher.poll()
                refusal = watcher.refused[ALIAS]
                assert (refusal.digest, refusal.code) == (digest, code)
                assert refusal.reason
                fetches = source.fetches
                source.publish("acme/other", make_version(make_adapter(1), 1))
                await watcher.poll()
                assert source.fetches <= fetches + 1
                with await versions.lease(ALIAS, ACME) as lease:
                    assert lease.digest == good
            await watcher.drained()
            assert engine.loaded() == (good,)
            assert watcher._counters.value("fedllm_versions_refused_total") == len(bad)
            source.publish(ALIAS, make_version(make_adapter(6), 6))
            await watcher.poll()
            assert watcher.refused == {}

    drive(body())


def test_a_lost_source_changes_nothing_and_is_asked_again(tiny_folder, drive) -> None:
    """While the source is away the loaded version serves; when it is back the missed change is applied."""

    async def body():
        async with watching(tiny_folder) as (_engine, source, versions, watcher):
            first = source.publish(ALIAS, make_version(make_adapter(1), 1))
            task = asyncio.create_task(watcher.run())
            await watcher.synced.wait()
            source.failure = PeerUnavailable("registry does not answer")
            second = source.publish(ALIAS, make_version(make_adapter(2), 2))
            while watcher.source_error is None:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            with await versions.lease(ALIAS, ACME) as lease:
                assert lease.digest == first
            source.failure = None
            while versions.served.versions[ALIAS].digest != second or watcher.source_error:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            task.cancel()

    drive(body())


def test_an_alias_that_disappears_is_not_served(tiny_folder, drive) -> None:
    """Withdrawing an alias ends it for new requests and frees its slot."""

    async def body():
        async with watching(tiny_folder) as (engine, source, versions, watcher):
            source.publish(ALIAS, make_version(make_adapter(1), 1))
            await watcher.poll()
            source.withdraw(ALIAS)
            await watcher.poll()
            await watcher.drained()
            assert engine.loaded() == ()
            with pytest.raises(NotFound):
                await versions.lease(ALIAS, ACME)

    drive(body())


def test_pins_reach_older_versions_of_the_same_federation_only(tiny_folder, drive) -> None:
    """`@vN` and `@digest8` load on demand; other federations, other tenants and unknown pins look alike."""

    async def body():
        async with watching(tiny_folder, slots=2) as (_engine, source, versions, watcher):
            first = source.publish(ALIAS, make_version(make_adapter(1), 1))
            second = source.publish(ALIAS, make_version(make_adapter(2), 2))
            foreign = source.publish("rival/tools", make_version(make_adapter(3), 1, "secret"))
            source.withdraw("rival/tools")
            await watcher.poll()
            for model, digest in [
                ("tiny", BASE), (ALIAS, second), (f"{ALIAS}@v1", first), (f"{ALIAS}@v2", second),
                (f"{ALIAS}@{first[:8]}", first), (f"{ALIAS}@{first}", first),
            ]:  # fmt: skip
                with await versions.lease(model, ACME) as lease:
                    assert lease.digest == digest
            nobody = Tenant("nobody", "0" * 64)
            for model, tenant in [
                (f"{ALIAS}@{foreign[:8]}", ACME), (f"{ALIAS}@v9", ACME), (f"{ALIAS}@{first[:7]}", ACME),
                ("rival/tools", ACME), ("gpt-4", ACME), (ALIAS, nobody), ("tiny", nobody),
            ]:  # fmt: skip
                with pytest.raises(NotFound, match="does not exist here"):
                    await versions.lease(model, tenant)

    drive(body())


@pytest.mark.parametrize("failure", [OSError("text"), AttributeError("text"), RecursionError("text")])
def test_an_unforeseen_failure_of_the_source_ends_nothing(tiny_folder, drive, failure) -> None:
    """Whatever the source raises is shown by its kind, and following goes on when it is back."""

    async def body():
        async with watching(tiny_folder) as (_engine, source, versions, watcher):
            source.failure = failure
            task = asyncio.create_task(watcher.run())
            while watcher.source_error is None:
                assert not task.done()
                await asyncio.sleep(0.01)
            assert watcher.source_error == type(failure).__name__
            digest = source.publish(ALIAS, make_version(make_adapter(1), 1))
            source.failure = None
            await watcher.synced.wait()
            assert versions.served.versions[ALIAS].digest == digest
            assert watcher.source_error is None
            task.cancel()

    drive(body())


@pytest.mark.parametrize(
    "failure",
    [DigestMismatch("x"), DecodeError("x"), NotFound("x"), SignatureInvalid("x"), ProcessDied("x"), OSError("x")],
)
def test_a_torn_download_is_shown_and_tried_again(tiny_folder, drive, monkeypatch, failure) -> None:
    """Refused and counted once while it lasts, taken live when it is over; other aliases do not wait for it."""
    monkeypatch.setattr("fedllm.serving.watch._FIRST_PAUSE_S", 0.01)

    async def body():
        async with watching(tiny_folder) as (_engine, source, versions, watcher):
            fetch, tries = source.fetch, 0
            torn = make_version(make_adapter(1), 1).version.digest

            async def tear(digest):
                nonlocal tries
                tries += digest == torn
                if digest == torn and tries < 3:
                    raise failure
                return await fetch(digest)

            source.fetch = tear
            assert source.publish(ALIAS, make_version(make_adapter(1), 1)) == torn
            source.publish("acme/other", make_version(make_adapter(2), 2))
            await watcher.poll()
            assert (watcher.refused[ALIAS].digest, watcher.refused[ALIAS].final) == (torn, False)
            assert watcher.synced.is_set()
            assert set(versions.served.versions) == {"acme/other"}
            await watcher.poll()
            await watcher.poll()
            assert versions.served.versions[ALIAS].digest == torn
            assert watcher.refused == {}
            assert watcher._counters.value("fedllm_versions_refused_total") == 1

    drive(body())


def test_a_torn_version_nobody_points_at_is_forgotten(tiny_folder, drive) -> None:
    """When its alias is withdrawn nothing is left to try."""

    async def body():
        async with watching(tiny_folder) as (_engine, source, _versions, watcher):
            source.stored.pop(source.publish(ALIAS, make_version(make_adapter(1), 1)))
            await watcher.poll()
            assert set(watcher.refused) == {ALIAS}
            source.withdraw(ALIAS)
            await watcher.poll()
            assert watcher.refused == {}

    drive(body())
