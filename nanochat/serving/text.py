"""Tokens become text while they come: characters whole, stop strings and special tokens not shown, each token's place in the text known."""
from nanochat.engine import TextStream
from nanochat.tokenizer import SPECIAL_TOKENS

TOOLS = {"<|python_start|>": "<|python_end|>", "<|output_start|>": "<|output_end|>"}


class Speech(TextStream):
    """Tokens -> what a reader is to see: special tokens are no text. With `hides_tools` neither is what is asked of a tool and what it
    says, as far as the call is whole; of one that is torn nothing is lost but the markers."""

    def __init__(self, tokenizer, hides_tools=False):
        super().__init__(tokenizer)
        self.names = {tokenizer.encode_special(name): name for name in SPECIAL_TOKENS}
        self.hides_tools, self.awaited, self.held = hides_tools, None, []  # what ends the call that is open, and its tokens

    def add(self, token):
        name = self.names.get(token)
        if name is None:
            if self.awaited is None:
                return super().add(token)
            self.held.append(token)
            return ""
        if not self.hides_tools:
            return ""
        if name == self.awaited:
            self.held = []
        text = self.flush()
        self.awaited = TOOLS.get(name)
        return text

    def flush(self):
        held, self.held, self.awaited = self.held, [], None
        return super().flush() + self.tokenizer.decode(held)


class StopText:
    """Text piece by piece -> the part of it that is certain. It ends before the first stop string to be complete (of several that
    complete with the same character, the longest), however the text was cut into pieces."""

    def __init__(self, stops):
        self.stops = [stop for stop in stops if stop]
        self.beginnings = {stop[:n] for stop in self.stops for n in range(1, len(stop))}
        self.longest = max(map(len, self.beginnings), default=0)
        self.held, self.is_cut = "", False

    def add(self, piece):
        text = self.held + piece
        ends = [(start + len(stop), start) for stop in self.stops if (start := text.find(stop)) >= 0]
        if ends:
            self.is_cut, self.held = True, ""
            return text[:min(ends)[1]]
        for length in range(min(self.longest, len(text)), 0, -1):
            if text[-length:] in self.beginnings:
                self.held = text[-length:]
                return text[:-length]
        self.held = ""
        return text

    def flush(self):
        held, self.held = self.held, ""
        return held


class Answer:
    """One completion as it grows, read from `stream`. `offsets[i]` is the number of characters before token i."""

    def __init__(self, stream, stops=()):
        self.stream, self.stop_text = stream, StopText(stops)
        self.tokens, self.offsets, self.pieces = [], [], []
        self.decoded = self.shown = self.released = 0  # characters decoded, characters shown, tokens that have been handed out

    def add(self, token, is_end=False):
        """A token -> the text that is certain now; an end token is no text."""
        self.tokens.append(token)
        self.offsets.append(self.decoded)
        return "" if is_end else self.show(self.stream.add(token))

    def show(self, decoded):
        self.decoded += len(decoded)
        return self.count(self.stop_text.add(decoded))

    def count(self, text):
        self.shown += len(text)
        self.pieces.append(text)
        return text

    def finish(self):
        """The text that was held back, at the end of an answer that no stop string has cut."""
        text = self.show(self.stream.flush())
        return text if self.is_cut else text + self.count(self.stop_text.flush())

    @property
    def whole(self):
        """All that has been shown."""
        return "".join(self.pieces)

    @property
    def is_cut(self):
        return self.stop_text.is_cut

    def release(self, finished):
        """-> the tokens and offsets not handed out before whose text has been shown; at the end all but those behind a cut."""
        first = self.released
        if finished and not self.is_cut:
            self.released = len(self.tokens)
        else:
            while self.released < len(self.tokens) and self.offsets[self.released] < self.shown:
                self.released += 1
        return self.tokens[first:self.released], self.offsets[first:self.released]


def text_offsets(tokenizer, tokens):
    """Tokens -> (their text, special tokens by name; for each the number of characters before it)."""
    answer = Answer(TextStream(tokenizer))
    text = "".join([*(answer.add(token) for token in tokens), answer.finish()])
    return text, answer.offsets


def token_text(tokenizer, token):
    """A token as a string that no other token has: its text, or `bytes:\\xe2\\x80` where its bytes are no text by themselves."""
    raw = tokenizer.id_to_bytes(token)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
