"""A run's checkpoints, tokenizer, report and logs to a Google Cloud Storage bucket, checked; and back.

    python -m scripts.upload_to_gcs --bucket=my-bucket --dry-run             # what would go; needs neither credentials nor a network
    python -m scripts.upload_to_gcs --bucket=my-bucket --run-name=first      # again: only what is not there yet
    python -m scripts.upload_to_gcs --bucket=my-bucket --run-name=first --verify
    python -m scripts.upload_to_gcs --bucket=my-bucket --run-name=first --download

Exit status 0 only if everything is in the bucket with the checksums of what is here (--download: here with those of the bucket); 1 otherwise, 3 where
--auto-terminate could not end the machine. Nothing is asked on the terminal. GCS_UPLOAD_GUIDE.md has the bucket, the role and the key.
"""
from dataclasses import dataclass, replace
from pathlib import Path

from nanochat.cloud import run_files
from nanochat.cloud.gcs import Bucket, Stored, TransferFailed, digest, in_parallel
from nanochat.cloud.here import terminate_here
from nanochat.common import base_dir, env, print0, write_atomic
from nanochat.configurator import parse


@dataclass(frozen=True)
class Config:
    """Upload a run to a Google Cloud Storage bucket, verify it there, or bring it back."""
    bucket: str = ""                 # the bucket ("" = GCS_BUCKET)
    run_name: str = ""               # the run's folder there, runs/NAME ("" = WANDB_RUN, else the first checkpoint's tag and tokenizer)
    exclude_data: bool = False       # leave out the AQuA splits, which prepare_aqua or prepare_offline makes again
    exclude_optimizer: bool = False  # leave out optimizer shards, two thirds of the bytes: the weights can be used, a stage cannot be resumed
    allow_no_weights: bool = False   # upload although there is no whole checkpoint yet
    overwrite: bool = False          # upload over another run of that name; on --download replace files that differ
    dry_run: bool = False            # list what would be transferred and ask nobody
    verify: bool = False             # only compare the bucket with its manifest
    download: bool = False           # bring the run here
    output: str | None = None        # folder to download into (None = the base directory, so that the run can go on)
    auto_terminate: bool = False     # after a verified upload end this rented machine through its cloud's API
    instance_id: str = ""            # this machine's id at the cloud ("" = found out where that is certain)
    api_url: str = ""                # another server that speaks the cloud's API
    workers: int = 4                 # files at a time
    patience_seconds: float = 300.0  # how long a failing request is repeated


def main(config):
    """-> exit status."""
    if sum((config.verify, config.download, config.auto_terminate)) > 1:
        raise ValueError("--verify, --download and --auto-terminate are three different things: choose one")
    if config.workers < 1 or config.patience_seconds <= 0:
        raise ValueError(f"workers={config.workers} and patience_seconds={config.patience_seconds:g} must be more than 0")
    act = verify if config.verify else download if config.download else upload
    try:
        done = act(config)
    except (TransferFailed, ValueError) as error:        # ValueError: what the user must mend, such as credentials
        print0(f"FAILED: {error}")
        done = False
    if done and config.auto_terminate and not config.dry_run:
        return terminate_here(config.instance_id, config.api_url)
    if not done and config.auto_terminate:
        print0("this machine is NOT terminated, since the upload is not complete: IT GOES ON BILLING if it is rented")
    return 0 if done else 1


# -- upload -----------------------------------------------------------------------------------------------------------

