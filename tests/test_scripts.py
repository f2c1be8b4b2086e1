"""The six scripts as their user starts them: the smoke preset, no network. Most commands call
main() in this process; a few are processes of their own."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from finetune import Predictor
from material import articles, on_cpu, prepared_folder, write_articles, write_raw_folder
from material import write_task_file
from tokenizer import run_script

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["tokenizer", "data", "model", "pretrain", "finetune", "committee"]
EXTRAS = ["transformers", "tokenizers", "safetensors", "google", "matplotlib", "sklearn",
          "hypothesis", "pytest", "pip"]  # packages that the scripts do without
TEXT = "bridge number 3 crosses brazil today"


def call(script: str, words: list[str]) -> tuple[int, str]:
    """Run a script's main() in this process: its exit status, and what it printed."""
    shown = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(shown), \
            contextlib.redirect_stderr(shown):
        patch.setattr("sys.argv", [f"{script}.py", *words])
        patch.setenv("https_proxy", "http://127.0.0.1:9")  # the network fails at once
        try:
            run_script(importlib.import_module(script).main)
        except SystemExit as end:
            return end.code or 0, shown.getvalue()
    return 0, shown.getvalue()


def run(script: str, *arguments: object, status: int = 0) -> str:
    """What a script prints, which must end with this exit status."""
    ended, shown = call(script, list(map(str, arguments)))
    assert ended == status, shown
    return shown


