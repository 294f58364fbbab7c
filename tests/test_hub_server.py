"""The loopback Hub refuses what the Hub refuses, and serves what the real client asks for."""

from __future__ import annotations

import hashlib
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

import huggingface_hub.constants
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.hub_server import Fault, HubServer

WEIGHTS = bytes(range(256)) * 400
FILES = {"config.json": b'{"model_type": "mamba2"}\n', "model.safetensors": WEIGHTS, "sub/notes.txt": b"hello\n"}


def fetch(url: str, method: str = "GET", body: bytes | None = None, headers: Mapping[str, str] = {}) -> bytes:
    """One request without the client library, for what the library would never send."""
    request = urllib.request.Request(url, data=body, method=method, headers=dict(headers))
    with urllib.request.urlopen(request, timeout=10) as response:
        return bytes(response.read())


def test_download_has_the_bytes_and_the_token_stays_off_the_storage(hub: HubServer) -> None:
    commit = hub.add_repo("alice/model", FILES, private=True)
    folder = Path(HfApi().snapshot_download("alice/model"))
    assert folder.name == commit
    assert {name: (folder / name).read_bytes() for name in FILES} == FILES
    storage = [entry for entry in hub.log if entry.path.startswith("/object/")]
    assert len(storage) == 1 and not storage[0].authorized
    assert all(entry.authorized for entry in hub.log if "/resolve/" in entry.path)


