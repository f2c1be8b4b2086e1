"""Agreement and calibration of a committee's members, from their saved logits.

    python results/votes.py runs/committee/RUN
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import read_json, run_script
from finetune import load_logits
from model import vote


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error (Guo et al., 2017, https://arxiv.org/abs/1706.04599).

    probabilities: (rows, classes); labels: (rows,). In bins of like confidence: how far the mean
    confidence lies from the accuracy.
    """
    confidence, predicted = probabilities.max(-1)
    correct = (predicted == labels).double()
    bin_of_row = (confidence * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, dtype=torch.double)
    gaps.index_add_(0, bin_of_row, correct - confidence.double())
    return float(gaps.abs().sum() / len(labels))


def agreement(predictions: Sequence[Tensor]) -> float:
    """The share of rows on which two members predict the same class: the mean over all pairs."""
    pairs = itertools.combinations(predictions, 2)
    return float(np.mean([float((a == b).double().mean()) for a, b in pairs]))


def agreement_and_errors(runs: Sequence[Path]) -> tuple[float, float, float]:
    """Of fine-tuning runs: agreement (0 for a single one), and the calibration error of a member
    (the mean) and of their vote."""
    logits, labels = zip(*map(load_logits, runs))
    members = torch.stack(logits)  # (K, rows, classes)
    errors = [calibration_error(one.softmax(-1), labels[0]) for one in members]
    agree = agreement(members.argmax(-1)) if len(runs) > 1 else 0.0
    return agree, float(np.mean(errors)), calibration_error(vote(members), labels[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a folder in runs/committee")
    folder = parser.parse_args().run
    for task, about in read_json(folder / "results.json", "tasks")["tasks"].items():
        runs = [folder.resolve().parent.parent / "finetune" / name for name in about["voters"]]
        agree, of_member, of_vote = agreement_and_errors(runs)
        print(f"{task}: expected calibration error: members {of_member:.3f}, committee "
              f"{of_vote:.3f}")
        if len(runs) > 1:
            print(f"{task}: two members agree on {100 * agree:.1f} % of the rows")


if __name__ == "__main__":
    run_script(main)
