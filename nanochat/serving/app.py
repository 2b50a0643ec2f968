"""The HTTP server: OpenAI's endpoints over the pool of models, and what a page and an operator ask besides.

    GET  /v1/models  /v1/models/{name}     what is on disk
    POST /v1/chat/completions              stream, n, stop, seed, temperature, top_p, top_k, max_tokens, logprobs
    POST /v1/completions                   the same; prompts as text or ids, one or many; echo, logprobs of the prompt
    GET  /v1/info                          defaults, limits, the default model
    POST /render                           markdown with LaTeX -> safe HTML
    POST /tokenize  /detokenize            text -> ids and back
    GET  /tokenizer_info                   only where settings say so
    GET  /health  /metrics                 always answer
    GET  /                                 the page

A prompt given as text begins with <|bos|>; ids are taken as they are. max_tokens beyond the context is cut to it: the answer then
ends with finish_reason "length". Errors are OpenAI's: {"error": {"message", "type", "param", "code"}}.
"""
import asyncio
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from nanochat.serving import completions, described
from nanochat.serving.described import RESPONSES, describe, says, says_text
from nanochat.serving.guard import OPEN_PATHS, Guard
from nanochat.serving.page import Page
from nanochat.serving.protocol import ApiError, DetokenizeRequest, RenderRequest, TokenizeRequest, problem_of
from nanochat.serving.render import render
from nanochat.serving.transport import ClientGone, Json, as_json


@dataclass(frozen=True)
class Settings:
    """What an operator decides. The first three are what a client gets that does not say otherwise."""
    temperature: float = 0.8
    top_k: int | None = 50
    max_tokens: int = 512
    max_tokens_limit: int = 4096
    max_body: int = 1 << 20
    timeout_s: float = 300.0
    tokenizer_info: bool = False


def build_app(pool, settings, metrics, page=None, api_key="", routers=(), log=None, origins=()):
    """-> the ASGI application. `page` is the HTML file served at /; `routers` are further endpoints, which find pool and settings in
    `request.app.state`; pages of `origins` may ask this server too."""
    @asynccontextmanager
    async def lifespan(app):
        pool.start(asyncio.get_running_loop())
        yield
        await asyncio.to_thread(pool.stop)

    app = FastAPI(title="nanochat", description="OpenAI's API over nanochat checkpoints.", lifespan=lifespan, docs_url=None, redoc_url=None,
                  openapi_url="/openapi.json", responses=RESPONSES)
    describe(app, api_key, OPEN_PATHS)
    app.state.pool, app.state.settings, app.state.metrics, app.state.page = pool, settings, metrics, Page(page)
    app.include_router(completions.router)
    app.include_router(router)
    if settings.tokenizer_info:
        app.include_router(tokenizer_router)
    for more in routers:
        app.include_router(more)
    app.add_exception_handler(ApiError, lambda request, error: as_json(error))
    app.add_exception_handler(RequestValidationError, lambda request, error: as_json(problem_of(error.errors())))
    app.add_exception_handler(ValueError, lambda request, error: as_json(ApiError(400, str(error)[:500])))
    app.add_exception_handler(HTTPException, lambda request, error: as_json(ApiError(error.status_code, str(error.detail)[:500], headers=error.headers)))
    app.add_exception_handler(Exception, lambda request, error: as_json(ApiError(500, f"the server failed: {type(error).__name__}", "server_error")))
    app.add_exception_handler(ClientGone, lambda request, error: Response(status_code=499))
    app.add_middleware(Guard, metrics=metrics, api_key=api_key, max_body=settings.max_body, log=log, origins=origins)
    if origins:
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["authorization", "content-type"], expose_headers=["retry-after"])
    return app


router, tokenizer_router = APIRouter(), APIRouter()


@router.get("/v1/models", responses=says(described.ModelList))
async def models(request: Request):
    """The models on disk, the default first."""
    return Json({"object": "list", "data": await asyncio.to_thread(request.app.state.pool.available)})


@router.get("/v1/models/{name:path}", responses=says(described.Model))
async def model(name: str, request: Request):
    stage, tag, _ = request.app.state.pool.resolve(name)
    return Json(next(one for one in await asyncio.to_thread(request.app.state.pool.available) if one["id"] == f"{stage}/{tag}"))


@router.get("/v1/info", responses=says(described.Info))
async def info(request: Request):
    """Defaults and limits, and the default model."""
    default = (await asyncio.to_thread(request.app.state.pool.available))[0]
    pool = request.app.state.pool
    return Json({"default_model": default["id"], "model": default, "settings": asdict(request.app.state.settings), "workers": len(pool.drivers),
                 "devices": [str(driver.compute.device) for driver in pool.drivers], "max_rows": pool.max_rows, "max_queue": pool.max_queue})


@router.post("/tokenize", responses=says(described.Tokens))
async def tokenize(body: TokenizeRequest, request: Request):
    """Text -> ids. A text that is the name of a special token, as a whole, is that token."""
    async with request.app.state.pool.seat(body.model, 0) as (_, seat):
        special = seat.tokenizer.special_ids.get(body.prompt)
        tokens = [special] if special is not None else seat.tokenizer.encode(body.prompt)
        return Json({"tokens": tokens, "count": len(tokens), "max_model_len": seat.model.config.sequence_len})


@router.post("/detokenize", responses=says(described.Detokenized))
async def detokenize(body: DetokenizeRequest, request: Request):
    async with request.app.state.pool.seat(body.model, 0) as (_, seat):
        return Json({"prompt": seat.tokenizer.decode(body.tokens)})


@tokenizer_router.get("/tokenizer_info", responses=says(described.TokenizerInfo))
async def tokenizer_info():
    """lm-evaluation-harness that finds this tokenizes here, and can then neither use a tokenizer of its own nor a chat template."""
    return Json({"tokenizer_class": "nanochat", "bos_token": "<|bos|>", "eos_token": "<|assistant_end|>", "pad_token": None, "add_bos_token": False})


@router.post("/render", responses=says(described.Rendered))
async def render_markdown(body: RenderRequest):
    """Markdown and LaTeX -> HTML with MathML, in which nothing can act."""
    return Json({"html": await asyncio.to_thread(render, body.text)})


@router.get("/", response_class=Response, responses=says_text("text/html"))
async def page(request: Request):
    html, policy = request.app.state.page.read()
    return Response(html, media_type="text/html; charset=utf-8", headers={"Content-Security-Policy": policy, "X-Frame-Options": "DENY"})


@router.get("/favicon.ico", include_in_schema=False)
async def favicon():
    return Response(status_code=204)


@router.get("/health", responses={**says(described.Health), 503: {"model": described.Health, "description": "an engine's thread has ended"}})
async def health(request: Request):
    """200 while all engines' threads live, 503 otherwise."""
    alive = request.app.state.pool.is_alive()
    return Json({"status": "ok" if alive else "failed"}, 200 if alive else 503)


@router.get("/metrics", response_class=Response, responses=says_text("text/plain"))
async def metrics(request: Request):
    """Prometheus' text format."""
    return Response(request.app.state.metrics.text(request.app.state.pool.gauges()), media_type="text/plain; version=0.0.4; charset=utf-8")
