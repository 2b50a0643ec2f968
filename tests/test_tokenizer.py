"""decode(encode(x)) = x; the mask covers exactly the assistant's tokens; damaged and hostile files are refused."""
import json
import os
import pickle
import pickletools

import pytest
import tiktoken
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.tokenizer import FILE_NAME, MIN_TRAINED, SPECIAL_TOKENS, Tokenizer, get_tokenizer, split_pattern
from scripts import tok_eval, tok_train

CORPUS = ["The quick brown fox, 12 + 34 = 46? Don't ask! <|bos|> the end of the question and the answer\n\n" * 4, "Привет, мир. 漢字漢字 e\u0301",
          "Twenty zebras juggle vexing puzzles while kind wizards hum of bygone jazz, 1875 and 2046: x^2 - y_1 = \\frac{a}{b} (see §7)."]
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
look_alikes = st.lists(st.one_of(any_text, st.sampled_from([*SPECIAL_TOKENS, "<|", "|>", "bos", "<|endoftext|>"])), max_size=6).map("".join)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(CORPUS, 400)


@pytest.fixture(scope="module")
def unusual():
    return Tokenizer.train(CORPUS, 350, pattern=r"\w+|\W+")


# -- text

@settings(max_examples=500, deadline=None)
@given(text=look_alikes)
def test_decoding_undoes_encoding_and_text_never_becomes_a_special_token(tokenizer, unusual, text):
    for each in (tokenizer, unusual):
        ids = each.encode(text)
        assert each.decode(ids) == text
        assert all(token_id < len(each.tokens) for token_id in ids)
        assert ids == each.tiktoken.encode_ordinary(text)
        assert b"".join(map(each.id_to_bytes, ids)) == text.encode()
        assert sum(each.token_bytes()[token_id] for token_id in ids) == len(text.encode())


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(look_alikes, max_size=5), num_threads=st.integers(1, 4))
def test_a_list_is_encoded_as_its_items_are_whatever_the_threads(tokenizer, unusual, texts, num_threads):
    for each in (tokenizer, unusual):
        assert each.encode(texts, num_threads=num_threads) == [each.encode(text) for text in texts]
        wrapped = each.encode(texts, prepend="<|bos|>", append=5, num_threads=num_threads)
        assert wrapped == [[each.bos_id, *each.encode(text), 5] for text in texts]


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 390), max_size=20))
def test_any_ids_decode(tokenizer, ids):
    assert isinstance(tokenizer.decode(ids), str)


def test_half_a_surrogate_pair_becomes_a_replacement_character(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
    assert tokenizer.encode("a\ud800b") == tokenizer.tiktoken.encode_ordinary("a\ud800b")
    assert tokenizer.decode(tokenizer.encode("\ud83d\ude00")) == "😀"


def test_special_tokens_stand_behind_the_mergeable_ones(tokenizer):
    assert [tokenizer.encode_special(name) for name in SPECIAL_TOKENS] == list(range(tokenizer.vocab_size - 9, tokenizer.vocab_size))
    assert tokenizer.vocab_size == 400 and tokenizer.bos_id == 391
    assert tokenizer.decode([tokenizer.bos_id, *tokenizer.encode("x")]) == "<|bos|>x"
    assert tokenizer.token_bytes()[-9:] == [0] * 9
    assert tokenizer.encode("x", prepend=tokenizer.bos_id) == tokenizer.encode("x", prepend="<|bos|>")


def test_torn_characters_are_shown_as_replacements(tokenizer):
    assert tokenizer.decode(list("€".encode())[:2]) == "\ufffd"


def test_wrong_arguments_are_refused(tokenizer):
    for call, message in ((lambda: tokenizer.encode("x", prepend="<|eos|>"), "not one of the 9"), (lambda: tokenizer.encode("x", append=400), "id 400"),
                          (lambda: tokenizer.decode([-1]), "id -1"), (lambda: tokenizer.encode(["x", None]), "a NoneType among 2"), (lambda: tokenizer.encode(b"x"), "encode got a bytes"),
                          (lambda: tokenizer.encode(["x"], num_threads=0), "num_threads=0"), (lambda: Tokenizer.train(CORPUS, 264), "vocab_size=264"),
                          (lambda: Tokenizer(tokenizer.tokens, tokenizer.pattern, ["<|bos|>"]), "are not the 9")):
        with pytest.raises(ValueError, match=message):
            call()


# -- files

def test_what_is_saved_is_what_is_loaded(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    tokenizer.save(tmp_path / "tokenizer")
    loaded = get_tokenizer()
    assert loaded.fingerprint == tokenizer.fingerprint and loaded.special_ids == tokenizer.special_ids
    assert loaded.encode(CORPUS) == tokenizer.encode(CORPUS)


def test_the_fingerprint_tells_merges_and_patterns_apart(tokenizer):
    others = [Tokenizer.train(CORPUS, 399), Tokenizer.train(CORPUS, 400, pattern=split_pattern(3)), Tokenizer.train(["other text"] * 9, 400)]
    assert len({other.fingerprint for other in [tokenizer, *others]}) == 4
    assert Tokenizer.train(CORPUS, 400, num_threads=1).fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"format": "nanochat-tokenizer-1"}', b"\x80\x04\x95", b'{"format": "other"}',
                                     b'{"format": "nanochat-tokenizer-1", "mergeable_ranks": 7, "pattern": "x", "special_tokens": []}'])
