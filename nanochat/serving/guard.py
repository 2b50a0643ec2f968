"""What stands before every route: who may ask, how much may be sent, what the browser may do with the answer, what is logged.

Plain ASGI, so that a client that leaves is noticed at once. The log has method, route, status and time: no body, no query, no path
that a client made up.
"""
import asyncio
import hashlib
import hmac
import ipaddress
import json
import time

from nanochat.serving.protocol import ApiError

OPEN_PATHS = ("/", "/health", "/metrics", "/favicon.ico")  # without the key: what a browser, a load balancer and a monitor ask
HEADERS = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"), (b"cache-control", b"no-store"),
           (b"cross-origin-resource-policy", b"same-origin")]
BODY_SECONDS = 30.0     # for the whole body to arrive
DRAIN_BYTES = 16 << 20  # of a refused body that are read and forgotten
DRAIN_SECONDS = 5.0


class Guard:
    """`api_key` "" = none is asked for; then only requests addressed to this machine by a loopback name are answered, so that no
    foreign page but those of `origins` can reach the server, not even under a name of its own (DNS rebinding)."""

    def __init__(self, app, metrics, api_key="", max_body=1 << 20, log=None, origins=()):
        self.app, self.metrics, self.max_body, self.log, self.origins = app, metrics, max_body, log, origins
        self.key_digest = hashlib.sha256(api_key.encode()).digest() if api_key else None

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status, size, is_complete = time.perf_counter(), 0, 0, False

        async def limited_receive():
            nonlocal size, is_complete
            if is_complete:  # what comes now is that the client has left
                return await receive()
            try:
                async with asyncio.timeout(began + BODY_SECONDS - time.perf_counter()):
                    message = await receive()
            except TimeoutError:
                raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:.0f} s", code="body_too_slow") from None
            size += len(message.get("body", b""))
            is_complete = not message.get("more_body", False)
            if size > self.max_body:
                raise too_large(self.max_body)
            return message

        async def drain():
            """A client that is still sending when the connection closes may never see the reply: so read on for a while."""
            nonlocal is_complete
            left = DRAIN_BYTES
            try:
                async with asyncio.timeout(DRAIN_SECONDS):
                    while not is_complete and left > 0:
                        message = await receive()
                        left -= len(message.get("body", b""))
                        is_complete = not message.get("more_body", False)
            except TimeoutError:
                pass

        async def watched_send(message):
            nonlocal status
            if message["type"] == "http.response.start":
                if not is_complete:
                    await drain()
                closing = [] if is_complete else [(b"connection", b"close")]
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), *HEADERS, *closing]}
            await send(message)

        try:
            self.check(scope)
            await self.app(scope, limited_receive, watched_send)
        except ApiError as error:
            if not status:
                await refuse(watched_send, error)
        finally:
            route = getattr(scope.get("route"), "path", "(none)")
            seconds = time.perf_counter() - began
            self.metrics.count("nanochat_requests_total", endpoint=route, status=status)
            self.metrics.observe("nanochat_request_seconds", seconds, endpoint=route)
            if self.log is not None:
                method = scope["method"] if scope["method"] in ("GET", "POST", "HEAD", "OPTIONS") else "other"
                self.log(f"{method} {route} {status} {seconds * 1000:.0f} ms")

    def check(self, scope):
        """ApiError for a request that is not to be read at all."""
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        if self.key_digest is None:
            if not is_loopback(host[:-len(port)] if (port := host[host.rfind(":"):])[1:].isdigit() else host):
                raise ApiError(403, "without an API key this server answers only under 127.0.0.1 and localhost", code="wrong_host")
            origin = headers.get(b"origin", b"").decode("latin-1")
            if origin and origin.partition("://")[2] != host and origin not in self.origins:
                raise ApiError(403, "requests from other sites' pages are not answered", code="cross_origin")
        elif scope["path"] not in OPEN_PATHS:
            given = headers.get(b"authorization", b"")
            token = given[7:] if given[:7].lower() == b"bearer " else b""
            if not hmac.compare_digest(hashlib.sha256(token).digest(), self.key_digest):
                raise ApiError(401, "the API key is missing or wrong: send it as `Authorization: Bearer KEY`", type="authentication_error",
                               code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or len(length) > 18 or int(length) > self.max_body:
            raise too_large(self.max_body)


def is_loopback(host):
    """Whether an address or name, in brackets or not, can only mean this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False


def too_large(max_body):
    return ApiError(413, f"the body is larger than {max_body} bytes", code="body_too_large")


async def refuse(send, error):
    body = json.dumps(error.body).encode()
    headers = [(name.lower().encode(), value.encode()) for name, value in (error.headers or {}).items()]
    headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": error.status_code, "headers": headers})
    await send({"type": "http.response.body", "body": body})
