"""A loopback server that speaks the Hub's protocol for the real client: point HF_ENDPOINT at `hub.url` in a child process.

It serves the files of local folders as dataset or model repositories: HEAD, GET and Range on resolve/, revision, tree,
paths-info, whoami. Files of 1 kB and more are "LFS": their etag is a sha256. `faults` makes chosen files fail a few times.
"""
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "c0ffee" * 6 + "c0ff"
LFS_BYTES = 1000


class FakeHub:
    """`with FakeHub({"datasets/me/texts": folder}) as hub:` serves until the block ends. `hub.requests` lists (method, path)."""
    handler = None  # another Handler, with more routes

    def __init__(self, repos, faults=None):
        self.repos = {name: Path(folder) for name, folder in repos.items()}  # "datasets/o/n" or "models/o/n" -> folder
        self.faults = dict(faults or {})  # file name -> list of "error" | "cut" | "corrupt", one per GET, then it works
        self.requests = []
        self.lock = threading.Lock()

    def __enter__(self):
        hub = self

        class BoundHandler(self.handler or Handler):
            pass

        BoundHandler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), BoundHandler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()

    def env(self, home):
        """The variables that send the real client here and keep its cache in `home`."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
                "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_fake", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1"}

    def count(self, method, ending):
        return sum(1 for seen, path in self.requests if seen == method and path.endswith(ending))


class Handler(BaseHTTPRequestHandler):
    """Routes are (method, pattern) -> the name of a method that gets the pattern's groups."""
    protocol_version = "HTTP/1.1"
    hub = None
    routes = [
        ("GET", r"/api/whoami-v2", "whoami"),
        ("GET", r"/api/(datasets|models)/([^/]+/[^/]+)/revision/([^/]+)", "revision"),
        ("GET", r"/api/(datasets|models)/([^/]+/[^/]+)", "revision"),
        ("GET", r"/api/(datasets|models)/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", "tree"),
        ("POST", r"/api/(datasets|models)/([^/]+/[^/]+)/paths-info/([^/]+)", "paths_info"),
        ("HEAD GET", r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve_dataset"),
        ("HEAD GET", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve_model"),
    ]

    def do_GET(self):
        path = urlsplit(self.path).path
        with self.hub.lock:
            self.hub.requests.append((self.command, path))
        body = self.body = self.read_body()
        for methods, pattern, name in self.routes:
            match = re.fullmatch(pattern, path)
            if match and self.command in methods.split():
                groups = [unquote(group) if group else group for group in match.groups()]
                return getattr(self, name)(*groups, **({"body": body} if self.command == "POST" else {}))
        return self.refuse(404, "EntryNotFound")

    do_HEAD = do_POST = do_PUT = do_GET

    def read_body(self):
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def log_message(self, *arguments):
        pass

    def reply(self, content, status=200, headers=None):
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def reply_json(self, value, status=200):
        self.reply(json.dumps(value).encode(), status)

    def refuse(self, status, code):
        self.reply(b"{}", status, {"X-Error-Code": code, "X-Error-Message": code})

    # -- answers ------------------------------------------------------------------------------------------------------

    def whoami(self):
        self.reply_json({"type": "user", "name": "me", "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def revision(self, kind, repo, revision=COMMIT):
        folder = self.hub.repos.get(f"{kind}/{repo}")
        if folder is None:
            return self.refuse(404, "RepoNotFound")
        self.reply_json({"_id": repo, "id": repo, "sha": COMMIT, "lastModified": "2026-01-01T00:00:00.000Z", "private": False,
                         "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": [],
                         "siblings": [{"rfilename": name} for name in file_names(folder)]})

    def tree(self, kind, repo, revision, inside=None):
        folder = self.hub.repos.get(f"{kind}/{repo}")
        if folder is None:
            return self.refuse(404, "RepoNotFound")
        recursive = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() in ("1", "true")
        entries, prefix = {}, f"{inside}/" if inside else ""
        for name in file_names(folder):
            if not name.startswith(prefix):
                continue
            steps = name[len(prefix):].split("/")
            for depth in range(1, len(steps) if recursive else min(2, len(steps))):
                path = prefix + "/".join(steps[:depth])
                entries[path] = {"type": "directory", "path": path, "oid": "0" * 40, "size": 0}
            if recursive or len(steps) == 1:
                entries[name] = describe(folder, name)
        self.reply_json(list(entries.values()))

    def paths_info(self, kind, repo, revision, body):
        folder = self.hub.repos.get(f"{kind}/{repo}")
        if folder is None:
            return self.refuse(404, "RepoNotFound")
        paths = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode())["paths"]
        self.reply_json([describe(folder, path) for path in paths if (folder / path).is_file()])

    def resolve_dataset(self, repo, revision, path):
        self.resolve(f"datasets/{repo}", path)

    def resolve_model(self, repo, revision, path):
        self.resolve(f"models/{repo}", path)

    def resolve(self, name, path):
        folder = self.hub.repos.get(name)
        if folder is None:
            return self.refuse(404, "RepoNotFound")
        if not (folder / path).is_file():
            return self.refuse(404, "EntryNotFound")
        content = (folder / path).read_bytes()
        entry = describe(folder, path)
        etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if "lfs" in entry:
            headers |= {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{etag}"'}
        fault = None
        if self.command == "GET":
            with self.hub.lock:
                pending = self.hub.faults.get(path)
                fault = pending.pop(0) if pending else None
        if fault == "error":
            return self.refuse(500, "Broken")
        if fault == "corrupt":
            content = bytes(byte ^ 1 for byte in content[:64]) + content[64:]
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        status = 200
        if wanted:
            first, last = int(wanted[1]), int(wanted[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[first:last + 1], 206
        if fault == "cut":  # announces all, sends half, hangs up
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(content[:len(content) // 2])
            self.close_connection = True
            return None
        return self.reply(content, status, headers)


def file_names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def describe(folder, name):
    """A file as the tree API lists it; large ones carry their sha256."""
    content = (folder / name).read_bytes()
    entry = {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()}
    if len(content) >= LFS_BYTES:
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return entry
