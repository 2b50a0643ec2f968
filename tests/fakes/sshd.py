"""A rented machine on loopback: the real sshd and the real tmux, with a home folder of its own. Nothing is faked but the address."""
import getpass
import os
import shutil
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"
MISSING = [name for name, there in (("sshd", Path(SSHD).exists()), ("ssh", shutil.which("ssh")), ("tmux", shutil.which("tmux")), ("git", shutil.which("git")),
                                    ("curl", shutil.which("curl")), ("cc", shutil.which("cc"))) if not there]


class Sshd:
    """`with Sshd(folder) as machine:` listens on machine.port; machine.key is a private key that it lets in, machine.home its home folder."""

    def __init__(self, folder):
        self.folder, self.home, self.key, self.user = Path(folder), Path(folder) / "home", Path(folder) / "id", getpass.getuser()
        self.socket = f"nanochat-{os.getpid()}"
        self.process = None

    def __enter__(self):
        self.home.mkdir(parents=True)
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)
        for name in ("id", "host_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / name], check=True)
        shutil.copy(self.folder / "id.pub", self.folder / "authorized_keys")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        (self.folder / "sshd_config").write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey \"{self.folder}/host_key\"\nAuthorizedKeysFile \"{self.folder}/authorized_keys\"\nPidFile none\n"
            f"PasswordAuthentication no\nPermitRootLogin prohibit-password\nStrictModes no\nUsePAM no\nMaxStartups 100\n"
            f"SetEnv \"HOME={self.home}\" \"TMUX_TMPDIR={self.home}\"\n")
        self.start()
        return self

    def start(self):
        self.process = subprocess.Popen([SSHD, "-D", "-f", self.folder / "sshd_config", "-E", self.folder / "sshd.log"])
        for _ in range(200):
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                time.sleep(0.02)
        raise AssertionError((self.folder / "sshd.log").read_text())

    def stop(self):
        """The machine drops off the network: the listener and every connection end. tmux goes on."""
        if self.process is None:
            return
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # a connection may end by itself meanwhile
                if child.name() == "sshd":
                    child.kill()
        self.process.kill()
        self.process.wait()
        self.process = None

    def change_host_key(self):
        self.stop()
        (self.folder / "host_key").unlink()
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / "host_key"], check=True)
        self.start()

    def tmux(self, *arguments):
        return subprocess.run(["tmux", "-L", self.socket, *arguments], env={**os.environ, "TMUX_TMPDIR": str(self.home)}, capture_output=True, text=True)

    def wipe(self):
        """A fresh machine at the same address."""
        self.tmux("kill-server")
        shutil.rmtree(self.home)
        self.home.mkdir()

    def __exit__(self, *exception):
        self.tmux("kill-server")
        self.stop()
