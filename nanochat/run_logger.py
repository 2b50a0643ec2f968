"""Where a run's numbers go: a progress bar or plain lines on the console, always a JSONL file, and W&B if asked for.

The file is base_dir()/runs/<stage>_<model_tag>.jsonl: a header with the config, then one object per call of `log`. It is
what the report reads. Only rank 0 writes; on the others every call does nothing. The only file that imports wandb.
"""
import atexit
import json
import math
import sys
import time

from nanochat.common import base_dir, env, write_atomic
from nanochat.configurator import config_dict

PLAIN_SECONDS = 10  # between plain lines when stdout is not a terminal; evaluations are always printed
MAX_SHOWN = 7       # metrics on a console line; the file has all of them


class RunLogger:
    """log(step, {"train/loss": 2.3, "val/bpb": 1.1}) to console, JSONL and W&B; close() at the end.

    `resume_step` is the last step whose lines stay in the file. Without it a run starts the file anew; the old one keeps
    one generation, under the ending .jsonl.1.
    """

    def __init__(self, stage, config, compute, total_steps=None, resume_step=None, model_tag=None):
        self.is_master, self.total_steps = compute.is_master, total_steps
        if not self.is_master:
            return
        self.stage = stage
        self.model_tag = model_tag or getattr(config, "model_tag", None) or f"d{getattr(config, 'depth', 0)}"
        self.path = base_dir() / "runs" / f"{stage}_{self.model_tag}.jsonl"
        header = open_log(self.path, resume_step)
        self.wandb = start_wandb(stage, self.model_tag, config, header.get("wandb_id"))
        self.file = open(self.path, "a", encoding="utf-8", buffering=1)  # line by line: a killed run loses nothing it logged
        self.write({"stage": stage, "model_tag": self.model_tag, "time": time.time(), "total_steps": total_steps, "resumed_at": resume_step,
                    "wandb_id": self.wandb.id if self.wandb else None, "config": config_dict(config)})
        self.console = Bar(stage, total_steps) if sys.stdout.isatty() else PlainLines(stage, total_steps)
        atexit.register(self.close)  # a run that dies must not leave the terminal without a cursor

    def log(self, step, metrics):
        """Numbers by name. What is not finite becomes null in the file, under a list of the names it happened to."""
        if not self.is_master:
            return
        metrics = {name: plain(value) for name, value in metrics.items()}
        broken = [name for name, value in metrics.items() if not is_finite(value)]
        record = {"step": step, "time": time.time(), **{name: None if name in broken else value for name, value in metrics.items()}}
        self.write({**record, "non_finite": broken} if broken else record)
        self.console.show(step, metrics)
        if self.wandb:
            self.wandb.log({"step": step, **metrics})

    def log_text(self, step, name, text):
        """A text, or a table given as a list of dicts with the same keys."""
        if not self.is_master:
            return
        self.write({"step": step, "time": time.time(), "text": {name: text}})
        rows = [{"text": text}] if isinstance(text, str) else text
        if isinstance(text, str):
            self.console.say(f"-- {name} at step {step}\n{visible(text)}")
        if self.wandb and rows:
            import wandb
            self.wandb.log({"step": step, name: wandb.Table(columns=list(rows[0]), data=[[str(cell) for cell in row.values()] for row in rows])})

    def log_image(self, step, name, path):
        """A picture by the path of its file, which the JSONL refers to and W&B gets a copy of."""
        if not self.is_master:
            return
        self.write({"step": step, "time": time.time(), "image": {name: str(path)}})
        if self.wandb:
            import wandb
            self.wandb.log({"step": step, name: wandb.Image(str(path))})

    def close(self):
        if not self.is_master or self.file.closed:
            return
        self.console.close()
        self.file.close()
        if self.wandb:
            self.wandb.finish()
        atexit.unregister(self.close)

    def write(self, record):
        self.file.write(json.dumps(record, ensure_ascii=False) + "\n")


# -- the file ---------------------------------------------------------------------------------------------------------

