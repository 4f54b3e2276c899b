"""The page that `daruma bench availability --write` makes. Every number comes from the result."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from daruma_trainer.bench.availability.arms import AROUND, SCENARIOS, SERVERS, WORKERS
from daruma_trainer.bench.availability.findings import bars
from daruma_trainer.bench.availability.stats import (
    Interval,
    Run,
    equal_gradients,
    interval,
    paired,
    phase_means,
    score,
    select,
)

PHASES = ("detect", "replace", "restore", "resume")
REFERENCES = ("stateless", "freshest", "freshest 2 copies")
"""Arms that train through an outage: each is set against every other."""
FAIR = {s.name for s in SCENARIOS if s.faults and s.seconds is None}
"""Scenarios whose runs are as long as those in which nothing fails."""
HOW = f"""
{SERVERS} servers and {WORKERS} workers under `daruma run`, all processes on this one machine; the
same worker program for all arms (`daruma_trainer.programs.fashion`, with torch's hooks around
`optimizer.step()` noting times). A run lasts so many seconds from the moment at which both workers
have made a step. Of one seed all arms have the same initial values, split and order of the data.

**Arms.** *Checkpoint*: `FullCheckpoint`, a consistent cut every so many updates, to which everybody
goes back. *Chain*: `Chain` with one replica of each shard in the other server's pod, `ack: None`,
sent every so many updates, as in the paper (so up to so many updates may be lost: pushes, or under
`Sync` steps of all workers; the product's default is `Next`, after each). *Stateless*: `Stateless`.
*Freshest*: `Freshest`; with *2 copies*, `copies: 2`.
These save an eighth of the blocks every eighth of that interval. Sync and async are
`consistency.mode`; the others are `Async`.

**Faults** scale with the run as in Cao et al. (arXiv 2406.05546), whose server was killed at 25 %
and 67 % of it and back at 42 % and 83 %. *Held away*: SIGKILL, and no room for a replacement until
then, as on a full cluster. *As fast as it goes*: SIGKILL alone. Servers: first server 1, then
server 0. Workers: worker 1 each time; worker 0 is the one whose parameters are scored. An *outage*
of a given length has {AROUND[0]:g} s before it and {AROUND[1]:g} s after it. That of 20 s is for
all arms; those of 5 and 60 s are for the two whose workers train through one, `stateless` and
`freshest`: they ask whether what these keep grows with its length. With 2 copies or a chain a
replica serves in the lost server's place long before 5 s are over, and with checkpoints workers
wait, so that more seconds only add waiting: of neither they were measured. *The store
hangs*: these runs save to an S3 server (moto), whose process is stopped (SIGSTOP) and goes on
later; all others save to a directory.

**Accuracy** is of worker 0's parameters as it last pulled them. It leaves a copy every so many
updates, which are scored when the job has ended: so no evaluation takes anybody's time but for the
copy (*aside*, share of the run). *At the end*: of the last copy, at equal time. *Average*: over the
run's whole time, each value holding until the next. *Equal gradients*: at the number that every run
of the scenario applied. A gradient counts as applied when all slots have it; again, when it is made
again after a rollback; those that a recovery lost are shown beside. A synchronous update is made of
{WORKERS} gradients.

**Utilisation** is the share of all workers' time that they were neither blocked in `step()` nor
away. *During*: while something was away (replaced at once: until the recovery's end, or the run's);
*before*: until the first fault. Pulling what follows from a push blocks, so it is below 100 % where
nothing fails. `stateless` and `freshest` run with `replay.maxPending: 65535`, so that workers need
not wait however long the outage is.

**Memory**: resident, looked at ten times a second, of a process with those in its pod (a server's
with the replicas that it hosts for others); pages that they share count in each. *Added*: how much
more a worker that lived through had during an outage than before it, each without the highest
twentieth of the looks (moments of torch's own steps, of which a long outage shows more); of all
workers and outages the largest. *At the highest*: with those looks, of the model. The model is as
small as what a process takes and gives back by itself; [a table of 100 MB](memory.md) says more.

**Bytes**: what servers counted, read every second and just before each kill; pushes and pulls are
of the wire, *replica* went to replicas, *checkpoint* to the store.

**Phases** are the operator's record: failure to detection, to a replacement that runs (with the
time that it was held away), to all slots being back, to the first new step that all slots have. A
worker's loss has one too. *Recovered in time*: of all kills, those whose recovery had ended when
the run did.

Intervals: 95 % of the mean over seeds (Student's t); differences are taken within each seed. With
one seed there is none, and nothing can be concluded. No claim here is wider than this machine,
model and data.
""".strip()


def page(result: Mapping[str, Any], plots: Mapping[str, str]) -> str:
    """Return the result as a page in Markdown."""
    lines = [
        "# Availability: training while members are away",
        "",
        "Made by `daruma bench availability --write`; edit the benchmark, not this page.",
        "",
        *_head(result),
        *bars(result),
    ]
    for scenario in _scenarios(result):
        lines += _scenario(result, scenario, plots.get(scenario))
    lines += _standing(result)
    lines += ["## How it is measured", "", HOW, ""]
    return "\n".join(lines)


def text(result: Mapping[str, Any]) -> str:
    """Return what the terminal shows: without the method."""
    lines = [*_head(result), *bars(result)]
    for scenario in _scenarios(result):
        lines += _scenario(result, scenario, None)
    return "\n".join(lines + _standing(result))


def _head(result: Mapping[str, Any]) -> list[str]:
    size = result["size"]
    seeds = len({r["seed"] for r in result["runs"]})
    loads = [r["load"] for r in result["runs"]]
    dates = [r.get("date", result["date"]) for r in result["runs"]]
    days = sorted({min(dates), max(dates)})
    lines = [
        f"{' to '.join(days)}, {result['machine']}; {len(result['runs'])} runs in "
        f"{result['took'] / 60:.0f} minutes, {seeds} seed{'s' if seeds != 1 else ''}, load average "
        f"{min(loads, default=0):.1f} to {max(loads, default=0):.1f} after a run (what is "
        "more than its own processes was other work on the machine)."
        + (" `--quick`: a small part, whose accuracies say little." if result["quick"] else ""),
        "",
        f"Convolutional network of {result['parameters']:,} parameters, SGD with a rate of 0.01, "
        f"batches of 32, data: {size['data']}. Runs of {size['seconds']:g} s; saved or sent to a "
        f"replica every {size['updates']} updates, scored every {size['evaluate']}.",
        "",
    ]
    for skipped in result["skipped"]:
        lines += [
            f"**Not measured: {skipped['arm']}.** TrainingJob does not know it: {skipped['why']}",
            "",
        ]
    for failed in result["failed"]:
        lines += [
            f"**Failed: {failed['arm']}, {failed['scenario']}, seed {failed['seed']}.** "
            f"{failed['why']}",
            "",
        ]
    return lines


def _scenarios(result: Mapping[str, Any]) -> list[str]:
    there = {r["scenario"] for r in result["runs"]}
    return [s.name for s in SCENARIOS if s.name in there]


def _arms(runs: Iterable[Run]) -> list[str]:
    return list(dict.fromkeys(r["arm"] for r in runs))


def _scenario(result: Mapping[str, Any], name: str, plot: str | None) -> list[str]:
    title = next(s.title for s in SCENARIOS if s.name == name)
    runs = select(result["runs"], name)
    lines = [f"## {name}: {title}", ""]
    if plot:
        lines += [f"![Accuracy, {title}]({plot})", ""]
    lines += [*_accuracy(result, name, runs), ""]
    if name == "none":
        return [*lines, *_differences(runs)]
    lines += [*_during(runs, 4 * result["parameters"]), ""]
    if phases := _phases(runs):
        lines += [*phases, ""]
    return [*lines, *_differences(runs)]


def _accuracy(result: Mapping[str, Any], name: str, runs: Sequence[Run]) -> list[str]:
    equal = equal_gradients(runs)
    head = ["arm", "accuracy at the end", "average", "loss at the end",
            f"at {equal} gradients", "gradients applied"]  # fmt: skip
    if name in FAIR:
        head.append("average, less its own without faults")
    body = []
    for arm in _arms(runs):
        own = select(runs, name, arm)
        row = [
            arm,
            *(_number(interval(score(r, m, equal) for r in own), ".3f")
              for m in ("end", "average", "loss", "gradients")),
            _number(interval(float(r["applied"]) for r in own), ".0f"),
        ]  # fmt: skip
        if name in FAIR:
            row.append(_number(paired(own, select(result["runs"], "none", arm), "average"), "+.3f"))
        body.append(row)
    return _table(head, body)


def _during(runs: Sequence[Run], model: float) -> list[str]:
    head = ["arm", "utilisation", "before", "during", "pushes lost", "replayed", "added memory",
            "of the model", "at the highest"]  # fmt: skip
    body = []
    for arm in _arms(runs):
        own = [r for r in runs if r["arm"] == arm]
        body.append(
            [
                arm,
                *(_percent(interval(r[key] for r in own))
                  for key in ("utilisation", "utilisation_before", "utilisation_outage")),
                *(_number(interval(float(r["pushes"][key]) for r in own), ".1f")
                  for key in ("lost", "replayed")),
                _megabytes(interval(r["memory"]["added"] for r in own)),
                *(_percent(interval(None if (b := r["memory"][key]) is None else b / model
                                    for r in own)) for key in ("added", "added_highest")),
            ]
        )  # fmt: skip
    return _table(head, body)


def _phases(runs: Sequence[Run]) -> list[str]:
    if not any(r["kills"] for r in runs):
        return []
    body = []
    for arm in _arms(runs):
        own = [r for r in runs if r["arm"] == arm]
        means = phase_means(own)
        kills = sum(r["kills"] for r in own)
        records = [x for r in own for x in r["recoveries"]]
        good = sum(x["outcome"] == "Succeeded" for x in records)
        body.append(
            [
                arm,
                f"{good} of {kills}",
                ", ".join(sorted({x["reason"] for x in records})),
                *(_number(means.get(p), ".2f") for p in ("seconds", *PHASES)),
            ]
        )
    return [
        "Recoveries, in seconds:",
        "",
        *_table(["arm", "recovered in time", "reasons", "whole", *PHASES], body),
    ]


def _differences(runs: Sequence[Run]) -> list[str]:
    """What the docs owe: by how much arms that train through are better or worse."""
    names = _arms(runs)
    equal = equal_gradients(runs)
    body = []
    for reference in (r for r in REFERENCES if r in names):
        ours = [r for r in runs if r["arm"] == reference]
        for other in (n for n in names if n != reference):
            theirs = [r for r in runs if r["arm"] == other]
            body.append(
                [
                    f"{reference} − {other}",
                    *(_number(paired(ours, theirs, m, equal), "+.3f")
                      for m in ("end", "average", "gradients")),
                ]
            )  # fmt: skip
    if not body:
        return []
    head = ["difference in accuracy", "at the end", "average", f"at {equal} gradients"]
    return ["At equal time and at equal gradients:", "", *_table(head, body), ""]


def _standing(result: Mapping[str, Any]) -> list[str]:
    runs = select(result["runs"], "none")
    if not runs:
        return []
    kinds = sorted({kind for r in runs for kind in r["bytes"]})
    head = ["arm", "gradients a second", "utilisation", "server's memory", "worker's memory",
            *(f"{kind.replace('_', ' ')} MB a gradient" for kind in kinds), "aside"]  # fmt: skip
    body = []
    for arm in _arms(runs):
        own = [r for r in runs if r["arm"] == arm]
        body.append(
            [
                arm,
                _number(interval(r["applied"] / r["seconds"] for r in own), ".1f"),
                _percent(interval(r["utilisation"] for r in own)),
                *(_megabytes(interval(r["memory"][role] for r in own))
                  for role in ("server", "worker")),
                *(_number(interval(r["bytes"].get(kind, 0.0) / 1e6 / max(1, r["computed"])
                                   for r in own), ".2f") for kind in kinds),
                _percent(interval(r["aside"] for r in own)),
            ]
        )  # fmt: skip
    model = 4 * result["parameters"] / 1e6
    return [
        "## What each costs while nothing fails",
        "",
        f"The model is {model:.2f} MB. Memory: the largest pod of its role.",
        "",
        *_table(head, body),
        "",
    ]


def _number(value: Interval | None, form: str) -> str:
    if value is None:
        return "–"
    half = "" if value.half is None else f" ± {value.half:{form.removeprefix('+')}}"
    return f"{value.mean:{form}}{half}"


def _percent(value: Interval | None) -> str:
    if value is None:
        return "–"
    half = "" if value.half is None else f" ± {100 * value.half:.1f}"
    return f"{100 * value.mean:.1f}{half} %"


def _megabytes(value: Interval | None) -> str:
    if value is None:
        return "–"
    half = "" if value.half is None else f" ± {value.half / 1e6:.1f}"
    return f"{value.mean / 1e6:.1f}{half} MB"


def _table(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return lines + [f"| {' | '.join(row)} |" for row in body]
