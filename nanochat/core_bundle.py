"""The published bundle of CORE's 22 tasks: read and checked from a folder, or fetched as a zip or from the Hub.

    core.yaml                one entry per task: label, dataset_uri, icl_task_type, num_fewshot, continuation_delimiter
    eval_meta_data.csv       what guessing scores on each task ("Random baseline", in per cent)
    eval_data/               the tasks' rows as JSON lines

The entries are those of llm-foundry, with which the paper's scores were made (DCLM, arXiv 2406.11794), and so are the defaults here.
"""
import csv
import hashlib
import json
import shutil
import stat
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from nanochat.common import base_dir, sha256_of, write_atomic

PUBLISHED_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
CORE_LABELS = ("hellaswag_zeroshot", "jeopardy", "bigbench_qa_wikidata", "arc_easy", "arc_challenge", "copa", "commonsense_qa", "piqa", "openbook_qa",
               "lambada_openai", "hellaswag", "winograd", "winogrande", "bigbench_dyck_languages", "agi_eval_lsat_ar", "bigbench_cs_algorithms",
               "bigbench_operators", "bigbench_repeat_copy_logic", "squad", "coqa", "boolq", "bigbench_language_identification")
KINDS = ("multiple_choice", "schema", "language_modeling")
MAX_UNPACKED = 4 * 2**30                                # bytes; the published bundle has 0.3 GB
ATTEMPTS = 3


@dataclass(frozen=True)
class Item:
    """Contexts and continuations, of which one side has several: multiple choice has several continuations, a schema several contexts,
    language modeling one of each. `gold` counts along the side with several."""
    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int = 0


@dataclass(frozen=True)
class CoreTask:
    label: str
    kind: str
    num_fewshot: int
    random_baseline: float                              # what guessing scores, 0..1
    items: tuple[Item, ...]
    digest: str                                         # SHA-256 of the file
    continuation_delimiter: str = " "
    example_delimiter: str = "\n"
    prompt_string: str = ""


# -- reading ----------------------------------------------------------------------------------------------------------

def load_bundle(folder, labels=None):
    """A bundle's folder -> its CoreTasks in the order of core.yaml, or those named. ValueError names the entry or line that is wrong."""
    import yaml                                         # a dependency of huggingface_hub; here because only this file reads yaml
    path = Path(folder) / "core.yaml"
    if not path.is_file():
        raise ValueError(f"{folder} holds no core.yaml, so it is not an eval bundle: give the folder with core.yaml, eval_meta_data.csv and eval_data/")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not readable yaml ({str(error).splitlines()[0] if str(error) else type(error).__name__}): fetch the bundle again") from error
    entries = content.get("icl_tasks") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{path} lists no tasks: it must hold icl_tasks, a list of entries with label, dataset_uri and icl_task_type")
    named = [entry.get("label") for entry in entries]
    repeated = next((label for label in named if named.count(label) > 1), None)
    if repeated is not None:
        raise ValueError(f"{path} names the task {repeated!r} {named.count(repeated)} times: give each entry its own label")
    unknown = sorted(set(labels or ()) - set(filter(lambda label: isinstance(label, str), named)))
    if unknown:
        raise ValueError(f"{path} has no task {', '.join(unknown)}: choose among {', '.join(map(str, named))}")
    baselines = read_baselines(Path(folder) / "eval_meta_data.csv")
    return [read_task(entry, Path(folder) / "eval_data", baselines) for entry in entries if labels is None or entry["label"] in labels]


