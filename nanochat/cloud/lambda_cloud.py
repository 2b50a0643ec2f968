"""Lambda's cloud API, version 1.8 (https://docs.lambda.ai/api/cloud): offers, rent, instances, terminate. Prices come in cents an hour.

Lambda bills from launch until *terminate* through this API or the dashboard; shutting the machine's system down changes nothing.
"""
import ipaddress
import time

from nanochat.cloud.api import Api, Refused
from nanochat.cloud.market import Instance, Offer

URL = "https://cloud.lambda.ai"
# what apt is asked for at first boot; no secret is ever put into user_data, which stays readable in the instance's metadata
USER_DATA = "#cloud-config\npackage_update: true\npackages: [git, curl, tmux, ca-certificates, build-essential]\n"
STATES = {"booting": "starting", "active": "running", "unhealthy": "broken", "preempted": "broken", "terminating": "ending", "terminated": "gone"}
NO_CAPACITY = "instance-operations/launch/insufficient-capacity"
GONE = "global/object-does-not-exist"


class LambdaCloud:
    """One account. `rentals_have_names`: an instance carries the name we gave it, so it is found even if the answer to the request was lost."""
    name, module, rentals_have_names = "lambda", "scripts.launch_lambda_training", True
    console = "https://cloud.lambda.ai/instances"
    launch_interval = 12.5  # the API takes 5 launches a minute, and about one call of any kind a second

    def __init__(self, config, key, signals):
        self.config, self.signals = config, signals
        self.url = config.api_url or URL
        self.api = Api(self.url, key, signals, interval=1.05)
        self.last_launch = -1e9

    def offers(self):
        """All types in all regions; where a type has no capacity at all it stands with the region ""."""
        offers = []
        for kind, entry in self.data("GET", "/instance-types").items():
            about = entry["instance_type"]
            specs = about.get("specs") or {}
            note = f"{about.get('gpu_description') or about.get('description') or ''}, {specs.get('vcpus', '?')} CPUs, {specs.get('memory_gib', '?')} GiB"
            regions = [region["name"] for region in entry.get("regions_with_capacity_available") or ()]
            for region in regions or [""]:
                offers.append(Offer(kind, region, int(specs.get("gpus") or 0), about["price_cents_per_hour"], bool(region),
                                    {"region_name": region, "instance_type_name": kind}, note))
        return offers

    def wanted(self, offers):
        """The offers that the flags ask for, the preferred region first. ValueError for a type that does not exist."""
        config = self.config
        kinds = {offer.kind for offer in offers}
        if config.instance_type not in kinds:
            raise ValueError(f"instance_type={config.instance_type!r} is not one of the {len(kinds)} types of this account: {', '.join(sorted(kinds))}")
        matching = [offer for offer in offers if offer.kind == config.instance_type]
        if not config.region:
            return matching
        order = [config.region, *config.fallback_regions]
        anywhere = "any" in order
        rank = {name: order.index(name) for name in order}
        return sorted((offer for offer in matching if offer.region in rank or anywhere and offer.region),
                      key=lambda offer: rank.get(offer.region, len(order)))

    def listing(self, offers):
        return offers

    def check_account(self, offer):
        """Fail before anything is paid: exactly one of the account's SSH keys must be named."""
        keys = {key["name"]: key for key in self.data("GET", "/ssh-keys")}
        name = self.config.ssh_key_name
        if not name and len(keys) == 1:
            name = next(iter(keys))
        if name not in keys:
            raise ValueError(f"ssh_key_name={name!r} is not among the account's {len(keys)} keys: {', '.join(sorted(keys)) or 'add one in the dashboard'}")
        self.ssh_key_name = name
        return f"SSH key {name}"

    def rent(self, offer, name):
        """Ask once -> the instance's id. Refused or NoAnswer tell what is known otherwise."""
        config = self.config
        body = {**offer.request, "ssh_key_names": [self.ssh_key_name], "name": name}
        if config.file_systems:
            body["file_system_names"] = list(config.file_systems)
        if config.image_id or config.image_family:
            body["image"] = {"id": config.image_id} if config.image_id else {"family": config.image_family}
        if not config.no_user_data:
            body["user_data"] = USER_DATA
        self.signals.sleep(max(0.0, self.last_launch + self.launch_interval * self.signals.scale - time.monotonic()) / self.signals.scale)
        try:
            ids = self.data("POST", "/instance-operations/launch", body, once=True)["instance_ids"]
        finally:
            self.last_launch = time.monotonic()
        return str(ids[0])

    def lacks_capacity(self, refusal):
        return refusal.code == NO_CAPACITY

    def instances(self):
        return [self.describe(entry) for entry in self.data("GET", "/instances")]

    def terminate(self, id):
        """-> True when the API says that it terminates this very instance, False when it does not know it."""
        try:
            ended = self.data("POST", "/instance-operations/terminate", {"instance_ids": [id]})["terminated_instances"]
        except Refused as refusal:
            if refusal.code == GONE or refusal.status == 404:
                return False
            raise
        return any(entry.get("id") == id for entry in ended)

    def resembles(self, instance, record):
        """It carries the name that only this rental has."""
        return instance.name == record.name

    def describe(self, entry):
        region = entry.get("region") or {}
        kind = entry.get("instance_type") or {}
        try:
            host = str(ipaddress.ip_address(entry.get("ip") or ""))
        except ValueError:
            host = ""
        return Instance(id=str(entry["id"]), state=STATES.get(entry["status"], "starting"), status=entry["status"], name=entry.get("name") or "",
                        kind=kind.get("name", ""), region=region.get("name", "") if isinstance(region, dict) else str(region), host=host,
                        port=self.config.ssh_port, user=self.config.ssh_user, cents_per_hour=kind.get("price_cents_per_hour"))

    def data(self, method, path, body=None, once=False):
        answer = self.api.call(method, "/api/v1" + path, body, once)
        if not isinstance(answer, dict) or "data" not in answer:
            raise Refused(200, "", f"{method} {path}: the answer has no 'data'; is {self.url} Lambda's API?")
        return answer["data"]
