"""Folders go to the Hub and come from it. The token is HF_TOKEN or that of `hf auth login`, read by huggingface_hub alone; it is never
an argument and never printed. What goes wrong there becomes a ValueError that says what to do.
"""
import re
from contextlib import contextmanager
from pathlib import Path

from nanochat.common import print0

REPO = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


def check_repo(repo):
    if not REPO.fullmatch(repo or "") or ".." in repo or repo.endswith((".git", ".", "-")):
        raise ValueError(f"{repo!r} is not the name of a Hub repository: write user/name, with letters, digits, - _ and .")
    return repo


def own_repo(name):
    """`name` in the account whose token is in force, as user/name."""
    from huggingface_hub import HfApi
    with hub_errors(name):
        return check_repo(f"{HfApi().whoami()['name']}/{name}")


@contextmanager
def hub_errors(repo):
    """The client's many exceptions -> one ValueError, in words."""
    from huggingface_hub.errors import (GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, LocalTokenNotFoundError, OfflineModeIsEnabled,
                                        RepositoryNotFoundError)
    try:
        yield
    except (RepositoryNotFoundError, GatedRepoError) as error:
        raise ValueError(f"the Hub has no repository {repo} that this account may use: check the name, set HF_TOKEN or run `hf auth login`") from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "?")
        hint = "set HF_TOKEN or run `hf auth login` with a token that may write there" if status in (401, 403) else "try again"
        raise ValueError(f"the Hub answered {status} for {repo} ({str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'}): {hint}") from error
    except LocalTokenNotFoundError as error:
        raise ValueError(f"{repo} needs a token: set HF_TOKEN or run `hf auth login`") from error
    except HFValidationError as error:
        raise ValueError(f"{repo}: {error}") from error
    except OfflineModeIsEnabled as error:
        raise ValueError(f"{repo} is on the Hub and HF_HUB_OFFLINE=1 forbids to ask it: unset that, or use a local folder") from error
    except (ConnectionError, TimeoutError, LocalEntryNotFoundError) as error:
        raise ValueError(f"the Hub cannot be reached for {repo} ({type(error).__name__}): check the network, then run the same command again") from error
    except Exception as error:  # the transport's own family of errors, whichever library is underneath
        if type(error).__module__.split(".")[0] not in ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"):
            raise
        raise ValueError(f"the Hub cannot be reached for {repo} ({type(error).__name__}): check the network, then run the same command again") from error


def push_folder(folder, repo, message, private=True, dry_run=False, patterns=None):
    """Upload a folder's files as one commit, making the repository if it is not there -> its address, None after a dry run.

    `private` holds for a repository that is made now; the visibility of one that exists is left alone."""
    check_repo(repo)
    folder = Path(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and (patterns is None or str(path.relative_to(folder)) in patterns))
    if not files:
        raise ValueError(f"{folder} holds 0 files to upload: export into it first")
    for path in files:
        print0(f"{path.stat().st_size:>14,} bytes  {path.relative_to(folder)}")
    print0(f"{len(files)} files for https://huggingface.co/{repo}, {'private' if private else 'public'} if it is new; message: {message}")
    if dry_run:
        print0("dry run: nothing was sent")
        return None
    from huggingface_hub import HfApi
    with hub_errors(repo):
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message,
                                   allow_patterns=None if patterns is None else list(patterns))
    address = str(getattr(commit, "commit_url", commit))
    print0(f"uploaded: {address}")
    return address


def list_files(repo, revision=None):
    from huggingface_hub import HfApi
    with hub_errors(check_repo(repo)):
        return sorted(HfApi().list_repo_files(repo, revision=revision))


def download(repo, files, folder, revision=None):
    """Those files of a repository into a folder, under their names; what an interrupted download left is gone on with."""
    from huggingface_hub import hf_hub_download
    with hub_errors(check_repo(repo)):
        for name in files:
            hf_hub_download(repo, name, revision=revision, local_dir=folder)
    return Path(folder)
