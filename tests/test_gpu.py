"""What the scripts do on a GPU. Most tests run on a CPU too, to rehearse the GPU's half as far as that can be; those that compare a device
with the CPU can then only show that the code runs.

On a machine with a GPU: python -m pytest tests/test_gpu.py -q -k cuda
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from itertools import count as ticking
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model
import pretrain as pretraining
from committee import SoftCommittee
from data import DataFolder, DeviceTable, Task, TokenTable, encode_texts
from finetune import FinetuneRecipe, finetune
from material import corpus_of, tables_of, articles, small_tokenizer
from model import MODELS, Attention, Classifier, MaskedLM, named_config
from pretrain import (PRESETS, Hardware, PretrainRecipe, count_embeddings, load_checkpoint, make_optimizers, mask_tokens, most_masked, pretrain,
                      schedule, update_weights)
from tokenizer import CLS, FIRST_PIECE

SMOKE = PRESETS["smoke"]
LENGTH = 32
needs_compiler = pytest.mark.skipif(not pretraining.can_compile(True), reason="no C++ compiler, which torch.compile needs")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # else convolutions on a GPU are rounded to 10 bits
    return torch.device(request.param)


@pytest.fixture(scope="module")
def corpus() -> DataFolder:
    """96 texts of exactly 32 tokens, laid end to end from the articles', and 20 held out: every batch of 8 has one shape."""
    tokenizer = small_tokenizer()
    texts = [a["text"] for a in articles(120)]
    table = encode_texts(texts[20:], tokenizer, LENGTH)
    stream = table.tokens[table.tokens >= FIRST_PIECE]
    rows = np.insert(np.resize(stream, (96, LENGTH - 1)), 0, CLS, axis=1)
    train = TokenTable(rows.flatten(), np.arange(97, dtype=np.int64) * LENGTH, LENGTH)
    return dataclasses.replace(corpus_of(texts[:1], texts[:20], tokenizer, LENGTH), articles=train)


def fp32(device: torch.device) -> Hardware:
    return Hardware(device, torch.float32, "test")


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_computes_the_same_there(device: torch.device, monkeypatch: pytest.MonkeyPatch, name: str, fused: bool) -> None:
    """Logits and gradients beside those of a CPU that attends by hand."""
    torch.manual_seed(0)
    config = named_config(name, 64, vocab_size=90, max_length=16, dropout=0.0, attention_dropout=0.0)
    ids = torch.randint(FIRST_PIECE, 90, (6, 16))
    ids[0, 9:], ids[1, 3:] = 0, 0
    asked = torch.tensor([0, 2, 17, 40, 95])
    net, found = MaskedLM(config), []
    for where, how in ((torch.device("cpu"), False), (device, fused)):
        monkeypatch.setattr(Attention, "fused", how)
        net.zero_grad()
        logits = net.to(where)(ids.to(where), asked.to(where))
        logits.square().sum().backward()
        found.append([logits.detach().cpu(), *(p.grad.cpu().clone() for p in net.parameters() if p.grad is not None)])
    whole = max(a.norm() for a in found[0])  # a convolution's bias has no gradient before a normalisation, but for rounding
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= (1e-3 if "conv" in name else 1e-4) * a.norm() + 1e-6 * whole


def test_so_many_masked_tokens_as_are_asked_for(device: torch.device) -> None:
    """The same positions as without a fixed number, then position 0, unchanged and without a label; or the first of too many."""
    ids = torch.randint(FIRST_PIECE, 90, (16, 64), device=device)
    ids[:, 0], ids[:, 50:] = CLS, 0
    rate = 0.15
    torch.manual_seed(1)
    _, positions, labels = mask_tokens(ids, 90, rate)
    for most in (most_masked(ids.numel(), rate), 64):
        torch.manual_seed(1)
        masked, asked, answers = mask_tokens(ids, 90, rate, count=most)
        real = min(len(positions), most)
        assert len(asked) == most and (most == 64) == (len(positions) > most)
        assert torch.equal(asked[:real], positions[:real]) and torch.equal(answers[:real], labels[:real])
        assert (asked[real:] == 0).all() and (answers[real:] == -100).all()
        changed = (masked != ids).flatten().nonzero().squeeze(1)
        assert torch.isin(changed, asked[:real]).all() and len(changed) > 0.8 * real and (masked[:, 0] == CLS).all()


