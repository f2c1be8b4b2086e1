"""committee.py - the soft committee of shallow models against the deep one: trains what is missing, votes, times, tabulates.

Last of the six files, and the one to run first: it does the whole job, from raw text to the table.

    python committee.py                                                         the embedded default, minutes on two cores
    python committee.py --data simple --task fewrel --members 6 --seeds 3       on data/simple, made by data.py prepare
    python committee.py --predict "Some text." runs/committee/RUN               a finished committee at work

The members of a committee are pre-trained separately, with their own seeds for initialisation, article order, masks and
fine-tuning; they share the articles, and with --count-start what counting tells of them. Their vote is soft: the mean of their
class probabilities (paper, section on committees).
"""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from data import DataFolder, InputError, Task, largest_share, open_folder, rows_a_class, run_script
from finetune import (PRESETS as FINETUNE_PRESETS, FinetuneRecipe, Predictor, Row, TaskTables, add_predict_flags, answer, check_task,
                      difference, finetune, gap_sentence, in_words, load_classifier, plot_accuracies, points, run_accuracy,
                      run_probabilities, twin_seed, unit_values, votes, with_rows)
from model import MODELS, BertConfig, Classifier, Committee, count_operations, count_parameters
from pretrain import (PRESETS as PRETRAIN_PRESETS, Hardware, PretrainRecipe, add_run_flags, checked, choose_hardware, chosen_recipe,
                      config_of, load_settings, number, open_data, pretrain, read_json, result_record, settings_hash, stop_signals,
                      write_json)
from tokenizer import Parser, in_one_line

MEMBERS = {"paper": 6, "quick": 4, "smoke": 2}  # of a committee, where the command line says nothing
MEMBER_SEED = 100  # members' pre-training seeds begin here, so that none is a deep model's


