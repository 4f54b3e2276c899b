"""Sets of whole numbers as stretches: which batches were lost, and which are kept.

A lost server takes thousands of one worker's batches at once, and a seat may be vacant for a
million: one by one they would be messages of megabytes, and a loop that stands still.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from daruma_trainer.parsing import ContractError

MOST = (1 << 62) - 1
"""The largest number that is read: how many there are up to it is counted in 63 bits, too."""


@dataclass(frozen=True, slots=True)
class Stretches:
    """A set of whole numbers."""

    pairs: tuple[tuple[int, int], ...] = ()
    """(first, last) of each stretch, ascending; between two of them a number is missing."""

    @classmethod
    def of(cls, *pairs: tuple[int, int]) -> "Stretches":
        """Return the numbers of all these stretches; one that ends before it begins has none."""
        found: list[tuple[int, int]] = []
        for first, last in sorted(pair for pair in pairs if pair[0] <= pair[1]):
            if found and first <= found[-1][1] + 1:
                found[-1] = found[-1][0], max(found[-1][1], last)
            else:
                found.append((first, last))
        return cls(tuple(found))

    @classmethod
    def these(cls, numbers: Iterable[int]) -> "Stretches":
        """Return these numbers."""
        return cls.of(*((n, n) for n in numbers))

    @classmethod
    def read(cls, text: str) -> "Stretches":
        """Read what `text` wrote: `0,2-4`. ContractError: it is none."""
        pairs = []
        for part in filter(None, text.split(",")):
            begin, _, end = part.partition("-")
            try:
                first, last = int(begin), int(end or begin)
            except ValueError as error:
                raise ContractError(f"{part[:40]!r} is no stretch of numbers") from error
            if last > MOST:
                raise ContractError(f"{part[:40]!r} is a stretch beyond {MOST}")
            if last < first:
                raise ContractError(f"{part[:40]!r} is a stretch that ends before it begins")
            pairs.append((first, last))
        return cls.of(*pairs)

    def text(self, most: int | None = None) -> str:
        """Write it: `0,2-4`; `most`: only so many stretches, the last ones."""
        pairs = self.pairs if most is None else self.pairs[-most:]
        return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in pairs)

    def up_to(self, last: int) -> "Stretches":
        """Return its numbers that are no larger than this."""
        return Stretches.of(*((a, min(b, last)) for a, b in self.pairs))

    def __len__(self) -> int:
        return sum(b - a + 1 for a, b in self.pairs)

    def __iter__(self) -> Iterator[int]:
        return (n for a, b in self.pairs for n in range(a, b + 1))

    def __or__(self, other: "Stretches") -> "Stretches":
        return Stretches.of(*self.pairs, *other.pairs)

    def __and__(self, other: "Stretches") -> "Stretches":
        return self - (self - other)

    def __sub__(self, other: "Stretches") -> "Stretches":
        left, at = [], 0
        for first, last in self.pairs:
            while at < len(other.pairs) and other.pairs[at][1] < first:
                at += 1
            begin = first
            for a, b in other.pairs[at:]:
                if a > last:
                    break
                left.append((begin, a - 1))
                begin = b + 1
            left.append((begin, last))
        return Stretches.of(*left)
