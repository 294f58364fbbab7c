"""Pushing converted folders with the real client to the Hub on loopback."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import hub_cards.publish as publish
from converter.commands.console import Console
from converter.errors import PublishError, SourceError, UsageError, VerificationError
from converter.manifest import SCALES_NAME, Manifest, SourceRecord
from converter.reporting import Reporter
from converter.scales import ScaleSet
from hub_cards.card import CARD_NAME, make_card
from hub_cards.publish import Destination, check_push, plan_push, push
from tests.converted_folder import convert
from tests.hub_server import Fault, HubServer, point_client_at, running_hub
from tests.small_checkpoints import write_transformers
from tests.tiny_folders import bare_manifest

SOURCE_ID = "bob/tiny"
SOURCE_CARD = "---\nlicense: mit\ntags: [mamba]\n---\n# Tiny\n"
REPO_ID = "alice/tiny-8k-hf"


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries of the client and of the push follow one another at once."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)


@pytest.fixture(scope="module")
def source_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mamba-2 checkpoint of three shards, of which the last holds every A_log."""
    folder = write_transformers(tmp_path_factory.mktemp("source") / "tiny", shards=4)
    (folder / CARD_NAME).write_text(SOURCE_CARD)
    return folder


@pytest.fixture(scope="module")
def conversion(source_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conversion of ``bob/tiny`` from a Hub, with its card: made once, since equal files make equal commits."""
    work = tmp_path_factory.mktemp("conversion")
    with pytest.MonkeyPatch.context() as monkeypatch, running_hub(work / "objects") as server:
        point_client_at(server, monkeypatch, work / "home", None)
        server.add_repo(SOURCE_ID, source_folder)
        return convert_with_card(SOURCE_ID, work / "out")


@pytest.fixture
def converted(hub: HubServer, source_folder: Path, conversion: Path, tmp_path: Path) -> Path:
    """A copy of the conversion, and its source on the Hub."""
    hub.add_repo(SOURCE_ID, source_folder)
    shutil.copytree(conversion, tmp_path / "out")
    return tmp_path / "out"


def convert_with_card(model: str, folder: Path, seed: int = 0) -> Path:
    """A conversion as the pipeline leaves it."""
    manifest = convert(model, folder, seed=seed)
    make_card(folder, manifest, source_card=SOURCE_CARD).write(folder)
    return folder


class Listener(Reporter):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.warnings: list[str] = []
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def files_of(folder: Path) -> dict[str, bytes]:
    """Path to content of every file that is not hidden."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {path: content for path, content in found.items() if not path.startswith(".")}


def lfs_uploads(hub: HubServer) -> list[int]:
    """Sizes of the objects that reached the storage."""
    return [entry.received for entry in hub.log if entry.path.startswith("/upload/") and entry.status == 200]


# What travels


def test_what_is_the_source_or_worse_is_not_pushed(hub: HubServer, converted: Path) -> None:
    manifest = Manifest.read(converted)
    assert manifest is not None and manifest.perplexity is not None
    table = replace(manifest.perplexity, converted=dict.fromkeys(manifest.perplexity.base, 1e6))
    replace(manifest, perplexity=table).write(converted)
    with pytest.raises(PublishError, match="worse than its source at every length") as refused:
        plan_push(converted, Destination())
    assert "--push-anyway" in refused.value.fix
    assert plan_push(converted, Destination(push_anyway=True)).uploads
    ones = [replace(tensor, requested={"min": 1.0, "mean": 1.0, "max": 1.0}) for tensor in manifest.changed]
    replace(manifest, changed=ones).write(converted)
    with pytest.raises(PublishError, match="every factor is 1"):
        plan_push(converted, Destination(push_anyway=True))


def test_push_sends_the_folder_in_one_commit(hub: HubServer, converted: Path) -> None:
    hub.log.clear()
    plan = plan_push(converted, Destination())
    assert plan.repo_id == REPO_ID and not plan.target.repository.exists
    assert hub.uploaded_bytes() == 0
    result = push(plan)
    assert result.url == f"{hub.url}/{REPO_ID}"
    assert hub.history(REPO_ID)[0].oid == result.commit
    assert len(hub.history(REPO_ID)) == 2
    pushed = {path: hub.content(REPO_ID, path) for path in hub.paths(REPO_ID) if path != ".gitattributes"}
    assert pushed == files_of(converted)
    # The pictures are binary, so they are objects as well.
    objects = [*converted.glob("*.safetensors"), converted / SCALES_NAME, *converted.glob("mmod/*.png")]
    expected = [path.stat().st_size for path in objects]
    assert sorted(lfs_uploads(hub)) == sorted(expected)
    assert not [entry for entry in hub.log if entry.path.startswith("/object/")]


def test_pushed_model_loads_by_id_in_a_fresh_process(
    hub: HubServer, converted: Path, source_folder: Path, tmp_path: Path
) -> None:
    push(plan_push(converted, Destination()))
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM as Auto\n"
        "model = Auto.from_pretrained(sys.argv[1], dtype=torch.float32)\n"
        "print(model(torch.arange(24)[None]).logits.flatten().tolist())"
    )
    environment = {**os.environ, **hub.environment(tmp_path / "elsewhere"), "OMP_NUM_THREADS": "1"}
    environment.pop("HF_TOKEN")
    command = [sys.executable, "-c", code, REPO_ID]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    base = AutoModelForCausalLM.from_pretrained(source_folder, dtype=torch.float32)
    scales = ScaleSet.load(str(converted))
    with torch.no_grad():
        before = base(torch.arange(24)[None]).logits.flatten().numpy()
        for name, parameter in base.named_parameters():
            if name in scales.log_s:
                parameter += torch.from_numpy(scales.log_s[name])
        expected = base(torch.arange(24)[None]).logits.flatten().numpy()
    logits = np.array(json.loads(done.stdout))
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(logits - before).max() > 1e-2


