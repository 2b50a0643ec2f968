"""End the rented machine that this very process runs on, through its cloud's API. Shutting its system down would not end the bill.

It must be certain which instance that is: the one named by its id; or at Lambda the one that carries the name of the rental whose launcher prepared
this machine (~/.nanochat-cloud/NAME), or whose address is this machine's host name. In doubt nothing is terminated and the command is printed.
"""
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from nanochat.cloud import launch, shipping
from nanochat.cloud.api import NoAnswer, Refused
from nanochat.cloud.hyperbolic import Hyperbolic
from nanochat.cloud.lambda_cloud import LambdaCloud
from nanochat.cloud.launch import Job
from nanochat.cloud.ledger import Record
from nanochat.cloud.session import Failed
from nanochat.cloud.signals import Interrupted, Signals, say
from nanochat.cloud.ssh import ConnectionLost, RemoteError
from nanochat.common import env

CLOUDS = {"LAMBDA_API_KEY": LambdaCloud, "HYPERBOLIC_API_KEY": Hyperbolic}


@dataclass(frozen=True)
class Settings:
    """The knobs that the clouds and launch.end read of a launcher's Config."""
    api_url: str = ""
    ssh_user: str = "ubuntu"
    ssh_port: int = 22
    gpu_count: int = 1
    terminate_minutes: float = 10.0
    settle_seconds: float = 0.0


def terminate_here(instance_id="", api_url=""):
    """-> exit status: 0 once the cloud's list shows this machine as ended, 3 with loud lines where it goes on billing."""
    keys = {variable: env(variable) or shipping.read_env_file(".env").get(variable, "") for variable in CLOUDS}
    names = rental_names()
    if not any(keys.values()):
        return still_billing("no LAMBDA_API_KEY or HYPERBOLIC_API_KEY is set on this machine, which is as it should be", instance_id or (names[0] if len(names) == 1 else ""))
    problem = ""
    with Signals() as signals:
        for cloud in (CLOUDS[variable](Settings(api_url), key, signals) for variable, key in keys.items() if key):
            try:
                instances = [instance for instance in cloud.instances() if not instance.is_over]
                mine = [instance for instance in instances if is_this_machine(instance, instance_id, names)]
                if len(mine) == 1:
                    one = mine[0]
                    record = Record(f"here-{one.id}", cloud.name, cloud.url, "rented", one.id, one.kind, one.region, cents_per_hour=one.cents_per_hour or 0.0,
                                    requested_at=one.created or time.time(), seen=True)
                    return 0 if launch.end(Job(cloud, cloud.config, signals, record)) else launch.LEFT_BEHIND
                problem += f"{len(mine)} of {cloud.name}'s {len(instances)} instances are certainly this machine; "
            except (Refused, NoAnswer, Failed, ConnectionLost, RemoteError, Interrupted, ValueError) as error:
                problem += f"{cloud.name}: {error}; "
    return still_billing(problem.removesuffix("; "), instance_id)


def rental_names():
    """The names of the rentals whose launcher prepared this machine."""
    return sorted(path.name for path in (Path.home() / ".nanochat-cloud").glob("*") if path.is_dir())


def is_this_machine(instance, instance_id, names, host=None):
    if instance_id:
        return instance.id == instance_id
    host = host or socket.gethostname()
    return bool(instance.name) and instance.name in names or bool(instance.host) and host in (instance.host, instance.host.replace(".", "-"))


def still_billing(problem, instance=""):
    bar = "!" * 100
    for line in (bar, f"THIS MACHINE WAS NOT TERMINATED AND GOES ON BILLING IF IT IS RENTED: {problem}.",
                 "Shutting its system down does not end the bill. On your own machine, where the cloud's key is:",
                 f"    python -m {LambdaCloud.module} --terminate={instance or 'ID'}", f"    python -m {Hyperbolic.module} --terminate={instance or 'ID'}",
                 f"whichever cloud it is at; --status shows the id. Or {LambdaCloud.console} or {Hyperbolic.console}", bar):
        say(line)
    return launch.LEFT_BEHIND
