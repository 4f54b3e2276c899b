"""The job as a program sees it: tables, an optimizer, batches, reports."""

import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from daruma_trainer.errors import ConfigurationError
from daruma_trainer.layout import Floats, Ints, TableSpec, choose_block_rows
from daruma_trainer.rules import Rule, rule_from_json, rule_to_json
from daruma_trainer.worker.batches import batch_indices, batches_in
from daruma_trainer.worker.client import Client
from daruma_trainer.worker.evaluating import Evaluation, Score
from daruma_trainer.worker.footing import align, pace, pull_all, take_position
from daruma_trainer.worker.pulling import Wanted
from daruma_trainer.worker.pushes import Update
from daruma_trainer.worker.rebuilding import Rebuilder, Rebuilders
from daruma_trainer.worker.table import Table

if TYPE_CHECKING:
    import torch

    from daruma_trainer.worker.optimizer import Optimizer

LOG = logging.getLogger("daruma")
BEGIN_SECONDS = 600.0
"""How long a program waits for all servers at its beginning."""
MAX_METRICS_BYTES = 8 << 10
"""Of what a program reports. Servers hand it on with what all others report, and the operator reads
no more of a member's words than the job has members."""
_NUMBER_BYTES = 28
"""Of a metric in JSON, beside its name."""


