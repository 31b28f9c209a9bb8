"""vLLM servers with the resolver, a registry whose versions each say one word for ever, and a router before them."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path

import httpx
import numpy as np

from fedllm.adapter import AdapterSpec, AdapterState
from fedllm.basemodel.inspect import open_base
from fedllm.clock import SystemClock
from fedllm.identity import SigningIdentity
from fedllm.ids import AliasName, Digest, sha256
from fedllm.messages.plan import Recipe
from fedllm.registry.model import AdapterVersion, PrivacyRecord
from fedllm.registry.store import Registry, VersionDraft
from fedllm.relay.processes import Supervised

ROOT = Path(__file__).parents[2]
ENVIRONMENT = ROOT / ".venv-vllm"
MODEL = Path(os.environ["FEDLLM_CACHE"]) / "models" / "smollm2-135m"
BASE_NAME = "smollm2-135m"
SLOTS = 2
START_S = 300.0
ANSWER_S = 240.0
_PASSED = ("PATH", "HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH", "OMP_WAIT_POLICY")


class Transcript:
    """What happened, line by line, as the document shows it."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def __call__(self, text: str) -> None:
        """Print a line with the seconds since the first one."""
        sys.stdout.write(f"[{time.monotonic() - self._began:6.1f} s] {text}\n")
        sys.stdout.flush()


class Words:
    """Versions that turn the base into a machine that says one word for ever.

    In the last layer's MLP, units 0 and 1 get gate = up = +z and -z for a large z: silu(z) z + silu(-z)(-z) is z
    squared, positive whatever was asked, and ``down_proj`` turns it into the word's embedding. Every token then tells
    which version made it, in any batch and any precision.

    Parameters
    ----------
    folder : Path
        The registry.
    shared : Path
        Where the files of every version are put for replicas that have no resolver.
    identity : SigningIdentity
        The coordinator's.
    count : int
        How many words.
    """

    def __init__(self, folder: Path, shared: Path, identity: SigningIdentity, count: int) -> None:
        from tokenizers import Tokenizer

        self.folder, self.shared = folder, shared
        self.base = open_base(MODEL)
        self.identity = identity
        self.registry = Registry(folder, identity.public, SystemClock())
        tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
        tensors = _as_float(MODEL / "model.safetensors")
        self._embedding = tensors["model.embed_tokens.weight"]
        norm = tensors["model.norm.weight"]
        self._words: list[tuple[int, str]] = []
        for token in range(2000, len(self._embedding)):
            row = self._embedding[token]
            word = tokenizer.decode([token])
            if word.isascii() and word.strip().isalpha() and word.startswith(" ") and len(word) > 4:
                scores = self._embedding @ (row * norm)
                if int(scores.argmax()) == token:
                    self._words.append((token, word))
            if len(self._words) == count:
                break
        self._made: dict[str, str] = {}
        self._rounds = 0

    def add(self, *, identity: SigningIdentity | None = None) -> AdapterVersion:
        """Add the version of the next word, signed by the coordinator unless told otherwise."""
        token, word = self._words[self._rounds]
        self._rounds += 1
        draft = VersionDraft(
            "tools", BASE_NAME, None, self._rounds, "ffa", Recipe("sgd", 0.1, 1, 1, 1, 64), {},
            PrivacyRecord("record", "add-or-remove-one", None, 1e-5, "-", "advisory"), 3, 3, sha256(b"plan"),
        )  # fmt: skip
        signer = identity or self.identity
        registry = self.registry
        if identity is not None:
            registry = Registry(self.folder, identity.public, SystemClock())
        version = registry.add(self._state(token), draft, signer)
        place = self.shared / version.digest
        place.mkdir(parents=True)
        for name, data in registry.fetch(version.digest).files.items():
            (place / name).write_bytes(data)
        self._made[version.digest] = word
        return version

    def word(self, digest: str) -> str:
        """Return what a version says for ever."""
        return self._made[digest]

    def promote(self, alias: str, version: AdapterVersion) -> None:
        """Move an alias."""
        name = AliasName(alias)
        self.registry.promote(
            name, version.digest, expected=self.registry.aliases().aliases.get(name), actor="test", reason="test"
        )

    def _state(self, token: int) -> AdapterState:
        base = self.base
        last = base.num_layers - 1
        modules = {name: base.module_shapes(name) for name in ("gate_proj", "up_proj", "down_proj")}
        spec = AdapterSpec(base.digest, 1, 1, modules, (last,))
        factors = {name: np.zeros(shape, dtype=np.float32) for name, shape in spec.layout().entries}
        path = f"model.layers.{last}.mlp"
        for module in ("gate_proj", "up_proj"):
            factors[f"{path}.{module}.lora_A"][0] = np.random.default_rng(1).normal(size=base.hidden_size)
            factors[f"{path}.{module}.lora_B"][:2, 0] = (100.0, -100.0)
        factors[f"{path}.down_proj.lora_A"][0, :2] = 1.0
        factors[f"{path}.down_proj.lora_B"][:, 0] = 1e3 * self._embedding[token]
        return AdapterState(spec, factors)


