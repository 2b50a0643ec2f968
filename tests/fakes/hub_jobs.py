"""The Jobs half of the loopback Hub. A "job" is a real process with the job's environment in an empty folder, its log a stream of server-sent events.

What an image would hold comes from `image_env`: where the packages are. A job that is killed loses its disk, as the real ones do. A bucket is a folder
under `hub.buckets`, which bubblewrap mounts where a job asks for it.
"""
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from tests.fakes.hub_upload import UploadHandler, UploadHub

ROOT = Path(__file__).parents[2]
LAUNCH = "hf_jobs.launch"
ENDED = ("COMPLETED", "ERROR", "CANCELED")


def gpu(model, quantity, vram="80 GB"):
    return {"type": "gpu", "model": model, "quantity": str(quantity), "vram": vram, "manufacturer": "Nvidia"}


HARDWARE = [{"name": name, "prettyName": title, "cpu": cpu, "ram": ram, "accelerator": accelerator, "unitCostMicroUSD": round(dollars / 60 * 1e6),
             "unitCostUSD": dollars / 60, "unitLabel": "minute"} for name, title, cpu, ram, accelerator, dollars in (
    ("cpu-basic", "CPU Basic", "2 vCPU", "16 GB", None, 0.01), ("a10g-large", "Nvidia A10G - large", "12 vCPU", "46 GB", gpu("A10G", 1, "24 GB"), 1.5),
    ("a100-large", "Nvidia A100 - large", "12 vCPU", "142 GB", gpu("A100", 1), 2.5), ("a100x8", "8x Nvidia A100", "96 vCPU", "1136 GB", gpu("A100", 8), 20.0))]


def now():
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class Job:
    """A process and what the API tells about it."""

    def __init__(self, namespace, asked, folder, image_env, buckets):
        self.id = secrets.token_hex(12)  # no two hubs on this machine share one: a job's processes are found by it
        self.namespace, self.asked, self.folder = namespace, asked, Path(folder)
        self.lines, self.stage, self.message, self.created, self.began = [], "RUNNING", None, now(), time.monotonic()
        self.changed = threading.Condition()
        self.folder.mkdir(parents=True)
        hardware = next(one for one in HARDWARE if one["name"] == asked["flavor"])
        environment = {"HOME": str(self.folder / "home"), "JOB_ID": self.id, "CPU_CORES": hardware["cpu"].split()[0], "MEMORY": hardware["ram"],
                       "ACCELERATOR": hardware["accelerator"]["model"] if hardware["accelerator"] else "none", "WORKDIR": str(self.folder / "workspace"),
                       **image_env, **asked["environment"], **asked.get("secrets", {})}
        (self.folder / "home").mkdir()
        (self.folder / "cwd").mkdir()
        self.process = subprocess.Popen([*mounted(asked.get("volumes"), buckets), *asked["command"]], cwd=self.folder / "cwd", env=environment,
                                        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True)
        threading.Thread(target=self.read, daemon=True).start()
        self.timer = threading.Timer(asked.get("timeoutSeconds", 1800), self.kill, ["ERROR", "Job timeout"])
        self.timer.daemon = True
        self.timer.start()

    def read(self):
        for line in self.process.stdout:
            with self.changed:
                self.lines.append(line.rstrip("\n"))
                self.changed.notify_all()
        code = self.process.wait()
        self.timer.cancel()
        self.end("COMPLETED" if code == 0 else "ERROR", None if code == 0 else f"Job failed with exit code: {code}")

    def end(self, stage, message):
        with self.changed:
            if self.stage not in ENDED:
                self.stage, self.message = stage, message
            self.changed.notify_all()

    def kill(self, stage="ERROR", message="killed"):
        """Every process of the job at once, as when its machine dies; then its disk."""
        self.end(stage, message)
        deadline = time.monotonic() + 60
        while self.send(signal.SIGKILL) and time.monotonic() < deadline:
            time.sleep(0.05)
        self.process.wait(timeout=60)
        shutil.rmtree(self.folder, ignore_errors=True)

    def send(self, number, word=""):
        """A signal to each of its processes whose command line holds the word -> how many there are."""
        mine = [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and f"JOB_ID={self.id}" in words(pid, "environ")]
        found = [pid for pid in mine if word in " ".join(words(pid, "cmdline"))]
        for pid in found:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                pass
        return len(found)

    def wait_for(self, test, seconds=600):
        """Until `test(lines)` is true or the job has ended -> whether it is true."""
        with self.changed:
            self.changed.wait_for(lambda: test(self.lines) or self.stage in ENDED, timeout=seconds)
            return test(self.lines)

    def info(self):
        seconds = int(time.monotonic() - self.began)
        return {"id": self.id, "createdAt": self.created, "dockerImage": self.asked.get("dockerImage"), "command": self.asked["command"], "arguments": [],
                "environment": self.asked["environment"], "flavor": self.asked["flavor"], "labels": self.asked.get("labels"),
                "status": {"stage": self.stage, "message": self.message}, "durations": {"schedulingSecs": 1, "runningSecs": seconds, "totalSecs": seconds + 1},
                "owner": {"id": "1", "name": self.namespace, "type": "user"}}


