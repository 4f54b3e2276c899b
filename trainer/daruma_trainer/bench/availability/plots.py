"""Curves of one scenario: accuracy against time, and against gradients."""

from collections.abc import Sequence
from pathlib import Path

from daruma_trainer.bench.availability.stats import (
    ACCURACY,
    GRADIENTS,
    TIME,
    Run,
    equal_gradients,
    value_at,
)

GRID = 40
"""Points of a drawn line."""


def draw(folder: Path, scenario: str, runs: Sequence[Run]) -> Path:
    """Draw the means over seeds, between the least and the most; returns the file."""
    import matplotlib as mpl  # takes half a second: only who draws pays for it

    mpl.use("Agg")
    # Without a salt the same numbers would make another file each time.
    mpl.rcParams["svg.hashsalt"] = "daruma"
    # Text as text: a third of the size.
    mpl.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot as plt

    seconds = max(r["seconds"] for r in runs)
    figure, axes = plt.subplots(1, 2, figsize=(8.0, 3.2), sharey=True)
    for axis, by in zip(axes, (TIME, GRADIENTS), strict=True):
        for arm in dict.fromkeys(r["arm"] for r in runs):
            own = [r for r in runs if r["arm"] == arm and r["curve"]]
            curves = [r["curve"] for r in own]
            # Over gradients a line ends where the first of the arm's runs did.
            end = seconds if by == TIME else equal_gradients(own)
            grid = [end * i / (GRID - 1) for i in range(GRID)]
            lines = [[value_at(c, by, x, ACCURACY) or 0.0 for x in grid] for c in curves]
            columns = [[round(v, 4) for v in c] for c in zip(*lines, strict=True)]
            mean = [sum(c) / len(c) for c in columns]
            (line,) = axis.plot(grid, mean, linewidth=1, label=arm)
            if len(curves) > 1:
                low, high = [min(c) for c in columns], [max(c) for c in columns]
                axis.fill_between(grid, low, high, alpha=0.12, color=line.get_color())
        axis.tick_params(labelsize=7)
    for begin, end in (w for r in runs for w in r["outages"]):
        axes[0].axvspan(begin, end, color="black", alpha=0.12 / len(runs), linewidth=0)
    axes[0].set_xlabel("seconds", fontsize=8)
    axes[1].set_xlabel("gradients applied", fontsize=8)
    axes[0].set_ylabel("test accuracy", fontsize=8)
    axes[1].legend(fontsize=6)
    figure.tight_layout()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{scenario}.svg"
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path
