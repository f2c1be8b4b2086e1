"""The authors' recipe, written afresh on Hugging Face Transformers: the yardstick for our own training loop.

Their hyper-parameters (AdamW 5e-5, decay 0.01 on everything, batch 32, no clipping, no warm-up, linear decay), every text padded to
128, the vocabulary head on all positions. It reads our token tables and is measured by our held-out loss, so both see the same data
and the same evaluation masks. Each fault of the authors' code is a flag. Source: https://arxiv.org/abs/2507.14871 and github
Rg32601/Tiny-Language-Models.

    python tests/reference_recipe.py runs/pretrain/RUN        repeat what a `--preset paper` run of ours did, and compare
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import DeviceTable, InputError, TokenTable, run_script  # noqa: E402
from pretrain import Runtime, choose_runtime, data_of, held_out_loss, load_settings, read_json, result_record, write_json  # noqa: E402
from tokenizer import CLS, MASK, PAD, SEP  # noqa: E402


@dataclass(frozen=True)
class Reference:
    """What a run of the authors' code is told. The four faults are theirs, and off here unless asked for."""

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
    fault_schedule: bool = False  # the schedule steps once an epoch, and the first epoch runs at learning rate 0
    fault_special: bool = False  # random replacements may be special tokens
    fault_stem: bool = False  # padding leaks through the stem
    fault_ids: bool = False  # [CLS] and [PAD] swapped in the configuration: padding_idx is [CLS]


class Stem(nn.Module):
    """The authors' stem, in the place of an encoder layer: takes and returns hidden states (B, T, C)."""

    def __init__(self, channels: int, kernels: tuple[int, ...]) -> None:
        super().__init__()
        sizes, blocks = [1] + [channels] * len(kernels), []
        for n, m, k in zip(sizes, sizes[1:], kernels):
            blocks += [nn.Conv2d(n, m, k, padding="same"), nn.BatchNorm2d(m), nn.GELU()]
        self.blocks = nn.Sequential(*blocks, nn.Conv2d(channels, 1, 1), nn.BatchNorm2d(1), nn.GELU())

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:  # the encoder passes its mask and more
        return self.blocks(hidden_states[:, None])[:, 0]


def build(reference: Reference, classes: int = 0) -> BertForMaskedLM | BertForSequenceClassification:
    """Their model builder: a Hugging Face BERT, with the stem as its first encoder layer where there is one. classes: of a classifier."""
    ids = (CLS, PAD) if reference.fault_ids else (PAD, CLS)
    config = BertConfig(
        vocab_size=reference.vocab_size, hidden_size=reference.width, num_hidden_layers=reference.layers + bool(reference.conv_kernels),
        num_attention_heads=reference.heads, intermediate_size=4 * reference.width, max_position_embeddings=reference.max_length,
        hidden_dropout_prob=reference.dropout, attention_probs_dropout_prob=reference.dropout, pad_token_id=ids[0], cls_token_id=ids[1],
        num_labels=classes)
    model = BertForSequenceClassification(config) if classes else BertForMaskedLM(config)
    if reference.conv_kernels:
        if not reference.fault_stem:
            raise InputError("the reference has only the authors' stem, through which padding leaks: use fault_stem")
        model.bert.encoder.layer[0] = Stem(reference.conv_channels, reference.conv_kernels)
    return model


def mask_tokens(inputs: Tensor, reference: Reference, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Their masking, by three Bernoulli draws: (masked ids (B, T), labels (B, T) with -100 where nothing is asked)."""
    def bernoulli(p: float) -> Tensor:
        return torch.bernoulli(torch.full(inputs.shape, p), generator=generator).bool()

    special = (inputs == PAD) | (inputs == CLS) | (inputs == SEP)
    chosen = bernoulli(reference.mask_rate) & ~special
    labels = inputs.masked_fill(~chosen, -100)
    masked = chosen & bernoulli(0.8)
    swapped = chosen & ~masked & bernoulli(0.5)
    words = torch.randint(0 if reference.fault_special else 5, reference.vocab_size, inputs.shape, generator=generator)
    return torch.where(swapped, words, inputs.masked_fill(masked, MASK)), labels


def padded_batches(table: TokenTable, reference: Reference, generator: torch.Generator) -> Iterator[Tensor]:
    """One pass in random order, every text padded to max_length: (B, max_length)."""
    order = torch.randperm(len(table), generator=generator).numpy()
    for start in range(0, len(order), reference.batch_size):
        yield padded(table, order[start : start + reference.batch_size], reference.max_length)


def padded(table: TokenTable, texts: np.ndarray, max_length: int) -> Tensor:
    """Texts' indices -> input_ids (B, max_length)."""
    batch = np.zeros((len(texts), max_length), dtype=np.int64)
    for row, text in zip(batch, texts):
        ids = table.tokens[table.offsets[text] : table.offsets[text + 1]]
        row[: len(ids)] = ids
    return torch.from_numpy(batch)


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor, reference: Reference, generator: torch.Generator) -> Tensor:
    """Their step: every position through the vocabulary head, the loss by the model itself."""
    masked, labels = mask_tokens(ids, reference, generator)  # on the CPU, by the collator
    optimizer.zero_grad()
    masked, seen, labels = (t.to(model.device) for t in (masked, (ids != PAD).long(), labels))
    loss = model(input_ids=masked, attention_mask=seen, labels=labels).loss
    loss.backward()
    optimizer.step()
    return loss.detach()


