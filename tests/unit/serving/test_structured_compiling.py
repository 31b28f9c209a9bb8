"""Compiling grammars: once for all who ask, in a bounded queue, and only for who still waits."""

from __future__ import annotations

import asyncio
import builtins
import threading

import pytest
from unit.serving.structured_scene import WEATHER

from fedllm.errors import MissingExtra, Overloaded
from fedllm.serving.schema import check_schema
from fedllm.serving.structured import Grammars, Shape
from fedllm.serving.text import TextCodec


@pytest.fixture(scope="module")
def codec(tiny_folder) -> TextCodec:
    """Return the tiny model's codec."""
    return TextCodec(tiny_folder)


def test_grammars_are_compiled_once_and_kept_bounded(codec, drive, monkeypatch) -> None:
    """Two requests share one compilation; the oldest is dropped; a full queue of others refuses."""

    async def body():
        grammars = Grammars(codec)
        shape = Shape(check_schema(WEATHER))
        first, second = await asyncio.gather(grammars.compile([shape]), grammars.compile([shape]))
        assert first is second
        assert await grammars.compile([shape]) is first
        for number in range(64):
            await grammars.compile([Shape(check_schema({"const": number}))])
        assert await grammars.compile([shape]) is not first
        waiting = [asyncio.ensure_future(grammars.compile([Shape(check_schema({"const": -n}))])) for n in range(1, 17)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="16 schemas wait"):
            await grammars.compile([Shape(check_schema({"const": "one more"}))])
        await asyncio.gather(*waiting)

    drive(body())


def test_what_nobody_waits_for_is_not_compiled(codec, drive, monkeypatch) -> None:
    """A queued schema whose last waiter left is skipped and leaves the queue; one with a waiter left is made."""
    gate, begun, made = threading.Event(), threading.Event(), []
    real = Grammars._compile

    def slow(self, shapes):
        made.append(shapes[0].schema)
        begun.set()
        gate.wait(20)
        return real(self, shapes)

    monkeypatch.setattr(Grammars, "_compile", slow)

    async def body():
        grammars = Grammars(codec)

        def ask(value):
            return asyncio.ensure_future(grammars.compile([Shape(check_schema({"const": value}))]))

        running, left, kept, stays = ask(1), ask(2), ask(3), ask(3)
        await asyncio.to_thread(begun.wait, 20)
        for task in (running, left, kept):
            task.cancel()
        await asyncio.gather(running, left, kept, return_exceptions=True)
        assert len(grammars._compiling) == 2
        again = ask(1)
        gate.set()
        await asyncio.gather(stays, again)
        assert made == ['{"const": 1}', '{"const": 3}']
        await ask(2)
        assert not grammars._compiling

    drive(body())


def test_without_xgrammar_the_extra_is_named(codec, drive, monkeypatch) -> None:
    """An install without it still serves; a request that needs it hears what is missing."""
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "xgrammar":
            raise ModuleNotFoundError("no", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtra, match="xgrammar"):
        drive(Grammars(codec).compile([Shape(check_schema({"type": "object"}))]))
