"""How the operator itself behaves. What a job wants stands in its spec, never here."""

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Settings:
    """Made once in an entry point and handed down."""

    passes: int = 32
    """Jobs that are looked at at the same time."""
    resync_seconds: float = 600.0
    """All jobs are listed and looked at again this often; repairs what a watch missed."""
    progress_seconds: float = 10.0
    """Progress alone is written to status at most this often."""
    calm_seconds: float = 0.5
    """While nothing fails, a job's view is asked for at most this often."""
    hurry_seconds: float = 0.03
    """As long as something happens, a member that had no news is asked again after this long."""
    poll_seconds: float = 2.0
    """Length of a long poll. A server has something to say four times a second, so one that says
    nothing for so long is doubted."""
    view_seconds: float = 0.5
    """How long a member may take to answer when it is asked for its view at once."""
    command_seconds: float = 2.0
    """How long a member may take to accept a membership, a restore plan or an order to save."""
    retry_seconds: float = 0.05
    """A member that does not answer yet (it imports torch) is told again after this long."""
    copies_seconds: float = 1.0
    """How long a restore plan waits for the copies of workers that stay silent."""
    superseded_grace_seconds: float = 30.0
    """Grace of a pod that was replaced while it still runs."""
    clean_grace_seconds: float = 5.0
    """Grace of a pod that a finished job no longer needs."""
    first_backoff_seconds: float = 0.1
    """After a failed pass; doubled by each further one."""
    longest_backoff_seconds: float = 30.0

    def local(self) -> "Settings":
        """Return what `daruma run` uses: one job, a person who watches, no API server to spare."""
        return replace(self, progress_seconds=0.1, calm_seconds=0.05, superseded_grace_seconds=2.0)
