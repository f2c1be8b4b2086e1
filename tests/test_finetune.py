"""Classification: intervals, yardsticks, entities, prediction."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import finetune as finetuning
from data import DataFolder, InputError, Task, encode_texts
from finetune import (PRESETS, Predictor, check_checkpoints, chosen_tasks, finetune, interval,
                      inverse_document_frequency, is_correct, load_logits, logistic_regression,
                      over_starts, piece_features, recipe_for, start_of, yardsticks)
from material import articles, corpus_of, on_cpu, pretrain_run, small_tokenizer, tables_of
from model import Classifier, named_config, vote
from pretrain import PRESETS as PRETRAIN_PRESETS
from pretrain import chosen_recipe, make_optimizers
from tokenizer import FIRST_PIECE

SMOKE = PRETRAIN_PRESETS["smoke"]
WORDS = {"france": "river city", "japan": "king painter", "brazil": "engine protein"}


def rows(count: int, first: int = 0) -> list[tuple[str, int]]:
    """Texts whose class is the place that they name."""
    return [(f"{words} number {first + i} of {place}", label)
            for label, (place, words) in enumerate(WORDS.items()) for i in range(count)]


TASK = Task("places", list(WORDS), rows(10), rows(4, 100), rows(5, 200))


@pytest.fixture(scope="module")
def checkpoints(corpus: DataFolder, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    return [pretrain_run("bert-1", SMOKE, corpus, seed, folder) for seed in (0, 1)]


# ---- intervals -----------------------------------------------------------------------------------


def test_t_interval_over_seeds() -> None:
    """By hand, for 70, 72 and 77 %: t with two degrees of freedom is 4.303."""
    found = interval([np.array([1.0] * n + [0.0] * (100 - n)) for n in (70, 72, 77)])
    half = 4.303 * np.std([70, 72, 77], ddof=1) / 3**0.5
    assert (found.mean, found.low, found.high) == pytest.approx((73, 73 - half, 73 + half))
    assert "t-interval over 3 seeds" in found.over


def test_t_values_are_students() -> None:
    """The density integrated from 0 to each value gives 0.475."""
    for df, t in enumerate(finetuning.T_975, 1):
        x = torch.linspace(0, t, 20_001, dtype=torch.float64)
        density = (torch.distributions.StudentT(float(df)).log_prob(x)).exp()
        assert float(torch.trapezoid(density, x)) == pytest.approx(0.475, abs=5e-5)


def test_bootstrap_interval_of_a_single_seed() -> None:
    """About the normal approximation's."""
    rng = np.random.default_rng(1)
    values = (rng.random(1_101) < 0.7).astype(float) - (rng.random(1_101) < 0.5).astype(float)
    found = interval([values])
    half = 196 * values.std() / len(values) ** 0.5
    expected = (100 * values.mean(), 100 * values.mean() - half, 100 * values.mean() + half)
    assert (found.mean, found.low, found.high) == pytest.approx(expected, abs=0.4)
    assert "bootstrap" in found.over


def test_a_difference_within_noise_is_said_so() -> None:
    clear = interval([np.ones(50), np.ones(50)]).sentence("A gives")
    assert clear.startswith("A gives +100.0 points (+100.0 to +100.0;") and "not" not in clear
    noise = interval([np.array([1.0, 0.0]), np.array([0.0, -1.0])]).sentence("A gives")
    assert noise.endswith("; not distinguishable from 0")


# ---- yardsticks ----------------------------------------------------------------------------------


def test_piece_features_by_hand(corpus: DataFolder) -> None:
    """Each text's idf of its pieces, each counted once, length 1; special tokens count nothing."""
    texts = ["the river", "the river river", "the king", "the"]
    table = encode_texts(texts, corpus.tokenizer, 32)
    V = corpus.tokenizer.vocab_size
    idf = inverse_document_frequency(table, V)
    pieces = [set(corpus.tokenizer.pieces.encode(text)) for text in texts]
    expected = torch.zeros(4, V)
    for i, of_text in enumerate(pieces):
        for piece in of_text - {1}:
            in_texts = sum(piece in other for other in pieces)
            expected[i, piece] = np.log(4 / in_texts)
    expected = F.normalize(expected)
    found = piece_features(table, idf).to_dense()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(found[0], found[1])
    assert not found[3].any() and not found[:, :FIRST_PIECE].any()


