"""The thread that drives one device: rows of all clients decode in one batch per model, prompts are scored between two steps.

Everything here but `submit`, `cancel` and `stop` runs in the thread; what it finds out reaches the event loop once per step.
A job never waits for another client: it joins the rows in flight at the next step, and a cancelled one leaves them there. A stream's first text
goes out at once and the rest every STREAM_SECONDS, in which a small model says many tokens: each on its own would cost the server, and whoever
reads it, more than the token did.
"""
import asyncio
import math
import queue
import threading
import time
import traceback
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from nanochat.engine import Engine, Request, message_parts
from nanochat.serving import scoring
from nanochat.serving.text import Answer


STREAM_SECONDS = 0.04  # more than 25 pieces a second are not seen


class Seat:
    """A model that is loaded, and its engine. `users` is the number of requests that need it (the event loop's business)."""

    def __init__(self, name, model, tokenizer, meta, max_rows):
        self.name, self.training_model, self.tokenizer, self.meta, self.max_rows, self.users = name, model, tokenizer, meta, max_rows, 0
        self.reset()

    def reset(self):
        """A new engine, without rows: at the start, and after a failure inside the old one."""
        self.engine = Engine(self.training_model, self.tokenizer, self.max_rows)
        self.answers = {}  # row id -> (job, index of the choice, Answer)

    @property
    def model(self):
        """With weights in the compute dtype."""
        return self.engine.model


class Piece(NamedTuple):
    """What one choice of a job has got since its last piece."""
    index: int
    text: str
    tokens: list[int]   # those whose text has been shown
    offsets: list[int]  # characters of the answer before each of them
    finish: str | None  # stop, length or cancelled
    generated: int = 0  # at the finish: tokens generated, shown or not
    parts: list | None = None  # at the finish: the message's parts where a tool was called


@dataclass(eq=False)
class Generation:
    """Requests whose samples are the choices of one answer. Their Pieces arrive in `pieces`; an Exception there ends the job."""
    seat: Seat
    requests: list[Request]
    stops: list[str]
    streams: bool  # pieces at every step, or only whole choices
    text_stream: object  # tokenizer -> TextStream: what of the tokens is text
    pieces: asyncio.Queue = field(default_factory=asyncio.Queue)
    held: list = field(default_factory=list)  # pieces that wait for the stream's turn
    turn: float = -math.inf  # by the event loop's clock
    timer: asyncio.TimerHandle | None = None
    born: float = field(default_factory=time.perf_counter)
    ids: list[int] = field(default_factory=list)
    has_begun: bool = False

    def release(self, loop):
        """On the event loop: hand out what is held."""
        if self.timer is not None:
            self.timer.cancel()
        self.timer, self.turn = None, loop.time() + STREAM_SECONDS
        for piece in self.held:
            self.pieces.put_nowait(piece)
        self.held.clear()


@dataclass(eq=False)
class Scoring:
    """Items to be scored by a seat's model; `result` becomes their Scores in order."""
    seat: Seat
    items: list[scoring.Item]
    result: asyncio.Future
    scores: dict = field(default_factory=dict)


@dataclass(eq=False)
class Call:
    """`function(seat)`, between two steps. For short work only: rows wait for it."""
    seat: Seat
    function: object
    result: asyncio.Future


