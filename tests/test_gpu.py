"""What the scripts do on a GPU. Most tests run on a CPU too, to rehearse as far as that can be.

On a machine with a GPU: python -m pytest tests/test_gpu.py -q -k cuda
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partialmethod
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model as modelling
import pretrain as pretraining
from data import DataFolder
from model import MODELS, Attention, Classifier, Committee, MaskedLM, named_config, stack, vote
from pretrain import (PRESETS, DeviceTable, PretrainRecipe, Runtime, fill_mask, load_checkpoint,
                      load_masked_lm, make_optimizers, mask_tokens, mlm_loss, pretrain)
from tokenizer import CLS, FIRST_PIECE

SMOKE = PRESETS["smoke"]
no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


# For what other tests show on a CPU already
on_a_gpu = pytest.mark.parametrize("device", [pytest.param("cuda", marks=no_gpu)], indirect=True)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=no_gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    # Otherwise convolutions on a GPU are rounded to 10 bits.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return torch.device(request.param)


def train(corpus: DataFolder, recipe: PretrainRecipe, runtime: Runtime) -> list[float]:
    """The losses of a pre-training run of BERT-1."""
    folder = pretrain(corpus, "bert-1", recipe, 0, runtime)
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines if '"loss"' in line]


@on_a_gpu
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_computes_the_same_there(device: torch.device, monkeypatch: pytest.MonkeyPatch,
                                         name: str, fused: bool) -> None:
    """Logits and gradients beside those of a CPU that attends by hand."""
    torch.manual_seed(0)
    config = named_config(name, 64, 1, vocab_size=90, max_length=16, dropout=0.0)
    ids = torch.randint(FIRST_PIECE, 90, (6, 16))
    ids[0, 9:], ids[1, 3:] = 0, 0
    positions = torch.tensor([0, 2, 17, 40, 95])
    model, found = MaskedLM(config), []
    for where, how in ((torch.device("cpu"), False), (device, fused)):
        monkeypatch.setattr(Attention, "fused", how)
        model.zero_grad()
        logits = model.to(where)(ids.to(where), positions.to(where))
        logits.square().sum().backward()
        found.append([logits.detach().cpu(), *(p.grad.cpu().clone() for p in model.parameters())])
    whole = max(a.norm() for a in found[0])  # some gradients are nothing but rounding
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= (1e-3 if "conv" in name else 1e-4) * a.norm() + 1e-6 * whole


class HostWaits(TorchDispatchMode):
    """Notes operations for whose result the host of a GPU has to wait."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_truth = name.startswith("index") and any(
            isinstance(x, Tensor) and x.dtype == torch.bool for x in tree_leaves(args[1:2]))
        if by_truth or name in ("nonzero", "_local_scalar_dense", "masked_select", "equal"):
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("name", ["bert-6", "bert-1", "bert-1-conv2"])
def test_the_host_never_waits_in_a_step(device: torch.device, corpus: DataFolder, name: str,
                                        optimizer: str) -> None:
    """But for a stem, which shows that the test would see it. On a GPU, PyTorch watches too."""
    config = named_config(name, 64, 1, vocab_size=200, max_length=32, dropout=0.1)
    model = MaskedLM(config).to(device)
    recipe = replace(SMOKE, optimizer=optimizer)
    optimizers = make_optimizers(model, recipe)
    table, waits = DeviceTable(corpus.articles, device), HostWaits()
    try:
        for step in range(3):
            if step and device.type == "cuda" and "conv" not in name:
                torch.cuda.set_sync_debug_mode("error")
            with waits:
                loss, count = mlm_loss(model, table.batch(np.arange(8)), 200, 0.15)
                (loss / count).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                for one in optimizers:
                    one.step()
                    one.zero_grad()
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert bool(waits.seen) == ("conv" in name), waits.seen


