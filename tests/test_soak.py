"""A soak: the whole way from a download to a committee's table, again and again, each time with one random fault on the way.

    TLM_RELIABILITY=results/reliability.json python -m pytest tests/test_soak.py -q -m slow
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from loopback import Loopback
from material import COUNT, record_reliability, write_articles, write_task_file

TESTS = Path(__file__).resolve().parent
STAGES = ("download", "tokenizer", "prepare", "pretrain", "finetune", "committee")
FAULTS = ("SIGKILL", "SIGTERM", "SIGINT", "file size limit", "damaged file", "server: short", "server: stall", "server: 503", "server: corrupt", "server: html",
          "server: wrong range", "server: endless")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="sends signals that Windows does not have")]


class Way:
    """The five commands in one folder, and what they print."""

    def __init__(self, folder: Path, material: Path, server: Loopback) -> None:
        self.folder, self.server = folder, server
        body = (material / "wiki.jsonl.gz").read_bytes()
        articles, model, runs = folder / "wiki.jsonl.gz", folder / "own.model", folder / "runs"
        place = folder / "data"
        common = ["--preset", "smoke", "--data", str(place), "--runs-dir", str(runs)]
        fetch = (f"import sys; sys.path.insert(0, {str(TESTS.parent)!r}); import data; data.BACKOFF_SECONDS, data.TIMEOUT_SECONDS = 0.01, (2.0, 0.5); "
                 f"data.run_script(lambda: data.download({server.url + '/wiki.jsonl.gz'!r}, {str(articles)!r}, {len(body)}, {hashlib.sha256(body).hexdigest()!r}))")
        slowly = [sys.executable, str(TESTS / "slowly.py")]
        self.commands = {
            "download": [sys.executable, "-c", fetch],
            "tokenizer": [sys.executable, str(TESTS.parent / "tokenizer.py"), "--train", str(material / "plain.txt"), "--model", str(model), "--vocab-size", "200"],
            "prepare": [sys.executable, str(TESTS.parent / "data.py"), "prepare", str(place), "--preset", "smoke", "--articles", str(articles), "--tokenizer",
                        str(model), "--labels", str(material / "train.csv"), str(material / "test.csv")],
            "pretrain": [*slowly, "pretrain.py", *common, "--set", "steps=10", "--name", "run"],
            "finetune": [*slowly, "finetune.py", *common, "--checkpoint", str(runs / "pretrain/run")],
            "committee": [*slowly, "committee.py", *common, "--members", "2", "--deep", "none", "--jobs", "2", "--set", "steps=5", "--finetune-set", "steps=5"]}
        self.outputs = {"download": [articles], "tokenizer": [model], "prepare": [place / "articles.bin", place / "dataset.json"], "pretrain": [runs / "pretrain/run" / name for name in ("last.pt", "config.json", "tokenizer.model")],
                        "finetune": [], "committee": []}

    def start(self, stage: str, **more) -> subprocess.Popen:
        environment = {**os.environ, "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "TLM_SLOW_WRITE": "0.0002"}
        with open(self.folder / f"{stage}.out", "w", encoding="utf-8") as out:
            return subprocess.Popen(self.commands[stage], stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True, **more)

    def shown(self, stage: str) -> str:
        return (self.folder / f"{stage}.out").read_text(encoding="utf-8", errors="replace")

    def run(self, stage: str, **more) -> int:
        """Its exit status, 0 or 2; 2 with exactly one line of error, and a traceback never."""
        status = self.start(stage, **more).wait(timeout=300)
        shown = self.shown(stage)
        assert status in (0, 2) and "Traceback" not in shown and shown.count("error: ") - shown.count("calibration error: ") == (status == 2), shown[-3000:]
        return status

    def result(self) -> tuple:
        """What must be the same every time: the committee's table, and all weights."""
        table = re.search(r"^data: \d+ classes, .*?(?=^latency)", self.shown("committee"), flags=re.M | re.S)[0]
        runs = self.folder / "runs"
        weights = {str(path.parent.relative_to(runs)): torch.load(path, weights_only=True)["model"] for path in runs.glob("*/*/last.pt")}
        return table, weights

    def finished(self) -> dict[Path, int]:
        return {path: (path.parent / "last.pt").stat().st_mtime_ns for path in self.folder.glob("runs/*/*/results.json") if (path.parent / "last.pt").exists()}