def words(pid, name):
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace").split("\0")
    except OSError:
        return []


def mounted(volumes, buckets):
    """What to put before a command that shall see these buckets at their places, and everything else of this machine as it is."""
    if not volumes:
        return []
    command = ["bwrap"]
    for place in sorted(Path("/").iterdir()):
        if place.is_symlink():
            command += ["--symlink", os.readlink(place), str(place)]
        elif place.is_dir():
            command += ["--dev-bind", str(place), str(place)]
    for volume in volumes:
        assert volume["type"] == "bucket" and not volume.get("readOnly")
        command += ["--bind", str(buckets[volume["source"]]), volume["mountPath"]]
    return [*command, "--"]


def can_mount():
    return shutil.which("bwrap") is not None and subprocess.run(["bwrap", "--dev-bind", "/", "/", "true"], capture_output=True).returncode == 0


class JobsHandler(UploadHandler):
    routes = [
        ("GET", r"/api/jobs/hardware", "hardware"),
        ("POST", r"/api/jobs/([^/]+)", "start_job"),
        ("GET", r"/api/jobs/([^/]+)", "list_jobs"),
        ("GET", r"/api/jobs/([^/]+)/([^/]+)", "inspect_job"),
        ("GET", r"/api/jobs/([^/]+)/([^/]+)/logs", "logs"),
        ("POST", r"/api/jobs/([^/]+)/([^/]+)/cancel", "cancel_job"),
        ("POST", r"/api/buckets/([^/]+)/([^/]+)", "create_bucket"),
        *UploadHandler.routes,
    ]

    def hardware(self):
        self.reply_json(HARDWARE)

    def start_job(self, namespace, body):
        if self.headers.get("Authorization") != "Bearer hf_fake":
            return self.refuse(401, "Unauthorized")
        asked = json.loads(body)
        if self.hub.refusal:
            return self.reply_json({"error": self.hub.refusal[1]}, self.hub.refusal[0])
        if any(not value for value in asked.get("secrets", {}).values()):
            return self.refuse(400, "EmptySecret")
        with self.hub.lock:
            job = Job(namespace, asked, self.hub.root.parent / "jobs" / str(len(self.hub.jobs) + 1), self.hub.image_env, self.hub.buckets)
            self.hub.jobs[job.id] = job
        self.reply_json(job.info())

    def list_jobs(self, namespace):
        query = parse_qs(urlsplit(self.path).query)
        wanted = [label.partition("=") for label in query.get("label", [])]
        self.reply_json([job.info() for job in reversed(self.hub.jobs.values()) if job.namespace == namespace and ("stage" not in query or job.stage in query["stage"])
                         and all((job.asked.get("labels") or {}).get(key) == value for key, _, value in wanted)])

    def inspect_job(self, namespace, job_id):
        return self.reply_json(self.hub.jobs[job_id].info()) if job_id in self.hub.jobs else self.refuse(404, "JobNotFound")

    def cancel_job(self, namespace, job_id, body):
        if job_id not in self.hub.jobs:
            return self.refuse(404, "JobNotFound")
        self.hub.jobs[job_id].kill("CANCELED", None)
        self.reply_json(self.hub.jobs[job_id].info())

    def logs(self, namespace, job_id):
        """From the beginning, as they come; `cut_logs` of the hub counts how often the stream still breaks off after a few lines."""
        if job_id not in self.hub.jobs:
            return self.refuse(404, "JobNotFound")
        job = self.hub.jobs[job_id]
        with self.hub.lock:
            cut, self.hub.cut_logs = self.hub.cut_logs > 0, max(0, self.hub.cut_logs - 1)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self.close_connection = True
        self.event("===== Job started =====")
        sent = 0
        while True:
            with job.changed:
                job.changed.wait_for(lambda: len(job.lines) > sent or job.stage in ENDED, timeout=5)
                fresh, over = job.lines[sent:], job.stage in ENDED
            try:
                for line in fresh[:3] if cut else fresh:
                    self.event(line)
                if not fresh:
                    self.wfile.write(b": keep-alive\n\n")
            except OSError:
                return None  # nobody listens any more
            sent += len(fresh)
            if over or cut and fresh:
                return None

    def event(self, text):
        self.wfile.write(f"data: {json.dumps({'timestamp': now(), 'data': text})}\n\n".encode())
        self.wfile.flush()

    def create_bucket(self, namespace, name, body):
        folder = self.hub.buckets[f"{namespace}/{name}"] = self.hub.root.parent / "buckets" / namespace / name
        folder.mkdir(parents=True, exist_ok=True)
        self.reply_json({"url": f"{self.hub.url}/buckets/{namespace}/{name}", "id": f"{namespace}/{name}"})

    def revision(self, kind, repo, revision="main"):
        """Private where it was made so; the listing is of the moment."""
        self.private = self.hub.private.get(repo, False)
        return super().revision(kind, repo, revision) if revision != "main" else super().revision(kind, repo)

    def reply_json(self, value, status=200):
        if isinstance(value, dict) and "siblings" in value:
            value["private"] = self.private
        super().reply_json(value, status)

    def commit(self, repo, revision, body):
        """As in an upload, and deletions."""
        rest = []
        for line in body.decode().splitlines():
            entry = json.loads(line)
            if entry["key"] == "deletedFile":
                (self.hub.repos[f"models/{repo}"] / entry["value"]["path"]).unlink()
            else:
                rest.append(line)
        super().commit(repo, revision, "\n".join(rest).encode())


