import ctypes
import os
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat import execution
from nanochat.execution import calculate, run_python, sandbox_refusal



@pytest.fixture(scope="module", autouse=True)
def nothing_is_left_behind():
    """Orphans of this module become children of this process, so that none can hide; at the end no new one may live."""
    libc, PR_SET_CHILD_SUBREAPER = ctypes.CDLL(None), 36
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    before = descendants()
    yield
    deadline = time.perf_counter() + 5
    while descendants() - before and time.perf_counter() < deadline:
        time.sleep(0.05)
    left = descendants() - before
    libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
    assert not left, {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in left}


def descendants():
    """The living processes below this one."""
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            except OSError:
                continue
            if state != "Z":                            # a zombie runs nothing
                parents[int(folder.name)] = int(parent)
    found, size = {os.getpid()}, 0
    while len(found) > size:
        size = len(found)
        found |= {pid for pid, parent in parents.items() if parent in found}
    return found - {os.getpid()}


in_sandbox = pytest.mark.skipif(sandbox_refusal() is not None, reason=f"no sandbox here: {sandbox_refusal()}")

# ---------------------------------------------------------------- calculator


@pytest.mark.parametrize("expression, value", [
    ("1+1", "2"), ("48/2", "24"), ("5*.5", "2.5"), ("10/3", "3.333333333"), ("0.1+0.2", "0.3"), ("1/3*3", "1"), ("2*(3+4)", "14"),
    ("1,000*3", "3000"), ("1,234,567.5+1", "1234568.5"), ("-2**2", "-4"), ("2**-1", "0.5"), ("2**3**2", "512"), ("2**0.5", "1.414213562"),
    ("50%", "0.5"), ("20%*50", "10"), ("--3", "3"), ("3 - -2", "5"), (" 7 ", "7"), ("5.", "5"), ("0.000123456789123", "0.0001234567891"),
    ("123456789.123*1000", "123456789123"), ("-0.0", "0"), ("0**0", "1"), ("(-1)**99999999999", "-1"), ("0.99999999999", "1"),
    ('"strawberry".count("r")', "3"), ("'a b c'.count(' ')", "2"), ("''.count('a')", "0"), ('"Mississippi".count("ss")', "2")])
def test_arithmetic_is_calculated(expression, value):
    assert calculate(expression) == value


@pytest.mark.parametrize("expression", [
    "", " ", "1+", "(1", "1)", "2 3", "1,00", "12,3456", "1,2345", "10%3", "1/0", "0**-1", "(-8)**(1/3)", "1e5", "1_000", "0x10", "2+2=", "٣+1", "²",
    "9**9**9", "2**99999", "10**400*10**400", "(" * 200 + "1" + ")" * 200, "(" * 100 + "1" + ")" * 100, "1+" * 200 + "1", "1/10**13", "x", "True",
    "abs(1)", "__import__('os')", "'a'*9", "'a'.upper()", "'a'.count('')", "'a'.count(b'')", "'a\\'b'.count('a')", '"a"."b".count("c")', "[1][0]", "1 if 1 else 2",
    "1//2", "1;2", "2^3", "lambda:0", "\x00", "nan", "inf"])
def test_everything_else_has_no_value(expression):
    assert calculate(expression) is None


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=300) | st.text("0123456789.,+-*/%() \"'count", max_size=300))
def test_the_calculator_never_raises_and_answers_plain_numbers_at_once(text):
    start = time.perf_counter()
    value = calculate(text)
    assert time.perf_counter() - start < 0.5
    assert value is None or re.fullmatch(r"-?[0-9]+(\.[0-9]*[1-9])?", value)


@settings(max_examples=200, deadline=None)
@given(st.recursive(st.integers(0, 99).map(str), lambda inner: st.tuples(inner, st.sampled_from(["+", "-", "*", "/"]), inner).map(lambda t: f"({''.join(t)})"),
                    max_leaves=6))
def test_the_calculator_agrees_with_python(expression):
    try:
        expected = eval(expression)  # digits and four operators that this test has put together itself
    except ZeroDivisionError:
        assert calculate(expression) is None
        return
    if expected == 0 or abs(expected) > 1e-6:
        assert float(calculate(expression)) == pytest.approx(expected, rel=1e-8, abs=1e-8)


