"""Masking, schedules, optimizers, accumulation, exact resume."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import pretrain as pretraining
from committee import SoftCommittee
from data import DataFolder, DeviceTable, InputError, TokenTable
from finetune import difference
from material import corpus_of, articles, small_tokenizer
from model import BertConfig, Classifier, ConvStem, MaskedLM, named_config
from pretrain import (PRESETS, Hardware, Muon, Optimisation, break_step, chosen_recipe, count_embeddings, count_neighbours,
                      held_out_loss, ids_with_masks, load_checkpoint, load_masked_lm, make_optimizers, mask_tokens, orthogonalise,
                      plot_losses, pretrain, sample_pieces, schedule, show_forward_pass, start_from_counts, unigram_loss, update_weights)
from tokenizer import CLS, FIRST_PIECE, MASK

CPU = Hardware(torch.device("cpu"), torch.float32, "test")


@pytest.fixture(scope="module")
def corpus() -> DataFolder:
    tokenizer = small_tokenizer()
    texts = [a["text"] for a in articles(120)]
    return corpus_of(texts[20:], texts[:20], tokenizer)


def test_masking_is_berts_statistically() -> None:
    """15 %, of which 80/10/10; specials never chosen, never inserted; random ids uniform. Bounds: 5 standard deviations."""
    V, n = 105, 400_000
    ids = torch.randint(0, V, (400, 1000), generator=torch.Generator().manual_seed(0))
    masked, positions, labels = mask_tokens(ids, V, 0.15, torch.Generator().manual_seed(1))
    flat, out = ids.flatten(), masked.flatten()
    assert torch.equal(labels, flat[positions]) and (labels >= FIRST_PIECE).all()
    untouched = torch.ones(n, dtype=torch.bool)
    untouched[positions] = False
    assert torch.equal(out[untouched], flat[untouched])

    def near(count: int, of: int, p: float) -> bool:
        return abs(count - of * p) < 5 * (of * p * (1 - p)) ** 0.5

    ordinary, M = int((flat >= FIRST_PIECE).sum()), len(positions)
    assert near(M, ordinary, 0.15)
    new = out[positions]
    replaced = new == MASK
    assert near(int(replaced.sum()), M, 0.8)
    changed = ~replaced & (new != labels)
    assert near(int(changed.sum()), M, 0.1 * 99 / 100)  # a random token is the old one in 1 of 100
    assert (new[~replaced] >= FIRST_PIECE).all()
    counts = torch.bincount(new[changed], minlength=V)[FIRST_PIECE:].double()
    chi2 = float(((counts - counts.mean()) ** 2 / counts.mean()).sum())
    assert chi2 < 99 + 5 * (2 * 99) ** 0.5
    again = mask_tokens(ids, V, 0.15, torch.Generator().manual_seed(1))[0]
    other = mask_tokens(ids, V, 0.15, torch.Generator().manual_seed(2))[0]
    assert torch.equal(masked, again) and not torch.equal(masked, other)


def test_every_seed_and_step_has_its_own_masks(corpus: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's CPU generator keeps the low 32 bits of a seed: seeds must not differ in the high ones alone."""
    draws = []
    original = pretraining.mask_tokens

    def spy(*args, **kwargs):
        if not kwargs.get("generator"):
            draws.append(torch.rand(4).tolist())
        return original(*args, **kwargs)

    monkeypatch.setattr(pretraining, "mask_tokens", spy)
    for seed in (0, 1, 2):
        pretrain("bert-1", dataclasses.replace(PRESETS["smoke"], steps=3), corpus, seed, tmp_path, CPU)
    assert len(draws) == 9 and len({tuple(d) for d in draws}) == 9


