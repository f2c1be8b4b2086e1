"""finetune.py - classification: from a checkpoint or from scratch, evaluation, and prediction for a user's own text.

Fifth of the six files. A pre-trained model and its twin from scratch share tokenizer, rows, seed and number of steps;
what is reported is the accuracy after the last epoch.

    python finetune.py --checkpoint runs/pretrain/bert-1-... --task fewrel --seeds 3     fine-tune it, and its twin
    python finetune.py --checkpoint RUN1 RUN2 --task agnews dbpedia                      several initialisations
    python finetune.py --model bert-1 --data greek                                       from scratch only
    python finetune.py --checkpoint RUN --task agnews --confusion --plot                 what it mixes up; the bars
    python finetune.py --predict "Some text." RUN                                        a finished run at work
    python finetune.py --predict - RUN                                                   on every line of the standard input
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import (UNKNOWN_TEXT, DataFolder, DeviceTable, InputError, Rows, Task, TokenTable, encode_texts, largest_share, rows_a_class,
                  run_script, text_lines, to_device, unknown_share, write_atomically)
from model import MODELS, BertConfig, Classifier, named_config
from pretrain import (LENGTH, PRESETS as PRETRAIN_PRESETS, SHAPE, Batches, Hardware, Optimisation, Run, add_run_flags, can_compile,
                      choose_hardware, chosen_recipe, config_of, data_of, load_checkpoint, load_settings, load_weights, maybe_compile,
                      number, open_data, pyplot, read_json, result_record, save_picture, setting, settings_hash, short_memory_named,
                      tokenizer_of, train, weights_hash, write_json)
from tokenizer import ENTITIES, Parser, Tokenizer


@dataclass(frozen=True)
class FinetuneRecipe(Optimisation):
    """Everything that decides what a fine-tuning run computes, but for initialisation, task and seed."""

    min_steps: int = setting(0, LENGTH, "at least so many steps, however few the rows: more passes are made")
    per_class: int = setting(0, LENGTH, "training rows of a class; 0: as many as the preset uses")
    pooling: str = setting("cls", SHAPE, "what the classifier reads: cls (first token), mean (of all tokens), entities (two, marked)")


PRESETS = {
    "paper": FinetuneRecipe(),
    "quick": FinetuneRecipe(
        epochs=5, min_steps=100, like_length=True, optimizer="muon", lr=3e-3, token_lr=0.3, position_lr=0.1, matrix_lr=0.02,
        beta2=0.98, weight_decay=0.0, decay_all=False, clip=1.0, warmup=0.1, attention_dropout=0.0, pooling="mean"),
    "smoke": FinetuneRecipe(epochs=1, batch_size=8, like_length=True, lr=1e-3, decay_all=False, clip=1.0, attention_dropout=0.0),
}


PER_CLASS = {"paper": 0, "quick": 100, "smoke": 5}  # training rows of a class; 0: all
TOPICS_PER_CLASS = 10  # for quick: the default shows what pre-training gives where labels are few


def with_rows(recipe: FinetuneRecipe, preset: str, task: str) -> FinetuneRecipe:
    """The recipe with the preset's number of training rows for this task, where it names none itself."""
    own = TOPICS_PER_CLASS if (preset, task) == ("quick", "topics") else PER_CLASS[preset]
    return dataclasses.replace(recipe, per_class=recipe.per_class or own)


# ----------------------------------------------------------------------------------------------- one training
@dataclass
class TaskTables:
    """A task as token tables on the device, with its labels. test: the rows that are scored, those of the split."""

    task: Task
    data_id: str
    split: str
    train: DeviceTable
    test: DeviceTable
    train_labels: Tensor
    test_labels: Tensor
    test_rows: Rows

    @classmethod
    def make(cls, data: DataFolder, task: str, split: str, per_class: int, device: torch.device) -> TaskTables:
        chosen = data.task(task)
        parts = chosen.rows(split, per_class)
        train, test = (DeviceTable(encode_texts([text for text, _ in rows], data.tokenizer, data.max_length), device) for rows in parts)
        train_labels, test_labels = (torch.tensor([label for _, label in rows]).to(device) for rows in parts)
        return cls(chosen, data.id, split, train, test, train_labels, test_labels, parts[1])


