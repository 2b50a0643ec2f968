"""Pretraining shards: download them, check them, iterate their documents. It knows no tokenizer and no tensor.

    python -m nanochat.dataset -n 24             # 24 training shards of FineWeb-EDU (100 MB each) and the validation shard
    python -m nanochat.dataset --data-dir texts  # a folder of your own: parquet files with a string column `text`

The validation shard has a fixed name. Were it "the last file", a longer download would turn it into training text.
"""
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from nanochat.common import base_dir, env, sha256_of
from nanochat.configurator import parse

HUB_REPO = "karpathy/fineweb-edu-100b-shuffle"
NUM_HUB_SHARDS = 1823
HUB_VAL_SHARD = "shard_01822.parquet"   # downloaded with every number of training shards
LOCAL_VAL_SHARD = "shard_val.parquet"   # the name in a folder of your own
MAX_ATTEMPTS = 4


@dataclass(frozen=True)
class Config:
    """Download the pretraining shards, or check a folder of your own."""
    num_files: int = -1    # [-n] training shards to download (-1 = all 1822); the validation shard always comes too
    num_workers: int = 4   # [-w] parallel downloads
    data_dir: str = ""     # check this folder of parquet files instead and download nothing (or set NANOCHAT_DATA_DIR)
    val_shard: str = ""    # name of the validation shard in data_dir ("" = shard_val.parquet, or the Hub's shard_01822.parquet)


def main(config):
    data_dir = config.data_dir or env("NANOCHAT_DATA_DIR")
    if not data_dir:
        failed = download_shards(config.num_files, config.num_workers)
        if failed:
            raise SystemExit(f"{len(failed)} shards could not be downloaded: {', '.join(failed)}. "
                             "What arrived is kept: run the same command again")
    train = list_shards("train", data_dir, config.val_shard or None)
    val = list_shards("val", data_dir, config.val_shard or None)
    num_train, num_val = (sum(sum(row_group_sizes(shard)) for shard in shards) for shards in (train, val))
    print(f"{train[0].parent}: {len(train)} training shards with {num_train:,} documents, "
          f"validation shard {val[0].name} with {num_val:,}")


# -- reading ----------------------------------------------------------------------------------------------------------

def shards_dir(data_dir=None):
    """`data_dir`, else $NANOCHAT_DATA_DIR, else the download folder under the base directory."""
    return Path(data_dir or env("NANOCHAT_DATA_DIR") or base_dir() / "base_data").expanduser()


def list_shards(split="train", data_dir=None, val_shard=None):
    """"train" or "val" -> sorted paths of the parquet files of that split. ValueError where the validation shard is missing."""
    if split not in ("train", "val"):
        raise ValueError(f"split={split!r} is neither 'train' nor 'val'")
    folder = shards_dir(data_dir)
    paths = sorted(folder.glob("*.parquet"))
    if not paths:
        raise ValueError(f"{folder} holds 0 parquet files: download shards with `python -m nanochat.dataset -n 24`, "
                         "or name your own folder by --data-dir or NANOCHAT_DATA_DIR")
    names = [val_shard] if val_shard else [LOCAL_VAL_SHARD, HUB_VAL_SHARD]
    val = [path for path in paths if path.name in names]
    if not val:
        raise ValueError(f"none of the {len(paths)} parquet files in {folder} is the validation shard ({' or '.join(names)}): "
                         f"put held-out text into {names[0]}, or name the file that holds it")
    if len(val) > 1:
        raise ValueError(f"{folder} holds {len(val)} validation shards ({' and '.join(names)}), one of your own and the Hub's: "
                         "keep the two sets in two folders")
    train = [path for path in paths if path not in val]
    if split == "train" and not train:
        raise ValueError(f"{folder} holds 1 parquet file, the validation shard {val[0].name}, and nothing to train on: add shards")
    return train if split == "train" else val


def iter_documents(shards, start=(0, 0, 0), with_positions=False):
    """Paths -> their documents in order, one row group in memory at a time, from position `start` = (shard, row group, row) on.

    With positions each item is (position, text), and the position of the first document not yet used is where to start again.
    """
    first_shard, first_group, first_row = start
    for shard in range(first_shard, len(shards)):
        for group in range(first_group, len(row_group_sizes(shards[shard]))):
            for row, text in enumerate(read_row_group(shards[shard], group)[first_row:].to_pylist(), first_row):
                yield ((shard, group, row), text or "") if with_positions else text or ""
            first_row = 0
        first_group = 0