def read_baselines(path):
    """eval_meta_data.csv -> {task: what guessing scores, 0..1}."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: without the random baselines there is no centred score")
    baselines = {}
    with open(path, encoding="utf-8", newline="") as file:
        try:
            for row in csv.DictReader(file):
                baselines[row["Eval Task"]] = float(row["Random baseline"]) / 100
        except (KeyError, TypeError, ValueError, csv.Error) as error:
            raise ValueError(f"{path} cannot be read after {len(baselines)} rows ({type(error).__name__}: {error}): "
                             "it must have the columns 'Eval Task' and 'Random baseline', the latter in per cent") from error
    return baselines


def read_task(entry, data_dir, baselines):
    """One entry of core.yaml -> CoreTask."""
    label = entry.get("label")
    if not isinstance(label, str) or not label:
        raise ValueError(f"an entry of core.yaml has the label {label!r}: it must be a name")

    def text(name, default=None):
        value = entry.get(name, default)
        if not isinstance(value, str):
            raise ValueError(f"{name} of the task {label} is {value!r}: it must be text")
        return value

    kind, uri = text("icl_task_type"), text("dataset_uri")
    if kind not in KINDS:
        raise ValueError(f"the task {label} is of the type {kind!r}: CORE has {', '.join(KINDS)}")
    shots = entry.get("num_fewshot", 0)
    shots = shots[0] if isinstance(shots, list) and len(shots) == 1 else shots
    if isinstance(shots, bool) or not isinstance(shots, int) or shots < 0:
        raise ValueError(f"num_fewshot of the task {label} is {entry['num_fewshot']!r}: it must be one number, 0 or more, or a list of one")
    baseline = baselines.get(label)
    if baseline is None or not 0 <= baseline < 1:
        raise ValueError(f"the random baseline of the task {label} is {'missing' if baseline is None else baseline} in eval_meta_data.csv: "
                         "it must be at least 0 and less than 100 per cent")
    parts = PurePosixPath(uri).parts
    if uri.startswith("/") or ".." in parts or "\\" in uri or "\0" in uri or not parts:
        raise ValueError(f"the task {label} lies at {uri!r}: it must be a path inside eval_data/")
    path = data_dir.joinpath(*parts)
    if not path.is_file():
        raise ValueError(f"{path}, the file of the task {label}, is missing: fetch the bundle again, or leave the task out of core.yaml")
    data = path.read_bytes()
    items = tuple(read_item(line, kind, f"line {number} of {path}") for number, line in enumerate(data.splitlines(), 1) if line.strip())
    if len(set(items)) <= shots:
        raise ValueError(f"{path} holds {len(set(items))} different rows, but each needs {shots} others as examples: lower num_fewshot of {label}")
    return CoreTask(label, kind, shots, baseline, items, hashlib.sha256(data).hexdigest(), text("continuation_delimiter", " "),
                    text("example_delimiter", "\n"), text("prompt_string", ""))


def read_item(line, kind, where):
    """A line of a task's file -> Item. Texts lose the white space around them, as in llm-foundry: it belongs to the delimiters."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise ValueError(f"{where} is not a JSON object ({line[:60]!r}): fetch the bundle again")

    def texts(name, several):
        value = row.get(name)
        value = value if several else [value]
        if not isinstance(value, list) or len(value) < 1 + several or not all(isinstance(text, str) for text in value):
            raise ValueError(f"{where} has the {name} {str(row.get(name))[:60]!r}: it must be {'a list of two or more texts' if several else 'a text'}")
        return tuple(text.strip() for text in value)

    if kind == "language_modeling":
        item = Item(texts("context", False), texts("continuation", False))
    else:
        item = Item(texts("query", False), texts("choices", True)) if kind == "multiple_choice" else \
            Item(texts("context_options", True), texts("continuation", False))
        gold, count = row.get("gold"), max(len(item.contexts), len(item.continuations))
        if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < count:
            raise ValueError(f"{where} says that choice {gold!r} of {count} is right: gold must be a number from 0 to {count - 1}")
        item = Item(item.contexts, item.continuations, gold)
    if not all(item.continuations) or kind == "schema" and not all(item.contexts):
        raise ValueError(f"{where} has an empty {'text' if kind == 'schema' else 'continuation'}: there would be nothing to score")
    return item


# -- finding and fetching ---------------------------------------------------------------------------------------------

