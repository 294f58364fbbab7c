"""What the loopback Hub and its object storage answer: the protocol that huggingface_hub 2.4.0 speaks.

They refuse what the Hub refuses: bad tokens, missing rights, wrong hashes, objects that were never uploaded, a
parent commit that is no longer the head, invalid card metadata.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import parse_qs, quote, unquote, urlsplit

from tests.hub_server.cards import card_metadata, metadata_problems
from tests.hub_server.faults import Connection
from tests.hub_server.jobs import HARDWARE, Job, as_events
from tests.hub_server.storage import Account, Blob, Commit, PullRequest, Repository, lfs_oid

if TYPE_CHECKING:
    from tests.hub_server import HubServer

DATE = "2026-01-01T00:00:00.000Z"
POINTER_SIZE = 134


class Refusal(Exception):
    """An answer other than success, in the Hub's words."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}


class Handler(Connection):
    """One connection: finds the route, checks, answers."""

    hub: ClassVar[HubServer]
    routes: ClassVar[tuple[tuple[str, str, str], ...]]

    def handle_any(self) -> None:
        """Answer one request of any method."""
        path = urlsplit(self.path).path
        self.query = {key: values[-1] for key, values in parse_qs(urlsplit(self.path).query).items()}
        self.begin(path)
        try:
            if self.fault and self.fault.kind == "status":
                self.read_body()
                raise Refusal(self.fault.status, self.fault.message, self.fault.code)
            self.find_route(path)()
        except Refusal as refusal:
            with suppress(ConnectionError):
                self.answer_json({"error": refusal.message}, refusal.status, refusal.headers)
        except ConnectionError:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def find_route(self, path: str) -> Callable[[], None]:
        for method, pattern, name in self.routes:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split("|"):
                groups = [None if group is None else unquote(group) for group in match.groups()]
                return lambda: getattr(self, name)(*groups)
        self.read_body()
        raise Refusal(404, "Not Found")

    def read_json(self) -> Any:
        return json.loads(self.read_body() or b"{}")

    def answer_json(self, value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self.answer(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def answer(self, body: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        if self.has_fault("lose"):
            self.drop_connection()
        self.entry.status = status
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.send_block(body)

    def answer_file(self, path: Path, headers: Mapping[str, str]) -> None:
        """A file, or the one byte range that was asked for."""
        size = path.stat().st_size
        start, end, status = 0, size - 1, 200
        headers = {"Accept-Ranges": "bytes", **headers}
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if asked and not self.has_fault("whole"):
            first, last = asked.groups()
            start = int(first) if first else max(0, size - int(last))
            end = min(size - 1, int(last)) if first and last else size - 1
            if start > end:
                raise Refusal(416, "Range Not Satisfiable", **{"Content-Range": f"bytes */{size}"})
            status = 206
            headers["Content-Range"] = f"bytes {start}-{end}/{size}"
        self.entry.status = status
        self.send_response(status)
        for name, value in {"Content-Length": str(end - start + 1), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        with path.open("rb") as file:
            file.seek(start)
            left = end - start + 1
            while left:
                block = file.read(min(left, 2**16))
                self.send_block(block)
                left -= len(block)


class StorageHandler(Handler):
    """The object storage: signed links alone open it, and an Authorization header is refused, as S3 does."""

    routes = (
        ("PUT", r"/upload/([^/]+/[^/]+)/([0-9a-f]{64})", "put_object"),
        ("GET|HEAD", r"/object/([0-9a-f]{64})", "get_object"),
    )

    def check_signature(self, text: str) -> None:
        if "authorization" in self.headers:
            raise Refusal(400, "Only one auth mechanism allowed")
        if not hmac.compare_digest(self.hub.sign(text), self.query.get("signature", "")):
            raise Refusal(403, "Access Denied")

    def put_object(self, repo: str, sha256: str) -> None:
        self.check_signature(f"{repo} {sha256}")
        digest = hashlib.sha256()
        with tempfile.NamedTemporaryFile(dir=self.hub.folder, delete=False) as file:
            try:
                for block in self.body_blocks():
                    digest.update(block)
                    file.write(block)
            except ConnectionResetError:
                Path(file.name).unlink()
                raise
        if digest.hexdigest() != sha256:
            Path(file.name).unlink()
            raise Refusal(400, "The SHA256 you specified did not match the calculated checksum")
        Path(file.name).replace(self.hub.object_path(sha256))
        self.answer(b"", headers={"ETag": f'"{sha256}"'})

    def get_object(self, sha256: str) -> None:
        self.check_signature(sha256)
        self.answer_file(self.hub.object_path(sha256), {"ETag": f'"{sha256}"'})


class HubHandler(Handler):
    """The Hub's own endpoints."""

    routes = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", r"/api/repos/create", "create_repo"),
        ("GET", r"/api/models/([^/]+/[^/]+)/auth-check(/write)?", "auth_check"),
        ("GET", r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", "model_info"),
        ("GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/(.+))?", "list_tree"),
        ("POST", r"/api/models/([^/]+/[^/]+)/paths-info/([^/]+)", "paths_info"),
        ("GET", r"/api/models/([^/]+/[^/]+)/discussions", "list_discussions"),
        ("POST", r"/api/models/([^/]+/[^/]+)/branch/([^/]+)", "create_branch"),
        ("POST", r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", "preupload"),
        ("POST", r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", "create_commit"),
        ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/verify", "lfs_verify"),
        ("GET", r"/api/kernels/([^/]+/[^/]+)/refs", "list_kernel_refs"),
        ("GET", r"/api/jobs/hardware", "list_hardware"),
        ("POST", r"/api/jobs/([^/]+)", "start_job"),
        ("GET", r"/api/jobs/([^/]+)/([^/]+)", "ask_job"),
        ("GET", r"/api/jobs/([^/]+)/([^/]+)/logs", "stream_log"),
        ("POST", r"/api/jobs/([^/]+)/([^/]+)/cancel", "cancel_job"),
        ("GET|HEAD", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
    )

    # Who asks, and what they may do

    def account(self) -> Account | None:
        header = self.headers.get("Authorization")
        if header is None:
            return None
        account = self.hub.accounts.get(header.removeprefix("Bearer "))
        if account is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return account

    def owns(self, account: Account | None, namespace: str) -> bool:
        return account is not None and (namespace == account.name or namespace in account.organizations)

    def readable(self, name: str) -> Repository:
        account = self.account()
        repo = self.hub.repositories.get(name)
        if repo is None or (repo.private and not self.owns(account, name.split("/")[0])):
            if account is None:
                raise Refusal(401, "Invalid username or password.", "RepoNotFound")
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return repo

    def open_for_contents(self, name: str) -> Repository:
        repo = self.readable(name)
        account = self.account()
        if repo.gated and not self.owns(account, name.split("/")[0]):
            words = f"Access to model {name} is restricted"
            if account is None:
                raise Refusal(401, f"{words}. You must have access to it and be authenticated.", "GatedRepo")
            raise Refusal(403, f"{words} and you are not in the authorized list. Ask for access.", "GatedRepo")
        return repo

    def writable(self, name: str, as_pull_request: bool = False) -> Repository:
        repo = self.readable(name)
        account = self.account()
        if account is None:
            raise Refusal(401, "Invalid username or password.")
        if account.role == "read":
            raise Refusal(403, "You are using a read token, which cannot write. Use a token with write access")
        if not as_pull_request and not account.may_write(name.split("/")[0]):
            raise Refusal(403, f"Your token's permissions do not cover {name}")
        if not as_pull_request and not self.owns(account, name.split("/")[0]):
            raise Refusal(403, f"You don't have the required permissions to write to {name}")
        return repo

    def commit_at(self, repo: Repository, revision: str) -> Commit:
        oid = repo.refs.get(revision, revision)
        if oid not in repo.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repo.commits[oid]

    # Accounts and repositories

    def whoami(self) -> None:
        account = self.account()
        if account is None:
            raise Refusal(401, "Invalid username or password.")
        organizations = [{"type": "org", "name": name, "roleInOrg": "write"} for name in account.organizations]
        token: dict[str, Any] = {"displayName": "test", "role": account.role, "createdAt": DATE}
        if account.role == "fineGrained":
            scoped = [{"entity": {"name": name}, "permissions": ["repo.write"]} for name in account.scope]
            token["fineGrained"] = {"global": [], "scoped": scoped}
        auth = {"type": "access_token", "accessToken": token}
        self.answer_json({"type": "user", "name": account.name, "orgs": organizations, "auth": auth})

    def validate_yaml(self) -> None:
        problems = metadata_problems(self.read_json()["content"])
        if problems:
            if self.headers.get("Accept") == "text/plain":
                self.answer("\n".join(problems).encode(), 400, {"Content-Type": "text/plain"})
                return
            message = {"errors": [{"message": problem} for problem in problems], "warnings": []}
            self.answer_json(message, 400, {"X-Error-Message": problems[0]})
        else:
            self.answer_json({"errors": [], "warnings": []})

    def create_repo(self) -> None:
        asked = self.read_json()
        account = self.account()
        if account is None:
            raise Refusal(401, "Invalid username or password.")
        namespace = asked.get("organization") or account.name
        name = f"{namespace}/{asked['name']}"
        if not account.may_write(namespace) or not self.owns(account, namespace):
            raise Refusal(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
        with self.hub.lock:
            if name in self.hub.repositories:
                url = f"{self.hub.url}/{name}"
                self.answer_json({"error": "You already created this model repo", "url": url}, 409)
                return
            self.hub.add_repo(name, private=asked.get("visibility") == "private")
        self.answer_json({"url": f"{self.hub.url}/{name}", "name": name})

    def auth_check(self, name: str, write: str | None) -> None:
        if write:
            self.writable(name)
        else:
            self.open_for_contents(name)
        self.answer_json({})

    # Reading

    def model_info(self, name: str, revision: str | None) -> None:
        repo = self.readable(name)
        commit = self.commit_at(repo, revision or "main")
        siblings: list[dict[str, Any]] = []
        for path, blob in sorted(commit.files.items()):
            siblings.append({"rfilename": path})
            if self.query.get("blobs"):
                siblings[-1] |= {"size": blob.size, "blobId": blob.oid}
                if blob.is_lfs:
                    siblings[-1]["lfs"] = {"sha256": blob.sha256, "size": blob.size, "pointerSize": POINTER_SIZE}
        card = commit.files.get("README.md")
        metadata = card_metadata(self.hub.object_path(card.sha256).read_text()) if card else {}
        self.answer_json(
            {
                "id": name,
                "sha": commit.oid,
                "private": repo.private,
                "gated": "manual" if repo.gated else False,
                "tags": metadata.get("tags", []),
                "cardData": metadata,
                "siblings": siblings,
            }
        )

    def describe(self, path: str, blob: Blob) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": blob.size, "oid": blob.oid}
        if blob.is_lfs:
            entry["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": POINTER_SIZE}
        return entry

    def list_tree(self, name: str, revision: str, folder: str | None) -> None:
        prefix = f"{folder}/" if folder else ""
        files = self.commit_at(self.readable(name), revision).files
        inside = {path: blob for path, blob in sorted(files.items()) if path.startswith(prefix)}
        if not inside:
            raise Refusal(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        parents = sorted({str(parent) for path in inside for parent in Path(path).parents})
        entries = [
            {"type": "directory", "path": path, "size": 0, "oid": "0" * 40}
            for path in parents
            if path != "." and path.startswith(prefix)
        ]
        entries += [self.describe(path, blob) for path, blob in inside.items()]
        if self.query.get("recursive") not in ("true", "True", "1"):
            entries = [entry for entry in entries if "/" not in str(entry["path"]).removeprefix(prefix)]
        self.answer_json(entries)

    def paths_info(self, name: str, revision: str) -> None:
        asked = parse_qs(self.read_body().decode()).get("paths", [])
        files = self.commit_at(self.readable(name), revision).files
        self.answer_json([self.describe(path, files[path]) for path in asked if path in files])

    def list_discussions(self, name: str) -> None:
        repo = self.readable(name)
        found = [
            {
                "title": pull.title,
                "num": pull.number,
                "author": {"name": pull.author},
                "createdAt": DATE,
                "status": "open",
                "repo": {"name": name, "type": "model"},
                "isPullRequest": True,
            }
            for pull in repo.pull_requests
            if self.query.get("author") in (None, pull.author)
        ]
        self.answer_json({"discussions": found, "count": len(found), "start": 0})

    def resolve(self, name: str, revision: str, path: str) -> None:
        repo = self.open_for_contents(name)
        commit = self.commit_at(repo, revision)
        blob = commit.files.get(path)
        headers = {"X-Repo-Commit": commit.oid}
        if blob is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", **headers)
        if not blob.is_lfs:
            self.answer_file(self.hub.object_path(blob.sha256), {**headers, "ETag": f'"{blob.oid}"'})
            return
        headers |= {
            "Location": f"{self.hub.storage_url}/object/{blob.sha256}?signature={self.hub.sign(blob.sha256)}",
            "X-Linked-Etag": f'"{blob.sha256}"',
            "X-Linked-Size": str(blob.size),
        }
        self.answer(b"", 302, headers)

    # Writing

    def create_branch(self, name: str, branch: str) -> None:
        asked = self.read_json()
        repo = self.writable(name)
        with self.hub.lock:
            if branch in repo.refs:
                raise Refusal(409, f"Reference already exists: {branch}")
            repo.refs[branch] = self.commit_at(repo, asked.get("startingPoint", "main")).oid
        self.answer_json({})

    def preupload(self, name: str, revision: str) -> None:
        asked = self.read_json()
        repo = self.writable(name, as_pull_request="create_pr" in self.query)
        present = self.commit_at(repo, revision).files
        answers = []
        for file in asked["files"]:
            is_lfs = self.hub.wants_lfs(repo, file["path"], base64.b64decode(file["sample"]), file["size"])
            answers.append(
                {"path": file["path"], "uploadMode": "lfs" if is_lfs else "regular", "shouldIgnore": False}
            )
            if blob := present.get(file["path"]):
                answers[-1]["oid"] = blob.sha256 if blob.is_lfs else blob.oid
        self.answer_json({"files": answers})

    def lfs_batch(self, name: str) -> None:
        asked = self.read_json()
        # Someone who opens a pull request names no branch here, and needs no right to write to one.
        repo = self.writable(name, as_pull_request="ref" not in asked)
        objects = []
        for item in asked["objects"]:
            objects.append({"oid": item["oid"], "size": item["size"], "authenticated": True})
            if item["oid"] not in repo.objects:
                href = f"{self.hub.storage_url}/upload/{name}/{item['oid']}"
                signature = self.hub.sign(f"{name} {item['oid']}")
                objects[-1]["actions"] = {
                    "upload": {"href": f"{href}?signature={signature}", "header": {}},
                    "verify": {"href": f"{self.hub.url}/{name}.git/info/lfs/verify", "header": {}},
                }
        self.answer_json({"transfer": "basic", "objects": objects})

    def lfs_verify(self, name: str) -> None:
        asked = self.read_json()
        repo = self.writable(name, as_pull_request=True)
        path = self.hub.object_path(asked["oid"])
        if not path.is_file() or path.stat().st_size != asked["size"]:
            raise Refusal(404, "Object not found or of another size")
        repo.objects.add(asked["oid"])
        self.answer_json({})

    def create_commit(self, name: str, revision: str) -> None:
        lines = [json.loads(line) for line in self.read_body().splitlines() if line.strip()]
        create_pr = self.query.get("create_pr") == "1"
        repo = self.writable(name, as_pull_request=create_pr or revision.startswith("refs/pr/"))
        account = self.account()
        assert account is not None
        with self.hub.lock:
            head = self.commit_at(repo, revision)
            header = lines[0]["value"]
            parent = header.get("parentCommit", head.oid)
            if parent != head.oid and not create_pr:
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            start = self.commit_at(repo, parent)
            added: dict[str, Blob] = {}
            removed: list[str] = []
            for line in lines[1:]:
                self.stage(repo, start, line["key"], line["value"], added, removed)
            number = len(repo.pull_requests) + 1
            if create_pr:
                revision = f"refs/pr/{number}"
                repo.refs[revision] = parent
                repo.pull_requests.append(PullRequest(number, header["summary"], account.name))
            commit = self.hub.add_commit(repo, revision, added, tuple(removed), header["summary"], account.name)
        url = f"{self.hub.url}/{name}"
        self.answer_json(
            {
                "success": True,
                "commitOid": commit.oid,
                "commitUrl": f"{url}/commit/{quote(commit.oid)}",
                "pullRequestUrl": f"{url}/discussions/{number}" if create_pr else None,
            }
        )

    def stage(
        self,
        repo: Repository,
        start: Commit,
        key: str,
        value: Mapping[str, Any],
        added: dict[str, Blob],
        removed: list[str],
    ) -> None:
        """Take one line of a commit, or refuse the commit."""
        path = value["path"]
        if key == "deletedFile":
            if path not in start.files:
                raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
            removed.append(path)
        elif key == "lfsFile":
            if value["oid"] not in repo.objects:
                raise Refusal(400, f'LFS pointer pointed to a file that does not exist: "{path}"')
            size = self.hub.object_path(value["oid"]).stat().st_size
            if value.get("size", size) != size:
                raise Refusal(400, f'LFS pointer has a wrong size: "{path}"')
            added[path] = Blob(value["oid"], size, lfs_oid(value["oid"], size), True)
        elif key == "file" and value["encoding"] == "base64":
            content = base64.b64decode(value["content"], validate=True)
            if self.hub.wants_lfs(repo, path, content[:512], len(content)):
                raise Refusal(400, f'Your push was rejected: "{path}" has to be an LFS file')
            if path == "README.md" and (problems := metadata_problems(content.decode())):
                raise Refusal(400, f"Invalid metadata in README.md: {problems[0]}")
            added[path] = self.hub.store(content, is_lfs=False)
        else:
            raise Refusal(400, f"Unknown operation {key}")

    # For a test in another process

    def list_kernel_refs(self, name: str) -> None:
        if name not in self.hub.kernels:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        branches = [
            {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": commit}
            for branch, commit in self.hub.kernels[name].items()
        ]
        self.answer_json({"branches": branches, "converts": [], "tags": []})

    # Jobs

    def list_hardware(self) -> None:
        self.answer_json(HARDWARE)

    def may_use_jobs(self, namespace: str) -> None:
        account = self.account()
        if account is None or not account.may_write(namespace):
            raise Refusal(403, "Forbidden: your token lacks the permission job.write")

    def job(self, namespace: str, number: str) -> Job:
        self.may_use_jobs(namespace)
        job = self.hub.jobs.by_id.get(number)
        if job is None or job.owner != namespace:
            raise Refusal(404, "Job not found")
        return job

    def start_job(self, namespace: str) -> None:
        self.may_use_jobs(namespace)
        spec = self.read_json()
        if spec["flavor"] not in [one["name"] for one in HARDWARE]:
            raise Refusal(400, "Invalid flavor")
        self.answer_json(self.hub.jobs.start(namespace, spec).ask())

    def ask_job(self, namespace: str, number: str) -> None:
        self.answer_json(self.job(namespace, number).ask())

    def stream_log(self, namespace: str, number: str) -> None:
        job = self.job(namespace, number)
        self.entry.status = 200
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        for block in as_events(job.run()):
            self.send_block(block)
        self.close_connection = True

    def cancel_job(self, namespace: str, number: str) -> None:
        self.job(namespace, number).end("CANCELED")
        self.answer_json({})
