"""Variants of pre-training that no flag makes, because they were tried and not kept: each replaces one function of pretrain.py.

    python results/ablate.py --variant "cosine schedule" --arms '{"cosine schedule": {"time_budget": 5.0}}' --out ...
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pretrain  # noqa: E402
from data import DeviceTable  # noqa: E402
from pretrain import Optimisation  # noqa: E402


def cosine(recipe: Optimisation, step: int, steps: int, steps_per_epoch: int) -> float:
    """The rise of the warm-up, then half a cosine down to 0."""
    warmup = int(recipe.warmup * steps)
    return (step + 1) / warmup if step < warmup else 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (steps - warmup))


def plateau(recipe: Optimisation, step: int, steps: int, steps_per_epoch: int) -> float:
    """The rise of the warm-up, then the full rate, which falls to 0 in the last third."""
    return min(1.0, (step + 1) / max(1, int(recipe.warmup * steps)), (steps - step) / (steps / 3))


def fused_muon(matrices: Sequence[Tensor], lr: float, weight_decay: float, dtype: torch.dtype) -> torch.optim.Optimizer:
    """PyTorch's own Muon, for which query, key and value are one matrix."""
    return torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, momentum=0.95, adjust_lr_fn="original")


class RampedTable(DeviceTable):
    """The first 32 tokens of each text in the first quarter of five minutes (--time-budget 5), the first 64 in the second, then all. A
    run that was interrupted begins that again, and its log counts tokens that were cut off."""

    started = math.inf  # when the run did

    def batch(self, texts: np.ndarray, to_longest: bool = False) -> Tensor:
        input_ids = super().batch(texts, to_longest)
        if not torch.is_grad_enabled():  # counting, held-out texts
            return input_ids
        self.started = min(self.started, time.perf_counter())
        quarter = int((time.perf_counter() - self.started) / 75)
        return input_ids[:, : (32, 64)[quarter]].contiguous() if quarter < 2 else input_ids


VARIANTS: dict[str, tuple[str, Callable]] = {
    "cosine schedule": ("schedule", cosine), "full rate, falling in the last third": ("schedule", plateau),
    "PyTorch's Muon, query, key and value as one": ("Muon", fused_muon), "32, then 64, then 128 tokens": ("DeviceTable", RampedTable)}


@contextlib.contextmanager
def replaced(variant: str | None) -> Iterator[None]:
    """While it is entered, pretrain.py does what the variant says."""
    if variant is None:
        yield
        return
    name, replacement = VARIANTS[variant]
    with mock.patch.object(pretrain, name, replacement):
        yield
