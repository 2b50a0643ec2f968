"""What a launcher's flags ask for: --list, --status, --terminate, --attach, --watch, --dry-run, or the launch itself.

`main(Cloud, config, key)` is all that the launch scripts call. Their Configs share the knobs that are read here and in launch.py.
"""
import re
import subprocess
import time
from pathlib import Path

from nanochat.cloud import launch, session, shipping
from nanochat.cloud.api import NoAnswer, Refused
from nanochat.cloud.launch import Job
from nanochat.cloud.ledger import Record, is_watched, ledger_dir, new_record, read_records
from nanochat.cloud.market import dollars, print_offers
from nanochat.cloud.session import Failed
from nanochat.cloud.signals import Interrupted, Signals, say
from nanochat.cloud.ssh import ConnectionLost, HostKeyChanged, RemoteError
from nanochat.common import env

ARTIFACTS = ("none", "report", "weights", "all")


def find_key(config, variable):
    """The API key: --api-key, the environment, the .env file, in this order; "" where there is none."""
    return config.api_key or env(variable) or shipping.read_env_file(config.env_file).get(variable, "")


def bare_flags(argv, *flags):
    """`--terminate` without a value means the only rental there is."""
    argv = list(argv)
    return [f"{word}=only" if word in flags and (place + 1 == len(argv) or argv[place + 1].startswith("--")) else word for place, word in enumerate(argv)]


def main(Cloud, config, key):
    """Do what the flags ask for -> exit status: 0, the run's own, 1 for a failure, 3 where an instance may still be billing, 128 + signal."""
    check(config)
    if config.api_key:
        say("--api-key can be seen in the process list: a variable or .env is safer")
    with Signals() as signals:
        cloud = Cloud(config, key, signals)
        try:
            for wanted, order in ((config.list, show_offers), (config.status, show_status), (config.terminate, terminate), (config.attach, attach), (config.watch, watch)):
                if wanted:
                    return order(cloud, config, signals)
            return rent_and_run(cloud, config, signals)
        except Interrupted as interrupt:
            return 128 + interrupt.number
        except (Refused, NoAnswer, Failed, ConnectionLost, HostKeyChanged, RemoteError) as error:
            say(f"FAILED: {error}")
            return 1


def check(config):
    """ValueError for what can be known to be wrong before anyone is asked."""
    shipping.check_relative(config.repo_dir, "repo_dir")
    shipping.check_relative(config.run_script, "run_script")
    shipping.check_relative(config.env_file_name, "env_file_name")
    for knob in ("tmux_session", "tmux_socket"):
        if not re.fullmatch(r"[A-Za-z0-9_-]*", getattr(config, knob), re.ASCII) or knob == "tmux_session" and not config.tmux_session:
            raise ValueError(f"{knob}={getattr(config, knob)!r} must be letters, digits, - and _")
    if config.repo_url:
        shipping.check_repo_url(config.repo_url)
        if config.commit:
            raise ValueError(f"commit={config.commit!r} is packed here, repo_url is cloned there: with --repo-url name the commit as --branch")
    if config.branch.startswith("-"):
        raise ValueError(f"branch={config.branch!r} is no branch, tag or commit")
    if config.artifacts not in ARTIFACTS:
        raise ValueError(f"artifacts={config.artifacts!r} is not one of {', '.join(ARTIFACTS)}")
    for knob in ("poll_seconds", "max_hours", "max_wait_minutes", "idle_minutes", "lost_minutes", "terminate_minutes"):
        if getattr(config, knob) <= 0:
            raise ValueError(f"{knob}={getattr(config, knob)} must be more than 0: an instance without that limit would bill without end")
    if config.ssh_key and not Path(config.ssh_key).expanduser().is_file():
        raise ValueError(f"ssh_key={config.ssh_key!r} does not exist: give the private key's file")
    if config.auto_start and config.no_deploy:
        raise ValueError("auto_start needs the code on the machine, no_deploy sends none: leave one of them out")
    try:
        re.compile(config.start_pattern)
    except re.error as error:
        raise ValueError(f"start_pattern={config.start_pattern!r} is no regular expression: {error}") from None


def rent_and_run(cloud, config, signals):
    variables = shipping.gather_env(config.env_file, config.env, config.inject_env)
    for pair in config.env:
        if re.search(r"KEY|TOKEN|SECRET|PASSWORD", pair.split("=")[0], re.IGNORECASE):
            say(f"--env {pair.split('=')[0]}=... can be seen in the process list: export it and use --inject-env {pair.split('=')[0]}")
    cargo = session.Cargo() if config.no_deploy else session.pack_cargo(config, variables)
    try:
        if cargo.tar and config.auto_start and not config.commit and not config.branch and not (shipping.ROOT / config.run_script).is_file():
            raise ValueError(f"run_script={config.run_script!r} does not exist in {shipping.ROOT}: name a script of the repository")
        record = new_record(cloud.name, cloud.url, config.name, ssh_key=str(Path(config.ssh_key).expanduser().resolve()) if config.ssh_key else "",
                            repo_dir=config.repo_dir, session=config.tmux_session, tmux_socket=config.tmux_socket)
        job = Job(cloud, config, signals, record)
        offer = launch.find_offer(job)
        account = cloud.check_account(offer)
        say(f"{offer}; {account}")
        say(f"it costs at most {dollars(offer.cents_per_hour * config.max_hours)} until the deadline of {config.max_hours:g} hours (--max-hours), and is terminated earlier "
            f"when the run ends, after {config.idle_minutes:g} idle minutes, or with Ctrl-C")
        if config.dry_run:
            say(f"code: {cargo.source or 'none'}; variables: {', '.join(sorted(variables)) or 'none'}; run: {config.run_script if config.auto_start else 'nothing (no --auto-start)'}")
            say("--dry-run: nothing was rented")
            return 0
        say(f"its record: {record.folder}")
        return launch.launch(job, offer, cargo)
    finally:
        if cargo.tar:
            cargo.tar.unlink(missing_ok=True)


