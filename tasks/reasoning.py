"""What the tasks with long reasoning traces share: rows of any shape become conversations, traces and answers come apart.

    <think>
    Each box holds 6, so 7 boxes hold 42.
    </think>

    Final Answer: 42

A row is a dict with a list of turns, or with a question, an answer and perhaps the reasoning in columns whose names differ from
data set to data set. Nothing is loaded into memory: a task remembers the places of the rows it uses.
"""
import json
import re
import unicodedata
from array import array
from collections import Counter
from pathlib import Path

from tasks.common import Task, message_text
from tasks.jsonl_chat import check_messages
from tasks.latex import last_boxed
from tasks.rewards import parse_number

MODES = ("cot", "answer_only")
# column names, the most telling first
TURNS = ("messages", "conversation", "conversations")
QUESTIONS = ("question", "prompt", "instruction", "input", "problem", "query")
REASONINGS = ("reasoning", "reasoning_content", "reasoning_trace", "thinking", "thought", "thoughts", "chain_of_thought", "cot", "rationale")
ANSWERS = ("answer", "final", "final_answer", "output", "response", "completion", "solution")
SPEAKERS = ("role", "from", "speaker", "author", "type")
CONTENTS = ("content", "value", "text", "message")
ROLES = {"user": "user", "human": "user", "prompter": "user", "instruction": "user", "question": "user",
         "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant", "ai": "assistant",
         "answer": "assistant", "system": "system", "developer": "system"}


# ---------------------------------------------------------------------------------------------------------------------
# Rows become messages

def read_messages(row):
    """A row -> (messages, None), or (None, the reason it cannot be used). Contents are plain text; traces are not touched."""
    if not isinstance(row, dict):
        return None, "not a JSON object"
    row = {str(name).lower(): value for name, value in row.items()}
    turns = next((row[name] for name in TURNS if isinstance(row.get(name), (list, tuple, dict)) and row[name]), None)
    if turns is None:
        messages = read_columns(row)
    else:
        if isinstance(turns, dict):                     # {"role": [...], "content": [...]}: turns by column
            turns = [dict(zip(turns, values)) for values in zip(*turns.values())] if all(isinstance(value, list) for value in turns.values()) else []
        messages = [read_turn(turn) for turn in turns]
    if not messages or None in messages:
        return None, "no question and answer" if turns is None else "a turn has no known role or no text"
    reason = check_messages(messages)
    if reason is None:
        try:
            "".join(message["content"] for message in messages).encode("utf-8")
        except UnicodeEncodeError:                      # JSON may spell half a surrogate pair, and no tokenizer can read it
            reason = "a text is no Unicode"
    return (None, reason) if reason else (messages, None)


