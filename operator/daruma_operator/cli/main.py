"""`daruma`: the commands that people type."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from daruma_operator.cli.delegate import become
from daruma_operator.errors import DarumaError, EnvironmentLacksError, ManifestError, UsageError
from daruma_trainer.contract import ExitCode

_TRAINER = ("numpy", "zmq"), "trainer"
_BENCHES = {
    "availability": (("numpy", "zmq", "torch", "pydantic", "rich", "yaml"), "bench,local,torch"),
    "checkpoint": _TRAINER,
    "memory": (("numpy", "zmq", "pydantic", "rich", "yaml"), "trainer,local"),
    "recovery": _TRAINER,
    "replay": _TRAINER,
    "replication": _TRAINER,
    "rework": _TRAINER,
}
"""What each benchmark imports at once, and the extras that bring it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code of api: 0, 1, 2 or 3."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        # What follows belongs to another program, `--help` too.
        if given[:1] == ["export"]:
            become("daruma_trainer.checkpoint.export", given[1:], ["numpy", "xxhash"], "trainer")
        if given[:1] == ["bench"] and given[1:2] and given[1] in _BENCHES:
            become("daruma_trainer.bench", given[1:], *_BENCHES[given[1]])
        options = _parser().parse_args(given)
        return _run(options)
    except (ManifestError, UsageError) as error:
        return _fail(error, ExitCode.USAGE)
    except EnvironmentLacksError as error:
        return _fail(error, ExitCode.MISSING)
    except DarumaError as error:
        return _fail(error, ExitCode.FAILED)


def _run(options: argparse.Namespace) -> int:
    try:
        from daruma_operator.cli.run import RunOptions, run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("daruma"):
            raise
        raise EnvironmentLacksError(
            f"this command needs {error.name}: pip install 'daruma-operator[local,torch]'"
        ) from error
    return run(
        RunOptions(
            manifest=options.file,
            out=options.out,
            kills=tuple(options.kill),
            strategy=options.strategy,
            json=options.json,
            first_port=options.ports,
        ),
        os.environ,
    )


def _fail(error: Exception, code: ExitCode) -> int:
    print(f"daruma: {error}", file=sys.stderr)
    return int(code)


def _port(text: str) -> int:
    port = int(text)
    if not 1024 <= port <= 65_000:
        raise argparse.ArgumentTypeError(f"a port from 1024 to 65000, not {text}")
    return port


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="daruma",
        description="Parameter-server training that gets up again after every fall.",
        epilog="exit codes: 0 done; 1 the job failed; 2 wrong usage or a bad manifest; "
        "3 the environment lacks something",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser(
        "run",
        help="run a TrainingJob on this machine, with processes instead of pods",
        description="Run a TrainingJob on this machine, with processes instead of pods.",
    )
    run.add_argument("file", type=Path, metavar="FILE", help="the manifest of a TrainingJob")
    run.add_argument("--out", type=Path, metavar="DIR", help="default: runs/<name of the job>")
    run.add_argument(
        "--kill",
        action="append",
        default=[],
        metavar="ROLE-INDEX@step=N",
        help="SIGKILL a member when the job reaches a step: server-1@step=50; may be repeated",
    )
    run.add_argument("--strategy", metavar="S", help="instead of the manifest's recovery.strategy")
    run.add_argument("--json", action="store_true", help="print report.json to standard output")
    run.add_argument(
        "--ports", type=_port, metavar="FIRST", help="give members the ports from here on"
    )
    commands.add_parser("export", help="make safetensors or a torch file of a checkpoint")
    bench = commands.add_parser("bench", help="measure: " + ", ".join(_BENCHES))
    bench.add_argument("what", choices=_BENCHES)
    return parser


if __name__ == "__main__":
    sys.exit(main())
