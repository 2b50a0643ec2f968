"""Throughput and time to the first token of the server: one client beside many, in turns, on one server in a process of its own.

    python dev/bench/serve.py --clients=32

Every client asks again as soon as it has its answer. Ratios are taken within a round, one client right before many, so that what else
the machine does hurts both. The model is random and never ends early. The last line is JSON.
"""
import asyncio
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from nanochat.checkpoint_manager import save_checkpoint  # noqa: E402
from nanochat.common import base_dir, compute_init  # noqa: E402
from nanochat.configurator import parse  # noqa: E402
from nanochat.gpt import GPT, config_from_depth  # noqa: E402
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer  # noqa: E402
from nanochat.training import LoopState  # noqa: E402


@dataclass(frozen=True)
class Config:
    """Measure the server."""
    clients: int = 32           # clients at once
    depth: int = 4              # layers; the width is 64 times as many
    vocab_size: int = 4096      # rows of the head
    prompt_tokens: int = 64     # of every request, all different
    new_tokens: int = 64        # of every answer
    requests: int = 2           # per client and round; the single one sends 6 times as many
    rounds: int = 3             # the median round counts
    stream: bool = True         # server-sent events, or whole answers
    device_type: str = ""       # cuda or cpu ("" = the best there is)
    dtype: str = ""             # number format ("" = the machine's default)
    num_gpus: int = 1           # workers of the server
    prepare: bool = False       # only write the model, into NANOCHAT_BASE_DIR: this program calls itself so


def prepare(folder, config):
    """A tokenizer of single bytes and made-up tokens, and a random model whose special tokens are never the likeliest."""
    pieces = [bytes([i]) for i in range(256)]
    pieces += [f"word{i:05d}".encode() for i in range(config.vocab_size - 256 - len(SPECIAL_TOKENS))]
    tokenizer = Tokenizer(pieces, r"\w+|\W+")
    tokenizer.save(folder / "tokenizer")
    torch.manual_seed(0)
    model = GPT(config_from_depth(config.depth, tokenizer.vocab_size, 2 * (config.prompt_tokens + config.new_tokens)))
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight, std=0.02 if name == "lm_head.weight" else 0.05)
    with torch.no_grad():
        model.lm_head.weight[-len(SPECIAL_TOKENS):] = 0
    save_checkpoint("base", "bench", LoopState(), config, compute_init("cpu", "float32"), model, torch.optim.SGD(model.parameters()), tokenizer)


class Client:
    """One connection that is kept open."""

    def __init__(self, port):
        self.port, self.reader = port, None

    async def ask(self, body):
        """-> (seconds to the first event of the answer, tokens generated)."""
        if self.reader is None:
            self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        content = json.dumps(body).encode()
        began = time.perf_counter()
        self.writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
                          % (len(content), content))
        head = await self.reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), head
        length, first, received = re.search(rb"content-length: (\d+)", head), None, b""
        if length:
            received = await self.reader.readexactly(int(length[1]))
        while not length:
            size = int(await self.reader.readline(), 16)
            chunk = await self.reader.readexactly(size + 2)
            first = time.perf_counter() - began if first is None else first
            received += chunk[:-2]
            if not size:
                break
        return first, int(re.findall(rb'"completion_tokens":(\d+)', received)[-1])


async def run(port, clients, requests, config, first_prompt):
    """-> (tokens per second, [seconds to the first token])."""
    async def work(number, client):
        results = []
        for i in range(requests):
            seed = first_prompt + number * requests + i
            prompt = [(seed * 7919 + j * 104729) % (config.vocab_size - len(SPECIAL_TOKENS)) for j in range(config.prompt_tokens)]
            results.append(await client.ask({"prompt": prompt, "max_tokens": config.new_tokens, "temperature": 0, "stream": config.stream,
                                             **({"stream_options": {"include_usage": True}} if config.stream else {})}))
        return results

    began = time.perf_counter()
    results = [one for each in await asyncio.gather(*(work(number, client) for number, client in enumerate(clients))) for one in each]
    seconds = time.perf_counter() - began
    assert all(tokens == config.new_tokens for _, tokens in results), "an answer ended early"
    return sum(tokens for _, tokens in results) / seconds, [first for first, _ in results if first is not None]


def quantile(values, share):
    return sorted(values)[min(int(share * len(values)), len(values) - 1)] if values else None


async def measure(port, config):
    clients, rounds, idle, loaded, number = [Client(port) for _ in range(config.clients)], [], [], [], 0
    for round in range(config.rounds + 1):
        one, first_idle = await run(port, clients[:1], 6 * config.requests, config, number)
        number += 6 * config.requests
        many, first_loaded = await run(port, clients, config.requests, config, number)
        number += config.clients * config.requests
        if round:  # the first one warms up
            rounds.append({"one": round_to(one), "many": round_to(many), "ratio": round_to(many / one)})
            idle, loaded = idle + first_idle, loaded + first_loaded
            print(rounds[-1], flush=True)
    milliseconds = {f"{name}_{label}": values and round_to(1000 * quantile(values, share)) for name, values in (("idle", idle), ("loaded", loaded))
                    for label, share in (("p50", 0.5), ("p95", 0.95))}
    return {"rounds": rounds, "ratio": round_to(statistics.median(each["ratio"] for each in rounds)), "first_token_ms": milliseconds,
            "first_token_ratio": idle and round_to(milliseconds["loaded_p95"] / milliseconds["idle_p95"])}


def round_to(value):
    return float(f"{value:.3g}")


def main(config):
    if config.prepare:
        prepare(base_dir(), config)
        return
    with tempfile.TemporaryDirectory() as folder:
        command = ["env", f"NANOCHAT_BASE_DIR={folder}", sys.executable]
        subprocess.run([*command, __file__, *sys.argv[1:], "--prepare=True"], check=True)
        process = subprocess.Popen([*command, "-m", "scripts.chat_web", "--source=base", "--port=0", f"--device-type={config.device_type}",
                                    f"--dtype={config.dtype}", f"--num-gpus={config.num_gpus}", "--access-log=False"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        try:
            line = process.stdout.readline()
            results = asyncio.run(measure(int(re.search(r"http://127\.0\.0\.1:(\d+)", line)[1]), config))
        finally:
            process.terminate()
            process.wait(30)
    print(json.dumps({**asdict(config), "server": line.partition(":")[0], "torch": torch.__version__, **results}))


if __name__ == "__main__":
    main(parse(Config))
