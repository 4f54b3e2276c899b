"""Replicas, as decisions: where they live, who is promoted, and what follows."""

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from controller_world import FOREVER, PEER, RUNNING, World, sources_of, spec_of
from daruma_operator.api.status import MemberStatus, Phase
from daruma_operator.controller.acts import CreatePod, PostRestore
from daruma_operator.controller.decide import Decision, decide
from daruma_operator.controller.draft import Policy
from daruma_operator.controller.observe import merge
from daruma_operator.controller.verdicts import name_of
from daruma_trainer.contract import Role, SourceKind, Suspect, View

REPLICA = SourceKind.REPLICA.value


def chained(servers: int = 3, *, replicas: int = 2, **recovery: Any) -> World:
    """A job that runs, whose shards have all their replicas."""
    chosen = {"strategy": "Chain", "chain": {"replicas": replicas}} | recovery
    spec = spec_of(recovery=chosen, servers={"replicas": servers})
    return whole(World(spec=spec, total=FOREVER).running())


def copied(**recovery: Any) -> World:
    """The same with `copies`: replicas that nobody counts on, as what is covered is not sent."""
    spec = spec_of(recovery={"copies": 2} | recovery)
    world = World(spec=spec, total=FOREVER, lagging=True).running()
    return world.until(lambda w: len(addressed(w)) == 3)


def condition(world: World, kind: str) -> str | None:
    return next((c.status for c in world.status.conditions if c.type == kind), None)


def whole(world: World) -> World:
    return world.until(lambda w: condition(w, "Replicated") == "True", ticks=200)


def recovered(world: World, count: int = 1) -> World:
    return world.until(lambda w: w.status.recovery is None and len(w.status.recoveries) >= count)


def addressed(world: World) -> list[MemberStatus]:
    return [m for m in world.status.replicas if m.address is not None]


def hosts(world: World, index: int) -> list[str]:
    mine = [m for m in world.status.replicas if m.index == index]
    return [m.pod for m in sorted(mine, key=lambda m: m.incarnation)]


def head(world: World, index: int) -> MemberStatus:
    return next(m for m in world.status.members if (m.role, m.index) == (Role.SERVER, index))


def test_replicas_live_in_the_pods_of_the_next_servers() -> None:
    world = chained()
    assert [hosts(world, i) for i in range(3)] == [
        ["j-server-1-1"], ["j-server-2-1"], ["j-server-0-1"],
    ]  # fmt: skip
    assert all(m.incarnation > head(world, m.index).incarnation for m in world.status.replicas)
    assert not world.status.recoveries
    chain = chained(4, replicas=3)
    assert hosts(chain, 2) == ["j-server-3-1", "j-server-0-1"]
    assert len({(m.index, m.incarnation) for m in chain.status.replicas}) == 8


@pytest.mark.parametrize(
    ("other", "reason"), [("b", "AllReplicas"), ("a", "SameNode")], ids=["two nodes", "one node"]
)
def test_on_other_nodes_if_there_are_any(other: str, reason: str) -> None:
    spec = spec_of(recovery={"strategy": "Chain"}, servers={"replicas": 3})
    world = World(spec=spec, total=FOREVER)
    world.tick()
    for name, pod in world.pods.items():
        node = other if name == "j-server-2-1" else "a"
        world.pods[name] = replace(pod, node=node)
    whole(world.running())
    if other == "b":
        assert hosts(world, 0) == ["j-server-2-1"], "server-1 is on its node"
    (shown,) = [c for c in world.status.conditions if c.type == "Replicated"]
    assert shown.reason == reason
    assert ("server-0, server-1, server-2" in shown.message) == (reason == "SameNode")


@pytest.mark.parametrize("restarted", [False, True])
def test_a_replica_is_promoted_at_once_and_without_a_pod(restarted: bool) -> None:
    world = chained()
    chosen = next(m for m in world.status.replicas if m.index == 1)
    world.kill("server-1")
    decision = world.tick(restarted=restarted)
    assert not [a for a in decision.acts if isinstance(a, CreatePod)]
    assert "Promoted" in [e.reason for e in decision.events]
    assert head(world, 1) == chosen
    recovered(world)
    record = world.status.recoveries[-1]
    assert (record.strategy, record.placement, record.reason) == (
        "Chain", "Promote", "ReplicaPromoted",
    )  # fmt: skip
    assert sources_of(world) == {REPLICA: len(world.slots(1))}
    assert (record.delta_norm.kind, record.rung) == ("Exact", 0)


def test_the_slots_return_and_the_chain_is_made_whole_again() -> None:
    world = chained()
    world.kill("server-1")
    recovered(world, 2)
    assert world.status.recoveries[-1].cause == "HandBack"
    assert not head(world, 1).guest
    whole(world)
    assert all(m.incarnation > head(world, m.index).incarnation for m in world.status.replicas)
    assert sorted(m.index for m in world.status.replicas) == [0, 1, 2]