def find_bundle(source=None, sha256=""):
    """The folder of a bundle. `source` is a folder, a zip file, the URL of a zip, or hub:NAME of a data set on the Hub; None = eval_bundle in
    the base directory, fetched from where it is published if it is not there. Of a zip, `sha256` is checked where given."""
    if source is None:
        folder = base_dir() / "eval_bundle"
        return folder if (folder / "core.yaml").is_file() else fetch_zip(PUBLISHED_URL, folder, sha256)
    if source.startswith("hub:"):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError
        try:
            folder = snapshot_download(source[4:], repo_type="dataset", allow_patterns=["**core.yaml", "**eval_meta_data.csv", "**eval_data/**"])
        except (HfHubHTTPError, OSError, ValueError) as error:
            raise ValueError(f"the data set {source[4:]} cannot be fetched from the Hub ({str(error).strip().splitlines()[0]}): check its name and HF_TOKEN") from error
        return root_of(Path(folder))
    if source.startswith(("http://", "https://")):
        folder = base_dir() / "eval_bundles" / hashlib.sha256(source.encode()).hexdigest()[:12]
        return folder if (folder / "core.yaml").is_file() else fetch_zip(source, folder, sha256)
    path = Path(source).expanduser()
    if path.is_file():
        digest = sha256_of(path)
        check_digest(path, digest, sha256)
        folder = base_dir() / "eval_bundles" / digest[:12]
        return folder if (folder / "core.yaml").is_file() else unpack(path, folder)
    if not path.is_dir():
        raise ValueError(f"{source} is neither a folder nor a zip file: give the eval bundle, its URL, or hub:NAME")
    return root_of(path)


def root_of(folder):
    """The folder itself or the one below it that holds core.yaml: a zip of a folder has it one level down."""
    found = sorted(folder.glob("core.yaml")) or sorted(folder.glob("*/core.yaml"))
    if len(found) != 1:
        raise ValueError(f"{folder} holds {len(found)} files core.yaml: an eval bundle has one, beside eval_data/")
    return found[0].parent


def fetch_zip(url, folder, sha256=""):
    """Download a zip and unpack it as `folder`, which appears only when all is there and checked -> folder."""
    import requests
    archive = folder.with_name(f"{folder.name}.zip.partial")
    archive.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with requests.get(url, stream=True, timeout=60, headers={"Accept-Encoding": "identity"}) as reply, open(archive, "wb") as file:
                reply.raise_for_status()
                for piece in reply.iter_content(2**20):
                    file.write(piece)
                expected = reply.headers.get("Content-Length")
            if expected is not None and archive.stat().st_size != int(expected):
                raise OSError(f"{archive.stat().st_size} bytes arrived instead of {expected}")
            break
        except (requests.RequestException, OSError) as error:
            archive.unlink(missing_ok=True)
            status = getattr(getattr(error, "response", None), "status_code", 0) or 0
            if attempt == ATTEMPTS or 400 <= status < 500:
                raise ValueError(f"the eval bundle at {url} could not be fetched in {attempt} attempts ({type(error).__name__}: {str(error)[:200]}): "
                                 "fetch it by hand and give the zip or its folder by --bundle") from error
    try:
        check_digest(url, sha256_of(archive), sha256)
        return unpack(archive, folder)
    finally:
        archive.unlink(missing_ok=True)


def check_digest(name, digest, expected):
    if expected and digest != expected.lower():
        raise ValueError(f"{name} has the SHA-256 {digest}, not {expected}: it is torn, changed, or another version")


def unpack(archive, folder):
    """A zip -> `folder`, with a file SHA256SUMS of what it held. Nothing is written outside it; what is no bundle leaves nothing behind."""
    staging = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        with zipfile.ZipFile(archive) as content:
            members = [member for member in content.infolist() if not member.is_dir()]
            size = sum(member.file_size for member in members)
            if size > MAX_UNPACKED:
                raise ValueError(f"{archive} would unpack to {size:,} bytes, more than {MAX_UNPACKED:,}: it is no eval bundle")
            for member in members:
                parts = PurePosixPath(member.filename).parts
                if member.filename.startswith("/") or ".." in parts or "\\" in member.filename or stat.S_ISLNK(member.external_attr >> 16):
                    raise ValueError(f"{archive} holds {member.filename!r}, a link or a path that leads out of its folder: do not use this file")
                target = staging.joinpath(*parts)
                target.parent.mkdir(parents=True, exist_ok=True)
                with content.open(member) as source, open(target, "wb") as file:  # reading checks the CRC
                    shutil.copyfileobj(source, file, 2**20)
        root = root_of(staging)
        sums = "".join(f"{sha256_of(path)}  {path.relative_to(root)}\n" for path in sorted(root.rglob("*")) if path.is_file())
        write_atomic(root / "SHA256SUMS", sums)
        shutil.rmtree(folder, ignore_errors=True)       # an older, incomplete one
        root.rename(folder)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError) as error:
        raise ValueError(f"{archive} cannot be unpacked ({type(error).__name__}: {error}): fetch it again") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder
