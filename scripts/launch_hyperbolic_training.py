"""Rent GPUs on Hyperbolic's spot marketplace, train there, fetch the results, terminate the rental.

    python -m scripts.launch_hyperbolic_training --list                     # no key needed
    export HYPERBOLIC_API_KEY=...                                           # or in .env
    python -m scripts.launch_hyperbolic_training --gpu-count=8 --max-price=20 --auto-start --inject-env WANDB_API_KEY
    python -m scripts.launch_hyperbolic_training --status                   # what is billing, orphans too; --terminate, --attach, --watch

The launcher stays and watches; the rental does not outlive it: Ctrl-C, an error, a lost connection, the deadline and idleness all end in
terminate. --detach leaves the run on its own after its first training line. Prices are dollars an hour for all GPUs of the rental together.
"""
import sys
from dataclasses import dataclass, replace

from nanochat.cloud.hyperbolic import Hyperbolic
from nanochat.cloud.orders import bare_flags, find_key, main as carry_out
from nanochat.configurator import parse


@dataclass(frozen=True)
class Config:
    """Rent GPUs on Hyperbolic's spot marketplace, train there, fetch the results, terminate the rental."""
    # What to rent
    gpu_count: int = 1                  # GPUs of one node
    gpu_model: str = ""                 # part of the model's name, such as H100 ("" = any)
    region: str = ""                    # one of the marketplace's own region names, see --list ("" = any; else HYPERBOLIC_REGION)
    fallback_regions: tuple[str, ...] = ()  # in this order when --region has nothing free; "any" = everywhere else
    supplier: str = ""                  # one supplier
    node_name: str = ""                 # this very node
    cluster_name: str = ""              # this cluster
    capacity_minutes: float = 0.0       # how long to wait until something matching is free
    max_price: float = -1.0             # most dollars per hour for the whole rental, all its GPUs (-1 = any; else HYPERBOLIC_MAX_PRICE)
    ssh_key: str = ""                   # private part of the key that the account knows ("" = ssh's own choice, the agent's too)
    ssh_user: str = "ubuntu"            # user on the machine where the marketplace names none
    name: str = "nanochat-train"        # the rental's name in the records here
    # What to run
    auto_start: bool = False            # start the run script in tmux; without it the machine is only made ready
    run_script: str = "run_aquarat_small.sh"  # path in the repository
    repo_url: str = ""                  # clone this there ("" = send the working tree as it is here)
    branch: str = ""                    # with --repo-url: branch, tag or commit to check out; without: what to send instead of the working tree
    commit: str = ""                    # send this commit instead of the working tree
    repo_dir: str = "nanochatAquaRat"   # folder on the machine, below the home folder; the log is training.log in it
    tmux_session: str = "training"      # its name
    tmux_socket: str = ""               # tmux -L ("" = the usual one)
    no_deploy: bool = False             # send nothing
    # Variables, over ssh's stdin
    env: tuple[str, ...] = ()           # KEY=VALUE for the run; can be seen in the process list here
    inject_env: tuple[str, ...] = ()    # names of variables to copy from here
    env_file: str = ".env"              # file whose variables go over too, but for cloud keys and folders ("" = none)
    env_file_name: str = ".env"         # its name in the repository there
    # Limits
    max_hours: float = 12.0             # deadline: terminate that many hours after the request
    idle_minutes: float = 60.0          # terminate when the log has not grown, no GPU worked and nobody was logged in for so long
    lost_minutes: float = 15.0          # terminate after so long without a connection
    start_minutes: float = 90.0         # terminate when no training line has come by then
    start_pattern: str = r"^\w+ step \d+"  # what a training line looks like
    max_wait_minutes: float = 25.0      # for the rental to run and let us in
    poll_seconds: float = 20.0          # between looks
    settle_seconds: float = 60.0        # so long a new rental may be missing in the list
    terminate_minutes: float = 10.0     # how long to repeat terminate before giving up loudly
    # Results
    artifacts: str = "weights"          # none, report (logs, reports, tokenizer), weights (and the newest models), all (and every checkpoint)
    fetch_minutes: float = 30.0         # for all of them
    # Leaving it alone
    detach: bool = False                # end here after the first training line; the rental stays and bills
    skip_wait: bool = False             # end here right after renting; the rental stays and bills
    # Instead of renting
    list: bool = False                  # show nodes, prices and regions that match
    dry_run: bool = False               # say what would be rented and sent, and end
    status: bool = False                # show what is rented and what it has cost; exit status 3 if nobody watches it
    terminate: str = ""                 # a rental's name or id, `all`, or nothing when there is only one
    attach: str = ""                    # the same: its tmux session in this terminal
    watch: str = ""                     # the same: follow it to its end, fetch, terminate
    # The account
    api_key: str = ""                   # better: HYPERBOLIC_API_KEY in the environment or in .env
    api_url: str = ""                   # another server that speaks this API


def main(config):
    if config.gpu_count < 1:
        raise ValueError(f"gpu_count={config.gpu_count}: rent at least 1 GPU")
    if not config.region and (region := find_key(replace(config, api_key=""), "HYPERBOLIC_REGION")):
        config = replace(config, region=region)
    if config.max_price < 0 and (price := find_key(replace(config, api_key=""), "HYPERBOLIC_MAX_PRICE")):
        config = replace(config, max_price=float(price))
    key = find_key(config, "HYPERBOLIC_API_KEY")
    if not key and not config.list:
        raise ValueError("HYPERBOLIC_API_KEY is not set: make a key at https://app.hyperbolic.ai/settings and export it, or write it into .env")
    return carry_out(Hyperbolic, config, key)


if __name__ == "__main__":
    raise SystemExit(main(parse(Config, bare_flags(sys.argv[1:], "--terminate", "--attach", "--watch"))))
