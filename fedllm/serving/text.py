"""Text to tokens and back: chat template, tokenizer, incremental detokenisation, stop strings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedllm.errors import BaseUnsupported, RequestInvalid


class TextCodec:
    """A base model's tokenizer and chat template.

    Parameters
    ----------
    folder : Path
        Hugging Face folder with ``tokenizer.json``; the template is ``chat_template.jinja`` or a field of
        ``tokenizer_config.json``.

    Raises
    ------
    BaseUnsupported
        If there is no tokenizer.
    """

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        path = folder / "tokenizer.json"
        if not path.is_file():
            raise BaseUnsupported(f"{folder} has no tokenizer.json")
        self._tokenizer = Tokenizer.from_file(str(path))
        settings = _read_json(folder / "tokenizer_config.json")
        self._special = {
            name: _token_text(settings.get(name)) for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        }
        self._template = _compile_template(folder, settings)
        self.stop_token_ids = _end_tokens(folder, self._tokenizer.token_to_id(self._special["eos_token"] or ""))

    def encode(self, text: str) -> list[int]:
        """Return the token ids of plain text, with the special tokens that the tokenizer adds."""
        return list(self._tokenizer.encode(text).ids)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Return the token ids of a conversation, ready for the assistant's answer.

        Raises
        ------
        RequestInvalid
            If the base has no chat template or the template refuses the messages.
        """
        from jinja2 import TemplateError

        if self._template is None:
            raise RequestInvalid("the base model has no chat template", hint="use /v1/completions")
        try:
            text = self._template.render(messages=messages, add_generation_prompt=True, **self._special)
        except (TemplateError, TypeError) as error:
            raise RequestInvalid(f"the chat template refuses these messages ({type(error).__name__})") from None
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decoder(self) -> TokenDecoder:
        """Return a fresh incremental decoder."""
        return TokenDecoder(self._tokenizer)


class TokenDecoder:
    """Turns tokens into text as they come; a character split over tokens appears when it is whole."""

    def __init__(self, tokenizer: Any) -> None:
        from tokenizers.decoders import DecodeStream

        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)

    def feed(self, token_ids: Sequence[int]) -> str:
        """Return the text that became complete."""
        return "".join(self._stream.step(self._tokenizer, token) or "" for token in token_ids)


class StopFilter:
    """Ends text at the first stop string, holding back what could still become one.

    Parameters
    ----------
    stops : sequence of str
        Stop strings; never delivered.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.hit = False

    def feed(self, text: str) -> str:
        """Return the text that is safe to deliver; nothing more comes once `hit` is true."""
        if self.hit:
            return ""
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.hit = True
            return self._held[: min(found)]
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        ready, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return ready

    def flush(self) -> str:
        """Return what was held back, at the end of the tokens."""
        rest, self._held = ("" if self.hit else self._held), ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that begins `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-size:]):
            return size
    return 0


def _compile_template(folder: Path, settings: Mapping[str, Any]) -> Any:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    path = folder / "chat_template.jinja"
    source = path.read_text(encoding="utf-8") if path.is_file() else settings.get("chat_template")
    if not isinstance(source, str):
        return None
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, autoescape=False)
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals["raise_exception"] = _raise
    return environment.from_string(source)


def _raise(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _end_tokens(folder: Path, eos: int | None) -> frozenset[int]:
    ids: set[int] = set() if eos is None else {eos}
    for name in ("config.json", "generation_config.json"):
        value = _read_json(folder / name).get("eos_token_id")
        ids |= set(value) if isinstance(value, list) else ({value} if isinstance(value, int) else set())
    return frozenset(ids)


def _token_text(value: object) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise BaseUnsupported(f"{path} is not JSON") from None
    return loaded if isinstance(loaded, dict) else {}
