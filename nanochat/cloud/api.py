"""JSON over HTTPS for clouds that bill by the hour: what may be repeated is repeated, what may have happened is told from what has not.

Three ends of a call: an answer; Refused, when the server said no and did nothing; NoAnswer, when nobody knows. A request that rents something is
sent with once=True: after NoAnswer the caller looks at the list before asking again.
"""
import email.utils
import ipaddress
import random
import time
from urllib.parse import urlsplit

import requests
from urllib3.exceptions import NameResolutionError, NewConnectionError

CONNECT_SECONDS, ANSWER_SECONDS, LONGEST_PAUSE = 10, 30, 120


class Refused(Exception):
    """The server's definite no: `.status`, `.code` (what to branch on) and its message."""

    def __init__(self, status, code, message):
        super().__init__(f"{message} ({code or 'no code'}, HTTP {status})")
        self.status, self.code = status, code


class NoAnswer(Exception):
    """No usable answer: the request may or may not have been carried out."""


class KeyAuth(requests.auth.AuthBase):
    """The key as a bearer token. As an auth object it cannot be replaced by a .netrc entry."""

    def __init__(self, key):
        self.key = key

    def __call__(self, request):
        if self.key:
            request.headers["Authorization"] = f"Bearer {self.key}"
        return request


class Api:
    """`Api(url, key, signals).call("GET", "/path")` -> the decoded JSON. Calls keep `interval` seconds between each other."""

    def __init__(self, url, key, signals, interval=0.0, patience=120):
        self.url, self.key, self.signals, self.interval, self.patience = checked_url(url), key, signals, interval, patience
        self.last_call = -1e9

    def call(self, method, path, body=None, once=False):
        """Repeat what failed for a passing reason for `patience` seconds; with once=True only what was certainly not carried out."""
        began, attempt = time.monotonic(), 0
        while True:
            self.signals.sleep(max(0.0, self.last_call + self.interval * self.signals.scale - time.monotonic()) / self.signals.scale)
            problem, pause, harmless = None, None, False
            try:
                response = requests.request(method, self.url + path, json=body, auth=KeyAuth(self.key), timeout=(CONNECT_SECONDS, ANSWER_SECONDS),
                                            allow_redirects=False, headers={"Connection": "close"})
            except requests.RequestException as error:
                problem, harmless = self.hide(f"{type(error).__name__}: {error}"), was_never_sent(error)
            else:
                answer = decode(response)
                code, message = explain(answer, response)
                if response.status_code == 429:
                    problem, pause, harmless = f"too many requests: {message}", retry_after(response), True
                elif response.status_code >= 500 or response.status_code == 408 or code == "global/internal-error":
                    problem = f"HTTP {response.status_code}: {message}"
                elif not 200 <= response.status_code < 300:
                    raise Refused(response.status_code, code, self.hide(message))
                elif answer is None:
                    problem = "the answer is not JSON"
                else:
                    return answer
            finally:
                self.last_call = time.monotonic()
            attempt += 1
            if once and not harmless or time.monotonic() - began > self.patience * self.signals.scale:
                raise NoAnswer(f"{method} {path}: {self.hide(problem)} (attempt {attempt})")
            if pause is None:
                pause = min(LONGEST_PAUSE, 2 ** min(attempt, 5)) * random.uniform(0.5, 1.0)
            self.signals.sleep(pause)

    def hide(self, text):
        """A message may quote the request: the key is not to be seen in it."""
        return text.replace(self.key, "***") if self.key else text


def checked_url(url):
    parts = urlsplit(url)
    try:
        local = parts.hostname == "localhost" or ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:
        local = False
    if not parts.hostname or parts.scheme != "https" and not (parts.scheme == "http" and local):
        raise ValueError(f"api_url={url!r} would carry the API key in the open: it must begin with https:// (http:// only for this machine itself)")
    return url.rstrip("/")


def was_never_sent(error):
    """True where no connection came about, so that the server cannot have acted."""
    reason = getattr(error.args[0], "reason", None) if error.args else None
    return isinstance(error, requests.ConnectTimeout) or isinstance(reason, (NewConnectionError, NameResolutionError))


def decode(response):
    try:
        return response.json()
    except ValueError:
        return None


def explain(answer, response):
    """(code, message) out of the shapes errors come in: {"error": {"code", "message"}}, {"message"}, {"detail"}, plain text."""
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    if isinstance(error, dict):
        message = error.get("message") or error.get("detail") or error.get("error") or response.reason or ""
        hint = f" ({error['suggestion']})" if error.get("suggestion") else ""
        return str(error.get("code") or ""), f"{message}{hint}"
    return "", str(error or response.text or response.reason or "")[:300]


def retry_after(response):
    """The Retry-After header in seconds, whether a number or a date; None without one that makes sense."""
    text = response.headers.get("Retry-After", "").strip()
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        except (TypeError, ValueError):
            return None
    return min(max(seconds, 0.0), LONGEST_PAUSE) if seconds == seconds else None