def test_a_compiled_model_is_one_graph(device: torch.device,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """fullgraph raises an error where Python would have to do a part between two graphs."""
    if device.type == "cpu":  # as on a GPU
        monkeypatch.setattr(modelling, "dropout", lambda x, p: F.dropout(x, p) if p else x)
        monkeypatch.setattr(Attention, "fused", True)
    model = MaskedLM(named_config("bert-1", 64, 1, vocab_size=90, max_length=16)).to(device)
    model.compile(fullgraph=True, backend="aot_eager")
    ids = torch.randint(FIRST_PIECE, 90, (6, 16), device=device)
    model(ids, torch.arange(5, device=device)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a C++ compiler")
def test_a_compiled_run_computes_the_same(device: torch.device, corpus: DataFolder, tmp_path: Path,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    if device.type == "cpu":  # traced only, since C++ for a CPU takes a minute
        traced = partialmethod(nn.Module.compile, backend="aot_eager")
        monkeypatch.setattr(nn.Module, "compile", traced)
    curves = []
    for compile in (False, True):
        runtime = Runtime(device, torch.float32, "", tmp_path / str(compile), compile=compile)
        curves.append(train(corpus, replace(SMOKE, steps=12), runtime))
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


@on_a_gpu
def test_an_interrupted_run_goes_on(device: torch.device, corpus: DataFolder, tmp_path: Path,
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU to the last bit; nearly so on a GPU, where sums are taken in any order."""
    recipe, found = replace(SMOKE, steps=12, dropout=0.1), []
    original = pretraining.schedule
    for name in ("straight", "halting"):
        runtime = Runtime(device, torch.float32, "", tmp_path / name)
        if name == "halting":
            with monkeypatch.context() as patch:
                patch.setattr(pretraining, "SAVE_SECONDS", -1.0)
                patch.setattr(pretraining, "schedule", lambda recipe, step, steps:
                              1 / 0 if step == 7 else original(recipe, step, steps))
                with pytest.raises(ZeroDivisionError):
                    pretrain(corpus, "bert-1", recipe, 0, runtime)
            # The second half alone is trained now.
            monkeypatch.setattr(pretraining, "schedule", lambda recipe, step, steps:
                                1 / 0 if step < 7 else original(recipe, step, steps))
        weights = load_checkpoint(pretrain(corpus, "bert-1", recipe, 0, runtime))["model"]
        found.append(torch.cat([x.flatten() for x in weights.values()]))
    tolerance = 0.0 if device.type == "cpu" else 5e-3
    assert (found[0] - found[1]).norm() <= tolerance * found[0].norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_and_fill_mask(device: torch.device, corpus: DataFolder, tmp_path: Path,
                                dtype: torch.dtype) -> None:
    # Most CPUs have no bf16 units and take long
    steps, gain = (40, 0.2) if (device.type, dtype) == ("cpu", torch.bfloat16) else (250, 0.5)
    recipe = replace(SMOKE, steps=steps, lr=5e-3, optimizer="muon")
    folder = pretrain(corpus, "bert-1", recipe, 0, Runtime(device, dtype, "", tmp_path))
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert results["held_out_loss"] < results["unigram_loss"] - gain
    (guesses,) = fill_mask(*load_masked_lm(folder), "The [MASK] of France crosses the city.")
    assert [p for _, p in guesses] == sorted((p for _, p in guesses), reverse=True)


@pytest.mark.parametrize("name", ["bert-1", "bert-1-conv2"])
def test_a_committee_is_its_members_there(device: torch.device, name: str) -> None:
    torch.manual_seed(0)
    runtime = Runtime(device, torch.float32)
    config = named_config(name, 64, 1, vocab_size=90, max_length=16)
    members = [Classifier(config, 5) for _ in range(3)]
    committee = runtime.for_inference(Committee(members))
    members = [runtime.for_inference(member) for member in members]
    ids = torch.randint(FIRST_PIECE, 90, (6, 16), device=device)
    ids[:, 0], ids[0, 9:] = CLS, 0
    with torch.no_grad():
        alone = torch.stack([member(ids).softmax(-1) for member in members]).mean(0)
        torch.testing.assert_close(vote(committee(ids)), alone, atol=1e-5, rtol=1e-4)
    if name == "bert-1":
        stacked = stack(members).to(device).train()
        stacked(ids).sum().backward()
        assert all(p.grad is not None for p in stacked.parameters())


@on_a_gpu
def test_a_table_cuts_the_same_batches_there(device: torch.device, corpus: DataFolder) -> None:
    rows = np.array([3, 0, 11])
    here, there = (DeviceTable(corpus.held_out, d) for d in (torch.device("cpu"), device))
    assert torch.equal(here.batch(rows), there.batch(rows).cpu())


@on_a_gpu
def test_masks_there_have_as_many_positions(device: torch.device) -> None:
    ids = torch.randint(FIRST_PIECE, 90, (16, 64), device=device)
    ids[:, 0], ids[:, 50:] = CLS, 0
    masked, positions, labels = mask_tokens(ids, 90, 0.15)
    assert len(positions) == len(labels) == 192 and (masked[:, 0] == CLS).all()
    chosen = positions[labels >= 0]
    assert torch.equal(labels[labels >= 0], ids.flatten()[chosen]) and len(chosen.unique()) > 80
