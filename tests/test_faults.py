"""Full disks, damaged or hostile files, numbers that go wrong: one clear line, and the last good
state stays."""

from __future__ import annotations

import json
import pickle
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import finetune as finetuning
import pretrain as pretraining
from data import DataFolder, InputError, Request, Task, load_table, open_folder, prepare
from data import read_json, read_metadata, save_array
from finetune import Predictor, finetune, load_logits, start_of
from material import on_cpu, prepared_folder, pretrain_run, small_tokenizer
from material import tables_of, write_articles
from pretrain import PRESETS, is_out_of_memory, load_checkpoint
from tokenizer import full_disk_named, save_tokenizer

STEPS = [1, 2, 3, 4, 5, 6, 7, 8]
RECIPE = replace(PRESETS["smoke"], steps=8)
ROWS = [("river city", 0), ("king painter", 1)]
TASK = Task("two", ["a", "b"], ROWS * 8, [], ROWS)


@pytest.fixture
def save_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretraining, "SAVE_SECONDS", -1.0)


@pytest.fixture
def limit_files(capsys: pytest.CaptureFixture) -> Iterator[Callable]:
    """A function that lets no file grow beyond a size in bytes, as on a full disk."""
    resource = pytest.importorskip("resource")  # Unix
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int = before[0]) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield limit
    limit()


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and "lock" not in path.name]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# ---- a full disk ----


@pytest.mark.parametrize("writer, name", [("save", r"last\.pt"), ("log", r"log\.jsonl")])
def test_a_full_disk_costs_at_most_the_last_steps(
        corpus: DataFolder, tmp_path: Path, save_each_step: None, limit_files: Callable,
        monkeypatch: pytest.MonkeyPatch, writer: str, name: str) -> None:
    """The checkpoint before stays. With room again, the run ends as if nothing had happened, and
    nothing is left of a half-written or damaged log."""
    run = tmp_path / "pretrain/full"
    original = getattr(pretraining.Run, writer)
    calls = iter(range(1, 100))

    def write(*args, **more) -> None:
        if next(calls) == 4:
            limit_files((run / "log.jsonl").stat().st_size + 10)
        original(*args, **more)

    monkeypatch.setattr(pretraining.Run, writer, write)
    message = rf"no space left on the disk while writing .*{name} \(.*\)\. Free some"
    with pytest.raises(InputError, match=message):
        pretrain_run("bert-1", RECIPE, corpus, 0, tmp_path, name="full")
    limit_files()
    assert load_checkpoint(run)["step"] == 3
    assert not list(run.glob("*.tmp"))
    with open(run / "log.jsonl", "ab") as file:
        file.write(b'\xff\0{"step": 1}}\n{"loss": 1}\n[1]\n{"step": 99, "loss": 1}\n{"step": 1, "l')
    pretrain_run("bert-1", RECIPE, corpus, 0, tmp_path, name="full")
    straight = pretrain_run("bert-1", RECIPE, corpus, 0, tmp_path, name="straight")
    lines = (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines if "loss" in json.loads(line)] == STEPS
    weights = load_checkpoint(run)["model"]
    for key, expected in load_checkpoint(straight)["model"].items():
        assert torch.equal(weights[key], expected)


