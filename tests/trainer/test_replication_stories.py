"""Stories of replicas and copies that found something, in short: see `replication_machine`."""

from collections.abc import Iterator
from functools import partial
from operator import is_

import pytest

from daruma_trainer.wire import Header, Kind
from replication_machine import MANY, Replication, kinds_of
from simulated_members import SimulatedWorker
from simulated_training import TABLES, WORKERS


@pytest.fixture
def story() -> Iterator[Replication]:
    machine = Replication()
    yield machine
    machine.teardown()


@pytest.mark.parametrize("consistency", ["async", "sync"])
@pytest.mark.parametrize("mode", ["next", "copies", "copies, momentum"])
def test_a_worker_that_did_not_hear_it_is_told_again(
    story: Replication, mode: str, consistency: str
) -> None:
    """What is covered was said once; a worker may not have as many more uncovered as it wants."""
    story.begin(mode, consistency)
    job = story.job
    for worker in job.live_workers:
        worker.step()
    lost = 0
    for _ in range(60):
        job.now += 0.01
        job.round()
        for wire in job.wires:
            if any(Header.decode(message).kind is Kind.COVERED for message in wire.down):
                wire.cut(0, 0)
                lost += 1
    assert lost
    story.calm()


def test_a_push_is_covered_though_its_worker_shares_a_node_with_the_head(
    story: Replication,
) -> None:
    """The other worker's copy would do; but that worker does not pull."""
    story.begin("copies", "async", shared=True)
    story.run(0)
    story.calm()


def test_a_table_comes_with_its_values(story: Replication) -> None:
    """They come later than the table, and replicas may have been sent its zeros."""
    story.begin("next", "async")
    job = story.job
    story.add_table()
    for turn in range(60):
        job.now += 0.03
        for wire in list(job.wires):
            kinds = kinds_of(wire)
            waits = turn < 30 and Kind.INIT in kinds
            job.move(partial(is_, wire), kinds.index(Kind.INIT) if waits else MANY, MANY)
        for member in job.members():
            job.spin(member)
    story.calm()


@pytest.mark.parametrize("consistency", ["async", "sync"])
@pytest.mark.parametrize("mode", ["next", "tail of 3", "copies", "copies, momentum"])
@pytest.mark.parametrize("comes", ["not at all", "without its values", "to one worker"])
def test_a_server_is_lost_while_a_table_comes(
    story: Replication, mode: str, consistency: str, comes: str
) -> None:
    """What was covered before is, whoever knows the table by then; and the table has its values."""
    story.begin(mode, consistency)
    job = story.job
    story.run(WORKERS)
    story.calm()
    story.crash_ahead()
    story.calm()
    job.specs.append(job.training.weights(TABLES))
    job.cut = None
    first, second = job.live_workers
    head = job.heads[0].me.id
    (first if comes == "to one worker" else second).add_tables()
    stays = comes == "not at all"
    for _ in range(12):
        job.now += 0.03
        job.move(lambda wire: not (stays and wire.own in job.workers), MANY, MANY)
        for member in job.members():
            job.spin(member)
    plane = job.servers[head].plane
    assert plane is not None
    assert (len(plane.shard.tables), bool(plane.given.all())) == {
        "not at all": (2, True), "without its values": (3, False), "to one worker": (3, True)
    }[comes]  # fmt: skip
    if comes == "to one worker" and consistency == "async":
        for worker in (first, second, second):
            worker.step()  # of three tables, and of two
            job.until(lambda: first.idle and second.idle, 20)
    job.crash(head)
    job.until(lambda: False, 40)
    for worker in job.live_workers:
        if len(worker._live.copy.specs) == TABLES:
            worker.add_tables()
    story.calm()
    assert not job.reported
    for server in job.heads:
        assert server.plane is not None
        assert server.plane.given.all()


@pytest.mark.parametrize("mode", ["tail of 3", "3 copies, momentum"])
def test_a_table_comes_to_a_chain_of_three_in_many_messages(story: Replication, mode: str) -> None:
    """The middle answers for what has come to it, or no more would come."""
    story.begin(mode, narrow=True)
    story.run(0)
    story.add_table()
    story.calm()


