"""What happens on the machine: code and variables go over, the run starts in tmux, its log is followed, its results come back.

The log is ~/<repo_dir>/training.log there and cloud/<rental>/training.log in the base directory here, results are in cloud/<rental>/artifacts/.
"""
import re
import shlex
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from nanochat.cloud import remote, shipping
from nanochat.cloud.market import dollars
from nanochat.cloud.signals import say
from nanochat.cloud.ssh import ConnectionLost, RemoteError
from nanochat.common import sha256_of

PIECE = 32 << 20  # bytes of a file per ssh call: what a lost connection costs at most
DATA_FOLDERS = ("base_data", "aqua", "eval_bundle", "eval_bundles", "dolci_stream", "wandb", "cloud")  # can be had elsewhere, or is huge
CHECKPOINT = re.compile(r"(?:model|meta|optim)_(\d{6,})(?:_rank\d+)?\.(?:pt|json)")
COST_SECONDS = 600


class Failed(Exception):
    """The rental cannot go on; the text says why."""


@dataclass
class Cargo:
    """What is to go over. `tar` is None where the machine clones `repo_url`. The values of `variables` are secrets."""
    tar: Path | None = None
    sha256: str = ""
    source: str = ""
    variables: dict = field(default_factory=dict, repr=False)


def pack_cargo(config, variables):
    """The code, packed before anything is paid -> Cargo."""
    if config.repo_url:
        return Cargo(source=f"{config.repo_url} {config.branch or 'default branch'}", variables=variables)
    tar = Path(tempfile.mkstemp(prefix="nanochat-", suffix=".tar")[1])
    try:
        sha256, source = shipping.pack(tar, config.commit or config.branch)
    except BaseException:
        tar.unlink()
        raise
    return Cargo(tar, sha256, source, variables)


def patiently(job, act):
    """Run `act`, again after each lost connection, for `lost_minutes`."""
    until = job.signals.deadline(60 * job.config.lost_minutes)
    while True:
        try:
            return act()
        except ConnectionLost as error:
            if time.monotonic() > until:
                raise
            say(f"the connection was lost ({error}); trying again")
            job.signals.sleep(5)


def deploy(job, cargo):
    """Tools, code and variables -> the machine. Each part may be repeated."""
    config, record, machine = job.config, job.record, job.machine
    patiently(job, lambda: machine.run(remote.PREPARE, record.name, timeout=1500))
    if cargo.tar:
        say(f"sending {cargo.source}, {cargo.tar.stat().st_size / 1e6:.1f} MB, to ~/{config.repo_dir}")
        patiently(job, lambda: machine.run(remote.UNPACK, record.name, config.repo_dir, cargo.sha256, data=cargo.tar, timeout=1800))
    else:
        say(f"the machine clones {cargo.source} into ~/{config.repo_dir}")
        try:
            commit = patiently(job, lambda: machine.run(remote.CLONE, record.name, config.repo_dir, config.repo_url, config.branch, timeout=900)).decode().strip()
        except RemoteError as error:
            raise Failed(f"the machine could not clone {cargo.source}: {error}") from None
        cargo.source += f", commit {commit}"
    record.save(source=cargo.source, base_dir=cargo.variables.get("NANOCHAT_BASE_DIR", ".cache/nanochat").removeprefix("~/"))
    if cargo.variables:
        say(f"sending variables: {', '.join(sorted(cargo.variables))}")
        lines = shipping.write_env_file(cargo.variables)
        patiently(job, lambda: machine.run(remote.STORE_ENV, config.repo_dir, config.env_file_name, data=lines))


def start(job, cargo):
    config, record, machine = job.config, job.record, job.machine
    try:
        patiently(job, lambda: machine.run(remote.START, record.name, config.repo_dir, config.tmux_session, config.tmux_socket, config.run_script,
                                           config.env_file_name, cargo.source))
    except RemoteError as error:
        raise Failed(f"the run could not be started: {error}") from None
    say(f"{config.run_script} is started in tmux {config.tmux_session}, waiting for its first training line (log: ~/{config.repo_dir}/training.log)")


def by_hand(job):
    return f"{shlex.join(job.machine.command())}  (repository: ~/{job.config.repo_dir})"


# -- watch ------------------------------------------------------------------------------------------------------------

