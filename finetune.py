"""finetune.py - classification: from a checkpoint and from scratch, yardsticks, prediction.

Fifth of the six files. A pre-trained model and its twin from scratch have the same architecture,
rows, recipe and seed. The reported accuracy is the one after the last epoch.

    python finetune.py --checkpoint runs/pretrain/RUN --task fewrel --seeds 3
    python finetune.py --checkpoint RUN1 RUN2 RUN3            one model, three seeds: an interval
    python finetune.py --model bert-1 --data greek            from scratch only
    python finetune.py --checkpoint RUN --confusion           which classes it mixes up
    python finetune.py --predict "Some text." RUN             RUN: a folder in runs/finetune
    python finetune.py --predict - RUN                        each line of the standard input
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import UNKNOWN_WARNING, DataFolder, Rows, Task, TokenTable, damage_named, encode_texts
from data import read_json, rows_a_class, setting_differences, text_lines, unknown_share
from model import MODELS, POOLINGS, BertConfig, Classifier, Committee, vote
from pretrain import PRESETS as PRETRAIN_PRESETS
from pretrain import Batches, DeviceTable, Recipe, Run, Runtime, add_run_flags, base_config
from pretrain import choose_runtime, chosen_recipe, config_of, data_of, fields_help, load_checkpoint
from pretrain import load_settings, load_weights, open_data, option, settings_hash, to_device
from pretrain import tokenizer_of, train, weights_hash
from tokenizer import ENTITIES, FIRST_PIECE, InputError, Parser, run_script, whole_number
from tokenizer import write_atomically


# Training rows of a class; 0: the task's own number
PER_CLASS = {"paper": 0, "quick": 100, "smoke": 5}
QUICK_TOPICS = 10  # rows of a class: few, since pre-training is worth most there


@dataclass(frozen=True)
class FinetuneRecipe(Recipe):
    min_steps: int = option(0, "train for at least this many steps")
    per_class: int = option(0, f"training rows of a class (0: quick {PER_CLASS['quick']}, topics "
                            f"{QUICK_TOPICS}; smoke {PER_CLASS['smoke']}; paper the task's own "
                            "number)")
    pooling: str = option("cls", "what the classifier reads: cls (first token), mean (of all "
                          "tokens), entities (the two marked ones)", choices=POOLINGS)

    def total_steps(self, steps_an_epoch: int) -> int:
        return self.steps or max(super().total_steps(steps_an_epoch), self.min_steps)


PRESETS = {
    "paper": FinetuneRecipe(),
    "quick": FinetuneRecipe(
        epochs=15, min_steps=300, optimizer="muon", lr=1e-3, matrix_lr=0.01, beta2=0.98,
        weight_decay=0.0, clip=1.0, warmup=0.1, pooling="mean"),
    "smoke": FinetuneRecipe(epochs=1, batch_size=8, lr=1e-3, clip=1.0),
}


def recipe_for(task: str, recipe: FinetuneRecipe, preset: str) -> FinetuneRecipe:
    """The recipe with the preset's number of training rows, unless it has its own."""
    own = QUICK_TOPICS if (preset, task) == ("quick", "topics") else PER_CLASS[preset]
    return replace(recipe, per_class=recipe.per_class or own)


# ---- one training --------------------------------------------------------------------------------


@dataclass
class TaskTables:
    """A task's rows as tokens on the device. test: the rows that are scored."""

    data: DataFolder
    task: Task
    split: str
    per_class: int
    test_rows: Rows
    train: DeviceTable
    train_labels: Tensor
    test: DeviceTable
    test_labels: Tensor


def make_tables(data: DataFolder, task_name: str, split: str, per_class: int,
                runtime: Runtime) -> TaskTables:
    """Encode the first per_class training rows of each class, and the rows of the split."""
    task = data.task(task_name)
    train_rows, test_rows = task.rows(split, per_class)
    tables, labels = [], []
    for rows in (train_rows, test_rows):
        table = encode_texts([text for text, _ in rows], data.tokenizer, data.max_length)
        tables.append(DeviceTable(table, runtime.device))
        labels.append(torch.tensor([label for _, label in rows], device=runtime.device))
    return TaskTables(data, task, split, per_class, test_rows, train=tables[0],
                      train_labels=labels[0], test=tables[1], test_labels=labels[1])


