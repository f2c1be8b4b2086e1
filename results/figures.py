"""The pictures of README.md, from the files in this folder alone.

    python results/figures.py            needs matplotlib (extras/requirements.txt)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

RESULTS = Path(__file__).resolve().parent
sys.path.insert(0, str(RESULTS.parent))

import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.patches import FancyBboxPatch  # noqa: E402

from extras.plots import plot_accuracies, plot_attention, plot_losses  # noqa: E402
from extras.plots import plot_sizes, save  # noqa: E402

# What the quick preset shares with the trials that it was chosen from
QUICK = {"batch_size": 32, "lr": 0.003, "matrix_lr": 0.02, "mask_rate": 0.25}
SENTENCE = "Paris is the capital of France."
BOXES = [  # of the flow: title, what it is, the script that makes it, colour
    ("text", "openings of\nWikipedia articles", "data.py", "#E8E8E8"),
    ("tokens", "numbers of\nword pieces", "tokenizer.py", "#CFE3F2"),
    ("masked language\nmodel", "guesses the hidden\ntokens of a text", "pretrain.py", "#F7DDB5"),
    ("classifier", "learns a few\nlabelled texts", "finetune.py", "#CBE8D6"),
    ("vote", "the mean of several\nsmall models", "committee.py", "#EBD3E4")]


def draw_flow(out: Path) -> None:
    """What flows through the scripts, from text to the vote."""
    figure, axes = plt.subplots(figsize=(10, 2.3), layout="constrained")
    for k, (title, about, script, colour) in enumerate(BOXES):
        x = 2.3 * k
        axes.add_patch(FancyBboxPatch((x, 0), 1.7, 1.5, boxstyle="round,pad=0.05", facecolor=colour,
                                      edgecolor="0.3", linewidth=1))
        axes.text(x + 0.85, 1.05, title, ha="center", va="center", weight="bold", fontsize=11)
        axes.text(x + 0.85, 0.42, about, ha="center", va="center", fontsize=9)
        axes.text(x + 0.85, -0.3, script, ha="center", va="center", family="monospace", fontsize=9)
        if k:
            axes.annotate("", (x - 0.08, 0.75), (x - 0.52, 0.75), arrowprops={"arrowstyle": "-|>"})
    axes.set(xlim=(-0.1, 11.1), ylim=(-0.5, 1.6), aspect="equal")
    axes.axis("off")
    save(figure, out)


def draw_minutes(trials: Path, out: Path) -> None:
    """Loss and dev accuracy after pre-trainings of other lengths, each with its own schedule.

    The minutes are steps times the seconds of a step in the default run. There, two models train
    at a time and nothing else runs.
    """
    runs = json.loads(trials.read_text(encoding="utf-8"))["runs"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for model, colour, marker in (("bert-6", "#0072B2", "o"), ("bert-1", "#D55E00", "s")):
        default = json.loads((RESULTS / f"models/{model}/results.json").read_text(encoding="utf-8"))
        minutes_a_step = default["seconds"] / default["steps"] / 60
        points = []
        for run in runs:
            is_quick = run["changed"] == QUICK | {"steps": run["changed"]["steps"]}
            if run["model"] == model and run["positions"] == "learned" and is_quick:
                loss = list(run["held_out_loss"].values())[-1]
                accuracy = sum(run["dev_accuracy"]) / len(run["dev_accuracy"])
                points.append((run["changed"]["steps"] * minutes_a_step, loss, accuracy))
        minutes, losses, accuracies = zip(*sorted(points))
        left.plot(minutes, losses, color=colour, marker=marker, label=model)
        right.plot(minutes, accuracies, color=colour, marker=marker, label=model)
    left.axhline(runs[0]["unigram_loss"], color="0.4", linestyle="--", label="unigram baseline")
    left.set(xlabel="minutes of pre-training on one core", ylabel="held-out loss in nats")
    right.set(xlabel="minutes of pre-training on one core", ylabel="accuracy on dev rows in %")
    left.legend()
    right.legend()
    save(figure, out)


def main() -> None:
    pictures, models = RESULTS / "figures", RESULTS / "models"
    pictures.mkdir(exist_ok=True)
    draw_flow(pictures / "flow.png")
    draw_minutes(RESULTS / "default-trials.json", pictures / "minutes.png")
    plot_losses([models / "bert-6", models / "bert-1"], pictures / "losses.png")
    plot_attention(models / "bert-1", SENTENCE, pictures / "attention.png")
    plot_accuracies(RESULTS / "committee-topics-quick.json", pictures / "accuracies.png")
    plot_sizes(RESULTS / "committee-topics-quick.json", pictures / "sizes.png")


if __name__ == "__main__":
    main()
