"""What forks members for tests that start many, from one process that has imported what all need.

    python forked_members.py        (by `local_cluster`; the protocol is the fork server's own)

DARUMA_TEST_COMMAND has, as JSON, what follows `python` in the command that a member runs.
"""

import json
import os
import runpy
import sys
from pathlib import Path

import daruma_trainer.programs.data
import daruma_trainer.server.serve
import daruma_trainer.worker.join  # noqa: F401 - so that no member has to
from daruma_trainer.server.forkserver import fork_servers

fork_servers()
first, *rest = json.loads(os.environ["DARUMA_TEST_COMMAND"])
if first == "-m":
    sys.argv = rest
    runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
else:
    sys.argv = [first, *rest]
    sys.path.insert(0, str(Path(first).parent))
    runpy.run_path(first, run_name="__main__")
