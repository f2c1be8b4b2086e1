"""How fast the scripts are, beside the authors' way and beside the machine's own limit.

The authors' way is tests/reference_recipe.py: Hugging Face's BERT, the vocabulary head on all
positions, every text padded to 128, fp32 on a CPU, fp16 autocast on a GPU. The two take turns, each
measurement in a process of its own; a row has the medians of both. Ours are real runs of the
scripts' own functions. The limit is a plain matrix product in the same type, over the operations of
a step.

    python data.py prepare speed --preset paper --articles '...' --task fewrel    the data
    python tests/benchmark_speed.py --data speed --quick         a few minutes on two cores
    python tests/benchmark_speed.py --data speed --rows pre-training
    python tests/benchmark_speed.py --data speed --grow          cost over width, depth, length, ...
    python tests/benchmark_speed.py --data speed --profile       where the time of a step goes

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
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from committee import measure_latency
from data import DataFolder, DeviceTable, InputError, TokenTable, data_path, decode_texts
from data import encode_texts, open_folder, run_script
from finetune import PRESETS as FINETUNE_PRESETS
from finetune import Start, TaskTables, finetune, make_tables, predict_logits
from model import MODELS, Attention, Classifier, Committee, MaskedLM, named_config
from pretrain import PRESETS, Runtime, choose_runtime, pretrain, result_record, write_json
from reference_recipe import Reference, build, classification_step, make_optimizer, padded
from reference_recipe import training_step
from tokenizer import PAD

LENGTH = 128
STEMS = [name for name in MODELS if "conv" in name]
Rates = list[float]


@dataclass
class Bench:
    """What all measurements need."""

    data: DataFolder
    task: str
    runtime: Runtime
    quick: bool

    def steps(self, cpu: int, gpu: int) -> int:
        return gpu if self.runtime.device.type == "cuda" else max(1, cpu // 3) if self.quick else cpu

    def tables(self, test_rows: int = 256) -> TaskTables:
        """The task, of its scored rows only so many."""
        tables = make_tables(self.data, self.task, "test", 0, self.runtime)
        every = max(1, len(tables.test_rows) // test_rows)
        rows = tables.test_rows[::every][:test_rows]
        table = encode_texts([text for text, _ in rows], self.data.tokenizer, LENGTH)
        labels = torch.tensor([label for _, label in rows], device=self.runtime.device)
        return replace(tables, test=DeviceTable(table, self.runtime.device), test_labels=labels,
                       test_rows=rows)

    def with_vocabulary(self, size: int) -> Bench:
        """The same texts, token ids folded into a smaller vocabulary. For timing alone."""
        def fold(table: TokenTable) -> TokenTable:
            small = np.where(table.tokens < size, table.tokens, 5 + table.tokens % (size - 5))
            return replace(table, tokens=small.astype(np.uint16))

        class Smaller:
            vocab_size = size
            hash, model = self.data.tokenizer.hash, self.data.tokenizer.model

        data = replace(self.data, articles=fold(self.data.articles),
                       held_out=fold(self.data.held_out), tokenizer=Smaller())
        return replace(self, data=data)


def full_length(table: TokenTable, texts: int, length: int = LENGTH) -> TokenTable:
    """So many texts of exactly `length` tokens, cut from a table's stream of tokens."""
    offsets = np.arange(texts + 1, dtype=np.int64) * length
    return TokenTable(np.resize(table.tokens, texts * length), offsets, length)


# ---- ours ----------------------------------------------------------------------------------------


def logged_rates(folder: Path) -> Rates:
    """Tokens a second of each line of a log but the first, in which everything warms up."""
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    rates = [json.loads(line).get("tokens_per_s") for line in lines]
    return [rate for rate in rates if rate][1:]


def our_pretraining(bench: Bench, model: str, preset: str, **changes: int) -> Rates:
    """Tokens a second."""
    stem = "conv" in model
    steps = bench.steps(4 if stem or preset == "paper" else 60, 200)
    recipe = replace(PRESETS[preset], steps=steps + 1, **changes)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        runtime = replace(bench.runtime, runs_dir=Path(folder))
        return logged_rates(pretrain(bench.data, model, recipe, 0, runtime))


