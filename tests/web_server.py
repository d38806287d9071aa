"""A web server on loopback with ranges, that counts what it is asked and fails on demand; and a real S3 server."""

import contextlib
import hashlib
import re
import socket
import struct
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit


@dataclass
class WebServer:
    """Serves the files of a folder.

    Attributes:
        folder: What is served.
        url: Of the folder.
        requests: Path (with its query) and range of each request so far.
        sent_bytes: Of bodies.
        faults: What happens to the coming requests in place of an answer, one each.
        ranges: Whether it knows ranges.
        query: What requests must bring along, or they are forbidden.
    """

    folder: Path
    url: str = ""
    requests: list[tuple[str, str]] = field(default_factory=list)
    sent_bytes: int = 0
    faults: list[Callable[["_Handler"], None]] = field(default_factory=list)
    ranges: bool = True
    query: str = ""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits for an acknowledgement
    state: WebServer

    def do_GET(self) -> None:
        address, wanted = urlsplit(self.path), self.headers.get("Range", "")
        self.state.requests.append((self.path, wanted))
        if self.state.faults:
            self.state.faults.pop(0)(self)
            return
        path = self.state.folder / address.path.lstrip("/")
        if address.query != self.state.query:
            self.send_error(403)
        elif not path.is_file():
            self.send_error(404)
        else:
            self._send(path.read_bytes(), wanted)

    def _send(self, content: bytes, wanted: str) -> None:
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted) if self.state.ranges else None
        start, end = (int(found[1]), min(int(found[2]) + 1, len(content))) if found else (0, len(content))
        body = content[start:end]
        self.send_response(416 if found and start >= len(content) else 206 if found else 200)
        if found:
            self.send_header("Content-Range", f"bytes {f'{start}-{end - 1}' if body else '*'}/{len(content)}")
        self.send_header("ETag", f'"{hashlib.md5(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(body)
            self.state.sent_bytes += len(body)

    def log_message(self, *args: Any) -> None:
        pass


def answer(code: int) -> Callable[[_Handler], None]:
    """Answer with an error."""
    return lambda handler: handler.send_error(code)


def reset(handler: _Handler) -> None:
    """Begin to answer and reset the connection."""
    handler.send_response(206)
    handler.send_header("Content-Range", "bytes 0-999/1000")
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b"a few")
    handler.wfile.flush()
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.close_connection = True


def stall(handler: _Handler) -> None:
    """Say nothing for a second."""
    time.sleep(1.0)
    handler.close_connection = True


def trickle(handler: _Handler) -> None:
    """Send a byte now and then, so that no single read takes long."""
    handler.send_response(206)
    handler.send_header("Content-Range", "bytes 0-99/100")
    handler.send_header("Content-Length", "100")
    handler.send_header("Connection", "close")
    handler.end_headers()
    with contextlib.suppress(OSError):
        for _ in range(100):
            handler.wfile.write(b"x")
            handler.wfile.flush()
            time.sleep(0.02)
    handler.close_connection = True


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[WebServer]:
    """Serve a folder on a free port."""
    state = WebServer(folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"state": state}))
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()


class FaultyApp:
    """A WSGI application in front of another: counts requests, and answers the coming ones with what is in `faults`.

    Attributes:
        faults: HTTP statuses, one a request.
        is_away: Whether it answers all requests with 503.
        requests: Method, path and range so far.
    """

    def __init__(self, app: Callable) -> None:
        self.app, self.faults, self.requests = app, list[int](), list[tuple[str, str, str]]()
        self.is_away = False

    def __call__(self, environ: dict, start_response: Callable) -> Any:
        request = (environ["REQUEST_METHOD"], environ["PATH_INFO"], environ.get("HTTP_RANGE", ""))
        self.requests.append(request)
        if self.is_away:
            start_response("503 Slow Down", [("Content-Length", "0")])
            return [b""]
        if self.faults and request[0] != "PUT":
            start_response(f"{self.faults.pop(0)} Fault", [("Content-Length", "0")])
            return [b""]
        return self.app(environ, start_response)


@dataclass(frozen=True)
class S3Bucket:
    """A bucket of the server in front of which `app` stands."""

    app: FaultyApp
    name: str
    client: Any

    @staticmethod
    def create(app: FaultyApp) -> "S3Bucket":
        import boto3.session  # here, since most tests need no S3

        client, name = boto3.session.Session().client("s3"), f"bucket-{uuid.uuid4().hex[:8]}"
        client.create_bucket(Bucket=name)
        return S3Bucket(app, name, client)

    def put(self, key: str, content: bytes) -> str:
        """Store an object; returns its address."""
        self.client.put_object(Bucket=self.name, Key=key, Body=content)
        return f"s3://{self.name}/{key}"
