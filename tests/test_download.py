"""Files that are whole or not there, locks between processes, and downloads from a server that misbehaves."""
from __future__ import annotations

import errno
import hashlib
import os
import random
import subprocess
import sys
import threading
import time
from email.utils import formatdate
from pathlib import Path

import pytest

import data
from data import InputError, download, fetch_bytes, file_lock, write_atomically
from loopback import Loopback

BODY = random.Random(1).randbytes(400_000)
SHA256, SHA1 = hashlib.sha256(BODY).hexdigest(), hashlib.sha1(BODY).hexdigest()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(data, "BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(data, "TIMEOUT_SECONDS", (2.0, 0.5))
    with Loopback() as loopback:
        loopback.files["/f.bin"] = BODY
        yield loopback


def fetch(server: Loopback, folder: Path, **expected) -> Path:
    return download(server.url + "/f.bin", folder / "f.bin", **(expected or {"size": len(BODY), "sha256": SHA256}))


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


# ---- write_atomically ----


def test_written_file_appears_whole_and_text_is_utf8(tmp_path):
    target = tmp_path / "new" / "a.txt"
    with write_atomically(target, "w") as file:
        file.write("é\n")
        assert not target.exists()
    assert target.read_bytes() == "é\n".encode()
    assert left_in(target.parent) == ["a.txt"]


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt])
def test_interrupted_writing_keeps_the_last_good_file(tmp_path, stop):
    target = tmp_path / "a.bin"
    target.write_bytes(b"good")
    with pytest.raises(stop):
        with write_atomically(target) as file:
            file.write(b"ba")
            raise stop
    assert target.read_bytes() == b"good" and left_in(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_is_one_line_that_names_the_file(tmp_path, monkeypatch, number):
    target = tmp_path / "a.bin"
    target.write_bytes(b"good")

    def full(descriptor: int) -> None:
        raise OSError(number, "full")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"no space left.*a\.bin"):
        with write_atomically(target) as file:
            file.write(b"bad")
    assert target.read_bytes() == b"good" and left_in(tmp_path) == ["a.bin"]


def test_other_disk_errors_are_not_called_a_full_disk(tmp_path, monkeypatch):
    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, "broken")
    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="broken"):
        with write_atomically(tmp_path / "a.bin") as file:
            file.write(b"x")
    assert left_in(tmp_path) == []


# ---- file_lock ----

def test_lock_names_its_holder_and_dies_with_it(tmp_path):
    lock = tmp_path / "deep" / "run.lock"
    code = ("import sys, time; sys.path[:0] = {!r}; from data import file_lock\n"
            "with file_lock({!r}, wait=False): print('held', flush=True); time.sleep(60)").format(sys.path, str(lock))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=f"process {process.pid}"):
            with file_lock(lock, wait=False):
                pass
    finally:
        process.kill()
        process.communicate()
    with file_lock(lock, wait=False):
        assert lock.read_text() == str(os.getpid())


def test_waiting_lock_waits(tmp_path):
    events: list[str] = []

    def wait_for_it() -> None:
        with file_lock(tmp_path / "run.lock", wait=True):
            events.append("second")
    with file_lock(tmp_path / "run.lock", wait=False):
        waiting = threading.Thread(target=wait_for_it)
        waiting.start()
        time.sleep(0.3)
        events.append("first")
    waiting.join(5)
    assert events == ["first", "second"]


def test_lock_is_free_after_an_error_inside(tmp_path):
    with pytest.raises(RuntimeError):
        with file_lock(tmp_path / "run.lock", wait=False):
            raise RuntimeError
    with file_lock(tmp_path / "run.lock", wait=False):
        pass


# ---- download ----


@pytest.mark.parametrize("expected", [{"size": len(BODY), "sha256": SHA256}, {"sha1": SHA1}, {"size": len(BODY)}, {"size": None}])
def test_download(server, tmp_path, expected):
    path = fetch(server, tmp_path / "new", **expected)
    assert path.read_bytes() == BODY and left_in(path.parent) == ["f.bin"]
    assert "tiny-language-models" in server.requests[0].user_agent and server.requests[0].encodings == "identity"
    assert len(server.requests) == 1


