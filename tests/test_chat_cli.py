import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nanochat.checkpoint_manager import save_checkpoint
from nanochat.compute import Compute
from nanochat.engine import Engine, Request, message_parts
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import MuonAdamW
from nanochat.tokenizer import get_tokenizer
from nanochat.training import LoopState
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
        self.answer, self.asked, self.model, self.kept = answer, [], make_model(), []

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


def test_a_tool_call_is_shown_and_special_tokens_are_not():
    chat, written = talk([*b"so ", PYTHON_START, *b"12/60", PYTHON_END, OUTPUT_START, *b"0.2", OUTPUT_END, *b"cents", 257, END])
    chat.ask("q")
    assert "".join(written) == "so `12/60` = `0.2` cents\n"
    assert [part["type"] for part in chat.messages[-1]["content"]] == ["text", "python", "python_output", "text"]


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


def test_a_conversation_computes_only_what_is_new_in_a_turn_and_says_what_a_fresh_engine_says():
    def talk_over(keep_rows):
        engine, fed = Engine(make_model(sequence_len=256), ChatTokenizer(), max_rows=1, keep_rows=keep_rows), []
        read = engine.decoder.prompts_raw_logits
        engine.decoder.prompts_raw_logits = lambda prompts, prefill: fed.append(len(prompts[0])) or read(prompts, prefill)
        chat = Chat(engine, Config(temperature=0.0, max_new_tokens=12), lambda *_, **__: None)
        for question in ("a first question", "another", "and a third"):
            chat.ask(question)
        chat.command("/retry")
        asked = [n for n in fed if n > 1]
        chat.command("/clear")
        assert not engine.kept
        return chat, asked, engine

    kept, asked, engine = talk_over(1)
    fresh, all_of_it, _ = talk_over(0)
    assert [m["content"] for m in kept.messages] == [m["content"] for m in fresh.messages]
    assert sum(asked) < sum(all_of_it) / 2 and len(engine.generate([Request([256, 1], max_new_tokens=2)])) == 1


# ---------------------------------------------------------------- the program, in a terminal


@pytest.fixture
def folder(base_directory):
    """A base directory with an untrained model under sft, which never ends by itself."""
    tokenizer = get_tokenizer()
    model = GPT(GPTConfig(4096, tokenizer.vocab_size, 2, 2, 2, 32))
    model.init_weights()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(std=0.1)
        model.lm_head.weight[[tokenizer.encode_special(f"<|{name}|>") for name in ("assistant_end", "bos", "python_start")]] = 0
    compute = Compute(torch.device("cpu"), torch.float32)
    save_checkpoint("sft", "tiny", LoopState(step=1), Config(), compute, model, MuonAdamW(model, compute), tokenizer)
    return base_directory


def command(*flags):
    return [sys.executable, "-m", "scripts.chat_cli", "--source=sft", "--device-type=cpu", "--dtype=float32", "--top-k=5", *flags]


ROOT = Path(__file__).parents[1]


def test_one_question_from_the_command_line(folder):
    result = subprocess.run(command("-p", "hello", "--max-new-tokens=12"), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and result.stdout.strip() and ">" not in result.stdout.splitlines()[0][:2], result.stderr


class Terminal:
    """A program on a pseudo-terminal: what a person types and sees."""

    def __init__(self, arguments):
        self.pid, self.fd = pty.fork()
        if not self.pid:
            os.chdir(ROOT)
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a suite started in the background ignores it, and so would its children
            os.execv(arguments[0], arguments)
        self.seen = ""

    def until(self, pattern, seconds=240):
        """Read until `pattern` appears behind what was awaited last -> the text up to there."""
        deadline = time.monotonic() + seconds
        while not (match := re.search(pattern, self.seen)):
            assert time.monotonic() < deadline, f"{pattern!r} does not come: {self.seen[-2000:]!r}"
            if select.select([self.fd], [], [], 1)[0]:
                self.seen += os.read(self.fd, 65536).decode(errors="replace")
        text, self.seen = self.seen[:match.end()], self.seen[match.end():]
        return text

    def type(self, keys):
        os.write(self.fd, keys.encode())

    def press_until(self, key, pattern, tries=40):
        """Press a key until the program answers, as a person would, another one in between: Python's readline sleeps through a signal that comes just
        before its `select`, and through all of them while it waits for a character that the terminal threw away at Ctrl-C."""
        for left in reversed(range(tries)):
            self.type(key)
            try:
                return self.until(pattern, 6)
            except AssertionError:
                if not left:
                    raise
                self.type("x")


def test_a_talk_in_a_terminal_with_an_answer_stopped_and_a_line_brought_back(folder, tmp_path):
    pytest.importorskip("readline")
    terminal = Terminal(command("--max-new-tokens=3000"))
    try:
        terminal.until("/help tells the rest")
        terminal.until("> ")
        terminal.type("say something long\r")
        terminal.until(r"long\r\n[^\[]{20}")  # it is being said while we read
        terminal.type("\x03")
        terminal.until(r"\[stopped\]")
        terminal.until("> ")
        terminal.type("half a line")
        terminal.until("half a line")  # a line that has not been read yet would be thrown away
        terminal.press_until("\x03", "\r\n\r*\n.*> ")  # at the prompt, Ctrl-C drops the line
        terminal.type("\x1b[A\r")  # arrow up brings back the last line
        terminal.until("say something long")
        terminal.until(r"\r\n[^\[]{20}")
        terminal.type("\x03")
        terminal.until(r"\[stopped\]")
        terminal.until("> ")
        terminal.type("/temp 0\r")
        terminal.until(r"\[temperature 0\.0\]")
        terminal.type(f"/save {tmp_path}/talk.jsonl\r")
        terminal.until(r"\[4 messages written")
        terminal.type("/quit\r")
        assert os.waitstatus_to_exitcode(os.waitpid(terminal.pid, 0)[1]) == 0
        terminal.pid = None
    finally:
        if terminal.pid:
            os.kill(terminal.pid, 9)
            os.waitpid(terminal.pid, 0)
        os.close(terminal.fd)
    messages = json.loads((tmp_path / "talk.jsonl").read_text())["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2 and messages[0]["content"] == messages[2]["content"] == "say something long"
    assert (folder / "chat_history").read_text().splitlines()[:1] == ["say something long"]