def test_with_its_replicas_host_a_server_is_lost() -> None:
    world = chained()
    world.kill("server-0")
    world.kill("server-1")
    world.until_phase(Phase.FAILED)
    assert world.status.reason == "StateLost"
    assert "no replica" in world.status.message


def test_the_ladder_goes_on_where_there_is_no_replica() -> None:
    world = chained(fallback=["Stateless"])
    world.kill("server-0")
    world.kill("server-1")
    recovered(world)
    record = world.status.recoveries[-1]
    assert (record.strategy, record.rung, record.outcome) == ("Stateless", 1, "Succeeded")


def test_of_three_the_last_is_promoted_when_two_are_lost() -> None:
    world = chained(4, replicas=3)
    last = max((m for m in world.status.replicas if m.index == 0), key=lambda m: m.incarnation)
    world.kill("server-0")
    world.kill("server-1")
    world.tick()
    assert head(world, 0) == last
    recovered(world)
    assert world.status.recoveries[-1].placement == "Promote"


def test_nobody_is_promoted_in_a_pod_that_is_lost_too() -> None:
    world = chained(4, replicas=3)
    last = max((m for m in world.status.replicas if m.index == 0), key=lambda m: m.incarnation)
    world.hang_up("server-0")
    world.hang_up("server-1")
    world.suspect("server-0-1")
    world.sim("worker-0").suspects += (Suspect("server-1-1", 0.05, "Disconnected"),)
    world.tick()
    assert world.pod("server-1").state == "Running", "its container has not said so yet"
    assert head(world, 0) == last
    recovered(world)
    assert world.status.recoveries[-1].placement == "Promote"


def test_a_host_that_does_not_answer_keeps_no_other_chain_waiting() -> None:
    spec = spec_of(recovery={"strategy": "Chain"}, servers={"replicas": 3})
    world = World(spec=spec, total=FOREVER).until_phase("Running")
    world.failing = {"server-2-1": 0.0}
    world.until(lambda w: {m.index for m in addressed(w)} == {0, 2}, ticks=50)


def test_nobody_is_promoted_on_whom_nobody_counts() -> None:
    spec = spec_of(recovery={"strategy": "Chain", "fallback": ["Stateless"]})
    world = World(spec=spec, total=FOREVER, lagging=True).running()
    world.until(lambda w: len(addressed(w)) == 3)
    assert condition(world, "Replicated") is None
    world.kill("server-1")
    recovered(world)
    assert world.status.recoveries[-1].strategy == "Stateless"
    assert not head(world, 1).guest


def test_a_lost_replica_is_no_loss_and_is_made_again() -> None:
    world = chained()
    lost = next(m for m in world.status.replicas if m.index == 0)
    world.end_guest(f"server-0-{lost.incarnation}", code=-9)
    told = [e for e in world.tick().events if e.reason == "ReplicaLost"]
    assert [(e.member, e.warning) for e in told] == [("server-0", True)]
    assert "(Signal9); server-0 gets another replica" in told[0].message
    assert lost not in world.status.replicas
    assert condition(world, "Replicated") == "False"
    ticks = len(world.decisions)
    whole(world)
    assert (len(world.decisions) - ticks) * 0.1 >= 3, "not again and again at once"
    assert not world.status.recoveries
    assert [m.index for m in world.status.replicas].count(0) == 1


def test_replicas_lost_with_their_hosts_are_made_again_at_once() -> None:
    world = chained(4, replicas=3)
    for n in range(4):
        world.kill(f"server-{n}")
        recovered(world, 2 * n + 2)
        ticks = len(world.decisions)
        whole(world)
        assert (len(world.decisions) - ticks) * 0.1 < 2, "or the next two kills take a whole chain"
    assert {r.outcome for r in world.status.recoveries} == {"Succeeded"}


def test_a_promoted_replica_gets_its_own_pod_before_replicas() -> None:
    world = chained(4, replicas=3)
    chosen = min((m for m in world.status.replicas if m.index == 1), key=lambda m: m.incarnation)
    world.kill("server-1")
    recovered(world, 2)
    seen = {m for d in world.decisions for m in d.status.replicas if m.index == 1}
    between = [m for m in seen if m.incarnation > chosen.incarnation + 1]
    assert all(m.incarnation > head(world, 1).incarnation for m in between)