def test_sampled_pieces_stand_for_all_on_average() -> None:
    """The labels' pieces are among them, each once; the sum under the softmax is that over the whole vocabulary, on average over draws."""
    V, labels = 50, torch.tensor([7, 9, 7, 30])
    logits = torch.randn(len(labels), V, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    sums = []
    for _ in range(4_000):
        pieces, growth, places = sample_pieces(labels, V, 12)
        assert len(pieces) == len(pieces.unique()) == 12 and pieces[:3].tolist() == [7, 9, 30] and not growth[:3].any()
        assert places.tolist() == [0, 1, 0, 2]
        sums.append((logits[:, pieces] + growth).exp().sum(1))
    drawn = torch.stack(sums)
    assert ((drawn.mean(0) - logits.exp().sum(1)).abs() < 5 * drawn.std(0) / len(sums) ** 0.5).all()
    assert len(sample_pieces(labels, V, 4)[0]) == 3 + 2  # half of what is asked for is drawn at least
    pieces, growth, places = sample_pieces(labels, V, V)  # all of them: the whole softmax
    assert not growth.any() and sorted(pieces.tolist()) == list(range(V)) and pieces[places[0]] == 7
    assert len(sample_pieces(labels[:0], V, 4)[0]) == 4 and not sample_pieces(torch.arange(V), V, 4)[1].any()


def test_the_authors_fault_inserts_special_tokens() -> None:
    ids = torch.full((200, 100), 7)
    for fault in (False, True):
        masked, positions, _ = mask_tokens(ids, 10, 0.5, torch.Generator().manual_seed(1), special_replacements=fault)
        new = masked.flatten()[positions]
        assert bool((new[new != MASK] < FIRST_PIECE).any()) == fault


def test_schedule() -> None:
    recipe = Optimisation(warmup=0.1)
    factors = [schedule(recipe, s, 100, 10) for s in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == 1.0 and factors[10] == 1.0
    assert factors[99] == pytest.approx(1 / 90) and all(a > b for a, b in zip(factors[10:], factors[11:]))
    assert schedule(Optimisation(), 0, 100, 10) == 1.0
    faulty = [schedule(Optimisation(fault_schedule=True), s, 100, 10) for s in range(100)]
    assert faulty[:10] == [0.0] * 10 and faulty[10:20] == [1.0] * 10 and faulty[90] == pytest.approx(1 / 9)


def test_epochs_are_not_overruled_by_a_presets_steps() -> None:
    assert chosen_recipe(PRESETS["quick"], []).steps == 300
    assert chosen_recipe(PRESETS["quick"], ["epochs=2"]).steps == 0
    assert chosen_recipe(PRESETS["quick"], ["epochs=2", "steps=7"]).steps == 7
    assert chosen_recipe(PRESETS["quick"], ["decay_all=true"]).decay_all is True


def test_an_overflow_stops_both_optimizers() -> None:
    """With a loss scale: one infinite gradient, and neither AdamW's nor Muon's parameters move."""
    model = MaskedLM(BertConfig(vocab_size=30, layers=1, width=64, heads=1, max_length=8))
    optimizers = make_optimizers(model, PRESETS["quick"])
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    for infinite in (True, False):
        scaler.scale(model(torch.full((1, 8), 9), torch.arange(3)).sum()).backward()
        if infinite:
            model.bias.grad[3] = torch.inf
        update_weights(model, optimizers, scaler, 1.0)
        moved = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
        assert bool(moved) is not infinite and scaler.get_scale() == 4.0
    assert {"bias", "bert.layers.0.mlp_in.weight"} <= moved


def test_the_bootstrap_interval() -> None:
    """Of one pair of models: resampled rows, all at once here and a sample at a time there; and about the normal approximation's."""
    rng = np.random.default_rng(1)
    first, second = (rng.random(1_101) < 0.7).astype(float), (rng.random(1_101) < 0.5).astype(float)
    d, found = first - second, difference([[first]], [[second]])
    rows = np.random.default_rng(0).integers(0, len(d), (2_000, len(d)))
    assert [found["low"], found["high"]] == pytest.approx(list(100 * np.percentile(d[rows].mean(1), [2.5, 97.5])), abs=1e-9)
    half = 196 * d.std() / len(d) ** 0.5
    assert [found["low"], found["high"]] == pytest.approx([found["mean"] - half, found["mean"] + half], abs=0.4)


def test_orthogonalise_keeps_singular_vectors() -> None:
    g = torch.randn(4, 48, 16, generator=torch.Generator().manual_seed(0))
    out = orthogonalise(g, iterations=10)
    u, s, v = torch.linalg.svd(g, full_matrices=False)
    assert (torch.linalg.svdvals(out) - 1).abs().max() < 0.4
    aligned = torch.einsum("nij,nik,nkj->nj", u, out, v.mT)  # diagonal of u' out v
    assert aligned.min() > 0.5
    torch.testing.assert_close(orthogonalise(g.mT, 10), out.mT, atol=1e-4, rtol=1e-4)


def test_muon_takes_query_key_and_value_for_three_matrices() -> None:
    fused = torch.nn.Parameter(torch.zeros(48, 16))
    fused.grad = torch.randn(48, 16, generator=torch.Generator().manual_seed(0))
    Muon([fused], lr=1.0).step()
    for part, grad in zip(fused.data.chunk(3), fused.grad.chunk(3)):
        torch.testing.assert_close(part, -orthogonalise(grad[None])[0], atol=1e-3, rtol=1e-3)


def test_optimizer_groups() -> None:
    model = MaskedLM(named_config("bert-1", 64, vocab_size=50))
    adamw, muon = make_optimizers(model, Optimisation(optimizer="muon", decay_all=False, position_lr=0.3))
    assert sorted(tuple(p.shape) for p in muon.param_groups[0]["params"]) == [(64, 64), (64, 256), (192, 64), (256, 64)]
    decayed, undecayed, tokens, positions = adamw.param_groups
    assert [tuple(p.shape) for p in positions["params"]] == [(128, 64)] and positions["lr"] == pytest.approx(0.3 * undecayed["lr"])
    assert all(p.ndim == 2 for p in decayed["params"]) and all(p.ndim == 1 for p in undecayed["params"])
    assert undecayed["weight_decay"] == 0.0
    (everything,) = make_optimizers(model, Optimisation())
    assert sum(len(g["params"]) for g in everything.param_groups) == len(list(model.parameters()))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder)["model"]


@pytest.mark.parametrize("head_sample", [0, 60])
def test_accumulation_is_exact(corpus: DataFolder, tmp_path: Path, head_sample: int) -> None:
    """Micro-batches with different numbers of masked tokens give the whole batch's gradient."""
    whole = dataclasses.replace(PRESETS["smoke"], steps=3, head_sample=head_sample)
    runs = [pretrain("bert-1", dataclasses.replace(whole, micro_batch=size), corpus, 0, tmp_path, CPU) for size in (0, 3)]
    a, b = map(weights, runs)
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=2e-5, rtol=1e-4)
    other = weights(pretrain("bert-1", whole, corpus, 1, tmp_path, CPU))
    assert not torch.allclose(a["bert.token.weight"], other["bert.token.weight"], atol=1e-3)


