"""`daruma run`: the operator's controller over processes of this machine, for one job."""

import asyncio
import json
import logging
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path
from typing import Any
from uuid import uuid4

from rich.console import Console

from daruma_operator.api.job import TrainingJob
from daruma_operator.api.load import load_manifest
from daruma_operator.api.spec import StrategyName
from daruma_operator.api.status import Phase
from daruma_operator.cli.folder import used, write_report
from daruma_operator.cli.kills import Kill, check_kills, due, parse_kill
from daruma_operator.cli.record import Recorder, interrupted_job, mean_loss
from daruma_operator.cli.show import ENDING, View, metrics_table, recoveries_tables
from daruma_operator.controller.decide import Decision
from daruma_operator.controller.loop import Controller, Hooks
from daruma_operator.controller.observe import Seen
from daruma_operator.errors import UsageError
from daruma_operator.metrics import Metrics
from daruma_operator.settings import Settings
from daruma_operator.substrate.ports import Ports
from daruma_operator.substrate.processes import HOST, ProcessSubstrate, program_command
from daruma_operator.substrate.protocol import Event, JobKey
from daruma_trainer.contract import ExitCode

_FINISH_SECONDS = 15.0
"""After the first Ctrl-C: how long workers and servers have to save what there is."""
_GRACE_SECONDS = 2.0
"""What still runs at the end gets SIGTERM, and SIGKILL after this."""


@dataclass(frozen=True, slots=True)
class RunOptions:
    """The command line of `daruma run`."""

    manifest: Path
    out: Path | None = None
    kills: tuple[str, ...] = ()
    strategy: str | None = None
    json: bool = False
    first_port: int | None = None


def run(
    options: RunOptions,
    environment: Mapping[str, str],
    substrate_of: Callable[..., ProcessSubstrate] = ProcessSubstrate,
) -> int:
    """Run the job to its end and return the exit code. Raises the errors of errors.py.

    `substrate_of`: what makes the members; benchmarks give one that can keep them away for a while.
    """
    job = _job(options, environment)
    kills = [parse_kill(text) for text in options.kills]
    check_kills(kills, job.spec.servers.replicas, job.spec.workers.replicas)
    program_command(job)
    ports = Ports(HOST, options.first_port)
    if options.first_port is not None:
        ports.check(job.spec.servers.replicas + job.spec.workers.replicas)
    out = options.out or Path("runs") / job.name
    with used(out):
        console = Console(stderr=options.json)
        substrate = substrate_of(job, out, environment, ports)
        one = _Run(substrate, JobKey(job.namespace, job.name), kills, console)
        report, phase = asyncio.run(one.to_the_end(out))
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        for table in recoveries_tables(report["recoveries"], console.width):
            console.print(table)
        console.print(metrics_table(report))
        # Lines of their own: they are to be copied.
        if report["result"] is not None:
            console.print(f"result: {report['result']['uri']}", soft_wrap=True, highlight=False)
        console.print(f"report: {out / 'report.json'}", soft_wrap=True, highlight=False)
    if one.interrupted:
        print(f"daruma: {report['message']}", file=sys.stderr)
        return ExitCode.FAILED
    if phase is not Phase.SUCCEEDED:
        last = substrate.job.status.last_failure
        theirs = last is not None and report["reason"] in ("BackoffLimitExceeded", "ProgramRefused")
        log = out / "logs" / f"{last.pod}.log" if last is not None and theirs else out / "logs"
        print(f"daruma: the job failed: {report['message']} (log: {log})", file=sys.stderr)
        return ExitCode.FAILED
    return ExitCode.OK


def _job(options: RunOptions, environment: Mapping[str, str]) -> TrainingJob:
    job = load_manifest(options.manifest, local=True)
    spec = job.spec
    if options.strategy is not None:
        if options.strategy not in set(StrategyName):
            raise UsageError(f"--strategy {options.strategy}: there are {', '.join(StrategyName)}")
        strategy = StrategyName(options.strategy)
        # What is left of the ladder; a rung must not be there twice.
        fallback = tuple(f for f in spec.recovery.fallback if f is not strategy)
        update = {"strategy": strategy, "fallback": fallback}
        spec = spec.model_copy(update={"recovery": spec.recovery.model_copy(update=update)})
        problems = spec.problems(local=True)
        if problems:
            raise UsageError("\n".join(f"--strategy {strategy}: {p}" for p in problems))
    for variable in spec.program.env:
        if variable.value is None and variable.name not in environment:
            raise UsageError(
                f"spec.program.env: {variable.name} comes from the cluster; export it here first"
            )
    return job.model_copy(
        update={
            "spec": spec,
            "uid": str(uuid4()),
            "resource_version": "1",
            "created_at": datetime.now(UTC),
        }
    )


