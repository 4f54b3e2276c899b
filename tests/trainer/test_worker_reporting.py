"""What a worker says of itself."""

from dataclasses import replace

import numpy as np

from daruma_trainer.agent import Command
from daruma_trainer.contract import SLOTS, Membership, Role, Settings, slots_from_hex
from daruma_trainer.wire import Header, Kind, encode_json
from simulated_job import SimulatedJob, quiet
from simulated_members import SimulatedWorker


def without(membership: Membership, server: int) -> Membership:
    """A server is fenced; nobody knows yet where its successor is."""
    epoch = membership.epoch + 1
    members = tuple(
        replace(m, incarnation=epoch, address=None)
        if (m.role, m.index) == (Role.SERVER, server)
        else m
        for m in membership.members
    )
    return replace(membership, epoch=epoch, recovery=membership.recovery or epoch, members=members)


def offered(worker: SimulatedWorker) -> set[int]:
    return {slot for copies in worker._report().copies for slot in slots_from_hex(copies.slots)}


def test_copies_are_offered_of_all_whom_the_epoch_that_it_names_replaces() -> None:
    """One server is away; another is drained, and tells its workers of it itself."""
    job = SimulatedJob(Settings(), 0.0, servers=2)
    try:
        worker = job.live_workers[0]
        assert job.until(lambda: quiet(job) and not worker._live.away(), 400)
        assert worker.membership is not None
        assert worker.copy is not None
        away = without(worker.membership, 1)
        worker._command(Command("membership", away))
        worker.spin()
        assert offered(worker) == set(np.flatnonzero(worker.copy.slots_of(1)).tolist())
        link, newest = worker._live.by_server[0].link, without(away, 0)
        header = Header(Kind.MEMBERSHIP, 0, newest.epoch, link.peer.incarnation)
        with worker.lock:
            worker._unasked(link, header, [b"", encode_json(newest.to_json())])
        assert worker._report().epoch == newest.epoch
        assert offered(worker) == set(range(SLOTS)), "it is connected, and counts no more"
    finally:
        job.close()