def check_entities(pooling: str, texts: Iterable[str], where: str) -> None:
    """Raises InputError for a text in which head and tail are not both marked, where those are what the classifier reads."""
    for text in texts if pooling == "entities" else ():
        if {bool(head) for head, _ in ENTITIES.findall(text)} != {True, False}:
            raise InputError(f"{where}: pooling entities reads two marked entities, [#head#] and [@tail@]; not both are in {text[:60]!r} "
                             "(FewRel: data.py prepare --entity-markers)")


def check_task(pooling: str, task: Task) -> None:
    """The same for all the texts of a task."""
    check_entities(pooling, (text for text, _ in [*task.train, *task.dev, *task.test]), f"task {task.name}")


@torch.no_grad()
def predict_logits(model: Callable, table: DeviceTable, hardware: Hardware, batch_size: int = 64) -> Tensor:
    """Logits of every text of a table, in its order: (texts, classes) float32 on the CPU. Texts of like length go together."""
    order = np.argsort(table.lengths, kind="stable")
    parts = []
    for start in range(0, len(order), batch_size):
        with hardware.autocast():
            parts.append(model(table.batch(order[start : start + batch_size])).float())
    result = torch.cat(parts).cpu()
    return torch.empty_like(result).index_copy_(0, torch.from_numpy(order.copy()), result)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(-1) == labels.to(logits.device)).float().mean())


def finetune(checkpoint: Path | None, config: BertConfig, tokenizer: Tokenizer, tables: TaskTables, recipe: FinetuneRecipe,
             seed: int, runs_dir: Path, hardware: Hardware, *, fresh: bool = False, compiled: bool = False, label: str = "",
             wait: bool = False) -> Path:
    """Train a classifier on a task and test it after the last epoch; returns its run folder, which also holds the logits
    of the test rows. A finished run is not trained again.

    checkpoint: a pre-training run, or None for its twin from scratch. The twin begins at N(0, init_std), and its tables learn at the
    full rate, since they hold nothing to spare; for BERT-6 that start is better, for BERT-1 level (results/recipe-search.json).
    wait: as for pretrain.
    """
    check_task(recipe.pooling, tables.task)
    if checkpoint is None:
        config, recipe = dataclasses.replace(config, local_start=0.0), dataclasses.replace(recipe, token_lr=1.0, position_lr=1.0)
    config = dataclasses.replace(config, dropout=recipe.dropout, attention_dropout=recipe.attention_dropout, pooling=recipe.pooling)
    start = load_checkpoint(checkpoint) if checkpoint else None
    origin = None
    if checkpoint and start:
        origin = [checkpoint.name, settings_hash(read_json(checkpoint / "config.json")), weights_hash(start["model"])]
    settings = {"kind": "finetune", "checkpoint": origin, "dtype": str(hardware.dtype), "config": dataclasses.asdict(config),
                "recipe": dataclasses.asdict(recipe), "seed": seed, "tokenizer": tokenizer.hash, "task": tables.task.name,
                "classes": tables.task.classes, "data": tables.data_id, "split": tables.split}
    name = checkpoint.name if checkpoint else f"scratch-{label}"
    folder = runs_dir / "finetune" / f"{tables.task.name}-{name}-seed{seed}-{settings_hash(settings)}"
    with Run(folder, settings, tokenizer, fresh, wait) as run, short_memory_named(folder):
        if run.results:
            return folder
        torch.manual_seed(seed)
        model = Classifier(config, len(tables.task.classes))
        if checkpoint and start:
            load_weights(model.bert, {k.removeprefix("bert."): v for k, v in start["model"].items() if k.startswith("bert.")}, checkpoint)
        # Exercise: train the classifier's head alone (requires_grad_(False) for model.bert). How much of the gap is left?
        model.to(hardware.device)
        compiled = can_compile(compiled)
        fixed_shapes = compiled and not (recipe.micro_batch or config.conv_kernels)

        def summed_loss(input_ids: Tensor, labels: Tensor) -> Tensor:
            with hardware.autocast():
                logits = model(input_ids)
            return F.cross_entropy(logits.float(), labels, reduction="sum")

        compiled_loss = maybe_compile(summed_loss, compiled, fixed_shapes)
        batches = Batches(tables.train.lengths, recipe, seed)
        steps = recipe.steps or max(recipe.epochs * batches.per_epoch, recipe.min_steps)

        def gradients(step: int, backward: Callable[[Tensor], None]) -> tuple[Tensor, int]:
            rows = batches[step]
            total = torch.zeros((), device=hardware.device)
            part = recipe.micro_batch or len(rows)
            for start in range(0, len(rows), part):
                texts = rows[start : start + part]
                labels = tables.train_labels[to_device(texts, hardware.device)]
                # an epoch's last, smaller batch has another shape
                loss_of = summed_loss if fixed_shapes and len(texts) < recipe.batch_size else compiled_loss
                loss = loss_of(tables.train.batch(texts, fixed_shapes), labels) / len(rows)
                backward(loss)
                total += loss.detach()
            return total, int(tables.train.lengths[rows].sum())

        final = train(run, model, recipe, hardware, seed, steps, batches.per_epoch, gradients,
                      label=f"{tables.task.name}: {'fine-tune ' + name if checkpoint else 'from scratch ' + label} {seed}")
        logits = predict_logits(hardware.for_inference(model), tables.test, hardware)
        with write_atomically(folder / "logits.npz") as file:
            np.savez_compressed(file, logits=logits.numpy(), labels=tables.test_labels.cpu().numpy())
        result = accuracy(logits, tables.test_labels)
        kind = "pretrained" if checkpoint else "scratch"
        model_name = load_settings(checkpoint, "pretrain")["model"] if checkpoint else label
        write_json(folder / "results.json", result_record(
            settings, final["seconds"], tasks={tables.task.name: {"models": {model_name: {kind: [result]}}, "committee": {}}},
            latency_ms={}, accuracy=result, train_loss=final["train_loss"], steps=final["steps"], hardware=hardware.reason))
    return folder


