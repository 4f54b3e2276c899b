"""Adoption, as decisions: who takes lost slots in, and how they return to a pod of their own."""

from dataclasses import replace
from datetime import timedelta

import pytest

from controller_world import FOREVER, PEER, World, sources_of, spec_of
from daruma_operator.api.status import Phase
from daruma_operator.controller.acts import CreatePod
from daruma_operator.substrate.protocol import PodState
from daruma_trainer.contract import Role, SavedState, SourceKind

PREDECESSOR = SourceKind.PREDECESSOR.value


def adopting(servers: int = 3, *, holds_pods: bool = False, strategy: str = "Freshest") -> World:
    """A job that runs; from then on new pods come or not."""
    recovery = {"placement": "Adopt", "strategy": strategy}
    spec = spec_of(recovery=recovery, servers={"replicas": servers})
    world = World(spec=spec, total=FOREVER).running()
    world.holds_pods = holds_pods
    return world


def recovered(world: World, count: int = 1) -> World:
    return world.until(lambda w: w.status.recovery is None and len(w.status.recoveries) >= count)


def hosts(world: World) -> dict[int, str]:
    return {m.index: m.pod for m in world.status.members if m.guest}


def test_slots_are_adopted_without_a_new_pod() -> None:
    world = adopting(holds_pods=True)
    before = list(world.created)
    world.kill("server-1")
    decision = world.tick()
    assert not [a for a in decision.acts if isinstance(a, CreatePod)]
    assert "Adopted" in [e.reason for e in decision.events]
    recovered(world)
    record = world.status.recoveries[-1]
    assert (record.cause, record.placement, record.outcome) == ("ServerLost", "Adopt", "Succeeded")
    assert list(sources_of(world)) == [PEER]
    assert hosts(world) == {1: "j-server-0-1"}
    assert world.status.phase is Phase.RUNNING
    assert world.created[: len(before)] == before


def test_slots_return_to_a_pod_of_their_own() -> None:
    world = adopting()
    world.kill("server-1")
    recovered(world, 2)
    record = world.status.recoveries[-1]
    assert (record.cause, record.reason, record.outcome) == ("HandBack", "HandedOver", "Succeeded")
    assert list(sources_of(world)) == [PREDECESSOR]
    assert (record.delta_norm.kind, record.delta_norm.value) == ("Exact", 0.0)
    assert hosts(world) == {}
    assert (world.status.returning, world.status.handing) == ((), ())
    (own,) = [m for m in world.status.members if m.role is Role.SERVER and m.index == 1]
    assert world.pods[own.pod].state == "Running"
    world.until(lambda w: not any(s.host for s in w.sims.values()))
    assert world.status.restarts.servers == 1, "a hand-back is no failure"
    said = [e.reason for d in world.decisions for e in d.events]
    assert said.count("HandedBack") == 1


def test_every_lost_server_has_a_host_of_its_own_as_long_as_there_are_some() -> None:
    world = adopting(4, holds_pods=True)
    world.kill("server-1")
    world.kill("server-3")
    recovered(world)
    assert hosts(world) == {1: "j-server-0-1", 3: "j-server-2-1"}


def test_with_its_host_a_guest_is_lost_and_both_are_adopted_anew() -> None:
    world = adopting(holds_pods=True)
    world.kill("server-1")
    recovered(world)
    world.kill("server-0")
    recovered(world, 2)
    record = world.status.recoveries[-1]
    assert sorted(x.index for x in record.losses) == [0, 1]
    assert hosts(world) == {0: "j-server-2-1", 1: "j-server-2-1"}


def test_a_guest_that_ends_is_lost() -> None:
    world = adopting(holds_pods=True)
    world.kill("server-1")
    recovered(world)
    (guest,) = [s.id for s in world.sims.values() if s.host]
    world.end_guest(guest, -9)
    recovered(world, 2)
    (loss,) = world.status.recoveries[-1].losses
    assert (loss.index, loss.reason) == (1, "Signal9")
    assert world.status.restarts.servers == 2
    assert hosts(world) == {1: "j-server-0-1"}
    said = [e.message for d in world.decisions for e in d.events if e.reason == "PodFailed"]
    assert said[-1] == f"{guest}, in the pod j-server-0-1, was lost (Signal9)"


