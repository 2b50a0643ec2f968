"""Start a job on Hugging Face's machines with the code as it lies here, watch it, and end with its status.

    hf auth login                                       # or HF_TOKEN; jobs need a positive credit balance
    python -m hf_jobs.launch --hardware
    python -m hf_jobs.launch --script=run_full_pipeline.sh --flavor=a100x8 --timeout=12h --env HF_BASE_DEPTH=12 HF_RL_TEMPERATURE=0.9 --dry-run
    python -m hf_jobs.launch --status                   # what runs and bills; --cancel ID, --logs ID

The working tree, or --commit, goes to a private repository from which the job takes it (or --repo-url is cloned there); results go to --output-repo or
--bucket after every stage. The same --name starts a job that goes on from them. Ends with 0 for a completed job, 1 for a failed one, 3 for one that was
canceled, 130 when the watching was interrupted.
"""
import importlib
import re
import signal
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from hf_jobs import jobs as hf_jobs
from hf_jobs.jobs import ENDED, call, stage_of
from nanochat.cloud import shipping
from nanochat.cloud.market import dollars
from nanochat.cloud.orders import bare_flags
from nanochat.cloud.signals import Signals, say
from nanochat.common import env as variable
from nanochat.configurator import parse
from nanochat.huggingface.hub import check_repo, hub_errors

SCRIPTS = {"run_full_pipeline.sh": "aquarat-hf", "bootstrap_and_train_base.sh": "hf-jobs-base", "bootstrap_and_train_rl.sh": "hf-jobs-rl"}
STAGE_ARGUMENTS = {"BASE_ARGS": "base_train", "MID_ARGS": "mid_train", "SFT_ARGS": "chat_sft", "RL_ARGS": "chat_rl", "EVAL_ARGS": "chat_eval"}
ACTIVE = ("SCHEDULING", "RUNNING")


@dataclass(frozen=True)
class Config:
    """Start a job on Hugging Face's machines with the code as it lies here, watch it, and end with its status."""
    # What to run
    script: str = "run_full_pipeline.sh"  # one of hf_jobs/: run_full_pipeline.sh, bootstrap_and_train_base.sh, bootstrap_and_train_rl.sh
    flavor: str = ""                    # the machine; --hardware lists them with their prices
    gpus: int = -1                      # refuse a flavor with another number of GPUs (-1 = take what it has)
    timeout: str = "12h"                # the job is ended after that long: a number with s, m, h or d
    image: str = "pytorch/pytorch:2.6.0-cuda12.4-cudnn9-devel"  # container; the project brings its own torch, python:3.11 is smaller
    name: str = ""                      # of the job and its results ("" = the script's with the time); the same name again goes on from them
    namespace: str = ""                 # user or organization that pays ("" = you)
    # Code
    commit: str = ""                    # send this commit instead of the working tree
    repo_url: str = ""                  # clone this there instead of sending anything
    git_ref: str = ""                   # with --repo-url: commit, tag or branch
    code_repo: str = ""                 # private repository the code is sent to ("" = NAMESPACE/nanochat-jobs-code)
    # Results
    output_repo: str = ""               # repository they go to after every stage, made private if it is new ("" = NAMESPACE/NAME)
    bucket: str = ""                    # a bucket (user/name) instead, mounted there; they lie under NAME in it
    # Variables
    env: tuple[str, ...] = ()           # KEY=VALUE: the knobs of README.md; they can be read by whoever sees the job
    secrets: tuple[str, ...] = ()       # names of variables to take from here as secrets, besides HF_TOKEN and WANDB_API_KEY
    env_file: str = "hf_jobs/.env"      # KEY=VALUE lines for the job too; those named like keys become secrets ("" = none)
    # Limits
    max_price: float = -1.0             # most dollars per hour (-1 = any)
    again: bool = False                 # start although a job with the same results runs
    # Watching
    detach: bool = False                # end here once it is submitted
    cancel_on_interrupt: bool = False   # Ctrl-C cancels the job; without this it asks, or tells how to
    dry_run: bool = False               # check and show everything, send nothing
    # Instead of starting one
    hardware: bool = False              # show the flavors and what they cost
    status: bool = False                # show the jobs that run, and the last that ended
    cancel: str = ""                    # cancel a job by its id or name, or the only one that runs
    logs: str = ""                      # the same: follow its log and end with its status


