"""The authors' recipe, written afresh on Hugging Face Transformers: the yardstick for our own loop.

AdamW 5e-5, decay 0.01 on everything, batches of 32, no clipping, no warm-up, linear decay; every
text padded to 128, the vocabulary head on all positions. It reads our token tables and is measured
by our held-out loss, so both see the same data and the same evaluation masks. Each fault of the
authors' code is a flag.

    python tests/reference_recipe.py RUN...     RUN: a run of ours with --preset paper, to compare

Source: https://arxiv.org/abs/2507.14871 and github Rg32601/Tiny-Language-Models.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import InputError, TokenTable, read_json, run_script
from pretrain import DeviceTable, Runtime, choose_runtime, data_of, held_out_loss, load_settings
from pretrain import result_record, write_json
from tokenizer import CLS, FIRST_PIECE, MASK, PAD, SEP


@dataclass(frozen=True)
class Reference:
    """The settings of a run of the authors' code. Its four faults are off unless they are set."""

    layers: int = 6
    width: int = 768
    heads: int = 12
    vocab_size: int = 30_522
    conv_channels: int = 0
    conv_kernels: tuple[int, ...] = ()
    epochs: int = 50
    batch_size: int = 32
    lr: float = 5e-5
    weight_decay: float = 0.01
    mask_rate: float = 0.15
    max_length: int = 128
    dropout: float = 0.1
    fault_schedule: bool = False  # the rate changes once an epoch, and is 0 in the first one
    fault_special: bool = False  # random replacements may be special tokens
    fault_stem: bool = False  # padding leaks through the stem
    fault_ids: bool = False  # [CLS] and [PAD] swapped in the configuration: padding_idx is [CLS]


class Stem(nn.Module):
    """The authors' stem, in the place of an encoder layer: hidden states (B, T, C) -> (B, T, C)."""

    def __init__(self, channels: int, kernels: tuple[int, ...]) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        channels_in = 1
        for kernel in kernels:
            convolution = nn.Conv2d(channels_in, channels, kernel, padding="same")
            blocks += [convolution, nn.BatchNorm2d(channels), nn.GELU()]
            channels_in = channels
        blocks += [nn.Conv2d(channels, 1, 1), nn.BatchNorm2d(1), nn.GELU()]
        self.blocks = nn.Sequential(*blocks)

    def forward(self, hidden: Tensor, *args, **kwargs) -> Tensor:  # ignores the encoder's mask
        return self.blocks(hidden[:, None])[:, 0]


def build(reference: Reference,
          classes: int = 0) -> BertForMaskedLM | BertForSequenceClassification:
    """A Hugging Face BERT; the stem, if any, is its first encoder layer. classes: 0 for MLM."""
    pad_id, cls_id = (CLS, PAD) if reference.fault_ids else (PAD, CLS)
    config = BertConfig(
        vocab_size=reference.vocab_size, hidden_size=reference.width,
        num_hidden_layers=reference.layers + bool(reference.conv_kernels),
        num_attention_heads=reference.heads, intermediate_size=4 * reference.width,
        max_position_embeddings=reference.max_length, hidden_dropout_prob=reference.dropout,
        attention_probs_dropout_prob=reference.dropout, pad_token_id=pad_id, cls_token_id=cls_id,
        num_labels=classes)
    model = BertForSequenceClassification(config) if classes else BertForMaskedLM(config)
    if reference.conv_kernels:
        if not reference.fault_stem:
            raise InputError("the reference has only the authors' stem, through which padding "
                             "leaks. Use fault_stem")
        model.bert.encoder.layer[0] = Stem(reference.conv_channels, reference.conv_kernels)
    return model


