"""Both stages on one GPU in minutes: Qwen2.5-0.5B-Instruct, 100 steps of SFT, then RL on 500 problems of GSM8K.

GSM8K is part of the SFT mixture because the reward wants its form: without having seen the last line "#### number" the model earns nothing, and RL
has nothing to compare. 01_debug_sft_rl_cpu.py is the twin for a machine without a GPU.
"""
from dev.integration_training.base_config import Config, DataConfig, DatasetSpec, ModelConfig, OutputConfig, RLConfig, SFTConfig, TargetConfig


def part(name, subset, split, max_samples):
    return DatasetSpec(name=name, split=split, subset=subset, max_samples=max_samples, filepath=None, size=None, repeat=1)


config = Config(
    target=TargetConfig(gpu_ranks=(0,), device_type="cuda"),
    model=ModelConfig(name="Qwen/Qwen2.5-0.5B-Instruct", dtype="bfloat16", compile=False),
    data=DataConfig(
        sft_mixture=(part("HuggingFaceTB/smol-smoltalk", None, "train", 1000), part("openai/gsm8k", "main", "train", 1000)),
        sft_eval_mixture=(part("openai/gsm8k", "main", "test", 200),),
        rl_mixture=(part("openai/gsm8k", "main", "train", 500),),
        rl_eval_mixture=(part("openai/gsm8k", "main", "test", 200),),
        max_length=512,
        shuffle_seed=42,
    ),
    sft=SFTConfig(
        num_epochs=1,
        num_iterations=100,
        batch_size=2,
        target_examples_per_step=8,
        optimizer="adamw",
        embedding_lr=1e-5,
        unembedding_lr=1e-5,
        matrix_lr=1e-5,
        weight_decay=0.0,
        init_lr_frac=1.0,
        warmup_ratio=0.05,
        lr_decay_style="linear",
        adam_beta1=0.9,
        adam_beta2=0.95,
        adam_eps=1e-8,
        clip_grad=1.0,
        eval_every=50,
        eval_steps=200,
        eval_max_new_tokens=256,
        checkpoint_every=50,
        log_every=10,
    ),
    rl=RLConfig(
        num_epochs=1,
        num_iterations=-1,
        examples_per_step=8,
        num_samples=8,
        batch_size=4,
        max_new_tokens=256,
        temperature=1.0,
        top_k=None,
        algorithm="reinforce",
        optimizer="adamw",
        embedding_lr=1e-6,
        unembedding_lr=1e-6,
        matrix_lr=1e-6,
        weight_decay=0.0,
        init_lr_frac=1.0,
        warmup_ratio=0.1,
        lr_decay_style="constant",
        adam_beta1=0.9,
        adam_beta2=0.95,
        adam_eps=1e-8,
        clip_grad=1.0,
        eval_every=20,
        eval_examples=200,
        save_every=20,
        log_every=1,
    ),
    output=OutputConfig(
        save_dir="results",
        log_level="info",
        experiment_name="01_debug_sft_rl",
        use_wandb=False,
        wandb_project=None,
        mode="sft+rl",
        source_checkpoint=None,
    ),
)
