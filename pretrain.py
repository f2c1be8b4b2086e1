"""pretrain.py - masked-language-model training: masking, optimizers, the loop, checkpoints.

Fourth of the six files, after tokenizer.py, data.py and model.py. Its loop (`train`) is also finetune.py's.

    python pretrain.py                                      BERT-1 on the embedded default, the quick recipe
    python pretrain.py --model bert-6 --data simple          on the data folder data/simple, made by data.py prepare
    python pretrain.py --data simple --max-articles 5000 --set lr=0.003 steps=2000
    python pretrain.py --fill-mask "Paris is the [MASK] of France." runs/pretrain/bert-1-...
    python pretrain.py --show "Paris is the [MASK] of France." runs/pretrain/bert-1-...  every shape, each head's attention
    python pretrain.py --plot runs/pretrain/bert-1-... runs/pretrain/bert-6-...          the loss curves
    torchrun --nproc_per_node=2 pretrain.py --model bert-6                               one run on several processes or GPUs

References
1) BERT's masking and head: Devlin et al., https://arxiv.org/abs/1810.04805
2) The authors' recipe: Gross et al., https://arxiv.org/abs/2507.14871, with their public code (github Rg32601/Tiny-Language-Models)
3) Muon: Jordan et al., https://kellerjordan.github.io/posts/muon/
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import hashlib
import importlib
import io
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import (DataFolder, DeviceTable, InputError, Request, TokenTable, batch_order, data_path, default_name, file_lock,
                  full_disk_named, open_folder, prepare, run_script, setting_differences, write_atomically)
from model import MODELS, POOLINGS, Attention, BertConfig, MaskedLM, attention_weights, count_parameters, named_config
from tokenizer import CLS, FIRST_PIECE, MASK, SEP, Parser, Tokenizer


# ---------------------------------------------------------------------------------------------------- recipes
def setting(default, group: str, text: str):
    """A recipe's field, with the help text of its flag and the group in which the help page shows it."""
    return field(default=default, metadata={"group": group, "help": text})


# groups of the help page
LENGTH, BATCHES, OPTIMIZER, SHAPE = "how long", "batches", "optimizer", "model"
START, TOKENS, FAULTS = "initial weights", "tokens and masks", "the authors' faults, to repeat them"


@dataclass(frozen=True)
class Optimisation:
    """What pre-training and fine-tuning have in common. The defaults are the authors' values."""

    epochs: int = setting(50, LENGTH, "passes over the training texts")
    steps: int = setting(0, LENGTH, "optimizer steps; 0: as many as --epochs make")
    time_budget: float = setting(0.0, LENGTH, "minutes of training instead of --steps and --epochs, with a learning rate that falls to 0 "
                                 "by then; 0: no limit. A run of this kind cannot be repeated bit by bit")
    batch_size: int = setting(32, BATCHES, "texts a step")
    micro_batch: int = setting(0, BATCHES, "texts at once, if a whole batch does not fit the memory (0: the batch); the same gradient, but "
                               "for dropout and a stem's batch statistics")
    like_length: bool = setting(False, BATCHES, "texts of like length share a batch: less padding, but batches are less random")
    optimizer: str = setting("adamw", OPTIMIZER, "adamw, or muon: Muon for the layers' matrices and AdamW for the rest")
    lr: float = setting(5e-5, OPTIMIZER, "peak learning rate of AdamW")
    token_lr: float = setting(1.0, OPTIMIZER, "the token embeddings' learning rate, relative to --lr (fine-tuning from scratch: always 1)")
    position_lr: float = setting(1.0, OPTIMIZER, "the position table's learning rate, relative to --lr (fine-tuning from scratch: "
                                 "always 1)")
    matrix_lr: float = setting(0.02, OPTIMIZER, "peak learning rate of Muon")
    beta2: float = setting(0.999, OPTIMIZER, "AdamW's second decay rate")
    weight_decay: float = setting(0.01, OPTIMIZER, "decoupled weight decay")
    decay_all: bool = setting(True, OPTIMIZER, "decay LayerNorms and biases too, as the authors do")
    clip: float = setting(0.0, OPTIMIZER, "largest norm of the gradient; 0: no clipping")
    warmup: float = setting(0.0, OPTIMIZER, "share of the steps in which the learning rate rises from 0, before it falls to 0")
    dropout: float = setting(0.1, SHAPE, "dropout of embeddings and blocks")
    attention_dropout: float = setting(0.1, SHAPE, "dropout of attention weights")
    fault_schedule: bool = setting(False, FAULTS, "the authors' schedule: a step an epoch, the first epoch at learning rate 0")


@dataclass(frozen=True)
class PretrainRecipe(Optimisation):
    """Everything that decides what a pre-training run computes, but for model, text and seed."""

    width: int = setting(768, SHAPE, "width of the base model, a multiple of 64")
    heads: int = setting(0, SHAPE, "attention heads at that width; 0: one for each 64")
    norm: str = setting("post", SHAPE, "LayerNorm post (BERT) or pre (inside the residual branch)")
    short_conv: bool = setting(False, SHAPE, "each layer reads a token with a share of its two neighbours: depthwise convolutions over "
                               "three tokens, before attention and before the feed-forward part")
    init_std: float = setting(0.02, START, "standard deviation of the initial weights")
    local_start: float = setting(0.0, START, "above 0: heads begin by looking at neighbouring tokens, this sharply")
    count_start: float = setting(0.0, START, "above 0: token embeddings begin as what counting pairs of tokens tells, with this "
                                 "standard deviation")
    count_window: int = setting(0, START, "with --count-start, above 0: count tokens at most so many places apart, each pair as one over "
                                "its distance, instead of all that share a text")
    mask_rate: float = setting(0.15, TOKENS, "share of the tokens to predict in training (evaluation: always 0.15)")
    head_sample: int = setting(0, TOKENS, "above 0: in training, answer among so many pieces, those that the batch asks for and others "
                               "drawn at random (evaluation: always among all; the training loss reads a little lower)")
    fault_special: bool = setting(False, FAULTS, "authors' fault: random replacements may be special tokens")
    fault_stem: bool = setting(False, FAULTS, "authors' fault: padding leaks through the convolutional stem")
    fault_ids: bool = setting(False, FAULTS, "authors' fault: [CLS] stands where [PAD] should, so its embedding is frozen at 0")


PRESETS = {
    "paper": PretrainRecipe(),
    "quick": PretrainRecipe(
        steps=300, optimizer="muon", lr=1e-2, position_lr=0.05, matrix_lr=0.02, beta2=0.98, weight_decay=0.0,
        decay_all=False, clip=1.0, warmup=0.05, dropout=0.0, attention_dropout=0.0, width=128, heads=4, norm="pre", local_start=2.0,
        count_start=0.1, mask_rate=0.25),
    "smoke": PretrainRecipe(
        steps=6, batch_size=8, like_length=True, lr=1e-3, decay_all=False, clip=1.0, warmup=0.2, dropout=0.0,
        attention_dropout=0.0, width=64, norm="pre"),
}


def chosen_recipe(preset: Optimisation, assignments: Sequence[str], flag: str = "--set"):
    """A preset with FIELD=VALUE assignments laid over. Raises InputError for unknown fields and impossible values."""
    fields = {f.name: f for f in dataclasses.fields(preset)}
    given: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or name not in fields:
            raise InputError(f"{flag} {assignment}: write FIELD=VALUE; the fields are {', '.join(fields)}")
        kind: Any = type(fields[name].default)
        try:
            given[name] = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
        except (ValueError, KeyError):
            raise InputError(f"{flag} {assignment}: {text!r} is no {kind.__name__}") from None
    return laid_over(preset, given)


def laid_over(preset, given: dict):
    """A preset with other values for some of its settings. Raises InputError for impossible ones."""
    if "epochs" in given:  # which a preset's number of steps would overrule
        given = {"steps": 0, **given}
    return checked(dataclasses.replace(preset, **given))