def test_second_push_makes_no_commit(hub: HubServer, converted: Path) -> None:
    push(plan_push(converted, Destination()))
    commits = len(hub.history(REPO_ID))
    hub.log.clear()
    plan = plan_push(converted, Destination())
    assert plan.is_empty and not plan.uploads
    assert push(plan).commit is None
    assert len(hub.history(REPO_ID)) == commits
    assert hub.uploaded_bytes() == 0


def test_cut_off_push_goes_on_with_what_is_missing(hub: HubServer, converted: Path) -> None:
    hub.faults.append(Fault("POST", "/commit/", "status", status=503, times=99))
    with pytest.raises(PublishError, match="retries did not help") as caught:
        push(plan_push(converted, Destination()))
    assert f"mmod push {converted} --repo-id {REPO_ID}" in caught.value.fix
    assert hub.paths(REPO_ID) == [".gitattributes"]
    first = lfs_uploads(hub)
    hub.faults.clear()
    hub.log.clear()
    assert push(plan_push(converted, Destination())).commit is not None
    assert first and lfs_uploads(hub) == []
    assert set(hub.paths(REPO_ID)) == {".gitattributes", *files_of(converted)}


def test_upload_survives_a_broken_connection_and_server_errors(hub: HubServer, converted: Path) -> None:
    hub.faults.append(Fault("PUT", "/upload/", "drop", after_bytes=100))
    hub.faults.append(Fault("PUT", "/upload/", "status", status=500, times=2))
    hub.faults.append(Fault("POST", "/commit/", "status", status=502))
    push(plan_push(converted, Destination()))
    assert set(hub.paths(REPO_ID)) == {".gitattributes", *files_of(converted)}
    assert len(hub.history(REPO_ID)) == 2


def test_commit_whose_answer_was_lost_is_not_made_twice(hub: HubServer, converted: Path) -> None:
    hub.faults.append(Fault("POST", "/commit/", "lose"))
    result = push(plan_push(converted, Destination()))
    assert result.commit == hub.repositories[REPO_ID].refs["main"]
    assert len(hub.history(REPO_ID)) == 2


