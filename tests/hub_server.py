"""A small stand-in for the model hub on 127.0.0.1: what huggingface_hub asks for, and what can go wrong with it."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

API = re.compile(r"/api/(model|dataset)s/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?$")
RESOLVE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)$")


@dataclass
class StandIn:
    """Repositories by kind and name, each with files by commit and branches, and how the hub is to misbehave."""

    url: str = ""
    files: dict[tuple[str, str], dict[str, dict[str, bytes]]] = field(default_factory=dict)  # ... commit, path
    branches: dict[tuple[str, str], dict[str, str]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)  # names
    token: str | None = None  # the only valid one; None: none is looked at
    trouble: int = 0  # how many of the next requests are answered with 503
    cut: int = 0  # how many of the next downloads end in the middle
    ranges: bool = True  # whether a download can go on in the middle
    asked: list[str] = field(default_factory=list)

    def add(self, name: str, files: dict[str, bytes], commit: str, kind: str = "model", branch: str = "main") -> None:
        """Put a commit, and let a branch stand there."""
        self.files.setdefault((kind, name), {})[commit] = files
        self.branches.setdefault((kind, name), {})[branch] = commit


@contextmanager
def serving() -> Iterator[StandIn]:
    """A stand-in that answers while the block runs."""
    hub = StandIn()

    class Handler(BaseHTTPRequestHandler):
        """One request."""

        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Nothing."""

        def do_HEAD(self) -> None:
            """The headers of the answer."""
            self.do_GET()

        def do_GET(self) -> None:
            """Answer as the hub does."""
            hub.asked.append(f"{self.command} {self.path}")
            if hub.trouble > 0:
                hub.trouble -= 1
                return self.send(503)
            given = self.headers.get("authorization")
            if given is not None and hub.token is not None and given != f"Bearer {hub.token}":
                return self.send(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
            path = self.path.split("?")[0]
            if found := API.match(path):
                kind, name, what, revision = found[1], found[2], found[3], found[4] or "main"
            elif found := RESOLVE.match(path):
                kind, name, what, revision = "dataset" if found[1] else "model", found[2], "file", found[3]
            else:
                return self.send(404)
            if (kind, name) not in hub.files:
                return self.send(404 if given else 401, {"X-Error-Code": "RepoNotFound"})
            commit = hub.branches[kind, name].get(revision, revision)
            files = hub.files[kind, name].get(commit)
            if files is None:
                return self.send(404, {"X-Error-Code": "RevisionNotFound"})
            if what == "tree":
                entries = [{"type": "file", "path": p, "size": len(b), "oid": etag(b)} for p, b in files.items()]
                return self.send(200, body=json.dumps(entries).encode())
            if what != "file":
                names = [{"rfilename": path} for path in files]
                return self.send(200, body=json.dumps({"id": name, "sha": commit, "siblings": names}).encode())
            if name in hub.gated:
                return self.send(403 if given else 401, {"X-Error-Code": "GatedRepo"})
            if found[4] not in files:
                return self.send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            body = files[found[4]]
            return self.send(200, {"X-Repo-Commit": commit, "ETag": f'"{etag(body)}"'}, body, download=True)

        def send(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"", download=False) -> None:
            start = re.match(r"bytes=(\d+)-", self.headers.get("range", "")) if download and hub.ranges else None
            if start is not None:
                body, status = body[int(start[1]) :], 206
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "HEAD":
                return
            if download and hub.cut > 0:
                hub.cut -= 1
                body, self.close_connection = body[: len(body) // 2], True
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def etag(body: bytes) -> str:
    """Forty hex digits that tell contents apart."""
    return hashlib.sha1(body).hexdigest()