@dataclass(frozen=True)
class Start:
    """What a fine-tuning starts from. checkpoint: a pre-training run, or None (from scratch)."""

    model: str
    config: BertConfig
    checkpoint: Path | None = None
    seed: int = 0  # of the pre-training

    @property
    def twin(self) -> Start:
        """The same model from scratch."""
        return replace(self, checkpoint=None)


def check_finished(folder: Path, what: str) -> None:
    """Raises InputError if a run has not ended. what: "training" or "pre-training"."""
    if not (folder / "results.json").exists():
        raise InputError(f"{folder}: its {what} has not ended. Repeat the command that started it: "
                         "it goes on from the last checkpoint")


def start_of(checkpoint: Path) -> Start:
    """A finished pre-training run as a start. Raises InputError if its training has not ended."""
    settings = load_settings(checkpoint, "pretrain")
    if "recipe" in settings:  # an imported model has none
        check_finished(checkpoint, "pre-training")
    return Start(settings["model"], config_of(checkpoint), checkpoint, settings["seed"])


def finetune(tables: TaskTables, start: Start, recipe: FinetuneRecipe, seed: int,
             runtime: Runtime) -> Path:
    """Train a classifier and score it after the last epoch; returns its run folder.

    The folder also gets logits.npz, the logits of the scored rows. A finished run is not trained
    again.
    """
    data, task, checkpoint = tables.data, tables.task, start.checkpoint
    check_entities(recipe.pooling, task)
    config = replace(start.config, dropout=recipe.dropout, pooling=recipe.pooling)
    weights = load_checkpoint(checkpoint)["model"] if checkpoint else {}
    settings = {
        "kind": "finetune", "model": start.model, "config": asdict(config), "seed": seed,
        "checkpoint": [checkpoint.name, weights_hash(weights)] if checkpoint else None,
        "recipe": asdict(recipe), "dtype": str(runtime.dtype), "tokenizer": data.tokenizer.hash,
        "task": task.name, "classes": task.classes, "data": data.id, "split": tables.split}
    origin = checkpoint.name if checkpoint else f"scratch-{start.model}"
    name = f"{task.name}-{origin}-seed{seed}-{settings_hash(settings)}"
    with Run(runtime.runs_dir / "finetune" / name, settings, data.tokenizer, runtime) as run:
        if run.is_finished:
            return run.folder
        torch.manual_seed(seed)
        model = Classifier(config, len(task.classes))
        if checkpoint:
            bert = {name.removeprefix("bert."): x for name, x in weights.items()
                    if name.startswith("bert.")}
            load_weights(model.bert, bert, checkpoint)
        # Exercise: train the classifier's own two layers alone: model.bert.requires_grad_(False)
        # here, and --runs-dir runs/frozen with the old --checkpoint. How much does each accuracy
        # fall: pre-trained, and from scratch?
        model.to(runtime.device)
        batches = Batches(tables.train.lengths, recipe, seed, like_length=True)

        def loss_of(texts: np.ndarray) -> tuple[Tensor, int]:
            labels = tables.train_labels[to_device(texts, runtime.device)]
            with runtime.autocast():
                logits = model(tables.train.batch(texts))
            return F.cross_entropy(logits.float(), labels, reduction="sum"), len(texts)

        figures = train(run, model, recipe, batches, loss_of)
        logits = predict_logits(runtime.for_inference(model), tables.test, runtime)
        labels = tables.test_labels.cpu()
        with write_atomically(run.folder / "logits.npz") as file:
            np.savez_compressed(file, logits=logits.numpy(), labels=labels.numpy())
        accuracy = float((logits.argmax(-1) == labels).double().mean())
        run.finish(accuracy=accuracy, **figures)
    return run.folder


def check_entities(pooling: str, task: Task) -> None:
    """Raises InputError if the classifier is to read two marked entities and a text has none."""
    if pooling == "entities":
        for text, _ in [*task.train, *task.dev, *task.test]:
            check_marks(text, f"task {task.name}")


def check_marks(text: str, where: str) -> None:
    kinds = {bool(head) for head, _ in ENTITIES.findall(text)}
    if kinds != {True, False}:
        raise InputError(f"{where}: pooling=entities reads two marked entities, [#head#] and "
                         f"[@tail@]; one is missing in {text[:60]!r} (FewRel: data.py prepare "
                         "--entity-markers)")


