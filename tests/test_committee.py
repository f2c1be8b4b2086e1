"""Which models are trained, who votes with whom, and what the table shows."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import committee as committees
from committee import (Job, Trained, committee_correct, held_out_sentences, measure_latency,
                       planned_models, report_language, report_task, table_rows)
from data import DataFolder, Task
from finetune import PRESETS as FINETUNE_PRESETS
from finetune import gap
from material import PLACES, SUBJECTS, VERBS, articles, corpus_of, on_cpu, pretrain_run
from material import tables_of
from model import Classifier, named_config
from pretrain import PRESETS, fill_mask, load_masked_lm
from tokenizer import Tokenizer, train_tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "results"))
from votes import agreement, calibration_error

TASK = Task("two", ["a", "b"], [("river city", 0), ("king painter", 1)] * 8, [("x", 0), ("y", 1)],
            [("a city", 0), ("the king", 1)])
JOB = Job(Path("d"), ["two"], "test", "smoke", PRESETS["smoke"], FINETUNE_PRESETS["smoke"],
          "bert-6", ["bert-1", "bert-1-wide"], 3, 2, on_cpu())


def test_planned_models() -> None:
    """Deep models first; members take the named models in turn; no seed occurs twice."""
    models = planned_models(JOB)
    assert [m.name for m in models] == ["bert-6"] * 2 + ["bert-1", "bert-1-wide", "bert-1"] * 2
    assert len({m.seed for m in models}) == 8
    assert [m.repeat for m in models[2:]] == [0] * 3 + [1] * 3
    assert [m.name for m in planned_models(replace(JOB, deep="none", seeds=1))] == [
        "bert-1", "bert-1-wide", "bert-1"]


def trained_models(rng: np.random.Generator) -> list[Trained]:
    """Every planned model, pre-trained and from scratch, right on random rows."""
    trained = []
    for model in planned_models(JOB):
        for kind, accuracy in (("pre-trained", 0.8), ("from scratch", 0.5)):
            correct = (rng.random(40) < accuracy).astype(float)
            folder = Path(f"{kind} {model.name} {model.seed}")
            trained.append(Trained(model, "two", kind, Path("checkpoint"), folder, correct))
    return trained


def test_the_table(corpus: DataFolder, monkeypatch: pytest.MonkeyPatch,
                   capsys: pytest.CaptureFixture) -> None:
    """Each row's values are those of its models; a committee's, of its own repeat's members."""
    asked: list[list[str]] = []
    trained = trained_models(np.random.default_rng(0))
    by_folder = {one.folder: one.correct for one in trained}

    def first_is_right(folders: list[Path]) -> np.ndarray:
        asked.append([folder.name for folder in folders])
        return by_folder[folders[0]]

    monkeypatch.setattr(committees, "is_correct", first_is_right)
    rows = table_rows(trained, JOB)
    assert {label: len(kinds["pre-trained"]) for label, kinds in rows.items()} == {
        "bert-6": 2, "bert-1, one member": 4, "bert-1-wide, one member": 2,
        "committee of 2 bert-1+bert-1-wide": 2, "committee of 3 bert-1+bert-1-wide": 2}
    assert ["from scratch bert-1 103", "from scratch bert-1-wide 104",
            "from scratch bert-1 105"] in asked
    assert all(len({int(name.split()[-1]) < 103 for name in names}) == 1 for names in asked)
    result = report_task(tables_of(TASK, corpus), trained, JOB)
    out = capsys.readouterr().out
    of_deep = [one for one in trained if one.model.name == "bert-6"]
    mean = 100 * np.mean([one.correct.mean() for one in of_deep if one.kind == "pre-trained"])
    assert result["table"]["bert-6"]["pre-trained"]["mean"] == pytest.approx(mean)
    assert f"bert-6{'':24}" in out and f"{mean:.1f} (" in out
    differences = [committee.mean() - deep.correct.mean() for committee, deep in zip(
        committee_correct([x for x in trained if x.kind == "pre-trained"], 3),
        [one for one in of_deep if one.kind == "pre-trained"])]
    assert result["against_deep"]["mean"] == pytest.approx(100 * np.mean(differences))
    assert result["voters"] == ["pre-trained bert-1 100", "pre-trained bert-1-wide 101",
                                "pre-trained bert-1 102"]
    assert "logistic regression" in out and "bert-1, one member: pre-training gives +" in out