def test_a_file_that_is_there_is_taken_as_it_is(server, tmp_path):
    (tmp_path / "f.bin").write_bytes(b"put here by hand")
    assert fetch(server, tmp_path).read_bytes() == b"put here by hand"
    assert server.requests == [] and os.listdir(tmp_path) == ["f.bin"]


def test_part_is_continued(server, tmp_path):
    (tmp_path / "f.bin.part").write_bytes(BODY[:150_000])
    assert fetch(server, tmp_path).read_bytes() == BODY
    assert [request.range for request in server.requests] == ["bytes=150000-"]


def test_part_is_not_continued_where_no_hash_could_tell_a_mixture(server, tmp_path):
    (tmp_path / "f.bin.part").write_bytes(b"old" * 1000)
    assert fetch(server, tmp_path, size=len(BODY)).read_bytes() == BODY
    assert server.requests[0].range is None


def test_part_of_another_version_is_fetched_again_from_the_start(server, tmp_path):
    (tmp_path / "f.bin.part").write_bytes(b"old" * 1000)
    assert fetch(server, tmp_path).read_bytes() == BODY
    assert [request.range for request in server.requests] == ["bytes=3000-", None] and left_in(tmp_path) == ["f.bin"]


def test_whole_part_is_kept(server, tmp_path):
    (tmp_path / "f.bin.part").write_bytes(BODY)
    assert fetch(server, tmp_path).read_bytes() == BODY
    assert [request.range for request in server.requests] == [f"bytes={len(BODY)}-"]


def test_part_that_is_too_long_is_begun_afresh(server, tmp_path):
    (tmp_path / "f.bin.part").write_bytes(BODY + b"more")
    assert fetch(server, tmp_path).read_bytes() == BODY
    assert [request.range for request in server.requests] == [f"bytes={len(BODY) + 4}-", None]


def test_server_without_ranges_begins_afresh(server, tmp_path):
    (tmp_path / "f.bin.part").write_bytes(BODY[:1000])
    server.behaviours["/f.bin"] = ["no ranges"]
    assert fetch(server, tmp_path).read_bytes() == BODY


@pytest.mark.parametrize("word", ["short", "short chunked", "stall"])
def test_interrupted_body_is_continued(server, tmp_path, word):
    server.behaviours["/f.bin"] = [word]
    assert fetch(server, tmp_path).read_bytes() == BODY
    first, second = (request.range for request in server.requests)
    assert first is None and 0 < int(second.removeprefix("bytes=").rstrip("-")) <= len(BODY) // 2


def test_body_that_always_ends_early_is_never_promoted(server, tmp_path):
    server.behaviours["/f.bin"] = ["short"] * 20
    with pytest.raises(InputError, match="cannot be fetched"):
        fetch(server, tmp_path, size=None)
    assert left_in(tmp_path) == ["f.bin.part"]


def test_wrong_range_is_not_appended(server, tmp_path):
    (tmp_path / "f.bin.part").write_bytes(BODY[:1000])
    server.behaviours["/f.bin"] = ["wrong range"]
    assert fetch(server, tmp_path).read_bytes() == BODY
    assert len(server.requests) == 2


@pytest.mark.parametrize("expected", [{"size": len(BODY), "sha256": SHA256}, {"sha1": SHA1}])
def test_wrong_hash_is_deleted(server, tmp_path, expected):
    server.behaviours["/f.bin"] = ["corrupt"]
    with pytest.raises(InputError, match="wrong file.*deleted.*by hand"):
        fetch(server, tmp_path, **expected)
    assert left_in(tmp_path) == []
    assert fetch(server, tmp_path, **expected).read_bytes() == BODY


def test_wrong_size_is_deleted_where_no_length_was_announced(server, tmp_path):
    server.behaviours["/f.bin"] = ["chunked"]
    with pytest.raises(InputError, match="wrong file.*deleted"):
        fetch(server, tmp_path, size=5)
    assert left_in(tmp_path) == []


