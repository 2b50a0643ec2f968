"""AQuA on eight GPUs: a mid-trained checkpoint of ours, SFT on the reference mixture with AQuA, then RL on AQuA. Curves go to W&B as well."""
from dev.integration_training.base_config import Config, DataConfig, DatasetSpec, ModelConfig, OutputConfig, RLConfig, SFTConfig, TargetConfig


def part(name, subset, split, max_samples, size=None, repeat=1):
    return DatasetSpec(name=name, split=split, subset=subset, max_samples=max_samples, filepath=None, size=size, repeat=repeat)


config = Config(
    target=TargetConfig(gpu_ranks=(0, 1, 2, 3, 4, 5, 6, 7), device_type="cuda"),
    model=ModelConfig(name="~/.cache/nanochat/mid_checkpoints/d20", dtype="bfloat16", compile=False),
    data=DataConfig(
        sft_mixture=(
            part("deepmind/aqua_rat", "raw", "train", 20_000),
            part("allenai/ai2_arc", "ARC-Easy", "train", None),         # 2.3K
            part("allenai/ai2_arc", "ARC-Challenge", "train", None),    # 1.1K
            part("openai/gsm8k", "main", "train", None),                # 7.5K
            part("HuggingFaceTB/smol-smoltalk", None, "train", 10_000),
            part("SimpleSpelling", None, "train", 600, size=600),
            DatasetSpec(name="custom_json", split="train", subset=None, max_samples=1000, filepath="~/.cache/nanochat/identity_conversations.jsonl", size=None, repeat=1),
        ),
        sft_eval_mixture=(part("deepmind/aqua_rat", "raw", "validation", None),),
        rl_mixture=(part("deepmind/aqua_rat", "raw", "train", None),),
        rl_eval_mixture=(part("deepmind/aqua_rat", "raw", "validation", None),),
        max_length=1024,
        shuffle_seed=42,
    ),
    sft=SFTConfig(
        num_epochs=1,
        num_iterations=-1,
        batch_size=8,
        target_examples_per_step=64,
        optimizer="muon",
        embedding_lr=0.004,
        unembedding_lr=0.0001,
        matrix_lr=0.0004,
        weight_decay=0.0,
        init_lr_frac=1.0,
        warmup_ratio=0.0,
        lr_decay_style="linear",
        adam_beta1=0.8,
        adam_beta2=0.95,
        adam_eps=1e-10,
        clip_grad=1.0,
        eval_every=100,
        eval_steps=254,
        eval_max_new_tokens=256,
        checkpoint_every=200,
        log_every=1,
    ),
    rl=RLConfig(
        num_epochs=1,
        num_iterations=600,
        examples_per_step=32,
        num_samples=16,
        batch_size=8,
        max_new_tokens=256,
        temperature=1.0,
        top_k=None,
        algorithm="reinforce",
        optimizer="muon",
        embedding_lr=0.004,
        unembedding_lr=0.0001,
        matrix_lr=0.0004,
        weight_decay=0.0,
        init_lr_frac=1.0,
        warmup_ratio=0.025,
        lr_decay_style="linear",
        adam_beta1=0.8,
        adam_beta2=0.95,
        adam_eps=1e-10,
        clip_grad=1.0,
        eval_every=60,
        eval_examples=254,
        save_every=60,
        log_every=1,
    ),
    output=OutputConfig(
        save_dir="results",
        log_level="info",
        experiment_name="03_aqua_sft_rl_8gpu",
        use_wandb=True,
        wandb_project="nanochat-aquarat",
        mode="sft+rl",
        source_checkpoint=None,
    ),
)
