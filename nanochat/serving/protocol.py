"""What a client may ask, in the words of OpenAI's API, and how it is told that it may not.

What would change an answer and is not supported is refused, not ignored. Beyond OpenAI's: `top_k`; token ids as prompts; an
assistant's content in parts of type python and python_output; `skip_special_tokens` (vLLM's name), which false shows by name.
"""
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

MAX_TOP = 20  # alternatives to each token
IGNORED = frozenset(("user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"))
NEUTRAL = {"presence_penalty": (0, None), "frequency_penalty": (0, None), "logit_bias": ({}, None), "best_of": (1, None), "suffix": ("", None),
           "tools": ([], None), "functions": ([], None), "response_format": ({"type": "text"}, None), "repetition_penalty": (1, None),
           "min_p": (0, None), "modalities": (["text"], None), "tool_choice": ("none", "auto", None), "function_call": ("none", "auto", None)}

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Stop = Annotated[str, Field(max_length=256)]


class ApiError(HTTPException):
    """What the client gets instead of an answer. An HTTPException, because FastAPI lets only those through while it reads a body."""

    def __init__(self, status, message, type="invalid_request_error", param=None, code=None, headers=None):
        super().__init__(status, message, headers)
        self.body = {"error": {"message": message, "type": type, "param": param, "code": code}}


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail


class Strict(BaseModel):
    """Types are not guessed, and numbers are finite."""
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)
    type: Literal["text", "python", "python_output"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)  # name, refusal, audio: what clients send back of earlier answers
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def plain(self):
        """As the tokenizer wants it."""
        content = self.content if isinstance(self.content, str) else [part.model_dump(include={"type", "text"}) for part in self.content]
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)
    include_usage: bool | None = False


def name_extras(schema):
    """Into the description: what `check` below lets pass besides the fields."""
    schema["properties"] |= {name: {"description": "accepted and ignored"} for name in sorted(IGNORED)}
    schema["properties"] |= {name: {"enum": list(values), "description": "not supported: only what changes nothing"} for name, values in NEUTRAL.items()}
    schema["additionalProperties"] = False


class Sampling(BaseModel):
    """The settings that both endpoints share. None = the server's default."""
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, json_schema_extra=name_extras)
    model: str | None = Field(None, max_length=200)
    n: int | None = Field(1, ge=1, le=128)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=2**31)
    seed: int | None = Field(None, ge=-2**63, lt=2**64)
    stop: Stop | Annotated[list[Stop], Field(max_length=32)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    skip_special_tokens: bool | None = True

    def check(self):
        """ApiError for a field that exists nowhere, or asks for something that is not there."""
        for name, value in (self.model_extra or {}).items():
            if name in NEUTRAL:
                if not any(value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in NEUTRAL[name]):
                    raise ApiError(400, f"{name} is not supported here: leave it out", param=name, code="unsupported_parameter")
            elif name not in IGNORED:
                raise ApiError(400, f"there is no parameter {name[:60]!r}", param=name[:60], code="unknown_parameter")

    @property
    def stops(self):
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class ChatRequest(Sampling):
    messages: list[Message] = Field(min_length=1, max_length=2000)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP)


class CompletionRequest(Sampling):
    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    max_tokens: int | None = Field(16, ge=0)
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP)
    echo: bool | None = False

    def prompts(self):
        """-> a list of str and lists of ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if self.prompt and isinstance(self.prompt[0], int) else self.prompt


class RenderRequest(Strict):
    text: str = Field(max_length=20_000)


class TokenizeRequest(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)
    prompt: str
    model: str | None = Field(None, max_length=200)


class DetokenizeRequest(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)
    tokens: list[TokenId]
    model: str | None = Field(None, max_length=200)


def problem_of(errors: list[dict[str, Any]]):
    """Pydantic's list of errors -> the ApiError that names the first."""
    first = errors[0]
    place = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path"))
    where = f"{place}: " if place else ""
    return ApiError(400, f"{where}{first['msg']}"[:500], param=place[:200] or None, code=first["type"])
