"""The mathematics: one function however it is computed, and padding that changes nothing."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F

import model as modelling
import tokenizer
from model import (HEAD_MARK, MODELS, PAD, TAIL_MARK, Attention, BertConfig, Classifier, Committee,
                   MaskedLM, attention_by_hand, count_parameters, dropout, named_config, pool,
                   stack, vote)


def shake(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random biases, norms and running statistics: at 0 and 1 they would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator) * 0.2
            tensor.add_(noise.abs() if "running_var" in name else noise)
    return model


def small(name: str, **settings) -> BertConfig:
    defaults = {"dropout": 0.0, "vocab_size": 50, "max_length": 24}
    return named_config(name, 128, 2, **{**defaults, **settings})


def ragged_batch(lengths: tuple[int, ...], T: int, vocab_size: int = 50) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, vocab_size, (len(lengths), T), generator=generator)
    return torch.where(torch.arange(T) < torch.tensor(lengths)[:, None], ids, PAD)


@pytest.mark.parametrize("name, fused", [*((name, True) for name in MODELS), ("bert-6", False),
                                         ("bert-1", False)])
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_padding_changes_nothing(name: str, norm: str, fused: bool,
                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """A text alone, in a padded batch, and beside other texts: the same logits, for both heads."""
    monkeypatch.setattr(Attention, "fused", fused)
    config = small(name, norm=norm, pooling="mean" if norm == "pre" else "cls")
    classifier = shake(Classifier(config, 5)).double().eval()
    lm = shake(MaskedLM(config)).double().eval()
    batch = ragged_batch((5, 9, 16, 2), 16)
    with torch.no_grad():
        together, hidden = classifier(batch), classifier.bert(batch)
        in_batch = lm(batch, 16 * torch.arange(4) + 1)
        for row, length in enumerate((5, 9, 16, 2)):
            alone = batch[row : row + 1, :length]
            torch.testing.assert_close(classifier(alone)[0], together[row])  # float64: to 1e-7
            torch.testing.assert_close(classifier.bert(alone)[0], hidden[row, :length])
            torch.testing.assert_close(lm(alone, torch.tensor([1]))[0], in_batch[row])


def test_pooling_by_hand() -> None:
    H, T = HEAD_MARK, TAIL_MARK
    assert (PAD, H, T) == (tokenizer.PAD, tokenizer.MASK, tokenizer.SEP)
    ids = torch.tensor([[2, 7, H, 8, 9, H, T, 7, T, T, 0, 0],  # the last real token is [SEP]
                        [2, T, 7, 8, T, 9, H, 7, 7, 7, T, 0],  # the head entity is cut off
                        [2, 7, 7, T, 0, 0, 0, 0, 0, 0, 0, 0]])  # none is marked
    x = torch.randn(2, 3, 12, 4)  # two members
    heads = [x[:, 0, 2:5].mean(1), x[:, 1, 6:11].mean(1), torch.zeros(2, 4)]
    tails = [x[:, 0, 6:8].mean(1), x[:, 1, 1:4].mean(1), x[:, 2, 3]]
    expected = torch.cat([torch.stack(heads, 1), torch.stack(tails, 1)], -1)
    torch.testing.assert_close(pool(x, ids, "entities"), expected)
    means = [x[0, 0, :10].mean(0), x[0, 1, :11].mean(0), x[0, 2, :4].mean(0)]
    torch.testing.assert_close(pool(x[0], ids, "mean"), torch.stack(means))
    assert torch.equal(pool(x, ids, "cls"), x[:, :, 0])


@pytest.mark.parametrize("name", [n for n in MODELS if "conv" in n])
def test_padding_stays_out_of_the_stems_statistics(name: str) -> None:
    """In training, more padding changes neither the output nor the running statistics."""
    outputs, means = [], []
    for T in (12, 20):
        torch.manual_seed(0)
        model = shake(Classifier(small(name), 3)).train()
        outputs.append(model(F.pad(ragged_batch((5, 12, 7), 12), (0, T - 12))))
        means.append(torch.cat([n.running_mean for n in model.bert.stem.norms]))
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-4, rtol=0)
    torch.testing.assert_close(means[0], means[1], atol=1e-5, rtol=0)


def test_a_rank_without_a_text_has_a_stem_too() -> None:
    """The last batch of an epoch may leave a rank nothing: no error, and gradients of 0."""
    model = MaskedLM(small("bert-1-conv2")).train()
    logits = model(torch.zeros(0, 16, dtype=torch.long), torch.zeros(0, dtype=torch.long))
    logits.sum().backward()
    assert logits.shape == (0, 50)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_attention_by_hand_is_pytorchs(dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 2, 9, 16, dtype=dtype, generator=generator) for _ in range(3))
    mask = (torch.arange(9) < torch.tensor([9, 4, 1])[:, None])[:, None, None, :]
    fused = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    by_hand = attention_by_hand(q, k, v, torch.zeros(mask.shape).masked_fill(~mask, -torch.inf))
    torch.testing.assert_close(by_hand, fused, atol=tolerance, rtol=tolerance)


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


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ["bert-6", "bert-1", "bert-1-wide"])
@pytest.mark.parametrize("norm, pooling", [("post", "cls"), ("pre", "mean"), ("pre", "entities")])
def test_stacked_members_are_one_after_another(name: str, norm: str, pooling: str, fused: bool,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """The same logits, and in training the same gradients."""
    monkeypatch.setattr(Attention, "fused", fused)
    config = small(name, norm=norm, pooling=pooling)
    members = [shake(Classifier(config, 6), seed).double() for seed in range(3)]
    batch = ragged_batch((5, 9, 16, 2), 16)
    H, T = HEAD_MARK, TAIL_MARK
    batch[0, [1, 3]], batch[1, [2, 4]], batch[2, [3, 9]] = H, T, H
    stacked = stack(members)
    one_after_another = torch.stack([member(batch) for member in members])
    torch.testing.assert_close(stacked(batch), one_after_another)
    stacked(batch).square().sum().backward()
    one_after_another.square().sum().backward()
    for name in ("bert.layers.0.mlp_in.weight", "bert.token.weight", "pooler.bias"):
        alone = torch.stack([member.get_parameter(name).grad for member in members])
        torch.testing.assert_close(stacked.get_parameter(name).grad, alone)


def test_a_committee_of_several_shapes_votes_softly() -> None:
    names = ("bert-1", "bert-1-conv2", "bert-1", "bert-6", "bert-1-conv2")
    members = [shake(Classifier(small(name), 6), i).eval() for i, name in enumerate(names)]
    batch = ragged_batch((5, 9), 16)
    with torch.no_grad():
        expected = torch.stack([member(batch).softmax(-1) for member in members]).mean(0)
        logits = Committee(members)(batch)
    assert logits.shape == (5, 2, 6)
    torch.testing.assert_close(vote(logits), expected, atol=1e-5, rtol=1e-4)


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
    assert heads == {"bert-6": 12, "bert-1": 12, "bert-1-wide": 24, "bert-1-conv2": 12,
                     "bert-1-conv2-narrow": 8, "bert-1-conv3": 12, "bert-1-conv2-k16": 12}
    assert named_config("bert-1-conv2-k16").conv_kernels == (16, 3)
    assert named_config("bert-1-conv3").conv_channels == 32
    with torch.device("meta"):
        model = MaskedLM(named_config("bert-6"))
    # By hand: token, position and norm; six layers; the head's dense, norm and bias.
    C, V = 768, 30_522
    layer = 4 * (C * C + C) + (4 * C * C + 4 * C) + (4 * C * C + C) + 4 * C
    expected = V * C + 128 * C + 2 * C + 6 * layer + C * C + C + 2 * C + V
    assert count_parameters(model) == expected
    for bad in ({"width": 100}, {"width": 128, "heads": 3}, {"width": 0}):
        with pytest.raises(ValueError, match="width"):
            named_config("bert-1", **bad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout(dtype: torch.dtype, p: float) -> None:
    """The right share, anywhere; the mean stays; a seed repeats it; the gradient follows it."""
    x = torch.ones(7, 301, 103, dtype=dtype, requires_grad=True)
    torch.manual_seed(1)
    y = dropout(x, p)
    dropped = (y == 0).float()
    for axes in ((1, 2), (0, 2), (0, 1)):
        share = dropped.mean(axes)
        assert (share - p).abs().max() < 6 * (p * (1 - p) * share.numel() / x.numel()) ** 0.5
    flat = dropped.flatten() - p
    for lag in range(1, 5):  # four elements share a random number: are they independent?
        assert abs(float((flat[lag:] * flat[:-lag]).mean())) < 0.003
    assert torch.allclose(y[y != 0], torch.tensor(1 / (1 - p), dtype=dtype))
    torch.manual_seed(1)
    assert torch.equal(y, dropout(x, p))
    y.sum().backward()
    assert torch.equal(x.grad, y)
    assert torch.equal(dropout(x, 0.0), x)


@pytest.mark.parametrize("name, norm",
                         [("bert-6", "pre"), ("bert-6", "post"), ("bert-1-conv2", "post")])
def test_bf16_is_fp32_within_its_rounding(name: str, norm: str) -> None:
    """Under autocast on a CPU all sums between the layers are bf16."""
    torch.manual_seed(0)
    model = Classifier(small(name, norm=norm), 3).eval()
    ids = torch.randint(5, 50, (8, 16))
    exact = model.bert(ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model.bert(ids)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() < 0.02 * exact.norm()


def test_the_command_prints_every_stage(monkeypatch: pytest.MonkeyPatch,
                                        capsys: pytest.CaptureFixture) -> None:
    arguments = ["model.py", "--model", "bert-1-conv2", "--width", "128"]
    monkeypatch.setattr(sys, "argv", arguments)
    modelling.main()
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[2:]}
    for stage, shape, parameters in (("bert.stem", "(1, 128, 128)", "37,891"),
                                     ("bert.layers.0.attention.qkv", "(1, 128, 384)", "49,536"),
                                     ("bert.layers.0.mlp_in", "(1, 128, 512)", "66,048"),
                                     ("logits", "(20, 30522)", "30,522")):
        assert shape in lines[stage] and parameters in lines[stage], lines[stage]
