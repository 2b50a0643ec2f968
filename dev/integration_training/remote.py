"""deploy.py --ssh: the working tree goes to another machine, into a folder of its own, runs there in tmux, and its results come back.

What is on the machine already (other trees, other sessions, busy GPUs) is left alone. remote.json beside the results says where the run is, so that
the same command after a lost connection, Ctrl-C or --detached follows it on and fetches. Secrets go over ssh's stdin.
"""
import dataclasses
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from nanochat.cloud import remote, shipping
from nanochat.cloud.session import fetch_file, parse_listing, patiently, show
from nanochat.cloud.signals import Interrupted, Signals, say
from nanochat.cloud.ssh import ConnectionLost, Machine, RemoteError, check_address
from nanochat.common import write_atomic

LOST_MINUTES = 30
BUSY_MEGABYTES, BUSY_PERCENT = 1000, 5                  # of a GPU that somebody else is using
GPUS = "nvidia-smi --query-gpu=index,memory.used,utilization.gpu --format=csv,noheader,nounits"


@dataclass(frozen=True)
class Patience:
    lost_minutes: float = LOST_MINUTES


@dataclass
class Job:
    """What nanochat.cloud.session asks a job for, and where the run is on the machine."""
    machine: Machine
    signals: Signals
    name: str                                           # of its folder in ~/.nanochat-cloud, and of its tmux session
    repo: str                                           # the tree, below the home folder
    config: Patience = Patience()


def deploy(config, experiment, folder):
    """-> the run's exit status there; 130 if this end was interrupted, 0 with config.detached once it has started."""
    record = folder / "remote.json"
    with Signals() as signals:
        machine = open_machine(config, folder, signals)
        try:
            known = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
            if known and known["ssh"] != config.ssh:
                raise ValueError(f"{record} says that this experiment runs at {known['ssh']}, not {config.ssh}: repeat that address, or choose another experiment_name")
            name = known.get("name") or f"{experiment.output.experiment_name.replace('.', '_')}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
            job = Job(machine, signals, name, f"integration_training/{name}")
            if not known:
                send(job, config, experiment)
                write_atomic(record, json.dumps({"ssh": config.ssh, "name": name}))
            attach = " ".join(machine.attach_command(job.name, config.tmux_socket))
            say(f"it runs in tmux {job.name}: {attach}")
            if config.detached and not known:
                return 0
            status = watch(job, config)
            fetch(job, experiment, folder)
            record.unlink()
            return status
        except Interrupted:
            say("the run goes on there; the same command follows it again and fetches its results")
            return 130


def open_machine(config, folder, signals):
    user, at, place = config.ssh.rpartition("@")
    host, colon, port = place.rpartition(":")
    if not at or colon and not port.isdigit():
        raise ValueError(f"--ssh={config.ssh!r} is not user@host or user@host:port: for example ubuntu@10.0.0.5:22")
    host, port = (host, int(port)) if colon else (place, 22)
    check_address(user, host, port)
    return Machine(host, port, user, config.ssh_key, folder.parent / f".known_hosts_{host}_{port}", signals)


def send(job, config, experiment):
    """Tree, configuration and variables over, and the start. Nothing has happened there where a GPU is missing or busy."""
    if experiment.target.device_type == "cuda":
        check_gpus(patiently(job, lambda: job.machine.run(GPUS)).decode(), experiment.target.gpu_ranks)
    there = dataclasses.replace(experiment, output=dataclasses.replace(experiment.output, save_dir="results"))
    variables = shipping.gather_env(config.env_file, (), ()) | ({"INTEGRATION_PYTHON": config.remote_python} if config.remote_python else {})
    with tempfile.TemporaryDirectory() as scratch:
        tar = Path(scratch) / "tree.tar"
        sha256, source = shipping.pack(tar)
        there.save(Path(scratch) / "experiment.json")
        patiently(job, lambda: job.machine.run(remote.PREPARE, job.name, timeout=1500))
        say(f"sending {source}, {tar.stat().st_size / 1e6:.1f} MB, to ~/{job.repo}")
        patiently(job, lambda: job.machine.run(remote.UNPACK, job.name, job.repo, sha256, data=tar, timeout=1800))
        patiently(job, lambda: job.machine.run(remote.STORE_ENV, job.repo, "experiment.json", data=(Path(scratch) / "experiment.json").read_bytes()))
    if variables:
        say(f"sending variables: {', '.join(sorted(variables))}")
        patiently(job, lambda: job.machine.run(remote.STORE_ENV, job.repo, ".env", data=shipping.write_env_file(variables)))
    patiently(job, lambda: job.machine.run(remote.START, job.name, job.repo, job.name, config.tmux_socket, "dev/integration_training/run_remote.sh", ".env", source))


def check_gpus(listing, wanted):
    """ValueError unless nvidia-smi's listing shows every GPU wanted, and idle."""
    rows = [[int(value) if value.strip().isdigit() else 0 for value in line.split(",")] for line in listing.splitlines() if line.strip()]  # some cards say [N/A]
    found = {index: (memory, load) for index, memory, load in rows}
    for gpu in wanted:
        if gpu not in found:
            raise ValueError(f"gpu_ranks={wanted}, but that machine has the {len(found)} GPUs {sorted(found)}: choose among them")
        memory, load = found[gpu]
        if memory > BUSY_MEGABYTES or load > BUSY_PERCENT:
            raise ValueError(f"GPU {gpu} there is in use ({memory} MB, {load} %): choose another, or wait")


def watch(job, config):
    """Show the log as it grows -> the run's exit status."""
    offset, contact, deadline = 0, time.monotonic(), time.monotonic() + 3600 * config.max_hours
    while True:
        state = None
        try:
            state, status, size, _, _, _, new = remote.parse_probe(job.machine.run(remote.PROBE, job.name, job.repo, job.name, config.tmux_socket, offset, timeout=60))
            contact = time.monotonic()
            show(new.decode(errors="replace"))
            offset += len(new)
            if state == "ended" and offset >= size:
                say(f"the run ended with status {status}")
                return status
        except (ConnectionLost, RemoteError) as error:
            say(f"no contact for {time.monotonic() - contact:.0f} s: {error}")
        if state in ("lost", "none"):
            raise ValueError(f"tmux {job.name} has vanished there before the run ended, perhaps the machine was started anew: what there is lies in "
                             f"~/{job.repo}/dev/integration_training/results; delete remote.json beside the results here to send it again")
        if time.monotonic() > min(deadline, contact + 60 * LOST_MINUTES):
            raise ValueError(f"not followed any longer: no contact for {LOST_MINUTES} minutes, or --max-hours={config.max_hours} are over. The run goes on there; the same "
                             "command follows it again")
        job.signals.sleep(0 if state and offset < size else config.poll_seconds)


def fetch(job, experiment, folder):
    """Every file of the results, checked by its SHA-256 -> `folder`."""
    there = f"{job.repo}/dev/integration_training/results/{experiment.output.experiment_name}"
    files = parse_listing(patiently(job, lambda: job.machine.run(remote.LIST_FILES, there)))
    until = time.monotonic() + 6 * 3600
    for size, name in files:
        patiently(job, lambda: fetch_file(job.machine, there, name, size, folder / name, until))
    say(f"fetched {len(files)} files, {sum(size for size, _ in files) / 1e6:.1f} MB, into {folder}")
