"""What each ingredient of a pre-training recipe is worth: held-out loss, and accuracy of the fine-tuned classifier, over seeds.

Choices are made with this, so it never sees a test row: it classifies further *training* rows, whose texts (like those of the test
rows) are kept out of the pre-training articles where the task's texts are articles themselves. Resumable; a finished run is reused.

    python results/ablate.py --out results/recipe-ablation.json                                  the embedded default, BERT-1
    python results/ablate.py --model bert-6 --seeds 1 --out results/recipe-bert-6-ablation.json
    python results/ablate.py --task fewrel --articles 'wiki*.jsonl.gz' --articles-count 20000 --min-class-size 694 --raw-dir DIR --out ...
    python results/ablate.py --arms '{"mask 40 %": {"mask_rate": 0.4}}' --out ...                recipes of your own, on top of quick
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import (Corpus, InputError, Task, add_source_flags, load_corpus, load_tasks, read_task, run_script, sample_task,  # noqa: E402
                  text_key)
from finetune import PRESETS as FINETUNE, TaskTables, check_task, finetune, note_what_it_read, points, twin_seed  # noqa: E402
from model import MODELS  # noqa: E402
from pretrain import (PRESETS, add_run_flags, break_step, choose_hardware, laid_over, load_pretrained, number, pretrain,  # noqa: E402
                      read_json, read_log, result_record, write_json)
from variants import VARIANTS, replaced  # noqa: E402

# without an ingredient, what belongs to it goes back too: the tables' rates suit the starts
ARMS = {
    "quick": {},
    "without the start from counts": {"count_start": 0.0},
    "without the start at the neighbours": {"local_start": 0.0, "position_lr": 1.0},
    "without both": {"count_start": 0.0, "local_start": 0.0, "position_lr": 1.0},
    "counts alone (no training, no local start)": {"steps": 1, "lr": 0.0, "matrix_lr": 0.0, "local_start": 0.0, "position_lr": 1.0},
}


def tuning_task(real: Task, args: argparse.Namespace) -> Task:
    """The task with the same number of training rows, but tested on further training rows: where choices are made."""
    classes, rows, _, titles = read_task(real.name, args.raw_dir, args.entity_markers)
    kept = {name: i for i, name in enumerate(real.classes)}
    forbidden = {text_key(text) for text, _ in real.test}
    allowed = [i for i, (text, label) in enumerate(rows) if classes[label] in kept and text_key(text) not in forbidden]
    return sample_task(real.name, real.classes, [(rows[i][0], kept[classes[rows[i][1]]]) for i in allowed], None,
                       [titles[i] for i in allowed] if titles else (), train_per_class=len(real.train) // len(real.classes),
                       test_per_class=args.tuning_rows, seed=43)


def changed(preset, changes: object, flag: str):
    """A preset with an arm's changes. Raises InputError for a setting that it does not have."""
    known = {f.name: type(f.default) for f in dataclasses.fields(preset)}
    if not isinstance(changes, dict):
        raise InputError(f"{flag}: write {{name of the arm: {{setting: value}}}}")
    for name, value in changes.items():
        if name not in known or not isinstance(value, (known[name], int) if known[name] is float else known[name]):
            raise InputError(f"{flag}: {name}: {value!r} is no setting; there are "
                             + ", ".join(f"{n} ({t.__name__})" for n, t in known.items()))
    return laid_over(preset, changes)


