"""A loopback server that speaks the spot marketplace of Hyperbolic, version 1: prices in cents per GPU-hour, nodes that are taken, rentals that
start without an address. `shape` chooses which of the known answers `create` gives; `faults` as in FakeLambda."""
from datetime import datetime, timezone

from tests.fakes.lambda_cloud import FakeCloud


def node(name, cents, gpus=8, free=8, model="NVIDIA-H100-80GB-HBM3", region="us-central-1", status="node_ready", reserved=False, supplier="acme"):
    return {"id": name, "status": status, "reserved": reserved, "cluster_name": f"cluster-{name}", "supplier_id": supplier, "location": {"region": region},
            "gpus_total": gpus, "gpus_reserved": gpus - free,
            "hardware": {"cpus": [{"model": "AMD", "virtual_cores": 200}], "gpus": [{"model": model, "ram": 81920, "interface": "PCIe"}] * gpus,
                         "storage": [{"capacity": 1000}], "ram": [{"capacity": 1000}]},
            "pricing": {"price": {"amount": cents, "period": "hourly", "agent": "x"}}}


class FakeHyperbolic(FakeCloud):
    open_to_all = ("market",)
    capacity_error = (500, {"message": "not enough capacity"})
    routes = (("POST", r"/v1/marketplace", "market"), ("POST", r"/v1/marketplace/instances/create", "create"), ("GET", r"/v1/marketplace/instances", "list"),
              ("POST", r"/v1/marketplace/instances/terminate", "terminate"), ("GET", r"/billing/get_current_balance", "balance"), ("GET", r"/users/me", "me"))

    def __init__(self, ssh_command="ssh ubuntu@127.0.0.1 -p 22", shape="instance_id", unknown=1, starting=1, after=None, **options):
        super().__init__(**options)
        self.ssh_command, self.shape, self.unknown, self.starting, self.after = ssh_command, shape, unknown, starting, after
        self.nodes = [node("dear", 300), node("cheap", 220), node("taken", 100, reserved=True), node("down", 90, status="node_down"), node("full", 80, free=0)]
        self.credits, self.public_key, self.all = 10_000, "ssh-ed25519 AAAA", {}
        self.stranger("someone-elses", "cheap")

    @staticmethod
    def error(code, message):
        return {"message": message}

    def stranger(self, id, where, looks=100):
        """A rental of the same account that this launcher has nothing to do with."""
        self.all[id] = {"id": id, "node": where, "gpu_count": 1, "status": "online", "looks": looks, "start": "2020-01-01T00:00:00Z"}

    def do_market(self, body):
        return 200, {"instances": self.nodes}

    def do_balance(self):
        return 200, {"credits": self.credits}

    def do_me(self):
        return 200, {"id": "u", "public_key": self.public_key}

    def do_create(self, body):
        found = [one for one in self.nodes if one["id"] == body["node_name"] and one["cluster_name"] == body["cluster_name"]]
        if set(body) - {"cluster_name", "node_name", "gpu_count", "image"} or not found:
            return 400, {"message": "bad request"}
        id = f"worn-fuchsia-{len(self.all)}"
        self.launched.append(id)
        self.all[id] = {"id": id, "node": body["node_name"], "gpu_count": body["gpu_count"], "status": "starting", "looks": 0,
                        "start": datetime.now(timezone.utc).isoformat().replace("+00:00", "Z")}
        return 200, {"instance_id": {"instance_id": id, "status": "starting", "message": ""}, "instance_name": {"status": "success", "instance_name": id},
                     "nothing": {"status": "success"}}[self.shape]

    def do_list(self):
        for rental in self.all.values():
            rental["looks"] += 1
            if rental["status"] == "starting" and rental["looks"] > self.unknown + self.starting:
                rental["status"] = "online"
            elif rental["status"] == "online" and self.after and rental["id"] in self.launched:
                rental["status"] = self.after
        return 200, {"instances": [self.show(rental) for rental in self.all.values() if rental["looks"] > self.unknown and rental["status"] != "terminated"]}

    def show(self, rental):
        price = next(one["pricing"] for one in self.nodes if one["id"] == rental["node"])
        return {"id": rental["id"], "start": rental["start"], "end": None, "created": rental["start"], "portMappings": [],
                "sshCommand": self.ssh_command if rental["status"] == "online" else "",
                "instance": {"id": rental["node"], "status": rental["status"], "hardware": {"gpus": [{"model": "NVIDIA-H100", "ram": 81920}]}, "pricing": price,
                             "gpu_count": rental["gpu_count"], "gpus_total": 8}}

    def do_terminate(self, body):
        rental = self.all.get(body["id"])
        if rental is None or rental["looks"] <= self.unknown or rental["status"] == "terminated":
            return 404, {"message": "instance not found"}
        rental["status"] = "terminated"
        self.terminated.append(body["id"])
        return 200, {"status": "success"}
