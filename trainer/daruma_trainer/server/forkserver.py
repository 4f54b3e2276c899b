"""One process that has imported all that a server needs, and forks servers on request (Linux).

`daruma run` starts its servers so: most of what a new interpreter does before it can serve is to
import, and a lost server is waited for. Requests come on standard input, a SOCK_SEQPACKET socket:
a JSON object of environment variables, with the descriptor of the log. The answer is
`{"pid": n}` or `{"error": "…"}`. A server is no child of this process but of the one that asked,
which is a subreaper: it learns how the server ended, and the server ends with it alone.
"""

import contextlib
import ctypes
import gc
import json
import os
import signal
import socket
import sys
import time

from daruma_trainer.server.guests import end_with

MAX_REQUEST_BYTES = 64 << 10
_PR_SET_NAME = 15


def fork_servers() -> None:
    """Answer requests until their end; returns in each new server, as itself."""
    import daruma_trainer.server.serve  # noqa: F401 - so that no server has to

    # Who ignored it may have started this; then nobody could be waited for.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    requests, parent = socket.socket(fileno=sys.stdin.fileno()), os.getppid()
    gc.collect()
    gc.freeze()  # so that what was imported stays shared
    while True:
        body, logs, _, _ = socket.recv_fds(requests, MAX_REQUEST_BYTES, 1)
        if not body:
            sys.exit(0)
        try:
            middle = os.fork()
        except OSError as error:
            _answer(requests, error=str(error))
        else:
            if middle == 0 and _forked(requests):
                _become(json.loads(body), logs[0], parent)
                requests.detach()
                return
            os.waitpid(middle, 0)
        for log in logs:
            os.close(log)


def _forked(requests: socket.socket) -> bool:
    """Fork once more and end; True in the process that goes on, whose parent just ended."""
    middle = os.getpid()
    try:
        pid = os.fork()
    except OSError as error:
        _answer(requests, error=str(error))
        os._exit(1)
    if pid:
        _answer(requests, pid=pid)
        os._exit(0)
    while os.getppid() == middle:
        time.sleep(0.0002)
    return True


def _answer(requests: socket.socket, **answer: int | str) -> None:
    # Who asked may be gone.
    with contextlib.suppress(OSError):
        requests.send(json.dumps(answer).encode())


def _become(variables: dict[str, str], log: int, parent: int) -> None:
    """Be a process of its own: session, standard streams, environment, name."""
    os.setsid()
    if not end_with(parent):
        os._exit(1)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.close(null)
    os.close(log)
    os.environ.update(variables)
    ctypes.CDLL(None).prctl(_PR_SET_NAME, b"daruma-server", 0, 0, 0)
