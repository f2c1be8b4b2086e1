"""Every script as its user starts it: a subprocess, the smoke preset, no network."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from finetune import Predictor
from material import articles, write_articles, prepared_folder, write_raw_folder, write_task_file
from pretrain import choose_runtime

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: str | Path, status: int = 0) -> str:
    """Run a script of the repository from another folder; returns what it printed."""
    # a proxy that leads nowhere: whatever reaches for the network fails at once
    environment = {**os.environ, "https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9", "OMP_NUM_THREADS": "1"}
    script, *rest = map(str, arguments)
    result = subprocess.run([sys.executable, str(ROOT / script), *rest], capture_output=True, text=True, encoding="utf-8",
                            env=environment, timeout=240, check=False)
    assert result.returncode == status, result.stdout + result.stderr
    assert "Traceback" not in result.stderr, result.stderr
    return result.stdout + (result.stderr if status else "")


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material with blanks é")
    write_articles(folder / "wiki.jsonl.gz", 150)
    write_raw_folder(folder / "raw")
    write_task_file(folder / "train.csv", 20)
    write_task_file(folder / "test.csv", 10, seed=1)
    prepared_folder(folder / "data/own", folder / "wiki.jsonl.gz", [folder / "train.csv", folder / "test.csv"])
    prepared_folder(folder / "data/tasks", folder / "wiki.jsonl.gz", task=("fewrel", "dbpedia"), raw_dir=folder / "raw", test_per_class=4)
    return folder


def sources(folder: Path, data: str = "own") -> list[str]:
    return ["--preset", "smoke", "--data", str(folder / "data" / data), "--runs-dir", str(folder / "runs")]


def test_tokenizer_script(material: Path) -> None:
    text = material / "plain.txt"
    text.write_text("a river of france and a city of japan\n" * 50 + "another engine there\n" * 20, encoding="utf-8")
    model = material / "own.model"
    run("tokenizer.py", "--train", text, "--model", model, "--vocab-size", "28")
    shown = run("tokenizer.py", "--model", model, "--show", "River of Japan")
    ids = re.findall(r"^ *(\d+)", shown, flags=re.M)
    assert ids[0] == "2" and ids[-1] == "3"
    assert run("tokenizer.py", "--model", model, "--decode", *ids).strip() == "river of japan"
    process = subprocess.Popen([sys.executable, str(ROOT / "tokenizer.py"), "--model", str(model), "--show", "river of japan " * 2_000],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()  # as `| head` does
    assert process.stderr.read() == "" and process.wait() == 1
    assert "[MASK]" in model.with_suffix(".vocab").read_text(encoding="utf-8")
    assert run("tokenizer.py", "--train", text, "--model", model, "--vocab-size", "9000", status=2).splitlines()[-1].startswith("error: no tokenizer of --vocab-size 9000")


def test_pretrain_and_finetune_scripts(material: Path) -> None:
    out = run("pretrain.py", *sources(material), "--model", "bert-1", "--name", "first")
    assert "unigram baseline" in out and "held-out loss" in out
    folder = material / "runs/pretrain/first"
    assert {p.name for p in folder.iterdir()} >= {"config.json", "log.jsonl", "last.pt", "tokenizer.model", "results.json"}
    assert re.search(r"\S+ 0\.\d{3}  ", run("pretrain.py", "--fill-mask", "the [MASK] of france", folder))
    out = run("finetune.py", *sources(material), "--checkpoint", folder,
              "--seeds", "2", "--set", "epochs=2", "--confusion")
    assert re.search(r"^  (\w+) taken for (?!\1)\w+: \d+ of 10 test rows\n {6}\w+ number 1\d{3} \w+ \1 today", out, flags=re.M), out
    with np.load(next((material / "runs/finetune").glob("own-first-seed0-*")) / "logits.npz") as file:
        wrong = int((file["logits"].argmax(1) != file["labels"]).sum())
    counts = [int(n) for n in re.findall(r"taken for \w+: (\d+) of", out)]
    assert counts == sorted(counts, reverse=True) and sum(counts) <= wrong <= sum(counts) + counts[-1]  # of 6 pairs, 5 are shown
    assert re.search(r"largest class +33.3 %\n +logistic regression +\d+", out) and "training rows a class" in out
    assert re.search(r"bert-1 pre-trained +[\d.]+ %, -?[\d.]+ to [\d.]+ .95 % t-interval over 2 fine-tuning seeds", out)
    run_folder = next((material / "runs/finetune").glob("own-first-seed0-*"))
    answer = json.loads(run("finetune.py", "--predict", "a city in japan", run_folder))
    assert answer["label"] in ("brazil", "france", "japan") and sum(answer["probabilities"].values()) == pytest.approx(1, abs=1e-3)
    predict = [sys.executable, str(ROOT / "finetune.py"), "--predict", "-", str(run_folder)]
    shown = subprocess.run(predict, check=True, input="one\r\n\nthree\x0cé\rשלום עולם".encode(), capture_output=True,
                           env={**os.environ, "PYTHONIOENCODING": "ascii"})
    answers = [json.loads(line) for line in shown.stdout.decode("utf-8").splitlines()]  # whatever the terminal's encoding
    assert [a["text"] for a in answers] == ["one", "", "three\x0cé", "שלום עולם"]
    assert [a["unknown"] > 0.5 for a in answers] == [False, False, False, True] and b"warning: the tokenizer does not know" in shown.stderr
    shown = subprocess.run(predict, input="one\nk\xe4se\n".encode("latin-1"), capture_output=True, check=False)
    assert shown.returncode == 2 and b"error: standard input, line 2: byte 0xe4 is not UTF-8 text" in shown.stderr


def test_a_checkpoint_is_known_by_its_weights(material: Path) -> None:
    """Trained again with changed code under the same name, it is another start; named twice, no second seed."""
    folder = material / "runs/pretrain/weights"
    run("pretrain.py", *sources(material), "--name", "weights", "--set", "steps=2")
    def tested() -> set[Path]:
        out = run("finetune.py", *sources(material), "--checkpoint", folder, "--set", "steps=2")
        assert "error" not in out
        return set((material / "runs/finetune").glob("own-weights-*"))
    assert len(before := tested()) == 1 and tested() == before
    saved = torch.load(folder / "last.pt", weights_only=True)
    saved["model"]["norm.bias"] += 1
    torch.save(saved, folder / "last.pt")
    assert len(tested()) == 2
    twice = run("finetune.py", *sources(material), "--checkpoint", folder, folder, status=2)
    assert "two have the same seed" in twice


def test_from_scratch_a_learnable_task_is_learnt(material: Path) -> None:
    out = run("finetune.py", *sources(material), "--model", "bert-1",
              "--set", "epochs=15", "pooling=mean", "per_class=20")
    assert float(re.search(r"from scratch +([\d.]+) %", out)[1]) > 80


def test_marked_entities_tell_what_the_words_do_not(material: Path) -> None:
    """Two classes of the same words: which of the two countries is the head?"""
    for part, n in (("train", 40), ("test", 20)):
        rows = [f'{head},"from {a} to {b} by river {n * i}"\n' for i in range(n)
                for head, ends in (("france", ("[# france #]", "[@ japan @]")), ("japan", ("[@ france @]", "[# japan #]")))
                for a, b in (ends, ends[::-1])]
        (material / f"head-{part}.csv").write_text("".join(["label,text\n", *rows]), encoding="utf-8")
    prepared_folder(material / "data/head", material / "wiki.jsonl.gz", [material / "head-train.csv", material / "head-test.csv"])
    out = run("finetune.py", *sources(material, "head"), "--model", "bert-1", "--set", "epochs=15", "pooling=entities", "per_class=100")
    assert float(re.search(r"from scratch +([\d.]+) %", out)[1]) > 95
    (folder,) = (material / "runs/finetune").glob("head-scratch-*")
    for text, label in (("from [@ japan @] to [# france #] by river", "france"), ("from [@ france @] to [# japan #]", "japan")):
        assert json.loads(run("finetune.py", "--predict", text, folder))["label"] == label
    for text in ("japan", "[# japan #] to france", "from [@ japan @]"):
        assert f"not both are in '{text}'" in run("finetune.py", "--predict", text, folder, status=2)
    more = ["--task", "fewrel", "--deep", "none", "--members", "2", "--finetune-set", "pooling=entities"]
    assert "task fewrel: pooling=entities" in run("committee.py", *sources(material, "tasks"), *more, status=2)
    prepared_folder(material / "data/marked", material / "wiki.jsonl.gz", task=("fewrel",), raw_dir=material / "raw", entity_markers=True)
    assert "committee of 2 bert-1" in run("committee.py", *sources(material, "marked"), *more)


def test_another_script_than_latin(material: Path) -> None:
    """README's walk through one's own data, in Greek letters: a text file, a CSV with Greek class names, a prediction."""
    greek = str.maketrans("abcdefghijklmnopqrstuvwxyz", "αβψδεφγηιξκλμνοπχρστθωςχυζ")
    (material / "ελληνικά.txt").write_text("\n\n".join(a["text"].lower().translate(greek) for a in articles(150)), encoding="utf-8")
    for name in ("train.csv", "test.csv"):
        head, _, rows = (material / name).read_text(encoding="utf-8").partition("\n")
        (material / f"ελλ-{name}").write_text(f"{head}\n{rows.translate(greek)}", encoding="utf-8")
    run("data.py", "prepare", material / "data/ελλ", "--preset", "smoke", "--articles", material / "ελληνικά.txt", "--labels",
        material / "ελλ-train.csv", material / "ελλ-test.csv")
    out = run("finetune.py", *sources(material, "ελλ"), "--set", "epochs=15", "pooling=mean", "per_class=20")
    (folder,) = (material / "runs/finetune").glob("ελλ-scratch-*")
    answer = Predictor([folder], choose_runtime("cpu"))("river number 3 crosses brazil today".translate(greek))["probabilities"]
    assert next(iter(answer)) == "brazil".translate(greek) and len(answer) == 3
    assert float(re.search(r"from scratch +([\d.]+) %", out)[1]) > 80  # so the letters did not become [UNK]


def test_committee_script(material: Path) -> None:
    command = ["committee.py", *sources(material, "tasks"), "--member-model", "bert-1", "bert-1-conv2", "--seeds", "2"]
    out = run(*command)
    for line in ("committee of 2 bert-1+bert-1-conv2", "bert-6: pre-training gives", "latency, a text of fewrel"):
        assert line in out
    path = Path(re.search(r"(\S.*results\.json) written", out)[1])
    record = json.loads(path.read_text(encoding="utf-8"))
    assert {"command", "machine", "versions", "git", "seconds", "settings", "tasks", "latency_ms"} <= set(record)
    for part in record["tasks"].values():
        counts = {label: len(row["accuracies"]["pre-trained"]) for label, row in part["table"].items()}
        assert counts == {"bert-6": 2, "bert-1, one member": 2, "bert-1-conv2, one member": 2, "committee of 2 bert-1+bert-1-conv2": 2}
        for row in part["table"].values():
            for kind in ("pre-trained", "from scratch"):
                assert row[kind]["mean"] == pytest.approx(100 * np.mean(row["accuracies"][kind]))
    assert {"p10", "median", "p90"} <= set(record["latency_ms"]["committee of 2"])
    assert "bert-1-conv2, one member" in record["latency_ms"]
    stamps = {p: p.stat().st_mtime_ns for p in (material / "runs").rglob("last.pt")}
    again = run(*command)
    assert stamps == {p: p.stat().st_mtime_ns for p in (material / "runs").rglob("last.pt")}, "something was trained again"
    tables = [re.findall(r"^(?:bert-|committee of).*[)]$", text, flags=re.M) for text in (out, again)]
    assert len(tables[0]) >= 8 and tables[0] == tables[1]


def test_embedded_default_from_the_raw_folder(material: Path) -> None:
    """In one process, and in two: with as many threads each, the same table."""
    run("data.py", "prepare", material / "data/default", "--preset", "smoke", "--task", "topics", "--raw-dir", material / "raw")
    shown = [run("committee.py", *sources(material, "default"), "--runs-dir", material / f"runs-default-{jobs}", "--members", "2", "--jobs", jobs)
             for jobs in ("1", "2")]
    assert "topics: 3 classes" in shown[0] and "3 models, 2 at a time" in shown[1]
    tables = [re.search(r"^topics: .*?(?=^latency)", text, flags=re.M | re.S)[0] for text in shown]
    assert tables[0] == tables[1]


def test_committee_without_a_deep_model(material: Path) -> None:
    """One cell of a study: some seeds of a shallow model, its gap, its committee."""
    out = run("committee.py", *sources(material, "tasks"), "--task", "fewrel", "--deep", "none", "--members", "2")
    record = json.loads(Path(re.search(r"(\S.*results\.json) written", out)[1]).read_text(encoding="utf-8"))
    table = record["tasks"]["fewrel"]["table"]
    assert "bert-6" not in out and set(table) == {"bert-1, one member", "committee of 2 bert-1"}
    assert len(table["bert-1, one member"]["accuracies"]["from scratch"]) == 2


def test_bad_input_in_a_process_of_its_own(material: Path) -> None:
    out = run("committee.py", *sources(material, "tasks"), "--task", "fewrel", "--jobs", "2",
              "--set", "lr=900", "warmup=0", "clip=0", "steps=40", status=2)
    assert "smaller lr" in out and 1 <= out.count("error: ") <= 2  # both may fail before the first one stops the other


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_a_signal_ends_all_processes_and_loses_nothing(material: Path) -> None:
    """SIGTERM to the first process alone; the same command then goes on and gives the table of an undisturbed run. Steps enough that the
    first process is still at work, some 5 s, when the second has begun."""
    def command(runs: str) -> list[str]:
        return ["committee.py", *sources(material, "tasks"), "--runs-dir", str(material / runs), "--task", "fewrel", "--set", "steps=1500", "--jobs", "2", "--members", "2", "--deep", "none"]

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, str(ROOT / "committee.py"), *command("halted")[1:]], env=environment, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    logs = material / "halted" / "pretrain"
    for _ in range(6000):
        if len(list(logs.glob("*/log.jsonl"))) == 2 and all(len(p.read_text(encoding="utf-8").splitlines()) > 3 for p in logs.glob("*/log.jsonl")):
            break
        time.sleep(0.01)
    process.terminate()
    out, err = process.communicate(timeout=120)
    assert process.returncode == 143 and err.count("stopped at step") == 2 and "Traceback" not in err, err
    steps = [torch.load(p, weights_only=True)["step"] for p in logs.glob("*/last.pt")]
    assert len(steps) == 2 and all(0 < step < 1500 for step in steps)
    tables = [re.search(r"^fewrel: .*?(?=^latency)", run(*command(runs)), flags=re.M | re.S)[0] for runs in ("halted", "straight")]
    assert tables[0] == tables[1]


def test_committee_on_a_file_of_ones_own(material: Path) -> None:
    out = run("committee.py", *sources(material), "--members", "2", "--deep", "none")
    assert "own: 3 classes" in out
    committee = Path(re.search(r"(\S.*)results\.json written", out)[1])
    text = "bridge number 3 crosses brazil today"
    voted = json.loads(run("committee.py", "--predict", text, committee))["probabilities"]
    names = json.loads((committee / "results.json").read_text(encoding="utf-8"))["tasks"]["own"]["voters"]
    voters = [Predictor([material / "runs/finetune" / name], choose_runtime("cpu"))(text)["probabilities"] for name in names]
    assert len(voters) == 2 and voted == {name: pytest.approx((voters[0][name] + voters[1][name]) / 2, abs=2e-4) for name in voted}
    assert "no committee for task 'agnews'" in run("committee.py", "--predict", text, committee, "--task", "agnews", status=2)


def test_a_checkpoint_finds_its_folder_and_refuses_another(material: Path, tmp_path: Path) -> None:
    """finetune.py reads the checkpoint's folder; another one needs the same tokenizer; one made anew with other text is refused."""
    place = tmp_path / "data/x"
    prepared_folder(place, material / "wiki.jsonl.gz", [material / "train.csv"])
    runs = ["--preset", "smoke", "--runs-dir", tmp_path / "runs"]
    run("pretrain.py", *runs, "--data", place, "--name", "first", "--set", "steps=2")
    checkpoint = tmp_path / "runs/pretrain/first"
    assert "x: 3 classes" in run("finetune.py", *runs, "--checkpoint", checkpoint, "--no-scratch")
    foreign = prepared_folder(tmp_path / "data/foreign", material / "wiki.jsonl.gz", [material / "train.csv"], vocab_size=200)
    assert "its tokenizer is not that of" in run("finetune.py", *runs, "--checkpoint", checkpoint, "--data", foreign, status=2)
    prepared_folder(tmp_path / "data/labels", labels=[material / "test.csv"], tokenizer=checkpoint / "tokenizer.model")
    out = run("finetune.py", *runs, "--checkpoint", checkpoint, "--data", tmp_path / "data/labels", "--no-scratch")
    assert "labels: 3 classes" in out and "may hold test texts" in out and "from scratch" not in out
    assert "holds 0 articles" in run("pretrain.py", *runs, "--data", tmp_path / "data/labels", status=2)
    write_articles(tmp_path / "other.jsonl.gz", 150, seed=8)
    run("data.py", "prepare", place, "--preset", "smoke", "--articles", tmp_path / "other.jsonl.gz", "--fresh")
    assert "was made again" in run("finetune.py", *runs, "--checkpoint", checkpoint, status=2)
    assert "made with other settings" in run("pretrain.py", *runs, "--data", place, "--name", "first", "--set", "steps=2", status=2)
    assert "has no task 'agnews'" in run("finetune.py", *runs, "--data", material / "data/own", "--task", "agnews", status=2)
    dev = run("finetune.py", *runs, "--data", material / "data/own", "--split", "dev", "--confusion")
    assert "of 2 dev rows" in dev  # a tenth of twenty rows a class


