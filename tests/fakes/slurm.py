"""A cluster of two nodes on this machine: the real slurmctld, slurmd and munged, bound to loopback, with their files in one folder. Nothing is faked but the GPUs."""
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
FOUND = {name: shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") for name in PROGRAMS}
MISSING = [name for name, path in FOUND.items() if not path] + ([] if os.getuid() == 0 else ["root"])
GPUS = 2                                                # of each node
DONE = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")

CONFIG = """ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CredType=cred/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmctldPort={ports[0]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2
MpiDefault=none
ReturnToService=2
MinJobAge=3600
KillWait=30
SlurmdTimeout=15
SlurmdParameters=config_overrides
{gpus}NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 RealMemory=1000 {gres} State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 RealMemory=1000 {gres} State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """`with Slurm(folder) as cluster:` jobs are submitted with cluster.sbatch and find `cluster.environment`; all processes end with it."""

    def __init__(self, folder, **environment):
        self.folder, self.config = Path(folder), Path(folder) / "slurm.conf"
        kept = {name: os.environ[name] for name in ("HOME", "LANG", "TMPDIR", "USER") if name in os.environ}
        path = os.pathsep.join([str(Path(sys.executable).parent), *sorted({str(Path(found).parent) for found in FOUND.values() if found}), "/usr/local/bin", "/usr/bin", "/bin"])
        self.environment = {**kept, "PATH": path, "SLURM_CONF": str(self.config), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", **environment}
        self.daemons = {}

    def __enter__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
        ports = [one.getsockname()[1] for one in sockets]
        for one in sockets:
            one.close()
        for name in ("state", "spool-n1", "spool-n2"):
            (self.folder / name).mkdir()
        self.has_gpus = self.make_gpus()
        host = socket.gethostname().split(".")[0]
        self.config.write_text(CONFIG.format(folder=self.folder, host=host, ports=ports, gpus="GresTypes=gpu\n" if self.has_gpus else "",
                                             gres=f"Gres=gpu:h100:{GPUS}" if self.has_gpus else ""))
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        try:
            self.start("munged", "--foreground", "--force", *(f"--{name}={self.folder}/{file}" for name, file in (
                ("key-file", "munge.key"), ("socket", "munge.sock"), ("pid-file", "munged.pid"), ("log-file", "munged.txt"), ("seed-file", "munge.seed"))))
            self.wait(lambda: (self.folder / "munge.sock").exists(), "munged")
            self.start("slurmctld", "-D", "-f", self.config)
            self.start_node("n1")
            self.start_node("n2")
            self.wait(lambda: self.ask("sinfo", "-h", "-N", "-o", "%t").split() == ["idle", "idle"], "two idle nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def make_gpus(self):
        """Slurm wants character devices: clones of /dev/null do. False where none can be made."""
        try:
            for i in range(GPUS):
                os.mknod(self.folder / f"nvidia{i}", 0o20666, os.makedev(1, 3))
        except OSError:
            return False
        (self.folder / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu Type=h100 File={self.folder}/nvidia[0-{GPUS - 1}]\n")
        return True

    def start(self, program, *arguments, name=None):
        log = open(self.folder / f"{name or program}.log", "ab")
        self.daemons[name or program] = subprocess.Popen([FOUND[program], *map(str, arguments)], env=self.environment, stdin=subprocess.DEVNULL, stdout=log,
                                                         stderr=log, start_new_session=True)
        log.close()

    def start_node(self, node):
        self.start("slurmd", "-D", "-N", node, "-f", self.config, name=node)

    def crash_node(self, node):
        """The power goes: slurmd, the steps on it and all they have started are gone at once."""
        gone = [process for process in self.processes() if process.environ().get("SLURMD_NODENAME") == node]
        assert gone, f"nothing runs on {node}"
        kill([psutil.Process(self.daemons[node].pid), *steps_of(gone), *gone])
        self.daemons[node].wait()

    def ask(self, *command, **environment):
        """A command's output, without a look at its status."""
        return subprocess.run(command, env={**self.environment, **environment}, cwd=ROOT, capture_output=True, text=True, timeout=120).stdout

    def sbatch(self, *arguments, **environment):
        """Submits from the repository's root; the output goes to {folder}/<job's number>.out -> the job's number."""
        done = subprocess.run(["sbatch", "--parsable", f"--output={self.folder}/%j.out", *arguments], env={**self.environment, **environment}, cwd=ROOT,
                              capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def output(self, job):
        path = self.folder / f"{job}.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def job(self, job):
        """{"JobState": "RUNNING", "Restarts": "0", ...}"""
        return dict(part.split("=", 1) for part in self.ask("scontrol", "show", "job", "-o", str(job)).split() if "=" in part)

    def finish(self, *jobs, timeout=900):
        """Waits until all have ended -> their states."""
        self.wait(lambda: all(self.job(job).get("JobState") in DONE for job in jobs), f"jobs {jobs}", timeout)
        return [self.job(job)["JobState"] for job in jobs]

    def wait(self, condition, what, timeout=180):
        ends = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > ends:
                logs = "\n".join(f"== {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in sorted([*self.folder.glob("*.log"), *self.folder.glob("*.out")]))
                raise AssertionError(f"no {what} within {timeout} s\n{logs}")
            time.sleep(0.2)

    def processes(self):
        """All that belongs to this cluster: its configuration stands in their environment."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("SLURM_CONF") == str(self.config) and process.pid != os.getpid():
                    found.append(process)
            except psutil.Error:
                pass
        return found

    def __exit__(self, *exception):
        mine = self.processes()
        kill([*mine, *steps_of(mine)])
        for daemon in self.daemons.values():
            daemon.wait()


def steps_of(processes):
    """The slurmstepds that started these processes: they write their titles over their environments."""
    parents = {parent.pid: parent for process in processes if process.is_running() for parent in process.parents()}
    return [parent for parent in parents.values() if parent.name() == "slurmstepd"]


def kill(processes):
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            pass
