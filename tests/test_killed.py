"""Killed, stopped or damaged at any moment: nothing is lost, and the end is the same to the bit.

The long tests write how often they tried what:

    TLM_RELIABILITY=results/reliability.json python -m pytest tests/test_killed.py -m slow
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data import open_folder
from loopback import Loopback
from material import COUNT, prepared_folder, pretrain_run, record_reliability, write_articles
from material import write_task_file
from pretrain import PRESETS

fcntl = pytest.importorskip("fcntl")
resource = pytest.importorskip("resource")
pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs the signals of Unix")
TESTS = Path(__file__).resolve().parent
SLOWLY = "tests/slowly.py"
# Whatever depends on time, or on the place of a run.
VARIABLE = {"seconds", "tokens_per_s", "latency_ms", "machine", "command", "git"}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed é")
    write_articles(folder / "wiki.jsonl.gz", 150)
    tables = [write_task_file(folder / "train.csv", 20),
              write_task_file(folder / "test.csv", 10, seed=1)]
    data = open_folder(prepared_folder(folder / "data", folder / "wiki.jsonl.gz", tables))
    pretrain_run("bert-1", replace(PRESETS["smoke"], steps=1), data, 0, folder, name="start")
    return folder


# ---- a command and what it leaves ----------------------------------------------------------------


@dataclass
class Job:
    """A command, the file that takes its output (a child could keep a pipe open), its runs."""

    line: Sequence[str | Path]
    out: Path
    runs: Path
    threads: int = 1

    def start(self, seconds_a_write: float = 0.0, **more) -> subprocess.Popen:
        # "passive": two runs side by side do not spin against each other.
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads), "NO_PROXY": "127.0.0.1",
                       "OMP_WAIT_POLICY": "passive", "TLM_SLOW_WRITE": str(seconds_a_write)}
        with open(self.out, "w", encoding="utf-8") as out:
            return subprocess.Popen(
                self.line, stdout=out, stderr=subprocess.STDOUT, env=environment, cwd=TESTS.parent,
                start_new_session=True, **more)

    def shown(self) -> str:
        return self.out.read_text(encoding="utf-8", errors="replace")

    def run(self, **more) -> int:
        """Returns status 0, or 2 with exactly one line of error. Never a traceback."""
        status = self.start(**more).wait(timeout=300)
        shown = self.shown()
        errors = [line for line in shown.splitlines() if line.startswith("error: ")]
        assert status in (0, 2) and len(errors) == status // 2, shown
        assert "Traceback" not in shown, shown
        return status

    def finish(self) -> None:
        assert self.run() == 0, self.shown()

    def half_written(self) -> set[Path]:
        return set(self.runs.glob("*/*/last.pt.*.tmp"))

    def holders(self) -> list[int]:
        """Processes that hold a run's lock. A killed one left its number there, but no lock."""
        found = []
        for path in self.runs.glob("*/*/lock"):
            with open(path, encoding="ascii") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    found += map(int, file.read().split())  # empty while it is given back
        return found

    def interrupt(self, moment: str, rng: random.Random) -> str:
        """Start it and end it: inside a write, or where `moment` says. Returns what happened."""
        before = self.half_written()
        process = self.start(seconds_a_write=0.0005)
        if moment == "random moment":
            wait_for(process, lambda: False, seconds=rng.uniform(0, 5))
        elif moment == "a starting child":
            wait_for(process, lambda: children_of(process))
        else:
            wait_for(process, lambda: self.half_written() - before)
            time.sleep(rng.uniform(0, 0.1))
        if process.poll() is not None:
            assert process.returncode == 0, self.shown()
            return "ended before"
        if moment.startswith("SIG"):
            process.send_signal(getattr(signal, moment))
            assert process.wait(timeout=60) == 128 + getattr(signal, moment), self.shown()
            assert "stopped at step" in self.shown() and "Traceback" not in self.shown()
        elif moment == "a second process":
            process.send_signal(signal.SIGSTOP)
            second = Job(self.line, self.out.with_suffix(".second"), self.runs)
            assert second.run() == 2 and f"locked by process {process.pid}." in second.shown()
            process.kill()
            process.wait(timeout=60)
        elif moment == "the parent alone":
            process.kill()
            process.wait(timeout=60)
            wait_for(None, lambda: not self.holders())
        elif moment in ("a child", "a starting child"):
            pids = self.holders() or children_of(process)
            os.kill(pids[0], signal.SIGKILL)
            assert process.wait(timeout=60) == 2, self.shown()
            assert "ended with status -9" in self.shown(), self.shown()
        else:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=60)
        return moment + (", half a checkpoint left" if self.half_written() - before else "")