def test_more_positions_than_are_asked_change_nothing(corpus: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head sees a multiple of 64 positions, whatever the masks; the weights are those of the masked positions alone."""
    asked, original = list[int](), pretraining.F.cross_entropy
    monkeypatch.setattr(pretraining.F, "cross_entropy", lambda logits, labels, **more: asked.append(len(labels)) or original(logits, labels, **more))
    recipe = dataclasses.replace(PRESETS["smoke"], steps=3)
    a = weights(pretrain("bert-1", recipe, corpus, 0, tmp_path / "padded", CPU))
    assert all(count % 64 == 0 for count in asked[:3])
    monkeypatch.setattr(pretraining.F, "pad", lambda x, pad, value=0: x)
    asked.clear()
    b = weights(pretrain("bert-1", recipe, corpus, 0, tmp_path / "plain", CPU))
    assert any(count % 64 for count in asked[:3])
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=2e-5, rtol=1e-4)


@pytest.mark.skipif(platform.libc_ver() < ("glibc", "2.35") or platform.libc_ver()[0] != "glibc", reason="blocks of 64 MB: newer glibc alone")
def test_freed_memory_is_kept() -> None:
    """64 MB that are freed and asked for again come without page faults; otherwise with 16,384, unless pages are huge."""
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
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(pretraining.__file__).parent, capture_output=True, text=True, check=True)
    before, after = map(float, done.stdout.split())
    if before < 1_000:
        pytest.skip("pages are huge here")
    assert after < 100


@pytest.mark.parametrize("name, norm", [("bert-6", "pre"), ("bert-6", "post"), ("bert-1-conv2", "post")])
def test_bf16_is_fp32_within_its_rounding(name: str, norm: str) -> None:
    """Under autocast on a CPU all sums between the layers are bf16; what comes out differs from fp32 by its rounding alone."""
    torch.manual_seed(0)
    model = Classifier(named_config(name, 64, vocab_size=50, max_length=16, norm=norm), 3).eval()
    ids = torch.randint(5, 50, (8, 16))
    exact = model.bert(ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model.bert(ids)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() < 0.02 * exact.norm()


def test_bf16_gradients_of_the_stem() -> None:
    """In bf16 the gradients of a stem in training are those of fp32 within a few percent, those of its normalisation too."""
    gradients = []
    real = torch.arange(64) < torch.tensor([[64], [50], [64], [9]])
    for autocast in (False, True):
        torch.manual_seed(0)
        stem, x, weight = ConvStem(named_config("bert-1-conv2", 192)).train(), torch.randn(4, 64, 192), torch.randn(4, 64, 192)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y = stem(x.bfloat16() if autocast else x, real)
        (y.float() * weight).sum().backward()
        gradients.append({name: p.grad for name, p in stem.named_parameters()
                          if p.numel() > 1 and not re.fullmatch(r"convs.\d.bias", name)})  # not sums that cancel: alone, or before a norm
    for name, exact in gradients[0].items():
        assert (gradients[1][name] - exact).norm() < 0.05 * exact.norm(), name


def test_a_rank_without_a_text_has_a_stem_too() -> None:
    """The last batch of an epoch may leave a rank nothing: no error, and gradients of 0."""
    stem, x = ConvStem(named_config("bert-1-conv2", 64)).train(), torch.randn(0, 16, 64, requires_grad=True)
    y = stem(x, torch.ones(0, 16, dtype=torch.bool))
    y.sum().backward()
    assert y.shape == x.shape and all(not p.grad.any() for p in stem.parameters())


@pytest.mark.parametrize("model, changes", [("bert-1", {"optimizer": "muon", "dropout": 0.1, "short_conv": True, "head_sample": 60}), ("bert-1-conv2", {"attention_dropout": 0.1})])
def test_resume_is_bit_exact(corpus: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, changes: dict) -> None:
    """Interrupted twice by a signal, once right after a step that is no line of the log; then equal to the last bit."""
    recipe = dataclasses.replace(PRESETS["smoke"], steps=250 if model == "bert-1" else 12, **changes)
    straight = pretrain(model, recipe, corpus, 3, tmp_path / "straight", CPU)
    original = pretraining.mask_tokens
    for stop_at in (5, 8):
        calls = {"n": 0}

        def interrupt(*args, **kwargs):
            calls["n"] += 1
            if calls["n"] == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*args, **kwargs)

        monkeypatch.setattr(pretraining, "mask_tokens", interrupt)
        with pytest.raises(SystemExit) as stopped:
            pretrain(model, recipe, corpus, 3, tmp_path / "halting", CPU)
        assert stopped.value.code == 128 + signal.SIGTERM
    monkeypatch.setattr(pretraining, "mask_tokens", original)
    halting = pretrain(model, recipe, corpus, 3, tmp_path / "halting", CPU)
    a, b = weights(straight), weights(halting)
    assert all(torch.equal(a[name], b[name]) for name in a)

    def log(folder: Path) -> list[dict]:
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_s")} for line in lines]

    assert log(straight) == log(halting)
    results = [json.loads((f / "results.json").read_text(encoding="utf-8")) for f in (straight, halting)]
    assert results[0]["held_out_loss"] == results[1]["held_out_loss"] and results[0]["train_loss"] == results[1]["train_loss"]


def test_time_budget(corpus: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training ends with its minutes, on its schedule; an interruption does not lengthen it. By a clock that ticks when it is read."""
    clock = {"now": 0.0}

    def tick() -> float:
        clock["now"] += 0.01
        return clock["now"]

    monkeypatch.setattr(pretraining.time, "perf_counter", tick)
    recipe = dataclasses.replace(PRESETS["smoke"], steps=1, time_budget=0.05)
    original, calls = pretraining.mask_tokens, {"n": 0}

    def interrupt(*args, **kwargs):
        calls["n"] += 1
        if calls["n"] == 30:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    monkeypatch.setattr(pretraining, "mask_tokens", interrupt)
    with pytest.raises(SystemExit):
        pretrain("bert-1", recipe, corpus, 0, tmp_path, CPU)
    used = clock["now"]
    assert 0.5 < used < 2.5
    clock["now"] = 1_000.0  # the time between two sessions does not count
    folder = pretrain("bert-1", recipe, corpus, 0, tmp_path, CPU)
    assert used + clock["now"] - 1_000 == pytest.approx(3, abs=0.3)
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert results["seconds"] == pytest.approx(3, abs=0.2) and results["steps"] > 40
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    factors = [line["factor"] for line in lines if "factor" in line]
    assert len(factors) > 20 and max(factors) > 0.9 and factors[-1] < 0.1
    assert sum("held_out_loss" in line for line in lines) == 5
    with pytest.raises(InputError, match="counts epochs"):
        pretraining.checked(dataclasses.replace(recipe, fault_schedule=True))


def test_a_run_folder_is_not_overwritten(corpus: DataFolder, tmp_path: Path) -> None:
    recipe = dataclasses.replace(PRESETS["smoke"], steps=2)
    folder = pretrain("bert-1", recipe, corpus, 0, tmp_path, CPU, name="mine")
    before = (folder / "last.pt").stat().st_mtime_ns
    assert pretrain("bert-1", recipe, corpus, 0, tmp_path, CPU, name="mine") == folder
    assert (folder / "last.pt").stat().st_mtime_ns == before, "a finished run was trained again"
    with pytest.raises(InputError, match=r"recipe.lr 0.001 there, 1.0 now, seed 0 there, 1 now"):
        pretrain("bert-1", dataclasses.replace(recipe, lr=1.0), corpus, 1, tmp_path, CPU, name="mine")
    assert (folder / "last.pt").stat().st_mtime_ns == before, "what was refused did something all the same"
    pretrain("bert-1", dataclasses.replace(recipe, lr=1e-2), corpus, 1, tmp_path, CPU, name="mine", fresh=True)


@pytest.mark.parametrize("head_sample", [0, 60])
def test_training_leaves_the_unigram_baseline(corpus: DataFolder, tmp_path: Path, head_sample: int) -> None:
    """The made-up sentences have a simple grammar: a few hundred steps must beat word frequencies by far."""
    recipe = dataclasses.replace(PRESETS["smoke"], steps=300, batch_size=16, optimizer="muon", lr=1e-2, beta2=0.98,
                                 head_sample=head_sample)
    results = json.loads((pretrain("bert-1", recipe, corpus, 0, tmp_path, CPU) / "results.json").read_text(encoding="utf-8"))
    seen = np.bincount(corpus.articles.tokens, minlength=200)[FIRST_PIECE:] + 1.0
    counted = sum(-np.log(seen[t - FIRST_PIECE] / seen.sum()) for t in np.asarray(corpus.held_out.tokens, dtype=int) if t >= FIRST_PIECE)
    ordinary = int((np.asarray(corpus.held_out.tokens) >= FIRST_PIECE).sum())
    assert results["unigram_loss"] == pytest.approx(counted / ordinary) == pytest.approx(unigram_loss(corpus.articles, corpus.held_out, 200))
    assert results["held_out_loss"] < results["unigram_loss"] - 1.0
    assert results["held_out_accuracy"] > 0.4


def test_non_finite_loss_stops_with_one_line(corpus: DataFolder, tmp_path: Path) -> None:
    recipe = dataclasses.replace(PRESETS["smoke"], steps=50, lr=1e30, warmup=0.0, clip=0.0)
    with pytest.raises(InputError, match="the loss is .* lower --lr"):
        pretrain("bert-1", recipe, corpus, 0, tmp_path, CPU)


def test_counting_puts_tokens_that_share_texts_together(tmp_path: Path) -> None:
    """Two subjects with words of their own and some in common: cosines within a subject exceed those across; no seed moves them."""
    rng, V = np.random.default_rng(0), 66
    subjects = [np.arange(5, 25), np.arange(25, 45)]
    texts = [np.concatenate([rng.choice(subjects[i % 2], 8), rng.choice(np.arange(45, 65), 6), [CLS]]) for i in range(400)]
    offsets = np.cumsum([0, *map(len, texts)])
    table = TokenTable(np.concatenate(texts).astype(np.uint16), offsets, 15)
    vectors = count_embeddings(table, V, 16)
    torch.manual_seed(5)
    assert torch.equal(vectors, count_embeddings(table, V, 16)) and vectors.shape == (V, 16)
    assert vectors[:FIRST_PIECE].abs().max() < 1e-5 and vectors[V - 1].abs().max() < 1e-5  # special tokens, and one that never occurs
    assert vectors[FIRST_PIECE:].std() == pytest.approx(1, abs=1e-3)
    # the same from a table of how often each token occurs in each text
    counts = torch.stack([torch.bincount(torch.from_numpy(t.astype(np.int64)), minlength=V) for t in texts]).float()
    counts[:, :FIRST_PIECE] = 0
    pairs, of_one = counts.T @ counts, (counts.T @ counts).sum(1)
    information = (pairs / of_one[:, None] / (of_one**0.75 / (of_one**0.75).sum())).log().nan_to_num(0.0, neginf=0.0).clamp(min=0)
    inner = vectors @ vectors.T  # of the leading directions, up to one factor, and to signs as the matrix is not symmetric
    left, values, _ = torch.linalg.svd(information)
    expected = (left[:, :16] * values[:16]) @ left[:, :16].T
    assert torch.allclose(inner / inner.norm(), expected / expected.norm(), atol=1e-3)
    unit = torch.nn.functional.normalize(vectors[5:45], dim=1)
    cosine = unit @ unit.T
    cosine.fill_diagonal_(torch.nan)
    within = torch.stack([cosine[:20, :20], cosine[20:, 20:]]).nanmean()
    assert within > cosine[:20, 20:].mean() + 0.3


def test_counting_in_windows(tmp_path: Path) -> None:
    """By hand; and a start from windows is another than one from texts, and kept in a file of its own."""
    texts = [np.array([5, 6, 7, 8, 9, 10, 11]), np.array([5, 6])]
    table = TokenTable(np.concatenate(texts).astype(np.uint16), np.array([0, 7, 9]), 8)
    expected = torch.zeros(12, 12)
    for text in texts:
        for i, a in enumerate(text):
            for j, b in enumerate(text):
                expected[a, b] += 1 / abs(i - j) if 0 < abs(i - j) <= 5 else 0
    torch.testing.assert_close(count_neighbours(table, 12, CPU.device, 5)[5:, 5:], expected[5:, 5:])
    assert torch.equal(count_neighbours(table, 12, CPU.device, 6)[5:, 5:], count_neighbours(table, 12, CPU.device, 4096)[5:, 5:])
    models = [MaskedLM(named_config("bert-1", 64, vocab_size=12, max_length=32)) for _ in range(3)]
    for model, window in zip(models, (5, 2, 0)):
        start_from_counts(model, table, 0.1, "cpu", tmp_path, window)
    starts = [model.bert.token.weight[5:] for model in models]
    assert not any(torch.allclose(starts[i], starts[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    assert len(list(tmp_path.glob("counts-*.pt"))) == 3


def test_start_from_counts_is_at_the_unigram_baseline(corpus: DataFolder, tmp_path: Path) -> None:
    V = corpus.tokenizer.vocab_size
    torch.manual_seed(0)
    model = MaskedLM(named_config("bert-1", 64, vocab_size=V, max_length=32, norm="pre", dropout=0.0)).eval()
    held_out = DeviceTable(corpus.held_out, CPU.device)
    before = held_out_loss(model, held_out, V, CPU)["held_out_loss"]
    start_from_counts(model, corpus.articles, 0.1, "cpu", tmp_path)
    again = MaskedLM(model.config)
    (kept,) = tmp_path.glob("counts-64-*.pt")
    stamp = kept.stat().st_mtime_ns
    start_from_counts(again, corpus.articles, 0.1, "cpu", tmp_path)
    assert kept.stat().st_mtime_ns == stamp, "counted twice"
    assert torch.equal(again.bert.token.weight[FIRST_PIECE:], model.bert.token.weight[FIRST_PIECE:])
    kept.write_bytes(b"rubbish")
    with pytest.raises(InputError, match="delete it"):
        start_from_counts(again, corpus.articles, 0.1, "cpu", tmp_path)
    after = held_out_loss(model, held_out, V, CPU)["held_out_loss"]
    assert before > after + 0.3 and abs(after - unigram_loss(corpus.articles, corpus.held_out, V)) < 0.2
    with pytest.raises(InputError, match="32768 is the most"):
        count_embeddings(corpus.articles, 40_000, 64)


def test_tables_learn_at_their_own_rates(corpus: DataFolder) -> None:
    model = MaskedLM(named_config("bert-1", 64, vocab_size=200, max_length=32, norm="pre"))
    groups = make_optimizers(model, Optimisation(lr=0.1, token_lr=0.3, position_lr=0.05, optimizer="muon"))[0].param_groups
    rates = {id(p): g["lr"] for g in groups for p in g["params"]}
    assert rates[id(model.bert.token.weight)] == pytest.approx(0.03) and rates[id(model.bert.position.weight)] == pytest.approx(0.005)
    assert rates[id(model.bias)] == rates[id(model.dense.weight)] == 0.1 and len(rates) == sum(len(g["params"]) for g in groups)


@pytest.mark.parametrize("name, more", [("bert-1-conv2", {}), ("bert-6", {"short_conv": True})])
def test_stored_in_the_type_of_products(name: str, more: dict) -> None:
    """for_inference rounds the weights once, to what autocast makes of them at every call: the same logits, bit by bit."""
    hardware = Hardware(torch.device("cpu"), torch.bfloat16, "")
    torch.manual_seed(0)
    members = [Classifier(named_config(name, 64, vocab_size=50, max_length=16, **more), 3).eval() for _ in range(2)]
    for parameter in (p for m in members for p in m.parameters() if not p.any()):  # biases and shares of neighbours begin at 0
        torch.nn.init.normal_(parameter, std=0.5)
    ids = torch.randint(5, 50, (4, 16))
    with torch.no_grad(), hardware.autocast():
        before = [m(ids) for m in members], SoftCommittee(members)(ids)
        members = [hardware.for_inference(m) for m in members]
        assert all(m.pooler.weight.dtype == torch.bfloat16 for m in members)
        assert torch.equal(before[1], SoftCommittee(members)(ids))
        assert all(torch.equal(x, m(ids)) for x, m in zip(before[0], members))


def test_show_and_plot(corpus: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """--show prints real shapes and the real attention; --plot draws, and without matplotlib says so in one line."""
    recipe = dataclasses.replace(PRESETS["smoke"], width=128, heads=2)
    folders = [pretrain(model, recipe, corpus, 0, tmp_path, CPU) for model in ("bert-1", "bert-1-conv2")]
    capsys.readouterr()
    show_forward_pass(folders[1], "the [MASK] of france")
    out = capsys.readouterr().out
    T = int(re.search(r"T (\d+) tokens", out)[1])
    for stage, shape in (("bert.stem", (1, T, 128)), ("bert.layers.0.attention.qkv", (1, T, 384)), ("bert.layers.0.mlp_in", (1, T, 512)),
                         ("dense", (1, 128)), ("logits", (1, corpus.tokenizer.vocab_size))):
        assert re.search(rf"^{re.escape(stage)} .*{re.escape(str(shape))}", out, flags=re.M), out
    show_forward_pass(folders[0], "the [MASK] of france")
    heads = re.split(r"^layer 1, head \d.*\n.*\n", capsys.readouterr().out, flags=re.M)[1:]
    model, tokenizer = load_masked_lm(folders[0])
    x = model.bert.token(ids_with_masks("the [MASK] of france", tokenizer, model.config)) + model.bert.position.weight[:T]
    query, key, _ = model.bert.layers[0].attention.project(model.bert.layers[0].attention_norm(x))
    weights = (query @ key.mT / 8).softmax(-1)[0]  # (H, T, T), heads 64 wide
    for head, expected in zip(heads, weights, strict=True):
        for line, row in zip(head.strip("\n").splitlines(), expected, strict=True):
            assert [line[12 + 6 * i : 18 + 6 * i].strip() for i in range(T)] == [f"{100 * w:.0f}" if w >= 0.05 else "" for w in row.tolist()]
    plot_losses(folders)
    assert (folders[0] / "loss.png").read_bytes().startswith(b"\x89PNG") and len(capsys.readouterr().out.splitlines()) == 1
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    plot_losses(folders)
    assert capsys.readouterr().err == "note: no picture is drawn without matplotlib: pip install matplotlib\n"


def test_the_break_of_a_loss_curve() -> None:
    down, noisy = [(s, 6.0 - 0.1 * max(0, s - 20)) for s in range(40)], [(s, 6.0 + 0.3 * (-1) ** s) for s in range(40)]
    assert 21 < break_step(down, 6.0) < 26 and break_step(noisy, 6.0) is None and break_step(down, 3.0) is None
