"""Talk to a model in the terminal; Ctrl-C stops an answer, /quit or Ctrl-D ends, the arrow keys bring back earlier lines.

    python -m scripts.chat_cli --source=rl
    python -m scripts.chat_cli --source=sft -p "What is 7 * 6?" --temperature=0

The engine keeps the keys and values of the conversation: a turn computes what is new in it.
"""
import json
from dataclasses import dataclass

from nanochat.checkpoint_manager import load_model
from nanochat.common import base_dir, write_atomic
from nanochat.compute import compute_cleanup, compute_init
from nanochat.configurator import parse
from nanochat.engine import Engine, TextStream, message_parts
from nanochat.run_logger import visible
from nanochat.tokenizer import SPECIAL_TOKENS

MARKS = {"<|python_start|>": "`", "<|python_end|>": "`", "<|output_start|>": " = `", "<|output_end|>": "` "}  # how a tool call is shown
COMMANDS = """/clear        forget the conversation
/save FILE    write the conversation to FILE as one line of JSON
/retry        another answer to the last question
/temp X       sample at temperature X (0 = greedy)
/quit         leave (also Ctrl-D)"""


@dataclass(frozen=True)
class Config:
    """Talk to a model in the terminal."""
    source: str = "sft"           # [-i] stage to talk to: mid, sft or rl
    model_tag: str | None = None  # [-g] folder of the checkpoint (None = the one saved last)
    step: int | None = None       # [-s] step of the checkpoint (None = the newest)
    prompt: str = ""              # [-p] one question, one answer, and no conversation
    temperature: float = 0.6      # [-t] 0 = greedy
    top_k: int | None = 50        # [-k] most likely tokens to draw from (None = all)
    max_new_tokens: int = 256     # [-m] longest answer
    device_type: str = ""         # cuda, mps or cpu ("" = the best there is)
    dtype: str = ""               # [-d] float32 or bfloat16 ("" = bfloat16 where the hardware has it)
    seed: int = 0                 # of the first answer; each answer after it takes the next number


class Chat:
    """A conversation and what it takes to go on with it."""

    def __init__(self, engine, config, write=print):
        self.engine, self.config, self.write = engine, config, write
        self.messages, self.temperature, self.seed = [], config.temperature, config.seed
        self.marks = {engine.tokenizer.encode_special(name): MARKS.get(name, "") for name in SPECIAL_TOKENS}

    def ask(self, text):
        """Put a question and write the answer as it comes; both join the conversation, unless the answer is empty."""
        self.messages.append({"role": "user", "content": text})
        tokens = []
        try:
            prompt = self.prompt()
            stream = TextStream(self.engine.tokenizer)
            for token, _ in self.engine.stream(prompt, max_new_tokens=self.config.max_new_tokens, temperature=self.temperature,
                                                       top_k=self.config.top_k, seed=self.seed):
                tokens.append(token)
                self.write(self.marks[token] if token in self.marks else visible(stream.add(token)), end="", flush=True)
            self.write(visible(stream.flush()))
        except KeyboardInterrupt:
            self.write(" [stopped]")
        except ValueError as error:
            self.write(f"[{error}]")
        self.seed += 1
        parts = message_parts(self.engine.tokenizer, tokens)
        if parts:
            self.messages.append({"role": "assistant", "content": parts})
        else:
            self.messages.pop()
            self.write("[no answer]")

    def prompt(self):
        """The conversation as tokens. Its oldest exchanges go where it would leave the answer less than a quarter of the context."""
        sequence_len = self.engine.model.config.sequence_len
        room = sequence_len - min(self.config.max_new_tokens, sequence_len // 4)
        first = 0
        while len(tokens := self.engine.tokenizer.render_prompt(self.messages[first:])) > room and first + 2 < len(self.messages):
            first += 2
        return tokens

    def command(self, line):
        """Do what a line beginning with / says -> False to leave."""
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        if name == "/quit":
            return False
        if name == "/clear":
            self.messages = []
            self.engine.kept.clear()
            self.write("[cleared]")
        elif name == "/save" and argument:
            try:
                write_atomic(argument, json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
                self.write(f"[{len(self.messages)} messages written to {argument}]")
            except OSError as error:
                self.write(f"[not saved: {error}]")
        elif name == "/retry" and self.messages:
            *earlier, question, answer = self.messages
            self.messages = list(earlier)
            self.ask(question["content"])
            if len(self.messages) == len(earlier):  # nothing came: what was there stays
                self.messages += [question, answer]
        elif name == "/temp" and valid_temperature(argument):
            self.temperature = float(argument)
            self.write(f"[temperature {self.temperature}]")
        else:
            self.write(COMMANDS)
        return True


def valid_temperature(text):
    try:
        return 0 <= float(text) < float("inf")
    except ValueError:
        return False


def main(config):
    compute = compute_init(config.device_type, config.dtype)
    model, tokenizer, meta = load_model(config.source, compute, "eval", config.model_tag, config.step)
    chat = Chat(Engine(model, tokenizer, max_rows=1, keep_rows=1), config)
    if config.prompt:
        chat.ask(config.prompt)
        compute_cleanup()
        return
    history = remember_lines()
    print(f"{meta['stage']} {meta['model_tag']}, step {meta['step']}, on {compute.device}. Ctrl-C stops an answer, /help tells the rest.")
    while True:
        print()
        try:
            line = input("> ").strip()
        except KeyboardInterrupt:  # at the prompt it drops the line
            print()
            continue
        except EOFError:
            print()
            break
        if line.startswith("/"):
            if not chat.command(line):
                break
        elif line:
            chat.ask(line)
    history()
    compute_cleanup()


def remember_lines(longest=1000):
    """Line editing, and the lines of earlier talks on the arrow keys, where Python has readline -> a function that saves this one's."""
    try:
        import readline
    except ImportError:  # Windows
        return lambda: None
    path = base_dir() / "chat_history"
    try:
        readline.read_history_file(path)
    except OSError:  # there is none yet, or it cannot be read: begin anew
        pass
    readline.set_history_length(longest)

    def save():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(path)
            path.chmod(0o600)
        except OSError as error:
            print(f"[history not saved: {error}]")
    return save


if __name__ == "__main__":
    main(parse(Config))
