"""Single rows of rules that take gradients: kernels, servers, and what workers push."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daruma_trainer.contract import Member, Membership, Role, Settings
from daruma_trainer.layout import Floats, Ints, TableSpec
from daruma_trainer.rules import SGD, Adagrad, Adam, Add, Assign, Rule, rule_to_json
from daruma_trainer.server.data import DataPlane
from daruma_trainer.server.replication.replicator import _cut
from daruma_trainer.server.replies import Reply
from daruma_trainer.server.shard import Shard, TableArrays
from daruma_trainer.server.slots import SlotState
from daruma_trainer.wire import (
    Header,
    Kind,
    Push,
    TablePush,
    decode_json,
    encode_push,
    from_bitmap,
    mask_of,
)
from daruma_trainer.worker.copies import HostCopy
from daruma_trainer.worker.pushes import Held, Update
from daruma_trainer.worker.sending import parts_of

IDS = np.arange(1024)
ROWS, COLS = 103, 3
EXACT: list[Rule] = [
    SGD(),
    SGD(momentum=0.9, dampening=0.1, weight_decay=0.01),
    SGD(momentum=0.9, nesterov=True, weight_decay=0.01),
    Adam(weight_decay=0.01),
    Adagrad(weight_decay=0.01),
    Add(),
    Assign(),
]


def shard_of(rule: Rule, block_rows: int = 4, seed: int = 0, cols: int = COLS) -> Shard:
    shard = Shard("uid", IDS)
    shard.create(TableSpec(0, "t", (ROWS, cols), block_rows, rule_to_json(rule)))
    values = np.random.default_rng(seed).normal(size=(ROWS, cols)).astype(np.float32)
    shard.set_values(IDS, {0: values[shard.tables[0].layout.rows].reshape(-1)})
    return shard


def by_row(table: TableArrays) -> Floats:
    """The table in its own order."""
    found = np.empty_like(table.data)
    found[table.layout.rows] = table.data
    return found


def everything(table: TableArrays) -> list[bytes]:
    return [*(a.tobytes() for a in (table.data, *table.state)), table.steps.tobytes()]


def gradients(count: int, seed: int, cols: int = COLS) -> list[Floats]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(ROWS, cols)).astype(np.float32) for _ in range(count)]


def some_rows(rng: np.random.Generator) -> Ints:
    return np.sort(rng.choice(ROWS, int(rng.integers(1, ROWS)), replace=False))


def push_rows(shard: Shard, rows: Ints, values: Floats, lr: float = 0.01) -> None:
    parts = [TablePush(0, lr, values, rows)]
    assert shard.check(parts, IDS) is None
    shard.apply(parts, IDS, IDS)


def checked() -> Any:
    """Torch warns where it is not told whether to check sparse tensors."""
    import torch  # takes seconds: only the process that runs this pays for it

    return cast("Any", torch.sparse).check_sparse_tensor_invariants()


# Kernels


@pytest.mark.parametrize("block_rows", [1, 4, ROWS])
@pytest.mark.parametrize("cols", [1, COLS, 20_000], ids=["1", "3", "more than a tile"])
@pytest.mark.parametrize("rule", EXACT, ids=str)
def test_all_rows_are_the_whole_table_bit_for_bit(rule: Rule, block_rows: int, cols: int) -> None:
    count = 20 if cols < 100 else 2
    whole, rows = shard_of(rule, block_rows, cols=cols), shard_of(rule, block_rows, cols=cols)
    for gradient in gradients(count, 1, cols):
        whole.apply([TablePush(0, 0.01, gradient[whole.tables[0].layout.rows])], IDS, IDS)
        push_rows(rows, np.arange(ROWS), gradient)
    assert everything(rows.tables[0]) == everything(whole.tables[0])
    np.testing.assert_allclose(rows.norms, whole.norms, rtol=1e-4)


@pytest.mark.parametrize("rule", EXACT, ids=str)
def test_what_is_not_pushed_stays_as_it_was(rule: Rule) -> None:
    shard, rng = shard_of(rule), np.random.default_rng(2)
    table = shard.tables[0]
    at = np.empty(ROWS, np.int64)
    at[table.layout.rows] = np.arange(ROWS)
    for gradient in gradients(10, 3):
        table.changed[:] = False
        before = [a.copy() for a in (table.data, *table.state)]
        steps, rows = table.steps.copy(), some_rows(rng)
        push_rows(shard, rows, gradient[rows])
        others = np.setdiff1d(np.arange(ROWS), rows)
        for old, new in zip(before, (table.data, *table.state), strict=True):
            np.testing.assert_array_equal(new[at[others]], old[at[others]])
            assert (new[at[rows]] != old[at[rows]]).any()
        touched = np.isin(table.layout.blocks, rows // 4)
        np.testing.assert_array_equal(table.changed, touched)
        np.testing.assert_array_equal(table.steps - steps, touched.astype(np.int64))
        moved = float(np.linalg.norm((table.data - before[0]).astype(np.float64)))
        assert shard.norms[-1] == pytest.approx(moved, rel=1e-3)


@pytest.mark.parametrize(
    ("rule", "make"),
    [
        (SGD(), lambda optim, p: optim.SGD(p, lr=0.01)),
        (Adam(), lambda optim, p: optim.SparseAdam(p, lr=0.01)),
        (Adagrad(), lambda optim, p: optim.Adagrad(p, lr=0.01)),
    ],
    ids=["sgd", "adam", "adagrad"],
)
def test_rows_are_torchs_sparse_gradients(rule: Rule, make: Any) -> None:
    """SparseAdam counts the pushes of the whole table: so does one block."""
    import torch  # takes seconds: only the process that runs this pays for it

    shard, rng = shard_of(rule, block_rows=ROWS), np.random.default_rng(4)
    param = torch.nn.Parameter(torch.from_numpy(by_row(shard.tables[0])))
    optimizer = make(torch.optim, [param])
    for gradient in gradients(100, 5):
        rows = some_rows(rng)
        values = torch.from_numpy(gradient[rows])
        with checked():
            param.grad = torch.sparse_coo_tensor(torch.from_numpy(rows)[None], values, (ROWS, COLS))
            optimizer.step()
        push_rows(shard, rows, gradient[rows])
    np.testing.assert_allclose(
        by_row(shard.tables[0]), param.detach().numpy(), rtol=1e-6, atol=2e-6
    )


@pytest.mark.parametrize(
    "rule",
    [
        SGD(momentum=0.9),
        SGD(momentum=0.9, weight_decay=0.01, nesterov=True),
        Adagrad(weight_decay=0.1),
    ],
    ids=str,
)
def test_each_row_is_as_if_it_were_a_parameter_of_its_own(rule: Rule) -> None:
    """That is what lazy means where torch has no such optimizer: no gradient, no step."""
    import torch  # takes seconds: only the process that runs this pays for it

    shard, rng = shard_of(rule), np.random.default_rng(6)
    params = [torch.nn.Parameter(torch.from_numpy(r.copy())) for r in by_row(shard.tables[0])]
    if isinstance(rule, SGD):
        optimizer: Any = torch.optim.SGD(
            params, 0.01, rule.momentum, weight_decay=rule.weight_decay, nesterov=rule.nesterov
        )
    else:
        optimizer = torch.optim.Adagrad(params, 0.01, weight_decay=0.1)
    for gradient in gradients(50, 7):
        rows = some_rows(rng)
        for row, param in enumerate(params):
            param.grad = torch.from_numpy(gradient[row].copy()) if row in rows else None
        optimizer.step()
        push_rows(shard, rows, gradient[rows])
    found = np.stack([param.detach().numpy() for param in params])
    np.testing.assert_allclose(by_row(shard.tables[0]), found, rtol=1e-6, atol=1e-6)


# Servers


def plane_of(rule: Rule, mode: str = "Sync", workers: int = 3, cols: int = COLS) -> DataPlane:
    seats = [(Role.SERVER, 0), *((Role.WORKER, i) for i in range(workers))]
    members = tuple(Member(role, i, 1, f"{role}{i}", f"{role}{i}:1") for role, i in seats)
    settings = Settings(consistency=mode)
    plane = DataPlane(Membership("uid", "n", "j", 1, 1, workers, members, settings), 0, 1)
    assert plane.add_table(TableSpec(0, "t", (ROWS, cols), 4, rule_to_json(rule))) is None
    plane.note_given(IDS)
    plane.beginning.open_slots()
    return plane


def send(plane: DataPlane, worker: int, batch: int, slots: Ints, *parts: TablePush) -> Reply:
    push = Push(worker, batch, batch, 1, 0, mask_of(slots), parts)
    frames = [b"", *(bytes(frame) for frame in encode_push(push))]
    reply = plane.push(f"worker-{worker}-1".encode(), Header(Kind.PUSH, 1, 1, 1), frames)
    assert reply is not None
    return reply


def rows_in(plane: DataPlane, rows: Ints, slots: Ints) -> Ints:
    return rows[plane.shard.tables[0].layout.find_in(slots, rows) >= 0]


def test_a_push_of_rows_that_comes_again_is_applied_once() -> None:
    plane, rows = plane_of(SGD(momentum=0.9), "Async"), np.array([0, 5, 102])
    part = TablePush(0, 0.5, np.ones((3, COLS), np.float32), rows)
    for _ in range(2):
        reply = send(plane, 0, 1, IDS, part)
        assert from_bitmap(reply.body[0][:128]).all()
    assert (plane.counts.applied, plane.counts.duplicate) == (1, 1)
    values = by_row(plane.shard.tables[0])
    assert (values[rows] == -0.5).all()
    assert not np.delete(values, rows, axis=0).any()


@pytest.mark.parametrize("rows", [[3, 3], [5, 2], [0, ROWS], [-1, 0]])
def test_rows_that_are_none_are_refused(rows: list[int]) -> None:
    plane = plane_of(Adam(), "Async")
    part = TablePush(0, 0.5, np.ones((2, COLS), np.float32), np.array(rows))
    reply = send(plane, 0, 1, IDS, part)
    assert reply.kind is Kind.REFUSED, decode_json(reply.body[0])
    assert not plane.shard.tables[0].data.any()


def test_a_mean_is_over_all_workers_whoever_gave_a_row() -> None:
    plane = plane_of(SGD(), workers=3)
    for worker, rows, value in [(0, [1, 2], 3.0), (1, [2, 7], 30.0), (2, [], 0.0)]:
        values = np.full((len(rows), COLS), value, np.float32)
        send(plane, worker, 1, IDS, TablePush(0, 1.0, values, np.array(rows, np.int64)))
    expected = np.zeros(ROWS, np.float32)
    expected[[1, 2, 7]] = -1.0, -11.0, -10.0
    np.testing.assert_array_equal(by_row(plane.shard.tables[0]), expected[:, None] + np.zeros(COLS))
    assert plane.step == 1


def test_a_worker_that_left_does_not_count_in_the_mean() -> None:
    plane = plane_of(SGD(), workers=3)
    plane.worker_left(2, 0)
    for worker, rows in [(1, [2]), (0, [1, 2])]:
        values = np.full((len(rows), COLS), 4.0, np.float32)
        send(plane, worker, 1, IDS, TablePush(0, 1.0, values, np.array(rows)))
    assert by_row(plane.shard.tables[0])[[0, 1, 2], 0].tolist() == [0.0, -2.0, -4.0]


def test_a_worker_that_gives_the_whole_table_makes_it_a_step_of_all_rows() -> None:
    plane = plane_of(SGD(momentum=0.5), workers=2)
    for batch in (1, 2):
        send(plane, 1, batch, IDS, TablePush(0, 1.0, np.full((1, COLS), 8.0, np.float32),
                                             np.array([batch])))  # fmt: skip
        send(plane, 0, batch, IDS, TablePush(0, 1.0, np.full((ROWS, COLS), 2.0, np.float32)))
    # Means of 1, and 5 for the row of the second worker; the first counts half in the second step.
    values = by_row(plane.shard.tables[0])
    assert values[:4, 0].tolist() == [-2.5, -8.5, -6.5, -2.5]


def test_a_push_that_comes_again_for_slots_that_were_not_ready_counts_once_in_each() -> None:
    plane, rows = plane_of(SGD(), workers=2), np.arange(ROWS)
    part = TablePush(0, 1.0, np.full((ROWS, COLS), 4.0, np.float32), rows)
    plane.slots.state[::2] = SlotState.RESTORING
    send(plane, 0, 1, IDS, part)
    plane.slots.state[:] = SlotState.READY
    send(plane, 0, 1, IDS, part)
    send(plane, 1, 1, IDS, TablePush(0, 1.0, np.empty((0, COLS), np.float32), rows[:0]))
    assert (by_row(plane.shard.tables[0]) == -2.0).all()


def test_what_goes_to_a_replica_in_parts_has_each_row_once() -> None:
    plane, rows = plane_of(SGD()), np.array([3, 9, 50, 102])
    made = [TablePush(0, 1.0, np.repeat(rows, COLS).astype(np.float32), rows)]
    found: list[int] = []
    for a, b in [(0, 300), (300, 301), (301, 1024)]:
        (part,) = _cut(plane, made, IDS, a, b)
        assert part.rows is not None
        assert len(rows_in(plane, part.rows, IDS[a:b])) == len(part.rows)
        np.testing.assert_array_equal(part.values, part.rows[:, None] + np.zeros(COLS))
        found += part.rows.tolist()
    assert sorted(found) == rows.tolist()


def by_hand(plane: DataPlane, given: list[tuple[Ints, Floats]], momentum: Floats) -> Floats:
    """The step of SGD with momentum 0.5 and rate 0.1 that workers' rows make."""
    values = by_row(plane.shard.tables[0])
    total, touched = np.zeros_like(values), np.zeros(ROWS, np.bool_)
    for rows, gradient in given:
        total[rows] += gradient
        touched[rows] = True
    total *= np.float32(1 / len(given))
    momentum[touched] = momentum[touched] * np.float32(0.5) + total[touched]
    values[touched] -= momentum[touched] * np.float32(0.1)
    return values


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.data())
def test_a_step_of_rows_is_the_same_bit_for_bit_in_whatever_order_its_parts_come(
    seed: int, data: st.DataObject
) -> None:
    """Messages of some slots each, some twice; the sum is made in the workers' order."""
    rng, plane = np.random.default_rng(seed), plane_of(SGD(momentum=0.5))
    momentum = np.zeros((ROWS, COLS), np.float32)
    halves = [IDS[IDS % 2 == 0], IDS[IDS % 2 == 1]]
    for batch in (1, 2, 3):
        given = []
        for _ in range(3):
            rows = some_rows(rng) if rng.random() < 0.8 else np.empty(0, np.int64)
            scale = 10.0 ** rng.integers(-4, 4)
            given.append((rows, np.float32(scale) * gradients(1, batch)[0][rows]))
        expected = by_hand(plane, given, momentum)
        messages = [(w, half) for w in range(3) for half in (0, 1)]
        order = data.draw(st.permutations(messages))
        for w, half in [*order[:4], *order]:
            rows, values = given[w]
            mine = np.isin(rows, rows_in(plane, rows, halves[half]))
            # The rate of the first worker counts, also where none of its rows are in the message.
            rate = (0.1, 0.2, 0.3)[w]
            send(plane, w, batch, halves[half], TablePush(0, rate, values[mine], rows[mine]))
        np.testing.assert_array_equal(by_row(plane.shard.tables[0]), expected)


