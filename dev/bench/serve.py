"""Throughput and time to the first token of the server: one client beside many, in turns, on one server in a process of its own.

    python dev/bench/serve.py --clients=32

Every client streams an answer and asks again as soon as it has it. Ratios are taken within a round, one client right before many, so
that what else the machine does hurts both. The first token's ratio is p95 among many over p95 alone. The model is random and never
ends an answer early. The last line is JSON.
"""
import asyncio
import json
import random
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
from nanochat.common import base_dir  # noqa: E402
from nanochat.compute import compute_init  # noqa: E402
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
    new_tokens: int = 128       # of an answer on average: between half of it and half as much again
    seconds: float = 10.0       # of one measurement, after half of it for coming in
    rounds: int = 3             # the median round counts
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
    model = GPT(config_from_depth(config.depth, tokenizer.vocab_size, config.prompt_tokens + 2 * config.new_tokens))
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight, std=0.02 if name == "lm_head.weight" else 0.05)
    with torch.no_grad():
        model.lm_head.weight[-len(SPECIAL_TOKENS):] = 0
    save_checkpoint("base", "bench", LoopState(), config, compute_init("cpu", "float32"), model, torch.optim.SGD(model.parameters()), tokenizer)


class Client:
    """One connection, kept open for a run."""

    def __init__(self, port):
        self.port, self.reader = port, None

    async def ask(self, body):
        """-> the times at which it was asked, the first token came, and the last; and the number of tokens."""
        if self.reader is None:
            self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        content = json.dumps(body).encode()
        began = time.perf_counter()
        self.writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
                          % (len(content), content))
        head = await self.reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), head
        first, received = None, bytearray()
        while not received.endswith(b"\r\n0\r\n\r\n"):  # as much at once as there is: whoever measures must not take the cores from what is measured
            news = await self.reader.read(1 << 16)
            assert news, "the server has closed the connection"
            first = first or time.perf_counter()
            received += news
        return began, first, time.perf_counter(), int(re.findall(rb'"completion_tokens":(\d+)', received)[-1])


async def run(port, number, config, seed):
    """`number` clients for `config.seconds` -> (tokens per second, [seconds to the first token]). They begin at different moments and ask
    for answers of different lengths, as people do; the time in which they come in is not counted."""
    async def work(draw):
        client, answers = Client(port), []
        await asyncio.sleep(draw.random() * (begin - time.perf_counter()) if number > 1 else 0)
        while time.perf_counter() < end:
            prompt = [draw.randrange(config.vocab_size - len(SPECIAL_TOKENS)) for _ in range(config.prompt_tokens)]
            wanted = draw.randint(config.new_tokens // 2, 3 * config.new_tokens // 2)
            answers.append(await client.ask({"prompt": prompt, "max_tokens": wanted, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}))
            assert answers[-1][-1] == wanted, "an answer ended early"
        client.writer.close()
        return answers

    begin = time.perf_counter() + config.seconds / 2
    end = begin + config.seconds
    answers = [answer for each in await asyncio.gather(*(work(random.Random(f"{seed} {i}")) for i in range(number))) for answer in each]
    tokens = sum(count * max(0.0, min(last, end) - max(asked, begin)) / (last - asked) for asked, _, last, count in answers)
    return tokens / config.seconds, [first - asked for asked, first, _, _ in answers if begin <= asked < end]


def quantile(values, share):
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


async def measure(port, config):
    rounds, idle, loaded = [], [], []
    await run(port, 2, config, "warm")
    for seed in range(config.rounds):
        one, first_idle = await run(port, 1, config, seed)
        many, first_loaded = await run(port, config.clients, config, seed)
        idle, loaded = idle + first_idle, loaded + first_loaded
        rounds.append({"one": round_to(one), "many": round_to(many), "ratio": round_to(many / one),
                       "first_token_ratio": round_to(quantile(first_loaded, 0.95) / quantile(first_idle, 0.95))})
        print(rounds[-1], flush=True)
    milliseconds = {f"{name}_{label}": round_to(1000 * quantile(values, share)) for name, values in (("idle", idle), ("loaded", loaded))
                    for label, share in (("p50", 0.5), ("p95", 0.95))}
    return {"rounds": rounds, "ratio": round_to(statistics.median(each["ratio"] for each in rounds)), "first_token_ms": milliseconds,
            "first_token_ratio": round_to(statistics.median(each["first_token_ratio"] for each in rounds))}


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