# ------------------------------------------------------------------------------------------------------- voting
class SoftCommittee(nn.Module):
    """The mean of the members' class probabilities. Members of one shape go through as one batched pass."""

    def __init__(self, members: Sequence[Classifier]) -> None:
        super().__init__()
        groups: dict[BertConfig, list[Classifier]] = {}
        for member in members:
            groups.setdefault(member.config, []).append(member)
        self.groups = nn.ModuleList(Committee(group) for group in groups.values())
        self.size = len(members)

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids: (B, T) -> probabilities (B, classes)."""
        # Exercise: let each member vote for one class and the majority win. When does that cost most, with many classes or with few?
        return sum(group(input_ids).float().softmax(-1).sum(0) for group in self.groups) / self.size


# ------------------------------------------------------------------------------------------------------- timing
@torch.no_grad()
def measure_latency(models: dict[str, Callable], tables: TaskTables, hardware: Hardware, texts: int = 60) -> dict[str, dict[str, float]]:
    """Milliseconds to classify one real test text, and texts a second in batches of 64, of each model.

    The models take turns on the same texts, so that a busy moment of the machine hits all of them alike; each text and each batch has
    run once before it counts, as the first of its shape is slow.
    """
    def seconds(model: Callable, rows: np.ndarray) -> float:
        input_ids = tables.test.batch(rows)
        if hardware.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        with hardware.autocast():
            result = model(input_ids)
        result.sum().item()  # waits for the device
        return time.perf_counter() - start

    lengths = tables.test.lengths
    single = np.linspace(0, len(lengths) - 1, texts).astype(int)
    batches = np.array_split(np.argsort(lengths)[: 64 * (len(lengths) // 64)], len(lengths) // 64)[:: max(1, len(lengths) // 640)] \
        if len(lengths) >= 64 else [np.arange(len(lengths))]
    for row in single:
        for model in models.values():
            seconds(model, np.array([row]))  # warm-up
    one: dict[str, list[float]] = {name: [] for name in models}
    many: dict[str, list[float]] = {name: [] for name in models}
    for row in single:
        for name, model in models.items():
            one[name].append(1e3 * seconds(model, np.array([row])))
    for rows in batches:
        for name, model in models.items():
            seconds(model, rows)  # warm-up
            many[name].append(seconds(model, rows))
    return {name: {"p10": float(np.percentile(one[name], 10)), "median": float(np.median(one[name])),
                   "p90": float(np.percentile(one[name], 90)),
                   "texts_per_s": sum(map(len, batches)) / sum(many[name])} for name in models}


def price(config: BertConfig, tokens: int, classes: int) -> dict[str, float]:
    """Parameters and operations (for a text of so many tokens) of one classifier."""
    with torch.device("meta"):
        parameters = count_parameters(Classifier(config, classes))
    return {"parameters": parameters, "operations": count_operations(config, tokens, classes)}


# --------------------------------------------------------------------------------------------------- the whole job
Unit = tuple[str, PretrainRecipe, int]  # what is trained: a named model, its recipe, its seed


@dataclass(frozen=True)
class Job:
    """What the command line asks for; recipe, finetune_recipe: for pre-training and fine-tuning; seeds: of fine-tuning."""

    data: Path
    tasks: list[str]
    split: str
    preset: str
    recipe: PretrainRecipe
    finetune_recipe: FinetuneRecipe
    members: int
    member_model: list[str]
    deep: str
    deep_time_budget: float | None
    seeds: int
    repeats: int
    device: str
    dtype: str
    compiled: bool
    fresh: bool
    runs_dir: Path


def planned(job: Job) -> tuple[list[Unit], list[list[Unit]]]:
    """(the deep models, one a repeat; the members, K a repeat). Repeats have their own seeds, and share no member."""
    recipe = job.recipe
    deep_recipe = recipe if job.deep_time_budget is None else dataclasses.replace(recipe, time_budget=job.deep_time_budget)
    checked(deep_recipe)
    return ([(job.deep, deep_recipe, repeat) for repeat in range(job.repeats) if job.deep != "none"],
            [[(job.member_model[k % len(job.member_model)], recipe, MEMBER_SEED + repeat * job.members + k)
              for k in range(job.members)] for repeat in range(job.repeats)])


def pretrain_unit(unit: Unit, data: DataFolder, job: Job, hardware: Hardware, fresh: bool, wait: bool = False) -> Path:
    model, recipe, seed = unit
    return pretrain(model, recipe, data, seed, job.runs_dir, hardware, fresh=fresh, compiled=job.compiled, wait=wait)


def make_tables(data: DataFolder, task: str, job: Job, hardware: Hardware) -> TaskTables:
    """A task's rows as this job trains on and scores them."""
    return TaskTables.make(data, task, job.split, with_rows(job.finetune_recipe, job.preset, task).per_class, hardware.device)


def finetune_unit(checkpoint: Path, pretrained: bool, data: DataFolder, tables: TaskTables, job: Job, hardware: Hardware,
                  wait: bool = False) -> list[Path]:
    """Fine-tuned runs of a pre-trained model, or of its twin from scratch, one a fine-tuning seed."""
    recipe = with_rows(job.finetune_recipe, job.preset, tables.task.name)
    return [finetune(checkpoint if pretrained else None, config_of(checkpoint), data.tokenizer, tables, recipe, twin_seed(checkpoint, j),
                     job.runs_dir, hardware, fresh=job.fresh, compiled=job.compiled, label=model_of(checkpoint), wait=wait)
            for j in range(job.seeds)]


def model_of(checkpoint: Path) -> str:
    return load_settings(checkpoint, "pretrain")["model"]