def checked(recipe: Optimisation) -> Optimisation:
    """The recipe itself. Raises InputError, naming the flag, for impossible values."""
    for name, known in (("optimizer", ("adamw", "muon")), ("norm", ("post", "pre")), ("pooling", POOLINGS)):
        if getattr(recipe, name, known[0]) not in known:
            raise InputError(f"{name}={getattr(recipe, name)}: there are {' and '.join(known)}")
    bounds = {"batch_size": (1, 10**6), "epochs": (1, 10**6), "steps": (0, 10**9), "min_steps": (0, 10**9), "micro_batch": (0, 10**6),
              "lr": (0, 1e3), "matrix_lr": (0, 1e3), "token_lr": (0, 1e3), "position_lr": (0, 1e3), "weight_decay": (0, 1e3),
              "clip": (0, 1e9), "heads": (0, 1024), "time_budget": (0, 1e5),
              "beta2": (0, 0.99999), "warmup": (0, 1), "dropout": (0, 0.99), "attention_dropout": (0, 0.99), "init_std": (0, 10),
              "width": (64, 16384), "mask_rate": (0.001, 1), "local_start": (0, 100), "count_start": (0, 10),
              "count_window": (0, 4096), "head_sample": (0, 10**6)}
    for name, (low, high) in bounds.items():
        if not low <= getattr(recipe, name, low) <= high:
            raise InputError(f"{name}={getattr(recipe, name)}: must lie in {low}..{high}")
    if recipe.time_budget and recipe.fault_schedule:
        raise InputError("fault_schedule counts epochs, time_budget does not: leave one out")
    if isinstance(recipe, PretrainRecipe):
        try:
            named_config("bert-1", recipe.width, recipe.heads, norm=recipe.norm)
        except ValueError as error:
            raise InputError(f"--width, --heads: {error}") from None
    return recipe


def number(least: int) -> Callable[[str], int]:
    """An argparse type: a whole number, `least` or more, up to 9 digits."""
    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to 999999999")
        return int(text)
    return parse


# --------------------------------------------------------------------------------------------------- hardware
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Hardware:
    """Where to compute, in which type matrix products run, and why."""

    device: torch.device
    dtype: torch.dtype
    reason: str

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def for_inference(self, model: Model) -> Model:
        """The model itself, on the device, its linear layers' weights in the type of matrix products: autocast, which would round them
        at every call to the same numbers, has nothing left to do. What the model frees is kept for its next call."""
        keep_freed_memory()
        for part in model.modules():
            if isinstance(part, nn.Linear):
                part.to(self.dtype)
        return model.to(self.device).eval()


def choose_hardware(device: str = "auto", dtype: str = "auto") -> Hardware:
    """bf16 where the hardware has it, else fp16 (GPUs) or fp32. device, dtype: "auto", or what the user insists on."""
    why = "as asked"
    if device == "auto":
        mps = torch.backends.mps.is_available() and world_size() == 1  # which gloo does not serve
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
        why = {"cuda": "a CUDA GPU is there", "mps": "Apple's GPU is there", "cpu": "no GPU found"}[device]
    if not re.fullmatch(r"cpu|mps|cuda(:\d{1,4})?", device) or device == "mps" and not torch.backends.mps.is_available():
        raise InputError(f"--device {device}: no such device here; leave the flag out, or use --device cpu")
    if device.startswith("cuda") and int(device.partition(":")[2] or 0) >= (found := torch.cuda.device_count()):
        raise InputError(f"--device {device}: PyTorch finds {found or 'no'} CUDA GPU{'s' * (found > 1)} here; "
                         + ("they are numbered from 0" if found else "use --device cpu"))
    if device == "cuda" and world_size() > 1:
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            raise InputError(f"--nproc_per_node: this machine has {gpus} GPUs; start as many processes, or use --device cpu")
        device = f"cuda:{local}"
    if ":" in device:
        torch.cuda.set_device(device)
    if device.startswith("cuda"):
        native = torch.cuda.get_device_capability(device) >= (8, 0)
        best, reason = ("bf16", "native on this GPU") if native else ("fp16", "this GPU has no bf16; loss scaling is on")
        name = torch.cuda.get_device_name(device)
    elif device == "cpu":
        has = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)() or getattr(torch.cpu, "_is_amx_tile_supported", bool)()
        best, reason = ("bf16", "AVX512-BF16 or AMX found") if has else ("fp32", "no AVX512-BF16 or AMX: bf16 would be slower")
        name = f"CPU, {torch.get_num_threads()} threads"
    else:
        best, reason, name = "fp32", "no faster type was tried here", device
    chosen = best if dtype == "auto" else dtype
    reason = reason if dtype == "auto" else "as asked"
    name = f"{world_size()} ranks: {name}" if world_size() > 1 else name
    types = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return Hardware(torch.device(device), types[chosen], f"{name} ({why}); matrix products in {chosen} ({reason})")


def keep_freed_memory() -> None:
    """Have the C library keep what is freed for the next step, instead of giving it back to the system (glibc; elsewhere nothing happens).

    A step of the paper's BERT-6 frees 1.5 GB and asks for them again, and the system fills every page with zeros before it lends it
    anew, which takes more than a quarter of the step on two cores. Kept are blocks of up to 1 GB (of up to 32 MB by glibc before 2.35).
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another system, another C library
        mallopt = ctypes.CDLL(None).mallopt
        if any(mallopt(-3, size) for size in (2**30, 2**25)):  # M_MMAP_THRESHOLD: the larger one, where that is allowed
            mallopt(-1, 2**30)  # M_TRIM_THRESHOLD


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument("--preset", choices=tuple(PRESETS), default="quick",
                       help="paper: the authors' set-up; quick: minutes on two cores (default); smoke: seconds, for tests")
    group.add_argument("--device", default="auto", help="auto (default), cpu, cuda, mps")
    group.add_argument("--dtype", default="auto", choices=("auto", "fp32", "bf16", "fp16"), help="of matrix products")
    group.add_argument("--compile", action="store_true", help="torch.compile model and loss: meant for a GPU (needs a C++ compiler)")
    group.add_argument("--runs-dir", type=Path, default=Path("runs"), metavar="DIR", help="results (default %(default)s)")
    group.add_argument("--fresh", action="store_true", help="start again where a run folder has other settings, or is finished")


def can_compile(wanted: bool) -> bool:
    """Whether to compile: if that is wanted and the C++ compiler is there that torch.compile calls. If it is not, a note says so."""
    found = shutil.which(os.environ.get("CXX") or {"win32": "cl", "darwin": "clang++"}.get(sys.platform, "g++")) is not None
    if wanted and not found:
        print("note: --compile needs a C++ compiler and none was found; going on without", file=sys.stderr)
    return wanted and found


def maybe_compile(function: Callable, wanted: bool, fixed_shapes: bool = False) -> Callable:
    """The compiled function, where that is wanted, else itself.

    fixed_shapes: those of its tensors never change (so an epoch's last, smaller batch is not for it). Then a GPU replays its forward and
    its backward pass as one CUDA graph each; else the host starts every kernel, which takes longer than a small model's arithmetic.
    """
    if not wanted:
        return function
    torch.compiler.reset()  # forget what an earlier run compiled: of one function only so many versions are kept
    return torch.compile(function, dynamic=False, mode="reduce-overhead") if fixed_shapes else torch.compile(function, dynamic=True)


# ------------------------------------------------------------------------------------------- several processes
# Under torchrun several processes, the ranks, train one model: each holds all of it, draws the order and the masks of the whole
# batch, and computes its slice. DistributedDataParallel averages the gradients, so all ranks make the same step.
def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextlib.contextmanager
def ranks() -> Iterator[None]:
    """Joins the other ranks, where torchrun has started this process. Only rank 0 prints what is not an error."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield
        return
    backends = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backends, timeout=timedelta(days=1))  # the others wait while rank 0 downloads
    try:
        with contextlib.redirect_stdout(sys.stdout if rank() == 0 else open(os.devnull, "w", encoding="utf-8")):
            yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def rank_0_first() -> Iterator[None]:
    """The others come when rank 0 is through, and find on the disk what it has left there."""
    if rank():
        try:
            agree(0)
        except RuntimeError:  # rank 0 has ended, and said why
            sys.exit(2)
    yield
    if rank() == 0:
        agree(0)