@torch.no_grad()
def predict_logits(model: nn.Module, table: DeviceTable, runtime: Runtime) -> Tensor:
    """The logits of all texts of a table, in its order: (texts, classes), fp32, on the CPU."""
    order = np.argsort(table.lengths, kind="stable")  # texts of similar length together
    parts = []
    for start in range(0, len(order), 64):
        with runtime.autocast():
            parts.append(model(table.batch(order[start : start + 64])).float())
    logits = torch.cat(parts).cpu()
    return logits[np.argsort(order)]


def load_logits(folder: Path) -> tuple[Tensor, Tensor]:
    """A finished run's logits of the scored rows (rows, classes), and their labels (rows,)."""
    path = folder / "logits.npz"
    with damage_named(path), np.load(path, allow_pickle=False) as file:
        return torch.from_numpy(file["logits"]).float(), torch.from_numpy(file["labels"])


def is_correct(folders: Sequence[Path]) -> np.ndarray:
    """Whether the vote of these runs is right, for each row: (rows,) of 1.0 and 0.0."""
    logits, labels = zip(*(load_logits(folder) for folder in folders))
    return (vote(torch.stack(logits)).argmax(-1) == labels[0]).double().numpy()


# ---- intervals -----------------------------------------------------------------------------------

# The 97.5 % quantile of Student's t, for 1 to 19 degrees of freedom. With more, the last one (then
# intervals are a little too wide).
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
         2.145, 2.131, 2.120, 2.110, 2.101, 2.093)


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval, in percent or percentage points."""

    mean: float
    low: float
    high: float
    over: str  # what the interval is taken over

    def __str__(self) -> str:
        return f"{self.mean:.1f} ({self.low:.1f} to {self.high:.1f})"

    def sentence(self, what: str) -> str:
        """One sentence that states the difference, its interval, and whether it may be noise."""
        sure = self.low > 0 or self.high < 0
        verdict = "" if sure else "; not distinguishable from 0"
        return (f"{what} {self.mean:+.1f} points ({self.low:+.1f} to {self.high:+.1f}; {self.over})"
                f"{verdict}")


def interval(values: Sequence[np.ndarray], what: str = "seeds") -> Interval:
    """The mean of values (rows,), and its interval.

    values: for each seed, a number for each row: 1 and 0 for right and wrong, or the difference
    of two models. A t-interval over seeds; for a single seed, a bootstrap over the rows.
    """
    means = 100 * np.array([value.mean() for value in values])
    n = len(means)
    if n > 1:
        t = T_975[min(n - 2, len(T_975) - 1)]
        half = t * means.std(ddof=1) / math.sqrt(n)
        over = f"95 % t-interval over {n} {what}"
        return Interval(means.mean(), means.mean() - half, means.mean() + half, over)
    rng, rows = np.random.default_rng(0), len(values[0])
    samples = [100 * values[0][rng.integers(0, rows, rows)].mean() for _ in range(2_000)]
    low, high = np.percentile(samples, [2.5, 97.5])
    return Interval(means[0], low, high, "95 % bootstrap interval over the scored rows, one seed")


def gap(correct: dict[str, list[np.ndarray]], what: str) -> Interval:
    """The accuracy that pre-training adds, pair by pair."""
    pairs = zip(correct["pre-trained"], correct["from scratch"])
    return interval([a - b for a, b in pairs], what)


# ---- yardsticks ----------------------------------------------------------------------------------
# What the same rows give without a transformer: the share of the largest class, and logistic
# regression on which pieces a text contains.

DECAYS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)


def distinct_pieces(table: TokenTable, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(text, piece) of each piece of each text; a piece counts once in a text."""
    text = np.repeat(np.arange(len(table)), table.lengths)
    return np.divmod(np.unique(text * vocab_size + table.tokens), vocab_size)


def piece_features(table: TokenTable, idf: np.ndarray) -> Tensor:
    """A sparse matrix (texts, V): the idf of each piece in a text, each row with L2 norm 1."""
    text, piece = distinct_pieces(table, len(idf))
    length = np.sqrt(np.bincount(text, weights=idf[piece] ** 2, minlength=len(table)))
    values = torch.from_numpy((idf[piece] / np.maximum(length[text], 1e-9)).astype(np.float32))
    places = torch.from_numpy(np.stack([text, piece]))
    return torch.sparse_coo_tensor(places, values, (len(table), len(idf)), check_invariants=False)


