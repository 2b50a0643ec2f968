"""What the model wrote, run safely: a calculator for its tool calls and a sandbox for its Python.

The calculator parses arithmetic itself and never evaluates Python. The sandbox starts a fresh interpreter under bubblewrap,
without network, host files, or a way to outlive its time. Nothing here judges an answer: `tasks/` does.
"""
import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

# ---------------------------------------------------------------- calculator

MAX_CHARS, MAX_NESTING, MAX_BITS = 256, 32, 512
NUMBER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+"
LEXEME = re.compile(rf"\s*(?:(?P<number>{NUMBER})|(?P<operator>\*\*|[-+*/%()]))")
COUNT = re.compile(r"""\s*(?P<q>['"])(?P<text>[^'"\\\n]*)(?P=q)\s*\.\s*count\(\s*(?P<r>['"])(?P<part>[^'"\\\n]+)(?P=r)\s*\)\s*""")


def calculate(expression):
    """An arithmetic expression, or "text".count("part"), as str -> its value as str, or None where it is anything else.

    + - * / ** and parentheses, decimals, thousands commas, and % behind a number for hundredths. Exact rational numbers
    inside: 0.1 + 0.2 is 0.3. Bounded in length, nesting and size, so it answers in microseconds whatever the text.
    """
    if len(expression) > MAX_CHARS:
        return None
    counted = COUNT.fullmatch(expression)
    if counted:
        return str(counted["text"].count(counted["part"]))
    try:
        return format_number(Arithmetic(expression).value())
    except (ArithmeticError, SyntaxError):
        return None


class Arithmetic:
    """Recursive descent: sum > product > sign > power > percent > atom. SyntaxError or ArithmeticError on bad input."""

    def __init__(self, expression):
        self.lexemes, self.next, self.nesting = [], 0, 0
        end, expression = 0, expression.rstrip()
        while end < len(expression):
            match = LEXEME.match(expression, end)
            if not match:
                raise SyntaxError(f"character {end} begins neither a number nor an operator")
            self.lexemes.append(match["number"] or match["operator"])
            end = match.end()

    def value(self):
        total = self.sum()
        if self.next < len(self.lexemes):
            raise SyntaxError(f"{self.lexemes[self.next]!r} follows a complete expression")
        return total

    def take(self, *wanted):
        """The next lexeme if it is one of `wanted`, and step over it; else None."""
        if self.next < len(self.lexemes) and self.lexemes[self.next] in wanted:
            self.next += 1
            return self.lexemes[self.next - 1]
        return None

    def sum(self):
        total = self.product()
        while operator := self.take("+", "-"):
            other = self.product()
            total = bounded(total + other if operator == "+" else total - other)
        return total

    def product(self):
        total = self.signed()
        while operator := self.take("*", "/"):
            other = self.signed()
            total = bounded(total * other if operator == "*" else total / other)
        return total

    def signed(self):
        negative = False
        while sign := self.take("-", "+"):  # a loop: a line of minus signs must not deepen the stack
            negative ^= sign == "-"
        value = self.power()
        return -value if negative else value

    def power(self):
        base = self.percent()
        if not self.take("**"):
            return base
        self.nest()
        exponent = self.signed()  # right-associative, and 2 ** -1 is allowed
        self.nesting -= 1
        return bounded(power(base, exponent))

    def percent(self):
        value = self.atom()
        while self.take("%"):
            value = bounded(value / 100)
        return value

    def atom(self):
        if self.take("("):
            self.nest()
            value = self.sum()
            self.nesting -= 1
            if not self.take(")"):
                raise SyntaxError("a parenthesis is never closed")
            return value
        if self.next == len(self.lexemes) or self.lexemes[self.next] in ("**", "+", "-", "*", "/", "%", ")"):
            raise SyntaxError("a number is missing")
        self.next += 1
        return bounded(Fraction(self.lexemes[self.next - 1].replace(",", "")))

    def nest(self):
        self.nesting += 1
        if self.nesting > MAX_NESTING:
            raise SyntaxError(f"nested deeper than {MAX_NESTING}")


