"""What a bag of words can do: logistic regression on two kinds of features, the yardstick below every table of accuracies.

The first, whether each piece of the tokenizer stands in the text, weighted by idf, knows nothing but the training rows (and the
pieces). The second, the mean of the vectors that pretrain.py's --count-start begins with, knows the articles too. Neither knows an
order of words. The decay is chosen on a fifth of the training rows, then all of them are used; one result is printed for each, on the
test rows (with --tune: on the fifth).

    python results/bag_of_words.py --out results/bag-of-words-topics.json
    python results/bag_of_words.py --task fewrel --articles 'wiki*.jsonl.gz' --articles-count 20000 --min-class-size 694 --out ...
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import Task, TokenTable, add_source_flags, load_corpus, load_tasks, make_table, run_script, tuning_split  # noqa: E402
from finetune import accuracy  # noqa: E402
from pretrain import PRESETS, add_run_flags, choose_hardware, count_embeddings, result_record, write_json  # noqa: E402
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


def features(task: Task, embed: Callable[[Tensor, Tensor], Tensor], tokenizer: Tokenizer, max_length: int, folder: Path) -> list[Tensor]:
    """[features of the training rows (rows, F), labels (rows,), features and labels of the test rows].

    embed: occurrences in some texts (texts, V), and in how many training rows each piece occurs (V,) -> features (texts, F).
    """
    counts = [occurrences(make_table([text for text, _ in rows], tokenizer, max_length, folder, f"{task.name}-bag"), tokenizer.vocab_size)
              for rows in (task.train, task.test)]
    for c in counts:
        c[:, :FIRST_PIECE] = 0
    x, test = (embed(c, (counts[0] > 0).sum(0)) for c in counts)
    mean, scale = x.mean(0), x.std(0).mean() * x.shape[1] ** 0.5  # scaled so that one grid of decays suits both kinds
    labels, test_labels = (torch.tensor([label for _, label in rows]) for rows in (task.train, task.test))
    return [(x - mean) / scale, labels, (test - mean) / scale, test_labels]


def fitted_accuracy(x: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor, decay: float) -> float:
    weight, bias = fit(x, labels, decay)
    return accuracy(test @ weight + bias, test_labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="results, JSON")
    add_run_flags(parser)
    add_source_flags(parser)
    args = parser.parse_args()
    started, preset = time.perf_counter(), PRESETS[args.preset]
    tasks = load_tasks(args)
    corpus = load_corpus(args, tasks, preset.vocab_size, preset.max_length)
    V, folder = corpus.tokenizer.vocab_size, args.runs_dir / "tables"
    vectors = count_embeddings(corpus.train, V, preset.width)

    def weighted(counts: Tensor, rows_with: Tensor) -> Tensor:
        return F.normalize(counts.clamp(max=1) * (rows_with.max() / rows_with.clamp(min=1)).log())

    def mean_vector(counts: Tensor, rows_with: Tensor) -> Tensor:
        return counts @ vectors / counts.sum(1, keepdim=True).clamp(min=1)

    kinds = {"pieces, weighted by idf": ("scratch", weighted), f"mean of {preset.width} counted directions": ("pretrained", mean_vector)}
    record: dict[str, dict] = {}
    for task in tasks:
        for name, (kind, embed) in kinds.items():
            tuning, final = (features(t, embed, corpus.tokenizer, preset.max_length, folder) for t in (tuning_split(task), task))
            decay = max(DECAYS, key=functools.partial(fitted_accuracy, *tuning))
            result = fitted_accuracy(*final, decay)
            record.setdefault(task.name, {"models": {}, "committee": {}})["models"][f"logistic regression, {name}"] = {kind: [result]}
            print(f"{task.name}, {len(task.train)} training rows: {name}: {100 * result:.1f} % (decay {decay:g})", flush=True)
    write_json(args.out, result_record({"vocab_size": V, "width": preset.width}, time.perf_counter() - started, tasks=record,
                                       latency_ms={}, hardware=choose_hardware("cpu").reason))


if __name__ == "__main__":
    run_script(main)
