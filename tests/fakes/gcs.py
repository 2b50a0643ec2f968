"""gcp-storage-emulator on loopback, behind a proxy that injects failures: `with FakeGCS() as gcs:`, then STORAGE_EMULATOR_HOST=gcs.url.

`gcs.faults` is a list of (method, pattern of the path, kind), each used once: "500", "429", "403", "drop" (the socket closes and nothing was done),
"drop-after" (it was done, the answer is lost), "cut" (an upload's body or a download's answer loses its second half), "flip" (one bit of the
content differs), "hang-up" (only half of the announced answer comes). `gcs.requests` lists (method, path and query).
"""
import logging
import re
import socket
import threading
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from gcp_storage_emulator.server import create_server


class FakeGCS:
    def __init__(self, bucket="bucket"):
        self.bucket, self.faults, self.requests, self.lock = bucket, [], [], threading.Lock()
        self.on_request = lambda method, path: None

    def __enter__(self):
        logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
        logging.getLogger("api").setLevel(logging.CRITICAL)
        self.emulator = create_server("127.0.0.1", 0, in_memory=True, default_bucket=self.bucket)
        self.emulator.start()
        self.backend = self.emulator._api._httpd.server_address[1]
        self.proxy = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundProxy", (Proxy,), {"gcs": self}))
        self.proxy.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.proxy.server_address[1]}"
        threading.Thread(target=self.proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.proxy.shutdown()
        self.proxy.server_close()
        self.emulator.stop()

    def fault(self, method, path):
        with self.lock:
            for place, (wanted, pattern, kind) in enumerate(self.faults):
                if wanted == method and re.search(pattern, path):
                    del self.faults[place]
                    return kind
        return ""

    def uploads(self):
        """Requests that begin the upload of an object."""
        return [path for method, path in self.requests if method == "POST" and "/upload/" in path]

    def change(self, name, content):
        """Replace an object's content behind everyone's back."""
        from google.auth.credentials import AnonymousCredentials
        from google.cloud import storage
        client = storage.Client(project="x", credentials=AnonymousCredentials(), client_options={"api_endpoint": f"http://127.0.0.1:{self.backend}"})
        client.bucket(self.bucket).blob(name).upload_from_string(content)


class Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    gcs = None

    def do_GET(self):
        gcs = self.gcs
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        gcs.requests.append((self.command, self.path))
        gcs.on_request(self.command, self.path)
        kind = gcs.fault(self.command, self.path)
        if kind == "drop":
            return self.hang_up()
        if kind.isdigit():
            return self.answer(int(kind), b'{"error": {"message": "injected"}}', {"Content-Type": "application/json"})
        if self.command in ("POST", "PUT") and body:
            body = damaged(body, kind)
        with gcs.lock:                                   # the emulator serves one at a time
            connection = HTTPConnection("127.0.0.1", gcs.backend, timeout=120)
            headers = {name: value for name, value in self.headers.items() if name.lower() not in ("content-length", "connection", "transfer-encoding")}
            connection.request(self.command, self.path, body=body, headers={**headers, "Host": self.headers["Host"]})
            response = connection.getresponse()
            content, status = response.read(), response.status
            headers = {name: value for name, value in response.getheaders() if name.lower() not in ("content-length", "connection", "date", "server")}
            connection.close()
        if kind == "drop-after":
            return self.hang_up()
        if self.command == "GET":
            content = damaged(content, kind)
        self.answer(status, content, headers, half=kind == "hang-up")

    do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = do_GET

    def answer(self, status, content, headers, half=False):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:len(content) // 2] if half else content)
        if half:
            self.hang_up()

    def hang_up(self):
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *arguments):
        pass


def damaged(content, kind):
    """The content as the fault leaves it; a multipart upload keeps its frame, so that it is the file itself that suffers."""
    if kind not in ("cut", "flip") or len(content) < 4:
        return content
    frame = re.search(rb"\r\n--[^\r\n]+--\r?\n?$", content)
    inner, tail = (content[:frame.start()], frame[0]) if frame else (content, b"")
    if kind == "cut":
        start = inner.rfind(b"\r\n\r\n") + 4 if frame else 0
        return inner[:start + (len(inner) - start) // 2] + tail
    return inner[:-1] + bytes([inner[-1] ^ 1]) + tail
