"""A small Hugging Face hub on this machine for datasets: the routes that huggingface_hub uses to write and read them.

Files are real, on the disk; large and binary ones go through LFS and a "CDN" of another host name, as on the real hub.
It misbehaves when it is told to.
"""

from __future__ import annotations

import base64
import hashlib
import json
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from time import sleep
from urllib.parse import parse_qs, unquote, urlsplit

from huggingface_hub import constants

from atcache.files.remote import block_cache, remote_file

TOKEN = "hf_of_these_tests"


@contextmanager
def a_hub_in_use(folder: Path, monkeypatch) -> Iterator[DatasetHub]:
    """A hub that this process uses, logged in; it keeps its files and the blocks that are read of them in a folder."""
    monkeypatch.setenv("ATCACHE_BLOCKS_DIR", str(folder / "blocks"))
    monkeypatch.setenv("ATCACHE_BLOCKS_GIB", "0.01")
    monkeypatch.setattr(block_cache, "_shared", None)
    monkeypatch.setattr(remote_file, "_claims", None)
    with DatasetHub(folder / "hub") as hub:
        # The library reads its environment when it is imported.
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "no-token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@dataclass(frozen=True)
class Blob:
    """One file of a commit."""

    oid: str
    """What huggingface_hub compares: the SHA-256 of an LFS file, else git's SHA-1."""
    size: int
    is_lfs: bool


@dataclass
class Repository:
    """A dataset: its commits, of which the last of a branch is its head."""

    is_private: bool
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    heads: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)