def test_the_calculator_works_in_many_threads_at_once():
    expressions = [f"({n}+{n})*{n}/{n}" for n in range(1, 400)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(calculate, expressions)) == [str(2 * n) for n in range(1, 400)]


# ---------------------------------------------------------------- sandbox


def run(code, **limits):
    return run_python(code, **{"timeout_s": 10.0, **limits})


@in_sandbox
def test_a_program_reads_its_input_and_says_its_output():
    result = run("import math, collections\nprint(input()[::-1], math.comb(4, 2), 'é', __name__)", stdin="abc\n")
    assert (result.success, result.stdout, result.stderr, result.sandbox) == (True, "cba 6 é __main__\n", "", "bubblewrap")


@in_sandbox
@pytest.mark.parametrize("code, status, words", [("1/0", 1, "ZeroDivisionError"), ("def", 1, "SyntaxError"), ("import sys; sys.exit(3)", 3, ""),
                                                 ("import os; os.kill(os.getpid(), 9)", -9, ""), ("import os; os.abort()", -6, ""), ("import torch", 1, "No module")])
def test_a_program_that_fails_says_how(code, status, words):
    result = run(code)
    assert not result.success and result.returncode == status and words in result.stderr and not result.timed_out


def test_at_least_forty_escapes_are_tried():
    assert len(ESCAPES) >= 50


