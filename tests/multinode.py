"""Two machines on one: network namespaces joined by a virtual cable, and torchrun in each of them, for the tests of several ranks and nodes."""
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PORT = 29400  # free in a namespace that has just been made


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True, timeout=60)


@contextmanager
def two_nodes():
    """-> [(namespace, interface, address)] of two nodes that reach each other and nothing else. Skips, with the reason, where that cannot be."""
    if not shutil.which("ip"):
        pytest.skip("two nodes need network namespaces, and there is no `ip` (Debian: iproute2)")
    word = uuid.uuid4().hex[:8]
    nodes = [(f"nc-{word}-{i}", f"nc{word}{i}", f"10.99.0.{i + 1}") for i in (0, 1)]
    try:
        for namespace, _, _ in nodes:
            made = ip("netns", "add", namespace)
            if made.returncode:
                pytest.skip(f"two nodes need network namespaces, which need root: {made.stderr.strip()}")
        commands = [("link", "add", nodes[0][1], "type", "veth", "peer", "name", nodes[1][1])]
        for namespace, interface, address in nodes:
            commands += [("link", "set", interface, "netns", namespace), ("-n", namespace, "addr", "add", f"{address}/24", "dev", interface),
                         ("-n", namespace, "link", "set", "lo", "up"), ("-n", namespace, "link", "set", interface, "up")]
        for command in commands:
            done = ip(*command)
            if done.returncode:
                pytest.skip(f"two nodes need a virtual cable: `ip {' '.join(command)}` says {done.stderr.strip()}")
        yield nodes
    finally:
        for namespace, _, _ in nodes:
            ip("netns", "del", namespace)  # the cable goes with it


class Job:
    """torchrun on each node, all of one job, or, with nodes None, on this machine alone; `wait()` -> the return codes, output in `logs`."""
    runs = itertools.count()

    def __init__(self, nodes, log_dir, program, *torchrun_flags, environment=None, per_node=1):
        """`program`: module and its arguments."""
        nodes = nodes or [None]
        number = next(self.runs)
        self.processes, self.logs = [], [Path(log_dir) / f"job{number}_node{i}.log" for i in range(len(nodes))]
        for i, node in enumerate(nodes):
            variables = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **(environment or {})}
            prefix, where = [], ["--standalone"]
            if node:
                namespace, variables["GLOO_SOCKET_IFNAME"], address = node
                prefix = ["ip", "netns", "exec", namespace]
                where = [f"--nnodes={len(nodes)}", "--rdzv-id=job", "--rdzv-backend=c10d", f"--rdzv-endpoint={nodes[0][2]}:{PORT}",
                         f"--rdzv-conf=is_host={int(i == 0)}", f"--local-addr={address}"]
            command = [*prefix, sys.executable, "-m", "torch.distributed.run", *where, f"--nproc-per-node={per_node}", "--monitor-interval=0.2",
                       *torchrun_flags, "-m", *program]
            with open(self.logs[i], "w") as log:
                self.processes.append(subprocess.Popen(command, cwd=ROOT, env=variables, stdin=subprocess.DEVNULL, stdout=log, stderr=log))

    def output(self):
        return "\n".join(f"--- node {i}\n{log.read_text(errors='replace')}" for i, log in enumerate(self.logs))

    def wait(self, timeout=900):
        try:
            return [process.wait(timeout) for process in self.processes]
        finally:
            self.stop()

    def stop(self):
        for process in self.processes:
            if process.poll() is None:
                process.terminate()  # torchrun ends its ranks, then itself
        for process in self.processes:
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


# ---------------------------------------------------------------------------------------------------------------------
# Stages one after another in one process, in one of which a rank may die, once:
#     python -m tests.multinode '{"runs": [[FOLDER, STAGE, {"resume": true}], ...], "die": {"how": "kill", "rank": 1, "step": 3, "marker": FILE}}'

def die(how, marker):
    """Once per marker file, which then tells when."""
    if Path(marker).exists():
        return
    Path(marker).write_text(str(time.time()))
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exit":
        os._exit(3)
    if how == "error":
        raise MemoryError("no memory left, says the test")
    while how == "hang":
        time.sleep(1)


def program(runs, die=None):
    """-> the module and its argument, for torchrun."""
    return ["tests.multinode", json.dumps({"runs": [[str(folder), stage, changes] for folder, stage, changes in runs], "die": die})]


def main(order):
    from nanochat.run_logger import RunLogger
    from tests import pipeline
    death, log = order["die"], RunLogger.log

    def log_or_die(self, step, metrics):
        if death and (step, os.environ["RANK"]) == (death["step"], str(death["rank"])) and "train/loss" in metrics:
            die(death["how"], death["marker"])
        log(self, step, metrics)

    RunLogger.log = log_or_die
    for folder, stage, changes in order["runs"]:
        os.environ["NANOCHAT_BASE_DIR"] = folder
        pipeline.run_stage(stage, **changes)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
