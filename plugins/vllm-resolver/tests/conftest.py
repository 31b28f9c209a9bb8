"""The plugin's code, and a stand-in for the two classes of vLLM that it touches."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))


@dataclass
class FakeRequest:
    """vLLM's LoRARequest, as far as a resolver sees it."""

    lora_name: str
    lora_int_id: int
    lora_path: str
    load_inplace: bool = False


@pytest.fixture
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, object]]:
    """Return vLLM's table of resolvers, of a vLLM that is not there."""
    resolvers: dict[str, object] = {}
    registry = SimpleNamespace(register_resolver=resolvers.__setitem__)
    modules = {
        "vllm": {},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": FakeRequest},
        "vllm.lora.resolver": {"LoRAResolver": object, "LoRAResolverRegistry": registry},
    }
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "fedllm_vllm_resolver.resolver", raising=False)
    yield resolvers
    sys.modules.pop("fedllm_vllm_resolver.resolver", None)