def test_length_need_not_be_announced(server, tmp_path):
    server.behaviours["/f.bin"] = ["chunked"]
    assert fetch(server, tmp_path).read_bytes() == BODY


@pytest.mark.parametrize("expected", [{"size": len(BODY), "sha256": SHA256}, {"sha256": SHA256}])
def test_error_page_with_status_200(server, tmp_path, expected):
    server.behaviours["/f.bin"] = ["html"]
    with pytest.raises(InputError, match="by hand"):
        fetch(server, tmp_path, **expected)
    assert left_in(tmp_path) == [] and len(server.requests) == 1


def test_error_page_does_not_cost_the_part(server, tmp_path):
    (tmp_path / "f.bin.part").write_bytes(BODY[:150_000])
    server.behaviours["/f.bin"] = ["html"]
    with pytest.raises(InputError, match="announces 26 bytes instead of 400000"):
        fetch(server, tmp_path)
    assert (tmp_path / "f.bin.part").read_bytes() == BODY[:150_000]


@pytest.mark.parametrize("word", ["500", "502", "503", "504", "429", "refuse"])
def test_passing_failures_are_tried_again(server, tmp_path, word):
    server.behaviours["/f.bin"] = [word, word]
    assert fetch(server, tmp_path).read_bytes() == BODY
    assert len(server.requests) == 3


@pytest.mark.parametrize("word", ["403", "404", "410", "401"])
def test_lasting_failures_are_not(server, tmp_path, word):
    server.behaviours["/f.bin"] = [word]
    with pytest.raises(InputError, match=f"f.bin.*status {word}"):
        fetch(server, tmp_path)
    assert len(server.requests) == 1 and left_in(tmp_path) == []


@pytest.mark.parametrize("word", ["loop", "file"])
def test_bad_redirects(server, tmp_path, word):
    server.behaviours["/f.bin"] = [word] * 100
    with pytest.raises(InputError, match="cannot be fetched"):
        fetch(server, tmp_path)
    assert left_in(tmp_path) == [] and len(server.requests) <= 31  # not once more for every attempt


@pytest.mark.parametrize("after, least", [("3", 3.0), (None, 4.0), ("99999", 120.0), ("soon", 0.01)])
def test_retry_after(server, tmp_path, monkeypatch, capsys, after, least):
    slept: list[float] = []
    monkeypatch.setattr(data.time, "sleep", lambda seconds: slept.append(seconds) if threading.current_thread() is main else None)
    main = threading.current_thread()
    server.behaviours["/f.bin"] = ["429:" + (after or formatdate(time.time() + 6, usegmt=True))]
    assert fetch(server, tmp_path).read_bytes() == BODY
    assert len(slept) == 1 and least <= slept[0] <= max(least, 6.5)
    note = f"note: {server.url}/f.bin: status 429; trying again in {slept[0]:.0f} s"
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("note")] == [note] * (slept[0] > 2)


def test_waits_grow(server, tmp_path, monkeypatch):
    slept: list[float] = []
    main = threading.current_thread()
    monkeypatch.setattr(data.time, "sleep", lambda seconds: slept.append(seconds) if threading.current_thread() is main else None)
    server.behaviours["/f.bin"] = ["503"] * 20
    with pytest.raises(InputError, match="status 503"):
        fetch(server, tmp_path)
    assert slept == [0.01 * 2 ** i for i in range(data.ATTEMPTS - 1)]


def test_a_script_without_a_network_ends_in_one_line(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(Path(data.__file__).parent)!r}); import data; data.BACKOFF_SECONDS = 0.01; data.run_script(data.main)"
    found = subprocess.run([sys.executable, "-c", code, "prepare", tmp_path / "x", "--task", "fewrel", "--raw-dir", tmp_path / "raw"], capture_output=True, text=True,
                           encoding="utf-8", env={**os.environ, "https_proxy": "http://127.0.0.1:9"}, check=False)  # which leads nowhere
    (line,) = found.stderr.splitlines()
    assert found.returncode == 2 and line.startswith("error: ") and "train_wiki.json" in line and "Check the network" in line