def test_foreign_files_are_refused(content, tmp_path):
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(ValueError, match=f"{len(content)} bytes.*cannot be used"):
        Tokenizer.load(tmp_path)


def test_torn_and_altered_files_are_refused(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    whole = (tmp_path / FILE_NAME).read_bytes()
    for size in range(0, len(whole), 97):
        (tmp_path / FILE_NAME).write_bytes(whole[:size])
        with pytest.raises(ValueError, match="cannot be used"):
            Tokenizer.load(tmp_path)
    stored = json.loads(whole)
    for name, value in (("pattern", "("), ("pattern", r"\w+"), ("special_tokens", SPECIAL_TOKENS[::-1]), ("fingerprint", "0"), ("pattern", None),
                        ("mergeable_ranks", stored["mergeable_ranks"][:-1]), ("mergeable_ranks", ["*"]), ("mergeable_ranks", [])):
        (tmp_path / FILE_NAME).write_text(json.dumps({**stored, name: value}))
        with pytest.raises(ValueError, match="cannot be used"):
            Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="scripts.tok_train"):
        Tokenizer.load(tmp_path / "nowhere")


@pytest.mark.parametrize("protocol", range(3, pickle.HIGHEST_PROTOCOL + 1))
def test_a_reference_pickle_becomes_the_same_tokenizer(tokenizer, tmp_path, protocol):
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(tokenizer.tiktoken, protocol))
    torch.save(torch.tensor(tokenizer.token_bytes(), dtype=torch.int32), tmp_path / "token_bytes.pt")
    for path in (tmp_path, tmp_path / "tokenizer.pkl"):
        assert Tokenizer.from_reference_pickle(path).fingerprint == tokenizer.fingerprint
    torch.save(torch.zeros(400, dtype=torch.int32), tmp_path / "token_bytes.pt")
    with pytest.raises(ValueError, match="belong to different tokenizers"):
        Tokenizer.from_reference_pickle(tmp_path)


