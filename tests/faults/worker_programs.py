"""Small programs for the tests here, run as `python worker_programs.py NAME [ARGUMENT]`."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import daruma_trainer as daruma
from daruma_trainer.layout import Floats, Ints


def tables(_: str) -> None:
    """Two tables, one after the other, each with values of its own; rows pushed and pulled."""
    with daruma.join() as job:
        first = job.table("first", (6, 2), initial=np.full((6, 2), 1.0))
        # Without the row that the other worker may have changed already.
        assert np.delete(first.pull(), 2, axis=0).tolist() == [[1.0, 1.0]] * 5
        second = job.table("second", (5,), rule="assign", initial=np.arange(5))
        assert first.pull([0, 5]).tolist() == [[1.0, 1.0]] * 2
        assert second.pull([4, 1]).tolist() == [4.0, 1.0]
        if job.index == 0:
            second.push([3, 0], [30.0, 10.0])
        job.flush()
        first.push([2], [[1.0, 2.0]])
        job.flush()
        job.report(second=float(second.pull([3])[0]), batch=job.batch)


def optimizer(_: str) -> None:
    """Groups, a schedule and clipping, as with torch alone; says how far it is from torch."""
    import torch

    def model() -> torch.nn.Sequential:
        torch.manual_seed(1)
        return torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))

    def groups(net: torch.nn.Sequential) -> list[dict[str, object]]:
        return [
            {"params": list(net[0].parameters()), "lr": 0.2},
            {"params": list(net[2].parameters()), "momentum": 0.5},
        ]

    def train(net: torch.nn.Module, opt: torch.optim.Optimizer) -> None:
        schedule = torch.optim.lr_scheduler.StepLR(opt, 5, 0.5)
        data = torch.Generator().manual_seed(2)
        for _ in range(20):
            x = torch.randn(4, 8, generator=data)
            y = torch.randint(0, 3, (4,), generator=data)
            torch.nn.functional.cross_entropy(net(x), y).backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            opt.step()
            opt.zero_grad()
            schedule.step()

    plain, served = model(), model()
    train(plain, torch.optim.SGD(groups(plain), lr=0.1))
    with daruma.join() as job:
        train(served, job.optimizer(groups(served), daruma.SGD(lr=0.1)))
        pairs = zip(plain.parameters(), served.parameters(), strict=True)
        job.report(apart=max((a - b).abs().max().item() for a, b in pairs))


def count(steps: str, lag: float = 0.0, gate: Path | None = None) -> None:
    """Each sample of a data set adds one to its row: what was done twice or not is seen."""
    with daruma.join() as job:
        table = job.table("seen", (60,))
        for (rows,) in job.batches((np.arange(60),), 5, steps=int(steps)):
            if gate is not None and job.batch == 5:
                stand(gate)
            table.push(rows, np.ones(len(rows)))
            time.sleep(0.02 + lag * job.index)


def stand(gate: Path) -> None:
    """Wait until there is a file."""
    deadline = time.monotonic() + 60
    while not gate.exists():
        if time.monotonic() > deadline:
            raise RuntimeError(f"nobody made {gate}")
        time.sleep(0.01)


def gated_count(gate: str) -> None:
    """The same in 60 batches, most of them only once there is a file."""
    count("60", gate=Path(gate))


def gated_count_long(gate: str) -> None:
    """The same in 150 batches."""
    count("150", gate=Path(gate))


def own(gate: str) -> None:
    """Rows that each worker adds to alone: after each push it has to find all of its own.

    The second half goes slowly, until there is a file of the gate's name and `.end`.
    """
    end = Path(f"{gate}.end")
    with daruma.join() as job:
        table = job.table("seen", (60,))
        mine = np.arange(job.index, 60, job.workers)
        for _ in job.batches((np.arange(6000),), 5, steps=60):
            if job.batch == 5:
                stand(Path(gate))
            table.push(mine, np.ones(len(mine)))
            found = table.values(mine)
            if (found != job.batch).any():
                raise RuntimeError(f"after batch {job.batch}: {found}")
            time.sleep(0.02 if job.batch < 30 or end.exists() else 1.0)


def lag(steps: str) -> None:
    """The same, with a worker 1 that comes late."""
    count(steps, 0.1)


def gated(gate: str) -> None:
    """Phases in which each worker writes its row; worker 1 waits for a file in the sixth.

    When a phase begins, everybody's row is of the one before; those ahead may be in it already.
    """
    with daruma.join() as job:
        table = job.table("seen", (job.workers,), rule="assign")
        for phase in job.phases(10):
            found = table.values()
            if (found < phase).any() or (found > phase + 1).any():
                raise RuntimeError(f"phase {phase} begins with {found}")
            if job.index == 1 and phase == 5:
                stand(Path(gate))
            table.push([job.index], [phase + 1])


def two_tables(_: str) -> None:
    """One batch for two tables, an empty one, and a barrier between workers."""
    with daruma.join() as job:
        rows = job.table("rows", (job.workers, 2), rule="assign")
        sums = job.table("sums", (3,))
        job.push(rows.change([job.index], [[1.0, 2.0]]), sums.change(None, np.ones(3)))
        rows.barrier()
        if rows.values().tolist() != [[1.0, 2.0]] * job.workers:
            raise RuntimeError(f"after the barrier: {rows.values()}")
        # Who left the barrier first may have pushed its next batch already.
        if sums.values().tolist() not in ([2.0, 2.0, 2.0], [2.0, 7.0, 2.0]):
            raise RuntimeError(f"after the barrier: {sums.values()}")
        if job.index == 0:
            sums.push([1], [5.0])
        else:
            sums.push([], [])
        job.barrier()
        state = {name: values.tolist() for name, values in job.state_dict().items()}
        if state != {"rows": [[1.0, 2.0]] * job.workers, "sums": [2.0, 7.0, 2.0]}:
            raise RuntimeError(f"at the end: {state}")
        job.report(batch=job.batch, sum=float(sums.values([1])[0]))


def sums(gate: str) -> None:
    """Each worker adds to all rows, and knows what it added; `gate` as in `gated`.

    It makes nothing again while there is a file `hold` beside the gate.
    """
    with daruma.join() as job:
        state = job.table("state", (job.workers,), rule="assign")
        table = job.table("sums", (64, 2))

        def part(rows: Ints) -> Floats:
            deadline = time.monotonic() + 60
            while Path(gate).with_name("hold").exists():
                if time.monotonic() > deadline:
                    raise RuntimeError("it is held for ever")
                time.sleep(0.01)
            # What the table keeps of this worker: as many additions as phases that it ended.
            return np.full((len(rows), 2), job.batch, np.float32)

        table.on_restored(part)
        for phase in job.phases(10):
            if job.index == 1 and phase == 5:
                stand(Path(gate))
            job.push(state.change([job.index], [phase + 1]), table.change(None, np.ones((64, 2))))


def careless(_: str) -> None:
    """A sum that nobody can make again."""
    with daruma.join() as job:
        job.table("sums", (64, 2)).push([3], [[1.0, 1.0]])


def descend(milliseconds: str) -> None:
    """Gradients for ever, each of which takes so long to compute: an even pull to zero."""
    from daruma_trainer.rules import SGD

    with daruma.join() as job:
        table = job.table("t", (512, 64), SGD(), initial=np.ones((512, 64)))
        while True:
            time.sleep(float(milliseconds) / 1000)
            table.push(None, table.values(), lr=1e-4)


def stops(_: str) -> None:
    """Worker 0 ends the job for all."""
    with daruma.join() as job:
        table = job.table("t", (8,))
        for _ in job.batches((np.arange(80),), 1, steps=1_000_000):
            table.push(None, np.ones(8))
            if job.index == 0 and job.batch == 10:
                job.stop("enough")
        job.report(ended=1.0 if job.stopped == "enough" else 0.0)


def mismatch(_: str) -> None:
    """Workers that disagree about a table."""
    with daruma.join() as job:
        job.table("t", (8 + job.index,))


def raises(_: str) -> None:
    """A program with a mistake."""
    with daruma.join():
        raise RuntimeError("a mistake of the program")


def pushes_nothing(_: str) -> None:
    """A program that forgets to push."""
    with daruma.join() as job:
        job.table("t", (8,))
        for _ in job.batches((np.arange(8),), 1):
            pass


PROGRAMS: dict[str, Callable[[str], None]] = {
    f.__name__: f
    for f in (
        tables,
        optimizer,
        count,
        gated_count,
        gated_count_long,
        own,
        lag,
        gated,
        two_tables,
        sums,
        careless,
        descend,
        stops,
        mismatch,
        raises,
        pushes_nothing,
    )
}

if __name__ == "__main__":
    PROGRAMS[sys.argv[1]](sys.argv[2] if len(sys.argv) > 2 else "")
