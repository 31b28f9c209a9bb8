"""vLLM beside the engine: the provider against a server that is not vLLM, the gate, and what the document says."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from unit.benchmarks.fake_vllm import BROKEN, CUT, REFUSED, tokens

from benchmarks import serving, serving_vllm
from benchmarks.document import NOT_MEASURED, GateFailed
from benchmarks.serving_figures import CASES, STREAMS, TARGETS, Timing, judged, make_document, ratios, table
from benchmarks.serving_vllm import BASE_NAME, Vllm, vllm_server
from fedllm.errors import NotFound, PeerUnavailable, ProcessDied
from fedllm.serving.native.loader import read_config

FAKE = Path(__file__).with_name("fake_vllm.py")


def make_environment(folder: Path, script: str) -> Path:
    """Return an environment whose interpreter is a shell script."""
    (folder / "bin").mkdir(parents=True)
    program = folder / "bin" / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    (folder / ".installed").touch()
    return folder


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """Return one that runs the fake server; it writes ``seen.json`` beside itself."""
    shutil.copy(FAKE, tmp_path)
    return make_environment(tmp_path / "environment", f'exec {sys.executable} {tmp_path / FAKE.name} "$@"')


@pytest.fixture
def adapters(tiny_base: Path) -> list:
    """Return the benchmark's, for the tiny model."""
    return serving.make_adapters(read_config(tiny_base))


def seen(tmp_path: Path) -> dict:
    """Return how the fake server was started."""
    return json.loads((tmp_path / "seen.json").read_text())


def test_streams_are_read_token_by_token_and_no_process_is_left(
    tmp_path, tiny_base, environment, adapters, monkeypatch
) -> None:
    """Eight adapters are loaded from PEFT's files, and each stream gets its own model's tokens, all of them."""
    monkeypatch.setattr(serving, "SPIN_S", 0)
    prompts = [(9, *range(n)) for n in range(STREAMS)]
    names = [BASE_NAME, *serving.NAMES[1:]]

    async def body() -> tuple[str, list, float, float]:
        async with vllm_server(environment, tiny_base, "float32", adapters) as server:
            results = await server.generate(prompts, 5, names)
            timing = await serving.vllms(server, serving.NAMES, prompts, 3)
            return await server.version(), results, timing.ttft_s, timing.seconds

    version, results, ttft_s, seconds = asyncio.run(body())
    assert version == "0.0-fake"
    assert [each for each, _ in results] == [tokens(name, p, 5) for name, p in zip(names, prompts, strict=True)]
    assert 0 < ttft_s <= seconds
    started = seen(tmp_path)
    assert not psutil.pid_exists(started["pid"])
    assert not Path(started["cwd"]).exists()


def test_the_server_is_started_as_the_others_are_measured(tmp_path, tiny_base, environment, adapters) -> None:
    """One thread, loopback, no other host; LoRA with a slot an adapter, and none of it without adapters."""

    async def body(states: list) -> dict:
        async with vllm_server(environment, tiny_base, "float32", states):
            return seen(tmp_path)

    with_lora, without = asyncio.run(body(adapters)), asyncio.run(body([]))
    flags = " ".join(with_lora["argv"])
    assert flags.startswith("-m vllm.entrypoints.openai.api_server ")
    assert "--host 127.0.0.1 " in flags
    assert flags.endswith("--enable-lora --max-loras 8 --max-lora-rank 16")
    assert not any("lora" in each for each in without["argv"])
    environ = with_lora["environ"]
    assert environ["OMP_NUM_THREADS"] == environ["HF_HUB_OFFLINE"] == "1"
    assert environ["VLLM_CPU_OMP_THREADS_BIND"].isdigit()
    assert "PYTHONPATH" not in environ


