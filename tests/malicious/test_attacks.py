"""Everything a hostile coordinator may try on the real line, and the code that every honest owner refuses it with."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from malicious.attacks_keys import KEYS
from malicious.attacks_line import LINES
from malicious.attacks_peers import PEERS
from malicious.attacks_plan import PLANS
from malicious.attacks_retry import RETRIES
from malicious.attacks_sparse import SPARSE
from malicious.attacks_sum import SUMS
from malicious.scene import Attack

ATTACKS = [*PLANS, *KEYS, *SUMS, *SPARSE, *RETRIES, *LINES, *PEERS]
names = [attack.name for attack in ATTACKS]


@pytest.mark.parametrize("attack", ATTACKS, ids=names)
def test_every_honest_owner_refuses(attack: Attack, tmp_path: Path) -> None:
    """With the code that the table names, and no other."""
    verdicts = asyncio.run(attack.play(tmp_path))
    assert verdicts
    assert set(verdicts.values()) == {attack.code}, verdicts


@pytest.mark.parametrize("attack", ATTACKS, ids=names)
def test_without_its_check_the_attack_gets_further(
    attack: Attack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It succeeds, or meets the next line of defence, which the table names: the refusal was that check's doing."""
    for remove in attack.removed:
        remove(monkeypatch)
    verdicts = asyncio.run(attack.play(tmp_path))
    assert set(verdicts.values()) == {attack.then}, verdicts
    assert attack.then != attack.code


def test_names_are_distinct() -> None:
    """Each row is an attack of its own."""
    assert len(set(names)) == len(names)
