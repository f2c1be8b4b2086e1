"""The authors' recipe on transformers: each of its faults does what it is said to do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

import reference_recipe as theirs  # noqa: E402
from data import InputError, TokenTable, encode_texts  # noqa: E402
from material import articles, small_tokenizer  # noqa: E402
from tokenizer import CLS, MASK  # noqa: E402

SMALL = theirs.Reference(layers=1, width=64, heads=1, vocab_size=200, epochs=2, batch_size=8, lr=1e-3, max_length=32, dropout=0.0)


@pytest.fixture(scope="module")
def table() -> TokenTable:
    return encode_texts([a["text"] for a in articles(40)], small_tokenizer(), 32)


def test_it_learns(table: TokenTable) -> None:
    before = theirs.evaluate(theirs.build(SMALL).eval(), table, 200)["held_out_loss"]
    after = theirs.evaluate(theirs.train(replace(SMALL, epochs=12), table, 0), table, 200)["held_out_loss"]
    assert after < before - 1.0


def test_fault_of_the_schedule(table: TokenTable) -> None:
    """One epoch is trained at learning rate 0: nothing changes but, with it repaired, everything does."""
    torch.manual_seed(3)
    start = theirs.build(SMALL).state_dict()
    for fault in (True, False):
        end = theirs.train(replace(SMALL, epochs=1, fault_schedule=fault), table, 3).state_dict()
        assert torch.equal(start["bert.embeddings.word_embeddings.weight"], end["bert.embeddings.word_embeddings.weight"]) == fault


def test_fault_of_the_ids(table: TokenTable) -> None:
    """[CLS] starts at 0, and its look-ups get no gradient."""
    embedding = theirs.build(replace(SMALL, fault_ids=True)).train().bert.embeddings.word_embeddings
    assert embedding.weight[CLS].abs().max() == 0
    embedding(torch.tensor([CLS, 7])).sum().backward()
    assert embedding.weight.grad[CLS].abs().max() == 0 and embedding.weight.grad[7].abs().max() == 1
    assert theirs.build(SMALL).bert.embeddings.word_embeddings.weight[CLS].abs().max() > 0


def test_masking_and_its_fault() -> None:
    ids = torch.randint(5, 200, (200, 500))
    ids[:, 0] = CLS
    masked, labels = theirs.mask_tokens(ids, SMALL, torch.Generator().manual_seed(0))
    chosen = labels != -100
    assert abs(chosen.float().mean() - 0.15 * 499 / 500) < 0.005 and not chosen[:, 0].any()
    assert abs((masked[chosen] == MASK).float().mean() - 0.8) < 0.02
    swapped = (masked != ids) & (masked != MASK)
    assert abs(swapped.sum() / chosen.sum() - 0.1) < 0.01 and (masked[swapped] >= 5).all()
    faulty, _ = theirs.mask_tokens(ids, replace(SMALL, fault_special=True), torch.Generator().manual_seed(0))
    assert (faulty[(faulty != ids) & (faulty != MASK)] < 5).any()


def test_the_leaky_stem_runs_in_their_encoder(table: TokenTable) -> None:
    reference = replace(SMALL, conv_channels=4, conv_kernels=(3, 3), fault_stem=True, epochs=1)
    assert theirs.evaluate(theirs.train(reference, table, 0), table, 200)["held_out_loss"] > 0
    with pytest.raises(InputError, match="fault_stem"):
        theirs.build(replace(reference, fault_stem=False))


def test_padding_to_full_length(table: TokenTable) -> None:
    batches = list(theirs.padded_batches(table, SMALL, torch.Generator().manual_seed(0)))
    assert [b.shape[1] for b in batches] == [32] * 5 and sum(int((b != 0).sum()) for b in batches) == len(table.tokens)
