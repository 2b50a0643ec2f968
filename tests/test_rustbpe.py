"""Rust merges, pieces and ids = those of the slow Python reference, of the `regex` package, of tiktoken and of PyPI's rustbpe."""
import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import rustbpe
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.common import env
from tests import bpe_reference

DEFAULT = rustbpe.default_pattern(2)
WORDS = r"[^ ]+| "          # outside the default family, and longer pieces
EVERYTHING = r"[\s\S]+"

# characters that Python 3.11 knows: the regex package knows newer letters than fancy-regex and tiktoken do
known = st.characters(exclude_categories=["Cn", "Cs", "Co"])
tricky = st.sampled_from("aZ sSlLvVeErRdmtſK'’ \u00a0\u0085\u3000\u2028\t\r\n\x0b\x1c07٣½²Ⅷ.,!-_é漢字\u0947\u0301\u200d😀\x00")
texts = st.lists(st.one_of(tricky, tricky, known), max_size=24).map("".join)
small_texts = st.sampled_from(["ab", "aab ", "abcd  ", "abcé漢  '\n1"]).flatmap(lambda letters: st.text(letters, max_size=60))


def train(corpus, vocab_size, pattern=None, **options):
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(iter(corpus), vocab_size, pattern=pattern, **options)
    return tokenizer


def tokens_of(tokenizer):
    return [token for token, _ in tokenizer.get_mergeable_ranks()]


def real_texts(megabytes, split="train"):
    folder = Path(env("NANOCHAT_TEST_DATA") or Path(__file__).parents[2] / "shared" / "data") / "text"
    shards = sorted(folder.glob(f"{split}_*.parquet"))
    if not shards:
        pytest.skip(f"no real text in {folder}")
    corpus, size = [], 0
    for shard in shards:
        for batch in pq.ParquetFile(shard).iter_batches(64, columns=["text"]):
            for text in batch["text"].to_pylist():
                corpus.append(text)
                size += len(text)
            if size > megabytes * 1e6 * (shards.index(shard) + 1) / len(shards):
                break
    return corpus


def assert_split_as_the_regex_package_does(text):
    for digits in (1, 2, 3):
        pattern = rustbpe.default_pattern(digits)
        pieces = rustbpe.split(text, pattern)
        assert pieces == bpe_reference.split(text, pattern)
        assert "".join(pieces) == text


# -- the splitter

@settings(max_examples=3000, deadline=None)
@given(texts)
def test_the_splitter_cuts_as_the_regex_package_does(text):
    assert_split_as_the_regex_package_does(text)


@pytest.mark.slow
@settings(max_examples=100_000, deadline=None)
@given(texts)
def test_the_splitter_cuts_as_the_regex_package_does_a_hundred_thousand_times(text):
    assert_split_as_the_regex_package_does(text)


@pytest.mark.parametrize("text, pieces", [
    ("don't DON'T we'll'VE", ["don", "'t", " DON", "'T", " we", "'ll", "'VE"]),
    ("12345 6", ["12", "34", "5", " ", "6"]),
    ("x  y   \n\n z ", ["x", " ", " y", "   \n\n", " z", " "]),
    ("a=[b];\n\nc", ["a", "=[", "b", "];\n\n", "c"]),
    ("'save (word", ["'s", "ave", " (", "word"]),
])
def test_pieces_known_by_hand(text, pieces):
    assert rustbpe.split(text) == pieces


@pytest.mark.slow
def test_every_code_point_is_cut_as_tiktoken_cuts_it():
    tokens = [bytes([byte]) for byte in range(256)]
    for byte in range(128, 256):  # a merge shows that no cut was made
        tokens += [bytes([byte]) + b"a"] + [mark + bytes([byte]) for mark in (b"a", b"1", b"!", b" ")]
    ours = rustbpe.Tokenizer.from_ranks([(token, rank) for rank, token in enumerate(tokens)])
    reference = as_tiktoken(ours)
    for first in range(128, 0x110000, 1 << 16):
        characters = [chr(code) for code in range(first, min(first + (1 << 16), 0x110000)) if not 0xD800 <= code < 0xE000]
        lines = [f"a{c}a 1{c} !{c} {c}a" for c in characters]
        assert ours.encode_batch(lines, 2) == reference.encode_ordinary_batch(lines, num_threads=2)


