"""Pieces in other processes: the same results in the same order, a piece's error is the caller's, and nobody is left behind."""
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from nanochat.workers import num_cores, workers

ROOT = Path(__file__).parents[1]


def described(number, word):
    if number < 0:
        raise ValueError(f"{number} is below 0")
    return f"{word} {number}", os.getpid()


def test_results_come_in_the_order_of_the_pieces_whoever_makes_them():
    pieces, made = [(number, "piece") for number in range(7)], {}
    for count in (1, 2):
        with workers(count) as run:
            first, second = run(described, pieces), run(described, pieces[:2])  # both begun before either is read
            made[count] = [*second, *first]
    assert [text for text, _ in made[1]] == [text for text, _ in made[2]] == [f"piece {number}" for number in (0, 1, *range(7))]
    assert {pid for _, pid in made[1]} == {os.getpid()} and os.getpid() not in {pid for _, pid in made[2]}
    assert num_cores() >= 1


def test_a_piece_that_fails_is_told_when_its_turn_comes():
    for count in (1, 2):
        with pytest.raises(ValueError, match="-3 is below 0"), workers(count) as run:
            results = run(described, [(1, "x"), (-3, "x"), (5, "x")])
            assert next(results)[0] == "x 1"
            list(results)


def test_one_worker_makes_a_piece_when_it_is_asked_for():
    seen = []
    with workers(1) as run:
        results = run(seen.append, [(1,), (2,)])
        assert seen == []
        next(results)
        assert seen == [1]


def test_workers_end_with_a_parent_that_is_killed():
    code = ("from nanochat.workers import workers\nimport os, time\nif __name__ == '__main__':\n with workers(2) as run:\n"
            "  print(*set(run(os.getpid, [()] * 2)), flush=True)\n  time.sleep(600)")
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        children = [psutil.Process(pid) for pid in pids]
        parent.kill()
    assert pids and psutil.wait_procs(children, timeout=120)[1] == []
