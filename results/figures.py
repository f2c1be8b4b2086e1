"""The pictures of README.md and of results/README.md, from the files in this folder alone.

    python results/figures.py            needs matplotlib (extras/requirements.txt)
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

RESULTS = Path(__file__).resolve().parent
sys.path.insert(0, str(RESULTS.parent))

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

from extras.plots import plot_attention, plot_losses, plot_sizes, save
from tables import MODELS, ROWS, TASKS, by_seed, c2_lines, half_width, joined, load

SENTENCE = "Paris is the capital of France."
BOXES = [  # of the flow: title, what it is, the script that makes it, colour
    ("text", "openings of\nWikipedia articles", "data.py", "#E8E8E8"),
    ("tokens", "numbers of\nword pieces", "tokenizer.py", "#CFE3F2"),
    ("masked language\nmodel", "guesses the hidden\ntokens of a text", "pretrain.py", "#F7DDB5"),
    ("classifier", "learns from a few\nlabelled texts", "finetune.py", "#CBE8D6"),
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


def draw_minutes(runs: list[dict], out: Path) -> None:
    """Loss and dev accuracy after pre-trainings of other lengths, each with its own schedule.

    The minutes are steps times the seconds of a step in the default run. There, two models train
    at a time and nothing else runs.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for model, colour, marker in (("bert-6", "#0072B2", "o"), ("bert-1", "#D55E00", "s")):
        default = load(f"models/{model}/results.json")
        minutes_a_step = default["seconds"] / default["steps"] / 60
        of_model = [run for run in runs if run["model"] == model]
        minutes = [run["steps"] * minutes_a_step for run in of_model]
        losses = [run["held_out_loss"] for run in of_model]
        accuracies = [np.mean(run["dev_accuracy"]) for run in of_model]
        left.plot(minutes, losses, color=colour, marker=marker, label=model)
        right.plot(minutes, accuracies, color=colour, marker=marker, label=model)
    left.axhline(default["unigram_loss"], color="0.4", linestyle="--", label="unigram baseline")
    left.set(xlabel="minutes of pre-training on one core", ylabel="held-out loss in nats")
    right.set(xlabel="minutes of pre-training on one core", ylabel="accuracy on dev rows in %")
    left.legend()
    right.legend()
    save(figure, out)


def plot_tasks(study: dict, axes: Axes) -> None:
    """From scratch and pre-trained: each task and model, with 20 rows a class."""
    runs, labels = joined(study), []
    cases = [("fewrel", "mean"), ("fewrel", "entities"), ("agnews", "mean"), ("dbpedia", "mean")]
    for task, pooling in cases:
        name = TASKS[task] + (", marked" if pooling == "entities" else "")
        for model, title in MODELS.items():
            y = len(labels)
            labels.append(f"{name}, {title}")
            same = {"task": task, "model": model, "rows_a_class": 20, "pooling": pooling}
            for text, colour in ((None, "#D55E00"), ("study", "#0072B2")):
                size = 90_000 if text else None
                found = by_seed(runs, "accuracy", text=text, articles=size, **same)
                values = list(found.values())
                axes.errorbar(np.mean(values), y, xerr=half_width(values), color=colour,
                              marker="o", capsize=3,
                              label="" if y else "pre-trained" if text else "from scratch")
            known = study["yardsticks"][f"{task}, 20 rows, {pooling}"]["logistic regression"]
            axes.plot(known, y, "k|", markersize=14, label="" if y else "logistic regression")
    axes.set(xlabel="accuracy in % (bars: 95 % over seeds, if there are several)",
             yticks=range(len(labels)), yticklabels=labels, xlim=(0, 100))
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower left")