def end_with_parent() -> None:
    """Wait until the process that started this one is gone, perhaps killed, then end this one as SIGTERM does: with a checkpoint."""
    parent = multiprocessing.parent_process()
    assert parent
    multiprocessing.connection.wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def work(material: multiprocessing.SimpleQueue, queue: multiprocessing.SimpleQueue, errors: multiprocessing.SimpleQueue, lock: object,
         threads: int) -> None:
    """What one of several processes does: take what all need, then the next job, (number of a unit, None) for pre-training or (number
    of a unit, (number of a task, with or without pre-training)), until there is none. What bad input has to say goes to `errors`."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    tqdm.set_lock(lock)
    try:
        units, job = material.get()
        data, hardware = open_folder(job.data), choose_hardware(job.device, job.dtype)
        while (step := queue.get()) is not None:
            number, then = step
            checkpoint = pretrain_unit(units[number], data, job, hardware, fresh=job.fresh and not then, wait=True)
            if then:
                tables = make_tables(data, job.tasks[then[0]], job, hardware)
                finetune_unit(checkpoint, then[1], data, tables, job, hardware, wait=True)
    except (InputError, OSError) as error:
        errors.put(in_one_line(error))
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def train_in_parallel(processes_wanted: int, units: list[Unit], job: Job) -> None:
    """Pre-train the units, then fine-tune each and its twin on every task, in several processes, which share the threads:
    models this small do not know what to do with two. The first units are begun first, and should be the slowest.

    A signal is passed on: each process saves its checkpoint and ends, and so does this one. Raises InputError where a process did,
    or was killed.
    """
    jobs: list[tuple[int, tuple[int, bool] | None]] = [(unit, None) for unit in range(len(units))]
    jobs += [(unit, (task, pretrained)) for unit in range(len(units)) for task in range(len(job.tasks)) for pretrained in (True, False)]
    context = multiprocessing.get_context("spawn")
    material, queue, errors, lock = context.SimpleQueue(), context.SimpleQueue(), context.SimpleQueue(), context.RLock()

    def hand_out() -> None:
        """In a thread, which may be left waiting for a process that is killed before it has taken its part; as arguments of the
        process, `start` would."""
        for _ in range(processes_wanted):
            material.put((units, job))
        for step in [*jobs, *[None] * processes_wanted]:
            queue.put(step)

    processes: list[multiprocessing.process.BaseProcess] = []
    failed: list[int] = []
    with stop_signals() as stop:
        for line in range(processes_wanted):
            os.environ["TQDM_POSITION"] = str(line)  # read by tqdm in the new process: a line for each bar
            processes.append(context.Process(target=work, daemon=True, args=(
                material, queue, errors, lock, max(1, torch.get_num_threads() // processes_wanted))))
            processes[-1].start()
        del os.environ["TQDM_POSITION"]
        threading.Thread(target=hand_out, daemon=True).start()
        while alive := [p for p in processes if p.is_alive()]:
            failed = failed or [p.exitcode for p in processes if p.exitcode]  # the first to fail, before others are told to end
            if stop or failed:
                for process in alive:
                    process.terminate()
            multiprocessing.connection.wait([p.sentinel for p in alive], timeout=0.5)
        failed = failed or [p.exitcode for p in processes if p.exitcode]
    if stop:
        sys.exit(128 + stop[0])
    if failed:
        raise InputError(errors.get() if not errors.empty() else f"a training process ended with status {failed[0]} (killed for memory, "
                         "if -9); the same command goes on from the last checkpoints, and --jobs 1 needs the least memory")


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error: how far the likeliest class' probability lies from the share of rows where it is right, on average
    over rows in bins of like probability (Guo et al., 2017). probabilities: (rows, classes); labels: (rows,)."""
    confidence, predicted = probabilities.max(-1)
    right = (predicted == labels).double()
    which = (confidence * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, dtype=torch.double).index_add_(0, which, right - confidence.double())
    return float(gaps.abs().sum() / len(labels))


def agreement(predictions: Sequence[Tensor] | Tensor) -> float:
    """Share of the rows on which two members predict the same class, mean over all pairs."""
    return float(np.mean([float((a == b).double().mean()) for a, b in itertools.combinations(predictions, 2)]))


