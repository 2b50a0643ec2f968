"""What the server answers, for its description at /openapi.json. Nothing is checked against it at run time; a test fuzzes the server and
compares every answer with it."""
from typing import Literal

from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, ConfigDict

from nanochat.serving.protocol import ErrorBody, TextPart


class Said(BaseModel):
    """All fields are always there, and there are no others."""
    model_config = ConfigDict(extra="forbid")


class Usage(Said):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


Finish = Literal["stop", "length"]


class TokenLogprob(Said):
    token: str
    logprob: float
    bytes: list[int]


class ScoredToken(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(Said):
    content: list[ScoredToken]
    refusal: None


class ChatMessage(Said):
    """`parts` is there where a tool was called: what to send back as content, so that the call stays one."""
    role: Literal["assistant"]
    content: str
    refusal: None
    parts: list[TextPart] = []


class ChatChoice(Said):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish


class ChatCompletion(Said):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class TextLogprobs(Said):
    """A column for each token; null where nothing precedes it."""
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(Said):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Finish


class Completion(Said):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class Model(Said):
    id: str
    object: Literal["model"]
    created: int
    owned_by: Literal["nanochat"]
    stage: str
    model_tag: str
    step: int
    steps: list[int]
    sequence_len: int
    n_layer: int
    n_head: int
    vocab_size: int
    is_default: bool
    is_loaded: bool


class ModelList(Said):
    object: Literal["list"]
    data: list[Model]


class ServerSettings(Said):
    temperature: float
    top_k: int | None
    max_tokens: int
    max_tokens_limit: int
    max_body: int
    timeout_s: float
    tokenizer_info: bool


class Info(Said):
    default_model: str
    model: Model
    settings: ServerSettings
    workers: int
    devices: list[str]
    max_rows: int
    max_queue: int


class Tokens(Said):
    tokens: list[int]
    count: int
    max_model_len: int


class Detokenized(Said):
    prompt: str


class TokenizerInfo(Said):
    tokenizer_class: Literal["nanochat"]
    bos_token: str
    eos_token: str
    pad_token: None
    add_bos_token: bool


class Rendered(Said):
    html: str


class Health(Said):
    status: Literal["ok", "failed"]


class Problem(Said):
    index: int
    num_problems: int
    prompt: str
    letters: list[str]
    answer_letter: str
    reference: str


class Letters(Said):
    probs: dict[str, float]
    mass: float
    best: str
    margin: float
    written: str | None
    is_forced: bool


class Attention(Said):
    layer: int
    head: int | None
    n_layer: int
    n_head: int
    queries: list[str]
    keys: list[str]
    kinds: list[Literal["question", "options", "completion", "other"]]
    weights: list[list[float]]


def says(model, also_stream=False):
    """What a route answers with status 200, as its decorator wants it."""
    streamed = {"content": {"text/event-stream": {"schema": {"type": "string", "description": "`data: CHUNK` events, then `data: [DONE]`"}}}}
    return {200: {"model": model, "description": "as asked" + ("; a stream of events where `stream` is true" if also_stream else ""),
                  **(streamed if also_stream else {})}}


def says_text(media_type):
    return {200: {"description": "text", "content": {media_type: {"schema": {"type": "string"}}}}}


ERRORS = {400: "the request is wrong, and the message says where", 401: "the API key is missing or wrong", 403: "not under this name, or not from this page",
          404: "no such path, model or problem", 405: "not by this method", 408: "the body took too long", 413: "the body is too large",
          429: "the queue is full: Retry-After says when to come back", 500: "the server or the engine failed"}
RESPONSES = {**{status: {"model": ErrorBody, "description": text} for status, text in ERRORS.items()},
             "default": {"model": ErrorBody, "description": "an error"}}  # which also keeps FastAPI from promising a 422
RESPONSES[429]["headers"] = {"Retry-After": {"schema": {"type": "integer", "minimum": 1}, "description": "seconds"}}


def describe(app, api_key, open_paths):
    """Let app.openapi() say, where there is a key, which paths want it."""
    def openapi():
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            if api_key:
                schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
                for path, operations in schema["paths"].items():
                    for operation in operations.values():
                        operation["security"] = [] if path in open_paths else [{"key": []}]
            app.openapi_schema = schema
        return app.openapi_schema
    app.openapi = openapi