def bounded(value):
    """The Fraction itself, unless its digits outgrow MAX_BITS: sizes must not double at every operator."""
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise OverflowError("the number is too long")
    return value


def power(base, exponent):
    """base ** exponent as a Fraction: exact for whole exponents, through a float for roots."""
    if exponent.denominator == 1:
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if abs(base) != 1 and bits * abs(exponent.numerator) > 2 * MAX_BITS:
            raise OverflowError("the power is too large")
        return base ** (exponent.numerator if abs(base) != 1 else exponent.numerator % 2)
    if base < 0:
        raise ArithmeticError("a root of a negative number is not real")
    return Fraction(float(base) ** float(exponent))


def format_number(value):
    """A Fraction -> "12", "2.5", "3.333333333": about ten digits, no trailing zeros, never an exponent."""
    if value.denominator == 1:
        return str(value.numerator)
    whole_digits = len(str(abs(value.numerator) // value.denominator))
    if value and abs(value) < Fraction(1, 10**12):
        raise ArithmeticError("too small to print")
    places = max(10 - whole_digits, 2) if abs(value) >= Fraction(1, 10) else 18
    digits = round(abs(value) * 10**places)
    if places == 18:  # keep ten digits behind the leading zeros
        places -= max(len(str(digits)) - 10, 0)
        digits = round(abs(value) * 10**places)
    whole, rest = divmod(digits, 10**places)
    text = f"{whole}.{rest:0{places}d}".rstrip("0").rstrip(".")
    return f"-{text}" if value < 0 and text != "0" else text


# ---------------------------------------------------------------- sandbox


@dataclass(frozen=True)
class ExecutionResult:
    """How a program ended. `success` means exit status 0 in time; `returncode` is minus the signal where one killed it."""
    success: bool
    stdout: str
    stderr: str
    timed_out: bool
    returncode: int
    sandbox: str  # "bubblewrap", or "weak": limits only


def run_python(code, stdin="", timeout_s=5.0, memory_mb=256, max_output_bytes=1 << 20, max_processes=8, allow_weak=False):
    """Run model-written Python in a fresh interpreter with only the standard library -> ExecutionResult.

    Under bubblewrap it sees no network, no file of the host but the interpreter's, no process but its own, and a /tmp of 16 MB
    in memory. Memory, processor time, wall time, processes, and the size of each output and file are bounded; longer output is
    cut. When it ends, by itself or by force, everything it started ends with it. Without bubblewrap RuntimeError, unless
    `allow_weak`: then the limits hold, but it can read files, use the network, and leave processes behind.
    """
    refusal = sandbox_refusal()
    if refusal and not allow_weak:
        raise RuntimeError(f"model-written code needs a sandbox, and there is none: {refusal}. Install it with `apt-get install "
                           "bubblewrap` (in a container, allow user namespaces), or pass allow_weak=True where the code is trusted")
    limits = {"as": memory_mb << 20, "cpu": int(timeout_s) + 1, "fsize": max_output_bytes, "nofile": 64, "core": 0}
    # Files, not pipes: RLIMIT_FSIZE bounds what is written there, so no output can fill our memory.
    with (tempfile.TemporaryFile() as source, tempfile.TemporaryFile() as given,
          tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, tempfile.TemporaryDirectory() as folder):
        for file, text in ((source, code), (given, stdin)):
            file.write(text.encode("utf-8", errors="replace"))
            file.seek(0)
        if refusal:
            command = [sys.executable, "-I", "-S", "-X", "utf8", "-c", weak_start(source.fileno(), limits)]
        else:
            command = bubblewrap_command(source.fileno(), limits, max_processes)
        process = subprocess.Popen(command, stdin=given, stdout=out, stderr=err, pass_fds=(source.fileno(),), cwd=folder, env={},
                                   start_new_session=True)
        timed_out = False
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:  # also when the wait was interrupted
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read(max_output_bytes).decode("utf-8", errors="replace"))
    status = process.returncode
    if status > 128 and not refusal:  # bubblewrap reports a death by signal as a shell does
        status = 128 - status
    return ExecutionResult(status == 0 and not timed_out, *texts, timed_out, status, "weak" if refusal else "bubblewrap")


@functools.cache
def sandbox_refusal():
    """None where bubblewrap works, else the reason it does not. Asked once."""
    missing = [program for program in ("bwrap", "prlimit", "setpriv") if shutil.which(program) is None]
    if missing:
        return f"{', '.join(missing)} not found"
    with tempfile.TemporaryFile() as source:
        command = bubblewrap_command(source.fileno(), {"core": 0}, 8)
        trial = subprocess.run(command, pass_fds=(source.fileno(),), env={}, capture_output=True, text=True, errors="replace")
    return None if trial.returncode == 0 else trial.stderr.strip()[-300:] or f"a trial ended with status {trial.returncode}"


def bubblewrap_command(source_fd, limits, max_processes):
    """The command line that runs the Python file behind `source_fd` in a sandbox."""
    python = interpreter()
    command = [shutil.which("prlimit"), *(f"--{name}={value}" for name, value in limits.items()), "--"]
    if os.geteuid() == 0:  # the kernel never counts root's processes, so a fork bomb needs to be somebody else's
        command = [shutil.which("setpriv"), "--reuid=65534", "--regid=65534", "--clear-groups", "--", *command]
    command += [shutil.which("bwrap"), "--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent", "--new-session",
                "--clearenv", "--uid", "65534", "--gid", "65534", "--hostname", "sandbox", "--ro-bind", "/usr", "/usr"]
    for name in ("/bin", "/lib", "/lib64"):
        if os.path.islink(name):
            command += ["--symlink", os.readlink(name), name]
        elif os.path.isdir(name):
            command += ["--ro-bind", name, name]
    if not str(python).startswith("/usr/local/"):
        command += ["--tmpfs", "/usr/local", "--remount-ro", "/usr/local"]  # what the machine's owner installed is not the program's business
    if not str(python).startswith("/usr/"):
        command += ["--ro-bind", sys.base_prefix, sys.base_prefix]
    for device in ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random"):
        command += ["--dev-bind", device, device]
    command += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache", "--dir", "/sandbox", "--ro-bind-data", str(source_fd), "/sandbox/program.py",
                "--size", str(16 << 20), "--tmpfs", "/tmp", "--chdir", "/tmp", "--remount-ro", "/"]
    # Counted inside, where only this program's processes are: several sandboxes at once do not share one allowance.
    return [*command, "--", shutil.which("prlimit"), f"--nproc={max_processes}", "--", str(python), "-I", "-S", "-X", "utf8", "/sandbox/program.py"]


def interpreter():
    """A Python that an unprivileged user may read: the system's if there is one, else the one we run on."""
    system = Path("/usr/bin/python3")
    own = Path(sys.base_prefix, "bin", f"python{sys.version_info.major}.{sys.version_info.minor}")
    return own if str(own).startswith("/usr/") or not system.exists() else system


def weak_start(source_fd, limits):
    """Python that limits itself, then runs the file behind `source_fd` as __main__."""
    return ("import os, resource\n"
            f"for name, value in {limits!r}.items():\n"
            "    try: resource.setrlimit(getattr(resource, 'RLIMIT_' + name.upper()), (value, value))\n"
            "    except ValueError: pass  # not every system has every limit\n"
            f"with open({source_fd}, 'rb') as file: source = file.read()\n"
            "exec(compile(source, 'program.py', 'exec'), {'__name__': '__main__'})\n")
