"""The upload half of the loopback Hub: create a repository, check a card's YAML, send small files inline and large ones by LFS, commit.

What is committed lands in a folder under `root`, from which the download half serves it. Nothing is there before the commit.
"""
import base64
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

from tests.fakes.hub import LFS_BYTES, FakeHub, Handler


class UploadHandler(Handler):
    routes = [
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", "preupload"),
        ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/([0-9a-f]{64})", "lfs_put"),
        ("POST", r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", "commit"),
        *Handler.routes,
    ]
    do_PUT = do_POST = Handler.do_GET

    def create(self, body):
        asked = json.loads(body)
        if self.headers.get("Authorization") != "Bearer hf_fake":
            return self.refuse(401, "Unauthorized")
        name = asked["name"] if "/" in asked["name"] else f"{asked.get('organization') or 'me'}/{asked['name']}"
        key = f"models/{name}"
        with self.hub.lock:
            exists = key in self.hub.repos
            if not exists:
                self.hub.repos[key] = self.hub.root / name
                self.hub.repos[key].mkdir(parents=True)
                self.hub.private[name] = asked.get("private") or asked.get("visibility") == "private"
        self.reply_json({"url": f"{self.hub.url}/{name}", "name": name, "id": name}, 409 if exists else 200)

    def validate_yaml(self, body):
        content, errors = json.loads(body)["content"], []
        parts = content.split("---\n", 2)
        try:
            if parts[0] or not isinstance(yaml.safe_load(parts[1]), dict):
                errors.append({"message": "the front matter must come first and hold a mapping"})
        except (yaml.YAMLError, IndexError) as error:
            errors.append({"message": str(error)})
        self.hub.validated.append(not errors)
        self.reply_json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, repo, revision, body):
        files = json.loads(body)["files"]
        self.reply_json({"files": [{"path": file["path"], "uploadMode": "lfs" if file["size"] >= LFS_BYTES and not file["path"].endswith((".md", ".json")) else "regular",
                                    "shouldIgnore": False, "oid": None} for file in files]})

    def lfs_batch(self, repo, body):
        objects = [{"oid": entry["oid"], "size": entry["size"], "authenticated": True,
                    "actions": {"upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}", "header": {}}}} for entry in json.loads(body)["objects"]]
        self.reply_json({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.refuse(400, "Corrupt")
        self.hub.blobs[oid] = self.body
        self.reply(b"")

    def commit(self, repo, revision, body):
        folder, summary = self.hub.repos[f"models/{repo}"], ""
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                summary = value["summary"]
                continue
            content = base64.b64decode(value["content"]) if entry["key"] == "file" else self.hub.blobs[value["oid"]]
            path = Path(folder, value["path"])
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        self.hub.commits.append((repo, summary))
        self.reply_json({"success": True, "commitOid": "c0ffee" * 6 + "c0ff", "commitUrl": f"{self.hub.url}/{repo}/commit/c0ffee", "hookOutput": ""})


class UploadHub(FakeHub):
    """FakeHub whose model repositories can be made and written to; they live under `root`."""
    handler = UploadHandler

    def __init__(self, root, repos=(), faults=None):
        super().__init__(dict(repos), faults)
        self.root, self.private, self.blobs, self.commits, self.validated = Path(root), {}, {}, [], []


# Importing torch takes longer than a command, and the client reads HF_ENDPOINT on import: one process runs them all.
DRIVER = """
import contextlib, importlib, io, json, os, sys
from nanochat.configurator import parse
for line in sys.stdin:
    base, token, name, argv = json.loads(line)
    os.environ.update(NANOCHAT_BASE_DIR=base, HF_TOKEN=token)
    module, error, output = importlib.import_module(name), None, io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            module.main(parse(module.Config, argv))
    except ValueError as problem:
        error = str(problem)
    print(json.dumps([error, output.getvalue()]), flush=True)
"""


class Commands:
    """`with Commands(hub, home) as run:` and then run(base directory, "scripts.x", "--flag=1") -> (message of its ValueError or None, output)."""

    def __init__(self, hub, home):
        self.environment = {**os.environ, **hub.env(home)}

    def __enter__(self):
        self.process = subprocess.Popen([sys.executable, "-c", DRIVER], cwd=Path(__file__).parents[2], env=self.environment, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *exception):
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def __call__(self, base, module, *argv, token="hf_fake"):
        self.process.stdin.write(json.dumps([str(base), token, module, list(argv)]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())