def start(script: str, *arguments: object) -> subprocess.Popen:
    """Start a script as a process, far from its folder, where no extra package can be imported."""
    command = [sys.executable, str(ROOT / f"{script}.py"), *map(str, arguments)]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data folders "own" and "tasks", and what they were made from."""
    folder = tmp_path_factory.mktemp("material with blanks é")
    source = write_articles(folder / "wiki.jsonl.gz", 150)
    write_raw_folder(folder / "raw")
    labels = [write_task_file(folder / "train.csv"), write_task_file(folder / "test.csv", 10, 1)]
    prepared_folder(folder / "data/own", source, labels)
    prepared_folder(folder / "data/tasks", source, task=("fewrel", "dbpedia"), test_per_class=4,
                    raw_dir=folder / "raw")
    return folder


def flags(folder: Path, data: str = "own") -> list[str]:
    data_folder = str(folder / "data" / data)
    return ["--preset", "smoke", "--data", data_folder, "--runs-dir", str(folder / "runs")]


@pytest.fixture(scope="module")
def pretrained(material: Path) -> Path:
    shown = run("pretrain", *flags(material), "--name", "first")
    assert "unigram baseline" in shown and "held-out loss" in shown
    return material / "runs/pretrain/first"


@pytest.fixture(scope="module")
def committee(material: Path) -> Path:
    """A committee of two for the task of the folder "own"."""
    shown = run("committee", *flags(material), "--members", "2", "--deep", "none", "--jobs", "1")
    assert "own: 3 classes" in shown and "bert-6" not in shown
    return Path(re.search(r"(\S.*)results\.json written", shown)[1])


def accuracy_from_scratch(shown: str) -> float:
    return float(re.search(r"from scratch +([\d.]+) %", shown)[1])


def trained_runs(material: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (material / "runs").rglob("last.pt")}


# ---- single scripts ----


def test_pretrain_and_finetune(material: Path, pretrained: Path) -> None:
    names = {path.name for path in pretrained.iterdir()}
    assert names >= {"config.json", "log.jsonl", "last.pt", "tokenizer.model", "results.json"}
    shown = run("pretrain", "--fill-mask", "the [MASK] of france", pretrained)
    assert re.search(r"\S+ 0\.\d{3}  ", shown)
    shown = run("finetune", *flags(material), "--checkpoint", pretrained, "--seeds", "2",
                "--set", "epochs=2", "--confusion")
    assert re.search(r"largest class +33.3 %\n +logistic regression +\d+", shown)
    assert re.search(r"bert-1 pre-trained +[\d.]+ %, .* over 2 fine-tuning seeds", shown)
    pair = r"^  (\w+) taken for (?!\1)\w+: \d+ of 10 test rows\n {6}\w+ number 1\d{3} \w+ \1 today"
    assert re.search(pair, shown, flags=re.M), shown
    (folder,) = (material / "runs/finetune").glob("own-first-seed0-*")
    with np.load(folder / "logits.npz") as file:
        wrong = int((file["logits"].argmax(1) != file["labels"]).sum())
    counts = [int(count) for count in re.findall(r"taken for \w+: (\d+) of", shown)]
    assert counts == sorted(counts, reverse=True)
    assert sum(counts) <= wrong <= sum(counts) + counts[-1]  # five of the six pairs are shown
    dev = run("finetune", *flags(material), "--split", "dev", "--confusion")
    assert "of 2 dev rows" in dev  # a tenth of twenty rows of a class


def test_a_checkpoint_is_known_by_its_weights(material: Path) -> None:
    """If it is trained again under the same name, fine-tuning begins anew as well."""
    checkpoint = material / "runs/pretrain/weights"
    run("pretrain", *flags(material), "--name", "weights", "--set", "steps=2")
    counts = []
    for change in (0, 0, 1):
        saved = torch.load(checkpoint / "last.pt", weights_only=True)
        saved["model"]["norm.bias"] += change
        torch.save(saved, checkpoint / "last.pt")
        run("finetune", *flags(material), "--checkpoint", checkpoint, "--set", "steps=2")
        counts.append(len(list((material / "runs/finetune").glob("own-weights-*"))))
    assert counts == [1, 1, 2]


def test_marked_entities_tell_what_the_words_do_not(material: Path) -> None:
    """Two classes of the same words: which of the two countries is the head?"""
    for part, count in (("train", 40), ("test", 20)):
        lines = ["label,text"]
        for i in range(count * count, count * count + count):
            lines += [f"france,from [# france #] to [@ japan @] by river {i}",
                      f"france,from [@ japan @] to [# france #] by river {i}",
                      f"japan,from [# japan #] to [@ france @] by river {i}",
                      f"japan,from [@ france @] to [# japan #] by river {i}"]
        (material / f"head-{part}.csv").write_text("\n".join(lines), encoding="utf-8")
    labels = [material / "head-train.csv", material / "head-test.csv"]
    prepared_folder(material / "data/head", material / "wiki.jsonl.gz", labels)
    shown = run("finetune", *flags(material, "head"), "--set", "epochs=15", "pooling=entities",
                "per_class=100")
    assert accuracy_from_scratch(shown) > 95
    (folder,) = (material / "runs/finetune").glob("head-scratch-*")
    shown = run("finetune", "--predict", "from [# france #] to [@ japan @]", folder)
    assert json.loads(shown)["label"] == "france"
    for text in ("japan", "[# japan #] to france", "from [@ japan @]"):
        shown = run("finetune", "--predict", text, folder, status=2)
        assert f"one is missing in '{text}'" in shown


def test_another_script_than_latin_is_learnt(material: Path) -> None:
    """README's walk through one's own data, with Greek texts, class names and file names."""
    greek_letters = "αβψδεφγηιξκλμνοπρστθωςχυζ"
    greek = str.maketrans("abcdefghijklmnoprstuvwxyz", greek_letters)
    texts = [article["text"].lower().translate(greek) for article in articles(150)]
    (material / "ελληνικά.txt").write_text("\n\n".join(texts), encoding="utf-8")
    labels = []
    for name in ("train.csv", "test.csv"):
        rows = (material / name).read_text(encoding="utf-8").translate(greek).split("\n", 1)[1]
        labels.append(material / f"ελλ-{name}")
        labels[-1].write_text(f"label,text\n{rows}", encoding="utf-8")
    run("data", "prepare", material / "data/ελλ", "--preset", "smoke", "--articles",
        material / "ελληνικά.txt", "--labels", *labels)
    shown = run("finetune", *flags(material, "ελλ"), "--set", "epochs=15", "pooling=mean",
                "per_class=20")
    assert accuracy_from_scratch(shown) > 80  # so the letters did not become [UNK]
    (folder,) = (material / "runs/finetune").glob("ελλ-scratch-*")
    answer = Predictor([folder], on_cpu())(TEXT.translate(greek))
    assert answer["label"] == "brazil".translate(greek)


def test_a_checkpoint_finds_its_folder_and_refuses_another(material: Path, tmp_path: Path) -> None:
    """finetune.py reads the folder that the checkpoint was trained on, if it is unchanged."""
    place = tmp_path / "data/x"
    prepared_folder(place, material / "wiki.jsonl.gz", [material / "train.csv"])
    common = ["--preset", "smoke", "--runs-dir", tmp_path / "runs"]
    run("pretrain", *common, "--data", place, "--name", "first", "--max-articles", "9")
    use = ["finetune", *common, "--no-scratch", "--checkpoint", tmp_path / "runs/pretrain/first"]
    assert "x: 3 classes" in run(*use)
    foreign = prepared_folder(tmp_path / "data/foreign", material / "wiki.jsonl.gz", vocab_size=200)
    assert "its tokenizer is not that of" in run(*use, "--data", foreign, status=2)
    labels = prepared_folder(tmp_path / "data/labels", labels=[material / "test.csv"],
                             tokenizer=place / "tokenizer.model")
    shown = run(*use, "--data", labels)
    assert "labels: 3 classes" in shown and "may hold test texts" in shown
    assert "from scratch" not in shown
    assert "holds 0 articles" in run("pretrain", *common, "--data", labels, status=2)
    other = write_articles(tmp_path / "other.jsonl.gz", 150, seed=8)
    run("data", "prepare", place, "--preset", "smoke", "--articles", other, "--fresh")
    assert "was made again" in run(*use, status=2)
    shown = run("pretrain", *common, "--data", place, "--name", "first", status=2)
    assert "made with other settings" in shown


# ---- the whole job ----


def test_the_committee_script(material: Path) -> None:
    """Tables, results.json and latency; the same command again trains nothing."""
    command = ["committee", *flags(material, "tasks"), "--member-model", "bert-1", "bert-1-conv2",
               "--jobs", "1", "--set", "steps=2"]
    shown = run(*command)
    for line in ("committee of 2 bert-1+bert-1-conv2", "bert-6: pre-training gives",
                 "latency, a text of fewrel"):
        assert line in shown
    path = Path(re.search(r"(\S.*results\.json) written", shown)[1])
    record = json.loads(path.read_text(encoding="utf-8"))
    assert {"command", "machine", "versions", "git", "seconds", "settings"} <= set(record)
    assert list(record["tasks"]) == ["fewrel", "dbpedia"]
    for part in record["tasks"].values():
        assert set(part["table"]) == {"bert-6", "bert-1, one member", "bert-1-conv2, one member",
                                      "committee of 2 bert-1+bert-1-conv2"}
    assert {"p10", "median", "p90"} <= set(record["latency_ms"]["committee of 2"])
    before = trained_runs(material)
    again = run(*command)
    assert trained_runs(material) == before, "something was trained again"
    first, second = (re.findall(r"^(?:bert-|committee of).*[)]$", text, flags=re.M)
                     for text in (shown, again))
    assert len(first) >= 8 and first == second


def test_a_committee_predicts_the_mean_of_its_members(material: Path, committee: Path) -> None:
    voted = json.loads(run("committee", "--predict", TEXT, committee))["probabilities"]
    record = json.loads((committee / "results.json").read_text(encoding="utf-8"))
    voters = []
    for name in record["tasks"]["own"]["voters"]:
        predictor = Predictor([material / "runs/finetune" / name], on_cpu())
        voters.append(predictor(TEXT)["probabilities"])
    assert len(voters) == 2
    for label, probability in voted.items():
        mean = (voters[0][label] + voters[1][label]) / 2
        assert probability == pytest.approx(mean, abs=2e-4)
    shown = run("committee", "--predict", TEXT, committee, "--task", "agnews", status=2)
    assert "no committee for task 'agnews'" in shown


def test_one_process_or_two_give_the_same_table(material: Path, tmp_path: Path) -> None:
    """Also: the default data folder is made from the raw folder."""
    run("data", "prepare", material / "data/default", "--preset", "smoke", "--task", "topics",
        "--raw-dir", material / "raw")
    tables = []
    for jobs in ("1", "2"):
        shown = run("committee", *flags(material, "default"), "--runs-dir", tmp_path / jobs,
                    "--members", "2", "--deep", "none", "--jobs", jobs)
        tables.append(re.search("^topics: 3 .*?(?=^latency)", shown, flags=re.M | re.S)[0])
    assert "2 models, 2 at a time" in shown
    assert tables[0] == tables[1]


# ---- processes ----


def test_every_script_runs_as_a_process_without_extra_packages(
        material: Path, pretrained: Path, committee: Path, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    """All from another folder and at the same time."""
    for name in EXTRAS:
        (tmp_path / f"{name}.py").write_text("raise ImportError('extra package')", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (classifier, *_) = (material / "runs/finetune").glob("own-bert-1-*")
    processes = {
        "CC BY-SA 4.0": start("data"),
        "[SEP]": start("tokenizer", "--model", pretrained / "tokenizer.model", "--show", "a city"),
        "parameters in all": start("model", "--width", "64"),
        "p(label)": start("pretrain", "--show", "the river of france", pretrained),
        '"label"': start("finetune", "--predict", TEXT, classifier),
        '"cut_off"': start("committee", "--predict", TEXT, committee)}
    for expected, process in processes.items():
        out, err = process.communicate(timeout=240)
        assert (process.returncode, err) == (0, b""), err
        assert expected in out.decode("utf-8")


def test_texts_from_standard_input(committee: Path, material: Path) -> None:
    """UTF-8 whatever the terminal's encoding is; a wrong byte ends it in one line, status 2."""
    (classifier, *_) = (material / "runs/finetune").glob("own-bert-1-*")
    process = start("finetune", "--predict", "-", classifier)
    lines = "one\r\n\nthree\x0cé\rשלום עולם\n".encode() + b"k\xe4se\n"
    out, err = process.communicate(lines, timeout=240)
    answers = [json.loads(line) for line in out.decode("utf-8").splitlines()]
    assert [answer["text"] for answer in answers] == ["one", "", "three\x0cé", "שלום עולם"]
    assert [answer["unknown"] > 0.5 for answer in answers] == [False, False, False, True]
    warning, error = err.decode("utf-8").splitlines()
    assert warning.startswith("warning: the tokenizer does not know most of this text")
    assert error.startswith("error: standard input, line 5: byte 0xe4 is not UTF-8 text")
    assert process.returncode == 2