# Each tries to do harm and prints HARM if it succeeds. {outside} is a file of the host, {pid} a process of the host.
ESCAPES = {
    "read a host file": "print('HARM', open('{outside}').read())",
    "read the password file": "print('HARM', open('/etc/passwd').read())",
    "list home folders": "import os; print('HARM', os.listdir('/root') + os.listdir('/home'))",
    "look for the host's files": "import os; print('HARM' if any(f == 'secret.txt' for _, _, files in os.walk('/') for f in files) else 'none')",
    "read the host's processes": "import os; print('HARM', os.listdir('/proc'))",
    "read its parent's environment": "print('HARM', open('/proc/1/environ').read())",
    "read our environment": "import os; print('HARM' if 'NANOCHAT_CANARY' in os.environ else 'none')",
    "write outside": "open('{outside}', 'w').write('HARM'); print('HARM')",
    "write in the root folder": "open('/x', 'w'); print('HARM')",
    "write to the system": "open('/usr/lib/x', 'w'); print('HARM')",
    "write to the devices": "open('/dev/x', 'w'); print('HARM')",
    "write to shared memory": "open('/dev/shm/x', 'w'); print('HARM')",
    "change the program itself": "open(__file__, 'w'); print('HARM')",
    "open a disk": "open('/dev/vda', 'rb'); print('HARM')",
    "make a device": "import os, stat; os.mknod('/tmp/x', 0o600 | stat.S_IFBLK, os.makedev(254, 0)); open('/tmp/x', 'rb'); print('HARM')",
    "connect to the network": "import socket; socket.create_connection(('1.1.1.1', 53), 2); print('HARM')",
    "connect to the host's loopback": "import socket; socket.create_connection(('127.0.0.1', {port}), 2); print('HARM')",
    "send a datagram": "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('8.8.8.8', 53)); print('HARM')",
    "listen raw": "import socket; socket.socket(socket.AF_INET, socket.SOCK_RAW, 1); print('HARM')",
    "use descriptors left open": "import os\nfor fd in range(3, 64):\n    try: print('HARM', fd, os.fstat(fd))\n    except OSError: pass",
    "signal the host's process": "import os; os.kill({pid}, 0); print('HARM')",
    "signal everyone": "import os, signal; os.kill(-1, signal.SIGKILL); print('alive')",
    "become root": "import os; os.setuid(0); print('HARM')",
    "change the root": "import os; os.chroot('/tmp'); print('HARM')",
    "mount": "import ctypes; print('HARM' if ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0 else 'refused')",
    "nest user namespaces": "import ctypes; print('HARM' if ctypes.CDLL(None).unshare(0x10000000) == 0 else 'refused')",
    "join another namespace": "import os, ctypes; fd = os.open('/proc/1/ns/mnt', 0); print('HARM' if ctypes.CDLL(None).setns(fd, 0) == 0 else '')",
    "trace the host's process": "import ctypes; print('HARM' if ctypes.CDLL(None).ptrace(16, {pid}, 0, 0) == 0 else 'refused')",
    "raise its limits": "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1)); print('HARM')",
    "run a set-user-id program": "import subprocess; print('HARM' if subprocess.run(['/usr/bin/su', '-c', 'id'], input=b'', capture_output=True).returncode == 0 else '')",
    "follow a link outside": "import os; os.symlink('{outside}', '/tmp/link'); print('HARM', open('/tmp/link').read())",
    "allocate memory": "x = bytearray(1 << 30); print('HARM')",
    "map memory": "import mmap; m = mmap.mmap(-1, 1 << 30); print('HARM')",
    "fill the disk with one file": "f = open('/tmp/x', 'wb')\nfor _ in range(64): f.write(bytes(1 << 20)); f.flush()\nprint('HARM')",
    "fill the disk with many files": "for i in range(64): open(f'/tmp/{{i}}', 'wb').write(bytes(1 << 20))\nprint('HARM')",
    "open endless files": "files = [open('/dev/null') for _ in range(100)]; print('HARM')",
    "fork endlessly": "import os, time\nfor n in range(100):\n    if os.fork() == 0: time.sleep(60); os._exit(0)\nprint('HARM')",
    "spawn endlessly": "import os, sys\nfor n in range(100): os.posix_spawn(sys.executable, [sys.executable, '-S', '-c', 'import time; time.sleep(60)'], {{}})\nprint('HARM')",
    "run a shell by posix_spawn": "import os; os.posix_spawn('/bin/sh', ['sh', '-c', 'cat {outside} && echo HARM'], {{}}); os.wait()",
    "fork by a raw system call": "import ctypes, time\nfor n in range(100):\n    pid = ctypes.CDLL(None).syscall(57)\n    if pid == 0: time.sleep(60)\n"
                                 "    if pid < 0: break\nelse: print('HARM')",
    "stop the host's process": "import os, signal; os.kill({pid}, signal.SIGSTOP); print('HARM')",
    "signal its own group and parents": "import os, signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN); os.killpg(0, signal.SIGTERM); os.kill(1, signal.SIGTERM); print('alive')",
    "read memory by /proc": "print('HARM', open('/proc/self/mem', 'rb'), open('/proc/{pid}/maps').read())",
    "mount /proc anew": "import ctypes, os; os.mkdir('/tmp/p'); print('HARM' if ctypes.CDLL(None).mount(b'proc', b'/tmp/p', b'proc', 0, None) == 0 else 'refused')",
    "leave through /proc": "import os; os.chdir('/proc/1/root'); print('HARM', os.listdir('.'))",
    "link hard to a host file": "import os; os.link('{outside}', '/tmp/link'); print('HARM')",
    "link a folder to the parents": "import os; os.symlink('../' * 20, '/tmp/up'); print('HARM' if os.path.exists('/tmp/up{outside}') else 'none')",
    "connect to an abstract socket": "import socket; socket.socket(socket.AF_UNIX).connect('\\0{abstract}'); print('HARM')",
    "ask the kernel by netlink for routes": "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.connect(('8.8.8.8', 53)); print('HARM', s.getsockname())",
    "raise a soft limit beyond the hard one": "import resource\nfor limit in (resource.RLIMIT_CPU, resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC, resource.RLIMIT_NOFILE):\n"
                                              "    try: resource.setrlimit(limit, (1 << 40, 1 << 40)); print('HARM', limit)\n    except (ValueError, OSError): pass",
    "raise the limits of the host's process": "import resource; resource.prlimit({pid}, resource.RLIMIT_AS, (1 << 20, 1 << 20)); print('HARM')",
    "type into the terminal": "import fcntl, termios; fcntl.ioctl(open('/dev/tty'), termios.TIOCSTI, b'x'); print('HARM')",
    "load a kernel module": "import ctypes; print('HARM' if ctypes.CDLL(None).syscall(175, b'x', 1, b'') == 0 else 'refused')",
    "run from memory what is not there": "import os; fd = os.memfd_create('x'); os.write(fd, b'#!/bin/sh\\ncat {outside} && echo HARM\\n'); os.execve(fd, ['x'], {{}})",
    "change the clock": "import time; time.clock_settime(time.CLOCK_REALTIME, 0); print('HARM')",
    "rename the host": "import socket; socket.sethostname('harm'); print('HARM')",
    "start endless threads": "import threading, time\nfor _ in range(100): threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\nprint('HARM')",
}


