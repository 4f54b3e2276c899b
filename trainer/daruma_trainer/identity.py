"""Who this process is, from its environment, which holds nothing that may change."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from daruma_trainer.contract import (
    DATA_PORT,
    ENV_INCARNATION,
    ENV_INDEX,
    ENV_JOB,
    ENV_LISTEN,
    ENV_NAMESPACE,
    ENV_ROLE,
    ENV_TOKEN_FILE,
    Role,
    member_id,
)
from daruma_trainer.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class Identity:
    """One incarnation of a server or worker."""

    namespace: str
    job: str
    role: Role
    index: int
    incarnation: int
    token: str
    listen: tuple[str, int] = ("0.0.0.0", DATA_PORT)  # noqa: S104 - a pod's own address
    """Of the data port; the agent takes the next one."""

    @property
    def id(self) -> str:
        """Name on the wire and in views."""
        return member_id(self.role, self.index, self.incarnation)

    @property
    def agent_listen(self) -> tuple[str, int]:
        """Where the agent listens."""
        return self.listen[0], self.listen[1] + 1

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "Identity":
        """Read it; ConfigurationError names the variable that is wrong."""

        def get(name: str) -> str:
            if name not in environment:
                raise ConfigurationError(
                    f"{name} is not set: this program is started by the operator or `daruma run`"
                )
            return environment[name]

        try:
            host, _, port = environment.get(ENV_LISTEN, f"0.0.0.0:{DATA_PORT}").rpartition(":")
            token = Path(get(ENV_TOKEN_FILE)).read_text().strip()
            return cls(
                get(ENV_NAMESPACE),
                get(ENV_JOB),
                Role(get(ENV_ROLE)),
                int(get(ENV_INDEX)),
                int(get(ENV_INCARNATION)),
                token,
                (host, int(port)),
            )
        except (ValueError, OSError) as error:
            raise ConfigurationError(f"the environment of this pod is wrong: {error}") from error
