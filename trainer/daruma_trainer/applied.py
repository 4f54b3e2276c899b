"""Applied entries: which batches of one worker a slot has. Pure integers.

An entry is (last, window): the last applied batch, and 64 bits for the batches before it; bit i
set means that batch last − 1 − i is applied too. What is older than the window counts as applied,
because a worker's pushes reach a slot in order and what a recovery lost is marked (the floor).
"""

from enum import IntEnum

from daruma_trainer.contract import WINDOW

FULL = (1 << WINDOW) - 1
"""The window of an entry without gaps."""


class Seen(IntEnum):
    """What a slot knows of a range of batches."""

    NEW = 0
    DUPLICATE = 1
    OVERLAP = 2
    """Some of the range is applied and some is not: it cannot be applied, nor ignored."""


def seen(last: int, window: int, first: int, until: int) -> Seen:
    """Say what an entry (last, window) has of batches `first` to `until`."""
    if first > last:
        return Seen.NEW
    if until > last:
        return Seen.OVERLAP
    missing = holes(last, window, first, until)
    if not missing:
        return Seen.DUPLICATE
    return Seen.NEW if len(missing) == until - first + 1 else Seen.OVERLAP


def holes(last: int, window: int, first: int, until: int) -> list[int]:
    """Return the batches of a range at or below `last` that are not applied."""
    low = max(first, last - WINDOW)
    return [b for b in range(low, min(until, last - 1) + 1) if not window >> (last - 1 - b) & 1]


def mark(last: int, window: int, first: int, until: int) -> tuple[int, int]:
    """Return the entry after batches `first` to `until` were applied."""
    if until > last:
        # The old last moves into the window, then everything moves on; gaps stay gaps.
        shift = until - last
        window = ((window << 1 | 1) << (shift - 1)) & FULL if shift <= WINDOW else 0
        last = until
    for b in range(max(first, last - WINDOW), min(until, last - 1) + 1):
        window |= 1 << (last - 1 - b)
    return last, window


def complete_until(last: int, window: int) -> int:
    """Return the largest batch up to which nothing is missing."""
    missing = holes(last, window, last - WINDOW, last)
    return missing[0] - 1 if missing else last
