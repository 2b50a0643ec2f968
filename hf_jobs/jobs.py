"""Hugging Face Jobs through huggingface_hub: which hardware there is and what it costs, sending the code, starting a job, following it to its end.

A job gets no files and keeps none: the code goes to a private repository of the user first, and its results to the store of hf_jobs/store.py.
"""
import difflib
import inspect
import re
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from nanochat.cloud import shipping
from nanochat.cloud.market import dollars
from nanochat.cloud.signals import say
from nanochat.huggingface.hub import hub_errors

ENDED = {"COMPLETED": 0, "ERROR": 1, "CANCELED": 3, "DELETED": 3}  # stage -> exit status
UNITS = {"second": 3600, "minute": 60, "hour": 1}
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)


# -- hardware ---------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Flavor:
    name: str
    title: str
    gpus: int
    cpu: str
    ram: str
    cents_per_hour: float

    def __str__(self):
        return f"{self.name} ({self.title}, {self.gpus} GPU{'s' * (self.gpus != 1)}, {self.cpu}, {self.ram}, {dollars(self.cents_per_hour)} an hour)"


def call(api, method_name, /, *arguments, **keywords):
    """A method of HfApi by its name, without those empty keywords that this version of huggingface_hub does not know."""
    method = getattr(api, method_name, None)
    known = inspect.signature(method).parameters if method else {}
    lost = [name for name, value in keywords.items() if value and name not in known]
    if method is None or lost:
        import huggingface_hub
        raise ValueError(f"huggingface_hub {huggingface_hub.__version__} has no {', '.join(lost) or method_name} for {method_name}: pip install -U huggingface_hub")
    with hub_errors("jobs"):
        return method(*arguments, **{name: value for name, value in keywords.items() if name in known})


def flavors(api):
    """What jobs can run on, cheapest first."""
    found = []
    for one in call(api, "list_jobs_hardware"):
        if one.unit_label not in UNITS:
            raise ValueError(f"the Hub prices {one.name} per {one.unit_label!r}, and this knows {', '.join(UNITS)}: no cost could be told; update this project")
        gpus = int(one.accelerator.quantity) if one.accelerator and one.accelerator.type == "gpu" else 0
        found.append(Flavor(one.name, one.pretty_name, gpus, one.cpu, one.ram, 100 * one.unit_cost_usd * UNITS[one.unit_label]))
    return sorted(found, key=lambda flavor: (flavor.cents_per_hour, flavor.name))


def find_flavor(offered, name, gpus, max_price):
    """The Flavor of that name. ValueError names the nearest, or what has that number of GPUs, or the price."""
    found = next((flavor for flavor in offered if flavor.name == name), None)
    if found is None:
        nearest = difflib.get_close_matches(name, [flavor.name for flavor in offered], n=1, cutoff=0)
        raise ValueError(f"there is no flavor {name!r} among the {len(offered)} of the Hub. Did you mean {nearest[0] if nearest else '?'!r}? --hardware lists them")
    if gpus not in (-1, found.gpus):
        others = [flavor.name for flavor in offered if flavor.gpus == gpus]
        raise ValueError(f"gpus={gpus}, but {found} has {found.gpus}: choose {' or '.join(others) or 'another number; no flavor has that many'}")
    if max_price >= 0 and found.cents_per_hour > 100 * max_price + 1e-6:
        raise ValueError(f"max_price={dollars(100 * max_price)} an hour, but {found} costs more: raise --max-price or choose another")
    return found