def test_data_script(material: Path, tmp_path: Path) -> None:
    out = run("data.py")
    assert "fewrel/train_wiki.json" in out and "CC BY-SA 4.0" in out
    command = ["data.py", "prepare", tmp_path / "x", "--preset", "smoke", "--articles", material / "wiki.jsonl.gz", "--labels", material / "train.csv"]
    first = run(*command)
    assert "task x: 3 classes" in first and "is there" in run(*command)
    assert "made otherwise (max_length 32 there, 24 now)" in run(*command, "--max-length", "24", status=2)
    assert "texts of 24 tokens" in run(*command, "--max-length", "24", "--fresh")
    assert "give the folder a name" in run("data.py", "prepare", "--articles", material / "wiki.jsonl.gz", status=2)
    selected = run("data.py", "select", material / "data/own", tmp_path / "high", "--overlap", "high", "--task", "own", "--count", "20")
    assert json.loads(selected[selected.index("{") :])["articles"] == 20
    assert "Name one with --task" in run("data.py", "select", material / "data/own", tmp_path / "clean", "--clean", status=2)
    out = run("pretrain.py", "--preset", "smoke", "--data", tmp_path / "high", "--runs-dir", tmp_path / "runs", "--max-articles", "9")
    assert "held-out loss" in out


PREPARE = ["data.py", "prepare", "NEW", "--preset", "smoke"]


