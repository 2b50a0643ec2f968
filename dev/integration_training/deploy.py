"""Run an experiment from its configuration file: on this machine, or over SSH on another.

    python dev/integration_training/deploy.py configs/01_debug_sft_rl_cpu.py
    python dev/integration_training/deploy.py configs/01_debug_sft_rl.py --ssh=ubuntu@10.0.0.5:22 --ssh-key=~/.ssh/id_ed25519

What is run (SFT, RL or both), on which GPUs and where the results go is in the file, not here. Run the same command again and the experiment goes on
where it stopped; a folder that holds another configuration is refused. With --ssh the working tree as it lies here goes over into a folder
of its own, runs there in tmux, where it survives a lost connection, and what it left comes back into the same folder as a local run's.
"""
import runpy
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

HERE, ROOT = Path(__file__).resolve().parent, Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from nanochat.common import env  # noqa: E402
from nanochat.configurator import parse  # noqa: E402
from dev.integration_training.base_config import Config as Experiment, load  # noqa: E402


@dataclass(frozen=True)
class Config:
    """Run an experiment: python dev/integration_training/deploy.py configs/NAME.py"""
    experiment: str                    # the configuration, as first or last argument: a .py file with `config = Config(...)`, or a .json
    ssh: str = ""                      # user@host or user@host:port to run on ("" = here)
    ssh_key: str | None = None         # private key (None = what ssh itself would use)
    remote_python: str = ""            # python there that has this project's packages ("" = install them there first, by scripts/bootstrap.sh)
    detached: bool = False             # with --ssh: leave when it has started; the same command later attaches to it and fetches
    env_file: str = ".env"             # with --ssh: KEY=value lines, HF_TOKEN for example, that the machine gets over ssh's stdin ("" = none)
    max_hours: float = 24.0            # with --ssh: how long to follow it
    poll_seconds: float = 10.0         # with --ssh: between looks at its log
    tmux_socket: str = ""              # with --ssh: tmux -L of that name there


def main(config):
    experiment = read_config(find(config.experiment))
    if config.ssh:
        from dev.integration_training.remote import deploy  # openssh is needed here only
        return deploy(config, experiment, results_folder(experiment))
    return run_here(experiment)


def named(arguments):
    """The first argument, or else the last, is the configuration where it is no flag."""
    place = next((place for place in (0, -1) if arguments and not arguments[place].startswith("-")), None)
    if place is None:
        return arguments
    arguments = list(arguments)
    return [f"--experiment={arguments.pop(place)}", *arguments]


def find(name):
    """A path as given, or below dev/integration_training."""
    for path in (Path(name).expanduser(), HERE / name, HERE / "configs" / name):
        if path.is_file():
            return path
    there = sorted(path.name for path in (HERE / "configs").glob("*.py"))
    raise ValueError(f"{name} is no file, neither here nor in {HERE.relative_to(ROOT)}: the {len(there)} configurations there are {', '.join(there)}")


def read_config(path):
    if path.suffix == ".json":
        return load(path)
    experiment = runpy.run_path(str(path)).get("config")
    if not isinstance(experiment, Experiment):
        raise ValueError(f"{path} defines config as {type(experiment).__name__}: it must hold `config = Config(...)`, see dev/integration_training/configs")
    return experiment


def results_folder(experiment):
    return HERE / Path(experiment.output.save_dir).expanduser() / experiment.output.experiment_name


def run_here(experiment):
    """-> the exit status of the training processes, which are this one's children: CUDA must not have been touched before it is told its devices."""
    check_devices(experiment)
    folder = results_folder(experiment)
    prepare_results(folder, experiment)
    print(f"{experiment.output.mode} on {experiment.target.device_type} {experiment.target.gpu_ranks}, results in {folder}", flush=True)
    return subprocess.run(command(experiment, folder), cwd=ROOT).returncode


def check_devices(experiment):
    """ValueError where the GPUs asked for are not here."""
    if experiment.target.device_type != "cuda":
        return
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
        count = len(listed.stdout.splitlines()) if listed.returncode == 0 else 0
    except FileNotFoundError:
        count = 0
    if max(experiment.target.gpu_ranks) >= count:
        raise ValueError(f"gpu_ranks={experiment.target.gpu_ranks}, but nvidia-smi shows {count} GPUs here: choose others, run it elsewhere with --ssh, or try its "
                         "CPU-sized twin, configs/01_debug_sft_rl_cpu.py")


def prepare_results(folder, experiment):
    """config.json beside the results. ValueError where the folder holds another experiment's."""
    stored = folder / "config.json"
    if stored.is_file():
        if same_run(load(stored)) != same_run(experiment):
            raise ValueError(f"{folder} holds the results of another configuration ({stored}): choose another experiment_name, or move the folder away")
    else:
        experiment.save(stored)


def same_run(experiment):
    """Without what only says how to watch it and where: that may differ between a run and its continuation."""
    output = replace(experiment.output, log_level="info", save_dir="", use_wandb=False, wandb_project=None)
    return replace(experiment, output=output, target=replace(experiment.target, gpu_ranks=(0,)))


def command(experiment, folder):
    """The argument list that trains: one process, or torchrun's one for each rank."""
    ranks = experiment.target.gpu_ranks
    variables = [f"NANOCHAT_BASE_DIR={folder}"]
    if experiment.target.device_type == "cuda":
        variables.append(f"CUDA_VISIBLE_DEVICES={','.join(map(str, ranks))}")
    if experiment.output.use_wandb:
        variables.append(f"WANDB_PROJECT={experiment.output.wandb_project}")
    if len(ranks) > 1 and env("OMP_NUM_THREADS") is None:
        variables.append("OMP_NUM_THREADS=1")
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={len(ranks)}"] if len(ranks) > 1 else []
    experiment.save(folder / "run.json")  # what is run now; config.json is what was asked for first
    return ["env", *variables, sys.executable, *launcher, str(HERE / "train.py"), str(folder / "run.json")]


if __name__ == "__main__":
    sys.exit(main(parse(Config, named(sys.argv[1:]))))
