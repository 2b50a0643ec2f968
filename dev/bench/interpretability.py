"""What watching costs: a forward pass plain, under hooks, and with all attention metrics; and beside an RL step's gradient, letters and lens included.

    python dev/bench/interpretability.py                 # depth 4, width 256; --device_type=cuda --depth=12 --n_embd=768 on a GPU

The model has random weights, whose attention costs what a trained one's does. The RL step is only its gradient pass over
`examples * num_samples` rows, without the sampling, so the shares printed are upper bounds. The last line is JSON.
"""
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from nanochat.compute import compute_init  # noqa: E402
from nanochat.configurator import parse  # noqa: E402
from nanochat.gpt import GPT, config_from_depth  # noqa: E402
from nanochat.interpretability.attention_metrics import measure_overhead  # noqa: E402
from nanochat.interpretability.logit_lens import lens_of_rollouts  # noqa: E402
from nanochat.rl.algorithm import reinforce_loss  # noqa: E402
from nanochat.rl.letter_metrics import decision_point, letter_ids, letter_metrics  # noqa: E402
from nanochat.rl.rollout import Rollout, make_batches  # noqa: E402
from nanochat.tokenizer import Tokenizer  # noqa: E402
from tasks.common import get_task, message_text  # noqa: E402


@dataclass(frozen=True)
class Config:
    """Measure what interpretability and letter telemetry cost."""
    device_type: str = ""         # cuda, mps or cpu ("" = the best there is)
    dtype: str = ""               # float32 or bfloat16 ("" = bfloat16 where the hardware has it)
    depth: int = 4                # blocks
    n_embd: int = 256             # width
    head_dim: int = 64            # size of a head
    vocab_size: int = 8192        # of the model; the tokenizer is a small one, trained here and now
    examples: int = 4             # problems in an RL step
    num_samples: int = 8          # rollouts per problem
    watched: int = 8              # rollouts whose attention is measured
    device_batch_size: int = 8    # rows of a forward pass
    every: int = 20               # steps between two looks, for the shares of the time
    repeats: int = 10             # the least time of so many counts


def main(config):
    compute = compute_init(config.device_type, config.dtype)
    conversations = list(get_task("algebra", split="train", stop=400))
    tokenizer = Tokenizer.train((message_text(message) for one in conversations for message in one["messages"]), 1024)
    models = []
    for _ in range(2):  # the policy and its reference
        model = GPT(config_from_depth(config.depth, config.vocab_size, 256, config.n_embd, config.head_dim), compute.dtype)
        model.init_weights()
        models.append(model.to(compute.device))
    model, reference = models
    conversations = conversations[:config.examples]
    groups = [[reference_rollout(tokenizer, conversation) for _ in range(config.num_samples)] for conversation in conversations]
    rollouts = [rollout for group in groups for rollout in group]
    watched = rollouts[:config.watched]

    def gradient():
        for batch in make_batches(rollouts, config.device_batch_size, tokenizer.bos_id, compute.device):
            reinforce_loss(model.logprobs(batch.inputs, batch.targets), batch.advantages, batch.targets != -1).backward()
        model.zero_grad()

    seconds = measure_overhead(model, tokenizer, [rollout.prompt + rollout.tokens for rollout in watched],
                               [len(rollout.prompt) for rollout in watched], repeats=config.repeats)
    seconds["gradient_s"] = least(gradient, compute, config.repeats)
    seconds["letters_s"] = least(lambda: letter_metrics(model, reference, tokenizer, groups, conversations, compute, config.device_batch_size),
                                 compute, config.repeats)
    of_letters = dict(zip("ABCDE", letter_ids(tokenizer, "ABCDE")))
    of_watched = [conversation for conversation in conversations for _ in range(config.num_samples)][:config.watched]
    seconds["lens_s"] = least(lambda: lens_of_rollouts(model, watched, of_watched, lambda one: decision_point(tokenizer, one.tokens, one.mask), of_letters,
                                                       config.device_batch_size), compute, config.repeats)
    plain, hooked, metrics, step, letters, lens = (seconds[name] for name in ("plain_s", "hooked_s", "metrics_s", "gradient_s", "letters_s", "lens_s"))
    shares = {"hooks_on_a_forward": hooked / plain - 1, "metrics_on_a_forward": metrics / plain - 1,
              "attention_of_training": metrics / (config.every * step), "letters_of_training": letters / (config.every * step),
              "lens_of_training": lens / (config.every * step)}
    print(f"{compute.device} {compute.dtype}: {len(watched)} rows of {max(len(r.prompt) + len(r.tokens) for r in watched)} tokens")
    print(f"forward pass        {1000 * plain:9.2f} ms")
    print(f"  under hooks       {1000 * hooked:9.2f} ms  {100 * shares['hooks_on_a_forward']:+.1f} %")
    print(f"  all metrics       {1000 * metrics:9.2f} ms  {100 * shares['metrics_on_a_forward']:+.1f} %")
    print(f"gradient of a step  {1000 * step:9.2f} ms  ({len(rollouts)} rows)")
    print(f"letter telemetry    {1000 * letters:9.2f} ms  ({len(rollouts)} rows, policy and reference)")
    print(f"logit lens          {1000 * lens:9.2f} ms  ({len(watched)} rows)")
    print(f"every {config.every} steps: attention {100 * shares['attention_of_training']:.2f} %, letters {100 * shares['letters_of_training']:.2f} %, lens "
          f"{100 * shares['lens_of_training']:.2f} % of the gradients' time; every step {100 * metrics / step:.1f} %, {100 * letters / step:.1f} % and {100 * lens / step:.1f} %")
    print(json.dumps({"bench": "interpretability", "device": str(compute.device), "dtype": str(compute.dtype), "depth": config.depth,
                      "n_embd": config.n_embd, "vocab_size": config.vocab_size, "rows": len(watched), "every": config.every, **seconds, **shares}))


def reference_rollout(tokenizer, conversation):
    """The task's own answer as if it had been sampled."""
    ids, mask = tokenizer.render_conversation(conversation)
    start = len(tokenizer.render_for_completion(conversation))
    return Rollout(ids[:start], ids[start:], mask[start:], [0.0] * (len(ids) - start), "", "stop", {"correct": 1.0}, advantage=1.0)


def least(run, compute, repeats):
    """Seconds of the fastest of `repeats` runs after one that warms up."""
    best = float("inf")
    for _ in range(repeats + 1):
        compute.synchronize()
        began = time.perf_counter()
        run()
        compute.synchronize()
        best = min(best, time.perf_counter() - began)
    return best


if __name__ == "__main__":
    main(parse(Config))