def upload(config):
    """-> True if the bucket holds the whole run."""
    found = run_files.plan(config.exclude_data, config.exclude_optimizer)
    for line in found.torn:
        print0(f"left out: {line}")
    for line in found.damaged:
        print0(f"DAMAGED: {line}")
    if not found.checkpoints and not config.allow_no_weights:
        raise ValueError(f"{base_dir()} holds 0 whole checkpoints, so no weights would be uploaded: train a stage, set NANOCHAT_BASE_DIR, or --allow-no-weights")
    if config.dry_run:
        return show(config, found)
    name = run_files.check_bucket(config.bucket or env("GCS_BUCKET", ""))
    run = run_files.check_run(config.run_name) if config.run_name else run_files.default_run(found.checkpoints)
    bucket, prefix = Bucket(name, config.patience_seconds), f"runs/{run}/"
    there = bucket.list(prefix)
    refuse_other_run(config, bucket, prefix)
    digests, failed, sent = send_all(config, bucket, prefix, found, there)
    lost = [one for one in found.checkpoints if not set(one["files"]) <= set(digests)]
    problems = [*found.damaged, *failed]
    if digests and not (lost and len(lost) == len(found.checkpoints)):
        place = base_dir() / f".{run_files.MANIFEST}"
        write_atomic(place, run_files.manifest(run, found, digests))
        bucket.send(place, prefix + run_files.MANIFEST)
        place.unlink()
        problems += differences(bucket.list(prefix), {name: Stored(one.size, one.crc32c, one.sha256) for name, one in digests.items()})
    whole = [one for one in found.checkpoints if one not in lost]
    for one in whole:
        print0(f"weights: {one['stage']} {one['model_tag']}, step {one['step']}")
    for line in problems:
        print0(f"MISSING: {line}")
    size = sum(one.size for one in digests.values())
    print0(f"gs://{name}/{prefix}: {len(digests)} of {len(found.files)} files, {size / 1e6:,.1f} MB, {sent} sent now, {len(digests) - sent} were there; "
           f"{len(whole)} checkpoints; {'NOT COMPLETE, the same command goes on from here' if problems else 'all verified'}")
    return not problems


def show(config, found):
    for name, path in found.files.items():
        print0(f"{path.stat().st_size:>14,} bytes  {name}")
    where = f"gs://{config.bucket.removeprefix('gs://') or env('GCS_BUCKET', 'BUCKET')}/runs/{config.run_name or '...'}"
    print0(f"dry run: {len(found.files)} files, {found.size / 1e6:,.1f} MB, {len(found.checkpoints)} whole checkpoints for {where}; nothing was sent and nobody asked")
    return not found.damaged


def refuse_other_run(config, bucket, prefix):
    """ValueError where the folder in the bucket belongs to a run that is not this base directory's."""
    content = bucket.read(prefix + run_files.MANIFEST)
    if content is None or config.overwrite:
        return
    theirs = run_files.read_manifest(content, f"gs://{bucket.name}/{prefix}{run_files.MANIFEST}")
    if theirs["origin"] != run_files.origin():
        raise ValueError(f"gs://{bucket.name}/{prefix} holds another run (of {theirs['time']}, {theirs['code']}): choose another --run-name, or --overwrite to replace it")


def send_all(config, bucket, prefix, found, there):
    """-> ({name: Digest} of what the bucket holds now, what failed in words, how many were sent). A checkpoint's meta file goes after all weights."""
    digests, failed, sent = {}, [], 0

    def send(name):
        mine = digest(found.files[name])
        if found.expected.get(name, mine.sha256) != mine.sha256:
            raise TransferFailed(f"{name} does not have the SHA-256 that its checkpoint records: it is torn or changed, and was not sent")
        if mine.same_as(there.get(name)) and there[name].sha256:
            return mine, False
        return bucket.send(found.files[name], prefix + name, mine), True

    for names in (list(found.expected), [name for name in found.files if name not in found.expected]):
        for name, result, error in in_parallel(send, names, config.workers):
            if error is None:
                mine, new = result
                digests[name] = replace(mine, content=None)
                sent += new
                if new and mine.size > 1_000_000:
                    print0(f"{mine.size:>14,} bytes  {name}")
            else:
                failed.append(f"{name} vanished before it was sent: a newer one may have taken its place" if isinstance(error, FileNotFoundError) else str(error))
    return digests, sorted(failed), sent


