"""Every error of the operator and of `daruma`, by what the caller should do.

DarumaError
├── ManifestError              fix the spec; `daruma` exits with 2, one line a problem
├── UsageError                 fix the command line; exit code 2
├── EnvironmentLacksError      install or free something; exit code 3
├── ClusterError               the API server did not do what was asked; the pass is repeated with
│                              a growing delay
└── UnreadableJobError         the job is there, but this version cannot read it: people were told,
                               and it is read again when it changes

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


class ClusterError(DarumaError):
    """The substrate could not do what was asked."""


class UnreadableJobError(DarumaError):
    """A job's status, or each spec of it that was seen, is of another version of Daruma."""
