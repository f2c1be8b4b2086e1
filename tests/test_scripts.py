"""Every script as its user starts it: a subprocess, the smoke preset, no network."""

from __future__ import annotations

import argparse
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

from data import load_tasks, text_key
from finetune import Predictor
from material import articles, write_articles, write_raw_folder, write_task_file
from pretrain import choose_hardware

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
    return folder


def sources(folder: Path) -> list[str]:
    return ["--preset", "smoke", "--articles", str(folder / "wiki.jsonl.gz"), "--raw-dir", str(folder / "raw"),
            "--runs-dir", str(folder / "runs")]


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
    assert run("tokenizer.py", "--train", text, "--model", model, "--vocab-size", "9000", status=2).startswith("error: --vocab-size 9000")


def test_pretrain_and_finetune_scripts(material: Path) -> None:
    out = run("pretrain.py", *sources(material), "--model", "bert-1", "--name", "first")
    assert "unigram baseline" in out and "held-out loss" in out
    folder = material / "runs/pretrain/first"
    assert {p.name for p in folder.iterdir()} >= {"config.json", "log.jsonl", "last.pt", "tokenizer.model", "results.json"}
    assert re.search(r"\S+ 0\.\d{3}  ", run("pretrain.py", "--fill-mask", "the [MASK] of france", folder))
    out = run("finetune.py", *sources(material), "--checkpoint", folder, "--task-file", material / "train.csv", material / "test.csv",
              "--seeds", "2", "--epochs", "2", "--plot", "--confusion")
    assert re.search(r"^  (\w+) taken for (?!\1)\w+: \d+ of 10 test rows\n {6}\w+ number 1\d{3} \w+ \1 today", out, flags=re.M), out
    with np.load(next((material / "runs/finetune").glob("train-first-seed0-*")) / "logits.npz") as file:
        wrong = int((file["logits"].argmax(1) != file["labels"]).sum())
    counts = [int(n) for n in re.findall(r"taken for \w+: (\d+) of", out)]
    assert counts == sorted(counts, reverse=True) and sum(counts) <= wrong <= sum(counts) + counts[-1]  # of 6 pairs, 5 are shown
    assert Path(re.search(r"(\S.*\.png) written", out)[1]).read_bytes().startswith(b"\x89PNG")
    assert re.search(r"train bert-1-\w{4} pre-trained: accuracy .* ± ", out) and "95 % t-interval over 2 fine-tuning seeds" in out
    run_folder = next((material / "runs/finetune").glob("train-first-seed0-*"))
    answer = json.loads(run("finetune.py", "--predict", "a city in japan", run_folder))
    assert answer["label"] in ("brazil", "france", "japan") and sum(answer["probabilities"].values()) == pytest.approx(1, abs=1e-3)
    (material / "lines.txt").write_text("one\n\nthree\x0cé\n", encoding="utf-8")
    answers = [json.loads(line) for line in run("finetune.py", "--predict-file", material / "lines.txt", run_folder).splitlines()]
    assert [a["text"] for a in answers] == ["one", "", "three\x0cé"]
    shown = subprocess.run([sys.executable, str(ROOT / "finetune.py"), "--predict-file", "-", str(run_folder)], check=True,
                           input="one\n\nthree\x0cé\n".encode(), capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert [json.loads(line) for line in shown.stdout.decode("utf-8").splitlines()] == answers  # whatever the terminal's encoding


def test_any_max_length(material: Path) -> None:
    """Texts are padded to multiples of 8, but never to more than a model has positions."""
    common = [*sources(material), "--max-length", "13"]
    out = run("committee.py", *common, "--task-file", material / "train.csv", material / "test.csv", "--members", "2", "--deep", "none")
    assert "committee of 2" in out
    trained = next((material / "runs/finetune").glob("train-bert-1-*-*"))
    assert json.loads((trained / "config.json").read_text(encoding="utf-8"))["config"]["max_length"] == 13
    assert '"label"' in run("finetune.py", "--predict", "a river of france and a city of japan " * 9, trained)


def test_test_texts_that_a_run_may_have_read_are_told(material: Path) -> None:
    common = ["--preset", "smoke", "--raw-dir", material / "raw", "--runs-dir", material / "runs-kept", "--task", "topics"]
    few, many, none = ["--test-per-class", "4"], ["--test-per-class", "8"], ["--no-scratch", "--steps", "2"]
    for name, flags in (("few", few), ("other", ["--task", "fewrel", "--test-per-class", "4", "--train-per-class", "5"])):
        run("pretrain.py", *common, *flags, "--name", name, "--steps", "2")
    told = {(name, rows[1]): re.findall(r"note: (\d+) test texts of topics may be", run(
        "finetune.py", *common, *rows, *none, "--checkpoint", material / "runs-kept/pretrain" / name))
        for name, rows in (("few", few), ("few", many), ("other", few))}
    assert told[("few", "4")] == [] and told[("other", "4")] == ["12"] and 0 < int(told[("few", "8")][0]) <= 24
    run("pretrain.py", *common, *many, "--name", "few", "--steps", "2", "--fresh")
    assert "may be" not in run("finetune.py", *common, *many, *none, "--checkpoint", material / "runs-kept/pretrain/few")


def test_a_checkpoint_is_known_by_its_weights(material: Path) -> None:
    """Trained again with changed code under the same name, it is another start; named twice, no second seed."""
    folder = material / "runs/pretrain/weights"
    run("pretrain.py", *sources(material), "--name", "weights", "--steps", "2")
    def tested() -> set[Path]:
        out = run("finetune.py", *sources(material), "--checkpoint", folder, "--task-file", material / "train.csv", "--steps", "2")
        assert "note: --articles: without effect" in out
        return set((material / "runs/finetune").glob("train-weights-*"))
    assert len(before := tested()) == 1 and tested() == before
    saved = torch.load(folder / "last.pt", weights_only=True)
    saved["model"]["norm.bias"] += 1
    torch.save(saved, folder / "last.pt")
    assert len(tested()) == 2
    twice = run("finetune.py", *sources(material), "--checkpoint", folder, folder, "--task-file", material / "train.csv", status=2)
    assert "the same model, text and seed" in twice


def test_from_scratch_a_learnable_task_is_learnt(material: Path) -> None:
    out = run("finetune.py", *sources(material), "--model", "bert-1", "--task-file", material / "train.csv", material / "test.csv",
              "--epochs", "15", "--pooling", "mean")
    assert float(re.search(r"from scratch: accuracy +([\d.]+) %", out)[1]) > 80


def test_marked_entities_tell_what_the_words_do_not(material: Path) -> None:
    """Two classes of the same words: which of the two countries is the head?"""
    for part, n in (("train", 40), ("test", 20)):
        rows = [f'{head},"from {a} to {b} by river {n * i}"\n' for i in range(n)
                for head, ends in (("france", ("[# france #]", "[@ japan @]")), ("japan", ("[@ france @]", "[# japan #]")))
                for a, b in (ends, ends[::-1])]
        (material / f"head-{part}.csv").write_text("".join(["label,text\n", *rows]), encoding="utf-8")
    command = ["finetune.py", *sources(material), "--model", "bert-1", "--task-file", material / "head-train.csv", material / "head-test.csv"]
    out = run(*command, "--epochs", "15", "--pooling", "entities")
    assert float(re.search(r"from scratch: accuracy +([\d.]+) %", out)[1]) > 95
    (folder,) = (material / "runs/finetune").glob("head-train-scratch-*")
    for text, label in (("from [@ japan @] to [# france #] by river", "france"), ("from [@ france @] to [# japan #]", "japan")):
        assert json.loads(run("finetune.py", "--predict", text, folder))["label"] == label
    for text in ("japan", "[# japan #] to france", "from [@ japan @]"):
        assert f"not both are in '{text}'" in run("finetune.py", "--predict", text, folder, status=2)
    command = ["committee.py", *sources(material), "--task", "fewrel", "--train-per-class", "5", "--test-per-class", "4", "--deep", "none",
               "--members", "2", "--ft-pooling", "entities"]
    assert "task fewrel: pooling entities" in run(*command, status=2)
    assert "committee of 2 bert-1" in run(*command, "--entity-markers")


def test_another_script_than_latin(material: Path) -> None:
    """README's walk through one's own data, in Greek letters: a text file, a CSV with Greek class names, a prediction."""
    greek = str.maketrans("abcdefghijklmnopqrstuvwxyz", "αβψδεφγηιξκλμνοπχρστθωςχυζ")
    (material / "ελληνικά.txt").write_text("\n\n".join(a["text"].lower().translate(greek) for a in articles(150)), encoding="utf-8")
    for name in ("train.csv", "test.csv"):
        head, _, rows = (material / name).read_text(encoding="utf-8").partition("\n")
        (material / f"ελλ-{name}").write_text(f"{head}\n{rows.translate(greek)}", encoding="utf-8")
    out = run("finetune.py", "--preset", "smoke", "--articles", material / "ελληνικά.txt", "--runs-dir", material / "runs-ελλ", "--task-file",
              material / "ελλ-train.csv", material / "ελλ-test.csv", "--epochs", "15", "--pooling", "mean")
    (folder,) = (material / "runs-ελλ/finetune").glob("ελλ-train-scratch-*")
    answer = Predictor(folder, choose_hardware("cpu"))(["river number 3 crosses brazil today".translate(greek)])[0]
    assert next(iter(answer)) == "brazil".translate(greek) and len(answer) == 3
    assert float(re.search(r"from scratch: accuracy +([\d.]+) %", out)[1]) > 80  # so the letters did not become [UNK]


def test_committee_script(material: Path) -> None:
    command = ["committee.py", *sources(material), "--task", "fewrel", "dbpedia", "--train-per-class", "5", "--test-per-class", "4",
               "--member-model", "bert-1", "bert-1-conv2", "--repeats", "2"]
    out = run(*command)
    for line in ("committee of 2 bert-1+bert-1-conv2", "bert-6: pre-training gives", "latency, one text of fewrel"):
        assert line in out
    path = Path(re.search(r"(\S.*results\.json) written", out)[1])
    record = json.loads(path.read_text(encoding="utf-8"))
    assert {"command", "machine", "versions", "git", "seconds", "settings", "tasks", "latency_ms"} <= set(record)
    for part in record["tasks"].values():
        assert {k: len(v["pretrained"]) for k, v in part["models"].items()} == {"bert-6": 2, "bert-1": 2, "bert-1-conv2": 2}
        assert [len(c) for c in part["committee"]["bert-1+bert-1-conv2"]] == [2, 2]
        members = [part["models"][m]["pretrained"][0] for m in ("bert-1",)]
        assert part["committee"]["bert-1+bert-1-conv2"][0][0] == pytest.approx(members[0])
    assert {"p10", "median", "p90"} <= set(record["latency_ms"]["committee-2"])
    stamps = {p: p.stat().st_mtime_ns for p in (material / "runs").rglob("last.pt")}
    again = run(*command)
    assert stamps == {p: p.stat().st_mtime_ns for p in (material / "runs").rglob("last.pt")}, "something was trained again"
    tables = [re.findall(r"^(?:bert-|committee of).*\d +[+-]\d.*", text, flags=re.M) for text in (out, again)]
    assert len(tables[0]) >= 8 and tables[0] == tables[1]


def test_embedded_default_from_the_raw_folder(material: Path) -> None:
    """In one process, and in two: with as many threads each, the same table."""
    shown = [run("committee.py", "--preset", "smoke", "--raw-dir", material / "raw", "--runs-dir", material / f"runs-default-{jobs}",
                 "--train-per-class", "5", "--test-per-class", "6", "--members", "2", "--jobs", jobs) for jobs in ("1", "2")]
    assert "topics: 3 classes" in shown[0] and "next, on the paper's data" in shown[0] and "2 processes" in shown[1]
    tables = [re.search(r"^topics: .*?(?=^latency)", text, flags=re.M | re.S)[0] for text in shown]
    assert tables[0] == tables[1] and not any("may be among" in text for text in shown)


def test_committee_without_a_deep_model(material: Path) -> None:
    """One cell of a study: some seeds of a shallow model, its gap, its committee."""
    kept = material / "cell.json"
    out = run("committee.py", *sources(material), "--task", "fewrel", "--train-per-class", "5", "--test-per-class", "4", "--deep", "none",
              "--members", "2", "--out", kept)
    part = json.loads(kept.read_text(encoding="utf-8"))["tasks"]["fewrel"]
    assert "bert-6" not in out and set(part["models"]) == {"bert-1"} and len(part["models"]["bert-1"]["scratch"]) == 2
    assert set(part["quality"]) == {"member", "committee", "agreement"} and 0 <= part["quality"]["agreement"] <= 1


def test_bad_input_in_a_process_of_its_own(material: Path) -> None:
    out = run("committee.py", *sources(material), "--task", "fewrel", "--train-per-class", "5", "--test-per-class", "4", "--jobs", "2",
              "--lr", "900", "--warmup", "0", "--clip", "0", "--steps", "40", status=2)
    assert "lower --lr" in out and out.count("error: ") == 1


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_a_signal_ends_all_processes_and_loses_nothing(material: Path) -> None:
    """SIGTERM to the first process alone; the same command then goes on and gives the table of an undisturbed run. Steps enough that the
    first process is still at work, some 5 s, when the second has begun."""
    def command(runs: str) -> list[str]:
        return ["committee.py", *map(str, sources(material)), "--runs-dir", str(material / runs), "--task", "fewrel", "--train-per-class", "5",
                "--test-per-class", "4", "--steps", "1500", "--jobs", "2", "--members", "2", "--deep", "none"]

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
    kept = material / "own.json"
    out = run("committee.py", *sources(material), "--task-file", material / "train.csv", material / "test.csv", "--members", "1",
              "--deep", "none", "--out", kept)
    assert "train: 3 classes" in out and json.loads(kept.read_text(encoding="utf-8"))["settings"]["task_file"][0].endswith("train.csv")
    assert "name a file" in run("committee.py", *sources(material), "--out", material, status=2)


def test_the_deep_model_has_its_own_time(material: Path) -> None:
    """--deep-time-budget is the deep model's alone: the member takes its steps."""
    kept = material / "deep.json"
    run("committee.py", *sources(material), "--task-file", material / "train.csv", material / "test.csv", "--members", "1", "--steps", "3",
        "--deep-time-budget", "0.1", "--out", kept)
    steps = {name[:6]: trained["steps"] for name, trained in json.loads(kept.read_text(encoding="utf-8"))["pretraining"].items()}
    assert steps["bert-1"] == 3 and steps["bert-6"] > 20


def test_members_are_trained_one_by_one_and_gathered(material: Path) -> None:
    """One member in a call of its own, and the call after it gathers: it trains the other alone."""
    command = ["committee.py", *sources(material), "--runs-dir", material / "runs-member", "--task-file", material / "train.csv",
               material / "test.csv", "--members", "2", "--deep", "none", "--jobs", "1"]
    out = run(*command, "--member", "2")
    assert out.count(": accuracy ") == 2 and "next: the other members" in out
    (alone,) = (material / "runs-member/pretrain").glob("*/last.pt")
    assert "-seed101-" in str(alone)  # number 2
    stamp = alone.stat().st_mtime_ns
    out = run(*command, "--plot")
    assert re.search(r"accuracies\.png written", out)
    assert "committee of 2 bert-1" in out and alone.stat().st_mtime_ns == stamp
    assert len(list((material / "runs-member/pretrain").glob("*/last.pt"))) == 2
    assert "there are 2, numbered from 1, and no deep model" in run(*command, "--member", "3", status=2)
    committee = Path(re.search(r"(\S.*)results\.json written", out)[1])
    text = "bridge number 3 crosses brazil today"
    voted = json.loads(run("committee.py", "--predict", text, committee))["probabilities"]
    hardware = choose_hardware("cpu")
    voters = [Predictor(folder, hardware)([text])[0] for folder in (material / "runs-member/finetune").glob("train-bert*")]
    assert len(voters) == 2 and voted == {name: pytest.approx((voters[0][name] + voters[1][name]) / 2, abs=2e-4) for name in voted}
    own = ["--task-file", material / "train.csv"]
    assert json.loads(run("committee.py", "--predict", text, committee, *own))["probabilities"] == voted
    assert "no committee for task 'agnews'" in run("committee.py", "--predict", text, committee, "--task", "agnews", status=2)


def test_ablation_script(material: Path) -> None:
    """Arms of recipes; what it classifies are training rows, never test rows."""
    out = material / "ablation.json"
    shown = run("results/ablate.py", *sources(material), "--task", "fewrel", "--tuning-rows", "4", "--seeds", "2", "--out", out,
                "--arms", '{"smoke": {}, "counts": {"count_start": 0.1, "vocab_size": 200}}')
    record = json.loads(out.read_text(encoding="utf-8"))
    arms = record["arms"]
    assert record["command"].startswith("python results/ablate.py --"), "a command to repeat, from the repository's root"
    assert [len(arm["held_out_loss"]) for arm in arms.values()] == [2, 2] and set(arms) == {"smoke", "counts"}
    assert all(len(arm["tasks"]["fewrel"]["models"]["bert-1"][kind]) == 2 for arm in arms.values() for kind in ("pretrained", "scratch"))
    assert all(len(arm["break_seconds"]) == 2 for arm in arms.values())
    assert "counts" in shown and "further training rows" in out.read_text(encoding="utf-8")


def test_ablation_never_sees_a_test_row(material: Path) -> None:
    """Every row of the task it trains and classifies is a training row of the official file, none a test text."""
    sys.path.insert(0, str(ROOT / "results"))
    import ablate

    args = argparse.Namespace(task=["topics"], task_file=None, raw_dir=material / "raw", prepared=None, entity_markers=False, preset="smoke", tune=False,
                              min_class_size=0, train_per_class=5, test_per_class=5, tuning_rows=4)
    (real,) = load_tasks(args)
    task = ablate.tuning_task(real, args)
    seen, test = ({text_key(text) for text, _ in rows} for rows in (task.train + task.test, real.test))
    assert len(task.test) == 12 and len(task.train) == len(real.train) == 15 and task.test_titles and not seen & test


def test_bag_of_words_script(material: Path) -> None:
    """The label is a word of the text, so a bag of words finds it."""
    out = run("results/bag_of_words.py", *sources(material), "--task-file", material / "train.csv", material / "test.csv",
              "--out", material / "bag.json")
    assert float(re.search(r"by idf: ([\d.]+) %", out)[1]) > 90 and "counted directions" in out
    assert "train" in json.loads((material / "bag.json").read_text(encoding="utf-8"))["tasks"]


def test_data_script(material: Path) -> None:
    assert "official size" not in run("data.py", "--raw-dir", material / "nothing") and "MIT" in run("data.py")
    out = run("data.py", "overlap", *sources(material), "--task", "fewrel", "--vocab-size", "150", "--max-length", "16", "--arm", "high",
              "--arm-count", "20")
    assert '"articles": 20' in out
    assert " 7 held out" in run("data.py", "fetch", *sources(material), "--task", "fewrel")
    prepared = material / "prepared"
    own = prepared / "tokenizer.model"
    encode = ["data.py", "encode", *sources(material), "--vocab-size", "150", "--max-length", "16", "--task", "fewrel", "--out", prepared]
    run(*encode)
    assert "is there already" in run(*encode, status=2)
    losses = {}
    for arm in ("high", "shuffled", "unigram"):
        out = run("pretrain.py", *sources(material), "--task", "fewrel", "--max-length", "16", "--tokenizer", own, "--arm", arm,
                  "--arm-count", "20")
        losses[arm] = re.search(r"held-out loss ([\d.]+) nats \(unigram baseline ([\d.]+)", out).groups()
    assert len({loss for loss, _ in losses.values()}) == 3, "an arm has no effect"
    assert losses["shuffled"][1] == losses["unigram"][1], "a control has other frequencies"
    elsewhere = ["--preset", "smoke", "--raw-dir", material / "nothing", "--runs-dir", material / "runs-elsewhere", "--prepared", prepared]
    both = [run("committee.py", *source, "--max-length", "16", "--task", "fewrel", "--articles-count", "100", "--deep", "none", "--members", "1")
            for source in (elsewhere, [*sources(material), "--tokenizer", own])]
    tables = [re.search(r"^fewrel: .*?(?=^latency)", text, flags=re.M | re.S)[0] for text in both]
    assert tables[0] == tables[1], "a prepared folder gives another result than the files it was made from"
    for flags, message in ((["--max-length", "32"], "holds 143 texts of 16 tokens"), (["--max-length", "16", "--articles-count", "9999"], "9999"),
                           (["--max-length", "16", "--arm", "clean"], "holds tokens alone"), (["--max-length", "16", "--task", "agnews"], "without task"),
                           (["--train-per-class", "3"], "has settled that")):
        assert message in run("committee.py", *elsewhere, "--task", "fewrel", *flags, status=2)
    elsewhere[-1] = material / "whole"
    run(*encode[:-1], elsewhere[-1], "--whole-articles")
    assert "held-out loss" in run("pretrain.py", *elsewhere, "--max-length", "16", "--steps", "2")
    assert "whole articles, end to end" in run("pretrain.py", *elsewhere, "--max-length", "16", "--articles-count", "20", status=2)


@pytest.mark.parametrize("arguments, message", [
    (["pretrain.py", "--articles", "no-such-file.txt"], "no such file"),
    (["pretrain.py", "--articles", "ARTICLES", "--width", "100"], "width 100 is not a positive multiple of 64"),
    (["pretrain.py", "--articles", "ARTICLES", "--optimizer", "sgd"], "there are adamw and muon"),
    (["pretrain.py", "--articles", "ARTICLES", "--whole-articles", "--arm", "high"], "leave --whole-articles out"),
    (["data.py", "overlap", "--articles", "ARTICLES", "--whole-articles"], "leave --whole-articles out"),
    (["pretrain.py", "--articles", "ARTICLES", "--vocab-size", "60000"], "largest that fits"),
    (["pretrain.py", "--articles", "ARTICLES", "--device", "cuda"], "--device cpu"),
    (["finetune.py", "--checkpoint", "nowhere", "--task-file", "TRAIN"], "is this a run folder"),
    (["finetune.py", "--predict", "x"], "--predict needs"),
    (["pretrain.py", "--articles", "ARTICLES", "--device", "gpu"], "--device gpu: no such device here"),
    (["pretrain.py", "--warmpu", "0.1"], "did you mean --warmup?"),
    (["finetune.py", "--task", "fewrell"], "did you mean fewrel?"),
    (["pretrain.py", "--articles", "ARTICLES", "--micro-batch", "-1"], "--micro-batch -1: must lie in"),
    (["committee.py", "--articles", "ARTICLES", "--deep", "bert-1"], "is a member too"),
    (["committee.py", "--articles", "ARTICLES", "--deep-time-budget", "-1"], "--deep-time-budget -1.0: must lie in"),
    (["committee.py", "--articles", "ARTICLES", "--deep", "none", "--deep-time-budget", "1"], "there is no deep model"),
    (["finetune.py", "--task-file", "TRAIN", "TRAIN", "TRAIN", "--articles", "ARTICLES"], "at most one test file"),
    (["pretrain.py", "--articles", "PACKED"], "d.xml.gz: article files end in"),
    (["pretrain.py", "--articles", "ARTICLES", "--articles-count", "9999"], "--articles-count 9999: there are"),
    (["pretrain.py", "--articles", "ARTICLES", "--wiki", "simplewiki"], "--wiki: not allowed with argument --articles"),
    (["pretrain.py", "--prepared", "RAW", "--tokenizer", "ARTICLES"], "has settled that"),
    (["finetune.py", "--task-file", "TRAIN", "--articles", "ARTICLES", "--width", "100", "--preset", "smoke"], "--width: width 100"),
    (["finetune.py", "--task-file", "ARTICLES", "--articles", "ARTICLES"], "line 1"),
    (["committee.py", "--articles", "ARTICLES", "--task", "fewrel", "--raw-dir", "RAW"], "--min-class-size"),
    (["results/ablate.py", "--task", "fewrel", "agnews", "--out", "x.json"], "one named --task"),
    (["results/ablate.py", "--arms", '{"a": {"heads": 2, "wdith": 64}}', "--out", "x.json"], "wdith: 64 is no setting"),
])
def test_bad_input_is_one_line_and_status_2(material: Path, arguments: list[str], message: str) -> None:
    names = {"ARTICLES": material / "wiki.jsonl.gz", "TRAIN": material / "train.csv", "RAW": material / "raw",
             "PACKED": material / "d.xml.gz"}
    names["PACKED"].write_bytes(gzip.compress(b"<mediawiki></mediawiki>"))
    if message == "--device cpu" and __import__("torch").cuda.is_available():
        pytest.skip("there is a GPU")
    extra = [] if arguments[0] == "data.py" else ["--runs-dir", material / "runs"]
    out = run(*[names.get(a, a) for a in arguments], *extra, status=2)
    assert message in out
    assert len([line for line in out.splitlines() if line.startswith("error: ")]) == 1