# Which repositories may be written


def test_repository_with_something_else_is_refused_before_a_byte(hub: HubServer, converted: Path) -> None:
    hub.add_repo("alice/other", {"config.json": b"{}"})
    hub.add_repo(REPO_ID, {"mmod.json": (converted / "mmod.json").read_bytes().replace(b"bob/tiny", b"eve/tiny")})
    hub.log.clear()
    with pytest.raises(PublishError, match="holds 1 files and no manifest") as caught:
        plan_push(converted, Destination("alice/other"))
    assert "--yes-overwrite" in caught.value.fix
    with pytest.raises(PublishError, match="a conversion of eve/tiny"):
        plan_push(converted, Destination())
    assert hub.uploaded_bytes() == 0
    push(plan_push(converted, Destination("other", yes_overwrite=True)))
    assert hub.content("alice/other", "config.json") == (converted / "config.json").read_bytes()


def test_empty_repository_and_earlier_push_are_written(hub: HubServer, converted: Path, tmp_path: Path) -> None:
    hub.add_repo(REPO_ID)
    push(plan_push(converted, Destination()))
    again = convert_with_card(SOURCE_ID, tmp_path / "again", seed=1)
    with pytest.raises(PublishError, match="another conversion of bob/tiny already") as caught:
        plan_push(again, Destination())
    assert "--yes-overwrite" in caught.value.fix
    with pytest.raises(PublishError, match="another conversion of bob/tiny already"):
        check(Destination(REPO_ID))
    assert check(Destination(REPO_ID, yes_overwrite=True)) == check(Destination(REPO_ID, revision="64k")) == REPO_ID
    assert plan_push(again, Destination(revision="64k")).uploads
    plan = plan_push(again, Destination(yes_overwrite=True))
    assert {"model-00004-of-00004.safetensors", "config.json"} <= set(plan.unchanged)
    push(plan)
    weights = "model-00003-of-00004.safetensors"
    assert hub.content(REPO_ID, weights) == (again / weights).read_bytes()
    assert len(hub.history(REPO_ID)) == 3


def test_weights_that_would_be_loaded_by_mistake_are_deleted(hub: HubServer, converted: Path) -> None:
    push(plan_push(converted, Destination()))
    repo = hub.repositories[REPO_ID]
    stale = ["model.safetensors", "pytorch_model.bin", "mmod/old.png"]
    others = ["model.gguf", "fp16/model.safetensors", "mmod/notes.txt"]
    hub.commit(repo, "main", dict.fromkeys([*stale, *others], b"old"), "By hand", "alice")
    plan = plan_push(converted, Destination())
    assert plan.deletions == tuple(sorted(stale))
    push(plan)
    assert not set(stale) & set(hub.paths(REPO_ID)) and set(others) <= set(hub.paths(REPO_ID))


def test_words_added_on_the_hub_are_kept(hub: HubServer, converted: Path) -> None:
    push(plan_push(converted, Destination()))
    card = hub.content(REPO_ID, CARD_NAME).decode()
    repo = hub.repositories[REPO_ID]
    hub.commit(repo, "main", {CARD_NAME: f"{card}\nSeen on the Hub.\n".encode()}, "By hand", "alice")
    (converted / "LICENSE").write_text("new")
    push(plan_push(converted, Destination()))
    assert hub.content(REPO_ID, CARD_NAME).decode().endswith("\n\nSeen on the Hub.\n")
    assert (converted / CARD_NAME).read_bytes() == hub.content(REPO_ID, CARD_NAME)
    assert plan_push(converted, Destination()).is_empty