class Driver(threading.Thread):
    """One per device. `rows` and `waiting` count choices; `load` what the event loop has given it and not got back."""

    def __init__(self, number, compute, metrics):
        super().__init__(name=f"driver-{number}", daemon=True)
        self.number, self.compute, self.metrics = number, compute, metrics
        self.inbox, self.loop = queue.SimpleQueue(), None
        self.active, self.scorings, self.calls, self.outbox = [], [], [], []
        self.rows = self.waiting = self.load = 0
        self.is_stopping = False

    # ------------------------------------------------------------ called from the event loop

    def submit(self, job):
        self.inbox.put((self.accept, job))

    def cancel(self, job):
        self.inbox.put((self.drop, job))

    def stop(self):
        self.is_stopping = True
        self.inbox.put((lambda job: None, None))

    # ------------------------------------------------------------ the thread

    def run(self):
        if self.compute.device.type == "cuda":
            torch.cuda.set_device(self.compute.device)
        while not self.is_stopping:
            self.read_inbox(wait=not (self.active or self.scorings or self.calls))
            for seat in list(self.active):
                self.guarded(seat, self.step)
            if self.scorings:
                self.guarded(self.scorings[0].seat, self.score_some)
            if self.calls:
                self.call(self.calls.pop(0))
            self.send()

    def read_inbox(self, wait):
        """Do what was asked for meanwhile; with `wait` at least one thing."""
        while True:
            try:
                action, job = self.inbox.get(block=wait)
            except queue.Empty:
                return
            if job is None:
                return
            self.guarded(job.seat, lambda seat: action(job), job)
            wait = False

    def guarded(self, seat, action, job=None):
        """A failure in one model's engine ends that model's jobs, and nothing else."""
        try:
            action(seat)
        except Exception as error:  # whatever a device can throw
            traceback.print_exc()
            self.metrics.count("nanochat_engine_errors_total")
            jobs = {other for other, _, _ in seat.answers.values()} | {other for other in self.scorings if other.seat is seat}
            jobs |= {job} if job is not None else set()
            seat.reset()
            self.scorings = [job for job in self.scorings if job.seat is not seat]
            self.active = [other for other in self.active if other is not seat]
            self.outbox += [(other, error) for other in jobs]
            self.count()

    def send(self):
        """The step's news to the event loop, in one go."""
        if self.outbox:
            news, self.outbox = self.outbox, []
            try:
                self.loop.call_soon_threadsafe(deliver, news)
            except RuntimeError:  # the loop has been closed: the program is ending
                self.is_stopping = True

    # ------------------------------------------------------------ jobs

    def accept(self, job):
        if isinstance(job, Scoring):
            self.scorings.append(job)
        elif isinstance(job, Call):
            self.calls.append(job)
        else:
            seat = job.seat
            index = 0
            for request in job.requests:
                for id in seat.engine.add(request):
                    job.ids.append(id)
                    seat.answers[id] = job, index, Answer(job.text_stream(seat.tokenizer), job.stops)
                    index += 1
            if seat not in self.active:
                self.active.append(seat)
        self.count()

    def drop(self, job):
        """Cancel what is left of a job; its open choices end with what they have."""
        if isinstance(job, Scoring):
            self.scorings = [other for other in self.scorings if other is not job]
        elif isinstance(job, Call):
            self.calls = [other for other in self.calls if other is not job]
        else:
            for id in job.ids:
                if id in job.seat.answers and job.seat.answers[id][0] is job:
                    job.seat.engine.cancel(id)
                    self.end(job.seat, id, "cancelled")
            if job.seat in self.active and not job.seat.answers:
                self.active.remove(job.seat)
        self.count()

    def call(self, job):
        try:
            self.outbox.append((job, job.function(job.seat)))
        except Exception as error:  # it belongs to whoever asked
            self.outbox.append((job, error))

    def step(self, seat):
        """One token more for every row of a seat. First tokens go out before the step that they would wait for, and on a CPU, which reads two prompts no
        faster together, before the next prompt."""
        while self.waiting:
            with torch.inference_mode():
                events = seat.engine.admit(1 if seat.model.device.type == "cpu" else None)
            if not events:
                break
            self.take(seat, events)
            self.count()
            self.send()
        self.take(seat, seat.engine.step())
        if not seat.answers:
            self.active.remove(seat)
        self.count()

    def take(self, seat, events):
        """A step's events -> pieces for the jobs they belong to."""
        now = time.perf_counter()
        for event in events:
            if event.id not in seat.answers:  # a stop string has ended it in this very step
                continue
            job, index, answer = seat.answers[event.id]
            if not job.has_begun:
                job.has_begun = True
                self.metrics.observe("nanochat_first_token_seconds", now - job.born)
            completion = event.completion
            text = answer.add(event.token, is_end=completion is not None and completion.finish_reason == "stop")
            if completion is not None:
                self.end(seat, event.id, completion.finish_reason, text)
            elif answer.is_cut:
                seat.engine.cancel(event.id)
                self.end(seat, event.id, "stop", text)
            elif job.streams and text:
                self.outbox.append((job, Piece(index, text, *answer.release(finished=False), None)))

    def end(self, seat, id, reason, text=""):
        job, index, answer = seat.answers.pop(id)
        if not answer.is_cut:
            text += answer.finish()
        if answer.is_cut:
            reason = "stop"
        if not job.streams:
            text = answer.whole
        parts = None if answer.is_cut else message_parts(seat.tokenizer, answer.tokens)
        if parts is not None and all(part["type"] == "text" for part in parts):
            parts = None
        self.metrics.count("nanochat_generated_tokens_total", len(answer.tokens))
        self.outbox.append((job, Piece(index, text, *answer.release(finished=True), reason, len(answer.tokens), parts)))

    def score_some(self, seat):
        """One pass over prompts that wait, of one model, whoever asked for them."""
        jobs = [job for job in self.scorings if job.seat is seat]
        open_items = [(job, place) for job in jobs for place in range(len(job.items)) if place not in job.scores]
        first = next(batch for batch in scoring.batches([job.items[place] for job, place in open_items], seat.model.device.type) if 0 in batch)
        chosen = [open_items[i] for i in first]  # the batch with the oldest one in it
        for (job, place), score in zip(chosen, scoring.score(seat.model, [job.items[place] for job, place in chosen], seat.tokenizer.vocab_size)):
            job.scores[place] = score
            if len(job.scores) == len(job.items):
                self.scorings.remove(job)
                self.outbox.append((job, [job.scores[i] for i in range(len(job.items))]))
        self.count()

    def count(self):
        started = sum(bool(answer.tokens) for seat in self.active for _, _, answer in seat.answers.values())
        choices = sum(len(seat.answers) for seat in self.active)
        self.rows, self.waiting = started, choices - started + sum(len(job.items) - len(job.scores) for job in self.scorings)


def deliver(news):
    """On the event loop: each piece of news to the job it belongs to. Pieces wait for their stream's turn, unless there is a last one among them."""
    loop, streams = asyncio.get_running_loop(), {}
    for job, item in news:
        if isinstance(job, Generation):
            job.held.append(item)
            streams[job] = streams.get(job, False) or isinstance(item, Exception) or item.finish is not None
        elif not job.result.done():
            if isinstance(item, Exception):
                job.result.set_exception(item)
            else:
                job.result.set_result(item)
    for job, has_last in streams.items():
        if has_last or loop.time() >= job.turn:
            job.release(loop)
        elif job.timer is None:
            job.timer = loop.call_at(job.turn, job.release, loop)