class _Run:
    def __init__(
        self, substrate: ProcessSubstrate, key: JobKey, kills: list[Kill], console: Console
    ) -> None:
        self._substrate = substrate
        self._key = key
        self._kills = kills
        self._view = View(console)
        self._recorder = Recorder()
        self._started = 0.0
        self._done = asyncio.Event()
        self._aborted = asyncio.Event()
        self._asked = False
        """Whether Ctrl-C came."""
        self._diverged = False
        self.interrupted = False
        """Whether it ended what would have gone on."""

    async def to_the_end(self, out: Path) -> tuple[dict[str, Any], Phase | None]:
        """Run until the job is final, or was interrupted, and write the report.

        Nothing that was started remains.
        """
        loop = asyncio.get_running_loop()
        self._started = loop.time()
        self._substrate.open()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._interrupt)
        controller = Controller(
            self._substrate, Settings().local(), Metrics(), hooks=Hooks(observer=self._observe)
        )
        self._substrate.changed = controller.enqueue
        self._substrate.told = self._tell
        stop = asyncio.Event()
        try:
            with self._view, _logged(out / "logs" / "daruma.log", self._warn):
                work = asyncio.create_task(controller.run(stop), name="controller")
                await self._wait()
                stop.set()
                await work
        finally:
            await self._substrate.close(0.0 if self._aborted.is_set() else _GRACE_SECONDS)
        job = self._substrate.job
        if job.status.phase not in (Phase.SUCCEEDED, Phase.FAILED):
            self.interrupted = True  # killed while the job was at its end
        report = self._recorder.report(job, self._seconds(), interrupted=self.interrupted)
        write_report(out, report)  # while nobody can interrupt it
        return report, job.status.phase

    async def _wait(self) -> None:
        """Return when the job is final; or, once interrupted, at the latest after a while."""
        done = asyncio.create_task(self._done.wait())
        aborted = asyncio.create_task(self._aborted.wait())
        try:
            await asyncio.wait((done, aborted), return_when=asyncio.FIRST_COMPLETED)
        finally:
            done.cancel()
            aborted.cancel()

    def _interrupt(self) -> None:
        if self._asked:
            self._warn("killing everything")
            self._aborted.set()
            return
        self._asked = True
        status = self._substrate.job.status
        loop = asyncio.get_running_loop()
        if status.reason in ENDING or status.phase is Phase.SUCCEEDED:
            self._warn("the programs are done already: ending; once more to kill")
            loop.call_later(_FINISH_SECONDS, self._aborted.set)
            return
        self.interrupted = True
        if not status.initialised:
            self._warn("interrupted before training began: there is nothing to save")
            self._aborted.set()
            return
        self._warn("interrupted: saving what there is; once more to kill")
        finish = _FINISH_SECONDS if self._substrate.terminate_workers() else 0.0
        loop.call_later(finish, self._aborted.set)

    def _observe(self, seen: Seen, decision: Decision) -> None:
        """Called by the controller once a pass."""
        seconds = self._seconds()
        job: TrainingJob = seen.job.model_copy(update={"status": decision.status})
        if self.interrupted and decision.status.phase is Phase.SUCCEEDED:
            job = interrupted_job(job, self._recorder.step)
        reports = {member: heard.report for member, heard in seen.heard.items()}
        self._recorder.note(job, reports, seconds)
        loss = mean_loss(reports)
        if loss is not None and not isfinite(loss) and not self._diverged:
            self._diverged = True
            self._warn(f"the programs report a loss of {loss}")
        self._view.show(job, loss, seconds)
        for kill in due(self._kills, self._recorder.step):
            pod = self._substrate.kill(kill.role, kill.index)
            if pod is not None:
                self._kills.remove(kill)
                self._warn(f"killed {pod.name}, as --kill {kill} asked")
        if decision.status.phase in (Phase.SUCCEEDED, Phase.FAILED):
            for kill in self._kills:
                self._warn(f"--kill {kill} never came to pass")
            self._kills.clear()
            self._done.set()

    def _tell(self, event: Event) -> None:
        # That its workers, told to end, ended well makes no success of an interrupted job.
        if not (self.interrupted and event.reason == "Succeeded"):
            self._view.event(self._seconds(), event)

    def _warn(self, text: str) -> None:
        self._view.say(self._seconds(), text, warning=True)

    def _seconds(self) -> float:
        return asyncio.get_running_loop().time() - self._started


class _Told(logging.Handler):
    """Errors of the controller belong before the eyes of who waits for it."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__(logging.ERROR)
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        """Say it in a line; the traceback is in the file."""
        cause = record.exc_info[1] if record.exc_info else None
        self._say(record.getMessage() + (f": {cause}" if cause else ""))


@contextmanager
def _logged(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Send what the controller logs to a file, and its errors to the terminal as well."""
    logger = logging.getLogger("daruma")
    file = logging.FileHandler(path)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    handlers = file, _Told(say)
    for handler in handlers:
        logger.addHandler(handler)
    before = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.level, logger.propagate = before
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()