def main(config):
    from huggingface_hub import HfApi, get_token
    if not (variable("HF_TOKEN") or get_token()):
        raise ValueError("there is no token: run `hf auth login`, or set HF_TOKEN to one that may write and start jobs")
    api = HfApi(token=variable("HF_TOKEN") or get_token())
    if config.hardware:
        return show_hardware(api)
    with hub_errors("jobs"):
        namespace = config.namespace or api.whoami()["name"]
    if config.status:
        return show_status(api, namespace)
    if config.cancel:
        return cancel(api, namespace, find_job(api, namespace, config.cancel).id)
    if config.logs:
        return watch(api, config, namespace, find_job(api, namespace, config.logs).id)
    return launch(api, config, namespace)


# -- starting ---------------------------------------------------------------------------------------------------------

def launch(api, config, namespace):
    check(config)
    variables, secrets = gather(api, config)
    name = config.name or f"{SCRIPTS[config.script]}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
    offered = hf_jobs.flavors(api)
    flavor = hf_jobs.find_flavor(offered, config.flavor, config.gpus, config.max_price)
    variables |= {"HF_OUTPUT_DIR": f"/store/{name}"} if config.bucket else {"HF_OUTPUT_REPO": check_repo(config.output_repo or f"{namespace}/{name}")}
    place = f"bucket {config.bucket}/{name}" if config.bucket else variables["HF_OUTPUT_REPO"]
    if not config.name:
        say(f"its name is {name}; start the same with --name={name} to go on from its results")
    check_arguments(variables)
    hf_jobs.check_knobs(config.script, variables, secrets, flavor.gpus)
    with nullcontext() if config.repo_url else tempfile.TemporaryDirectory() as folder:
        code = None
        if config.repo_url:
            variables |= {"REPO_URL": config.repo_url, "GIT_REF": config.git_ref}
        else:
            tar = Path(folder, "code.tar")
            code = hf_jobs.Code(tar, *shipping.pack(tar, config.commit))
            repo = check_repo(config.code_repo or f"{namespace}/nanochat-jobs-code")
            variables |= {"CODE_REPO": repo, "CODE_FILE": code.name, "CODE_SHA256": code.sha256}
        hours = hf_jobs.timeout_seconds(config.timeout) / 3600
        say(f"{config.script} on {flavor}; it ends after {hours:g} hours at the latest and costs at most {dollars(hours * flavor.cents_per_hour)}")
        say(f"code: {code.source if code else ' '.join((config.repo_url, config.git_ref)).strip()}; results: {place}")
        say(f"variables: {', '.join(f'{key}={value}' for key, value in sorted(variables.items()))}; secrets: {', '.join(sorted(secrets)) or 'none'}")
        if config.dry_run:
            say("--dry-run: nothing was sent")
            return 0
        refuse_a_second_one(api, config, namespace, variables, place)
        if code:
            hf_jobs.send_code(api, repo, code)
    order = {"image": config.image, "command": ["bash", "-c", (shipping.ROOT / "hf_jobs" / "start.sh").read_text(encoding="utf-8"), "start", config.script],
             "env": variables, "flavor": flavor.name, "timeout": int(hours * 3600), "name": name, "namespace": namespace,
             "volumes": mounted_bucket(api, config.bucket)}
    with Signals() as signals:                          # an interrupt in the middle must not lose the id of a job that bills
        job = hf_jobs.submit(api, order, secrets)
    say(f"job {job.id}: {job.url}")
    if signals.received:
        return interrupted(api, config, namespace, job.id)
    if config.detach:
        say(f"it runs and bills; python -m hf_jobs.launch --logs={job.id} follows it, --cancel={job.id} ends it")
        return 0
    return watch(api, config, namespace, job.id, flavor)


