"""Text into token ids, exactly as serving does it: a base model's own tokenizer and chat template, without torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from fedllm.errors import DataError


class Tokenizer(Protocol):
    """What reading records needs of a tokenizer."""

    def apply_chat(self, messages: Sequence[dict[str, str]]) -> tuple[list[int], list[bool]]:
        """Return token ids of a conversation, and which of them are the assistant's (end of turn included)."""

    def encode(self, text: str) -> list[int]:
        """Return token ids of plain text."""

    @property
    def end(self) -> int:
        """The token that ends an answer."""


class ChatTokenizer:
    """A base model's own tokenizer and chat template (``tokenizers`` and ``jinja2``; no torch).

    Each turn is tokenised apart from what comes before it, exactly as serving does: there the prompt ends where
    the assistant's answer begins.

    Parameters
    ----------
    folder : Path
        Base model folder in Hugging Face layout.
    """

    def __init__(self, folder: Path) -> None:
        from jinja2.sandbox import ImmutableSandboxedEnvironment
        from tokenizers import Tokenizer as FastTokenizer

        if not (folder / "tokenizer.json").is_file():
            raise DataError(f"base model folder {folder} has no tokenizer.json", hint="fedllm model pull")
        self._tokenizer = FastTokenizer.from_file(str(folder / "tokenizer.json"))
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        file = folder / "chat_template.jinja"
        source = file.read_text(encoding="utf-8") if file.is_file() else settings.get("chat_template")
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        self._template = environment.from_string(source) if isinstance(source, str) else None
        self._special = {k: _text(settings.get(k)) for k in ("bos_token", "eos_token", "pad_token", "unk_token")}
        end = self._tokenizer.token_to_id(self._special["eos_token"] or "")
        if end is None:
            raise DataError(f"base model folder {folder} names no end token in tokenizer_config.json")
        self._end = int(end)

    @property
    def end(self) -> int:
        """The end-of-turn token."""
        return self._end

    def encode(self, text: str) -> list[int]:
        """Return token ids of plain text, no special tokens added."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def apply_chat(self, messages: Sequence[dict[str, str]]) -> tuple[list[int], list[bool]]:
        """Return token ids and the mask of assistant tokens, up to each turn's end token.

        Raises
        ------
        DataError
            If the base model has no chat template, or one that rewrites earlier turns.
        """
        ids: list[int] = []
        mask: list[bool] = []
        done = ""
        for index, turn in enumerate(messages):
            if turn["role"] != "assistant":
                continue
            prompt = self._render(messages[:index], True)
            whole = self._render(messages[: index + 1], False)
            if not (prompt.startswith(done) and whole.startswith(prompt)):
                raise DataError("the base model's chat template rewrites earlier turns; its answers cannot be located")
            before, answer = self.encode(prompt[len(done) :]), self.encode(whole[len(prompt) :])
            # Nothing after the end token is ever generated, so nothing after it is learnt.
            last = answer.index(self._end) + 1 if self._end in answer else len(answer)
            ids += before + answer
            mask += [False] * len(before) + [True] * last + [False] * (len(answer) - last)
            done = whole
        return ids, mask

    def _render(self, messages: Sequence[dict[str, str]], prompt: bool) -> str:
        if self._template is None:
            raise DataError(
                "the base model has no chat template and the data has 'messages' records",
                hint="use prompt/completion records, or a base model with a chat template",
            )
        return str(self._template.render(messages=messages, add_generation_prompt=prompt, **self._special))


def _text(value: object) -> str | None:
    # tokenizer_config.json writes a special token as text or as an object with the text in "content"
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None
