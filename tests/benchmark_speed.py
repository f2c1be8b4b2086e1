"""How fast the scripts are, beside the authors' way and beside the machine's own limit; writes results/speed-cpu.json or speed-<gpu>.json.

The authors' way is tests/reference_recipe.py: Hugging Face's BERT, the vocabulary head on all positions, every text padded to 128, fp32
on a CPU, fp16 autocast on a GPU. The two take turns (A B A B), each in a process of its own; a row has the medians of both, with their
spread (the committees run once). Ours come from the logs of real runs of the scripts' own functions (`pretrain`, `finetune`,
`predict_logits`, `measure_latency`): what is timed is what users run. The limit is a plain matrix product in the same type, measured in the
same run, over the operations that a token needs with the vocabulary head on masked positions only.

    python data.py prepare speed --preset paper --articles '...' --task fewrel   a data folder with the paper's vocabulary
    python tests/benchmark_speed.py --data speed --quick                       some 4 minutes on two cores
    python tests/benchmark_speed.py --grow                                     how cost grows; results/speed-growth-....json
    python tests/benchmark_speed.py --profile                                  where a step's time goes; results/speed-profile-....json
    python tests/benchmark_speed.py --together                                 K members in one batched pass; results/speed-together-....json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from committee import SoftCommittee, measure_latency  # noqa: E402
from data import DataFolder, DeviceTable, InputError, Task, TokenTable, data_path, decode_texts, encode_texts, open_folder, run_script  # noqa: E402
from finetune import PRESETS as FINETUNE_PRESETS, TaskTables, finetune, predict_logits  # noqa: E402
from model import MODELS, BertConfig, Classifier, MaskedLM, count_operations, count_parameters, named_config  # noqa: E402
from pretrain import (PRESETS, Hardware, PretrainRecipe, choose_hardware, keep_freed_memory, mask_tokens, maybe_compile,  # noqa: E402
                      most_masked, pretrain, result_record, write_json)
from reference_recipe import Reference, build, classification_step, make_optimizer, padded, training_step  # noqa: E402
from tokenizer import PAD  # noqa: E402

PAPER, QUICK, LENGTH = PRESETS["paper"], PRESETS["quick"], 128
PEAKS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}  # of dense bf16 products a second, by NVIDIA's data sheets (SXM)
Rates = list[float]


@dataclass
class Bench:
    """What the rows need: texts, a task, the hardware, and a folder for runs that are thrown away."""

    corpus: DataFolder
    task: Task
    hardware: Hardware
    folder: Path

    @property
    def reference_dtype(self) -> torch.dtype:
        return torch.float16 if self.hardware.device.type == "cuda" else torch.float32

    def tables(self, test_rows: int) -> TaskTables:
        tables = TaskTables.make(self.corpus, self.task.name, "test", 0, self.hardware.device)
        rows = self.task.test[:: max(1, len(self.task.test) // test_rows)][:test_rows]
        test = DeviceTable(encode_texts([text for text, _ in rows], self.corpus.tokenizer, LENGTH), self.hardware.device)
        labels = torch.tensor([label for _, label in rows], device=self.hardware.device)
        return replace(tables, test=test, test_labels=labels, test_rows=rows)

    def untrimmed(self, tables: TaskTables, part: str) -> TokenTable:
        """The "train" or "test" rows as a table that the reference pads by itself."""
        rows = tables.test_rows if part == "test" else self.task.rows("test")[0]
        return encode_texts([text for text, _ in rows], self.corpus.tokenizer, LENGTH)

    def throw_away(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.folder))


def full_length(table: TokenTable, texts: int, length: int = LENGTH) -> TokenTable:
    """So many texts of exactly `length` tokens, cut from a table's stream of tokens."""
    return TokenTable(np.resize(table.tokens, texts * length), np.arange(texts + 1, dtype=np.int64) * length, length)


# ------------------------------------------------------------------------------------------- ours, by the scripts' own functions
def passes(device: torch.device) -> int:
    """How often to predict: on a GPU, where the first time is spent on preparations, twice, and the second counts."""
    return 2 if device.type == "cuda" else 1


