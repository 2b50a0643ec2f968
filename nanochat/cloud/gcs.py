"""A Google Cloud Storage bucket: what it holds, files to it and from it, each compared with the checksum that the server itself computed.

google-cloud-storage does the talking and repeats what failed for a passing reason; STORAGE_EMULATOR_HOST sends it to an emulator. It needs no
more than roles/storage.objectUser on the bucket: the bucket's own settings are never asked for.
"""
import base64
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nanochat.common import env

SMALL = 8 << 20          # bytes; below, a file is read once into memory, so that a log that grows meanwhile arrives as it was at one moment
CHUNK = 64 << 20         # bytes of one request of a large file: what a lost connection costs at most; a multiple of 256 KiB
ATTEMPTS = 3             # for a file whose content changes, or arrives damaged, while it is sent
ROLE = "roles/storage.objectUser"


class TransferFailed(Exception):
    """This file did not get across; the text says why."""


@dataclass(frozen=True)
class Stored:
    """An object as the bucket lists it: `crc32c` is the server's own checksum, `sha256` what its sender wrote beside it ("" = nothing)."""
    size: int
    crc32c: str
    sha256: str


@dataclass(frozen=True)
class Digest:
    """A file's content, told from any other: `content` holds it where it is small."""
    size: int
    crc32c: str
    sha256: str
    content: bytes | None = None

    def same_as(self, stored):
        return stored is not None and (self.size, self.crc32c) == (stored.size, stored.crc32c) and stored.sha256 in ("", self.sha256)


def digest(path, keep=True):
    """Read a file once -> Digest; with `keep` a small one's content comes along."""
    import google_crc32c
    crc, sha, size, small = google_crc32c.Checksum(), hashlib.sha256(), 0, None
    with open(path, "rb") as file:
        if keep and os.fstat(file.fileno()).st_size <= SMALL:
            small = file.read()
            crc.update(small)
            sha.update(small)
            size = len(small)
        while small is None and (piece := file.read(1 << 20)):
            crc.update(piece)
            sha.update(piece)
            size += len(piece)
    return Digest(size, base64.b64encode(crc.digest()).decode(), sha.hexdigest(), small)


def check_library():
    """ValueError where google-cloud-storage is not installed."""
    try:
        import google.cloud.storage  # noqa: F401
    except ImportError as error:
        raise ValueError("google-cloud-storage is not installed: `uv sync --inexact --extra gcs` (or pip install google-cloud-storage) adds it") from error


@contextmanager
def storage_errors(bucket):
    """The client's many exceptions -> ValueError where the user must do something, TransferFailed otherwise."""
    import requests
    from google.api_core import exceptions as api
    from google.auth import exceptions as auth
    from google.cloud.storage.exceptions import DataCorruption
    try:
        yield
    except auth.DefaultCredentialsError as error:
        raise ValueError("there are no Google credentials here: set GOOGLE_APPLICATION_CREDENTIALS to a service account's JSON file, or run "
                         "`gcloud auth application-default login`") from error
    except auth.TransportError as error:
        raise TransferFailed(f"Google's login cannot be reached ({first_line(error)})") from error
    except auth.GoogleAuthError as error:
        raise ValueError(f"Google refuses the credentials ({first_line(error)}): renew them") from error
    except api.Unauthorized as error:
        raise ValueError(f"gs://{bucket} wants credentials (401): set GOOGLE_APPLICATION_CREDENTIALS, or run `gcloud auth application-default login`") from error
    except api.Forbidden as error:
        raise ValueError(f"this account may not do that in gs://{bucket} (403): it needs {ROLE} on the bucket; objectCreator can neither list nor verify") from error
    except api.NotFound as error:
        raise ValueError(f"gs://{bucket} or what was asked for in it does not exist (404): check the bucket's name, or `gcloud storage buckets create gs://{bucket}`") from error
    except (api.GoogleAPIError, DataCorruption, requests.RequestException, ConnectionError, TimeoutError) as error:
        raise TransferFailed(f"{type(error).__name__}: {first_line(error)}") from error


def first_line(error):
    return (str(error).strip().splitlines() or ["no reason given"])[0][:300]


