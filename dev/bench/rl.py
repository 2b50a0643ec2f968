"""Seconds of one RL step, ours beside TRL's GRPOTrainer, on the same weights in the same process, in turns.

    OMP_NUM_THREADS=2 python -m dev.bench.rl                    # 4 prompts x 8 samples, prompt 64, 64 new tokens, depth 4 x 256
    OMP_NUM_THREADS=2 python -m dev.bench.rl --lengths=varying --dtypes=float32

"equal": every completion has `--new-tokens` tokens. "varying": one token in `--mean-tokens` ends a completion, for both, so that
lengths are geometric. Ours is a step of chat_rl without its telemetry: sample_groups, advantages, gradient, update, refresh of the
engine. TRL's is GRPOTrainer's `training_step` with its defaults but for what the load fixes (one batch, no gradient checkpointing,
float32 unless `--peer-bf16`). Its AdamW is cheaper than our Muon; `--optimizer=adamw` gives both the same. In float32 the largest
difference between the log-probabilities of sampler and trainer is asserted to be 1e-5 at most. The last line is JSON.
"""
import json
import os
import statistics
import tempfile
from dataclasses import dataclass, replace

import torch

from dev.bench import decode
from nanochat.compute import compute_init
from nanochat.configurator import parse
from nanochat.engine import Engine
from nanochat.gpt import GPT
from nanochat.optim import MuonAdamW
from nanochat.rl.algorithm import group_advantages, reinforce_loss
from nanochat.rl.rollout import make_batches, sample_groups
from nanochat.rl.shared_prompt import make_shared_batches


@dataclass(frozen=True)
class Config:
    """Measure one RL step."""
    device_type: str = ""                      # cuda or cpu ("" = the best there is)
    depth: int = 4                             # layers; the width is 64 times as many
    vocab_size: int = 8192                     # vocabulary
    prompts: int = 4                           # per step
    samples: int = 8                           # per prompt
    prompt_tokens: int = 64                    # of each prompt
    new_tokens: int = 64                       # longest completion
    mean_tokens: int = 24                      # mean length of the geometric completions
    lengths: tuple[str, ...] = ("equal", "varying")  # loads to measure
    dtypes: tuple[str, ...] = ("float32", "")  # ours ("" = the machine's default)
    threads: int = 2                           # of a CPU
    clock: str = "wall"                        # wall, or cpu: seconds of processor time, for a CPU that others use too (with threads=1)
    rounds: int = 6                            # measured steps of each
    compiled: bool = True                      # our gradient pass at equal lengths
    shared: bool = True                        # our gradient pass computes a prompt once per group (False = once per sample)
    optimizer: str = "muon"                    # ours: muon (what chat_rl takes) or adamw (TRL's)
    peer: bool = True                          # measure TRL too
    peer_bf16: bool = False                    # TRL under bfloat16 autocast


class Words(decode.Numbers):
    """A tokenizer whose conversations are token lists already."""

    def render_for_completion(self, conversation):
        return conversation

    def decode(self, ids):
        return " ".join(f"t{id}" for id in ids)


def parity(text):
    """The reward: 1 where the sum of the ids is even. Nothing to be learned, but right and wrong in nearly every group."""
    return float(sum(int(word[1:]) for word in text.split()) % 2 == 0)


class Ours:
    """Everything a step of ours needs, and the seconds of its parts."""

    def __init__(self, config, compute, weights, prompts, stops, kind):
        self.config, self.prompts = config, prompts
        self.model = GPT(weights.config, compute.dtype).to(compute.device)
        self.model.load_state_dict(weights.state_dict())
        self.model.fill_rotary_table()
        if config.compiled and kind == "equal":  # every new shape compiles anew: lengths that vary stay eager
            self.model.compile_for_training()
        self.compute, self.tokenizer = compute, Words(config.vocab_size)
        self.engine = Engine(self.model, self.tokenizer, tools=False)
        self.engine.stops = frozenset(stops)
        self.optimizer = (MuonAdamW(self.model, compute) if config.optimizer == "muon" else
                          torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True))
        self.seconds, self.step, self.largest_difference = [], 0, 0.0

    def __call__(self):
        config, begun = self.config, self.clock()
        seeds = [self.step * config.prompts + place for place in range(config.prompts)]
        groups = sample_groups(self.engine, self.tokenizer, self.prompts, lambda _, text: {"correct": parity(text)}, config.samples,
                               config.new_tokens, 1.0, seeds)
        sampled = self.clock()
        rewards = torch.tensor([[rollout.reward for rollout in group] for group in groups])
        for group, row in zip(groups, group_advantages(rewards).tolist()):
            for rollout, advantage in zip(group, row):
                rollout.advantage = advantage
        rollouts = [rollout for group in groups for rollout in group]
        rows = len(rollouts)
        batches = (make_shared_batches if config.shared else make_batches)(rollouts, rows, 0, self.compute.device)
        count = sum(int((batch.targets != -1).sum()) for batch in batches)
        for batch in batches:
            logprobs = batch.logprobs(self.model) if config.shared else self.model.logprobs(batch.inputs, batch.targets)
            (reinforce_loss(logprobs, batch.advantages, batch.targets != -1) / count).backward()
            self.largest_difference = max(self.largest_difference, float((logprobs.detach() - batch.sampler_logprobs).abs().max()))
        learned = self.clock()
        if config.optimizer == "muon":
            self.optimizer.step(lr_mult=1e-6, grad_clip=1.0)  # the weights all but stay what they are: every step is the same work
        else:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.engine.refresh()
        ended = self.clock()
        self.step += 1
        self.seconds.append({"step": ended - begun, "generate": sampled - begun, "gradient": learned - sampled, "update": ended - learned,
                             "tokens": sum(len(rollout.tokens) for rollout in rollouts)})

    def clock(self):
        self.compute.synchronize()
        return decode.CLOCKS[self.config.clock]()


