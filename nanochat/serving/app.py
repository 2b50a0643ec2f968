"""The HTTP server: OpenAI's endpoints over the pool of models, and what a page and an operator ask besides.

    GET  /v1/models  /v1/models/{name}     what is on disk
    POST /v1/chat/completions              stream, n, stop, seed, temperature, top_p, top_k, max_tokens, logprobs
    POST /v1/completions                   the same; prompts as text or ids, one or many; echo, logprobs of the prompt
    GET  /v1/info                          defaults, limits, the default model
    POST /render                           markdown with LaTeX -> safe HTML
    POST /tokenize  /detokenize  GET /tokenizer_info     for lm-evaluation-harness
    GET  /health  /metrics                 always answer
    GET  /                                 the page

A prompt given as text begins with <|bos|>; ids are taken as they are. max_tokens beyond the context is cut to it: the answer then
ends with finish_reason "length". Errors are OpenAI's: {"error": {"message", "type", "param", "code"}}.
"""
import asyncio
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import asdict, dataclass

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from nanochat.serving.generate import Answering, Choice, engine_requests
from nanochat.serving.guard import Guard
from nanochat.serving.page import Page
from nanochat.serving.protocol import (ApiError, ChatRequest, CompletionRequest, DetokenizeRequest, ErrorBody, RenderRequest, TokenizeRequest,
                                       problem_of)
from nanochat.serving.render import render
from nanochat.serving.replies import ChatReply, CompletionReply, dumps, event
from nanochat.serving.scoring import Item, Score
from nanochat.serving.text import Answer


@dataclass(frozen=True)
class Settings:
    """What an operator decides. The first three are what a client gets that does not say otherwise."""
    temperature: float = 0.8
    top_k: int | None = 50
    max_tokens: int = 512
    max_tokens_limit: int = 4096
    max_body: int = 1 << 20
    timeout_s: float = 300.0


class Json(Response):
    media_type = "application/json"

    def render(self, content):
        return dumps(content)


class ClientGone(Exception):
    """Nobody is there to read the answer."""