def wait_for(process: subprocess.Popen | None, condition: Callable, seconds: float = 60) -> None:
    """Until it is true, or the process has ended. Only a wait for nothing may take its time."""
    end = time.monotonic() + seconds
    while not condition() and (process is None or process.poll() is None):
        if time.monotonic() > end:
            assert seconds < 60, "nothing happened in a minute"
            return
        time.sleep(0.002)


def children_of(process: subprocess.Popen) -> list[int]:
    """The training processes of a committee, also those that have not begun (Linux)."""
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    found = []
    for pid in listed.read_text(encoding="ascii").split():
        if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
            found.append(int(pid))
    return found


def comparable(value: Any) -> Any:
    """A value without what may differ from run to run; tensors as bytes."""
    if isinstance(value, dict):
        return {key: comparable(x) for key, x in value.items() if key not in VARIABLE}
    if isinstance(value, (list, tuple)):
        return [comparable(x) for x in value]
    return value.numpy().tobytes() if isinstance(value, torch.Tensor) else value


def contents(runs: Path) -> dict[str, Any]:
    """All that interruptions must not change, by file; and no file may be more or fewer."""
    found: dict[str, Any] = {}
    for path in runs.glob("*/*/*"):
        content: Any = path.read_bytes()
        if path.name == "last.pt":
            content = torch.load(path, weights_only=True)
        elif path.suffix == ".json":
            content = json.loads(content)
        elif path.suffix == ".jsonl":
            content = [json.loads(line) for line in content.splitlines()]
        if path.name != "data.json":  # a path
            found[str(path.relative_to(runs))] = comparable(content)
    return found


def differences(a: Path, b: Path) -> list[str]:
    """The files of two folders of runs that are not the same."""
    one, other = contents(a), contents(b)
    assert any(name.endswith("last.pt") for name in one)
    return [name for name in one.keys() | other.keys() if one.get(name) != other.get(name)]


def finished(runs: Path) -> dict[Path, int]:
    """When the last checkpoint of each finished run was written."""
    stamps = {}
    for path in runs.glob("*/*/last.pt"):
        if path.with_name("results.json").exists():
            stamps[path] = path.stat().st_mtime_ns
    return stamps


# ---- interrupted again and again -----------------------------------------------------------------


def training(name: str, steps: int, material: Path) -> list[str]:
    """A command that makes about so many steps."""
    if name.startswith("pretrain"):
        return ["pretrain.py", "--name", "run", "--set", "dropout=0.1", "optimizer=muon",
                f"steps={steps}"]
    if name == "finetune":
        return ["finetune.py", "--checkpoint", str(material / "pretrain/start"), "--no-scratch",
                "--set", f"steps={steps}"]
    return ["committee.py", "--members", "2", "--deep", "none", "--jobs", "2",
            "--set", f"steps={steps // 2}", "--finetune-set", f"steps={steps // 6}"]


def survives(name: str, moments: Sequence[str], material: Path, seed: int) -> Counter[str]:
    """Interrupt it at these moments, then let it end, and compare it with an undisturbed twin.

    Returns how often what happened.
    """
    rng = random.Random(seed)
    jobs = []
    for kind in ("straight", "halting"):
        runs = material / f"{name}, {kind}, {len(moments)}"
        line = [sys.executable, SLOWLY, *training(name, 12 + 6 * len(moments), material),
                "--preset", "smoke", "--data", material / "data", "--runs-dir", runs]
        jobs.append(Job(line, runs.with_suffix(".out"), runs, 2 if "2 threads" in name else 1))
    straight, halting = jobs
    undisturbed = straight.start()
    happened: Counter[str] = Counter()
    done: dict[Path, int] = {}
    for moment in moments:
        happened[halting.interrupt(moment, rng)] += 1
        done = {**finished(halting.runs), **done}
    halting.finish()
    assert undisturbed.wait(timeout=300) == 0, straight.shown()
    assert done.items() <= finished(halting.runs).items(), "a finished run was trained again"
    assert not differences(straight.runs, halting.runs)
    return happened