def row_group_sizes(path):
    """A shard -> the number of documents in each of its row groups, from the footer alone."""
    import pyarrow as pa  # here and below, not above: a third of a second that whoever reads no shard need not spend
    import pyarrow.parquet as pq
    try:
        with pq.ParquetFile(path) as shard:
            columns = shard.schema_arrow
            metadata = shard.metadata
            if "text" not in columns.names or not is_text(columns.field("text").type):
                raise ValueError(f"{path} has the columns {', '.join(columns.names)} but no string column `text`: "
                                 "rename the one that holds the documents")
            return [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} ({Path(path).stat().st_size if Path(path).exists() else 0} bytes) is not a readable parquet file "
                         f"({error}): delete it and fetch it again") from error


def is_text(kind):
    from pyarrow import types
    return types.is_string(kind) or types.is_large_string(kind)


def read_row_group(path, group):
    """A shard and a row group's number -> its texts as one arrow column: bytes until someone asks for a row."""
    import pyarrow.parquet as pq
    with pq.ParquetFile(path) as shard:
        return shard.read_row_group(group, columns=["text"])["text"]


# -- downloading ------------------------------------------------------------------------------------------------------

def download_shards(num_files=-1, num_workers=4, folder=None):
    """Fetch the first `num_files` training shards and the validation shard -> names of those that failed after every retry.

    A shard appears in `folder` only when it is whole and checked, so one that is there already costs no request.
    """
    if not (num_files == -1 or 1 <= num_files < NUM_HUB_SHARDS):
        raise ValueError(f"num_files={num_files}, but {HUB_REPO} has {NUM_HUB_SHARDS - 1} training shards: "
                         f"ask for 1 to {NUM_HUB_SHARDS - 1}, or -1 for all")
    folder = Path(folder or base_dir() / "base_data")
    staging = folder / ".download"  # the Hub client keeps its unfinished files and their etags here, to go on after a break
    staging.mkdir(parents=True, exist_ok=True)
    num_train = NUM_HUB_SHARDS - 1 if num_files == -1 else num_files
    names = [HUB_VAL_SHARD] + [f"shard_{index:05d}.parquet" for index in range(num_train)]
    missing = [name for name in names if not is_whole(folder / name)]
    print(f"{len(names) - len(missing)} of {len(names)} shards are in {folder}" + (f", {len(missing)} to download" if missing else ""))

    def fetch(name):
        for attempt in range(1, MAX_ATTEMPTS + 1):
            problem, worth_another = download_shard(name, folder, staging)
            if problem is None:
                print(f"{name} downloaded ({(folder / name).stat().st_size / 1e6:.1f} MB)", flush=True)
                return True
            print(f"{name}: attempt {attempt} of {MAX_ATTEMPTS} failed: {problem}", flush=True)
            if not worth_another or attempt == MAX_ATTEMPTS:
                return False
            time.sleep(2 ** (attempt - 1))

    with ThreadPoolExecutor(max_workers=num_workers) as pool:
        failed = [name for name, done in zip(missing, pool.map(fetch, missing)) if not done]
    if not failed:
        shutil.rmtree(staging)
    return failed


def download_shard(name, folder, staging):
    """One attempt at one shard -> (None, False), or (what went wrong, whether another attempt may help)."""
    # imported here because it costs half a second and training only reads
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
    try:
        expected = get_hf_file_metadata(hf_hub_url(HUB_REPO, name, repo_type="dataset"))
        path = Path(hf_hub_download(HUB_REPO, name, repo_type="dataset", local_dir=staging))
    except (EntryNotFoundError, RepositoryNotFoundError, GatedRepoError) as error:
        return first_line(error), False
    except (HfHubHTTPError, OSError, EOFError) as error:
        return first_line(error), True
    problem = difference(path, expected.size, expected.etag)
    if problem:
        path.unlink()  # the next attempt must not trust these bytes
        return problem, True
    path.replace(folder / name)
    return None, False


def difference(path, size, etag):
    """What distinguishes the file from its published size and etag (a sha256 for large files), and from parquet; None if nothing."""
    if size is not None and path.stat().st_size != size:
        return f"{path.stat().st_size} bytes arrived instead of {size}"
    if etag and len(etag) == 64:
        digest = sha256_of(path)
        if digest != etag:
            return f"its sha256 is {digest[:12]}... instead of {etag[:12]}..."
    return None if is_whole(path) else "it is not a parquet file with a column `text`"


def is_whole(path):
    """Whether the file exists and ends in a parquet footer that lists a text column."""
    try:
        return Path(path).exists() and bool(row_group_sizes(path))
    except ValueError:
        return False


def first_line(error):
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"


if __name__ == "__main__":
    main(parse(Config))