def agree(mine: int) -> int:
    """The largest of all ranks' values, so that they go on and stop together: each waits here for all."""
    if world_size() == 1:
        return mine
    value = torch.tensor(mine)  # on the CPU: nobody waits for a GPU
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)


# ------------------------------------------------------------------------------------------------- run folder
def result_record(settings: dict, seconds: float, **more) -> dict:
    """What every results.json begins with: enough to repeat it and to know where it was measured."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    machine = {"system": platform.platform(terse=True), "cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if torch.cuda.is_initialized():  # there is one, and it was used
        machine["gpu"] = torch.cuda.get_device_name()
    here, script = Path(__file__).resolve().parent, Path(sys.argv[0]).resolve()
    git = None
    with contextlib.suppress(OSError):
        found = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=False)
        git = found.stdout.strip() or None
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    command = shlex.join(["python", script.relative_to(here).as_posix() if here in script.parents else script.name, *sys.argv[1:]])
    return {"command": command, "machine": machine, "versions": versions, "git": git, "seconds": round(seconds, 1),
            "settings": settings, **more}


class Run:
    """A run folder: config.json, log.jsonl, last.pt, tokenizer.model, results.json. A context manager, which holds the
    folder's lock: two processes never train in one folder.

    settings: everything that decides the result. A folder with other settings is refused, unless fresh. One in which another
    process trains is refused, unless wait. Of several ranks, 0 alone holds the lock and writes.
    """

    def __init__(self, folder: Path, settings: dict, tokenizer: Tokenizer, fresh: bool = False, wait: bool = False) -> None:
        self.folder, self.tokenizer, self.fresh, self.wait = folder, tokenizer, fresh, wait
        self.settings = json.loads(json.dumps(settings))  # tuples become lists, as they will be when read back
        self.results: dict | None = None

    def __enter__(self) -> Run:
        with rank_0_first():
            self.open()
        return self

    def open(self) -> None:
        if rank() and not (self.folder / "config.json").exists():
            raise InputError(f"{self.folder}: rank 0 has made it, rank {rank()} does not see it; name a --runs-dir that all machines share")
        self.folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            if rank() == 0:
                stack.enter_context(file_lock(self.folder / "lock", wait=self.wait))
                for left in self.folder.glob("*.tmp"):  # what a killed process had not finished writing
                    left.unlink(missing_ok=True)
            if self.fresh and rank() == 0:
                for name in ("results.json", "last.pt", "log.jsonl", "logits.npz", "config.json"):
                    (self.folder / name).unlink(missing_ok=True)
            if (self.folder / "config.json").exists():
                before = read_json(self.folder / "config.json")
                if differences := setting_differences(before, self.settings):
                    raise InputError(f"{self.folder}: made with other settings ({', '.join(differences)}); "
                                     "choose another --name, or --fresh to throw it away")
                if (self.folder / "results.json").exists():
                    self.results = read_json(self.folder / "results.json")
            else:
                with write_atomically(self.folder / "tokenizer.model") as file:
                    file.write(self.tokenizer.model)
                write_json(self.folder / "config.json", self.settings)
            self.held = stack.pop_all()  # until __exit__; an error above gives the lock back

    def __exit__(self, *error) -> None:
        self.held.__exit__(*error)

    def log(self, **record) -> None:
        if rank():
            return
        line = json.dumps(record) + "\n"
        with full_disk_named(self.folder / "log.jsonl"), open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(line)

    def save(self, step: int, model: nn.Module, optimizers: list[torch.optim.Optimizer], **more) -> None:
        """A checkpoint, atomically. A finished run's (no optimizers) holds the weights alone."""
        if rank():
            return
        save_tensors(self.folder / "last.pt", {"step": step, "model": model.state_dict(),
                                               "optimizers": [o.state_dict() for o in optimizers], **more})

    def resume(self, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict:
        """Load last.pt, if there is one, and cut the log back to it. Returns the checkpoint ({"step": 0} for none)."""
        state: dict = {"step": 0}
        if (self.folder / "last.pt").exists():
            state = load_checkpoint(self.folder)
            load_weights(model, state["model"], self.folder)
            with misfit_named(self.folder / "last.pt"):
                for optimizer, saved in zip(optimizers, state["optimizers"]):
                    optimizer.load_state_dict(saved)
        if rank() == 0 and (log := self.folder / "log.jsonl").exists():
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
            kept = [line for line in lines if -1 < logged_step(line) <= state["step"]]
            write_text(log, "".join(line + "\n" for line in (kept if state["step"] else [])))
        return state


def logged_step(line: str) -> int:
    """The step of a line of the log; -1 for one that was cut short or is none of ours."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return -1


def save_tensors(path: Path, state: object) -> None:
    """torch.save, atomically. It goes through memory, since torch.save hides a full disk behind errors of its own."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with write_atomically(path) as file:
        file.write(buffer.getbuffer())


def write_text(path: Path, text: str) -> None:
    with write_atomically(path) as file:
        file.write(text.encode("utf-8"))


def write_json(path: Path, record: dict) -> None:
    write_text(path, json.dumps(record, indent=1) + "\n")


def read_json(path: Path, *required: str) -> dict:
    """A JSON object from a run folder. Raises InputError if it is damaged, or lacks a required key."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict):
            raise ValueError("not an object")
        if missing := [key for key in required if key not in record]:
            raise ValueError(f"no {missing[0]!r} in it: of another version?")
        return record
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({error}); is this a run folder? --fresh makes it anew") from None


def load_settings(folder: Path, kind: str) -> dict:
    """The config.json of a run folder of this kind ("pretrain" or "finetune")."""
    settings = read_json(folder / "config.json")
    if settings.get("kind") != kind:
        raise InputError(f"{folder}: not a {kind} run; name a folder under {Path('runs') / kind}")
    return read_json(folder / "config.json", "config", "seed", "tokenizer", *{"pretrain": ("model",), "finetune": ("classes",)}[kind])


def config_of(folder: Path, kind: str = "pretrain") -> BertConfig:
    """The shape of the model in a run folder."""
    with misfit_named(folder / "config.json"):
        return BertConfig(**load_settings(folder, kind)["config"])


def tokenizer_of(folder: Path, kind: str = "pretrain") -> Tokenizer:
    """The tokenizer of a run folder; no other fits its model."""
    tokenizer = Tokenizer.load(folder / "tokenizer.model")
    if tokenizer.hash != load_settings(folder, kind)["tokenizer"]:
        raise InputError(f"{folder / 'tokenizer.model'}: not the tokenizer this run was made with; put that one back, or train anew")
    return tokenizer


def load_checkpoint(folder: Path) -> dict:
    """The checkpoint of a run folder, on the CPU."""
    if not (folder / "last.pt").exists():
        raise InputError(f"{folder}: no last.pt in it; name a run folder, such as runs/pretrain/...")
    state = load_tensors(folder / "last.pt")
    if not isinstance(state, dict) or not all(isinstance(state.get(key), kind) for key, kind in
                                              (("step", int), ("model", dict), ("optimizers", list))):
        raise InputError(f"{folder / 'last.pt'}: not a checkpoint of ours; delete it, or its run folder: it is made again")
    return state


@contextlib.contextmanager
def misfit_named(path: Path) -> Iterator[None]:
    """Turns whatever Python and PyTorch raise over contents of another version or model into one line that names the file."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise InputError(f"{path}: does not fit this model ({type(error).__name__}), is it of another version? "
                         "Delete its run folder: it is made again") from None


