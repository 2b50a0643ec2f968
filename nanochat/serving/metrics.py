"""What the server counts, as Prometheus reads it (https://prometheus.io/docs/instrumenting/exposition_formats). No text of any
request is ever part of it."""
import bisect
import os
import threading

import psutil

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
HELP = {
    "nanochat_requests_total": ("counter", "requests answered, by endpoint and status"),
    "nanochat_prompt_tokens_total": ("counter", "tokens of prompts accepted"),
    "nanochat_generated_tokens_total": ("counter", "tokens generated"),
    "nanochat_cancelled_total": ("counter", "requests whose client left or whose time was up"),
    "nanochat_engine_errors_total": ("counter", "failures inside the engine"),
    "nanochat_request_seconds": ("histogram", "whole requests, by endpoint"),
    "nanochat_first_token_seconds": ("histogram", "from a request's arrival to its first token"),
    "nanochat_rows": ("gauge", "completions in flight, by worker"),
    "nanochat_queue": ("gauge", "completions and prompts to score that wait, by worker"),
    "nanochat_models_loaded": ("gauge", "models in memory, by worker"),
    "nanochat_resident_bytes": ("gauge", "memory of the process"),
}


class Metrics:
    """Counters and histograms, safe to change from any thread."""

    def __init__(self):
        self.lock, self.counters, self.histograms = threading.Lock(), {}, {}
        self.process = psutil.Process(os.getpid())

    def count(self, name, value=1, **labels):
        key = name, tuple(labels.items())
        with self.lock:
            self.counters[key] = self.counters.get(key, 0) + value

    def observe(self, name, seconds, **labels):
        key = name, tuple(labels.items())
        with self.lock:
            buckets, total = self.histograms.get(key) or ([0] * (len(SECONDS) + 1), 0.0)
            buckets[bisect.bisect_left(SECONDS, seconds)] += 1
            self.histograms[key] = buckets, total + seconds

    def mean(self, name):
        """The mean of a histogram over all its labels; 0 where nothing was observed."""
        with self.lock:
            found = [value for (other, _), value in self.histograms.items() if other == name]
        return sum(total for _, total in found) / max(sum(sum(buckets) for buckets, _ in found), 1)

    def text(self, gauges):
        """{(name, labels): value} of the moment -> the whole page."""
        with self.lock:
            values = {**self.counters, **gauges, ("nanochat_resident_bytes", ()): self.process.memory_info().rss}
            histograms = {key: (list(buckets), total) for key, (buckets, total) in self.histograms.items()}
        lines = []
        for name, (kind, text) in HELP.items():
            lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
            lines += [f"{name}{labelled(labels)} {value}" for (other, labels), value in values.items() if other == name]
            for (other, labels), (buckets, total) in histograms.items():
                if other == name:
                    below = 0
                    for edge, number in zip((*SECONDS, "+Inf"), buckets):
                        below += number
                        lines.append(f"{name}_bucket{labelled((*labels, ('le', edge)))} {below}")
                    lines += [f"{name}_sum{labelled(labels)} {total}", f"{name}_count{labelled(labels)} {below}"]
        return "\n".join(lines) + "\n"


def labelled(labels):
    return "{" + ",".join(f'{name}="{value}"' for name, value in labels) + "}" if labels else ""
