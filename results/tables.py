"""The tables of the study in results/README.md, from study.json alone.

    python results/tables.py             writes each table after its mark, <!-- table NAME -->

Accuracies in %; 95 % t-intervals over seeds, or no interval if there is a single seed.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

RESULTS = Path(__file__).resolve().parent
sys.path.insert(0, str(RESULTS.parent))

from finetune import interval

TASKS = {"fewrel": "FewRel", "agnews": "AG News", "dbpedia": "DBpedia"}
MODELS = {"bert-6": "BERT-6", "bert-1": "BERT-1"}
LABELLED = {("fewrel", "mean"): "FewRel", ("fewrel", "entities"): "FewRel, entities marked",
            ("agnews", "mean"): "AG News", ("dbpedia", "mean"): "DBpedia"}  # task, pooling
ROWS = {"rows_a_class": 20, "pooling": "mean"}  # of tables C2 and C3
STEPS = 4_800  # of the study's pre-trainings, unless a table says otherwise


def load(name: str) -> dict:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def shown(values: Sequence[float]) -> str:
    """The mean of one value a seed, with its interval."""
    if len(values) < 2:
        return "".join(f"{value:.1f}" for value in values)
    return str(interval([np.array([value / 100]) for value in values]))


def half_width(values: Sequence[float]) -> float:
    """Of the interval that shown() shows; 0 for a single seed."""
    if len(values) < 2:
        return 0.0
    found = interval([np.array([value / 100]) for value in values])
    return found.high - found.mean


def table_of(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in [head, *rows]]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def joined(study: dict) -> list[dict]:
    """The fine-tunings, each with its pre-training: "text", "articles", "pretrain_steps".

    A model from scratch has no text: None. Raises ValueError if runs on the same rows have other
    numbers of passes: by_seed would take the mean of both.
    """
    runs = []
    epochs: dict[tuple, int] = {}  # of each set of labelled rows
    for run in study["finetune"].values():
        rows = run["task"], run["rows_a_class"], run["pooling"]
        if epochs.setdefault(rows, run["epochs"]) != run["epochs"]:
            raise ValueError(f"study.json: fine-tunings on {rows} have {epochs[rows]} and "
                             f"{run['epochs']} passes. Remove one kind")
        before = study["pretrain"].get(run["checkpoint"], {})
        runs.append(run | {"text": before.get("text"), "articles": before.get("articles"),
                           "pretrain_steps": before.get("steps")})
    return runs


def by_seed(runs: Sequence[dict], value: str, **wanted: object) -> dict[int, float]:
    """Seed of the pre-training -> a value of the runs with the wanted fields.

    The mean, if it was fine-tuned with several seeds: finetune.py takes that of the pre-training,
    the same plus 1,000, and so on.
    """
    found: dict[int, list[float]] = {}
    for run in runs:
        if all(run[field] == wish for field, wish in wanted.items()):
            found.setdefault(run["seed"] % 1_000, []).append(run[value])
    return {seed: sum(found[seed]) / len(found[seed]) for seed in sorted(found)}


def differences(first: dict[int, float], second: dict[int, float]) -> list[float]:
    """first - second, for each seed that both have."""
    return [first[seed] - second[seed] for seed in first if seed in second]


def table_c1(study: dict) -> str:
    """Pre-trained against from scratch: tasks, numbers of labelled rows, both models."""
    runs, rows = joined(study), []
    for name, known in study["yardsticks"].items():
        task, rows_a_class, pooling = name.split(", ")
        for model, title in MODELS.items():
            same = {"task": task, "rows_a_class": int(rows_a_class.split()[0]),
                    "pooling": pooling, "model": model}
            after = by_seed(runs, "accuracy", **same, text="study", articles=90_000,
                            pretrain_steps=STEPS)
            scratch = by_seed(runs, "accuracy", **same, text=None)
            gaps = differences(after, scratch)
            if gaps:
                rows.append([LABELLED[task, pooling], str(same["rows_a_class"]), title,
                             str(len(gaps)), shown([known["logistic regression"]]),
                             shown(list(after.values())), shown(list(scratch.values())),
                             shown(gaps)])
    titles = list(TASKS.values())
    rows.sort(key=lambda row: (titles.index(row[0].split(",")[0]), int(row[1]), row[0]))
    return table_of(["task", "rows a class", "model", "seeds", "logistic regression",
                     "pre-trained", "from scratch", "gap"], rows)


def task_cells(found: dict[str, dict[int, float]]) -> list[str]:
    """For each task of the tables: the mean over seeds, with its interval."""
    return [shown(list(found[task].values())) for task in TASKS]


def change_row(title: str, columns: int, more: dict[str, dict[int, float]],
               less: dict[str, dict[int, float]]) -> list[str]:
    """A row with the differences of two rows, seed by seed, after empty columns."""
    changes = [shown(differences(more[task], less[task])) for task in TASKS]
    return [f"**{title}**", *[""] * (columns - 1), *changes]


class Size(NamedTuple):
    """The runs of one model on one number of articles. Losses and accuracies are by seed."""

    articles: int
    steps: int
    losses: dict[int, float]
    accuracies: dict[str, dict[int, float]]  # of each task


def c2_lines(study: dict) -> dict[tuple[str, str], list[Size]]:
    """(model, "equal steps" or "equal passes") -> its numbers of articles, the fewest first."""
    runs, pretrainings = joined(study), list(study["pretrain"].values())
    lines: dict[tuple[str, str], list[Size]] = {}
    for model, title in (("bert-1", "equal steps"), ("bert-1", "equal passes"),
                         ("bert-6", "equal steps")):
        sizes = sorted({run["articles"] for run in pretrainings
                        if run["text"] == "study" and run["model"] == model})
        line = lines[model, title] = []
        for size in sizes:
            steps = STEPS if title == "equal steps" else round(STEPS * size / sizes[-1])
            before = {"text": "study", "articles": size, "model": model}
            losses = by_seed(pretrainings, "held_out_loss", **before, steps=steps)
            accuracies = {task: by_seed(runs, "accuracy", **before, task=task, **ROWS,
                                        pretrain_steps=steps) for task in TASKS}
            line.append(Size(size, steps, losses, accuracies))
    return lines


def table_c2(study: dict) -> str:
    """More articles, at equal steps and at equal passes."""
    rows: list[list[str]] = []
    for (model, title), sizes in c2_lines(study).items():
        for size in sizes:
            rows.append([f"{MODELS[model]}, {title}", f"{size.articles:,}", f"{size.steps:,}",
                         f"{32 * size.steps / size.articles:.1f}",
                         f"{np.mean(list(size.losses.values())):.2f}", str(len(size.losses)),
                         *task_cells(size.accuracies)])
        least, most = sizes[0], sizes[-1]
        rows.append(change_row(f"{most.articles:,} minus {least.articles:,}", 6, most.accuracies,
                               least.accuracies))
    return table_of(["", "articles", "steps", "passes", "held-out loss", "seeds", *TASKS.values()],
                    rows)


def table_c3(study: dict) -> str:
    """10,000 articles of low, random and high overlap with a task, tested on all tasks."""
    runs, rows = joined(study), []
    found: dict[str, dict[str, dict[int, float]]] = {}
    for text in ("random", "fewrel-low", "fewrel-high", "agnews-low", "agnews-high"):
        losses = by_seed(list(study["pretrain"].values()), "held_out_loss", text=text,
                         model="bert-1")
        found[text] = {task: by_seed(runs, "accuracy", text=text, task=task, model="bert-1",
                                     **ROWS) for task in TASKS}
        coverage = study["texts"][text]["coverage"]["occurrences_common"]
        rows.append([text, f"{100 * coverage:.1f}", f"{np.mean(list(losses.values())):.2f}",
                     str(len(losses)), *task_cells(found[text])])
        if text.endswith("high"):
            task = text.removesuffix("-high")
            for other, name in (("low", f"{task}-low"), ("random", "random")):
                rows.append(change_row(f"{task}: high minus {other}", 4, found[text],
                                       found[name]))
    return table_of(["articles", "covered, %", "held-out loss", "seeds", *TASKS.values()], rows)


def table_c4(study: dict) -> str:
    """The vote of several BERT-1s beside a BERT-6, on each set of rows that has both."""
    votes = {}  # title of the column -> the votes on its rows
    for (task, pooling), title in LABELLED.items():
        found = study["votes"].get(f"{task}, {ROWS['rows_a_class']} rows, {pooling}", {})
        if "bert-6" in found:
            votes[title] = found
    rows = [["BERT-6", *(found["bert-6"] for found in votes.values())]]
    sizes = [size for size in map(str, range(1, 10))
             if all(size in found for found in votes.values())]
    titles = {size: f"{size} BERT-1s" for size in sizes} | {"1": "the first BERT-1"}
    for size in sizes:
        rows.append([titles[size], *(found[size] for found in votes.values())])
    for size in sizes[2::3]:  # 3 and 6
        rows.append([f"**{titles[size]} minus BERT-6**",
                     *(found[f"{size} minus bert-6"] for found in votes.values())])
    for model, title in (("bert-1-wide", "of width 256"), ("bert-1-conv3", "convolutional")):
        key = f"3, one {model} minus 3"
        if any(key in found for found in votes.values()):
            rows.append([f"**3, one {title}, minus 3 BERT-1s**",
                         *(found.get(key, "") for found in votes.values())])
    rows.append(["two BERT-1s agree on, %", *(found["agreement"] for found in votes.values())])
    rows.append(["calibration error of a BERT-1, of the vote of all",
                 *(found["calibration error"] for found in votes.values())])
    return table_of(["", *votes], rows)


def table_fewrel(study: dict) -> str:
    """A BERT-1 on FewRel after two pre-trainings on 20,000 articles, a short and a longer one."""
    runs, rows = joined(study), []
    for pooling, title in (("mean", "the sentence alone"), ("entities", "entities marked")):
        same = {"task": "fewrel", "rows_a_class": 20, "pooling": pooling, "model": "bert-1"}
        known = study["yardsticks"][f"fewrel, 20 rows, {pooling}"]["logistic regression"]
        scratch = by_seed(runs, "accuracy", **same, text=None)
        for steps in (2_000, STEPS):
            after = by_seed(runs, "accuracy", **same, text="study", articles=20_000,
                            pretrain_steps=steps)
            rows.append([title, f"{steps:,}", shown([known]), shown(list(after.values())),
                         shown([scratch[seed] for seed in after]),
                         shown(differences(after, scratch))])
    return table_of(["", "steps", "logistic regression", "pre-trained", "from scratch", "gap"],
                    rows)


def table_order(study: dict) -> str:
    """BERT-1s whose pre-training text has its tokens scrambled within each text, or as they are."""
    runs, rows = joined(study), []
    for (task, pooling), title in LABELLED.items():
        same = ROWS | {"task": task, "pooling": pooling, "model": "bert-1"}
        scrambled = by_seed(runs, "accuracy", **same, text="scrambled")
        ordered = by_seed(runs, "accuracy", **same, text="study", articles=90_000,
                          pretrain_steps=STEPS)
        scratch = by_seed(runs, "accuracy", **same, text=None)
        seeds = [seed for seed in scrambled if seed in ordered and seed in scratch]
        columns = [[found[seed] for seed in seeds] for found in (scratch, scrambled, ordered)]
        added = [ordered[seed] - scrambled[seed] for seed in seeds]
        rows.append([title, *map(shown, columns), shown(added)])
    return table_of(["", "from scratch", "scrambled", "as it is", "order adds"], rows)


def insert_tables(text: str) -> str:
    """The text with each table put after its mark. Raises ValueError if a mark is missing."""
    study = load("study.json")
    tables = {"FewRel": table_fewrel(study), "C1": table_c1(study), "order": table_order(study),
              "C2": table_c2(study), "C3": table_c3(study), "C4": table_c4(study)}
    for name, table in tables.items():
        old = re.compile(rf"(<!-- table {name} -->\n\n)(\|.*\n)*")
        text, count = old.subn(lambda mark, table=table: mark[1] + table + "\n", text)
        if count != 1:
            raise ValueError(f"<!-- table {name} --> stands {count} times in the text, not once")
    return text


def main() -> None:
    path = RESULTS / "README.md"
    path.write_text(insert_tables(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
