"""The two endpoints that answer: a request is checked, gets a seat at a model, and is answered whole or as a stream."""
from contextlib import AsyncExitStack, aclosing
from functools import partial

from fastapi import APIRouter, Request
from starlette.responses import Response

from nanochat.engine import TextStream
from nanochat.serving.described import ChatCompletion, Completion, says
from nanochat.serving.generate import Answering, Choice, check_tokens, engine_requests
from nanochat.serving.protocol import ApiError, ChatRequest, CompletionRequest
from nanochat.serving.replies import ChatReply, CompletionReply
from nanochat.serving.scoring import Item, Score
from nanochat.serving.text import Answer, Speech
from nanochat.serving.transport import EventStream, Json, while_connected

router = APIRouter()


@router.post("/v1/chat/completions", responses=says(ChatCompletion, also_stream=True))
async def chat_completions(body: ChatRequest, request: Request):
    """One answer, or n, to a conversation. The content is what the assistant says; where it called a tool, the message has `parts` too."""
    body.check()
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    settings = request.app.state.settings
    wanted = body.max_completion_tokens or body.max_tokens or settings.max_tokens
    top = (body.top_logprobs or 0) if body.logprobs else None

    def prepare(seat):
        prompt = seat.tokenizer.render_prompt([message.plain() for message in body.messages])
        return engine_requests(body, [prompt], min(wanted, settings.max_tokens_limit), settings, seat)

    async def reply(driver, seat, requests):
        return ChatReply(seat, [requests[0].tokens], wants_usage(body))

    return await respond(request, body, body.n or 1, prepare, reply, text_stream(body, hides_tools=True), top)


@router.post("/v1/completions", responses=says(Completion, also_stream=True))
async def completions(body: CompletionRequest, request: Request):
    """Text goes on. With echo and logprobs the prompt's own tokens are scored: so evaluation harnesses ask for likelihoods."""
    body.check()
    settings, prompts, n = request.app.state.settings, body.prompts(), body.n or 1
    wanted = 16 if body.max_tokens is None else body.max_tokens
    if not prompts or not all(prompt or isinstance(prompt, str) for prompt in prompts):
        raise ApiError(400, "a prompt is empty: give text, or one token id or more", param="prompt")
    if not wanted and not body.echo:
        raise ApiError(400, "max_tokens=0 asks for nothing: give 1 or more, or echo: true", param="max_tokens")

    def encoded(seat):
        return [seat.tokenizer.encode(prompt, prepend="<|bos|>") if isinstance(prompt, str) else prompt for prompt in prompts]

    if body.echo and (body.logprobs is not None or not wanted):
        # a greedy token more comes out of the scoring pass, so that a prompt may fill the whole context
        if not wanted or (wanted == 1 and (body.temperature == 0 or body.top_p == 0)):
            return await respond_scored(request, body, n * len(prompts), encoded, wanted, text_stream(body))

    def prepare(seat):
        return engine_requests(body, encoded(seat), min(wanted, settings.max_tokens_limit), settings, seat)

    async def reply(driver, seat, requests):
        ids, texts, scores = [each.tokens for each in requests], None, None
        if body.echo:
            texts = echo_texts(seat, prompts)
            if body.logprobs is not None:
                scores = await request.app.state.pool.score(driver, seat, [Item(tokens, 0, body.logprobs) for tokens in ids])
        return CompletionReply(seat, ids, wants_usage(body), n, texts, scores)

    return await respond(request, body, n * len(prompts), prepare, reply, text_stream(body), body.logprobs)


def text_stream(body, hides_tools=False):
    return TextStream if body.skip_special_tokens is False else partial(Speech, hides_tools=hides_tools)


def wants_usage(body):
    return bool(body.stream and body.stream_options and body.stream_options.include_usage)


def echo_texts(seat, prompts):
    return [prompt if isinstance(prompt, str) else seat.tokenizer.decode(prompt) for prompt in prompts]


async def respond(request, body, load, prepare, make_reply, text_stream, top):
    """Wait for a seat, check what depends on the model, then answer whole or as a stream."""
    pool, settings = request.app.state.pool, request.app.state.settings
    async with AsyncExitStack() as stack:
        driver, seat = await while_connected(request, stack.enter_async_context(pool.seat(body.model, load)))
        requests = prepare(seat)
        answering = Answering(pool, driver, seat, requests, body.stops, bool(body.stream), text_stream, top, settings.timeout_s)

        async def chunks():
            reply = await make_reply(driver, seat, requests)
            async with aclosing(aiter(answering)) as news:
                async for choices in news:
                    yield reply.chunk(choices)
            yield reply.end(answering.choices)

        async def whole():
            reply = await make_reply(driver, seat, requests)
            scores = {}
            async with aclosing(aiter(answering)) as news:
                async for choices in news:
                    scores.update((choice.index, choice.score) for choice in choices)
            for choice in answering.choices:
                choice.first_new, choice.score = 0, scores[choice.index]
            return Json(reply.whole(answering.choices))

        if body.stream:
            return EventStream(request, chunks(), stack.pop_all())
        return await while_connected(request, whole())


async def respond_scored(request, body, load, encoded, wanted, text_stream):
    """Echoed prompts with at most one greedy token behind each: passes over the prompts are all it takes."""
    pool, top, n = request.app.state.pool, body.logprobs, body.n or 1

    async def work():
        async with pool.seat(body.model, load) as (driver, seat):
            prompts = encoded(seat)
            for prompt in prompts:
                check_scored(seat, prompt)
            pool.metrics.count("nanochat_prompt_tokens_total", sum(map(len, prompts)))
            scores = None
            if top is not None or wanted:
                scores = await pool.score(driver, seat, [Item(tokens, 0, top or 0) for tokens in prompts])
        choices = [one_token(seat, prompts[index // n], index, scores and scores[index // n], wanted, Answer(text_stream(seat.tokenizer), body.stops), top)
                   for index in range(n * len(prompts))]
        reply = CompletionReply(seat, prompts, wants_usage(body), n, echo_texts(seat, body.prompts()), scores if top is not None else None)
        return Response(reply.chunk(choices) + reply.end(choices), media_type="text/event-stream") if body.stream else Json(reply.whole(choices))

    return await while_connected(request, work())


def check_scored(seat, tokens):
    check_tokens(seat, tokens)
    most = seat.model.config.sequence_len
    if len(tokens) > most:
        raise ApiError(400, f"the prompt has {len(tokens)} tokens, and the model's context is {most}: shorten it", param="prompt", code="context_length_exceeded")


def one_token(seat, prompt, index, score, wanted, answer, top):
    """The choice that has only the likeliest token behind its prompt (or, with `wanted` 0, none)."""
    choice = Choice(index, prompt, finish="length")
    if wanted:
        token, logprob, alternatives = score.next
        is_end = token in seat.engine.stops
        choice.text = choice.new_text = answer.add(token, is_end) + ("" if answer.is_cut else answer.finish())
        choice.tokens, choice.offsets, choice.generated = [token], [0], 1
        choice.finish = "stop" if is_end or answer.is_cut else "length"
        choice.score = None if top is None else Score([logprob], [alternatives], score.next)
    return choice
