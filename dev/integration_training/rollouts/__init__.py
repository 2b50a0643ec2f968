"""What train.py may call."""
from dev.integration_training.rollouts.training import run_rl_training, run_sft_training

__all__ = ["run_rl_training", "run_sft_training"]
