"""Commands that the trainer answers: this process becomes it, because we must not import numpy."""

import importlib.util
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from daruma_operator.errors import EnvironmentLacksError


def become(module: str, arguments: Sequence[str], needs: Sequence[str], extra: str) -> NoReturn:
    """Run `python -m module` in place of this process.

    `needs`: libraries it imports; EnvironmentLacksError names the `extra` that brings them.
    """
    missing = [name for name in needs if importlib.util.find_spec(name) is None]
    if missing:
        raise EnvironmentLacksError(
            f"this command needs {', '.join(missing)}: pip install 'daruma-operator[{extra}]'"
        )
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])  # noqa: S606
