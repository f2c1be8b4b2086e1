"""Twenty steps of the paper's recipe, frozen: whoever restructures the code must get the same losses.

tests/pins.json holds a small token table (20 batches with masked ids, positions and labels, drawn once) and the losses
of each model in float32 without dropout. The weights begin as N(0, 0.02) from NumPy, in the order of their names.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pretrain
from model import MaskedLM, named_config

PINS = json.loads(Path(__file__).with_name("pins.json").read_text(encoding="utf-8"))


def fill_from_numpy(model: nn.Module) -> None:
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            drawn = torch.from_numpy(rng.normal(0.0, 0.02, tuple(parameter.shape)).astype(np.float32))
            parameter.copy_(drawn + 1.0 if "norm" in name and name.endswith("weight") else drawn)


def losses_of(name: str) -> list[float]:
    """The mean loss of each of the 20 steps, as the `paper` preset makes them: AdamW, linear decay, no clipping."""
    config = named_config(name, 64, 4, vocab_size=PINS["vocab_size"], max_length=32, dropout=0.0)
    model = MaskedLM(config).train()
    fill_from_numpy(model)
    recipe = pretrain.PRESETS["paper"]
    optimizers = pretrain.make_optimizers(model, recipe)
    losses = []
    for step, batch in enumerate(PINS["batches"]):
        factor = pretrain.schedule(recipe, step, len(PINS["batches"]))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * factor
        logits = model(torch.tensor(batch["masked_ids"]), torch.tensor(batch["positions"]))
        loss = F.cross_entropy(logits.float(), torch.tensor(batch["labels"]))
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", ["bert-6", "bert-1", "bert-1-conv2"])
def test_twenty_steps_of_the_paper_preset(name: str) -> None:
    assert losses_of(name) == pytest.approx(PINS["losses"][name], abs=2e-5)
