import json

import pytest
import torch

from nanochat.engine import Engine, message_parts
from scripts.chat_cli import Chat, Config
from tests.test_engine import END, OUTPUT_END, OUTPUT_START, PYTHON_END, PYTHON_START, ByteTokenizer, make_model


class ChatTokenizer(ByteTokenizer):
    """Every text of a conversation between bars."""

    def render_prompt(self, messages):
        texts = [m["content"] if isinstance(m["content"], str) else "".join(part["text"] for part in m["content"]) for m in messages]
        return [self.bos_id, *"|".join(texts).encode()]


class Script:
    """Says a fixed answer, token by token, like Engine.stream."""
    stops = {END, 256}
    tokenizer = ChatTokenizer()

    def __init__(self, answer):
        self.answer, self.asked, self.model = answer, [], make_model()

    def stream(self, tokens, **settings):
        self.asked.append((self.tokenizer.decode(tokens[1:]), settings["temperature"], settings["seed"]))
        for token in self.answer:
            if token is KeyboardInterrupt:
                raise KeyboardInterrupt
            yield token, False


def talk(answer, **changes):
    written = []
    chat = Chat(Script(answer), Config(**changes), lambda text="", end="\n", flush=False: written.append(text + end))
    return chat, written


def test_a_conversation_grows_by_question_and_answer_and_can_be_taken_back():
    chat, written = talk([*"fine é".encode(), END])
    chat.ask("how?")
    chat.ask("and?")
    assert "".join(written) == "fine é\n" * 2
    assert [question for question, _, _ in chat.engine.asked] == ["how?", "how?|fine é|and?"]
    chat.command("/temp 0")
    chat.command("/retry")
    assert chat.engine.asked[-1] == ("how?|fine é|and?", 0.0, 2) and len(chat.messages) == 4
    chat.engine.answer = [END]
    chat.command("/retry")
    assert len(chat.messages) == 4, "an answer that does not come replaces none"
    chat.command("/clear")
    assert chat.messages == [] and chat.command("/help") and not chat.command("/quit")


def test_a_stopped_answer_is_kept_as_far_as_it_came_and_an_empty_one_is_not():
    chat, written = talk([*b"par", KeyboardInterrupt])
    chat.ask("q")
    assert chat.messages[-1]["content"] == [{"type": "text", "text": "par"}] and written[-1] == " [stopped]\n"
    chat, _ = talk([KeyboardInterrupt])
    chat.ask("q")
    assert chat.messages == []


def test_the_conversation_is_saved_as_one_line_of_json(tmp_path):
    chat, written = talk([*b"ok", END])
    chat.ask("q")
    chat.command(f"/save {tmp_path / 'talk.jsonl'}")
    assert json.loads((tmp_path / "talk.jsonl").read_text()) == {"messages": chat.messages}
    (tmp_path / "file").write_text("")
    chat.command(f"/save {tmp_path / 'file' / 'below'}")
    assert "not saved" in written[-1]


@pytest.mark.parametrize("line", ["/temp", "/temp hot", "/temp -1", "/temp nan", "/save", "/retry", "/nonsense"])
def test_a_wrong_command_shows_the_commands(line):
    chat, written = talk([END])
    assert chat.command(line) and "/quit" in written[-1] and chat.temperature == 0.6


def test_what_steers_a_terminal_is_not_passed_on():
    chat, written = talk([*b"\x1b[2J\x07ok\n", END])
    chat.ask("q")
    assert "\x1b" not in "".join(written) and "\x07" not in "".join(written) and "ok\n" in "".join(written)


def test_the_oldest_exchanges_go_when_the_context_is_full():
    chat, _ = talk([*b"a" * 20, END])
    for question in "xyz":
        chat.ask(question * 15)
    assert chat.engine.asked[-1][0] == "z" * 15 and len(chat.messages) == 6
    chat.ask("w" * 80)  # too long for the model by itself: the engine says so, the program goes on


def test_a_question_that_cannot_fit_is_refused_in_words():
    written = []
    chat = Chat(Engine(make_model(), ChatTokenizer()), Config(), lambda text="", end="\n", flush=False: written.append(text))
    chat.ask("w" * 80)
    assert any("81 tokens" in text for text in written) and chat.messages == []
    torch.manual_seed(0)
    chat.ask("hello")
    assert chat.engine.is_idle


def test_tool_calls_become_parts_of_the_message():
    tokens = [*b"so ", PYTHON_START, *b"1+1", PYTHON_END, OUTPUT_START, *b"2", OUTPUT_END, *b"done", END]
    assert message_parts(ByteTokenizer(), tokens) == [{"type": "text", "text": "so "}, {"type": "python", "text": "1+1"},
                                                      {"type": "python_output", "text": "2"}, {"type": "text", "text": "done"}]
    assert message_parts(ByteTokenizer(), [PYTHON_START, *b"1+"]) == [] == message_parts(ByteTokenizer(), [END])
