"""A server on localhost that speaks enough of the Hugging Face Hub's HTTP interface for its real client.

    python tests/support/hub_server.py --token SECRET --log FILE [--hold FILE]

Prints its address, then serves until it is ended. Repositories are commits over content-addressed blobs, in memory.
Reading is public; a wrong token is refused everywhere and writing needs the right one, as on the Hub. `--hold` names a
file; while it exists, uploads of large files wait, so that a test can cut one off. `--log` gets a line a request.
It knows nothing of xet (set HF_HUB_DISABLE_XET=1), gated repositories or pages of results.
"""

import argparse
import base64
import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlparse

KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}
PREFIXES = {"model": "", "dataset": "datasets/", "space": "spaces/"}
LARGE = (".safetensors", ".bin", ".parquet", ".pt", ".gguf", ".arrow")


class Blob(NamedTuple):
    data: bytes
    large: bool

    @property
    def oid(self):
        """What the Hub calls the file's content: sha256 for LFS, git's blob id otherwise."""
        if self.large:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()


class Commit(NamedTuple):
    files: dict[str, Blob]
    parent: str | None
    title: str


class Repository:
    """Branches and tags name commits; a commit maps paths to blobs and never changes."""

    def __init__(self):
        self.commits, self.tags = {}, {}
        self.branches = {"main": self.add({}, None, "initial commit")}

    def add(self, files, parent, title):
        content = json.dumps([parent, title, time.time_ns(), sorted((path, blob.oid) for path, blob in files.items())])
        sha = hashlib.sha1(content.encode()).hexdigest()
        self.commits[sha] = Commit(files, parent, title)
        return sha

    def resolve(self, revision):
        """The commit that a branch, a tag or the beginning of a commit id names, or None."""
        for names in (self.branches, self.tags):
            if revision in names:
                return names[revision]
        found = [sha for sha in self.commits if len(revision) >= 7 and sha.startswith(revision)]
        return found[0] if found else None


