"""The folder of a run: made, found to be writable, and used by one run at a time."""

import errno
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from daruma_operator.errors import EnvironmentLacksError

_NEEDED_BYTES = 4 << 20
"""Logs, a token and the smallest of checkpoints fit in."""


@contextmanager
def used(out: Path) -> Iterator[None]:
    """Make the folder and hold it. EnvironmentLacksError says why it cannot be used."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = os.open(out / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _unusable(out, error) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.posix_fallocate(lock, 0, _NEEDED_BYTES)
            os.ftruncate(lock, 0)
        except BlockingIOError as error:
            raise EnvironmentLacksError(
                f"--out {out}: another `daruma run` uses this folder; name another one"
            ) from error
        except OSError as error:
            raise _unusable(out, error) from error
        yield
    finally:
        os.close(lock)


def write_report(out: Path, report: Mapping[str, Any]) -> None:
    """Write `report.json` whole or not at all. EnvironmentLacksError: it cannot be written."""
    new = out / "report.json.new"
    try:
        new.write_text(json.dumps(report, indent=2) + "\n")
        new.replace(out / "report.json")
    except OSError as error:
        raise _unusable(out, error) from error


def _unusable(out: Path, error: OSError) -> EnvironmentLacksError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return EnvironmentLacksError(
            f"--out {out}: no space is left there; free some, or name a folder on another disk"
        )
    return EnvironmentLacksError(
        f"--out {out}: cannot be written ({error.strerror}); name a folder that can"
    )