def twin_seed(checkpoint: Path | None, number: int) -> int:
    """The seed of fine-tuning number 0, 1, ... of a pre-training run, and of its twin from scratch."""
    return 1_000 * number + (load_settings(checkpoint, "pretrain")["seed"] if checkpoint else 0)


def run_accuracy(folder: Path) -> float:
    return read_json(folder / "results.json", "accuracy", "train_loss")["accuracy"]


def run_probabilities(folder: Path) -> tuple[Tensor, Tensor]:
    """A finished run's class probabilities of the test rows (rows, classes), and the labels (rows,)."""
    try:
        with np.load(folder / "logits.npz", allow_pickle=False) as file:
            return torch.from_numpy(file["logits"]).float().softmax(-1), torch.from_numpy(file["labels"])
    except Exception as error:  # numpy raises a dozen kinds for a damaged file; all mean the same here
        raise InputError(f"{folder / 'logits.npz'}: cannot be read ({error}); delete that run folder, it is made again") from None


def votes(folders: Sequence[Path]) -> list[np.ndarray]:
    """Whether the soft vote of the first 1, 2, ... K runs is right on each test row: K arrays (rows,) of 0 and 1."""
    total: Tensor | float = 0.0
    result = []
    for folder in folders:
        probabilities, labels = run_probabilities(folder)
        total = total + probabilities
        result.append((total.argmax(-1) == labels).double().numpy())
    return result


# ------------------------------------------------------------------------------------------- means and intervals
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
         2.110, 2.101, 2.093, 2.086)  # Student's t, 97.5 %, for 1 to 20 degrees of freedom