class JobsHub(UploadHub):
    """UploadHub that runs jobs: `hub.jobs` {id: Job}; `hub.refusal` (status, message) refuses new ones; `hub.buckets` {name: folder}."""
    handler = JobsHandler

    def __init__(self, root, image_env=None):
        super().__init__(root)
        self.jobs, self.buckets, self.refusal, self.cut_logs = {}, {}, None, 0
        self.image_env = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "USE_ACTIVE_ENV": "1", "PRESET": "cpu", "OMP_NUM_THREADS": "1", **(image_env or {})}

    def __enter__(self):
        hub = super().__enter__()
        self.image_env |= {name: value for name, value in self.env("").items() if name not in ("HF_TOKEN", "HF_HOME", "HF_HUB_OFFLINE")}
        return hub

    def __exit__(self, *exception):
        for job in self.jobs.values():
            if job.stage not in ENDED:
                job.kill()
        super().__exit__(*exception)

    @property
    def newest(self):
        return list(self.jobs.values())[-1]


# Importing torch takes longer than a command, and the client reads HF_ENDPOINT on import: one process runs them all.
DRIVER = """
import contextlib, importlib, io, json, os, sys
from pathlib import Path
from nanochat.cloud import shipping
from nanochat.configurator import parse
for line in sys.stdin:
    variables, root, name, argv = json.loads(line)
    os.environ.update({key: value for key, value in variables.items() if value is not None})
    for key in [key for key, value in variables.items() if value is None]:
        os.environ.pop(key, None)
    shipping.ROOT = Path(root)
    module, status, error, output = importlib.import_module(name), None, None, io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            status = module.main(parse(module.Config, argv))
    except (ValueError, SystemExit) as problem:
        error = str(problem)
    print(json.dumps([status, error, output.getvalue()]), flush=True)
"""


class Driver:
    """`with Driver(hub, home) as run:` and then run("hf_jobs.launch", "--flag=1", VARIABLE="value") -> (status, message of its ValueError or None, output)."""

    def __init__(self, hub, home):
        self.environment = {name: value for name, value in {**os.environ, **hub.env(home)}.items() if name not in ("WANDB_API_KEY", "JOB_ID")}

    def __enter__(self):
        self.process = subprocess.Popen([sys.executable, "-c", DRIVER], cwd=ROOT, env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *exception):
        self.process.stdin.close()
        self.process.wait(timeout=600)

    def __call__(self, module, *argv, root=None, **variables):
        self.process.stdin.write(json.dumps([{"HF_TOKEN": "hf_fake", **variables}, str(root or ROOT), module, list(argv)]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@contextmanager
def launched(hub, tree, *flags, patience=400):
    """The launcher as its own process, from `tree`; after that many seconds it is killed, so that nobody waits for ever."""
    environment = {**os.environ, **hub.env(hub.home)}
    environment.pop("WANDB_API_KEY", None)
    process = subprocess.Popen([sys.executable, "-m", LAUNCH, *flags], cwd=tree, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    impatience = threading.Timer(patience, process.kill)
    impatience.start()
    try:
        yield process
    finally:
        impatience.cancel()
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=600)


def read_until(process, text):
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return "".join(lines)
    raise AssertionError(f"{text!r} did not come:\n{''.join(lines)}")