def show_offers(cloud, config, signals):
    print_offers(cloud.listing(cloud.offers()), say)
    return 0


# -- rentals ----------------------------------------------------------------------------------------------------------

def show_status(cloud, config, signals):
    """All that may be billing: the ledger's open records beside the cloud's list -> exit status 3 if an orphan is among them."""
    listed, known, orphans = cloud.instances(), set(), 0
    for record in read_records(cloud.name):
        job = Job(cloud, config, signals, record)
        try:
            mine = launch.ours(job, listed) if record.is_open else [instance for instance in listed if instance.id == record.id and not instance.is_over]
        except Failed as problem:
            say(f"{record.name}: {problem}")
            orphans += 1
            continue
        known |= {instance.id for instance in mine}
        alive = [instance for instance in mine if not instance.is_over]
        watched = is_watched(record)
        hours = (time.time() - record.requested_at) / 3600
        if not alive and record.is_open and not watched and (record.seen or 3600 * hours > launch.NEVER_LISTED_SECONDS):
            record.save(state="terminated", ended_at=time.time(), note="it was not in the cloud's list")
        if not alive and not record.is_open:
            continue
        if alive and not record.id and not watched:
            record.save(id=alive[0].id, state="rented")
        status = ", ".join(f"{instance.id} {instance.status}" for instance in alive) or f"{record.state}, not in the list so far"
        watcher = f"watched by process {record.pid}" if watched else "detached" if record.state == "detached" else "ORPHAN: nobody watches it"
        say(f"{record.name}: {status}, {record.kind} {record.region}, {hours:.2f} h, about {dollars(record.cost)} at {dollars(record.cents_per_hour)} an hour, {watcher}")
        if not watched:
            orphans += record.state != "detached"
            for flag in ("--terminate", "--watch"):
                say(f"    {launch.command(job, flag, record.name)}")
    for instance in listed:
        if instance.id not in known and not instance.is_over:
            price = "" if instance.cents_per_hour is None else f", {dollars(instance.cents_per_hour)} an hour"
            say(f"{instance.id}: {instance.status}, {instance.name} {instance.kind}{price}, not rented from here")
    if not orphans and all(instance.is_over for instance in listed):
        say(f"nothing is running at {cloud.name}")
    return launch.LEFT_BEHIND if orphans else 0


def find_records(cloud, target):
    """`only`, `all`, a rental's name or an instance's id -> open records; an id that is in no record gets one."""
    records = [record for record in read_records(cloud.name) if record.is_open]
    if target == "all":
        return records
    if target == "only":
        if len(records) != 1:
            raise Failed(f"there are {len(records)} open rentals ({', '.join(record.name for record in records) or 'none'}): name one, or `all`")
        return records
    found = [record for record in records if target in (record.name, record.id)]
    if found:
        return found
    if any(instance.id == target for instance in cloud.instances()):
        return [Record(name=f"by-hand-{re.sub(r'[^A-Za-z0-9-]', '-', target)}", cloud=cloud.name, api_url=cloud.url, state="rented", id=target)]
    raise Failed(f"{target!r} is neither in the ledger ({ledger_dir()}) nor in {cloud.name}'s list")


def terminate(cloud, config, signals):
    done = [launch.end(Job(cloud, config, signals, record)) for record in find_records(cloud, config.terminate)]
    if not done:
        say("nothing to terminate")
    return 0 if all(done) else launch.LEFT_BEHIND


def attach(cloud, config, signals):
    """The rental's tmux session in this terminal; leaving it (Ctrl-B D) changes nothing."""
    job = job_of(cloud, config, signals, config.attach)
    record = job.record
    if not record.host:
        launch.reach(job)
    return subprocess.call(launch.machine_of(job).attach_command(record.session or config.tmux_session, record.tmux_socket))


def watch(cloud, config, signals):
    """Take over a rental that goes on by itself: follow it to its end, fetch, terminate."""
    job = job_of(cloud, config, signals, config.watch)
    if is_watched(job.record):
        raise Failed(f"process {job.record.pid} watches {job.record.name} already")
    launch.adopt(job.record)

    def work():
        launch.reach(job)
        return session.watch(job, launch.look)

    return launch.supervise(job, work)


def job_of(cloud, config, signals, target):
    records = find_records(cloud, target)
    if len(records) != 1:
        raise Failed(f"{len(records)} rentals are open: name one of {', '.join(record.name for record in records)}")
    return Job(cloud, config, signals, records[0])