def our_finetuning(bench: Bench) -> Rates:
    """Texts a second, of the paper's BERT-6."""
    tables = bench.tables(64)
    recipe = replace(FINETUNE_PRESETS["paper"], steps=bench.steps(8, 200) + 1)
    with tempfile.TemporaryDirectory() as folder:
        runtime = replace(bench.runtime, runs_dir=Path(folder))
        start = Start("bert-6", our_config(bench, "bert-6"))
        rates = logged_rates(finetune(tables, start, recipe, 0, runtime))
    return [rate / float(tables.train.lengths.mean()) for rate in rates]


def our_config(bench: Bench, model: str):
    return named_config(model, vocab_size=bench.data.tokenizer.vocab_size, max_length=LENGTH)


def our_classifier(bench: Bench, model: str) -> Classifier:
    return Classifier(our_config(bench, model), classes_of(bench))


def our_prediction(bench: Bench) -> Rates:
    """Texts a second, of the paper's BERT-6."""
    model = bench.runtime.for_inference(our_classifier(bench, "bert-6"))
    table = bench.tables(bench.steps(256, 2_000)).test
    rates = []
    for _ in range(2):
        start = time.perf_counter()
        predict_logits(model, table, bench.runtime)
        rates.append(len(table.lengths) / (time.perf_counter() - start))
    return rates[1:]


def our_committee(bench: Bench, what: str) -> Rates:
    """Of six of the paper's BERT-1s: milliseconds for a text, or texts a second in batches."""
    members = [our_classifier(bench, "bert-1") for _ in range(6)]
    committee = bench.runtime.for_inference(Committee(members))
    return [measure_latency({"x": committee}, bench.tables(128), bench.runtime)["x"][what]]


def our_encoding(bench: Bench) -> Rates:
    """Seconds to encode 5,000 articles."""
    articles = bench.data.articles
    texts = decode_texts(articles.subset(np.arange(min(5_000, len(articles)))), bench.data.tokenizer)
    start = time.perf_counter()
    encode_texts(texts, bench.data.tokenizer, LENGTH)
    return [time.perf_counter() - start]


