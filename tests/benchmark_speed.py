"""How fast the scripts are, beside the authors' way and beside the machine's own limit.

The authors' way is tests/reference_recipe.py: Hugging Face's BERT, the vocabulary head on all
positions, every text padded to 128, fp32 on a CPU, fp16 autocast on a GPU, the C library's own
settings for memory. The two take turns, each measurement in a process of its own; a row has the
medians of both. Ours are real runs of the scripts' own functions. The limit is a plain matrix
product in the same type, over the operations of a step.

    python data.py prepare speed --preset paper --articles '...' --task fewrel    the data
    python tests/benchmark_speed.py --data speed --quick         a few minutes on two cores
    python tests/benchmark_speed.py --data speed --rows pre-training
    python tests/benchmark_speed.py --data speed --grow          cost over width, depth, length, ...
    python tests/benchmark_speed.py --data speed --profile       where the time of a step goes
    python tests/benchmark_speed.py --data speed --ranks         one training on 1, 2, 3 processes

Writes results/speed-*.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from committee import measure_latency
from data import DataFolder, InputError, TokenTable, data_path, decode_texts
from data import encode_texts, open_folder, run_script
from finetune import PRESETS as FINETUNE_PRESETS
from finetune import Start, TaskTables, finetune, make_tables
from model import MODELS, Attention, BertConfig, Classifier, Committee, MaskedLM
from pretrain import PRESETS, DeviceTable, Runtime, base_config, choose_runtime, pretrain
from pretrain import result_record, write_json
from reference_recipe import Reference, build, make_optimizer, padded, pretraining_step
from reference_recipe import training_step
from tokenizer import FIRST_PIECE, PAD

QUICK_VOCABULARY = 4_000
STEMS = [name for name in MODELS if "conv" in name]
DEPTHS = (1, 2, 3, 6, 12)
MODELS.update({f"bert-{layers}": (layers, 1, 0, ()) for layers in DEPTHS})


@dataclass
class Bench:
    """What all measurements need."""

    data: DataFolder
    task: str
    runtime: Runtime
    quick: bool

    def steps(self, cpu: int, gpu: int) -> int:
        if self.runtime.device.type == "cuda":
            return gpu
        return max(3, cpu // 3) if self.quick else cpu

    def batch_size(self, model: str) -> int:
        """Texts in a step: a stem takes long on a CPU."""
        return 4 if model in STEMS and self.runtime.device.type == "cpu" else 32

    def tables(self) -> TaskTables:
        """The task, with 128 of its test rows."""
        tables = make_tables(self.data, self.task, "test", 0, self.runtime)
        rows = tables.test_rows[:: max(1, len(tables.test_rows) // 128)][:128]
        table = encode_texts([text for text, _ in rows], self.data.tokenizer, self.data.max_length)
        labels = torch.tensor([label for _, label in rows], device=self.runtime.device)
        return replace(tables, test=DeviceTable(table, self.runtime.device), test_labels=labels,
                       test_rows=rows)

    def articles_for(self, preset: str) -> DataFolder:
        """The data; for `quick`, token ids are folded into its vocabulary, for timing alone."""
        size = min(QUICK_VOCABULARY, self.data.tokenizer.vocab_size)
        if preset != "quick":
            return self.data
        tokenizer = SimpleNamespace(vocab_size=size, hash=self.data.tokenizer.hash,
                                    model=self.data.tokenizer.model)
        return replace(self.data, articles=folded(self.data.articles, size),
                       held_out=folded(self.data.held_out, size), tokenizer=tokenizer)

    def config(self, model: str, preset: str) -> BertConfig:
        return base_config(model, PRESETS[preset], self.articles_for(preset))

    def classifiers(self, count: int, model: str, preset: str = "paper") -> nn.Module:
        """One classifier, or a committee."""
        config = base_config(model, PRESETS[preset], self.data)
        classes = len(self.data.meta["tasks"][self.task]["classes"])
        members = [Classifier(config, classes) for _ in range(count)]
        return self.runtime.for_inference(Committee(members) if count > 1 else members[0])


def folded(table: TokenTable, size: int) -> TokenTable:
    small = FIRST_PIECE + table.tokens % (size - FIRST_PIECE)
    return replace(table, tokens=np.where(table.tokens < size, table.tokens, small))


def full_length(table: TokenTable, texts: int, length: int) -> TokenTable:
    """So many texts of exactly `length` tokens, cut from a table's stream of tokens."""
    offsets = np.arange(texts + 1, dtype=np.int64) * length
    return TokenTable(np.resize(table.tokens, texts * length), offsets, length)


