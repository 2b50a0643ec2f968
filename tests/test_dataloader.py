"""The loaders' promises: no token lost, ranks disjoint, world sizes agree, resumed = never stopped, errors surface."""
import json
import random
from collections import Counter
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nanochat import packing
from nanochat.dataloader import ConversationLoader, PaddedLoader, PretrainingLoader, merge_states

BOS, USER_START, USER_END, ASSISTANT_START, ASSISTANT_END = range(256, 261)


class Bytes:
    """A tokenizer whose ids are bytes, with five special tokens."""
    bos_id, vocab_size = BOS, 261

    def encode(self, texts, num_threads=1):
        return [list(text.encode("utf-8")) for text in texts]

    def render_conversation(self, conversation, max_tokens=2048):
        ids, mask = [BOS], [0]
        for message in conversation["messages"]:
            is_answer = message["role"] == "assistant"
            body = list(message["content"].encode("utf-8"))
            ids += [ASSISTANT_START, *body, ASSISTANT_END] if is_answer else [USER_START, *body, USER_END]
            mask += [0] + [int(is_answer)] * (len(body) + 1)
        return ids[:max_tokens], mask[:max_tokens]


class Words:
    """A tokenizer that gives every word an id of its own, so that each token of a corpus can be followed."""
    bos_id = 0

    def encode(self, texts, num_threads=1):
        return [[int(word) for word in text.split()] for text in texts]


class Sums:
    """A task of additions with answers of very different lengths."""
    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        answer = f"{index} and {index} are {2 * index}" + " indeed" * (index * 7 % 13)
        return {"messages": [{"role": "user", "content": f"{index}+{index}?"}, {"role": "assistant", "content": answer}]}


@pytest.fixture
def shards(tmp_path):
    """Three shards, 3000 documents, words numbered through: document lengths from 0 to 80."""
    rng, word, paths = random.Random(0), 1, []
    for shard in range(3):
        texts = []
        for _ in range((1300, 1, 1699)[shard]):
            length = rng.choice((0, 3, 10, 30, 80))
            texts.append(" ".join(str(i) for i in range(word, word + length)))
            word += length
        paths.append(tmp_path / f"{shard}.parquet")
        pq.write_table(pa.table({"text": texts}), paths[-1], row_group_size=37)
    return paths


def make_pretraining(shards, **settings):
    return PretrainingLoader(Words(), shards, **{"device_batch_size": 2, "seq_len": 24, **settings})


def make_conversations(shards, **settings):
    return ConversationLoader(Bytes(), Sums(150), **{"device_batch_size": 2, "seq_len": 200, **settings})


def make_padded(shards, **settings):
    return PaddedLoader(Bytes(), Sums(150), **{"device_batch_size": 2, "seq_len": 200, **settings})


every_loader = pytest.mark.parametrize("make", [make_pretraining, make_conversations, make_padded])


def take(loader, count):
    return [(inputs.clone(), targets.clone()) for inputs, targets in islice(loader, count)]


def same(left, right):
    return len(left) == len(right) and all(torch.equal(a, b) for one, other in zip(left, right) for a, b in zip(one, other))


# -- what all three promise -------------------------------------------------------------------------------------------

