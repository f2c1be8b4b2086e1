"""Killed at any moment, two at once, stopped by signals: nothing is lost, and the end is the same to the last bit."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from material import COUNT, record_reliability, write_articles, prepared_folder, write_task_file

TESTS = Path(__file__).resolve().parent
fcntl = pytest.importorskip("fcntl")  # Unix
pytestmark = pytest.mark.skipif(os.name != "posix", reason="sends signals that Windows does not have")


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed é")
    write_articles(folder / "wiki.jsonl.gz", 150)
    write_task_file(folder / "train.csv", 20)
    write_task_file(folder / "test.csv", 10, seed=1)
    prepared_folder(folder / "data", folder / "wiki.jsonl.gz", [folder / "train.csv", folder / "test.csv"])
    return folder


@dataclass
class Job:
    """A command that saves a checkpoint after every step (tests/slowly.py), and how often it was killed where."""

    material: Path
    name: str  # of its folder of runs
    arguments: Sequence[str]
    threads: int = 1
    killed: dict[str, int] = field(default_factory=dict)

    @property
    def runs(self) -> Path:
        return self.material / self.name

    def start(self, seconds_a_write: float = 0.0) -> subprocess.Popen:
        script, *rest = self.arguments
        command = [sys.executable, str(TESTS / "slowly.py"), script, "--preset", "smoke", "--data", str(self.material / "data"),
                   "--runs-dir", str(self.runs), *rest]
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads), "TLM_SLOW_WRITE": str(seconds_a_write),
                       "OMP_WAIT_POLICY": "passive"}  # or else two runs side by side spin against each other
        with open(self.material / f"{self.name}.out", "a", encoding="utf-8") as out:  # no pipe, which children would hold open
            return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True)

    def shown(self) -> str:
        return (self.material / f"{self.name}.out").read_text(encoding="utf-8", errors="replace")

    def finish(self) -> str:
        """Run it to its end; returns what it printed."""
        before = len(self.shown()) if (self.material / f"{self.name}.out").exists() else 0
        assert self.start().wait(timeout=300) == 0, self.shown()[-3000:]
        assert "Traceback" not in self.shown(), self.shown()
        return self.shown()[before:]

    def half_written(self) -> list[Path]:
        # not "*/*": a folder of tables that is gone before it is looked into would be an error
        return [path for kind in ("pretrain", "finetune") for path in self.runs.glob(f"{kind}/*/last.pt.*.tmp")]

    def holders(self) -> list[int]:
        """Processes that hold the lock of a run folder now; a killed one left its number in the file, but not the lock."""
        found = []
        for path in self.runs.glob("*/*/lock"):
            with open(path, encoding="ascii") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    found += [int(text) for text in file.read().split()]
        return found

    def kill(self, moment: str, rng: random.Random) -> None:
        """Start it and kill it with SIGKILL: inside the first write of a checkpoint, or at a random moment."""
        old, process = set(self.half_written()), self.start(seconds_a_write=0.0005)
        if moment == "random moment":
            time.sleep(rng.uniform(0, 5))
        else:
            while process.poll() is None and not set(self.half_written()) - old:
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.1))
        if process.poll() is not None:
            moment = "ended before"
            assert process.returncode == 0, self.shown()[-3000:]
        elif moment == "a child":
            for pid in self.holders()[:1]:
                os.kill(pid, signal.SIGKILL)
            assert process.wait(timeout=60) == 2 and "ended with status -9" in self.shown(), self.shown()
        elif moment == "the parent alone":
            process.kill()
            process.wait(timeout=60)
            for _ in range(300):
                if not self.holders():
                    break
                time.sleep(0.1)
            assert not self.holders(), "children train on without their parent"
        else:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=60)
            if set(self.half_written()) - old:
                moment = f"{moment}, half a checkpoint left"
        self.killed[moment] = self.killed.get(moment, 0) + 1


def contents(folder: Path) -> tuple:
    """All that must not depend on interruptions: weights, optimizers, log and results, but for times."""
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return (torch.load(folder / "last.pt", weights_only=True)["model"], torch.load(folder / "optimizers.pt", weights_only=True),
            [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_s")} for line in log],
            {k: v for k, v in results.items() if k not in ("seconds", "machine", "command", "git")})


def assert_same(a: object, b: object, where: str) -> None:
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


def survives(straight: Job, halting: Job, moments: Sequence[str], seed: int) -> tuple[str, str]:
    """Kill at these moments, then let it end, and compare all run folders with the undisturbed ones. Returns what both showed last."""
    rng = random.Random(seed)
    undisturbed = straight.start()
    finished: dict[Path, int] = {}
    for moment in moments:
        halting.kill(moment, rng)
        for path in halting.runs.glob("*/*/results.json"):
            finished.setdefault(path, (path.parent / "last.pt").stat().st_mtime_ns)
    shown = halting.finish()
    assert undisturbed.wait(timeout=300) == 0, straight.shown()
    assert all((path.parent / "last.pt").stat().st_mtime_ns == stamp for path, stamp in finished.items()), "a finished run was trained again"
    folders = [path.parent.relative_to(straight.runs) for path in straight.runs.glob("*/*/results.json") if (path.parent / "last.pt").exists()]
    assert folders
    for folder in folders:
        assert_same(contents(straight.runs / folder), contents(halting.runs / folder), str(folder))
    assert not list(halting.runs.rglob("*/*/*.tmp")), "half-written files were left"
    return straight.shown(), shown


def pretraining(material: Path, threads: int, kills: int) -> list[Job]:
    arguments = ["pretrain.py", "--name", "run", "--set", f"steps={12 + 6 * kills}", "dropout=0.1", "optimizer=muon"]
    return [Job(material, f"pretrain-{kind}-{threads}-{kills}", arguments, threads) for kind in ("straight", "halting")]


def finetuning(material: Path, kills: int) -> list[Job]:
    start = Job(material, "start", ["pretrain.py", "--name", "run"])
    start.finish()
    arguments = ["finetune.py", "--checkpoint", str(start.runs / "pretrain/run"), "--no-scratch", "--set", f"steps={12 + 6 * kills}"]
    return [Job(material, f"finetune-{kind}-{kills}", arguments) for kind in ("straight", "halting")]


def committees(material: Path, kills: int) -> list[Job]:
    arguments = ["committee.py", "--members", "2", "--deep", "none", "--jobs", "2", "--set", f"steps={3 + 3 * kills}",
                 "--finetune-set", f"steps={2 + kills}"]
    return [Job(material, f"committee-{kind}-{kills}", arguments) for kind in ("straight", "halting")]


MOMENTS = ["a write", "random moment", "a write"]


@pytest.mark.parametrize("threads", [1, 2])
def test_killed_pretraining_ends_the_same_to_the_last_bit(material: Path, threads: int) -> None:
    straight, halting = pretraining(material, threads, 3)
    survives(straight, halting, MOMENTS, seed := random.randrange(10**6))
    assert sum(halting.killed.values()) == 3 and halting.killed.get("a write, half a checkpoint left"), (halting.killed, seed)


def test_killed_finetuning_ends_the_same_to_the_last_bit(material: Path) -> None:
    straight, halting = finetuning(material, 3)
    survives(straight, halting, MOMENTS, random.randrange(10**6))
    assert halting.killed.get("a write, half a checkpoint left"), halting.killed


def table(shown: str) -> str:
    return re.search(r"^data: \d+ classes, .*?(?=^latency)", shown, flags=re.M | re.S)[0]


def test_killed_committee_gives_the_same_table(material: Path) -> None:
    straight, halting = committees(material, 3)
    a, b = survives(straight, halting, ["a write", "the parent alone", "a child"], random.randrange(10**6))
    assert table(a) == table(b)


def test_a_process_killed_as_it_starts(material: Path) -> None:
    """It has not read yet what the parent sends, which must not wait for it for ever."""
    job = Job(material, "early-child", ["committee.py", "--members", "2", "--deep", "none", "--jobs", "2"])
    process = job.start()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    found: list[str] = []
    while process.poll() is None and not found:
        time.sleep(0.001)
        found = [pid for pid in children.read_text(encoding="ascii").split()
                 if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()] if children.exists() else []
    os.kill(int(found[0]), signal.SIGKILL)
    assert process.wait(timeout=60) == 2 and "ended with status -9" in job.shown(), job.shown()


@pytest.mark.slow
def test_killed_many_times(material: Path) -> None:
    kills, figures = COUNT or 25, {}
    choices = ["a write", "a write", "random moment"]
    for name, (straight, halting) in {"pretrain, 1 thread": pretraining(material, 1, kills), "pretrain, 2 threads": pretraining(material, 2, kills),
                                      "finetune": finetuning(material, kills), "committee": committees(material, kills)}.items():
        seed, started = random.randrange(10**6), time.perf_counter()
        moments = random.Random(seed).choices(choices + ["the parent alone", "a child"] * (name == "committee"), k=kills)
        a, b = survives(straight, halting, moments, seed)
        assert name != "committee" or table(a) == table(b)
        figures[name] = {"kills": kills - halting.killed.get("ended before", 0), "where": halting.killed, "seed": seed,
                         "bit-identical": True, "seconds": round(time.perf_counter() - started)}
        record_reliability("killed", figures)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_tells_so_by_its_status(material: Path, number: int) -> None:
    job = Job(material, f"signal-{number}", ["pretrain.py", "--name", "run", "--set", "steps=400"])
    process = job.start()
    while process.poll() is None and not (job.runs / "pretrain/run/last.pt").exists():
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(timeout=60) == 128 + number and "Traceback" not in job.shown(), job.shown()
    step = torch.load(job.runs / "pretrain/run/last.pt", weights_only=True)["step"]
    assert 0 < step < 400 and f"stopped at step {step}" in job.shown()


def test_sigterm_while_a_folder_is_made_leaves_no_half_folder(material: Path) -> None:
    place = material / "many/x"
    command = [sys.executable, str(TESTS.parent / "data.py"), "prepare", str(place), "--articles", str(material / "wiki.jsonl.gz"), "--vocab-size", "150"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8")
    while process.poll() is None and not (material / "many/.x.tmp").exists():
        time.sleep(0.001)
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143 and "Traceback" not in err and [p.name for p in (material / "many").iterdir()] == [".x.lock"], out + err
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0 and (place / "dataset.json").exists()


def test_two_at_once_in_one_folder(material: Path) -> None:
    """The second names the first and refuses; when the first is killed, the lock is gone, although its file stays."""
    job = Job(material, "two", ["pretrain.py", "--name", "run", "--set", "steps=400"])
    first = job.start(seconds_a_write=0.0005)
    while first.poll() is None and job.holders() != [first.pid]:
        time.sleep(0.01)
    second = job.start()
    assert second.wait(timeout=60) == 2 and f"is locked by process {first.pid}. " in job.shown(), job.shown()
    assert first.poll() is None, "the second ended the first"
    first.kill()
    first.wait(timeout=60)
    job.arguments = [*job.arguments[:-1], "steps=2", "--fresh"]
    job.finish()
