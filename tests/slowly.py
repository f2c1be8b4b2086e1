"""Runs a script as its user does, but saves a checkpoint after every step, and slowly: so a test
can kill the process inside a write. The last checkpoint keeps its optimizers, for comparison.

    python tests/slowly.py pretrain.py --preset smoke ...

All of it stands at the module's level, because committee.py's further processes import it again.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import committee
import data
import finetune
import pretrain

SCRIPTS = {"pretrain.py": pretrain, "finetune.py": finetune, "committee.py": committee}
SECONDS = float(os.environ["TLM_SLOW_WRITE"])  # for each 4,096 bytes of a checkpoint
latest: list[torch.optim.Optimizer] = []
make_optimizers, save = pretrain.make_optimizers, pretrain.Run.save


class SlowFile:
    def __init__(self, file: IO) -> None:
        self.file = file

    def write(self, content: bytes) -> None:
        for start in range(0, len(content), 4096):
            time.sleep(SECONDS)
            self.file.write(content[start : start + 4096])


@contextmanager
def write_slowly(path: Path, mode: str = "wb") -> Iterator[IO | SlowFile]:
    with data.write_atomically(path, mode) as file:
        yield SlowFile(file) if path.name == "last.pt" else file


def remember_optimizers(*arguments) -> list[torch.optim.Optimizer]:
    latest[:] = make_optimizers(*arguments)
    return list(latest)


def save_optimizers_too(run: pretrain.Run, state: pretrain.TrainingState, model: torch.nn.Module,
                        optimizers: list) -> None:
    save(run, state, model, latest)


pretrain.write_atomically = write_slowly
pretrain.make_optimizers = remember_optimizers
pretrain.Run.save = save_optimizers_too
pretrain.SAVE_SECONDS = -1.0

if __name__ == "__main__":
    script = sys.argv.pop(1)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    data.run_script(SCRIPTS[script].main)