def break_seconds(run: Path) -> float | None:
    """Seconds of training after which a run's loss has left the unigram baseline for good (break_step); None if it has not."""
    log = read_log(run)
    lines = [record for record in log if "loss" in record]
    found = break_step([(record["step"], record["loss"]) for record in lines], log[0]["unigram_loss"])
    return next((record["seconds"] for record in lines if record["step"] == found), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(MODELS), default="bert-1", help="what is pre-trained (default %(default)s)")
    parser.add_argument("--arms", type=json.loads, default=ARMS, metavar="JSON",
                        help="{name: {setting: value}}; default: the kept ingredients")
    parser.add_argument("--ft-arms", type=json.loads, default={"": {}}, metavar="JSON", help="the same for fine-tuning")
    parser.add_argument("--seeds", type=number(1), default=3, metavar="N", help="pre-training seeds (default %(default)s)")
    parser.add_argument("--variant", choices=tuple(VARIANTS), help="pre-train in a way that no flag makes (results/variants.py)")
    parser.add_argument("--tuning-rows", type=number(1), default=30, metavar="N", help="rows a class to classify (default %(default)s)")
    parser.add_argument("--scratch", action=argparse.BooleanOptionalAction, default=True, help="also the twins from scratch")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="results, JSON; rewritten after every run")
    add_run_flags(parser)
    add_source_flags(parser)
    args = parser.parse_args()
    hardware, started = choose_hardware(args.device, args.dtype), time.perf_counter()
    if args.tune or args.task_file or len(args.task or []) > 1 or not (isinstance(args.arms, dict) and isinstance(args.ft_arms, dict)):
        raise InputError("ablate.py takes one named --task, no --task-file, no --tune (it never sees a test row), and arms as "
                         "'{name: {setting: value}}'")
    recipes = {name: changed(PRESETS[args.preset], changes, "--arms") for name, changes in args.arms.items()}
    ft_recipes = {name: changed(FINETUNE[args.preset], changes, "--ft-arms") for name, changes in args.ft_arms.items()}
    (real,) = load_tasks(args)
    task = tuning_task(real, args)
    for recipe in ft_recipes.values():
        check_task(recipe.pooling, task)
    corpora: dict[tuple[int, int], Corpus] = {}
    arms: dict[str, dict] = {}
    for name, recipe in recipes.items():
        size = (recipe.vocab_size, recipe.max_length)
        if size not in corpora:
            corpora[size] = load_corpus(args, [real, task], *size)
        for seed in range(args.seeds):
            own = f"{args.model}-{re.sub('[^a-z0-9]+', '-', f'{args.variant} {name}'.lower())}-seed{seed}" if args.variant else ""
            with replaced(args.variant):  # the settings, and so the usual name, do not tell of it
                run = pretrain(args.model, recipe, corpora[size], seed, args.runs_dir, hardware, name=own, fresh=args.fresh,
                               compiled=args.compile, wait=True)
            pretraining = read_json(run / "results.json")
            note_what_it_read(run, task)
            config, _, tokenizer = load_pretrained(run)
            tables = TaskTables.make(task, tokenizer, config.max_length, args.runs_dir, hardware.device)
            for ft_name, ft_recipe in ft_recipes.items():
                arm = arms.setdefault(f"{name}; {ft_name}" if ft_name else name, {
                    "settings": {"pre-training": args.arms[name], "fine-tuning": args.ft_arms[ft_name]}, "held_out_loss": [], "seconds": [],
                    "break_seconds": [],
                    "train_loss": {}, "tasks": {task.name: {"models": {args.model: {}}, "committee": {}}}})
                arm["held_out_loss"].append(pretraining["held_out_loss"])
                arm["seconds"].append(pretraining["seconds"])
                arm["break_seconds"].append(break_seconds(run))
                for kind, start in (("pretrained", run), ("scratch", None))[: 2 if args.scratch else 1]:
                    folder = finetune(start, config, tokenizer, tables, ft_recipe, twin_seed(run, 0), args.runs_dir, hardware,
                                      fresh=args.fresh, compiled=args.compile, label=args.model, wait=True)
                    result = read_json(folder / "results.json")
                    arm["tasks"][task.name]["models"][args.model].setdefault(kind, []).append(result["accuracy"])
                    arm["train_loss"].setdefault(kind, []).append(result["train_loss"])
                settings = {"model": args.model, "variant": args.variant, "task": task.name,
                            "classified": f"{len(task.test)} further training rows",
                            "pre-training": PRESETS[args.preset].__dict__, "fine-tuning": FINETUNE[args.preset].__dict__}
                write_json(args.out, result_record(settings, time.perf_counter() - started, hardware=hardware.reason,
                                                   unigram_loss=pretraining["unigram_loss"], arms=arms))
    for name, arm in arms.items():
        values = " ".join(f"{kind} {points(x)}" for kind, x in arm["tasks"][task.name]["models"][args.model].items())
        print(f"{name:42} {np.mean(arm['held_out_loss']):.3f} nats, {np.mean(arm['seconds']):3.0f} s; {values}")


if __name__ == "__main__":
    run_script(main)
