"""One HTML file, served under a policy that runs only what stands in it: each <script> and <style> is named by its hash."""
import base64
import hashlib
import re

from nanochat.serving.protocol import ApiError

ELEMENT = re.compile(rb"<(script|style)\b[^>]*>(.*?)</\1\s*>", re.DOTALL | re.IGNORECASE)


class Page:
    """The file at `path` (None = there is no page). It is read again when it changes."""

    def __init__(self, path):
        self.path, self.stamp, self.content = path, None, None

    def read(self):
        """-> (HTML bytes, Content-Security-Policy)."""
        try:
            stamp = self.path.stat().st_mtime_ns if self.path else None
            if stamp is None:
                raise FileNotFoundError
            if stamp != self.stamp:
                html = self.path.read_bytes()
                self.content, self.stamp = (html, policy(html)), stamp
        except FileNotFoundError:
            raise ApiError(404, "this server has no page; its API is under /v1, described by /openapi.json", code="no_page") from None
        return self.content


def policy(html):
    """Only the file's own scripts and styles, connections home, pictures made on the spot; no frames, forms, plugins."""
    hashes = {"script": [], "style": []}
    for kind, content in ELEMENT.findall(html):
        # a parser reads line ends as \n before it hashes
        digest = hashlib.sha256(content.replace(b"\r\n", b"\n")).digest()
        hashes[kind.decode().lower()].append(f"'sha256-{base64.b64encode(digest).decode()}'")
    allowed = {kind: " ".join(found) or "'none'" for kind, found in hashes.items()}
    return (f"default-src 'none'; script-src {allowed['script']}; style-src {allowed['style']}; connect-src 'self'; img-src 'self' data: blob:; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