def test_a_guest_that_its_host_does_not_start_is_named_with_the_host() -> None:
    spec = spec_of(
        recovery={"placement": "Adopt", "timeouts": {"replaceSeconds": 5}}, servers={"replicas": 2}
    )
    world = World(spec=spec, total=FOREVER).running()
    world.kill("server-1")
    world.tick()
    (guest,) = [s.id for s in world.sims.values() if s.host]
    del world.sims[guest]
    world.sim("server-0").guests = ()
    world.tick(6)
    assert world.status.message == (
        f"no replacement ran within 5 s: {guest}, in the pod j-server-0-1, was not heard of"
    )


def test_a_pod_that_ends_before_it_took_its_slots_back_is_tried_again_soon() -> None:
    world = adopting(3)
    world.kill("server-2")
    world.until(lambda w: bool(w.status.returning) and w.status.returning[0].pod in w.pods)
    (first,) = world.status.returning
    pod = world.pods[first.pod]
    world.pods[first.pod] = replace(
        pod, state=PodState.TERMINATED, exit_code=137, created_at=world.now
    )
    # replaceSeconds, 120, are for one that does not run.
    world.until(lambda w: len(w.status.recoveries) == 2, ticks=100)
    assert world.status.recoveries[-1].cause == "HandBack"


def test_with_nobody_left_servers_are_replaced() -> None:
    world = adopting(2)
    world.kill("server-0")
    world.kill("server-1")
    recovered(world)
    assert hosts(world) == {}
    assert world.status.recoveries[-1].placement == "Replace"


def test_replace_adopts_where_no_pod_comes() -> None:
    world = World(total=FOREVER).running()
    world.holds_pods = True
    world.kill("server-1")
    world.tick()
    assert hosts(world) == {}
    world.now += timedelta(seconds=121)
    recovered(world)
    record = world.status.recoveries[-1]
    assert (record.placement, record.outcome) == ("Adopt", "Succeeded")
    assert hosts(world) == {1: "j-server-0-1"}


def test_a_hand_back_whose_source_dies_takes_the_next_best() -> None:
    world = adopting(holds_pods=True)
    world.kill("server-1")
    recovered(world)
    own = world.status.returning or world.until(lambda w: bool(w.status.returning)).status.returning
    world.start(own[0].pod)
    world.until(lambda w: w.status.recovery is not None)
    world.kill("server-0")  # the host, and with it the incarnation that hands over
    recovered(world, 2)
    assert world.status.recoveries[-1].outcome == "Succeeded"
    assert world.status.handing == ()


@pytest.mark.parametrize("strategy", ["FullCheckpoint", "Partial"])
def test_nobody_rolls_back_for_a_hand_back(strategy: str) -> None:
    recovery = {"placement": "Adopt", "strategy": strategy}
    world = World(spec=spec_of(recovery=recovery), total=FOREVER)
    world.cut = SavedState("n/j/u/cuts/00000002-0000000002.json", 2, 1000, 0.0)
    world.running()
    world.kill("server-1")
    recovered(world)
    generation = world.status.rollback.generation
    recovered(world, 2)
    assert world.status.recoveries[-1].cause == "HandBack"
    assert world.status.rollback.generation == generation


def test_an_operator_that_restarts_at_any_pass_brings_it_to_the_same_end() -> None:
    world = adopting()
    world.kill("server-1")
    world.until(
        lambda w: w.status.recovery is None and len(w.status.recoveries) == 2, restarted=True
    )
    assert hosts(world) == {}
    assert [r.cause for r in world.status.recoveries] == ["ServerLost", "HandBack"]


def test_a_job_ends_with_an_adopted_server_too() -> None:
    spec = spec_of(recovery={"placement": "Adopt"})
    world = World(spec=spec, total=12).running()
    world.holds_pods = True
    world.kill("server-1")
    world.until_phase("Succeeded")
    assert world.status.result is not None
    assert [p for p in world.pods.values() if p.state == "Running"] == []


