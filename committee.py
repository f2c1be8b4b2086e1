"""committee.py - the whole experiment in one command: it trains what is missing, votes, measures
latency, prints a table, and shows how the models fill [MASK] in three held-out sentences.

Last of the six files, and the one to run first.

    python committee.py                                        the default data folder
    python committee.py --data simple --task fewrel --members 6 --seeds 3
    python committee.py --predict "Some text." RUN             RUN: a folder in runs/committee

The members are trained separately, each with a seed of its own, on the same articles. Their vote is
soft: the mean of their probabilities. They are compared with one deep model, by default a BERT-6.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from data import DataFolder, open_folder, read_json
from finetune import PRESETS as FINETUNE_PRESETS
from finetune import FinetuneRecipe, Interval, Predictor, Start, TaskTables, add_task_flags
from finetune import check_entities, chosen_tasks, finetune, gap, interval, is_correct
from finetune import load_classifier, make_tables, predict, print_header, recipe_for, start_of
from finetune import yardsticks
from model import MODELS, Committee, count_parameters
from pretrain import PRESETS as PRETRAIN_PRESETS
from pretrain import PretrainRecipe, Runtime, add_run_flags, choose_runtime, chosen_recipe
from pretrain import fields_help, fill_mask, keep_freed_memory, load_masked_lm, open_data
from pretrain import pretrain, result_record, settings_hash, stop_signals, write_json
from tokenizer import UNK, InputError, Parser, run_script, whole_number

MEMBERS = {"paper": 6, "quick": 4, "smoke": 2}  # of a committee
MEMBER_SEED = 100  # the members' seeds begin here, so that none is a deep model's
KINDS = ("pre-trained", "from scratch")


@dataclass(frozen=True)
class Job:
    """What the command line asks for."""

    data: Path
    tasks: list[str]
    split: str
    preset: str
    recipe: PretrainRecipe
    finetune_recipe: FinetuneRecipe
    deep: str
    member_models: list[str]
    members: int
    seeds: int
    runtime: Runtime


@dataclass(frozen=True)
class Model:
    """A model to train. repeat: from 0; --seeds N trains everything N times."""

    name: str
    seed: int
    repeat: int
    is_member: bool


@dataclass(frozen=True)
class Trained:
    """A fine-tuned classifier."""

    model: Model
    task: str
    kind: str  # one of KINDS
    checkpoint: Path  # the pre-training run, also for a twin from scratch
    folder: Path
    correct: np.ndarray  # (rows,): 1.0 where it is right, else 0.0


def planned_models(job: Job) -> list[Model]:
    """The deep models, then the members. No seed occurs twice (up to 100 --seeds)."""
    models = []
    if job.deep != "none":
        models += [Model(job.deep, repeat, repeat, is_member=False) for repeat in range(job.seeds)]
    for repeat in range(job.seeds):
        for k in range(job.members):
            name = job.member_models[k % len(job.member_models)]
            seed = MEMBER_SEED + repeat * job.members + k
            models.append(Model(name, seed, repeat, is_member=True))
    return models


def tables_of(job: Job, data: DataFolder) -> dict[str, TaskTables]:
    tables = {}
    for task in job.tasks:
        per_class = recipe_for(task, job.finetune_recipe, job.preset).per_class
        tables[task] = make_tables(data, task, job.split, per_class, job.runtime)
    return tables


def train_model(model: Model, job: Job, data: DataFolder,
                tables: dict[str, TaskTables]) -> list[Trained]:
    """Pre-train a model, then fine-tune it and its twin from scratch on each task."""
    checkpoint = pretrain(data, model.name, job.recipe, model.seed, job.runtime)
    start = start_of(checkpoint)
    starts: dict[str, Start] = {"pre-trained": start, "from scratch": start.twin}
    trained = []
    for task in job.tasks:
        recipe = recipe_for(task, job.finetune_recipe, job.preset)
        for kind in KINDS:
            folder = finetune(tables[task], starts[kind], recipe, model.seed, job.runtime)
            correct = is_correct([folder])
            trained.append(Trained(model, task, kind, checkpoint, folder, correct))
    return trained


# ---- several processes on a CPU ------------------------------------------------------------------


def train_in_process(model: Model, job: Job, threads: int) -> None:
    """What a process of train_in_parallel does."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    keep_freed_memory()  # choose_runtime did so in the parent alone

    def train() -> None:
        data = open_folder(job.data)
        train_model(model, job, data, tables_of(job, data))

    run_script(train)


