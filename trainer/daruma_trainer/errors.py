"""Every error of the trainer, by what the caller should do.

DarumaError
├── ConfigurationError       fix the program or the manifest; exit code 2
│   └── TableMismatchError   two workers made different tables of one name
├── MissingError             install something; exit code 3
├── GaveUpError              a deadline passed or the job ended; exit code 1
│   └── ReplacedError        this incarnation was replaced; exit code 4
└── StoreError               a store failed: try later, or the next source
    ├── StoreFullError       no space left
    ├── StoreAwayError       nobody answers, or nobody who knows: ask again, within a deadline
    └── DamagedError         bytes are not what was written: take the next source

`contract.ContractError` (what came is no message of ours) stands beside this tree, because the
operator raises it too; `wire.MalformedError` is one.
"""


class DarumaError(Exception):
    """Base of all: catch it to say one clear sentence and exit."""


class ConfigurationError(DarumaError):
    """The program or the manifest asks for what cannot be."""


class TableMismatchError(ConfigurationError):
    """Two workers made different tables of one name or number."""


class MissingError(DarumaError):
    """The environment lacks something; the message says what to install."""


class GaveUpError(DarumaError):
    """What was waited for did not come within its deadline, or the job ended."""


class ReplacedError(GaveUpError):
    """A newer incarnation has this one's place."""


class StoreError(DarumaError):
    """Reading or writing a store failed."""


class StoreFullError(StoreError):
    """The store has no space left."""


class StoreAwayError(StoreError):
    """The store cannot be reached or refuses everybody: nothing is known of what lies in it."""


class DamagedError(StoreError):
    """What was read is not what was written."""
