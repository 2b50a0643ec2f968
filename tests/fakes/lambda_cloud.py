"""A loopback server that speaks Lambda's Cloud API 1.8.3, with an account, a life for each instance, and failures on order.

`with FakeLambda(host="127.0.0.1") as cloud:` serves at cloud.url. An instance goes unknown (404) -> booting without an address -> active ->
terminating -> gone, one step per look. `cloud.faults["launch"] = [...]` makes the next calls of a kind fail: 401, 429, 500, 503, "capacity",
"drop" (the socket closes and nothing was done), "drop-after" (it was done, the answer is lost), "garbage" (200, but no JSON).
"""
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


class FakeCloud:
    """What the two fakes share: a server, a log of calls, faults. `key` is what the bearer token must be."""
    routes = ()  # (method, pattern, name): `do_<name>(*groups, body)` gives (status, answer)

    def __init__(self, key="secret-api-key"):
        self.key, self.faults, self.calls, self.launched, self.terminated = key, {}, [], [], []
        self.lock = threading.RLock()
        self.on_call = lambda name: None  # tests hook in here

    def __enter__(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"cloud": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()

    def names(self):
        return [name for name, _ in self.calls]

    def bodies(self, name):
        return [body for called, body in self.calls if called == name]

    @property
    def left_running(self):
        """Everything that was rented and is not terminated: what a user would go on paying for."""
        return sorted(set(self.launched) - set(self.terminated))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    cloud = None

    def do_GET(self):
        cloud, path = self.cloud, urlsplit(self.path).path
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = json.loads(content) if content else None
        for method, pattern, name in cloud.routes:
            match = re.fullmatch(pattern, path)
            if match and method == self.command:
                break
        else:
            return self.reply(404, cloud.error("global/object-does-not-exist", "no such path"))
        with cloud.lock:
            cloud.calls.append((name, body))
            fault = cloud.faults[name].pop(0) if cloud.faults.get(name) else None
        cloud.on_call(name)
        if self.headers.get("Authorization") != f"Bearer {cloud.key}" and name not in cloud.open_to_all:
            return self.reply(401, cloud.error("global/invalid-api-key", "API key was invalid, expired, or deleted."))
        if fault == "drop":
            return self.hang_up()
        if fault == "garbage":
            return self.reply(200, None, b"<html>a proxy's page</html>")
        if isinstance(fault, int):
            code = {401: "global/invalid-api-key", 403: "global/account-inactive", 409: "global/internal-error"}.get(fault, "")
            return self.reply(fault, cloud.error(code, f"HTTP {fault} on order, key {cloud.key}"), headers={"Retry-After": "1"} if fault == 429 else {})
        if fault == "capacity":
            return self.reply(*cloud.capacity_error)
        with cloud.lock:
            status, answer = getattr(cloud, f"do_{name}")(*match.groups(), **({"body": body} if self.command == "POST" else {}))
        if fault == "drop-after":
            return self.hang_up()
        return self.reply(status, answer)

    do_POST = do_GET

    def log_message(self, *arguments):
        pass

    def hang_up(self):
        self.close_connection = True

    def reply(self, status, answer, content=None, headers=None):
        content = json.dumps(answer).encode() if content is None else content
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


def instance_type(name, cents, gpus, regions):
    return {"instance_type": {"name": name, "description": f"{gpus}x GPU", "gpu_description": "H100 (80 GB SXM5)", "price_cents_per_hour": cents,
                              "specs": {"vcpus": 26 * gpus, "memory_gib": 225 * gpus, "storage_gib": 2816, "gpus": gpus}},
            "regions_with_capacity_available": [{"name": region, "description": region} for region in regions]}


class FakeLambda(FakeCloud):
    open_to_all = ()
    routes = (("GET", r"/api/v1/instance-types", "types"), ("POST", r"/api/v1/instance-operations/launch", "launch"), ("GET", r"/api/v1/instances", "list"),
              ("GET", r"/api/v1/instances/([^/]+)", "get"), ("POST", r"/api/v1/instance-operations/terminate", "terminate"), ("GET", r"/api/v1/ssh-keys", "keys"))

    def __init__(self, host="127.0.0.1", unknown=1, booting=1, after=None, **options):
        super().__init__(**options)
        self.host, self.unknown, self.booting, self.after = host, unknown, booting, after  # after: status that an active instance takes on
        self.types = {"gpu_1x_a10": instance_type("gpu_1x_a10", 75, 1, ["us-west-1", "us-east-1"]),
                      "gpu_8x_h100_sxm5": instance_type("gpu_8x_h100_sxm5", 2392, 8, ["us-south-1"]),
                      "gpu_8x_a100": instance_type("gpu_8x_a100", 1032, 8, [])}
        self.ssh_keys = [{"id": "k1", "name": "laptop", "public_key": "ssh-ed25519 AAAA"}]
        self.all = {}  # id -> the instance, with its age in looks

    capacity_error = (400, {"error": {"code": "instance-operations/launch/insufficient-capacity", "message": "Not enough capacity to fulfill launch request.",
                                      "suggestion": "Choose an instance type with more availability."}})

    @staticmethod
    def error(code, message):
        return {"error": {"code": code, "message": message}}

    def do_types(self):
        return 200, {"data": self.types}

    def do_keys(self):
        return 200, {"data": self.ssh_keys}

    def do_launch(self, body):
        allowed = {"region_name", "instance_type_name", "ssh_key_names", "file_system_names", "hostname", "name", "image", "user_data", "tags"}
        if set(body) - allowed or not isinstance(body.get("ssh_key_names"), list) or len(body["ssh_key_names"]) != 1 or len(body.get("name", "")) > 64:
            return 400, self.error("global/invalid-parameters", f"Invalid request body: {sorted(set(body) - allowed)}")
        regions = [region["name"] for region in self.types[body["instance_type_name"]]["regions_with_capacity_available"]]
        if body["region_name"] not in regions:
            return self.capacity_error
        id = f"{len(self.all):032x}"
        self.launched.append(id)
        self.all[id] = {"id": id, "name": body.get("name"), "status": "booting", "looks": 0, "ssh_key_names": body["ssh_key_names"], "file_system_names": [],
                        "region": {"name": body["region_name"], "description": ""}, "instance_type": self.types[body["instance_type_name"]]["instance_type"],
                        "actions": {}}
        return 200, {"data": {"instance_ids": [id]}}

    def age(self):
        """One look older, each of them."""
        for instance in self.all.values():
            instance["looks"] += 1
            if instance["status"] == "terminating":
                instance["status"] = "gone" if instance["looks"] > 1 else "terminating"
            elif instance["status"] == "booting" and instance["looks"] > self.unknown + self.booting:
                instance["status"], instance["ip"] = "active", self.host
            elif instance["status"] == "active" and self.after:
                instance["status"] = self.after

    def visible(self):
        return [{key: value for key, value in instance.items() if key != "looks"} for instance in self.all.values()
                if instance["looks"] > self.unknown and instance["status"] != "gone"]

    def do_list(self):
        self.age()
        return 200, {"data": self.visible()}

    def do_get(self, id):
        self.age()
        found = [instance for instance in self.visible() if instance["id"] == id]
        return (200, {"data": found[0]}) if found else (404, self.error("global/object-does-not-exist", "Specified instance does not exist."))

    def do_terminate(self, body):
        there = {instance["id"] for instance in self.visible()}
        if not set(body["instance_ids"]) <= there:
            return 404, self.error("global/object-does-not-exist", "Specified instance does not exist.")
        for id in body["instance_ids"]:
            self.all[id].update(status="terminating", looks=self.unknown + 1)
            self.terminated.append(id)
        return 200, {"data": {"terminated_instances": [instance for instance in self.visible() if instance["id"] in body["instance_ids"]]}}