def timeout_seconds(text):
    """"12h", "90m", "1.5d" or "600s" -> seconds. ValueError otherwise: without a timeout the Hub ends a job after 30 minutes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text or "")
    seconds = int(float(match[1]) * SECONDS[match[2]]) if match else 0
    if seconds < 60:
        raise ValueError(f"timeout={text!r} is no time of at least a minute: write a number with its unit, such as 12h, 90m or 2d")
    return seconds


# -- what goes there --------------------------------------------------------------------------------------------------

def split_secrets(values):
    """Variables -> (those of them that may be seen, those whose names say they are secret)."""
    hidden = {name: value for name, value in values.items() if SECRET_NAME.search(name)}
    return {name: value for name, value in values.items() if name not in hidden}, hidden


def check_knobs(script, variables, secrets, gpus):
    """Let the job's own script look at its knobs, here, for a machine with that many GPUs. ValueError holds what it says."""
    if not shutil.which("bash"):
        say("there is no bash here: the knobs are checked when the job begins")
        return
    marked = {name: "set" for name in secrets}              # that it will be there is all that the check needs to know
    given = {"JOB_ID": "check", **variables, **marked, "HF_JOB_GPUS": str(gpus), "PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/nowhere"}
    with tempfile.TemporaryDirectory() as folder:           # apart from this checkout's own .env, which does not travel
        for name in (f"hf_jobs/{script}", "hf_jobs/common.sh", "scripts/bootstrap.sh", "scripts/pipeline.sh"):
            target = Path(folder, name)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(shipping.ROOT / name, target)
        done = subprocess.run(["bash", f"hf_jobs/{script}", "--check"], cwd=folder, env=given, capture_output=True, text=True)
    if done.returncode:
        raise ValueError("the job would be refused:\n" + (done.stderr.strip() or f"its script ended with status {done.returncode}").replace("ERROR: ", ""))


@dataclass(frozen=True)
class Code:
    """A packed tree: where it lies here, its SHA-256, what it is in words."""
    tar: Path
    sha256: str
    source: str

    @property
    def name(self):
        return f"code/{self.sha256[:16]}.tar"


def send_code(api, repo, code):
    """The packed tree -> a private repository. ValueError where the repository is public: the tree may hold what nobody else should read."""
    from huggingface_hub import CommitOperationAdd
    with hub_errors(repo):
        api.create_repo(repo, private=True, exist_ok=True)
        info = api.repo_info(repo)
        if not info.private:
            raise ValueError(f"code_repo={repo} is public, and your working tree may not be meant to be: make it private, or choose another")
        if code.name not in {sibling.rfilename for sibling in info.siblings or ()}:
            api.create_commit(repo, [CommitOperationAdd(code.name, code.tar)], commit_message=code.source)


def submit(api, order, secrets):
    """Start the job -> JobInfo. No secret may stand where it can be read: ValueError if one does."""
    for name, value in secrets.items():
        if len(value) >= 8 and value in repr(order):
            raise ValueError(f"the value of the secret {name} also stands in the job's variables, command, name or image, where it could be read: take it out")
    known = inspect.signature(api.run_job).parameters
    if "name" not in known:                                 # before 1.24: the name is a label, before 1.4 there are none
        name = order.pop("name")
        order |= {"labels": {"name": name}} if "labels" in known else {}
    return call(api, "run_job", **order, secrets=secrets or None)


# -- a job that runs --------------------------------------------------------------------------------------------------

def stage_of(job):
    return str(getattr(job.status.stage, "value", job.status.stage))


def look(api, job_id, namespace, patience=30):
    """inspect_job, through failures of the network that last a while."""
    for attempt in range(patience):
        try:
            return call(api, "inspect_job", job_id=job_id, namespace=namespace)
        except ValueError as error:
            if getattr(getattr(error.__cause__, "response", None), "status_code", 500) < 500 or attempt == patience - 1:
                raise
            say(f"{error}")
            time.sleep(min(30, 2 ** attempt))


def follow(api, job_id, namespace, pause=2.0):
    """Print a job's log until the job has ended -> its JobInfo. A log that breaks off is gone on with."""
    shown, wait = 0, pause
    while True:
        before = shown
        try:
            for number, line in enumerate(call(api, "fetch_job_logs", job_id=job_id, namespace=namespace, follow=True)):
                if number >= shown:
                    say(line.rstrip("\n"))
                    shown = number + 1
        except ValueError as error:
            say(f"(the log: {error})")
        except Exception as error:  # raised while lines are being read, in the transport's own words
            if type(error).__module__.split(".")[0] not in ("httpx", "httpx2", "httpcore", "httpcore2", "huggingface_hub", "requests", "urllib3"):
                raise
            say(f"(the log broke off: {type(error).__name__})")
        job = look(api, job_id, namespace)
        if stage_of(job) in ENDED:
            return job
        wait = pause if shown > before else min(30, 2 * wait)
        time.sleep(wait)


def hours(job):
    """How long a job has run, as the Hub counts it; None where it does not say."""
    durations = getattr(job, "durations", None)
    return durations.running_secs / 3600 if durations and durations.running_secs is not None else None