def describe_votes(deep: Sequence[Path], groups: Sequence[Sequence[Path]]) -> dict[str, float]:
    """Calibration of the deep runs, the members and their committees, and the members' agreement: means over all there are.

    deep: fine-tuned runs; groups: the members of each committee.
    """
    values: dict[str, list[float]] = {"deep": [calibration_error(*run_probabilities(f)) for f in deep]}
    for group in groups:
        read, labels = zip(*map(run_probabilities, group))
        members = torch.stack(read)  # (K, rows, classes)
        values.setdefault("member", []).extend(calibration_error(p, labels[0]) for p in members)
        values.setdefault("committee", []).append(calibration_error(members.mean(0), labels[0]))
        values.setdefault("agreement", []).extend([agreement(members.argmax(-1))] if len(group) > 1 else [])
    return {name: float(np.mean(x)) for name, x in values.items() if x}


KINDS = ("pretrained", "scratch")
Right = dict[str, list[list[list[np.ndarray]]]]  # kind -> right (1) or wrong (0) by row, of [repeat][fine-tuning seed][the first K members]


def table_rows(models: dict[str, dict[str, list[float]]], right: Right, job: Job) -> list[Row]:
    """(label, accuracies pre-trained, accuracies from scratch) of each model and each size of committee; an accuracy for each of what
    the interval is taken over."""
    rows: list[Row] = []
    for model, values in models.items():
        label = model + (f", mean of {len(values['pretrained']) // job.seeds}" if model != job.deep else "")
        pretrained, scratch = (unit_values([values[kind][i : i + job.seeds] for i in range(0, len(values[kind]), job.seeds)])
                               for kind in KINDS)
        rows.append((label, pretrained, scratch))
    for k in range(2, job.members + 1):
        pretrained, scratch = (unit_values([[float(seed[k - 1].mean()) for seed in repeat] for repeat in right[kind]]) for kind in KINDS)
        rows.append((f"committee of {k} {'+'.join(job.member_model)}", pretrained, scratch))
    return rows


def print_table(tables: TaskTables, rows: list[Row], deep: str) -> None:
    task = tables.task
    print(f"\n{task.name}: {len(task.classes)} classes, {rows_a_class(tables.train_labels.tolist())} training rows a class, "
          f"{len(tables.test_rows)} {tables.split} rows; always naming the largest class: "
          f"{100 * largest_share(tables.test_labels.tolist()):.1f} %\n"
          "accuracy in % (±: 95 % t-interval over pre-training seeds, or over fine-tuning seeds where there is one pre-training seed)")
    print(f"{'model':34}{'pre-trained':>16}{'from scratch':>16}{'gap':>8}")
    deep_accuracy = {label: np.mean(pretrained) for label, pretrained, _ in rows}.get(deep)
    for label, pretrained, scratch in rows:
        note = f"{100 * np.mean(pretrained) / deep_accuracy:.1f} % of {deep}" if deep_accuracy and label.startswith("committee") else ""
        gap = 100 * (np.mean(pretrained) - np.mean(scratch))
        print(f"{label:34}{points(pretrained):>16}{points(scratch):>16}{gap:>+8.1f}  {note}".rstrip())


def contenders(deep: Sequence[Path], members: Sequence[Path], job: Job, hardware: Hardware) -> dict[str, Callable]:
    """Who is timed: the deep model (if there is one), the slowest member, and the committee. deep, members: fine-tuned runs."""
    classifiers = [hardware.for_inference(load_classifier(member)) for member in members]
    slowest = max(classifiers, key=lambda c: count_operations(c.config, 128))
    return {**{job.deep: hardware.for_inference(load_classifier(folder)) for folder in deep},
            "member": slowest, f"committee-{job.members}": SoftCommittee(classifiers)}