# Workers


def test_each_message_of_a_batch_says_which_tables_it_has() -> None:
    """Where none of the rows are in it, too: the first worker's rate must count everywhere."""
    copy = HostCopy("uid", 3, 1)
    copy.add(TableSpec(0, "t", (ROWS, COLS), 4, rule_to_json(Adam())))
    copy.arrange()
    rows = np.array([9])
    held = Held(1, 1, (Update(0, 0.1, np.ones((1, COLS), np.float32), rows),))
    found = []
    for server in range(3):
        groups = copy.groups_of(server)
        for number in range(len(groups)):
            (part,) = parts_of(held, groups, number)
            assert part.rows is not None
            assert part.lr == 0.1
            found += part.rows.tolist()
    assert found == [9]


def step_of(*grads: Any) -> tuple[Update, ...]:
    """What an optimizer pushes of parameters with these gradients, each (6, 2)."""
    import torch  # takes seconds: only the process that runs this pays for it

    from daruma_trainer.worker.optimizer import Optimizer

    pushed: list[tuple[Update, ...]] = []
    job = SimpleNamespace(
        add_table=lambda name, _shape, _rule, _values: SimpleNamespace(id=int(name[1:])),
        begin=lambda: None,
        after_pull=lambda _write: None,
        values=lambda _table: np.zeros((6, 2), np.float32),
        exchange=pushed.append,
    )
    params = [torch.nn.Parameter(torch.ones(6, 2)) for _ in grads]
    optimizer = Optimizer(cast("Any", job), params, SGD(lr=0.5))
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    return pushed[0]


