"""Hyperbolic's spot marketplace, version 1: offers, rent, instances, terminate. Nodes are priced in CENTS per GPU and hour.

A rental carries no name of ours. After a request without an answer it is recognised by its node, its GPU count and by not having been in the list
before; what cannot be told from someone else's rental is named to the user and never terminated.
"""
from datetime import datetime, timezone

from nanochat.cloud.api import Api, Refused
from nanochat.cloud.market import Instance, Offer, dollars
from nanochat.cloud.ssh import parse_ssh_command

URL = "https://api.hyperbolic.xyz"
STARTING, RUNNING = ("starting", "pending", "creating", "provisioning", "booting"), ("online", "ready", "running", "active", "node_ready", "instance_running")
ENDING, BROKEN = ("terminating", "stopping"), ("failed", "error", "offline", "unhealthy", "preempted")
OVER = ("terminated", "stopped", "deleted", "ended")
CLOCK_SKEW = 300


class Hyperbolic:
    """One account, or none: the marketplace may be read without a key."""
    name, module, rentals_have_names = "hyperbolic", "scripts.launch_hyperbolic_training", False
    console = "https://app.hyperbolic.ai/instances"

    def __init__(self, config, key, signals):
        self.config, self.signals, self.url = config, signals, config.api_url or URL
        self.api = Api(self.url, key, signals, interval=0.3)

    def offers(self):
        """Every node with a price, for `gpu_count` of its GPUs."""
        answer = self.api.call("POST", "/v1/marketplace", {"filters": {}})
        nodes = answer if isinstance(answer, list) else answer.get("instances", [])
        return [offer for node in nodes if (offer := self.describe_node(node))]

    def describe_node(self, node):
        hardware, price = node.get("hardware") or {}, ((node.get("pricing") or {}).get("price") or {}).get("amount")
        gpus = hardware.get("gpus") or []
        if price is None or not node.get("id"):
            return None
        free = int(node.get("gpus_total") or len(gpus)) - int(node.get("gpus_reserved") or 0)
        count = self.config.gpu_count
        model = gpus[0].get("model", "?") if gpus else "?"
        memory = f"{gpus[0]['ram'] / 1024:.0f} GB each, " if gpus and gpus[0].get("ram") else ""
        cluster = node.get("cluster_name") or ""
        return Offer(model, (node.get("location") or {}).get("region") or "", count, float(price) * count,
                     node.get("status") == "node_ready" and not node.get("reserved") and free >= count,
                     {"cluster_name": cluster, "node_name": node["id"], "gpu_count": count, "supplier": node.get("supplier_id") or ""},
                     f"{memory}{free} of {node.get('gpus_total', '?')} free, node {node['id']} of {cluster}, supplier {node.get('supplier_id') or '?'}")

    def wanted(self, offers):
        """The offers that the flags ask for, cheapest first; fallback regions after the preferred one. ValueError for a name that does not exist."""
        config = self.config
        order = [one.lower() for one in (config.region, *config.fallback_regions) if one]
        tests = {"region": (config.region, lambda offer: "any" in order or offer.region.lower() in order, lambda offer: offer.region),
                 "supplier": (config.supplier, lambda offer: offer.request["supplier"].lower() == config.supplier.lower(), lambda offer: offer.request["supplier"]),
                 "gpu_model": (config.gpu_model, lambda offer: config.gpu_model.lower() in offer.kind.lower(), lambda offer: offer.kind),
                 "node_name": (config.node_name, lambda offer: offer.request["node_name"] == config.node_name, lambda offer: offer.request["node_name"]),
                 "cluster_name": (config.cluster_name, lambda offer: offer.request["cluster_name"] == config.cluster_name, lambda offer: offer.request["cluster_name"])}
        for knob, (value, fits, name_of) in tests.items():
            if not value:
                continue
            there = sorted({name_of(offer) for offer in offers if name_of(offer)})
            offers = [offer for offer in offers if fits(offer)]
            if not offers and knob != "node_name" and there:
                raise ValueError(f"{knob}={value!r} matches none of what is offered: {', '.join(there)}")
        rank = {name: place for place, name in enumerate(order)}
        return sorted(offers, key=lambda offer: (rank.get(offer.region.lower(), len(order)), offer.cents_per_hour))

    def listing(self, offers):
        return self.wanted(offers)

    def check_account(self, offer):
        """Fail before anything is paid: the account needs credit and an SSH key."""
        credits = self.api.call("GET", "/billing/get_current_balance").get("credits")
        if credits is None:
            raise ValueError("the account's balance could not be read: the answer has no 'credits'")
        if credits <= 0:
            raise ValueError(f"the account's balance is {dollars(credits)}: add credit at {self.console}")
        if not self.api.call("GET", "/users/me").get("public_key"):
            raise ValueError("the account has no SSH public key: add one in the settings at https://app.hyperbolic.ai")
        return f"balance {dollars(credits)}, enough for {credits / offer.cents_per_hour:.1f} h"

    def rent(self, offer, name):
        """Ask once -> the rental's id, "" where the answer names none."""
        body = {key: offer.request[key] for key in ("cluster_name", "node_name", "gpu_count")}
        answer = self.api.call("POST", "/v1/marketplace/instances/create", body, once=True)
        answer = answer if isinstance(answer, dict) else {}
        if str(answer.get("status")).lower() in ("error", "failed"):
            raise Refused(200, "", str(answer.get("message") or answer))
        return str(answer.get("instance_id") or answer.get("instance_name") or answer.get("id") or "")

    def lacks_capacity(self, refusal):
        return refusal.status in (404, 409) or any(word in str(refusal).lower() for word in ("capacity", "reserved", "not available", "unavailable"))

    def instances(self):
        answer = self.api.call("GET", "/v1/marketplace/instances")
        return [self.describe(entry) for entry in (answer if isinstance(answer, list) else answer.get("instances") or [])]

    def terminate(self, id):
        """-> True when the marketplace takes the order, False when it does not know the rental."""
        try:
            self.api.call("POST", "/v1/marketplace/instances/terminate", {"id": id})
        except Refused as refusal:
            if refusal.status == 404:
                return False
            raise
        return True

    def resembles(self, instance, record):
        """As far as node, count and time tell, this is the rental; it was not there before the request."""
        return (instance.id not in record.known_before and instance.node == record.node and instance.gpus in (None, record.gpus)
                and (instance.created is None or instance.created >= record.requested_at - CLOCK_SKEW))

    def describe(self, entry):
        inner = entry.get("instance") or {}
        status = str(inner.get("status") or entry.get("status") or "").lower()
        try:
            address = parse_ssh_command(entry.get("sshCommand"), self.config.ssh_user)
        except ValueError:
            address = None  # one strange line must not hide the other rentals, which may have to be terminated
        state = next((state for state, words in (("starting", STARTING), ("running", RUNNING), ("ending", ENDING), ("broken", BROKEN), ("gone", OVER))
                      if status in words), "starting")
        if entry.get("end") and moment(entry["end"]) is not None and moment(entry["end"]) <= datetime.now(timezone.utc).timestamp():
            state = "gone"
        if state == "running" and not address:
            state = "starting"  # no way in yet
        user, host, port = address or ("", "", 22)
        count = inner.get("gpu_count")
        price = ((inner.get("pricing") or {}).get("price") or {}).get("amount")
        gpus = (inner.get("hardware") or {}).get("gpus") or []
        return Instance(id=str(entry["id"]), state=state, status=status, kind=gpus[0].get("model", "") if gpus else "", host=host, port=port, user=user,
                        cents_per_hour=None if price is None else float(price) * int(count or 1), node=str(inner.get("id") or ""), gpus=count,
                        created=moment(entry.get("created") or entry.get("start")))


def moment(text):
    """An ISO 8601 time -> Unix time, None where it is none."""
    try:
        when = datetime.fromisoformat(str(text).replace("Z", "+00:00"))
    except ValueError:
        return None
    return (when if when.tzinfo else when.replace(tzinfo=timezone.utc)).timestamp()
