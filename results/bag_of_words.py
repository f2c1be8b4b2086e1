"""What a bag of words can do: logistic regression on idf-weighted pieces, the yardstick beside every accuracy.

It knows which pieces of the tokenizer stand in a text, and no order of words. The decay is chosen on the dev rows; then train and
dev rows together are used, and the accuracy on the test rows is printed.

    python results/bag_of_words.py --data vital --per-class 10 --out results/bag-of-words-topics.json
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import Rows, TokenTable, data_path, encode_texts, open_folder, run_script  # noqa: E402
from finetune import accuracy  # noqa: E402
from pretrain import choose_hardware, result_record, write_json  # noqa: E402
from tokenizer import FIRST_PIECE, Tokenizer  # noqa: E402

DECAYS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


def fit(x: Tensor, labels: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression: weights (features, classes), bias (classes,)."""
    weight = torch.zeros(x.shape[1], int(labels.max()) + 1, requires_grad=True)
    bias = torch.zeros(weight.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=150, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight + bias, labels) + decay * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def occurrences(table: TokenTable, vocab_size: int) -> Tensor:
    """How often each token occurs in each text: (texts, V) float32."""
    cells = torch.from_numpy(np.repeat(np.arange(len(table)), np.diff(table.offsets)) * vocab_size + table.tokens)
    return torch.bincount(cells, minlength=len(table) * vocab_size).float().view(-1, vocab_size)


def features(parts: tuple[Rows, Rows], tokenizer: Tokenizer, max_length: int) -> list[Tensor]:
    """(training rows, scored rows) -> [features (rows, V), labels (rows,) of the first; the same of the second]."""
    counts = [occurrences(encode_texts([text for text, _ in rows], tokenizer, max_length), tokenizer.vocab_size) for rows in parts]
    for c in counts:
        c[:, :FIRST_PIECE] = 0
    rows_with = (counts[0] > 0).sum(0)
    idf = (rows_with.max() / rows_with.clamp(min=1)).log()
    x, scored = (F.normalize(c.clamp(max=1) * idf) for c in counts)
    mean, scale = x.mean(0), x.std(0).mean() * x.shape[1] ** 0.5
    labels, scored_labels = (torch.tensor([label for _, label in rows]) for rows in parts)
    return [(x - mean) / scale, labels, (scored - mean) / scale, scored_labels]


def fitted_accuracy(x: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor, decay: float) -> float:
    weight, bias = fit(x, labels, decay)
    return accuracy(test @ weight + bias, test_labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="results, JSON")
    parser.add_argument("--data", required=True, metavar="NAME", help="a data folder")
    parser.add_argument("--per-class", type=int, default=0, metavar="N", help="training rows of a class (0: all)")
    args = parser.parse_args()
    started, data = time.perf_counter(), open_folder(data_path(args.data))
    record: dict[str, dict] = {}
    for name in data.meta["tasks"]:
        task = data.task(name)
        tuning, final = (features(task.rows(split, args.per_class), data.tokenizer, data.max_length) for split in ("dev", "test"))
        decay = max(DECAYS, key=functools.partial(fitted_accuracy, *tuning))
        result = fitted_accuracy(*final, decay)
        record[name] = {"models": {"logistic regression": {"scratch": [result]}}, "committee": {}}
        print(f"{name}, {len(final[1])} training rows: {100 * result:.1f} % (decay {decay:g})", flush=True)
    write_json(args.out, result_record({"data": data.id, "per_class": args.per_class}, time.perf_counter() - started, tasks=record,
                                       latency_ms={}, hardware=choose_hardware("cpu").reason))


if __name__ == "__main__":
    run_script(main)
