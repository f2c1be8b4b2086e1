"""The mathematics: the same function however it is computed, and padding that changes nothing."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

import tokenizer
from committee import SoftCommittee, agreement, calibration_error
from model import (HEAD, MODELS, PAD, TAIL, Attention, BertConfig, Classifier, Committee, MaskedLM, attention_by_hand,
                   count_operations, count_parameters, dropout, named_config, pool, with_neighbours)


def shake(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random biases, norms and running statistics: at their initial 0 and 1 they would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator) * 0.2
            tensor.add_(noise.abs() if "running_var" in name else noise)
    return model


KINDS = (*MODELS, "bert-6 with short convolutions")


def small(name: str, **settings) -> BertConfig:
    channels = {"dropout": 0.0, "attention_dropout": 0.0, "vocab_size": 50, "max_length": 24}
    return named_config(name.split()[0], 128, **{**channels, "short_conv": "short" in name, **settings})


def ragged_batch(lengths: tuple[int, ...], T: int, vocab_size: int = 50) -> torch.Tensor:
    ids = torch.randint(5, vocab_size, (len(lengths), T), generator=torch.Generator().manual_seed(1))
    return torch.where(torch.arange(T) < torch.tensor(lengths)[:, None], ids, PAD)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_padding_changes_nothing(name: str, norm: str) -> None:
    """A text alone, in a padded batch, and beside other neighbours: the same logits, for both heads."""
    config = small(name, norm=norm, pooling="mean" if norm == "pre" else "cls")
    classifier = shake(Classifier(config, 5)).double().eval()
    lm = shake(MaskedLM(config)).double().eval()
    batch = ragged_batch((5, 9, 16, 2), 16)
    with torch.no_grad():
        together, hidden = classifier(batch), classifier.bert(batch)
        for row, length in enumerate((5, 9, 16, 2)):
            alone = batch[row : row + 1, :length]
            torch.testing.assert_close(classifier(alone)[0], together[row])  # float64: to 1e-7
            torch.testing.assert_close(classifier.bert(alone)[0], hidden[row, :length])
            torch.testing.assert_close(lm(alone, torch.tensor([1])), lm(batch, torch.tensor([row * 16 + 1])))


def test_short_convolution_is_pytorchs() -> None:
    torch.manual_seed(0)
    x, taps, real = torch.randn(2, 7, 16), torch.randn(2, 1, 1, 16), torch.arange(7) < torch.tensor([[7], [4]])
    kernel = torch.stack([taps[0].flatten(), torch.ones(16), taps[1].flatten()], -1)[:, None]  # (C, 1, 3)
    theirs = F.conv1d((x * real[:, :, None]).mT, kernel, padding=1, groups=16).mT
    torch.testing.assert_close(with_neighbours(x, taps, real), theirs)

    config = small("bert-6 with short convolutions")
    plain, convolved = MaskedLM(dataclasses.replace(config, short_conv=False)), MaskedLM(config)
    assert not any(p.ndim == 2 for name, p in convolved.named_parameters() if "taps" in name), "Muon would take them for matrices"
    missing = convolved.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert len(missing) == 12 and all("taps" in name for name in missing)
    batch, asked = ragged_batch((5, 16), 16), torch.tensor([1, 2, 20])
    assert torch.equal(plain(batch, asked), convolved(batch, asked)), "it does not begin as an ordinary BERT"
    convolved(batch, asked).sum().backward()
    assert all(p.grad is not None and p.grad.any() for name, p in convolved.named_parameters() if "taps" in name)


def test_pooling_by_hand() -> None:
    assert (PAD, HEAD, TAIL) == (tokenizer.PAD, tokenizer.MASK, tokenizer.SEP)
    ids = torch.tensor([[2, 7, HEAD, 8, 9, HEAD, TAIL, 7, TAIL, TAIL, PAD, PAD],  # the last real token is [SEP]
                        [2, TAIL, 7, 8, TAIL, 9, HEAD, 7, 7, 7, TAIL, PAD],  # the head entity is cut off
                        [2, 7, 7, TAIL, PAD, PAD, PAD, PAD, PAD, PAD, PAD, PAD]])  # none is marked
    x = torch.randn(2, 3, 12, 4)  # two members
    none = torch.zeros(2, 4)
    heads = [x[:, 0, 2:5].mean(1), x[:, 1, 6:11].mean(1), none]
    tails = [x[:, 0, 6:8].mean(1), x[:, 1, 1:4].mean(1), x[:, 2, 3]]
    torch.testing.assert_close(pool(x, ids, "entities"), torch.cat([torch.stack(heads, 1), torch.stack(tails, 1)], -1))
    torch.testing.assert_close(pool(x[0], ids, "mean"), torch.stack([x[0, 0, :10].mean(0), x[0, 1, :11].mean(0), x[0, 2, :4].mean(0)]))
    assert torch.equal(pool(x, ids, "cls"), x[:, :, 0])


@pytest.mark.parametrize("name", [n for n in MODELS if "conv" in n])
def test_padding_stays_out_of_the_stems_statistics(name: str) -> None:
    """In training, more padding changes neither the output nor the running statistics; in the authors' stem it does."""
    for leaky in (False, True):
        outputs, means = [], []
        for T in (12, 20):
            torch.manual_seed(0)
            model = shake(Classifier(small(name, leaky_stem=leaky), 3)).train()
            batch = F.pad(ragged_batch((5, 12, 7), 12), (0, T - 12))
            outputs.append(model(batch))
            means.append(torch.cat([n.running_mean for n in model.bert.stem.norms]))
        same = torch.allclose(outputs[0], outputs[1], atol=1e-4) and torch.allclose(means[0], means[1], atol=1e-5)
        assert same != leaky


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_attention_by_hand_is_the_fused_one(dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 2, 9, 16, dtype=dtype, generator=generator) for _ in range(3))
    mask = (torch.arange(9) < torch.tensor([9, 4, 1])[:, None])[:, None, None, :]
    fused = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(attention_by_hand(q, k, v, mask), fused, atol=tolerance, rtol=tolerance)