def test_edit_in_between_is_noticed(hub: HubServer, converted: Path) -> None:
    hub.add_repo(REPO_ID)
    plan = plan_push(converted, Destination())
    hub.commit(hub.repositories[REPO_ID], "main", {"a.txt": b"a"}, "By someone else", "alice")
    with pytest.raises(PublishError, match="A commit has happened since") as caught:
        push(plan)
    assert "mmod push" in caught.value.fix
    assert hub.paths(REPO_ID) == [".gitattributes", "a.txt"]


# Options


def test_private_revision_and_message(hub: HubServer, converted: Path) -> None:
    destination = Destination("alice/chosen", private=True, revision="long", commit_message="Better at length")
    push(plan_push(converted, destination))
    repo = hub.repositories["alice/chosen"]
    assert repo.private
    assert hub.paths("alice/chosen", "main") == [".gitattributes"]
    assert set(hub.paths("alice/chosen", "long")) == {".gitattributes", *files_of(converted)}
    assert repo.commits[repo.refs["long"]].title == "Better at length"
    assert plan_push(converted, destination).is_empty


def test_public_repository_is_not_taken_for_a_private_push(hub: HubServer, converted: Path) -> None:
    hub.add_repo(REPO_ID)
    with pytest.raises(PublishError, match="is public, and --private was given"):
        plan_push(converted, Destination(private=True))
    with pytest.raises(UsageError, match="exclude each other"):
        plan_push(converted, Destination(private=True, public=True))


def hide_source(hub: HubServer, folder: Path) -> None:
    hub.repositories[SOURCE_ID].private = True


def gate_source(hub: HubServer, folder: Path) -> None:
    hub.repositories[SOURCE_ID].gated = True


def make_source_local(hub: HubServer, folder: Path) -> None:
    rewrite_manifest(folder, source={"kind": "folder", "name": "tiny"})


def add_local_tokenizer(hub: HubServer, folder: Path) -> None:
    rewrite_manifest(folder, tokenizer={"kind": "folder", "name": "words", "revision": "sha256:0"})


def rewrite_manifest(folder: Path, **fields: dict[str, object]) -> None:
    """Merge fields into the records of a folder's mmod.json."""
    path = folder / "mmod.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {name: (content[name] or {}) | fields[name] for name in fields}))


@pytest.mark.parametrize(
    ("conceal", "reason"),
    [
        (hide_source, "bob/tiny cannot be seen on the Hub"),
        (gate_source, "bob/tiny is gated"),
        (make_source_local, "tiny is a local folder"),
        (add_local_tokenizer, "words is a local folder"),
    ],
)
def test_what_is_not_public_stays_private_unless_asked(
    hub: HubServer, converted: Path, conceal: Callable[[HubServer, Path], None], reason: str
) -> None:
    conceal(hub, converted)
    listener = Listener()
    plan = plan_push(converted, Destination("alice/a"))
    plan.show(listener)
    assert plan.to_json()["private"] and any(reason in line and "--public" in line for line in listener.lines)
    push(plan)
    assert hub.repositories["alice/a"].private
    hub.add_repo("alice/b")
    with pytest.raises(PublishError, match=f"alice/b is public, and {reason}") as caught:
        plan_push(converted, Destination("alice/b"))
    assert "add --public" in caught.value.fix
    push(plan_push(converted, Destination("alice/b", public=True)))
    push(plan_push(converted, Destination("alice/c", public=True)))
    assert not hub.repositories["alice/c"].private