def open_log(path, resume_step):
    """Make the file ready for appending -> the header of the run that goes on, {} for a new one."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        return {}
    if resume_step is None:
        path.replace(path.with_name(path.name + ".1"))
        return {}
    records = read_log(path)
    kept = [record for record in records if record.get("step", -1) <= resume_step]
    write_atomic(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept))
    return next((record for record in kept if "config" in record), {})


def read_log(path):
    """A run's JSONL -> its records. A last line that was cut off when the run was killed is left out."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def plain(value):
    """A number of any library -> Python's; containers by their elements."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return value.tolist()  # torch and numpy scalars and arrays alike


def is_finite(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return all(is_finite(item) for item in value)
    return not isinstance(value, float) or math.isfinite(value)


# -- W&B --------------------------------------------------------------------------------------------------------------

def start_wandb(stage, model_tag, config, run_id):
    """A W&B run, or None for run="dummy". Without a key or a network it is recorded offline, after one warning; it never stops a run."""
    name = getattr(config, "run", "dummy")
    if name == "dummy":
        return None
    import wandb  # half a second, so only for those who ask
    settings = {"project": env("WANDB_PROJECT", "nanochat-aquarat"), "entity": env("WANDB_ENTITY"), "name": f"{name}-{stage}", "group": name,
                "job_type": stage, "tags": [stage, model_tag], "dir": str(base_dir()), "config": config_dict(config)}
    settings |= {"id": run_id, "resume": "allow"} if run_id else {}

    def start(mode):
        # console off: it would store every frame of the progress bar
        run = wandb.init(mode=mode, settings=wandb.Settings(silent=True, console="off", init_timeout=30), **settings)
        run.define_metric("*", step_metric="step")  # our steps, which a resumed run may repeat, on every x axis
        return run

    mode, problem = env("WANDB_MODE", "online"), None
    try:
        if mode == "online" and not wandb.login(prompt=False, verify=False):  # never ask: nobody may be watching
            problem = "there is no API key (WANDB_API_KEY, or `wandb login`)"
        else:
            return start(mode)
    except (wandb.Error, ValueError) as error:  # ValueError: a variable it cannot read, such as an empty WANDB_MODE
        problem = str(error).splitlines()[0]
    try:
        run = start("offline")
    except (wandb.Error, ValueError):
        print(f"W&B: {problem}. This run goes on without W&B; its numbers are in the JSONL file", flush=True)
        return None
    print(f"W&B: {problem}. This run is recorded offline; send it later with `wandb sync {base_dir()}/wandb/offline-run-*`", flush=True)
    return run


# -- the console ------------------------------------------------------------------------------------------------------

class PlainLines:
    """One line every few seconds, for logs and pipes: the first step, the last and every evaluation are among them."""

    def __init__(self, stage, total_steps):
        self.stage, self.total_steps = stage, total_steps
        self.first, self.began, self.printed = None, time.perf_counter(), -math.inf

    def show(self, step, metrics):
        if self.first is None:
            self.first, self.began = step, time.perf_counter()
        now = time.perf_counter()
        measured = is_evaluation(metrics)
        is_last = self.total_steps is not None and step >= self.total_steps - 1
        if not measured and not is_last and now - self.printed < PLAIN_SECONDS:
            return
        if not measured:
            self.printed = now
        place = f"step {step}" + (f"/{self.total_steps} ({100 * step / max(1, self.total_steps):.0f} %)" if self.total_steps else "")
        print(" | ".join([f"{self.stage} {place}", *shown(metrics), *self.time_left(step, now)]), flush=True)

    def time_left(self, step, now):
        if not self.total_steps or step <= self.first:
            return []
        return [f"{clock((self.total_steps - step) * (now - self.began) / (step - self.first))} left"]

    def say(self, text):
        print(text, flush=True)

    def close(self):
        pass


class Bar:
    """A progress bar with the time left and the newest numbers, for a terminal."""

    def __init__(self, stage, total_steps):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        self.progress = Progress(TextColumn("[bold]{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(),
                                 TimeRemainingColumn(), TextColumn("{task.fields[metrics]}"), refresh_per_second=4)
        self.task = self.progress.add_task(stage, total=total_steps, metrics="")
        self.started = False

    def show(self, step, metrics):
        if not self.started:  # here and not before: a resumed run starts in the middle, and compiling is no step
            self.progress.update(self.task, completed=step)
            self.progress.start()
            self.started = True
        if is_evaluation(metrics):
            self.say(f"step {step} | " + " | ".join(shown(metrics)))
        self.progress.update(self.task, completed=step, metrics=" | ".join(shown(metrics)[:4]))

    def say(self, text):
        self.progress.console.print(text, markup=False, highlight=False)

    def close(self):
        if self.started:
            self.progress.stop()


def is_evaluation(metrics):
    return any(name.startswith(("val/", "eval/")) for name in metrics)


def shown(metrics):
    """The first few metrics as short texts, in the order in which the script gave them."""
    texts = [f"{name.removeprefix('train/')} {short(value)}" for name, value in metrics.items() if isinstance(value, (int, float))]
    return texts[:MAX_SHOWN] + ([f"+{len(texts) - MAX_SHOWN} in the file"] if len(texts) > MAX_SHOWN else [])


def visible(text):
    """Text of a model's making, fit to be shown: control characters become their pictures, since some steer terminals and break HTML."""
    return "".join(chr(0x2400 + ord(char)) if char < " " and char not in "\n\t" else "\ufffd" if "\x7f" <= char <= "\x9f" else char for char in text)


def short(value):
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def clock(seconds):
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