def judge_task(task: Task, data: DataFolder, deep_runs: list[Path], member_runs: list[list[Path]], job: Job,
               hardware: Hardware) -> tuple[dict, list[Path], list[Path]]:
    """Fine-tune every model and its twin on a task, vote, print the table.

    deep_runs, member_runs: pre-training runs, one a repeat (none with --deep none), and K a repeat.
    Returns (the task's part of results.json; the first deep model's fine-tuned run, if any; the first committee's).
    """
    tables = make_tables(data, task.name, job, hardware)
    deep: dict[str, list[list[Path]]] = {}  # kind -> fine-tuned runs, [repeat][fine-tuning seed]
    groups: dict[str, list[list[list[Path]]]] = {}  # [repeat][member][fine-tuning seed]
    members: dict[str, list[list[Path]]] = {}  # the same, [member of any repeat][fine-tuning seed]
    models: dict[str, dict[str, list[float]]] = {}
    for kind in KINDS:
        deep[kind], *groups[kind] = [[finetune_unit(run, kind == "pretrained", data, tables, job, hardware) for run in runs]
                                     for runs in (deep_runs, *member_runs)]
        members[kind] = sum(groups[kind], [])
        for checkpoint, unit in zip([*deep_runs, *sum(member_runs, [])], deep[kind] + members[kind]):
            models.setdefault(model_of(checkpoint), {}).setdefault(kind, []).extend(map(run_accuracy, unit))
    right: Right = {kind: [[votes([member[j] for member in group]) for j in range(job.seeds)] for group in groups[kind]] for kind in KINDS}
    name = "+".join(job.member_model)

    rows = table_rows(models, right, job)
    print_table(tables, rows, job.deep)
    result: dict[str, object] = {}
    if deep_runs:
        deep_right = [[votes([folder])[0] for folder in unit] for unit in deep["pretrained"]]
        against_deep = difference([[c[-1] for c in repeat] for repeat in right["pretrained"]], deep_right)
        print(in_words(f"committee of {job.members} against {job.deep}:", against_deep))
        print(gap_sentence(job.deep, *deep.values()))
        result["against_deep"] = against_deep
    print(gap_sentence(name, *members.values()))
    last_loss = {kind: max(read_json(f / "results.json", "train_loss")["train_loss"] for f in sum(deep[kind] + members[kind], []))
                 for kind in KINDS}
    print(f"largest last training loss: pre-trained {last_loss['pretrained']:.3f}, from scratch {last_loss['scratch']:.3f}")
    quality = describe_votes(sum(deep["pretrained"], []),
                             [[member[j] for member in group] for group in groups["pretrained"] for j in range(job.seeds)])
    print("expected calibration error: " + ", ".join(f"{n} {v:.3f}" for n, v in quality.items() if n != "agreement")
          + (f"; two members agree on {100 * quality['agreement']:.0f} % of the rows" if job.members > 1 else ""))

    first = [unit[0] for unit in groups["pretrained"][0]]  # the committee that is timed, and kept for --predict
    curves = {kind: [[float(k.mean()) for k in seed] for repeat in right[kind] for seed in repeat] for kind in KINDS}
    return {"models": models, "committee": {name: curves["pretrained"]}, "committee_scratch": {name: curves["scratch"]}, "table": rows,
            "tokens": int(np.median(tables.test.lengths)), "classes": len(task.classes), "train_rows": len(tables.train_labels),
            "test_rows": len(tables.test_rows), "note": task.note, "voters": [folder.name for folder in first], "train_loss": last_loss,
            "quality": quality, **result}, [unit[0] for unit in deep["pretrained"][:1]], first


def print_prices(latency: dict[str, dict[str, float]], prices: dict[str, dict[str, float]], task: str, tokens: int) -> None:
    print(f"\n{'latency, one text of ' + task:34}{'median ms':>10}{'10-90 %':>16}{'texts/s, 64':>13}{'M parameters':>14}"
          f"{'M operations':>14}")
    for model, t in latency.items():
        spread = f"{t['p10']:.2f}-{t['p90']:.2f}"
        print(f"{model:34}{t['median']:10.2f}{spread:>16}{t['texts_per_s']:13.0f}{prices[model]['parameters'] / 1e6:14.2f}"
              f"{prices[model]['operations'] / 1e6:14.1f}")
    print(f"(member: the slowest one, the committee's critical path with a device for each; operations: for {tokens} tokens)")