def test_a_reader_that_has_enough_ends_a_script_in_silence(pretrained: Path) -> None:
    """As `| head` does."""
    model = pretrained / "tokenizer.model"
    process = start("tokenizer", "--model", model, "--show", "river of japan " * 2_000)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 1


def test_bad_input_in_a_process_of_a_committee(
        material: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    run("committee", *flags(material), "--runs-dir", tmp_path, "--jobs", "2", "--members", "2",
        "--deep", "none", "--set", "lr=900", "warmup=0", "clip=0", "steps=40", status=2)
    err = capfd.readouterr().err
    assert "smaller lr" in err
    assert 1 <= err.count("error: ") <= 2  # both may fail before the first one stops the other
    assert "Traceback" not in err


# ---- bad input ----

NEW = ["data", "prepare", "NEW", "--preset", "smoke", "--articles"]
PRETRAIN = ["pretrain", "--runs-dir", "RUNS", "--data", "OWN"]
FINETUNE = ["finetune", "--runs-dir", "RUNS", "--data", "OWN"]
COMMITTEE = ["committee", "--preset", "smoke", "--runs-dir", "RUNS", "--data", "OWN"]


@pytest.mark.parametrize("arguments, message", [
    (["tokenizer", "--model", "NEW", "--train", "TRAIN"], "train.csv: article files end in"),
    (["tokenizer", "--model", "NEW", "--train", "WIKI", "--vocab-size", "60000"],
     "no tokenizer of --vocab-size 60000 could be trained on these texts: Vocabulary size"),
    ([*NEW, "no-such-file.txt"], "--articles no-such-file.txt: no such file"),
    ([*NEW, "WIKI", "--wiki", "simplewiki"], "--wiki: not allowed with argument --articles"),
    ([*NEW, "WIKI", "--labels", "TRAIN", "TRAIN", "TRAIN"], "at most one test file"),
    ([*NEW, "WIKI", "--task", "fewrell"], "did you mean fewrel?"),
    ([*NEW, "WIKI", "--max-length", "3"], "--max-length 3: must lie in"),
    (["data", "prepare", "--articles", "WIKI"], "give the folder a name"),
    (["data", "select", "OWN", "NEW", "--clean"], "Name one with --task"),
    (["pretrain", "--data", "RAW"], "no data folder"),
    (["pretrain", "--data", "OWN", "--runs-dir", "TRAIN"], "Choose another path"),
    ([*PRETRAIN, "--set", "width=100"], "width 100 is not a multiple of 64"),
    ([*PRETRAIN, "--set", "stepps=1"], "did you mean steps?"),
    ([*PRETRAIN, "--max-articles", "9999"], "--max-articles is 9999"),
    ([*PRETRAIN, "--device", "cuda:99"], "Use --device cpu"),
    ([*PRETRAIN, "--device", "gpu"], "--device gpu: no such device here"),
    ([*PRETRAIN, "--sede", "1"], "did you mean --seed?"),
    (["finetune", "--checkpoint", "nowhere"], "config.json: cannot be read"),
    (["finetune", "--predict", "x"], "--predict: name a finished run"),
    ([*FINETUNE, "--task", "agnews"], "has no task 'agnews'"),
    ([*FINETUNE, "--no-scratch"], "there is nothing else to train"),
    (["finetune", "--checkpoint", "x", "--model", "bert-6"], "a checkpoint has its own model"),
    ([*COMMITTEE, "--members", "1", "--member-model", "bert-1", "bert-1-wide"],
     "2 models and 1 members"),
    ([*COMMITTEE, "--deep", "bert-1"], "is a member too"),
    ([*COMMITTEE, "--finetune-set", "pooling=entities"], "task own: pooling=entities reads two"),
    (["model", "--model", "bert-7"], "did you mean bert-6?"),
])
def test_bad_input_is_one_line_and_status_2(material: Path, arguments: list[str],
                                            message: str) -> None:
    names = {"WIKI": "wiki.jsonl.gz", "TRAIN": "train.csv", "RAW": "raw",
             "OWN": "data/own", "NEW": "data/bad", "RUNS": "bad runs"}
    words = [material / names[word] if word in names else word for word in arguments]
    shown = run(*words, status=2)
    assert message in shown
    assert len(re.findall("^error: ", shown, flags=re.M)) == 1
    assert not (material / "data/bad").exists()
    assert not list((material / "data").glob(".*.tmp"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_short_and_says_what_the_script_does(script: str) -> None:
    lines = run(script, "--help").splitlines()
    assert len(lines) <= 80
    assert any(line.startswith(f"{script}.py - ") for line in lines)