def end_with_parent() -> None:
    """Wait until the parent process is gone, perhaps killed; then save the state and end."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def train_in_parallel(models: Sequence[Model], job: Job, jobs: int) -> None:
    """Train the models, each in a process of its own, `jobs` at a time: a small model has no use
    for two threads. A signal is passed on: each process saves its state and ends.
    """
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // jobs)
    waiting = list(models)
    running: dict[int, BaseProcess] = {}  # by line of the terminal, one for each progress bar
    status, is_ending = 0, False
    with stop_signals() as stop, tqdm(total=len(models), desc="models", position=jobs, unit="model",
                                      leave=False, dynamic_ncols=True) as bar:
        while waiting or running:
            for line in range(jobs):
                if line not in running and waiting:
                    os.environ["TQDM_POSITION"] = str(line)  # read by tqdm in the new process
                    arguments = (waiting.pop(0), job, threads)
                    running[line] = context.Process(target=train_in_process, args=arguments)
                    running[line].start()
            sentinels = [process.sentinel for process in running.values()]
            multiprocessing.connection.wait(sentinels, timeout=0.5)
            for line, process in list(running.items()):
                if process.exitcode is not None:
                    status = status or process.exitcode
                    del running[line]
                    bar.update()
            if (stop or status) and not is_ending:
                is_ending = True
                waiting = []
                for process in running.values():
                    process.terminate()
    os.environ.pop("TQDM_POSITION", None)
    if stop:
        sys.exit(128 + stop[0])
    if status > 0:  # the process has said why
        sys.exit(status)
    if status:
        raise InputError(f"a training process ended with status {status} (-9: killed, perhaps for "
                         "lack of memory). The same command goes on; --jobs 1 needs least memory")


# ---- the table -----------------------------------------------------------------------------------


def committee_correct(trained: Sequence[Trained], size: int) -> list[np.ndarray]:
    """Whether the vote of the first `size` members is right, for each repeat: (rows,)."""
    repeats: dict[int, list[Path]] = {}
    for one in trained:
        if one.model.is_member:
            repeats.setdefault(one.model.repeat, []).append(one.folder)
    return [is_correct(folders[:size]) for folders in repeats.values()]


def table_rows(trained: Sequence[Trained], job: Job) -> dict[str, dict[str, list[np.ndarray]]]:
    """Label in the table -> kind -> for each seed or member: (rows,), 1.0 where it is right."""
    rows: dict[str, dict[str, list[np.ndarray]]] = {}
    for one in trained:
        label = one.model.name + (", one member" if one.model.is_member else "")
        rows.setdefault(label, {}).setdefault(one.kind, []).append(one.correct)
    for size in range(2, job.members + 1):
        label = f"committee of {size} {'+'.join(job.member_models)}"
        for kind in KINDS:
            of_kind = [one for one in trained if one.kind == kind]
            rows.setdefault(label, {})[kind] = committee_correct(of_kind, size)
    return rows


def report_task(tables: TaskTables, trained: Sequence[Trained], job: Job) -> dict:
    """Print a task's table and what it means; returns its part of results.json."""
    print_header(tables)
    print("accuracy in %, with 95 % intervals: over seeds or members, or over rows (one seed)")
    print(f"{'model':30}{'pre-trained':>22}{'from scratch':>22}{'gap':>22}")
    known = yardsticks(tables)
    for name, accuracy in known.items():
        print(f"{name:30}{'':22}{100 * accuracy:>22.1f}")
    rows = table_rows(trained, job)
    record: dict[str, dict] = {}
    gaps: dict[str, Interval] = {}
    for label, pairs in rows.items():
        intervals = {kind: interval(pairs[kind], "seeds or members") for kind in KINDS}
        intervals["gap"] = gaps[label] = gap(pairs, "seeds or members")
        print(f"{label:30}" + "".join(f"{one!s:>22}" for one in intervals.values()))
        record[label] = {kind: asdict(one) for kind, one in intervals.items()}
        record[label]["accuracies"] = {kind: [float(x.mean()) for x in pairs[kind]]
                                       for kind in KINDS}
    for label, difference in gaps.items():
        if not label.startswith("committee"):
            print(difference.sentence(f"{label}: pre-training gives"))
    result = {"yardsticks": known, "table": record}
    if job.deep != "none":
        committee = list(rows.values())[-1]["pre-trained"]  # the last row has all members
        pairs_of_repeats = zip(committee, rows[job.deep]["pre-trained"])
        against = interval([a - b for a, b in pairs_of_repeats])
        print(against.sentence(f"committee of {job.members} against {job.deep}:"))
        result["against_deep"] = asdict(against)
    voters = [one.folder.name for one in trained if one.kind == "pre-trained"
              and one.model.is_member and one.model.repeat == 0]
    return {**result, "voters": voters, "classes": len(tables.task.classes),
            "train_rows": len(tables.train_labels), "test_rows": len(tables.test_labels)}


