"""Masking, batches, optimizers, schedule, exact resume, what a run folder promises."""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import pretrain as pretraining
from data import DataFolder, InputError, encode_texts
from material import articles, on_cpu, pretrain_run, small_tokenizer
from model import Classifier, Committee, MaskedLM, named_config
from pretrain import (PRESETS, Batches, DeviceTable, Muon, Recipe, chosen_recipe,
                      encode_with_masks, fields_help, load_checkpoint, load_masked_lm,
                      make_optimizers, mask_tokens, orthogonalise, schedule, show, unigram_loss)
from tokenizer import CLS, FIRST_PIECE, MASK, PAD

SMOKE = PRESETS["smoke"]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_checkpoint(folder)["model"]


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def log(folder: Path) -> list[dict]:
    """The lines of a log, without times."""
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    times = ("seconds", "tokens_per_s")
    return [{k: v for k, v in json.loads(line).items() if k not in times} for line in lines]


# ---- masking -------------------------------------------------------------------------------------


def near(count: int, of: int, p: float) -> bool:
    """Within five standard deviations."""
    return abs(count - of * p) < 5 * (of * p * (1 - p)) ** 0.5


def test_masking_is_berts_statistically() -> None:
    """Of the chosen 80/10/10; specials never chosen, never inserted; random ids uniform."""
    V, n = 105, 400_000
    ids = torch.randint(0, V, (400, 1000), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = CLS
    masked, positions, labels = mask_tokens(ids, V, 0.15, torch.Generator().manual_seed(1))
    positions, labels = positions[labels >= 0], labels[labels >= 0]
    flat, out = ids.flatten(), masked.flatten()
    assert torch.equal(labels, flat[positions]) and (labels >= FIRST_PIECE).all()
    untouched = torch.ones(n, dtype=torch.bool)
    untouched[positions] = False
    assert torch.equal(out[untouched], flat[untouched])
    ordinary, M = int((flat >= FIRST_PIECE).sum()), len(positions)
    assert near(M, ordinary, 0.15)
    new = out[positions]
    replaced = new == MASK
    assert near(int(replaced.sum()), M, 0.8)
    changed = ~replaced & (new != labels)
    assert near(int(changed.sum()), M, 0.1 * 99 / 100)  # 1 in 100 random tokens is the old one
    assert (new[~replaced] >= FIRST_PIECE).all()
    counts = torch.bincount(new[changed], minlength=V)[FIRST_PIECE:].double()
    chi2 = float(((counts - counts.mean()) ** 2 / counts.mean()).sum())
    assert chi2 < 99 + 5 * (2 * 99) ** 0.5
    again = mask_tokens(ids, V, 0.15, torch.Generator().manual_seed(1))[0]
    other = mask_tokens(ids, V, 0.15, torch.Generator().manual_seed(2))[0]
    assert torch.equal(masked, again) and not torch.equal(masked, other)


@pytest.mark.parametrize("rate", [0.01, 0.15, 1.0])
def test_the_number_of_positions_is_fixed(rate: float) -> None:
    """A multiple of 64. The surplus ones carry no label and change nothing."""
    ids = torch.randint(FIRST_PIECE, 90, (16, 64))
    ids[:, 0], ids[:, 50:] = CLS, PAD
    for seed in range(30):
        torch.manual_seed(seed)
        masked, positions, labels = mask_tokens(ids, 90, rate)
        assert len(positions) == -(-16 * 64 * rate // 64) * 64 == len(labels)
        chosen = labels >= 0
        assert (positions[~chosen] == 0).all() and (labels[~chosen] == -100).all()
        assert len(positions[chosen].unique()) == chosen.sum() > 0
        changed = (masked != ids).flatten().nonzero().squeeze(1)
        assert torch.isin(changed, positions[chosen]).all() and (masked[:, 0] == CLS).all()
    if rate == 1.0:
        assert chosen.sum() == (ids >= FIRST_PIECE).sum()


def test_positions_without_a_label_change_nothing() -> None:
    """Loss and gradients are those of the chosen positions alone."""
    torch.manual_seed(0)
    model = MaskedLM(named_config("bert-1", 64, 1, vocab_size=90, max_length=64, dropout=0.0))
    ids = torch.randint(FIRST_PIECE, 90, (4, 40))
    ids[:, 0] = CLS
    found = []
    for all_positions in (True, False):
        torch.manual_seed(1)
        masked, positions, labels = mask_tokens(ids, 90, 0.15)
        keep = labels >= (-100 if all_positions else 0)
        model.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(masked, positions[keep]), labels[keep])
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    assert not (labels >= 0).all()
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=1e-4)


