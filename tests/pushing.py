"""What tests of a worker's pushes share: three servers, and one table."""

import numpy as np

from daruma_trainer.contract import Replay
from daruma_trainer.layout import TableSpec
from daruma_trainer.rules import SGD, Rule, rule_to_json
from daruma_trainer.wire import Slots, TablePush
from daruma_trainer.worker.copies import HostCopy
from daruma_trainer.worker.pushes import Held, Pushes, Update

SERVERS = 3
ROWS, COLS = 64, 2


def copy_of(rule: Rule) -> HostCopy:
    copy = HostCopy("uid", SERVERS, 1)
    copy.add(TableSpec(0, "t", (ROWS, COLS), 1, rule_to_json(rule)))
    copy.arrange()
    return copy


COPY = copy_of(SGD())


def slots_of(server: int) -> Slots:
    return COPY.slots_of(server)


def rows_of(server: int) -> list[int]:
    groups = COPY.groups_of(server)
    return [row for group in groups for row in group.layout.tables[0].rows.tolist()]


def update(value: float, lr: float = 0.1, rows: list[int] | None = None) -> Update:
    count = ROWS if rows is None else len(rows)
    index = None if rows is None else np.array(rows, np.int64)
    return Update(0, lr, np.full((count, COLS), value, np.float32), index)


def held(pushes: Pushes, batch: int, *updates: Update, epoch: int = 1) -> Held:
    pushes.begin(batch)
    made = Held(batch, epoch, updates)
    pushes.hold(made)
    return made


def accumulate(
    pushes: Pushes, made: Held, server: int, rule: Rule | None = None, now: float = 0.0
) -> None:
    pushes.accumulate(made, server, COPY, now, [rule or SGD()])


def sealed(pushes: Pushes, server: int) -> list[TablePush]:
    """What a server's only replay sends, all its messages together."""
    (done,) = pushes.sealed[server]
    return [part for parts in done.cut(COPY.groups_of(server)) for part in parts]


def accumulated(replay: Replay, rule: Rule, count: int = 3) -> Pushes:
    pushes = Pushes(replay)
    for batch in range(1, count + 1):
        made = held(pushes, batch, update(1.0))
        accumulate(pushes, made, 1, rule)
        pushes.note_applied(batch, ~slots_of(1))
    return pushes


def values_of(parts: tuple[TablePush, ...] | list[TablePush]) -> dict[int, float]:
    """Of pushes of single rows: the first value of each row."""
    found: dict[int, float] = {}
    for part in parts:
        assert part.rows is not None
        assert (np.diff(part.rows) > 0).all()
        assert (part.values == part.values[:, :1]).all()
        found |= dict(zip(part.rows.tolist(), part.values[:, 0].tolist(), strict=True))
    return found