def test_with_copies_a_replica_takes_what_is_fresher_from_the_workers() -> None:
    world = copied()
    world.kill("server-1")
    decision = world.tick()
    assert not [a for a in decision.acts if isinstance(a, CreatePod)]
    recovered(world)
    record = world.status.recoveries[-1]
    assert (record.strategy, record.placement) == ("Freshest", "Promote")
    assert list(sources_of(world)) == [PEER]
    offered = [p.sources for p in world.planned.values()]
    assert [[s.kind.value for s in sources] for sources in offered[:1]] == [
        [PEER, PEER, REPLICA, RUNNING]
    ], "the workers' copies are newer than its own"


@pytest.mark.parametrize("lost", [("server-1",), ("server-1", "server-2")])
def test_a_promoted_replica_is_not_heard_through_a_sibling(lost: tuple[str, ...]) -> None:
    """Its copies do not come that way, and what is covered may be on it alone."""
    world = copied()
    for seat in lost:
        world.kill(seat)
    world.tick()
    (promoted,) = [m for m in world.status.members if m.guest]
    name, epoch = name_of(promoted), world.status.epoch
    seen = world.seen()
    now, sibling = seen.heard[name].report, seen.heard["server-0-1"].report
    assert (now.epoch, bool(now.copies)) == (epoch, True)
    before = replace(now, epoch=epoch - 1, state="Replica", copies=())
    views = [
        (0.2, View(1, epoch - 1, before)),
        (0.1, View(1, epoch, sibling, {name: (0.0, replace(now, copies=()))})),
    ]

    def decided() -> Decision:
        heard = {**seen.heard, name: merge(views)[name]}
        policy = Policy(store=world.store, progress_seconds=0.0, copies_seconds=0.0)
        return decide(replace(seen, heard=heard), policy, world.now)

    waits = decided()
    assert not [a for a in waits.acts if isinstance(a, PostRestore)]
    assert waits.message.endswith(f"waiting for {name} to say what they have")
    views.append((0.0, View(2, epoch, now)))
    (plan,) = [a for a in decided().acts if isinstance(a, PostRestore) and a.member == name]
    assert REPLICA in [s.kind.value for s in plan.restore.sources]


def test_what_no_worker_gave_is_not_said_to_come_from_them() -> None:
    world = copied()
    world.dead_peers = True
    world.kill("server-1")
    recovered(world)
    assert list(sources_of(world)) == [REPLICA]
    assert world.status.recoveries[-1].reason == "ReplicaPromoted"
    plain = World(total=FOREVER, dead_peers=True).running()
    plain.kill("server-1")
    recovered(plain)
    assert list(sources_of(plain)) == [RUNNING]
    record = plain.status.recoveries[-1]
    assert (record.reason, record.delta_norm.kind) == ("PeerCopiesFailed", "Unknown")


def test_without_workers_at_hand_a_covered_push_is_with_the_replica() -> None:
    """`Stateless` takes what workers have; with `copies` a push may be on the replica alone."""
    world = copied(strategy="Stateless")
    world.kill("server-1")
    recovered(world)
    (sources,) = [p.sources for p in world.planned.values()]
    assert [s.kind.value for s in sources] == [PEER, PEER, REPLICA, RUNNING]


@pytest.mark.parametrize("seed", range(6))
def test_an_operator_that_dies_changes_nothing(seed: int) -> None:
    world = chained(4, replicas=3)
    for n, seat in enumerate(("server-2", "server-0")):
        world.kill(seat)
        for tick in range(60):
            world.tick(restarted=(tick + seed) % 3 == 0)
        recovered(world, 2 * n + 2)
    assert all(r.outcome == "Succeeded" for r in world.status.recoveries)
    whole(world)


def test_a_replica_that_hangs_is_doubted_and_then_dropped() -> None:
    world = chained()
    hung = next(m for m in world.status.replicas if m.index == 0)
    name = f"server-0-{hung.incarnation}"
    world.sim("server-0").suspects = (Suspect(name, 1.5, "Unanswered"),)
    assert world.seen().doubted, "so that the operator asks it itself"
    world.failing[name] = 0.0
    world.until(lambda w: hung not in w.status.replicas, ticks=60)
    assert not world.status.recoveries


def test_a_replica_whose_loop_alone_hangs_is_dropped() -> None:
    world = chained()
    hung = next(m for m in world.status.replicas if m.index == 0)
    name = f"server-0-{hung.incarnation}"
    world.sim("server-0").suspects = (Suspect(name, 1.5, "Unanswered"),)
    world.silent[name] = 29.0
    world.until(lambda w: hung not in w.status.replicas, ticks=60)
    assert not world.status.recoveries


