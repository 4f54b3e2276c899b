"""Every error of the operator and of `daruma`, by what the caller should do.

DarumaError
├── ManifestError              fix the spec; `daruma` exits with 2, one line a problem
├── UsageError                 fix the command line; exit code 2
├── EnvironmentLacksError      install or free something; exit code 3
└── TryAgainError              the pass is repeated with a growing delay
    ├── AgentError             a member's agent did not do what was asked
    └── ClusterError           the API server, or the substrate, did not do what was asked

`substrate.protocol.StatusConflict` stands beside this tree: it is an outcome, not a fault.
"""


class DarumaError(Exception):
    """Base of all: str() is what a person should read."""


class ManifestError(DarumaError):
    """The manifest is wrong; a line for each problem: field, what is wrong, what to do."""


class UsageError(DarumaError):
    """The command line is wrong."""


class EnvironmentLacksError(DarumaError):
    """This machine lacks something: the message says what to install or to free."""


class TryAgainError(DarumaError):
    """Something outside failed; nothing was decided by it."""


class AgentError(TryAgainError):
    """A member's agent could not be reached, or refused."""


class ClusterError(TryAgainError):
    """The substrate could not do what was asked."""