def test_a_gap_is_taken_pair_by_pair() -> None:
    """Two seeds that differ, each with the same gap: the interval has no width."""
    a, b = np.array([1.0, 1, 1, 0]), np.array([1.0, 0, 0, 0])
    pairs = {"pre-trained": [a, b], "from scratch": [a - [1, 0, 0, 0], b - [1, 0, 0, 0]]}
    found = gap(pairs, "members")
    assert (found.mean, found.low, found.high) == pytest.approx((25, 25, 25))


def test_latency(corpus: DataFolder) -> None:
    """Two like models beside one that sleeps: it is slower, and all have run on all texts."""
    class Slow(Classifier):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            committees.time.sleep(0.01)
            return super().forward(input_ids)

    config = named_config("bert-1", 64, 1, vocab_size=200, max_length=32)
    models = {"fast": Classifier(config, 2).eval(), "slow": Slow(config, 2).eval()}
    latency = measure_latency(models, tables_of(TASK, corpus), on_cpu())
    assert latency["slow"]["median"] > 10 and latency["slow"]["median"] > latency["fast"]["median"]
    assert latency["fast"]["p10"] <= latency["fast"]["median"] <= latency["fast"]["p90"]
    assert 0 < latency["slow"]["texts_per_s"] < 200
    assert latency["fast"]["parameters"] == sum(p.numel() for p in models["fast"].parameters())


def test_calibration_and_agreement_by_hand() -> None:
    """Four rows: two at confidence 0.9, one of them right; two at 0.6, both right."""
    p = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.4, 0.6]])
    labels = torch.tensor([0, 1, 1, 1])
    expected = (2 * abs(0.5 - 0.9) + 2 * abs(1 - 0.6)) / 4
    assert calibration_error(p, labels) == pytest.approx(expected)
    assert calibration_error(torch.eye(2), torch.tensor([0, 1])) == 0
    a, b, c = torch.tensor([0, 1, 1, 0]), torch.tensor([0, 1, 0, 1]), torch.tensor([0, 1, 1, 0])
    assert agreement([a, b, c]) == pytest.approx((0.5 + 1 + 0.5) / 3)


def test_masked_words_of_held_out_articles(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The words come from the held-out articles, and the answers from the checkpoints."""
    texts = [a["text"] for a in articles(60)]
    words = [*SUBJECTS, *VERBS, *PLACES]
    tokenizer = Tokenizer(train_tokenizer(words * 30 + texts, 150))  # its pieces are whole words
    corpus = corpus_of(texts[20:], texts[:20], tokenizer)
    held_out = "".join(texts[:20]).casefold()
    sentences = held_out_sentences(corpus)
    assert len(sentences) == 3
    for text, word in sentences:
        assert text.replace("[MASK]", word) in held_out and len(word) > 3
    checkpoint = pretrain_run("bert-1", PRESETS["smoke"], corpus, 0, tmp_path)
    capsys.readouterr()
    trained = [replace(one, checkpoint=checkpoint)
               for one in trained_models(np.random.default_rng(0))]
    record = report_language(trained, corpus)
    shown = capsys.readouterr().out
    for line in record:
        assert line["text"] in shown and set(line["guesses"]) == {"bert-6", "bert-1", "bert-1-wide"}
        guesses = fill_mask(*load_masked_lm(checkpoint), line["text"], 4)[0]
        assert line["guesses"]["bert-1"] == guesses
