"""Requests to the loopback Hub, each logged with its bytes, and the faults that can be ordered for them."""

from __future__ import annotations

import re
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import Any, ClassVar, Literal


@dataclass
class Fault:
    """What goes wrong with the next requests that match.

    Attributes:
        method, path: HTTP method, and a regular expression searched in the path; storage requests have paths
            ``/upload/…`` and ``/object/…``.
        kind: ``status`` answers ``status`` with ``message``; ``drop`` cuts the connection after ``after_bytes`` of
            an upload's body, or of a download's; ``lose`` does what was asked and cuts the connection in place of
            an answer; ``slow`` waits ``seconds`` and then answers as usual; ``whole`` sends a file in place of the
            range that was asked for.
        times: how many requests are hit.
    """

    method: str
    path: str
    kind: Literal["status", "drop", "lose", "slow", "whole"]
    status: int = 500
    message: str = "Internal Error - We're working hard to fix this as soon as possible!"
    code: str = ""
    after_bytes: int = 0
    seconds: float = 0.0
    times: int = 1


@dataclass
class LoggedRequest:
    """One request, in the log from its start; ``received`` and ``sent`` count bytes of the bodies.

    ``status`` is 0 until an answer begins, and stays so where the connection broke before one.
    """

    method: str
    path: str
    authorized: bool
    status: int = 0
    received: int = 0
    sent: int = 0


class Faults:
    """The faults that are ordered, and the log."""

    def __init__(self) -> None:
        self.ordered: list[Fault] = []
        self.log: list[LoggedRequest] = []
        self._lock = threading.Lock()

    def take(self, method: str, path: str) -> Fault | None:
        """The fault ordered for this request, if any, counted down."""
        with self._lock:
            for fault in self.ordered:
                if fault.times > 0 and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None


class Connection(BaseHTTPRequestHandler):
    """One connection that logs its bytes and breaks where it was told to.

    Attributes:
        fault: what was ordered for the request that is being answered.
        entry: its line in the log.
    """

    faults: ClassVar[Faults]
    protocol_version = "HTTP/1.1"
    # Headers and body leave in two writes; together with delayed acknowledgements that would cost 40 ms each time.
    disable_nagle_algorithm = True
    fault: Fault | None
    entry: LoggedRequest

    def begin(self, path: str) -> None:
        """Log the request, and take the fault that is ordered for it."""
        self.entry = LoggedRequest(self.command, path, "authorization" in self.headers)
        self.faults.log.append(self.entry)
        self.fault = self.faults.take(self.command, path)
        if self.has_fault("slow"):
            assert self.fault is not None
            # Not time.sleep, which tests of the client's retries do away with.
            threading.Event().wait(self.fault.seconds)

    def has_fault(self, kind: str) -> bool:
        """Whether a fault of that kind is to happen now."""
        return self.fault is not None and self.fault.kind == kind

    def breaks_at(self, done: int) -> int | None:
        """How many of further bytes pass before the line breaks, after ``done``; None where it does not."""
        return self.fault.after_bytes - done if self.fault and self.fault.kind == "drop" else None

    def body_blocks(self) -> Iterator[bytes]:
        """The request's body, plain or chunked, block by block; cut off where a fault says so."""
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.count(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length", 0))
        while left:
            block = self.count(self.rfile.read(min(left, 2**16)))
            if not block:
                raise ConnectionResetError
            left -= len(block)
            yield block

    def count(self, block: bytes) -> bytes:
        left = self.breaks_at(self.entry.received)
        self.entry.received += len(block)
        if left is not None and len(block) > left:
            self.drop_connection()
        return block

    def drop_connection(self) -> None:
        """Reset the connection as a broken line would."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        raise ConnectionResetError

    def read_body(self) -> bytes:
        return b"".join(self.body_blocks())

    def send_block(self, block: bytes) -> None:
        left = self.breaks_at(self.entry.sent)
        if left is not None and len(block) > left:
            self.wfile.write(block[:left])
            self.wfile.flush()
            self.entry.sent += left
            self.connection.shutdown(socket.SHUT_WR)
            self.close_connection = True
            raise ConnectionResetError
        self.entry.sent += len(block)
        self.wfile.write(block)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the requests are in the log."""