class DatasetHub(ThreadingHTTPServer):
    """A hub on a free port, from a thread, until it is closed."""

    daemon_threads = True

    def __init__(self, folder: Path, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.cdn = f"http://localhost:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.lock = threading.Lock()
        self.uploads: list[str] = []
        """SHA-256 of each file that was sent."""
        self.asked: list[tuple[str, str, str | None]] = []
        """Method, path and Authorization header of each request."""
        self.is_read_only = False
        self.faults = random.Random(0)
        self.fault_rate = 0.0
        self.upload_delay_s = 0.0
        self.meanwhile: list[Callable[[], object]] = []
        """What others do during a push: at each commit that arrives, the first one happens just before it."""
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def __exit__(self, *error) -> None:
        self.shutdown()
        super().__exit__(*error)

    def handle_error(self, *_) -> None:
        """Keep quiet about clients that were killed."""

    def add_commit(self, repository: Repository, branch: str, tree: dict[str, Blob], message: str) -> str:
        parent = repository.heads.get(branch, "")
        about = json.dumps([parent, message, sorted((name, blob.oid) for name, blob in tree.items())])
        commit = hashlib.sha1(about.encode()).hexdigest()
        repository.commits[commit] = tree
        repository.heads[branch] = commit
        repository.messages.append(message)
        return commit

    def create(self, name: str, *, is_private: bool = True) -> Repository:
        repository = self.repositories[name] = Repository(is_private)
        attributes = b"*.bin filter=lfs\n"
        self.add_commit(repository, "main", {".gitattributes": self.keep(attributes, is_lfs=False)}, "initial commit")
        return repository

    def keep(self, data: bytes, *, is_lfs: bool) -> Blob:
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        blob = Blob(hashlib.sha256(data).hexdigest() if is_lfs else git, len(data), is_lfs)
        (self.folder / blob.oid).write_bytes(data)
        return blob

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        repository = self.repositories[name]
        tree = repository.commits[repository.heads.get(revision, revision)]
        return {path: (self.folder / blob.oid).read_bytes() for path, blob in tree.items()}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    server: DatasetHub

    def log_message(self, *_) -> None:
        """Keep quiet."""

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, value) -> None:
        self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def do(self) -> None:
        hub, place = self.server, urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        hub.asked.append((self.command, place.path, self.headers.get("Authorization")))
        with hub.lock:
            is_faulty = hub.faults.random() < hub.fault_rate
            status = hub.faults.choice([500, 429])
        if is_faulty:
            return self.answer(status, b"busy", Retry_After="0")
        parts = [unquote(part) for part in place.path.strip("/").split("/")]
        match parts:
            case ["cdn", oid] | ["upload", oid]:
                return self.put(oid, body) if self.command == "PUT" else self.send_file(hub.folder / oid, oid)
            case ["api", "validate-yaml"]:
                return self.json({"warnings": [], "errors": []})
            case ["api", "repos", "create"]:
                return self.create(json.loads(body))
            case ["api", "datasets", org, name, *rest]:
                pass
            case ["datasets", org, name, "resolve", *rest]:
                rest = ["resolve", *rest]
            case ["datasets", org, name, "info", "lfs", "objects", "batch"]:
                org, name, rest = org, name.removesuffix(".git"), ["batch"]
            case _:
                return self.answer(404)
        repository = hub.repositories.get(f"{org}/{name}")
        if repository is None or (repository.is_private and not self.is_known):
            return self.answer(404 if self.is_known else 401, X_Error_Code="RepoNotFound")
        return self.about(f"{org}/{name}", repository, rest, body, parse_qs(place.query))

    do_GET = do_HEAD = do_POST = do_PUT = do

    @property
    def is_known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def may_write(self) -> bool:
        if may := self.is_known and not self.server.is_read_only:
            return may
        self.answer(403, b'{"error": "You may not write here"}', X_Error_Message="You may not write here")
        return False

    def create(self, asked) -> None:
        hub, name = self.server, f"{asked['organization']}/{asked['name']}"
        if self.may_write():
            assert asked["type"] == "dataset"
            hub.create(name, is_private=asked.get("visibility") == "private")
            self.json({"url": f"{hub.url}/datasets/{name}"})

    def put(self, oid: str, body: bytes) -> None:
        hub = self.server
        sleep(hub.upload_delay_s)
        assert hashlib.sha256(body).hexdigest() == oid
        (hub.folder / oid).write_bytes(body)
        hub.uploads.append(oid)
        self.answer(200)

    def about(self, name: str, repository: Repository, rest: list[str], body: bytes, query) -> None:
        hub = self.server
        revision = rest[1] if len(rest) > 1 else "main"
        commit = repository.heads.get(revision, revision)
        if commit not in repository.commits:
            return self.answer(404, X_Error_Code="RevisionNotFound")
        tree = repository.commits[commit]
        match rest:
            case [] | ["revision", _]:
                return self.json({"id": name, "sha": commit, "private": repository.is_private, "siblings": []})
            case ["tree", _, *below]:
                prefix = "".join(f"{part}/" for part in below)
                found = [self.entry(path, blob) for path, blob in sorted(tree.items()) if path.startswith(prefix)]
                return self.json(found) if found or not below else self.answer(404, X_Error_Code="EntryNotFound")
            case ["paths-info", _]:
                wanted = parse_qs(body.decode())["paths"]
                return self.json([self.entry(path, tree[path]) for path in wanted if path in tree])
            case ["preupload", _]:
                if not self.may_write():
                    return None
                files = json.loads(body)["files"]
                return self.json({"files": [self.mode(file, tree) for file in files]})
            case ["batch"]:
                objects = json.loads(body)["objects"]
                return self.json({"transfer": "basic", "objects": [self.action(one) for one in objects]})
            case ["commit", _]:
                return self.commit(name, repository, revision, body) if self.may_write() else None
            case ["resolve", _, *path]:
                blob = tree.get("/".join(path))
                if blob is None:
                    return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
                if blob.is_lfs:
                    return self.answer(302, Location=f"{hub.cdn}/cdn/{blob.oid}", X_Repo_Commit=commit)
                return self.send_file(hub.folder / blob.oid, blob.oid)
        return self.answer(404)

    @staticmethod
    def entry(path: str, blob: Blob) -> dict:
        lfs = {"lfs": {"oid": blob.oid, "size": blob.size, "pointerSize": 130}} if blob.is_lfs else {}
        return {"type": "file", "path": path, "size": blob.size, "oid": blob.oid[:40], **lfs}

    @staticmethod
    def mode(file, tree) -> dict:
        sample, path = base64.b64decode(file["sample"]), file["path"]
        is_lfs = file["size"] > 10_000_000 or b"\0" in sample
        oid = {"oid": tree[path].oid} if path in tree else {}
        return {"path": path, "uploadMode": "lfs" if is_lfs else "regular", "shouldIgnore": False, **oid}

    def action(self, one) -> dict:
        if (self.server.folder / one["oid"]).exists():
            return {"oid": one["oid"], "size": one["size"]}
        href = f"{self.server.cdn}/upload/{one['oid']}"
        return {"oid": one["oid"], "size": one["size"], "actions": {"upload": {"href": href}}}

    def commit(self, name: str, repository: Repository, branch: str, body: bytes) -> None:
        hub, summary = self.server, ""
        if hub.meanwhile:
            hub.meanwhile.pop(0)()
        header = json.loads(body.splitlines()[0])["value"]
        with hub.lock:
            if header.get("parentCommit", repository.heads[branch]) != repository.heads[branch]:
                return self.answer(412, X_Error_Message="A commit has happened since.")
            tree = dict(repository.commits[repository.heads[branch]])
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                match line["key"]:
                    case "header":
                        summary = value["summary"]
                    case "file":
                        tree[value["path"]] = hub.keep(base64.b64decode(value["content"]), is_lfs=False)
                    case "lfsFile":
                        assert (hub.folder / value["oid"]).exists(), "a file is sent before it is committed"
                        tree[value["path"]] = Blob(value["oid"], value["size"], is_lfs=True)
                    case "deletedFile":
                        del tree[value["path"]]
            made = hub.add_commit(repository, branch, tree, summary)
        return self.json({"commitUrl": f"{hub.url}/datasets/{name}/commit/{made}", "commitOid": made})

    def send_file(self, file: Path, oid: str) -> None:
        size, start, status, headers = file.stat().st_size, 0, 200, {}
        stop = size
        if "Range" in self.headers:
            first, last = self.headers["Range"].removeprefix("bytes=").split("-")
            start, stop, status = int(first), min(int(last) + 1, size), 206
            headers["Content_Range"] = f"bytes {start}-{stop - 1}/{size}"
        body = b"" if self.command == "HEAD" else file.read_bytes()[start:stop]
        self.answer(status, body, **headers, ETag=f'"{oid}"', Content_Length=str(stop - start))