def test_an_optimizer_pushes_the_rows_of_sparse_gradients_each_once() -> None:
    import torch  # takes seconds: only the process that runs this pays for it

    bag = torch.nn.Embedding(6, 2, sparse=True)
    with checked():
        bag(torch.tensor([4, 1, 4])).sum().backward()
    assert bag.weight.grad is not None
    (update,) = step_of(bag.weight.grad)
    assert update.rows is not None
    assert update.rows.tolist() == [1, 4]
    assert update.values.tolist() == [[1, 1], [2, 2]]
    assert update.lr == 0.5


def test_an_optimizer_pushes_what_it_is_given() -> None:
    import torch  # takes seconds: only the process that runs this pays for it

    with checked():
        index = torch.empty((1, 0), dtype=torch.int64)
        none, dense, single = step_of(
            torch.sparse_coo_tensor(index, torch.empty(0, 2), (6, 2)),
            torch.full((6, 2), 3.0),
            torch.eye(6, 2).to_sparse(),
        )
    assert none.rows is not None
    assert (len(none.rows), none.values.shape) == (0, (0, 2))
    assert dense.rows is None
    assert (dense.values == 3.0).all(), "a copy: zero_grad came"
    assert single.rows is None
    np.testing.assert_array_equal(single.values, np.eye(6, 2))
