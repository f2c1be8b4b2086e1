"""A small web server on 127.0.0.1 that serves given bytes, and misbehaves where a test asks."""

from __future__ import annotations

import re
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(frozen=True)
class Request:
    path: str
    range: str | None
    user_agent: str
    encodings: str | None  # the header Accept-Encoding
    connection: int  # the client's port: one for each connection


class Loopback:
    """A server. files: path -> bytes. behaviours: path -> what its next answers do, a word each.

    Words: "ok" (also when the list is used up); "no ranges"; "short" (half the body, then the end);
    "chunked" (whole, its length not announced), "short chunked"; "wrong range"; "corrupt"; "html"
    (an error page with status 200); "stall" (half the body, then nothing); "drip" (the body a
    hundredth at a time, slowly); "endless" (the body again and again, its length not announced);
    "no number" (a Content-Length that is none); "416"; "loop" and "file" (redirects to itself and
    to file://); "refuse" (the connection is closed unanswered); or a status such as "404". "429:7"
    adds the header `Retry-After: 7`.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.behaviours: dict[str, list[str]] = {}
        self.requests: list[Request] = []
        self.delay = 0.0  # seconds before every answer
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()
        self._ended = threading.Event()

    def __enter__(self) -> Loopback:
        loopback = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                loopback._answer(self)

            def log_message(self, *arguments: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, *arguments: object) -> None:
                pass  # a client that went away: some tests are about just that

        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        serve = self._server.serve_forever
        threading.Thread(target=serve, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()

    def asked(self, path: str) -> list[Request]:
        return [request for request in self.requests if request.path == path]

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        with self._lock:
            headers = handler.headers
            self.requests.append(Request(
                handler.path, headers.get("Range"), headers.get("User-Agent", ""),
                headers.get("Accept-Encoding"), handler.client_address[1]))
            queue = self.behaviours.get(handler.path, [])
            word = queue.pop(0) if queue else "ok"
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            time.sleep(self.delay)
            self._send(handler, word)
        except (BrokenPipeError, ConnectionResetError):
            handler.close_connection = True
        finally:
            with self._lock:
                self._at_once -= 1

    def _send(self, handler: BaseHTTPRequestHandler, word: str) -> None:
        body, status, headers = self.files.get(handler.path), 200, {}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", handler.headers.get("Range", ""))
        if word == "refuse":
            handler.close_connection = True
            return
        if re.match(r"\d{3}", word) or body is None:
            word = word if word[0].isdigit() else "404"
            number, _, after = word.partition(":")
            body, status = b"no", int(number)
            headers = {"Retry-After": after} if after else {}
        elif word in ("loop", "file"):
            body, status = b"", 302
            headers = {"Location": handler.path if word == "loop" else "file:///etc/hostname"}
        elif word == "html":
            body = b"<html>Please log in</html>"
        knows_ranges = word not in ("no ranges", "html")
        if asked and status == 200 and knows_ranges:
            start, end = int(asked[1]), min(int(asked[2] or len(body)) + 1, len(body))
            if start >= len(body):
                body, status, headers = b"", 416, {"Content-Range": f"bytes */{len(body)}"}
            else:
                shift = 1 if word == "wrong range" else 0
                headers = {"Content-Range": f"bytes {start - shift}-{end - shift - 1}/{len(body)}"}
                body, status = body[start - shift:end - shift], 206
        if word == "corrupt":
            third = len(body) // 3
            body = body[:third] + bytes([body[third] ^ 1]) + body[third + 1:]
        handler.send_response(status)
        if word == "no number":
            headers |= {"Content-Length": "many", "Connection": "close"}
        elif word == "endless":
            headers |= {"Connection": "close"}
        elif word.endswith("chunked"):
            headers |= {"Transfer-Encoding": "chunked"}
        else:
            headers |= {"Content-Length": str(len(body))}
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        if word.endswith("chunked"):
            handler.wfile.write(b"%x\r\n" % len(body))
            whole = body + b"\r\n0\r\n\r\n"
            handler.wfile.write(body[:len(body) // 2] if word == "short chunked" else whole)
        elif word == "drip":
            for start in range(0, len(body), step := len(body) // 100 + 1):
                handler.wfile.write(body[start:start + step])
                time.sleep(0.01)
        elif word == "endless":
            while not self._ended.is_set():
                handler.wfile.write(body)
        elif word in ("short", "stall"):
            handler.wfile.write(body[:len(body) // 2])
        else:
            handler.wfile.write(body)
        if word == "stall":
            handler.wfile.flush()
            self._ended.wait(10)
        if word in ("short", "short chunked", "stall", "no number"):
            handler.close_connection = True