def mask_tokens(input_ids: Tensor, reference: Reference,
                generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Their masking: ids (B, T) -> masked ids (B, T), labels (B, T), -100 where none is chosen."""
    def bernoulli(p: float) -> Tensor:
        return torch.bernoulli(torch.full(input_ids.shape, p), generator=generator).bool()

    special = (input_ids == PAD) | (input_ids == CLS) | (input_ids == SEP)
    chosen = bernoulli(reference.mask_rate) & ~special
    masked = chosen & bernoulli(0.8)
    swapped = chosen & ~masked & bernoulli(0.5)
    lowest = 0 if reference.fault_special else FIRST_PIECE
    random_tokens = torch.randint(lowest, reference.vocab_size, input_ids.shape,
                                  generator=generator)
    masked_ids = torch.where(swapped, random_tokens, input_ids.masked_fill(masked, MASK))
    return masked_ids, input_ids.masked_fill(~chosen, -100)


def padded(table: TokenTable, texts: np.ndarray, max_length: int) -> Tensor:
    """Indices of texts -> input_ids (B, max_length)."""
    batch = np.full((len(texts), max_length), PAD, dtype=np.int64)
    for row, text in zip(batch, texts):
        ids = table.tokens[table.offsets[text] : table.offsets[text + 1]]
        row[: len(ids)] = ids
    return torch.from_numpy(batch)


def padded_batches(table: TokenTable, reference: Reference,
                   generator: torch.Generator) -> Iterator[Tensor]:
    """One pass in random order, every text padded to max_length: (B, max_length)."""
    order = torch.randperm(len(table), generator=generator).numpy()
    for start in range(0, len(order), reference.batch_size):
        yield padded(table, order[start : start + reference.batch_size], reference.max_length)


def make_optimizer(model: nn.Module, reference: Reference) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=reference.lr,
                             weight_decay=reference.weight_decay)


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer, input_ids: Tensor,
                  labels: Tensor, attention_mask: Tensor) -> Tensor:
    """A step of pre-training or of fine-tuning: the model itself computes the loss."""
    optimizer.zero_grad()
    loss = model(input_ids=input_ids, attention_mask=attention_mask, labels=labels).loss
    loss.backward()
    optimizer.step()
    return loss.detach()


def pretraining_step(model: nn.Module, optimizer: torch.optim.Optimizer, input_ids: Tensor,
                     reference: Reference, generator: torch.Generator) -> Tensor:
    """Masks are drawn on the CPU. Every position goes through the vocabulary head."""
    masked_ids, labels = mask_tokens(input_ids, reference, generator)
    attention_mask = (input_ids != PAD).long()
    batch = [x.to(model.device) for x in (masked_ids, labels, attention_mask)]
    return training_step(model, optimizer, *batch)


def train(reference: Reference, table: TokenTable, seed: int) -> BertForMaskedLM:
    """Pre-train as the authors' main script means to."""
    torch.manual_seed(seed)
    model = build(reference).train()
    generator = torch.Generator().manual_seed(seed)
    optimizer = make_optimizer(model, reference)
    epochs = reference.epochs
    steps = epochs * -(-len(table) // reference.batch_size)
    step = 0
    for epoch in range(epochs):
        for input_ids in padded_batches(table, reference, generator):
            factor = (steps - step) / steps
            if reference.fault_schedule:
                factor = (epochs - epoch) / max(1, epochs - 1) if epoch else 0.0
            optimizer.param_groups[0]["lr"] = reference.lr * factor
            pretraining_step(model, optimizer, input_ids, reference, generator)
            step += 1
    return model.eval()


def evaluate(model: BertForMaskedLM, table: TokenTable, vocab_size: int) -> float:
    """Our held-out loss (nats), with our evaluation masks, of their model."""
    def at_positions(ids: Tensor, positions: Tensor) -> Tensor:
        logits = model(input_ids=ids, attention_mask=(ids != PAD).long()).logits
        return logits.flatten(0, 1)[positions]

    runtime = Runtime(torch.device("cpu"), torch.float32)
    device_table = DeviceTable(table, runtime.device)
    return held_out_loss(at_positions, device_table, vocab_size, runtime)["held_out_loss"]


def repeat(run: Path) -> float:
    """The held-out loss of the authors' recipe on the data, with the settings, of a run of ours."""
    settings = load_settings(run, "pretrain")
    known = {**settings["recipe"], **settings["config"]}
    names = [field.name for field in fields(Reference)]
    reference = Reference(**{name: known[name] for name in names if name in known})
    data = data_of(run)
    count = settings["max_articles"] or len(data.articles)
    model = train(reference, data.articles.subset(np.arange(count)), settings["seed"])
    return evaluate(model, data.held_out, reference.vocab_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="finished runs that differ in seeds")
    parser.add_argument("--out", type=Path, help="write both sides' losses to this JSON file")
    args = parser.parse_args()
    started = time.perf_counter()
    losses: dict[str, list[float]] = {"ours": [], "reference": []}
    for run in args.runs:
        results = read_json(run / "results.json", "held_out_loss", "unigram_loss", "settings")
        losses["ours"].append(results["held_out_loss"])
        losses["reference"].append(repeat(run))
        print(f"{run}: ours {losses['ours'][-1]:.4f}, reference {losses['reference'][-1]:.4f} nats",
              flush=True)
    ours, theirs = (np.mean(values) for values in losses.values())
    print(f"mean: ours {ours:.4f}, reference {theirs:.4f}; difference {ours - theirs:+.4f}")
    if args.out:
        settings = {name: results["settings"][name] for name in ("recipe", "config")}
        record = result_record(settings, seconds=round(time.perf_counter() - started),
                               hardware=choose_runtime().in_words, held_out_loss=losses,
                               unigram_loss=results["unigram_loss"])
        write_json(args.out, record)


if __name__ == "__main__":
    run_script(main)
