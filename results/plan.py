"""The study's plan: every cell with its command and its predicted minutes. Writes results/plan.json and results/reproduce.sh.

A cell is one command of committee.py; cells share what they can (the same model on the same articles with the same seed is trained
once), so their order matters for the minutes alone. Predicted from rates measured on two cores, two processes with a thread each.

    python results/plan.py          then, from the repository's root:  bash results/reproduce.sh   (or any line of it)
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

HERE = Path(__file__).resolve().parent
MACHINE = "2 cores of an AMD EPYC with AVX512-BF16"
# tokens/s there of one process of two, fine-tuning or pre-training
RATES = {"bert-1": 42_000, "bert-6": 12_000, "bert-1-wide": 18_000, "bert-1-conv3": 3_000}
TOKENS = {"article": 125, "fewrel": 41, "agnews": 61, "dbpedia": 69}  # of a text, with 4,000 pieces
ROWS = {"fewrel": 58, "agnews": 4, "dbpedia": 14}  # classes; the quick preset has 100 training rows of each
STEPS, BATCH, EPOCHS, LEAST_STEPS = 1_000, 32, 5, 100  # the study's pre-training steps; the rest is the quick preset's

PREPARED = "runs/study/prepared"
SOURCE = ("--articles 'data/wikipedia/articles-*.jsonl.gz' --raw-dir data --runs-dir runs/study --min-class-size 694 "
          f"--tokenizer {PREPARED}/tokenizer.model")
SIZES = (5_000, 20_000, 40_000, 90_000)
trained: set[tuple] = set()  # (model, articles, arm, steps, seed) and (.., task, rows): what an earlier cell has made


def minutes(models: dict[str, int], tasks: tuple[str, ...], text: tuple, steps: int, rows: int) -> float:
    """Predicted wall time of a cell on two cores. models: name -> seeds; text: what the articles are, for what is trained already."""
    seconds = 0.0
    for model, seeds in models.items():
        for seed in range(seeds):
            if (model, text, steps, seed) not in trained:
                seconds += steps * BATCH * TOKENS["article"] / RATES[model]
            for task in tasks:
                tuning = max(EPOCHS * ROWS[task] * rows, LEAST_STEPS * BATCH) * TOKENS[task] / RATES[model]
                for start in ((model, text, steps, seed, task, rows), (model, "scratch", seed, task, rows)):
                    seconds += 0.0 if start in trained else tuning
                    trained.add(start)
            trained.add((model, text, steps, seed))
    return round(seconds / 2 / 60 + 1.0, 1)  # two processes; a minute to read articles, time models, and so on


def cell(name: str, claim: str, question: str, tasks: tuple[str, ...], *, deep: int = 0, shallow: int = 3, repeats: int = 1,
         articles: int = 90_000, steps: int = STEPS, epochs: int = 0, rows: int = 100, text: tuple = (), flags: str = "") -> dict:
    length = f"--epochs {epochs} --steps 0" if epochs else f"--steps {steps}"
    steps = epochs * -(-articles // BATCH) or steps
    command = (f"python committee.py --task {' '.join(tasks)} {SOURCE} --articles-count {articles} {length} "
               f"--repeats {repeats} --members {shallow // repeats} {'' if deep else '--deep none '}"
               f"{f'--train-per-class {rows} --test-per-class 70 ' if rows != 100 else ''}{f'{flags} ' if flags else ''}"
               f"--out results/study/{name}.json")
    models = {"bert-6": deep} if deep else {}
    members = flags.partition("--member-model ")[2].split() or ["bert-1"]
    models |= {member: shallow // len(members) for member in members}
    return {"name": name, "claim": claim, "question": question, "command": command,
            "minutes": minutes(models, tasks, (articles, *text), steps, rows)}


def plan() -> list[dict]:
    three, fewrel = ("fewrel", "agnews", "dbpedia"), ("fewrel",)
    plain = "--count-start 0 --local-start 0 --position-lr 1"
    cells = [cell(f"c2-steps-{n}", "C2", f"{n} articles, equal steps", fewrel, articles=n) for n in SIZES]
    cells.append(cell("c1", "C1", "three tasks, BERT-6 and BERT-1", three, deep=3, shallow=6, repeats=3))
    cells.append(cell("c4", "C4", "the same six BERT-1s as one committee", three, deep=1, shallow=6))
    for task in ("fewrel", "agnews"):
        for arm in ("low", "random", "high"):
            text = ("random",) if arm == "random" else (arm, task)  # the same random articles for both tasks
            cells.append(cell(f"c3-{task}-{arm}", "C3", f"10,000 articles of {arm} overlap with {task}", (task,), text=text,
                              flags=f"--arm {arm} --arm-count 10000"))
    for name, question, flags in (
            ("counts", "both starts, and not a step of training", "--lr 0 --matrix-lr 0"),
            ("shuffled", "the articles' tokens shuffled within each text", "--arm shuffled"),
            ("unigram", "tokens drawn from the unigram distribution", "--arm unigram"),
            ("plain", "no start from counts or at neighbours: masked language modelling alone", plain)):
        cells.append(cell(f"control-{name}", "control", question, fewrel, text=(name,), flags=flags,
                          steps=1 if name == "counts" else STEPS))
    cells.append(cell("clean", "C1", "without the articles that share ten words in a row with test rows", ("fewrel", "dbpedia"),
                      text=("clean",), flags="--arm clean"))
    for rows in (5, 20, 624):
        for n in (5_000, 90_000):
            cells.append(cell(f"grid-{rows}-{n}", "grid", f"{rows} labels a class, {n} articles", fewrel, articles=n, rows=rows,
                              shallow=3 if rows < 624 else 1))
    cells += [cell(f"c2-passes-{n}", "C2", f"{n} articles, two passes", fewrel, articles=n, epochs=2) for n in SIZES]
    cells.append(cell("mixed", "C4", "three BERT-1s and three of twice the width in one committee", fewrel, deep=1, shallow=6,
                      flags="--member-model bert-1 bert-1-wide"))
    cells.append(cell("stem-without", "C4", "three BERT-1s, 300 steps, 20 labels a class", fewrel, steps=300, rows=20))
    cells.append(cell("stem-with", "C4", "the same with a convolutional stem, slow on a CPU", fewrel, text=("conv",), steps=300, rows=20,
                      flags="--member-model bert-1-conv3"))
    return cells


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    source = SOURCE.partition(" --tokenizer")[0]
    encode = f"python data.py encode {source} --articles-count {max(SIZES)} --vocab-size 4000 --out {PREPARED}"
    cells = [{"name": "encode", "claim": "", "question": "one tokenizer for the whole study", "command": encode, "minutes": 5.0}, *plan()]
    total = sum(c["minutes"] for c in cells)
    record = {"machine": MACHINE, "tokens_per_s_of_one_process_of_two": RATES,
              "minutes_predicted": round(total), "cells": cells}
    (HERE / "plan.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    lines = [f"# {c['claim']}{': ' if c['claim'] else ''}{c['question']} (about {c['minutes']:.0f} minutes)\n{c['command']}"
             for c in cells]
    lines[0] = f"if [ ! -d {PREPARED} ]; then\n{lines[0]}\nfi"
    (HERE / "reproduce.sh").write_text(
        "#!/bin/sh\n# The study, cell by cell; written by results/plan.py. From the repository's root, with FewRel, AG News, DBpedia and\n"
        "# article files in data/ (README, \"On the paper's data\"). Any line runs alone, once the first has made the tokenizer; an\n"
        f"# interrupted one goes on where it was. About {total / 60:.1f} hours on two cores.\nset -e\n\n" + "\n\n".join(lines)
        + "\n\n# Figures and README's tables, from what is there\npython results/figures.py\n", encoding="utf-8")
    print(f"{len(cells)} cells, {total / 60:.1f} hours")


if __name__ == "__main__":
    main()