def test_the_switch_between_the_two_attentions(monkeypatch: pytest.MonkeyPatch) -> None:
    model = shake(Classifier(small("bert-6"), 4))
    batch = ragged_batch((5, 9, 16), 16)
    results = []
    for fused in (True, False):
        monkeypatch.setattr(Attention, "fused", fused)
        model.zero_grad()
        logits = model(batch)
        logits.square().sum().backward()
        results.append((logits.detach(), [p.grad.clone() for p in model.parameters()]))
    torch.testing.assert_close(results[0], results[1], atol=1e-3, rtol=1e-3)
    assert not torch.equal(results[0][0], results[1][0]), "the switch switched nothing"


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("norm, pooling", [("post", "cls"), ("pre", "mean"), ("pre", "entities")])
def test_batched_committee_is_the_loop(name: str, norm: str, pooling: str) -> None:
    members = [shake(Classifier(small(name, norm=norm, pooling=pooling), 6), seed).double().eval() for seed in range(3)]
    batch = ragged_batch((5, 9, 16, 2), 16)
    batch[0, [1, 3]], batch[1, [2, 4]], batch[2, [3, 9]] = HEAD, TAIL, HEAD
    with torch.no_grad():
        loop = torch.stack([member(batch) for member in members])
    torch.testing.assert_close(Committee(members)(batch), loop)


def test_calibration_and_agreement_by_hand() -> None:
    """Four rows: two at confidence 0.9, one of them right; two at 0.6, both right."""
    p = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.4, 0.6]])
    labels = torch.tensor([0, 1, 1, 1])
    assert calibration_error(p, labels) == pytest.approx((2 * abs(0.5 - 0.9) + 2 * abs(1 - 0.6)) / 4)
    assert calibration_error(torch.eye(2), torch.tensor([0, 1])) == 0
    a, b, c = torch.tensor([0, 1, 1, 0]), torch.tensor([0, 1, 0, 1]), torch.tensor([0, 1, 1, 0])
    assert agreement([a, b, c]) == pytest.approx((0.5 + 1 + 0.5) / 3)