@pytest.mark.parametrize("arguments, message", [
    ([*PREPARE, "--articles", "no-such-file.txt"], "no such file"),
    ([*PREPARE, "--articles", "ARTICLES", "--vocab-size", "60000"], "set it to a value <="),
    ([*PREPARE, "--articles", "PACKED"], "d.html: article files end in"),
    ([*PREPARE, "--articles", "ARTICLES", "--count", "9999"], "there are 150 distinct articles"),
    ([*PREPARE, "--articles", "ARTICLES", "--wiki", "simplewiki"], "--wiki: not allowed with argument --articles"),
    ([*PREPARE, "--articles", "ARTICLES", "--labels", "TRAIN", "TRAIN", "TRAIN"], "at most one test file"),
    ([*PREPARE, "--articles", "ARTICLES", "--labels", "ARTICLES"], "line 1"),
    ([*PREPARE, "--articles", "ARTICLES", "--task", "fewrell"], "did you mean fewrel?"),
    ([*PREPARE, "--articles", "ARTICLES", "--task", "fewrel", "--raw-dir", "RAW", "--train-per-class", "99"], "--min-class-size"),
    ([*PREPARE, "--articles", "ARTICLES", "--max-length", "3"], "--max-length 3: must lie in"),
    (["pretrain.py", "--data", "RAW"], "no data folder"),
    (["pretrain.py", "--data", "OWN", "--set", "width=100"], "width 100 is not a multiple of 64"),
    (["pretrain.py", "--data", "OWN", "--set", "optimizer=sgd"], "there are adamw and muon"),
    (["pretrain.py", "--data", "OWN", "--set", "batch_size=0"], "batch_size=0: must lie in"),
    (["pretrain.py", "--data", "OWN", "--set", "stepps=1"], "did you mean steps?"),
    (["pretrain.py", "--data", "OWN", "--max-articles", "9999"], "--max-articles is 9999"),
    (["pretrain.py", "--data", "OWN", "--device", "cuda"], "--device cpu"),
    (["pretrain.py", "--data", "OWN", "--device", "gpu"], "--device gpu: no such device here"),
    (["pretrain.py", "--sede", "1"], "did you mean --seed?"),
    (["finetune.py", "--checkpoint", "nowhere"], "nowhere"),
    (["finetune.py", "--predict", "x"], "--predict: name a finished run"),
    (["finetune.py", "--data", "OWN", "--no-scratch"], "there is nothing else to train"),
    (["finetune.py", "--checkpoint", "x", "--model", "bert-6"], "a checkpoint has its own model"),
    (["committee.py", "--data", "OWN", "--members", "1", "--member-model", "bert-1", "bert-1-wide"], "2 models and 1 members"),
    (["committee.py", "--data", "OWN", "--deep", "bert-1"], "is a member too"),
    (["committee.py", "--data", "OWN", "--finetune-set", "pooling=max"], "there are cls and mean and entities"),
    (["model.py", "--model", "bert-7"], "did you mean bert-6?"),
])
def test_bad_input_is_one_line_and_status_2(material: Path, arguments: list[str], message: str) -> None:
    names = {"ARTICLES": material / "wiki.jsonl.gz", "TRAIN": material / "train.csv", "RAW": material / "raw",
             "PACKED": material / "d.html", "OWN": material / "data/own", "NEW": material / "data/bad"}
    names["PACKED"].write_bytes(gzip.compress(b"<mediawiki></mediawiki>"))
    if message == "--device cpu" and __import__("torch").cuda.is_available():
        pytest.skip("there is a GPU")
    extra = [] if arguments[0] in ("data.py", "model.py") else ["--runs-dir", material / "runs"]
    out = run(*[names.get(a, a) for a in arguments], *extra, status=2)
    assert message in out
    assert len([line for line in out.splitlines() if line.startswith("error: ")]) == 1
    assert not (material / "data/bad").exists() and not list((material / "data").glob(".*.tmp"))