class HostWaits(TorchDispatchMode):
    """Notes the operations whose result the host of a GPU has to wait for: a number, or a shape that depends on numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_truth = name.startswith("index") and any(isinstance(x, Tensor) and x.dtype == torch.bool for x in tree_leaves(args[1:2]))
        if name in ("nonzero", "_local_scalar_dense", "masked_select", "equal", "is_nonzero", "_unique2") or by_truth:
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "changes"), [("bert-6", {}), ("bert-1", {"optimizer": "muon", "clip": 0.0}), ("bert-1", {"short_conv": True}),
                                               ("bert-1", {"head_sample": 60})])
def test_the_host_never_waits_in_a_step(device: torch.device, corpus: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str,
                                        changes: dict) -> None:
    """(But for --head-sample, which shows that the test would see it.) On a GPU, PyTorch watches too."""
    waits = HostWaits()

    def few_steps(run: object, net: nn.Module, recipe: PretrainRecipe, hardware: Hardware, seed: int, steps: int, steps_per_epoch: int,
                  gradients: Callable, **more: object) -> dict:
        optimizers, scaler = make_optimizers(net, recipe), torch.amp.GradScaler(device.type, enabled=False)
        for step in range(3):
            if step and device.type == "cuda" and not recipe.head_sample:  # in the first, things are set up
                torch.cuda.set_sync_debug_mode("error")
            with waits:
                gradients(step, lambda part: part.backward())
                update_weights(net, optimizers, scaler, recipe.clip)
        raise KeyboardInterrupt

    monkeypatch.setattr(pretraining, "train", few_steps)
    monkeypatch.setattr(pretraining, "can_compile", lambda wanted: wanted)
    monkeypatch.setattr(pretraining, "maybe_compile", lambda function, *_: function)
    try:
        with pytest.raises(KeyboardInterrupt):
            pretrain(name, dataclasses.replace(SMOKE, **changes), corpus, 0, tmp_path, fp32(device), compiled=True)
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert bool(waits.seen) == ("head_sample" in changes), waits.seen


@pytest.mark.parametrize("name", [name for name in MODELS if "conv" not in name])
def test_a_compiled_step_is_one_graph(device: torch.device, corpus: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """fullgraph: an error, where Python would have to do a part of the step between two graphs."""
    if device.type == "cpu":  # as on a GPU
        monkeypatch.setattr(model, "dropout", lambda x, p: F.dropout(x, p) if p else x)
        monkeypatch.setattr(Attention, "fused", True)
    monkeypatch.setattr(pretraining, "can_compile", lambda wanted: wanted)
    monkeypatch.setattr(pretraining, "maybe_compile", lambda function, wanted, fixed_shapes: torch.compile(function, fullgraph=True, backend="aot_eager"))
    recipe = dataclasses.replace(SMOKE, steps=3, dropout=0.1, attention_dropout=0.1)
    assert len(losses(pretrain(name, recipe, corpus, 0, tmp_path, Hardware(device, torch.bfloat16, "test"), compiled=True))) == 3


@needs_compiler
def test_compiled_steps_compute_the_same(device: torch.device, corpus: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss curve is that of a run that is not compiled; with dropout, which a CUDA graph must draw anew at each replay, too: at a
    learning rate of 0 each step's loss is another, and the same in a second run."""
    curves = [losses(pretrain("bert-1", dataclasses.replace(SMOKE, steps=12), corpus, 0, tmp_path / str(compiled), fp32(device), compiled=compiled))
              for compiled in (False, True)]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    if device.type == "cpu":  # which has no such graphs, and takes a quarter of a minute to compile this
        return
    still = dataclasses.replace(SMOKE, steps=6, batch_size=96, like_length=False, lr=0.0, dropout=0.5, attention_dropout=0.5)

    def same_texts_and_masks(ids: Tensor, vocab_size: int, rate: float = 0.15, count: int = 0, **_: object) -> list[Tensor]:
        return [t.to(device) for t in mask_tokens(ids.sort(0).values.cpu(), vocab_size, rate, torch.Generator().manual_seed(0), count=count)]

    monkeypatch.setattr(pretraining, "mask_tokens", same_texts_and_masks)
    again = [losses(pretrain("bert-1", still, corpus, 0, tmp_path / again, fp32(device), compiled=True)) for again in ("a", "b")]
    assert again[0] == pytest.approx(again[1], rel=1e-5) and len(set(again[0])) == 6
    assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]