def check(config):
    """ValueError for what can be known to be wrong before anyone is asked."""
    if config.script not in SCRIPTS:
        raise ValueError(f"script={config.script!r} is not one of {', '.join(SCRIPTS)}")
    if not config.flavor:
        raise ValueError("flavor is not given: choose a machine, --hardware lists them with their prices")
    hf_jobs.timeout_seconds(config.timeout)
    if config.name and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}", config.name, re.ASCII):
        raise ValueError(f"name={config.name!r} is no name of a repository: use letters, digits, . _ and -")
    if config.repo_url:
        shipping.check_repo_url(config.repo_url)
        if config.commit:
            raise ValueError(f"commit={config.commit!r} is packed here, repo_url is cloned there: with --repo-url name the commit as --git-ref")
    elif config.git_ref:
        raise ValueError(f"git_ref={config.git_ref!r} belongs to --repo-url; to send a commit of this checkout use --commit")
    if config.bucket and config.output_repo:
        raise ValueError("bucket and output_repo are both given: results go to one place")
    if config.bucket:
        check_repo(config.bucket)


def gather(api, config):
    """-> (the job's variables, its secrets). A secret is never taken from a KEY=VALUE on the command line, which others can read."""
    for pair in config.env:
        if hf_jobs.SECRET_NAME.search(pair.split("=")[0]):
            raise ValueError(f"--env {pair.split('=')[0]}=... would be seen in the process list and in the job's page: export it, then --secrets {pair.split('=')[0]}")
    in_file = shipping.read_env_file(shipping.ROOT / config.env_file) if config.env_file else {}
    variables, secrets = hf_jobs.split_secrets(shipping.gather_env(shipping.ROOT / config.env_file if config.env_file else "", config.env, ()))
    for name in config.secrets:
        value = variable(name) or in_file.get(name)
        if not value:
            raise ValueError(f"--secrets {name}: the variable is not set here, and an empty secret would fail hours later: export {name}=... first")
        secrets[name] = value
    secrets["HF_TOKEN"] = variable("HF_TOKEN") or in_file.get("HF_TOKEN") or api.token
    if variable("WANDB_API_KEY"):
        secrets.setdefault("WANDB_API_KEY", variable("WANDB_API_KEY"))
    return variables, secrets


def check_arguments(variables):
    """The stages' further flags, BASE_ARGS to EVAL_ARGS, against the stages' Configs: a wrong one is told now and not hours later, when its stage begins."""
    for knob, stage in STAGE_ARGUMENTS.items():
        if variables.get(knob, "").strip():
            try:
                parse(importlib.import_module(f"scripts.{stage}").Config, [*(["--source=rl"] if knob == "EVAL_ARGS" else []), *variables[knob].split()])
            except SystemExit as error:
                raise ValueError(f"{knob}={variables[knob]!r} has a flag or value that scripts/{stage}.py does not take: see above") from error


def refuse_a_second_one(api, config, namespace, variables, place):
    """Two jobs that write to one place would undo each other's work."""
    keys = ("HF_OUTPUT_REPO", "HF_OUTPUT_DIR")
    for job in active(api, namespace):
        if [(job.environment or {}).get(key) for key in keys] == [variables.get(key) for key in keys] and not config.again:
            raise ValueError(f"job {job.id} runs and keeps its results in {place} too: --cancel={job.id} first, or give another --name, or --again")


def mounted_bucket(api, bucket):
    if not bucket:
        return None
    from huggingface_hub import Volume
    call(api, "create_bucket", bucket, private=True, exist_ok=True)
    return [Volume(type="bucket", source=bucket, mount_path="/store")]