@pytest.mark.parametrize(
    ("trouble", "said"),
    [(REFUSED, "/v1/completions with 404"), (BROKEN, "out of slots"), (CUT, "left in the middle")],
    ids=["refused", "broken", "cut"],
)
def test_a_stream_that_fails_is_no_timing(tiny_base, environment, trouble: int, said: str) -> None:
    """Three ways to fail, the last two after a token; each says what happened."""

    async def body() -> None:
        async with vllm_server(environment, tiny_base, "float32") as server:
            await server.generate([(9, 9), (trouble, 9)], 4, [BASE_NAME] * 2)

    with pytest.raises(PeerUnavailable, match=said):
        asyncio.run(body())


def test_a_server_that_ends_at_once_shows_its_log(tmp_path, tiny_base) -> None:
    """The reason that it gave is in the error."""
    broken = make_environment(tmp_path / "environment", "echo no such operator >&2; exit 3")

    async def body() -> None:
        async with vllm_server(broken, tiny_base, "float32"):
            raise AssertionError

    with pytest.raises(ProcessDied, match=r"ended with 3(?s:.)*no such operator"):
        asyncio.run(body())


def test_waiting_of_the_scheduler_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """It spins while the worker computes; counted, vLLM would look twice as dear as it is."""

    def process(name: str, user: float, system: float) -> SimpleNamespace:
        return SimpleNamespace(name=lambda: name, cpu_times=lambda: SimpleNamespace(user=user, system=system))

    children = [process("python", 1, 0.5), process("VLLM::EngineCore", 50, 7), process("VLLM::Worker", 10, 2)]
    fake = SimpleNamespace(children=lambda recursive: children if recursive else [])
    monkeypatch.setattr(serving_vllm.psutil, "Process", lambda pid: {7: fake}[pid])
    assert Vllm(None, 7).cpu_s() == 13.5


def test_without_its_environment_vllm_is_not_measured(tmp_path, tiny_base, monkeypatch, capsys) -> None:
    """The reason names the make target; one that make did not finish counts as missing; unasked says so."""
    half = tmp_path / "environment"
    make_environment(half, "exit 0")
    monkeypatch.setattr(serving, "ENVIRONMENT", half)
    assert serving.why_without(asked=True) is None
    (half / ".installed").unlink()
    reason = serving.why_without(asked=True)
    assert reason is not None
    assert reason.startswith("not measured: ")
    assert "make .venv-vllm/.installed" in reason
    assert "--with-vllm" in str(serving.why_without(asked=False))

    async def body() -> None:
        async with vllm_server(half, tiny_base, "float32"):
            raise AssertionError

    with pytest.raises(NotFound) as caught:
        asyncio.run(body())
    assert caught.value.hint == "make .venv-vllm/.installed"
    monkeypatch.setenv("FEDLLM_CACHE", str(tmp_path))
    assert serving.main(["--with-vllm", "--json"]) == NOT_MEASURED  # the flag is known, the base model missing
    assert "fedllm model pull" in json.loads(capsys.readouterr().out)["error"]


class _Judge:
    """Logits that depend on the adapter's name and the place."""

    def logits(self, tokens: list[int], name: str) -> torch.Tensor:
        gen = torch.Generator().manual_seed(sum(name.encode()))
        return torch.randn(len(tokens), 50, generator=gen)


class _Server:
    """Chooses greedily by the judge's logits; `mistaken` renames an adapter before."""

    def __init__(self, mistaken) -> None:
        self._mistaken = mistaken

    async def generate(self, prompts, out: int, names) -> list[tuple[list[int], float]]:
        rows = [
            _Judge().logits([0] * (len(prompt) + out), self._mistaken(name))[len(prompt) - 1 : -1]
            for prompt, name in zip(prompts, names, strict=True)
        ]
        return [(row.argmax(-1).tolist(), 0.0) for row in rows]


def test_the_gate_passes_a_server_that_uses_the_adapters() -> None:
    """Its tokens are PEFT's best."""
    assert asyncio.run(serving.gate_vllm(_Server(lambda name: name), _Judge(), 50_000, "bfloat16")) == 0


