"""The authors' recipe on transformers: each of its faults does what it is said to do."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import reference_recipe as theirs
from data import InputError, TokenTable, encode_texts, open_folder
from material import articles, prepared_folder, pretrain_run, small_tokenizer, write_articles
from pretrain import PRESETS
from tokenizer import CLS, FIRST_PIECE, MASK

SMALL = theirs.Reference(layers=1, width=64, heads=1, vocab_size=200, epochs=2, batch_size=8,
                         lr=1e-3, max_length=32, dropout=0.0)


@pytest.fixture(scope="module")
def table() -> TokenTable:
    return encode_texts([a["text"] for a in articles(40)], small_tokenizer(), 32)


def test_it_learns(table: TokenTable) -> None:
    before = theirs.evaluate(theirs.build(SMALL).eval(), table, 200)
    model = theirs.train(replace(SMALL, epochs=6, lr=4e-3), table, 0)
    assert theirs.evaluate(model, table, 200) < before - 1.0


@pytest.mark.parametrize("fault", [True, False])
def test_fault_of_the_schedule(table: TokenTable, fault: bool) -> None:
    """With it, the first epoch changes nothing, since its learning rate is 0."""
    torch.manual_seed(3)
    start = theirs.build(SMALL).get_input_embeddings().weight
    trained = theirs.train(replace(SMALL, epochs=1, fault_schedule=fault), table, 3)
    assert torch.equal(start, trained.get_input_embeddings().weight) == fault


@pytest.mark.parametrize("fault", [True, False])
def test_fault_of_the_ids(fault: bool) -> None:
    """With it, [CLS] starts at 0, and its look-ups get no gradient."""
    embedding = theirs.build(replace(SMALL, fault_ids=fault)).get_input_embeddings()
    assert embedding.weight[CLS].any() != fault
    embedding(torch.tensor([CLS, 7])).sum().backward()
    assert embedding.weight.grad[CLS].any() != fault
    assert embedding.weight.grad[7].all()


@pytest.mark.parametrize("fault", [True, False])
def test_masking_and_its_fault(fault: bool) -> None:
    """Of the chosen 80/10/10. With the fault, random tokens may be special ones."""
    input_ids = torch.randint(FIRST_PIECE, 200, (200, 500))
    input_ids[:, 0] = CLS
    reference = replace(SMALL, fault_special=fault)
    generator = torch.Generator().manual_seed(0)
    masked_ids, labels = theirs.mask_tokens(input_ids, reference, generator)
    chosen = labels != -100
    assert chosen.float().mean() == pytest.approx(0.15 * 499 / 500, abs=0.005)
    assert not chosen[:, 0].any()
    assert (masked_ids[chosen] == MASK).float().mean() == pytest.approx(0.8, abs=0.02)
    swapped = (masked_ids != input_ids) & (masked_ids != MASK)
    assert swapped.sum() / chosen.sum() == pytest.approx(0.1, abs=0.01)
    assert (masked_ids[swapped] < FIRST_PIECE).any() == fault


@pytest.mark.parametrize("stem", [True, False])
def test_padding_leaks_through_their_stem_alone(table: TokenTable, stem: bool) -> None:
    more = {"conv_channels": 4, "conv_kernels": (3, 3), "fault_stem": True} if stem else {}
    model = theirs.train(replace(SMALL, epochs=1, **more), table, 0)
    input_ids = torch.full((1, 8), 7)
    longer_ids = torch.nn.functional.pad(input_ids, (0, 8))
    short, long = (model(input_ids=ids, attention_mask=(ids != 0).long()).logits[:, :8]
                   for ids in (input_ids, longer_ids))
    assert torch.allclose(short, long, atol=1e-5) != stem


def test_a_stem_without_the_leak_is_refused() -> None:
    with pytest.raises(InputError, match="fault_stem"):
        theirs.build(replace(SMALL, conv_channels=4, conv_kernels=(3, 3)))


def test_every_text_once_at_full_length(table: TokenTable) -> None:
    batches = list(theirs.padded_batches(table, SMALL, torch.Generator().manual_seed(0)))
    assert [batch.shape for batch in batches] == [(8, 32)] * 5
    tokens = torch.cat(batches)
    assert (tokens == CLS).sum() == 40 and (tokens != 0).sum() == len(table.tokens)


def test_it_repeats_a_run_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shape, data and recipe are the run's; both losses go to the JSON file."""
    data = open_folder(prepared_folder(tmp_path / "data", write_articles(tmp_path / "w.jsonl.gz")))
    recipe = replace(PRESETS["paper"], epochs=2, width=64, heads=1, lr=2e-3)
    run = pretrain_run("bert-1", recipe, data, 0, tmp_path)
    out = tmp_path / "reference.json"
    monkeypatch.setattr(sys, "argv", ["reference_recipe.py", str(run), "--out", str(out)])
    theirs.main()
    record = json.loads(out.read_text(encoding="utf-8"))
    losses = record["held_out_loss"]
    assert losses["reference"] == pytest.approx(losses["ours"], abs=0.4)
    assert max(losses["reference"]) < record["unigram_loss"] + 1.0