@pytest.mark.parametrize(
    ("strategy", "store"),
    # Those that need a store are refused without one.
    [
        ("FullCheckpoint", True), ("Partial", True), ("Stateless", True), ("Freshest", True),
        ("Stateless", False), ("Freshest", False),
    ],
)  # fmt: skip
def test_a_hand_back_whose_guest_dies_becomes_an_ordinary_loss(strategy: str, store: bool) -> None:
    recovery = {"placement": "Adopt", "strategy": strategy}
    spec = spec_of(recovery=recovery, **({} if store else {"checkpoint": {}}))
    world = World(spec=spec, total=FOREVER, store="file:///s" if store else None)
    world.cut = SavedState("n/j/u/cuts/00000002-0000000002.json", 2, 1000, 0.0) if store else None
    world.running()
    world.kill("server-1")
    recovered(world)
    world.until(lambda w: w.status.recovery is not None and bool(w.status.handing))
    world.dead_sources = True
    world.until(lambda w: any(s.plan for s in w.sims.values() if s.index == 1 and not s.host))
    world.end_guest(next(s.id for s in world.sims.values() if s.host), -9)
    world.until(lambda w: w.status.recovery is not None and w.status.recovery.cause == "ServerLost")
    world.dead_sources = False
    recovered(world, 2)
    record = world.status.recoveries[-1]
    assert (record.strategy, record.outcome) == (strategy, "Succeeded")
    assert PREDECESSOR not in record.sources
    assert world.status.handing == ()


def test_incarnations_never_go_back() -> None:
    world = adopting(holds_pods=True)
    world.kill("server-1")
    recovered(world)
    world.until(lambda w: bool(w.status.returning))
    stale = world.status.returning[0]
    world.end_guest(next(s.id for s in world.sims.values() if s.host), -9)
    recovered(world, 2)
    world.until(lambda w: bool(w.status.returning) and w.status.returning[0] != stale)
    (guest,) = [m for m in world.status.members if m.guest]
    assert world.status.returning[0].incarnation > guest.incarnation
    assert stale.pod not in world.pods


def test_a_host_that_dies_counts_once() -> None:
    world = adopting(4, holds_pods=True)
    world.kill("server-1")
    recovered(world)
    before = len(world.status.restarts.counted)
    world.kill("server-0")
    recovered(world, 2)
    assert len(world.status.restarts.counted) == before + 1


def test_a_server_without_memory_is_not_taken_in() -> None:
    world = adopting(holds_pods=False)
    world.kill("server-1", reason="OOMKilled")
    recovered(world)
    assert world.status.recoveries[-1].placement == "Replace"
    assert hosts(world) == {}


def test_a_successor_that_served_is_not_replaced_from_the_frozen_shard() -> None:
    world = adopting()
    world.kill("server-1")
    recovered(world)
    world.until(lambda w: w.status.recovery is not None and bool(w.status.recovery.planned_epoch))
    world.kill("server-1")  # the pod of its own, in the middle of the hand-back
    recovered(world, 2)
    record = world.status.recoveries[-1]
    assert record.cause == "ServerLost"
    assert list(record.sources) == [PEER]


def test_a_worker_lost_meanwhile_makes_a_hand_back_no_loss_of_servers() -> None:
    world = adopting()
    world.kill("server-1")
    recovered(world)
    world.until(lambda w: w.status.recovery is not None)
    world.kill("worker-0")
    recovered(world, 2)
    assert world.status.recoveries[-1].cause == "HandBack"


def test_a_guest_that_is_said_to_be_elsewhere_is_not_spoken_to() -> None:
    """The job's token goes with all that it is told."""
    world = adopting(holds_pods=True)
    world.guests_at = "192.0.2.1"
    world.kill("server-1")
    world.until(lambda w: any(s.guests for s in w.sims.values()))
    for _ in range(10):
        world.tick()
    (guest,) = [m for m in world.status.members if m.guest]
    assert guest.address is None
    world.until_phase("Failed", seconds=10.0)
    assert world.status.reason == "ReplaceTimeout"
    assert f"in the pod {guest.pod}, was not heard of" in world.status.message


@pytest.mark.parametrize("port", ["", "x", "-1", "65535", "9" * 5000, "\u0663"])
def test_a_guests_port_is_one(port: str) -> None:
    world = adopting(holds_pods=True)
    world.kill("server-1")
    world.until(lambda w: any(s.guests for s in w.sims.values()))
    (host,) = [s for s in world.sims.values() if s.guests]
    address = world.pods[f"j-{host.id}"].address or ""
    host.guests = (replace(host.guests[0], address=f"{address.rpartition(':')[0]}:{port}"),)
    for _ in range(3):
        world.tick()
    assert [m.address for m in world.status.members if m.guest] == [None]
