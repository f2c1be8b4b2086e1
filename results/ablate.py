"""What each ingredient of a pre-training recipe is worth: held-out loss, and accuracy of the fine-tuned classifier, over seeds.

Choices are made with this, so it never sees a test row: it classifies further *training* rows, whose texts (like those of the test
rows) are kept out of the pre-training articles where the task's texts are articles themselves. Resumable; a finished run is reused.

    python results/ablate.py --out results/recipe-ablation.json                                  the embedded default, BERT-1
    python results/ablate.py --model bert-6 --seeds 1 --out results/recipe-ablation-bert-6.json
    python results/ablate.py --task fewrel --articles 'wiki*.jsonl.gz' --articles-count 20000 --min-class-size 694 --raw-dir DIR --out ...
    python results/ablate.py --arms '{"mask 40 %": {"mask_rate": 0.4}}' --out ...                recipes of your own, on top of quick
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import Task, add_source_flags, load_corpus, load_tasks, read_task, run_script, sample_task, text_key  # noqa: E402
from finetune import PRESETS as FINETUNE, TaskTables, finetune, points, run_accuracy, twin_seed  # noqa: E402
from model import MODELS  # noqa: E402
from pretrain import PRESETS, add_run_flags, choose_hardware, load_pretrained, number, pretrain, read_json, result_record, write_json  # noqa: E402

# without an ingredient, what belongs to it goes back too: the tables' rates suit the starts
ARMS = {
    "quick": {},
    "without the start from counts": {"count_start": 0.0},
    "without the start at the neighbours": {"local_start": 0.0, "position_lr": 1.0},
    "without both": {"count_start": 0.0, "local_start": 0.0, "position_lr": 1.0},
    "the start from counts alone (1 step)": {"steps": 1},
}


def tuning_task(real: Task, args: argparse.Namespace) -> Task:
    """The task with the same number of training rows, but tested on further training rows: where choices are made."""
    classes, rows, test_rows, _ = read_task(real.name, args.raw_dir)
    kept = {name: i for i, name in enumerate(real.classes)}
    forbidden = {text_key(text) for text, _ in real.test}
    rows = [(text, kept[classes[label]]) for text, label in rows if classes[label] in kept and text_key(text) not in forbidden]
    per_class = len(real.train) // len(real.classes)
    return sample_task(real.name, real.classes, rows, None, train_per_class=per_class, test_per_class=args.tuning_rows, seed=43)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(MODELS), default="bert-1", help="what is pre-trained (default %(default)s)")
    parser.add_argument("--arms", type=json.loads, default=ARMS, metavar="JSON", help="{name: {setting: value}}; default: the kept ingredients")
    parser.add_argument("--ft-arms", type=json.loads, default={"": {}}, metavar="JSON", help="the same for fine-tuning")
    parser.add_argument("--seeds", type=number(1), default=3, metavar="N", help="pre-training seeds (default %(default)s)")
    parser.add_argument("--tuning-rows", type=number(1), default=30, metavar="N", help="rows a class to classify (default %(default)s)")
    parser.add_argument("--scratch", action=argparse.BooleanOptionalAction, default=True, help="also the twins from scratch")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="results, JSON; rewritten after every run")
    add_run_flags(parser)
    add_source_flags(parser)
    args = parser.parse_args()
    hardware, started = choose_hardware(args.device, args.dtype), time.perf_counter()
    (real,) = load_tasks(args)
    task = tuning_task(real, args)
    base = PRESETS[args.preset]
    corpora = {}
    arms: dict[str, dict] = {}
    for name, changes in args.arms.items():
        recipe = dataclasses.replace(base, **changes)
        if recipe.vocab_size not in corpora:
            corpora[recipe.vocab_size] = load_corpus(args, [real, task], recipe.vocab_size, recipe.max_length)
        for seed in range(args.seeds):
            run = pretrain(args.model, recipe, corpora[recipe.vocab_size], seed, args.runs_dir, hardware)
            config, _, tokenizer = load_pretrained(run)
            tables = TaskTables.make(task, tokenizer, config.max_length, args.runs_dir, hardware.device)
            for ft_name, ft_changes in args.ft_arms.items():
                key = f"{name}; {ft_name}" if ft_name else name
                arm = arms.setdefault(key, {"settings": {**changes, **ft_changes}, "held_out_loss": [], "seconds": [], "train_loss": [],
                                            "tasks": {task.name: {"models": {args.model: {}}, "committee": {}}}})
                pretraining = read_json(run / "results.json")
                arm["held_out_loss"].append(pretraining["held_out_loss"])
                arm["seconds"].append(pretraining["seconds"])
                for kind, start in (("pretrained", run), ("scratch", None))[: 2 if args.scratch else 1]:
                    folder = finetune(start, config, tokenizer, tables, dataclasses.replace(FINETUNE[args.preset], **ft_changes),
                                      twin_seed(run, 0), args.runs_dir, hardware, label=args.model)
                    arm["tasks"][task.name]["models"][args.model].setdefault(kind, []).append(run_accuracy(folder))
                    arm["train_loss"].append(read_json(folder / "results.json")["train_loss"])
                write_json(args.out, result_record(
                    {"model": args.model, "task": task.name, "classified": f"{len(task.test)} further training rows", "recipe": base.__dict__},
                    time.perf_counter() - started, hardware=hardware.reason, unigram_loss=pretraining["unigram_loss"], arms=arms))
    for name, arm in arms.items():
        values = " ".join(f"{kind} {points(x)}" for kind, x in arm["tasks"][task.name]["models"][args.model].items())
        print(f"{name:42} {np.mean(arm['held_out_loss']):.3f} nats, {np.mean(arm['seconds']):3.0f} s; {values}")


if __name__ == "__main__":
    run_script(main)
