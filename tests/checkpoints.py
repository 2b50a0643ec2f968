"""Small checkpoints without training, for the tests of what leaves and enters the base directory."""
import json
from dataclasses import dataclass

import torch

from nanochat.checkpoint_manager import save_checkpoint, stage_dir
from nanochat.common import base_dir
from nanochat.compute import compute_init
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import Tokenizer
from nanochat.training import LoopState

TEXT = ["The cat sat on the mat, and the cat was fat. What is 12 + 34? It's 46!", "a b c d e f g aaaa aaab abab baba Answer: A\nAnswer: B\nAnswer: C\n" * 3,
        "x = 3 * (y - 17) / 2.5; print(x)\n\nstep by step: 1234567890, naïve café, 你好, привет 🙂" * 2]


@dataclass(frozen=True)
class Config:
    model_tag: str = "tiny"
    max_seq_len: int = 64
    recipe: str = "offline"
    seed: int = 3


def small_tokenizer(vocab_size=400):
    return Tokenizer.train(iter(TEXT * 3), vocab_size)


def noisy_model(vocab_size, n_kv_head=2, seed=2, sequence_len=64):
    """Two layers whose zero-initialised matrices are not zero, so that every part matters."""
    model = GPT(GPTConfig(sequence_len, vocab_size, 2, 4, n_kv_head, 32))
    model.init_weights(seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return model


def save_small(stage="rl", tag="tiny", padding=7, step=12, **sizes):
    """A whole checkpoint of a stage in the base directory, with its tokenizer, a log and an evaluation -> (model, tokenizer)."""
    tokenizer = small_tokenizer()
    tokenizer.save(base_dir() / "tokenizer")
    model = noisy_model(tokenizer.vocab_size + padding, **sizes)
    config, compute = Config(tag), compute_init("cpu", "float32")
    save_checkpoint(stage, tag, LoopState(step=step, tokens=999), config, compute, model, torch.optim.SGD(model.parameters(), lr=0.1), tokenizer, finished=True)
    runs, evals = base_dir() / "runs", base_dir() / "eval"
    runs.mkdir(exist_ok=True)
    evals.mkdir(exist_ok=True)
    header = {"stage": stage, "model_tag": tag, "time": 1.0, "config": {"model_tag": tag, "max_steps": 12, "task": "AQUA", "recipe": "offline", "resume": False}}
    (runs / f"{stage}_{tag}.jsonl").write_text(json.dumps(header) + "\n" + json.dumps({"step": step, "rl/mean_reward": 0.5}) + "\n", encoding="utf-8")
    metrics = {"accuracy": 0.4567, "ci_low": 0.3912, "ci_high": 0.5238, "best_constant": {"letter": "E", "share": 0.2717}, "random_accuracy": 0.2,
               "no_reasoning": 0.21, "parse_failures": 0.03, "mean_tokens": 41.0, "letters_gold": {"A": 1}, "letters_pred": {"A": 1}}
    summary = {"stage": stage, "model_tag": tag, "step": step, "task": "AQUA", "split": "test", "n": 217, "metrics": metrics, "verdict": "above | blind: yes\n", "time": 2.0}
    (evals / f"{stage}_{tag}_AQUA_test.json").write_text(json.dumps(summary), encoding="utf-8")
    return model, tokenizer


def weights_of(stage, tag):
    """{file name: tensors} of the checkpoint's model files."""
    return {path.name: torch.load(path, weights_only=True) for path in sorted(stage_dir(stage, tag).glob("model_*.pt"))}
