"""The page that `daruma bench rework --write` makes. Every number in it comes from the result."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from daruma_trainer.bench.rework.arms import LOST, SERVERS, Ack, Copy
from daruma_trainer.bench.rework.catalogue import PROGRAMS
from daruma_trainer.bench.rework.findings import bars, findings
from daruma_trainer.bench.rework.trial import CAP, PILOTS, TARGET

HOW = f"""
**Rework** is E[κ(arm)] − E[κ(no failure)], with κ the first step whose loss on *all* data is at
most ε. ε is fixed beforehand, by runs that are not in the experiment: the loss that the mean of
{PILOTS} pilots reaches at {TARGET:.0%} of the budget. Runs past {CAP} budgets count as that many
steps and are reported as *capped*. A failure's step is geometric, drawn again where the run had
reached ε before it; it takes one, two or three of {SERVERS} servers, in a random order that all
arms share. After a failure every arm, the undisturbed state too, draws the same batches, of a
stream of this failure alone; so an arm whose state is exact is the undisturbed run, bit for bit,
and its rework is 0. Steps that a rollback throws away are counted by their effect: the
rolled-back state stands at the failure's step. Intervals: 95 %, bootstrap over seeds, then over
each seed's failures. **Reduction** is against `FullCheckpoint` with the same C, everything rolled
back to the last cut.

**What is real:** the servers' tables, placement, saves (selection, segments, manifests, cuts) and
restores are the servers' own code, as are the streams to replicas and the worker's host copy; they
run in one process, on a store in memory. **What is not:** sockets, and the kernels *after* a
failure, which a test holds against the servers' own: they work on all arms at once. One worker's
batch stands for a step of all workers.

**Arms.** `Partial`: lost blocks come from the running checkpoint, a fraction r saved every r·C
steps; *all* is r = 1, where selection does not matter. `Priority` takes the blocks whose squared
distance is largest for their bytes; `Distance`, SCAR's rule to the letter, the farthest however
large (shown where blocks differ in size: elsewhere the two are one). All spend the same bytes.
`Freshest`: parameters from a worker's last complete pull, optimizer state from the running
checkpoint (Priority, the smallest r).
*{Copy.SYNC}*: that pull is the state of the step. *{Copy.ASYNC}*: for each lost server the pull
is of this step or of the one before, with equal chance, and pushes since are lost.
*{Copy.OLDEST}*: always a step old, the worst that the freshest worker's copy can be.
*{Copy.COVERED}*: `copies: 2`, that worst with what it is for: the worker has kept the push of the
step, for nobody said that it is on two nodes, and makes it again; optimizer state comes from a
replica, where there is any. `Chain` *{Ack.NONE}*: `ack: None` with `every: C`, lost blocks come
from replicas that got everything up to C updates ago. `Chain` *{Ack.TAIL}*: the update of the last
step is still under way, and its worker pushes it again. Not modelled: gradients that are stale by
themselves, pushes that are accumulated during the outage, which make the real loss smaller, and
outages that workers train through. Young–Daly's interval is √(2 · s · MTBF) in steps: s is what a
save holds requests up (its CPU time ÷ that of a step, measured in this program), MTBF the mean of
the geometric distribution.
""".strip()


def page(result: Mapping[str, Any], plots: Mapping[str, str]) -> str:
    """Return the result as a page in Markdown."""
    lines = [
        "# Rework: what a failure costs in iterations",
        "",
        "Made by `daruma bench rework --write`; edit the benchmark, not this page.",
        "",
        f"{result['date']}, {result['machine']}, {result['seconds']:.0f} s"
        + (" (`--quick`: a small part, with wide intervals)." if result["quick"] else "."),
        "",
    ]
    if left := [p for p in PROGRAMS if p not in {x["program"] for x in result["programs"]}]:
        lines += [f"Not measured in this run: {', '.join(left)}.", ""]
    lines += bars(result)
    for program in result["programs"]:
        lines += _program(program, plots.get(program["program"]))
    lines += perturbation(result["perturbation"])
    lines += ["## How it is measured", "", HOW, ""]
    return "\n".join(lines)


def text(result: Mapping[str, Any]) -> str:
    """Return what the terminal shows: the reductions and the study, without the method."""
    lines = bars(result)
    for program in result["programs"]:
        lines += [f"## {program['program']}: {program['title']}", "", *_tables(program), ""]
    return "\n".join(lines + perturbation(result["perturbation"]))


def perturbation(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The study of the bound."""
    if not rows:
        return []
    body = [
        [r["family"], r["kind"], str(r["trials"]), str(r["violations"]), f"{r['tightness']:.2f}",
         f"{r['largest']:.2f}"]
        for r in rows
    ]  # fmt: skip
    return [
        "## The bound on rework",
        "",
        "rework ≤ log(1 + ‖δ‖ / (cᵀ‖x(0) − x*‖)) / log(1/c), where each step contracts by c. "
        "Rework is counted in whole steps against the step that the contraction promises, so "
        "against ⌈bound⌉; tightness is rework ÷ ⌈bound⌉, its median and its largest. "
        "Below 0: the regression was ahead of the promise even after its failure.",
        "",
        *_table(["iteration", "perturbation", "trials", "violations", "median", "largest"], body),
        "",
    ]


