"""The ranks of a restarted job find each other and not the dead; what one of them cannot do all of them say."""
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from nanochat.compute import collective_timeout, meet


def start(store, world_size=3, number=0, counts=(), failures=(), ranks=None):
    """All ranks of one start, a thread each -> what each was told, in the order of `ranks`."""
    with ThreadPoolExecutor(world_size) as pool:
        told = [pool.submit(meet, store, rank, world_size, number, dict(counts).get(rank, 0), dict(failures).get(rank)) for rank in ranks or range(world_size)]
        return [one.exception(120) or one.result() for one in told]


@pytest.fixture
def store():
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=60))
    return store


def test_all_ranks_of_a_start_agree_on_its_name_and_no_two_starts_share_one(store):
    names = set()
    for before in range(4):  # one store over all restarts, with all that the dead have left in it
        told = start(store, ranks=((0, 1, 2), (2, 1, 0))[before % 2])
        assert len(set(told)) == 1 and told[0][1] == before
        names.add(told[0][0])
    assert len(names) == 4


def test_a_node_that_saw_no_failure_learns_of_the_restart_from_the_others():
    for counts in ({0: 2}, {2: 2}):
        store = dist.HashStore()
        assert {count for _, count in start(store, counts=counts)} == {2}


def test_the_second_stage_of_one_program_is_no_restart(store):
    first, second = start(store, number=0), start(store, number=1)
    assert first[0][1] == second[0][1] == 0 and first[0][0] != second[0][0]


def test_a_rank_that_died_while_it_waited_does_not_count_as_one_that_is_there(store):
    """Rank 0 of an earlier start announced it and died; the greetings to it are never answered, those to the new one are."""
    store.add("start-0-count", 1)
    store.set("start-0", "start-0-of-the-dead")
    assert {count for _, count in start(store, ranks=(2, 1, 0))} == {1}


def test_what_one_rank_lacks_all_ranks_say(store):
    mine = ValueError("device_type='cuda', but torch sees 0 CUDA devices")
    told = start(store, failures={1: mine})
    assert told[1] is mine
    for other in (told[0], told[2]):
        assert isinstance(other, ValueError) and "rank 1 on" in str(other) and "cannot start: device_type='cuda', but torch sees 0 CUDA devices" in str(other)


def test_the_time_to_wait_is_a_number_of_seconds(monkeypatch):
    monkeypatch.delenv("NANOCHAT_TIMEOUT", raising=False)
    assert collective_timeout() == 600
    monkeypatch.setenv("NANOCHAT_TIMEOUT", "30")
    assert collective_timeout() == 30
    for wrong in ("0", "-5", "half an hour", "1.5"):
        monkeypatch.setenv("NANOCHAT_TIMEOUT", wrong)
        with pytest.raises(ValueError, match="is not a number of seconds: give a whole number such as 600"):
            collective_timeout()