def load_committee(folder: Path, task: str, hardware: Hardware) -> Predictor:
    """The finished committee of a folder under runs/committee/, for one of its tasks ("": the first)."""
    tasks = read_json(folder / "results.json").get("tasks", {})
    name = task or next(iter(tasks), "")
    if "voters" not in tasks.get(name, {}):
        raise InputError(f"{folder}: no committee for task {name!r} in it; it has {', '.join(tasks) or 'none'}")
    members = [folder.resolve().parent.parent / "finetune" / voter for voter in tasks[name]["voters"]]
    return Predictor(members[0], hardware, SoftCommittee([hardware.for_inference(load_classifier(member)) for member in members]))


def command_line() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("run", nargs="?", type=Path, help="with --predict: a finished committee under runs/committee/")
    group = parser.add_argument_group("who votes")
    group.add_argument("--members", type=number(1), metavar="K", help="members of the committee (default: quick 4, paper 6)")
    group.add_argument("--member-model", nargs="+", choices=tuple(MODELS), default=["bert-1"], metavar="MODEL",
                       help=f"of the members, taken in turn if several (default bert-1); one of {', '.join(MODELS)}")
    group.add_argument("--deep", choices=(*MODELS, "none"), default="bert-6", help="the model to reach (default %(default)s)")
    group.add_argument("--deep-time-budget", type=float, metavar="X", help="minutes of pre-training for the deep model (default: as for "
                       "the members, --time-budget)")
    group.add_argument("--seeds", type=number(1), default=1, metavar="N", help="fine-tuning seeds of each model (default %(default)s)")
    group.add_argument("--repeats", type=number(1), default=1, metavar="N",
                       help="independent deep models and committees, for intervals over pre-training (default %(default)s)")
    group.add_argument("--jobs", type=number(1), metavar="N",
                       help="models trained at once, in processes that share the threads (default: the threads, at most 4; on a GPU 1)")
    group.add_argument("--plot", action="store_true", help="also draw the table, beside results.json (needs matplotlib)")
    group.add_argument("--out", type=Path, metavar="FILE", help="write the results, JSON, to FILE too")
    add_predict_flags(parser)
    add_run_flags(parser)
    group = parser.add_argument_group("text and recipes")
    group.add_argument("--data", default="", metavar="NAME", help="a data folder, made by data.py (default: vital, made if missing)")
    group.add_argument("--task", nargs="+", metavar="TASK", help="tasks of the folder (default: all)")
    group.add_argument("--split", choices=("dev", "test"), default="test", help="which rows are scored; dev rows for choices")
    group.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="other values for the pre-training recipe")
    group.add_argument("--finetune-set", nargs="+", default=[], metavar="FIELD=VALUE", help="other values for the fine-tuning recipe")
    return parser