def inverse_document_frequency(table: TokenTable, vocab_size: int) -> np.ndarray:
    """log(texts / texts with the piece), for each piece; 0 for special tokens: (V,)."""
    _, piece = distinct_pieces(table, vocab_size)
    texts_with = np.bincount(piece, minlength=vocab_size)
    idf = np.log(len(table) / np.maximum(texts_with, 1))
    idf[:FIRST_PIECE] = 0
    return idf


def logistic_regression(rows: tuple[Rows, Rows], data: DataFolder, classes: int,
                        decays: Sequence[float]) -> list[float]:
    """The accuracy on the second rows after a fit on the first, for each weight decay."""
    train, test = (encode_texts([text for text, _ in part], data.tokenizer, data.max_length)
                   for part in rows)
    labels, test_labels = (torch.tensor([label for _, label in part]) for part in rows)
    idf = inverse_document_frequency(train, data.tokenizer.vocab_size)
    x, test_x = piece_features(train, idf), piece_features(test, idf)
    weight = torch.zeros(len(idf), classes, requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    accuracies = []
    for decay in decays:  # each fit goes on from the one before
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=60, history_size=10,
                                      line_search_fn="strong_wolfe")

        def closure(optimizer=optimizer, decay=decay) -> Tensor:
            optimizer.zero_grad()
            logits = torch.sparse.mm(x, weight) + bias
            loss = F.cross_entropy(logits, labels) + decay * weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        with torch.no_grad():
            predicted = (torch.sparse.mm(test_x, weight) + bias).argmax(-1)
        accuracies.append(float((predicted == test_labels).double().mean()))
    return accuracies


def yardsticks(tables: TaskTables) -> dict[str, float]:
    """Accuracies without a transformer. The weight decay is chosen on the dev rows."""
    task, classes = tables.task, len(tables.task.classes)
    dev = logistic_regression(task.rows("dev", tables.per_class), tables.data, classes, DECAYS)
    best = int(np.argmax(dev))
    if tables.split == "test":
        rows = task.rows("test", tables.per_class)
        decays = DECAYS[: best + 1]  # as on the dev rows: each fit starts from the one before
        regression = logistic_regression(rows, tables.data, classes, decays)[-1]
    else:
        regression = dev[best]
    largest = tables.test_labels.bincount().max().item() / len(tables.test_labels)
    return {"largest class": largest, "logistic regression": regression}


def print_header(tables: TaskTables) -> None:
    train_rows = rows_a_class(tables.train_labels.tolist())
    print(f"\n{tables.task.name}: {len(tables.task.classes)} classes, {train_rows} training rows "
          f"a class, {len(tables.test_rows)} {tables.split} rows")


def print_confusion(folder: Path, tables: TaskTables) -> None:
    """Print the classes that a run mixes up most often, with two texts of each pair."""
    logits, labels = load_logits(folder)
    predicted = logits.argmax(-1)
    classes, K = tables.task.classes, len(tables.task.classes)
    counts = torch.bincount(labels * K + predicted, minlength=K * K).view(K, K)
    counts.fill_diagonal_(0)
    print(f"most confused by {folder.name}:")
    for cell in counts.flatten().argsort(descending=True, stable=True)[:5].tolist():
        label, other = divmod(cell, K)
        count = int(counts[label, other])
        if count == 0:
            break  # the rest was never mixed up
        total = int((labels == label).sum())
        print(f"  {classes[label]} taken for {classes[other]}: {count} of {total} "
              f"{tables.split} rows")
        rows = ((labels == label) & (predicted == other)).nonzero().flatten()
        for row in rows[:2].tolist():
            print(f"      {' '.join(tables.test_rows[row][0].split())[:100]}")


# ---- prediction ----------------------------------------------------------------------------------


def load_classifier(folder: Path) -> Classifier:
    """The classifier of a finished run, on the CPU. Raises InputError if it is not finished."""
    settings = load_settings(folder, "finetune")
    check_finished(folder, "training")
    model = Classifier(config_of(folder), len(settings["classes"]))
    load_weights(model, load_checkpoint(folder)["model"], folder)
    return model.eval()