def load_weights(model: nn.Module, weights: dict[str, Tensor], folder: Path) -> None:
    """Put a checkpoint's weights into a model. Raises InputError where they are another model's."""
    with misfit_named(folder / "last.pt"):
        model.load_state_dict(weights)


def load_tensors(path: Path):
    """What torch.save wrote: tensors and plain values only, nothing is executed."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises a dozen kinds for a damaged file; all mean the same here
        raise InputError(f"{path}: damaged ({type(error).__name__}); delete it, or its run folder: it is made again") from None


# ------------------------------------------------------------------------------------------------- optimizers
class Muon(torch.optim.Optimizer):
    """Momentum whose update is replaced by the nearest (semi-)orthogonal matrix, found by Newton-Schulz iteration.

    Not torch.optim.Muon, because that one computes in bf16 (slow without hardware for it), takes a fused query-key-value
    matrix for one, and orthogonalises matrices one by one: here those of one shape go through as one batch.
    """

    def __init__(self, matrices: Sequence[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0,
                 dtype: torch.dtype = torch.float32) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype  # of the iteration's products; bfloat16 is good enough, and float16 is not

    @torch.no_grad()
    def step(self, closure=None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p not in self.state:
                    self.state[p]["velocity"] = torch.zeros_like(p)
                velocity = self.state[p]["velocity"]
                velocity.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(velocity, group["momentum"])  # Nesterov
                parts = p.size(0) // p.size(1) if p.size(0) == 3 * p.size(1) else 1  # query, key, value
                for piece, direction in zip(p.chunk(parts), update.chunk(parts)):
                    by_shape.setdefault(tuple(piece.shape), []).append((piece, direction))
            for (rows, columns), pairs in by_shape.items():
                directions = orthogonalise(torch.stack([d for _, d in pairs]).to(self.dtype))
                for (piece, _), direction in zip(pairs, directions):
                    piece.mul_(1 - group["lr"] * group["weight_decay"])
                    piece.add_(direction, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)


def orthogonalise(g: Tensor, iterations: int = 5) -> Tensor:
    """(n, rows, columns) -> matrices with the same singular vectors and singular values near 1 (0.7 to 1.2)."""
    a, b, c = 3.4445, -4.7750, 2.0315  # a quintic that pulls every singular value in (0, 1] there fast; reference 3
    tall = g.size(1) > g.size(2)
    x = g.mT if tall else g
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        xx = x @ x.mT
        polynomial = torch.baddbmm(xx, xx, xx, beta=b, alpha=c)  # b xx + c xx^2, in one pass
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


def make_optimizers(model: nn.Module, recipe: Optimisation, dtype: torch.dtype = torch.float32) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the matrices inside the layers and AdamW for embeddings, heads, norms, biases, short
    convolutions.

    dtype: of Muon's matrix products, float32 or bfloat16.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in named if recipe.optimizer == "muon" and ".layers." in name and p.ndim == 2]
    chosen = {id(p) for p in matrices}
    tables = {"bert.token.weight": recipe.token_lr, "bert.position.weight": recipe.position_lr}
    rest = [p for name, p in named if id(p) not in chosen and name not in tables]
    decayed = [p for p in rest if recipe.decay_all or p.ndim >= 2]
    undecayed = [p for p in rest if not (recipe.decay_all or p.ndim >= 2)]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": undecayed, "weight_decay": 0.0},
              *({"params": [p], "weight_decay": recipe.weight_decay, "lr": recipe.lr * tables[name]}
                for name, p in named if name in tables)]
    adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=recipe.lr, betas=(0.9, recipe.beta2), fused=True)
    return [adamw, Muon(matrices, recipe.matrix_lr, weight_decay=recipe.weight_decay, dtype=dtype)] if matrices else [adamw]


def schedule(recipe: Optimisation, step: int, steps: int, steps_per_epoch: int) -> float:
    """The factor on the learning rates at a step: linear from 0 in the warm-up, then linear to 0 at the end."""
    if recipe.fault_schedule:  # once an epoch, with an epoch of "warm-up" at factor 0
        epochs, epoch = max(2, steps // steps_per_epoch), step // steps_per_epoch
        return 0.0 if epoch == 0 else (epochs - epoch) / (epochs - 1)
    warmup = int(recipe.warmup * steps)
    return (step + 1) / warmup if step < warmup else (steps - step) / (steps - warmup)


# --------------------------------------------------------------------------------------------------- the loop
@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of dying of them, so that a step is always finished and saved."""
    caught: list[int] = []
    try:
        before = {s: signal.signal(s, lambda number, frame: caught.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread
        before = {}
    try:
        yield caught
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


@contextlib.contextmanager
def short_memory_named(folder: Path) -> Iterator[None]:
    """Turns memory that does not suffice into an InputError that names the flags to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # of the first, one kind a device
        if not isinstance(error, MemoryError) and not re.search("out of memory|allocate memory", str(error)):
            raise
        raise InputError(f"{folder}: out of memory; lower --micro-batch (a part of the batch at a time, the same gradient; "
                         "for fine-tuning in committee.py --ft-micro-batch), else --max-length, --width or --jobs. "
                         "The last checkpoint is kept") from None


def update_weights(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], scaler: torch.amp.GradScaler, clip: float) -> None:
    """One step of the optimizers with the gradients that are there (clip: their largest norm, 0 for any); none are left."""
    overflow = False
    if clip:
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
        overflow = scaler.is_enabled() and not norm.isfinite()
    for optimizer in optimizers:
        if not overflow:  # if only one optimizer's gradients have overflown, the other is not to step either
            scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    scaler.update()


def all_finite(model: nn.Module) -> bool:
    return bool(torch.stack([t.isfinite().all() for t in model.state_dict().values()]).all())


def train(run: Run, model: nn.Module, recipe: Optimisation, hardware: Hardware, seed: int, steps: int, steps_per_epoch: int,
          gradients: Callable[[int, Callable[[Tensor], None]], tuple[Tensor, int]],
          evaluate: Callable[[], dict] | None = None, label: str = "", header: dict | None = None,
          save_every: float = 60.0) -> dict:
    """The loop: gradients, step, log, evaluate, save. Goes on from the run's checkpoint, if it has one.

    gradients(step, backward): computes the loss of that step, calls backward on it (several times when accumulating) and
    returns (mean loss, tokens seen). Everything random is drawn after the step's own seed is set, so a resumed run equals
    an uninterrupted one. evaluate(): a record for the log, five times in a run. header: the log's first line. save_every:
    seconds between checkpoints.
    Returns the last evaluation with the mean loss of the last tenth of the run, its steps and the seconds of training.
    """
    keep_freed_memory()
    optimizers = make_optimizers(model, recipe, torch.bfloat16 if hardware.dtype == torch.bfloat16 else torch.float32)
    scaler = torch.amp.GradScaler(hardware.device.type, enabled=hardware.dtype == torch.float16)
    peaks = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    state = run.resume(model, optimizers)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]  # those of the checkpoint, by now
    step, tokens, seconds, record = state["step"], state.get("tokens", 0), state.get("seconds", 0.0), state.get("record", {})
    tail_loss, tail_steps = state.get("tail", [0.0, 0])
    if state.get("scaler") and scaler.is_enabled():
        scaler.load_state_dict(state["scaler"])
    losses = list(state["losses"].to(hardware.device)) if "losses" in state else []  # since the last line of the log
    saved = window_start = time.perf_counter()
    started, window_tokens = saved - seconds, 0
    end = 10_000 if recipe.time_budget else steps
    log_every = max(1, end // 100)

    def progress() -> int:
        """How far the run has come on its way to `end`: in steps, or in ten-thousandths of the time budget."""
        return agree(int(end * (time.perf_counter() - started) / (60 * recipe.time_budget))) if recipe.time_budget else step

    now = progress() if tail_steps or not recipe.time_budget else min(progress(), end - 1)  # at least one step closes a run
    if step == 0 and header:
        run.log(step=0, **header)
    model.train()

    def save() -> None:
        if losses and not torch.stack(losses).isfinite().all() or not all_finite(model):
            return  # the last good checkpoint stays; the next line of the log stops the run
        run.save(step, model, optimizers, tokens=tokens, seconds=time.perf_counter() - started, record=record,
                 tail=[tail_loss, tail_steps], scaler=scaler.state_dict(), **({"losses": torch.stack(losses)} if losses else {}))

    with stop_signals() as stop, tqdm(total=None if recipe.time_budget else steps, initial=step, desc=label, unit="step", mininterval=1.0,
                                      dynamic_ncols=True, leave=False, disable=rank() > 0) as bar:
        while now < end:
            # through a hash, because PyTorch's CPU generator keeps the low 32 bits of a seed alone
            torch.manual_seed(int(np.random.SeedSequence((seed, step)).generate_state(1)[0]))
            factor = schedule(recipe, now, end, steps_per_epoch)
            for group, peak in zip(groups, peaks):
                group["lr"] = peak * factor
            loss, seen = gradients(step, lambda part: scaler.scale(part).backward())
            update_weights(model, optimizers, scaler, recipe.clip)
            losses.append(loss)
            step, tokens, window_tokens = step + 1, tokens + seen, window_tokens + seen
            bar.update()
            before, now = now, progress()
            if now // log_every > before // log_every or now >= end:
                mean = torch.stack(losses).mean().item()  # the one place where the host waits for the device
                if not math.isfinite(mean) or now >= end and not all_finite(model):
                    raise InputError(f"{run.folder}: the loss is {mean} at step {step}, or the weights are not finite; lower --lr, "
                                     "or use --dtype fp32. The last good checkpoint is kept")
                if now > end * 0.9:
                    tail_loss, tail_steps = tail_loss + mean * len(losses), tail_steps + len(losses)
                losses.clear()
                rate = window_tokens / (time.perf_counter() - window_start)
                run.log(step=step, tokens=tokens, loss=round(mean, 5), factor=round(factor, 5), tokens_per_s=round(rate),
                        seconds=round(time.perf_counter() - started, 2))
                bar.set_postfix_str(f"loss {mean:.3f}, {rate / 1e3:.1f}k tokens/s, {100 * min(1, now / end):.0f} %")
                window_tokens, window_start = 0, time.perf_counter()
                if evaluate and (now // (20 * log_every) > before // (20 * log_every) or now >= end):
                    model.eval()
                    record = evaluate()
                    model.train()
                    run.log(step=step, **record)
                    if rank() == 0:
                        bar.write(f"{label} step {step}: " + ", ".join(f"{k} {v:.4g}" for k, v in record.items()), file=sys.stderr)
                    window_start = time.perf_counter()
            told = agree(stop[0] if stop else 0)
            if told or time.perf_counter() - saved > save_every:
                save()
                saved = time.perf_counter()
            if told and rank() == 0:
                print(f"stopped at step {step}, {100 * min(1, now / end):.0f} % of the run; the same command (without --fresh) goes on "
                      "from there", file=sys.stderr)
            if told:
                sys.exit(128 + told)
        seconds = time.perf_counter() - started
        run.save(step, model, [], tokens=tokens, seconds=seconds, record=record, tail=[tail_loss, tail_steps])
        if told := agree(stop[0] if stop else 0):  # it came in the last step, or while that was saved
            sys.exit(128 + told)
    model.eval()
    return {**record, "train_loss": tail_loss / max(1, tail_steps), "steps": step, "tokens": tokens, "seconds": seconds}


class Batches:
    """Batches of text indices by step; each epoch's order is a function of (seed, epoch)."""

    def __init__(self, lengths: np.ndarray, recipe: Optimisation, seed: int) -> None:
        self.lengths, self.recipe, self.seed = lengths, recipe, seed
        self.per_epoch = -(-len(lengths) // recipe.batch_size)
        self.epoch, self.order = -1, list[np.ndarray]()

    def __getitem__(self, step: int) -> np.ndarray:
        epoch, index = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            self.epoch = epoch
            self.order = batch_order(self.lengths, self.recipe.batch_size, self.seed, epoch, self.recipe.like_length)
        return self.order[index]


# ------------------------------------------------------------------------------------------- a start from counts
def count_pairs(table: TokenTable, vocab_size: int, device: torch.device) -> Tensor:
    """In how many pairs of positions, over all texts, one token stands at the first and the other at the second: (vocab_size,
    vocab_size), fp32. Rows and columns of special tokens hold padding too, and are to be passed over.

    The time grows with texts x length^2 (a second for ten thousand of 128 tokens), the memory is 8 V^2 bytes, 12 of very much text.
    """
    size = torch.int32 if int((table.lengths**2).sum()) < 2**31 else torch.int64  # no count is larger than that sum
    texts, cells = DeviceTable(table, device), torch.zeros(vocab_size**2, dtype=size, device=device)
    together = max(1, 4_000_000 // int(table.lengths.max()) ** 2)  # texts, for pairs in some ten megabytes
    for first in range(0, len(table), together):
        ids = texts.batch(np.arange(first, min(first + together, len(table))))  # (texts, T)
        seen = (ids[:, :, None] * vocab_size + ids[:, None, :]).flatten()  # each pair of positions; those with padding count as [PAD]
        cells.index_add_(0, seen, torch.ones_like(seen, dtype=size))
    return cells.view(vocab_size, vocab_size).float()


def count_neighbours(table: TokenTable, vocab_size: int, device: torch.device, window: int) -> Tensor:
    """How often each two tokens stand at most `window` places apart in a text, each time as one over their distance (after GloVe,
    Pennington et al., 2014, whose windows are of ten): (vocab_size, vocab_size), fp32, special tokens as in count_pairs.

    The time grows with tokens x window (six seconds for 90,000 openings, 16,000 pieces and a window of five), the memory is 12 V^2 bytes.
    """
    texts, cells = DeviceTable(table, device), torch.zeros(vocab_size**2, dtype=torch.float64, device=device)
    together = max(1, 1_000_000 // int(table.lengths.max()))
    for first in range(0, len(table), together):
        ids = texts.batch(np.arange(first, min(first + together, len(table))))  # (texts, T)
        for distance in range(1, min(window, ids.size(1) - 1) + 1):
            seen = (ids[:, :-distance] * vocab_size + ids[:, distance:]).flatten()
            cells.index_add_(0, seen, torch.full(seen.shape, 1 / distance, dtype=cells.dtype, device=device))
    cells = cells.view(vocab_size, vocab_size).float()
    return cells + cells.T


@torch.no_grad()
def count_embeddings(table: TokenTable, vocab_size: int, width: int, device: torch.device | str = "cpu", window: int = 0) -> Tensor:
    """What counting alone tells of the tokens: vectors (vocab_size, width) of standard deviation 1; 0 for special tokens.

    The leading directions of the positive pointwise mutual information of the pairs, max(0, log p(a, b) / (p(a) p'(b))) with p' the
    0.75th power of p, are the vectors: tokens that share texts lie near each other, with a window those that share neighbours (Levy and
    Goldberg, 2014, "Neural word embedding as implicit matrix factorization"). The same for every seed. Takes 0.1 GB for 4,000 pieces,
    8 GB for the paper's 30,522, half as much again with a window; raises InputError where that is too much.
    """
    device = torch.device(device if torch.device(device).type == "cuda" else "cpu")  # other devices lack a decomposition or two
    if vocab_size > (limit := 32_768):
        raise InputError(f"counting pairs: a vocabulary of {vocab_size} pieces is too large, {limit} is the most here; "
                         "use a smaller one, or --count-start 0")
    pairs = count_neighbours(table, vocab_size, device, window) if window else count_pairs(table, vocab_size, device)
    pairs[:FIRST_PIECE], pairs[:, :FIRST_PIECE] = 0, 0
    of_one = pairs.sum(1)
    expected = of_one**0.75  # p': a power below 1, so that rare tokens do not get the largest values
    information = pairs.div_(of_one[:, None]).div_(expected / expected.sum()).log_().nan_to_num_(0.0, neginf=0.0).clamp_(min=0.0)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        vectors, values, _ = torch.svd_lowrank(information, q=min(vocab_size, width + 20), niter=4)
    vectors = (vectors * values.sqrt())[:, :width]
    return (vectors / vectors[FIRST_PIECE:].std()).cpu()


@torch.no_grad()
def start_from_counts(model: MaskedLM, table: TokenTable, std: float, device: torch.device | str, folder: Path, window: int = 0) -> None:
    """Token embeddings from count_embeddings, and an output bias from the tokens' frequencies: before its first step the model
    is at the unigram baseline, and knows which words go together.

    folder: keeps what was counted, for the next member of the committee.
    """
    V, C = model.config.vocab_size, model.config.width
    program = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]  # whoever changes how it counts is not to get the old counts
    path = folder / f"counts-{C}-{f'window-{window}-' if window else ''}{program}.pt"
    with file_lock(path.with_suffix(".lock"), wait=True):  # of several processes, one counts
        if not path.exists():
            save_tensors(path, count_embeddings(table, V, C, device, window))
        vectors = std * load_tensors(path)
    model.bert.token.weight[FIRST_PIECE:, : vectors.size(1)] = vectors[FIRST_PIECE:]
    model.norm.weight.fill_(model.config.init_std / std)  # the embeddings are the output layer too: logits as small as ever
    seen = torch.from_numpy(np.bincount(table.tokens, minlength=V)[FIRST_PIECE:] + 1.0)
    model.bias[FIRST_PIECE:] = (seen / seen.sum()).log().float()
    model.bias[:FIRST_PIECE] = model.bias.min()


# ------------------------------------------------------------------------------------- masked language modelling
def mask_tokens(input_ids: Tensor, vocab_size: int, rate: float = 0.15, generator: torch.Generator | None = None,
                special_replacements: bool = False, count: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """BERT's masking: each ordinary token is chosen with probability `rate`; of the chosen, 80 % become [MASK], 10 %
    another token drawn at random, 10 % stay. One uniform draw decides both.

    input_ids: (B, T) -> masked ids (B, T), positions (M,) into the flattened batch, labels (M,). No special token is
    chosen, and none inserted (unless special_replacements, the authors' fault).

    count: above 0, M is this number, however many were chosen: a GPU's host need not wait to learn it, and shapes stay the same. If more
    were chosen, the last of them are left as they are; if fewer, position 0, a [CLS], fills up, unchanged and with the label -100.
    """
    # Exercise: choose whole words, all pieces of one together. The loss rises; is the model a better start for a classifier?
    draw = torch.rand(input_ids.shape, generator=generator, device=input_ids.device)
    chosen = (draw < rate) & (input_ids >= FIRST_PIECE)
    flat, chosen = input_ids.flatten(), chosen.flatten()
    positions = (chosen.nonzero_static(size=count, fill_value=0) if count else chosen.nonzero()).squeeze(1)  # (M,)
    labels = flat[positions]
    share = draw.flatten()[positions] / rate  # uniform in [0, 1) once more, given that the token was chosen
    random_ids = torch.randint(0 if special_replacements else FIRST_PIECE, vocab_size, labels.shape, generator=generator,
                               device=input_ids.device)
    replacement = torch.where(share < 0.8, MASK, torch.where(share < 0.9, random_ids, labels))
    if count:
        ordinary = labels >= FIRST_PIECE
        replacement, labels = torch.where(ordinary, replacement, labels), torch.where(ordinary, labels, -100)
    return flat.index_put((positions,), replacement).view_as(input_ids), positions, labels


def most_masked(tokens: int, rate: float) -> int:
    """The mean number of masked tokens among so many, and five standard deviations more, in multiples of 64: not one batch in a million
    has more."""
    return -(-math.ceil(tokens * rate + 5 * math.sqrt(tokens * rate * (1 - rate))) // 64) * 64


def sample_pieces(labels: Tensor, vocab_size: int, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """A smaller question than "which of all pieces?": which of `number` pieces, namely those that some label names and others drawn at
    random? Each drawn one stands for several, so its logit is to grow by the logarithm of how many: then the sum under the softmax is
    right on average (importance sampling; after Bengio and Senécal, 2003, "Quick training of probabilistic neural nets").

    labels: (M,) -> pieces (K,), what to add to their logits (K,), the labels as places among the pieces (M,). K: `number`, or more,
    where the labels name more than half as many.
    """
    named = torch.zeros(vocab_size, dtype=torch.bool, device=labels.device)
    named[labels] = True
    others = (~named).nonzero().squeeze(1)
    drawn = others[torch.randperm(len(others), device=labels.device)[: max(number - (vocab_size - len(others)), number // 2, 1)]]
    pieces = torch.cat([named.nonzero().squeeze(1), drawn])
    growth = torch.zeros(len(pieces), device=labels.device)
    growth[len(pieces) - len(drawn) :] = math.log(max(1, len(others)) / max(1, len(drawn)))
    return pieces, growth, named.cumsum(0)[labels] - 1


def unigram_loss(train: TokenTable, held_out: TokenTable, vocab_size: int) -> float:
    """Cross-entropy, in nats, of a model that knows only how often each token occurs (in the training articles)."""
    seen = np.bincount(train.tokens, minlength=vocab_size)[FIRST_PIECE:] + 1.0
    asked = np.bincount(held_out.tokens, minlength=vocab_size)[FIRST_PIECE:]
    return float(-(asked * np.log(seen / seen.sum())).sum() / asked.sum())


@torch.no_grad()
def held_out_loss(model: Callable, table: DeviceTable, vocab_size: int, hardware: Hardware) -> dict[str, float]:
    """MLM loss (nats) and accuracy on the held-out articles, always at 15 % and always with the same masks."""
    order = np.argsort(table.lengths, kind="stable")
    generator = torch.Generator().manual_seed(0)  # the CPU's, on any device
    total, correct, count = 0.0, 0, 0
    for start in range(0, len(order), 64):
        input_ids = table.batch(order[start : start + 64])
        masked, positions, labels = (t.to(hardware.device) for t in mask_tokens(input_ids.cpu(), vocab_size, generator=generator))
        with hardware.autocast():
            logits = model(masked, positions).float()
        total += F.cross_entropy(logits, labels, reduction="sum").item()
        correct += int((logits.max(1).indices == labels).sum())  # argmax takes several times as long on a CPU
        count += len(labels)
    return {"held_out_loss": total / max(1, count), "held_out_accuracy": correct / max(1, count)}


def pretrain(model_name: str, recipe: PretrainRecipe, data: DataFolder, seed: int, runs_dir: Path, hardware: Hardware, *,
             max_articles: int = 0, name: str = "", fresh: bool = False, compiled: bool = False, wait: bool = False) -> Path:
    """Pre-train a named model on a data folder and return its run folder; a finished run is not trained again.

    max_articles: train on the first so many articles, which are a random sample (0: all). wait: if another process is training
    it, until that has ended.
    """
    if not 0 <= max_articles <= len(data.articles) or not len(data.articles):
        raise InputError(f"{data.path}: holds {len(data.articles)} articles, and --max-articles is {max_articles}")
    articles = data.articles.subset(np.arange(max_articles)) if max_articles else data.articles
    vocab_size = data.tokenizer.vocab_size
    try:
        config = named_config(
            model_name, recipe.width, recipe.heads, vocab_size=vocab_size, max_length=data.max_length, norm=recipe.norm,
            dropout=recipe.dropout, attention_dropout=recipe.attention_dropout, init_std=recipe.init_std,
            local_start=recipe.local_start, short_conv=recipe.short_conv,
            leaky_stem=recipe.fault_stem, frozen_row=2 if recipe.fault_ids else -1)
    except ValueError as error:
        raise InputError(str(error)) from None
    settings = {"kind": "pretrain", "model": model_name, "config": dataclasses.asdict(config),
                "recipe": dataclasses.asdict(recipe), "seed": seed, "dtype": str(hardware.dtype), "tokenizer": data.tokenizer.hash,
                "data": data.id, "max_articles": max_articles}
    folder = runs_dir / "pretrain" / (name or f"{model_name}-seed{seed}-{settings_hash(settings)}")
    with Run(folder, settings, data.tokenizer, fresh, wait) as run, short_memory_named(folder):
        if rank() == 0:
            write_json(folder / "data.json", {"path": str(data.path.resolve()), "id": data.id})
        if run.results:
            return folder
        torch.manual_seed(seed)
        model = MaskedLM(config)
        if recipe.count_start and not (folder / "last.pt").exists():  # a checkpoint holds all that would be counted again
            counts = f"{data.id[:16]}-{max_articles}"
            start_from_counts(model, articles, recipe.count_start, hardware.device, runs_dir / "tables" / counts, recipe.count_window)
        model.to(hardware.device)
        compiled = can_compile(compiled)
        forward: Callable = DistributedDataParallel(model) if world_size() > 1 else model
        # Where no shape depends on a batch's numbers, a GPU's host never waits for it, and what is compiled is one graph
        fixed_shapes = (compiled or hardware.device.type == "cuda") and not (
            recipe.head_sample or recipe.micro_batch or config.conv_kernels or world_size() > 1)
        train_table, held_out = DeviceTable(articles, hardware.device), DeviceTable(data.held_out, hardware.device)
        batches = Batches(articles.lengths, recipe, seed)
        steps = recipe.steps or recipe.epochs * batches.per_epoch
        unigram = unigram_loss(articles, data.held_out, vocab_size)
        length = f"{recipe.time_budget:g} minutes" if recipe.time_budget else f"{steps} steps, {steps / batches.per_epoch:.1f} passes"
        print(f"{folder.name}: {count_parameters(model) / 1e6:.2f} M parameters, {length}, {recipe.batch_size} texts a step; "
              f"unigram baseline {unigram:.3f} nats", flush=True)

        def summed_loss(masked: Tensor, asked: Tensor, answers: Tensor, pieces: Tensor | None, growth: Tensor | None) -> Tensor:
            with hardware.autocast():
                logits = forward(masked, asked, pieces).float()  # (M, V) or (M, K); the copy in bf16 is dropped at once
            if growth is not None:
                logits += growth
            return F.cross_entropy(logits, answers, reduction="sum")  # passes over labels of -100

        compiled_loss = maybe_compile(summed_loss, compiled, fixed_shapes)

        def gradients(step: int, backward: Callable[[Tensor], None]) -> tuple[Tensor, int]:
            input_ids = train_table.batch(batches[step], fixed_shapes and compiled)
            masked, positions, labels = mask_tokens(input_ids, vocab_size, recipe.mask_rate, special_replacements=recipe.fault_special,
                                                    count=most_masked(input_ids.numel(), recipe.mask_rate) if fixed_shapes else 0)
            masked_tokens = (labels >= 0).sum().clamp(min=1)
            pieces = growth = None
            if 0 < recipe.head_sample < vocab_size:
                pieces, growth, labels = sample_pieces(labels, vocab_size, recipe.head_sample)
            if rank():  # all ranks have drawn the masks of the whole batch; from here on each draws its own dropout
                torch.manual_seed(torch.initial_seed() + rank())
            rows, T = input_ids.shape
            share = -(-rows // world_size())  # this rank's slice; the last may be shorter, or empty
            part = min(recipe.micro_batch or share, share)
            total = torch.zeros((), device=input_ids.device)
            for start in range(rank() * share, (rank() + 1) * share, part):  # as many parts on every rank
                stop = min(start + part, (rank() + 1) * share)
                inside: slice | Tensor = slice(None)
                if part < rows:
                    inside = (positions >= start * T) & (positions < stop * T)
                asked, answers = positions[inside] - start * T, labels[inside]
                # A matrix product of a new shape is slow the first time (on a CPU), so the shapes are to come again: some positions more
                more = -len(asked) % 64
                asked, answers = F.pad(asked, (0, more)), F.pad(answers, (0, more), value=-100)
                # an epoch's last, smaller batch has another shape
                loss_of = summed_loss if fixed_shapes and rows < recipe.batch_size else compiled_loss
                # each part weighs as many masked tokens as it has: an exact split
                loss = loss_of(masked[start:stop], asked, answers, pieces, growth) / masked_tokens
                backward(loss * world_size())  # DistributedDataParallel takes the mean over the ranks, this is to be the sum
                total += loss.detach()
            if world_size() > 1:
                dist.all_reduce(total)
            return total, int(train_table.lengths[batches[step]].sum())

        final = train(run, model, recipe, hardware, seed, steps, batches.per_epoch, gradients, label=f"pre-train {model_name} {seed}",
                      header={"unigram_loss": round(unigram, 5), "parameters": count_parameters(model)},
                      evaluate=lambda: held_out_loss(model, held_out, vocab_size, hardware))
        if rank() == 0:
            seconds = final.pop("seconds")
            write_json(folder / "results.json", result_record(settings, seconds, tasks={}, latency_ms={}, unigram_loss=unigram,
                                                              hardware=hardware.reason, **final))
    return folder


def settings_hash(settings: dict) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def weights_hash(weights: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, t in sorted(weights.items()):
        digest.update(name.encode() + t.contiguous().numpy().tobytes())
    return digest.hexdigest()


def load_pretrained(folder: Path) -> tuple[BertConfig, dict[str, Tensor], Tokenizer]:
    """(configuration, weights, tokenizer) of a finished or unfinished pre-training run."""
    return config_of(folder), load_checkpoint(folder)["model"], tokenizer_of(folder)


def load_masked_lm(folder: Path) -> tuple[MaskedLM, Tokenizer]:
    """The model of a pre-training run, ready to be used, on the CPU."""
    config, weights, tokenizer = load_pretrained(folder)
    if "dense.weight" not in weights:
        raise InputError(f"{folder}: was imported without a masked-language-model head; it can only be fine-tuned")
    model = MaskedLM(config).eval()
    load_weights(model, weights, folder)
    return model, tokenizer


def ids_with_masks(text: str, tokenizer: Tokenizer, config: BertConfig) -> Tensor:
    """A user's text as input_ids (1, T), with [MASK] where it says so."""
    pieces = [tokenizer.pieces.encode(part) for part in text.split("[MASK]")]
    ids = [CLS] + [i for n, part in enumerate(pieces) for i in ([MASK] if n else []) + part] + [SEP]
    if len(ids) > config.max_length:
        raise InputError(f"the text has {len(ids)} tokens, the model {config.max_length} positions; give a shorter one")
    return torch.tensor([ids])


@torch.no_grad()
def fill_mask(folder: Path, text: str, top: int = 5) -> list[list[tuple[str, float]]]:
    """The likeliest pieces, with their probabilities, for every "[MASK]" of a text."""
    model, tokenizer = load_masked_lm(folder)
    if "[MASK]" not in text:
        raise InputError("--fill-mask: the text holds no [MASK]")
    input_ids = ids_with_masks(text, tokenizer, model.config)
    probabilities = model(input_ids, (input_ids[0] == MASK).nonzero().squeeze(1)).softmax(-1)
    return [[(tokenizer.pieces.id_to_piece(int(i)), float(p)) for p, i in zip(*row.topk(top))] for row in probabilities]


@torch.no_grad()
def show_forward_pass(folder: Path, text: str) -> None:
    """Print what every stage of a real forward pass returns, and how each head spreads its attention."""
    model, tokenizer = load_masked_lm(folder)
    config, input_ids = model.config, ids_with_masks(text, tokenizer, model.config)
    asked = (input_ids[0] == MASK).nonzero().squeeze(1)
    positions = asked if len(asked) else torch.arange(input_ids.size(1))
    B, T = input_ids.shape
    print(f"B {B} text, T {T} tokens, C {config.width} wide, H {config.heads} heads of D {config.width // config.heads}, "
          f"V {config.vocab_size} pieces, M {len(positions)} positions asked ({'the masked ones' if len(asked) else 'no [MASK]: all'})")
    print(f"{'stage':34}{'module':12}{'shape':18}standard deviation\n{'input_ids':34}{'':12}{tuple(input_ids.shape)!s}")
    listened: list[tuple[Attention, Tensor]] = []

    def report(name: str, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        print(f"{name:34}{type(module).__name__:12}{tuple(output.shape)!s:18}{output.std():.3f}")
        if isinstance(module, Attention):
            listened.append((module, inputs[0]))

    hooks = [module.register_forward_hook(partial(report, name)) for name, module in model.named_modules()
             if name and not isinstance(module, nn.ModuleList)]
    logits = model(input_ids, positions)
    for hook in hooks:
        hook.remove()
    print(f"{'logits':34}{'':12}{tuple(logits.shape)!s:18}{logits.std():.3f}   (the token embeddings once more, and a bias)")
    names = [tokenizer.pieces.id_to_piece(int(i)) for i in input_ids[0]]
    for number, (attention, x) in enumerate(listened, 1):
        query, key, _ = attention.project(x)
        for head, weights in enumerate(attention_weights(query, key, torch.ones(1, 1, 1, T, dtype=torch.bool))[0], 1):
            print(f"\nlayer {number}, head {head}: the row's token listens to the column's, in % (under 5 left out)")
            print(" " * 12 + "".join(f"{name[:5]:>6}" for name in names))
            for name, row in zip(names, weights.tolist()):
                print(f"{name[:11]:>11} " + "".join(f"{100 * w:6.0f}" if w >= 0.05 else " " * 6 for w in row).rstrip())


# ------------------------------------------------------------------------------------------------------- pictures
def pyplot() -> ModuleType | None:
    """matplotlib.pyplot, for pictures in files; None, said in one line, where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        print("note: no picture is drawn without matplotlib: pip install matplotlib", file=sys.stderr)
        return None
    matplotlib.use("Agg")
    return importlib.import_module("matplotlib.pyplot")


def save_picture(figure, path: Path) -> None:
    with write_atomically(path) as file:
        figure.savefig(file, format="png", dpi=150, bbox_inches="tight")
    print(f"{path} written")


def break_step(curve: Sequence[tuple[int, float]], baseline: float) -> int | None:
    """Where a loss curve [(step, nats)] leaves the plateau at the unigram baseline: from this step on the mean of five points stays
    0.1 nats below."""
    smooth = [np.mean([loss for _, loss in curve[max(0, i - 4) : i + 1]]) for i in range(len(curve))]
    below = len(curve)
    while below and smooth[below - 1] < baseline - 0.1:
        below -= 1
    return curve[below][0] if below < len(curve) else None


def plot_losses(folders: Sequence[Path]) -> None:
    """The loss curves of pre-training runs, with the unigram baseline and the step at which each breaks away from it."""
    logs = [read_log(folder) for folder in folders]
    if not (plt := pyplot()):
        return
    figure, axes = plt.subplots(figsize=(8, 5))
    for number, (folder, log) in enumerate(zip(folders, logs)):
        colour, unigram = f"C{number % 10}", log[0]["unigram_loss"]
        curve = [(r["step"], r["loss"]) for r in log if "loss" in r]
        held_out = [(r["step"], r["held_out_loss"]) for r in log if "held_out_loss" in r]
        found = break_step(curve, unigram)
        label = f"{folder.resolve().name}: " + (f"leaves the baseline at step {found}" if found else "at the baseline")
        axes.plot(*zip(*curve), color=colour, alpha=0.6, linewidth=1, label=label)
        axes.plot(*zip(*held_out), color=colour, linestyle="", marker="o", markersize=5) if held_out else None
        axes.axhline(unigram, color=colour if len({log[0]["unigram_loss"] for log in logs}) > 1 else "0.3", linestyle="--", linewidth=1)
        if found:
            axes.axvline(found, color=colour, linestyle=":", linewidth=1)
    axes.set(xlabel="step", ylabel="loss in nats", title="Line: training. Dots: held-out articles. Dashed: unigram baseline")
    axes.legend(fontsize=8)
    save_picture(figure, folders[0] / "loss.png")


def read_log(folder: Path) -> list[dict]:
    """The lines of a pre-training run's log. Raises InputError where there is no curve in it yet."""
    load_settings(folder, "pretrain")
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines() if (folder / "log.jsonl").exists() else []
    log = [json.loads(line) for line in lines if logged_step(line) > -1]
    if not any("loss" in record for record in log) or "unigram_loss" not in log[0]:
        raise InputError(f"{folder}: no loss in its log.jsonl yet; name a pre-training run that has made some steps")
    return log


def open_data(name: str, preset: str) -> DataFolder:
    """The data folder of this name; the embedded default (name "") is prepared if it is missing."""
    path = data_path(name or default_name(preset))
    if not name and not path.exists():
        return prepare(path, Request(preset=preset))
    return open_folder(path)


def data_of(run: Path) -> DataFolder:
    """The data folder that a pre-training run was trained on. Raises InputError if it is gone or was made anew with other text."""
    if not (run / "data.json").exists():
        raise InputError(f"{run}: does not say where its text lies (an imported model?); name a data folder with --data")
    place = read_json(run / "data.json", "path", "id")
    data = open_folder(place["path"])
    if data.id != place["id"]:
        raise InputError(f"{data.path}: was made anew with other contents since {run} was trained; name a data folder with --data")
    return data


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--data", default="", metavar="NAME", help="a data folder, made by data.py (default: vital, made if missing)")
    parser.add_argument("--model", choices=tuple(MODELS), default="bert-1", help="architecture (default %(default)s)")
    parser.add_argument("--max-articles", type=number(0), default=0, metavar="N", help="train on the first N articles (default: all)")
    parser.add_argument("--seed", type=number(0), default=0, help="of initialisation, article order, masks and dropout")
    parser.add_argument("--name", default="", help="of the run folder (default: made from the settings)")
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="other values for fields of the recipe")
    parser.add_argument("--fill-mask", nargs=2, metavar=("TEXT", "RUN"), help="what a trained run puts in place of [MASK]")
    parser.add_argument("--show", nargs=2, metavar=("TEXT", "RUN"), help="every stage of RUN's forward pass over a text, and each head's "
                        "attention; the text may hold [MASK]")
    parser.add_argument("--plot", nargs="+", type=Path, metavar="RUN", help="draw the loss curves of these runs, into the first one's "
                        "loss.png (needs matplotlib)")
    add_run_flags(parser)
    args = parser.parse_args()
    if args.fill_mask:
        for row in fill_mask(Path(args.fill_mask[1]), args.fill_mask[0]):
            print("  ".join(f"{piece} {p:.3f}" for piece, p in row))
        return
    if args.show:
        show_forward_pass(Path(args.show[1]), args.show[0])
        return
    if args.plot:
        plot_losses(args.plot)
        return
    with ranks():
        with rank_0_first():
            recipe, hardware = chosen_recipe(PRESETS[args.preset], args.set), choose_hardware(args.device, args.dtype)
            print(hardware.reason, flush=True)
            data = open_data(args.data, args.preset)
        folder = pretrain(args.model, recipe, data, args.seed, args.runs_dir, hardware, max_articles=args.max_articles, name=args.name,
                          fresh=args.fresh, compiled=args.compile)
        if rank() == 0:
            results = read_json(folder / "results.json", "held_out_loss", "held_out_accuracy", "unigram_loss", "seconds")
            print(f"{folder}: held-out loss {results['held_out_loss']:.3f} nats (unigram baseline {results['unigram_loss']:.3f}), "
                  f"accuracy {results['held_out_accuracy']:.3f}, {results['seconds']:.0f} s\n"
                  f"next: python finetune.py --checkpoint {folder}")


if __name__ == "__main__":
    run_script(main)