def our_start(bench: Bench) -> Rates:
    """Seconds from the command to the first line of the log."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "pretrain" / "start" / "log.jsonl"
        command = [sys.executable, str(ROOT / "pretrain.py"), "--data", str(bench.data.path.resolve()),
                   "--set", "steps=1", "width=64", "heads=1", "--name", "start", "--runs-dir", folder]
        start = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and not (log.exists() and log.stat().st_size):
                time.sleep(0.01)
            seconds = time.perf_counter() - start
            process.kill()
    return [seconds]


# ---- the authors' way ----------------------------------------------------------------------------


class Theirs:
    """A model of theirs with its optimizer."""

    def __init__(self, bench: Bench, layers: int, classes: int = 0, width: int = 768, heads: int = 12,
                 **more: object) -> None:
        self.bench, self.device = bench, bench.runtime.device
        self.reference = Reference(layers=layers, width=width, heads=heads,
                                   vocab_size=bench.data.tokenizer.vocab_size, **more)
        self.model = build(self.reference, classes).to(self.device).train()
        self.optimizer = make_optimizer(self.model, self.reference)
        self.generator = torch.Generator().manual_seed(0)

    def autocast(self) -> contextlib.AbstractContextManager:
        fp16 = self.device.type == "cuda"
        return torch.autocast(self.device.type, dtype=torch.float16, enabled=fp16)

    def rates(self, step: Callable[[], Tensor], unit: int) -> Rates:
        """Units a second, of steps that follow one that warms up."""
        rates = []
        for _ in range(self.bench.steps(3, 20) + 1):
            start = time.perf_counter()
            with self.autocast():
                step().sum().item()
            rates.append(unit / (time.perf_counter() - start))
        return rates[1:]

    def texts(self, table: TokenTable, rows: np.ndarray) -> Tensor:
        return padded(table, rows, LENGTH).to(self.device)

    def logits(self, input_ids: Tensor) -> Tensor:
        """input_ids: (B, T), padded to 128 here."""
        ids = nn.functional.pad(input_ids, (0, LENGTH - input_ids.size(1)), value=PAD)
        with self.autocast(), torch.no_grad():
            return self.model(input_ids=ids, attention_mask=(ids != PAD).long()).logits.float()


def their_pretraining(bench: Bench, layers: int, **more: object) -> Rates:
    theirs = Theirs(bench, layers, **more)
    rows = np.arange(theirs.reference.batch_size)
    ids = padded(bench.data.articles, rows, LENGTH)
    return theirs.rates(lambda: training_step(theirs.model, theirs.optimizer, ids, theirs.reference,
                                              theirs.generator), ids.numel())


def classes_of(bench: Bench) -> int:
    return len(bench.data.meta["tasks"][bench.task]["classes"])


def their_finetuning(bench: Bench) -> Rates:
    theirs = Theirs(bench, 6, classes_of(bench))
    rows = bench.data.task(bench.task).rows("test")[0][:32]
    table = encode_texts([text for text, _ in rows], bench.data.tokenizer, LENGTH)
    ids = theirs.texts(table, np.arange(32))
    labels = torch.tensor([label for _, label in rows], device=theirs.device)
    return theirs.rates(lambda: classification_step(theirs.model, theirs.optimizer, ids, labels), 32)


def their_prediction(bench: Bench) -> Rates:
    theirs = Theirs(bench, 6, classes_of(bench))
    theirs.model.eval()
    ids = bench.tables(64).test.batch(np.arange(64))
    return theirs.rates(lambda: theirs.logits(ids), 64)


def their_committee(bench: Bench, what: str) -> Rates:
    members = [Theirs(bench, 1, classes_of(bench)) for _ in range(6)]
    for member in members:
        member.model.eval()

    class OneAfterAnother(nn.Module):
        def forward(self, input_ids: Tensor) -> Tensor:
            return torch.stack([member.logits(input_ids) for member in members])

    return [measure_latency({"x": OneAfterAnother()}, bench.tables(64), bench.runtime)["x"][what]]


# ---- rows ----------------------------------------------------------------------------------------

Measure = Callable[[Bench], Rates]


def small(measure: Measure) -> Measure:
    return lambda bench: measure(bench.with_vocabulary(4_000))


# name -> unit, ours, theirs (None: only ours)
ROWS: dict[str, tuple[str, Measure, Measure | None]] = {}
for name, layers in (("bert-6", 6), ("bert-1", 1)):
    ROWS[f"pre-training, paper, {name}"] = (
        "tokens/s", lambda b, name=name: our_pretraining(b, name, "paper"),
        lambda b, layers=layers: their_pretraining(b, layers))
    ROWS[f"pre-training, quick, {name}"] = (
        "tokens/s", small(lambda b, name=name: our_pretraining(b, name, "quick")),
        small(lambda b, layers=layers: their_pretraining(b, layers, width=128, heads=4)))
ROWS["fine-tuning, paper, bert-6"] = ("texts/s", our_finetuning, their_finetuning)
ROWS["prediction, paper, bert-6"] = ("texts/s", our_prediction, their_prediction)
for unit, what in (("ms", "median"), ("texts/s", "texts_per_s")):
    ROWS[f"committee of 6 of the paper's bert-1, {unit}"] = (
        unit, lambda b, what=what: our_committee(b, what), lambda b, what=what: their_committee(b, what))
for name in STEMS:
    stem = {"conv_channels": MODELS[name][2], "conv_kernels": MODELS[name][3], "fault_stem": True}
    width = 512 if "narrow" in name else 768
    ROWS[f"pre-training, paper, {name}"] = (
        "tokens/s", lambda b, name=name: our_pretraining(b, name, "paper"),
        lambda b, stem=stem, width=width: their_pretraining(b, 1, width=width, heads=width // 64, **stem))
ROWS["encode 5,000 articles"] = ("s", our_encoding, None)
ROWS["from the command to the first step"] = ("s", our_start, None)


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
    recipe = PRESETS[preset]
    config = named_config(model, recipe.width, recipe.heads, norm=recipe.norm, dropout=0.0,
                          vocab_size=bench.data.tokenizer.vocab_size)
    Attention.fused, before = False, Attention.fused
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        masked = torch.arange(round(32 * LENGTH * recipe.mask_rate))
        MaskedLM(config)(torch.ones(32, LENGTH, dtype=torch.long), masked).sum().backward()
    Attention.fused = before
    return counter.get_total_flops() / (32 * LENGTH)


def apart(arguments: argparse.Namespace, row: str, side: str) -> dict:
    """Measure a side of a row in a process of its own, which ends with this one."""
    command = [sys.executable, __file__, "--data", arguments.data, "--row", row, side, "--device", arguments.device]
    command += ["--quick"] if arguments.quick else []
    command += ["--task", arguments.task] if arguments.task else []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    try:
        shown, _ = process.communicate()
    finally:
        process.kill()
    if process.returncode:
        raise InputError(f"{row}, {side}: ended with status {process.returncode}")
    return json.loads(shown.splitlines()[-1])


def measured_here(bench: Bench, row: str, side: str) -> dict:
    unit, ours, theirs = ROWS[row]
    rates = (ours if side == "ours" else theirs)(bench)
    peak = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_initialized() else 0.0
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        peak = peak or int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1e6
    return {"rates": rates, "memory_gb": peak}


def measure_row(bench: Bench, arguments: argparse.Namespace, row: str, limit: float) -> dict:
    """Both sides in turns; prints and returns the row."""
    unit, _, theirs = ROWS[row]
    sides = ["ours", "reference"] if theirs else ["ours"]
    found: dict[str, list[dict]] = {side: [] for side in sides}
    for _ in range(1 if bench.quick else 3):
        for side in sides:
            found[side].append(apart(arguments, row, side))
    record: dict = {"name": row, "unit": unit}
    for side, runs in found.items():
        rates = np.concatenate([run["rates"] for run in runs])
        record[side] = float(np.median(rates))
        record[f"{side}_10_90"] = np.percentile(rates, [10, 90]).tolist()
        record[f"{side}_memory_gb"] = max(run["memory_gb"] for run in runs)
    line = f"{row:44}{record['ours']:12.5g}"
    if theirs:
        ratio = record["ours"] / record["reference"]
        record["ratio"] = 1 / ratio if unit == "ms" else ratio
        line += f"{record['reference']:12.5g} {unit:9}{record['ratio']:6.1f}"
    else:
        line += f"{'':12} {unit}"
    if row.startswith("pre-training"):
        _, preset, model = row.split(", ")
        on = bench.with_vocabulary(4_000) if preset == "quick" else bench
        record["share_of_limit"] = record["ours"] * operations_of_a_token(on, model, preset) / limit
        line += f"   {100 * record['share_of_limit']:.0f} % of the limit"
    print(line, flush=True)
    return record


# ---- how cost grows, and where the time goes -----------------------------------------------------


def growth(bench: Bench) -> dict[str, dict[str, float]]:
    """Tokens a second of quick's models with one thing changed at a time."""
    bench = bench.with_vocabulary(4_000)
    result: dict[str, dict[str, float]] = {}
    changes = {"width": (64, 128, 256, 512, 768), "batch_size": (8, 32, 128)}
    for model in ("bert-1", "bert-6"):
        for field, values in changes.items():
            for value in values:
                heads = {"heads": value // 32} if field == "width" else {}
                rates = our_pretraining(bench, model, "quick", **{field: value}, **heads)
                result.setdefault(f"{model}, {field}", {})[str(value)] = float(np.median(rates))
        for length in (32, 64, 128, 256):
            articles = full_length(bench.data.articles, 4_096, length)
            meta = {**bench.data.meta, "max_length": length}
            data = replace(bench.data, articles=articles, meta=meta)
            rates = our_pretraining(replace(bench, data=data), model, "quick")
            result.setdefault(f"{model}, length", {})[str(length)] = float(np.median(rates))
    for what in ("median", "texts_per_s"):
        for K in (1, 2, 4, 8, 16):
            config = named_config("bert-1", 128, 4, vocab_size=4_000, norm="pre")
            committee = Committee([Classifier(config, classes_of(bench)) for _ in range(K)])
            model = bench.runtime.for_inference(committee)
            latency = measure_latency({"x": model}, bench.tables(128), bench.runtime)["x"]
            result.setdefault(f"members, {what}", {})[str(K)] = latency[what]
    print(json.dumps(result, indent=1))
    return result


KINDS = {"matrix products": "mm|linear|matmul|convolution", "softmax, loss": "softmax|nll|entropy",
         "copies": "copy_", "optimizer": "adamw|optimizer|lerp", "GELU": "gelu",
         "LayerNorm": "layer_norm", "random numbers": "random|bernoulli|rand"}


def profile(bench: Bench) -> dict[str, dict[str, float]]:
    """Shares of the time of pre-training steps, by kind of operation."""
    result: dict[str, dict[str, float]] = {}
    for preset, where in (("paper", bench), ("quick", bench.with_vocabulary(4_000))):
        for model in ("bert-6", "bert-1"):
            with torch.profiler.profile() as profiler:
                our_pretraining(where, model, preset)
            shares: dict[str, float] = {}
            for event in profiler.key_averages():
                kind = "everything else"
                for known, words in KINDS.items():
                    if re.search(words, event.key.lower()):
                        kind = known
                        break
                shares[kind] = shares.get(kind, 0.0) + event.self_cpu_time_total
            total = sum(shares.values())
            result[f"{preset}, {model}"] = {kind: time / total for kind, time in shares.items()}
    print(json.dumps(result, indent=1))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", required=True, metavar="NAME", help="a data folder of the paper's vocabulary and length")
    add("--task", default="", metavar="TASK", help="a task of it (default: the first)")
    add("--quick", action="store_true", help="each side once, fewer steps, one stem")
    add("--rows", nargs="+", metavar="WORD", default=[""], help="only rows whose name begins so; with it, give --out")
    add("--row", nargs=2, metavar=("ROW", "SIDE"), help="one measurement, as a JSON line")
    add("--grow", action="store_true", help="measure how cost grows, instead of the table")
    add("--profile", action="store_true", help="measure where a step's time goes, instead of the table")
    add("--device", default="auto", help="auto (default), cpu, cuda")
    add("--out", type=Path, help="default results/speed-cpu.json or results/speed-NAME-OF-GPU.json")
    arguments = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"
    runtime = choose_runtime(arguments.device)
    folder = open_folder(data_path(arguments.data))
    full = replace(folder, articles=full_length(folder.articles, 4_096), held_out=full_length(folder.held_out, 8))
    bench = Bench(full, arguments.task or next(iter(folder.meta["tasks"])), runtime, arguments.quick)
    if arguments.row:
        print(json.dumps(measured_here(bench, *arguments.row)))
        return
    started = time.perf_counter()
    gpu = runtime.device.type == "cuda"
    place = re.sub(r"\W+", "-", torch.cuda.get_device_name()).lower() if gpu else "cpu"
    mode = "growth-" if arguments.grow else "profile-" if arguments.profile else ""
    out = arguments.out or ROOT / "results" / f"speed-{mode}{place}.json"

    def keep(**measured: object) -> None:
        settings = {"quick": arguments.quick, "task": bench.task, "vocab_size": folder.tokenizer.vocab_size}
        write_json(out, result_record(settings, seconds=round(time.perf_counter() - started),
                                      hardware=runtime.reason, **measured))

    if arguments.grow:
        keep(growth=growth(bench))
    elif arguments.profile:
        keep(profile=profile(bench))
    else:
        limit = matrix_product_rate(runtime)
        print(f"{runtime.reason}; a matrix product: {limit / 1e9:.0f} GFLOP/s\n{'':44}{'ours':>12}{'reference':>12}")
        rows: list[dict] = []
        for row in ROWS:
            if row.startswith(tuple(arguments.rows)) and not (bench.quick and any(s in row for s in STEMS[1:])):
                rows.append(measure_row(bench, arguments, row, limit))
                keep(rows=rows, limit=limit)  # what is measured is not lost with the rest
    print(f"{out} written; {(time.perf_counter() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    run_script(main)