class Predictor:
    """Finished fine-tuning runs of one task at work on new texts: one run, or a committee."""

    def __init__(self, folders: Sequence[Path], runtime: Runtime) -> None:
        settings = load_settings(folders[0], "finetune")
        self.classes = settings["classes"]
        self.max_length = settings["config"]["max_length"]
        self.pooling = settings["config"]["pooling"]
        self.tokenizer = tokenizer_of(folders[0])
        self.runtime = runtime
        committee = Committee([load_classifier(folder) for folder in folders])
        self.model = runtime.for_inference(committee)

    @torch.no_grad()
    def __call__(self, text: str) -> dict:
        """Probabilities by class, largest first; the share of unknown tokens; cut off or not."""
        if self.pooling == "entities":
            check_marks(text, "a text to classify")
        table = encode_texts([text], self.tokenizer, self.max_length)
        input_ids = DeviceTable(table, self.runtime.device).batch(np.array([0]))
        with self.runtime.autocast():
            probabilities = vote(self.model(input_ids))[0].tolist()
        best = sorted(zip(self.classes, probabilities), key=lambda pair: -pair[1])
        return {"text": text, "label": best[0][0], "probabilities": dict(best),
                "unknown": unknown_share(table.tokens, self.tokenizer),
                "cut_off": bool(table.cut_off)}


def predict(text: str, predictor: Predictor) -> None:
    """Print a JSON line for the text, or if it is "-", for each line of the standard input."""
    lines: Iterable[str] = [text]
    if text == "-":
        lines = text_lines(sys.stdin.buffer, "standard input")
        torch.set_num_threads(1)  # for one short text, threads cost more than they give
    warned = False
    for line in lines:
        record = predictor(line.rstrip("\n"))
        best = list(record["probabilities"].items())[:5]
        record["probabilities"] = {name: round(p, 4) for name, p in best}
        record["unknown"] = round(record["unknown"], 4)
        print(json.dumps(record, ensure_ascii=False), flush=True)
        if record["unknown"] > 0.5 and not warned:
            print(f"warning: {UNKNOWN_WARNING}", file=sys.stderr, flush=True)
            warned = True


# ---- command line --------------------------------------------------------------------------------


def check_checkpoints(checkpoints: Sequence[Path], data: DataFolder) -> None:
    """Raises InputError unless the checkpoints fit the data and differ in their seeds alone."""
    first = load_settings(checkpoints[0], "pretrain")
    seeds = []
    for checkpoint in checkpoints:
        settings = load_settings(checkpoint, "pretrain")
        if settings["tokenizer"] != data.tokenizer.hash:
            raise InputError(f"{data.path}: its tokenizer is not that of {checkpoint}. Make a "
                             "folder with data.py prepare NAME --tokenizer "
                             f"{checkpoint / 'tokenizer.model'}")
        positions = settings["config"]["max_length"]
        if positions < data.max_length:
            raise InputError(f"{data.path}: texts of {data.max_length} tokens, and {checkpoint} "
                             f"reads {positions}. Make a folder with --max-length {positions}")
        if different := setting_differences(first | {"seed": 0}, settings | {"seed": 0}):
            raise InputError(f"--checkpoint {checkpoint}: differs from the first one in more than "
                             f"its seed ({', '.join(different)}). Give it a command of its own")
        if settings.get("data") != data.id:
            print(f"note: {checkpoint.name} was trained on the articles of another data folder, "
                  f"which may hold test texts of {data.path}", flush=True)
        seeds.append(settings["seed"])
    if len(set(seeds)) < len(seeds):
        raise InputError("--checkpoint: two have the same seed. Name runs with different seeds")


def over_starts(runs: Sequence[Sequence[Path]]) -> list[np.ndarray]:
    """The values for interval(), each (rows,): one for each fine-tuning seed of a single start.

    With several starts, one for each start: the mean over its fine-tuning seeds.
    """
    correct = [[is_correct([folder]) for folder in folders] for folders in runs]
    return [np.mean(values, axis=0) for values in correct] if len(correct) > 1 else correct[0]


