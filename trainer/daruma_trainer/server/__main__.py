"""What a server pod runs: `daruma-server`, or `python -m daruma_trainer.server`."""

import logging
import os
import signal
import sys

import zmq

from daruma_trainer.contract import ENV_HOST_PID
from daruma_trainer.errors import DarumaError
from daruma_trainer.identity import Identity
from daruma_trainer.server.memory import keep_freed


def main() -> int:
    """Serve until the job ends or this incarnation is replaced; returns the exit code."""
    logging.basicConfig(
        level=os.environ.get("DARUMA_LOG_LEVEL", "INFO"),
        format="%(asctime)s %(levelname)s %(message)s",
        stream=sys.stderr,
    )
    if host := os.environ.get(ENV_HOST_PID):
        from daruma_trainer.server.guests import end_with

        if not end_with(int(host)):
            return 1
    from daruma_trainer.server.serve import Server

    keep_freed()
    try:
        identity = Identity.from_environment(os.environ)
        server = Server(identity)
    except DarumaError as error:
        logging.getLogger("daruma.server").error("%s", error)
        return 2
    except (OSError, zmq.ZMQError) as error:
        logging.getLogger("daruma.server").error("cannot listen: %s", error)
        return 2
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: server.stop())
    logging.getLogger("daruma.server").info("%s listens on %s:%s", identity.id, *identity.listen)
    return server.run()


if __name__ == "__main__":
    if sys.argv[1:] == ["--fork"]:
        from daruma_trainer.server.forkserver import fork_servers

        fork_servers()
    sys.exit(main())