def test_a_long_run_of_white_space_or_of_anything_takes_linear_time():
    for text in (" " * 300_000 + "x", "\n " * 150_000, "!" * 300_000, "1" * 300_000, "\t" * 300_000, "é" * 300_000):
        assert "".join(rustbpe.split(text)) == text


# -- training

@settings(max_examples=300, deadline=None)
@given(st.lists(small_texts, max_size=6), st.integers(256, 330), st.sampled_from([DEFAULT, WORDS, EVERYTHING]))
def test_merges_equal_the_reference(corpus, vocab_size, pattern):
    tokenizer = train(corpus, vocab_size, pattern)
    assert tokens_of(tokenizer) == bpe_reference.train(corpus, vocab_size, pattern)
    assert tokenizer.get_pattern() == pattern
    assert [rank for _, rank in tokenizer.get_mergeable_ranks()] == list(range(tokenizer.vocab_size))


@settings(max_examples=100, deadline=None)
@given(st.lists(texts, max_size=5))
def test_merges_equal_the_reference_on_any_text(corpus):
    assert tokens_of(train(corpus, 300)) == bpe_reference.train(corpus, 300, DEFAULT)


def test_merges_depend_neither_on_threads_nor_on_buffers():
    corpus = real_texts(1)
    first = tokens_of(train(corpus, 2000, num_threads=1))
    for options in ({"num_threads": 2}, {"num_threads": 7, "buffer_size": 1}, {"buffer_size": 3}):
        assert tokens_of(train(corpus, 2000, **options)) == first
    assert tokens_of(train(corpus[::-1], 2000)) == first


def test_the_rule_for_ties_is_the_smaller_pair():
    assert tokens_of(train(["hello world"], 261))[256:] == [b" w", b"el", b"hel", b"ld", b"lo"]


def test_a_text_that_runs_out_of_pairs_ends_the_training():
    assert tokens_of(train(["aaa"], 400))[256:] == [b"aa", b"aaa"]
    assert train([], 400).vocab_size == train(["", " "], 400).vocab_size == 256
    assert tokens_of(train(["aaa"], 2**30))[256:] == [b"aa", b"aaa"]  # and costs no memory for what will not be


@pytest.mark.parametrize("vocab_size", [-1, 0, 255])
def test_a_vocabulary_smaller_than_the_bytes_is_refused(vocab_size):
    with pytest.raises(ValueError, match=f"vocab_size={vocab_size} is outside 256"):
        train(["text"], vocab_size)


def test_what_cannot_be_trained_on_is_refused():
    with pytest.raises(ValueError, match="item 1 of the iterator is of type int"):
        train(["text", 7], 300)
    with pytest.raises(ValueError, match="not a regular expression"):
        train(["text"], 300, "(")
    with pytest.raises(ValueError, match="buffer_size=0"):
        train(["text"], 300, buffer_size=0)
    with pytest.raises(ValueError, match="surrogates"):
        train(["\ud800"], 300)
    with pytest.raises(ValueError, match="digits=4"):
        rustbpe.default_pattern(4)
    with pytest.raises(ValueError, match="0 tokens"):
        rustbpe.Tokenizer().encode("text")


def test_an_error_of_the_iterator_arrives_and_the_tokenizer_stays_as_it_was():
    def broken():
        yield "text " * 1000
        raise OSError("the shard is gone")

    tokenizer = train(["abab"], 300)
    before = tokens_of(tokenizer)
    with pytest.raises(OSError, match="the shard is gone"):
        tokenizer.train_from_iterator(broken(), 300)
    assert tokens_of(tokenizer) == before


PEER = """
import json, sys
import rustbpe
assert rustbpe.__file__.startswith(sys.argv[1]), rustbpe.__file__
for line in sys.stdin:
    job = json.loads(line)
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(iter(job["corpus"]), job["vocab_size"], pattern=job["pattern"])
    print(json.dumps([token.hex() for token, _ in tokenizer.get_mergeable_ranks()]))
"""


