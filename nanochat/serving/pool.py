"""Which models there are, which are in memory, and which device serves a request: the least loaded one.

A model's name is a stage, `rl`; a stage and its folder, `rl/d8`; or with the step, `rl/d8/120`. Models are loaded when first asked
for, at most `max_models` per device; the one unused for longest goes. Everything runs on the event loop, loading in a thread.
"""
import asyncio
import json
from collections import OrderedDict
from contextlib import asynccontextmanager

from nanochat.checkpoint_manager import FOLDERS, find_model_tag, load_model, saved_steps, stage_dir
from nanochat.common import base_dir
from nanochat.serving.driver import Call, Driver, Scoring, Seat
from nanochat.serving.protocol import ApiError


class Pool:
    """Drivers, one per Compute in `computes`, and the seats that each has loaded."""

    def __init__(self, computes, metrics, source, model_tag=None, step=None, max_rows=64, max_queue=256, max_models=4, timeout_s=300.0):
        self.metrics, self.default = metrics, (source, model_tag, step)
        self.max_rows, self.max_queue, self.max_models, self.timeout_s = max_rows, max_queue, max_models, timeout_s
        self.drivers = [Driver(number, compute, metrics) for number, compute in enumerate(computes)]
        self.seats = {driver: OrderedDict() for driver in self.drivers}
        self.locks = {driver: asyncio.Lock() for driver in self.drivers}

    def preload(self):
        """Load the default model on every device before the first request, so that what is wrong with it is told at the start."""
        key = self.resolve("")
        for driver, seats in self.seats.items():
            seats[key] = self.read(driver, key)
        return key

    def start(self, loop):
        for driver in self.drivers:
            driver.loop = loop
            driver.start()

    def stop(self):
        """Ends the threads, at the latest after the step they are in."""
        for driver in self.drivers:
            driver.stop()
        for driver in self.drivers:
            driver.join(timeout=10)

    def is_alive(self):
        return all(driver.is_alive() for driver in self.drivers)

    # ------------------------------------------------------------ names

    def available(self):
        """What is on disk -> one dict per model, the default first."""
        default, found = self.resolve(""), []
        for stage, name in FOLDERS.items():
            parent = base_dir() / name
            for folder in sorted(parent.iterdir()) if parent.is_dir() else ():
                steps = saved_steps(folder)
                if steps:
                    found.append(self.describe(stage, folder, steps, default))
        return sorted((one for one in found if one), key=lambda one: not one["is_default"])

    def describe(self, stage, folder, steps, default):
        step = default[2] if (stage, folder.name) == default[:2] else steps[-1]
        path = folder / f"meta_{step:06d}.json"
        try:
            sizes = json.loads(path.read_text(encoding="utf-8"))["model_config"]
        except (OSError, ValueError, KeyError, TypeError):  # torn, or being replaced at this moment
            return None
        key = stage, folder.name, step
        return {"id": f"{stage}/{folder.name}", "object": "model", "created": int(path.stat().st_mtime), "owned_by": "nanochat", "stage": stage,
                "model_tag": folder.name, "step": step, "steps": steps, "sequence_len": sizes["sequence_len"], "n_layer": sizes["n_layer"],
                "n_head": sizes["n_head"], "vocab_size": sizes["vocab_size"], "is_default": key == default,
                "is_loaded": any(key in seats for seats in self.seats.values())}

    def resolve(self, name):
        """A model's name -> (stage, model_tag, step); the empty name is the default's. 404 where there is no such model."""
        stage, tag, step = self.default
        if name:
            parts = name.split("/")
            stage, tag, step = parts[0], None, None
            if stage == self.default[0] and len(parts) == 1:
                tag, step = self.default[1:]
            if len(parts) > 1:
                tag = parts[1]
            if len(parts) > 2:
                step = int(parts[2]) if parts[2].isascii() and parts[2].isdigit() and len(parts[2]) < 12 else -1
            if stage not in FOLDERS or len(parts) > 3 or (tag is not None and tag not in folders(stage)):
                raise unknown(name)
        try:
            tag = tag or find_model_tag(stage)
        except ValueError as error:
            raise unknown(name or stage, error) from error
        steps = saved_steps(stage_dir(stage, tag))
        if not steps or (step is not None and step not in steps):
            raise unknown(name or f"{stage}/{tag}", f"its steps are {steps or 'none'}")
        return stage, tag, steps[-1] if step is None else step

    # ------------------------------------------------------------ seats

    @asynccontextmanager
    async def seat(self, name, load=1):
        """A (driver, seat) for a request of `load` choices or prompts, held until the block ends. 429 where the queue is full."""
        driver = min(self.drivers, key=lambda one: one.load)
        limit = self.max_rows + self.max_queue
        if load > limit:
            raise ApiError(400, f"this request has {load} choices and prompts, and the server takes {limit} at once: cut it into smaller ones")
        if driver.load + load > limit:
            raise self.busy(f"{driver.load} choices are waiting or in work, and {limit} are the most: try again later")
        key = self.resolve(name)
        driver.load += load
        seat = None
        try:
            seat = await self.load(driver, key)
            yield driver, seat
        finally:
            driver.load -= load
            if seat is not None:
                seat.users -= 1

    async def load(self, driver, key):
        """The seat of a model on a driver's device, with one user more."""
        seats = self.seats[driver]
        async with self.locks[driver]:
            if key not in seats:
                while len(seats) >= self.max_models:
                    unused = next((other for other, seat in seats.items() if not seat.users), None)
                    if unused is None:
                        raise self.busy(f"all {self.max_models} models in memory are in use, so {'/'.join(map(str, key))} must wait: try again later")
                    del seats[unused]
                try:
                    seats[key] = await asyncio.shield(asyncio.get_running_loop().run_in_executor(None, self.read, driver, key))
                except ValueError as error:
                    raise ApiError(404, str(error), code="model_not_found", param="model") from error
            seats.move_to_end(key)
            seats[key].users += 1
            return seats[key]

    def read(self, driver, key):
        stage, tag, step = key
        steps = saved_steps(stage_dir(stage, tag))
        # the newest may be torn: then load_model falls back to the one before
        model, tokenizer, meta = load_model(stage, driver.compute, "eval", tag, None if steps and step == steps[-1] else step)
        return Seat(f"{stage}/{tag}", model.requires_grad_(False), tokenizer, meta, self.max_rows)

    def busy(self, message):
        wait = min(max(round(self.metrics.mean("nanochat_request_seconds")), 1), 60)
        return ApiError(429, message, type="rate_limit_error", code="queue_full", headers={"Retry-After": str(wait)})

    # ------------------------------------------------------------ work

    async def score(self, driver, seat, items):
        """Items -> their Scores; a cancelled call is taken back."""
        return await self.result(driver, Scoring(seat, items, asyncio.get_running_loop().create_future()))

    async def call(self, driver, seat, function):
        """`function(seat)`'s value, computed in the driver's thread between two steps."""
        return await self.result(driver, Call(seat, function, asyncio.get_running_loop().create_future()))

    async def result(self, driver, job):
        driver.submit(job)
        try:
            async with asyncio.timeout(self.timeout_s):
                return await job.result
        except TimeoutError:
            raise self.busy(f"this took more than {self.timeout_s:.0f} s: try again later, or ask for less") from None
        finally:
            driver.cancel(job)

    def gauges(self):
        gauges = {}
        for driver in self.drivers:
            labels = (("worker", driver.number),)
            gauges["nanochat_rows", labels] = driver.rows
            gauges["nanochat_queue", labels] = driver.waiting + driver.inbox.qsize()
            gauges["nanochat_models_loaded", labels] = len(self.seats[driver])
        return gauges


def folders(stage):
    parent = base_dir() / FOLDERS[stage]
    return [path.name for path in parent.iterdir()] if parent.is_dir() else []


def unknown(name, reason="GET /v1/models lists those there are"):
    return ApiError(404, f"there is no model {name!r} ({reason})", code="model_not_found", param="model")