def differences(there, wanted):
    """What of `wanted` {name: Stored} the bucket does not hold so, in words."""
    lines = []
    for name, one in wanted.items():
        stored = there.get(name)
        if stored is None:
            lines.append(f"{name} is not in the bucket")
        elif (stored.size, stored.crc32c) != (one.size, one.crc32c):
            lines.append(f"{name} has {stored.size} bytes and CRC32C {stored.crc32c} in the bucket instead of {one.size} and {one.crc32c}")
    return lines


# -- the other direction ----------------------------------------------------------------------------------------------

def open_run(config):
    """-> (bucket, prefix, its manifest, what is there)."""
    name = run_files.check_bucket(config.bucket or env("GCS_BUCKET", ""))
    run = run_files.check_run(config.run_name or env("WANDB_RUN", ""))
    bucket, prefix = Bucket(name, config.patience_seconds), f"runs/{run}/"
    where = f"gs://{name}/{prefix}{run_files.MANIFEST}"
    there = bucket.list(prefix)
    content = bucket.read(prefix + run_files.MANIFEST)
    if content is None:
        raise ValueError(f"{where} does not exist{f', although {len(there)} files are there: that upload was never finished' if there else ''}: check --run-name")
    return bucket, prefix, run_files.read_manifest(content, where), there


def verify(config):
    bucket, prefix, listed, there = open_run(config)
    wanted = {name: Stored(**one) for name, one in listed["files"].items()}
    problems = differences(there, wanted)
    for line in problems:
        print0(f"MISSING: {line}")
    beyond = len(set(there) - set(wanted) - {run_files.MANIFEST})
    print0(f"gs://{bucket.name}/{prefix} of {listed['time']}, {listed['code']}: {len(wanted) - len(problems)} of {len(wanted)} files as its manifest says"
           + (f", {beyond} older files beside them" if beyond else ""))
    return not problems


def download(config):
    """-> True if every file of the manifest is here. A checkpoint's meta file comes after all weights, so nothing torn is ever seen as whole."""
    bucket, prefix, listed, there = open_run(config)
    target = Path(config.output).expanduser() if config.output else base_dir()
    wanted, newer, failed = {}, [], []
    for name, one in listed["files"].items():
        stored = there.get(name)
        wanted[name] = Stored(**one)
        if stored and stored.sha256 and stored != wanted[name]:  # a later upload was interrupted before its manifest: each of its files is whole in itself
            wanted[name] = stored
            newer.append(name)
    present = {name: digest(path, keep=False) for name in wanted if (path := run_files.inside(target, name)).is_file()}
    different = [name for name, mine in present.items() if not mine.same_as(wanted[name])]
    if different and not config.overwrite:
        raise ValueError(f"{len(different)} files of {target} differ from the run's, {different[0]} the first of them: choose another --output, or --overwrite to replace them")
    needed = [name for name in wanted if name not in present or name in different]
    if config.dry_run:
        print0("\n".join(["dry run: would fetch", *needed]))
        return True

    tensors = [name for name in needed if name.endswith(".pt")]
    for names in (tensors, [name for name in needed if name not in tensors]):
        for name, _, error in in_parallel(lambda name: bucket.fetch(prefix + name, run_files.inside(target, name), wanted[name]), names, config.workers):
            if error is not None:
                failed.append(str(error))
        if failed:
            break
    if not failed and not config.output:
        write_atomic(target / run_files.ORIGIN, listed["origin"] + "\n")
    for line in sorted(failed):
        print0(f"MISSING: {line}")
    for name in newer:
        print0(f"newer than the manifest, from an upload that was interrupted: {name}")
    print0(f"{target}: {sum(run_files.inside(target, name).is_file() for name in wanted)} of {len(wanted)} files of gs://{bucket.name}/{prefix}, {len(needed)} fetched now; "
           + ("NOT COMPLETE, the same command goes on from here" if failed else "all verified"))
    return not failed


if __name__ == "__main__":
    raise SystemExit(main(parse(Config)))
