"""
The part of the Hub that `push_to_hub.py` and `from_pretrained` speak with, on 127.0.0.1: repositories with branches,
preupload, LFS, commits, trees, and files with ETag and Range. Faults can be asked for.
"""

import base64
import hashlib
import io
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


TOKEN = "hf_" + "a" * 34  # not one of the Hub's
LFS_ENDINGS = (".safetensors", ".png")


@dataclass
class Fault:
    """What goes wrong the next `times` times that `path` matches."""

    method: str
    path: str  # regular expression
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    cut: bool = False
    corrupt: bool = False
    lost: bool = False  # done, but the answer never comes
    overtaken: bool = False  # by a commit of somebody else
    times: int = 1


@dataclass
class Repository:
    private: bool = False
    commits: dict[str, dict[str, str]] = field(default_factory=dict)  # files' sha256 by commit
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)


class HubServer:
    """
    ```python
    with HubServer() as hub:
        hub.faults.append(Fault("PUT", "/lfs/", status=500))
        subprocess.run(…, env={**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN})
        assert hub.files("org/mm-gem")
    ```
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}  # by sha256
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.Lock()
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.server.shutdown()
        self.server.server_close()

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """What a revision of a repository holds."""
        repository = self.repositories[repo_id]
        commit = repository.branches.get(revision, revision)
        return {path: self.blobs[sha] for path, sha in repository.commits.get(commit, {}).items()}

    def store(self, content: bytes) -> str:
        sha = hashlib.sha256(content).hexdigest()
        self.blobs[sha] = content
        return sha

    def commit(self, repository: Repository, branch: str, files: dict[str, str], message: str) -> str:
        number = len(repository.commits)
        oid = hashlib.sha1(f"{number} {message} {sorted(files.items())}".encode()).hexdigest()
        repository.commits[oid] = files
        repository.branches[branch] = oid
        repository.messages.append(message)
        return oid

    def asked(self, method: str, path: str) -> int:
        """How many requests there were whose path holds this regular expression."""
        return sum(m == method and re.search(path, p) is not None for m, p in self.requests)

    def fault_for(self, method: str, path: str) -> Fault | None:
        with self.lock:
            self.requests.append((method, path))
            for fault in self.faults:
                if fault.times and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_hub: HubServer

    def log_message(self, *_: Any) -> None:
        pass

    def handle_any(self) -> None:
        path = urlsplit(self.path).path
        length = int(self.headers.get("Content-Length") or 0)
        fault = self.server_hub.fault_for(self.command, path)
        if fault is not None and fault.cut and self.command in ("PUT", "POST"):
            self.rfile.read(length // 2)
            return self.hang_up()
        body = self.rfile.read(length)
        if fault is not None and fault.status:
            return self.answer({"error": "asked for by the test"}, fault.status, fault.headers)
        for method, pattern, action in ROUTES:
            match = re.fullmatch(pattern, path)
            if method == self.command and match:
                is_open = method in ("GET", "HEAD") or "/lfs/" in path
                if not is_open and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    return self.answer({"error": "Invalid credentials"}, 401)
                if fault is not None and fault.corrupt:
                    body = body[:-1] + bytes([body[-1] ^ 1])
                if fault is not None and fault.lost:
                    self.wfile = io.BytesIO()
                action(self, *(unquote(part or "") for part in match.groups()), body=body, fault=fault)
                return self.hang_up() if fault is not None and fault.lost else None
        self.answer({"error": f"no {self.command} {path}"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # -- writing

    def create(self, body: bytes, fault: Fault | None) -> None:
        asked = json.loads(body)
        repo_id = f"{asked['organization']}/{asked['name']}"
        hub = self.server_hub
        if repo_id in hub.repositories:
            return self.answer({"error": "You already created this model repo", "url": f"{hub.url}/{repo_id}"}, 409)
        repository = hub.repositories[repo_id] = Repository(private=asked.get("visibility") == "private")
        hub.commit(repository, "main", {}, "initial commit")
        self.answer({"url": f"{hub.url}/{repo_id}"})

    def validate_yaml(self, body: bytes, fault: Fault | None) -> None:
        self.answer({"errors": [], "warnings": []})

    def branch(self, repo_id: str, branch: str, body: bytes, fault: Fault | None) -> None:
        repository = self.server_hub.repositories[repo_id]
        if branch in repository.branches:
            return self.answer({"error": "Reference already exists"}, 409)
        repository.branches[branch] = repository.branches["main"]
        self.answer({})

    def preupload(self, repo_id: str, revision: str, body: bytes, fault: Fault | None) -> None:
        repository = self.server_hub.repositories[repo_id]
        if revision not in repository.branches:
            return self.answer({"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})
        files = repository.commits[repository.branches[revision]]
        answers = []
        for file in json.loads(body)["files"]:
            large = file["path"].endswith(LFS_ENDINGS)
            sha = files.get(file["path"])
            oid = sha if large or sha is None else _git_oid(self.server_hub.blobs[sha])
            mode = "lfs" if large else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer({"files": answers})

    def lfs_batch(self, repo_id: str, body: bytes, fault: Fault | None) -> None:
        url, objects = self.server_hub.url, []
        for item in json.loads(body)["objects"]:
            known = item["oid"] in self.server_hub.blobs
            actions = {
                "upload": {"href": f"{url}/lfs/{item['oid']}"},
                "verify": {"href": f"{url}/api/verify"},
            }
            objects.append({**item, **({} if known else {"actions": actions})})
        self.answer({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str, body: bytes, fault: Fault | None) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self.answer({"error": "The checksum does not match"}, 400)
        self.server_hub.store(body)
        self.answer({})

    def verify(self, body: bytes, fault: Fault | None) -> None:
        asked = json.loads(body)
        known = len(self.server_hub.blobs.get(asked["oid"], b"")) == asked["size"]
        self.answer({} if known else {"error": "not there"}, 200 if known else 404)

    def create_commit(self, repo_id: str, revision: str, body: bytes, fault: Fault | None) -> None:
        hub, repository = self.server_hub, self.server_hub.repositories[repo_id]
        header, *changes = map(json.loads, body.splitlines())
        if fault is not None and fault.overtaken:
            files = {**repository.commits[repository.branches[revision]], "theirs.md": hub.store(b"theirs")}
            hub.commit(repository, revision, files, "theirs")
        if header["value"].get("parentCommit") not in (None, repository.branches[revision]):
            return self.answer({"error": "A commit has happened since"}, 412)
        files = dict(repository.commits[repository.branches[revision]])
        for change in changes:
            value = change["value"]
            if change["key"] == "file":
                files[value["path"]] = hub.store(base64.b64decode(value["content"]))
            elif change["key"] == "lfsFile":
                if value["oid"] not in hub.blobs:
                    return self.answer({"error": f"LFS object {value['oid']} was not uploaded"}, 400)
                files[value["path"]] = value["oid"]
            elif change["key"] == "deletedFile":
                del files[value["path"]]
        branch, pull_request = revision, None
        if "create_pr=1" in urlsplit(self.path).query:
            branch = f"refs/pr/{sum(name.startswith('refs/pr') for name in repository.branches) + 1}"
            pull_request = f"{hub.url}/{repo_id}/discussions/{branch.rpartition('/')[2]}"
        oid = hub.commit(repository, branch, files, header["value"]["summary"])
        url = f"{hub.url}/{repo_id}/commit/{oid}"
        self.answer({"commitUrl": url, "commitOid": oid, "pullRequestUrl": pull_request})

    # -- reading

    def _revision(self, repo_id: str, revision: str) -> tuple[str, dict[str, str]] | None:
        repository = self.server_hub.repositories.get(repo_id)
        if repository is None or (repository.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"):
            self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            return None
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            self.answer({"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})
            return None
        return commit, repository.commits[commit]

    def info(self, repo_id: str, revision: str = "main", *, body: bytes, fault: Fault | None) -> None:
        if found := self._revision(repo_id, revision):
            siblings = [{"rfilename": path} for path in found[1]]
            private = self.server_hub.repositories[repo_id].private
            content = {
                "_id": "1",
                "id": repo_id,
                "sha": found[0],
                "siblings": siblings,
                "private": private,
                "tags": [],
            }
            self.answer({**content, "downloads": 0, "likes": 0, "disabled": False, "gated": False})

    def tree(self, repo_id: str, revision: str, folder: str = "", *, body: bytes, fault: Fault | None) -> None:
        if found := self._revision(repo_id, revision):
            content = []
            for path, sha in found[1].items():
                if path.startswith(folder.strip("/")):
                    size = len(self.server_hub.blobs[sha])
                    item = {"type": "file", "path": path, "size": size, "oid": _git_oid(self.server_hub.blobs[sha])}
                    if path.endswith(LFS_ENDINGS):
                        item["lfs"] = {"oid": sha, "size": size, "pointerSize": 130}
                    content.append(item)
            self.answer(content)

    def resolve(self, repo_id: str, revision: str, path: str, body: bytes, fault: Fault | None) -> None:
        found = self._revision(repo_id, revision)
        if found is None:
            return
        commit, files = found
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if path not in files:
            return self.answer({"error": "Entry not found"}, 404, {**headers, "X-Error-Code": "EntryNotFound"})
        content = self.server_hub.blobs[files[path]]
        headers["ETag"] = f'"{files[path] if path.endswith(LFS_ENDINGS) else _git_oid(content)}"'
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked:
            start, end = int(asked[1]), int(asked[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            return self.answer(content[start : end + 1], 206, headers)
        if fault is not None and fault.cut and self.command == "GET":
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            return self.hang_up()
        self.answer(content, 200, headers)


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


REPO = r"([^/]+/[^/]+)"
ROUTES = [
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate_yaml),
    ("POST", rf"/api/models/{REPO}/branch/([^/]+)", _Handler.branch),
    ("POST", rf"/api/models/{REPO}/preupload/([^/]+)", _Handler.preupload),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/lfs/([0-9a-f]+)", _Handler.lfs_put),
    ("POST", r"/api/verify", _Handler.verify),
    ("POST", rf"/api/models/{REPO}/commit/([^/]+)", _Handler.create_commit),
    ("GET", rf"/api/models/{REPO}", _Handler.info),
    ("GET", rf"/api/models/{REPO}/revision/([^/]+)", _Handler.info),
    ("GET", rf"/api/models/{REPO}/tree/([^/]+)(/.*)?", _Handler.tree),
    ("HEAD", rf"/{REPO}/resolve/([^/]+)/(.+)", _Handler.resolve),
    ("GET", rf"/{REPO}/resolve/([^/]+)/(.+)", _Handler.resolve),
]