def limit_file_size(most: int) -> None:
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


def strike(way: Way, stage: str, fault: str, rng: random.Random) -> str:
    """Run a stage with a fault; returns what came of it. The stage is then still to be run as if nothing had happened."""
    if fault.startswith("server"):
        way.server.behaviours["/wiki.jsonl.gz"] = [fault.removeprefix("server: ")]
        return f"status {way.run(stage)}"
    if fault == "file size limit":
        most = 3_000 if stage == "download" else 30_000  # bytes; a checkpoint has more
        return f"status {way.run(stage, preexec_fn=lambda: limit_file_size(most))}"
    if fault == "damaged file":
        way.run(stage)
        path = rng.choice(way.outputs[stage])
        path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])
        next_stage = "prepare" if stage in ("download", "tokenizer") else STAGES[STAGES.index(stage) + 1]
        status = way.run(next_stage)
        assert status == 2 and (path.name in way.shown(next_stage) or path.parent.name in way.shown(next_stage)), way.shown(next_stage)
        for left in (path.parent.iterdir() if stage in ("prepare", "pretrain") else [path]):  # as the line says: delete it, it is made again
            left.unlink()
        return "named"
    process = way.start(stage)
    time.sleep(rng.uniform(0, 4))
    os.killpg(process.pid, getattr(signal, fault)) if process.poll() is None else None
    process.wait(timeout=60)
    assert "Traceback" not in way.shown(stage) or "import" in way.shown(stage), way.shown(stage)  # Ctrl-C while Python still starts
    return f"status {process.returncode}"


def same(a: tuple, b: tuple) -> bool:
    return a[0] == b[0] and a[1].keys() == b[1].keys() and all(
        torch.equal(t, b[1][run][name]) for run, weights in a[1].items() for name, t in weights.items())


def test_soak(tmp_path: Path) -> None:
    cycles, seed, started = COUNT or 50, random.randrange(10**6), time.perf_counter()
    rng = random.Random(seed)
    write_articles(tmp_path / "wiki.jsonl.gz", 150)
    write_task_file(tmp_path / "train.csv", 10)
    write_task_file(tmp_path / "test.csv", 5, seed=1)
    (tmp_path / "plain.txt").write_text("\n".join(f"the river {i} of france and a king of japan founded the city, {i * 7919}" for i in range(300)), encoding="utf-8")
    tried: Counter[str] = Counter()
    lost = wrong = 0
    with Loopback() as server:
        server.files["/wiki.jsonl.gz"] = (tmp_path / "wiki.jsonl.gz").read_bytes()
        for cycle in range(-1, cycles):  # the first is undisturbed
            folder = tmp_path / f"cycle {cycle}"
            folder.mkdir()
            way = Way(folder, tmp_path, server)
            fault = rng.choice(FAULTS)
            struck = "download" if fault.startswith("server") else rng.choice(STAGES[:4] if fault == "damaged file" else STAGES)
            for stage in STAGES:
                if cycle >= 0 and stage == struck:
                    outcome = strike(way, stage, fault, rng)
                    tried[f"{stage}, {fault}: {outcome}"] += 1
                    before = way.finished()
                    if fault == "damaged file":
                        assert way.run(stage) == 0, way.shown(stage)
                        continue
                    assert way.run(stage) == 0, way.shown(stage)
                    lost += any(way.finished().get(path) != stamp for path, stamp in before.items())
                else:
                    assert way.run(stage) == 0, way.shown(stage)
            if cycle < 0:
                expected = way.result()
            else:
                wrong += not same(expected, way.result())
            record_reliability("soak", {"cycles": cycle + 1, "seed": seed, "faults tried": dict(sorted(tried.items())), "survived": cycle + 1 - wrong,
                                        "lost work": lost, "wrong results": wrong, "seconds": round(time.perf_counter() - started)})
    assert lost == wrong == 0, json.dumps(tried)
