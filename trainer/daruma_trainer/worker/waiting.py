"""What a worker that gives up has waited for, in a sentence that says who and why."""

from daruma_trainer.contract import Membership, Role
from daruma_trainer.worker.pulling import Wanted
from daruma_trainer.worker.sessions import Sessions, Stage

MAX_NAMED = 5
"""Members that one sentence names."""


def waited_for(
    membership: Membership | None, sessions: Sessions | None, wanted: Wanted | None
) -> str:
    """Say who is missing. `wanted`: the pull that the program waits for, if it is one."""
    if membership is None or sessions is None:
        return (
            "the operator told nobody's address: it does not reach this pod, or other pods do not "
            "run; `kubectl describe trainingjob` says which"
        )
    found = [text for s in range(membership.servers) if (text := _lacks(sessions, wanted, s))]
    found += [
        f"{member.id} has no address yet"
        for member in membership.of(Role.WORKER)
        if member.address is None
    ]
    more = f" and {len(found) - MAX_NAMED} more" if len(found) > MAX_NAMED else ""
    return (
        "; ".join(found[:MAX_NAMED]) + more or "every server answers: see the other workers' logs"
    )


def _lacks(sessions: Sessions, wanted: Wanted | None, server: int) -> str | None:
    session = sessions.by_server.get(server)
    if session is None:
        return f"server-{server} does not run, or was lost: see the job's events"
    name = session.link.peer.id
    suspect = session.link.suspect(sessions.membership.settings.suspect_seconds)
    if suspect is not None:
        how = "gives no answer" if suspect.reason == "Unanswered" else "cannot be reached"
        return f"{name} {how} for {suspect.age:.0f} s: see its log"
    if session.stage is not Stage.SYNCED:
        return f"{name} has slots that are not Ready: see the job's events"
    if wanted is not None and wanted.missing[sessions.copy.slots_of(server)].any():
        return f"{name} waits for a batch of another worker, see their logs"
    return None
