"""SFT alone on the processor, four steps of a tiny Qwen2 in seconds: does all that a run needs stand where it should?"""
from dev.integration_training.base_config import Config, DataConfig, DatasetSpec, ModelConfig, OutputConfig, SFTConfig, TargetConfig

config = Config(
    target=TargetConfig(gpu_ranks=(0,), device_type="cpu"),
    model=ModelConfig(name="tiny-qwen2", dtype="float32", compile=False),
    data=DataConfig(
        sft_mixture=(
            DatasetSpec(name="ALGEBRA", split="train", subset="1,2", max_samples=200, filepath=None, size=1000, repeat=1),
            DatasetSpec(name="synthetic", split="train", subset="addition", max_samples=None, filepath=None, size=100, repeat=2),
        ),
        sft_eval_mixture=(DatasetSpec(name="ALGEBRA", split="validation", subset="1,2", max_samples=16, filepath=None, size=100, repeat=1),),
        rl_mixture=(),
        rl_eval_mixture=(),
        max_length=256,
        shuffle_seed=42,
    ),
    sft=SFTConfig(
        num_epochs=1,
        num_iterations=4,
        batch_size=4,
        target_examples_per_step=16,
        optimizer="muon",
        embedding_lr=0.003,
        unembedding_lr=0.003,
        matrix_lr=0.02,
        weight_decay=0.0,
        init_lr_frac=1.0,
        warmup_ratio=0.0,
        lr_decay_style="cosine",
        adam_beta1=0.9,
        adam_beta2=0.95,
        adam_eps=1e-8,
        clip_grad=1.0,
        eval_every=4,
        eval_steps=16,
        eval_max_new_tokens=16,
        checkpoint_every=2,
        log_every=1,
    ),
    rl=None,
    output=OutputConfig(save_dir="results", log_level="info", experiment_name="02_debug_sft", use_wandb=False, wandb_project=None, mode="sft",
                        source_checkpoint=None),
)
