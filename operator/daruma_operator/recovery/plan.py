"""Plan where lost slots are taken from: each from the freshest copy that can be reached.

Of peers the version of each slot is known, so they are ordered by it. The running checkpoint comes
after them: it is at most as fresh as what workers pulled since it was saved, and of its slots the
server that reads it knows the versions, not the operator.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from daruma_trainer.contract import (
    Copies,
    Source,
    SourceKind,
    Version,
    slots_from_hex,
    slots_to_hex,
)

MAX_SOURCES = 256
"""Sources in one plan; the stalest beyond it are left out."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Where the slots of one server come from."""

    sources: tuple[Source, ...]
    """In the order in which a slot tries those that hold it."""
    unsourced: int
    """Slots that no source has."""
    oldest: Version | None
    """Of the peer copies that stand first for some slot, the stalest."""
    exact_peers: bool
    """Every slot has a peer's copy standing first for it."""
    handed: bool = False
    """A predecessor that is still there hands them over."""
    nothing: bool = False
    """The server has no slots: of very many some have none."""


def plan_slots(
    slots: Sequence[int],
    kinds: Collection[SourceKind],
    copies: Mapping[str, Sequence[Copies]],
    *,
    stored: bool,
    predecessor: tuple[str, str] | None = None,
    replica: str | None = None,
) -> Plan:
    """Order the sources of `slots`.

    `copies` says which slots each live worker kept of its last complete pull, and what `replica`,
    which was promoted and is to be restored, has itself; `stored` whether a
    store may hold the lost shard's running checkpoint, `predecessor` who hands the slots over (its
    name and its agent).
    """
    if not slots and predecessor is None:
        return Plan((), 0, None, exact_peers=True, nothing=True)
    lost = frozenset(slots)
    peers: list[tuple[Version, str, list[int]]] = []
    for member, held in copies.items():
        if (SourceKind.REPLICA if member == replica else SourceKind.PEER) in kinds:
            for part in held:
                mine = [s for s in slots_from_hex(part.slots) if s in lost]
                if mine:
                    peers.append((Version(part.lineage, part.position), member, mine))
    # Among equals any will do, but the same one for the same observations.
    # The replica's own come with the optimizer's state, and without a way.
    peers.sort(key=lambda p: (-p[0].lineage, -p[0].position, p[1] != replica, p[1]))
    peers = peers[:MAX_SOURCES]
    covered: set[int] = set()
    oldest: Version | None = None
    for version, _, mine in peers:
        if not covered.issuperset(mine):
            oldest = version
            covered.update(mine)
    sources = [
        Source(
            SourceKind.REPLICA if member == replica else SourceKind.PEER,
            slots_to_hex(mine),
            member,
        )
        for _, member, mine in peers
    ]
    by_peers = covered == lost
    if predecessor is not None:
        name, agent = predecessor
        given = Source(SourceKind.PREDECESSOR, slots_to_hex(slots), name, agent=agent)
        sources.insert(0, given)
        covered |= lost
    if stored and SourceKind.RUNNING_CHECKPOINT in kinds:
        sources.append(Source(SourceKind.RUNNING_CHECKPOINT, slots_to_hex(slots)))
        covered |= lost
    handed = predecessor is not None
    return Plan(tuple(sources), len(lost - covered), oldest, by_peers, handed)