@pytest.mark.parametrize("name, moments", [
    ("pretrain, 2 threads", ["a write", "SIGINT", "a second process"]),
    ("finetune", ["a write", "SIGTERM"]),
    ("committee", ["SIGTERM", "the parent alone", "a child"])])
def test_an_interrupted_job_ends_as_an_undisturbed_one(name: str, moments: list[str],
                                                       material: Path) -> None:
    """Killed, stopped by signals, locked while it runs: at the end the same to the last bit."""
    happened = survives(name, moments, material, random.randrange(10**6))
    assert happened["a write, half a checkpoint left"] == moments.count("a write"), happened
    assert not happened["ended before"], happened


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_prepare_leaves_no_half_folder(material: Path, tmp_path: Path,
                                                number: int) -> None:
    articles = material / "wiki.jsonl.gz"
    line = [sys.executable, "data.py", "prepare", tmp_path / "x", "--preset", "smoke",
            "--articles", articles]
    job = Job(line, tmp_path / "out", tmp_path)
    process = job.start()
    wait_for(process, (tmp_path / ".x.tmp").exists)
    process.send_signal(number)
    assert process.wait(timeout=60) == -number and not (tmp_path / "x").exists(), job.shown()
    assert "Traceback" not in job.shown(), job.shown()
    assert prepared_folder(tmp_path / "x", articles) == tmp_path / "x"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".x.lock", "out", "x"]


def test_sigterm_ends_a_script_even_where_python_swallows_exceptions() -> None:
    """Python only reports an exception of a `__del__` or a weak-reference callback, and goes on."""
    program = ("import os, tokenizer\n"
               "class Dying:\n"
               "    def __del__(self):\n"
               f"        os.kill(os.getpid(), {signal.SIGTERM:d})\n"
               "tokenizer.run_script(Dying)\n")
    done = subprocess.run([sys.executable, "-c", program], cwd=TESTS.parent, capture_output=True)
    assert (done.returncode, done.stderr) == (-signal.SIGTERM, b"")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pretrain, 1 thread", "pretrain, 2 threads", "finetune",
                                  "committee"])
def test_killed_many_times(name: str, material: Path) -> None:
    seed, started = random.randrange(10**6), time.perf_counter()
    choices = ["a write", "a write", "random moment"]
    choices += ["the parent alone", "a child", "a starting child"] if name == "committee" else []
    moments = random.Random(seed).choices(choices, k=COUNT or 25)
    happened = survives(name, moments, material, seed)
    record_reliability(f"killed, {name}", {
        "kills": happened.total() - happened["ended before"], "where": happened, "seed": seed,
        "bit-identical": True, "seconds": round(time.perf_counter() - started)})


# ---- the whole way, with one fault on it ---------------------------------------------------------

FETCH = """import data, sys
data.BACKOFF_SECONDS, data.TIMEOUT_SECONDS = 0.01, (2.0, 0.5)
url, path, size, sha256 = sys.argv[1:]
data.run_script(lambda: data.download(url, data.Path(path), int(size), sha256))"""
FAULTS = ["SIGKILL", "SIGTERM", "SIGINT", "file size limit", "damaged file", "server: short",
          "server: stall", "server: 503", "server: corrupt", "server: html", "server: wrong range",
          "server: endless"]
RUN = "runs/pretrain/run"
DAMAGED = {  # stage -> files that it makes, and the stage that reads them
    "download": (["wiki.jsonl.gz"], "prepare"), "tokenizer": (["own.model"], "prepare"),
    "prepare": (["data/articles.bin", "data/dataset.json"], "pretrain"),
    "pretrain": ([f"{RUN}/last.pt", f"{RUN}/config.json", f"{RUN}/tokenizer.model"], "finetune")}


