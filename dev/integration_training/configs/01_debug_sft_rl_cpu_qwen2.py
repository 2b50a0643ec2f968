"""The CPU-sized twin of 01_debug_sft_rl: the same with a fresh two-layer Qwen2 through transformers, which learns faster: it has the digits one by one."""
from dev.integration_training.base_config import Config, DataConfig, DatasetSpec, ModelConfig, OutputConfig, RLConfig, SFTConfig, TargetConfig


def problems(split, size):
    return (DatasetSpec(name="synthetic", split=split, subset="sorting", max_samples=None, filepath=None, size=size, repeat=1),)


config = Config(
    target=TargetConfig(gpu_ranks=(0,), device_type="cpu"),
    model=ModelConfig(name="tiny-qwen2", dtype="float32", compile=False),
    data=DataConfig(sft_mixture=problems("train", 20_000), sft_eval_mixture=problems("validation", 500), rl_mixture=problems("train", 20_000),
                    rl_eval_mixture=problems("validation", 500), max_length=128, shuffle_seed=42),
    sft=SFTConfig(num_epochs=1, num_iterations=70, batch_size=8, target_examples_per_step=64, optimizer="adamw", embedding_lr=0.005, unembedding_lr=0.003,
                  matrix_lr=0.003, weight_decay=0.0, init_lr_frac=1.0, warmup_ratio=0.05, lr_decay_style="linear", adam_beta1=0.9, adam_beta2=0.95,
                  adam_eps=1e-8, clip_grad=1.0, eval_every=35, eval_steps=500, eval_max_new_tokens=16, checkpoint_every=35, log_every=10),
    rl=RLConfig(num_epochs=1, num_iterations=100, examples_per_step=32, num_samples=8, batch_size=64, max_new_tokens=16, temperature=1.0, top_k=None,
                algorithm="reinforce", optimizer="adamw", embedding_lr=0.0015, unembedding_lr=0.0015, matrix_lr=0.0015, weight_decay=0.0, init_lr_frac=1.0,
                warmup_ratio=0.1, lr_decay_style="linear", adam_beta1=0.9, adam_beta2=0.95, adam_eps=1e-8, clip_grad=1.0, eval_every=50,
                eval_examples=500, save_every=50, log_every=5),
    output=OutputConfig(save_dir="results", log_level="info", experiment_name="01_debug_sft_rl_cpu_qwen2", use_wandb=False, wandb_project=None, mode="sft+rl",
                        source_checkpoint=None),
)
