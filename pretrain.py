"""pretrain.py - masked-language-model training: masking, optimizers, the loop, checkpoints.

Fourth of the six files. finetune.py uses its loop too. Read first: recipes -> masked language
modelling -> optimizers -> the loop. What follows keeps runs safe on disk and finds the device.

    python pretrain.py                                      BERT-1 on the default data folder
    python pretrain.py --model bert-6 --data simple         on the data folder data/simple
    python pretrain.py --data simple --max-articles 5000 --set lr=0.003 steps=2000
    python pretrain.py --fill-mask "Paris is the [MASK] of France." runs/pretrain/RUN
    python pretrain.py --show "Paris is the capital of France." runs/pretrain/RUN
    torchrun --nproc_per_node=2 pretrain.py --model bert-6  one run in several processes

References
1) Masking: Devlin et al., https://arxiv.org/abs/1810.04805
2) The authors' recipe: Gross et al., https://arxiv.org/abs/2507.14871, and their code, github
   Rg32601/Tiny-Language-Models
3) Muon: Jordan et al., https://kellerjordan.github.io/posts/muon/
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import difflib
import hashlib
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
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from data import DataFolder, Request, TokenTable, damage_named, data_path, default_name, file_lock
from data import open_folder, prepare, read_json, setting_differences
from model import MODELS, NORMS, BertConfig, MaskedLM, StackedLinear, count_parameters
from model import named_config
from tokenizer import CLS, FIRST_PIECE, MASK, PAD, SEP, InputError, Parser, Tokenizer
from tokenizer import full_disk_named, run_script, whole_number, without_surrogates
from tokenizer import write_atomically

EVALUATION_MASK_RATE = 0.15  # always, so that losses can be compared
SAVE_SECONDS = 60.0  # between two checkpoints
LOG_LINES = 100  # with the training loss; about so many in a run
EVALUATIONS = 5  # on held-out articles; about so many in a run


# ---- recipes -------------------------------------------------------------------------------------


def option(default: Any, help: str, low: float = 0, high: float = 1e9, choices: tuple = ()) -> Any:
    """A field of a recipe: its default, a help text, and the values that are allowed."""
    about = {"help": help, "low": low, "high": high, "choices": choices}
    return field(default=default, metadata=about)


@dataclass(frozen=True)
class Recipe:
    """What pre-training and fine-tuning have in common. The defaults are the authors' values; they
    do not use Muon, so matrix_lr is ours."""

    epochs: int = option(50, "passes over the training texts", 1)
    steps: int = option(0, "optimizer steps (0: from the epochs)")
    batch_size: int = option(32, "texts in a step", 1)
    optimizer: str = option("adamw", "adamw, or muon for the layers' matrices (AdamW for the rest)",
                            choices=("adamw", "muon"))
    lr: float = option(5e-5, "peak learning rate of AdamW", high=1e3)
    matrix_lr: float = option(0.02, "peak learning rate of Muon", high=1e3)
    beta2: float = option(0.999, "AdamW's decay of the squared gradients", high=0.99999)
    weight_decay: float = option(0.01, "decoupled weight decay, on every parameter", high=1e3)
    clip: float = option(0.0, "gradient clipping: largest norm (0: no clipping)")
    warmup: float = option(0.0, "share of the steps in which the learning rate rises", high=1)
    dropout: float = option(0.1, "dropout rate", high=0.99)

    def total_steps(self, steps_an_epoch: int) -> int:
        return self.steps or self.epochs * steps_an_epoch


@dataclass(frozen=True)
class PretrainRecipe(Recipe):
    mask_rate: float = option(0.15, "share of the tokens to predict", 0.001, 1)
    width: int = option(768, "width of the base model, a multiple of 64", 64, 16384)
    heads: int = option(12, "its attention heads", 1, 1024)
    norm: str = option("post", "LayerNorm after each block (post) or before (pre)", choices=NORMS)


PRESETS = {
    "paper": PretrainRecipe(),
    "quick": PretrainRecipe(
        steps=2_000, optimizer="muon", lr=3e-3, beta2=0.98, weight_decay=0.0, clip=1.0, warmup=0.05,
        dropout=0.0, mask_rate=0.25, width=128, heads=4, norm="pre"),
    "smoke": PretrainRecipe(
        steps=6, batch_size=8, lr=1e-3, clip=1.0, warmup=0.2, dropout=0.0, width=64, heads=1,
        norm="pre"),
}


def chosen_recipe(preset: Any, assignments: Sequence[str], flag: str = "--set") -> Any:
    """The preset with other values for some fields. assignments: FIELD=VALUE.

    Raises InputError for an unknown field or a value that is not allowed.
    """
    fields = {f.name: f for f in dataclasses.fields(preset)}
    chosen: dict[str, Any] = {}
    for assignment in assignments:
        name, _, text = assignment.partition("=")
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1, cutoff=0)
            raise InputError(f"{flag} {assignment}: write FIELD=VALUE. There is no field {name!r}; "
                             f"did you mean {near[0]}? --help lists all fields")
        kind: Any = type(fields[name].default)
        about = fields[name].metadata
        try:
            value = kind(text)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise InputError(f"{flag} {assignment}: {text!r} is not {what}") from None
        if about["choices"] and value not in about["choices"]:
            raise InputError(f"{flag} {assignment}: must be {' or '.join(about['choices'])}")
        if not about["choices"] and not about["low"] <= value <= about["high"]:
            raise InputError(f"{flag} {assignment}: must lie in {about['low']}..{about['high']:g}")
        chosen[name] = value
    if "epochs" in chosen:  # then the preset's own numbers of steps do not count
        for name in {"steps", "min_steps"} & set(fields):
            chosen.setdefault(name, 0)
    return dataclasses.replace(preset, **chosen)


def fields_help(presets: dict[str, Any], flag: str = "--set") -> str:
    """A table for --help: the fields of a recipe and their values in each preset."""
    lines = [f"fields for {flag} (in brackets: their values in {', '.join(presets)})"]
    for f in dataclasses.fields(next(iter(presets.values()))):
        values = ", ".join(str(getattr(recipe, f.name)) for recipe in presets.values())
        lines.append(f"  {f.name:13} {f.metadata['help']} ({values})")
    return "\n".join(lines)


# ---- masked language modelling -------------------------------------------------------------------


def mask_tokens(input_ids: Tensor, vocab_size: int, rate: float,
                generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """BERT's masking. Each ordinary token is chosen with probability `rate`. Of the chosen ones,
    80 % become [MASK], 10 % a random token, and 10 % stay as they are.

    input_ids: (B, T) -> masked ids (B, T), positions (M,) in the B * T tokens, labels (M,).

    M depends on B, T and rate alone: it is rate * B * T, rounded up to a multiple of 64. So
    shapes repeat, and the CPU need not wait until a GPU has counted. If fewer tokens are chosen,
    the rest of positions is 0, with the label -100, which the loss ignores. If more are, the last
    ones are left out.
    """
    # Exercise: mask all pieces of a word, or none. A word begins at a piece with "▁". This function
    # sees only ids, so make a table (V,) of 1 (begins a word, or is special) and 0 in pretrain(),
    # number the words with cumsum, and give all pieces of a word the same number in `draw`. Train
    # with --runs-dir runs/words, and compare the accuracies after fine-tuning. (held_out_loss masks
    # with this function, too. So the losses cannot be compared.)
    device = input_ids.device
    flat = input_ids.flatten()
    M = math.ceil(rate * len(flat) / 64) * 64
    draw = torch.rand(len(flat), generator=generator, device=device)
    chosen = (draw < rate) & (flat >= FIRST_PIECE)  # never a special token
    positions = chosen.nonzero_static(size=M, fill_value=0).squeeze(1)
    tokens = flat[positions]
    random_tokens = torch.randint(FIRST_PIECE, vocab_size, (M,), generator=generator, device=device)
    draw = torch.rand(M, generator=generator, device=device)
    # Below 0.8: [MASK]. From 0.8 to 0.9: a random token. Above: the token itself.
    new_tokens = torch.where(draw < 0.9, random_tokens, tokens)
    new_tokens = torch.where(draw < 0.8, MASK, new_tokens)
    is_chosen = tokens >= FIRST_PIECE  # False where the fill value 0 points at [CLS]
    new_tokens = torch.where(is_chosen, new_tokens, tokens)
    labels = torch.where(is_chosen, tokens, -100)
    return flat.scatter(0, positions, new_tokens).view_as(input_ids), positions, labels


def mlm_loss(model: nn.Module, input_ids: Tensor, vocab_size: int,
             mask_rate: float) -> tuple[Tensor, Tensor]:
    """The cross-entropy of the masked tokens, in nats (natural logarithm).

    input_ids: (B, T) -> the summed loss of this process' rows, and the number of masked tokens in
    the whole batch; both scalars.
    """
    masked_ids, positions, labels = mask_tokens(input_ids, vocab_size, mask_rate)
    count = (labels >= 0).sum().clamp(min=1)
    if world_size() > 1:
        masked_ids, positions, labels = rows_of_this_rank(masked_ids, positions, labels)
    logits = model(masked_ids, positions)  # (M, V)
    return F.cross_entropy(logits.float(), labels, reduction="sum"), count


def unigram_loss(train: TokenTable, held_out: TokenTable, vocab_size: int) -> float:
    """The loss, in nats, of a model that knows the tokens' frequencies and nothing else."""
    seen = np.bincount(train.tokens, minlength=vocab_size)[FIRST_PIECE:] + 1.0  # add-one smoothing
    counts = np.bincount(held_out.tokens, minlength=vocab_size)[FIRST_PIECE:]
    return float(-(counts * np.log(seen / seen.sum())).sum() / counts.sum())


