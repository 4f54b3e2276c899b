"""Up to the first step: pods, their addresses, the first membership. Pure."""

from daruma_operator.api.status import Phase
from daruma_operator.controller.adopting import guest_report
from daruma_operator.controller.draft import Draft
from daruma_operator.controller.ending import fail
from daruma_operator.controller.observe import runs
from daruma_operator.controller.progress import steps_of
from daruma_operator.controller.verdicts import finished, name_of
from daruma_trainer.contract import TRAINS, Role


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
    if d.left(d.status.phase_since, limit) <= 0:
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
    ready = 0
    for member in d.status.members:
        report = d.seen.report(name_of(member))
        done = member.role is Role.WORKER and finished(d.seen.pod(member.pod))
        wanted = ("Ready",) if member.role is Role.SERVER else TRAINS
        ready += done or (report is not None and report.state in wanted)
    total = len(d.status.members)
    if d.status.initialised and ready == total:
        n, w = d.spec.servers.replicas, d.spec.workers.replicas
        text = f"{n} of {n} servers and {w} of {w} workers are ready"
        d.phase(Phase.RUNNING, "AllPodsReady", text)
        return
    began = "" if steps_of(d) else "; no step yet"
    d.phase(Phase.STARTING, "Joining", f"{ready} of {total} members are ready{began}")
