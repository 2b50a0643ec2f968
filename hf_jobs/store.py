"""Where a job's results outlive its disk: a Hub repository, or a folder that is a mounted bucket. The job scripts call it after every stage.

    python -m hf_jobs.store --repo=me/run --push       the base directory's results -> the store
    python -m hf_jobs.store --repo=me/run --pull       the store -> an empty base directory, so that a restarted job goes on

Kept are each stage's newest whole checkpoint (with its optimizer shards until the stage is done) and the records of nanochat/cloud/run_files.py, among them
the stamps by which scripts/pipeline.sh knows what is done. Data is not kept and its stamps neither: it comes from a seed or the network again. The layout
is the base directory's own, so scripts/fetch_checkpoint.py reads the repository.
"""
import errno
import fcntl
import json
import os
import re
import shutil
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path

from nanochat.checkpoint_manager import FOLDERS, newest_whole
from nanochat.cloud.run_files import LOOSE, ORIGIN, RECORDS, files_of, is_at, safe_name, unknown
from nanochat.common import base_dir, print0, sha256_of, write_atomic
from nanochat.configurator import parse
from nanochat.huggingface.hub import check_repo, download, hub_errors

DATA_STAGES = ("data", "shards", "aqua", "identity")
MANIFEST = "store.json"
WAITS = (5, 15, 45, 120, 300)  # seconds between attempts to reach the Hub


@dataclass(frozen=True)
class Config:
    """Keep a job's results in a Hub repository or a mounted folder, and bring them back."""
    repo: str = ""               # Hub repository (user/name); made private where it is not there
    folder: str = ""             # a folder instead, such as a mounted bucket
    push: bool = False           # take the results there
    pull: bool = False           # bring them into the base directory, unless it holds a run already
    after: str = ""              # name of the stage that is done, for the commit's message
    watch_minutes: float = -1.0  # push that often until the process that started this one ends (-1 = no)


def main(config):
    if bool(config.repo) == bool(config.folder):
        raise ValueError(f"repo={config.repo!r} and folder={config.folder!r}: give one of them")
    if config.push + config.pull + (config.watch_minutes > 0) != 1:
        raise ValueError("give one of --push, --pull and --watch-minutes")
    store = HubStore(check_repo(config.repo)) if config.repo else FolderStore(config.folder)
    if config.pull:
        pull(store)
    elif config.push:
        patiently(lambda: push(store, f"after {config.after}" if config.after else "by hand"))
    else:
        watch(store, 60 * config.watch_minutes)


def watch(store, seconds):
    """Push every so often while the parent lives. A push that fails is told and tried again next time: the next one after a stage decides."""
    parent = os.getppid()
    while True:
        due = time.monotonic() + seconds
        while time.monotonic() < due:
            time.sleep(min(1.0, seconds))
            if os.getppid() != parent:
                return
        try:
            push(store, "within a stage")
        except ValueError as error:
            print0(f"upload: {error}")


def patiently(action):
    """The Hub or a bucket may be away for minutes; what is refused will be refused again."""
    for wait in WAITS:
        try:
            return action()
        except ValueError as error:
            status = getattr(getattr(error.__cause__, "response", None), "status_code", None)
            refused = status in (400, 401, 403, 404, 422) or getattr(error.__cause__, "errno", None) in (errno.EACCES, errno.EPERM, errno.EROFS)
            if refused or error.__cause__ is None:
                raise
            print0(f"upload: {error}; again in {wait} s")
            time.sleep(wait)
    return action()


# -- both ways --------------------------------------------------------------------------------------------------------

def push(store, message):
    with locked():
        snapshot = base_dir() / ".store" / "snapshot"
        names = take_snapshot(snapshot)
        try:
            store.send(snapshot, names, message)
        finally:
            shutil.rmtree(snapshot, ignore_errors=True)
    if left := unknown(base_dir()):
        print0(f"not among what is kept of a run, and so only on this disk: {', '.join(left)}")


