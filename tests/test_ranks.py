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
pytestmark = pytest.mark.skipif(not torch.distributed.is_available() or not shutil.which("ps"), reason="needs gloo, ps and a signal")


def torchrun(processes: int, arguments: list[str]) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", str(ROOT / "pretrain.py")]
    return subprocess.Popen([*command, *arguments], text=True, encoding="utf-8", stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def smoke(articles: Path, runs: Path) -> list[str]:
    return ["--preset", "smoke", "--data", str(articles), "--runs-dir", str(runs), "--name", "r", "--device", "cpu", "--dtype", "fp32"]


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_two_ranks_then_three_equal_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks, of which one alone is told to stop; three go on, one of them with no text of four to do. The steps, in parts on the
    ranks, are those of a single process: the same losses, the same weights."""
    articles = prepared_folder(tmp_path / "data é", write_articles(tmp_path / "wiki é.jsonl.gz", 150))

    def arguments(runs: str) -> list[str]:
        return [*smoke(articles, tmp_path / runs), "--set", "batch_size=4", "steps=240"]

    ranks = tmp_path / "ranks" / "pretrain" / "r"
    process = torchrun(2, arguments("ranks"))
    while process.poll() is None and not ((ranks / "log.jsonl").exists() and losses(ranks)):
        time.sleep(0.01)
    first = int((ranks / "lock").read_text(encoding="ascii"))
    family = [line.split() for line in subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True)
              .stdout.splitlines()]
    (second,) = [int(pid) for pid, parent in family if int(parent) == process.pid and int(pid) != first]
    os.kill(second, signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode and err.count("stopped at step") == 1, err
    assert 0 < torch.load(ranks / "last.pt", weights_only=True)["step"] < 240  # seconds of steps: a busy machine may be late
    process = torchrun(3, arguments("ranks"))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out.count("held-out loss") == 1 and "3 ranks" in out, out  # rank 0 alone prints
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *arguments("one")])
    pretraining.main()
    one = tmp_path / "one" / "pretrain" / "r"
    assert len(losses(one)) == 120 and losses(ranks) == pytest.approx(losses(one), abs=2e-4)
    a, b = (torch.load(folder / "last.pt", weights_only=True)["model"] for folder in (ranks, one))
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=2e-4, rtol=0)
    results = [json.loads((folder / "results.json").read_text(encoding="utf-8")) for folder in (ranks, one)]
    assert results[0]["held_out_loss"] == pytest.approx(results[1]["held_out_loss"], abs=1e-4)


@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
def test_compiled_ranks_equal_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    articles = prepared_folder(tmp_path / "data", write_articles(tmp_path / "wiki.jsonl.gz", 150))
    process = torchrun(2, [*smoke(articles, tmp_path / "ranks"), "--set", "batch_size=4", "steps=6", "--compile"])
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0 and "2 ranks" in out, err
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *smoke(articles, tmp_path / "one"), "--set", "batch_size=4", "steps=6"])
    pretraining.main()
    ranks, one = (losses(tmp_path / runs / "pretrain" / "r") for runs in ("ranks", "one"))
    assert len(one) == 6 and ranks == pytest.approx(one, abs=2e-4)


def test_bad_input_on_several_ranks_is_one_line(tmp_path: Path) -> None:
    out, err = torchrun(2, ["--data", str(tmp_path / "none"), "--runs-dir", str(tmp_path)]).communicate(timeout=60)
    assert err.count("error: ") == 1 and "no data folder" in err, err


def test_a_runs_folder_that_another_machine_does_not_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretraining, "rank", lambda: 1)
    with pytest.raises(InputError, match="--runs-dir that all machines share"), pretraining.Run(tmp_path / "r", {}, small_tokenizer(), on_cpu()):
        pass
    assert not (tmp_path / "r").exists()
