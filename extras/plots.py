"""extras/plots.py - pictures of finished runs. It imports the six scripts; none of them imports it.

    pip install matplotlib
    python -m extras.plots losses runs/pretrain/RUN1 runs/pretrain/RUN2 --out losses.png
    python -m extras.plots accuracies runs/committee/RUN --out accuracies.png
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from data import write_atomically
from pretrain import damage_named, read_json
from tokenizer import InputError, Parser, run_script

COLOURS = {"pre-trained": "#0072B2", "from scratch": "#D55E00"}  # safe for the colour-blind


def break_step(steps: Sequence[int], losses: Sequence[float], baseline: float) -> int | None:
    """The step at which a loss curve leaves the unigram baseline.

    From this step on, the mean of five points stays 0.1 nats below the baseline.
    """
    found = None
    for i in reversed(range(len(losses))):
        if np.mean(losses[max(0, i - 4) : i + 1]) > baseline - 0.1:
            break
        found = steps[i]
    return found


def plot_losses(runs: Sequence[Path], out: Path) -> None:
    """Training and held-out losses of finished pre-training runs, with the unigram baseline."""
    figure, axes = plt.subplots(figsize=(8, 5))
    for number, run in enumerate(runs):
        colour = f"C{number % 10}"
        results = read_json(run / "results.json", "unigram_loss")
        with damage_named(run / "log.jsonl"):
            text = (run / "log.jsonl").read_text(encoding="utf-8")
            lines = [json.loads(line) for line in text.splitlines()]
        curve = [(line["step"], line["loss"]) for line in lines if "loss" in line]
        held_out = [(line["step"], line["held_out_loss"]) for line in lines
                    if "held_out_loss" in line]
        steps, losses = zip(*curve)
        leaves = break_step(steps, losses, results["unigram_loss"])
        where = f"leaves the baseline at step {leaves}" if leaves else "stays at the baseline"
        axes.plot(steps, losses, color=colour, linewidth=1, label=f"{run.resolve().name}: {where}")
        axes.plot(*zip(*held_out), color=colour, linestyle="", marker="o", markersize=5)
        axes.axhline(results["unigram_loss"], color=colour, linestyle="--", linewidth=1)
        if leaves:
            axes.axvline(leaves, color=colour, linestyle=":", linewidth=1)
    axes.set(xlabel="step", ylabel="loss in nats",
             title="Line: training. Dots: held-out articles. Dashed: unigram baseline")
    axes.legend(fontsize=8)
    save(figure, out)


def plot_accuracies(run: Path, out: Path) -> None:
    """The table of a committee's run: a panel for each task, with 95 % intervals."""
    tasks = read_json(run / "results.json", "tasks")["tasks"]
    figure, panels = plt.subplots(1, len(tasks), figsize=(6 * len(tasks), 4.5), squeeze=False,
                                  layout="constrained")
    for axes, (task, about) in zip(panels[0], tasks.items()):
        labels = list(about["table"])
        for kind, offset in (("pre-trained", -0.18), ("from scratch", 0.18)):
            found = [about["table"][label][kind] for label in labels]
            means = np.array([one["mean"] for one in found])
            low = means - np.array([one["low"] for one in found])
            high = np.array([one["high"] for one in found]) - means
            axes.barh(np.arange(len(labels)) + offset, means, height=0.34, color=COLOURS[kind],
                      xerr=[low, high], ecolor="0.2", capsize=3, label=kind)
        for name, style in (("largest class", ":"), ("logistic regression", "--")):
            axes.axvline(100 * about["yardsticks"][name], color="0.3", linestyle=style, label=name)
        axes.set(title=task, xlabel="accuracy in %, with 95 % intervals", xlim=(0, 100),
                 yticks=range(len(labels)), yticklabels=labels)
        axes.invert_yaxis()
    handles, names = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, names, ncols=4, loc="outside upper center", frameon=False)
    save(figure, out)


def save(figure: plt.Figure, out: Path) -> None:
    with write_atomically(out) as file:
        figure.savefig(file, format="png", dpi=150, bbox_inches="tight")
    plt.close(figure)
    print(f"{out} written")


def main() -> None:
    parser = Parser(__doc__, prog="python -m extras.plots")
    parser.add_argument("what", choices=("losses", "accuracies"))
    parser.add_argument("run", nargs="+", type=Path, help="pre-training runs, or a committee's")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the .png to write")
    args = parser.parse_args()
    if args.what == "losses":
        plot_losses(args.run, args.out)
    elif len(args.run) > 1:
        raise InputError("accuracies: name one run, a folder in runs/committee")
    else:
        plot_accuracies(args.run[0], args.out)


if __name__ == "__main__":
    run_script(main)
