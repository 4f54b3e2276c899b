"""What a person sees of a run: a live view in a terminal, else lines; tables at the end."""

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from daruma_operator.api.job import TrainingJob
from daruma_operator.api.status import Phase
from daruma_operator.substrate.protocol import Event

_REFRESH_SECONDS = 0.1
_LINE_SECONDS = 2.0
_PHASES = ("detect", "replace", "restore", "resume")
ENDING = ("SavingResult", "WorkersLeaving")
"""Reasons of a job whose programs came to their ends."""
_WAITING = (Phase.PENDING, Phase.STARTING, Phase.RECOVERING)
"""Phases whose message says what is waited for."""
_STYLES = {"Running": "green", "Recovering": "yellow", "Succeeded": "green", "Failed": "red"}


class View:
    """Shows how a run goes on. A context manager; `seconds` are since the run began."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self._shown = -_LINE_SECONDS
        self._said: tuple[str, str] | None = None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, job: TrainingJob, loss: float | None, seconds: float) -> None:
        """Show the newest state, at most as often as eyes can follow."""
        told = str(job.status.phase), job.status.reason or ""
        pause = _REFRESH_SECONDS if self._live is not None else _LINE_SECONDS
        if told == self._said and seconds - self._shown < pause:
            return
        self._said, self._shown = told, seconds
        if self._live is not None:
            self._live.update(_panel(job, loss, seconds), refresh=True)
        else:
            self._console.print(_line(job, loss, seconds), highlight=False, soft_wrap=True)

    def say(self, seconds: float, text: str, *, warning: bool = False) -> None:
        """Write a line that stays."""
        line = Text(f"{seconds:7.2f} s  {text}", style="yellow" if warning else "")
        self._console.print(line, soft_wrap=True)

    def event(self, seconds: float, event: Event) -> None:
        """Write an event of the job."""
        member = f" {event.member}" if event.member else ""
        self.say(seconds, f"{event.reason}{member}: {event.message}", warning=event.warning)


def _line(job: TrainingJob, loss: float | None, seconds: float) -> Text:
    status = job.status
    words = [f"{seconds:7.2f} s  {status.phase}", f"servers {status.servers.text or '-'}"]
    words += [f"workers {status.workers.text or '-'}", _progress(job, loss)]
    why = _why(job)
    return Text(", ".join(word for word in words if word) + (f": {why}" if why else ""))


def _why(job: TrainingJob) -> str:
    """Say what is waited for, or nothing while the job trains."""
    status = job.status
    waits = status.phase in _WAITING or status.reason in ENDING
    return status.message if waits else ""


def _progress(job: TrainingJob, loss: float | None) -> str:
    progress = job.status.progress
    if progress is None:
        return ""
    total = f" of {progress.total_steps}" if progress.total_steps else ""
    words = [f"step {progress.step}{total}"]
    if loss is not None:
        words.append(f"loss {loss:.4f}")
    if progress.steps_per_second:
        words.append(f"{progress.steps_per_second:.0f} steps/s")
    return ", ".join(words)


def _panel(job: TrainingJob, loss: float | None, seconds: float) -> RenderableType:
    status = job.status
    grid = Table.grid(padding=(0, 2))
    phase = Text(str(status.phase), style=_STYLES.get(str(status.phase), "cyan"))
    grid.add_row("job", f"{job.namespace}/{job.name}", f"{seconds:.1f} s")
    grid.add_row("phase", phase, status.reason or "")
    grid.add_row("servers", status.servers.text or "-", "")
    grid.add_row("workers", status.workers.text or "-", "")
    grid.add_row("progress", _progress(job, loss) or "-", "")
    if why := _why(job):
        grid.add_row("now", why, "")
    if status.recoveries:
        last = status.recoveries[-1].model_dump(mode="json", by_alias=True)
        grid.add_row("recovery", _who(last), f"{_seconds(last.get('seconds'))} s")
    return Group(grid)


def recoveries_tables(recoveries: Sequence[Mapping[str, Any]], width: int) -> list[Table]:
    """Return what each recovery did and cost, a column each; as many a table as are legible.

    Recoveries are entries of status.recoveries.
    """
    most = max(1, (width - 18) // 26)
    return [
        _recoveries_table(recoveries[first : first + most])
        for first in range(0, len(recoveries), most)
    ]


def _recoveries_table(recoveries: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="Recoveries", title_justify="left")
    table.add_column("")
    for record in recoveries:
        what = "handed back" if record["cause"] == "HandBack" else "lost"
        table.add_column(f"{record['id']}: {_who(record)} {what}")
    cells = [_cells(record) for record in recoveries]
    for name in cells[0]:
        table.add_row(name, *(cell[name] for cell in cells))
        if name in ("reason", "resume", "= seconds"):
            table.add_section()
    return table


def _cells(record: Mapping[str, Any]) -> dict[str, str]:
    sources = (f"{kind} {slots}" for kind, slots in sorted(record["sources"].items()))
    moments = (f"{kind} {slots}" for kind, slots in sorted(record["moments"].items()))
    return {
        "strategy": f"{record['strategy']}, {record['outcome']}",
        "reason": str(record["reason"]),
        **{name: _seconds(record["phases"][name]) for name in _PHASES},
        "= seconds": _seconds(record["seconds"]),
        "‖δ‖": _delta(record["deltaNorm"]),
        "rework": _rework(record["rework"]),
        "sources": ", ".join(sources) or "-",
        "moments": ", ".join(moments) or "-",
        "pushes": _pushes(record["pushes"]),
        "workers": _meanwhile(record),
    }


def metrics_table(report: Mapping[str, Any]) -> Table:
    """Return what the run reached."""
    table = Table(title="Result", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row("steps", str(report["steps"]))
    if report["loss"]:
        table.add_row("loss", _value(report["loss"][-1][2]))
    for name, value in sorted(report["metrics"].items()):
        table.add_row(name, _value(value))
    pushes = ", ".join(f"{n} {k}" for k, n in report["pushes"].items())
    table.add_row("pushes", pushes)
    return table


def _value(value: float | None) -> str:
    return "not a number" if value is None else f"{value:.4f}"


def _who(record: Mapping[str, Any]) -> str:
    losses = record.get("losses") or []
    seats = [f"{str(x.get('role')).lower()}-{x.get('index')}" for x in losses]
    if not seats:
        role = str(record.get("role")).lower()
        seats = [f"{role}-{index}" for index in record.get("indexes") or []]
    return ", ".join(seats) or "-"


def _seconds(value: Any) -> str:
    return "-" if value is None else f"{value:.3f}"


def _rework(rework: Mapping[str, Any]) -> str:
    said = [f"{rework['redoneSteps']} steps redone"]
    if rework.get("estimated") is not None:
        said.append(f"{rework['estimated'][1]:.3g} more at most (estimated)")
    if rework.get("counterfactualSteps") is not None:
        said.append(f"a full checkpoint would redo {rework['counterfactualSteps']}")
    return "; ".join(said)


def _meanwhile(record: Mapping[str, Any]) -> str:
    used, gap = record.get("utilisation"), record.get("gap")
    words = [] if used is None else [f"{100 * used:.1f} % computing"]
    words += [] if not gap else [f"gap ≤ {gap:.3g}"]
    return ", ".join(words) or "-"


def _pushes(pushes: Mapping[str, int]) -> str:
    """Always what was lost and replayed; the rest where there is some."""
    shown = {k: n for k, n in pushes.items() if n or k in ("lost", "replayed")}
    return ", ".join(f"{n} {k}" for k, n in shown.items())


def _delta(delta: Mapping[str, Any]) -> str:
    value, kind = delta.get("value"), delta.get("kind")
    if value is None:
        return "unknown"
    return f"{value:.3g}" if kind == "Exact" else f"≤ {value:.3g}"
