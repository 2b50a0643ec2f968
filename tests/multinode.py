"""Two machines on one: network namespaces joined by a virtual cable, and torchrun in each of them, for the tests of several nodes."""
import ast
import itertools
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
    """torchrun on each node, all of one job; `wait()` -> the return codes, output in `logs`."""
    runs = itertools.count()

    def __init__(self, nodes, folders, log_dir, program, *torchrun_flags, environment=None, per_node=1):
        """`folders`: NANOCHAT_BASE_DIR on each node. `program`: module and its arguments."""
        number = next(self.runs)
        self.processes, self.logs = [], [Path(log_dir) / f"job{number}_node{i}.log" for i in range(len(nodes))]
        for i, (namespace, interface, address) in enumerate(nodes):
            variables = {**os.environ, "NANOCHAT_BASE_DIR": str(folders[i]), "GLOO_SOCKET_IFNAME": interface, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
                         **(environment or {})}
            command = ["ip", "netns", "exec", namespace, sys.executable, "-m", "torch.distributed.run", f"--nnodes={len(nodes)}", f"--nproc-per-node={per_node}",
                       "--rdzv-id=job", "--rdzv-backend=c10d", f"--rdzv-endpoint={nodes[0][2]}:{PORT}", f"--rdzv-conf=is_host={int(i == 0)}",
                       f"--local-addr={address}", "--monitor-interval=0.2", *torchrun_flags, "-m", *program]
            with open(self.logs[i], "w") as log:
                self.processes.append(subprocess.Popen(command, cwd=ROOT, env=variables, stdin=subprocess.DEVNULL, stdout=log, stderr=log))

    def output(self):
        return "\n".join(f"--- node {i}\n{log.read_text(errors='replace')}" for i, log in enumerate(self.logs))

    def wait(self, timeout=600):
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
# One stage in which a rank dies, once: python -m tests.multinode STAGE HOW RANK STEP MARKER [NAME=VALUE ...]

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
        raise MemoryError("out of memory, says the test")
    while how == "hang":
        time.sleep(1)


def main(stage, how, rank, step, marker, *changes):
    from nanochat.run_logger import RunLogger
    from tests import pipeline
    log = RunLogger.log

    def log_or_die(self, at, metrics):
        if at == int(step) and "train/loss" in metrics and os.environ["RANK"] == rank:
            die(how, marker)
        log(self, at, metrics)

    RunLogger.log = log_or_die
    pipeline.run_stage(stage, **{name: ast.literal_eval(value) for name, value in (change.split("=") for change in changes)})


if __name__ == "__main__":
    main(*sys.argv[1:])
