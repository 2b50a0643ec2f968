"""Rent a machine at Lambda, train there, fetch the results, terminate it.

    export LAMBDA_API_KEY=...                               # or in .env
    python -m scripts.launch_lambda_training --list
    python -m scripts.launch_lambda_training --ssh-key-name=laptop --instance-type=gpu_8x_h100_sxm5 --region=us-west-1 --auto-start --inject-env WANDB_API_KEY
    python -m scripts.launch_lambda_training --status       # what is billing, orphans too; --terminate, --attach, --watch take it from there

The launcher stays and watches; the instance does not outlive it: Ctrl-C, an error, a lost connection, the deadline and idleness all end in
terminate. --detach leaves the run on its own after its first training line. LAMBDA_MANUAL_SETUP.md has the same by hand.
"""
import sys
from dataclasses import dataclass

from nanochat.cloud.lambda_cloud import USER_DATA, LambdaCloud
from nanochat.cloud.orders import bare_flags, find_key, main as carry_out
from nanochat.configurator import parse


@dataclass(frozen=True)
class Config:
    """Rent a machine at Lambda, train there, fetch the results, terminate it."""
    # What to rent
    instance_type: str = "gpu_1x_a10"   # --list shows all of them
    region: str = ""                    # where ("" = wherever there is capacity)
    fallback_regions: tuple[str, ...] = ()  # in this order when --region has no capacity; "any" = everywhere else
    capacity_minutes: float = 0.0       # how long to wait for capacity
    max_price: float = -1.0             # most dollars per hour for the whole instance (-1 = any)
    ssh_key_name: str = ""              # name of your key in the account ("" = the only one there is)
    ssh_key: str = ""                   # file of its private part ("" = ssh's own choice, the agent's too)
    ssh_user: str = "ubuntu"            # user on the machine
    ssh_port: int = 22                  # its ssh port
    name: str = "nanochat-train"        # the instance's name; a random ending is added, by which it is found again
    quantity: int = 1                   # the API rents one at a time; anything else is refused
    image_id: str = ""                  # image by id
    image_family: str = ""              # image by family
    file_systems: tuple[str, ...] = ()  # names of persistent file systems to mount
    # What to run
    auto_start: bool = False            # start the run script in tmux; without it the machine is only made ready
    run_script: str = "run_aquarat_small.sh"  # path in the repository
    repo_url: str = ""                  # clone this there ("" = send the working tree as it is here)
    branch: str = ""                    # with --repo-url: branch, tag or commit to check out; without: what to send instead of the working tree
    commit: str = ""                    # send this commit instead of the working tree
    repo_dir: str = "nanochatAquaRat"   # folder on the machine, below the home folder; the log is training.log in it
    tmux_session: str = "nanochat-train"  # its name
    tmux_socket: str = ""               # tmux -L ("" = the usual one)
    no_deploy: bool = False             # send nothing
    no_user_data: bool = False          # do not ask cloud-init for packages
    print_user_data: bool = False       # show what cloud-init is asked for, and end
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
    max_wait_minutes: float = 25.0      # for the instance to run and let us in
    poll_seconds: float = 20.0          # between looks
    settle_seconds: float = 60.0        # so long a new instance may be missing in the API's list
    terminate_minutes: float = 10.0     # how long to repeat terminate before giving up loudly
    # Results
    artifacts: str = "weights"          # none, report (logs, reports, tokenizer), weights (and the newest models), all (and every checkpoint)
    fetch_minutes: float = 30.0         # for all of them
    # Leaving it alone
    detach: bool = False                # end here after the first training line; the instance stays and bills
    skip_wait: bool = False             # end here right after renting; the instance stays and bills
    # Instead of renting
    list: bool = False                  # show types, prices and free regions
    dry_run: bool = False               # say what would be rented and sent, and end
    status: bool = False                # show what is rented and what it has cost; exit status 3 if nobody watches it
    terminate: str = ""                 # a rental's name, an instance's id, `all`, or nothing when there is only one
    attach: str = ""                    # the same: its tmux session in this terminal
    watch: str = ""                     # the same: follow it to its end, fetch, terminate
    # The account
    api_key: str = ""                   # better: LAMBDA_API_KEY in the environment or in .env
    api_url: str = ""                   # another server that speaks this API


def main(config):
    if config.print_user_data:
        print(USER_DATA, end="")
        return 0
    if config.quantity != 1:
        raise ValueError(f"quantity={config.quantity}: Lambda's API rents one instance a time, and so does this: run it {max(2, config.quantity)} times")
    if config.image_id and config.image_family:
        raise ValueError("image_id and image_family are both given: the API takes one of them")
    key = find_key(config, "LAMBDA_API_KEY")
    if not key:
        raise ValueError("LAMBDA_API_KEY is not set: make a key at https://cloud.lambda.ai/api-keys and export it, or write it into .env")
    return carry_out(LambdaCloud, config, key)


if __name__ == "__main__":
    raise SystemExit(main(parse(Config, bare_flags(sys.argv[1:], "--terminate", "--attach", "--watch"))))
