"""Up to the first step: pods, their addresses, the first membership. Pure."""

from daruma_operator.api.status import Phase
from daruma_operator.controller.adopting import guest_report
from daruma_operator.controller.draft import Draft
from daruma_operator.controller.ending import all_left, fail
from daruma_operator.controller.observe import runs
from daruma_operator.controller.progress import steps_of
from daruma_operator.controller.verdicts import finished, name_of
from daruma_operator.names import seat
from daruma_trainer.contract import TRAINS, Role

_TRAINS = "its program has to make its tables and train inside `with daruma.join()`"
_MOST_NAMED = 5


def addresses(d: Draft) -> None:
    """Write down the addresses of members that run now, in a new epoch.

    At first all are waited for, so that one epoch names all. Later an address is given out at once:
    a server's slots have no owner until then, and others go on without a worker.
    """
    known = []
    missing = 0
    for member in d.status.members:
        if member.address is not None:
            continue
        pod = d.seen.pod(member.pod)
        address = None if pod is None or not runs(pod) else pod.address
        if member.guest:
            guest = guest_report(d, member)
            address = None if guest is None else guest.address
        if address is None:
            missing += 1
        else:
            node = None if pod is None else pod.node
            known.append(member.model_copy(update={"address": address, "node": node}))
    if not known or (missing and d.status.recovery is None and not d.status.initialised):
        return
    d.replace_members(known)
    d.raise_epoch()


def pending(d: Draft) -> None:
    """Wait for all pods to run."""
    waiting = [m for m in d.status.members if m.address is None]
    early = [m.pod for m in waiting if m.role is Role.WORKER and finished(d.seen.pod(m.pod))]
    if early:
        # Who has ended gets no address any more, and without it nobody trains.
        fail(d, "NothingTrained", f"{early[0]} ended with exit code 0 before it joined: {_TRAINS}")
        return
    if not waiting:
        d.phase(Phase.STARTING, "AllPodsRunning", "all pods run; waiting for the members to join")
        return
    reasons = []
    for member in waiting:
        pod = d.seen.pod(member.pod)
        if pod is not None and pod.reason:
            reasons.append(f"{pod.name}: {pod.reason} {pod.message or ''}".strip())
    text = "; ".join(reasons)[:600]
    limit = d.spec.recovery.timeouts.pending_seconds
    if d.left_to_act(d.status.phase_since, limit) <= 0:
        fail(
            d,
            "PodsPending",
            f"{len(waiting)} pods did not run within {limit:g} s{': ' + text if text else ''}",
        )
        return
    total = len(d.status.members)
    running = f"{total - len(waiting)} of {total} pods run"
    d.phase(Phase.PENDING, "PodsCreated", f"{running}{'; ' + text if text else ''}")


def starting(d: Draft) -> None:
    """Wait until all have joined and the parameters are initialised."""
    if _left_untrained(d):
        fail(d, "NothingTrained", f"every worker has left, and no table was made: {_TRAINS}")
        return
    missing = []
    for member in d.status.members:
        report = d.seen.report(name_of(member))
        done = member.role is Role.WORKER and finished(d.seen.pod(member.pod))
        wanted = ("Ready",) if member.role is Role.SERVER else TRAINS
        if not (done or (report is not None and report.state in wanted)):
            missing.append(seat(member.role, member.index))
    if d.status.initialised and not missing:
        n, w = d.spec.servers.replicas, d.spec.workers.replicas
        text = f"{n} of {n} servers and {w} of {w} workers are ready"
        d.phase(Phase.RUNNING, "AllPodsReady", text)
        return
    total = len(d.status.members)
    names = ", ".join(missing[:_MOST_NAMED]) + (", …" if len(missing) > _MOST_NAMED else "")
    text = f"{total - len(missing)} of {total} members are ready"
    d.phase(Phase.STARTING, "Joining", text + (f"; waiting for {names}" if missing else ""))


def _left_untrained(d: Draft) -> bool:
    """Whether all workers are at their ends, and every server says that there are no parameters."""
    servers = [d.seen.report(name_of(m)) for m in d.members(Role.SERVER)]
    return (
        not d.status.initialised
        and all_left(d)
        and all(r is not None and not r.initialised for r in servers)
        and not any(steps_of(d).values())
    )
