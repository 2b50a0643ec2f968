"""Text <-> token ids, and conversations -> (ids, mask). Merges are trained by rustbpe; encoding gives tiktoken's ids.

A tokenizer is one JSON file: pattern, special tokens, mergeable ranks. Nothing is ever pickled. Layout of a conversation:

    <|bos|> (<|user_start|> text <|user_end|> <|assistant_start|> parts <|assistant_end|>)*
"""
import base64
import binascii
import hashlib
import json
from pathlib import Path

import rustbpe
import tiktoken

from nanochat.common import base_dir, write_atomic
from nanochat.reference_tokenizer import check_token_bytes, read_encoding

SPECIAL_TOKENS = ["<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>",
                  "<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>"]
FILE_NAME = "tokenizer.json"
FORMAT = "nanochat-tokenizer-1"
MIN_TRAINED = 8  # assistant tokens that a cut conversation keeps at least, if it has as many


def split_pattern(digits=2):
    """The default split pattern, GPT-4's, with at most `digits` (1, 2 or 3) digits together."""
    return rustbpe.default_pattern(digits)


def get_tokenizer():
    """The tokenizer of this base directory."""
    return Tokenizer.load(base_dir() / "tokenizer")


class Tokenizer:
    """Byte-level BPE with special tokens behind the mergeable ones. `truncated` counts the conversations it had to shorten,
    `untrained` those it rendered without a single trained token."""

    def __init__(self, tokens: list[bytes], pattern, special_tokens=SPECIAL_TOKENS):
        """The bytes of mergeable token 0, 1, 2, ..., the split pattern, and the names of the ids behind them."""
        if sorted(special_tokens) != sorted(SPECIAL_TOKENS):
            raise ValueError(f"the special tokens {', '.join(special_tokens)} are not the {len(SPECIAL_TOKENS)} of this project "
                             f"({', '.join(SPECIAL_TOKENS)}): use a tokenizer trained here or by the reference")
        self.tokens, self.pattern, self.special_tokens = list(tokens), pattern, list(special_tokens)
        self.encoder = rustbpe.Tokenizer.from_ranks([(token, rank) for rank, token in enumerate(self.tokens)], pattern)
        self.is_fast = pattern in map(split_pattern, (1, 2, 3))
        self.special_ids = {name: len(self.tokens) + i for i, name in enumerate(self.special_tokens)}
        self.vocab_size = len(self.tokens) + len(self.special_tokens)
        self.bos_id = self.special_ids["<|bos|>"]
        self.table = self.tokens + [name.encode() for name in self.special_tokens]
        self.reference = None
        self.truncated = self.untrained = 0

    @classmethod
    def train(cls, text_iterator, vocab_size, pattern=None, num_threads=0):
        """An iterable of str -> a tokenizer of at most `vocab_size` ids, special tokens included; fewer if the text runs out
        of pairs. pattern None = rustbpe's default, at most two digits to a token; num_threads 0 = one per core."""
        smallest = 256 + len(SPECIAL_TOKENS)
        if vocab_size < smallest:
            raise ValueError(f"vocab_size={vocab_size} is less than {smallest}: 256 bytes and {len(SPECIAL_TOKENS)} special tokens "
                             f"come first, ask for {smallest} or more")
        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(text_iterator, vocab_size - len(SPECIAL_TOKENS), pattern=pattern, num_threads=num_threads)
        return cls([token for token, _ in trainer.get_mergeable_ranks()], trainer.get_pattern())

    # -- files

    def save(self, folder):
        """Writes tokenizer.json into `folder`, all of it or nothing."""
        write_atomic(Path(folder) / FILE_NAME, json.dumps({"format": FORMAT, "fingerprint": self.fingerprint, **self.content()}))

    @classmethod
    def load(cls, folder):
        """The tokenizer saved in `folder`. ValueError where there is none or the file is damaged."""
        path = Path(folder) / FILE_NAME
        if not path.is_file():
            raise ValueError(f"there is no {FILE_NAME} in {folder}: train one with `python -m scripts.tok_train`")
        problem = "it is not a tokenizer of this project"
        try:
            stored = json.loads(path.read_bytes())
            if isinstance(stored, dict) and stored.get("format") == FORMAT:
                problem = "it is damaged"
                tokens = [base64.b64decode(token, validate=True) for token in stored["mergeable_ranks"]]
                tokenizer = cls(tokens, stored["pattern"], stored["special_tokens"])
                if tokenizer.fingerprint == stored["fingerprint"]:
                    return tokenizer
                problem = "its content does not match its fingerprint"
        except (json.JSONDecodeError, UnicodeDecodeError, binascii.Error, KeyError, TypeError, ValueError) as error:
            problem += f" ({error})"
        raise ValueError(f"{path} ({path.stat().st_size} bytes) cannot be used, {problem}: "
                         "restore it, or train another with `python -m scripts.tok_train`")

    @classmethod
    def from_reference_pickle(cls, path):
        """A reference `tokenizer.pkl`, a pickled tiktoken.Encoding, or the folder that holds it. A `token_bytes.pt` beside it
        must agree. Nothing in the file is executed: names other than tiktoken's Encoding are refused."""
        path = Path(path) / "tokenizer.pkl" if Path(path).is_dir() else Path(path)
        state = read_encoding(path)
        tokens, special_ids = state["mergeable_ranks"], state["special_tokens"]
        by_rank = sorted(tokens, key=tokens.get)
        names = sorted(special_ids, key=special_ids.get)
        if ([tokens[token] for token in by_rank] != list(range(len(tokens)))
                or [special_ids[name] for name in names] != list(range(len(tokens), len(tokens) + len(names)))):
            raise ValueError(f"{path} has {len(tokens)} mergeable and {len(names)} special tokens whose ids are not 0, 1, 2, ... in "
                             "this order: it is not a reference tokenizer")
        tokenizer = cls(by_rank, state["pat_str"], names)
        if (path.parent / "token_bytes.pt").is_file():
            check_token_bytes(path.parent / "token_bytes.pt", tokenizer.token_bytes())
        return tokenizer

    def content(self):
        """What makes this tokenizer this tokenizer, JSON-able."""
        return {"pattern": self.pattern, "special_tokens": self.special_tokens,
                "mergeable_ranks": [base64.b64encode(token).decode() for token in self.tokens]}

    @property
    def fingerprint(self):
        """sha256 of merges, pattern and special tokens: equal if and only if all ids mean the same."""
        return hashlib.sha256(json.dumps(self.content(), sort_keys=True).encode()).hexdigest()

    # -- text

    def encode(self, text, prepend=None, append=None, num_threads=1):
        """str -> ids, or list of str -> list of ids, each between `prepend` and `append` (an id or a special token's name).
        Text never becomes a special token, whatever it looks like."""
        before = [] if prepend is None else [self.to_id(prepend)]
        after = [] if append is None else [self.to_id(append)]
        if isinstance(text, str):
            return before + self.encode_ordinary([text], 1)[0] + after
        if not isinstance(text, (list, tuple)):
            raise ValueError(f"encode got a {type(text).__name__}: give str, or a list of str")
        wrong = next((item for item in text if not isinstance(item, str)), "")
        if not isinstance(wrong, str):
            raise ValueError(f"encode got a {type(wrong).__name__} among {len(text)} items: give str, or a list of str")
        if num_threads < 1:
            raise ValueError(f"num_threads={num_threads} threads cannot encode: give 1 or more")
        rows = self.encode_ordinary(list(text), num_threads)
        return [before + ids + after for ids in rows] if before or after else rows

    def encode_ordinary(self, texts, num_threads):
        try:
            if self.is_fast:
                return self.encoder.encode_batch(texts, num_threads)
            return self.tiktoken.encode_ordinary_batch(texts, num_threads=num_threads)
        except UnicodeEncodeError:  # half a surrogate pair is no text: it becomes a replacement character, as in tiktoken
            return self.encode_ordinary([text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts], num_threads)

    @property
    def tiktoken(self):
        """The same vocabulary as a tiktoken.Encoding: our encoder's oracle, and the encoder for unusual patterns."""
        if self.reference is None:
            ranks = {}
            for rank, token in enumerate(self.tokens):
                ranks.setdefault(token, rank)
            self.reference = tiktoken.Encoding("nanochat", pat_str=self.pattern, mergeable_ranks=ranks, special_tokens=self.special_ids)
        return self.reference

    def encode_special(self, name):
        """A special token's name -> its id."""
        if name not in self.special_ids:
            raise ValueError(f"{name!r} is not one of the {len(self.special_ids)} special tokens: use {', '.join(self.special_tokens)}")
        return self.special_ids[name]

    def to_id(self, token):
        return self.encode_special(token) if isinstance(token, str) else self.checked(token)

    def checked(self, token_id):
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(f"id {token_id} is outside this vocabulary of {self.vocab_size}: was it made by another tokenizer?")
        return token_id

    def decode(self, ids):
        """ids -> str; special tokens appear by name, bytes that are no UTF-8 as replacement characters."""
        return b"".join([self.table[self.checked(token_id)] for token_id in ids]).decode("utf-8", errors="replace")

    def id_to_bytes(self, token_id):
        """The bytes one id stands for; of a special token, its name."""
        return self.table[self.checked(token_id)]

    def token_bytes(self):
        """UTF-8 bytes of every id, 0 for special tokens: what bits per byte divides by."""
        return [len(token) for token in self.tokens] + [0] * len(self.special_tokens)

    # -- conversations

    def render_conversation(self, conversation, max_tokens=2048):
        """A conversation -> (ids, mask), at most `max_tokens` of each; mask 1 = trained on: what the assistant says and its end.

        Too long, it loses its end. If fewer than 8 trained tokens (or all there are) would be left, its earliest exchanges go
        first, whole; and if no exchange fits, the first loses the beginning of its question, so that half the room is the answer's.
        """
        if max_tokens < 6:
            raise ValueError(f"max_tokens={max_tokens} cannot hold a conversation: its markers and one word need 6, give more")
        exchanges = self.render_exchanges(check_conversation(conversation))
        rendered = self.assemble(exchanges)
        if len(rendered[0]) > max_tokens:
            self.truncated += 1
            rendered = self.shorten(exchanges, max_tokens)
        self.untrained += not any(rendered[1])
        return rendered

    def render_for_completion(self, conversation):
        """A conversation -> the ids of all but its last answer, ending where the assistant begins to speak."""
        turns = check_conversation(conversation)
        if turns[-1][0] != "assistant":
            raise ValueError(f"message {len(conversation['messages']) - 1} is the user's, but the last must be the reference answer "
                             "to be dropped: use render_prompt for a conversation without one")
        return self.render_turns(turns[:-1])

    def render_prompt(self, messages):
        """Messages that end with the user's -> ids that end where the assistant begins to speak."""
        turns = check_conversation({"messages": messages})
        if turns[-1][0] != "user":
            raise ValueError(f"message {len(messages) - 1} is the assistant's, but a prompt ends with the user's: drop it or add a question")
        return self.render_turns(turns)

    def render_turns(self, turns):
        return self.assemble(self.render_exchanges(turns))[0] + [self.special_ids["<|assistant_start|>"]]

    def render_exchanges(self, turns):
        """Turns -> [(question, answer)], each a list of (id, mask) with its markers; the last answer may be empty."""
        exchanges = []
        for role, parts in turns:
            rendered = [(self.special_ids[f"<|{role}_start|>"], 0)]
            for kind, text in parts:
                ids = self.encode_ordinary([text], 1)[0]
                if kind == "text":
                    rendered += [(token_id, int(role == "assistant")) for token_id in ids]
                else:
                    name, trained = {"python": ("python", 1), "python_output": ("output", 0)}[kind]
                    ids = [self.special_ids[f"<|{name}_start|>"], *ids, self.special_ids[f"<|{name}_end|>"]]
                    rendered += [(token_id, trained) for token_id in ids]
            rendered.append((self.special_ids[f"<|{role}_end|>"], int(role == "assistant")))
            exchanges = exchanges + [(rendered, [])] if role == "user" else exchanges[:-1] + [(exchanges[-1][0], rendered)]
        return exchanges

    def assemble(self, exchanges):
        """Exchanges -> (ids, mask), with <|bos|> in front."""
        pairs = [pair for question, answer in exchanges for pair in question + answer]
        return [self.bos_id] + [token_id for token_id, _ in pairs], [0] + [trained for _, trained in pairs]

    def shorten(self, exchanges, max_tokens):
        """The rule of render_conversation for a conversation that is too long."""
        for first in range(len(exchanges)):
            ids, mask = self.assemble(exchanges[first:])
            if any(mask) and sum(mask[:max_tokens]) >= min(MIN_TRAINED, sum(mask)):
                return ids[:max_tokens], mask[:max_tokens]
        question, answer = next((exchange for exchange in exchanges if exchange[1]), exchanges[0])
        answer_room = min(len(answer), max_tokens // 2)
        question_room = max_tokens - 1 - answer_room - 2  # but for <|bos|> and the question's two markers
        text = question[1:-1]
        shorter = question[:1] + text[max(0, len(text) - question_room):] + question[-1:]
        ids, mask = self.assemble([(shorter, answer)])
        return ids[:max_tokens], mask[:max_tokens]

    def visualize(self, ids, mask):
        """ids and mask -> text for a terminal: trained tokens green, the others grey."""
        assert len(ids) == len(mask), (len(ids), len(mask))
        return "".join(f"\033[{32 if trained else 90}m{self.decode([token_id])}\033[0m" for token_id, trained in zip(ids, mask))


def check_conversation(conversation):
    """A conversation -> [(role, [(part type, text)])], the system's text at the head of the first question. ValueError names
    the message that breaks a rule: roles alternate, user first; content is not empty; only the assistant has tool parts."""
    messages = conversation.get("messages") if isinstance(conversation, dict) else None
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError("the conversation has no messages: it must be {'messages': [{'role': ..., 'content': ...}, ...]}")
    turns, system = [], ""
    for index, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        parts = check_content(index, role, message)
        if role == "system" and index == 0:
            system = "".join(text for _, text in parts) + "\n\n"
            continue
        expected = "assistant" if turns and turns[-1][0] == "user" else "user"
        if role != expected:
            raise ValueError(f"message {index} has the role {role!r}, but it is the {expected}'s turn: "
                             "roles alternate, the user begins, and only message 0 may be the system's")
        if not turns:
            parts = [("text", system + "".join(text for _, text in parts))]  # one text, so that words may merge across the border
        turns.append((role, parts))
    if not turns:
        raise ValueError("message 0 is the system's and the only one: add the user's")
    return turns


def check_content(index, role, message):
    """A message -> its [(part type, text)]."""
    if role not in ("system", "user", "assistant"):
        raise ValueError(f"message {index} has the role {role!r}: use system, user or assistant")
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}] if content else []
    if not isinstance(content, (list, tuple)):
        raise ValueError(f"message {index} ({role}) has content of type {type(content).__name__}: give text or a list of parts")
    if not content:
        raise ValueError(f"message {index} ({role}) is empty: drop the conversation or give the message content")
    allowed = ("text", "python", "python_output") if role == "assistant" else ("text",)
    parts = []
    for part in content:
        kind, text = (part.get("type"), part.get("text")) if isinstance(part, dict) else (None, None)
        if kind not in allowed or not isinstance(text, str):
            raise ValueError(f"message {index} ({role}) has a part of type {kind!r} with text of type {type(text).__name__}: "
                             f"a part is {{'type': one of {', '.join(allowed)}, 'text': str}}")
        parts.append((kind, text))
    return parts
