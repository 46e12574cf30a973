"""A small HTTP server that speaks the part of the Hub's API that huggingface_hub calls.

Models' commits and files lie in memory. A test may move a branch, cut a connection after some bytes, or
have a path answered with an error, and sees every request that came.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass(slots=True)
class Repository:
    """revisions: a branch or tag to its commit. commits: to the files by name."""

    revisions: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit_of(self, revision: str) -> str | None:
        commit = self.revisions.get(revision, revision)
        return commit if commit in self.commits else None


@dataclass(slots=True)
class Hub:
    """What the server has, does and has seen."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    """(method, path, Range header) in order."""
    tokens: set[str | None] = field(default_factory=set)
    """The Authorization headers that came for all but content."""
    storage_tokens: set[str | None] = field(default_factory=set)
    """The Authorization headers that came for content."""
    cuts: dict[str, list[int]] = field(default_factory=dict)
    """File name to the bytes after which each of the next answers breaks off."""
    listed_sizes: dict[str, int] = field(default_factory=dict)
    """File name to a size in the listing that is not the file's."""
    errors: dict[str, tuple[int, str]] = field(default_factory=dict)
    """The end of a path to the status and X-Error-Code that answer it."""
    answered_commit: str | None = None
    """In place of the commit that was asked for."""
    after_file: Callable[[str], None] = lambda name: None
    url: str = ""
    storage_url: str = ""

    def fetched(self) -> list[str]:
        """The names of files whose content was asked for, in order."""
        return [
            path.rsplit("/", 1)[1] for method, path, _ in self.requests if method == "GET" and "/cdn/" in path
        ]


@contextmanager
def serving(hub: Hub) -> Iterator[None]:
    """Serve `hub` on a free port, at `hub.url`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            answer(self, hub)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        # Two hosts, as the real Hub keeps content elsewhere, where the token must not go.
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        hub.storage_url = f"http://localhost:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


def answer(request: BaseHTTPRequestHandler, hub: Hub) -> None:
    path = unquote(urlsplit(request.path).path)
    if path.startswith("/api/") and not path.startswith("/api/models/"):
        return send(request, 404, {})  # the library asks for what is none of a model's
    hub.requests.append((request.command, path, request.headers.get("Range")))
    (hub.storage_tokens if path.startswith("/cdn/") else hub.tokens).add(request.headers.get("Authorization"))
    for end, (status, code) in hub.errors.items():
        if path.endswith(end):
            return send(request, status, {"X-Error-Code": code})
    match path.removeprefix("/").split("/"):
        case ["api", "models", owner, name, "revision", *revision]:
            answer_listing(request, hub, repository=f"{owner}/{name}", revision="/".join(revision))
        case [owner, name, "resolve", commit, *file]:
            answer_file(request, hub, repository=f"{owner}/{name}", commit=commit, file="/".join(file))
        case ["cdn", owner, name, commit, *file]:
            send_content(
                request, hub, content=hub.repositories[f"{owner}/{name}"].commits[commit]["/".join(file)]
            )
            hub.after_file("/".join(file))
        case _:
            send(request, 404, {})


def answer_listing(request: BaseHTTPRequestHandler, hub: Hub, *, repository: str, revision: str) -> None:
    if repository not in hub.repositories:
        # As the Hub does, which tells nobody whether a private repository exists.
        return send(request, 401, {"X-Error-Code": "RepoNotFound"})
    commit = hub.repositories[repository].commit_of(revision)
    if commit is None:
        return send(request, 404, {"X-Error-Code": "RevisionNotFound"})
    files = hub.repositories[repository].commits[commit]
    siblings = [
        {"rfilename": name, "size": hub.listed_sizes.get(name, len(content))}
        for name, content in files.items()
    ]
    send(request, 200, {}, json.dumps({"id": repository, "sha": commit, "siblings": siblings}).encode())


def answer_file(
    request: BaseHTTPRequestHandler, hub: Hub, *, repository: str, commit: str, file: str
) -> None:
    """The metadata, and where the content is."""
    content = hub.repositories[repository].commits.get(commit, {}).get(file)
    if content is None:
        return send(request, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
    headers = {
        "X-Repo-Commit": hub.answered_commit or commit,
        "X-Linked-Etag": f'"{sha256(content).hexdigest()}"',
        "X-Linked-Size": str(len(content)),
        "Location": f"{hub.storage_url}/cdn/{repository}/{commit}/{file}",
    }
    send(request, 302, headers)


def send_content(request: BaseHTTPRequestHandler, hub: Hub, *, content: bytes) -> None:
    name = request.path.rsplit("/", 1)[1]
    start = 0
    if (wanted := request.headers.get("Range")) is not None:
        start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        content = content[start:]
    cuts = hub.cuts.get(name, [])
    if cuts:
        num_bytes = cuts.pop(0)
        request.close_connection = True
        send(request, 206 if start else 200, {}, content[:num_bytes], length=len(content))
    else:
        send(request, 206 if start else 200, {}, content)


def send(
    request: BaseHTTPRequestHandler,
    status: int,
    headers: dict[str, str],
    content: bytes = b"",
    *,
    length: int | None = None,
) -> None:
    request.send_response(status)
    for name, value in headers.items():
        request.send_header(name, value)
    request.send_header("Content-Length", str(len(content) if length is None else length))
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(content)