# ---- ours: each function returns one rate or more ------------------------------------------------


@contextlib.contextmanager
def temporary_runs(bench: Bench) -> Iterator[Runtime]:
    """A runtime whose runs are thrown away. What they print goes to standard error."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        yield replace(bench.runtime, runs_dir=Path(folder))


def logged_rates(run: Path) -> list[float]:
    """Tokens a second of each line of a log but the first, in which everything warms up."""
    lines = map(json.loads, (run / "log.jsonl").read_text(encoding="utf-8").splitlines())
    return [line["tokens_per_s"] for line in lines if "loss" in line][1:]


def our_pretraining(bench: Bench, model: str, preset: str, length: int = 0,
                    **changes: int) -> list[float]:
    """Tokens a second. length: of the texts, instead of that of the data folder."""
    is_slow = model in STEMS or preset == "paper"
    steps = bench.steps(4 if is_slow else 60, 200) + 1
    recipe = replace(PRESETS[preset], **{"batch_size": bench.batch_size(model), **changes},
                     steps=steps)
    data = bench.articles_for(preset)
    if length:
        data = replace(data, articles=full_length(data.articles, 4_096, length),
                       held_out=full_length(data.held_out, 8, length),
                       meta={**data.meta, "max_length": length})
    with temporary_runs(bench) as runtime:
        return logged_rates(pretrain(data, model, recipe, 0, runtime))


def our_finetuning(bench: Bench, model: str) -> list[float]:
    """Texts a second, with the paper's recipe."""
    tables = bench.tables()
    recipe = replace(FINETUNE_PRESETS["paper"], steps=bench.steps(8, 200) + 1)
    start = Start(model, bench.config(model, "paper"))
    with temporary_runs(bench) as runtime:
        rates = logged_rates(finetune(tables, start, recipe, 0, runtime))
    return [rate / float(tables.train.lengths.mean()) for rate in rates]


def latency(bench: Bench, model: nn.Module, figure: str) -> list[float]:
    """figure: "median", milliseconds for a text; or "texts_per_s", in batches."""
    return [measure_latency({"it": model}, bench.tables(), bench.runtime)["it"][figure]]


def our_prediction(bench: Bench, count: int, model: str, figure: str,
                   preset: str = "paper") -> list[float]:
    return latency(bench, bench.classifiers(count, model, preset), figure)


def our_encoding(bench: Bench) -> list[float]:
    """Seconds to encode 4,096 full articles."""
    texts = decode_texts(bench.data.articles, bench.data.tokenizer)
    start = time.perf_counter()
    encode_texts(texts, bench.data.tokenizer, bench.data.max_length)
    return [time.perf_counter() - start]