def _program(program: Mapping[str, Any], plot: str | None) -> list[str]:
    yd = program["young_daly"]
    lines = [
        f"## {program['program']}: {program['title']}",
        "",
        f"{program['parameters']:,} parameters in "
        + ", ".join(f"{n} ({r} × {c}, {rule})" for n, r, c, rule in program["tables"])
        + f". {program['seeds']} seeds × {program['failures']} failures, {program['date']}, "
        f"{program['seconds']:.0f} s; "
        f"ε = {program['target']:.5g} "
        f"(pilots at step {program['target_step']}), MTBF {program['mtbf']:g} steps, cap "
        f"{program['cap']}. A save holds requests up for {yd['save_steps']:.2f} steps, so "
        f"Young–Daly: C = {yd['steps']}.",
        "",
    ]
    if plot:
        lines += [f"![Rework of {program['program']}]({plot})", ""]
    lines += [*_tables(program), ""]
    lines += findings(program)
    lines += ["### While nothing fails", "", *_standing(program), ""]
    return lines


def _tables(program: Mapping[str, Any]) -> list[str]:
    names = list(dict.fromkeys(c["arm"] for c in program["cells"]))
    found = {(c["arm"], c["lost"]): c for c in program["cells"]}
    head = ["arm", *(f"{lost}/{SERVERS} lost" for lost in LOST), "capped", "‖δ‖"]
    full, rest = [], []
    for name in names:
        if (name, 0) in found:
            cell = found[name, 0]
            full.append([name, _steps(cell), f"{cell['capped']:.1%}", f"{cell['delta']:.3g}"])
            continue
        cells = [found[name, lost] for lost in LOST]
        rest.append(
            [
                name,
                *(f"{_steps(c)}<br>{_percent(c['reduction'])}" for c in cells),
                f"{max(c['capped'] for c in cells):.1%}",
                " / ".join(f"{c['delta']:.3g}" for c in cells),
            ]
        )
    return [
        "Everything rolled back; rework in steps:",
        "",
        *_table(["arm", "rework", "capped", "‖δ‖"], full),
        "",
        "Only the lost blocks; rework in steps, and its reduction against `FullCheckpoint` of the "
        "same C:",
        "",
        *_table(head, rest),
    ]


def _standing(program: Mapping[str, Any]) -> list[str]:
    body = [
        [s["name"], f"{s['data']:.0f}",
            f"{s['manifests']:.0f}", f"{s['held_up_ms']:.3f}", f"{s['background_ms']:.3f}",
         f"{s['memory']:,}"]
        for s in program["standing"]
    ]  # fmt: skip
    return [
        "All servers together: bytes written a step (without the first save, but "
        "with what compaction moved), "
        "milliseconds of CPU a step that requests waited and that the store's thread worked, and "
        "bytes kept in memory between saves (running checkpoint and buffers; for Freshest the "
        "worker's host copy with its double buffer). Of replicas: bytes sent to them (one each, "
        "n = 2), CPU of the heads and of the replicas, and the replicas' arrays; `copies: 2` is "
        "beside Freshest's own. Manifests and messages' heads outweigh the data of models as "
        "small as these.",
        "",
        *_table(
            [
                "way to save",
                "bytes of blocks",
                "bytes of manifests",
                "waited ms",
                "background ms",
                "memory",
            ],
            body,
        ),
    ]


def _steps(cell: Mapping[str, Any]) -> str:
    r = cell["rework"]
    return f"{r['mean']:.2f} [{r['low']:.2f}, {r['high']:.2f}]"


def _percent(value: Mapping[str, float] | None) -> str:
    if value is None:
        return "–"
    return f"**{value['mean']:.0%}** [{value['low']:.0%}, {value['high']:.0%}]"


def _table(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return lines + [f"| {' | '.join(row)} |" for row in body]
