"""A base directory with tiny models of every stage, and the server over it in a thread of the test's own process."""
import asyncio
import json
import re
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import httpx
import torch
import uvicorn

from nanochat.checkpoint_manager import save_checkpoint
from nanochat.compute import Compute
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.serving.app import Settings, build_app
from nanochat.serving.metrics import Metrics
from nanochat.serving.pool import Pool
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer
from nanochat.training import LoopState

SECONDS = 180  # to wait for anything: a machine may be busy
get = partial(httpx.get, timeout=SECONDS)
COMPUTE = Compute(torch.device("cpu"), torch.float32)
TEXT = ["Ann has 10 boxes with 8 cups each. How many cups in all?\n- 90=A\n- 80=B\n10*8=80 so 80=B\nAnswer: B Answer: A Answer: C Answer: D Answer: E "
        "naïve café, 東京, 🙂 the quick brown fox jumps over the lazy dog"] * 40


@dataclass(frozen=True)
class NoConfig:
    seed: int = 0


def make_base(folder, stages=("base", "mid", "sft", "rl"), sequence_len=96, n_layer=2, n_embd=32, vocab_size=400, padding=0):
    """Tokenizer, random models with `padding` rows beyond its vocabulary, and ten AQuA problems under `folder`, which must be NANOCHAT_BASE_DIR."""
    tokenizer = Tokenizer.train(TEXT, vocab_size)
    tokenizer.save(folder / "tokenizer")
    for seed, stage in enumerate(stages):
        torch.manual_seed(seed)
        model = GPT(GPTConfig(sequence_len, tokenizer.vocab_size + padding, n_layer, 2, 2, n_embd))
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.3)  # the head too: a fresh model is uniform, and every greedy choice a tie
        save_checkpoint(stage, "d2", LoopState(step=5), NoConfig(), COMPUTE, model, torch.optim.SGD(model.parameters()), tokenizer)
    rows = [{"question": f"What is {i} + 1?", "options": [f"A){i}", f"B){i + 1}", "C)7", "D)90", "E)31"], "rationale": "count", "correct": "B"}
            for i in range(10, 20)]
    (folder / "aqua").mkdir()
    (folder / "aqua" / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


SPECIAL = "|".join(map(re.escape, SPECIAL_TOKENS))
CALL = "|".join(rf"<\|{kind}_start\|>(?:(?!{SPECIAL}).)*<\|{kind}_end\|>" for kind in ("python", "output"))


def said(completion):
    """What a chat shows of an engine's Completion: whole calls and the names of special tokens taken out of its text."""
    return re.sub(SPECIAL, "", re.sub(CALL, "", completion.text, flags=re.DOTALL))


def written(tokenizer, completion):
    """What a text completion shows of it: the bytes of all but special tokens."""
    special = set(tokenizer.special_ids.values())
    return b"".join(tokenizer.id_to_bytes(token) for token in completion.tokens if token not in special).decode("utf-8", errors="replace")


class Server(uvicorn.Server):
    """What a test needs to know about a running server."""
    pool = url = metrics = None

    def capture_signals(self):  # signals belong to the test's process
        return contextmanager(lambda: (yield))()


@contextmanager
def serve(source="rl", workers=1, page=None, api_key="", routers=(), log=None, settings=Settings(), origins=(), port=0, **limits):
    metrics = Metrics()
    pool = Pool([COMPUTE] * workers, metrics, source, **limits)
    app = build_app(pool, settings, metrics, page, api_key, routers, log, origins)
    server = Server(uvicorn.Config(app, port=port, log_level="warning", access_log=False, loop="asyncio", http="h11", timeout_graceful_shutdown=2,
                                   timeout_keep_alive=75, ws="none"))
    server.app, server.pool, server.metrics = app, pool, metrics
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        server.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        yield server
    finally:
        server.should_exit = True
        thread.join(SECONDS)
        assert not thread.is_alive(), "the server did not end"


class Pace:
    """From now on engines take a step only where the test gives leave, so that nothing depends on who is faster. A request's first token
    needs none."""

    def __init__(self, monkeypatch):
        self.leave, self.is_free, step = threading.Semaphore(0), False, Engine.step

        def paced_step(engine):
            return step(engine) if self.is_free or self.leave.acquire(timeout=0.02) else []
        monkeypatch.setattr(Engine, "step", paced_step)

    def give(self, steps):
        self.leave.release(steps)

    def free(self):
        self.is_free = True


def wait_until_idle(server, seconds=SECONDS):
    """Nothing in flight, nothing waiting, no row left in any engine."""
    end = time.monotonic() + seconds
    while any(driver.load or driver.rows or driver.waiting or driver.active or driver.scorings for driver in server.pool.drivers):
        assert time.monotonic() < end, [(driver.load, driver.rows, driver.waiting) for driver in server.pool.drivers]
        time.sleep(0.02)
    for seats in server.pool.seats.values():
        for seat in seats.values():
            assert seat.engine.is_idle and not seat.answers and seat.users == 0