def test_mixed_committee_is_the_mean_of_probabilities() -> None:
    members = [shake(Classifier(small(name), 6), seed).eval() for seed, name in enumerate(("bert-1", "bert-1-conv2", "bert-1", "bert-6"))]
    batch = ragged_batch((5, 9), 16)
    with torch.no_grad():
        expected = torch.stack([member(batch).softmax(-1) for member in members]).mean(0)
    torch.testing.assert_close(SoftCommittee(members)(batch), expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="one shape"):
        Committee(members)


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_one_batch_can_be_learnt_by_heart(norm: str) -> None:
    torch.manual_seed(0)
    model = MaskedLM(small("bert-1", norm=norm))
    batch = ragged_batch((16, 12, 16, 9), 16)
    positions = torch.tensor([1, 5, 17, 20, 33, 40, 49, 55])
    labels = torch.randint(5, 50, (8,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = F.cross_entropy(model(batch, positions), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


def test_named_models_are_the_papers() -> None:
    heads = {name: named_config(name).heads for name in MODELS}
    assert heads == {"bert-6": 12, "bert-1": 12, "bert-1-wide": 24, "bert-1-conv2": 12, "bert-1-conv2-narrow": 8, "bert-1-conv3": 12,
                     "bert-1-conv2-k16": 12}
    assert named_config("bert-1-conv2-k16").conv_kernels == (16, 3) and named_config("bert-1-conv3").conv_channels == 32
    with torch.device("meta"):
        model = MaskedLM(named_config("bert-6"))
    # counted by hand: token, position and norm; 6 layers; the head's dense, norm and bias
    C, V = 768, 30_522
    layer = 4 * (C * C + C) + (4 * C * C + 4 * C) + (4 * C * C + C) + 4 * C
    assert count_parameters(model) == V * C + 128 * C + 2 * C + 6 * layer + C * C + C + 2 * C + V
    for bad in ({"width": 100}, {"width": 128, "heads": 3}):
        with pytest.raises(ValueError):
            named_config("bert-1", **bad)


@pytest.mark.parametrize("name", MODELS)
def test_operations_are_what_pytorch_counts(name: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    config = small(name)
    model = Classifier(config, 5).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        Attention.fused = False  # the fused kernel on a CPU is not counted
        try:
            model(torch.full((1, 16), 7))
        finally:
            Attention.fused = True
    # "same" padding makes PyTorch count border positions of a convolution like all others, as count_operations does
    assert count_operations(config, 16, 5) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_local_start_looks_at_neighbours() -> None:
    """Half of the heads begin with most of their attention one place before, one behind, two before, ...; the rest spread it."""
    torch.manual_seed(0)
    model = MaskedLM(BertConfig(vocab_size=200, layers=1, width=256, heads=8, norm="pre", local_start=3.0)).eval()
    ids = torch.randint(5, 200, (4, 60))
    layer = model.bert.layers[0]
    x = layer.attention_norm(model.bert.token(ids) + model.bert.position.weight[:60])
    q, k, _ = layer.attention.qkv(x).view(4, 60, 3, 8, 32).permute(2, 0, 3, 1, 4)
    weights = (q @ k.mT / 32**0.5).softmax(-1)  # (4, 8, 60, 60)
    for head, offset in enumerate((-1, 1, -2, 2)):
        inside = weights[:, head].diagonal(offset, dim1=-2, dim2=-1)  # from every token to the one at this offset
        assert inside.mean() > 0.5, f"head {head}"
    assert weights[:, 4:].max() < 0.2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout(dtype: torch.dtype, p: float) -> None:
    """The right share is dropped, anywhere; the mean stays; a seed repeats it; the gradient follows the mask."""
    x = torch.ones(7, 301, 103, dtype=dtype, requires_grad=True)
    torch.manual_seed(1)
    y = dropout(x, p)
    dropped = (y == 0).float()
    for axis in ((1, 2), (0, 2), (0, 1)):
        assert (dropped.mean(axis) - p).abs().max() < 6 * (p * (1 - p) * max(dropped.mean(axis).numel(), 1) / x.numel()) ** 0.5
    flat = dropped.flatten()
    for lag in range(1, 5):  # four decisions share a draw: are they independent?
        assert abs(float(((flat[lag:] - p) * (flat[:-lag] - p)).mean())) < 0.003
    assert torch.allclose(y[y != 0], torch.tensor(1 / (1 - p), dtype=dtype))
    torch.manual_seed(1)
    assert torch.equal(y, dropout(x, p))
    y.sum().backward()
    assert torch.equal(x.grad, y)
    assert dropout(x, 0.0) is x or torch.equal(dropout(x, 0.0), x)
