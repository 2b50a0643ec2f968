"""One command: a machine at Lambda that trains, and is terminated when the training has ended.

    python launch_lambda.py --list-types
    python launch_lambda.py --instance-type=gpu_8x_h100_sxm5 --region=us-west-1

The short form of scripts/launch_lambda_training.py, which has all the knobs: the run starts by itself, WANDB_API_KEY goes along if it is set.
"""
import sys
from dataclasses import dataclass

from nanochat.cloud.orders import bare_flags
from nanochat.common import env
from nanochat.configurator import parse
from scripts import launch_lambda_training


@dataclass(frozen=True)
class Config:
    """Train at Lambda with one command."""
    instance_type: str = "gpu_8x_h100_sxm5"  # --list-types shows all of them
    region: str = ""                    # where ("" = wherever there is capacity)
    name: str = "nanochat-train"        # the instance's name; a random ending is added
    ssh_key_name: str = ""              # name of your key in the account ("" = the only one there is)
    ssh_key: str = ""                   # file of its private part ("" = ssh's own choice)
    max_price: float = -1.0             # most dollars per hour for the whole instance (-1 = any)
    no_deploy: bool = False             # only rent it, send and start nothing
    list_types: bool = False            # show types, prices and free regions
    dry_run: bool = False               # say what would be rented and sent, and end
    status: bool = False                # show what is rented and what it has cost
    terminate: str = ""                 # a rental's name, an instance's id, `all`, or nothing when there is only one
    attach: str = ""                    # the same: its tmux session in this terminal


def main(config):
    inject = ("WANDB_API_KEY",) if env("WANDB_API_KEY") else ()
    return launch_lambda_training.main(launch_lambda_training.Config(
        instance_type=config.instance_type, region=config.region, name=config.name, ssh_key_name=config.ssh_key_name, ssh_key=config.ssh_key,
        max_price=config.max_price, no_deploy=config.no_deploy, auto_start=not config.no_deploy, inject_env=inject, list=config.list_types,
        dry_run=config.dry_run, status=config.status, terminate=config.terminate, attach=config.attach))


if __name__ == "__main__":
    raise SystemExit(main(parse(Config, bare_flags(sys.argv[1:], "--terminate", "--attach"))))
