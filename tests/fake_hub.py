"""A hub that the real clients talk to, huggingface_hub and modelscope_hub: repositories by name, and what may go wrong."""

import base64
import contextlib
import hashlib
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """What the hub has, and how it behaves.

    Attributes:
        files: {repository: {name: content}}; the name of a data set begins with datasets/.
        gated: repositories that this user may not read.
        broken: names whose content is sent with a bit flipped, so many times.
        failures: requests that are answered 503 before any other answer.
        stored: large files that were uploaded and not committed yet, by their hash.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.broken: dict[str, int] = {}
        self.failures = 0
        self.asked: list[str] = []
        self.stored: dict[str, bytes] = {}


def _described(files: dict[str, bytes]) -> list[dict[str, object]]:
    entries = []
    for name, content in files.items():
        entry: dict[str, object] = {"rfilename": name, "path": name, "type": "file"}
        entry |= {"size": len(content), "oid": _git_hash(content), "blobId": _git_hash(content)}
        if name.endswith(".safetensors"):
            digest = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {
                "oid": digest,
                "sha256": digest,
                "size": len(content),
                "pointerSize": 134,
            }
        entries.append(entry)
    return entries


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def _answer(self, code: int, content: bytes = b"", **headers: str) -> None:
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def do_GET(self) -> None:
            hub.asked.append(self.path)
            if hub.failures:
                hub.failures -= 1
                return self._answer(503)
            path, _, query = self.path.partition("?")
            if path.startswith("/api/v1/"):
                return self._modelscope(path, urllib.parse.parse_qs(query))
            path = path.replace("/api/datasets/", "/api/models/datasets/")
            api = re.fullmatch(
                r"/api/models/((?:datasets/)?[^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path
            )
            raw = re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            found = api or raw
            repo = found[1] if found else ""
            if repo not in hub.files:
                return self._answer(404, b"{}", X_Error_Code="RepoNotFound")
            revision = (api[3] if api else raw[2]) or "main"  # type: ignore[index]
            if revision not in ("main", COMMIT):
                return self._answer(404, b"{}", X_Error_Code="RevisionNotFound")
            if api:
                return self._describe(repo, api[2] == "tree")
            return self._send(repo, raw[3])  # type: ignore[index]

        do_HEAD = do_GET

        def do_POST(self) -> None:
            hub.asked.append(self.path)
            length = int(self.headers.get("Content-Length", 0))
            body = self.rfile.read(length)
            path = self.path.partition("?")[0]
            if path == "/api/validate-yaml":  # of a card
                fields = json.loads(body)["content"].split("---")[1]
                return self._json({"errors": [], "warnings": [], "fields": fields})
            if path == "/api/repos/create":
                name = "/".join(filter(None, map(json.loads(body).get, ("organization", "name"))))
                hub.files.setdefault(name, {})
                return self._json({"url": f"http://{self.headers['Host']}/{name}"})
            if found := re.fullmatch(r"/api/models/(.+)/preupload/main", path):
                files = []
                for file in json.loads(body)["files"]:
                    large = file["path"].endswith(".safetensors")
                    mode = "lfs" if large else "regular"
                    files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
                return self._json({"files": files})
            if path.endswith("/info/lfs/objects/batch"):
                objects = []
                for each in json.loads(body)["objects"]:
                    address = f"http://{self.headers['Host']}/put/{each['oid']}"
                    objects.append({**each, "actions": {"upload": {"href": address}}})
                return self._json({"transfer": "basic", "objects": objects})
            if found := re.fullmatch(r"/api/models/(.+)/commit/main", path):
                return self._commit(found[1], body)
            return self._answer(404, b"{}")

        def do_PUT(self) -> None:
            hub.asked.append(self.path)
            content = self.rfile.read(int(self.headers["Content-Length"]))
            hub.stored[hashlib.sha256(content).hexdigest()] = content
            self._answer(200)

        def _commit(self, repo: str, body: bytes) -> None:
            if repo in hub.gated:
                return self._answer(403, b"{}", X_Error_Message="no write token")
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.files[repo][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.files[repo][value["path"]] = hub.stored[value["oid"]]
            address = f"http://{self.headers['Host']}/{repo}/commit/{COMMIT}"
            self._json({"success": True, "commitOid": COMMIT, "commitUrl": address})

        def _json(self, value: object) -> None:
            self._answer(200, json.dumps(value).encode(), Content_Type="application/json")

        def _modelscope(self, path: str, query: dict[str, list[str]]) -> None:
            found = re.fullmatch(r"/api/v1/(model|dataset)s/([^/]+/[^/]+)(/repo.*)?", path)
            name = "datasets/" * (found[1] == "dataset") + found[2] if found else ""
            if name in hub.gated:
                return self._answer(403, b'{"Code": 10010205003, "Message": "denied"}')
            if name not in hub.files or query.get("Revision", ["master"]) != ["master"]:
                return self._answer(404, b'{"Code": 10010205001, "Message": "not found"}')
            if "FilePath" in query:
                return self._send(name, query["FilePath"][0])
            files = []
            for file, content in hub.files[name].items():
                entry = {"Path": file, "Name": file.rpartition("/")[2], "Type": "blob"}
                entry |= {"Size": len(content), "Sha256": hashlib.sha256(content).hexdigest()}
                files.append(entry)
            self._json({"Code": 200, "Data": {"Files": files, "TotalCount": len(files)}})

        def _describe(self, repo: str, tree: bool) -> None:
            entries = _described(hub.files[repo])
            info = {"id": repo, "sha": COMMIT, "siblings": entries, "private": False, "tags": []}
            content = json.dumps(entries if tree else info).encode()
            self._answer(200, content, Content_Type="application/json")

        def _send(self, repo: str, name: str) -> None:
            if repo in hub.gated:
                return self._answer(403, b"{}", X_Error_Code="GatedRepo")
            content = hub.files[repo].get(name)
            if content is None:
                return self._answer(404, b"{}", X_Error_Code="EntryNotFound")
            headers = {"X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes"}
            (entry,) = _described({name: content})
            lfs = entry.get("lfs")
            headers["ETag"] = f'"{lfs["sha256"] if lfs else entry["oid"]}"'  # type: ignore[index]
            if self.command == "GET" and hub.broken.get(name):
                hub.broken[name] -= 1
                content = content[:-1] + bytes([content[-1] ^ 1])
            if span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                first, last = int(span[1]), int(span[2] or len(content) - 1)
                headers["Content_Range"] = f"bytes {first}-{last}/{len(content)}"
                return self._answer(206, content[first : last + 1], **headers)
            return self._answer(200, content, **headers)

    return Handler


@contextlib.contextmanager
def serve(hub: Hub) -> Iterator[str]:
    """The address of the hub, for HF_ENDPOINT."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