@pytest.mark.parametrize(
    ("reason", "age", "dropped"),
    [
        ("Disconnected", 4.0, True), ("Disconnected", 2.0, False),
        ("Unanswered", 20.0, False),  # it is slow, perhaps
        ("Unconnected", 60.0, False),  # for which nobody waits
    ],
)  # fmt: skip
def test_a_replica_that_only_its_server_cannot_reach_is_dropped(
    reason: str, age: float, dropped: bool
) -> None:
    """The operator reaches both; workers would wait until the link heals."""
    world = chained()
    cut = next(m for m in world.status.replicas if m.index == 0)
    name = f"server-0-{cut.incarnation}"
    world.sim("server-0").suspects = (Suspect(name, age, reason),)
    decision = world.tick(0.01)
    assert (cut not in world.status.replicas) == dropped
    told = [e.message for e in decision.events if e.reason == "ReplicaLost"]
    assert len(told) == dropped
    assert all("Parted" in text for text in told)
    assert not world.status.recoveries


def test_what_others_say_of_a_replica_drops_it_not() -> None:
    world = chained()
    name = next(f"server-0-{m.incarnation}" for m in world.status.replicas if m.index == 0)
    world.sim("server-1").suspects = (Suspect(name, 60.0, "Disconnected"),)
    world.tick()
    assert name in {f"server-0-{m.incarnation}" for m in world.status.replicas if m.index == 0}


def test_a_replica_is_kept_while_workers_do_not_reach_its_server() -> None:
    world = chained()
    cut = next(m for m in world.status.replicas if m.index == 0)
    name = f"server-0-{cut.incarnation}"
    world.sim("server-0").suspects = (Suspect(name, 60.0, "Disconnected"),)
    world.sim("worker-1").suspects = (Suspect("server-0-1", 0.5, "Disconnected"),)
    world.tick()
    assert cut in world.status.replicas
    world.sim("worker-1").suspects = (Suspect("server-0-1", 0.5, "Unanswered"),)
    world.tick()
    assert cut not in world.status.replicas, "it waits for the replica, and they for it"


def test_another_operator_hears_the_replicas_before_it_judges() -> None:
    world = chained()
    replica = next(m for m in world.status.replicas if m.index == 1)
    world.unheard = {f"server-1-{replica.incarnation}"}
    world.kill("server-1")
    world.tick(restarted=True)
    assert world.status.phase == "Running", "nobody knows yet who could take its place"
    world.unheard.clear()
    recovered(world)
    assert world.status.recoveries[-1].placement == "Promote"


def test_another_operator_waits_no_longer_than_a_second_for_a_replica() -> None:
    world = chained(fallback=["Stateless"])
    replica = next(m for m in world.status.replicas if m.index == 1)
    world.unheard = {f"server-1-{replica.incarnation}"}
    world.kill("server-1")
    world.tick(restarted=True)
    world.until(lambda w: w.status.phase == "Recovering", ticks=11)


def test_a_promotion_that_is_told_late_is_no_loss() -> None:
    world = chained()
    world.kill("server-1")
    world.lost_acts = True  # the operator dies between the write and what it announced
    world.tick()
    world.lost_acts = False
    world.now += timedelta(seconds=2)
    recovered(world)
    record = world.status.recoveries[-1]
    assert (record.strategy, record.reason, record.rung) == ("Chain", "ReplicaPromoted", 0)


def failing_hand_back() -> World:
    """A chained job whose frozen server was asked for its slots in vain."""
    world = chained()
    world.kill("server-1")
    recovered(world)
    world.dead_sources = True
    world.until(lambda w: bool(w.status.handing))
    world.tick()
    return world


def test_a_server_that_has_all_and_does_not_hand_it_over_is_asked_again() -> None:
    world = failing_hand_back()
    for _ in range(20):
        world.tick()
    world.dead_sources = False
    recovered(world, 2)
    assert (world.status.recoveries[-1].cause, world.status.recoveries[-1].strategy) == (
        "HandBack", "Chain",
    )  # fmt: skip


def test_not_for_ever_and_not_once_it_is_gone() -> None:
    world = failing_hand_back()
    world.until_phase(Phase.FAILED, seconds=5.0)
    assert world.status.reason == "StateLost"
    world = failing_hand_back()
    (frozen,) = world.status.handing
    world.end_guest(f"server-1-{frozen.incarnation}", code=-9)
    world.until_phase(Phase.FAILED, ticks=10)


def test_a_pod_that_is_lost_in_the_hand_back_loses_nothing() -> None:
    world = chained()
    world.kill("server-1")
    recovered(world)

    def hands_back(w: World) -> bool:
        return w.status.recovery is not None and w.status.recovery.cause == "HandBack"

    world.until(hands_back)
    frozen = next(m for m in world.status.handing if m.index == 1)
    world.kill("server-1")
    world.tick()
    assert frozen in world.status.handing, "it has what its successor never got"
    recovered(world, 2)
    assert world.status.phase is Phase.RUNNING
    assert world.status.recoveries[-1].outcome == "Succeeded"