def test_every_seed_and_step_has_its_own_masks(corpus: DataFolder, tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's CPU generator keeps the low 32 bits of a seed: step seeds must differ in them."""
    draws = []
    original = pretraining.mask_tokens

    def spy(*args) -> tuple:
        if len(args) == 3:  # in training
            draws.append(tuple(torch.rand(4).tolist()))
        return original(*args)

    monkeypatch.setattr(pretraining, "mask_tokens", spy)
    for seed in (0, 1, 2):
        pretrain_run("bert-1", replace(SMOKE, steps=3), corpus, seed, tmp_path)
    assert len(draws) == 9 == len(set(draws))


# ---- batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("like_length", [False, True])
def test_batches_hold_each_text_once_in_an_order_that_repeats(like_length: bool) -> None:
    texts = [article["text"][: 20 + i] for i, article in enumerate(articles(101))]
    table = encode_texts(texts, small_tokenizer(), 64)
    recipe = Recipe(batch_size=8, epochs=2)
    batches, again = (Batches(table.lengths, recipe, 1, like_length) for _ in range(2))
    assert batches.steps == 26
    first, second = ([batches[step] for step in steps] for steps in (range(13), range(13, 26)))
    assert sorted(np.concatenate(first)) == sorted(np.concatenate(second)) == list(range(101))
    assert not np.array_equal(np.concatenate(first), np.concatenate(second))
    assert np.array_equal(again[20], second[7])  # as after a resume
    device_table = DeviceTable(table, torch.device("cpu"))
    padded = 0
    for batch in first:
        ids = device_table.batch(batch)
        T = ids.size(1)
        assert ids.dtype == torch.int64 and T % 8 == 0 and T - table.lengths[batch].max() < 8
        for i, row in zip(batch, ids.tolist()):
            tokens = table.tokens[table.offsets[i] : table.offsets[i + 1]].tolist()
            assert row == tokens + [PAD] * (T - len(tokens))
        padded += ids.numel()
    assert (padded < 1.15 * len(table.tokens)) == like_length


# ---- recipes, schedule, optimizers ---------------------------------------------------------------


def test_recipes_from_the_command_line() -> None:
    quick = PRESETS["quick"]
    assert chosen_recipe(quick, []) == quick and quick.steps == 2_000
    assert chosen_recipe(quick, ["epochs=2"]).total_steps(10) == 20  # not the preset's steps
    assert chosen_recipe(quick, ["epochs=2", "steps=7"]).total_steps(10) == 7
    assert PRESETS["paper"].total_steps(10) == 500
    assert chosen_recipe(quick, ["lr=1e-3", "norm=post"]) == replace(quick, lr=1e-3, norm="post")
    for wrong, message in (("lr=x", "'x' is not a number"), ("lr=nan", "must lie in 0..1000"),
                           ("steps=1.5", "'1.5' is not a whole number"), ("beta2=1", "must lie in"),
                           ("norm=none", "must be post or pre"), ("lrr=1", "did you mean lr?"),
                           ("steps", "'' is not a whole number")):
        with pytest.raises(InputError, match=re.escape(message)):
            chosen_recipe(quick, [wrong])
    assert "warmup        share of the steps" in fields_help(PRESETS)
    assert "(0.0, 0.05, 0.2)" in fields_help(PRESETS)


def test_schedule() -> None:
    factors = [schedule(Recipe(warmup=0.1), step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == factors[10] == 1.0
    assert factors[99] == pytest.approx(1 / 90)
    assert all(a > b for a, b in zip(factors[10:], factors[11:]))
    assert schedule(Recipe(), 0, 100) == 1.0


def test_orthogonalise_keeps_singular_vectors() -> None:
    for rows, columns in ((48, 16), (16, 48), (32, 32)):
        g = torch.randn(2, rows, columns, generator=torch.Generator().manual_seed(0))
        out, g = orthogonalise(g, iterations=10)[1], g[1]
        u, _, v = torch.linalg.svd(g, full_matrices=False)
        assert (torch.linalg.svdvals(out) - 1).abs().max() < 0.4
        assert (u.T @ out @ v.T).diagonal().min() > 0.5


def test_muon_is_pytorchs() -> None:
    """PyTorch's computes in bf16, so the two agree within its rounding."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(48, 16, generator=generator)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = [Muon([ours], lr=0.02, weight_decay=0.1),
                  torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.95)]
    for _ in range(5):
        ours.grad = torch.randn(48, 16, generator=generator)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    moved = (theirs - start).norm()
    assert moved > 0.3 and (ours - theirs).norm() < 0.01 * moved


def test_which_optimizer_trains_what() -> None:
    model = MaskedLM(named_config("bert-1", 64, 1, vocab_size=50))
    adamw, muon = make_optimizers(model, Recipe(optimizer="muon"))
    shapes = sorted(tuple(p.shape) for p in muon.param_groups[0]["params"])
    assert shapes == [(64, 64), (64, 256), (192, 64), (256, 64)]
    assert len(adamw.param_groups[0]["params"]) == len(list(model.parameters())) - 4
    (everything,) = make_optimizers(model, Recipe())
    (group,) = everything.param_groups
    assert len(group["params"]) == len(list(model.parameters()))
    assert (group["weight_decay"], group["betas"]) == (0.01, (0.9, 0.999))


# ---- the loop ------------------------------------------------------------------------------------


@pytest.mark.parametrize("model, changes", [("bert-1", {"optimizer": "muon", "dropout": 0.1}),
                                            ("bert-1-conv2", {"dropout": 0.1})])
def test_resume_is_bit_exact(corpus: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                             model: str, changes: dict) -> None:
    """Stopped by signals between two lines of the log, then equal to the last bit."""
    recipe = replace(SMOKE, steps=250 if model == "bert-1" else 12, **changes)
    straight = pretrain_run(model, recipe, corpus, 3, tmp_path / "straight")
    original = pretraining.mask_tokens
    for stop_at in (5, 8):
        calls = {"n": 0}

        def interrupt(*args, calls=calls, stop_at=stop_at) -> tuple:
            calls["n"] += 1
            if calls["n"] == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*args)

        monkeypatch.setattr(pretraining, "mask_tokens", interrupt)
        with pytest.raises(SystemExit) as stopped:
            pretrain_run(model, recipe, corpus, 3, tmp_path / "halting")
        assert stopped.value.code == 128 + signal.SIGTERM
    monkeypatch.setattr(pretraining, "mask_tokens", original)
    halting = pretrain_run(model, recipe, corpus, 3, tmp_path / "halting")
    a, b = weights(straight), weights(halting)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert log(straight) == log(halting)
    for key in ("held_out_loss", "train_loss", "tokens", "steps"):
        assert results(straight)[key] == results(halting)[key]


def test_what_the_log_and_the_results_hold(corpus: DataFolder, tmp_path: Path) -> None:
    folder = pretrain_run("bert-1", replace(SMOKE, steps=200), corpus, 0, tmp_path)
    lines = log(folder)
    assert [line["step"] for line in lines if "loss" in line] == [*range(2, 201, 2)]
    assert [line["step"] for line in lines if "held_out_loss" in line] == [40, 80, 120, 160, 200]
    lengths = corpus.articles.lengths
    assert lines[-2]["tokens"] == results(folder)["tokens"]  # 200 steps are 15.4 passes
    assert 15 * lengths.sum() < results(folder)["tokens"] < 16 * lengths.sum()
    losses = [line["loss"] for line in lines if "loss" in line]
    assert results(folder)["train_loss"] == pytest.approx(np.mean(losses[-10:]))
    assert results(folder)["held_out_loss"] == lines[-1]["held_out_loss"]
    assert {"command", "machine", "versions", "git", "settings"} <= set(results(folder))


def test_a_run_folder_is_not_overwritten(corpus: DataFolder, tmp_path: Path) -> None:
    recipe = replace(SMOKE, steps=2)
    folder = pretrain_run("bert-1", recipe, corpus, 0, tmp_path, "mine")
    before = (folder / "last.pt").stat().st_mtime_ns
    assert pretrain_run("bert-1", recipe, corpus, 0, tmp_path, "mine") == folder
    assert (folder / "last.pt").stat().st_mtime_ns == before, "a finished run was trained again"
    with pytest.raises(InputError, match=r"recipe.lr 0.001 there, 1.0 now, seed 0 there, 1 now"):
        pretrain_run("bert-1", replace(recipe, lr=1.0), corpus, 1, tmp_path, "mine")
    assert (folder / "last.pt").stat().st_mtime_ns == before, "a refused command did something"
    pretrain_run("bert-1", replace(recipe, lr=1e-2), corpus, 1, tmp_path, "mine", fresh=True)
    assert (folder / "last.pt").stat().st_mtime_ns != before


def test_training_leaves_the_unigram_baseline(corpus: DataFolder, tmp_path: Path) -> None:
    """The made-up sentences have a simple grammar. A few hundred steps must find it."""
    recipe = replace(SMOKE, steps=300, batch_size=16, optimizer="muon", lr=1e-2, beta2=0.98)
    figures = results(pretrain_run("bert-1", recipe, corpus, 0, tmp_path))
    seen = np.bincount(corpus.articles.tokens, minlength=200)[FIRST_PIECE:] + 1.0
    held_out = np.asarray(corpus.held_out.tokens, dtype=int)
    held_out = held_out[held_out >= FIRST_PIECE]
    baseline = float(-np.log(seen / seen.sum())[held_out - FIRST_PIECE].mean())
    assert figures["unigram_loss"] == pytest.approx(baseline)
    assert unigram_loss(corpus.articles, corpus.held_out, 200) == pytest.approx(baseline)
    assert figures["held_out_loss"] < baseline - 1.0 and figures["held_out_accuracy"] > 0.4


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or platform.libc_ver() < ("glibc", "2.35"),
                    reason="blocks of 64 MB: newer glibc alone")
def test_freed_memory_is_kept() -> None:
    """64 MB that are freed and needed again come without page faults; otherwise with 16,384."""
    code = """
import resource, torch
from pretrain import keep_freed_memory
def faults():
    for i in range(40):
        if i == 20:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**24)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 20
before = faults()
keep_freed_memory()
print(before, faults())"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(pretraining.__file__).parent,
                          capture_output=True, text=True, check=True)
    before, after = map(float, done.stdout.split())
    if before < 1_000:
        pytest.skip("pages are huge here")
    assert after < 100


@pytest.mark.parametrize("name", ["bert-6", "bert-1-conv2"])
def test_weights_are_rounded_once_for_inference(name: str) -> None:
    """The same logits, bit by bit, as when autocast rounds the weights at each call."""
    runtime = on_cpu(dtype=torch.bfloat16)
    torch.manual_seed(0)
    config = named_config(name, 64, 1, vocab_size=50, max_length=16)
    members = [Classifier(config, 3).eval() for _ in range(2)]
    for parameter in (p for member in members for p in member.parameters() if not p.any()):
        torch.nn.init.normal_(parameter, std=0.5)  # biases begin at 0
    ids = torch.randint(5, 50, (4, 16))
    with torch.no_grad(), runtime.autocast():
        for model in (members[0], Committee(members)):
            before = model(ids)
            rounded = runtime.for_inference(model)
            assert torch.equal(before, rounded(ids))
            assert any(p.dtype == torch.bfloat16 for p in rounded.parameters())


# ---- a trained model at work ---------------------------------------------------------------------


@pytest.mark.parametrize("text", ["The [MASK] of France.", "A [MASK]. A city", "a [MASK], the "])
def test_a_text_with_masks_has_the_tokens_of_the_text_without(text: str) -> None:
    tokenizer = small_tokenizer()
    names = [tokenizer.pieces.id_to_piece(i) for i in range(tokenizer.vocab_size)]
    word = max((name for name in names if name.startswith("▁")), key=len)
    whole = tokenizer.encode([text.replace("[MASK]", word.removeprefix("▁"))])[0].tolist()
    expected = [MASK if token == names.index(word) else token for token in whole]
    assert MASK in expected
    assert encode_with_masks(text, tokenizer, 64)[0].tolist() == expected


def test_a_wrong_byte_in_a_text_to_fill_is_a_question_mark() -> None:
    tokenizer = small_tokenizer()
    wrong = encode_with_masks("a \udce9 [MASK]", tokenizer, 64)
    assert torch.equal(wrong, encode_with_masks("a ? [MASK]", tokenizer, 64))


def test_show(corpus: DataFolder, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The masks and the predictions are those of a real forward pass."""
    folder = pretrain_run("bert-1", SMOKE, corpus, 0, tmp_path)
    capsys.readouterr()
    text = "The river of France crosses the city."
    show(folder, text)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    model, tokenizer = load_masked_lm(folder)
    input_ids = encode_with_masks(text, tokenizer, 32)
    torch.manual_seed(0)
    masked, positions, labels = mask_tokens(input_ids, 200, 0.25)
    assert [row[1] for row in rows] == [tokenizer.pieces.id_to_piece(int(i)) for i in input_ids[0]]
    assert [row[2] for row in rows] == [tokenizer.pieces.id_to_piece(int(i)) for i in masked[0]]
    probabilities = model(masked, positions).softmax(-1)
    for place, label, p in zip(positions.tolist(), labels.tolist(), probabilities):
        if label >= 0:
            assert rows[place][3:5] == [tokenizer.pieces.id_to_piece(label), f"{p[label]:.4f}"]