def whole_way(folder: Path, material: Path, url: str) -> dict[str, Job]:
    """All stages, from a download to a committee."""
    body = (material / "wiki.jsonl.gz").read_bytes()
    articles, model, place = folder / "wiki.jsonl.gz", folder / "own.model", folder / "data"
    common = ["--preset", "smoke", "--data", place, "--runs-dir", folder / "runs"]
    lines: dict[str, list] = {
        "download": ["-c", FETCH, url, articles, str(len(body)), hashlib.sha256(body).hexdigest()],
        "tokenizer": ["tokenizer.py", "--train", material / "plain.txt", "--model", model,
                      "--vocab-size", "200"],
        "prepare": ["data.py", "prepare", place, "--preset", "smoke", "--articles", articles,
                    "--tokenizer", model, "--labels", material / "train.csv"],
        "pretrain": [SLOWLY, "pretrain.py", *common, "--set", "steps=10", "--name", "run"],
        "finetune": [SLOWLY, "finetune.py", *common, "--checkpoint", folder / RUN],
        "committee": [SLOWLY, "committee.py", *common, "--members", "2", "--deep", "none",
                      "--jobs", "2", "--set", "steps=5", "--finetune-set", "steps=5"]}
    folder.mkdir()
    jobs = {}
    for stage, line in lines.items():
        jobs[stage] = Job([sys.executable, *line], folder / f"{stage}.out", folder / "runs")
    return jobs


def damage(stage: str, way: dict[str, Job], rng: random.Random) -> str:
    """Cut off a file that the stage makes. The stage that reads it names it."""
    for made_before in ("download", "tokenizer", stage):
        way[made_before].finish()
    names, reader = DAMAGED[stage]
    path = way[stage].runs.parent / rng.choice(names)
    os.truncate(path, rng.randrange(path.stat().st_size))
    assert way[reader].run() == 2, way[reader].shown()
    is_folder = stage in ("prepare", "pretrain")
    assert str(path.parent if is_folder else path) in way[reader].shown(), way[reader].shown()
    # As the line says: delete the file, or the folder, and it is made again.
    for file in path.parent.iterdir() if is_folder else [path]:
        file.unlink()
    return "named"


def strike(stage: str, fault: str, way: dict[str, Job], rng: random.Random) -> str:
    """Run a stage with a fault; returns what came of it."""
    job = way[stage]
    if fault == "damaged file":
        return damage(stage, way, rng)
    if fault.startswith("server"):  # it knows what to do
        return f"status {job.run()}"
    if fault == "file size limit":
        most = 3_000 if stage == "download" else 30_000  # bytes; a checkpoint has more
        limits = (resource.RLIMIT_FSIZE, (most, most))
        return f"status {job.run(preexec_fn=lambda: resource.setrlimit(*limits))}"
    process = job.start()
    wait_for(process, lambda: False, seconds=rng.uniform(0, 4))
    if process.poll() is None:
        os.killpg(process.pid, getattr(signal, fault))
    process.wait(timeout=60)
    # Ctrl-C while Python still imports gives a traceback of Python's own.
    assert "Traceback" not in job.shown() or "import" in job.shown(), job.shown()
    return f"status {process.returncode}"


@pytest.mark.slow
def test_from_download_to_committee_with_a_fault_on_the_way(material: Path, tmp_path: Path) -> None:
    """Each cycle has one random fault. The same commands then give what an undisturbed way gave."""
    seed, started = random.randrange(10**6), time.perf_counter()
    rng = random.Random(seed)
    rivers = [f"the river {i} of france and a king of japan, {i * 7919}" for i in range(300)]
    (material / "plain.txt").write_text("\n".join(rivers), encoding="utf-8")
    tried: Counter[str] = Counter()
    with Loopback() as server:
        server.files["/wiki.jsonl.gz"] = (material / "wiki.jsonl.gz").read_bytes()
        for cycle in range((COUNT or 50) + 1):  # the first is undisturbed
            way = whole_way(tmp_path / str(cycle), material, f"{server.url}/wiki.jsonl.gz")
            fault = rng.choice(FAULTS)
            struck = rng.choice(list(DAMAGED if fault == "damaged file" else way))
            if fault.startswith("server"):
                struck = "download"
                server.behaviours["/wiki.jsonl.gz"] = [fault.removeprefix("server: ")] * (cycle > 0)
            for stage, job in way.items():
                if cycle and stage == struck:
                    tried[f"{stage}, {fault}: {strike(stage, fault, way, rng)}"] += 1
                done = finished(job.runs)
                job.finish()
                assert done.items() <= finished(job.runs).items(), "a finished run is trained again"
            assert not differences(tmp_path / "0/runs", tmp_path / f"{cycle}/runs"), (tried, seed)
            record_reliability("soak", {
                "cycles": cycle, "seed": seed, "faults tried": dict(sorted(tried.items())),
                "seconds": round(time.perf_counter() - started)})
