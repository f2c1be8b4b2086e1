"""extras/plots.py - pictures of finished runs. It imports the six scripts; none of them imports it.

    pip install -r extras/requirements.txt
    python -m extras.plots losses runs/pretrain/RUN1 runs/pretrain/RUN2 --out losses.png
    python -m extras.plots attention runs/pretrain/RUN --text "Paris is in France." --out heads.png
    python -m extras.plots accuracies runs/committee/RUN --out accuracies.png
    python -m extras.plots sizes runs/committee/RUN --out sizes.png
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

from data import damage_named, read_json
from finetune import check_finished
from model import attention_weights
from pretrain import encode_with_masks, load_masked_lm, load_settings
from tokenizer import InputError, Parser, run_script, write_atomically

MOST_TOKENS = 40
COLOURS = {"pre-trained": "#0072B2", "from scratch": "#D55E00"}  # safe for the colour-blind


def plateau_end(steps: Sequence[int], losses: Sequence[float], baseline: float) -> int | None:
    """The step at which a loss curve leaves the unigram baseline.

    From this step on, the mean of five points stays 0.1 nats below the baseline.
    """
    first_step = None
    for i in reversed(range(len(losses))):
        if np.mean(losses[max(0, i - 4) : i + 1]) > baseline - 0.1:
            break
        first_step = steps[i]
    return first_step


def plot_losses(runs: Sequence[Path], out: Path) -> None:
    """Training and held-out losses of finished pre-training runs, with the unigram baseline."""
    figure, axes = plt.subplots(figsize=(8, 5))
    for number, run in enumerate(runs):
        colour = f"C{number % 10}"
        if "recipe" not in load_settings(run, "pretrain"):
            raise InputError(f"{run}: was imported, so it has no loss curve")
        check_finished(run, "pre-training")
        results = read_json(run / "results.json", "unigram_loss")
        with damage_named(run / "log.jsonl"):
            text = (run / "log.jsonl").read_text(encoding="utf-8")
            lines = [json.loads(line) for line in text.splitlines()]
            curve = [(line["step"], line["loss"]) for line in lines if "loss" in line]
            held_out = [(line["step"], line["held_out_loss"]) for line in lines
                        if "held_out_loss" in line]
            steps, losses = zip(*curve)
        leaves = plateau_end(steps, losses, results["unigram_loss"])
        where = f"0.1 below the baseline from step {leaves}" if leaves else "stays at the baseline"
        axes.plot(steps, losses, color=colour, linewidth=1, label=f"{run.resolve().name}: {where}")
        axes.plot(*zip(*held_out), color=colour, linestyle="", marker="o", markersize=5)
        axes.axhline(results["unigram_loss"], color=colour, linestyle="--", linewidth=1)
        if leaves:
            axes.axvline(leaves, color=colour, linestyle=":", linewidth=1)
    axes.set(xlabel="step", ylabel="loss in nats",
             title="Line: training. Dots: held-out articles. Dashed: unigram baseline")
    axes.legend(fontsize=8)
    save(figure, out)


def committee_results(run: Path) -> dict:
    """The results of a committee. run: its folder, or the results file itself."""
    path = run if run.suffix == ".json" else run / "results.json"
    if (run / "config.json").exists() or not path.exists():
        raise InputError(f"{run}: not a finished committee. Name a folder in runs/committee")
    return read_json(path, "tasks", "settings")


def error_bars(intervals: Sequence[dict]) -> tuple[np.ndarray, np.ndarray]:
    """(means (n,), how far each interval reaches below and above its mean (2, n))."""
    means = np.array([one["mean"] for one in intervals])
    low = np.array([one["low"] for one in intervals])
    high = np.array([one["high"] for one in intervals])
    return means, np.stack([means - low, high - means])


def plot_accuracies(run: Path, out: Path) -> None:
    """The table of a committee's run: a panel for each task, with 95 % intervals."""
    tasks = committee_results(run)["tasks"]
    figure, panels = plt.subplots(1, len(tasks), figsize=(6 * len(tasks), 4.5), squeeze=False,
                                  layout="constrained")
    for axes, (task, of_task) in zip(panels[0], tasks.items()):
        labels = list(of_task["table"])
        for kind, offset in (("pre-trained", -0.18), ("from scratch", 0.18)):
            found = [of_task["table"][label][kind] for label in labels]
            means, errors = error_bars(found)
            axes.barh(np.arange(len(labels)) + offset, means, height=0.34, color=COLOURS[kind],
                      xerr=errors, ecolor="0.2", capsize=3, label=kind)
        for name, style in (("largest class", ":"), ("logistic regression", "--")):
            accuracy = 100 * of_task["yardsticks"][name]
            axes.axvline(accuracy, color="0.3", linestyle=style, label=name)
        axes.set(title=task, xlabel="accuracy in %, with 95 % intervals", xlim=(0, 100),
                 yticks=range(len(labels)), yticklabels=labels)
        axes.invert_yaxis()
    handles, names = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, names, ncols=4, loc="outside upper center", frameon=False)
    save(figure, out)


