"""Numbers that must not move: tiny models whose weights are a formula, with logits and losses frozen as literals.

The literals of the bert and megatron-bert models were computed in float64 by Hugging Face's BertForMaskedLM,
BertForSequenceClassification and their MegatronBert twins (transformers 5.23), that of the convolutional model by its own
embeddings and layer with the authors' stem written out between them: test_huggingface.py, test_golden_numbers, computes
them anew. So the proof runs here without transformers too.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Attention, BertConfig, Classifier, MaskedLM

SETTINGS = {"post": {"norm": "post", "layers": 2}, "pre": {"norm": "pre", "layers": 2},
            "conv": {"norm": "post", "layers": 1, "conv_channels": 2, "conv_kernels": (3, 3)}}
INPUT_IDS = {"ragged": [[2, 5, 9, 4, 11, 22, 3], [2, 6, 4, 3, 0, 0, 0]], "full": [[2, 5, 9, 4, 11, 22, 3], [2, 4, 17, 8, 20, 13, 3]]}
POSITIONS, TOKENS, LABELS = [3, 9], [10, 7], [2, 0]  # masked positions of the flattened ragged batch; their tokens; classes
SHOWN = [0, 7, 10, 22]  # the columns of the MLM logits that are frozen

#         architecture, head: logits (two rows), loss
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


def fill_by_formula(model: nn.Module) -> nn.Module:
    """Every weight a sine of its index; around 1 where it is a scale, positive where it is a variance. In float64."""
    model = model.double().eval()
    with torch.no_grad():
        for number, (name, tensor) in enumerate(sorted(model.state_dict().items())):
            wave = torch.sin(torch.arange(tensor.numel(), dtype=torch.float64) * (0.7 + 0.05 * number) + number).view(tensor.shape)
            if name.endswith("num_batches_tracked"):
                continue
            scale = "norm" in name and name.endswith("weight") or name.endswith("running_var")
            tensor.copy_(1 + 0.5 * wave if scale else 0.4 * wave)
    return model


def golden_model(architecture: str, head: str) -> MaskedLM | Classifier:
    config = BertConfig(vocab_size=23, width=8, heads=2, max_length=7, **SETTINGS[architecture])
    return fill_by_formula(MaskedLM(config) if head == "mlm" else Classifier(config, 3))


def golden_batch(architecture: str, head: str) -> tuple[Tensor, Tensor, Tensor]:
    """(input_ids, positions, labels); the convolutional model's texts have no padding, as its authors define it there."""
    input_ids = torch.tensor(INPUT_IDS["full" if architecture == "conv" else "ragged"])
    positions = torch.tensor([3, 8]) if architecture == "conv" else torch.tensor(POSITIONS)
    return input_ids, positions, torch.tensor(TOKENS if head == "mlm" else LABELS)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "by hand"])
@pytest.mark.parametrize("architecture, head", list(GOLDEN), ids=lambda value: value)
def test_golden(architecture: str, head: str, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Attention, "fused", fused)
    model, (input_ids, positions, labels) = golden_model(architecture, head), golden_batch(architecture, head)
    expected, expected_loss = GOLDEN[architecture, head]
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        model = model.to(dtype)
        logits = model(input_ids, positions) if head == "mlm" else model(input_ids)
        loss = F.cross_entropy(logits, labels)
        shown = logits[:, SHOWN] if head == "mlm" else logits
        torch.testing.assert_close(shown, torch.tensor(expected, dtype=dtype), atol=tolerance, rtol=0)
        torch.testing.assert_close(loss, torch.tensor(expected_loss, dtype=dtype), atol=tolerance, rtol=0)
