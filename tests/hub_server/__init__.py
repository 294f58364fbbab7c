"""A small Hub on loopback: keeps repositories and enforces the protocol that huggingface_hub 2.4.0 speaks.

It serves models over HTTP with the LFS path (``HF_HUB_DISABLE_XET=1``): accounts and tokens, repositories with
branches, commits and pull requests, LFS objects on a second origin behind signed links, and the read side that
``snapshot_download`` and ``from_pretrained`` use. Jobs run on this machine. Faults can be
ordered, and every request is logged.

What it cannot show: the chunk store (Xet), pages of long listings, the Hub's own limits and scans, and whatever
the Hub changes later.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import huggingface_hub.hf_api
import pytest

from tests.hub_server.cards import metadata_problems
from tests.hub_server.faults import Fault, Faults, LoggedRequest
from tests.hub_server.handlers import HubHandler, StorageHandler
from tests.hub_server.jobs import Jobs
from tests.hub_server.storage import Storage

__all__ = ["Fault", "HubServer", "LoggedRequest", "hub", "metadata_problems", "point_client_at", "running_hub"]


class HubServer(Storage):
    """Two HTTP servers on 127.0.0.1, the Hub and its object storage, and all that they keep.

    Attributes:
        faults: what goes wrong with requests to come.
        log: the requests so far.
        jobs: those that were started.
        kernels: name of a kernel's repository to the commits of its branches.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        requests = Faults()
        self.faults, self.log = requests.ordered, requests.log
        self.jobs = Jobs()
        self.kernels: dict[str, dict[str, str]] = {}
        served = {"hub": self, "faults": requests}
        self._servers = [
            ThreadingHTTPServer(("127.0.0.1", 0), type(handler.__name__, (handler,), served))
            for handler in (HubHandler, StorageHandler)
        ]
        self.url, self.storage_url = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)

    def start(self) -> None:
        """Answer requests on background threads until :meth:`stop`."""
        for server in self._servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        """Close both ports."""
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Variables that lead a client in a fresh process here, with caches under ``home``."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            **({"HF_TOKEN": token} if token else {}),
        }

    def uploaded_bytes(self) -> int:
        """Bytes of file content that reached the storage or came inside a commit, since the log was cleared."""
        return sum(r.received for r in self.log if r.path.startswith("/upload/") or "/commit/" in r.path)


@contextmanager
def running_hub(folder: Path) -> Iterator[HubServer]:
    """A server that answers for as long as the block runs."""
    server = HubServer(folder)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def point_client_at(server: HubServer, monkeypatch: pytest.MonkeyPatch, home: Path, token: str | None) -> None:
    """Lead the client of this process to the server; it reads its environment at import, hence more than that."""
    for variable in ("HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in server.environment(home, token).items():
        monkeypatch.setenv(variable, value)
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
    # File systems are kept for reuse and remember which server they were made for.
    huggingface_hub.HfFileSystem.clear_instance_cache()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub on loopback that the client of this process talks to, logged in as ``alice`` with a write token."""
    with running_hub(tmp_path / "hub-objects") as server:
        point_client_at(server, monkeypatch, tmp_path / "hub-home", server.add_account("alice"))
        yield server
