"""A stand-in for the hub's HTTP API: repositories, LFS, commits, downloads; and any refusal that a test asks for.

It speaks the older way of sending large files (LFS), so clients are run with HF_HUB_DISABLE_XET=1.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

TOKEN = "hf_TheTokenThatMayWrite00000000000000"
LARGE = (".safetensors", ".png")
MANY = 10**9


@dataclass
class Repo:
    """A repository: the files of each revision, by name."""

    private: bool
    revisions: dict[str, dict[str, bytes]] = field(default_factory=dict)


@dataclass
class Hub:
    """What it holds, what it has heard, and how it is to fail: {operation: (what, how many times)}.

    What: a status, "drop" (the connection), or "silent" (no answer, ever).
    """

    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    faults: dict[str, tuple[Any, int]] = field(default_factory=dict)
    heard: list[str] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)
    address: str = ""

    def commit(self, repo: str, changes: dict[str, bytes]) -> str:
        """A new commit on main; a commit is called by a hash of what is in it."""
        files = {**self.repos[repo].revisions.get("main", {}), **changes}
        said = json.dumps({name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())})
        commit = hashlib.sha1(said.encode()).hexdigest()
        self.repos[repo].revisions |= {"main": files, commit: files}
        return commit

    def sha(self, repo: str, revision: str) -> str:
        """The commit that a branch or a commit's own name stands for."""
        revisions = self.repos[repo].revisions
        return next(name for name, files in revisions.items() if len(name) == 40 and files is revisions[revision])


class Handler(BaseHTTPRequestHandler):
    """One request: `ROUTES` says by which method of this class it is answered."""

    hub: Hub
    protocol_version = "HTTP/1.1"
    ROUTES = (
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "yaml"),
        ("POST", r"/api/models/(.+?)/preupload/(.+)", "preupload"),
        ("POST", r"/api/models/(.+?)/commit/(.+)", "commit"),
        ("GET", r"/api/models/(.+?)/tree/(.+)", "tree"),
        ("GET", r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", "info"),
        ("GET", r"/api/models/(.+?)/xet-write-token/(.+)", "xet"),
        ("POST", r"/(.+?)\.git/info/lfs/objects/batch", "batch"),
        ("PUT", r"/lfs/(.+)", "put"),
        ("GET", r"/(.+?)/resolve/([^/]+)/(.+)", "resolve"),
    )

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(self.path.partition("?")[0])
        method = "GET" if self.command == "HEAD" else self.command
        for verb, pattern, name in self.ROUTES:
            if verb == method and (found := re.fullmatch(pattern, path)):
                self.hub.heard.append(name)
                fault, times = self.hub.faults.get(name, (None, 0))
                if times:
                    self.hub.faults[name] = (fault, times - 1)
                    return self.fail(fault)
                return getattr(self, name)(body, *found.groups())
        self.hub.heard.append(f"{self.command} {path}")
        self.send(404, {"error": "no such page"})

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def fail(self, fault: Any) -> None:
        if fault == "silent":
            self.hub.over.wait()
        if fault in ("drop", "silent"):
            self.close_connection = True
            self.connection.close()
        else:
            self.send(fault, {"error": "refused"}, {"X-Error-Code": "RepoNotFound"} if fault == 404 else {})

    def send(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repo(self, name: str, revision: str = "main") -> Repo | None:
        """The repository, or None and an answer that it is not there, or not for everybody."""
        found = self.hub.repos.get(name)
        if found is None or (found.private and not self.known()):
            return self.send(404 if self.known() else 401, {"error": "no such"}, {"X-Error-Code": "RepoNotFound"})
        if found.revisions and revision not in found.revisions:
            return self.send(404, {"error": "no such"}, {"X-Error-Code": "RevisionNotFound"})
        return found

    # --- the pages ---

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if not self.known():
            return self.send(401, {"error": "Invalid username or password."})
        there = name in self.hub.repos
        if not there:
            self.hub.repos[name] = Repo(private=asked.get("visibility") == "private" or bool(asked.get("private")))
            self.hub.commit(name, {".gitattributes": b""})
        self.send(409 if there else 200, {"url": f"{self.hub.address}/{name}"})

    def yaml(self, body: bytes) -> None:
        self.send(200, {"warnings": [], "errors": []})

    def info(self, body: bytes, name: str, revision: str | None) -> None:
        if repo := self.repo(name, revision or "main"):
            sha = self.hub.sha(name, revision or "main")
            self.send(200, {"id": name, "modelId": name, "sha": sha, "private": repo.private, "siblings": []})

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        if repo := self.repo(name):
            there = repo.revisions["main"]
            files = [file["path"] for file in json.loads(body)["files"]]
            self.send(200, {"files": [self.mode(file, there.get(file)) for file in files]})

    def mode(self, name: str, data: bytes | None) -> dict[str, Any]:
        large = name.endswith(LARGE)
        oid = None if data is None else (lfs(data) if large else blob(data))
        return {"path": name, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}

    def batch(self, body: bytes, name: str) -> None:
        wanted = json.loads(body)["objects"]
        upload = [{"upload": {"href": f"{self.hub.address}/lfs/{o['oid']}"}} for o in wanted]
        objects = [
            {**o, **({} if o["oid"] in self.hub.objects else {"actions": actions})}
            for o, actions in zip(wanted, upload, strict=True)
        ]
        self.send(200, {"objects": objects, "transfer": "basic"})

    def xet(self, body: bytes, name: str, revision: str) -> None:
        self.send(404, {"error": "no such page"})

    def put(self, body: bytes, oid: str) -> None:
        self.hub.objects[lfs(body)] = body
        self.send(200 if lfs(body) == oid else 400, {})

    def commit(self, body: bytes, name: str, revision: str) -> None:
        if not self.known():
            return self.send(401, {"error": "no"})
        changes = {}
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                changes[value["path"]] = self.hub.objects[value["oid"]]
        oid = self.hub.commit(name, changes)
        self.send(200, {"commitOid": oid, "commitUrl": f"{self.hub.address}/{name}/commit/{oid}"})

    def tree(self, body: bytes, name: str, revision: str) -> None:
        if repo := self.repo(name, revision):
            files = repo.revisions[revision]
            self.send(200, [self.entry(file, data) for file, data in files.items()])

    def entry(self, name: str, data: bytes) -> dict[str, Any]:
        large = {"lfs": {"oid": lfs(data), "size": len(data), "pointerSize": 130}} if name.endswith(LARGE) else {}
        return {"type": "file", "path": name, "size": len(data), "oid": blob(data), **large}

    def resolve(self, body: bytes, name: str, revision: str, file: str) -> None:
        if repo := self.repo(name, revision):
            data = repo.revisions[revision].get(file)
            if data is None:
                return self.send(404, {"error": "no such"}, {"X-Error-Code": "EntryNotFound"})
            etag = lfs(data) if file.endswith(LARGE) else blob(data)
            self.send(200, data, {"X-Repo-Commit": self.hub.sha(name, revision), "ETag": f'"{etag}"'})

    def log_message(self, format: str, *args: Any) -> None:
        pass


def lfs(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def standin() -> Iterator[Hub]:
    """A hub at `address`."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield hub
    finally:
        hub.over.set()
        server.shutdown()
        server.server_close()


def environment(hub: Hub, home: Path) -> dict[str, str]:
    """The variables under which `huggingface_hub` talks to it, with a token that may write."""
    return {
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": TOKEN,
        "NO_PROXY": "127.0.0.1",
    }
