"""Choices -> the JSON that OpenAI's API gives: whole answers, and chunks of a stream."""
import json
import secrets
import time

from nanochat.serving.text import text_offsets, token_text

FINISH = {"stop": "stop", "length": "length", "cancelled": "length", None: None}  # a request whose time is up was cut, like a long one


# One encoder for all: json.dumps with settings makes a new one for every token. ASCII: half a surrogate pair from a client must not break the answer.
ENCODER = json.JSONEncoder(ensure_ascii=True, allow_nan=False, separators=(",", ":"))


def dumps(value):
    return ENCODER.encode(value).encode()


def event(value):
    return b"data: " + dumps(value) + b"\n\n"


DONE = b"data: [DONE]\n\n"


def usage(prompts, choices):
    """Every prompt counts once, however often it is continued; end tokens and cut ones count as generated."""
    prompt_tokens, completion_tokens = sum(map(len, prompts)), sum(choice.generated for choice in choices)
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": prompt_tokens + completion_tokens}


class Reply:
    """What the answers to one request share. A subclass says how a choice looks."""

    def __init__(self, seat, prompts, include_usage):
        self.tokenizer, self.prompts, self.include_usage = seat.tokenizer, prompts, include_usage
        self.common = {"id": f"{self.prefix}-{secrets.token_hex(12)}", "object": self.kind, "created": int(time.time()), "model": seat.name}

    def whole(self, choices):
        return {**self.common, "choices": [self.choice(choice) for choice in choices], "usage": usage(self.prompts, choices)}

    def chunk(self, choices):
        """Choices with news -> the bytes of their events. Chunks carry a null usage where usage will follow, as OpenAI's do."""
        common = {**self.common, "object": self.chunk_kind, **({"usage": None} if self.include_usage else {})}
        return b"".join(event({**common, "choices": [self.delta(choice)]}) for choice in choices)

    def end(self, choices):
        last = event({**self.common, "object": self.chunk_kind, "choices": [], "usage": usage(self.prompts, choices)}) if self.include_usage else b""
        return last + DONE

    def alternatives(self, top):
        return [(token_text(self.tokenizer, token), token, logprob) for token, logprob in top]


class ChatReply(Reply):
    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, seat, prompts, include_usage=False):
        super().__init__(seat, prompts, include_usage)
        self.greeted = set()

    def choice(self, choice):
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        if choice.parts is not None:
            message["parts"] = choice.parts  # ours: what a client sends back as content, so that tool calls stay tool calls
        return {"index": choice.index, "message": message, "logprobs": self.logprobs(choice), "finish_reason": FINISH[choice.finish]}

    def delta(self, choice):
        delta = {} if choice.index in self.greeted else {"role": "assistant", "content": ""}
        self.greeted.add(choice.index)
        if choice.new_text:
            delta["content"] = choice.new_text
        if choice.parts is not None:
            delta["parts"] = choice.parts
        return {"index": choice.index, "delta": delta, "logprobs": self.logprobs(choice), "finish_reason": FINISH[choice.finish]}

    def logprobs(self, choice):
        if choice.score is None:
            return None
        content = []
        for token, logprob, top in zip(choice.tokens[choice.first_new:], choice.score.logprobs, choice.score.top):
            content.append({**self.entry(token, logprob), "top_logprobs": [self.entry(other, value) for other, value in top]})
        return {"content": content, "refusal": None}

    def entry(self, token, logprob):
        return {"token": token_text(self.tokenizer, token), "logprob": logprob, "bytes": list(self.tokenizer.id_to_bytes(token))}


class CompletionReply(Reply):
    """`echoes` has for each prompt its Score where logprobs are wanted; with echo the prompt stands before every answer to it."""
    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, seat, prompts, include_usage=False, n=1, echo_texts=None, echo_scores=None):
        super().__init__(seat, prompts, include_usage)
        self.n, self.echo_texts, self.echo_scores, self.greeted = n, echo_texts, echo_scores, set()

    def choice(self, choice):
        return {"index": choice.index, "text": self.echo(choice) + choice.text, "logprobs": self.logprobs(choice, True),
                "finish_reason": FINISH[choice.finish]}

    def delta(self, choice):
        is_first = choice.index not in self.greeted
        self.greeted.add(choice.index)
        return {"index": choice.index, "text": (self.echo(choice) if is_first else "") + choice.new_text,
                "logprobs": self.logprobs(choice, is_first), "finish_reason": FINISH[choice.finish]}

    def echo(self, choice):
        return "" if self.echo_texts is None else self.echo_texts[choice.index // self.n]

    def logprobs(self, choice, with_echo):
        lines = []
        start = len(self.echo(choice))
        if with_echo and self.echo_scores is not None:
            score, prompt = self.echo_scores[choice.index // self.n], choice.prompt
            _, offsets = text_offsets(self.tokenizer, prompt)
            # an added <|bos|> is no part of the echoed text
            shift = start - len(self.tokenizer.decode(prompt))
            lines += zip(prompt, score.logprobs, score.top, [max(offset + shift, 0) for offset in offsets])
        if choice.score is not None:
            lines += zip(choice.tokens[choice.first_new:], choice.score.logprobs, choice.score.top,
                         [start + offset for offset in choice.offsets[choice.first_new:]])
        if not lines and choice.score is None and self.echo_scores is None:
            return None
        tokens, token_logprobs, top_logprobs, text_offset = [list(column) for column in zip(*lines)] or [[], [], [], []]
        return {"tokens": [token_text(self.tokenizer, token) for token in tokens], "token_logprobs": token_logprobs,
                "top_logprobs": [self.table(*entry) for entry in zip(tokens, token_logprobs, top_logprobs)], "text_offset": text_offset}

    def table(self, token, logprob, top):
        """Alternatives by their text, the token itself among them; None for a token that nothing precedes."""
        return None if top is None else {token_text(self.tokenizer, token): logprob} | {
            token_text(self.tokenizer, other): value for other, value in reversed(top)}
