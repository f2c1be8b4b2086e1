"""Files that are whole or not there, locks, and downloads from a server that misbehaves."""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import random
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from multiprocessing.synchronize import Event
from pathlib import Path
from types import SimpleNamespace

import pytest

import data
from data import InputError, download, fetch_bytes, file_lock
from loopback import Loopback
from tokenizer import run_script, write_atomically

BODY = random.Random(1).randbytes(400_000)
SHA1, SHA256 = hashlib.sha1(BODY).hexdigest(), hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Loopback]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(data, "BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(data, "TIMEOUT_SECONDS", (2.0, 0.3))
    with Loopback() as loopback:
        loopback.files["/f.bin"] = BODY
        yield loopback


def fetch(server: Loopback, folder: Path, size: int = len(BODY), digest: str = SHA256) -> bytes:
    return download(server.url + "/f.bin", folder / "f.bin", size, digest).read_bytes()


def ranges(server: Loopback) -> list[str | None]:
    return [request.range for request in server.requests]


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


# ---- writing and locks ---------------------------------------------------------------------------


def test_a_written_file_appears_whole_and_text_is_utf8(tmp_path: Path) -> None:
    target = tmp_path / "new" / "a.txt"
    with write_atomically(target, "w") as file:
        file.write("é\n")
        assert not target.exists()
    assert target.read_bytes() == "é\n".encode() and left_in(target.parent) == ["a.txt"]


@pytest.mark.parametrize("failure, raised, message", [
    (RuntimeError("bug"), RuntimeError, "bug"),
    (KeyboardInterrupt(), KeyboardInterrupt, "^$"),
    (OSError(errno.EIO, "broken"), OSError, "broken"),
    (OSError(errno.ENOSPC, "full"), InputError, r"no space left .*a\.bin \(full\). Free some"),
    (OSError(errno.EDQUOT, "quota"), InputError, r"no space left .*a\.bin \(quota\). Free some")])
def test_interrupted_writing_keeps_the_old_file(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException,
        raised: type[BaseException], message: str) -> None:
    def fail(descriptor: int) -> None:
        raise failure

    target = tmp_path / "a.bin"
    target.write_bytes(b"good")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(raised, match=message), write_atomically(target) as file:
        file.write(b"bad")
    assert target.read_bytes() == b"good" and left_in(tmp_path) == ["a.bin"]


def hold(path: Path, held: Event) -> None:
    with file_lock(path, wait=False):
        held.set()
        time.sleep(60)


def test_a_lock_names_its_holder_and_dies_with_it(tmp_path: Path) -> None:
    start = "fork" if hasattr(os, "fork") else "spawn"  # fork: no second `import torch`
    context = multiprocessing.get_context(start)
    lock, held = tmp_path / "deep" / "run.lock", context.Event()
    process = context.Process(target=hold, args=(lock, held))
    process.start()
    try:
        assert held.wait(30)
        with pytest.raises(InputError, match=f"run.lock is locked by process {process.pid}. Wait"):
            with file_lock(lock, wait=False):
                pass
    finally:
        process.kill()
        process.join()
    with pytest.raises(RuntimeError), file_lock(lock, wait=False):
        assert lock.read_text(encoding="utf-8") == str(os.getpid())
        raise RuntimeError
    with file_lock(lock, wait=False):  # an error inside has freed it
        pass


# ---- download ------------------------------------------------------------------------------------


@pytest.mark.parametrize("part, words, digest, requested", [
    pytest.param(None, [], SHA256, [None], id="sha256"),
    pytest.param(None, [], SHA1, [None], id="sha1"),
    pytest.param(None, ["chunked"], SHA256, [None], id="no length announced"),
    pytest.param(None, ["no number"], SHA256, [None], id="length is no number"),
    pytest.param(BODY[:150], [], SHA256, ["bytes=150-"], id="part is continued"),
    pytest.param(b"old", [], SHA256, ["bytes=3-", None], id="part of another version"),
    pytest.param(BODY, [], SHA256, ["bytes=400000-"], id="whole part"),
    pytest.param(BODY + b"x", [], SHA256, ["bytes=400001-", None], id="part too long"),
    pytest.param(BODY[:9], ["no ranges"], SHA256, ["bytes=9-"], id="no ranges"),
    pytest.param(BODY[:9], ["wrong range"], SHA256, ["bytes=9-"] * 2, id="wrong range"),
    *(pytest.param(None, [word, word], SHA256, [None] * 3, id=f"{word} may pass")
      for word in ("500", "502", "503", "504", "429", "refuse"))])
def test_download(server: Loopback, tmp_path: Path, part: bytes | None, words: list[str],
                  digest: str, requested: list[str | None]) -> None:
    if part is not None:
        (tmp_path / "f.bin.part").write_bytes(part)
    server.behaviours["/f.bin"] = words
    assert fetch(server, tmp_path, digest=digest) == BODY
    assert left_in(tmp_path) == ["f.bin"] and ranges(server) == requested
    assert "tiny-language-models" in server.requests[0].user_agent
    assert server.requests[0].encodings == "identity"


@pytest.mark.parametrize("word", ["short", "short chunked", "stall"])
def test_an_interrupted_body_is_continued(server: Loopback, tmp_path: Path, word: str) -> None:
    server.behaviours["/f.bin"] = [word]
    assert fetch(server, tmp_path) == BODY
    first, second = ranges(server)
    assert first is None and 0 < int(second[6:-1]) <= len(BODY) // 2


WRONG = "wrong file .*, now deleted. Try again, or put the right file at .* by hand"


@pytest.mark.parametrize("words, expected, message, most_requests, left", [
    (["short"] * 20, {}, "cannot be fetched .* bytes", 6, ["f.bin.part"]),
    (["503"] * 20, {}, "cannot be fetched .status 503", 6, []),
    (["corrupt"], {}, WRONG, 1, []),
    (["corrupt"], {"digest": SHA1}, WRONG, 1, []),
    (["chunked"], {"size": 5}, WRONG, 1, []),
    (["html"], {}, "announces 26 bytes instead of 400000, perhaps an error page", 1, []),
    (["endless"], {}, "wrong file .*458752.* instead of .*400000.*deleted", 1, []),
    (["loop"] * 99, {}, "cannot be fetched .Exceeded 30 redirects", 31, []),
    (["file"], {}, "cannot be fetched .No connection adapters", 1, []),
    *(([status], {}, f"f.bin is not served .status {status}", 1, [])
      for status in ("401", "403", "404", "410"))])
def test_what_cannot_be_fetched_is_one_line_and_no_file(
        server: Loopback, tmp_path: Path, words: list[str], expected: dict, message: str,
        most_requests: int, left: list[str]) -> None:
    server.behaviours["/f.bin"] = words
    with pytest.raises(InputError, match=message):
        fetch(server, tmp_path, **expected)
    assert left_in(tmp_path) == left and len(server.requests) == most_requests
    server.behaviours.clear()
    assert fetch(server, tmp_path) == BODY


def test_an_error_page_does_not_cost_the_part(server: Loopback, tmp_path: Path) -> None:
    (tmp_path / "f.bin.part").write_bytes(BODY[:150])
    server.behaviours["/f.bin"] = ["html"]
    with pytest.raises(InputError, match="announces 26 bytes"):
        fetch(server, tmp_path)
    assert (tmp_path / "f.bin.part").read_bytes() == BODY[:150]


def test_a_file_that_is_there_is_taken_as_it_is(server: Loopback, tmp_path: Path) -> None:
    (tmp_path / "f.bin").write_bytes(b"put here by hand")
    assert fetch(server, tmp_path) == b"put here by hand"
    assert server.requests == [] and os.listdir(tmp_path) == ["f.bin"]


@pytest.mark.parametrize("words, pauses", [
    (["503"] * 5, [0.01, 0.02, 0.04, 0.08, 0.16]), (["429:3"], [3]), (["429:99999"], [120]),
    (["429:soon"], [0.01]), ([f"429:{formatdate(1_000_006, usegmt=True)}"], [6])])
def test_pauses_grow_or_are_what_the_server_asks_for(
        server: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture, words: list[str], pauses: list[float]) -> None:
    slept: list[float] = []
    clock = SimpleNamespace(time=lambda: 1_000_000.0, sleep=slept.append)
    monkeypatch.setattr(data, "time", clock)
    server.behaviours["/f.bin"] = words
    assert fetch(server, tmp_path) == BODY
    assert slept == pytest.approx(pauses)
    note = f"note: {server.url}/f.bin: status 429; trying again in {pauses[0]:.0f} s"
    assert (note in capsys.readouterr().err) == (pauses[0] > 2)


def test_without_a_network_a_script_ends_in_one_line(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(data, "BACKOFF_SECONDS", 0.01)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # which leads nowhere
    place = ["x", "--task", "fewrel", "--raw-dir", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["data.py", "prepare", *place])
    with pytest.raises(SystemExit, match="2"):
        run_script(data.main)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: https://raw.githubusercontent.com/")
    assert f"Check the network, or put the file at {tmp_path}/fewrel/train_wiki.json" in line
    assert line.endswith("with no flags needs only the Python package index")


def test_a_full_disk_is_named(
        server: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"no space left.*f\.bin\.part"):
        fetch(server, tmp_path)
    assert "f.bin" not in left_in(tmp_path) and len(server.requests) == 1


def test_a_slow_body_arrives_and_is_no_file_before_its_end(
        server: Loopback, tmp_path: Path) -> None:
    """It takes longer than the time-out in all, but never between two pieces."""
    server.behaviours["/f.bin"] = ["drip"]
    thread = threading.Thread(target=fetch, args=(server, tmp_path))
    thread.start()
    seen: set[str] = set()
    while thread.is_alive():
        seen.update(left_in(tmp_path))
        assert not (tmp_path / "f.bin").exists() or fetch(server, tmp_path) == BODY
        time.sleep(0.02)
    assert fetch(server, tmp_path) == BODY and len(server.requests) == 1
    assert "f.bin.part" in seen


def test_of_two_that_want_a_file_one_fetches_it(server: Loopback, tmp_path: Path) -> None:
    server.delay = 0.2
    threads = [threading.Thread(target=fetch, args=(server, tmp_path)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert (tmp_path / "f.bin").read_bytes() == BODY and len(server.requests) == 1


# ---- small files and parts of files --------------------------------------------------------------


@pytest.mark.parametrize("words, span, expected, requested", [
    ([], (), BODY, None), ([], (10, 20), BODY[10:20], "bytes=10-19"),
    ([], (0, 1), BODY[:1], "bytes=0-0"),
    *(([word], (100, 3000), BODY[100:3000], "bytes=100-2999")
      for word in ("503", "short", "wrong range", "stall"))])
def test_fetch_bytes(server: Loopback, words: list[str], span: tuple, expected: bytes,
                     requested: str | None) -> None:
    attempts = 1 + len(words)
    server.behaviours["/f.bin"] = words
    assert fetch_bytes(server.url + "/f.bin", *span) == expected
    assert ranges(server) == [requested] * attempts


@pytest.mark.parametrize("word, span, message, requests", [
    ("no ranges", (100, 200), "does not give the bytes 100 to 200 alone .status 200", 1),
    ("416", (100, 200), "does not give the bytes 100 to 200 alone .status 416", 1),
    ("endless", (), "sends over 1000000 bytes, perhaps without end. Try later", 1),
    ("endless", (0, 1000), "sends over 1000 bytes, perhaps without end. Try later", 1),
    ("ok", (399_995, 400_005), "5 bytes came instead of 10", 6)])
def test_fetch_bytes_refuses_other_bytes(
        server: Loopback, monkeypatch: pytest.MonkeyPatch, word: str, span: tuple, message: str,
        requests: int) -> None:
    monkeypatch.setattr(data, "MOST_BYTES_AT_ONCE", 1_000_000)
    server.behaviours["/f.bin"] = [word]
    with pytest.raises(InputError, match=message):
        fetch_bytes(server.url + "/f.bin", *span)
    assert len(server.requests) == requests