def watch(job, look, until_started=False):
    """Follow the run to its end -> its exit status; with `until_started`, to the first training line.

    Failed at the deadline, when idle, when the connection or the instance is lost, when no training line comes. `look(job)` asks the cloud.
    """
    config, record, signals, machine = job.config, job.record, job.signals, job.machine
    now = time.monotonic()
    age = time.time() - record.requested_at
    deadline = now + 3600 * config.max_hours * signals.scale - age
    start_by = now + 60 * config.start_minutes * signals.scale
    last_contact = last_active = last_cost = now
    lost_after, idle_after = (60 * minutes * signals.scale for minutes in (config.lost_minutes, config.idle_minutes))
    offset, tail, started, rounds = 0, "", False, 0
    pattern = re.compile(config.start_pattern, re.MULTILINE)
    mirror = record.folder / "training.log"
    mirror.write_bytes(b"")
    while True:
        state = "unreachable"
        try:
            output = machine.run(remote.PROBE, record.name, record.repo_dir, record.session, record.tmux_socket, offset, timeout=60)
            state, status, size, _, gpu, users, new = remote.parse_probe(output)
        except (ConnectionLost, RemoteError, ValueError) as error:
            say(f"no contact for {time.monotonic() - last_contact:.0f} s: {error}")
        now = time.monotonic()
        if state != "unreachable":
            last_contact = now
            if new or gpu >= 5 or users > 0 or rounds == 0:
                last_active = now
            offset = 0 if size < offset else offset + len(new)
            with open(mirror, "ab") as file:
                file.write(new)
            text = new.decode(errors="replace")
            show(text)
            tail = (tail + text)[-20000:]
            match = pattern.search(tail) if not started else None
            if match:
                started = True
                line = tail[tail.rfind("\n", 0, match.start()) + 1:].split("\n")[0]
                say(f"TRAINING RUNS, {dollars(record.cost)} so far. Its first line: {shown(line)[:200]}")
                if until_started:
                    return 0
            if state == "ended" and offset >= size:
                say(f"the run ended with status {status}" + ("" if started else ", and no training line was seen") + f"; {dollars(record.cost)} so far")
                return status if started or status else 0
            if state == "lost":
                raise Failed(f"the tmux session {record.session} has vanished before the run ended; the end of its log is above")
        if now - last_contact > lost_after:
            raise Failed(f"no connection to the machine for {config.lost_minutes:g} minutes (--lost-minutes)")
        if now > deadline:
            raise Failed(f"the deadline of {config.max_hours:g} hours is reached (--max-hours)")
        if state != "unreachable" and now - last_active > idle_after:
            raise Failed(f"idle for {config.idle_minutes:g} minutes (--idle-minutes): the log does not grow, no GPU works, nobody is logged in")
        if config.auto_start and not started and now > start_by:
            raise Failed(f"no training line within {config.start_minutes:g} minutes (--start-minutes): looked for {config.start_pattern!r}")
        if rounds % 3 == 2 or state == "unreachable":
            look(job)
        if now - last_cost > COST_SECONDS * signals.scale:
            last_cost = now
            say(f"[{dollars(record.cost)} after {(time.time() - record.requested_at) / 3600:.1f} h at {dollars(record.cents_per_hour)} an hour]")
        rounds += 1
        signals.sleep(0 if state != "unreachable" and offset < size else config.poll_seconds)  # at once where more of the log is waiting


def show(text):
    if text:
        say(shown(text.rstrip("\n")))


def shown(text):
    """Without control characters, which steer terminals: what a model wrote may be among the lines."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text)


# -- fetch ------------------------------------------------------------------------------------------------------------

def fetch(job):
    """The log and what `artifacts` asks for -> cloud/<rental>/artifacts/, each file resumed after a lost connection and checked by its SHA-256."""
    config, record, machine = job.config, job.record, job.machine
    if config.artifacts == "none" or not record.source:
        return
    target = record.folder / "artifacts"
    until = job.signals.deadline(60 * config.fetch_minutes)
    machine.run("true", timeout=30)  # a machine that is gone is not waited for a second time
    total = count = 0
    for folder, choose in ((record.repo_dir, lambda files: [file for file in files if file[1] == "training.log"]),
                           (record.base_dir, lambda files: chosen(files, config.artifacts))):
        listing = patiently(job, lambda: machine.run(remote.LIST_FILES, folder))
        for size, name in choose(parse_listing(listing)):
            patiently(job, lambda: fetch_file(machine, folder, name, size, target / name, until))
            total, count = total + size, count + 1
    say(f"fetched {count} files, {total / 1e6:.1f} MB, into {target}")


def parse_listing(output):
    """LIST_FILES' output -> [(size, path)]. The machine is not trusted: a path that would leave the folder is refused."""
    files = []
    for entry in output.split(b"\0"):
        size, tab, name = entry.partition(b"\t")
        if not tab:
            continue
        try:
            name, size = name.decode(), int(size)
        except ValueError:
            continue
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\n" in name:
            raise Failed(f"the machine lists {name!r}, which lies outside of its folder")
        files.append((size, name))
    return files


def chosen(files, artifacts):
    """Of the base directory's files: report = all but data and checkpoints; weights = and the newest model of each folder; all = and every checkpoint."""
    newest = {}
    for _, name in files:
        match = CHECKPOINT.fullmatch(PurePosixPath(name).name)
        if match:
            folder = str(PurePosixPath(name).parent)
            newest[folder] = max(newest.get(folder, 0), int(match[1]))
    keep = []
    for size, name in sorted(files, key=lambda file: file[1]):
        path = PurePosixPath(name)
        match = CHECKPOINT.fullmatch(path.name)
        if path.parts[0] in DATA_FOLDERS or path.name.endswith(".partial"):
            continue
        if match and not (artifacts == "all" or artifacts == "weights" and int(match[1]) == newest[str(path.parent)] and not path.name.startswith("optim")):
            continue
        keep.append((size, name))
    return sorted(keep, key=lambda file: bool(CHECKPOINT.fullmatch(PurePosixPath(file[1]).name)))  # what is small and irreplaceable comes first


def fetch_file(machine, folder, name, size, target, until):
    """The first `size` bytes of one file (it may be growing), continued from what is there. Failed where they do not arrive whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    for _ in range(2):  # a second time from the beginning where the file changed under our hands
        have = partial.stat().st_size if partial.exists() else 0
        while have < size:
            if time.monotonic() > until:
                raise Failed(f"fetching takes longer than --fetch-minutes; {name} is incomplete")
            piece = machine.run(remote.READ_FILE, folder, name, have, min(PIECE, size - have), timeout=600)
            if not piece:
                break
            with open(partial, "ab") as file:
                file.write(piece)
            have += len(piece)
        partial.touch()
        if machine.run(remote.HASH_FILE, folder, name, size, timeout=600).split()[:1] == [sha256_of(partial).encode()]:
            partial.replace(target)
            return
        partial.unlink()
    raise Failed(f"{name} arrived with another SHA-256 than it has on the machine")
