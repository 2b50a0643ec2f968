"""One split of a data set: the rows of a local JSON-lines file where a folder is given, else of the Hugging Face Hub."""
from pathlib import Path

from tasks.common import load_hub_dataset, load_jsonl


def load_split(hub_id, config, split, splits, data_dir=None, file_name=None):
    """The rows of `split`, one of `splits`: from data_dir/file_name, or from the Hub's data set `hub_id` where data_dir is None.

    A folder that lacks the file is an error, never a reason to fetch the rows elsewhere."""
    if split not in splits:
        raise ValueError(f"{hub_id} has no split {split!r}: the {len(splits)} splits are {', '.join(splits)}")
    if data_dir is None:
        return load_hub_dataset(hub_id, config, split)
    path = Path(data_dir).expanduser() / file_name
    if not path.is_file():
        there = sorted(other.name for other in path.parent.glob("*.json*"))
        raise ValueError(f"{path} is not there; the folder holds {len(there)} JSON files {there[:8]}: "
                         "put the split there under that name, or leave data_dir out to fetch it from the Hub")
    return load_jsonl(path)