def mean_and_interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half-width of the 95 % t-interval); the half-width of a single value is nan."""
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return mean, math.nan
    return mean, (T_975[n - 2] if n - 2 < len(T_975) else 2.08) * float(np.std(values, ddof=1)) / math.sqrt(n)


def difference(first: Sequence[Sequence[np.ndarray]], second: Sequence[Sequence[np.ndarray]]) -> dict[str, float | str]:
    """The difference of two accuracies, in points: mean, low and high end of a 95 % interval, and over what that is taken.

    first, second: right (1) or wrong (0) on each test row, (rows,), of [pre-training seed][fine-tuning seed], pair by pair. The
    interval is a t-interval over pre-training seeds; over fine-tuning seeds, if there is one pre-training seed; over test
    rows (bootstrap), if there is one pair alone.
    """
    differences = [[a - b for a, b in zip(*pair)] for pair in zip(first, second)]  # each (rows,)
    values = unit_values([[float(d.mean()) for d in unit] for unit in differences])
    mean, half = mean_and_interval(values)
    low, high = mean - half, mean + half
    over = f"95 % t-interval over {len(values)} {'pre-training' if len(differences) > 1 else 'fine-tuning'} seeds"
    if len(values) == 1:
        rng, (one,) = np.random.default_rng(0), differences[0]
        low, high = np.percentile([one[rng.integers(0, len(one), len(one))].mean() for _ in range(2_000)], [2.5, 97.5])
        over = "95 % bootstrap interval over test rows; one seed"
    return {"mean": 100 * mean, "low": 100 * float(low), "high": 100 * float(high), "over": over}


def in_words(what: str, d: dict) -> str:
    """One honest sentence on a difference."""
    verdict = "" if d["low"] > 0 or d["high"] < 0 else ": not distinguishable from 0"
    return f"{what} {d['mean']:+.1f} points, {d['low']:+.1f} to {d['high']:+.1f} ({d['over']}){verdict}"


def gap_sentence(what: str, pretrained: Sequence[Sequence[Path]], scratch: Sequence[Sequence[Path]]) -> str:
    """The gap between the fine-tuned runs of [pre-training seed][fine-tuning seed] and their twins from scratch."""
    return in_words(f"{what}: pre-training gives",
                    difference(*([[votes([f])[0] for f in unit] for unit in side] for side in (pretrained, scratch))))


def unit_values(units: Sequence[Sequence[float]]) -> list[float]:
    """What an interval is taken over: the means of the pre-training seeds, or the fine-tuning seeds of a single one."""
    return [float(np.mean(unit)) for unit in units] if len(units) > 1 else list(units[0])


def points(values: Sequence[float]) -> str:
    """Accuracies as a table shows them: mean in %, with the half-width of the interval where there is one."""
    mean, half = mean_and_interval(values)
    return f"{100 * mean:5.1f}" + (f" ± {100 * half:.1f}" if len(values) > 1 else "")


def show_confusion(folder: Path, task: Task, rows: Rows, top: int = 5) -> None:
    """Print the pairs of classes that a finished run mixes up most often, with two of the test texts for each."""
    probabilities, labels = run_probabilities(folder)
    predicted, K = probabilities.argmax(-1), len(task.classes)
    counts = torch.bincount(labels * K + predicted, minlength=K * K).view(K, K)
    counts.fill_diagonal_(0)
    print(f"most confused by {folder.name}:")
    for count, cell in zip(*counts.flatten().topk(min(top, K * K))):
        if not count:
            break
        label, other = divmod(int(cell), K)
        print(f"  {task.classes[label]} taken for {task.classes[other]}: {count} of {int((labels == label).sum())} test rows")
        for i in ((labels == label) & (predicted == other)).nonzero().flatten()[:2]:
            print(f"      {' '.join(rows[int(i)][0].split())[:100]}")


Row = tuple[str, list[float], list[float]]  # of a table: label, accuracies pre-trained, accuracies from scratch


def plot_accuracies(tables: dict[str, list[Row]], path: Path) -> None:
    """Draw a panel for each task: each row's means and their intervals."""
    if not (plt := pyplot()):
        return
    longest = max(map(len, tables.values()))
    figure, panels = plt.subplots(1, len(tables), figsize=(6 * len(tables), 1.6 + 0.5 * longest), squeeze=False, layout="constrained")
    for axes, (task, rows) in zip(panels[0], tables.items()):
        for place, (_, pretrained, scratch) in enumerate(rows):
            for values, colour, offset in ((pretrained, "#0072B2", -0.18), (scratch, "#D55E00", 0.18)):  # safe for the colour-blind
                if values:
                    mean, half = mean_and_interval(values)
                    axes.barh(place + offset, 100 * mean, height=0.34, color=colour, xerr=None if math.isnan(half) else 100 * half,
                              ecolor="0.2", capsize=3)
                    axes.text(1, place + offset, f"{100 * mean:.1f}", va="center", color="white", fontsize=8)
        axes.set(title=task, xlabel="accuracy in % (line: 95 % t-interval)", xlim=(0, 100), yticks=range(len(rows)))
        axes.set_yticklabels([row[0] for row in rows])
        axes.invert_yaxis()
    figure.legend([plt.Rectangle((0, 0), 1, 1, color=c) for c in ("#0072B2", "#D55E00")], ["pre-trained", "from scratch"], ncols=2,
                  loc="outside upper center", frameon=False)
    save_picture(figure, path)