@every_loader
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_every_world_size_sees_the_same_micro_batches_in_the_same_order(shards, make, world_size):
    with make(shards) as one:
        expected = take(one, 24)
    ranks = []
    for rank in range(world_size):
        with make(shards, rank=rank, world_size=world_size) as loader:
            ranks.append(take(loader, 24 // world_size))
    assert same([ranks[j % world_size][j // world_size] for j in range(24)], expected)


@every_loader
def test_resumed_equals_never_stopped(shards, make):
    with make(shards) as loader:
        expected = take(loader, 60)
    for stop in random.Random(1).sample(range(60), 5) + [0]:
        with make(shards) as loader:
            take(loader, stop)
            state = json.loads(json.dumps(loader.state()))
            counts = loader.counts
        with make(shards, state=state) as resumed:
            assert resumed.counts == counts
            assert same(take(resumed, 60 - stop), expected[stop:]), f"stopped after {stop}"


@every_loader
def test_a_run_of_four_ranks_goes_on_as_two_or_eight(shards, make):
    with make(shards) as loader:
        expected = take(loader, 32)
    states = []
    for rank in range(4):
        with make(shards, rank=rank, world_size=4) as loader:
            take(loader, 4)
            states.append(loader.state())
    state = json.loads(json.dumps(merge_states(states)))
    for world_size in (1, 2, 8):
        for rank in range(world_size):
            with make(shards, rank=rank, world_size=world_size, state=state) as loader:
                assert same(take(loader, 16 // world_size), expected[16 + rank::world_size])


@every_loader
def test_targets_are_the_inputs_shifted_by_one(shards, make):
    with make(shards) as loader:
        for inputs, targets in take(loader, 20):
            assert inputs.dtype == targets.dtype == torch.int64 and inputs.shape == targets.shape
            shown = (targets[:, :-1] >= 0) & ((targets[:, 1:] >= 0) | (make is make_pretraining))  # padding follows an end
            assert shown.any() and torch.equal(targets[:, :-1][shown], inputs[:, 1:][shown])


@every_loader
def test_a_bounded_loader_ends_and_so_does_its_thread(shards, make):
    loader = make(shards, max_batches=3)
    assert len(take(loader, 10)) == 3
    loader.thread.join(timeout=5)
    assert not loader.thread.is_alive()
    with pytest.raises(StopIteration):
        next(loader)


@every_loader
def test_close_ends_a_thread_that_waits_for_room(shards, make):
    loader = make(shards, prefetch=1)
    next(loader)
    loader.close()
    assert not loader.thread.is_alive()


def test_an_error_in_the_thread_reaches_the_consumer(shards):
    class Broken(Words):
        def encode(self, texts, num_threads=1):
            raise RuntimeError("no such word")
    with pytest.raises(RuntimeError, match="no such word"):
        next(PretrainingLoader(Broken(), shards, 2, 24))


@every_loader
def test_a_state_of_other_data_or_of_another_rank_is_refused(shards, make):
    with make(shards) as loader:
        state = loader.state()
    with pytest.raises(ValueError, match="num_items was"):
        make(shards, state={**state, "data": {**state["data"], "num_items": 1}})
    with pytest.raises(ValueError, match="num_lanes was 8 and is 9"):
        make(shards, state=state, rank=1, world_size=3)
    with make(shards, rank=0, world_size=2) as loader:
        state = loader.state()
    with pytest.raises(ValueError, match="merge_states"):
        make(shards, state=state, rank=1, world_size=2)


def test_impossible_ranks_and_sizes_are_refused(shards):
    with pytest.raises(ValueError, match="rank=2 does not exist"):
        make_pretraining(shards, rank=2, world_size=2)
    with pytest.raises(ValueError, match="seq_len=0"):
        make_pretraining(shards, seq_len=0)
    with pytest.raises(ValueError, match="0 conversations"):
        PaddedLoader(Bytes(), Sums(0), 2, 24)


# -- packed documents -------------------------------------------------------------------------------------------------

def test_rows_are_full_and_begin_with_bos(shards):
    with make_pretraining(shards) as loader:
        for inputs, targets in take(loader, 50):
            assert inputs.shape == (2, 24)
            assert (inputs[:, 0] == 0).all() and (targets >= 0).all()
        assert loader.counts["padding"] == 0


def test_no_token_is_lost_and_none_is_taught_twice_in_an_epoch(shards):
    """What a lane has taught and what waits in its buffer are exactly the documents it has read."""
    texts = [text for path in shards for text in pq.read_table(path)["text"].to_pylist()]
    feed = packing.DocumentFeed(Words(), shards, 1)
    for number in range(8):
        lane = packing.PackedLane(feed, number, 8, 2, 24, 0, True, None)
        taught = [word for index in range(40) for word in lane.micro_batch(index)[1].flatten().tolist() if word]
        waiting = [word for _, offset, tokens, _ in lane.pieces for word in tokens[offset:].tolist()]
        mine = [item for item in range(lane.next) if item // feed.block_size % 8 == number]
        assert lane.next < len(texts) and len(taught) > 0.8 * 40 * 2 * 24
        assert sorted(taught + waiting) == [int(word) for item in mine for word in texts[item].split()]


def test_ranks_are_disjoint(shards):
    seen = []
    for rank in range(4):
        with make_pretraining(shards, rank=rank, world_size=4) as loader:
            seen.append({word for _, targets in take(loader, 20) for word in targets.flatten().tolist()} - {0})
            assert loader.epoch == 0
    for one in range(4):
        for other in range(one):
            assert not seen[one] & seen[other]


def test_epochs_are_counted_and_come_back(tmp_path):
    pq.write_table(pa.table({"text": [str(i) for i in range(1, 9)]}), tmp_path / "tiny.parquet")
    with make_pretraining([tmp_path / "tiny.parquet"]) as loader:
        batches = take(loader, 20)
        assert loader.epoch > 3
    assert {word for _, targets in batches for word in targets.flatten().tolist()} == set(range(9))


def test_the_state_is_small(shards):
    with make_pretraining(shards) as loader:
        take(loader, 40)
        assert len(json.dumps(loader.state())) < 20_000


def test_texts_without_a_token_are_an_error_and_not_an_endless_search(tmp_path):
    pq.write_table(pa.table({"text": ["", None, ""]}), tmp_path / "empty.parquet")
    with pytest.raises(ValueError, match="the texts are empty"):
        next(make_pretraining([tmp_path / "empty.parquet"]))


# -- packed conversations ---------------------------------------------------------------------------------------------

def conversations_in(inputs):
    """(B, T) inputs -> the question numbers of the conversations in them, cut at <|bos|>."""
    found = []
    for row in inputs.tolist():
        for start in [place for place, token in enumerate(row) if token == BOS and row[place + 1:place + 2] == [USER_START]]:
            found.append(int(bytes(row[start + 2:row.index(USER_END, start)]).split(b"+")[0]))
    return found


def test_conversations_are_never_split_and_the_gap_is_ignored(shards):
    with make_conversations(shards) as loader:
        for inputs, targets in take(loader, 20):
            for row, target in zip(inputs.tolist(), targets.tolist()):
                assert row.count(USER_START) == row.count(ASSISTANT_END) + (ASSISTANT_END == target[-1])
                assert all(t == -1 or t == row[i + 1] for i, t in enumerate(target[:-1]))
        assert 0 < loader.counts["padding"] < 0.1 * loader.counts["positions"]
        assert loader.counts["truncated"] == 0


def test_each_epoch_gives_every_conversation_once_in_a_new_order(shards):
    with make_conversations(shards, device_batch_size=1, seq_len=400) as loader:
        order = [number for inputs, _ in take(loader, 150) for number in conversations_in(inputs)]
    counts = Counter(order)
    assert set(counts) == set(range(150)) and max(counts.values()) - min(counts.values()) <= 8


def test_train_on_all_teaches_the_question_too(shards):
    with make_conversations(shards) as loader:
        (inputs, targets), = take(loader, 1)
    with make_conversations(shards, train_on_all=True) as loader:
        (all_inputs, all_targets), = take(loader, 1)
    assert torch.equal(inputs, all_inputs)
    for untaught in (BOS, USER_END, ASSISTANT_START):
        assert not (targets == untaught).any() and (all_targets == untaught).any()
    assert torch.equal(targets[targets >= 0], all_targets[targets >= 0])


def test_a_conversation_longer_than_a_row_is_cut_and_counted(shards):
    with make_conversations(shards, seq_len=20) as loader:
        take(loader, 10)
        assert loader.counts["truncated"] > 0


# -- padded conversations ---------------------------------------------------------------------------------------------

def test_padded_rows_hold_one_conversation_and_teach_only_the_answer(shards):
    with make_padded(shards, pad_multiple=16) as loader:
        for inputs, targets in take(loader, 20):
            assert inputs.shape[1] % 16 == 0 and inputs.shape[0] == 2
            for row, target, number in zip(inputs.tolist(), targets.tolist(), conversations_in(inputs)):
                answer = Sums(150)[number]["messages"][1]["content"]
                assert bytes(t for t in target if 0 <= t < 256).decode() == answer
                assert [t for t in target if t >= 256] == [ASSISTANT_END]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_one_epoch_gives_each_conversation_exactly_once_to_all_ranks_together(shards, world_size):
    found, lengths = [], set()
    for rank in range(world_size):
        with make_padded(shards, device_batch_size=4, rank=rank, world_size=world_size, num_epochs=1) as loader:
            batches = take(loader, 1000)
            assert len(batches) == len(loader)
            lengths.add(len(batches))
            found += [number for inputs, _ in batches for number in conversations_in(inputs)]
    assert sorted(found) == list(range(150)) and len(lengths) == 1


def test_grouping_by_length_saves_padding(shards, monkeypatch):
    shares = []
    for window in (16, 1):
        monkeypatch.setattr(packing, "WINDOW_BATCHES", window)
        with make_padded(shards, device_batch_size=8, pad_multiple=8, num_epochs=1) as loader:
            take(loader, 100)
            shares.append(loader.counts["padding"] / loader.counts["positions"])
    assert shares[0] < 0.5 * shares[1]


def test_a_conversation_cut_before_its_answer_is_counted_and_teaches_nothing(shards):
    with make_padded(shards, seq_len=5, num_epochs=1) as loader:
        batches = take(loader, 100)
        assert loader.counts["skipped"] > 100
    assert sum((targets >= 0).sum().item() for _, targets in batches) < 150
