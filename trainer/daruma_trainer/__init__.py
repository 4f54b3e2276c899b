"""Daruma for programs: `import daruma_trainer as daruma`.

    with daruma.join() as job:
        optimizer = job.optimizer(model.parameters(), daruma.SGD(lr=0.01))
        for x, y in job.batches(dataset, batch_size=32):
            ...

Importing this imports neither torch nor numpy: the operator reads `daruma_trainer.contract`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from daruma_trainer.rules import SGD, Adagrad, Adam, Add, Assign
    from daruma_trainer.worker.job import Job
    from daruma_trainer.worker.join import join
    from daruma_trainer.worker.table import Table

__all__ = ["SGD", "Adagrad", "Adam", "Add", "Assign", "Job", "Table", "join"]

_HOMES = {
    **dict.fromkeys(("SGD", "Adagrad", "Adam", "Add", "Assign"), "daruma_trainer.rules"),
    "Job": "daruma_trainer.worker.job",
    "Table": "daruma_trainer.worker.table",
    "join": "daruma_trainer.worker.join",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