def pull(store):
    """What the store keeps -> the base directory; stamps come last, so that an interrupted pull is done again."""
    base = base_dir()
    if any((base / "stages").glob("*.started")):
        print0(f"{base} holds a run already: it goes on, nothing is fetched")
        return
    with locked():
        arrived = base / ".store" / "arrived"
        names = patiently(lambda: store.fetch(arrived))
        for name in sorted(names, key=lambda name: (name.startswith("stages/"), "/meta_" in name, name)):
            (base / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(arrived / name, base / name)
        shutil.rmtree(arrived, ignore_errors=True)
    done = sorted(name[7:-5] for name in names if name.startswith("stages/") and name.endswith(".done"))
    print0(f"{len(names)} files fetched from {store}; done before: {', '.join(done) or 'no stage'}")


@contextmanager
def locked():
    """One push or pull at a time: the watcher and the end of a stage may meet."""
    path = base_dir() / ".store" / "lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def take_snapshot(snapshot):
    """The results as they are now, linked or copied into a folder, so that training may go on beneath -> their names.

    Stamps are read first: a stage that is stamped as done has its checkpoint by then."""
    for _ in range(10):
        shutil.rmtree(snapshot, ignore_errors=True)
        try:
            names = names_to_keep(base_dir())
            for name in names:
                preserve(base_dir() / name, snapshot / name)
            return names
        except FileNotFoundError:
            time.sleep(1)  # a checkpoint was pruned meanwhile, a newer one is there
    raise ValueError(f"{base_dir()} changes faster than it can be read: save less often")


def preserve(path, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".pt":
        try:
            os.link(path, target)  # these appear whole under their name and are never written again
            return
        except FileNotFoundError:
            raise
        except OSError:
            pass                   # a file system without links
    shutil.copyfile(path, target)


def names_to_keep(base):
    """Names below the base directory, the stamps first."""
    names = [f"stages/{path.name}" for path in sorted((base / "stages").glob("*.*")) if path.stem not in DATA_STAGES]
    for stage, room in FOLDERS.items():
        for folder in sorted(path for path in (base / room).glob("*") if path.is_dir()):
            meta = newest_whole(folder)
            if meta:
                finished = meta["finished"] and f"stages/train-{stage}.done" in names
                files = [name for name in meta["files"] if not (finished and name.startswith("optim_"))]
                names += [f"{room}/{folder.name}/{name}" for name in (*files, f"meta_{meta['step']:06d}.json")]
    files, unfit = files_of(base, (*(room for room in RECORDS if room != "stages"), *LOOSE))
    for line in unfit:
        print0(f"left out: {line}")
    names += [*files, *([ORIGIN] if (base / ORIGIN).is_file() else [])]
    return [name for name in names if is_kept(name)]


def is_kept(name):
    """True for a name that `names_to_keep` could give: a stranger's file in the store stays there."""
    return name == ORIGIN or safe_name(name) and is_at(name, (*RECORDS, *FOLDERS.values()) if "/" in name else LOOSE)


def outdated(there, names):
    """Of the names in the store those that a newer snapshot replaces: older checkpoints of its folders, those of training that has begun anew and has none
    yet, and stamps it has no more (FRESH=1 takes them away), for a job that came after would believe them."""
    now, rooms = set(names), {name.rpartition("/")[0] for name in names if is_at(name, FOLDERS.values())}
    anew = [room for stage, room in FOLDERS.items() if f"stages/train-{stage}.started" in now and not any(is_at(name, [room]) for name in names)]
    return [name for name in there if name not in now and is_kept(name) and (is_at(name, ["stages", *anew]) or name.rpartition("/")[0] in rooms)]


# -- the two stores ---------------------------------------------------------------------------------------------------

class HubStore:
    """A model repository on the Hub; every push is one commit, so that what is read is always of one moment."""

    def __init__(self, repo):
        self.repo = repo

    def __str__(self):
        return self.repo

    def send(self, snapshot, names, message):
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
        with hub_errors(self.repo):
            api = HfApi()
            api.create_repo(self.repo, private=True, exist_ok=True)
            gone = outdated(api.list_repo_files(self.repo), names)
            operations = [CommitOperationAdd(name, snapshot / name) for name in names] + [CommitOperationDelete(name) for name in gone]
            if operations:
                api.create_commit(self.repo, operations, commit_message=message)
        print0(f"upload, {message}: {len(names)} files are in {self.repo}")

    def fetch(self, arrived):
        from huggingface_hub import HfApi
        with hub_errors(self.repo):
            api = HfApi()
            api.create_repo(self.repo, private=True, exist_ok=True)  # a token that may not write is found out now, before anything is computed
            info = api.repo_info(self.repo)
        names = sorted(sibling.rfilename for sibling in info.siblings or () if is_kept(sibling.rfilename))
        download(self.repo, names, arrived, info.sha)
        return names


def folder_errors(method):
    """A mounted bucket may fail for a while, as a network does: its OSError is a ValueError with a cause, which `patiently` tries again."""
    @wraps(method)
    def call(self, *arguments):
        try:
            return method(self, *arguments)
        except OSError as error:
            raise ValueError(f"{self} fails ({error}): is the bucket mounted, and may this job write there?") from error
    return call


class FolderStore:
    """A folder, for example of a mounted bucket. Its manifest is written last and names what is whole, with SHA-256."""

    def __init__(self, folder):
        self.folder = Path(folder)
        if not self.folder.is_absolute():
            raise ValueError(f"folder={folder!r} must be an absolute path")

    def __str__(self):
        return str(self.folder)

    def manifest(self):
        path = self.folder / MANIFEST
        if not path.is_file():
            return {}
        try:
            return {str(name): str(digest) for name, digest in json.loads(path.read_text(encoding="utf-8")).items() if is_kept(name)}
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path} is damaged ({error}): empty the folder to start over") from None  # trying again would not mend it

    def staged(self, name, digest):
        """Where new content waits, beside the old, for the manifest that names it: a push that is cut short at any moment has happened whole or not at all."""
        return (self.folder / name).with_name(f".{Path(name).name}.{digest[:16]}.new")

    def settle(self):
        """What a push was cut short in: put what the manifest names into its place, remove the rest -> the manifest."""
        self.folder.mkdir(parents=True, exist_ok=True)
        there = self.manifest()
        for name, digest in there.items():
            if self.staged(name, digest).is_file():
                os.replace(self.staged(name, digest), self.folder / name)
        for path in [path for ending in ("new", "partial") for path in self.folder.rglob(f".*.{ending}")]:
            path.unlink()
        return there

    @folder_errors
    def send(self, snapshot, names, message):
        before, now = self.settle(), {name: sha256_of(snapshot / name) for name in names}
        for name in names:
            if before.get(name) != now[name] or not (self.folder / name).is_file():
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(snapshot / name, self.staged(name, now[name]))
        gone = outdated({*before, *(path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file())}, names)
        write_atomic(self.folder / MANIFEST, json.dumps({**{name: digest for name, digest in before.items() if name not in gone}, **now}, indent=1))
        self.settle()
        for name in gone:
            (self.folder / name).unlink(missing_ok=True)
        print0(f"upload, {message}: {len(names)} files are in {self.folder}")

    @folder_errors
    def fetch(self, arrived):
        names, lost = [], []
        for name, digest in self.settle().items():
            (arrived / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                shutil.copyfile(self.folder / name, arrived / name)
                (names if sha256_of(arrived / name) == digest else lost).append(name)
            except FileNotFoundError:
                lost.append(name)
        for name in lost:
            print0(f"{self.folder / name} is not there with the SHA-256 that {MANIFEST} records: it is left out, and the stages that may have made it run again")
        return [name for name in names if not in_doubt(name, lost)]


def in_doubt(name, lost):
    """True for the stamp of a finished stage whose results may be among the lost files: of training its checkpoints, of the others, which are short, anything."""
    if not lost or not re.fullmatch(r"stages/.*\.done", name):
        return False
    room = FOLDERS.get(name.removeprefix("stages/train-").removesuffix(".done"))
    return room is None or any(one.startswith(f"{room}/") for one in lost)


if __name__ == "__main__":
    main(parse(Config))