def read_columns(row):
    """A row with lower-case names -> [user, assistant] from its question, reasoning and answer columns, or None."""
    question, reasoning, answer = (next((row[name].strip() for name in names if isinstance(row.get(name), str) and row[name].strip()), "")
                                   for names in (QUESTIONS, REASONINGS, ANSWERS))
    if isinstance(row.get("instruction"), str) and row["instruction"].strip() == question and isinstance(row.get("input"), str):
        question = f"{question}\n\n{row['input']}".strip()   # the instruction speaks of this input
    if not question or not answer:
        return None
    if reasoning and not has_trace(answer):
        answer = with_trace(reasoning, answer)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def read_turn(turn):
    """A turn in any spelling -> {"role", "content"}, or None."""
    if not isinstance(turn, dict):
        return None
    role = next((ROLES[turn[name].strip().lower()] for name in SPEAKERS if isinstance(turn.get(name), str) and turn[name].strip().lower() in ROLES), None)
    content = next((turn[name] for name in CONTENTS if turn.get(name)), None)
    if isinstance(content, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
        content = "".join(part["text"] for part in content)
    if role is None or not isinstance(content, str):
        return None
    reasoning = next((turn[name] for name in REASONINGS if isinstance(turn.get(name), str) and turn[name].strip()), None)
    if role == "assistant" and reasoning and not has_trace(content):
        content = with_trace(reasoning, content)
    return {"role": role, "content": content.strip()}


# ---------------------------------------------------------------------------------------------------------------------
# Traces and answers

# other ways to mark what <think> marks; the solution's marks say nothing once the trace is marked
SPELLINGS = (("<|begin_of_thought|>", "<think>"), ("<|end_of_thought|>", "</think>"), ("<|begin_of_solution|>", ""), ("<|end_of_solution|>", ""))
FINAL_TAG = re.compile(r"<(/?)final>", re.IGNORECASE)
FINAL_MARKS = tuple(re.compile(pattern, re.IGNORECASE) for pattern in
                    (r"\bfinal answer(?:\*\*)?:", r"\bfinal(?:\*\*)?:", r"\banswer(?:\*\*)?:", r"####"))


def with_trace(reasoning, answer):
    return f"<think>\n{reasoning.strip()}\n</think>\n\n{answer.strip()}"


def has_trace(text):
    return any(mark in text for mark in ("<think>", "</think>", "<|begin_of_thought|>"))


def split_trace(text):
    """A text -> (reasoning, answer), the reasoning "" if there is none; None if a trace begins and never ends."""
    for other, ours in SPELLINGS:
        text = text.replace(other, ours)
    before, end, answer = text.rpartition("</think>")
    if end:
        # some models' templates open the trace themselves, so that the text holds its end only
        return before.partition("<think>")[2 if "<think>" in before else 0].strip(), answer.strip()
    return None if "<think>" in text else ("", text.strip())


def final_answer(text):
    """What a text answers in the end, without its trace: the last <final>, else what follows the last "Final Answer:", "Final:",
    "Answer:" or "####" (the first of these that occurs), else everything. None if the trace never ends or nothing follows."""
    parts = split_trace(text)
    if parts is None:
        return None
    answer = parts[1]
    tagged, start = None, None
    for tag in FINAL_TAG.finditer(answer):              # not <final>(.*?)</final>, which is quadratic in tags that never close
        if tag[1] and start is not None:
            tagged, start = answer[start:tag.start()], None
        elif not tag[1] and start is None:
            start = tag.end()
    if tagged is not None:
        answer = tagged
    else:
        for mark in FINAL_MARKS:
            found = list(mark.finditer(answer))
            if found:
                answer = answer[found[-1].end():]
                break
    answer = answer.strip()
    return answer.removeprefix("**").strip() or None    # **Final Answer:** 42


def normalized_answer(text):
    """The final answer in one spelling: the last \\boxed{} if there is one, no case, blanks or wrapping, equal numbers equal; or None."""
    answer = final_answer(text)
    if answer is None:
        return None
    answer = unicodedata.normalize("NFKC", last_boxed(answer) or answer)
    answer = " ".join(answer.casefold().split()).strip("$*`\"' ").removesuffix(".").strip("$*`\"' ")
    number = parse_number(answer)
    return (answer if number is None else str(number)) or None


# ---------------------------------------------------------------------------------------------------------------------
# Tasks

class JsonLines:
    """A JSON-lines file as a random-access list: only where its lines begin is kept in memory. A line that is no JSON is None."""

    def __init__(self, path):
        self.path, self.starts, self.lengths = Path(path).expanduser(), array("q"), array("q")
        position = 0
        with open(self.path, "rb") as lines:
            for line in lines:
                if line.strip():
                    self.starts.append(position)
                    self.lengths.append(len(line))
                position += len(line)

    def __len__(self):
        return len(self.starts)

    def __getitem__(self, index):
        with open(self.path, "rb") as file:
            file.seek(self.starts[index])
            return parse_line(file.read(self.lengths[index]))


def parse_line(line):
    """The bytes of a line -> its value, or None if it is not JSON."""
    try:
        return json.loads(line.decode("utf-8", errors="replace"))
    except (json.JSONDecodeError, RecursionError):
        return None


class ReasoningTask(Task):
    """Conversations whose answers may hold a trace. Children call `use` and write `read(row) -> (conversation, reason)`.

    Right is what gives the same normalized final answer as the reference, traces left out."""

    def __init__(self, mode, **slicing):
        super().__init__(**slicing)
        if mode not in MODES:
            raise ValueError(f"mode={mode!r} is not one of the {len(MODES)} modes {', '.join(MODES)}: cot keeps the trace, answer_only drops it")
        self.mode, self.skipped, self.places = mode, Counter(), array("q")

    def use(self, rows, order=None):
        """Look through the rows (in their order, or the one given) until `stop` can be used; the others are counted in `skipped`."""
        self.rows = rows
        for place in range(len(rows)) if order is None else order:
            if self.stop != -1 and len(self.places) >= self.stop:
                break                                   # never look at two million rows to use a thousand
            conversation, reason = self.read(rows[place])
            if reason:
                self.skipped[reason] += 1
            else:
                self.places.append(place)
        if not self.places and self.stop != 0:
            raise ValueError(f"none of the {self.skipped.total()} rows of {self.name} can be used ({dict(self.skipped)}): "
                             "look at the columns of the file, its categories and the mode")

    def num_examples(self):
        return len(self.places)

    def get_example(self, index):
        return self.read(self.rows[self.places[index]])[0]

    def find_answer(self, conversation, text):
        return normalized_answer(text)

    def is_correct(self, conversation, completion):
        answer = normalized_answer(completion)
        return answer is not None and answer == normalized_answer(message_text(conversation["messages"][-1]))


def in_mode(messages, mode, shorten):
    """Messages -> (messages as the mode wants them, None) or (None, reason). `shorten(text)` gives an answer without its trace."""
    result = []
    for message in messages:
        if message["role"] == "assistant":
            parts = split_trace(message["content"])
            if parts is None:
                return None, "a trace never ends"
            reasoning, answer = parts
            if not answer:
                return None, "no answer after the trace"
            content = shorten(message["content"]) if mode == "answer_only" else with_trace(reasoning, answer) if reasoning else answer
            if not content:
                return None, "no final answer"
            message = {"role": "assistant", "content": content}
        result.append(message)
    if mode == "cot" and not reasoning:                 # earlier turns may lack theirs: chat templates drop them
        return None, "no trace to learn from"
    return result, None
