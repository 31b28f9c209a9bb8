"""Text to tokens and back: chat template, tokenizer, incremental detokenisation, stop strings.

A template that knows ``tools`` is given them. Another one gets the functions in a system message in front, and sees
calls and their results as plain text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedllm.errors import BaseUnsupported, RequestInvalid

_TOOLS_INTRODUCED = (
    'You can call these functions. To call one, answer with one JSON object {"name": ..., "arguments": {...}} and '
    "nothing else."
)
_LONG_CHARS = 4096
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class TextCodec:
    """A base model's tokenizer and chat template.

    Parameters
    ----------
    folder : Path
        Hugging Face folder with ``tokenizer.json``; the template is ``chat_template.jinja`` or a field of
        ``tokenizer_config.json``.

    Attributes
    ----------
    stop_token_ids : frozenset of int
        Tokens that end an answer.
    vocabulary : int
        One more than the tokenizer's largest id.

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
        self._template, self._template_has_tools = _compile_template(folder, settings)
        self._special_ids = frozenset(
            i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special
        )
        self.vocabulary = 1 + max(self._tokenizer.get_vocab().values())
        self._spelling = _spelling(json.loads(self._tokenizer.to_str()).get("decoder"))
        self.stop_token_ids = _end_tokens(folder, self._tokenizer.token_to_id(self._special["eos_token"] or ""))

    def encode(self, text: str) -> list[int]:
        """Return the token ids of plain text, with the special tokens that the tokenizer adds."""
        return self._encode(text, special=True)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Return the token ids of a conversation, ready for the assistant's answer.

        Parameters
        ----------
        messages : sequence of mapping
            OpenAI's; the ``arguments`` of calls are objects, not texts.
        tools : sequence of mapping
            OpenAI's function tools.

        Raises
        ------
        RequestInvalid
            If the base has no chat template or the template refuses the messages.
        """
        if self._template is None:
            raise RequestInvalid("the base model has no chat template", hint="use /v1/completions")
        extra = {"tools": list(tools)} if tools and self._template_has_tools else {}
        try:
            if not self._template_has_tools:
                messages = _as_text(messages, tools)
            text = self._template.render(messages=messages, add_generation_prompt=True, **extra, **self._special)
        except Exception as error:  # noqa: BLE001 - a template comes with the base and may fail in any way
            raise RequestInvalid(f"the chat template refuses these messages ({type(error).__name__})") from None
        return self._encode(text, special=False)

    def _encode(self, text: str, *, special: bool) -> list[int]:
        if len(text) > _LONG_CHARS:
            # Unlike encode, this lets other threads of Python run meanwhile.
            return list(self._tokenizer.encode_batch_fast([text], add_special_tokens=special)[0].ids)
        return list(self._tokenizer.encode(text, add_special_tokens=special).ids)

    def token_bytes(self, token: int) -> bytes:
        """Return what one token spells; a special token spells its name, an unknown id nothing."""
        name: str | None = self._tokenizer.id_to_token(token)
        if name is None:
            return b""
        if token in self._special_ids:
            return name.encode()
        return self._spelling(name)

    def spelled(self) -> list[bytes]:
        """Return what each token adds to the text, by id: nothing for special tokens."""
        return [b"" if token in self._special_ids else self.token_bytes(token) for token in range(self.vocabulary)]

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

    Attributes
    ----------
    hit : bool
        Whether one was found.
    after : str
        What came behind it, in the piece that completed it.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.hit = False
        self.after = ""

    def feed(self, text: str) -> str:
        """Return the text that is safe to deliver; nothing more comes once `hit` is true."""
        if self.hit:
            return ""
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.hit = True
            at = min(found)
            stop = next(stop for stop in self._stops if self._held.startswith(stop, at))
            self.after = self._held[at + len(stop) :]
            return self._held[:at]
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


def _compile_template(folder: Path, settings: Mapping[str, Any]) -> tuple[Any, bool]:
    """Return the template, and whether it reads ``tools``."""
    from jinja2 import meta
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    path = folder / "chat_template.jinja"
    source = path.read_text(encoding="utf-8") if path.is_file() else settings.get("chat_template")
    if not isinstance(source, str):
        return None, False
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, autoescape=False)
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals["raise_exception"] = _raise
    names = meta.find_undeclared_variables(environment.parse(source))
    return environment.from_string(source), "tools" in names


def _as_text(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return a conversation in which functions and calls are text, for a template that knows neither."""
    made: list[Mapping[str, Any]] = []
    for message in messages:
        if calls := message.get("tool_calls"):
            written = [json.dumps(call["function"], ensure_ascii=False) for call in calls]
            content = "\n".join([*filter(None, [message["content"]]), *written])
            made.append({"role": message["role"], "content": content})
        else:
            made.append(message)
    if not tools:
        return made
    text = "\n".join([_TOOLS_INTRODUCED, *(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)])
    if made and made[0]["role"] == "system":
        first = {"role": "system", "content": f"{made[0]['content']}\n\n{text}"}
        return [first, *made[1:]]
    return [{"role": "system", "content": text}, *made]


def _spelling(decoder: object) -> Callable[[str], bytes]:
    """Return how a vocabulary spells bytes: GPT-2's alphabet, byte fallback with a bar for spaces, or as it is."""
    kinds = json.dumps(decoder)
    if '"ByteLevel"' in kinds:
        shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
        hidden = [byte for byte in range(256) if byte not in shown]
        alphabet = {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
        return lambda name: b"".join(bytes([alphabet[c]]) if c in alphabet else c.encode() for c in name)
    if '"ByteFallback"' in kinds:
        return lambda name: (
            bytes([int(found[1], 16)]) if (found := _BYTE.fullmatch(name)) else name.replace("\u2581", " ").encode()
        )
    return str.encode


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
