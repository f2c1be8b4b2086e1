"""Numbers that must not move, whoever restructures the code: logits, losses and 20 training steps.

GOLDEN holds what tiny models give whose weights are a formula. Hugging Face's models gave these
numbers in float64; test_huggingface.py computes them anew. pins.json holds 20 batches (masked ids,
positions, labels, drawn once) and the loss of each step of the paper's recipe without dropout.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pretrain
from model import Attention, BertConfig, Classifier, MaskedLM, named_config

SETTINGS = {"post": {"norm": "post", "layers": 2}, "pre": {"norm": "pre", "layers": 2},
            "conv": {"norm": "post", "layers": 1, "conv_channels": 2, "conv_kernels": (3, 3)}}
RAGGED = [[2, 5, 9, 4, 11, 22, 3], [2, 6, 4, 3, 0, 0, 0]]
FULL = [[2, 5, 9, 4, 11, 22, 3], [2, 4, 17, 8, 20, 13, 3]]
SHOWN = [0, 7, 10, 22]  # the columns of the MLM logits that are frozen
LABELS = {"mlm": [10, 7], "classifier": [2, 0]}  # tokens at the masked positions; classes

# architecture, head: logits (two rows), loss
GOLDEN: dict[tuple[str, str], tuple[list[list[float]], float]] = {
    ("post", "mlm"): ([[-0.6244004948, -0.1077987858, -0.8628591032, 0.3603665497],
                       [-0.685668382, -0.0035778367, -0.854391917, 0.4596885218]], 3.7273493775),
    ("post", "classifier"): ([[0.3793899355, -0.4686883234, 0.0242819972],
                              [0.365280777, -0.4138177121, 0.0297569145]], 0.9436932611),
    ("pre", "mlm"): ([[-0.185542417, -0.1962515003, -0.528569489, -0.0426672809],
                      [-1.0241515251, 0.030216466, -1.1328848503, 0.7544067655]], 3.562007248),
    ("pre", "classifier"): ([[0.2635708959, -1.0107516242, 0.2253981607],
                             [0.265289282, -0.979179587, 0.2187117129]], 0.8266222483),
    ("conv", "mlm"): ([[-1.1541879953, 0.700803436, -1.3869726783, -1.0821904974],
                       [-1.2208129038, 0.6667079775, -1.3773143341, -1.1562673125]], 3.8964382078),
    ("conv", "classifier"): ([[-0.709396136, 1.8640040149, -1.0254228153],
                              [-0.6814288312, 1.8051262693, -1.0097507209]], 2.8168081472),
}
PINS = json.loads(Path(__file__).with_name("pins.json").read_text(encoding="utf-8"))


def is_scale(name: str) -> bool:
    return "norm" in name and name.endswith("weight")


@torch.no_grad()
def fill_by_formula(model: nn.Module) -> nn.Module:
    """In float64, every weight a sine of its index: around 1 where it is a scale or a variance."""
    model = model.double().eval()
    for number, (name, tensor) in enumerate(sorted(model.state_dict().items())):
        if name.endswith("num_batches_tracked"):
            continue
        index = torch.arange(tensor.numel(), dtype=torch.float64)
        wave = torch.sin(index * (0.7 + 0.05 * number) + number).view(tensor.shape)
        around_1 = is_scale(name) or name.endswith("running_var")
        tensor.copy_(1 + 0.5 * wave if around_1 else 0.4 * wave)
    return model


def golden_model(architecture: str, head: str) -> MaskedLM | Classifier:
    config = BertConfig(vocab_size=23, width=8, heads=2, max_length=7, **SETTINGS[architecture])
    return fill_by_formula(MaskedLM(config) if head == "mlm" else Classifier(config, 3))


def golden_batch(architecture: str, head: str) -> tuple[Tensor, Tensor, Tensor]:
    """Ids (2, 7), masked positions (2,), labels (2,). The authors' stem is for full texts only."""
    is_conv = architecture == "conv"
    input_ids = torch.tensor(FULL if is_conv else RAGGED)
    positions = torch.tensor([3, 8] if is_conv else [3, 9])
    return input_ids, positions, torch.tensor(LABELS[head])


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "by hand"])
@pytest.mark.parametrize("architecture, head", list(GOLDEN), ids=lambda value: value)
def test_logits_and_losses_are_hugging_faces(architecture: str, head: str, fused: bool,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Attention, "fused", fused)
    input_ids, positions, labels = golden_batch(architecture, head)
    expected, expected_loss = GOLDEN[architecture, head]
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        model = golden_model(architecture, head).to(dtype)
        logits = model(input_ids, positions) if head == "mlm" else model(input_ids)
        shown = logits[:, SHOWN] if head == "mlm" else logits
        loss = F.cross_entropy(logits, labels)
        for found, golden in ((shown, expected), (loss, expected_loss)):
            frozen = torch.tensor(golden, dtype=dtype)
            torch.testing.assert_close(found, frozen, atol=tolerance, rtol=0)


@torch.no_grad()
def fill_from_numpy(model: nn.Module) -> None:
    """N(0, 0.02) from NumPy, in the order of the parameters' names, and 1 more for scales."""
    rng = np.random.default_rng(0)
    for name, parameter in sorted(model.named_parameters()):
        drawn = rng.normal(0.0, 0.02, tuple(parameter.shape)).astype(np.float32)
        parameter.copy_(torch.from_numpy(drawn) + is_scale(name))


@pytest.mark.parametrize("name", ["bert-6", "bert-1", "bert-1-conv2"])
def test_twenty_steps_of_the_papers_recipe(name: str) -> None:
    """AdamW, a linear decay of the learning rate, no clipping."""
    config = named_config(name, 64, 4, vocab_size=PINS["vocab_size"], max_length=32, dropout=0.0)
    model = MaskedLM(config).train()
    fill_from_numpy(model)
    recipe = pretrain.PRESETS["paper"]
    (optimizer,) = pretrain.make_optimizers(model, recipe)
    losses = []
    for step, batch in enumerate(PINS["batches"]):
        factor = pretrain.schedule(recipe, step, len(PINS["batches"]))
        optimizer.param_groups[0]["lr"] = recipe.lr * factor
        logits = model(torch.tensor(batch["masked_ids"]), torch.tensor(batch["positions"]))
        loss = F.cross_entropy(logits, torch.tensor(batch["labels"]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == pytest.approx(PINS["losses"][name], abs=2e-5)