@needs_compiler
def test_compiled_finetuning_computes_the_same(device: torch.device, tmp_path: Path) -> None:
    tokenizer, rows = small_tokenizer(), [(a["text"], n % 2) for n, a in enumerate(articles(48))]
    tables = tables_of(Task("parity", ["even", "odd"], rows[:40], [], rows[40:]), tokenizer, LENGTH, str(device))
    config = named_config("bert-1", 64, vocab_size=tokenizer.vocab_size, max_length=LENGTH)
    recipe = FinetuneRecipe(steps=8, batch_size=8, lr=1e-3, dropout=0.0, attention_dropout=0.0)
    curves = [losses(finetune(None, config, tokenizer, tables, recipe, 0, tmp_path / str(compiled), fp32(device), compiled=compiled, label="x"))
              for compiled in (False, True)]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_without_a_compiler(corpus: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """--compile is told to be left out, and the run is the one without it, shapes and all."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    cpu = fp32(torch.device("cpu"))
    weights = [load_checkpoint(pretrain("bert-1", SMOKE, corpus, 0, tmp_path / str(compiled), cpu, compiled=compiled))["model"]
               for compiled in (False, True)]
    assert all(torch.equal(t, weights[1][name]) for name, t in weights[0].items())
    assert capsys.readouterr().err.count("note: --compile needs a C++ compiler and none was found; going on without") == 1


def test_an_interrupted_run_goes_on(device: torch.device, corpus: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU with the same weights bit by bit (test_training.py), on a GPU, where sums are taken in any order, nearly."""
    recipe, found = dataclasses.replace(SMOKE, steps=12, dropout=0.1), []
    for halts in (False, True):
        if halts:
            with monkeypatch.context() as patch:
                patch.setattr(pretraining, "schedule", lambda recipe, now, end, per_epoch: 1 / 0 if now == 7 else schedule(recipe, now, end, per_epoch))
                ticks = ticking(0.0, 100.0)  # seconds: each step saves
                patch.setattr(pretraining.time, "perf_counter", lambda ticks=ticks: next(ticks))
                with pytest.raises(ZeroDivisionError):
                    pretrain("bert-1", recipe, corpus, 0, tmp_path / str(halts), fp32(device))
            # not from the start again, which would end at the same weights
            monkeypatch.setattr(pretraining, "schedule", lambda recipe, now, *rest: 1 / 0 if now < 7 else schedule(recipe, now, *rest))
        folder = pretrain("bert-1", recipe, corpus, 0, tmp_path / str(halts), fp32(device))
        found.append(torch.cat([t.flatten() for t in load_checkpoint(folder)["model"].values()]))
    assert (found[0] - found[1]).norm() <= (0.0 if device.type == "cpu" else 5e-3) * found[0].norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_leaves_the_unigram_baseline_in_16_bits(device: torch.device, corpus: DataFolder, tmp_path: Path, dtype: torch.dtype) -> None:
    if device.type == "cpu" and dtype == torch.float16:
        pytest.skip("for GPUs without bf16")
    recipe = dataclasses.replace(SMOKE, steps=250, lr=5e-3, optimizer="muon", clip=1.0)
    folder = pretrain("bert-1", recipe, corpus, 0, tmp_path, Hardware(device, dtype, "test"))
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert results["train_loss"] < results["unigram_loss"] - 0.15


@pytest.mark.parametrize("name", ["bert-1", "bert-1-conv2"])
def test_a_committee_is_its_members_there(device: torch.device, name: str) -> None:
    torch.manual_seed(0)
    config = named_config(name, 64, vocab_size=90, max_length=16)
    members = [fp32(device).for_inference(Classifier(config, 5)) for _ in range(3)]
    ids = torch.randint(FIRST_PIECE, 90, (6, 16), device=device)
    ids[0, 9:] = 0
    with torch.no_grad():
        alone = torch.stack([member(ids).softmax(-1) for member in members]).mean(0)
        assert torch.allclose(SoftCommittee(members)(ids), alone, atol=1e-5)


def test_counting_is_the_same_there(device: torch.device, corpus: DataFolder) -> None:
    """The directions are drawn by each device's own generator: what is compared is how near the tokens lie to each other."""
    here, there = (count_embeddings(corpus.articles, corpus.tokenizer.vocab_size, 16, where)[FIRST_PIECE:] for where in ("cpu", device))
    near, also_near = here @ here.T, there @ there.T
    assert (near - also_near).norm() < 0.05 * near.norm()


def test_a_table_cuts_the_same_batches_there(device: torch.device, corpus: DataFolder) -> None:
    rows = np.array([3, 0, 11])
    here, there = (DeviceTable(corpus.held_out, where) for where in (torch.device("cpu"), device))
    for fixed in (False, True):
        assert torch.equal(here.batch(rows, fixed), there.batch(rows, fixed).cpu())
    assert here.batch(rows, True).size(1) == LENGTH