def test_a_pull_that_lacks_a_table_covers_nothing(story: Replication) -> None:
    story.begin("copies")
    job = story.job
    story.run(WORKERS)
    story.calm()
    first, second = job.live_workers
    job.specs.append(job.training.weights(TABLES))
    first.add_tables()
    assert job.until(lambda: first.idle, 40)
    seen = []
    for worker in (first, second):
        worker.refresh()
        for _ in range(20):
            job.now += 0.01
            job.spin(worker.me.id)
            seen += [(worker, Kind.HAVE) for w in job.wires if Kind.HAVE in kinds_of(w)]
            job.round()
        assert worker.idle
    assert {worker for worker, _ in seen} == {first}
    job.cut = None
    second.add_tables()
    story.calm()


def test_a_lazy_replica_has_a_new_table_at_once(story: Replication) -> None:
    story.begin("every 3, of 3", "async")
    story.add_table()
    story.crash_head(MANY)
    story.calm()


def test_a_step_that_all_others_are_past_is_acknowledged(story: Replication) -> None:
    """Of a push to a promoted replica, whose sender has pulled that step long ago."""
    story.begin("copies", "sync")
    story.run(WORKERS)
    story.add_table()
    story.crash_head(MANY)
    story.calm()


def test_a_replay_is_let_go_whose_acknowledgement_was_lost(story: Replication) -> None:
    story.begin("3 copies, momentum", "async")
    job = story.job
    (wire,) = [w for w in job.wires if w.own == job.live_workers[0].me.id]
    wire.cut(0, 0)
    pair = frozenset((wire.own, wire.peer.id))
    job.parted.add(pair)
    story.run(0)
    story.join()
    for _ in range(60):
        job.now += 0.01
        job.round()
        story.again(0)  # what is answered now says nothing
    story.calm()


@pytest.mark.parametrize("mode", ["none", "every 3"])
def test_a_last_step_is_acknowledged_by_a_server_that_makes_it_again(
    story: Replication, mode: str
) -> None:
    """Its predecessor made it and showed it; another server has yet to."""
    story.begin(mode, "sync", servers=2)
    job = story.job
    story.run(WORKERS)
    story.calm()
    head, other = (server.me.id for server in job.heads)
    for worker in job.live_workers:
        worker.step()
        job.parted.add(frozenset((worker.me.id, other)))
    for wire in list(job.wires):
        if wire.peer.id == other and wire.own in job.workers:
            wire.cut(MANY, 0)
    for _ in range(6):
        job.move(lambda w: w.peer.id == head and w.own in job.workers, MANY, MANY)
        for member in (head, *job.workers):
            job.spin(member)
    job.crash(head)
    job.until(lambda: False, 40)
    story.calm()


SURE = ("next", "tail of 3", "copies", "copies, momentum", "3 copies, momentum")


@pytest.mark.parametrize("servers", [1, 2])
@pytest.mark.parametrize("consistency", ["async", "sync", "bounded"])
@pytest.mark.parametrize("mode", SURE)
def test_what_a_lost_server_had_alone_is_given_again(
    story: Replication, mode: str, consistency: str, servers: int
) -> None:
    """Twice: the second time to who was the second replica, or has followed since."""
    story.begin(mode, consistency, servers=servers, single=True)
    story.run(WORKERS)
    for _ in range(2):
        story.crash_ahead()
        for _ in range(4):
            story.operate()
            story.job.now += 0.3
            story.job.round()
    story.calm()
    assert not story.job.reported


@pytest.mark.parametrize("consistency", ["async", "sync"])
@pytest.mark.parametrize("mode", SURE)
def test_nobody_hears_of_a_promotion(story: Replication, mode: str, consistency: str) -> None:
    """Workers push to the one that was deposed, and what it says to its replica comes late."""
    story.begin(mode, consistency)
    job = story.job
    story.run(WORKERS)
    old = job.heads[0].me.id
    story.depose()
    for worker in job.live_workers:
        worker.step()
    for turn in range(24):
        job.now += 0.03
        if turn == 4:  # the old one has what they pushed; from now on they push to the new one
            for told in job.operator.members.values():
                job.operator.tell(told)
        for member in job.members():
            job.spin(member)
        job.move(lambda w: w.own != old, MANY, MANY)
    job.move(lambda w: w.own == old, MANY, MANY)
    story.calm()