# --------------------------------------------------------------------------------------------------- prediction
def load_classifier(folder: Path) -> Classifier:
    """The classifier of a finished fine-tuning run, as it was saved, on the CPU. Raises InputError for one that is not finished."""
    settings = load_settings(folder, "finetune")
    if not (folder / "results.json").exists():
        raise InputError(f"{folder}: its training has not ended; the same command that began it goes on with it")
    model = Classifier(config_of(folder, "finetune"), len(settings["classes"])).eval()
    load_weights(model, load_checkpoint(folder)["model"], folder)
    return model


class Predictor:
    """A finished fine-tuning run at work on texts of its user; or a committee, then `folder` is one of its members."""

    def __init__(self, folder: Path, hardware: Hardware, committee: nn.Module | None = None) -> None:
        settings = load_settings(folder, "finetune")
        self.classes, self.max_length, self.hardware = settings["classes"], settings["config"]["max_length"], hardware
        self.tokenizer, self.pooling = tokenizer_of(folder, "finetune"), settings["config"]["pooling"]
        self.model = committee or hardware.for_inference(load_classifier(folder))
        self.votes = committee is not None  # what it returns are probabilities already

    def __call__(self, texts: Sequence[str]) -> list[dict[str, float]]:
        """Class name -> probability, likeliest first, for every text."""
        return self.classify(self.encode(texts))

    def encode(self, texts: Sequence[str]) -> TokenTable:
        check_entities(self.pooling, texts, "a text to classify")
        return encode_texts(texts, self.tokenizer, self.max_length)

    @torch.no_grad()
    def classify(self, table: TokenTable, batch_size: int = 64) -> list[dict[str, float]]:
        texts = DeviceTable(table, self.hardware.device)
        result = []
        for start in range(0, len(table), batch_size):
            input_ids = texts.batch(np.arange(start, min(start + batch_size, len(table))))
            with self.hardware.autocast():
                output = self.model(input_ids).float()
            probabilities = (output if self.votes else output.softmax(-1)).cpu()
            result += [dict(sorted(zip(self.classes, row.tolist()), key=lambda pair: -pair[1])) for row in probabilities]
        return result


def add_predict_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--predict", metavar="TEXT", help="classify this text with RUN, as a JSON line; -: each line of the "
                        "standard input, answered as it comes")


def answer(text: str, predictor: Predictor) -> None:
    """--predict TEXT: a JSON line for the text, or for each line of the standard input. "unknown" is the share of unknown tokens."""
    if text == "-":
        torch.set_num_threads(1)  # for one short text, threads cost more than they give
    warned = False
    for line in text_lines(sys.stdin.buffer, "standard input") if text == "-" else [text]:
        line = line.rstrip("\n")
        table = predictor.encode([line])
        (probabilities,) = predictor.classify(table)
        best = {name: round(p, 4) for name, p in list(probabilities.items())[:5]}
        unknown, cut_off = unknown_share(table.tokens, predictor.tokenizer), bool(table.cut_off)
        record = {"text": line, "label": next(iter(best)), "probabilities": best, "unknown": round(unknown, 4), "cut_off": cut_off}
        print(json.dumps(record, ensure_ascii=False), flush=True)
        if unknown > 0.5 and not warned:
            print("warning: " + UNKNOWN_TEXT, file=sys.stderr, flush=True)
            warned = True


