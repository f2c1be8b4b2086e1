"""Several processes for one run: torchrun, as its user starts it, with gloo on the CPU."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import pretrain as pretraining
from data import InputError
from material import on_cpu, prepared_folder, small_tokenizer, write_articles

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and shutil.which("pgrep")), reason="needs gloo and pgrep")


def torchrun(processes: int, arguments: list[str]) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc_per_node={processes}", str(ROOT / "pretrain.py"), *arguments]
    return subprocess.Popen(command, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")


def figures(folder: Path, name: str) -> list[float]:
    """The values of this name in a run's log."""
    path = folder / "log.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [line[name] for line in map(json.loads, text.splitlines()) if name in line]


@pytest.mark.parametrize("compiled", [[], pytest.param(["--compile"], marks=pytest.mark.slow)])
def test_two_ranks_then_three_equal_one_process(compiled: list[str], tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    """The same losses and weights, although of two ranks one is told to stop, and three go on. Of
    the three, one has none of a batch's four texts."""
    data = prepared_folder(tmp_path / "data é", write_articles(tmp_path / "wiki é.jsonl.gz", 150))
    arguments = ["--preset", "smoke", "--data", str(data), "--device", "cpu", "--dtype", "fp32",
                 "--name", "r", "--set", "batch_size=4", "steps=60", "--runs-dir"]
    ranks, one = (tmp_path / name / "pretrain/r" for name in ("ranks", "one"))
    process = torchrun(2, [*arguments, str(tmp_path / "ranks"), *compiled])
    while process.poll() is None and not figures(ranks, "loss"):
        time.sleep(0.01)
    pgrep = ["pgrep", "-P", str(process.pid)]
    pids = subprocess.run(pgrep, capture_output=True, text=True, check=True).stdout.split()
    pids.remove((ranks / "lock").read_text(encoding="ascii"))  # rank 0
    os.kill(int(pids[0]), signal.SIGTERM)
    out, err = process.communicate(timeout=200)
    assert process.returncode and err.count("stopped at step") == 1, err
    assert 0 < torch.load(ranks / "last.pt", weights_only=True)["step"] < 60
    process = torchrun(3, [*arguments, str(tmp_path / "ranks")])
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert out.count("held-out loss") == 1 and "3 ranks" in out, out  # rank 0 alone prints
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *arguments, str(tmp_path / "one")])
    pretraining.main()
    assert len(figures(one, "loss")) == 60
    for name in ("loss", "held_out_loss"):
        assert figures(ranks, name) == pytest.approx(figures(one, name), abs=2e-4)
    weights, expected = (torch.load(folder / "last.pt", weights_only=True)["model"]
                         for folder in (ranks, one))
    for name in expected:
        torch.testing.assert_close(weights[name], expected[name], atol=2e-4, rtol=0)


def test_bad_input_on_several_ranks_is_one_line(tmp_path: Path) -> None:
    process = torchrun(2, ["--data", str(tmp_path / "none"), "--runs-dir", str(tmp_path)])
    out, err = process.communicate(timeout=200)
    assert err.count("error: ") == 1 and "no data folder" in err, err


def test_a_runs_folder_that_another_machine_does_not_see(tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretraining, "rank", lambda: 1)
    run = pretraining.Run(tmp_path / "r", {}, small_tokenizer(), on_cpu())
    with pytest.raises(InputError, match="--runs-dir that all machines share"), run:
        pass
    assert not (tmp_path / "r").exists()