def classification_step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor, labels: Tensor) -> Tensor:
    """Their fine-tuning step."""
    optimizer.zero_grad()
    loss = model(input_ids=ids, attention_mask=(ids != PAD).long(), labels=labels).loss
    loss.backward()
    optimizer.step()
    return loss.detach()


def make_optimizer(model: nn.Module, reference: Reference) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=reference.lr, weight_decay=reference.weight_decay)


def train(reference: Reference, table: TokenTable, seed: int) -> BertForMaskedLM:
    """Pre-train as the authors' main script means to."""
    torch.manual_seed(seed)
    model, generator = build(reference).train(), torch.Generator().manual_seed(seed)
    optimizer = make_optimizer(model, reference)
    per_epoch = -(-len(table) // reference.batch_size)
    steps, step = reference.epochs * per_epoch, 0
    for epoch in range(reference.epochs):
        for ids in padded_batches(table, reference, generator):
            if reference.fault_schedule:
                factor = 0.0 if epoch == 0 else (reference.epochs - epoch) / max(1, reference.epochs - 1)
            else:
                factor = (steps - step) / steps
            optimizer.param_groups[0]["lr"] = reference.lr * factor
            training_step(model, optimizer, ids, reference, generator)
            step += 1
    return model.eval()


def evaluate(model: BertForMaskedLM, table: TokenTable, vocab_size: int) -> dict[str, float]:
    """Our held-out loss, with our evaluation masks, of their model."""
    def at_positions(ids: Tensor, positions: Tensor) -> Tensor:
        return model(input_ids=ids, attention_mask=(ids != PAD).long()).logits.flatten(0, 1)[positions]

    runtime = Runtime(torch.device("cpu"), torch.float32)
    return held_out_loss(at_positions, DeviceTable(table, runtime.device), vocab_size, runtime)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="finished `--preset paper` runs of pretrain.py that differ in their seeds alone")
    parser.add_argument("--out", type=Path, help="write both sides' held-out losses to this JSON file")
    args = parser.parse_args()
    started, ours, theirs = time.perf_counter(), [], []
    for run in args.runs:
        settings = load_settings(run, "pretrain")
        recipe, config = settings["recipe"], settings["config"]
        data = data_of(run)
        train_table, held_out = data.articles, data.held_out
        if settings["max_articles"]:
            train_table = train_table.subset(np.arange(settings["max_articles"]))
        reference = Reference(
            layers=config["layers"], width=config["width"], heads=config["heads"], vocab_size=config["vocab_size"],
            conv_channels=config["conv_channels"], conv_kernels=tuple(config["conv_kernels"]), epochs=recipe["epochs"],
            batch_size=recipe["batch_size"], lr=recipe["lr"], weight_decay=recipe["weight_decay"], max_length=config["max_length"],
            dropout=recipe["dropout"])
        ours.append(read_json(run / "results.json")["held_out_loss"])
        theirs.append(evaluate(train(reference, train_table, settings["seed"]), held_out, reference.vocab_size)["held_out_loss"])
        print(f"seed {settings['seed']}: ours {ours[-1]:.4f}, reference {theirs[-1]:.4f} nats", flush=True)
    print(f"mean of {len(ours)}: ours {np.mean(ours):.4f}, reference {np.mean(theirs):.4f}; difference {np.mean(ours) - np.mean(theirs):+.4f}")
    if args.out:
        write_json(args.out, result_record({"recipe": recipe, "config": config}, seconds=round(time.perf_counter() - started), hardware=choose_runtime().reason,
                                            held_out_loss={"ours": ours, "reference": theirs},
                                           unigram_loss=read_json(args.runs[0] / "results.json")["unigram_loss"]))


if __name__ == "__main__":
    run_script(main)