# ------------------------------------------------------------------------------------------------- command line
Start = tuple[Path | None, BertConfig, Tokenizer]  # a pre-training run or None (from scratch), and what the model is built from


def starting_points(checkpoints: Sequence[Path], data: DataFolder, model: str, preset: str) -> dict[str, list[Start]]:
    """What is fine-tuned: the checkpoints by label (those that differ in their seeds alone are one row of the table), or, where
    there are none, a model from scratch."""
    starts: dict[str, list[Start]] = {}
    read: list[dict] = []
    for checkpoint in checkpoints:
        settings = load_settings(checkpoint, "pretrain")
        label = f"{settings['model']}-{settings_hash({k: v for k, v in settings.items() if k != 'seed'})[:4]}"
        if settings in read:
            raise InputError(f"--checkpoint {checkpoint}: the same model, text and seed as one before it; an interval is over other seeds")
        read.append(settings)
        check_folder(checkpoint, data)
        starts.setdefault(label, []).append((checkpoint, config_of(checkpoint), tokenizer_of(checkpoint)))
    if starts:
        return starts
    recipe = PRETRAIN_PRESETS[preset]
    config = named_config(model, recipe.width, recipe.heads, vocab_size=data.tokenizer.vocab_size, max_length=data.max_length,
                          norm=recipe.norm)
    return {model: [(None, config, data.tokenizer)]}


def check_folder(checkpoint: Path, data: DataFolder) -> None:
    """Raises InputError for a data folder with another tokenizer than the checkpoint's; says so where it is another folder."""
    settings = load_settings(checkpoint, "pretrain")
    if settings["tokenizer"] != data.tokenizer.hash:
        raise InputError(f"{data.path}: its tokenizer is not that of {checkpoint}; make a folder with data.py prepare NAME --tokenizer "
                         f"{checkpoint / 'tokenizer.model'}")
    if (positions := config_of(checkpoint).max_length) < data.max_length:
        raise InputError(f"{data.path}: its texts have up to {data.max_length} tokens, and {checkpoint} has {positions} positions; "
                         f"make a folder with --max-length {positions}")
    if settings.get("data") != data.id:
        print(f"note: {checkpoint.name} was trained on the articles of another data folder, which may hold test texts of {data.path}",
              flush=True)


@dataclass(frozen=True)
class Work:
    """What a command asks for, beside models and tasks: the same for every run."""

    data: DataFolder
    split: str
    seeds: int
    recipe: FinetuneRecipe
    preset: str
    runs_dir: Path
    hardware: Hardware
    fresh: bool
    compiled: bool


def finetune_twins(task: str, label: str, starts: list[Start], work: Work, scratch: bool) -> dict[str, list[list[Path]]]:
    """Fine-tune each start, and with scratch its twin: finished runs of "pre-trained" and "from scratch", [start][fine-tuning seed]."""
    runs: dict[str, list[list[Path]]] = {}
    recipe = with_rows(work.recipe, work.preset, task)
    tables = TaskTables.make(work.data, task, work.split, recipe.per_class, work.hardware.device)
    for checkpoint, config, tokenizer in starts:
        for start in dict.fromkeys([checkpoint, None] if scratch else [checkpoint]):
            runs.setdefault("pre-trained" if start else "from scratch", []).append([
                finetune(start, config, tokenizer, tables, recipe, twin_seed(checkpoint, j), work.runs_dir, work.hardware,
                         fresh=work.fresh, compiled=work.compiled, label=label) for j in range(work.seeds)])
    return runs


