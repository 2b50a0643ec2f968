"""Answers on their way: JSON, streams of events, and the client that may leave at any moment."""
import asyncio
from contextlib import aclosing

from starlette.responses import Response

from nanochat.serving.protocol import ApiError
from nanochat.serving.replies import dumps, event


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


def as_json(error):
    return Json(error.body, error.status_code, error.headers)
