"""What the numbers say: the bars that were set beforehand, and where priority does not help."""

from collections.abc import Mapping
from typing import Any

from daruma_trainer.bench.rework.arms import LOST, SERVERS

BARS: Mapping[str, tuple[str, tuple[float, ...]]] = {
    "toy": ("mean", (0.85, 0.80, 0.70)),
    "mlr": ("low", (0.60, 0.40, 0.20)),
    "cnn": ("low", (0.60, 0.40, 0.20)),
    "mf": ("low", (0.50, 0.20, 0.0)),
}
"""Reduction of `Partial Priority r=1/8 C=8`, by servers lost: its mean, or its lower 95 % end."""
EXACT = ("toy", "mlr", "mf")
"""Programs whose parameters are all that there is: Freshest under Sync has to cost nothing."""
ASYNC_BAR, ASYNC_EVERY = 0.95, 40

NATURE: Mapping[str, str] = {
    "toy": "A row's gradient is as large as its feature's scale.",
    "mlr": "Rows of pixels that are nearly always dark hardly move.",
    "mf": "Users are solved anew from the items at once: a lost block of users costs nothing, "
    "however old its copy is and whatever was chosen.",
    "cnn": "Adam moves every weight by about its learning rate, whatever its gradient is; so a "
    "block's distance follows its size and the age of its copy, and the few bytes of the "
    "convolution would wait for long if it were not distance for bytes that counts. A worker's "
    "copy has no moments: with it they come from the running checkpoint, as old as their blocks' "
    "last save, and most of what `Freshest` with `copies: 1` costs is their age. With "
    "`copies: 2` a replica has them.",
    "lda": "A sampler goes on moving where it has arrived: distance to the saved topics (total "
    "variation, as in SCAR) is partly noise, and so is rework.",
}
"""What is known of each program beforehand that bears on a choice by distance."""


def bars(result: Mapping[str, Any]) -> list[str]:
    """The bars, and whether they were met."""
    rows: list[str] = []
    for program in result["programs"]:
        rows += _program_bars(program)
    study = result["perturbation"]
    if study:
        violations = sum(r["violations"] for r in study)
        trials = sum(r["trials"] for r in study)
        rows.append(
            _row(
                "the bound on rework", f"0 violations in {trials}", str(violations), not violations
            )
        )
    if not rows:
        return []
    head = ["| what | bar, set beforehand | measured | |", "|---|---|---|---|"]
    few = ["Too few runs to judge a bar by: the intervals are wide.", ""] if result["quick"] else []
    return ["## Bars", "", *few, *head, *rows, ""]


def findings(program: Mapping[str, Any]) -> list[str]:
    """Where priority does not help in this program, and why."""
    found = _by_arm(program)
    better: list[str] = []
    worse: list[str] = []
    against: list[tuple[float, float]] = []
    for every in sorted({c["every"] for c in program["cells"] if c["lost"]}):
        for lost in LOST:
            ours = found.get((f"Partial Priority r=1/8 C={every}", lost))
            turn = found.get((f"Partial RoundRobin r=1/8 C={every}", lost))
            whole = found.get((f"Partial all C={every}", lost))
            if (theirs := found.get((f"Partial Distance r=1/8 C={every}", lost))) and ours:
                against.append((ours["rework"]["mean"], theirs["rework"]["mean"]))
            if ours is None or turn is None or whole is None:
                continue
            best = min(turn["rework"]["mean"], whole["rework"]["mean"])
            where = f"C = {every}, {lost}/{SERVERS} lost"
            (better if ours["rework"]["mean"] < best else worse).append(where)
    if not better and not worse:
        return []
    said = (
        "Priority with r = 1/8 had the least mean rework, against turns (RoundRobin, r = 1/8) and "
        f"saving all, in {len(better)} of {len(better) + len(worse)} cells"
    )
    if worse:
        said += ", but not at " + "; ".join(worse)
    if against:
        better_than = sum(a < b for a, b in against)
        said += (
            ". Against SCAR's rule to the letter (Distance: the farthest blocks, however large) it "
            f"had less in {better_than} of {len(against)}"
        )
    share = program["concentration"]
    return [
        f"{said}. How much there is to choose: the eighth of the rows that moved farthest in eight "
        f"steps made {share:.0%} of the way (squared; 12 % if all moved alike). "
        + NATURE.get(program["program"], ""),
        "",
    ]


def _program_bars(program: Mapping[str, Any]) -> list[str]:
    name, found = program["program"], _by_arm(program)
    rows = []
    if name in BARS:
        which, limits = BARS[name]
        cells = [found.get(("Partial Priority r=1/8 C=8", lost)) for lost in LOST]
        got = [c["reduction"][which] for c in cells if c and c["reduction"]]
        if len(got) == len(LOST):
            said = "mean" if which == "mean" else "lower 95 % end"
            rows.append(
                _row(
                    f"{name}: reduction by Priority, r = 1/8, C = 8, at 1/4, 1/2, 3/4 lost, {said}",
                    "≥ " + "/".join(f"{v:.0%}" for v in limits),
                    "/".join(f"{v:.0%}" for v in got),
                    all(g >= v for g, v in zip(got, limits, strict=True)),
                )
            )
    exact = [c for (arm, _), c in found.items() if arm.startswith("Freshest Sync")]
    if name in EXACT and exact:
        worst = max(abs(c["rework"][k]) for c in exact for k in ("mean", "low", "high"))
        rows.append(
            _row(f"{name}: Freshest under Sync, rework", "exactly 0", f"{worst:g}", not worst)
        )
    for arm in ("Freshest Async", "Freshest Async, copies 2", "Chain Tail"):
        late = [
            c["reduction"]["mean"]
            for (key, _), c in found.items()
            if key.startswith(f"{arm} C=") and c["every"] >= ASYNC_EVERY and c["reduction"]
        ]
        if late:
            what = f"{name}: {arm}, C ≥ {ASYNC_EVERY}, smallest mean reduction"
            least = min(late)
            rows.append(_row(what, f"≥ {ASYNC_BAR:.0%}", f"{least:.1%}", least >= ASYNC_BAR))
    return rows


def _by_arm(program: Mapping[str, Any]) -> dict[tuple[str, int], Mapping[str, Any]]:
    return {(c["arm"], c["lost"]): c for c in program["cells"]}


def _row(what: str, bar: str, measured: str, met: bool) -> str:
    return f"| {what} | {bar} | {measured} | {'met' if met else '**not met**'} |"