def finetune_task(tables: TaskTables, starts: Sequence[Start], recipe: FinetuneRecipe, seeds: int,
                  scratch: bool, confusion: bool, runtime: Runtime) -> None:
    """Fine-tune all starts, and their twins from scratch, on one task; print the accuracies."""
    print_header(tables)
    for name, accuracy in yardsticks(tables).items():
        print(f"  {name:36}{100 * accuracy:6.1f} %")
    over = "pre-training seeds" if len(starts) > 1 else "fine-tuning seeds"
    kinds = ["from scratch"] if scratch or not starts[0].checkpoint else []
    kinds += ["pre-trained"] if starts[0].checkpoint else []
    correct: dict[str, list[np.ndarray]] = {}
    for kind in kinds:
        runs: list[list[Path]] = []
        for start in starts:
            chosen = start if kind == "pre-trained" else start.twin
            # The seed of the pre-training, as in committee.py; then seeds that no start has
            runs.append([finetune(tables, chosen, recipe, 1_000 * n + start.seed, runtime)
                         for n in range(seeds)])
        correct[kind] = over_starts(runs)
        measured = interval(correct[kind], over)
        losses = [read_json(folder / "results.json", "train_loss")["train_loss"]
                  for folders in runs for folder in folders]
        label = f"{starts[0].model} {kind}"
        print(f"  {label:36}{measured.mean:6.1f} %, {measured.low:.1f} to {measured.high:.1f} "
              f"({measured.over}); training loss at the end {np.mean(losses):.3f}; {runs[-1][-1]}")
    if confusion:
        print_confusion(runs[0][0], tables)  # of the pre-trained model, if there is one
    if len(correct) == 2:
        what = f"{tables.task.name}, {starts[0].model}: pre-training gives"
        print(gap(correct, over).sentence(what))


def chosen_tasks(names: Sequence[str], data: DataFolder) -> list[str]:
    """The tasks by name, or all of the folder. Raises InputError if there is none."""
    if not data.meta["tasks"]:
        raise InputError(f"{data.path}: has no task. Make a folder with data.py prepare --task or "
                         "--labels")
    return [data.task(name).name for name in dict.fromkeys(names or data.meta["tasks"])]


def add_task_flags(parser: Parser, default_data: str) -> None:
    """Flags that finetune.py and committee.py share. default_data: in words."""
    add = parser.add_argument
    add("run", nargs="?", type=Path, metavar="RUN", help="with --predict: a finished run")
    add("--data", default="", metavar="NAME", help=f"data folder (default: {default_data})")
    add("--task", nargs="+", default=[], metavar="TASK", help="tasks of the data folder (default: "
        "all)")
    add("--split", choices=("dev", "test"), default="test", help="rows to score. test (default): "
        "train on train and dev rows. dev: for choices")
    add("--predict", metavar="TEXT", help="classify a text with RUN; -: each line of the standard "
        "input")


def main() -> None:
    parser = Parser(__doc__, epilog=fields_help(PRESETS))
    add_task_flags(parser, "the checkpoint's, or vital")
    add = parser.add_argument
    add("--checkpoint", nargs="+", type=Path, default=[], metavar="RUN", help="pre-training runs")
    add("--model", choices=tuple(MODELS), help="without --checkpoint (default bert-1)")
    add("--seeds", type=whole_number(1), default=1, metavar="N",
        help="fine-tune each model N times, with other seeds")
    add("--no-scratch", action="store_true", help="leave out the twin from scratch")
    add("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="other values for the recipe")
    add("--confusion", action="store_true", help="print the classes that are mixed up most")
    add_run_flags(parser)
    args = parser.parse_args()
    runtime = choose_runtime(args.device, args.dtype, args.runs_dir, args.fresh)
    if args.predict is not None:
        if not args.run:
            raise InputError("--predict: name a finished run, a folder in runs/finetune")
        predict(args.predict, Predictor([args.run], runtime))
        return
    if args.run:
        raise InputError(f"{args.run}: to start from a run, write --checkpoint {args.run}")
    if args.checkpoint and args.model:
        raise InputError("--model: a checkpoint has its own model. Leave the flag out")
    if args.no_scratch and not args.checkpoint:
        raise InputError("--no-scratch: without --checkpoint there is nothing else to train")
    recipe = chosen_recipe(PRESETS[args.preset], args.set)
    print(runtime.in_words, flush=True)
    if args.checkpoint and not args.data:
        data = data_of(args.checkpoint[0])
    else:
        data = open_data(args.data, args.preset)
    if args.checkpoint:
        check_checkpoints(args.checkpoint, data)
        starts = [start_of(checkpoint) for checkpoint in args.checkpoint]
    else:
        model = args.model or "bert-1"
        starts = [Start(model, base_config(model, PRETRAIN_PRESETS[args.preset], data))]
    for name in chosen_tasks(args.task, data):
        own = recipe_for(name, recipe, args.preset)
        tables = make_tables(data, name, args.split, own.per_class, runtime)
        finetune_task(tables, starts, own, args.seeds, not args.no_scratch, args.confusion, runtime)


if __name__ == "__main__":
    run_script(main)
