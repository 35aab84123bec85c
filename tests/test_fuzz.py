"""A seeded handful of bench.fuzz, without its guidance by coverage."""

from __future__ import annotations

import random

import pytest

from bench.fuzz.__main__ import _NASTY, _mutated_json
from bench.fuzz.seeds import seeds
from bench.fuzz.targets import JSON_TARGETS, TARGETS, play


@pytest.fixture(scope="module")
def good() -> dict[str, list[bytes]]:
    return seeds()


def _damaged(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        at = draw.randrange(len(changed) + 1)
        action = draw.randrange(5)
        if action == 0 and at < len(changed):
            changed[at] ^= 1 << draw.randrange(8)
        elif action == 1:
            changed[at : at + 8] = draw.choice((0, 1, 2**31, 2**60, 2**64 - 1)).to_bytes(
                8, "little"
            )
        elif action == 2:
            del changed[at : at + draw.choice((1, 8, len(changed)))]
        elif action == 3:
            changed[at:at] = draw.randbytes(draw.choice((1, 8, 64)))
        else:
            changed[at:at] = changed[max(0, at - 64) : at]
    return bytes(changed)


@pytest.mark.parametrize("target", TARGETS)
def test_anything_is_taken_or_refused(target: str, good: dict[str, list[bytes]]) -> None:
    assert all(play(target, data) for data in good[target]), "good inputs are good"
    play(target, b"")
    draw = random.Random(target)
    refused = 0
    for _ in range(200):
        data = draw.choice(good[target])
        as_json = target in JSON_TARGETS and draw.random() < 0.5
        changed = _mutated_json(data, draw) if as_json else None
        refused += not play(target, _damaged(data, draw) if changed is None else changed)
    assert refused > 10


def test_mutations_leave_the_samples_they_are_made_of_alone() -> None:
    """Once a sample was put into itself, and walking through it took all memory."""
    before = repr(_NASTY)
    for seed in range(3000):
        _mutated_json(b'{"a":[1]}', random.Random(seed))
    assert repr(_NASTY) == before