def plot_row_counts(study: dict, axes: Axes) -> None:
    """The same for FewRel, against the number of labelled rows."""
    runs = joined(study)
    known_at = {}
    for name, known in study["yardsticks"].items():
        task, rows, pooling = name.split(", ")
        if (task, pooling) == ("fewrel", "mean"):
            known_at[int(rows.split()[0])] = known["logistic regression"]
    axes.plot(*zip(*sorted(known_at.items())), "k--", label="logistic regression")
    for model, title, marker in (("bert-6", "BERT-6", "s"), ("bert-1", "BERT-1", "o")):
        for text, kind, colour in (("study", "pre-trained", "#0072B2"),
                                   (None, "from scratch", "#D55E00")):
            points = []
            for size in sorted(known_at):
                found = by_seed(runs, "accuracy", task="fewrel", model=model, pooling="mean",
                                rows_a_class=size, text=text, articles=90_000 if text else None)
                if found:
                    values = list(found.values())
                    points.append((size, np.mean(values), half_width(values)))
            sizes, means, errors = zip(*points)
            axes.errorbar(sizes, means, errors, color=colour, marker=marker, capsize=3,
                          linestyle="-" if model == "bert-1" else ":", label=f"{title}, {kind}")
    axes.set(xlabel="FewRel, labelled rows a class (logarithmic)", ylabel="accuracy in %",
             xscale="log")
    axes.set_xticks(sorted(known_at), map(str, sorted(known_at)), minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def draw_c1(study: dict, out: Path) -> None:
    """What pre-training is worth on each task, and with more labelled rows."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 3.8), layout="constrained",
                                         width_ratios=(3, 2))
    plot_tasks(study, left)
    plot_row_counts(study, right)
    save(figure, out)


def draw_c2(study: dict, out: Path) -> None:
    """Held-out loss of both models, and accuracies of the BERT-1, over the number of articles."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
    lines = c2_lines(study)
    articles = [size.articles for size in lines["bert-1", "equal steps"]]

    def draw(axes: Axes, found: dict[int, dict[int, float]], **look: str) -> None:
        """found: number of articles -> seed -> value."""
        values = [list(of_seed.values()) for of_seed in found.values()]
        axes.errorbar(list(found), list(map(np.mean, values)), list(map(half_width, values)),
                      capsize=3, **look)

    for ((model, title), sizes), style in zip(lines.items(), ("-o", ":s", "--o")):
        draw(left, {size.articles: size.losses for size in sizes}, fmt=style,
             label=f"{MODELS[model]}, {title}", color="#D55E00" if model == "bert-6" else "0.2")
        if model == "bert-1":
            for task, colour in zip(TASKS, ("#0072B2", "#D55E00", "#009E73")):
                draw(right, {size.articles: size.accuracies[task] for size in sizes}, fmt=style,
                     label=f"{TASKS[task]}, {title}", color=colour)
    left.set(ylabel="held-out loss in nats")
    right.set(ylabel="accuracy of a BERT-1 in %", ylim=(0, 100))
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set(xlabel="articles for pre-training (logarithmic)")
        axes.set_xticks(articles, [f"{size:,}" for size in articles], minor=False)
        axes.grid(alpha=0.3)
    left.legend()
    figure.legend(*right.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    save(figure, out)


def draw_c3(study: dict, out: Path) -> None:
    """BERT-1: articles of low and high overlap with a task, tested on this task and the other."""
    runs = joined(study)
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axes, task in zip(panels, ("fewrel", "agnews")):
        for k, (text, colour) in enumerate((("fewrel-low", "#A6CEE3"), ("fewrel-high", "#0072B2"),
                                            ("random", "0.6"), ("agnews-low", "#F2C79A"),
                                            ("agnews-high", "#D55E00"))):
            found = by_seed(runs, "accuracy", text=text, task=task, model="bert-1", **ROWS)
            values = list(found.values())
            if text.endswith("high"):
                low = by_seed(runs, "accuracy", text=text.replace("high", "low"), task=task,
                              model="bert-1", **ROWS)
                for seed in found:
                    axes.plot([k - 1, k], [low[seed], found[seed]], color="0.7", linewidth=1)
            axes.errorbar(k, np.mean(values), half_width(values), color=colour, marker="o",
                          markersize=9, capsize=4, elinewidth=2)
            axes.plot([k] * len(values), values, ".", color="0.2", zorder=3)
        axes.set(title=f"tested on {TASKS[task]}", ylabel="accuracy in %", xlim=(-0.5, 4.5),
                 xticks=range(5), xticklabels=["FewRel\nlow", "FewRel\nhigh", "random",
                                               "AG News\nlow", "AG News\nhigh"],
                 xlabel="articles by their overlap with")
        axes.grid(axis="y", alpha=0.3)
    save(figure, out)


def draw_growth(rows: Sequence[dict], out: Path) -> None:
    """Speed and memory of quick's models against width, depth, batch size, length and members."""
    kinds = {"width": "width", "layers": "layers", "batch_size": "texts in a batch",
             "length": "tokens in a text", "members": "members of a committee"}
    lines = {"bert-1": ("#0072B2", "o"), "bert-6": ("#D55E00", "s"), "bert": ("#000000", "^")}
    figure, panels = plt.subplots(2, 5, figsize=(15, 5.2), layout="constrained")
    for column, (kind, title) in zip(panels.T, kinds.items()):
        ticks: set[int] = set()
        for model, (colour, marker) in lines.items():
            found = [row for row in rows if row["name"].startswith(f"growth, {model}, {kind}, ")]
            if not found:
                continue
            values = [int(row["name"].split(", ")[-1]) for row in found]
            ticks.update(values)
            for axes, field in zip(column, ("ours", "ours_memory_gb")):
                axes.plot(values, [row[field] for row in found], color=colour, marker=marker,
                          label=model)
        for axes in column:
            axes.set(xscale="log", xlabel=title)
            axes.set_ylim(bottom=0)
            axes.set_xticks(sorted(ticks), map(str, sorted(ticks)), minor=False)
            axes.minorticks_off()
            axes.grid(alpha=0.3)
        is_latency = kind == "members"
        column[0].set_ylabel("ms for one text" if is_latency else "training: tokens a second")
        column[1].set_ylabel("memory of the process in GB")
    panels[0, 0].legend()
    save(figure, out)


def main() -> None:
    pictures, models = RESULTS / "figures", RESULTS / "models"
    pictures.mkdir(exist_ok=True)
    draw_flow(pictures / "flow.png")
    draw_minutes(load("default-trials.json")["minutes"], pictures / "minutes.png")
    plot_losses([models / "bert-6", models / "bert-1"], pictures / "losses.png")
    plot_attention(models / "bert-1", SENTENCE, pictures / "attention.png")
    plot_sizes(RESULTS / "committee-topics-quick.json", pictures / "sizes.png")
    study = load("study.json")
    draw_c1(study, pictures / "c1.png")
    draw_c2(study, pictures / "c2.png")
    draw_c3(study, pictures / "c3.png")
    plot_sizes(RESULTS / "committee-study.json", pictures / "c4.png")
    draw_growth(load("speed-growth-cpu.json")["rows"], pictures / "growth.png")


if __name__ == "__main__":
    main()
