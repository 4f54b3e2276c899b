"""What servers say of the store during a recovery: what is not whole, and whether it can be asked.
Pure."""

from dataclasses import dataclass

from daruma_operator.controller.draft import Draft
from daruma_operator.controller.sourcing import goes_back, restoring
from daruma_operator.controller.verdicts import name_of
from daruma_operator.names import seat
from daruma_trainer.contract import Report, Role, SavedState

DAMAGED = "SourceDamaged"
STORE_AWAY = "StoreUnreachable"
"""status.reason, and an event, while a recovery waits for the store."""


@dataclass(frozen=True, slots=True)
class UnreadCut:
    """The cut that all members were to go back to cannot be loaded by all."""

    why: str
    older: SavedState | None
    """The newest before it, where there is one."""


def unread_cut(d: Draft) -> UnreadCut | None:
    """Tell of the cut of a rollback that a server cannot load; None if that is not so."""
    if not goes_back(d.status):
        return None
    generation = d.status.rollback.generation
    unread = [
        (name, report)
        for name, report in _servers(d)
        if report.error is not None
        and report.epoch >= d.status.epoch
        and report.generation == generation
    ]
    if not unread:
        return None
    # As far back as any of them has to; where one finds none, there is none for all.
    olders = [report.older for _, report in unread]
    found = [older for older in olders if older is not None]
    older = min(found, key=lambda o: o.path) if len(found) == len(olders) else None
    then = "there is no cut before it" if older is None else f"going back to step {older.step}"
    for name, report in unread:
        d.tell(DAMAGED, f"{report.error}; {then}", warning=True, member=name.rpartition("-")[0])
    name, report = unread[0]
    return UnreadCut(f"{name}: {report.error}; {then}", older)


def tell_damage(d: Draft) -> bool:
    """Tell of stored blocks that were not whole; True if there were any."""
    found = False
    for member in restoring(d.status):
        report = d.seen.report(name_of(member))
        restore = None if report is None else report.restore
        if restore is not None and restore.damaged and restore.recovery == d.record.id:
            found = True
            where = seat(member.role, member.index)
            text = f"what was stored of {where} is not whole: " + "; ".join(restore.damaged)
            d.tell(DAMAGED, text, warning=True, member=where)
    return found


def store_away(d: Draft) -> str | None:
    """What a server says that waits for the store in this recovery, or None."""
    for name, report in _servers(d):
        if report.waiting is not None and report.epoch >= d.record.epoch:
            return f"{name}: {report.waiting}"
    return None


def _servers(d: Draft) -> list[tuple[str, Report]]:
    """What the servers that count said last, as far as they were heard."""
    reports = [(name_of(m), d.seen.report(name_of(m))) for m in d.members(Role.SERVER)]
    return [(name, report) for name, report in reports if report is not None]
