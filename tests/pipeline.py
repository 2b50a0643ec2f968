"""The whole pipeline on two layers, for the tests that start, kill, resume and split it. Run as a program it is one stage:

    python -m tests.pipeline base --resume        with NANOCHAT_BASE_DIR set
    python -m tests.pipeline grpo num_steps=1     with other settings
"""
import ast
import dataclasses
import sys

from scripts import base_train, chat_grpo, chat_rl, chat_sft, mid_train, prepare_offline, tok_train

STAGES = ("base", "mid", "sft", "rl")
FOLDERS = {"base": "base_checkpoints", "mid": "mid_checkpoints", "sft": "chatsft_checkpoints", "rl": "chatrl_checkpoints"}


def prepare():
    """Data and tokenizer."""
    prepare_offline.main(prepare_offline.Config(text_chars=200_000, train_rows=300, validation_rows=40, test_rows=40, identity_rows=20))
    tok_train.main(tok_train.Config(vocab_size=768))


def stage_config(stage, **changes):
    tiny = {"device_type": "cpu", "dtype": "float32", "save_every": 2, "keep_last": 2}
    configs = {
        "base": lambda: base_train.Config(depth=2, n_embd=64, head_dim=32, max_seq_len=128, num_iterations=6, device_batch_size=2,
                                          total_batch_size=2 * 2 * 128, eval_every=3, eval_tokens=512, sample_every=-1, compile=False, **tiny),
        "mid": lambda: mid_train.Config(recipe="offline", num_iterations=6, eval_every=3, eval_tokens=512, compile=False, **tiny),
        "sft": lambda: chat_sft.Config(sft_recipe="offline", num_iterations=6, device_batch_size=4, target_examples_per_step=8, eval_every=3, eval_steps=2,
                                       eval_metrics_every=6, eval_metrics_max_problems=4, max_new_tokens=16, init_lr_frac=0.5, compile=False, **tiny),
        "rl": lambda: chat_rl.Config(max_steps=6, examples_per_step=4, num_samples=4, max_new_tokens=16, device_batch_size=4, eval_every=6,
                                     eval_examples=4, preflight=-1, **tiny),  # these models know nothing: a preflight would refuse them
        "grpo": lambda: chat_grpo.Config(tasks="ALGEBRA:2,AQUA:1", num_steps=6, examples_per_step=6, num_samples=6, max_new_tokens=16, device_batch_size=4,
                                         eval_every=6, eval_examples=4, output_tag="g2", preflight=-1, curriculum=True, curriculum_accuracy=0.02,
                                         curriculum_window=4, dynamic_sampling=True, dynamic_rounds=3, grpo_epochs=2, minibatches=2, kl_coef=0.02, kl_every=2,
                                         attn_every=-1,
                                         temp_schedule="linear", temp_end=0.8, length_penalty_mode="linear", length_penalty_target=8, **tiny),
    }
    return dataclasses.replace(configs[stage](), **changes)


def run_stage(stage, **changes):
    modules = {"base": base_train, "mid": mid_train, "sft": chat_sft, "rl": chat_rl, "grpo": chat_grpo}
    modules[stage].main(stage_config(stage, **changes))


if __name__ == "__main__":
    changes = dict(argument.split("=") for argument in sys.argv[2:] if "=" in argument)
    flags = {name: f"--{name}" in sys.argv for name in ("resume", "overwrite")}
    run_stage(sys.argv[1], **flags | {name: ast.literal_eval(value) for name, value in changes.items()})
