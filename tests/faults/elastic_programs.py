"""Programs for the tests of steps whose workers come and go: `python elastic_programs.py NAME …`.

Each batch leaves a mark, so that what was done twice, or not, is seen in the result.
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from worker_programs import stand

import daruma_trainer as daruma
from daruma_trainer.programs.data import classification
from daruma_trainer.rules import Rule
from daruma_trainer.worker.job import Job
from daruma_trainer.worker.pushes import Held
from daruma_trainer.worker.sessions import Session, Sessions, Stage

RULES: dict[str, Rule] = {
    "sgd": daruma.SGD(),
    "momentum": daruma.SGD(momentum=0.9),
    "adam": daruma.Adam(),
    "add": daruma.Add(),
}
FIRST_LIFE = os.environ.get("DARUMA_INCARNATION") == "1"


def check_staleness(job: Job) -> None:
    """What this worker's next batch is made of has of all others what `Bounded` promises.

    A seat that is vacant, or just taken, is nobody's.
    """
    client = job._client
    membership, copy = client.membership, client.copy
    if membership is None or copy is None or membership.settings.consistency != "Bounded":
        return
    with client.lock:
        needed = job.batch - membership.settings.max_staleness
        others = [m.index for m in membership.members if m.id.startswith("worker") and m.address]
        has = copy.last.min(axis=0)[others]
    if (has < needed).any() and not membership.elastic:
        raise RuntimeError(f"batch {job.batch + 1} would be made of {has}, below {needed}")


def marks(steps: str, think_ms: str = "5", gate: str = "") -> None:
    """Each batch adds one to its own column, in every row; replacements wait for the gate.

    Reports how far ahead of the slowest this worker was at most.
    """
    total = int(steps)
    with daruma.join() as job:
        if gate and not FIRST_LIFE:
            stand(Path(gate))
        table = job.table("marks", (64, job.workers * total))
        lead = 0.0
        for _ in job.batches((np.arange(8),), 1, steps=total):
            check_staleness(job)
            seen = table.values().min(axis=0).reshape(job.workers, total).sum(axis=1)
            lead = max(lead, job.batch - float(seen.min()))
            job.report(lead=lead)
            time.sleep(float(think_ms) / 1000 * (1 + job.index))
            mark = np.zeros((64, job.workers * total), np.float32)
            mark[:, job.index * total + job.batch] = 1.0
            table.push(None, mark)


def withhold(job: Job, batch: int, lacks: int) -> None:
    """In its first life the last of two workers gives one batch to all servers but one."""
    if FIRST_LIFE and job.index == min(1, job.workers - 1):
        sessions = job._client._live
        send = sessions.sender.held

        def send_some(server: int, held: Held) -> None:
            if (held.batch, server) != (batch, lacks):
                send(server, held)

        sessions.sender.held = send_some  # type: ignore[method-assign]


def apart(batch: str, lacks: str, steps: str) -> None:
    """Marks. In its second life, worker 1 goes on before any server can take what it pushes."""
    total = int(steps)
    with daruma.join() as job:
        table = job.table("marks", (64, job.workers * total))
        withhold(job, int(batch), int(lacks))
        if not FIRST_LIFE:
            hold_back(job._client._live, lambda: job.batch >= int(batch) + 2)
        for _ in job.batches((np.arange(8),), 1, steps=total):
            time.sleep(0.005)
            mark = np.zeros((64, job.workers * total), np.float32)
            mark[:, job.index * total + job.batch] = 1.0
            table.push(None, mark)


def hold_back(sessions: Sessions, until: Callable[[], bool]) -> None:
    """Begin no session anew, once there was a first pull, before something is true."""
    advance = sessions._advance

    def later(server: int, session: Session) -> None:
        if sessions._worker.resumed and session.stage is Stage.TABLES and not until():
            session.retry_at = time.monotonic() + 0.01
        else:
            advance(server, session)

    sessions._advance = later  # type: ignore[method-assign]


def withheld(rule: str, batch: str, lacks: str, steps: str = "30") -> None:
    """Regression. Worker 1 in its first life gives one batch to all servers but one."""
    (x, y), _ = classification("digits", 0)
    with daruma.join() as job:
        table = job.table("weight", (10, x.shape[1]), rule=RULES[rule])
        weight = table.pull()
        withhold(job, int(batch), int(lacks))
        for inputs, labels in job.batches((x, y), 32, steps=int(steps)):
            scores = np.exp(inputs @ weight.T)
            chances = scores / scores.sum(axis=1, keepdims=True)
            chances[np.arange(len(labels)), labels] -= 1
            rate = -0.1 if rule == "add" else 0.01
            table.push(None, rate * (chances.T @ inputs) / len(labels), lr=1.0)
            weight = job.values(table.spec.id)


PROGRAMS: dict[str, Callable[..., None]] = {f.__name__: f for f in (marks, apart, withheld)}

if __name__ == "__main__":
    PROGRAMS[sys.argv[1]](*sys.argv[2:])
