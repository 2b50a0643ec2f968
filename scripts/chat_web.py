"""Talk to models in the browser, and through OpenAI's API. `kill` and Ctrl-C end it.

    python -m scripts.chat_web -i rl                    prints the address; open it
    curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' -d '{"messages": [{"role": "user", "content": "2 + 2?"}]}'
    OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none").chat.completions.create(model="rl", messages=[...], stream=True)

The endpoints are listed in nanochat/serving/app.py; those for AQuA are here, and what they return is in their docstrings:

    GET  /aqua/problem?index=N             a problem of the validation split, a random one without index
    POST /aqua/letters                     the letters' distribution where the answer is decided
    POST /aqua/attention                   one layer's attention, for a heatmap

The page is scripts/chat_web.html, one file. It is served under a Content-Security-Policy with the hash of each <script> and <style> in
it, so inline handlers (onclick=) and style attributes do not work in it; element.style.width = ... does. With a key the page itself is
open, and it must send `Authorization: Bearer KEY` with every request.

Beyond 127.0.0.1 (--host) a key is demanded: NANOCHAT_API_KEY in the environment or in .env, or --api-key-file. --api-key=VALUE works
too, but whoever may list this machine's processes reads it there. There is no TLS: put a reverse proxy in front for that.
"""
import asyncio
import random
import signal
import socket
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import uvicorn
from fastapi import APIRouter, Query, Request
from pydantic import Field

from nanochat.common import env, print0
from nanochat.compute import Compute, compute_init
from nanochat.configurator import parse
from nanochat.interpretability.attention_metrics import prompt_spans
from nanochat.interpretability.capture import Capture
from nanochat.interpretability.plots import token_labels
from nanochat.rl.letter_metrics import decision_point, letter_ids, letters_at
from nanochat.serving.app import Settings, build_app
from nanochat.serving.described import Attention, Letters, Problem, says
from nanochat.serving.guard import is_loopback
from nanochat.serving.metrics import Metrics
from nanochat.serving.pool import Pool
from nanochat.serving.protocol import ApiError, Message, Strict
from nanochat.serving.transport import Json, while_connected
from tasks.aqua import AQUA
from tasks.common import message_text


@dataclass(frozen=True)
class Config:
    """Serve models: a page to talk to them, and OpenAI's API."""
    num_gpus: int = 1                # [-n] workers, one per GPU; on a CPU they share its cores
    source: str = "sft"              # [-i] stage of the default model: base, mid, sft or rl
    temperature: float = 0.8         # [-t] of answers whose request names none; 0 = greedy
    top_k: int | None = 50           # [-k] most likely tokens to draw from, likewise (None = all)
    max_tokens: int = 512            # [-m] longest chat answer, likewise
    model_tag: str | None = None     # [-g] folder of the default model (None = the one saved last)
    step: int | None = None          # [-s] its step (None = the newest)
    port: int = 8000                 # [-p] 0 = any free one
    dtype: str = ""                  # [-d] float32 or bfloat16 ("" = bfloat16 where the hardware has it)
    device_type: str = ""            # cuda, mps or cpu ("" = the best there is)
    host: str = "127.0.0.1"          # address to listen on; beyond this machine a key is needed
    api_key: str = ""                # visible to others on this machine: prefer NANOCHAT_API_KEY or --api-key-file
    api_key_file: str = ""           # file with the key and nothing else
    # Limits
    max_rows: int = 64               # completions decoded at once, per worker
    max_queue: int = 256             # completions that may wait, per worker, before 429
    max_models: int = 4              # models in memory, per worker
    max_tokens_limit: int = 4096     # longest answer that a request may ask for
    max_body_bytes: int = 1 << 20    # longest request
    timeout_s: float = 300.0         # a request's time; its answer ends where it is then
    access_log: bool = True          # print method, route, status and time of every request
    tokenizer_info: bool = False     # answer /tokenizer_info: lm-evaluation-harness then needs no tokenizer=FOLDER, and takes no chat template
    cors_origins: str = ""           # origins, with commas between them, whose pages may ask this server too, e.g. http://localhost:3000


