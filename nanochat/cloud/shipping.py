"""What goes to a rented machine: the code as it lies here (or an exact commit), and the variables of .env as lines that bootstrap.sh reads.

Nothing here writes into the repository. Values are secrets: they are returned as bytes for stdin, and only names are ever shown.
"""
import hashlib
import re
import subprocess
import tarfile
from pathlib import Path
from urllib.parse import urlsplit

from nanochat.common import env

ROOT = Path(__file__).parents[2]
MAX_BYTES = 500_000_000
# keys of the clouds stay here: a rented machine has no business with them; folders of this machine mean nothing there
KEPT_HERE = ("LAMBDA_API_KEY", "HYPERBOLIC_API_KEY", "HYPERBOLIC_REGION", "HYPERBOLIC_MAX_PRICE", "NANOCHAT_BASE_DIR", "NANOCHAT_DATA_DIR",
             "NANOCHAT_AQUA_DIR", "AQUA_DATA_DIR", "GOOGLE_APPLICATION_CREDENTIALS")


# -- code -------------------------------------------------------------------------------------------------------------

def pack(target, commit="", root=None):
    """Write a tar file of the working tree (what git tracks or would add, so no .env), or of a commit -> (sha256, description)."""
    root = Path(root or ROOT)

    def git(*arguments, binary=False):
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True)
        if done.returncode:
            raise ValueError(f"git {arguments[0]} failed in {root}: {done.stderr.decode(errors='replace').strip()}: use --repo-url, or start from a git checkout")
        return done.stdout if binary else done.stdout.decode().strip()

    if commit:
        if commit.startswith("-"):
            raise ValueError(f"commit={commit!r} is no commit, tag or branch: give a name that `git log` shows")
        full = git("rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}")
        Path(target).write_bytes(git("archive", "--format=tar", full, binary=True))
        source = f"commit {full}"
    else:
        names = [name for name in git("ls-files", "-z", "-c", "-o", "--exclude-standard", "--deduplicate", binary=True).decode().split("\0")
                 if name and (root / name).is_symlink() or (root / name).is_file()]
        sizes = sorted(((root / name).lstat().st_size, name) for name in names)
        if sum(size for size, _ in sizes) > MAX_BYTES:
            megabytes = sum(size for size, _ in sizes) / 1e6
            raise ValueError(f"the working tree is {megabytes:.0f} MB, more than {MAX_BYTES / 1e6:.0f} MB; largest: "
                             f"{', '.join(name for _, name in sizes[-3:])}: let .gitignore name what need not go over, or use --commit")
        with tarfile.open(target, "w") as archive:
            for name in names:
                archive.add(root / name, name, recursive=False)
        changed = len(git("status", "--porcelain").splitlines())
        source = f"commit {git('rev-parse', 'HEAD')}" + (f" with {changed} changed files" if changed else "")
    return hashlib.sha256(Path(target).read_bytes()).hexdigest(), source


def check_repo_url(url):
    """ValueError unless a fresh machine, which has no keys of yours, can clone it."""
    parts = urlsplit(url)
    ssh_form = re.fullmatch(r"(?:ssh://)?(?:[\w.-]+@)?([\w.-]+)[:/](.+)", url) if not parts.scheme.startswith("http") and parts.scheme != "file" else None
    if ssh_form:
        raise ValueError(f"repo_url={url!r} needs an SSH key that the machine does not have: use https://{ssh_form[1]}/{ssh_form[2]}, or leave --repo-url out and your own tree goes over")
    if parts.scheme not in ("https", "http", "file") or url.startswith("-"):
        raise ValueError(f"repo_url={url!r} is not a URL that git can clone: use https://HOST/OWNER/NAME")
    if parts.username or parts.password:
        raise ValueError("repo_url contains a user name or token, which would be seen in process lists: leave --repo-url out and your own tree goes over")
    return url


def check_relative(value, knob):
    """ValueError unless `value` is a plain path below a folder."""
    if not re.fullmatch(r"[A-Za-z0-9_.][A-Za-z0-9_.-]*(/[A-Za-z0-9_.][A-Za-z0-9_.-]*)*", value, re.ASCII) or {"..", "."} & set(value.split("/")):
        raise ValueError(f"{knob}={value!r} must be a path of letters, digits, . _ - and / without ..: for example nanochatAquaRat")
    return value


# -- variables --------------------------------------------------------------------------------------------------------

def read_env_file(path):
    """KEY=value lines -> dict, by the rules of read_env_file in scripts/bootstrap.sh: data, never executed; an empty value is none."""
    values = {}
    for line in Path(path).read_bytes().decode("utf-8").split("\n") if Path(path).is_file() else ():
        match = re.match(r"\s*(?:export )?([A-Za-z_][A-Za-z0-9_]*)=(.*)", line, re.ASCII | re.DOTALL)
        if not match:
            continue
        value = match[2].removesuffix("\r")
        if len(value) >= 2 and value[0] == value[-1] and value[0] in "\"'":
            value = value[1:-1]
        if value:
            values.setdefault(match[1], value)
    return values


def write_env_file(values):
    """dict -> bytes that read_env_file here and in bootstrap.sh turn back into the same values. ValueError names what cannot be written."""
    for name, value in values.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name, re.ASCII):
            raise ValueError(f"{name!r} is not a variable's name: use letters, digits and _")
        if "\n" in value or "\0" in value:
            raise ValueError(f"{name} has several lines ({value.count(chr(10)) + 1}), which a .env file cannot hold: encode it, for example with base64")
    return "".join(f'{name}="{value}"\n' for name, value in values.items()).encode()


def gather_env(env_file, pairs, inject):
    """The variables for the machine: the .env file's, then those taken from the environment by name, then KEY=VAL pairs; later ones win."""
    values = {name: value for name, value in read_env_file(env_file).items() if name not in KEPT_HERE} if env_file else {}
    for name in inject:
        value = env(name)
        if value is None:
            raise ValueError(f"--inject-env {name}: the variable is not set here: export {name}=... first, or write it into .env")
        values[name] = value
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--env {pair.split('=')[0]!r} has no value: write --env {name}=VALUE, or --inject-env {name} for one that is set here")
        values[name] = value
    write_env_file(values)  # refuses what cannot travel before anything is rented
    return values