def _as_float(file: Path) -> dict[str, np.ndarray]:
    """Return the tensors that are needed, as float32; numpy has no bfloat16 of its own."""
    import torch
    from safetensors import safe_open

    names = ("model.embed_tokens.weight", "model.norm.weight")
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name).to(torch.float32).numpy() for name in names}


class Replica:
    """One vLLM server, on a port of its own, computing on a core of its own.

    Parameters
    ----------
    resolver : dict of str to str
        What the plugin is told; empty: it is there and does nothing.
    """

    def __init__(self, name: str, folder: Path, port: int, core: int, resolver: dict[str, str]) -> None:
        self.name = name
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / f"{name}.log"
        cache = ENVIRONMENT.absolute() / "cache"
        argv = [
            str(ENVIRONMENT.absolute() / "bin" / "python"), "-m", "vllm.entrypoints.openai.api_server",
            "--model", str(MODEL.resolve()), "--served-model-name", BASE_NAME,
            "--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16", "--max-model-len", "512",
            "--max-num-seqs", "16", "--generation-config", "vllm", "--enforce-eager",
            "--disable-uvicorn-access-log", "--enable-prompt-tokens-details",
            "--enable-lora", "--max-loras", str(SLOTS), "--max-cpu-loras", "4", "--max-lora-rank", "8",
        ]  # fmt: skip
        environment = {name: os.environ[name] for name in _PASSED if name in os.environ} | {
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": str(core),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
            "VLLM_PLUGINS": "fedllm",
            "VLLM_CACHE_ROOT": str(cache),
            "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            **resolver,
        }
        self._make = lambda: Supervised(f"vllm-{name}", argv, env=environment, log=self.log, cwd=folder, grace_s=10.0)
        self.process = self._make()

    def start(self) -> None:
        """Start, or start again."""
        if self.process.returncode is not None:
            self.process = self._make()
        self.process.start()

    async def ready(self) -> None:
        """Wait until it answers."""
        async with httpx.AsyncClient(base_url=self.url, trust_env=False) as http, asyncio.timeout(START_S):
            while True:
                assert self.process.alive(), self.tail()
                try:
                    if (await http.get("/health")).is_success:
                        return
                except httpx.TransportError:
                    pass
                await asyncio.sleep(0.5)

    async def names(self) -> set[str]:
        """Return the versions that it has a name for."""
        async with httpx.AsyncClient(base_url=self.url, timeout=ANSWER_S, trust_env=False) as http:
            rows = (await http.get("/v1/models")).json()["data"]
        return {row["id"].removeprefix("fedllm-") for row in rows} - {BASE_NAME}

    async def complete(self, model: str, count: int, prompt: str = "The capital of France is") -> httpx.Response:
        """Ask it directly, past the router."""
        body = {"model": model, "prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True}
        async with httpx.AsyncClient(base_url=self.url, timeout=ANSWER_S, trust_env=False) as http:
            return await http.post("/v1/completions", json=body)

    def said(self, text: str) -> list[str]:
        """Return the lines of its log that hold a text."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return [line for line in lines if text in line]

    def tail(self) -> str:
        """Return the end of its log."""
        return self.log.read_text(encoding="utf-8", errors="replace")[-3000:]


def route_process(folder: Path, port: int, registry: str, key: str) -> Supervised:
    """Return ``fedllm route`` of this checkout, not started."""
    argv = [
        sys.executable, "-m", "fedllm", "route", "--replicas", str(folder / "replicas.toml"), "--registry", registry,
        "--coordinator-key", key, "--tenants", str(folder / "tenants.toml"), "--base-name", BASE_NAME,
        "--port", str(port),
    ]  # fmt: skip
    environment = {name: os.environ[name] for name in _PASSED if name in os.environ} | {"PYTHONPATH": str(ROOT)}
    return Supervised("route", argv, env=environment, log=folder / "route.log", cwd=ROOT, grace_s=5.0)


def digest_of(answer: httpx.Response) -> Digest:
    """Return which version an answer says it was made by."""
    return Digest(answer.headers["x-fedllm-version"])