@in_sandbox
@pytest.mark.parametrize("name", ESCAPES)
def test_each_escape_is_tried_and_refused(name, tmp_path, monkeypatch):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    secret.chmod(0o666)
    for folder in (tmp_path, tmp_path.parent, tmp_path.parent.parent):  # only the sandbox shall stand between program and file
        folder.chmod(0o755)
    monkeypatch.setenv("NANOCHAT_CANARY", "secret")
    abstract = f"nanochat-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        local.bind(f"\0{abstract}")
        local.listen()
        result = run(ESCAPES[name].format(outside=secret, pid=os.getpid(), port=server.getsockname()[1], abstract=abstract))
    assert "HARM" not in result.stdout and not result.timed_out, result
    assert secret.read_text() == "secret"


@in_sandbox
@pytest.mark.parametrize("code", ["while True: pass", "import time; time.sleep(60)", "input()\nimport time; time.sleep(60)",
                                  "import signal, time\nfor s in range(1, 32):\n    try: signal.signal(s, signal.SIG_IGN)\n    except OSError: pass\ntime.sleep(60)",
                                  "9 ** 9 ** 9", "import re; re.match('(a+)+b', 'a' * 60)"])
def test_endless_programs_are_killed_in_time(code):
    start = time.perf_counter()
    result = run(code, stdin="x\n", timeout_s=0.5)
    assert result.timed_out and not result.success and time.perf_counter() - start < 3


@in_sandbox
def test_endless_output_is_cut():
    result = run("while True: print('x' * 10000)", max_output_bytes=100_000)
    assert not result.success and len(result.stdout) == 100_000 and len(result.stderr) < 100_000
    result = run("import sys\nwhile True: sys.stderr.write('x' * 10000)", max_output_bytes=100_000)
    assert not result.success and len(result.stderr) <= 100_000


def processes_with(mark):
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if mark.encode() in (folder / "cmdline").read_bytes():
                    found.append(folder.name)
            except OSError:
                pass
    return found


@in_sandbox
@pytest.mark.parametrize("ending", ["", "while True: pass", "1/0", "os.kill(os.getpid(), 9)"])
def test_no_process_is_left_behind(ending):
    mark = f"sleeper-{os.getpid()}-{time.time_ns()}"
    code = ("import os, subprocess, sys\n"
            f"for _ in range(3): subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)', '{mark}'], start_new_session=True)\n"
            "if os.fork() == 0:\n    os.setsid()\n    import time; time.sleep(60)\n" + ending)
    run(code, timeout_s=1.0)
    deadline = time.perf_counter() + 2
    while processes_with(mark) and time.perf_counter() < deadline:
        time.sleep(0.05)
    assert processes_with(mark) == []


@in_sandbox
def test_many_sandboxes_run_at_once():
    code = "import threading\nfor _ in range(3): threading.Thread(target=lambda: None).start()\nprint(sum(range({})))"
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda n: run(code.format(n)), range(24)))
    assert [result.stdout for result in results] == [f"{sum(range(n))}\n" for n in range(24)]


def test_without_a_sandbox_nothing_runs_unless_weakness_is_asked_for(monkeypatch):
    monkeypatch.setattr(execution, "sandbox_refusal", lambda: "bwrap not found")
    with pytest.raises(RuntimeError, match="bwrap not found.*apt-get install bubblewrap.*allow_weak"):
        run("print(1)")
    result = run("print(input(), __name__)", stdin="hello\n", allow_weak=True)
    assert result.success and result.stdout == "hello __main__\n" and result.sandbox == "weak"
    assert run("while True: pass", timeout_s=0.5, allow_weak=True).timed_out
    assert "MemoryError" in run("bytearray(1 << 30)", allow_weak=True).stderr
    assert len(run("while True: print('x' * 10000)", max_output_bytes=50_000, allow_weak=True).stdout) == 50_000
    assert not run("1/0", allow_weak=True).success