class Job:
    """What `daruma.join()` gives. Not thread-safe: it belongs to the program's thread."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._specs: list[TableSpec] = []
        self._begun = 0
        """How many of them the servers have."""
        self._batches_open = False
        self._generation = 0
        """The one that this program's position belongs to; the client may know of a newer."""
        self._batch_generation = 0
        """The same, when the batch at hand was taken from `batches`."""
        self._evaluation = Evaluation(client, self.report)
        self._writers: list[Callable[[], None]] = []
        self._rebuilders = Rebuilders(client, self._specs)

    # Who and where

    @property
    def index(self) -> int:
        """This worker's index."""
        return self._client.me.index

    @property
    def workers(self) -> int:
        """How many workers the job has."""
        membership = self._client.membership
        return 1 if membership is None else membership.workers

    @property
    def batch(self) -> int:
        """The number of the last batch, over all lives of this worker; 0 before the first.

        Waits for tables that were declared and not used yet: with them comes the position.
        """
        self.begin()
        return self._client.batch

    @property
    def stopped(self) -> str | None:
        """The reason somebody gave to `stop`, or None."""
        return self._client.stopped or self._client.own_stop

    # Parameters

    def optimizer(
        self,
        params: "Iterable[torch.nn.Parameter | tuple[str, torch.nn.Parameter] | dict[str, Any]]",
        rule: Rule | None = None,
    ) -> "Optimizer":
        """Put parameters on the servers and return a torch optimizer whose `step` goes there.

        Takes what torch's optimizers take: parameters, named parameters or groups. All workers
        must give the same ones in the same order; worker 0's values are the initial ones.
        """
        from daruma_trainer.worker.optimizer import Optimizer

        return Optimizer(self, params, rule)

    def table(
        self,
        name: str,
        shape: Sequence[int],
        rule: str | Rule = "add",
        initial: ArrayLike | None = None,
    ) -> Table:
        """Declare a table; `initial` (default zeros) counts on the lowest worker alone.

        Declare all of them before the first is used: that waits until all servers have them, and
        the job's first save has the tables that are there then.
        """
        made = rule_from_json(f'{{"rule": "{rule}"}}') if isinstance(rule, str) else rule
        return Table(self, self.add_table(name, tuple(shape), made, initial))

    def add_table(
        self, name: str, shape: tuple[int, ...], rule: Rule, initial: ArrayLike | None
    ) -> TableSpec:
        """Declare a table without waiting for it; `begin` waits for all that were declared."""
        membership = self._client.membership
        if membership is None:
            raise ConfigurationError("a table outside `with daruma.join()`")
        rows = shape[0] if shape else 1
        cols = int(np.prod(shape[1:], dtype=np.int64))
        block_rows = choose_block_rows(
            rows, cols, membership.servers, membership.settings.block_bytes
        )
        spec = TableSpec(len(self._specs), name, shape, block_rows, rule_to_json(rule))
        TableSpec.from_json(spec.to_json())
        values = np.zeros((rows, cols), np.float32)
        if initial is not None:
            values[:] = np.asarray(initial, np.float32).reshape(rows, cols)
        self._specs.append(spec)
        self._client.add_table(spec, values)
        return spec

    def begin(self) -> None:
        """Wait until every declared table is there, and take their values."""
        if self._begun == len(self._specs):
            return
        self._begun = len(self._specs)
        self._client.announce()
        if self._client.resumed:
            pull_all(self._client, BEGIN_SECONDS)
            align(self._client, self._generation)
        else:
            self._generation = take_position(self._client, BEGIN_SECONDS)
        self._client.enter("Training")

    def refresh(self) -> None:
        """Pull the newest values of every slot that can be reached."""
        self.begin()
        self._settle(0)

    def values(self, table: int, rows: Sequence[int] | Ints | None = None) -> Floats:
        """Return a copy of a table's last pulled values."""
        self.begin()
        client = self._client
        if client.copy is None:
            raise ConfigurationError("no table yet")
        spec = self._specs[table]
        with client.lock:
            data = client.copy.data[table]
            chosen = data.copy() if rows is None else data[np.asarray(rows, np.int64)]
        return chosen.reshape(-1, *spec.shape[1:]) if spec.shape else chosen.reshape(())

    def state_dict(self) -> dict[str, Floats]:
        """Return all tables by name, freshly pulled."""
        self.refresh()
        return {spec.name: self.values(spec.id).reshape(spec.shape) for spec in self._specs}

    # Steps

    def push(self, *changes: Update) -> None:
        """Send changes of several tables (`table.change`) as one batch: all of them, or none."""
        self.exchange(changes)

    def barrier(self) -> None:
        """Wait until every worker has pushed as many batches as this one, and pull them all.

        All of it is applied by all slots then. Nobody waits for a worker that is at its end; a
        lost server or worker is waited for, up to progressSeconds. After a rollback, and when the
        job is stopped, it returns at once: look at `job.batch`, or use `phases`, which does.
        """
        self._settle(self.batch, all_workers=True)

    def exchange(self, updates: tuple[Update, ...]) -> None:
        """Push one batch and pull what follows from it. A lost server makes this slow, no more."""
        self.begin()
        client = self._client
        # A gradient of a batch before a rollback is dropped: that batch comes again.
        current = not self._batches_open or self._batch_generation == self._generation
        ahead = client.meanwhile.runs_ahead()
        if ahead:
            # One step may be under way, no more: so no more gradients are kept than otherwise.
            self._until_answered(client.wanted)
        if current and (client.stopped is None or not self._batches_open):
            client.push(updates, self._generation)
        self._settle(pace(client), ahead=ahead)
        self._evaluation.after_batch()

    def rebuild_with(self, spec: TableSpec, fn: Rebuilder) -> None:
        """See Table.on_restored."""
        self.begin()
        self._rebuilders.add(spec, fn, sync=self._sync)

    def check_sum(self, spec: TableSpec) -> None:
        """Refuse a sum that a recovery would leave wrong for ever."""
        self._rebuilders.check(spec, sync=self._sync)

    def wait(self, ready: Callable[[], bool], seconds: float, what: str) -> None:
        """Wait, and meanwhile make again what a restored server asks for."""
        self._rebuilders.wait(ready, seconds, what)

    @property
    def _sync(self) -> bool:
        membership = self._client.membership
        return membership is not None and membership.settings.consistency == "Sync"

    def after_pull(self, write: Callable[[], None]) -> None:
        """Call `write` whenever new values have come (the optimizer copies them into torch)."""
        self._writers.append(write)

    def _until_answered(self, wanted: Wanted | None) -> None:
        """Wait for what a pull asked for, but of servers that are away."""
        if wanted is None:
            return
        started = time.monotonic()
        self._until(
            lambda: not (wanted.missing & ~self._client.meanwhile.away(0)).any(),
            "an answer from every server that is there",
        )
        self._client.stepped(complete=False, seconds=time.monotonic() - started)

    def _until_covered(self) -> None:
        """Take no step in before the one that this worker keeps, when it does, is covered.

        Or a server, lost with another worker, could leave slots that are behind what anybody has.
        """
        self._until(
            lambda: not self._client.meanwhile.crowded,
            "a copy of the last step but one on another node",
        )

    def _settle(self, min_step: int, *, all_workers: bool = False, ahead: bool = False) -> None:
        """Pull; where a rollback came meanwhile, go on from where it leads.

        `ahead`: go on with what is there already; the answers are for the next step.
        """
        client, meanwhile = self._client, self._client.meanwhile
        started = time.monotonic()
        if client.membership is not None and client.membership.repeats:
            self._until_covered()
        wanted = client.pull(min_step, all_workers=all_workers)

        def missing() -> bool:
            # A phase ends with what every worker gave: no server may be left out of that.
            away = np.zeros_like(wanted.missing) if all_workers else meanwhile.away(min_step)
            return bool((wanted.missing & ~away).any()) or meanwhile.crowded

        self._until(
            lambda: not (meanwhile.crowded if ahead else missing()),
            f"batch {min_step} of every worker" if all_workers else "an answer from every server",
        )
        complete = self._rolled_back or not wanted.missing.any()
        if self._rolled_back:
            LOG.info("rolled back: going on from the cut")
            self._generation = take_position(client, self._progress_seconds())
        align(client, self._generation)
        client.stepped(complete=complete, seconds=time.monotonic() - started)
        for write in self._writers:
            write()

    def _until(self, ready: Callable[[], bool], what: str) -> None:
        """Wait for servers; a rollback, or the job's stop, ends that, too."""
        client = self._client
        self.wait(
            lambda: self._rolled_back or client.stopped is not None or ready(),
            self._progress_seconds(),
            what,
        )

    @property
    def _rolled_back(self) -> bool:
        return self._client.generation != self._generation

    def _progress_seconds(self) -> float:
        membership = self._client.membership
        return 600.0 if membership is None else membership.settings.progress_seconds

    # Data, reports

    def batches(
        self,
        dataset: Any,
        batch_size: int = 32,
        *,
        steps: int | None = None,
        epochs: int | None = None,
        seed: int = 0,
    ) -> Iterator[Any]:
        """Go through this worker's part of a dataset, from where its last life left off.

        `dataset`: a tuple of arrays or tensors of one length, or anything with `__len__` and
        `__getitem__` (its items are handed to the program as a list). `steps` batches, or
        `epochs` of the worker's part (default one). May be opened once a program.
        """
        who = (self.index, self.workers)
        samples = len(dataset[0]) if isinstance(dataset, tuple) else len(dataset)
        total = steps if steps is not None else batches_in(samples, batch_size, epochs or 1, who)
        for batch in self._positions(total, in_phases=False):
            index = batch_indices(samples, batch_size, batch, seed, who)
            if isinstance(dataset, tuple):
                yield tuple(part[index] for part in dataset)
            else:
                yield [dataset[i] for i in index.tolist()]

    def phases(self, total: int) -> Iterator[int]:
        """Count phases from 0, from where this worker's last life left off; one push in each.

        A phase begins when every worker's push of the one before is applied and pulled
        (`barrier`), so `table.values()` has it. A program that keeps nothing from one phase to
        the next but what is in its tables goes on after any failure. Instead of `batches`.
        """
        for batch in self._positions(total, in_phases=True):
            yield batch - 1

    def _positions(self, total: int, *, in_phases: bool) -> Iterator[int]:
        """Go through this worker's batch numbers, the next one being what it makes of it."""
        if self._batches_open:
            raise ConfigurationError(
                "job.batches or job.phases may be opened once: its position is the worker's"
            )
        self._batches_open = True
        self._client.total_steps = total
        while self.batch < total or self._come_back():
            if self.stopped is not None:
                return
            if self.batch >= total:
                continue  # sent back to a cut that has all of this worker's batches
            before, self._batch_generation = self.batch, self._generation
            if in_phases:
                self.barrier()
                if self._generation != self._batch_generation or self.stopped is not None:
                    continue
            yield before + 1
            if self.batch == before and self.stopped is None and self._client.generation == 0:
                raise ConfigurationError(
                    "a batch was taken and nothing was pushed: call optimizer.step() or "
                    "table.push() once for each batch"
                )

    def _come_back(self) -> bool:
        """At the end of its batches a worker waits for what could send it back; True: it must.

        That is until all slots have its batches and, where a job can roll back, until all other
        workers reached their ends too.
        """
        client = self._client
        membership, pushes = client.membership, client.pushes
        if membership is None or pushes is None or self.stopped is not None:
            return False
        waits = membership.settings.cuts

        def over() -> bool:
            if pushes.acked < client.batch or not waits:
                return pushes.acked >= client.batch
            client.enter("Finished")
            return client.finished == self._generation

        self.wait(
            lambda: self._rolled_back or self.stopped is not None or over(),
            math.inf if waits else self._progress_seconds(),
            "the last batches' acknowledgement",
        )
        if not self._rolled_back:
            return False
        client.enter("Training")
        self._settle(0)
        return True

    def report(self, loss: float | None = None, **metrics: float) -> None:
        """Say how it goes: shown by `kubectl get`, in metrics and in the report.

        ConfigurationError: with this there would be more metrics than MAX_METRICS_BYTES.
        """
        client = self._client
        with client.lock:
            values = client.values | {name: float(value) for name, value in metrics.items()}
            if len(values) > len(client.values):
                _check_size(values)
            if loss is not None:
                client.loss = float(loss)
            client.values = values

    def evaluate(self, fn: Score, every: int = 0) -> None:
        """Call `fn` on worker 0 after every so many of its batches, and at the end (0: only then).

        It runs with freshly pulled parameters; what it returns is reported (a number as `score`).
        """
        self._evaluation.choose(fn, every)

    def stop(self, reason: str) -> None:
        """End all workers after their step; the job succeeds with what it has."""
        with self._client.lock:
            self._client.own_stop = reason[:1000]
        self._client.wake()

    def flush(self) -> None:
        """Wait until all slots have every batch of this worker."""
        client = self._client
        pushes = client.pushes
        if pushes is None or not self._specs:
            return
        self.begin()
        self.wait(
            lambda: pushes.acked >= client.batch or client.stopped is not None or self._rolled_back,
            self._progress_seconds(),
            "the last batches' acknowledgement",
        )
        if self._rolled_back:
            # A program with a loop of its own has ended: nobody computes its batches again.
            LOG.warning("rolled back after the program's last batch: ending from the cut")
            self._settle(0)

    def evaluate_result(self) -> None:
        """Evaluate what was saved: nobody pushes any more, and the servers stay until we end."""
        if self._specs:
            self._evaluation.of_result(self._writers)


def _check_size(metrics: Iterable[str]) -> None:
    size = sum(len(json.dumps(name)) + _NUMBER_BYTES for name in metrics)
    if size > MAX_METRICS_BYTES:
        raise ConfigurationError(
            f"job.report: all metrics together are {size} bytes, and {MAX_METRICS_BYTES} are the "
            "most: report fewer names, or shorter ones"
        )
