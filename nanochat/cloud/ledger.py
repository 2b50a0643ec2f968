"""What this machine has rented, on disk before the request is sent: base_dir()/cloud/<name>/rental.json, one folder per rental.

Each file is written by the one launcher that owns it, whole or not at all. A launcher that was killed leaves its file behind, and `--status`
finds by it what is still billing. No secrets are in it.
"""
import json
import os
import re
import secrets
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from nanochat.cloud.signals import say
from nanochat.common import base_dir, write_atomic

OPEN_STATES = ("requesting", "unknown", "rented", "detached", "ending")  # those that may cost money; the others: planned, refused, terminated


@dataclass
class Record:
    """One rental. `state`: planned (nothing asked for yet), requesting (the request may be on its way), unknown (no answer, nothing found yet), rented, detached (left running
    on purpose), ending, refused, terminated."""
    name: str
    cloud: str
    api_url: str = ""
    state: str = "planned"
    id: str = ""
    kind: str = ""
    region: str = ""
    node: str = ""
    gpus: int = 0
    cents_per_hour: float = 0.0
    requested_at: float = 0.0
    rented_at: float = 0.0
    ended_at: float = 0.0
    doubt: bool = False       # a request got no answer: there may be an instance that nobody has seen yet
    seen: bool = False        # the cloud has listed it under `id`
    known_before: list = field(default_factory=list)  # ids of instances that were there before the request
    pid: int = 0
    host: str = ""
    port: int = 22
    user: str = ""
    ssh_key: str = ""
    base_dir: str = ""        # NANOCHAT_BASE_DIR on the machine
    repo_dir: str = ""
    session: str = ""
    tmux_socket: str = ""
    source: str = ""
    note: str = ""

    @property
    def folder(self):
        return ledger_dir() / self.name

    @property
    def cost(self):
        """Cents so far, counted from the request: the upper bound of what is billed."""
        until = self.ended_at or time.time()
        return max(0.0, until - self.requested_at) / 3600 * self.cents_per_hour

    @property
    def is_open(self):
        return self.state in OPEN_STATES

    def save(self, **changes):
        """First in memory, then on disk: if the disk fails, the caller still knows the id."""
        for name, value in changes.items():
            setattr(self, name, value)
        write_atomic(self.folder / "rental.json", json.dumps(asdict(self), indent=1) + "\n")


def ledger_dir():
    return base_dir() / "cloud"


def new_record(cloud, api_url, prefix, **values):
    """A rental under a name that no other has: the cloud is asked to carry it, and an instance whose request got no answer is found by it."""
    clean = re.sub(r"[^a-z0-9-]+", "-", prefix.lower()).strip("-")[:40] or "nanochat"
    return Record(name=f"{clean}-{secrets.token_hex(4)}", cloud=cloud, api_url=api_url, pid=os.getpid(), requested_at=time.time(), **values)


def read_records(cloud):
    """All records of that cloud, oldest first. A file that cannot be read is named, for it may stand for a paid instance."""
    records = []
    for path in sorted(Path(ledger_dir()).glob("*/rental.json")):
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            record = Record(**{field.name: values[field.name] for field in fields(Record) if field.name in values})
        except (OSError, ValueError, KeyError, TypeError) as error:
            say(f"{path} cannot be read ({error}): look at the cloud's own list for instance names that begin like {path.parent.name}")
            continue
        if record.cloud == cloud:
            records.append(record)
    return sorted(records, key=lambda record: record.requested_at)


def is_watched(record):
    """True while the launcher that wrote the record is alive."""
    if record.pid <= 0 or record.pid == os.getpid():
        return record.pid > 0
    try:
        command = Path(f"/proc/{record.pid}/cmdline").read_bytes() if Path("/proc/self").exists() else None
        os.kill(record.pid, 0)
    except (OSError, ValueError):
        return False
    return command is None or b"launch" in command or b"python" in command