def plot_sizes(run: Path, out: Path) -> None:
    """Accuracy of the vote against the number of members, beside the deep model's."""
    results = committee_results(run)
    deep, most = results["settings"]["deep"], results["settings"]["members"]
    figure, panels = plt.subplots(1, len(results["tasks"]), figsize=(5 * len(results["tasks"]), 4),
                                  squeeze=False, layout="constrained")
    for axes, (task, of_task) in zip(panels[0], results["tasks"].items()):
        table = of_task["table"]
        for kind, colour in COLOURS.items():
            sizes, found = [], []
            for label, row in table.items():
                if label.endswith("one member"):
                    sizes.append(1)
                    found.append(row[kind])
                elif match := re.match(r"committee of (\d+)", label):
                    sizes.append(int(match[1]))
                    found.append(row[kind])
            means, errors = error_bars(found)
            axes.errorbar(sizes, means, errors, color=colour, marker="o", capsize=3,
                          label=f"committee, {kind}")
            if deep in table:
                own = table[deep][kind]
                axes.axhline(own["mean"], color=colour, linestyle="--", label=f"{deep}, {kind}")
                axes.axhspan(own["low"], own["high"], color=colour, alpha=0.1, linewidth=0)
        axes.set(title=task, xlabel="members of the committee", xticks=range(1, most + 1),
                 ylabel="accuracy in %, with 95 % intervals")
    handles, names = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, names, ncols=2, loc="outside upper center", frameon=False)
    save(figure, out)


@torch.no_grad()
def attention_of(run: Path, text: str) -> tuple[list[str], list[Tensor]]:
    """The tokens of a text, and each layer's attention weights over it: (heads, T, T)."""
    model, tokenizer = load_masked_lm(run)
    input_ids = encode_with_masks(text, tokenizer, model.config.max_length)
    weights: list[Tensor] = []

    def hook(attention: Any, arguments: tuple) -> None:
        query, key, _ = attention.project(arguments[0])
        weights.append(attention_weights(query, key, torch.zeros(1, 1, 1, key.size(-2)))[0])

    for layer in model.bert.layers:
        layer.get_submodule("attention").register_forward_pre_hook(hook)
    model.bert(input_ids)
    return [tokenizer.pieces.id_to_piece(int(i)) for i in input_ids[0]], weights


def plot_attention(run: Path, text: str, out: Path) -> None:
    """How much each token (row) attends to each token (column): a panel for each head."""
    tokens, weights = attention_of(run, text)
    rows, columns, T = len(weights), len(weights[0]), len(tokens)
    if T > MOST_TOKENS:
        raise InputError(f"--text: has {T} tokens, and a picture shows at most {MOST_TOKENS}. Give "
                         "a shorter one")
    side = max(2.0, 0.16 * T)
    figure, panels = plt.subplots(rows, columns, figsize=(columns * side + 2, rows * side + 1),
                                  squeeze=False, layout="constrained", sharex=True, sharey=True)
    for layer, (of_layer, line) in enumerate(zip(weights, panels), 1):
        for head, (of_head, axes) in enumerate(zip(of_layer, line), 1):
            image = axes.imshow(of_head.numpy(), cmap="viridis", vmin=0, vmax=1)
            axes.set_title(f"layer {layer}, head {head}", fontsize=8)
            # parse_math: "$" is no formula
            axes.set_xticks(range(T), tokens, rotation=90, fontsize=6, parse_math=False)
            axes.set_yticks(range(T), tokens, fontsize=6, parse_math=False)
    figure.supxlabel("token that is attended to")
    figure.supylabel("token that attends")
    figure.colorbar(image, ax=panels, label="attention weight", shrink=0.8)
    save(figure, out)


def save(figure: plt.Figure, out: Path) -> None:
    with write_atomically(out) as file:
        figure.savefig(file, format="png", dpi=150, bbox_inches="tight")
    plt.close(figure)
    print(f"{out} written")


def main() -> None:
    parser = Parser(__doc__, prog="python -m extras.plots")
    parser.add_argument("what", choices=("losses", "attention", "accuracies", "sizes"))
    parser.add_argument("run", nargs="+", type=Path, help="losses, attention: pre-training runs; "
                        "accuracies, sizes: a committee's run")
    parser.add_argument("--text", default="", help="attention: the sentence to show")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the .png to write")
    args = parser.parse_args()
    if args.what != "losses" and len(args.run) > 1:
        raise InputError(f"{args.what}: name one run")
    if args.out.suffix.lower() != ".png":
        raise InputError(f"--out {args.out}: must end in .png")
    if args.what == "attention" and not args.text:
        raise InputError("attention: name a sentence with --text")
    if args.what == "losses":
        plot_losses(args.run, args.out)
    elif args.what == "attention":
        plot_attention(args.run[0], args.text, args.out)
    elif args.what == "accuracies":
        plot_accuracies(args.run[0], args.out)
    else:
        plot_sizes(args.run[0], args.out)


if __name__ == "__main__":
    run_script(main)