def in_parallel(act, names, workers):
    """act(name) for each, `workers` at a time -> (name, what it gave, its TransferFailed or OSError or None), in the order in which they end.
    Any other exception ends them all: what is wrong with the credentials is wrong for every file."""
    with ThreadPoolExecutor(workers) as pool:
        jobs = {pool.submit(act, name): name for name in names}
        try:
            for job in as_completed(jobs):
                error = job.exception()
                if error is not None and not isinstance(error, (TransferFailed, OSError)):
                    raise error
                yield jobs[job], None if error else job.result(), error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class Bucket:
    """`Bucket("my-bucket", 120)` repeats each call for up to 120 seconds. It may be used by several threads at once."""

    def __init__(self, name, patience):
        check_library()
        from google.cloud import storage
        from google.cloud.storage.retry import DEFAULT_RETRY
        self.name = name
        self.retry = DEFAULT_RETRY.with_delay(initial=min(1.0, patience / 20), maximum=min(30.0, patience / 4)).with_timeout(patience)
        with storage_errors(name):
            self.client = storage.Client(project=env("GCP_PROJECT_ID"))
            self.bucket = self.client.bucket(name)

    def list(self, prefix):
        """{object's name without the prefix: Stored}."""
        with storage_errors(self.name):
            found = self.client.list_blobs(self.bucket, prefix=prefix, fields="items(name,size,crc32c,metadata),nextPageToken", retry=self.retry)
            return {blob.name[len(prefix):]: Stored(int(blob.size), blob.crc32c or "", (blob.metadata or {}).get("sha256", "")) for blob in found}

    def send(self, path, name, known=None):
        """Upload a file -> the Digest of what the server then says that it holds. `known` is the file's Digest where it is known already.
        FileNotFoundError where the file is gone meanwhile."""
        problem = ""
        for _ in range(ATTEMPTS):
            mine = known or digest(path)
            known = None
            blob = self.bucket.blob(name, chunk_size=CHUNK)
            blob.metadata = {"sha256": mine.sha256}
            blob.crc32c = mine.crc32c                    # the server refuses what does not have it
            try:
                with storage_errors(self.name):
                    if mine.content is not None:
                        blob.upload_from_string(mine.content, content_type="application/octet-stream", retry=self.retry)
                    else:
                        blob.upload_from_filename(str(path), content_type="application/octet-stream", retry=self.retry, crc32c_checksum_value=mine.crc32c)
                    stored = Stored(int(blob.size), blob.crc32c or "", (blob.metadata or {}).get("sha256", ""))
            except TransferFailed as error:
                problem = str(error)
                continue
            if mine.same_as(stored):
                return mine
            problem = f"the bucket now holds {stored.size} bytes with CRC32C {stored.crc32c}, sent were {mine.size} with {mine.crc32c}"
        raise TransferFailed(f"{name}: {problem}")

    def fetch(self, name, target, wanted):
        """Download an object to `target`, going on with what an interrupted download left; `wanted` is the Stored that must arrive."""
        target = Path(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{(wanted.sha256 or hashlib.sha256(wanted.crc32c.encode()).hexdigest())[:12]}.partial")
        problem = ""
        for _ in range(ATTEMPTS):
            have = partial.stat().st_size if partial.exists() else 0
            if have > wanted.size:
                partial.unlink()
                have = 0
            try:
                with storage_errors(self.name), open(partial, "ab") as file:
                    if have < wanted.size:
                        self.bucket.blob(name).download_to_file(file, start=have, raw_download=True, checksum=None, retry=self.retry)
            except TransferFailed as error:              # what did arrive stays, the next attempt goes on behind it
                problem = str(error)
                continue
            found = digest(partial, keep=False)
            if found.same_as(wanted):
                partial.replace(target)
                return
            problem = f"arrived with {found.size} bytes and CRC32C {found.crc32c} instead of {wanted.size} and {wanted.crc32c}"
            partial.unlink()
        raise TransferFailed(f"{name}: {problem}")

    def read(self, name):
        """A small object's content, None where there is none."""
        from google.api_core.exceptions import NotFound
        with storage_errors(self.name):
            try:
                return self.bucket.blob(name).download_as_bytes(retry=self.retry)
            except NotFound:
                return None