def test_merges_equal_those_of_the_published_rustbpe(tmp_path):
    peer = env("NANOCHAT_PEER_RUSTBPE")
    if not peer:
        pytest.skip("NANOCHAT_PEER_RUSTBPE names no folder: pip install --target FOLDER rustbpe==0.1.0")
    jobs = [{"corpus": real_texts(4), "vocab_size": 8192, "pattern": rustbpe.default_pattern(digits)} for digits in (2, 3)]
    jobs += [{"corpus": ["aaaa aaa abab abababa bb" * i], "vocab_size": 300, "pattern": WORDS} for i in range(5)]
    output = subprocess.run([sys.executable, "-c", PEER, str(Path(peer).resolve())], input="\n".join(map(json.dumps, jobs)), cwd=tmp_path,
                            env={"PYTHONPATH": str(Path(peer).resolve())}, capture_output=True, text=True, check=True).stdout
    for job, line in zip(jobs, output.splitlines(), strict=True):
        assert [token.hex() for token in tokens_of(train(job["corpus"], job["vocab_size"], job["pattern"]))] == json.loads(line)


# -- encoding

def as_tiktoken(tokenizer):
    return tiktoken.Encoding("test", pat_str=tokenizer.get_pattern(), mergeable_ranks=dict(tokenizer.get_mergeable_ranks()), special_tokens={})


@pytest.fixture(scope="module")
def small():
    return train(["the cat sat on the mat, 'twas 1234 times! \n\n don't we'll " * 3, "Привет мир, 漢字 漢字 é é"], 400)


@settings(max_examples=500, deadline=None)
@given(text=st.one_of(texts, st.text("thecaso 1'\n漢é", max_size=150)))
def test_ids_equal_the_reference_and_tiktoken(small, text):
    ids = small.encode(text)
    assert ids == as_tiktoken(small).encode_ordinary(text) == bpe_reference.encode(text, tokens_of(small), small.get_pattern())


@settings(max_examples=300, deadline=None)
@given(st.lists(small_texts, min_size=1, max_size=4), small_texts, st.sampled_from([DEFAULT, WORDS, EVERYTHING]))
def test_ids_equal_tiktoken_for_any_vocabulary(corpus, text, pattern):
    tokenizer = train(corpus, 320, pattern)
    assert tokenizer.encode(text) == as_tiktoken(tokenizer).encode_ordinary(text)


def test_ids_equal_tiktoken_for_ranks_that_no_training_would_give():
    tokens = [bytes([byte]) for byte in range(255, -1, -1)] + [b"abcd", b"bc", b"ab", b"cd", b"abc", b"zzzzzzzzzzzzzzzzzzzzz", b"xy xy"]
    tokenizer = rustbpe.Tokenizer.from_ranks([(token, rank) for rank, token in enumerate(tokens)])
    for text in ("abcd", "abcdabcd", "abcde", "zabc", "z" * 21, "z" * 22, "bcbc", "xy xy"):
        assert tokenizer.encode(text) == as_tiktoken(tokenizer).encode_ordinary(text)


def test_ids_of_real_text_equal_tiktoken_whatever_the_threads():
    corpus = real_texts(1)
    tokenizer = train(corpus, 4096)
    unseen = real_texts(1, "val") + ["a" * 5000, "ab" * 3000, "漢" * 1000, ""]
    expected = as_tiktoken(tokenizer).encode_ordinary_batch(unseen)
    for num_threads in (1, 2, 5, 0):
        assert tokenizer.encode_batch(unseen, num_threads) == expected
    assert [tokenizer.encode(text) for text in unseen] == expected
    assert tokenizer.encode_batch([], 4) == []


def test_damaged_ranks_are_refused():
    full = [(bytes([byte]), byte) for byte in range(256)]
    for ranks, message in ((full[:-1], "no token is the single byte 255"), (full + [(b"ab", 300)], "rank 300 of the 257"),
                           (full + [(b"ab", 3)], "rank 3 of the 257"), ([], "0 tokens"), (full + [(b"", 256)], "token 256 has no bytes")):
        with pytest.raises(ValueError, match=message):
            rustbpe.Tokenizer.from_ranks(ranks)