def test_logistic_regression_is_sklearns(corpus: DataFolder) -> None:
    """The same accuracy as scikit-learn's, for a decay of the same strength."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    labelled = [(a["text"], i % 4) for i, a in enumerate(articles(200))]
    train, test = labelled[:160], labelled[80:]  # two thirds of the test rows are known
    for decay in (1e-2, 1e-4):
        (found,) = logistic_regression((train, test), corpus, 4, [decay])
        table, test_table = (encode_texts([t for t, _ in part], corpus.tokenizer, 32)
                             for part in (train, test))
        idf = inverse_document_frequency(table, corpus.tokenizer.vocab_size)
        x, test_x = (piece_features(t, idf).to_dense().numpy() for t in (table, test_table))
        theirs = linear_model.LogisticRegression(C=1 / (2 * decay * len(train)), max_iter=1000)
        theirs.fit(x, [label for _, label in train])
        assert found == pytest.approx(theirs.score(test_x, [label for _, label in test]), abs=0.03)


def test_yardsticks(corpus: DataFolder) -> None:
    found = yardsticks(tables_of(TASK, corpus))
    assert found["largest class"] == pytest.approx(1 / 3) and found["logistic regression"] > 0.9


# ---- training ------------------------------------------------------------------------------------


def test_a_task_that_is_named_twice_counts_once() -> None:
    data: Any = SimpleNamespace(meta={"tasks": {"places": {}}}, task=lambda name: TASK)
    assert chosen_tasks(["places", "places"], data) == ["places"]


def test_recipes() -> None:
    assert recipe_for("topics", PRESETS["quick"], "quick").per_class == 10
    assert recipe_for("fewrel", PRESETS["quick"], "quick").per_class == 100
    assert recipe_for("topics", replace(PRESETS["quick"], per_class=7), "quick").per_class == 7
    assert recipe_for("fewrel", PRESETS["paper"], "paper").per_class == 0
    assert PRESETS["quick"].total_steps(3) == 300 and PRESETS["quick"].total_steps(50) == 750
    assert replace(PRESETS["quick"], steps=7).total_steps(3) == 7
    assert chosen_recipe(PRESETS["quick"], ["epochs=1"]).total_steps(3) == 3


def test_an_unfinished_checkpoint_is_refused(checkpoints: list[Path], tmp_path: Path) -> None:
    unfinished = shutil.copytree(checkpoints[0], tmp_path / "unfinished")
    (unfinished / "results.json").unlink()
    with pytest.raises(InputError, match="unfinished: its pre-training has not ended"):
        start_of(unfinished)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_frozen_bert_stays_as_it_is(optimizer: str) -> None:
    """The exercise in finetune.py: the optimizers leave frozen parameters alone."""
    model = Classifier(named_config("bert-1", 64, 1, vocab_size=50, max_length=16), 3)
    model.bert.requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizers = make_optimizers(model, replace(PRESETS["quick"], optimizer=optimizer))
    model(torch.full((2, 8), 7)).square().sum().backward()
    for one in optimizers:
        one.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == name.startswith("bert.")


def test_a_pretrained_model_and_its_twin(corpus: DataFolder, checkpoints: list[Path],
                                         tmp_path: Path) -> None:
    """Both learn; one begins with the checkpoint's weights, the other does not."""
    tables, runtime = tables_of(TASK, corpus), on_cpu(tmp_path)
    recipe = replace(PRESETS["smoke"], epochs=40, pooling="mean", lr=3e-3)
    start = start_of(checkpoints[0])
    pretrained = finetune(tables, start, recipe, 0, runtime)
    scratch = finetune(tables, start.twin, recipe, 0, runtime)
    for folder in (pretrained, scratch):
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        assert results["accuracy"] == is_correct([folder]).mean() > 0.6
    assert pretrained != scratch and "scratch-bert-1" in scratch.name
    logits = [load_logits(folder)[0] for folder in (pretrained, scratch)]
    votes = vote(torch.stack(logits)).argmax(-1).numpy()
    labels = [label for _, label in TASK.test]
    assert is_correct([pretrained, scratch]).tolist() == (votes == labels).tolist()
    still = replace(recipe, steps=1, lr=0.0, weight_decay=0.0)
    begun = finetune(tables, start, still, 0, runtime)
    weights = torch.load(begun / "last.pt", weights_only=True)["model"]
    origin = torch.load(checkpoints[0] / "last.pt", weights_only=True)["model"]
    assert torch.equal(weights["bert.token.weight"], origin["bert.token.weight"])


def test_seeds_of_one_start_or_of_several() -> None:
    """Several starts: the mean over the fine-tuning seeds of each. One start: its seeds."""
    right = {Path(name): value for name, value in
             (("a0", [1, 1]), ("a1", [1, 0]), ("b0", [0, 0]), ("b1", [0, 1]))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetuning, "is_correct", lambda f: np.array(right[f[0]], dtype=float))
        both = over_starts([[Path("a0"), Path("a1")], [Path("b0"), Path("b1")]])
        assert [x.tolist() for x in both] == [[1, 0.5], [0, 0.5]]
        one = over_starts([[Path("a0"), Path("a1")]])
        assert [x.tolist() for x in one] == [[1, 1], [1, 0]]


def test_checkpoints_that_do_not_belong_together(corpus: DataFolder, checkpoints: list[Path],
                                                 tmp_path: Path) -> None:
    check_checkpoints(checkpoints, corpus)
    with pytest.raises(InputError, match="two have the same seed"):
        check_checkpoints([checkpoints[0], checkpoints[0]], corpus)
    other = pretrain_run("bert-1", replace(SMOKE, steps=3), corpus, 5, tmp_path)
    with pytest.raises(InputError, match="in more than its seed .recipe.steps 6 there, 3 now"):
        check_checkpoints([checkpoints[0], other], corpus)
    foreign = corpus_of(["a text"], ["another"], small_tokenizer(190))
    with pytest.raises(InputError, match="its tokenizer is not that of"):
        check_checkpoints(checkpoints, foreign)


def test_predictions_are_the_votes(corpus: DataFolder, checkpoints: list[Path],
                                   tmp_path: Path) -> None:
    """For each text, one by one, the probabilities of the batch that was scored."""
    tables, runtime = tables_of(TASK, corpus), on_cpu(tmp_path)
    folders = [finetune(tables, start_of(c), PRESETS["smoke"], 0, runtime) for c in checkpoints]
    expected = vote(torch.stack([load_logits(folder)[0] for folder in folders]))
    predictor = Predictor(folders, runtime)
    for (text, _), row in zip(TASK.test, expected.tolist()):
        record = predictor(text)
        probabilities = record["probabilities"]
        assert [probabilities[name] for name in WORDS] == pytest.approx(row, abs=1e-5)
        assert record["label"] == max(probabilities, key=probabilities.get)
        assert list(probabilities.values()) == sorted(probabilities.values(), reverse=True)
    assert predictor("☃☃☃")["unknown"] == 1 and predictor("the king " * 50)["cut_off"]
