"""The study's runs (results/reproduce.sh) as one small file, results/study.json.

    python results/collect.py                    reads data/*, runs/*/pretrain and runs/*/finetune
    python results/collect.py --add              keeps what the file holds of runs that are gone

Unfinished runs are left out, so it can be called while the study is under way.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import DataFolder, open_folder, read_json
from finetune import interval, is_correct, make_tables, yardsticks
from pretrain import choose_runtime
from tokenizer import InputError, run_script, write_atomically
from votes import agreement_and_errors

HERE = Path(__file__).resolve().parent


def pretraining_record(results: dict, folders: dict[str, DataFolder]) -> dict:
    """What a pre-training run was, and what it reached."""
    settings = results["settings"]
    folder = folders[settings["data"]]
    return {"text": folder.path.name, "articles": settings["max_articles"] or len(folder.articles),
            "model": settings["model"], "width": settings["config"]["width"],
            "steps": results["steps"], "seed": settings["seed"],
            "held_out_loss": round(results["held_out_loss"], 4),
            "unigram_loss": round(results["unigram_loss"], 4),
            "seconds": results["seconds"], "git": results["git"]}


def finetuning_record(results: dict, runs: str) -> dict:
    """A fine-tuning run. checkpoint: the name of its pre-training run, or null (from scratch)."""
    settings, recipe = results["settings"], results["settings"]["recipe"]
    checkpoint = settings["checkpoint"]
    return {"checkpoint": f"{runs}/{checkpoint[0]}" if checkpoint else None,
            "model": settings["model"], "width": settings["config"]["width"],
            "seed": settings["seed"], "task": settings["task"],
            "rows_a_class": recipe["per_class"], "pooling": recipe["pooling"],
            "epochs": recipe["epochs"], "steps": results["steps"],
            "train_loss": round(results["train_loss"], 4),
            "accuracy": round(100 * results["accuracy"], 3), "git": results["git"]}


def yardstick_record(settings: dict, folder: DataFolder) -> dict:
    """The accuracies that need no transformer, on the rows of a fine-tuning run."""
    runtime = choose_runtime("cpu", "fp32", HERE, fresh=False)
    rows = settings["recipe"]["per_class"]
    tables = make_tables(folder, settings["task"], settings["split"], rows, runtime)
    known = {name: round(100 * accuracy, 3) for name, accuracy in yardsticks(tables).items()}
    return {"test_rows": len(tables.test_rows), "classes": len(tables.task.classes), **known}


def rows_of(run: dict) -> str:
    """The name of the labelled rows of a fine-tuning."""
    return f"{run['task']}, {run['rows_a_class']} rows, {run['pooling']}"


def vote_record(finetuned: dict[str, dict]) -> dict[str, dict]:
    """Rows -> the accuracy of the BERT-6 ("bert-6"), of the vote of the first 1, 2, ... BERT-1s of
    runs/study ("1", "2", ...), and their differences ("1 minus bert-6", ...).

    Intervals are over the test rows, but over seeds for several BERT-6s; a difference is that to
    their mean. "3, one bert-1-wide minus 3": with such a third member, minus three BERT-1s.
    "agreement": on how many rows two members predict the same class, in %; "calibration error": of
    a member and of the vote of all (results/votes.py).
    """
    runs_of: dict[str, dict[str, list[Path]]] = {}  # rows -> model -> runs
    for name, run in sorted(finetuned.items(), key=lambda item: item[1]["seed"]):
        runs, folder = name.split("/")
        if runs == "study" and run["checkpoint"]:
            of_model = runs_of.setdefault(rows_of(run), {})
            of_model.setdefault(run["model"], []).append(Path("runs/study/finetune") / folder)
    records: dict[str, dict] = {}
    for rows, of_model in runs_of.items():
        record = records[rows] = {}
        members = of_model.get("bert-1", [])
        deep = [is_correct([run]) for run in of_model.get("bert-6", [])]
        if deep:
            record["bert-6"] = str(interval(deep))
        for size in range(1, len(members) + 1):
            voted = is_correct(members[:size])
            record[str(size)] = str(interval([voted]))
            if deep:
                record[f"{size} minus bert-6"] = str(interval([voted - np.mean(deep, axis=0)]))
        for model, others in of_model.items():
            if len(members) > 2 and model not in ("bert-1", "bert-6"):
                mixed = is_correct([*members[:2], others[0]])
                record[f"3, one {model} minus 3"] = str(interval([mixed - is_correct(members[:3])]))
        if len(members) > 1:
            agree, of_member, of_vote = agreement_and_errors(members)
            record["agreement"] = f"{100 * agree:.1f}"
            record["calibration error"] = f"{of_member:.3f}, {of_vote:.3f}"
    return records


def add_earlier(study: dict[str, dict[str, dict]]) -> None:
    """Add what study.json holds already. Where both have a record, the earlier one stays: a vote
    must not mix two sets of runs. To replace a record, take it out of the file first.
    """
    earlier = read_json(HERE / "study.json", *study)
    for kind, records in study.items():
        study[kind] = earlier[kind] | {name: record for name, record in records.items()
                                       if name not in earlier[kind]}


def lines_of(records: dict[str, dict]) -> str:
    """JSON with one record a line, so that two versions of the file can be compared."""
    lines = [f"{json.dumps(name)}: {json.dumps(one)}" for name, one in records.items()]
    return "{\n" + ",\n".join(lines) + "\n}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--add", action="store_true", help="keep what study.json holds already")
    args = parser.parse_args()
    paths = [path.parent for path in sorted(Path("data").glob("*/dataset.json"))]
    folders = {folder.id: folder for folder in map(open_folder, paths)}
    study: dict[str, dict[str, dict]] = {"texts": {}, "pretrain": {}, "finetune": {},
                                         "yardsticks": {}}
    for folder in folders.values():
        about = folder.meta.get("selected", {})
        study["texts"][folder.path.name] = about | {"articles": len(folder.articles)}
    paths = sorted(Path("runs").glob("*/*/*/results.json"))
    if not paths:
        raise InputError("runs: holds no finished run. Start with results/reproduce.sh")
    for path in paths:
        results = read_json(path, "settings")
        runs, kind, name = path.parts[-4:-1]
        if kind == "pretrain":
            study[kind][f"{runs}/{name}"] = pretraining_record(results, folders)
        elif kind == "finetune":
            record = finetuning_record(results, runs)
            study[kind][f"{runs}/{name}"] = record
            rows = rows_of(record)
            if rows not in study["yardsticks"]:
                settings = results["settings"]
                study["yardsticks"][rows] = yardstick_record(settings, folders[settings["data"]])
    study["votes"] = vote_record(study["finetune"])
    if args.add:
        add_earlier(study)
    machine = {key: results[key] for key in ("machine", "versions")}  # of the last run
    parts = [f"{json.dumps(name)}: {lines_of(records)}" for name, records in study.items()]
    text = "{\n" + ",\n".join([f'"measured": {json.dumps(machine)}', *parts]) + "\n}\n"
    with write_atomically(HERE / "study.json") as file:
        file.write(text.encode("utf-8"))
    print(f"{HERE / 'study.json'}: {len(study['pretrain'])} pre-trainings, "
          f"{len(study['finetune'])} fine-tunings")


if __name__ == "__main__":
    run_script(main)