def our_start(bench: Bench) -> list[float]:
    """Seconds from the command to the first line of the log."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "pretrain/start/log.jsonl"
        command = [sys.executable, str(ROOT / "pretrain.py"), "--data", str(bench.data.path),
                   "--set", "steps=1", "width=64", "heads=1", "--name", "start",
                   "--runs-dir", folder]
        start = time.perf_counter()
        nowhere = subprocess.DEVNULL
        with ending_with_us(command, stdout=nowhere, stderr=nowhere) as process:
            while process.poll() is None and not (log.exists() and log.stat().st_size):
                time.sleep(0.01)
            return [time.perf_counter() - start]


# ---- the authors' way ----------------------------------------------------------------------------


def reference_of(config: BertConfig, batch_size: int = 32) -> Reference:
    """A model of theirs of the same shape."""
    return Reference(
        layers=config.layers, width=config.width, heads=config.heads, vocab_size=config.vocab_size,
        conv_channels=config.conv_channels, conv_kernels=config.conv_kernels,
        max_length=config.max_length, batch_size=batch_size, fault_stem=True)


def their_autocast(bench: Bench) -> contextlib.AbstractContextManager:
    device = bench.runtime.device.type
    return torch.autocast(device, dtype=torch.float16, enabled=device == "cuda")


def their_training(bench: Bench, model: str, preset: str = "paper",
                   is_finetuning: bool = False) -> list[float]:
    """Tokens a second, or in fine-tuning texts a second. The first step warms up."""
    reference = reference_of(bench.config(model, preset), bench.batch_size(model))
    tables = bench.tables()
    classes = len(tables.task.classes) if is_finetuning else 0
    network = build(reference, classes).to(bench.runtime.device).train()
    optimizer = make_optimizer(network, reference)
    generator = torch.Generator().manual_seed(0)
    batch = np.arange(reference.batch_size)
    rates = []
    for _ in range(bench.steps(3, 20) + 1):
        start = time.perf_counter()
        with their_autocast(bench):
            if is_finetuning:
                ids = to_full_length(tables.train.batch(batch), bench)
                loss = training_step(network, optimizer, ids, tables.train_labels[batch],
                                     (ids != PAD).long())
            else:
                ids = padded(bench.articles_for(preset).articles, batch, reference.max_length)
                loss = pretraining_step(network, optimizer, ids, reference, generator)
        loss.item()  # waits for the device
        amount = len(ids) if is_finetuning else ids.numel()
        rates.append(amount / (time.perf_counter() - start))
    return rates[1:]


def to_full_length(ids: Tensor, bench: Bench) -> Tensor:
    """(B, T) -> (B, max_length)"""
    return nn.functional.pad(ids, (0, bench.data.max_length - ids.size(1)), value=PAD)


class OneAfterAnother(nn.Module):
    """Classifiers of theirs."""

    def __init__(self, bench: Bench, count: int, model: str) -> None:
        super().__init__()
        self.bench = bench
        reference = reference_of(bench.config(model, "paper"))
        classes = len(bench.data.meta["tasks"][bench.task]["classes"])
        members = [build(reference, classes).eval() for _ in range(count)]
        self.members = nn.ModuleList(members).to(bench.runtime.device)

    @torch.no_grad()
    def forward(self, input_ids: Tensor) -> Tensor:
        ids = to_full_length(input_ids, self.bench)
        mask = (ids != PAD).long()
        with their_autocast(self.bench):
            logits = [model(input_ids=ids, attention_mask=mask).logits for model in self.members]
        return torch.stack(logits).float()


def their_prediction(bench: Bench, count: int, model: str, figure: str) -> list[float]:
    return latency(bench, OneAfterAnother(bench, count, model), figure)


# ---- the table -----------------------------------------------------------------------------------

Sides = dict[str, Callable[[Bench], list[float]]]


def all_rows() -> dict[str, tuple[str, Sides]]:
    """Name -> unit, and the measurement of each side. Some rows have no reference."""
    rows: dict[str, tuple[str, Sides]] = {}

    def add(name: str, unit: str, ours: Callable, theirs: Callable, **arguments: object) -> None:
        sides = {"ours": partial(ours, **arguments), "reference": partial(theirs, **arguments)}
        rows[name] = unit, sides

    trained = [("paper", "bert-6"), ("paper", "bert-1"), ("quick", "bert-6"), ("quick", "bert-1")]
    for preset, model in trained + [("paper", stem) for stem in STEMS]:
        add(f"pre-training, {preset}, {model}", "tokens/s", our_pretraining, their_training,
            model=model, preset=preset)
    add("fine-tuning, paper, bert-6", "texts/s", our_finetuning,
        partial(their_training, is_finetuning=True), model="bert-6")
    for unit, figure in (("ms", "median"), ("texts/s", "texts_per_s")):
        for name, count, model in (("bert-6", 1, "bert-6"), ("6 of bert-1", 6, "bert-1")):
            add(f"prediction, paper, {name}, {unit}", unit, our_prediction, their_prediction,
                count=count, model=model, figure=figure)
    rows["encode 4,096 articles"] = "s", {"ours": our_encoding}
    rows["from the command to the first step"] = "s", {"ours": our_start}
    return rows


def growth_rows() -> dict[str, tuple[str, Sides]]:
    """Rows of quick's models, one thing changed at a time. They have no reference."""
    rows: dict[str, tuple[str, Sides]] = {}

    def add(name: str, unit: str, measure: Callable, **arguments: object) -> None:
        rows[f"growth, {name}"] = unit, {"ours": partial(measure, **arguments)}

    for model in ("bert-1", "bert-6"):
        pretraining = partial(add, unit="tokens/s", measure=our_pretraining, model=model,
                              preset="quick")
        for width in (64, 128, 256, 512):
            pretraining(f"{model}, width, {width}", width=width, heads=width // 32)
        for size in (8, 32, 128):
            pretraining(f"{model}, batch_size, {size}", batch_size=size)
        for length in (32, 64, 128, 256):
            pretraining(f"{model}, length, {length}", length=length)
    for layers in DEPTHS:
        add(f"bert, layers, {layers}", "tokens/s", our_pretraining, model=f"bert-{layers}",
            preset="quick")
    for members in (1, 2, 4, 8, 16):
        add(f"bert-1, members, {members}", "ms", our_prediction, count=members, model="bert-1",
            figure="median", preset="quick")
    return rows


ROWS = all_rows() | growth_rows()


def matrix_product_rate(runtime: Runtime) -> float:
    """Operations a second of a plain matrix product in the type of training: the best of many."""
    a = torch.randn(4096, 768, device=runtime.device, dtype=runtime.dtype)
    b = torch.randn(768, 3072, device=runtime.device, dtype=runtime.dtype)
    best = 0.0
    for _ in range(30):
        start = time.perf_counter()
        (a @ b)[0, 0].item()
        best = max(best, 2 * 4096 * 768 * 3072 / (time.perf_counter() - start))
    return best


def operations_of_a_token(bench: Bench, model: str, preset: str) -> float:
    """Operations of a pre-training step, counted by PyTorch, for each of its tokens."""
    config = replace(bench.config(model, preset), dropout=0.0)
    tokens = 32 * config.max_length
    Attention.fused, before = False, Attention.fused  # the counter knows plain products alone
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        positions = torch.arange(round(tokens * PRESETS[preset].mask_rate))
        input_ids = torch.ones(32, config.max_length, dtype=torch.long)
        MaskedLM(config)(input_ids, positions).sum().backward()
    Attention.fused = before
    return counter.get_total_flops() / tokens


@contextlib.contextmanager
def ending_with_us(command: list[str], **streams: int) -> Iterator[subprocess.Popen]:
    """A process that ends when this one is done with it, or is told to end."""
    with subprocess.Popen(command, text=True, encoding="utf-8", **streams) as process:
        try:
            yield process
        finally:
            process.terminate()


def measure_apart(flags: list[str], row: str, side: str) -> dict:
    """Measure a side of a row in a process of its own."""
    command = [sys.executable, __file__, *flags, "--row", row, side]
    with ending_with_us(command, stdout=subprocess.PIPE) as process:
        shown, _ = process.communicate()
    if process.returncode:
        raise InputError(f"{row}, {side}: ended with status {process.returncode}")
    return json.loads(shown.splitlines()[-1])


def measure_here(bench: Bench, row: str, side: str) -> dict:
    rates = ROWS[row][1][side](bench)
    peak = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_initialized() else 0.0
    with contextlib.suppress(OSError):  # no Linux
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        peak = peak or int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1e6
    return {"rates": rates, "memory_gb": peak}


def measure_row(bench: Bench, flags: list[str], row: str, limit: float) -> dict:
    """Both sides in turns; prints and returns the row."""
    unit, sides = ROWS[row]
    runs: dict[str, list[dict]] = {side: [] for side in sides}
    for _ in range(1 if bench.quick else 3):
        for side in sides:
            runs[side].append(measure_apart(flags, row, side))
    record: dict = {"name": row, "unit": unit}
    for side in sides:
        rates = np.concatenate([run["rates"] for run in runs[side]])
        record[side] = float(np.median(rates))
        record[f"{side}_10_90"] = np.percentile(rates, [10, 90]).tolist()
        record[f"{side}_memory_gb"] = max(run["memory_gb"] for run in runs[side])
    line = f"{row:44}{record['ours']:12.5g}"
    if "reference" in sides:
        ratio = record["ours"] / record["reference"]
        record["ratio"] = 1 / ratio if unit == "ms" else ratio
        line += f"{record['reference']:12.5g}{record['ratio']:6.1f}"
    line += f" {unit}"
    model = row.split(", ")[-1]
    if row.startswith("pre-training") and model not in STEMS:
        operations = operations_of_a_token(bench, model, row.split(", ")[1])
        record["share_of_limit"] = record["ours"] * operations / limit
        line += f"   {100 * record['share_of_limit']:.0f} % of the limit"
    print(line, flush=True)
    return record


def measure_table(bench: Bench, flags: list[str], prefixes: tuple[str, ...],
                  keep: Callable[..., None]) -> None:
    """Measure the rows that begin so. Each is kept at once: it is not lost with the rest."""
    limit = matrix_product_rate(bench.runtime)
    print(f"{bench.runtime.in_words}; a matrix product: {limit / 1e9:.0f} GFLOP/s\n"
          f"{'':44}{'ours':>12}{'reference':>12}{'ratio':>6}")
    left_out = STEMS[1:] if bench.quick and prefixes == ("",) else []
    rows: list[dict] = []
    for row in ROWS:
        is_wanted = row.startswith(prefixes) and (prefixes != ("",) or not row.startswith("growth"))
        if is_wanted and row.split(", ")[-1] not in left_out:
            rows.append(measure_row(bench, flags, row, limit))
            keep(rows=rows, limit=limit)


# ---- several processes, and where the time goes --------------------------------------------------


def ranks(bench: Bench) -> list[dict]:
    """quick's BERT-6 under torchrun, a thread for each rank: tokens a second, and the losses."""
    result: list[dict] = []
    for count in (1, 2, 3):
        with tempfile.TemporaryDirectory() as folder:
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                        f"--nproc_per_node={count}", str(ROOT / "pretrain.py")]
            flags = ["--data", str(bench.data.path), "--model", "bert-6", "--device", "cpu",
                     "--name", "ranks", "--set", "steps=60", "--runs-dir", folder]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            subprocess.run([*torchrun, *flags], env=environment, check=True, capture_output=True)
            log = (Path(folder) / "pretrain/ranks/log.jsonl").read_text(encoding="utf-8")
            lines = [line for line in map(json.loads, log.splitlines()) if "loss" in line]
        losses = [line["loss"] for line in lines]
        first = result[0]["losses"] if result else losses
        rate = float(np.median([line["tokens_per_s"] for line in lines[1:]]))
        difference = max(abs(x - y) for x, y in zip(losses, first))
        result.append({"ranks": count, "tokens_per_s": rate, "losses": losses,
                       "largest_difference_of_losses": difference})
        print(f"{count} ranks: {rate:.0f} tokens/s; losses differ from those of 1 rank by at "
              f"most {difference:.2g}", flush=True)
    return result