@pytest.mark.parametrize(
    "mistaken",
    [lambda name: BASE_NAME, lambda name: {"a0": "a1"}.get(name, name), lambda name: "a7"],
    ids=["adapters ignored", "one taken for another", "base gets an adapter"],
)
def test_the_gate_fails_a_server_that_is_wrong_about_adapters(mistaken) -> None:
    """A peer that computes something else is not one to be compared with."""
    with pytest.raises(GateFailed, match="vllm: a token is"):
        asyncio.run(serving.gate_vllm(_Server(mistaken), _Judge(), 50_000, "bfloat16"))


def timings(**seconds: float) -> dict[str, list[Timing]]:
    """Return two batches a case."""
    return {case: [Timing(each, each / 4, 2 * each)] * 2 for case, each in seconds.items()}


OURS = timings(base=1.0, one=1.25, mixed8=2.0)
PEFT = timings(base=2.0, one=4.0, mixed8=8.0)
VLLM = timings(base=1.0, base_without_lora=0.5, one=4.0, mixed8=5.0)


def test_the_document_has_vllms_fields_and_the_ratios_are_of_them() -> None:
    """Same fields as the other providers, one case more; the better peer is the faster."""
    found = make_document({"fedllm": OURS, "peft": PEFT, "vllm": VLLM}, 0.01, "bfloat16", 16, 2)
    row = found["providers"]["vllm"]
    assert {f"{case}_tok_s" for case in CASES} | {"base_without_lora_tok_s"} <= set(row)
    assert set(row) >= set(found["providers"]["peft"])
    assert row["mixed8_tok_s"] == pytest.approx(16 * STREAMS / 5, rel=1e-2)
    assert row["ttft_mixed8_s"] == 1.25
    assert found["mixed8_over_better_peer"] == pytest.approx(2.5, rel=1e-2)
    assert found["mixed8_over_peft"] == pytest.approx(4, rel=1e-2)
    assert found["base_over_vllm_without_lora"] == 0.5
    assert found["base_over_vllm"] == 1.0
    drawn = table(found | {"vllm_reason": None, "vllm_version": "0.32.0"})
    assert drawn.row_count == 3
    assert "0.32.0, without LoRA 256" in str(drawn.caption)
    assert "base_over_vllm_without_lora 0.5, aim >= 1: not met" in str(drawn.caption)


def test_without_vllm_nothing_is_said_of_it_but_why() -> None:
    """No ratio and no target that needs it; the table has a row of dashes and the reason."""
    found = make_document({"fedllm": OURS, "peft": PEFT}, 0.01, "bfloat16", 16, 2)
    assert found["providers"]["vllm"] is None
    assert not any("vllm" in name or "better" in name for name in found)
    assert [each["figure"] for each in found["targets"]] == ["base_over_peft", "ttft_mixed8_over_base"]
    assert serving.NOT_INSTALLED in str(table(found | {"vllm_reason": serving.NOT_INSTALLED}).caption)


@pytest.mark.parametrize(("figure", "kind", "sign", "bound"), TARGETS)
def test_a_target_is_met_on_its_bound_and_missed_beyond(figure: str, kind: str, sign: str, bound: float) -> None:
    """Musts and aims alike, in the right direction."""
    worse = 0.99 * bound if sign == ">=" else 1.01 * bound

    def met(value: float) -> list[bool]:
        return [
            each["met"]
            for each in judged({figure: value})
            if (each["kind"], each["bound"]) == (kind, f"{sign} {bound:g}")
        ]

    assert met(bound) == [True]
    assert met(worse) == [False]


def test_the_better_peer_may_be_peft() -> None:
    """The ratio takes whichever is faster."""
    providers = make_document(
        {"fedllm": OURS, "peft": VLLM, "vllm": PEFT | timings(base_without_lora=1.0)}, 0, "float32", 16, 2
    )
    assert ratios(providers["providers"])["mixed8_over_better_peer"] == providers["mixed8_over_peft"]
