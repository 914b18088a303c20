"""A hub of models and data sets on this machine, for the real client libraries.

It speaks what huggingface_hub and datasets ask for: descriptions and trees of repositories, and
files by branch or commit.  Large files are handed out as the hub does, from a second address.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".bin", ".h5", ".msgpack", ".onnx", ".parquet", ".gz")
Files = Mapping[str, bytes]


def folder_files(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder by their paths in it."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@dataclass
class Repository:
    """branches: name -> files.  gated: the status that its files are refused with."""

    branches: dict[str, Files]
    gated: int | None = None

    def files_at(self, revision: str) -> Files | None:
        """Return the files of a branch or a commit."""
        for name, files in self.branches.items():
            if revision in (name, commit_of(files)):
                return files
        return None


@dataclass
class Hub:
    """A running hub.

    models, data_sets: id -> repository; they may change while it runs.  sent: REPOSITORY/FILE of
    each content that was sent, in order.
    """

    url: str
    models: dict[str, Repository] = field(default_factory=dict)
    data_sets: dict[str, Repository] = field(default_factory=dict)
    sent: list[str] = field(default_factory=list)

    @property
    def shelves(self) -> dict[str, dict[str, Repository]]:
        return {"models": self.models, "datasets": self.data_sets}

    def environment(self, home: Path) -> dict[str, str]:
        """Return what the client libraries read when they are imported."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
        }


@dataclass(frozen=True)
class Answer:
    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


def commit_of(files: Files) -> str:
    digest = hashlib.sha1()
    for path, content in sorted(files.items()):
        digest.update(f"{path}\0{blob_id(content)}\n".encode())
    return digest.hexdigest()


def blob_id(content: bytes) -> str:
    """Return git's name of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Yield a hub without repositories on a free port of this machine."""
    hub = Hub("")

    class Handler(_Handler):
        shelf = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    shelf: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._send(answer(self.shelf, self.path, self.command))

    do_HEAD = do_GET

    def do_POST(self) -> None:
        asked = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        self._send(answer(self.shelf, self.path, self.command, asked))

    def _send(self, reply: Answer) -> None:
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body)

    def log_message(self, *_: object) -> None:
        """Stay silent."""


def answer(hub: Hub, address: str, method: str, asked: str = "") -> Answer:
    """Answer one request; `address` is what follows the host."""
    parts = [unquote(part) for part in urlsplit(address).path.strip("/").split("/")]
    query = parse_qs(urlsplit(address).query)
    if parts[0] == "large":
        return _large(hub, parts[1:], method)
    if parts[0] == "api":
        shelf = hub.shelves.get(parts[1])
        return _refused(404, "") if shelf is None else _about(shelf, parts[2:], query, asked)
    kind, parts = ("datasets", parts[1:]) if parts[0] == "datasets" else ("models", parts)
    if len(parts) < 5 or parts[2] != "resolve":
        return _refused(404, "")
    return _file(hub, kind, parts, method)


def _about(
    shelf: dict[str, Repository], parts: list[str], query: dict[str, list[str]], asked: str
) -> Answer:
    """Describe a repository: .../[revision/REV], .../tree/REV[/FOLDER] or .../paths-info/REV."""
    name, (kind, revision) = "/".join(parts[:2]), parts[2:4] or ("revision", "main")
    if name not in shelf:
        return _refused(401, "RepoNotFound")
    files = shelf[name].files_at(revision)
    if files is None:
        return _refused(404, "RevisionNotFound")
    if kind == "revision":
        siblings = [{"rfilename": path} for path in files]
        return _json({"id": name, "sha": commit_of(files), "siblings": siblings, "tags": []})
    if kind == "paths-info":
        return _json([row for path in parse_qs(asked)["paths"] for row in _entry(files, path)])
    folder = "".join(f"{part}/" for part in parts[4:])
    inside = [path for path in files if path.startswith(folder)]
    if not inside:
        return _refused(404, "EntryNotFound")
    recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
    return _json(
        [row for path in _listed(inside, folder, recursive) for row in _entry(files, path)]
    )


def _listed(paths: list[str], folder: str, recursive: bool) -> list[str]:
    """Return the paths below a folder and the folders among them."""
    found = set()
    for path in paths:
        steps = path.removeprefix(folder).split("/")
        depth = len(steps) if recursive else 1
        found |= {folder + "/".join(steps[: number + 1]) for number in range(depth)}
    return sorted(found)


def _entry(files: Files, path: str) -> list[dict[str, object]]:
    if path not in files:
        if not any(other.startswith(f"{path}/") for other in files):
            return []
        return [{"type": "directory", "path": path, "oid": blob_id(path.encode()), "size": 0}]
    content = files[path]
    entry = {"type": "file", "path": path, "oid": blob_id(content), "size": len(content)}
    if path.endswith(LARGE):
        entry["lfs"] = {"oid": _sha256(content), "size": len(content), "pointerSize": 130}
    return [entry]


def _file(hub: Hub, kind: str, parts: list[str], method: str) -> Answer:
    name, revision, path = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
    repository = hub.shelves[kind].get(name)
    if repository is None:
        return _refused(401, "RepoNotFound")
    if repository.gated:
        return _refused(repository.gated, "GatedRepo")
    files = repository.files_at(revision)
    if files is None:
        return _refused(404, "RevisionNotFound")
    commit = {"X-Repo-Commit": commit_of(files)}
    if path not in files:
        return Answer(404, headers={"X-Error-Code": "EntryNotFound", **commit})
    content = files[path]
    if not path.endswith(LARGE):
        if method != "HEAD":
            hub.sent.append(f"{name}/{path}")
        return Answer(body=content, headers={"ETag": f'"{blob_id(content)}"', **commit})
    linked = {"X-Linked-Etag": f'"{_sha256(content)}"', "X-Linked-Size": str(len(content))}
    elsewhere = hub.url.replace("127.0.0.1", "localhost")  # clients take another host for a store
    place = {"Location": f"{elsewhere}/large/{kind}/{name}/{_sha256(content)}"}
    return Answer(302, headers={**place, **linked, **commit})


def _large(hub: Hub, parts: list[str], method: str) -> Answer:
    """Give out a large file by its content: KIND/REPOSITORY/SHA256."""
    name, sha256 = "/".join(parts[1:3]), parts[3]
    for files in hub.shelves[parts[0]][name].branches.values():
        for path, content in files.items():
            if path.endswith(LARGE) and _sha256(content) == sha256:
                if method != "HEAD":
                    hub.sent.append(f"{name}/{path}")
                return Answer(body=content, headers={"ETag": f'"{sha256}"'})
    return _refused(404, "EntryNotFound")


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _json(value: object) -> Answer:
    return Answer(body=json.dumps(value).encode(), headers={"Content-Type": "application/json"})


def _refused(status: int, code: str) -> Answer:
    return Answer(status, headers={"X-Error-Code": code} if code else {})
