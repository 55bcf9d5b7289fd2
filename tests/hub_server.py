"""A stand-in for the parts of the Hugging Face Hub's API that pushing and pulling use, on loopback.

Repositories are kept in memory: commits of files, which are large (with an SHA-256, uploaded on
their own) or in git (with git's hash). It counts requests and bytes, and can be told to refuse.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import huggingface_hub.constants
import pytest

LARGE = (".safetensors", ".npz", ".model", ".bin")
"""Endings of files that are large here, as .gitattributes of the Hub has it."""
ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


def blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repo:
    name: str
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Hash -> path -> content."""
    branches: dict[str, str] = field(default_factory=dict)

    def has(self, revision: str) -> bool:
        return self.branches.get(revision, revision) in self.commits

    def head(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches.get(revision, revision)]

    def add(self, branch: str, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(f"{self.name} {branch} {len(self.commits)}".encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha


class Hub:
    """The state of the server, and what a test sets and reads."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.xet: list[bytes] | None = None
        """Files that arrive in parts, if the host has Xet: the parts are taken and not read."""
        self.requests: Counter[str] = Counter()
        self.tokens = {"hf_writer"}
        """Tokens with the right to write."""
        self.readers = {"hf_reader"}
        """Tokens without it."""
        self.refuse: dict[str, int] = {}
        """Kind of request -> status that it is answered with."""
        self.break_after: int | None = None
        """Number of downloads after which the connection is closed in the middle of one."""
        self.sent: list[str] = []
        """Paths of the files that were downloaded."""
        self.before_commit = lambda: None
        self.spoilt = ""
        """Path of a file that is changed as it is committed."""
        self.endpoint = ""

    def repo(self, name: str) -> Repo:
        return self.repos[name]

    def make(self, name: str, files: dict[str, bytes], private: bool = False) -> Repo:
        self.repos[name] = repo = Repo(name, private)
        repo.add("main", {".gitattributes": ATTRIBUTES} | files)
        return repo


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *arguments):
        pass

    def answer(self, status, value=None, headers=None, body=None):
        content = json.dumps(value).encode() if body is None else body
        self.send_response(status)
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def error(self, status, code=None):
        self.answer(status, {"error": code or "no"}, {"X-Error-Code": code} if code else None)

    def allowed(self, kind, *, write=False, private=False) -> bool:
        """Whether a request may go on; otherwise it is answered."""
        self.hub.requests[kind] += 1
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if kind in self.hub.refuse:
            self.error(self.hub.refuse[kind])
        elif (token and token not in self.hub.tokens | self.hub.readers) or (write and not token):
            self.error(401)
        elif write and token not in self.hub.tokens:
            self.error(403)
        elif private and not token:
            self.error(401, "RepoNotFound")
        else:
            return True
        return False

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            found = b""
            while size := int(self.rfile.readline(), 16):
                found += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return found
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_GET(self):
        path, query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            self.info(found[1], unquote(found[2] or "main"))
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            self.tree(found[1], unquote(found[2]), int(query.get("cursor", ["0"])[0]))
        elif path.startswith("/api/models/") and "/xet-write-token/" in path and self.hub.xet:
            address = {"casUrl": f"{self.hub.endpoint}/xet", "accessToken": "t"}
            self.answer(200, address | {"exp": 2**40})
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.file(found[1], unquote(found[2]), unquote(found[3]))
        else:
            self.error(404)

    do_HEAD = do_GET

    def do_POST(self):
        path, body = urlsplit(self.path).path, self.body()
        if self.hub.xet and re.fullmatch("/xet/v1/(xorbs/.+|shards)", path):
            self.hub.requests["xet"] += 1
            self.hub.objects |= {hashlib.sha256(file).hexdigest(): file for file in self.hub.xet}
            self.answer(200, {"was_inserted": True, "result": 1})
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/branch/([^/]+)", path):
            repo = self.hub.repos[found[1]]
            if self.allowed("branch", write=True):
                repo.branches[unquote(found[2])] = repo.branches["main"]
                self.answer(200, {})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", path):
            self.preupload(found[1], unquote(found[2]), json.loads(body))
        elif found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self.batch(json.loads(body))
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", path):
            self.commit(found[1], unquote(found[2]), body)
        else:
            self.error(404)

    def do_PUT(self):
        content = self.body()
        self.hub.requests["upload"] += 1
        if "upload" in self.hub.refuse:
            self.error(self.hub.refuse["upload"])
            return
        oid = self.path.rsplit("/", 1)[1]
        if hashlib.sha256(content).hexdigest() != oid:
            self.error(400)
            return
        self.hub.objects[oid] = content
        self.answer(200, {})

    def found(self, name, revision, kind):
        """The files of a revision, or None once the request is answered."""
        repo = self.hub.repos.get(name)
        if not self.allowed(kind, private=repo is not None and repo.private):
            return None
        if repo is None:
            # Who is not logged in is not told whether there is one.
            self.error(404 if self.headers.get("Authorization") else 401, "RepoNotFound")
        elif not repo.has(revision):
            self.error(404, "RevisionNotFound")
        else:
            return repo.head(revision)
        return None

    def info(self, name, revision):
        if (files := self.found(name, revision, "info")) is not None:
            repo = self.hub.repos[name]
            sha = repo.branches.get(revision, revision)
            siblings = [{"rfilename": path} for path in files]
            facts = {"id": name, "modelId": name, "private": repo.private, "tags": []}
            self.answer(200, facts | {"sha": sha, "siblings": siblings})

    def tree(self, name, revision, start):
        if (files := self.found(name, revision, "tree")) is None:
            return
        entries, page = [], 20
        for path, content in sorted(files.items()):
            entry = {"type": "file", "path": path, "size": len(content), "oid": blob(content)}
            if path.endswith(LARGE):
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
                entry["oid"] = blob(digest.encode())  # of the pointer
            entries.append(entry)
        headers = {}
        if start + page < len(entries):
            following = f"{self.hub.endpoint}{urlsplit(self.path).path}"
            headers["Link"] = f'<{following}?recursive=true&cursor={start + page}>; rel="next"'
        self.answer(200, entries[start : start + page], headers)

    def file(self, name, revision, path):
        if (files := self.found(name, revision, f"resolve {self.command}")) is None:
            return
        if path not in files:
            self.error(404, "EntryNotFound")
            return
        content = files[path]
        repo = self.hub.repos[name]
        etag = hashlib.sha256(content).hexdigest() if path.endswith(LARGE) else blob(content)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": repo.branches.get(revision, revision)}
        headers["Accept-Ranges"] = "bytes"
        if self.command == "GET":
            self.hub.sent.append(path)
            count = len(self.hub.sent)
            if self.hub.break_after is not None and count > self.hub.break_after:
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: len(content) // 2])
                self.close_connection = True
                return
        status, part = 200, content
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            status, part = 206, content[int(asked[1]) :]
            headers["Content-Range"] = f"bytes {asked[1]}-{len(content) - 1}/{len(content)}"
        self.answer(status, headers=headers | {"Content-Length": str(len(part))}, body=part)

    def create(self, wanted):
        if not self.allowed("create", write=True):
            return
        name = f"{wanted['organization']}/{wanted['name']}"
        if name in self.hub.repos:
            self.error(409)
            return
        self.hub.make(name, {}, wanted.get("visibility") == "private")
        self.answer(200, {"url": f"{self.hub.endpoint}/{name}"})

    def preupload(self, name, revision, wanted):
        if not self.allowed("preupload", write=True):
            return
        there = self.hub.repos[name].head(revision)
        found = []
        for file in wanted["files"]:
            path = file["path"]
            large = path.endswith(LARGE)
            entry = {"path": path, "uploadMode": "lfs" if large else "regular"}
            if path in there:
                content = there[path]
                entry["oid"] = hashlib.sha256(content).hexdigest() if large else blob(content)
            found.append(entry | {"shouldIgnore": False})
        self.answer(200, {"files": found})

    def batch(self, wanted):
        if not self.allowed("batch", write=True):
            return
        objects = []
        for each in wanted["objects"]:
            entry = {"oid": each["oid"], "size": each["size"]}
            if each["oid"] not in self.hub.objects:
                href = f"{self.hub.endpoint}/upload/{each['oid']}"
                entry["actions"] = {"upload": {"href": href}}
            objects.append(entry)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def commit(self, name, branch, body):
        if not self.allowed("commit", write=True):
            return
        self.hub.before_commit()
        repo = self.hub.repos[name]
        files = dict(repo.head(branch))
        for line in body.splitlines():
            item = json.loads(line)
            kind, value = item["key"], item["value"]
            if kind == "header" and value.get("parentCommit") not in (None, repo.branches[branch]):
                self.error(412)
                return
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif kind == "deletedFile":
                del files[value["path"]]
        if self.hub.spoilt in files:
            files[self.hub.spoilt] += b" "
        sha = repo.add(branch, files)
        url = f"{self.hub.endpoint}/{name}/commit/{sha}"
        self.answer(200, {"commitOid": sha, "commitUrl": url, "hookOutput": ""})


@contextlib.contextmanager
def serving():
    """Context in which a `Hub` answers on loopback."""
    hub = Hub()
    handler = type("HandlerOfHub", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def standing_in():
    """Context with the stand-in, and the library set to it; a token that may write is set."""
    with serving() as found, pytest.MonkeyPatch.context() as patch:
        address = huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE
        given = {
            "ENDPOINT": found.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": address.replace(
                "https://huggingface.co", found.endpoint
            ),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,  # the stand-in has the other way to upload large files
            "HF_HUB_DISABLE_PROGRESS_BARS": True,
        }
        for name, value in given.items():
            patch.setattr(huggingface_hub.constants, name, value)
        patch.setenv("HF_TOKEN", "hf_writer")
        huggingface_hub.close_session()
        yield found
        huggingface_hub.close_session()


def fails(outcome, message):
    """Asserts that a command was refused in one line that has this message."""
    assert outcome.code == 2 and message in outcome.err, outcome
    assert outcome.err.splitlines()[-1].startswith("xelm: ") and "Traceback" not in outcome.err