def main(config):
    key = api_key(config)
    if not is_loopback(config.host) and not key:
        raise SystemExit(f"--host={config.host} lets other machines in, and there is no API key: set NANOCHAT_API_KEY (in the environment or in "
                         ".env), or give --api-key-file=FILE")
    computes = devices(config)
    metrics = Metrics()
    pool = Pool(computes, metrics, config.source, config.model_tag, config.step, config.max_rows, config.max_queue, config.max_models,
                config.timeout_s)
    try:
        name = "/".join(map(str, pool.preload()))
    except (ApiError, ValueError) as error:
        raise SystemExit(f"chat_web: {getattr(error, 'detail', error)}. Train one first (bash run_aquarat_small.sh), choose another stage (-i base, mid, sft, rl), "
                         "or set NANOCHAT_BASE_DIR") from None
    settings = Settings(config.temperature, config.top_k, config.max_tokens, config.max_tokens_limit, config.max_body_bytes, config.timeout_s, config.tokenizer_info)
    origins = tuple(origin.strip().rstrip("/") for origin in config.cors_origins.split(",") if origin.strip())
    app = build_app(pool, settings, metrics, Path(__file__).with_name("chat_web.html"), key, (router,), print0 if config.access_log else None, origins)
    try:
        listener = listen(config.host, config.port)
    except OSError as error:
        raise SystemExit(f"{config.host}:{config.port} cannot be opened ({error.strerror}): choose another --port, or 0 for any free one") from None
    port = listener.getsockname()[1]
    shown = f"[{config.host}]" if ":" in config.host else config.host
    print0(f"{name} on {', '.join(str(compute.device) for compute in computes)}: http://{shown}:{port}/ (API under /v1; Ctrl-C ends it)")
    # Clients keep idle connections for 5 s or so: the server must not be the one that closes them, just as a request comes.
    # uvicorn raises the signal that ended it once more: here that does nothing, and the program ends with status 0
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    server = uvicorn.Server(uvicorn.Config(app, access_log=False, log_level="warning", timeout_graceful_shutdown=5, timeout_keep_alive=75, server_header=False, http="h11",
                                           h11_max_incomplete_event_size=1 << 16, loop="asyncio", ws="none"))
    asyncio.run(server.serve(sockets=[listener]))


