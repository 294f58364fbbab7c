"""A read-only Hub of one data set on loopback: what the ``datasets`` library asks for when it streams."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

COMMIT = "a" * 40


class DatasetServer(ThreadingHTTPServer):
    """Serves one data set.

    Attributes:
        name: ``owner/name``.
        files: path to content.
        sent: path to the bytes of it that went out.
        failures: path to how many of the next requests for its bytes are answered with 503.
        answers: requests left to answer at all; later ones find the line dead. None for no end.
    """

    def __init__(self, name: str, files: Mapping[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.name = name
        self.files = files
        self.sent: dict[str, int] = dict.fromkeys(files, 0)
        self.failures: dict[str, int] = dict.fromkeys(files, 0)
        self.answers: int | None = None

    @property
    def endpoint(self) -> str:
        """What HF_ENDPOINT must be."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def entries(self, folder: str) -> list[dict[str, Any]]:
        """What lies directly in a folder, as the Hub lists it."""
        paths = [PurePosixPath(path) for path in self.files]
        inside = {path for path in paths for path in (path, *path.parents) if str(path.parent) == (folder or ".")}
        return [self._entry(path) for path in sorted(inside) if str(path) != "."]

    def _entry(self, path: PurePosixPath) -> dict[str, Any]:
        content = self.files.get(str(path))
        oid = hashlib.sha1(str(path).encode()).hexdigest()
        if content is None:
            return {"type": "directory", "oid": oid, "path": str(path)}
        return {"type": "file", "oid": oid, "size": len(content), "path": str(path)}


class _Connection(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: DatasetServer

    def do_GET(self) -> None:
        if self.server.answers is not None:
            self.server.answers -= 1
            if self.server.answers < 0:
                self.close_connection = True
                return
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urlsplit(self.path).path
        api, tree = f"/api/datasets/{self.server.name}", f"/tree/{COMMIT}"
        files = f"/datasets/{self.server.name}/resolve/"
        if path.startswith(api + tree):
            self._answer(json.dumps(self.server.entries(path.removeprefix(api + tree).strip("/"))).encode())
        elif path == api or path.startswith(f"{api}/revision/"):
            siblings = [{"rfilename": name} for name in self.server.files]
            self._answer(json.dumps({"id": self.server.name, "sha": COMMIT, "siblings": siblings}).encode())
        elif path.startswith(files):
            self._send_file(path.removeprefix(files).partition("/")[2])
        else:
            self._answer(b"{}", 404)

    do_HEAD = do_GET
    do_POST = do_GET

    def _send_file(self, name: str) -> None:
        content = self.server.files.get(name)
        if content is None:
            self._answer(b"", 404)
            return
        if self.command == "GET" and self.server.failures[name]:
            self.server.failures[name] -= 1
            self._answer(b"", 503)
            return
        headers = {"ETag": f'"{hashlib.sha1(name.encode()).hexdigest()}"', "X-Repo-Commit": COMMIT}
        first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        part = content[int(first) : int(last) + 1 if last else None]
        status = 206 if "Range" in self.headers else 200
        headers["Content-Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
        self._answer(part, status, headers, name)

    def _answer(
        self, body: bytes, status: int = 200, headers: Mapping[str, str] | None = None, path: str | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
            if path is not None:
                self.server.sent[path] += len(body)

    def log_message(self, format: str, *args: object) -> None:
        """Tests read ``sent``, not a log."""


@contextmanager
def served(name: str, files: Mapping[str, bytes]) -> Iterator[DatasetServer]:
    """A server of one data set, running in a thread."""
    with DatasetServer(name, files) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
