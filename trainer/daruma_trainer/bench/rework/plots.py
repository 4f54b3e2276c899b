"""Plots of one program: what each arm costs, by the share of servers lost."""

from pathlib import Path
from typing import Any

from daruma_trainer.bench.rework.arms import LOST, SERVERS
from daruma_trainer.errors import MissingError

SHOWN = ("Partial all", "Partial Priority r=1/8", "Partial RoundRobin r=1/8",
         "Partial Random r=1/8", "Freshest Sync", "Freshest Async, oldest",
         "Chain None")  # fmt: skip


def draw(folder: Path, program: dict[str, Any]) -> Path:
    """Draw rework against what was lost, one panel for each C; returns the file."""
    try:
        import matplotlib as mpl
    except ModuleNotFoundError as error:
        raise MissingError("plots need matplotlib: pip install 'daruma-operator[bench]'") from error
    mpl.use("Agg")
    # Without a salt the same numbers would make another file each time.
    mpl.rcParams["svg.hashsalt"] = "daruma"
    # Text as text: a third of the size.
    mpl.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot as plt

    everies = sorted({c["every"] for c in program["cells"] if c["lost"]})
    figure, axes = plt.subplots(
        1, len(everies), figsize=(3.4 * len(everies), 3.0), sharey=False, squeeze=False
    )
    for axis, every in zip(axes[0], everies, strict=True):
        found = {(c["arm"], c["lost"]): c["rework"] for c in program["cells"]}
        full = found[f"FullCheckpoint C={every}", 0]["mean"]
        axis.axhline(full, color="black", linestyle="--", linewidth=1, label="FullCheckpoint")
        for n, name in enumerate(SHOWN):
            points = [found.get((f"{name} C={every}", lost)) for lost in LOST]
            if None in points:
                continue
            x = [lost / SERVERS + 0.008 * (n - len(SHOWN) / 2) for lost in LOST]
            mean = [p["mean"] for p in points if p]
            low = [p["mean"] - p["low"] for p in points if p]
            high = [p["high"] - p["mean"] for p in points if p]
            axis.errorbar(x, mean, yerr=[low, high], label=name, linewidth=1, marker=".", capsize=2)
        axis.set_title(f"C = {every}", fontsize=9)
        axis.set_xlabel("servers lost", fontsize=8)
        axis.set_xticks([lost / SERVERS for lost in LOST], [f"{lost}/{SERVERS}" for lost in LOST])
        axis.tick_params(labelsize=7)
    axes[0][0].set_ylabel("rework, steps", fontsize=8)
    axes[0][-1].legend(fontsize=6)
    figure.tight_layout()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{program['program']}.svg"
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path