class Evil:
    """Unpickled by the standard library it leaves a folder behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_malicious_pickle_is_refused_and_does_nothing(tokenizer, tmp_path):
    trap = tmp_path / "trap"
    encoding = tokenizer.tiktoken
    hidden = tiktoken.Encoding("x", pat_str=encoding._pat_str, mergeable_ranks=encoding._mergeable_ranks, special_tokens=tokenizer.special_ids)
    hidden.name = Evil(trap)  # in the state of an otherwise true encoding
    name = pickletools.optimize(pickle.dumps(encoding)).replace(b"tiktoken.core", b"tiktoken.load").replace(b"\x8c\x08Encoding", b"\x8c\x09read_file")
    for content in (pickle.dumps(Evil(trap)), pickle.dumps([Evil(trap)]), pickle.dumps(hidden), pickle.dumps(eval), name,
                    b"cposix\nsystem\n(S'mkdir " + str(trap).encode() + b"'\ntR.", b"cbuiltins\neval\n(S'1'\ntR.", b"", b"garbage",
                    pickle.dumps(encoding)[:-200], pickle.dumps({"pat_str": "x"}), pickle.dumps(tiktoken.Encoding),
                    pickle.dumps(encoding).replace(b"pat_str", b"Pat_str")):
        (tmp_path / "tokenizer.pkl").write_bytes(content)
        with pytest.raises(ValueError, match="cannot be read as a tokenizer"):
            Tokenizer.from_reference_pickle(tmp_path)
        assert not trap.exists()
    pickle.loads(pickle.dumps(Evil(trap)))
    assert trap.exists()  # the trap works


def test_a_reference_with_other_special_tokens_is_refused(tokenizer, tmp_path):
    for special in ({"<|endoftext|>": 391}, {name: 500 + i for i, name in enumerate(SPECIAL_TOKENS)}):
        encoding = tiktoken.Encoding("x", pat_str=r"\w+", mergeable_ranks={token: i for i, token in enumerate(tokenizer.tokens)}, special_tokens=special)
        (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(encoding))
        with pytest.raises(ValueError, match="special tokens"):
            Tokenizer.from_reference_pickle(tmp_path)


# -- conversations

CONVERSATION = {"messages": [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "12 + 34?"},
    {"role": "assistant", "content": [{"type": "text", "text": "Let me see "}, {"type": "python", "text": "12+34"},
                                      {"type": "python_output", "text": "46"}, {"type": "text", "text": "46"}]},
    {"role": "user", "content": [{"type": "text", "text": "Thank"}, {"type": "text", "text": " you"}]},
    {"role": "assistant", "content": "<|bos|>"},
]}


def spans(tokenizer, ids, mask):
    """[(text, mask)] of the runs of equal mask."""
    runs = []
    for token_id, trained in zip(ids, mask, strict=True):
        if runs and runs[-1][1] == trained:
            runs[-1][0].append(token_id)
        else:
            runs.append(([token_id], trained))
    return [(tokenizer.decode(run), trained) for run, trained in runs]


def test_the_mask_covers_exactly_what_the_assistant_says(tokenizer):
    ids, mask = tokenizer.render_conversation(CONVERSATION)
    assert spans(tokenizer, ids, mask) == [
        ("<|bos|><|user_start|>Be brief.\n\n12 + 34?<|user_end|><|assistant_start|>", 0),
        ("Let me see <|python_start|>12+34<|python_end|>", 1),
        ("<|output_start|>46<|output_end|>", 0),
        ("46<|assistant_end|>", 1),
        ("<|user_start|>Thank you<|user_end|><|assistant_start|>", 0),
        ("<|bos|><|assistant_end|>", 1)]
    assert ids.count(tokenizer.bos_id) == 1


def test_prompts_end_where_the_assistant_begins(tokenizer):
    ids, mask = tokenizer.render_conversation(CONVERSATION)
    prompt = tokenizer.render_for_completion(CONVERSATION)
    assert prompt == ids[:len(prompt)] and prompt[-1] == tokenizer.encode_special("<|assistant_start|>") and not mask[len(prompt) - 1]
    assert tokenizer.render_prompt(CONVERSATION["messages"][:-1]) == prompt
    assert len(CONVERSATION["messages"]) == 5  # nothing was changed on the way


words = st.lists(st.sampled_from(["the ", "question ", "12 ", "x", "漢", "<|user_end|>"]), min_size=1, max_size=30).map("".join)
answers = st.one_of(words, st.lists(st.fixed_dictionaries({"type": st.sampled_from(["text", "python", "python_output"]), "text": words | st.just("")}),
                                    min_size=1, max_size=4))
conversations = st.tuples(st.one_of(st.none(), words), st.lists(st.tuples(words, answers), min_size=1, max_size=4)).map(lambda drawn: {"messages":
    ([{"role": "system", "content": drawn[0]}] if drawn[0] else [])
    + [message for question, answer in drawn[1] for message in ({"role": "user", "content": question}, {"role": "assistant", "content": answer})]})


@settings(max_examples=400, deadline=None)
@given(conversation=conversations, max_tokens=st.integers(6, 200))
def test_a_conversation_of_any_length_keeps_something_to_learn(tokenizer, conversation, max_tokens):
    full_ids, full_mask = tokenizer.render_conversation(conversation, 10**9)
    before = tokenizer.truncated, tokenizer.untrained
    ids, mask = tokenizer.render_conversation(conversation, max_tokens)
    assert len(ids) == len(mask) <= max_tokens and ids[0] == tokenizer.bos_id
    assert set(mask) <= {0, 1} and sum(mask) <= sum(full_mask)
    assert (tokenizer.truncated - before[0]) == (len(full_ids) > max_tokens)
    assert (tokenizer.untrained - before[1]) == (not any(mask))
    if len(full_ids) <= max_tokens:
        assert (ids, mask) == (full_ids, full_mask)
    has_output = any(part["type"] == "python_output" for message in conversation["messages"] if isinstance(message["content"], list)
                     for part in message["content"])
    if not has_output:  # what a tool says may fill all the room there is
        assert any(mask)
    structure = [token_id for token_id in ids if token_id >= len(tokenizer.tokens)]
    opened = [name for name in SPECIAL_TOKENS if name.endswith("_start|>")]
    for name in opened:  # every marker that is opened is closed, but for the one that the cut hit
        missing = structure.count(tokenizer.encode_special(name)) - structure.count(tokenizer.encode_special(name.replace("start", "end")))
        assert missing in (0, 1)


def test_a_long_conversation_loses_its_end_then_its_beginning_then_half_its_question(tokenizer):
    def exchange(question, answer):
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    short, long = exchange("question", "the answer " * 10), exchange("the " * 300, "the answer " * 60)
    ids, mask = tokenizer.render_conversation({"messages": short + long}, 100)
    assert ids == tokenizer.render_conversation({"messages": short + long}, 10**6)[0][:100] and sum(mask) >= MIN_TRAINED
    assert tokenizer.render_conversation({"messages": long + short}, 100) == tokenizer.render_conversation({"messages": short})
    ids, mask = tokenizer.render_conversation({"messages": long}, 100)
    assert len(ids) == 100 and sum(mask) == 49  # 50 for the answer with its marker, which is not trained on
    assert tokenizer.decode(ids).startswith("<|bos|><|user_start|> the") or tokenizer.decode(ids).startswith("<|bos|><|user_start|>the")
    answer = exchange("the " * 300, "end")
    assert tokenizer.decode(tokenizer.render_conversation({"messages": answer}, 100)[0]).endswith("the <|user_end|><|assistant_start|>end<|assistant_end|>")


def user(content="hello"):
    return {"role": "user", "content": content}


def assistant(content="hello"):
    return {"role": "assistant", "content": content}


@pytest.mark.parametrize("messages, message", [
    (None, "has no messages"), ([], "has no messages"), ("hello", "has no messages"),
    ([assistant()], "message 0 has the role 'assistant', but it is the user's turn"),
    ([user(), user()], "message 1 has the role 'user'"), ([user(), assistant(), assistant()], "message 2 has the role 'assistant'"),
    ([user(), {"role": "system", "content": "x"}], "message 1 has the role 'system'"), ([{"role": "system", "content": "x"}], "add the user's"),
    ([user(), {"role": "tool", "content": "x"}], "message 1 has the role 'tool'"), ([{"content": "x"}], "message 0 has the role None"), (["x"], "message 0"),
    ([user("")], r"message 0 \(user\) is empty"), ([user(), assistant([])], r"message 1 \(assistant\) is empty"),
    ([user(None)], "content of type NoneType"), ([user(), assistant(7)], r"message 1 \(assistant\) has content of type int"),
    ([user(), assistant([{"type": "image", "text": "x"}])], "part of type 'image'"), ([user(), assistant([{"type": "text"}])], "text of type NoneType"),
    ([user([{"type": "python", "text": "1"}])], r"message 0 \(user\) has a part of type 'python'"), ([user(), assistant(["x"])], "part of type None"),
])
def test_bad_conversations_name_the_message(tokenizer, messages, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.render_conversation({"messages": messages})
    with pytest.raises(ValueError, match=message):
        tokenizer.render_prompt(messages)


@settings(max_examples=200, deadline=None)
@given(conversation=st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5),
                                 lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
                                     st.sampled_from(["messages", "role", "content", "type", "text"]), inner | st.sampled_from(["user", "assistant"]), max_size=4)))
def test_rubbish_is_rendered_or_refused_by_a_value_error(tokenizer, conversation):
    try:
        ids, mask = tokenizer.render_conversation(conversation)
    except ValueError:
        return
    assert len(ids) == len(mask) and set(mask) <= {0, 1}


def test_what_has_no_end_to_drop_or_no_question_is_refused(tokenizer):
    with pytest.raises(ValueError, match="message 0 is the user's"):
        tokenizer.render_for_completion({"messages": [user()]})
    with pytest.raises(ValueError, match="message 1 is the assistant's"):
        tokenizer.render_prompt([user(), assistant()])
    with pytest.raises(ValueError, match="max_tokens=5"):
        tokenizer.render_conversation(CONVERSATION, 5)


def test_a_conversation_without_an_answer_teaches_nothing_and_is_counted(tokenizer):
    before = tokenizer.untrained
    assert not any(tokenizer.render_conversation({"messages": [user()]})[1])
    assert tokenizer.untrained == before + 1


def test_visualize_shows_every_token_in_its_colour(tokenizer):
    shown = tokenizer.visualize(*tokenizer.render_conversation(CONVERSATION))
    assert "\033[90m<|bos|>\033[0m" in shown and "\033[32m<|assistant_end|>\033[0m" in shown


# -- the scripts

@pytest.fixture
def shards(tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("shard_00000.parquet", "shard_val.parquet"):
        pq.write_table(pa.table({"text": CORPUS * 20}), folder / name)
    return folder


def test_tok_train_saves_a_tokenizer_of_the_capped_text(shards):
    tok_train.main(tok_train.Config(vocab_size=300, data_dir=str(shards), max_chars=1000, doc_cap=50))
    read = {"documents": 0, "chars": 0, "bytes": 0}
    capped = list(tok_train.capped(iter(CORPUS * 20), tok_train.Config(max_chars=1000, doc_cap=50), read))
    assert sum(map(len, capped)) == read["chars"] == 1000 and max(map(len, capped)) == 50
    assert get_tokenizer().fingerprint == Tokenizer.train(capped, 300).fingerprint
    for changes, message in (({"digits": 4}, "digits=4"), ({"max_chars": 0}, "max_chars=0"), ({"vocab_size": 10}, "vocab_size=10")):
        with pytest.raises(ValueError, match=message):
            tok_train.main(tok_train.Config(**{"data_dir": str(shards), **changes}))


def test_tok_eval_compares_where_it_can_and_says_where_it_cannot(shards, capsys, monkeypatch, tmp_path):
    tok_train.main(tok_train.Config(vocab_size=300, data_dir=str(shards)))
    bytes_only = tiktoken.Encoding("gpt2", pat_str=r"[\s\S]", mergeable_ranks={bytes([byte]): byte for byte in range(256)}, special_tokens={})

    def get_encoding(name):
        if name == "gpt2":
            return bytes_only
        raise ConnectionError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)
    tok_eval.main(tok_eval.Config(data_dir=str(shards)))
    output = capsys.readouterr().out
    assert "GPT-2 (256)" in output and "GPT-4 is not compared" in output and "ConnectionError" in output
    section = json.loads((tmp_path / "base" / "report" / "tok_eval.json").read_text())
    assert {row["kind"] for row in section["data"]["rows"]} == {*tok_eval.SAMPLES, "train shards", "val shard"}
    assert all(row["bytes"] == row["GPT-2"] >= row["tokens"] > 0 for row in section["data"]["rows"])
