"""A full disk, damaged or hostile files in a run folder, numbers that go wrong: one clear line, and the last good state stays."""

from __future__ import annotations

import builtins
import dataclasses
import errno
import json
import os
import pickle
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import finetune as finetuning
import pretrain as pretraining
from data import DataFolder, DeviceTable, InputError, Task, encode_texts, load_table, open_folder, read_metadata
from finetune import Predictor, finetune, load_logits, start_of
from material import articles, corpus_of, on_cpu, prepared_folder, pretrain_run, small_tokenizer, tables_of, write_articles
from pretrain import PRESETS, load_checkpoint, read_json
from tokenizer import save_tokenizer

RECIPE = dataclasses.replace(PRESETS["smoke"], steps=8)
TASK = Task("two", ["a", "b"], [("river city", 0), ("king painter", 1)] * 8, [], [("a city", 0), ("the king", 1)])


@pytest.fixture(scope="module")
def corpus() -> DataFolder:
    tokenizer = small_tokenizer()
    texts = [a["text"] for a in articles(60)]
    return corpus_of(texts[20:], texts[:20], tokenizer)


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "lock"}


def save_after_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretraining, "SAVE_SECONDS", -1.0)


# ---- a full disk ----

class SmallDisk:
    """In place of open(): files that can be written until `room` bytes are used; then the disk is full."""

    def __init__(self, room: float) -> None:
        self.room = room

    def __call__(self, path, mode: str = "r", *args, **more):
        file = builtins.open(path, mode, *args, **more)
        return SmallDiskFile(file, self) if set(mode) & set("wa") else file


