"""Work in independent pieces on all cores: each piece in another process, the results in the order of the pieces."""
import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager


def num_cores():
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def workers(count):
    """-> run(function, pieces), which calls function(*piece) for each piece -> an iterator of the results in their order. What one worker would
    do is done here, each piece when its result is asked for; more begin with all pieces at once.

    The processes start afresh, since a copy of this one could wait for locks of its threads: the function stands at the top of a module."""
    if count < 2:
        yield lambda function, pieces: (function(*piece) for piece in pieces)
        return
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), initializer=end_with_parent)

    def run(function, pieces):
        futures = [pool.submit(function, *piece) for piece in pieces]
        return (future.result() for future in futures)

    try:
        yield run
    finally:
        pool.shutdown(cancel_futures=True)


def end_with_parent():
    """A worker whose parent was killed would wait for its next piece forever."""
    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