class Refusal(Exception):
    """An error answer: HTTP status, message and the X-Error-Code that the client turns into its exception."""

    def __init__(self, status, message, code=None):
        super().__init__(message)
        self.status, self.code = status, code


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, token, log, hold):
        super().__init__(("127.0.0.1", 0), Handler)
        self.token, self.log, self.hold = token, log, hold
        self.repositories, self.uploads, self.lock = {}, {}, threading.RLock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def repository(self, kind, name):
        if (kind, name) not in self.repositories:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return self.repositories[kind, name]

    def commit_of(self, repository, revision):
        sha = repository.resolve(revision)
        if sha is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, repository.commits[sha]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_):
        pass

    def handle_request(self):
        body = self.body()
        try:
            self.check_token()
            with_lock = not self.path.startswith("/lfs/")
            if with_lock:
                with self.server.lock:
                    status, answer, headers = self.route(body)
            else:
                status, answer, headers = self.upload(body)
        except Refusal as refusal:
            status, answer = refusal.status, {"error": str(refusal)}
            headers = {"X-Error-Message": str(refusal), **({"X-Error-Code": refusal.code} if refusal.code else {})}
        if not isinstance(answer, bytes):
            answer = json.dumps(answer).encode()
        with self.server.lock, open(self.server.log, "a") as log:
            print(self.command, self.path, status, file=log, flush=True)
        self.send_response(status)
        for name, value in {"Content-Length": str(len(answer)), "X-Request-Id": "local", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def body(self):
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().strip() or b"0", 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def check_token(self):
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if given and given != self.server.token:
            raise Refusal(401, "Invalid credentials in Authorization header")
        reads = self.command in ("GET", "HEAD") or self.path.endswith("/paths-info/") or "/lfs/" in self.path
        if not given and (not reads or self.path == "/api/whoami-v2"):
            raise Refusal(401, "Invalid username or password.")

    def route(self, body):
        path = urlparse(self.path)
        query = parse_qs(path.query, keep_blank_values=True)
        for pattern, answer in (
            (r"/api/whoami-v2", self.who),
            (r"/api/validate-yaml", lambda *_: {"errors": [], "warnings": []}),
            (r"/api/repos/create", self.create),
            (r"/(datasets/|spaces/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", self.batch),
            (r"/(datasets/|spaces/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.resolve),
            (r"/api/(models|datasets|spaces)/([^/]+/[^/]+?)(?:/([a-z-]+)(?:/(.*))?)?", self.api),
        ):
            if match := re.fullmatch(pattern, path.path.rstrip("/")):
                result = answer(body, query, *map(lambda part: unquote(part or ""), match.groups()))
                return result if isinstance(result, tuple) else (200, result, {"Content-Type": "application/json"})
        raise Refusal(404, f"no such address: {path.path}", "EntryNotFound")

    # -- repositories ------------------------------------------------------------------------------------------------

    def who(self, body, query):
        return {"type": "user", "id": "1", "name": "tester", "fullname": "Tester", "orgs": [], "auth": {}}

    def create(self, body, query):
        asked = json.loads(body)
        kind, name = asked.get("type") or "model", f"{asked.get('organization') or 'tester'}/{asked['name']}"
        url = f"{self.server.url}/{PREFIXES[kind]}{name}"
        if (kind, name) in self.server.repositories:
            return 409, {"error": "You already created this repo", "url": url}, {}
        self.server.repositories[kind, name] = Repository()
        return {"url": url, "name": name, "id": name}

    def api(self, body, query, kinds, name, verb, rest):
        kind = KINDS[kinds]
        repository = self.server.repository(kind, name)
        if verb == "refs":
            refs = {"branches": ("heads", repository.branches), "tags": ("tags", repository.tags)}
            return {"converts": []} | {
                group: [{"name": n, "ref": f"refs/{folder}/{n}", "targetCommit": sha} for n, sha in names.items()]
                for group, (folder, names) in refs.items()
            }
        revision, _, sub = (rest or "main").partition("/")
        asked = json.loads(body) if body.lstrip()[:1] == b"{" and verb != "commit" else {}
        if verb == "branch":
            start = asked.get("startingPoint") or "main"
            repository.branches[revision] = self.server.commit_of(repository, start)[0]
            return {}
        sha, commit = self.server.commit_of(repository, revision)
        if verb == "tag":
            repository.tags[asked["tag"]] = sha
            return {}
        if verb == "preupload":
            return {"files": [self.upload_mode(commit, file) for file in asked["files"]]}
        if verb == "commit":
            return self.commit(repository, revision, sha, commit, body, f"{self.server.url}/{PREFIXES[kind]}{name}")
        if verb == "commits":
            return list(self.history(repository, sha))
        if verb == "tree":
            return self.tree(commit, sub, query.get("recursive", [""])[0].lower() == "true")
        if verb == "paths-info":
            paths = asked.get("paths") or parse_qs(body.decode()).get("paths", [])
            return [self.entry(commit, path) for path in paths if path in commit.files]
        if verb in ("", "revision"):
            siblings = [{"rfilename": path} for path in sorted(commit.files)]
            return {"id": name, "modelId": name, "sha": sha, "private": False, "tags": [], "siblings": siblings}
        raise Refusal(404, f"no such address: {verb}", "EntryNotFound")

    def history(self, repository, sha):
        while sha:
            commit = repository.commits[sha]
            date = "2026-01-01T00:00:00.000Z"
            yield {"id": sha, "title": commit.title, "message": "", "date": date, "authors": [{"user": "tester"}]}
            sha = commit.parent

    def entry(self, commit, path):
        blob = commit.files[path]
        entry = {"type": "file", "path": path, "size": len(blob.data), "oid": blob.oid}
        return entry | ({"lfs": {"oid": blob.oid, "size": len(blob.data), "pointerSize": 134}} if blob.large else {})

    def tree(self, commit, folder, recursive):
        prefix = f"{folder}/" if folder else ""
        inside = [path for path in sorted(commit.files) if path.startswith(prefix)]
        if folder and not inside:
            raise Refusal(404, f"{folder} does not exist", "EntryNotFound")
        files = [path for path in inside if recursive or "/" not in path[len(prefix) :]]
        folders = {prefix + path[len(prefix) :].split("/")[0] for path in inside if "/" in path[len(prefix) :]}
        listed = [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in sorted(folders)]
        return listed + [self.entry(commit, path) for path in files]

    # -- writing -----------------------------------------------------------------------------------------------------

    def upload_mode(self, commit, file):
        blob = commit.files.get(file["path"])
        large = file["path"].endswith(LARGE)
        mode = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        return mode | {"oid": blob.oid if blob else None}

    def batch(self, body, query, prefix, name):
        objects = []
        for wanted in json.loads(body)["objects"]:
            known = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.server.uploads:
                href = {"href": f"{self.server.url}/lfs/{wanted['oid']}", "header": {}}
                known["actions"] = {"upload": href, "verify": href}
            objects.append(known)
        return {"transfer": "basic", "objects": objects}

    def upload(self, body):
        """A large file's bytes (PUT) and the client's question whether they arrived (POST)."""
        oid = self.path.removeprefix("/lfs/")
        if self.command == "PUT":
            with self.server.lock, open(self.server.log, "a") as log:
                print("UPLOADING", self.path, file=log, flush=True)
            while self.server.hold and Path(self.server.hold).exists():
                time.sleep(0.05)
            if hashlib.sha256(body).hexdigest() != oid:
                raise Refusal(400, "the bytes are not those announced")
            self.server.uploads[oid] = body
        return 200, b"", {}

    def commit(self, repository, revision, parent, before, body, url):
        files, title = dict(before.files), ""
        for line in filter(None, body.splitlines()):
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "header":
                title = value.get("summary", "")
                if value.get("parentCommit") not in (None, parent):
                    raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), large=False)
            elif key == "lfsFile":
                if value["oid"] not in self.server.uploads:
                    raise Refusal(400, f"{value['path']} was never uploaded")
                files[value["path"]] = Blob(self.server.uploads[value["oid"]], large=True)
            elif key == "deletedFile":
                files.pop(value["path"], None)
            else:
                raise Refusal(400, f"unknown operation {key}")
        sha = repository.branches[revision] = repository.add(files, parent, title)
        return {"success": True, "commitOid": sha, "commitUrl": f"{url}/commit/{sha}", "hookOutput": ""}

    # -- reading -----------------------------------------------------------------------------------------------------

    def resolve(self, body, query, prefix, name, revision, path):
        kind = KINDS.get(prefix.rstrip("/"), "model")
        sha, commit = self.server.commit_of(self.server.repository(kind, name), revision)
        if path not in commit.files:
            return 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha}
        blob = commit.files[path]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{blob.oid}"', "Accept-Ranges": "bytes"}
        if blob.large:
            headers |= {"X-Linked-Etag": f'"{blob.oid}"', "X-Linked-Size": str(len(blob.data))}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if part and self.command == "GET":
            first, last = int(part[1]), int(part[2] or len(blob.data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(blob.data)}"
            return 206, blob.data[first : last + 1], headers
        return 200, blob.data, headers


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--token", required=True)
    parser.add_argument("--log", required=True)
    parser.add_argument("--hold")
    args = parser.parse_args()
    hub = Hub(args.token, args.log, args.hold)
    print(hub.url, flush=True)
    hub.serve_forever()


if __name__ == "__main__":
    main()