# -- jobs that are there ----------------------------------------------------------------------------------------------

def active(api, namespace):
    return [job for job in list(call(api, "list_jobs", namespace=namespace)) if stage_of(job) in ACTIVE]


def find_job(api, namespace, wanted):
    """By id or name; "only" is the one that runs."""
    jobs = list(call(api, "list_jobs", namespace=namespace))
    running = [job for job in jobs if stage_of(job) in ACTIVE]
    found = running if wanted == "only" else [job for job in jobs if job.id == wanted] or [job for job in running if (job.labels or {}).get("name") == wanted]
    if len(found) != 1:
        raise ValueError(f"{len(found)} jobs of {namespace} are {'running' if wanted == 'only' else repr(wanted)}: give the id of one of "
                         f"{', '.join(job.id for job in running) or 'those that --status shows; none runs'}")
    return found[0]


def watch(api, config, namespace, job_id, flavor=None):
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        job = hf_jobs.follow(api, job_id, namespace)
    except KeyboardInterrupt:
        return interrupted(api, config, namespace, job_id)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    ran = hf_jobs.hours(job)
    cost = f", about {dollars(ran * flavor.cents_per_hour)}" if flavor and ran is not None else ""
    say(f"job {job_id}: {stage_of(job)}{f' ({job.status.message})' if job.status.message else ''}{f' after {ran:.2f} h' if ran is not None else ''}{cost}")
    return ENDED[stage_of(job)]


def stop(number, frame):
    raise KeyboardInterrupt


def interrupted(api, config, namespace, job_id):
    """Ctrl-C: cancel it, ask, or tell how. What is kept so far stays kept."""
    wanted = config.cancel_on_interrupt
    if not wanted and sys.stdin.isatty() and sys.stdout.isatty():
        try:
            wanted = input(f"\ncancel job {job_id}? It bills while it runs. [y/N] ").strip().lower() in ("y", "yes")
        except (KeyboardInterrupt, EOFError):
            pass
    if wanted:
        cancel(api, namespace, job_id)
    else:
        say(f"job {job_id} goes on and bills. Follow it: python -m hf_jobs.launch --logs={job_id}; end it: python -m hf_jobs.launch --cancel={job_id}")
    return 130


def cancel(api, namespace, job_id):
    call(api, "cancel_job", job_id=job_id, namespace=namespace)
    stage = stage_of(hf_jobs.look(api, job_id, namespace))
    say(f"job {job_id}: cancel was asked for, it is {stage}" + ("" if stage in ENDED else "; --status shows when it has ended"))
    return 0


def show_hardware(api):
    for flavor in hf_jobs.flavors(api):
        say(f"{flavor.name:16} {flavor.gpus:>2} GPUs  {dollars(flavor.cents_per_hour):>8}/h  {flavor.cpu:>9}  {flavor.ram:>8}  {flavor.title}")
    return 0


def show_status(api, namespace):
    prices = {flavor.name: flavor.cents_per_hour for flavor in hf_jobs.flavors(api)}
    jobs = list(call(api, "list_jobs", namespace=namespace))
    ended = [job for job in jobs if stage_of(job) not in ACTIVE and {"HF_OUTPUT_REPO", "HF_OUTPUT_DIR"} & set(job.environment or {})]
    for job in [job for job in jobs if stage_of(job) in ACTIVE] + ended[:10]:
        flavor, ran = str(getattr(job.flavor, "value", job.flavor)), hf_jobs.hours(job)
        cost = f", {ran:.2f} h, about {dollars(ran * prices[flavor])}" if ran is not None and flavor in prices else ""
        say(f"{job.id}  {stage_of(job):10}  {(job.labels or {}).get('name', '-')}  {flavor}{cost}")
    say(f"{sum(stage_of(job) in ACTIVE for job in jobs)} of the jobs of {namespace} run and bill")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(parse(Config, bare_flags(sys.argv[1:], "--cancel", "--logs"))))