def devices(config):
    """One Compute per worker."""
    first = compute_init(config.device_type, config.dtype)
    if config.num_gpus < 1:
        raise SystemExit(f"-n {config.num_gpus} leaves no worker: give 1 or more")
    if first.device.type != "cuda":
        torch.set_num_threads(max(1, torch.get_num_threads() // config.num_gpus))
        return [first] * config.num_gpus
    if config.num_gpus > torch.cuda.device_count():
        raise SystemExit(f"-n {config.num_gpus} needs as many GPUs, and there are {torch.cuda.device_count()}: give that number or fewer")
    return [Compute(torch.device("cuda", number), first.dtype) for number in range(config.num_gpus)]


def api_key(config):
    """The key from --api-key-file, --api-key, the environment or .env, in this order; "" = none."""
    if config.api_key_file:
        try:
            key = Path(config.api_key_file).expanduser().read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise SystemExit(f"--api-key-file={config.api_key_file} cannot be read: {error}") from None
        if not key:
            raise SystemExit(f"--api-key-file={config.api_key_file} is empty: write the key into it")
    else:
        key = config.api_key or env("NANOCHAT_API_KEY") or dotenv("NANOCHAT_API_KEY")
    if not key.isascii() or any(letter.isspace() for letter in key):
        raise SystemExit("the API key has blanks or characters beyond ASCII, which no client can send: use letters and digits")
    return key


def dotenv(name, path=".env"):
    """The value of NAME=value in a .env file, "" where there is none; read as data, never executed."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return ""
    values = [line.partition("=")[2].strip().strip("\"'") for line in lines if line.removeprefix("export ").partition("=")[0].strip() == name]
    return values[-1] if values else ""


def listen(host, port):
    """A listening socket, so that an occupied port is told in words and port 0 has a number."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    listener.listen(2048)
    listener.set_inheritable(True)
    return listener


# ---------------------------------------------------------------------------------------------------------------------
# AQuA

router = APIRouter(prefix="/aqua")
MAX_QUERIES, MAX_KEYS = 32, 160  # of a heatmap: what can still be read


class Thought(Strict):
    """A conversation that ends with the question, and what the assistant has said so far."""
    model: str | None = Field(None, max_length=200)
    messages: list[Message] = Field(min_length=1, max_length=2000)
    text: str = ""

    def tokens(self, seat, text):
        """-> (ids of the prompt, ids of `text`)."""
        prompt = seat.tokenizer.render_prompt([message.plain() for message in self.messages])
        completion = seat.tokenizer.encode(text)
        most = seat.model.config.sequence_len
        if len(prompt) + len(completion) > most:
            raise ApiError(400, f"conversation and text have {len(prompt) + len(completion)} tokens, and the model's context is {most}: shorten them",
                           code="context_length_exceeded")
        return prompt, completion


class LettersRequest(Thought):
    letters: list[str] = Field(default=list("ABCDE"), min_length=2, max_length=8)


class AttentionRequest(Thought):
    layer: int = -1
    head: int | None = None


@cache
def problems():
    return AQUA(split="validation")


@router.get("/problem", responses=says(Problem))
async def problem(index: int | None = Query(None, ge=0, lt=2**31)):
    """-> {index, num_problems, prompt (the user's message, as models were trained on it), letters, answer_letter, reference}."""
    try:
        task = await asyncio.to_thread(problems)
    except (ValueError, OSError) as error:  # no data on this machine, and no Hub to fetch it from
        raise ApiError(404, f"there are no AQuA problems here: {error}"[:500], code="no_data") from None
    if index is not None and index >= len(task):
        raise ApiError(404, f"there is no problem {index}: the split has {len(task)}", param="index")
    index = random.SystemRandom().randrange(len(task)) if index is None else index
    conversation = task[index]
    return Json({"index": index, "num_problems": len(task), "prompt": message_text(conversation["messages"][0]), "letters": conversation["letters"],
                 "answer_letter": conversation["answer_letter"], "reference": message_text(conversation["messages"][-1])})


@router.post("/letters", responses=says(Letters))
async def letters(body: LettersRequest, request: Request):
    """{model, messages, text, letters} -> {probs {letter: p over the letters}, mass (their share of the vocabulary), best, margin (logit of
    the best less that of the second best), written (the letter that stands in `text`, or null), is_forced}.

    `text` is the assistant's answer so far. If it has a line "Answer: X", the distribution is the one X was drawn from; else
    "Answer:" is put behind it, and is_forced is true."""
    def look(seat):
        id_of = dict(zip(body.letters, letter_ids(seat.tokenizer, body.letters)))
        prompt, completion = body.tokens(seat, body.text)
        point = decision_point(seat.tokenizer, completion)
        is_forced = point is None
        written = None if is_forced else next((letter for letter, token in id_of.items() if token == completion[point]), None)
        if is_forced:
            text = body.text.rstrip()
            prompt, completion = body.tokens(seat, text + "\nAnswer:" if text else "Answer:")
            point = len(completion)
        inputs = torch.tensor([prompt + completion[:point]], device=seat.model.device)
        with torch.inference_mode():
            said = letters_at(seat.model, None, seat.model.hidden(inputs)[:, -1], None, [body.letters], id_of, 1.0)[0]
        return {**said, "written": written, "is_forced": is_forced}
    return await look_into(request, body, look)


@router.post("/attention", responses=says(Attention))
async def attention(body: AttentionRequest, request: Request):
    """{model, messages, text, layer, head} -> {layer, head, n_layer, n_head, queries, keys (labels), kinds (of the keys: question, options,
    completion, other), weights [query][key] in 0..1}. layer -1 = the last; head null = the mean of all. A row is a prediction, of at most
    the last 32 tokens; a column a token it could look at, the first and the last 159."""
    def look(seat):
        config = seat.model.config
        if not -config.n_layer <= body.layer < config.n_layer:
            raise ApiError(400, f"layer {body.layer} does not exist: the model has {config.n_layer}", param="layer")
        if body.head is not None and not 0 <= body.head < config.n_head:
            raise ApiError(400, f"head {body.head} does not exist: the model has {config.n_head}", param="head")
        prompt, completion = body.tokens(seat, body.text)
        sequence, layer = prompt + completion, body.layer % config.n_layer
        T = len(sequence)
        first = max(len(prompt) - 1, T - MAX_QUERIES)
        with torch.inference_mode(), Capture(seat.model, [layer]) as seen:
            seat.model.hidden(torch.tensor([sequence], device=seat.model.device))
            weights = seen.attention(layer, first)[0]  # (H, Q, T)
        weights = weights.mean(dim=0) if body.head is None else weights[body.head]
        keys = list(range(T)) if T <= MAX_KEYS else [0, *range(T - MAX_KEYS + 1, T)]
        labels, spans = [label.replace(r"\$", "$") for label in token_labels(seat.tokenizer, sequence)], prompt_spans(seat.tokenizer, sequence)
        kinds = ["completion" if t >= len(prompt) else "question" if spans["question"][t] else "options" if spans["options"][t] else "other" for t in keys]
        return {"layer": layer, "head": body.head, "n_layer": config.n_layer, "n_head": config.n_head, "queries": labels[first:],
                "keys": [labels[t] for t in keys], "kinds": kinds, "weights": [[round(value, 4) for value in row] for row in weights[:, keys].tolist()]}
    return await look_into(request, body, look)


async def look_into(request, body, look):
    """Run `look(seat)` between two steps of the model's engine."""
    async def work():
        async with request.app.state.pool.seat(body.model) as (driver, seat):
            return Json(await request.app.state.pool.call(driver, seat, look))
    return await while_connected(request, work())


if __name__ == "__main__":
    main(parse(Config))
