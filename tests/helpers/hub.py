"""A local Hugging Face hub: serves folders as data sets to the real client over HTTP, and counts what it serves."""

import hashlib
import json
import os
import re
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class LocalHub(ThreadingHTTPServer):
    """Serves the data sets below `root` (owner/name/...) while it is open as a context.

    ends_at: a request for this file ends the service; it and all later ones get an error. commit: of all data sets.
    fetched: bytes served of each file. revisions: the requested ones.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.root = root
        self.ends_at, self.has_ended = "", False
        self.commit = "c" * 40
        self.fetched: dict[str, int] = {}
        self.revisions: set[str] = set()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def __exit__(self, *error: Any) -> None:
        self.shutdown()
        super().__exit__(*error)

    def environment(self, folder: Path) -> dict[str, str]:
        """Environment of a process that uses this hub, with its caches below `folder`."""
        inherited = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
        caches = {"HF_HOME": str(folder / "hf"), "UM3_CACHE": str(folder / "um3"), "OMP_NUM_THREADS": "1"}
        return inherited | caches | {"HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}", "PYTHONPATH": str(ROOT)}


class _Answer(BaseHTTPRequestHandler):
    server: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Log nothing."""

    def do_GET(self) -> None:
        url = urllib.parse.urlparse(self.path)
        path = urllib.parse.unquote(url.path)
        if match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            self._send_description(match[1], match[2] or "main")
        elif match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/tree/[^/]+(?:/(.*))?", path):
            self._send_folder(match[1], match[2] or "", recursive="recursive=true" in url.query.lower())
        elif match := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/[^/]+/(.*)", path):
            self._send_file(match[1], match[2])
        else:
            self._send_error("EntryNotFound")

    do_HEAD = do_GET

    def _send_description(self, name: str, revision: str) -> None:
        folder = self.server.root / name
        if not folder.is_dir():
            return self._send_error("RepoNotFound")
        self.server.revisions.add(revision)
        files = [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*")) if file.is_file()]
        description = {"id": name, "sha": self.server.commit, "tags": []}
        description |= dict.fromkeys(("private", "gated", "disabled"), False)
        return self._send(json.dumps(description | {"siblings": [{"rfilename": file} for file in files]}).encode())

    def _send_folder(self, name: str, below: str, *, recursive: bool) -> None:
        folder = self.server.root / name / below
        if not folder.is_dir():
            return self._send_error("EntryNotFound")
        entries = []
        for path in sorted(folder.rglob("*") if recursive else folder.iterdir()):
            kind, size = ("directory", 0) if path.is_dir() else ("file", path.stat().st_size)
            place = path.relative_to(self.server.root / name).as_posix()
            entries.append({"type": kind, "path": place, "size": size, "oid": hashlib.sha1(place.encode()).hexdigest()})
        return self._send(json.dumps(entries).encode())

    def _send_file(self, name: str, file: str) -> None:
        path = self.server.root / name / file
        self.server.has_ended |= path.name == self.server.ends_at
        if not path.is_file() or self.server.has_ended:
            return self._send_error("EntryNotFound")
        data = path.read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": self.server.commit}
        headers["Accept-Ranges"] = "bytes"
        code = 200
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(wanted[1]), min(int(wanted[2] or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            code, data = 206, data[first : last + 1]
        if self.command == "GET":
            self.server.fetched[path.name] = self.server.fetched.get(path.name, 0) + len(data)
        return self._send(data, code, **headers)

    def _send_error(self, reason: str) -> None:
        self._send(b"{}", 404, **{"X-Error-Code": reason, "X-Repo-Commit": self.server.commit})

    def _send(self, body: bytes, code: int = 200, **headers: str) -> None:
        self.send_response(code)
        for key, value in {"Content-Length": str(len(body)), "Content-Type": "application/json", **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