KINDS = {"matrix products": "mm|linear|matmul|convolution", "softmax, loss": "softmax|nll|entropy",
         "copies": "copy_", "optimizer": "adamw|optimizer|lerp", "GELU": "gelu",
         "LayerNorm": "layer_norm", "random numbers": "rand|bernoulli", "everything else": ""}


def profile(bench: Bench) -> dict[str, dict[str, float]]:
    """Shares of the time of pre-training steps, by kind of operation."""
    result: dict[str, dict[str, float]] = {}
    for row in list(ROWS)[:4]:
        _, preset, model = row.split(", ")
        with torch.profiler.profile() as profiler:
            our_pretraining(bench, model, preset)
        shares = dict.fromkeys(KINDS, 0.0)
        for event in profiler.key_averages():
            kinds = [kind for kind, words in KINDS.items() if re.search(words, event.key.lower())]
            shares[kinds[0]] += event.self_cpu_time_total
        total = sum(shares.values())
        result[f"{preset}, {model}"] = {kind: time / total for kind, time in shares.items()}
    print(json.dumps(result, indent=1))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", required=True, metavar="NAME", help="a data folder, made with --preset paper")
    add("--task", default="", metavar="TASK", help="a task of it (default: the first)")
    add("--quick", action="store_true", help="fewer steps, each side once; by default one stem")
    add("--rows", nargs="+", metavar="PREFIX", default=[""], help="only rows that begin so")
    add("--row", nargs=2, metavar=("ROW", "SIDE"), help="one measurement, as a JSON line")
    add("--grow", action="store_true", help="how cost grows, instead of the table")
    add("--profile", action="store_true", help="where a step's time goes, instead of the table")
    add("--ranks", action="store_true", help="1, 2 and 3 processes, instead of the table")
    add("--device", default="auto", help="auto (default), cpu, cuda")
    add("--out", type=Path, help="default results/speed-cpu.json or speed-NAME-OF-GPU.json there")
    args = parser.parse_args()
    started = time.perf_counter()
    is_theirs = bool(args.row) and args.row[1] == "reference"
    with patch("pretrain.keep_freed_memory") if is_theirs else contextlib.nullcontext():
        runtime = choose_runtime(args.device)
    folder = open_folder(data_path(args.data).resolve())
    data = replace(folder, articles=full_length(folder.articles, 4_096, folder.max_length),
                   held_out=full_length(folder.held_out, 8, folder.max_length))
    bench = Bench(data, args.task or next(iter(folder.meta["tasks"])), runtime, args.quick)
    if args.row:
        print(json.dumps(measure_here(bench, *args.row)))
        return
    is_gpu = runtime.device.type == "cuda"
    place = re.sub(r"\W+", "-", torch.cuda.get_device_name()).lower() if is_gpu else "cpu"
    modes = {"growth-": args.grow, "profile-": args.profile, "ranks-": args.ranks}
    mode = "".join(name for name, is_chosen in modes.items() if is_chosen)
    out = args.out or ROOT / "results" / f"speed-{mode}{place}.json"

    def keep(**measured: object) -> None:
        settings = {"quick": args.quick, "task": bench.task,
                    "vocab_size": folder.tokenizer.vocab_size}
        seconds = round(time.perf_counter() - started)
        write_json(out, result_record(settings, seconds=seconds, hardware=runtime.in_words,
                                      **measured))

    if args.ranks:
        keep(ranks=ranks(bench))
    elif args.profile:
        keep(profile=profile(bench))
    else:
        flags = ["--data", args.data, "--task", bench.task, "--device", args.device]
        flags += ["--quick"] if args.quick else []
        measure_table(bench, flags, ("growth",) if args.grow else tuple(args.rows), keep)
    print(f"{out} written; {(time.perf_counter() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    run_script(main)