# ---- latency -------------------------------------------------------------------------------------


@torch.no_grad()
def seconds_for(model: nn.Module, tables: TaskTables, rows: np.ndarray, runtime: Runtime) -> float:
    """Seconds of a forward pass over some rows, which are on the device already."""
    input_ids = tables.test.batch(rows)
    if runtime.device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    with runtime.autocast():
        logits = model(input_ids)
    logits.sum().item()  # waits for the device
    return time.perf_counter() - start


def measure_latency(models: dict[str, nn.Module], tables: TaskTables,
                    runtime: Runtime) -> dict[str, dict[str, float]]:
    """Milliseconds for one real text, and texts a second in batches of 64, of each model.

    The models take turns, so that a busy moment of the machine hits all of them. The first call
    for each shape is slow and does not count.
    """
    order = np.argsort(tables.test.lengths, kind="stable")
    singles = [order[[i]] for i in np.linspace(0, len(order) - 1, 60).astype(int)]
    starts = range(0, max(1, len(order) - 63), max(64, len(order) // 10))
    batches = [order[start : start + 64] for start in starts]  # at most ten, short texts to long
    rounds = [*singles, *batches]
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for rows in 2 * rounds:
        for name, model in models.items():
            seconds[name].append(seconds_for(model, tables, rows, runtime))
    record = {}
    for name, model in models.items():
        one, many = np.split(np.array(seconds[name][len(rounds) :]), [len(singles)])
        low, median, high = 1e3 * np.percentile(one, [10, 50, 90])
        record[name] = {"median": median, "p10": low, "p90": high,
                        "texts_per_s": sum(map(len, batches)) / many.sum(),
                        "parameters": count_parameters(model)}
    return record


def report_latency(trained: Sequence[Trained], tables: TaskTables,
                   job: Job) -> dict[str, dict[str, float]]:
    """Time the first deep model, a member of each shape, and their committee; print the table."""
    models: dict[str, nn.Module] = {}
    voters = []
    for one in trained:
        if one.kind == "pre-trained" and one.model.repeat == 0:
            classifier = load_classifier(one.folder)
            if one.model.is_member:
                voters.append(classifier)
                models.setdefault(f"{one.model.name}, one member", classifier)
            else:
                models[one.model.name] = classifier
    # First the committee, because for_inference changes the members in place
    models[f"committee of {job.members}"] = Committee(voters)
    models = {name: job.runtime.for_inference(model) for name, model in models.items()}
    latency = measure_latency(models, tables, job.runtime)
    print(f"\n{'latency, a text of ' + tables.task.name:30}{'median ms':>12}{'10 to 90 %':>16}"
          f"{'texts/s, 64':>14}{'M parameters':>14}")
    for name, t in latency.items():
        spread = f"{t['p10']:.2f} to {t['p90']:.2f}"
        print(f"{name:30}{t['median']:12.2f}{spread:>16}{t['texts_per_s']:14.0f}"
              f"{t['parameters'] / 1e6:14.2f}")
    return latency


# ---- the language --------------------------------------------------------------------------------


def held_out_sentences(data: DataFolder, count: int = 3) -> list[tuple[str, str]]:
    """(the beginning of a held-out article with [MASK] for one word, the word), `count` times."""
    pieces = data.tokenizer.pieces
    sentences: list[tuple[str, str]] = []
    for start, end in zip(data.held_out.offsets, data.held_out.offsets[1:]):
        if len(sentences) == count:
            break
        ids = data.held_out.tokens[start + 1 : end - 1][:24].tolist()
        names = [pieces.id_to_piece(i) for i in ids]
        begins = [name.startswith("▁") for name in names]
        # A word of one piece and of four letters or more, not among the first, before another word
        words = [k for k in range(4, len(ids) - 1)
                 if begins[k] and begins[k + 1] and len(names[k]) > 4]
        if words and UNK not in ids:
            k = words[len(words) // 2]
            text = f"{pieces.decode(ids[:k])} [MASK] {pieces.decode(ids[k + 1 :])}"
            sentences.append((text, names[k].removeprefix("▁")))
    return sentences


def report_language(trained: Sequence[Trained], data: DataFolder) -> list[dict]:
    """Print what the first model of each name puts in place of [MASK]."""
    record: list[dict] = []
    sentences = held_out_sentences(data)
    if not sentences:  # a writing system without blanks between words
        return record
    models: dict[str, tuple] = {}
    for one in trained:
        if one.model.name not in models:
            models[one.model.name] = load_masked_lm(one.checkpoint)
    print("\nheld-out articles: what the models put in place of [MASK], with probabilities")
    for text, word in sentences:
        print(f"{text} ... ({word})")
        guesses: dict[str, list] = {}
        for name, (model, tokenizer) in models.items():
            guesses[name] = fill_mask(model, tokenizer, text, top=4)[0]
            best = ", ".join(f"{piece.removeprefix('▁')} {p:.2f}" for piece, p in guesses[name])
            print(f"    {name:26}{best}")
        record.append({"text": text, "word": word, "guesses": guesses})
    return record


# ---- the whole job -------------------------------------------------------------------------------


def run_job(job: Job, data: DataFolder, jobs: int) -> None:
    """Train, vote, time, and write results.json. jobs: models trained at once (0: as fits)."""
    started = time.perf_counter()
    print(job.runtime.in_words, flush=True)
    print(data.in_words(), flush=True)
    for task in job.tasks:
        check_entities(job.finetune_recipe.pooling, data.task(task))  # before any training
    models = planned_models(job)
    if not jobs:
        jobs = min(4, torch.get_num_threads()) if job.runtime.device.type == "cpu" else 1
    jobs = min(jobs, len(models))
    if jobs > 1:
        print(f"{len(models)} models, {jobs} at a time", flush=True)
        train_in_parallel(models, job, jobs)
        # All runs are finished now. With fresh, the loop below would train them again.
        job = replace(job, runtime=replace(job.runtime, fresh=False))
    tables = tables_of(job, data)
    trained: list[Trained] = []
    for model in models:
        trained += train_model(model, job, data, tables)  # a finished run is only read
    tasks = {}
    for task in job.tasks:
        of_task = [one for one in trained if one.task == task]
        tasks[task] = report_task(tables[task], of_task, job)
    first = [one for one in trained if one.task == job.tasks[0]]
    latency = report_latency(first, tables[job.tasks[0]], job)
    language = report_language(first, data)
    settings = asdict(job) | {"data": data.id, "dtype": str(job.runtime.dtype)}
    del settings["runtime"]
    folder = job.runtime.runs_dir / "committee" / (
        f"{'-'.join(job.tasks)}-{settings_hash(settings)}")
    record = result_record(settings, seconds=round(time.perf_counter() - started, 1), tasks=tasks,
                           latency_ms=latency, language=language, hardware=job.runtime.in_words)
    write_json(folder / "results.json", record)
    print(f"\n{folder / 'results.json'} written; {record['seconds'] / 60:.1f} minutes in all (what "
          "was there already was not trained again)")


def load_committee(folder: Path, task: str, runtime: Runtime) -> Predictor:
    """The committee of a folder in runs/committee, for one of its tasks ("": the first)."""
    tasks = read_json(folder / "results.json", "tasks")["tasks"]
    name = task or next(iter(tasks), "")
    if "voters" not in tasks.get(name, {}):
        raise InputError(f"{folder}: has no committee for task {name!r}; it has "
                         f"{', '.join(tasks) or 'none'}")
    runs = folder.resolve().parent.parent / "finetune"
    return Predictor([runs / voter for voter in tasks[name]["voters"]], runtime)


def main() -> None:
    fields = [fields_help(PRETRAIN_PRESETS), fields_help(FINETUNE_PRESETS, "--finetune-set")]
    parser = Parser(__doc__, epilog="\n\n".join(fields))
    add_task_flags(parser, "vital, made if missing")
    add = parser.add_argument
    add("--members", type=whole_number(1), metavar="K",
        help=f"number of members (default: {', '.join(f'{p} {n}' for p, n in MEMBERS.items())})")
    add("--member-model", nargs="+", choices=tuple(MODELS), default=["bert-1"], metavar="M",
        help="the members' models, in turn (default bert-1)")
    add("--deep", choices=(*MODELS, "none"), default="bert-6", metavar="M",
        help="the deep model, or none (default %(default)s)")
    add("--seeds", type=whole_number(1), default=1, metavar="N",
        help="repeat everything N times, each with other seeds")
    add("--jobs", type=whole_number(1), default=0, metavar="N",
        help="models trained at once (default: the threads, at most 4; on a GPU 1)")
    add("--set", nargs="+", default=[], metavar="FIELD=VALUE",
        help="other values for the pre-training recipe")
    add("--finetune-set", nargs="+", default=[], metavar="FIELD=VALUE",
        help="other values for the fine-tuning recipe")
    add_run_flags(parser)
    args = parser.parse_args()
    runtime = choose_runtime(args.device, args.dtype, args.runs_dir, args.fresh)
    if args.predict is not None:
        if not args.run:
            raise InputError("--predict: name a finished committee, a folder in runs/committee")
        predict(args.predict, load_committee(args.run, args.task[0] if args.task else "", runtime))
        return
    if args.run:
        raise InputError(f"{args.run}: a committee's folder is named with --predict")
    members = args.members or MEMBERS[args.preset]
    if len(args.member_model) > members:
        raise InputError(f"--member-model: {len(args.member_model)} models and {members} members. "
                         f"Use --members {len(args.member_model)}, or fewer models")
    if args.deep in args.member_model:
        raise InputError(f"--deep {args.deep}: is a member too. Name another model")
    recipe = chosen_recipe(PRETRAIN_PRESETS[args.preset], args.set)
    finetune_recipe = chosen_recipe(FINETUNE_PRESETS[args.preset], args.finetune_set,
                                    "--finetune-set")
    data = open_data(args.data, args.preset)
    job = Job(data.path, chosen_tasks(args.task, data), args.split, args.preset, recipe,
              finetune_recipe, args.deep, args.member_model, members, args.seeds, runtime)
    run_job(job, data, args.jobs)


if __name__ == "__main__":
    run_script(main)