def command_line() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("run", nargs="?", type=Path, help="with --predict: a finished run under runs/finetune/")
    parser.add_argument("--checkpoint", nargs="+", type=Path, default=[], metavar="RUN",
                        help="pre-training runs to start from")
    parser.add_argument("--scratch", action=argparse.BooleanOptionalAction, default=True, help="also train the twin from scratch")
    parser.add_argument("--model", choices=tuple(MODELS), default="bert-1", help="without --checkpoint (default %(default)s)")
    parser.add_argument("--data", default="", metavar="NAME", help="a data folder (default: the checkpoint's; without one: vital)")
    parser.add_argument("--task", nargs="+", metavar="TASK", help="tasks of the folder (default: all)")
    parser.add_argument("--split", choices=("dev", "test"), default="test", help="test: train on train and dev rows and score the test "
                        "rows; dev: for choices, train on train rows and score dev rows (default %(default)s)")
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="other values for fields of the recipe (per_class=20)")
    parser.add_argument("--seeds", type=number(1), default=1, metavar="N", help="fine-tuning seeds of each model (default %(default)s)")
    parser.add_argument("--confusion", action="store_true", help="also print the most confused classes, with test texts")
    parser.add_argument("--plot", action="store_true", help="also draw the accuracies, beside the table's .json (needs matplotlib)")
    add_predict_flags(parser)
    add_run_flags(parser)
    return parser


def main() -> None:
    args = command_line().parse_args()
    hardware = choose_hardware(args.device, args.dtype)
    if args.predict is not None:
        if not args.run:
            raise InputError("--predict needs the folder of a finished run, under runs/finetune/")
        answer(args.predict, Predictor(args.run, hardware))
        return
    if args.run:
        raise InputError(f"{args.run}: a run is named with --predict; to start from one, write --checkpoint {args.run}")
    recipe = chosen_recipe(PRESETS[args.preset], args.set)
    print(hardware.reason, flush=True)
    if args.data or not args.checkpoint:
        data = open_data(args.data, args.preset)
    else:
        data = data_of(args.checkpoint[0])
    names = args.task or list(data.meta["tasks"])
    if not names:
        raise InputError(f"{data.path}: holds no task; make a folder with --task or --labels (data.py prepare)")
    work = Work(data, args.split, args.seeds, recipe, args.preset, args.runs_dir, hardware, args.fresh, args.compile)
    tasks = [data.task(name) for name in names]
    starts = starting_points(args.checkpoint, data, args.model, args.preset)
    started = time.perf_counter()
    record: dict[str, dict] = {}
    drawn: dict[str, list[Row]] = {}
    for task in tasks:
        train, scored = ([label for _, label in rows] for rows in
                         task.rows(args.split, with_rows(recipe, args.preset, task.name).per_class))
        print(f"{task.name}: {len(task.classes)} classes, {rows_a_class(train)} training rows a class, {len(scored)} {args.split} rows; "
              f"always naming the largest class: {100 * largest_share(scored):.1f} %")
        record[task.name] = {"models": {}, "committee": {}, "largest_class": largest_share(scored)}
        for label, group in starts.items():
            runs = finetune_twins(task.name, label, group, work, args.scratch)
            values = {kind: [list(map(run_accuracy, unit)) for unit in units] for kind, units in runs.items()}
            for kind, units in runs.items():
                losses = [read_json(f / "results.json", "train_loss")["train_loss"] for unit in units for f in unit]
                print(f"{task.name} {label} {kind}: accuracy {points(unit_values(values[kind]))} %, "
                      f"last training loss {np.mean(losses):.3f}; {units[-1][-1]}")
            record[task.name]["models"][label] = {{"pre-trained": "pretrained", "from scratch": "scratch"}[kind]: sum(units, [])
                                                  for kind, units in values.items()}
            pretrained, scratch = (unit_values(values[kind]) if kind in values else [] for kind in ("pre-trained", "from scratch"))
            drawn.setdefault(task.name, []).append((label, pretrained, scratch))
            if args.confusion:
                show_confusion(next(iter(runs.values()))[0][0], task, task.rows(args.split)[1])
            if len(runs) == 2:
                print(gap_sentence(f"{task.name} {label}", *runs.values()))
    settings = {k: str(v) for k, v in sorted(vars(args).items()) if v is not None and k not in ("fresh", "confusion", "plot")}
    path = args.runs_dir / "finetune" / f"table-{settings_hash(settings)}.json"
    write_json(path, result_record(settings, time.perf_counter() - started, tasks=record, latency_ms={}, hardware=hardware.reason))
    print(f"{path} written")
    if args.plot:
        plot_accuracies(drawn, path.with_suffix(".png"))


if __name__ == "__main__":
    run_script(main)