class EventStream(Response):
    """Server-sent events from an async iterator of bytes, whose end, whoever brings it about, closes `stack`."""

    def __init__(self, request, chunks, stack):
        super().__init__(media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.request, self.chunks, self.stack = request, chunks, stack

    async def __call__(self, scope, receive, send):
        async def write():
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async with aclosing(self.chunks) as chunks:
                try:
                    async for chunk in chunks:
                        await send({"type": "http.response.body", "body": chunk, "more_body": True})
                except ApiError as error:  # the status has been sent; the stream says it
                    await send({"type": "http.response.body", "body": event(error.body), "more_body": True})
            await send({"type": "http.response.body", "body": b""})

        async with self.stack:
            try:
                await while_connected(self.request, write())
            except ClientGone:
                pass


async def while_connected(request, work):
    """What the coroutine `work` returns; ClientGone, and `work` cancelled, as soon as the client has left."""
    async def gone():
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return tasks[0].result()
        raise ClientGone
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def build_app(pool, settings, metrics, page=None, api_key="", routers=(), log=None):
    """-> the ASGI application. `page` is the HTML file served at /; `routers` are further endpoints, which find pool and settings in
    `request.app.state`."""
    @asynccontextmanager
    async def lifespan(app):
        pool.start(asyncio.get_running_loop())
        yield
        await asyncio.to_thread(pool.stop)

    app = FastAPI(title="nanochat", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url="/openapi.json",
                  responses={status: {"model": ErrorBody} for status in (400, 401, 403, 404, 405, 413, 429, 500)})
    app.state.pool, app.state.settings, app.state.metrics, app.state.page = pool, settings, metrics, Page(page)
    app.include_router(router)
    for more in routers:
        app.include_router(more)
    app.add_exception_handler(ApiError, lambda request, error: Json(error.body, error.status, error.headers))
    app.add_exception_handler(RequestValidationError, lambda request, error: as_json(problem_of(error.errors())))
    app.add_exception_handler(ValueError, lambda request, error: as_json(ApiError(400, str(error)[:500])))
    app.add_exception_handler(HTTPException, lambda request, error: as_json(ApiError(error.status_code, str(error.detail)[:500], headers=error.headers)))
    app.add_exception_handler(ClientGone, lambda request, error: Response(status_code=499))
    app.add_middleware(Guard, metrics=metrics, api_key=api_key, max_body=settings.max_body, log=log)
    return app


def as_json(error):
    return Json(error.body, error.status, error.headers)


router = APIRouter()


# ---------------------------------------------------------------------------------------------------------------------
# Answers

@router.post("/v1/chat/completions")
async def chat_completions(body: ChatRequest, request: Request):
    """One answer, or n, to a conversation."""
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

    return await respond(request, body, body.n or 1, prepare, reply, top)


@router.post("/v1/completions")
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
            return await respond_scored(request, body, n * len(prompts), encoded, wanted)

    def prepare(seat):
        return engine_requests(body, encoded(seat), min(wanted, settings.max_tokens_limit), settings, seat)

    async def reply(driver, seat, requests):
        ids, texts, scores = [each.tokens for each in requests], None, None
        if body.echo:
            texts = echo_texts(seat, prompts)
            if body.logprobs is not None:
                scores = await request.app.state.pool.score(driver, seat, [Item(tokens, 0, body.logprobs) for tokens in ids])
        return CompletionReply(seat, ids, wants_usage(body), n, texts, scores)

    return await respond(request, body, n * len(prompts), prepare, reply, body.logprobs)


def wants_usage(body):
    return bool(body.stream and body.stream_options and body.stream_options.include_usage)


def echo_texts(seat, prompts):
    return [prompt if isinstance(prompt, str) else seat.tokenizer.decode(prompt) for prompt in prompts]


async def respond(request, body, load, prepare, make_reply, top):
    """Wait for a seat, check what depends on the model, then answer whole or as a stream."""
    pool, settings = request.app.state.pool, request.app.state.settings
    async with AsyncExitStack() as stack:
        driver, seat = await while_connected(request, stack.enter_async_context(pool.seat(body.model, load)))
        requests = prepare(seat)
        answering = Answering(pool, driver, seat, requests, body.stops, bool(body.stream), top, settings.timeout_s)

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


async def respond_scored(request, body, load, encoded, wanted):
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
        choices = [one_token(seat, prompts[index // n], index, scores and scores[index // n], wanted, body.stops, top) for index in range(n * len(prompts))]
        reply = CompletionReply(seat, prompts, wants_usage(body), n, echo_texts(seat, body.prompts()), scores if top is not None else None)
        return Response(reply.chunk(choices) + reply.end(choices), media_type="text/event-stream") if body.stream else Json(reply.whole(choices))

    return await while_connected(request, work())


def check_scored(seat, tokens):
    config = seat.model.config
    if not 0 <= min(tokens) <= max(tokens) < config.vocab_size:
        raise ApiError(400, f"the prompt holds token {max(tokens)}, outside the vocabulary of {config.vocab_size}", param="prompt")
    if len(tokens) > config.sequence_len:
        raise ApiError(400, f"the prompt has {len(tokens)} tokens, and the model's context is {config.sequence_len}: shorten it", param="prompt",
                       code="context_length_exceeded")


def one_token(seat, prompt, index, score, wanted, stops, top):
    """The choice that has only the likeliest token behind its prompt (or, with `wanted` 0, none)."""
    choice = Choice(index, prompt, finish="length")
    if wanted:
        token, logprob, alternatives = score.next
        answer, is_end = Answer(seat.tokenizer, stops), token in seat.engine.stops
        choice.text = choice.new_text = answer.add(token, is_end) + ("" if answer.is_cut else answer.finish())
        choice.tokens, choice.offsets, choice.generated = [token], [0], 1
        choice.finish = "stop" if is_end or answer.is_cut else "length"
        choice.score = None if top is None else Score([logprob], [alternatives], score.next)
    return choice


# ---------------------------------------------------------------------------------------------------------------------
# Models, tokens, pages

@router.get("/v1/models")
async def models(request: Request):
    """The models on disk, the default first."""
    return Json({"object": "list", "data": await asyncio.to_thread(request.app.state.pool.available)})


@router.get("/v1/models/{name:path}")
async def model(name: str, request: Request):
    stage, tag, _ = request.app.state.pool.resolve(name)
    return Json(next(one for one in await asyncio.to_thread(request.app.state.pool.available) if one["id"] == f"{stage}/{tag}"))


@router.get("/v1/info")
async def info(request: Request):
    """Defaults and limits, and the default model."""
    default = (await asyncio.to_thread(request.app.state.pool.available))[0]
    pool = request.app.state.pool
    return Json({"default_model": default["id"], "model": default, "settings": asdict(request.app.state.settings), "workers": len(pool.drivers),
                 "devices": [str(driver.device.device) for driver in pool.drivers], "max_rows": pool.max_rows, "max_queue": pool.max_queue})


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, request: Request):
    """Text -> ids. A text that is the name of a special token, as a whole, is that token."""
    async with request.app.state.pool.seat(body.model, 0) as (_, seat):
        special = seat.tokenizer.special_ids.get(body.prompt)
        tokens = [special] if special is not None else seat.tokenizer.encode(body.prompt)
        return Json({"tokens": tokens, "count": len(tokens), "max_model_len": seat.model.config.sequence_len})


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, request: Request):
    async with request.app.state.pool.seat(body.model, 0) as (_, seat):
        return Json({"prompt": seat.tokenizer.decode(body.tokens)})


@router.get("/tokenizer_info")
async def tokenizer_info():
    return Json({"tokenizer_class": "nanochat", "bos_token": "<|bos|>", "eos_token": "<|assistant_end|>", "pad_token": None, "add_bos_token": False})


@router.post("/render")
async def render_markdown(body: RenderRequest):
    """Markdown and LaTeX -> HTML with MathML, in which nothing can act."""
    return Json({"html": await asyncio.to_thread(render, body.text)})


@router.get("/")
async def page(request: Request):
    html, policy = request.app.state.page.read()
    return Response(html, media_type="text/html; charset=utf-8", headers={"Content-Security-Policy": policy, "X-Frame-Options": "DENY"})


@router.get("/favicon.ico", include_in_schema=False)
async def favicon():
    return Response(status_code=204)


@router.get("/health")
async def health(request: Request):
    """200 while all engines' threads live, 500 otherwise."""
    alive = request.app.state.pool.is_alive()
    return Json({"status": "ok" if alive else "failed"}, 200 if alive else 500)


@router.get("/metrics")
async def metrics(request: Request):
    """Prometheus' text format."""
    return Response(request.app.state.metrics.text(request.app.state.pool.gauges()), media_type="text/plain; version=0.0.4; charset=utf-8")