@pytest.mark.parametrize("mode", ["tail of 3", "3 copies, momentum"])
def test_two_are_lost_before_the_third_has_it(story: Replication, mode: str) -> None:
    story.begin(mode)
    job = story.job
    story.run(WORKERS)
    story.calm()
    head, second, third = job.operator.chain(0)
    for worker in job.live_workers:
        worker.step()
    for _ in range(10):
        job.now += 0.03
        job.move(lambda w: w.peer != third, MANY, MANY)
        for member in job.members():
            job.spin(member)
    assert all(
        worker.pushes is not None and worker.pushes.uncovered(0) for worker in job.live_workers
    )
    job.operate()
    for lost in (head, second):
        job.crash(lost.id)
    story.calm()
    assert not job.reported


def test_a_replica_that_lags_does_not_serve_what_workers_have_newer(story: Replication) -> None:
    story.begin("copies")
    job = story.job
    story.run(WORKERS)
    story.calm()
    for act in (SimulatedWorker.step, SimulatedWorker.refresh):
        for worker in job.live_workers:
            act(worker)
        for _ in range(6):
            job.round()
    assert not any(w.pushes is not None and w.pushes.uncovered(0) for w in job.live_workers)
    head, replica = (job.servers[m.id].plane for m in job.operator.chain(0))
    assert head is not None
    assert replica is not None
    assert (head.slots.last > replica.slots.last).any()
    story.crash_head(0)
    story.calm()
    assert not job.reported


def test_what_a_later_life_makes_again_is_not_counted_as_lost(story: Replication) -> None:
    """A worker counted a batch as lost, and died; the server that knew that too. Nobody else does,
    so the worker's replacement makes it again."""
    story.begin("every 3, of 3", "bounded, elastic", servers=2)
    story.run(0)
    story.add_table()
    story.calm()
    story.operate()
    story.depose(1)
    story.wait(1.2)
    for arrive in (2, 1):
        story.crash_ahead(arrive=arrive)
        story.calm()
    story.crash(member=3, arrive=0)
    story.crash(member=0, arrive=1)
    story.calm()


def test_what_a_worker_said_it_holds_is_kept_until_it_is_sent(story: Replication) -> None:
    """A server and its first replica died: the second one lacks a batch that both had. Its worker
    said that it holds it, and then heard from the other server, which was the last to take it."""
    story.begin("every 3, of 3", "async", servers=2, shared=True)
    story.crash_ahead(server=1, arrive=1)
    story.decide(choice=335316, hurry=False)
    story.crash_ahead(server=1, arrive=0)
    story.calm()


def test_what_is_lost_is_counted_though_its_worker_did_not_hear_it(story: Replication) -> None:
    """A server marks what it lacks, and says so; then the connection breaks."""
    story.begin("every 3", "async")
    job = story.job
    story.run(WORKERS)
    story.calm()
    story.crash_ahead()
    broken = 0
    for _ in range(80):
        job.now += 0.03
        job.round()
        job.operate()
        for wire in job.wires:
            if any(b'"complete"' in frame for message in wire.down for frame in message[1:]):
                wire.cut(0, 0)
                broken += 1
        if broken >= WORKERS:
            break
    assert job.reported, "said"
    assert not story.counted(), "and not heard"
    story.calm()
    assert story.counted() == job.reported


def test_replicas_are_no_further_behind_than_what_workers_keep(story: Replication) -> None:
    """A server and a worker die together: what the replica lacks is made again, of what it has."""
    story.begin("3 copies, momentum", "sync", shared=True, narrow=True)
    story.add_table()
    story.calm()
    story.run(WORKERS)
    story.crash(member=0, arrive=1)
    story.calm()
    assert not any(w.position.mixed for w in story.job.live_workers)


def test_nor_are_those_of_a_server_that_is_away(story: Replication) -> None:
    """Workers push to the others meanwhile, who make a step of it: nobody takes that in."""
    story.begin("copies, momentum", "sync", servers=2)
    job = story.job
    story.run(WORKERS)
    story.calm()

    def step(heads: list[str]) -> None:
        """Workers and these servers alone go on."""
        for worker in job.live_workers:
            assert worker.idle
            worker.step()
        for _ in range(5):
            job.move(lambda w: w.own in job.workers and w.peer.id in heads, MANY, MANY)
            for member in (*heads, *job.workers):
                job.spin(member)

    first, second = (head.me.id for head in job.heads)
    step([first, second])
    job.crash(first)
    step([second])
    plane = job.servers[second].plane
    assert plane is not None
    assert plane.step == max(w.batch for w in job.live_workers)
    job.crash(job.live_workers[0].me.id)
    story.calm()
    assert not any(w.position.mixed for w in job.live_workers)
