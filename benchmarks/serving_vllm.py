"""vLLM as a provider: its own OpenAI server on loopback, in an environment of its own, asked over HTTP.

The server has one thread that computes, bound to a core as vLLM does by default; its scheduler and its HTTP front are
processes beside. HTTP, JSON and detokenising are within its times; fedllm's engine and PEFT are called in process.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import psutil

from fedllm.adapter import AdapterState, to_peft
from fedllm.demo.cluster import free_ports
from fedllm.errors import NotFound, PeerUnavailable, ProcessDied
from fedllm.relay.processes import Supervised

HINT = "make .venv-vllm/.installed"
BASE_NAME = "__base__"
"""What base requests ask for; also PEFT's name for rows without an adapter."""
SPIN_S = 1.5
"""vLLM's worker spins for a second after its last step; the next provider's times must not pay for it."""
START_LIMIT_S = 600.0
_ANSWER_LIMIT_S = 600.0
_SCHEDULER = "VLLM::EngineCore"
_GRACE_S = 10.0
_TAIL = 3000


def installed(environment: Path) -> bool:
    """Return whether vLLM's environment is there, and complete."""
    return (environment / ".installed").is_file()


class Vllm:
    """A client of one running server.

    Parameters
    ----------
    http : httpx.AsyncClient
        Its base address is the server's.
    pid : int
        The process that started all of the server's.
    """

    def __init__(self, http: httpx.AsyncClient, pid: int) -> None:
        self._http = http
        self._pid = pid

    def cpu_s(self) -> float:
        """Return the CPU seconds used so far, but for the scheduler's, which spins while it waits for the worker."""
        times = [p.cpu_times() for p in psutil.Process(self._pid).children(recursive=True) if p.name() != _SCHEDULER]
        return sum(each.user + each.system for each in times)

    async def version(self) -> str:
        """Return the server's version."""
        return str((await self._http.get("/version")).raise_for_status().json()["version"])

    async def add_adapters(self, states: Sequence[AdapterState], folder: Path) -> None:
        """Load adapters under the names ``a0``, ``a1`` and so on.

        Parameters
        ----------
        folder : Path
            Where the files are written; they must stay.

        Raises
        ------
        PeerUnavailable
            If the server refuses one.
        """
        for index, state in enumerate(states):
            place = folder / f"a{index}"
            place.mkdir()
            for name, data in to_peft(state, base_name=BASE_NAME).items():
                (place / name).write_bytes(data)
            asked = {"lora_name": place.name, "lora_path": str(place)}
            _expect_ok(await self._http.post("/v1/load_lora_adapter", json=asked))

    async def generate(
        self, prompts: Sequence[Sequence[int]], out: int, names: Sequence[str]
    ) -> list[tuple[list[int], float]]:
        """Stream one request a prompt, all at once; return each one's tokens, and when its first came.

        Parameters
        ----------
        names : Sequence[str]
            An adapter for each prompt, or `BASE_NAME`.

        Raises
        ------
        PeerUnavailable
            If the server refuses a request, or fails in the middle of one.
        """
        pairs = zip(names, prompts, strict=True)
        return await asyncio.gather(*(self._stream(name, prompt, out) for name, prompt in pairs))

    async def _stream(self, model: str, prompt: Sequence[int], out: int) -> tuple[list[int], float]:
        body = {
            "model": model,
            "prompt": list(prompt),
            "max_tokens": out,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        tokens: list[int] = []
        first = 0.0
        try:
            async with self._http.stream("POST", "/v1/completions", json=body) as response:
                if response.is_error:
                    await response.aread()
                _expect_ok(response)
                async for line in response.aiter_lines():
                    made = _tokens(line)
                    if made:
                        first = first or time.perf_counter()
                        tokens += made
        except httpx.TransportError as error:
            raise PeerUnavailable(f"vllm left in the middle of a stream: {type(error).__name__}") from None
        return tokens, first


def _tokens(line: str) -> list[int]:
    """Return the tokens in a line of an event stream; none in blank lines and at its end."""
    data = line.removeprefix("data: ")
    if data == line or data == "[DONE]":
        return []
    chunk = json.loads(data)
    if "error" in chunk:
        raise PeerUnavailable(f"vllm failed in the middle of a stream: {chunk['error']}")
    return [token for choice in chunk["choices"] for token in choice["token_ids"]]


def _expect_ok(response: httpx.Response) -> None:
    if response.is_error:
        said = response.text[:_TAIL]
        raise PeerUnavailable(f"vllm answered {response.request.url.path} with {response.status_code}: {said}")


@asynccontextmanager
async def vllm_server(
    environment: Path, folder: Path, dtype: str, adapters: Sequence[AdapterState] = ()
) -> AsyncIterator[Vllm]:
    """Run a server until the end of the block; none of its processes is left then.

    Parameters
    ----------
    environment : Path
        The virtual environment with vLLM in it.
    folder : Path
        The base model.
    dtype : str
        What it computes in.
    adapters : Sequence[AdapterState]
        Loaded before the block begins; without any, the server is started without LoRA.

    Raises
    ------
    NotFound
        If there is no such environment.
    ProcessDied
        If the server ends or is not ready in time; carries the end of its log.
    """
    if not installed(environment):
        raise NotFound("vLLM's environment is not installed", hint=HINT)
    with TemporaryDirectory(prefix="vllm-", ignore_cleanup_errors=True) as made:
        root = Path(made)
        (port,) = free_ports(1)
        argv = _command(environment, folder, dtype, port, adapters)
        log = root / "server.log"
        server = Supervised("vllm", argv, env=_variables(environment), log=log, cwd=root, grace_s=_GRACE_S)
        try:
            server.start()
            address = f"http://127.0.0.1:{port}"
            async with httpx.AsyncClient(base_url=address, timeout=_ANSWER_LIMIT_S, trust_env=False) as http:
                await _wait_ready(http, server, log)
                assert server.pid is not None
                client = Vllm(http, server.pid)
                await client.add_adapters(adapters, root)
                yield client
        finally:
            await asyncio.to_thread(server.terminate)


def _command(environment: Path, folder: Path, dtype: str, port: int, adapters: Sequence[AdapterState]) -> list[str]:
    argv = [
        str(environment.absolute() / "bin" / "python"), "-m", "vllm.entrypoints.openai.api_server",
        "--model", str(folder.resolve()), "--served-model-name", BASE_NAME, "--host", "127.0.0.1", "--port", str(port),
        "--dtype", dtype, "--max-model-len", "1024", "--max-num-seqs", "16", "--generation-config", "vllm",
    ]  # fmt: skip
    if adapters:
        rank = max(state.spec.rank for state in adapters)
        argv += ["--enable-lora", "--max-loras", str(len(adapters)), "--max-lora-rank", str(rank)]
    return argv


def _variables(environment: Path) -> dict[str, str]:
    """Return the server's variables: one thread, no other host, and what it compiles kept in its own folder."""
    passed = ("PATH", "HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH")
    kept = {name: os.environ[name] for name in passed if name in os.environ}
    cache = environment.absolute() / "cache"
    return kept | {
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": str(max(os.sched_getaffinity(0))),
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB, all of it resident; one holds every stream many times over
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_CACHE_ROOT": str(cache),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


async def _wait_ready(http: httpx.AsyncClient, server: Supervised, log: Path) -> None:
    end_s = time.monotonic() + START_LIMIT_S
    while server.alive() and time.monotonic() < end_s:
        try:
            if (await http.get("/health")).is_success:
                return
        except httpx.TransportError:
            pass
        await asyncio.sleep(0.5)
    state = f"is not ready after {START_LIMIT_S:g} s" if server.alive() else f"ended with {server.returncode}"
    raise ProcessDied(f"vllm {state}; the end of its log:\n{_tail(log)}")


def _tail(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-_TAIL:]
