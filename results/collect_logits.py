"""All fine-tuned models' logits of the test rows in one small file, for committees of them.

    python results/collect_logits.py runs/finetune logits.npz

The file holds a float16 array (rows, classes) for each run, and its labels.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import run_script, write_atomically  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="a folder of fine-tuned runs")
    parser.add_argument("out", type=Path, help="the .npz file to write")
    args = parser.parse_args()
    arrays: dict[str, np.ndarray] = {}
    for path in sorted(args.runs.glob("*/logits.npz")):
        with np.load(path, allow_pickle=False) as file:
            arrays[path.parent.name] = file["logits"].astype(np.float16)
            arrays[f"{path.parent.name} labels"] = file["labels"].astype(np.int16)
    with write_atomically(args.out) as file:
        np.savez_compressed(file, **arrays)
    print(f"{args.out}: {len(arrays) // 2} runs, {args.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_script(main)