def logged_rates(folder: Path) -> Rates:
    """Tokens/s of a run's log lines, but for the first, in which everything warms up."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["tokens_per_s"] for line in lines if "tokens_per_s" in line][1:]


def our_pretraining(bench: Bench, model: str, recipe: PretrainRecipe, steps: int, compiled: bool = False) -> Rates:
    """Tokens/s of steps of pretrain.py."""
    with contextlib.redirect_stdout(sys.stderr):
        return logged_rates(pretrain(model, replace(recipe, steps=steps + 1), bench.corpus, 0, bench.throw_away(), bench.hardware,
                                     compiled=compiled))


def our_finetuning(bench: Bench, model: str, steps: int, compiled: bool = False) -> Rates:
    """Texts/s of steps of finetune.py under the `paper` recipe, but with batches of like length as in `quick`."""
    tables = bench.tables(64)
    recipe = replace(FINETUNE_PRESETS["paper"], steps=steps + 1, like_length=True)
    config = named_config(model, PAPER.width, vocab_size=bench.corpus.tokenizer.vocab_size, max_length=LENGTH)
    with contextlib.redirect_stdout(sys.stderr):
        folder = finetune(None, config, bench.corpus.tokenizer, tables, recipe, 0, bench.throw_away(), bench.hardware, compiled=compiled,
                          label=model)
    return [rate / float(tables.train.lengths.mean()) for rate in logged_rates(folder)]


def our_classifier(bench: Bench, model: str) -> Classifier:
    config = named_config(model, PAPER.width, vocab_size=bench.corpus.tokenizer.vocab_size, max_length=LENGTH)
    return bench.hardware.for_inference(Classifier(config, len(bench.task.classes)))


def our_prediction(bench: Bench, rows: int) -> Rates:
    """Texts/s of classifying the test rows with the paper's BERT-6."""
    model, table, seconds = our_classifier(bench, "bert-6"), bench.tables(rows).test, 0.0
    for _ in range(passes(bench.hardware.device)):
        start = time.perf_counter()
        predict_logits(model, table, bench.hardware)
        seconds = time.perf_counter() - start
    return [len(table.lengths) / seconds]


def our_committee(bench: Bench, K: int, texts: int) -> dict[str, dict[str, float]]:
    """What measure_latency tells of the paper's BERT-6 and of K of its BERT-1s."""
    models = {"bert-6": our_classifier(bench, "bert-6"), "committee": SoftCommittee([our_classifier(bench, "bert-1") for _ in range(K)])}
    return measure_latency(models, bench.tables(128), bench.hardware, texts=texts)


