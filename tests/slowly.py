"""Runs a script of the repository as its user does, except that it saves a checkpoint after every step, and slowly:
so that a process can be killed inside one. Its state of the optimizers at the end, which a finished run drops, is kept too.

    python tests/slowly.py pretrain.py --preset smoke ...

Everything stands at the module's level, because committee.py's further processes import this file again.
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
import committee  # noqa: E402
import data  # noqa: E402
import finetune  # noqa: E402
import pretrain  # noqa: E402

SECONDS = float(os.environ.get("TLM_SLOW_WRITE", "0"))  # that every write into a checkpoint takes longer
optimizers: list[torch.optim.Optimizer] = []
make_optimizers, save = pretrain.make_optimizers, pretrain.Run.save


class SlowFile:
    def __init__(self, file: IO) -> None:
        self.file = file

    def write(self, content: bytes) -> int:
        for start in range(0, len(content), 4096):
            time.sleep(SECONDS)
            self.file.write(content[start : start + 4096])
        return len(content)

    def flush(self) -> None:
        self.file.flush()


@contextmanager
def write_slowly(path: Path, mode: str = "wb") -> Iterator[IO | SlowFile]:
    with data.write_atomically(path, mode) as file:
        yield SlowFile(file) if path.name == "last.pt" else file


def remember_optimizers(*arguments) -> list[torch.optim.Optimizer]:
    optimizers[:] = make_optimizers(*arguments)
    return list(optimizers)


def save_optimizers_too(run: pretrain.Run, state: pretrain.TrainingState, model: torch.nn.Module, unfinished: list) -> None:
    if not unfinished and any(o.state for o in optimizers):  # the end; no state: this process found nothing left to train
        with data.write_atomically(run.folder / "optimizers.pt") as file:
            torch.save([o.state_dict() for o in optimizers], file)
    save(run, state, model, unfinished)


pretrain.write_atomically = write_slowly
pretrain.make_optimizers = remember_optimizers
pretrain.Run.save = save_optimizers_too
pretrain.SAVE_SECONDS = -1.0

if __name__ == "__main__":
    script = sys.argv.pop(1)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    data.run_script({"pretrain.py": pretrain, "finetune.py": finetune, "committee.py": committee}[script].main)
