"""One rented machine over the system's own ssh: scripts go as the command, data and secrets only over stdin.

The host key is pinned on first use: a known_hosts file of the rental's own takes the first key that is shown, and from then on no other.
The children are in a session of their own, so that Ctrl-C reaches the launcher and not the connection it still needs.
"""
import ipaddress
import re
import shlex
import subprocess
import threading
import time
from pathlib import Path

MARK = "nanochat-begin-of-output"  # whatever a login script prints comes before it


class ConnectionLost(Exception):
    """No connection, or it broke: may be tried again."""


class NotAllowed(ConnectionLost):
    """The machine does not take our key. While it boots that may change."""


class HostKeyChanged(Exception):
    """Another host key than at first: nothing is sent there any more."""


class RemoteError(Exception):
    """A script failed on the machine: `.code`, and what it said."""

    def __init__(self, code, message):
        super().__init__(f"status {code}: {message}" if message else f"status {code}")
        self.code = code


class Machine:
    """`Machine(host, port, user, key, known_hosts, signals).run("echo $1", "hello")` -> b"hello\\n"."""

    def __init__(self, host, port, user, key, known_hosts, signals):
        self.host, self.port, self.user, self.key, self.known_hosts, self.signals = host, port, user, key, Path(known_hosts), signals
        check_address(user, host, port)

    def options(self):
        pinned = self.known_hosts.is_file() and self.known_hosts.stat().st_size > 0
        self.known_hosts.parent.mkdir(parents=True, exist_ok=True)
        settings = {"StrictHostKeyChecking": "yes" if pinned else "accept-new", "UserKnownHostsFile": ssh_quote(self.known_hosts),
                    "GlobalKnownHostsFile": "/dev/null", "UpdateHostKeys": "no", "HashKnownHosts": "no", "ControlPath": "none",
                    "ForwardAgent": "no", "ForwardX11": "no", "ConnectTimeout": "10", "ServerAliveInterval": "10", "ServerAliveCountMax": "3"}
        if self.key:
            settings |= {"IdentitiesOnly": "yes", "IdentityFile": ssh_quote(Path(self.key).expanduser())}
        return [part for name, value in settings.items() for part in ("-o", f"{name}={value}")]

    def command(self, *remote, options=()):
        """The argument list of an ssh call that a person could type as well."""
        return ["ssh", *options, *self.options(), "-p", str(self.port), f"{self.user}@{self.host}", *remote]

    def run(self, script, *arguments, data=b"", timeout=120):
        """Run a bash script with arguments and stdin (bytes, or the path of a file) -> its stdout. Raises the exceptions above."""
        # --norc: under sshd even `bash -c` reads .bashrc, which may print
        remote = f"printf '%s\\n' {MARK}; exec bash --norc -c {shlex.quote(script)} nanochat {' '.join(shlex.quote(str(one)) for one in arguments)}"
        command = self.command(remote, options=("-T", "-o", "BatchMode=yes", "-o", "LogLevel=ERROR"))
        if isinstance(data, Path):
            with open(data, "rb") as file:
                code, out, error = self.wait_for(command, timeout, stdin=file)
        else:
            code, out, error = self.wait_for(command, timeout, data=data, stdin=subprocess.PIPE)
        before, mark, out = out.partition(MARK.encode() + b"\n")
        message = error.decode(errors="replace").strip()[-2000:]
        if code == 255:
            if "HOST IDENTIFICATION HAS CHANGED" in message or "Host key verification failed" in message:
                raise HostKeyChanged(f"{self.host}:{self.port} shows another host key than at first ({self.known_hosts}): someone may be in between. Nothing more is sent there")
            raise (NotAllowed if "Permission denied (" in message else ConnectionLost)(message or "ssh ended with status 255")
        if not mark and code == 0:
            raise ConnectionLost("the connection ended before the script's output")
        if code != 0:
            raise RemoteError(code, message)
        return out

    def wait_for(self, command, timeout, data=None, stdin=None):
        """(status, stdout, stderr). The child does not outlive this call, whatever ends it."""
        until = time.monotonic() + timeout
        child = subprocess.Popen(command, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
        if data is not None:  # by a thread: communicate() forgets what is left of its input when its timeout strikes
            pipe, child.stdin = child.stdin, None
            threading.Thread(target=feed, args=(pipe, data), daemon=True).start()
        try:
            while True:
                try:
                    out, error = child.communicate(timeout=0.2)
                    return child.returncode, out, error
                except subprocess.TimeoutExpired:
                    self.signals.check()
                    if time.monotonic() > until:
                        raise ConnectionLost(f"no end after {timeout:.0f} s") from None
        finally:
            if child.poll() is None:
                child.kill()
                child.communicate()

    def attach_command(self, session, tmux_socket=""):
        """The line that shows the tmux session in a terminal."""
        tmux = ["tmux", *(["-L", tmux_socket] if tmux_socket else []), "attach", "-t", f"={session}"]
        return self.command(shlex.join(tmux), options=("-t",))


def feed(pipe, data):
    try:
        with pipe:
            pipe.write(data)
    except OSError:
        pass  # the child has ended; its status tells why


def check_address(user, host, port):
    """ValueError unless these can stand on ssh's command line: an answer from the network must not become an option."""
    try:
        ipaddress.ip_address(host)
        good = True
    except ValueError:
        good = re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9-]{0,62})(\.[A-Za-z0-9][A-Za-z0-9-]{0,62})*\.?", host, re.ASCII) is not None
    if not (good and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]{0,31}", user, re.ASCII) and isinstance(port, int) and 0 < port < 65536):
        raise ValueError(f"{user!r}@{host!r} port {port!r} is no address for ssh: the cloud's answer is not what was expected, look at its dashboard")


def parse_ssh_command(text, default_user):
    """"ssh user@host -p PORT" -> (user, host, port), "" -> None. ValueError for what is neither."""
    try:
        words = shlex.split(text or "")
    except ValueError as error:
        raise ValueError(f"ssh command {text!r} cannot be read: {error}") from None
    if not words:
        return None
    user, host, port = default_user, "", 22
    tokens = iter(words[1:] if words[0] == "ssh" else words)
    for token in tokens:
        if token in ("-p", "-l", "-i", "-o"):
            value = next(tokens, "")
            if token == "-p":
                port = int(value) if re.fullmatch(r"[0-9]{1,5}", value, re.ASCII) else 0
            elif token == "-l":
                user = value
        elif re.fullmatch(r"-p[0-9]{1,5}", token, re.ASCII):
            port = int(token[2:])
        elif not host:
            before, at, host = token.rpartition("@")
            user = before if at else user
        else:
            raise ValueError(f"ssh command {text!r} has more than one host")
    check_address(user, host, port)
    return user, host, port


def ssh_quote(path):
    """A path for the value of an ssh option, where spaces separate and % begins a token."""
    return '"' + str(path).replace("%", "%%") + '"'
