"""Failures on order: `--kill server-1@step=50`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from daruma_operator.errors import UsageError
from daruma_trainer.contract import Role

_FORM = re.compile(r"(server|worker)-(\d{1,5})@step=(\d{1,9})")
_ROLES = {"server": Role.SERVER, "worker": Role.WORKER}


@dataclass(frozen=True, slots=True)
class Kill:
    """SIGKILL to the member of this role and index once the job has made `step` steps."""

    role: Role
    index: int
    step: int

    def __str__(self) -> str:
        return f"{self.role.value.lower()}-{self.index}@step={self.step}"


def parse_kill(text: str) -> Kill:
    """Read `ROLE-INDEX@step=N`; UsageError says what is wrong with it."""
    match = _FORM.fullmatch(text)
    if match is None:
        raise UsageError(
            f"--kill {text}: write ROLE-INDEX@step=N, as in server-1@step=50 or worker-0@step=10"
        )
    return Kill(_ROLES[match[1]], int(match[2]), int(match[3]))


def check_kills(kills: Sequence[Kill], servers: int, workers: int) -> None:
    """Raise UsageError for a member that the job does not have."""
    for kill in kills:
        members = servers if kill.role is Role.SERVER else workers
        if kill.index >= members:
            raise UsageError(
                f"--kill {kill}: the job has {members} {kill.role.value.lower()}s, counted from 0"
            )


def due(kills: Sequence[Kill], step: int) -> list[Kill]:
    """Return those whose step has come."""
    return [kill for kill in kills if kill.step <= step]
