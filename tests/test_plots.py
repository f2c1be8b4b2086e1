"""extras/plots.py: the step at which a curve leaves the baseline, and pictures of real runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")

from data import DataFolder, InputError
from extras.plots import attention_of, plateau_end, plot_accuracies, plot_attention, plot_losses
from extras.plots import plot_sizes
from material import pretrain_run
from pretrain import PRESETS, encode_with_masks, load_masked_lm


def test_the_break_of_a_loss_curve() -> None:
    steps = range(40)
    falling = [6.0 - 0.1 * max(0, step - 20) for step in steps]
    noisy = [6.0 + 0.3 * (-1) ** step for step in steps]
    assert 21 < plateau_end(steps, falling, 6.0) < 26
    assert plateau_end(steps, noisy, 6.0) is None and plateau_end(steps, falling, 3.0) is None


def test_loss_curves(corpus: DataFolder, tmp_path: Path) -> None:
    recipe = replace(PRESETS["smoke"], steps=20)
    runs = [pretrain_run("bert-1", recipe, corpus, seed, tmp_path / "runs") for seed in (0, 1)]
    plot_losses(runs, tmp_path / "losses.png")
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    for content in ("rubbish", "", "1\n", '{"loss": 1}\n'):
        (runs[1] / "log.jsonl").write_text(content, encoding="utf-8")
        with pytest.raises(InputError, match="log.jsonl: cannot be read"):
            plot_losses(runs, tmp_path / "losses.png")
    (runs[1] / "results.json").unlink()
    with pytest.raises(InputError, match="pre-training has not ended"):
        plot_losses(runs, tmp_path / "losses.png")
    with pytest.raises(InputError, match="not a finished committee"):
        plot_accuracies(runs[0], tmp_path / "x.png")


def test_accuracies(tmp_path: Path) -> None:
    interval = {"mean": 60.0, "low": 50.0, "high": 65.0, "over": "seeds"}
    row = {"pre-trained": interval, "from scratch": interval}
    task = {"table": {"bert-6": row, "bert-1, one member": row, "committee of 2 bert-1": row},
            "yardsticks": {"largest class": 0.2, "logistic regression": 0.5}}
    settings = {"deep": "bert-6", "members": 2}
    record = json.dumps({"tasks": {"a": task, "b": task}, "settings": settings})
    (tmp_path / "results.json").write_text(record, encoding="utf-8")
    plot_accuracies(tmp_path, tmp_path / "accuracies.png")
    plot_sizes(tmp_path, tmp_path / "sizes.png")
    for name in ("accuracies.png", "sizes.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_attention(corpus: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are softmax(q k / sqrt(D)) of what the layer really sees."""
    recipe = replace(PRESETS["smoke"], width=128, heads=2)
    run = pretrain_run("bert-1", recipe, corpus, 0, tmp_path / "runs")
    text = "The river of France crosses the city."
    tokens, (weights,) = attention_of(run, text)
    model, tokenizer = load_masked_lm(run)
    input_ids = encode_with_masks(text, tokenizer, 32)
    assert tokens == [tokenizer.pieces.id_to_piece(int(i)) for i in input_ids[0]]
    layer = model.bert.layers[0]
    x = model.bert.token(input_ids) + model.bert.position.weight[: len(tokens)]
    q, k, _ = layer.attention.qkv(layer.attention_norm(x))[0].detach().chunk(3, -1)
    for head in (0, 1):
        own = slice(64 * head, 64 * head + 64)
        expected = (q[:, own] @ k[:, own].T / 8).softmax(-1)
        assert torch.allclose(weights[head], expected, atol=1e-6)
    plot_attention(run, text, tmp_path / "attention.png")
    assert (tmp_path / "attention.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr("extras.plots.MOST_TOKENS", 5)
    with pytest.raises(InputError, match="a picture shows at most 5"):
        plot_attention(run, text, tmp_path / "x.png")