def run_trl(config, peer, prompts, stops, after_step):
    """TRL's seconds per step; `after_step()` is called after each of them, its time not counted."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    words = Tokenizer(models.WordLevel({f"t{id}": id for id in range(config.vocab_size)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0", pad_token="t0", eos_token=f"t{config.vocab_size - 1}")
    peer.generation_config.eos_token_id = sorted(stops) or None
    rows, clock = config.prompts * config.samples, decode.CLOCKS[config.clock]
    seconds, spent = [], {"generate": 0.0}

    class Watch(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            spent["begun"], spent["generate"] = clock(), 0.0

        def on_step_end(self, *args, **kwargs):
            step = clock() - spent["begun"]
            seconds.append({"step": step, "generate": spent["generate"], "gradient_and_update": step - spent["generate"], "tokens": spent["tokens"]})
            after_step()

    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            peer, lambda completions, **_: [parity(text) for text in completions],
            GRPOConfig(folder, per_device_train_batch_size=rows, num_generations=config.samples, max_completion_length=config.new_tokens,
                       max_steps=config.rounds + 2, learning_rate=1e-6, bf16=config.peer_bf16, use_cpu=config.device_type == "cpu",
                       gradient_checkpointing=False, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
                       generation_kwargs={} if stops else {"min_new_tokens": config.new_tokens}),
            Dataset.from_list([{"prompt": " ".join(f"t{id}" for id in prompt)} for prompt in prompts]), processing_class=tokenizer, callbacks=[Watch()])
        generate = trainer._generate_single_turn

        def timed(*args, **kwargs):
            begun = clock()
            result = generate(*args, **kwargs)
            spent["generate"] += clock() - begun
            spent["tokens"] = sum(map(len, result[0]))
            return result
        trainer._generate_single_turn = timed
        trainer.train()
    return seconds


def main(config):
    torch.set_num_threads(config.threads)
    compute = compute_init(config.device_type, "float32")
    torch.set_num_threads(config.threads)
    config = replace(config, device_type=compute.device.type)
    results = [measure(config, compute, kind) for kind in config.lengths]
    for result in results:
        print({name: value for name, value in result.items() if name != "runs"}, flush=True)
    print(json.dumps({"config": config.__dict__, "torch": torch.__version__, "threads": torch.get_num_threads(), "results": results}))


def measure(config, compute, kind):
    """One load: medians of the steps taken in turns, the first two of each left out (they compile and warm up)."""
    load = decode.Config(depth=config.depth, vocab_size=config.vocab_size, peer=config.peer)
    model, peer = decode.build(load, torch.float32, compute.device)
    ids = torch.randint(1, config.vocab_size - len(decode.MARKERS), (config.prompts, config.prompt_tokens), generator=torch.Generator().manual_seed(0))
    prompts = ids.tolist()
    # Random weights spread the probability over the whole vocabulary, so that so many end tokens end one completion in `mean_tokens` steps.
    stops = range(1, 1 + config.vocab_size // config.mean_tokens) if kind == "varying" else ()
    defaults = {name: compute_init(config.device_type, name).dtype for name in config.dtypes}
    ours = {str(dtype)[6:]: Ours(config, replace(compute, dtype=dtype), model, prompts, stops, kind) for dtype in defaults.values()}
    torch.set_num_threads(config.threads)

    def all_ours():
        for step in ours.values():
            step()
    if config.peer:
        peer.requires_grad_(True)
        runs = {"trl": run_trl(config, peer, prompts, stops, all_ours)}
    else:
        runs = {}
        for _ in range(config.rounds + 2):
            all_ours()
    runs.update({f"ours {name}": step.seconds for name, step in ours.items()})
    result = {"lengths": kind, "load": round(os.getloadavg()[0], 1), "seconds": {name: {part: round(statistics.median(step[part] for step in steps[2:]), 4) for part in steps[0]}
                                           for name, steps in runs.items()}}
    for name in ours:
        result[f"largest log-prob difference, {name}"] = ours[name].largest_difference
        if config.peer:
            pairs = list(zip(runs["trl"][2:], runs[f"ours {name}"][2:]))
            result[f"ratio {name}"] = {part: round(statistics.median(slow[part] / fast[part] for slow, fast in pairs), 2) for part in ("step", "generate")}
            result[f"ratio {name}"]["generate per token"] = round(statistics.median(
                slow["generate"] / slow["tokens"] / (fast["generate"] / fast["tokens"]) for slow, fast in pairs), 2)
    assert "float32" not in ours or ours["float32"].largest_difference <= 1e-5, ours["float32"].largest_difference
    return {**result, "runs": runs}


if __name__ == "__main__":
    main(parse(Config))