def train_and_judge(job: Job, data: DataFolder, jobs: int, out: Path | None, plot: bool) -> None:
    """The whole job: pre-training, fine-tuning, tables, results.json. jobs: models trained at once (0: as many as fit)."""
    started = time.perf_counter()
    deep, members = planned(job)
    hardware = choose_hardware(job.device, job.dtype)
    print(hardware.reason, flush=True)
    tasks = [data.task(name) for name in job.tasks]
    for task in tasks:
        check_task(job.finetune_recipe.pooling, task)  # before anything is pre-trained
    print(data.in_words(), flush=True)
    units = [*deep, *sum(members, [])]
    jobs = min(len(units), jobs or (min(4, torch.get_num_threads()) if hardware.device.type == "cpu" else 1))
    if jobs > 1:
        print(f"{jobs} processes with {max(1, torch.get_num_threads() // jobs)} threads each", flush=True)
        train_in_parallel(jobs, units, job)
        job = dataclasses.replace(job, fresh=False)  # all there is, is new
    deep_runs = [pretrain_unit(unit, data, job, hardware, job.fresh) for unit in deep]
    member_runs = [[pretrain_unit(unit, data, job, hardware, job.fresh) for unit in group] for group in members]
    results = {task.name: judge_task(task, data, deep_runs, member_runs, job, hardware) for task in tasks}

    result, deep_one, voters = results[tasks[0].name]
    tokens = result["tokens"]
    tables = make_tables(data, job.tasks[0], job, hardware)
    latency = measure_latency(contenders(deep_one, voters, job, hardware), tables, hardware)
    all_members = [price(config_of(c), tokens, len(tasks[0].classes)) for c in member_runs[0]]
    prices = {job.deep: price(config_of(run), tokens, len(tasks[0].classes)) for run in deep_runs[:1]}
    prices["member"] = max(all_members, key=lambda p: p["operations"])
    prices[f"committee-{job.members}"] = {k: sum(p[k] for p in all_members) for k in all_members[0]}
    print_prices(latency, prices, tasks[0].name, tokens)
    seconds = time.perf_counter() - started
    settings = {k: v for k, v in dataclasses.asdict(job).items() if k not in ("data", "fresh", "runs_dir", "compiled")} | {"data": data.id}
    pretraining = {c.name: {k: v for k, v in read_json(c / "results.json").items() if k in
                            ("held_out_loss", "held_out_accuracy", "unigram_loss", "steps", "tokens", "seconds")}
                   for c in [*deep_runs, *sum(member_runs, [])]}
    record = result_record(settings, seconds, tasks={name: part for name, (part, *_) in results.items()}, latency_ms=latency,
                           price=prices, pretraining=pretraining, jobs=jobs, hardware=hardware.reason)
    folder = job.runs_dir / "committee" / f"{'-'.join(t.name for t in tasks)}-{settings_hash(settings)}"
    folder.mkdir(parents=True, exist_ok=True)
    for path in (folder / "results.json", *([out] if out else [])):
        write_json(path, record)
    if plot:
        plot_accuracies({name: part["table"] for name, (part, *_) in results.items()}, folder / "accuracies.png")
    print(f"\n{folder / 'results.json'} written; {seconds / 60:.1f} minutes in all (what was there already was not trained again)")
    if tasks[0].name == "topics":
        print("next, on the paper's data: python data.py prepare simple --wiki simplewiki --task fewrel; python committee.py --data simple")


def main() -> None:
    args = command_line().parse_args()
    if args.predict is not None:
        if not args.run:
            raise InputError("--predict needs the folder of a finished committee, under runs/committee/")
        hardware = choose_hardware(args.device, args.dtype)
        answer(args.predict, load_committee(args.run, args.task[0] if args.task else "", hardware))
        return
    if args.run:
        raise InputError(f"{args.run}: a committee's folder is named with --predict")
    if args.out and (args.out.is_dir() or not args.out.resolve().parent.is_dir()):
        raise InputError(f"--out {args.out}: name a file, in a folder that exists")
    if args.deep == "none" and args.deep_time_budget is not None:
        raise InputError("--deep-time-budget: there is no deep model; leave --deep none out")
    if args.deep in args.member_model:
        raise InputError(f"--deep {args.deep}: is a member too; name another model")
    data = open_data(args.data, args.preset)
    tasks = args.task or list(data.meta["tasks"])
    if not tasks:
        raise InputError(f"{data.path}: holds no task; make a folder with --task or --labels (data.py prepare)")
    job = Job(data.path, tasks, args.split, args.preset, chosen_recipe(PRETRAIN_PRESETS[args.preset], args.set),
              chosen_recipe(FINETUNE_PRESETS[args.preset], args.finetune_set, "--finetune-set"), args.members or MEMBERS[args.preset],
              args.member_model, args.deep, args.deep_time_budget, args.seeds, args.repeats, args.device, args.dtype, args.compile,
              args.fresh, args.runs_dir)
    train_and_judge(job, data, args.jobs or 0, args.out, args.plot)


if __name__ == "__main__":
    run_script(main)