def test_a_signal_while_the_last_checkpoint_is_written(
        corpus: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint is complete, and the same command then trains nothing again."""
    original = pretraining.Run.save

    def save(run: pretraining.Run, state: object, model: object, optimizers: list) -> None:
        signal.raise_signal(signal.SIGINT)
        original(run, state, model, optimizers)

    monkeypatch.setattr(pretraining.Run, "save", save)
    with pytest.raises(SystemExit) as ended:
        pretrain_run("bert-1", RECIPE, corpus, 0, tmp_path, name="run")
    run = tmp_path / "pretrain/run"
    assert ended.value.code == 130
    assert load_checkpoint(run)["step"] == RECIPE.steps
    monkeypatch.undo()
    log = (run / "log.jsonl").read_bytes()
    pretrain_run("bert-1", RECIPE, corpus, 0, tmp_path, name="run")
    assert (run / "results.json").exists()
    assert (run / "log.jsonl").read_bytes() == log, "it was trained again"


def test_a_full_disk_keeps_the_folder_and_the_tokenizer_that_are_there(
        tmp_path: Path, limit_files: Callable) -> None:
    source = write_articles(tmp_path / "a.jsonl.gz", 150)
    prepared_folder(tmp_path / "data/old", source)
    save_tokenizer(small_tokenizer(), tmp_path / "data/own.model")
    before = contents(tmp_path)
    request = Request(articles=[str(source)], preset="smoke", count=140)
    for size in (0, 10, 100_000):  # the last is enough for tokenizer.vocab
        limit_files(size)
        for name in ("new", "old"):
            with pytest.raises(InputError, match="no space left"):
                prepare(tmp_path / "data" / name, request, fresh=name == "old")
    with pytest.raises(InputError, match="no space left"):
        save_tokenizer(small_tokenizer(190), tmp_path / "data/own.model")
    with pytest.raises(InputError, match="no space left"), full_disk_named("x.npy"):
        save_array(tmp_path / "x.npy", np.zeros(20_000))  # np.save does not say why it fails
    (tmp_path / "x.npy").unlink()
    after = contents(tmp_path)
    assert before.pop("data/own.vocab") and after.pop("data/own.vocab")  # for readers alone
    assert after == before


def test_a_folder_that_is_made_anew_is_never_lost(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even if Ctrl-C comes after the old one was put aside, before the new one has its name."""
    source = write_articles(tmp_path / "a.jsonl.gz", 60)
    place = prepared_folder(tmp_path / "data/x", source, vocab_size=150)
    before = open_folder(place).id
    request = Request(articles=[str(source)], preset="smoke", vocab_size=150)
    rename = Path.rename

    def interrupt(path: Path, target: Path) -> Path:
        if path.name == ".x.tmp":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare(place, replace(request, count=40), fresh=True)
    monkeypatch.undo()
    assert not place.exists()
    assert prepare(place, request).id == before
    assert [path.name for path in place.parent.iterdir() if path.suffix == ".tmp"] == []


# ---- hostile files ----


class Payload:
    """Unpickled without care, this makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder. Before it was made, a killed process had left a half-made one."""
    place = tmp_path_factory.mktemp("folders é")
    (place / "data/.x.tmp").mkdir(parents=True)
    (place / "data/.x.tmp/articles.bin").write_bytes(b"half")
    with pytest.raises(InputError, match="no data folder"):
        open_folder(place / "data/x")
    folder = prepared_folder(place / "data/x", write_articles(place / "a.jsonl.gz", 150))
    assert sorted(path.name for path in folder.parent.iterdir()) == [".x.lock", "x"]
    return folder


def test_a_pickle_is_not_executed(data_folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    payload = Payload(mark)
    pickle.loads(pickle.dumps(payload))
    assert mark.exists(), "the payload is harmless, so the test proves nothing"
    mark.unlink()
    checkpoint = {"step": 1, "model": payload, "optimizers": []}
    for zipped in (True, False):
        torch.save(checkpoint, tmp_path / "last.pt", _use_new_zipfile_serialization=zipped)
        with pytest.raises(InputError, match="last.pt: cannot be read .*delete it"):
            load_checkpoint(tmp_path)
    (tmp_path / "last.pt").write_bytes(pickle.dumps(checkpoint))
    with pytest.raises(InputError, match="last.pt: cannot be read .*delete it"):
        load_checkpoint(tmp_path)
    array = np.array([payload, 1], dtype=object)
    np.savez(tmp_path / "logits.npz", logits=array, labels=np.zeros(1))
    with pytest.raises(InputError, match="logits.npz: cannot be read"):
        load_logits(tmp_path)
    (tmp_path / "articles.bin").write_bytes(b"\2\0")
    np.save(tmp_path / "articles.npy", array, allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        load_table(tmp_path, "articles", read_metadata(data_folder))
    assert not mark.exists(), "a file was executed"


# ---- damaged files ----


def other_version(path: Path) -> bytes:
    """A sound file of the same kind that says something else."""
    if path.suffix == ".model":
        return small_tokenizer(190).model
    if path.suffix == ".json":
        return b'{"kind": "finetune", "config": {"new_setting": 1}}'
    if path.suffix == ".pt":
        torch.save({**torch.load(path, weights_only=True), "model": {"other": torch.ones(2)}}, path)
    return path.read_bytes().replace(b"logits", b"labels")


DAMAGES: dict[str, Callable[[Path], bytes]] = {
    "empty": lambda path: b"",
    "cut short": lambda path: path.read_bytes()[: path.stat().st_size // 2],
    "random bytes": lambda path: random.Random(0).randbytes(1000),
    "another version": other_version,
    "a list": lambda path: b"[1, 2]",
    "zip alone": lambda path: b"PK\x03\x04" + bytes(100),
    "deep": lambda path: b"[" * 100_000}


@pytest.fixture(scope="module")
def classifier(corpus: DataFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tuning run; ../../pretrain/run is its start, which has lost its results."""
    folder = tmp_path_factory.mktemp("runs é")
    start = start_of(pretrain_run("bert-1", RECIPE, corpus, 0, folder, name="run"))
    (folder / "pretrain/run/results.json").unlink()
    tables = tables_of(TASK, corpus)
    return finetune(tables, start, finetuning.PRESETS["smoke"], 0, on_cpu(folder))


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_of_a_run_are_named(classifier: Path, corpus: DataFolder,
                                          damage: str) -> None:
    """Whatever uses the file says which one it is and what to do."""
    runs = classifier.parent.parent
    uses: dict[Path, Callable[[], object]] = {
        classifier / "results.json": lambda: read_json(classifier / "results.json", "accuracy"),
        classifier / "logits.npz": lambda: load_logits(classifier),
        runs / "pretrain/run/last.pt":
            lambda: pretrain_run("bert-1", RECIPE, corpus, 0, runs, name="run")}
    for name in ("config.json", "last.pt", "tokenizer.model"):
        uses[classifier / name] = lambda: Predictor([classifier], on_cpu())
    for path, use in uses.items():
        valid = path.read_bytes()
        path.write_bytes(DAMAGES[damage](path))
        with pytest.raises(InputError, match="delete it|Train one with|train again") as error:
            use()
        assert str(path) in str(error.value)
        path.write_bytes(valid)
    Predictor([classifier], on_cpu())


def test_an_unfinished_classifier_is_not_used(classifier: Path, tmp_path: Path) -> None:
    unfinished = shutil.copytree(classifier, tmp_path / "run")
    (unfinished / "results.json").unlink()
    with pytest.raises(InputError, match="its training has not ended"):
        Predictor([unfinished], on_cpu())


@pytest.mark.parametrize("damage", ["empty", "cut short", "random bytes", "deep"])
def test_damaged_files_of_a_data_folder_are_named(data_folder: Path, damage: str) -> None:
    for path in sorted(data_folder.iterdir()):
        valid = path.read_bytes()
        path.write_bytes(DAMAGES[damage](path))
        with pytest.raises(InputError, match=f"{path.name}.*Make the folder again"):
            open_folder(data_folder)
        path.unlink()
        with pytest.raises(InputError, match="no data folder|is missing"):
            open_folder(data_folder)
        path.write_bytes(valid)
    open_folder(data_folder)


@pytest.mark.parametrize("change, message", [({"format": 0}, "of format 0"),
                                             ({"max_length": 16}, "dataset.json: was changed")])
def test_another_dataset_json_is_refused(data_folder: Path, tmp_path: Path, change: dict,
                                         message: str) -> None:
    text = json.dumps({**read_metadata(data_folder), **change})
    (tmp_path / "dataset.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        open_folder(tmp_path)


def test_two_at_once_make_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Each takes the lock; the second finds what the first has made."""
    source = write_articles(tmp_path / "a.jsonl.gz", 200)
    request = Request(articles=[str(source)], preset="smoke")
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: prepare(tmp_path / "data/x", request), range(2))
    assert first.id == second.id
    assert capsys.readouterr().out.count("x is there") == 1


# ---- numbers that go wrong ----


@pytest.mark.parametrize("steps", [1, 8, 250])
def test_weights_that_are_not_finite_are_never_saved(
        corpus: DataFolder, tmp_path: Path, save_each_step: None, steps: int) -> None:
    """After the first step the loss is still finite, and the weights are not."""
    recipe = replace(RECIPE, steps=steps, lr=1e39, warmup=0.0, clip=0.0)
    with pytest.raises(InputError, match="smaller lr .*or --dtype fp32"):
        pretrain_run("bert-1", recipe, corpus, 0, tmp_path, name="run")
    names = {path.name for path in (tmp_path / "pretrain/run").iterdir()}
    assert not names & {"last.pt", "results.json"}


def fail_at(call: int, function: Callable, error: Callable[[], object]) -> Callable:
    """The function, except that its n-th call is error(result)."""
    calls = iter(range(1, 10**6))

    def failing(*args, **more):
        result = function(*args, **more)
        return error(result) if next(calls) == call else result

    return failing


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(
        corpus: DataFolder, tmp_path: Path, save_each_step: None,
        monkeypatch: pytest.MonkeyPatch) -> None:
    """It is noticed at the next line of the log, here after every second step."""
    nan_once = fail_at(5, pretraining.F.cross_entropy, lambda loss: loss * float("nan"))
    monkeypatch.setattr(pretraining.F, "cross_entropy", nan_once)
    with pytest.raises(InputError, match="the loss is nan at step 6.*last good checkpoint is kept"):
        pretrain_run("bert-1", replace(RECIPE, steps=200), corpus, 0, tmp_path, name="run")
    state = load_checkpoint(tmp_path / "pretrain/run")
    assert state["step"] == 4
    assert all(weight.isfinite().all() for weight in state["model"].values())


def test_out_of_memory_names_the_flag_to_lower(
        corpus: DataFolder, tmp_path: Path, save_each_step: None,
        monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(result: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(pretraining, "mask_tokens", fail_at(4, pretraining.mask_tokens, exhausted))
    with pytest.raises(InputError, match="out of memory. Use a smaller batch_size.*--jobs"):
        pretrain_run("bert-1", replace(RECIPE, steps=200), corpus, 0, tmp_path, name="run")
    assert load_checkpoint(tmp_path / "pretrain/run")["step"] == 3


@pytest.mark.parametrize("error, expected", [
    (MemoryError(), True),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
    (RuntimeError("a bug"), False)])
def test_only_short_memory_is_called_so(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


def test_every_text_has_a_token_to_attend_to(classifier: Path) -> None:
    """Each text begins with [CLS], also an empty one, so probabilities are finite."""
    predictor = Predictor([classifier], on_cpu())
    for text in ("", " ", "\u2603", "\0", "\ud800", "word " * 100):
        assert sum(predictor(text)["probabilities"].values()) == pytest.approx(1, abs=1e-5)