def test_pictures_that_cannot_be_drawn_are_no_fault_of_the_hub(
    hub: HubServer, converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no font")

    monkeypatch.setattr("hub_cards.card.draw_pictures", fail)
    listener = Listener()
    push(plan_push(converted, Destination(), reporter=listener))
    assert any("no font" in warning and "Hub" not in warning for warning in listener.warnings)
    # What was drawn before stays beside the weights.
    assert [path for path in hub.paths(REPO_ID) if path.endswith(".png")]


def test_public_source_is_pushed_as_the_hub_does(hub: HubServer, converted: Path) -> None:
    push(plan_push(converted, Destination("alice/a")))
    assert not hub.repositories["alice/a"].private


def test_source_of_ones_own_that_is_private_is_found_so_before_calibration(hub: HubServer) -> None:
    hub.add_repo(SOURCE_ID)
    hub.add_repo("alice/open")
    assert check(Destination("alice/open")) == "alice/open"
    hub.repositories[SOURCE_ID].gated = True
    with pytest.raises(PublishError, match="alice/open is public, and bob/tiny is gated"):
        check(Destination("alice/open"))
    listener = Listener()
    check_push(Destination("alice/new"), KNOWN, source_card=None, target_len=None, reporter=listener)
    assert listener.lines == ["alice/new is kept private, since bob/tiny is gated; --public publishes it."]


def test_dry_run_never_ends_in_advice_that_pushes(hub: HubServer, converted: Path) -> None:
    hub.faults.append(Fault("GET", "/api/models/", "status", status=403, message="No", times=99))
    with pytest.raises(PublishError) as caught:
        plan_push(converted, Destination(dry_run=True))
    assert caught.value.fix.endswith(f"mmod push {converted} --dry-run")


def test_front_matter_of_the_folder_keeps_its_order(hub: HubServer, converted: Path) -> None:
    card = converted / CARD_NAME
    front, body = card.read_text().removeprefix("---\n").split("---\n", 1)
    turned = dict(reversed(yaml.safe_load(front).items()))
    turned["model-index"] = turned["model-index"][::-1]
    card.write_text(f"---\n{yaml.safe_dump(turned, sort_keys=False)}---\n{body}")
    push(plan_push(converted, Destination("alice/chosen")))
    pushed = yaml.safe_load(hub.content("alice/chosen", CARD_NAME).decode().split("---\n")[1])
    assert list(pushed) == list(turned)
    assert hub.content("alice/chosen", CARD_NAME) == card.read_bytes()
    assert plan_push(converted, Destination("alice/chosen")).is_empty


def test_plan_as_json_and_table(hub: HubServer, converted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_push(converted, Destination())
    plan.show(Console())
    shown = capsys.readouterr().err
    assert f"Push to {REPO_ID} (new)" in shown
    described = json.loads(json.dumps(plan.to_json()))
    assert described["upload_bytes"] == sum(described["upload"].values()) == plan.upload_bytes
    assert hub.repositories.keys() == {SOURCE_ID}


# Before calibration

SOURCE = SourceRecord(SOURCE_ID, "hub", "0" * 40, "transformers", "mamba2")
KNOWN = bare_manifest(SOURCE)


def check(destination: Destination, card: str | None = SOURCE_CARD) -> str:
    return check_push(destination, KNOWN, source_card=card, target_len=32768)


def test_check_names_the_repository(hub: HubServer) -> None:
    assert check(Destination()) == "alice/tiny-32k-hf"
    assert check(Destination("short")) == "alice/short"
    assert hub.repositories == {}


@pytest.mark.parametrize(
    ("account", "destination", "words"),
    [
        ({"name": "carol", "role": "read"}, Destination(), "has no right to write for carol"),
        ({"name": "carol"}, Destination("dave/x"), "no member of dave"),
        ({"name": "carol"}, Destination("bob/theirs"), "required permissions to write"),
        (
            {"name": "carol", "role": "fineGrained", "scope": ("team",)},
            Destination(),
            "no right to write for carol",
        ),
    ],
)
def test_check_refuses_without_rights(
    hub: HubServer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    account: dict[str, object],
    destination: Destination,
    words: str,
) -> None:
    hub.add_repo("bob/theirs")
    token = hub.add_account(**account)  # type: ignore[arg-type]
    point_client_at(hub, monkeypatch, tmp_path / "carol", token)
    with pytest.raises(PublishError, match=words) as caught:
        check(destination)
    assert "token with write access" in caught.value.fix
    assert token not in str(caught.value) + caught.value.fix


def test_check_accepts_organisations_and_fine_grained_tokens(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    token = hub.add_account("carol", role="fineGrained", organizations=("team",), scope=("team",))
    point_client_at(hub, monkeypatch, tmp_path / "carol", token)
    assert check(Destination("team/tiny")) == "team/tiny"


def test_check_refuses_metadata_and_names(hub: HubServer) -> None:
    with pytest.raises(PublishError, match='metadata: "license_name" is required when') as caught:
        check(Destination(), "---\nlicense: other\n---\n")
    assert "mmod push" not in caught.value.fix
    with pytest.raises(PublishError, match="no name that the Hub takes"):
        check(Destination("alice/..bad--"))
    with pytest.raises(UsageError, match="exclude each other"):
        check(Destination("alice/x", private=True, public=True))


# Errors


def test_hub_that_never_answers_is_given_up(
    hub: HubServer, converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener, plan = Listener(), plan_push(converted, Destination(REPO_ID))
    monkeypatch.setattr("converter.hub.ANSWER_SECONDS", 0.3)
    monkeypatch.setattr("converter.hub.WORK_SECONDS", 0.3)
    hub.faults.append(Fault("POST", "/commit/", "slow", seconds=0.8))
    assert push(plan, reporter=listener).commit == hub.repositories[REPO_ID].refs["main"]
    assert len(hub.history(REPO_ID)) == 2
    assert "timed out); trying again in 1 s" in listener.warnings[0]
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(PublishError, match=r"Hub cannot be reached for .*: timed out"):
            plan_push(converted, Destination(REPO_ID))


def refuse_login(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")


def break_token(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789secret")


def go_offline(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def unplug(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")


def fault(**settings: object) -> Callable[[HubServer, pytest.MonkeyPatch], None]:
    def order(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
        hub.faults.append(Fault(**{"times": 99, "kind": "status", **settings}))  # type: ignore[arg-type]

    return order


@pytest.mark.parametrize(
    ("trouble", "words", "fix"),
    [
        (refuse_login, "You are not logged in", "hf auth login"),
        (break_token, "Invalid credentials", "hf auth login"),
        (go_offline, "offline mode", "HF_HUB_OFFLINE"),
        (unplug, "Hub cannot be reached", "network"),
        (fault(method="POST", path="/preupload/", status=403, message="Fine words"), "Fine words", "write access"),
        (fault(method="POST", path="/create", status=409, message="You already did"), "name is taken", "--repo-id"),
        (fault(method="POST", path="/batch", status=403, message="Private storage quota"), "no room", "--repo-id"),
        (fault(method="PUT", path="/upload/", status=503, message="Slow down"), "Slow down", "Wait"),
        (
            fault(method="PUT", path="/upload/", kind="drop", after_bytes=10),
            "Hub cannot be reached",
            "network",
        ),
        (fault(method="POST", path="/commit/", status=412, message="Moved on"), "Moved on", "Look at the change"),
        (fault(method="POST", path="/commit/", status=500, message="Lost it"), "Lost it", "Wait"),
        (fault(method="POST", path="/commit/", status=429, message="Too fast"), "fewer requests", "Wait"),
        (fault(method="POST", path="validate-yaml", status=400, message="Bad card"), "Bad card", "card"),
    ],
)
def test_errors_keep_the_servers_words_and_give_the_line_to_go_on(
    hub: HubServer,
    converted: Path,
    monkeypatch: pytest.MonkeyPatch,
    trouble: Callable[[HubServer, pytest.MonkeyPatch], None],
    words: str,
    fix: str,
) -> None:
    before = files_of(converted)
    token = os.environ["HF_TOKEN"]
    trouble(hub, monkeypatch)
    with pytest.raises(PublishError, match=words) as caught:
        push(plan_push(converted, Destination(REPO_ID)))
    text = f"{caught.value} {caught.value.fix}"
    assert fix in caught.value.fix
    assert "card" in fix or f"mmod push {converted} --repo-id {REPO_ID}" in caught.value.fix
    assert token not in text and "hf_0123456789secret" not in text and "signature=" not in text
    after = files_of(converted)
    assert after.keys() == before.keys()
    assert {name for name in before if before[name] != after[name]} <= {CARD_NAME}
    if REPO_ID in hub.repositories:
        assert hub.paths(REPO_ID) == [".gitattributes"]


def test_no_folder_of_ours_is_refused(hub: HubServer, tmp_path: Path) -> None:
    with pytest.raises(PublishError, match="no conversion"):
        plan_push(tmp_path, Destination())


def test_what_no_loader_reads_stays_at_home_and_is_named(hub: HubServer, converted: Path) -> None:
    expected = {".gitattributes", *files_of(converted)}
    names = [".env", ".eval_results/x.yaml", "optimizer.pt", "runs/a/events.1", "mmod/notes.txt", "diary.txt"]
    for name in names:
        (converted / name).parent.mkdir(parents=True, exist_ok=True)
        (converted / name).write_text("SECRET=1")
    listener = Listener()
    plan = plan_push(converted, Destination())
    plan.show(listener)
    assert plan.to_json()["not_sent"] == sorted(names)
    assert "Not sent, since no loader reads it: .env, .eval_results/" in listener.lines[-1]
    push(plan)
    assert set(hub.paths(REPO_ID)) == expected


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("model-00001-of-00004.safetensors", "changed"),
        ("tokenizer.json", "changed"),
        (SCALES_NAME, "changed"),
        ("tokenizer_config.json", "is gone"),
        ("chat_template.jinja", "was added"),
    ],
)
def test_folder_is_proved_before_a_byte_is_sent(hub: HubServer, converted: Path, path: str, said: str) -> None:
    if said == "is gone":
        (converted / path).unlink()
    elif said == "was added":
        (converted / path).write_text("{{ messages }}")
    else:
        content = bytearray((converted / path).read_bytes())
        content[-1] ^= 1
        (converted / path).write_bytes(content)
    with pytest.raises(VerificationError, match=f"{path} {said} since"):
        push(plan_push(converted, Destination()))
    assert hub.uploaded_bytes() == 0 and REPO_ID not in hub.repositories


def test_repository_that_is_taken_is_told_before_the_folder_is_hashed(hub: HubServer, converted: Path) -> None:
    hub.add_repo("alice/other", {"config.json": b"{}"})
    (converted / "tokenizer_config.json").unlink()
    with pytest.raises(PublishError, match="holds 1 files and no manifest"):
        plan_push(converted, Destination("alice/other"))


def test_link_that_leaves_the_folder_is_refused_before_anything_is_asked(
    hub: HubServer, converted: Path, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("SECRET=1")
    hub.log.clear()
    for name in ("LICENSE", "mmod/other.png"):
        (converted / name).symlink_to(tmp_path / "secret")
        with pytest.raises(SourceError, match=f"{name} is a link that leaves the folder"):
            plan_push(converted, Destination())
        (converted / name).unlink()
    assert hub.log == []


def test_no_token_is_stored(hub: HubServer, converted: Path, tmp_path: Path) -> None:
    token = os.environ["HF_TOKEN"]
    push(plan_push(converted, Destination()))
    stored = [path for path in tmp_path.rglob("*") if path.is_file() and token.encode() in path.read_bytes()]
    assert stored == []
    assert not any(token.encode() in hub.content(REPO_ID, path) for path in hub.paths(REPO_ID))


def test_module_needs_no_torch() -> None:
    code = (
        "import sys, hub_cards.publish, hub_cards.card; print('torch' in sys.modules, 'calibrator' in sys.modules)"
    )
    root = Path(publish.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_folder_can_move_between_push_and_push(hub: HubServer, converted: Path, tmp_path: Path) -> None:
    push(plan_push(converted, Destination()))
    shutil.move(converted, tmp_path / "moved")
    assert plan_push(tmp_path / "moved", Destination()).is_empty
