"""Conversations from a JSON-lines file: an identity, rejection samples, your own. Trained on, not scored.

One line is {"messages": [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A small model."}]},
or the list of messages alone, or {"question": "Who are you?", "answer": "A small model."} with the two fields named.
"""
import json
import random
from collections import Counter
from pathlib import Path

from tasks.common import Task, register

PART_TYPES = ("text", "python", "python_output")


def check_messages(messages):
    """None if the messages can be trained on, else the reason in words: system (optional), then user and assistant in turn."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return "no list of messages"
    turns = messages[1:] if messages and messages[0].get("role") == "system" else messages
    if not turns or [turn.get("role") for turn in turns] != ["user", "assistant"] * (len(turns) // 2):
        return "roles are not user and assistant in turn, ending with assistant"
    for message in messages:
        content = message.get("content")
        if message["role"] == "assistant" and isinstance(content, list):
            if not content or not all(isinstance(part, dict) and part.get("type") in PART_TYPES and isinstance(part.get("text"), str) for part in content):
                return "a part is not {type, text}"
        elif not isinstance(content, str) or not content.strip():
            return "a message has no text"
    return None


@register("JsonlChat")
class JsonlChat(Task):
    """The conversations of a file, in its order or shuffled by the seed. Bad lines are left out and counted by reason in `skipped`."""

    def __init__(self, path=None, messages_field="messages", prompt_field=None, answer_field=None, shuffle=False, seed=42, **kwargs):
        super().__init__(**kwargs)
        if path is None or not Path(path).expanduser().is_file():
            raise ValueError(f"path={str(path)!r} is not a file, so there are 0 conversations: give the path of a file with one JSON object per line")
        if (prompt_field is None) != (answer_field is None):
            raise ValueError(f"prompt_field={prompt_field!r} and answer_field={answer_field!r} belong together: give both, or neither for '{messages_field}'")
        self.conversations, self.skipped = [], Counter()
        with open(Path(path).expanduser(), encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if not line.strip():
                    continue
                messages = read_messages(line, messages_field, prompt_field, answer_field)
                reason = "not JSON" if messages is ... else check_messages(messages)
                if reason:
                    self.skipped[reason] += 1
                else:
                    self.conversations.append(messages)
        if not self.conversations:
            raise ValueError(f"none of the {self.skipped.total()} lines of {path} can be used ({dict(self.skipped)}): "
                             f"each needs the field {messages_field!r}, or name prompt_field and answer_field")
        if shuffle:
            random.Random(seed).shuffle(self.conversations)

    def num_examples(self):
        return len(self.conversations)

    def get_example(self, index):
        return {"messages": self.conversations[index]}


def read_messages(line, messages_field, prompt_field, answer_field):
    """A line -> what should be its messages, not yet checked; ... if it is not JSON."""
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        return ...
    if isinstance(row, list):
        return row
    if not isinstance(row, dict):
        return None
    if prompt_field is None:
        return row.get(messages_field)
    return [{"role": "user", "content": row.get(prompt_field)}, {"role": "assistant", "content": row.get(answer_field)}]