@torch.no_grad()
def held_out_loss(model: Callable, table: DeviceTable, vocab_size: int,
                  runtime: Runtime) -> dict[str, float]:
    """Loss (nats) and accuracy on the held-out articles, always with the same masks."""
    order = np.argsort(table.lengths, kind="stable")  # texts of similar length together
    generator = torch.Generator().manual_seed(0)  # the CPU's, whatever the device is
    total, correct, count = 0.0, 0, 0
    for start in range(0, len(order), 64):
        input_ids = table.batch(order[start : start + 64]).cpu()
        batch = mask_tokens(input_ids, vocab_size, EVALUATION_MASK_RATE, generator)
        masked_ids, positions, labels = (x.to(runtime.device) for x in batch)
        with runtime.autocast():
            logits = model(masked_ids, positions).float()
        total += F.cross_entropy(logits, labels, reduction="sum").item()
        correct += int((logits.max(1).indices == labels).sum())  # on a CPU faster than argmax
        count += int((labels >= 0).sum())
    return {"held_out_loss": total / max(1, count), "held_out_accuracy": correct / max(1, count)}


# ---- optimizers ----------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum; each update is made approximately orthogonal. Reference 3.

    torch.optim.Muon does the same, but in bf16 only, which is slow on a CPU without bf16 units.
    The projection for query, key and value counts as one matrix here; three gave the same loss.
    """

    def __init__(self, matrices: Sequence[Tensor], lr: float, momentum: float = 0.95,
                 weight_decay: float = 0.0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype  # of the matrix products in orthogonalise

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for p in group["params"]:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                momentum_buffer = self.state[p]["momentum_buffer"]
                momentum_buffer.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(momentum_buffer, group["momentum"])  # Nesterov
                by_shape.setdefault(p.shape, []).append((p, update))
            for (rows, columns), pairs in by_shape.items():
                updates = torch.stack([update for _, update in pairs])
                updates = orthogonalise(updates.to(self.dtype))  # all of one shape at once
                scale = max(1.0, rows / columns) ** 0.5
                for (p, _), update in zip(pairs, updates):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-group["lr"] * scale)


def orthogonalise(g: Tensor, iterations: int = 5) -> Tensor:
    """(n, rows, columns) -> matrices with the same singular vectors and singular values near 1.

    Newton-Schulz iteration, x <- (a + b X + c X X) x with X = x x^T. After five steps most
    singular values lie between 0.7 and 1.2. The numbers are those of reference 3.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.mT if g.size(1) > g.size(2) else g
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        xx = x @ x.mT
        polynomial = torch.baddbmm(xx, xx, xx, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if g.size(1) > g.size(2) else x


def make_optimizers(model: nn.Module, recipe: Recipe,
                    dtype: torch.dtype = torch.float32) -> list[torch.optim.Optimizer]:
    """[AdamW] for everything; or [AdamW, Muon], with Muon for the matrices in the layers."""
    matrices: list[Tensor] = []
    rest: list[Tensor] = []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        is_matrix = ".layers." in name and p.ndim == 2
        (matrices if is_matrix and recipe.optimizer == "muon" else rest).append(p)
    adamw = torch.optim.AdamW(rest, lr=recipe.lr, betas=(0.9, recipe.beta2),
                              weight_decay=recipe.weight_decay, fused=True)
    if not matrices:
        return [adamw]
    return [adamw, Muon(matrices, recipe.matrix_lr, weight_decay=recipe.weight_decay, dtype=dtype)]


def schedule(recipe: Recipe, step: int, steps: int) -> float:
    """The factor on the learning rates: a linear warm-up, then a linear decay to 0."""
    # Exercise: keep the rate constant after the warm-up, and train with --runs-dir runs/constant.
    # Compare the held-out losses. (Fine-tuning calls this function, too.)
    warmup = int(recipe.warmup * steps)
    return (step + 1) / warmup if step < warmup else (steps - step) / (steps - warmup)


# ---- batches -------------------------------------------------------------------------------------


def to_device(x: np.ndarray, device: torch.device) -> Tensor:
    """The array on the device. On a CUDA GPU, the copy queues behind other work: no waiting."""
    return torch.from_numpy(x).to(device, non_blocking=device.type == "cuda")


class DeviceTable:
    """A token table on the training device. Its tokens are copied there once. For a batch, only two
    numbers of each text follow: where it begins, and its length.
    """

    def __init__(self, table: TokenTable, device: torch.device) -> None:
        self.device, self.max_length = device, table.max_length
        self.tokens = torch.from_numpy(table.tokens.astype(np.int32)).to(device)
        self.offsets, self.lengths = table.offsets, table.lengths

    def batch(self, texts: np.ndarray) -> Tensor:
        """Indices of texts -> input_ids (B, T) int64, with PAD behind shorter texts."""
        longest = int(self.lengths[texts].max())
        padded = min(-(-longest // 8) * 8, self.max_length)  # a multiple of 8, so shapes are few
        place = np.stack([self.offsets[texts], self.lengths[texts]])
        start, length = to_device(place, self.device)[:, :, None]  # each (B, 1)
        column = torch.arange(padded, device=self.device)
        index = (start + column).clamp_(max=len(self.tokens) - 1)
        return torch.where(column < length, self.tokens[index], PAD).long()


class Batches:
    """Batches of text indices, by step. The order of an epoch depends on (seed, epoch) alone.

    like_length: texts of similar length share a batch, which saves padding.
    """

    def __init__(self, lengths: np.ndarray, recipe: Recipe, seed: int, like_length: bool) -> None:
        self.lengths, self.batch_size, self.seed = lengths, recipe.batch_size, seed
        self.like_length = like_length
        self.per_epoch = math.ceil(len(lengths) / recipe.batch_size)
        self.steps = recipe.total_steps(self.per_epoch)
        self.epoch = -1
        self.order: list[np.ndarray] = []

    def __getitem__(self, step: int) -> np.ndarray:
        epoch, index = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            self.epoch = epoch
            self.order = self.order_of(epoch)
        return self.order[index]

    def order_of(self, epoch: int) -> list[np.ndarray]:
        """The batches of an epoch. The last one may be smaller."""
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(len(self.lengths))
        size = self.batch_size
        if not self.like_length:
            return [order[i : i + size] for i in range(0, len(order), size)]
        batches = []
        for start in range(0, len(order), 64 * size):  # sort within blocks of 64 batches,
            block = order[start : start + 64 * size]
            block = block[np.argsort(self.lengths[block], kind="stable")]
            batches += [block[i : i + size] for i in range(0, len(block), size)]
        return [batches[i] for i in rng.permutation(len(batches))]  # then shuffle the batches


# ---- the loop ------------------------------------------------------------------------------------


def train(run: Run, model: nn.Module, recipe: Recipe, batches: Batches,
          loss_of: Callable[[np.ndarray], tuple[Tensor, Tensor | int]],
          evaluate: Callable[[], dict[str, float]] | None = None) -> dict[str, Any]:
    """Train the model from its run's last checkpoint, or from the start, to the last step.

    loss_of(text indices): the summed loss of a batch, and the number of terms in that sum.
    evaluate(): figures for the log, about EVALUATIONS times in a run, and after the last step.
    Returns what results.json keeps of a training. Each step sets its own random seed. So a run
    that was interrupted and resumed gives exactly the same result (with the same device and
    number of processes).
    """
    optimizers = make_optimizers(model, recipe, run.runtime.dtype)
    state = run.resume(model, optimizers)
    steps, seed = batches.steps, run.settings["seed"]
    log_every = max(1, steps // LOG_LINES)
    evaluate_every = log_every * LOG_LINES // EVALUATIONS
    saved = time.monotonic()
    model.train()
    with stop_signals() as stop, tqdm(
            total=steps, initial=state.step, desc=run.folder.name, unit="step", mininterval=1.0,
            dynamic_ncols=True, leave=False, disable=rank() > 0) as bar:
        while state.step < steps:
            state.step_began = time.perf_counter()
            torch.manual_seed(seed_of_step(seed, state.step))
            factor = schedule(recipe, state.step, steps)
            for optimizer, peak in zip(optimizers, (recipe.lr, recipe.matrix_lr)):
                optimizer.param_groups[0]["lr"] = peak * factor
            texts = batches[state.step]
            loss, count = loss_of(texts)
            loss = loss / count
            loss.backward()
            sum_over_ranks([p.grad for p in model.parameters()])
            if recipe.clip:
                nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            loss = loss.detach()
            sum_over_ranks([loss])
            state.losses.append(loss)
            state.tokens += int(batches.lengths[texts].sum())
            state.step += 1
            bar.update()
            is_last = state.step == steps
            if state.step % log_every == 0 or is_last:
                bar.set_postfix_str(run.log_losses(state, model, is_last))
            state.count_time()
            if evaluate and (state.step % evaluate_every == 0 or is_last):
                model.eval()
                run.log(step=state.step, **evaluate())
                model.train()
            signal_number = largest_of_ranks(stop[0] if stop else 0)
            if is_last or signal_number or time.monotonic() - saved > SAVE_SECONDS:
                run.save(state, model, [] if is_last else optimizers)  # a finished run needs none
                saved = time.monotonic()
            if signal_number:
                break
        # Once more, since a signal may have come while the last checkpoint was written
        if signal_number := largest_of_ranks(stop[0] if stop else 0):
            run.end_by_signal(signal_number, state.step)
    model.eval()
    return run.summary(state)


def seed_of_step(seed: int, step: int) -> int:
    # A hash, since PyTorch's generator on a CPU keeps only the low 32 bits of a seed.
    return int(np.random.SeedSequence((seed, step)).generate_state(1)[0])


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list, so that a step is always finished and saved."""
    caught: list[int] = []
    before = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, lambda number, frame: caught.append(number))
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def pretrain(data: DataFolder, model_name: str, recipe: PretrainRecipe, seed: int, runtime: Runtime,
             max_articles: int = 0, name: str = "") -> Path:
    """Pre-train a model on a data folder; returns its run folder. A finished run is not trained
    again.

    max_articles: train on the first max_articles articles alone (0: all). The order is random, so
    they are a random sample.
    name: of the run folder; made from the settings if it is empty. Raises InputError.
    """
    if not 0 <= max_articles <= len(data.articles) or not len(data.articles):
        raise InputError(f"{data.path}: holds {len(data.articles)} articles, and --max-articles is "
                         f"{max_articles}. Choose fewer, or a data folder with more articles")
    articles = data.articles.subset(np.arange(max_articles)) if max_articles else data.articles
    vocab_size = data.tokenizer.vocab_size
    config = base_config(model_name, recipe, data)
    settings = {
        "kind": "pretrain", "model": model_name, "config": asdict(config), "recipe": asdict(recipe),
        "seed": seed, "dtype": str(runtime.dtype), "tokenizer": data.tokenizer.hash,
        "data": data.id, "max_articles": max_articles}
    folder_name = name or f"{model_name}-seed{seed}-{settings_hash(settings)}"
    with Run(runtime.runs_dir / "pretrain" / folder_name, settings, data.tokenizer, runtime) as run:
        if rank() == 0:  # for finetune.py
            write_json(run.folder / "data.json", {"path": str(data.path.resolve())})
        if run.is_finished:
            return run.folder
        torch.manual_seed(seed)
        model = MaskedLM(config).to(runtime.device)
        table = DeviceTable(articles, runtime.device)
        held_out = DeviceTable(data.held_out, runtime.device)
        batches = Batches(articles.lengths, recipe, seed, like_length=False)
        baseline = unigram_loss(articles, data.held_out, vocab_size)
        print(f"{folder_name}: {count_parameters(model) / 1e6:.2f} M parameters, {batches.steps} "
              f"steps of {recipe.batch_size} texts, {batches.steps / batches.per_epoch:.1f} passes "
              f"over the articles; unigram baseline {baseline:.3f} nats", flush=True)
        if runtime.compile:
            model.compile(dynamic=True)

        def loss_of(texts: np.ndarray) -> tuple[Tensor, Tensor]:
            with runtime.autocast():
                return mlm_loss(model, table.batch(texts), vocab_size, recipe.mask_rate)

        result = train(run, model, recipe, batches, loss_of,
                       lambda: held_out_loss(model, held_out, vocab_size, runtime))
        run.finish(unigram_loss=baseline, **result)
    return run.folder


def base_config(model_name: str, recipe: PretrainRecipe, data: DataFolder) -> BertConfig:
    """The architecture of a named model under a recipe, for the texts of a data folder."""
    try:
        return named_config(model_name, recipe.width, recipe.heads, norm=recipe.norm,
                            dropout=recipe.dropout, vocab_size=data.tokenizer.vocab_size,
                            max_length=data.max_length)
    except ValueError as error:
        raise InputError(f"--set width=, heads=: {error}") from None


# ---- run folder ----------------------------------------------------------------------------------


@dataclass
class TrainingState:
    """What a checkpoint keeps besides weights, optimizers and the log."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    losses: list[Tensor] = field(default_factory=list)  # since the last line of the log
    step_began: float = 0.0  # not in the checkpoint

    def count_time(self) -> None:
        """Add the time since the step began, or since the last call. Evaluations do not count."""
        now = time.perf_counter()
        self.seconds += now - self.step_began
        self.step_began = now


class Run:
    """A run folder. While it is open, a lock keeps other processes out.

    config.json: the settings, which decide the result. log.jsonl: about LOG_LINES lines with the
    training loss, and one for each evaluation. last.pt: the last checkpoint. tokenizer.model.
    results.json: when it is finished. data.json: where the data folder lies, if it is a
    pre-training. logits.npz: if it is a fine-tuning, see finetune().
    A folder with other settings is refused, unless `runtime.fresh`. Of several ranks, only rank 0
    writes.
    """

    def __init__(self, folder: Path, settings: dict, tokenizer: Tokenizer,
                 runtime: Runtime) -> None:
        self.folder, self.tokenizer, self.runtime = folder, tokenizer, runtime
        self.settings = json.loads(json.dumps(settings))  # as it is when read: lists, no tuples
        self.lines: list[dict] = []  # of the log
        self.is_finished = False

    def __enter__(self) -> Run:
        with rank_0_first(), contextlib.ExitStack() as stack:
            if rank() and not (self.folder / "config.json").exists():
                raise InputError(f"{self.folder}: made by rank 0, but rank {rank()} does not see "
                                 "it. Name a --runs-dir that all machines share")
            if rank() == 0:
                stack.enter_context(file_lock(self.folder / "lock", wait=False))
                self.tidy()
            config = self.folder / "config.json"
            if config.exists():
                if different := setting_differences(read_json(config), self.settings):
                    raise InputError(f"{self.folder}: made with other settings "
                                     f"({', '.join(different)}). Choose another name; or throw it "
                                     "away (--fresh, or delete the folder)")
            else:
                with write_atomically(self.folder / "tokenizer.model") as file:
                    file.write(self.tokenizer.model)
                write_json(config, self.settings)
            self.is_finished = (self.folder / "results.json").exists()
            self.lock = stack.pop_all()  # an error above gives the lock back, success keeps it
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        self.lock.close()
        if is_out_of_memory(error):
            raise InputError(f"{self.folder}: out of memory. Use a smaller batch_size or width "
                             "(--set), or fewer --jobs. The last checkpoint is kept") from None

    def tidy(self) -> None:
        """Remove what a killed process left half-written, and with `fresh` all results."""
        names = ["results.json", "last.pt", "log.jsonl", "logits.npz", "config.json"]
        fresh = [self.folder / name for name in names] if self.runtime.fresh else []
        for path in [*self.folder.glob("*.tmp"), *fresh]:
            path.unlink(missing_ok=True)

    def log(self, **record: Any) -> None:
        """Append a line to the log."""
        self.lines.append(record)
        path = self.folder / "log.jsonl"
        if rank() == 0:
            with full_disk_named(path), open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def log_losses(self, state: TrainingState, model: nn.Module, is_last: bool) -> str:
        """Log the mean loss since the last line; returns it for the progress bar.

        Raises InputError if the loss, or at the end a weight, is not finite.
        """
        mean = torch.stack(state.losses).mean().item()  # .item() waits for a GPU
        if not math.isfinite(mean) or is_last and not all_finite(model):
            raise InputError(f"{self.folder}: the loss is {mean} at step {state.step}, or the "
                             "weights are not finite. Use a smaller lr (--set), or --dtype fp32. "
                             "The last good checkpoint is kept")
        state.count_time()
        before: dict[str, Any] = next((x for x in reversed(self.lines) if "loss" in x), {})
        seconds = state.seconds - before.get("seconds", 0.0)
        rate = round((state.tokens - before.get("tokens", 0)) / max(seconds, 1e-9))
        self.log(step=state.step, loss=round(mean, 5), tokens=state.tokens, tokens_per_s=rate,
                 seconds=round(state.seconds, 3))
        state.losses.clear()
        return f"loss {mean:.3f}, {rate / 1e3:.1f}k tokens/s"

    def save(self, state: TrainingState, model: nn.Module,
             optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Write a checkpoint. Weights or losses that are not finite are never written."""
        losses = torch.stack(state.losses) if state.losses else torch.zeros(0)
        if rank() or not (losses.isfinite().all() and all_finite(model)):
            return
        save_tensors(self.folder / "last.pt", {
            "step": state.step, "tokens": state.tokens, "seconds": state.seconds,
            "losses": losses, "log": self.lines, "model": model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers]})

    def resume(self, model: nn.Module,
               optimizers: Sequence[torch.optim.Optimizer]) -> TrainingState:
        """Load the last checkpoint, if there is one, and rewrite the log as it was then."""
        state = TrainingState()
        path = self.folder / "last.pt"
        if path.exists():
            saved = load_checkpoint(self.folder)
            load_weights(model, saved["model"], self.folder)
            with damage_named(path):
                for optimizer, content in zip(optimizers, saved["optimizers"]):
                    optimizer.load_state_dict(content)
                losses = list(saved["losses"].to(self.runtime.device))
                state = TrainingState(saved["step"], saved["tokens"], saved["seconds"], losses)
                self.lines = list(saved["log"])
        if rank() == 0:
            with write_atomically(self.folder / "log.jsonl", "w") as file:
                file.writelines(json.dumps(line) + "\n" for line in self.lines)
        return state

    def end_by_signal(self, number: int, step: int) -> None:
        """End the process as a signal asks it to. The state is saved already, if it is finite."""
        if rank() == 0:
            print(f"stopped at step {step}; the same command (without --fresh) goes on from the "
                  "last checkpoint", file=sys.stderr)
        sys.exit(128 + number)

    def summary(self, state: TrainingState) -> dict[str, Any]:
        """Figures of a finished training. train_loss: the mean over the last tenth of the log."""
        losses = [line["loss"] for line in self.lines if "loss" in line]
        figures = {"train_loss": float(np.mean(losses[-max(1, len(losses) // 10) :])),
                   "steps": state.step, "tokens": state.tokens, "seconds": round(state.seconds, 1)}
        for line in self.lines:
            if "loss" not in line:  # an evaluation: the last one counts
                figures.update((name, x) for name, x in line.items() if name != "step")
        return figures

    def finish(self, **figures: Any) -> None:
        """Write results.json, which marks the run as finished."""
        if rank() == 0:
            record = result_record(self.settings, hardware=self.runtime.in_words, **figures)
            write_json(self.folder / "results.json", record)


def all_finite(model: nn.Module) -> bool:
    return bool(torch.stack([x.isfinite().all() for x in model.state_dict().values()]).all())


def is_out_of_memory(error: BaseException | None) -> bool:
    if isinstance(error, RuntimeError):  # PyTorch has one text for each kind of device
        return bool(re.search("out of memory|allocate memory", str(error)))
    return isinstance(error, MemoryError)


def result_record(settings: dict, **figures: Any) -> dict:
    """What each results.json begins with: how to repeat it, and where it was measured."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, IndexError):
        cpu = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text("utf-8"))[0]
    machine = {"system": platform.platform(terse=True), "cpu": cpu, "cores": os.cpu_count(),
               "threads": torch.get_num_threads()}
    here = Path(__file__).resolve().parent
    git = None
    with contextlib.suppress(OSError):  # there is no git
        describe = ["git", "describe", "--always", "--dirty"]
        git = subprocess.run(describe, cwd=here, capture_output=True, text=True).stdout.strip()
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    command = shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
    return {"command": command, "machine": machine, "versions": versions, "git": git or None,
            "settings": settings, **figures}


def settings_hash(settings: dict) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def weights_hash(weights: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def save_tensors(path: Path, content: object) -> None:
    # Through memory, since torch.save hides a full disk behind errors of its own.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with write_atomically(path) as file:
        file.write(buffer.getbuffer())


def write_json(path: Path, record: dict) -> None:
    with write_atomically(path, "w") as file:
        file.write(json.dumps(record, indent=1) + "\n")


def load_settings(folder: Path, kind: str) -> dict:
    """The settings of a run. kind: "pretrain" or "finetune". Raises InputError."""
    settings = read_json(folder / "config.json", "kind", "model", "config", "seed", "tokenizer")
    if settings["kind"] != kind:
        raise InputError(f"{folder}: not a {kind} run; name a folder in runs/{kind}")
    return settings


def config_of(folder: Path) -> BertConfig:
    """The architecture of the model in a run folder."""
    with damage_named(folder / "config.json"):
        return BertConfig(**read_json(folder / "config.json", "config")["config"])


def tokenizer_of(folder: Path) -> Tokenizer:
    """The tokenizer of a run folder. No other one fits its model."""
    tokenizer = Tokenizer.load(folder / "tokenizer.model")
    if tokenizer.hash != read_json(folder / "config.json", "tokenizer")["tokenizer"]:
        raise InputError(f"{folder / 'tokenizer.model'}: not the tokenizer that this run was made "
                         "with. Put that one back, or train again")
    return tokenizer


def load_checkpoint(folder: Path) -> dict:
    """The last checkpoint of a run folder, on the CPU. Nothing in the file is executed."""
    path = folder / "last.pt"
    with damage_named(path):
        saved = torch.load(path, map_location="cpu", weights_only=True)
        assert isinstance(saved["step"], int) and isinstance(saved["model"], dict)
        return saved


def load_weights(model: nn.Module, weights: dict[str, Tensor], folder: Path) -> None:
    """Put a checkpoint's weights into a model. Raises InputError if they do not fit."""
    with damage_named(folder / "last.pt"):
        model.load_state_dict(weights)


def open_data(name: str, preset: str) -> DataFolder:
    """The data folder of this name. Name "": the default, which is made if it is missing."""
    path = data_path(name or default_name(preset))
    if not name and not path.exists():
        return prepare(path, Request(preset=preset))
    return open_folder(path)


def data_of(run: Path) -> DataFolder:
    """The data folder of a pre-training run. Raises InputError if it is gone or was changed."""
    settings = load_settings(run, "pretrain")
    if not (run / "data.json").exists():  # an imported model
        raise InputError(f"{run}: does not say where its text is. Name a data folder with --data")
    data = open_folder(read_json(run / "data.json", "path")["path"])
    if data.id != settings["data"]:
        raise InputError(f"{data.path}: was made again with other contents since {run} was "
                         "trained. Name a data folder with --data")
    return data


# ---- device and number type ----------------------------------------------------------------------


@dataclass(frozen=True)
class Runtime:
    """Where and how to compute.

    dtype: of matrix products. Weights stay in float32. On a CPU with bf16, the hidden states
    between the layers are bf16 too. in_words: device, threads and dtype. runs_dir, fresh, compile:
    the flags of these names.
    """

    device: torch.device
    dtype: torch.dtype
    in_words: str = ""
    runs_dir: Path = Path("runs")
    fresh: bool = False
    compile: bool = False

    def autocast(self) -> torch.autocast:
        is_mixed = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype, enabled=is_mixed)

    def for_inference(self, model: nn.Module) -> nn.Module:
        """Move the model to the device, and round its linear weights once, not at each call."""
        for part in model.modules():
            if isinstance(part, (nn.Linear, StackedLinear)):
                part.to(self.dtype)
        return model.to(self.device).eval()


def choose_runtime(device: str = "auto", dtype: str = "auto", runs_dir: Path = Path("runs"),
                   fresh: bool = False, compile: bool = False) -> Runtime:
    """A GPU if there is one, bf16 where the hardware computes in it. Raises InputError."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if torch.backends.mps.is_available() and world_size() == 1:
            device = "mps"
    match = re.fullmatch(r"cpu|mps|cuda(?::(\d{1,4}))?", device)
    if not match or (device == "mps" and not torch.backends.mps.is_available()):
        raise InputError(f"--device {device}: no such device here. Leave the flag out, or use "
                         "--device cpu")
    if device.startswith("cuda"):
        number = int(match[1] or os.environ.get("LOCAL_RANK", 0))
        gpus = torch.cuda.device_count()
        if number >= gpus:
            raise InputError(f"--device {device}: GPU number {number} is needed and PyTorch finds "
                             f"{gpus} GPUs here (numbers begin at 0). Use --device cpu")
        device = f"cuda:{number}"
        torch.cuda.set_device(device)
        has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
        name = torch.cuda.get_device_name(device)
    else:
        has_bf16 = device == "cpu" and (torch.cpu._is_avx512_bf16_supported()
                                        or torch.cpu._is_amx_tile_supported())
        name = device
    if dtype == "auto":
        dtype = "bf16" if has_bf16 else "fp32"
    if compile and not shutil.which(os.environ.get("CXX", "c++")):
        raise InputError("--compile: needs a C++ compiler. Install one, or leave the flag out")
    keep_freed_memory()
    processes = f"{world_size()} ranks: " if world_size() > 1 else ""
    in_words = f"{processes}{name}; matrix products in {dtype}"
    types = {"fp32": torch.float32, "bf16": torch.bfloat16}
    return Runtime(torch.device(device), types[dtype], in_words, runs_dir, fresh, compile)


def keep_freed_memory() -> None:
    """Have the C library keep freed memory for the next step (glibc; elsewhere nothing happens).

    Otherwise it gives large blocks back, and the system fills each page with zeros before it
    lends it again. That takes a sixth to a quarter of a step of the paper's BERT-6 on two cores.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # no glibc
        mallopt = ctypes.CDLL(None).mallopt
        # M_MMAP_THRESHOLD up to 1 GB; glibc before 2.35 allows 32 MB. Then M_TRIM_THRESHOLD.
        if mallopt(-3, 2**30) or mallopt(-3, 2**25):
            mallopt(-1, 2**30)


# ---- several processes ---------------------------------------------------------------------------
# torchrun starts several processes, the ranks. Each holds the whole model, draws the masks of the
# whole batch, and computes its own rows. The gradients are added up, so all make the same step.
# A convolutional stem is the exception: each rank has the batch statistics of its own rows.


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rows_of_this_rank(masked_ids: Tensor, positions: Tensor,
                      labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's rows of a batch, with their masked positions; perhaps none."""
    B, T = masked_ids.shape
    share = math.ceil(B / world_size())
    first, last = min(B, rank() * share), min(B, (rank() + 1) * share)
    mine = (positions >= first * T) & (positions < last * T)
    torch.manual_seed(torch.initial_seed() + 1 + rank())  # each rank has its own dropout
    return masked_ids[first:last], positions[mine] - first * T, labels[mine]


def sum_over_ranks(tensors: Sequence[Tensor | None]) -> None:
    """Add up each tensor over all ranks, in place."""
    for tensor in tensors:
        if world_size() > 1 and tensor is not None:
            dist.all_reduce(tensor)


def largest_of_ranks(number: int) -> int:
    """The largest of all ranks' numbers: so they go on or stop together."""
    if world_size() == 1:
        return number
    value = torch.tensor(number)  # on the CPU: nobody waits for a GPU
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)


@contextlib.contextmanager
def ranks() -> Iterator[None]:
    """Join the other ranks, if torchrun has started this process. Only rank 0 prints."""
    if "RANK" not in os.environ:
        yield
        return
    backends = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backends, timeout=timedelta(days=1))  # rank 0 may have to download
    try:
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            with contextlib.redirect_stdout(nowhere if rank() else sys.stdout):
                yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def rank_0_first() -> Iterator[None]:
    """The other ranks wait until rank 0 is through, and find on the disk what it made."""
    if rank():
        try:
            largest_of_ranks(0)  # a barrier
        except RuntimeError:  # rank 0 has ended, and said why
            sys.exit(2)
    yield
    if rank() == 0:
        largest_of_ranks(0)


# ---- a trained model at work ---------------------------------------------------------------------


def load_masked_lm(folder: Path) -> tuple[MaskedLM, Tokenizer]:
    """The model of a pre-training run, on the CPU, and its tokenizer."""
    load_settings(folder, "pretrain")  # raises InputError for another kind of run
    model = MaskedLM(config_of(folder)).eval()
    weights = load_checkpoint(folder)["model"]
    if "dense.weight" not in weights:
        raise InputError(f"{folder}: was imported without the masked-language-model head, so it "
                         "can only be fine-tuned")
    load_weights(model, weights, folder)
    return model, tokenizer_of(folder)


def encode_with_masks(text: str, tokenizer: Tokenizer, max_length: int) -> Tensor:
    """A text as input_ids (1, T), with the mask token where it says [MASK]."""
    first, *others = without_surrogates(text).split("[MASK]")
    ids = [CLS, *tokenizer.pieces.encode(first)]
    for part in others:
        ids += [MASK, *tokenizer.encode_after_mark(part)]
    ids.append(SEP)
    if len(ids) > max_length:
        raise InputError(f"the text has {len(ids)} tokens, and the model reads {max_length}. Give "
                         "a shorter one")
    return torch.tensor([ids])


@torch.no_grad()
def fill_mask(model: MaskedLM, tokenizer: Tokenizer, text: str,
              top: int = 5) -> list[list[tuple[str, float]]]:
    """The most probable pieces, with their probabilities, for each [MASK] of a text."""
    if "[MASK]" not in text:
        raise InputError("--fill-mask: the text has no [MASK] in it")
    input_ids = encode_with_masks(text, tokenizer, model.config.max_length)
    positions = (input_ids[0] == MASK).nonzero().squeeze(1)
    guesses = []
    # An imported model may have more embeddings than there are pieces.
    for row in model(input_ids, positions)[:, : tokenizer.vocab_size].softmax(-1):
        best = row.topk(top)
        pieces = [tokenizer.pieces.id_to_piece(int(i)) for i in best.indices]
        guesses.append(list(zip(pieces, best.values.tolist())))
    return guesses


@torch.no_grad()
def show(folder: Path, text: str) -> None:
    """Print how a text is masked, and what the model predicts at each masked place."""
    model, tokenizer = load_masked_lm(folder)
    input_ids = encode_with_masks(text, tokenizer, model.config.max_length)
    V, T = tokenizer.vocab_size, input_ids.size(1)
    torch.manual_seed(0)
    masked_ids, positions, labels = mask_tokens(input_ids, V, PRESETS["quick"].mask_rate)
    label_at = dict(zip(positions.tolist(), labels.tolist()))
    probabilities = model(masked_ids, torch.arange(T))[:, :V].softmax(-1)  # (T, V)

    def piece(token: int | Tensor) -> str:
        return tokenizer.pieces.id_to_piece(int(token))

    print(f"{'place':>5} {'text':16}{'input':16}{'label':16}{'p(label)':>8}  most probable")
    for place in range(T):
        label = label_at.get(place, -100)
        columns = f"{place:5} {piece(input_ids[0, place]):16}{piece(masked_ids[0, place]):16}"
        if label >= 0:
            best = piece(probabilities[place].argmax())
            columns += f"{piece(label):16}{probabilities[place, label]:8.4f}  {best}"
        print(columns.rstrip())


# ---- command line --------------------------------------------------------------------------------


def add_run_flags(parser: Parser) -> None:
    """Flags of all three training scripts."""
    add = parser.add_argument_group("run").add_argument
    add("--preset", choices=tuple(PRESETS), default="quick", help="paper: the authors' set-up; "
        "quick: minutes on two cores (default); smoke: seconds, for tests")
    add("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps")
    add("--dtype", default="auto", choices=("auto", "fp32", "bf16"), help="of matrix "
        "products; auto: bf16 if the hardware has it")
    add("--runs-dir", type=Path, default=Path("runs"), metavar="DIR", help="folder for the runs")
    add("--fresh", action="store_true", help="train again, even if the run is finished")


def main() -> None:
    parser = Parser(__doc__, epilog=fields_help(PRESETS))
    add = parser.add_argument
    add("--data", default="", metavar="NAME", help="data folder (default: vital, made if missing)")
    add("--model", choices=tuple(MODELS), default="bert-1", help="default %(default)s")
    add("--max-articles", type=whole_number(0), default=0, metavar="N",
        help="train on the first N (0: all)")
    add("--seed", type=whole_number(0), default=0, help="for weights, order, masks, dropout")
    add("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="other values for the recipe")
    add("--name", default="", metavar="RUN", help="name of the run folder")
    add("--compile", action="store_true", help="use torch.compile (meant for a GPU)")
    add("--fill-mask", nargs=2, metavar=("TEXT", "RUN"), help="what RUN predicts for each [MASK]")
    add("--show", nargs=2, metavar=("TEXT", "RUN"), help="how TEXT is masked, what RUN predicts")
    add_run_flags(parser)
    args = parser.parse_args()
    if args.fill_mask:
        text, run = args.fill_mask
        for guesses in fill_mask(*load_masked_lm(Path(run)), text):
            print("  ".join(f"{piece} {p:.3f}" for piece, p in guesses))
        return
    if args.show:
        show(Path(args.show[1]), args.show[0])
        return
    with ranks():
        recipe = chosen_recipe(PRESETS[args.preset], args.set)
        runtime = choose_runtime(args.device, args.dtype, args.runs_dir, args.fresh, args.compile)
        print(runtime.in_words, flush=True)
        with rank_0_first():
            data = open_data(args.data, args.preset)
        folder = pretrain(data, args.model, recipe, args.seed, runtime, args.max_articles,
                          args.name)
        if rank() == 0:
            results = read_json(folder / "results.json", "held_out_loss", "unigram_loss")
            print(f"{folder}: held-out loss {results['held_out_loss']:.3f} nats (unigram baseline "
                  f"{results['unigram_loss']:.3f}), accuracy {results['held_out_accuracy']:.3f}, "
                  f"{results['seconds']:.0f} s\nnext: python finetune.py --checkpoint {folder}")


if __name__ == "__main__":
    run_script(main)
