"""Ctrl-C, TERM and a closed terminal are noted and answered at safe points, never thrown between two arbitrary lines.

Whoever pays by the hour must not lose an instance's id because an exception flew past the assignment. So the handler only counts; `sleep` and
`check` raise Interrupted, and every wait of nanochat.cloud goes through them. While an instance is being terminated more signals are tolerated.
"""
import os
import select
import signal
import time

CAUGHT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(Exception):
    """A signal asks to stop; `.number` is the signal."""

    def __init__(self, number):
        super().__init__(signal.Signals(number).name)
        self.number = number


class Signals:
    """`with Signals() as signals:` in the main thread. `signals.sleep(seconds)` waits and raises Interrupted when one has come."""

    scale = 1.0  # of every wait and deadline: tests live faster

    def __init__(self):
        self.received, self.tolerated = [], 0

    def __enter__(self):
        self.reader, self.writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.before = {number: signal.signal(number, self.note) for number in CAUGHT}
        return self

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        os.close(self.reader)
        os.close(self.writer)

    def note(self, number, frame):
        self.received.append(number)
        try:
            os.write(self.writer, b"!")
            os.write(2, f"\n{signal.Signals(number).name}: one moment, stopping in an orderly way\n".encode())
        except OSError:
            pass  # the terminal is gone, or the pipe is full of earlier signals

    def check(self):
        if len(self.received) > self.tolerated:
            raise Interrupted(self.received[-1])

    def tolerate(self, more):
        """From here on the signals so far and `more` further ones do not interrupt."""
        self.tolerated = len(self.received) + more

    def deadline(self, seconds):
        """That long from now, on the clock of time.monotonic()."""
        return time.monotonic() + seconds * self.scale

    def sleep(self, seconds):
        """Wait that long, or until a signal that is not tolerated."""
        until = time.monotonic() + seconds * self.scale
        self.check()
        while (left := until - time.monotonic()) > 0:
            if select.select([self.reader], [], [], left)[0]:
                os.read(self.reader, 64)
                self.check()


def say(text=""):
    """`print` at once. A terminal that has gone away must not keep an instance from being terminated."""
    try:
        print(text, flush=True)
    except (OSError, ValueError):
        pass
