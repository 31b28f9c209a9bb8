"""A coordinator that shows owners different candidates, to read one owner's held-out score."""

from __future__ import annotations

import pytest
from secagg_world import World

from fedllm.errors import FedllmError, StepMismatch
from fedllm.messages.secagg import UnmaskRequest


def test_scores_of_different_candidates_do_not_open() -> None:
    """A probe for one owner and junk for the rest would open that owner's score: signatures name the candidate."""
    world = World(n=4)
    for number, owner in enumerate(world.names):
        world.owners[owner].bind(b"probe" if number == 0 else b"junk")
    survivors = world.survivors()
    signed = {owner: world.owners[owner].confirm(survivors) for owner in survivors}
    victim, *rest = world.names
    for subject, signers in ((b"probe", [victim]), (b"junk", rest)):
        coordinator = world.coordinator
        coordinator.bind(subject)
        good = [s for o, s in signed.items() if o in signers]
        request = UnmaskRequest(world.purpose, survivors, tuple(good))
        with pytest.raises(FedllmError):
            world.owners[victim].unmask(request)


def test_what_a_sum_is_about_is_fixed_before_it_is_signed() -> None:
    """Another subject, or one after the signature, is refused; the same one again is not."""
    world = World(n=4)
    owner = world.owners[world.names[0]]
    owner.bind(b"one")
    owner.bind(b"one")
    with pytest.raises(StepMismatch, match="something else"):
        owner.bind(b"two")
