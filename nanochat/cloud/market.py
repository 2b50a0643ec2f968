"""What a cloud offers and what it has rented out to us, in one form for all clouds. Prices are cents an hour for the whole instance."""
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Offer:
    """One thing that could be rented: a type in a region, or GPUs of a node."""
    kind: str                 # the instance type, or the GPU's model
    region: str
    gpus: int
    cents_per_hour: float     # for the whole instance
    available: bool
    request: dict = field(default_factory=dict)  # what the cloud's own request needs
    note: str = ""

    def __str__(self):
        return f"{self.kind} in {self.region} ({self.gpus} GPU{'s' * (self.gpus != 1)}, {dollars(self.cents_per_hour)} an hour)"


@dataclass(frozen=True)
class Instance:
    """A rented instance as its cloud lists it."""
    id: str
    state: str                # starting, running, broken, ending, gone
    status: str = ""          # the cloud's own word for it
    name: str = ""
    kind: str = ""
    region: str = ""
    host: str = ""            # "" until there is an address
    port: int = 22
    user: str = ""
    cents_per_hour: float | None = None
    node: str = ""            # the machine it stands on, where the cloud says so
    gpus: int | None = None
    created: float | None = None  # Unix time

    @property
    def is_over(self):
        return self.state in ("ending", "gone")


def dollars(cents):
    return f"${cents / 100:,.2f}"


def affordable(offers, max_price):
    """The available offers that cost at most max_price dollars an hour (-1 = any). ValueError where all of them cost more."""
    there = [offer for offer in offers if offer.available]
    cheap = [offer for offer in there if max_price < 0 or offer.cents_per_hour <= 100 * max_price + 1e-6]
    if there and not cheap:
        cheapest = min(there, key=lambda offer: offer.cents_per_hour)
        raise ValueError(f"max_price=${max_price:.2f} an hour for the whole instance, but the cheapest that matches is {cheapest}: raise --max-price or choose another")
    return cheap


def print_offers(offers, say):
    """A table of offers, the rentable ones first."""
    if not offers:
        return say("nothing is offered that matches")
    rows = [("TYPE", "GPUS", "REGION", "$/HOUR", "$/GPU/HOUR", "FREE NOW", "")]
    for offer in sorted(offers, key=lambda offer: (not offer.available, offer.cents_per_hour, offer.kind, offer.region)):
        rows.append((offer.kind, str(offer.gpus), offer.region or "-", f"{offer.cents_per_hour / 100:.2f}", f"{offer.cents_per_hour / 100 / max(1, offer.gpus):.2f}",
                     "yes" if offer.available else "no", offer.note))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        say("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