def test_no_network_says_what_can_be_done(server, tmp_path):
    with Loopback() as gone:
        url = gone.url + "/f.bin"
    with pytest.raises(InputError) as caught:
        download(url, tmp_path / "f.bin", sha256=SHA256)
    message = str(caught.value)
    assert url in message and str(tmp_path / "f.bin") in message and "\n" not in message
    assert message.endswith("`python committee.py` with no flags needs only the Python package index")


def test_full_disk(server, tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "full")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"no space left.*f\.bin\.part"):
        fetch(server, tmp_path)
    assert "f.bin" not in left_in(tmp_path) and len(server.requests) == 1


def test_slow_drip(server, tmp_path):
    """Slower than the time-out in all, but never between two pieces: it gets there, and is no file before its end."""
    server.behaviours["/f.bin"] = ["drip"]
    thread = threading.Thread(target=fetch, args=(server, tmp_path))
    thread.start()
    while thread.is_alive():
        assert not (tmp_path / "f.bin").exists() or (tmp_path / "f.bin").read_bytes() == BODY
        time.sleep(0.02)
    assert (tmp_path / "f.bin").read_bytes() == BODY and len(server.requests) == 1


def test_body_without_end(server, tmp_path):
    """Not much more is written than was announced elsewhere, however much is sent."""
    server.behaviours["/f.bin"] = ["endless"]
    with pytest.raises(InputError, match="wrong file .*458752.* instead of .*400000.*deleted"):
        fetch(server, tmp_path)
    assert left_in(tmp_path) == []


def test_length_that_is_no_number(server, tmp_path):
    server.behaviours["/f.bin"] = ["no number"]
    assert fetch(server, tmp_path).read_bytes() == BODY


def test_two_processes_fetch_one_file(server, tmp_path):
    server.delay = 0.3
    code = ("import sys; sys.path[:0] = {!r}; from data import download; download({!r}, {!r}, sha256={!r})"
            .format(sys.path, server.url + "/f.bin", str(tmp_path / "f.bin"), SHA256))
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [process.wait(20) for process in processes] == [0, 0]
    assert (tmp_path / "f.bin").read_bytes() == BODY and len(server.requests) == 1


# ---- fetch_bytes ----


def test_fetch_bytes(server):
    assert fetch_bytes(server.url + "/f.bin") == BODY
    assert fetch_bytes(server.url + "/f.bin", 10, 20) == BODY[10:20]
    assert fetch_bytes(server.url + "/f.bin", 0, 1) == BODY[:1]
    assert fetch_bytes(server.url + "/f.bin", len(BODY) - 5) == BODY[-5:]
    assert [request.range for request in server.requests] == [None, "bytes=10-19", "bytes=0-0", f"bytes={len(BODY) - 5}-"]


@pytest.mark.parametrize("word", ["503", "short", "wrong range", "stall"])
def test_fetch_bytes_tries_again(server, word):
    server.behaviours["/f.bin"] = [word]
    assert fetch_bytes(server.url + "/f.bin", 100, 3000) == BODY[100:3000]
    assert len(server.requests) == 2


@pytest.mark.parametrize("word", ["no ranges", "416"])
def test_fetch_bytes_refuses_a_server_without_ranges(server, word):
    server.behaviours["/f.bin"] = [word]
    with pytest.raises(InputError, match="bytes 100 to 200"):
        fetch_bytes(server.url + "/f.bin", 100, 200)
    assert len(server.requests) == 1


def test_fetch_bytes_of_a_body_without_end(server, monkeypatch):
    monkeypatch.setattr(data, "MOST_BYTES_AT_ONCE", 1_000_000)
    for span in ((), (0, 1000)):
        server.behaviours["/f.bin"] = ["endless"]
        with pytest.raises(InputError, match="perhaps without end"):
            fetch_bytes(server.url + "/f.bin", *span)


def test_fetch_bytes_past_the_end(server):
    with pytest.raises(InputError, match="instead of"):
        fetch_bytes(server.url + "/f.bin", len(BODY) - 5, len(BODY) + 5)
