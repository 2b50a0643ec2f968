"""A checked request -> text as it comes, or whole: prompts become engine requests, pieces become choices, tokens get their
log-probabilities. It knows nothing of JSON; `replies.py` does."""
import asyncio
import secrets
from dataclasses import dataclass, field

from nanochat.engine import Request
from nanochat.serving.driver import Generation
from nanochat.serving.protocol import ApiError
from nanochat.serving.scoring import Item, Score


@dataclass
class Choice:
    """One choice so far, and what is new since the last look: text, and tokens with their offsets and scores."""
    index: int
    prompt: list[int]
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    finish: str | None = None
    generated: int = 0
    parts: list | None = None
    new_text: str = ""
    first_new: int = 0            # place in tokens of the first new one
    score: Score | None = None    # of tokens[first_new:], where logprobs are wanted

    def add(self, piece):
        self.text += piece.text
        self.new_text += piece.text
        self.tokens += piece.tokens
        self.offsets += piece.offsets
        self.finish, self.generated, self.parts = piece.finish, piece.generated, piece.parts

    def look_away(self):
        """What is here is no longer new."""
        self.new_text, self.first_new, self.score = "", len(self.tokens), None


def check_tokens(seat, tokens):
    """ApiError for ids that are no token: also those of rows that only pad the vocabulary."""
    if not 0 <= min(tokens) <= max(tokens) < seat.tokenizer.vocab_size:
        raise ApiError(400, f"the prompt holds token {max(tokens)}, outside the vocabulary of {seat.tokenizer.vocab_size}", param="prompt")


def engine_requests(body, prompts, max_new_tokens, defaults, seat):
    """A Sampling body and prompts as ids -> engine Requests, each with n samples. ApiError for what does not fit the model."""
    seed = secrets.randbits(63) if body.seed is None else body.seed
    temperature = defaults.temperature if body.temperature is None else body.temperature
    top_k = defaults.top_k if body.top_k is None else body.top_k
    top_k = None if top_k is None or top_k < 1 else min(top_k, seat.model.config.vocab_size)
    if body.top_p == 0:  # nothing but the likeliest
        temperature = 0.0
    requests = []
    for prompt in prompts:
        check_tokens(seat, prompt)
        room = seat.model.config.sequence_len - len(prompt)
        if room < 1:
            raise ApiError(400, f"the prompt has {len(prompt)} tokens, and the model's context of {room + len(prompt)} leaves no place for an answer: "
                           "shorten it", param="messages" if hasattr(body, "messages") else "prompt", code="context_length_exceeded")
        request = Request(prompt, body.n or 1, min(max_new_tokens, room), temperature, top_k, body.top_p or None, seed)
        seat.engine.check(request)
        requests.append(request)
    return requests


class Answering:
    """The life of one request in a seat: `async for` gives the Choices with something new, until all have finished."""

    def __init__(self, pool, driver, seat, requests, stops, streams, text_stream, top=None, timeout_s=300):
        """`text_stream(tokenizer)` = what of the tokens is text; `top` None = no log-probabilities, else the number of alternatives to each."""
        self.pool, self.driver, self.seat, self.top = pool, driver, seat, top
        self.deadline = asyncio.get_running_loop().time() + timeout_s
        self.job = Generation(seat, requests, stops, streams, text_stream)
        self.choices = [Choice(0, request.tokens) for request in requests for _ in range(request.num_samples)]
        for index, choice in enumerate(self.choices):
            choice.index = index
        self.is_late = False

    async def __aiter__(self):
        self.pool.metrics.count("nanochat_prompt_tokens_total", sum(len(request.tokens) for request in self.job.requests))
        self.driver.submit(self.job)
        open_choices = len(self.choices)
        try:
            while open_choices:
                changed = {}
                for piece in await self.some_pieces():
                    if isinstance(piece, Exception):
                        raise ApiError(500, f"the engine failed: {type(piece).__name__}", type="server_error") from piece
                    self.choices[piece.index].add(piece)
                    changed[piece.index] = self.choices[piece.index]
                    open_choices -= piece.finish is not None
                changed = list(changed.values())
                if self.top is not None:
                    await self.score(changed)
                yield changed
                for choice in changed:
                    choice.look_away()
            if self.is_late and not any(choice.generated for choice in self.choices):
                raise self.pool.busy("the request's time was up before its turn came: try again later")
        finally:
            if open_choices:
                self.driver.cancel(self.job)
                self.pool.metrics.count("nanochat_cancelled_total")

    async def some_pieces(self):
        """All pieces that are there, at least one. Past the deadline the job is cancelled and its last pieces are awaited."""
        pieces = self.job.pieces
        try:
            async with asyncio.timeout_at(None if self.is_late else self.deadline):
                first = await pieces.get()
        except TimeoutError:
            self.is_late = True
            self.pool.metrics.count("nanochat_cancelled_total")
            self.driver.cancel(self.job)
            first = await pieces.get()
        return [first] + [pieces.get_nowait() for _ in range(pieces.qsize())]

    async def score(self, choices):
        """The new tokens of each choice, by one more pass over it: exact, and nothing that the engine must know about."""
        scored = [choice for choice in choices if len(choice.tokens) > choice.first_new]
        items = [Item(choice.prompt + choice.tokens, len(choice.prompt) + choice.first_new, self.top) for choice in scored]
        if items:
            for choice, score in zip(scored, await self.pool.score(self.driver, self.seat, items)):
                choice.score = score