class SmallDiskFile:
    def __init__(self, file, disk: SmallDisk) -> None:
        self.file, self.disk = file, disk

    def write(self, content) -> int:
        self.disk.room -= len(content)
        if self.disk.room < 0:
            self.file.write(content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(content)

    def __getattr__(self, name: str):
        return getattr(self.file, name)

    def __enter__(self) -> SmallDiskFile:
        return self

    def __exit__(self, *error) -> None:
        self.file.close()


def test_full_disk_in_a_checkpoint(corpus: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint before stays, nothing half-written stays, and with room again the run ends as if nothing had been."""
    straight = pretrain_run("bert-1", RECIPE, corpus, 0, tmp_path / "straight")
    save_after_every_step(monkeypatch)
    disk = SmallDisk(3e6)  # a checkpoint has about 0.9 MB
    monkeypatch.setattr(data, "open", disk, raising=False)
    with pytest.raises(InputError, match=r"no space left on the disk while writing .*last\.pt \(.*\)\. Free some"):
        pretrain_run("bert-1", RECIPE, corpus, 0, tmp_path / "full")
    folder = tmp_path / "full" / "pretrain" / straight.name
    assert 1 <= load_checkpoint(folder)["step"] < 8 and not list(folder.glob("*.tmp"))
    disk.room = float("inf")
    pretrain_run("bert-1", RECIPE, corpus, 0, tmp_path / "full")
    a, b = (load_checkpoint(f)["model"] for f in (straight, folder))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_full_disk_in_a_line_of_the_log(corpus: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a half-written line leaves is cut off by the next run."""
    save_after_every_step(monkeypatch)
    disk = SmallDisk(500)
    monkeypatch.setattr(pretraining, "open", disk, raising=False)
    with pytest.raises(InputError, match=r"no space left on the disk while writing .*log\.jsonl"):
        pretrain_run("bert-1", RECIPE, corpus, 0, tmp_path, name="run")
    log, step = tmp_path / "pretrain/run/log.jsonl", load_checkpoint(tmp_path / "pretrain/run")["step"]
    assert not log.read_text(encoding="utf-8").endswith("\n") and step >= 1
    disk.room = float("inf")
    pretrain_run("bert-1", RECIPE, corpus, 0, tmp_path, name="run")
    steps = [json.loads(line)["step"] for line in log.read_text(encoding="utf-8").splitlines() if "loss" in json.loads(line)]
    assert steps == [*range(1, 9)]


def test_a_signal_while_the_last_checkpoint_is_written(tmp_path: Path, corpus: DataFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    original = pretraining.Run.save

    def save(run: pretraining.Run, state: object, model: torch.nn.Module, optimizers: list) -> None:
        if not optimizers:
            signal.raise_signal(signal.SIGINT)
        original(run, state, model, optimizers)

    with monkeypatch.context() as patch:
        patch.setattr(pretraining.Run, "save", save)
        with pytest.raises(SystemExit) as ended:
            pretrain_run("bert-1", RECIPE, corpus, 0, tmp_path, name="run")
    assert ended.value.code == 130 and load_checkpoint(tmp_path / "pretrain/run")["step"] == RECIPE.steps
    stamp = (tmp_path / "pretrain/run/log.jsonl").read_text(encoding="utf-8")
    pretrain_run("bert-1", RECIPE, corpus, 0, tmp_path, name="run")
    assert (tmp_path / "pretrain/run/results.json").exists()
    assert (tmp_path / "pretrain/run/log.jsonl").read_text(encoding="utf-8") == stamp, "it was trained again"


@pytest.mark.parametrize("where", ["write_bytes", "replace"])
def test_full_disk_keeps_the_tokenizer_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    save_tokenizer(small_tokenizer(), tmp_path / "own.model")
    before = files_in(tmp_path)

    def full(self: Path, content: bytes) -> None:
        with open(self, "wb") as file:
            file.write(content[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    if where == "write_bytes":
        monkeypatch.setattr(Path, "write_bytes", full)
    else:
        monkeypatch.setattr("tokenizer.os.replace", lambda a, b: full(Path(a), b"x"))
    with pytest.raises(OSError):
        save_tokenizer(small_tokenizer(190), tmp_path / "own.model")
    monkeypatch.undo()
    assert files_in(tmp_path) == before


# ---- hostile and damaged files ----

class Payload:
    """Unpickled without care, this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture(scope="module")
def runs(corpus: DataFolder, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pre-training run and a fine-tuning run."""
    folder = tmp_path_factory.mktemp("runs é")
    pretrained = pretrain_run("bert-1", RECIPE, corpus, 0, folder)
    return pretrained, tune(pretrained, corpus, folder)


def tune(pretrained: Path, corpus: DataFolder, folder: Path) -> Path:
    return finetune(tables_of(TASK, corpus), start_of(pretrained), finetuning.PRESETS["smoke"], 0, on_cpu(folder))


def test_a_pickle_is_not_executed(runs: tuple[Path, Path], corpus: DataFolder, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    pickle.loads(pickle.dumps(Payload(mark)))
    assert mark.exists(), "the payload is harmless, the test proves nothing"
    mark.unlink()
    for write in (lambda path: path.write_bytes(pickle.dumps(Payload(mark))),
                  lambda path: torch.save({"step": 1, "model": Payload(mark), "optimizers": []}, path),
                  lambda path: torch.save({"step": 1, "model": Payload(mark)}, path, _use_new_zipfile_serialization=False)):
        write(tmp_path / "last.pt")
        with pytest.raises(InputError, match="last.pt: cannot be read .*delete it"):
            load_checkpoint(tmp_path)
    np.savez(tmp_path / "logits.npz", logits=np.array([Payload(mark)], dtype=object), labels=np.zeros(1))
    with pytest.raises(InputError, match="logits.npz: cannot be read"):
        load_logits(tmp_path)
    write_articles(tmp_path / "a.jsonl.gz", 150)
    folder = prepared_folder(tmp_path / "data/x", tmp_path / "a.jsonl.gz")
    np.save(folder / "articles.npy", np.array([Payload(mark), 1], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="was changed"):
        open_folder(folder)
    with pytest.raises(InputError, match="articles.npy: damaged"):
        load_table(folder, "articles", read_metadata(folder))
    assert not mark.exists(), "a file was executed"


def other_version(path: Path) -> bytes:
    if path.suffix == ".json":
        record = json.loads(path.read_text(encoding="utf-8"))
        record = {"kind": record["kind"], "config": {**record["config"], "new_setting": 1}} if "config" in record else {"version": 2}
        return json.dumps(record).encode()
    if path.suffix == ".model":
        return small_tokenizer(190).model
    if path.suffix == ".npz":
        return (path.parent / "config.json").read_bytes()
    torch.save({**torch.load(path, weights_only=True), "model": {"other.weight": torch.zeros(2)}}, path)
    return path.read_bytes()


DAMAGES: dict[str, Callable[[Path], bytes]] = {
    "empty": lambda path: b"", "cut short": lambda path: path.read_bytes()[: path.stat().st_size // 2],
    "random bytes": lambda path: random.Random(0).randbytes(1000), "another version": other_version,
    "a list": lambda path: b"[1, 2]", "zip alone": lambda path: b"PK\x03\x04" + bytes(100), "deep": lambda path: b"[" * 100_000}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["config.json", "results.json", "last.pt", "tokenizer.model", "logits.npz"])
def test_damaged_files_of_a_run_are_named(runs: tuple[Path, Path], corpus: DataFolder, name: str, damage: str) -> None:
    """Whatever uses the file says which it is, and what to do; none of it is a traceback."""
    pretrained, tuned = runs
    uses = {"config.json": [lambda: Predictor([tuned], on_cpu()), lambda: tune(pretrained, corpus, tuned.parent.parent)],
            "results.json": [lambda: read_json(tuned / "results.json", "accuracy")], "last.pt": [lambda: Predictor([tuned], on_cpu())],
            "tokenizer.model": [lambda: Predictor([tuned], on_cpu())], "logits.npz": [lambda: load_logits(tuned)]}[name]
    path = tuned / name
    valid = path.read_bytes()
    try:
        path.write_bytes(DAMAGES[damage](path))
        for use in uses:
            with pytest.raises(InputError, match=r"--fresh|[Dd]elete|train|made with|made again|name a folder") as error:
                use()
            assert str(tuned) in str(error.value)
    finally:
        path.write_bytes(valid)
    Predictor([tuned], on_cpu())


def test_an_unfinished_classifier_is_not_used(runs: tuple[Path, Path]) -> None:
    results = runs[1] / "results.json"
    valid = results.read_bytes()
    results.unlink()
    try:
        with pytest.raises(InputError, match="has not ended"):
            Predictor([runs[1]], on_cpu())
    finally:
        results.write_bytes(valid)


@pytest.mark.parametrize("damage", ["empty", "cut short", "random bytes", "another version"])
def test_a_damaged_checkpoint_does_not_resume(runs: tuple[Path, Path], corpus: DataFolder, damage: str) -> None:
    pretrained, _ = runs
    valid, results = (pretrained / "last.pt").read_bytes(), (pretrained / "results.json").read_bytes()
    try:
        (pretrained / "last.pt").write_bytes(DAMAGES[damage](pretrained / "last.pt"))
        (pretrained / "results.json").unlink()
        with pytest.raises(InputError, match=r"last\.pt: .*[Dd]elete"):
            pretrain_run("bert-1", RECIPE, corpus, 0, pretrained.parent.parent)
    finally:
        (pretrained / "last.pt").write_bytes(valid)
        (pretrained / "results.json").write_bytes(results)


def test_a_damaged_log_is_cut_not_a_traceback(runs: tuple[Path, Path], corpus: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_after_every_step(monkeypatch)
    monkeypatch.setattr(data, "open", SmallDisk(3e6), raising=False)
    with pytest.raises(InputError):
        pretrain_run("bert-1", RECIPE, corpus, 0, tmp_path, name="run")
    monkeypatch.undo()
    log = tmp_path / "pretrain/run/log.jsonl"
    log.write_bytes(log.read_bytes() + b'\xff\0{"step": 1}}\n{"loss": 1}\n[1]\n{"step": 99, "loss": 1}\n{"step": 1, "lo')
    pretrain_run("bert-1", RECIPE, corpus, 0, tmp_path, name="run")
    steps = [json.loads(line)["step"] for line in log.read_text(encoding="utf-8").splitlines() if "loss" in json.loads(line)]
    assert steps == [*range(1, 9)]


# ---- numbers that go wrong ----

@pytest.mark.parametrize("steps", [1, 8, 250])
def test_weights_that_are_not_finite_are_never_saved(corpus: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """After the first step the loss is still finite and the weights are not; nothing of that reaches the disk, not even at the end."""
    save_after_every_step(monkeypatch)
    recipe = dataclasses.replace(RECIPE, steps=steps, lr=1e39, warmup=0.0, clip=0.0)
    with pytest.raises(InputError, match="smaller lr .*or --dtype fp32"):
        pretrain_run("bert-1", recipe, corpus, 0, tmp_path, name="run")
    assert not (tmp_path / "pretrain/run/last.pt").exists() and not (tmp_path / "pretrain/run/results.json").exists()


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(corpus: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted on the device, read with the next line of the log (here every second step), and then the run stops."""
    save_after_every_step(monkeypatch)
    original, calls = pretraining.F.cross_entropy, {"n": 0}

    def sometimes_nan(*args, **more):
        calls["n"] += 1
        return original(*args, **more) * (float("nan") if calls["n"] == 6 else 1.0)

    monkeypatch.setattr(pretraining.F, "cross_entropy", sometimes_nan)
    with pytest.raises(InputError, match="the loss is nan at step 6.*smaller lr .*or --dtype fp32.*last good checkpoint is kept"):
        pretrain_run("bert-1", dataclasses.replace(RECIPE, steps=200), corpus, 0, tmp_path, name="run")
    state = load_checkpoint(tmp_path / "pretrain/run")
    assert state["step"] == 5 and all(t.isfinite().all() for t in state["model"].values())


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), MemoryError(),
                                   RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")], ids=lambda e: type(e).__name__)
def test_out_of_memory_names_the_flag_to_lower(corpus: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    save_after_every_step(monkeypatch)
    original, calls = pretraining.mask_tokens, {"n": 0}

    def exhausted(*args, **more):
        calls["n"] += 1
        if calls["n"] == 4:
            raise error
        return original(*args, **more)

    monkeypatch.setattr(pretraining, "mask_tokens", exhausted)
    with pytest.raises(InputError, match="out of memory. Use a smaller batch_size"):
        pretrain_run("bert-1", dataclasses.replace(RECIPE, steps=200), corpus, 0, tmp_path, name="run")
    assert load_checkpoint(tmp_path / "pretrain/run")["step"] == 3


def test_other_errors_are_not_called_short_memory(corpus: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args, **more):
        raise RuntimeError("a bug")

    monkeypatch.setattr(pretraining, "mask_tokens", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        pretrain_run("bert-1", RECIPE, corpus, 0, tmp_path)


def test_no_row_of_attention_is_fully_masked(runs: tuple[Path, Path], corpus: DataFolder, tmp_path: Path) -> None:
    """Every text begins with [CLS], the emptiest included, so there is always a token to attend to, and probabilities are finite."""
    texts = ["", " ", "\u2603", "\0", "\ud800", "word " * 100]
    table = DeviceTable(encode_texts(texts, corpus.tokenizer, 32), torch.device("cpu"))
    assert (table.batch(np.arange(len(texts)))[:, 0] == 2).all()
    predictor = Predictor([runs[1]], on_cpu())
    for text in texts:
        assert sum(predictor(text)["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    meta = {"articles": 2, "max_length": 8, "vocab_size": 9}
    np.array([2, 3], dtype="<u2").tofile(tmp_path / "articles.bin")
    np.save(tmp_path / "articles.npy", np.array([0, 2, 2]))
    with pytest.raises(InputError, match="tokens and offsets disagree"):  # a text of no tokens would be such a row
        load_table(tmp_path, "articles", meta)


def test_same_seed_same_bits(corpus: DataFolder, tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, dropout=0.1, optimizer="muon")
    a, b, other = (load_checkpoint(pretrain_run("bert-1", recipe, corpus, seed, tmp_path / name))["model"] for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert all(torch.equal(a[name], b[name]) for name in a) and not torch.equal(a["bert.token.weight"], other["bert.token.weight"])


# ---- a data folder is complete or not there ----

def snapshot(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if ".lock" not in p.name)


def test_full_disk_while_a_folder_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_articles(tmp_path / "a.jsonl.gz", 150)
    place = prepared_folder(tmp_path / "data/x", tmp_path / "a.jsonl.gz")
    before = {p.name: p.read_bytes() for p in place.iterdir()}
    for room in (0, 10, 3_000):
        with monkeypatch.context() as patch:
            patch.setattr(data, "open", SmallDisk(room), raising=False)
            for name, fresh in (("y", False), ("x", True)):
                request = data.Request(articles=[str(tmp_path / "a.jsonl.gz")], preset="smoke", count=140)
                with pytest.raises(InputError, match="no space left"):
                    data.prepare(tmp_path / "data" / name, request, fresh)
    assert {p.name: p.read_bytes() for p in place.iterdir()} == before
    assert {name.partition("/")[0] for name in snapshot(tmp_path / "data")} == {"x"}


def test_a_kill_leaves_no_half_folder(tmp_path: Path) -> None:
    """What a killed process left beside the folder is no folder, and goes with the next call."""
    write_articles(tmp_path / "a.jsonl.gz", 150)
    (tmp_path / "data/.x.tmp").mkdir(parents=True)
    (tmp_path / "data/.x.tmp/articles.bin").write_bytes(b"half")
    with pytest.raises(InputError, match="no data folder"):
        open_folder(tmp_path / "data/x")
    place = prepared_folder(tmp_path / "data/x", tmp_path / "a.jsonl.gz")
    assert {name.partition("/")[0] for name in snapshot(tmp_path / "data")} == {"x"} and len(open_folder(place).articles) == 143


def test_two_processes_prepare_one_folder(tmp_path: Path) -> None:
    write_articles(tmp_path / "a.jsonl.gz", 200)
    command = [sys.executable, str(Path(data.__file__)), "prepare", str(tmp_path / "data/x"), "--preset", "smoke", "--articles", str(tmp_path / "a.jsonl.gz")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8") for _ in range(2)]
    shown = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], shown
    assert sorted("is there" in out for out, _ in shown) == [False, True]
    open_folder(tmp_path / "data/x")


@pytest.mark.parametrize("damage", ["empty", "cut short", "random bytes", "deep"])
def test_a_damaged_data_folder_is_named(tmp_path: Path, damage: str) -> None:
    write_articles(tmp_path / "a.jsonl.gz", 150)
    place = prepared_folder(tmp_path / "data/x", tmp_path / "a.jsonl.gz")
    for path in sorted(place.iterdir()):
        valid = path.read_bytes()
        path.write_bytes(DAMAGES[damage](path))
        with pytest.raises(InputError, match="Make the folder again") as error:
            open_folder(place)
        assert path.name in str(error.value)
        path.unlink()
        with pytest.raises(InputError, match="data folder|is missing"):
            open_folder(place)
        path.write_bytes(valid)
    meta = json.loads((place / "dataset.json").read_text(encoding="utf-8"))
    for change, message in (({"format": 0}, "of format 0"), ({"max_length": 16}, "was changed")):
        (place / "dataset.json").write_text(json.dumps({**meta, **change}), encoding="utf-8")
        with pytest.raises(InputError, match=message):
            open_folder(place)
