"""A table as a program sees it: arrays on the servers, for algorithms without gradients."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from daruma_trainer.errors import ConfigurationError
from daruma_trainer.layout import Floats, Ints, TableSpec
from daruma_trainer.rules import rule_from_json
from daruma_trainer.worker.pushes import Update

if TYPE_CHECKING:
    from daruma_trainer.worker.job import Job


class Table:
    """One named array on the servers, for algorithms without gradients."""

    def __init__(self, job: "Job", spec: TableSpec) -> None:
        self._job = job
        self.spec = spec
        self._adds = rule_from_json(spec.rule).name == "add"

    def pull(self, rows: Sequence[int] | Ints | None = None) -> Floats:
        """Fetch the newest values: of all rows, or of some; shape (rows, *shape[1:]), a copy."""
        self._job.refresh()
        return self._job.values(self.spec.id, rows)

    def values(self, rows: Sequence[int] | Ints | None = None) -> Floats:
        """Return what was last pulled, as `pull` does, without asking for anything newer."""
        return self._job.values(self.spec.id, rows)

    def push(self, rows: Sequence[int] | Ints | None, delta: ArrayLike, lr: float = 1.0) -> None:
        """Send one batch for this table, of all rows (None) or of some: those alone move.

        `delta` has the shape of what `pull` gives for the same rows; each row at most once. No
        rows at all is a batch too: `push([], [])` keeps in step a worker that has nothing to say.
        """
        self._job.push(self.change(rows, delta, lr))

    def barrier(self) -> None:
        """End a phase: see `Job.barrier`. It is the same one for all tables."""
        self._job.barrier()

    def on_restored(self, fn: Callable[[Ints], ArrayLike]) -> None:
        """Make this table's sums again where they were lost; for rule `add`, by all workers.

        An error in a sum stays for ever. So a server that was restored from a copy clears its
        rows, and `fn(rows)` has to return what this worker's pushes so far, the one under way
        included, have added to these rows; shape (rows, *shape[1:]). It is called on the
        program's thread, while that waits for a server.
        """
        if not self._adds:
            raise ConfigurationError(
                f"table {self.spec.name!r} has no rule add: only sums have to be made again"
            )
        self._job.rebuild_with(self.spec, fn)

    def change(
        self, rows: Sequence[int] | Ints | None, delta: ArrayLike, lr: float = 1.0
    ) -> Update:
        """Return what `push` would send, for `job.push` of several tables in one batch."""
        if self._adds:
            self._job.check_sum(self.spec)
        if rows is None:
            return Update(self.spec.id, lr, self._rows_of(delta, self.spec.rows), None)
        given: Ints = np.asarray(rows, np.int64)
        order = np.argsort(given)
        index, values = given[order], self._rows_of(delta, len(given))[order]
        if (np.diff(index) <= 0).any():
            raise ConfigurationError(f"table {self.spec.name!r}: a row is pushed twice in a batch")
        if len(index) and not 0 <= index[0] <= index[-1] < self.spec.rows:
            wrong = index[0] if index[0] < 0 else index[-1]
            raise ConfigurationError(
                f"table {self.spec.name!r} has rows 0 to {self.spec.rows - 1}, and no row {wrong}"
            )
        return Update(self.spec.id, lr, values, index)

    def _rows_of(self, delta: ArrayLike, rows: int) -> Floats:
        """Return values as (rows, cols); what has another shape is a mistake, whatever its size."""
        # A copy: it may be sent, and sent again, after the program has changed its own.
        values: Floats = np.array(delta, np.float32, order="C")
        shape, row = np.shape(delta), self.spec.shape[1:]
        right = {(rows, *row), (rows, self.spec.cols)} | ({row} if rows == 1 else set())
        if shape not in right and (rows or values.size):
            raise ConfigurationError(
                f"table {self.spec.name!r}: values of shape {shape} for {rows} rows of shape {row}"
            )
        return values.reshape(rows, self.spec.cols)