def test_download_goes_on_where_the_connection_broke(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    hub.add_repo("alice/model", FILES)
    hub.faults.append(Fault("GET", "/object/", "drop", after_bytes=30_000))
    path = Path(HfApi().hf_hub_download("alice/model", "model.safetensors"))
    assert path.read_bytes() == WEIGHTS
    first, second = (entry for entry in hub.log if entry.path.startswith("/object/"))
    assert first.sent == 30_000 and second.status == 206
    assert first.sent + second.sent == len(WEIGHTS)


def test_tree_folders_and_metadata(hub: HubServer) -> None:
    hub.add_repo("alice/model", {**FILES, "README.md": b"---\ntags: [mamba]\nlicense: mit\n---\n# A\n"})
    api = HfApi()
    every = {entry.path for entry in api.list_repo_tree("alice/model", recursive=True)}
    assert every == {".gitattributes", "README.md", "config.json", "model.safetensors", "sub", "sub/notes.txt"}
    assert {entry.path for entry in api.list_repo_tree("alice/model", "sub")} == {"sub/notes.txt"}
    assert "sub/notes.txt" not in {entry.path for entry in api.list_repo_tree("alice/model")}
    info = api.model_info("alice/model", files_metadata=True)
    assert info.card_data is not None and info.card_data.license == "mit"
    weights = next(file for file in info.siblings or [] if file.rfilename == "model.safetensors")
    assert weights.lfs is not None and weights.lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()


def test_missing_things_are_named_as_the_hub_names_them(hub: HubServer) -> None:
    hub.add_repo("alice/model", FILES)
    hub.add_repo("bob/secret", FILES, private=True)
    hub.add_repo("bob/gated", FILES, gated=True)
    api = HfApi()
    for missing in ("alice/none", "bob/secret"):
        with pytest.raises(RepositoryNotFoundError):
            api.model_info(missing)
    with pytest.raises(RevisionNotFoundError):
        api.model_info("alice/model", revision="no-such-branch")
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download("alice/model", "missing.json")
    with pytest.raises(GatedRepoError):
        api.hf_hub_download("bob/gated", "config.json")
    assert api.model_info("bob/gated").gated == "manual"
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        HfApi(token="hf_wrong").model_info("alice/model")


def test_push_keeps_contents_and_checks_the_parent(hub: HubServer) -> None:
    api = HfApi()
    api.create_repo("alice/model", private=True)
    head = api.model_info("alice/model").sha
    operations = [CommitOperationAdd(path, content) for path, content in FILES.items()]
    first = api.create_commit("alice/model", operations, commit_message="One", parent_commit=head)
    assert {path: hub.content("alice/model", path) for path in FILES} == FILES
    assert hub.repositories["alice/model"].private
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as caught:
        change = [CommitOperationAdd("config.json", b"{}")]
        api.create_commit("alice/model", change, commit_message="Two", parent_commit=head)
    assert caught.value.response.status_code == 412
    assert hub.repositories["alice/model"].refs["main"] == first.oid
    api.create_commit("alice/model", [CommitOperationDelete("config.json")], commit_message="Three")
    assert "config.json" not in hub.paths("alice/model")


def test_pull_request_leaves_main_alone(hub: HubServer) -> None:
    head = hub.add_repo("bob/model", FILES)
    api = HfApi()
    change = [CommitOperationAdd("model.safetensors", WEIGHTS[::-1])]
    info = api.create_commit("bob/model", change, commit_message="Better", create_pr=True)
    assert info.pr_revision == "refs/pr/1" and info.pr_num == 1
    assert hub.repositories["bob/model"].refs["main"] == head
    assert hub.content("bob/model", "model.safetensors", "refs/pr/1") == WEIGHTS[::-1]
    assert [pull.title for pull in api.get_repo_discussions("bob/model", author="alice")] == ["Better"]
    with pytest.raises(HfHubHTTPError, match="required permissions"):
        api.create_commit("bob/model", [CommitOperationAdd("a.txt", b"a")], commit_message="Not mine")


def test_rights(hub: HubServer) -> None:
    hub.add_repo("alice/model", FILES)
    reader = HfApi(token=hub.add_account("carol", role="read"))
    with pytest.raises(HfHubHTTPError, match="read token"):
        reader.auth_check("alice/model", write=True)
    with pytest.raises(HfHubHTTPError, match="rights to create"):
        reader.create_repo("carol/new")
    with pytest.raises(HfHubHTTPError, match="rights to create"):
        HfApi().create_repo("bob/new")
    HfApi().auth_check("alice/model", write=True)
    assert HfApi().whoami()["name"] == "alice"
    assert (
        HfApi(token=hub.add_account("dan", organizations=("team",))).create_repo("team/new").repo_id == "team/new"
    )


def test_hashes_signatures_and_unknown_objects_are_refused(hub: HubServer) -> None:
    hub.add_repo("alice/model")
    oid = hashlib.sha256(WEIGHTS).hexdigest()
    link = f"{hub.storage_url}/upload/alice/model/{oid}"
    signed = f"{link}?signature={hub.sign(f'alice/model {oid}')}"
    token = {"Authorization": f"Bearer {next(iter(hub.accounts))}"}
    for url, body, headers, words in (
        (signed, b"other bytes", {}, "did not match"),
        (link, WEIGHTS, {}, "Access Denied"),
        (signed, WEIGHTS, token, "Only one auth mechanism"),
    ):
        with pytest.raises(urllib.error.HTTPError) as caught:
            fetch(url, "PUT", body, headers)
        assert words in caught.value.read().decode()
    lines = [
        {"key": "header", "value": {"summary": "Sneak"}},
        {"key": "lfsFile", "value": {"path": "model.safetensors", "oid": oid, "size": 1}},
    ]
    with pytest.raises(urllib.error.HTTPError) as caught:
        body = b"\n".join(json.dumps(line).encode() for line in lines)
        fetch(f"{hub.url}/api/models/alice/model/commit/main", "POST", body, token)
    assert "does not exist" in caught.value.read().decode()
    assert len(hub.history("alice/model")) == 1


def test_invalid_card_metadata_is_refused_before_anything_is_sent(hub: HubServer) -> None:
    hub.add_repo("alice/model")
    operations = [
        CommitOperationAdd("README.md", b"---\ntags: mamba\n---\n"),
        CommitOperationAdd("model.safetensors", WEIGHTS),
    ]
    with pytest.raises(ValueError, match='"tags" must be an array'):
        HfApi().create_commit("alice/model", operations, commit_message="Bad card")
    assert hub.uploaded_bytes() == 0


def test_upload_cut_off_is_retried_and_what_arrived_is_not_sent_again(hub: HubServer) -> None:
    api = HfApi()
    api.create_repo("alice/model")
    hub.faults.append(Fault("PUT", "/upload/", "drop", after_bytes=10_000))
    hub.faults.append(Fault("POST", "/commit/", "status", status=503, times=1))
    with pytest.raises(HfHubHTTPError):
        api.create_commit("alice/model", [CommitOperationAdd("a.bin", WEIGHTS)], commit_message="First try")
    puts = [entry for entry in hub.log if entry.path.startswith("/upload/")]
    assert [entry.status for entry in puts] == [0, 200]
    api.create_commit("alice/model", [CommitOperationAdd("a.bin", WEIGHTS)], commit_message="Second try")
    assert len([entry for entry in hub.log if entry.path.startswith("/upload/")]) == 2
    assert hub.content("alice/model", "a.bin") == WEIGHTS


def test_slow_and_worded_faults(hub: HubServer) -> None:
    hub.add_repo("alice/model", FILES)
    hub.faults.append(Fault("GET", "/api/models/", "slow", seconds=0.3))
    start = time.monotonic()
    HfApi().model_info("alice/model")
    assert time.monotonic() - start >= 0.3
    hub.faults.append(Fault("GET", "/api/models/", "status", status=400, message="Out of tea"))
    with pytest.raises(BadRequestError, match="Out of tea"):
        HfApi().model_info("alice/model")