# --------------------------------------------------------------------------------------------------------- the authors' way
def synchronised(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Theirs:
    """A model of theirs with its optimizer, and steps of theirs."""

    def __init__(self, bench: Bench, reference: Reference, classes: int = 0, dtype: torch.dtype | None = None) -> None:
        self.bench, self.reference, self.device = bench, reference, bench.hardware.device
        self.dtype = dtype or bench.reference_dtype
        self.model = build(reference, classes).to(self.device).train()
        self.optimizer, self.generator = make_optimizer(self.model, reference), torch.Generator().manual_seed(0)

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def timed(self, steps: int, step: Callable[[np.ndarray], Tensor], unit: int) -> Rates:
        rates, B = [], self.reference.batch_size
        together = 10 if self.device.type == "cuda" else 1  # steps, so that a GPU's host may run ahead, as ours does
        with self.autocast():
            step(np.arange(B))  # warm-up
        for _ in range(max(1, steps // together)):
            start = synchronised(self.device)
            for i in range(together):
                with self.autocast():
                    step(np.arange(i * B, (i + 1) * B))  # the same texts again and again: all are padded to one length
            rates.append(together * B * unit / (synchronised(self.device) - start))
        return rates

    def pretraining(self, steps: int) -> Rates:
        """Tokens/s."""
        return self.timed(steps, lambda rows: training_step(
            self.model, self.optimizer, padded(self.bench.corpus.articles, rows, LENGTH), self.reference, self.generator), LENGTH)

    def finetuning(self, tables: TaskTables, table: TokenTable, steps: int) -> Rates:
        """Texts/s."""
        return self.timed(steps, lambda rows: classification_step(
            self.model, self.optimizer, padded(table, rows, LENGTH).to(self.device), tables.train_labels[rows]), 1)

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        """ids: (B, T), padded to 128 here -> (B, classes)."""
        ids = nn.functional.pad(ids, (0, LENGTH - ids.size(1)), value=PAD)
        with self.autocast():
            return self.model(input_ids=ids, attention_mask=(ids != PAD).long()).logits.float()

    def prediction(self, table: TokenTable, rows: int) -> Rates:
        """Texts/s."""
        self.model.eval()
        seconds = 0.0
        for _ in range(passes(self.device)):
            start = synchronised(self.device)
            for first in range(0, rows, 64):
                self.logits(padded(table, np.arange(first, min(first + 64, rows)), LENGTH).to(self.device))
            seconds = synchronised(self.device) - start
        return [rows / seconds]


def their_pretraining(bench: Bench, reference: Reference, steps: int, dtype: torch.dtype | None = None) -> Rates:
    return Theirs(bench, reference, dtype=dtype).pretraining(steps)


def their_finetuning(bench: Bench, reference: Reference, steps: int) -> Rates:
    tables, theirs = bench.tables(64), Theirs(bench, reference, len(bench.task.classes))
    return theirs.finetuning(tables, bench.untrimmed(tables, "train"), steps)


def their_prediction(bench: Bench, reference: Reference, rows: int) -> Rates:
    return Theirs(bench, reference, len(bench.task.classes)).prediction(bench.untrimmed(bench.tables(rows), "test"), rows)


def their_committee(bench: Bench, reference: Reference, K: int, texts: int) -> dict[str, dict[str, float]]:
    """What measure_latency tells of K models of theirs, asked one after the other."""
    members = [Theirs(bench, reference, len(bench.task.classes)) for _ in range(K)]
    for member in members:
        member.model.eval()
    return measure_latency({"committee": partial(in_turn, members)}, bench.tables(128), bench.hardware, texts=texts)


@torch.no_grad()
def in_turn(members: Sequence[Theirs], ids: Tensor) -> Tensor:
    """Their soft vote: (B, T) -> probabilities (B, classes)."""
    return sum(member.logits(ids).softmax(-1) for member in members) / len(members)


# -------------------------------------------------------------------------------------------------------- measuring and telling
Result = TypeVar("Result")


def apart(work: Callable[[], Result]) -> tuple[Result, float]:
    """Run in a process of its own: (its result, the most memory it held in GB; 0 where the system does not tell)."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure_peak, (work,))


def measure_peak(work: Callable[[], Result]) -> tuple[Result, float]:
    result = work()
    if torch.cuda.is_available():
        return result, torch.cuda.max_memory_allocated() / 1e9
    with contextlib.suppress(OSError):  # getrusage would count what the parent held when it started this process
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
        return result, int(found[1]) / 1e6 if found else 0.0
    return result, 0.0


def matrix_product_rate(hardware: Hardware, seconds: float = 2.0) -> float:
    """Floating-point operations a second of (4096 x 768) @ (768 x 3072) in the type that training uses: the best of many."""
    a, b = (torch.randn(shape, device=hardware.device).to(hardware.dtype) for shape in ((4096, 768), (768, 3072)))
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = synchronised(hardware.device)
        for _ in range(20 if hardware.device.type == "cuda" else 1):
            a @ b
        done = synchronised(hardware.device) - start
        best = max(best, 2 * 4096 * 768 * 3072 * (20 if hardware.device.type == "cuda" else 1) / done)
    return best


def alternate(ours: Callable[[], Rates], theirs: Callable[[], Rates], rounds: int) -> tuple[Rates, Rates, dict[str, float]]:
    """A B A B, each side in a process of its own: (our rates, their rates, the most memory that each held)."""
    rates: tuple[Rates, Rates] = [], []
    peaks = [0.0, 0.0]
    spawn = multiprocessing.get_context("spawn").Pool
    with spawn(1) as first, spawn(1) as second:
        for _ in range(rounds):
            for side, (pool, work) in enumerate(((first, ours), (second, theirs))):
                found, peaks[side] = pool.apply(measure_peak, (work,))
                rates[side].extend(found)
    return *rates, {"ours_memory_gb": peaks[0], "reference_memory_gb": peaks[1]}


def row(name: str, unit: str, ours: Rates | float, reference: Rates | float, target: float, **more) -> dict:
    """A row of the table: medians, their ratio, 10th and 90th percentiles. Where less is better (ms, s, GB), the ratio is turned round."""
    def spread(values: Rates | float) -> tuple[float, list[float]]:
        values = np.atleast_1d(values)
        return float(np.median(values)), [float(np.percentile(values, 10)), float(np.percentile(values, 90))]

    (a, a_spread), (b, b_spread) = spread(ours), spread(reference)
    ratio = a / b if unit.endswith(("/s", "%")) else b / a
    record = {"name": name, "ours": a, "reference": b, "unit": unit, "ratio": ratio, "target": target, "met": ratio >= target,
              "ours_10_90": a_spread, "reference_10_90": b_spread, **more}
    print(f"{name:58}{a:12.5g}{b:12.5g} {unit:9}{ratio:8.2f}{target:8.2f}  {'met' if record['met'] else 'not met'}", flush=True)
    return record


def operations_of_a_token(config: BertConfig) -> float:
    """Floating-point operations of a training step, the vocabulary head working on masked positions only, for each of its tokens."""
    return 3 * count_operations(config, LENGTH, masked=round(0.15 * LENGTH)) / LENGTH


@dataclass
class Table:
    """What the rows of the table have in common. rounds: how often the two sides take turns."""

    bench: Bench
    args: argparse.Namespace
    rounds: int
    rate: float  # of a plain matrix product, floating-point operations a second

    @property
    def cuda(self) -> bool:
        return self.bench.hardware.device.type == "cuda"

    @property
    def quick(self) -> bool:
        return self.args.quick

    @property
    def steps(self) -> int:
        """Of the reference; ours are faster, and do several times as many."""
        return 300 if self.cuda else 1 if self.quick else 2

    def against(self, name: str, unit: str, ours: Callable[[], Rates], theirs: Callable[[], Rates], target: float, **more) -> dict:
        our_rates, their_rates, memory = alternate(ours, theirs, self.rounds)
        return row(name, unit, our_rates, their_rates, target, **memory, **more)

    def paper(self) -> Iterator[dict]:
        bench, V = self.bench, self.bench.corpus.tokenizer.vocab_size
        for model, target in (("bert-6", 3.7), ("bert-1", 7.0)):
            operations = operations_of_a_token(named_config(model, PAPER.width, vocab_size=V))
            limit = self.rate / operations
            step = self.against(
                f"pre-training step, paper's {model}, 32 x 128, dropout 0.1", "tokens/s",
                partial(our_pretraining, bench, model, PAPER, 4 * self.steps, self.cuda),
                partial(their_pretraining, bench, Reference(layers=MODELS[model][0], vocab_size=V), self.steps), target, limit=limit)
            yield step
            if not self.cuda:  # which is measured against its peak below
                median, *spread = (100 * rate / limit for rate in (step["ours"], *step["ours_10_90"]))
                yield row("    its share of the machine's limit", "%", median, 80.0, 1.0, ours_10_90=spread, reference_is="the target")
            if model == "bert-6":
                yield row("    its peak memory", "GB", step["ours_memory_gb"], step["reference_memory_gb"], 1 / 0.6)
                if self.cuda:
                    yield from self.shares_of_the_peak(step["ours"], operations)

    def shares_of_the_peak(self, rate: float, operations: float) -> Iterator[dict]:
        """rate: tokens/s of the paper's BERT-6 with its 32 texts a step."""
        yield row("    the paper's whole pre-training, 576 M tokens", "minutes", 50 * 90_000 * LENGTH / rate / 60, 10.0, 1.0,
                  reference_is="the target")
        peak = next((peak for name, peak in PEAKS.items() if name in torch.cuda.get_device_name()), math.nan)
        large, _ = apart(partial(our_pretraining, self.bench, "bert-6", replace(PAPER, batch_size=256), self.steps, True))
        for texts, rates, least in ((32, [rate], 0.3), (256, large, 0.45)):
            yield row(f"    % of the GPU's bf16 peak, {texts} x 128", "%", list(100 * np.array(rates) * operations / peak), 100 * least, 1.0,
                      reference_is="the target")

    def classify(self) -> Iterator[dict]:
        bench, deep, test = self.bench, Reference(vocab_size=self.bench.corpus.tokenizer.vocab_size), 128 if self.quick else 512
        yield self.against(f"fine-tuning step, paper's bert-6, {bench.task.name}", "texts/s",
                           partial(our_finetuning, bench, "bert-6", 4 * self.steps, self.cuda), partial(their_finetuning, bench, deep, self.steps), 7.0)
        yield self.against(f"prediction, paper's bert-6, {bench.task.name}", "texts/s", partial(our_prediction, bench, test),
                           partial(their_prediction, bench, deep, test), 8.0)

    def committee(self) -> Iterator[dict]:
        texts, shallow = (20 if self.quick else 60), Reference(layers=1, vocab_size=self.bench.corpus.tokenizer.vocab_size)
        latency, _ = apart(partial(our_committee, self.bench, 5, texts))
        ours, theirs = latency["committee"], apart(partial(their_committee, self.bench, shallow, 5, texts))[0]["committee"]
        yield row("soft committee of 5 paper's bert-1, 1 text", "ms", ours["median"], theirs["median"], 3.0, ours_p10_p90=[ours["p10"], ours["p90"]])
        yield row("    the same against our own bert-6, 1 text", "ms", ours["median"], latency["bert-6"]["median"], 1.0)
        yield row("soft committee of 5 paper's bert-1, batches of 64", "texts/s", ours["texts_per_s"], theirs["texts_per_s"], 6.0)

    def small(self) -> Iterator[dict]:
        many, bench = (600 if self.cuda else 20 if self.quick else 60), replace(self.bench, corpus=small_vocabulary(self.bench.corpus, 4_000))
        for model in ("bert-6", "bert-1"):
            reference = Reference(layers=MODELS[model][0], width=QUICK.width, heads=QUICK.heads, vocab_size=4_000, dropout=0.0)
            yield self.against(f"pre-training step, quick's {model}, 4,000 pieces", "tokens/s",  # the start from counts is no part of a step
                               partial(our_pretraining, bench, model, replace(QUICK, count_start=0.0), many, self.cuda),
                               partial(their_pretraining, bench, reference, many // 3, bench.hardware.dtype), 2.5)

    def stems(self) -> Iterator[dict]:
        few = replace(PAPER, batch_size=32 if self.cuda else 4)
        for model in ("bert-1-conv2",) if self.quick else ("bert-1-conv2", "bert-1-conv2-narrow", "bert-1-conv3", "bert-1-conv2-k16"):
            config = named_config(model, PAPER.width)
            reference = Reference(layers=1, width=config.width, heads=config.heads, vocab_size=self.bench.corpus.tokenizer.vocab_size,
                                  conv_channels=config.conv_channels, conv_kernels=config.conv_kernels, batch_size=few.batch_size, fault_stem=True)
            steps = 40 if self.cuda else 2 * self.steps
            yield self.against(f"pre-training step, paper's {model}, {few.batch_size} x 128", "tokens/s",
                               partial(our_pretraining, self.bench, model, few, 2 * steps),  # not compiled: its shapes vary
                               partial(their_pretraining, self.bench, reference, steps), 2.0)

    def host(self) -> Iterator[dict]:
        """What no GPU has a part in."""
        (seconds, texts), peak = apart(partial(encode, self.bench.corpus.path, 10_000 if self.quick else 90_000))
        yield row(f"encode {texts} openings", "s", seconds, 20.0 * texts / 90_000, 1.0, reference_is="the target")
        yield row("    its peak memory", "GB", peak, 1.0, 1.0, reference_is="the target")
        yield row("classifying lines of stdin as they come, bert-1, width 256", "texts/s", lines_a_second(self.bench, 300), 200.0, 1.0,
                  reference_is="the target")
        yield row("start to first step", "s", [start_to_first_step(self.bench.corpus.path, self.bench.folder)], 4.0, 1.0, reference_is="the target")


SECTIONS = ("paper", "classify", "committee", "small", "stems", "host")  # methods of Table


def all_rows(bench: Bench, args: argparse.Namespace) -> Iterator[dict]:
    rate, cuda = matrix_product_rate(bench.hardware), bench.hardware.device.type == "cuda"
    print(f"{bench.hardware.reason}; matrix products: {rate / 1e9:.0f} GFLOP/s\n"
          f"{'':58}{'ours':>12}{'reference':>12} {'unit':9}{'ratio':>8}{'target':>8}")
    table = Table(bench, args, 3 if not args.quick else 1 if cuda else 2, rate)  # on a GPU, each round compiles anew
    for section in args.rows:
        yield from getattr(table, section)()


@dataclass
class Pieces:
    """What pretrain.py asks of a tokenizer."""

    vocab_size: int
    hash: str
    model: bytes


def small_vocabulary(corpus: DataFolder, size: int) -> DataFolder:
    """The same texts under a tokenizer of fewer pieces: ids beyond it are folded back. For timing alone."""
    def fold(table: TokenTable) -> TokenTable:
        tokens = np.where(table.tokens < size, table.tokens, 5 + table.tokens % (size - 5)).astype(np.uint16)
        return TokenTable(tokens, table.offsets, table.max_length)

    pieces: Any = Pieces(size, corpus.tokenizer.hash, corpus.tokenizer.model)
    return replace(corpus, tokenizer=pieces, articles=fold(corpus.articles), held_out=fold(corpus.held_out))


def encode(folder: Path, count: int) -> Rates:
    """[seconds to encode the openings, how many]."""
    data = open_folder(folder)
    texts = decode_texts(data.articles.subset(np.arange(min(count, len(data.articles)))), data.tokenizer)
    start = time.perf_counter()
    encode_texts(texts, data.tokenizer, LENGTH)
    return [time.perf_counter() - start, len(texts)]


def start_to_first_step(folder: Path, runs: Path) -> float:
    """Seconds from `python pretrain.py --data ...` to its first logged step."""
    command = [sys.executable, str(ROOT / "pretrain.py"), "--data", f"{folder.resolve()}/", "--set", "steps=1", "width=64", "--fresh",
               "--name", "speed-start", "--runs-dir", str(runs)]
    log, start = runs / "pretrain" / "speed-start" / "log.jsonl", time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (log.exists() and "tokens_per_s" in log.read_text(encoding="utf-8")):
            time.sleep(0.02)
        seconds = time.perf_counter() - start
    if process.returncode:
        raise InputError(f"{' '.join(command)}: ended with status {process.returncode}")
    return seconds


def lines_a_second(bench: Bench, lines: int) -> float:
    """Short texts a second through `finetune.py --predict -`, each line sent when the one before is answered."""
    config = named_config("bert-1", 256, vocab_size=bench.corpus.tokenizer.vocab_size, max_length=LENGTH)
    with contextlib.redirect_stdout(sys.stderr):
        run = finetune(None, config, bench.corpus.tokenizer, bench.tables(64), replace(FINETUNE_PRESETS["quick"], steps=1), 0,
                       bench.throw_away(), bench.hardware, label="bert-1")
    texts = [" ".join(text.split())[:60].encode() + b"\n" for text, _ in bench.task.test[: lines + 20]]
    command = [sys.executable, str(ROOT / "finetune.py"), "--predict", "-", str(run), "--device", bench.hardware.device.type]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin and process.stdout
        start = 0.0
        for number, text in enumerate(texts):
            start = time.perf_counter() if number == 20 else start  # those before warm up
            process.stdin.write(text)
            process.stdin.flush()
            assert process.stdout.readline()
        seconds = time.perf_counter() - start
        process.stdin.close()
    return (len(texts) - 20) / seconds


# ------------------------------------------------------------------------------------------ members trained together
def together(bench: Bench, K: int = 5) -> Iterator[dict]:
    """Rows: K BERT-1s trained in one batched pass (torch.func.vmap over their stacked weights), beside pretrain.py, which takes one after
    the other. Both by AdamW; `quick`'s shape, and on a GPU the paper's."""
    cuda = bench.hardware.device.type == "cuda"
    small = replace(bench, corpus=small_vocabulary(bench.corpus, 4_000))
    cases = [("quick", small, replace(QUICK, optimizer="adamw", count_start=0.0, local_start=0.0, clip=0.0))]
    for preset, where, recipe in [*cases, ("paper", bench, PAPER)] if cuda else cases:
        for compiled in (False, True) if cuda else (False,):
            all_of_them, one, memory = alternate(partial(batched_pretraining, where, recipe, K, 300 if cuda else 12, compiled),
                                                 partial(our_pretraining, where, "bert-1", recipe, 300 if cuda else 60, compiled), 1 if cuda else 3)
            yield row(f"{K} of {preset}'s bert-1 in one batched pass{', compiled' * compiled}", "tokens/s", all_of_them, one, 1.0,
                      reference_is="one after the other", **memory)


def batched_pretraining(bench: Bench, recipe: PretrainRecipe, K: int, steps: int, compiled: bool) -> Rates:
    """Tokens/s of all K together, each with texts, masks and dropout of its own."""
    device, V = bench.hardware.device, bench.corpus.tokenizer.vocab_size
    config = named_config("bert-1", recipe.width, recipe.heads, vocab_size=V, max_length=LENGTH, norm=recipe.norm, dropout=recipe.dropout,
                          attention_dropout=recipe.attention_dropout)
    keep_freed_memory()
    models = [MaskedLM(config).to(device).train() for _ in range(K)]
    parameters, _ = stack_module_state(models)  # type: ignore[arg-type]
    for weight in parameters.values():
        torch._dynamo.mark_static_address(weight)  # else a CUDA graph copies it at every replay, as it does a batch
    optimizer = torch.optim.AdamW(parameters.values(), lr=recipe.lr, fused=True)
    table, texts = DeviceTable(bench.corpus.articles, device), K * recipe.batch_size
    tokens = recipe.batch_size * LENGTH
    masked = most_masked(tokens, recipe.mask_rate) if device.type == "cuda" else round(tokens * recipe.mask_rate)  # as pretrain.py has it

    def loss(weights: dict[str, Tensor], masked: Tensor, positions: Tensor, labels: Tensor) -> Tensor:
        with bench.hardware.autocast():
            logits = functional_call(models[0], weights, (masked, positions)).float()
        return nn.functional.cross_entropy(logits, labels)

    losses = maybe_compile(vmap(loss, randomness="different"), compiled, fixed_shapes=True)
    rates, window = [], 20 if device.type == "cuda" else 1
    for step in range(steps // window + 1):
        start = synchronised(device)
        for _ in range(window):
            ids = table.batch(np.arange(step * texts, (step + 1) * texts) % len(table.lengths)).view(K, recipe.batch_size, LENGTH)
            batches = [torch.stack(parts) for parts in zip(*(mask_tokens(one, V, recipe.mask_rate, count=masked) for one in ids))]
            losses(parameters, *batches).sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        rates.append(window * texts * LENGTH / (synchronised(device) - start))
    return rates[1:]


# ------------------------------------------------------------------------------------------------------------ how cost grows
def growth(bench: Bench, quick: bool) -> dict[str, list[dict]]:
    """Tokens/s and memory of a pre-training step, of `quick`'s model with one thing changed at a time and of every model of the two
    presets, and committees of K at work."""
    base = replace(bench, corpus=small_vocabulary(bench.corpus, 4_000))
    steps = 10
    result: dict[str, list[dict]] = {}
    changes: dict[str, Sequence[int]] = {"width": (64, 128, 256, 512, 768), "layers": (1, 6), "batch_size": (8, 32, 128),
                                         "max_length": (32, 64, 128, 256)}
    for what, values in changes.items():
        for value in values[::2] if quick else values:
            model = "bert-6" if (what, value) == ("layers", 6) else "bert-1"
            recipe = replace(QUICK, count_start=0.0, local_start=0.0, heads=0, **({what: value} if what != "layers" else {}))
            cut = {part: full_length(getattr(base.corpus, part), 512, recipe.max_length) for part in ("articles", "held_out")}
            corpus = replace(base.corpus, **cut)
            rates, memory = apart(partial(our_pretraining, replace(base, corpus=corpus), model, recipe, steps))
            result.setdefault(what, []).append({"value": value, "tokens_per_s": float(np.median(rates)), "memory_gb": memory})
            print(f"{what} {value}: {np.median(rates):.0f} tokens/s, {memory:.2f} GB", flush=True)
    for preset, recipe in (("quick", replace(QUICK, count_start=0.0)), ("paper", PAPER)):
        corpus = base.corpus if preset == "quick" else bench.corpus
        tokens = (recipe.steps or recipe.epochs * 90_000 // 32) * 32 * LENGTH
        for model in ("bert-6", "bert-1") if quick else MODELS:
            few = steps if preset == "quick" and not MODELS[model][2] else 2
            rates, memory = apart(partial(our_pretraining, replace(bench, corpus=corpus), model, recipe, few))
            config = named_config(model, recipe.width, recipe.heads, vocab_size=corpus.tokenizer.vocab_size, norm=recipe.norm)
            with torch.device("meta"):
                parameters = count_parameters(MaskedLM(config))
            result.setdefault("models", []).append({
                "preset": preset, "model": model, "parameters": parameters, "tokens_per_s": float(np.median(rates)), "memory_gb": memory,
                "tokens": tokens, "hours": tokens / float(np.median(rates)) / 3600})
            print(f"{preset} {model}: {np.median(rates):.0f} tokens/s, {memory:.2f} GB", flush=True)
    config = named_config("bert-1", QUICK.width, vocab_size=bench.corpus.tokenizer.vocab_size, max_length=LENGTH, norm="pre")
    tables = bench.tables(64)
    classifiers = [bench.hardware.for_inference(Classifier(config, len(bench.task.classes))) for _ in range(16)]
    committees = {str(k): SoftCommittee(classifiers[:k]) for k in (1, 2, 4, 8, 16)}
    for k, t in measure_latency(committees, tables, bench.hardware, texts=20).items():
        result.setdefault("members", []).append({"value": int(k), "ms": t["median"], "texts_per_s": t["texts_per_s"]})
        print(f"members {k}: {t['median']:.2f} ms a text, {t['texts_per_s']:.0f} texts/s in batches of 64", flush=True)
    return result


# -------------------------------------------------------------------------------------------------------- where the time goes
KINDS = {"matrix products": "mm|linear|matmul|convolution", "softmax and loss": "softmax|nll|cross_entropy", "casts and copies": "copy_",
         "optimizer": "adamw|optimizer|lerp", "GELU": "gelu", "LayerNorm": "layer_norm", "random draws": "random|bernoulli|aten::rand"}


def profile(bench: Bench) -> dict[str, dict[str, float]]:
    """Shares of the time of the presets' pre-training steps, by kind of operation, as PyTorch's profiler sees them."""
    result: dict[str, dict[str, float]] = {}
    cuda = bench.hardware.device.type == "cuda"
    for preset, recipe in (("paper", PAPER), ("quick", replace(QUICK, count_start=0.0))):
        corpus = bench.corpus if preset == "paper" else small_vocabulary(bench.corpus, 4_000)
        for model in ("bert-6", "bert-1"):
            with torch.profiler.profile() as profiler:
                our_pretraining(replace(bench, corpus=corpus), model, recipe, 3 if preset == "paper" else 30)
            shares = result.setdefault(f"{preset}, {model}", {})
            for event in profiler.key_averages():
                kind = next((kind for kind, words in KINDS.items() if re.search(words, event.key.lower())), "everything else")
                if event.device_type == torch.autograd.DeviceType.CPU:  # a GPU's kernels are counted with the operations that start them
                    shares[kind] = shares.get(kind, 0.0) + (event.self_device_time_total if cuda else event.self_cpu_time_total)
            total = sum(shares.values())
            for kind in shares:
                shares[kind] /= total
            print(f"{preset}, {model}: " + ", ".join(f"{kind} {100 * x:.0f} %" for kind, x in sorted(shares.items(), key=lambda i: -i[1])))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions and one stem: some 4 minutes on two cores")
    parser.add_argument("--rows", nargs="+", choices=SECTIONS, default=SECTIONS, help="parts of the table (default: all); with fewer, give --out")
    parser.add_argument("--grow", action="store_true", help="measure how cost grows, instead of the table")
    parser.add_argument("--profile", action="store_true", help="measure where a step's time goes, instead of the table")
    parser.add_argument("--together", action="store_true", help="train five members in one batched pass, instead of the table")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda")
    parser.add_argument("--out", type=Path, help="default results/speed-cpu.json or results/speed-NAME-OF-GPU.json")
    parser.add_argument("--data", required=True, metavar="NAME", help="a data folder of the paper's vocabulary and length")
    parser.add_argument("--task", metavar="TASK", help="a task of it (default: the first)")
    args = parser.parse_args()
    started = time.perf_counter()
    hardware = choose_hardware(args.device)
    gpu = re.sub(r"\W+", "-", torch.cuda.get_device_name()).lower() if hardware.device.type == "cuda" else ""
    mode = "growth-" if args.grow else "profile-" if args.profile else "together-" if args.together else ""
    out = args.out or ROOT / "results" / f"speed-{mode}{gpu or 'cpu'}.json"
    os.environ["TQDM_DISABLE"] = "1"
    corpus = open_folder(data_path(args.data))
    task = corpus.task(args.task or next(iter(corpus.meta["tasks"])))
    with tempfile.TemporaryDirectory() as folder:
        full = replace(corpus, articles=full_length(corpus.articles, 4_096), held_out=full_length(corpus.held_out, 8))
        bench = Bench(full, task, hardware, Path(folder))
        def keep(**measured) -> None:
            settings = {"quick": args.quick, "task": task.name, "vocab_size": corpus.tokenizer.vocab_size}
            write_json(out, result_record(settings, time.perf_counter() - started, hardware=hardware.reason, **measured))

        if args.grow:
            keep(growth=growth(bench, args.quick))
        elif args.profile:
            keep(profile=profile(bench))
        else:
            rows: list[dict] = []
            for found in together(bench) if args.together else all_rows(bench, args):
                rows.append(found)
                keep(rows=rows)  # what is measured is not lost with the rest
    print(f"{out} written; {(time.perf_counter() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    run_script(main)
