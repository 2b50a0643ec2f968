"""The schema of an experiment: nested frozen dataclasses without a single default. What a run did is what its file says, all of it.

    config = Config(target=TargetConfig(...), model=ModelConfig(...), data=..., sft=..., rl=..., output=...)

A value that is left out is an error of Python's own, which names it. A value that cannot be is a ValueError here, before anything is
loaded, rented or trained. `save` and `load` are a JSON file and back, equal to the original.
"""
import dataclasses
import json
import re
import types
import typing
from dataclasses import dataclass
from pathlib import Path

MODES = ("sft", "rl", "sft+rl")
ADAMW_LIMIT = 0.01      # AdamW moves each weight by about its rate per step: 0.02, a rate of Muon's, destroys a trained model
MUON_LIMIT = 0.1
EMBEDDING_LIMIT = 0.3   # our own embedding is N(0, 1) and normalised behind: it bears rates that no other tensor does


@dataclass(frozen=True)
class TargetConfig:
    """Where it runs."""
    gpu_ranks: tuple[int, ...]      # GPUs by number, which CUDA_VISIBLE_DEVICES is set to; several share the model by FSDP2. On a CPU: one gloo rank each
    device_type: str                # cuda or cpu

    def __post_init__(self):
        check(self.device_type in ("cuda", "cpu"), f"device_type={self.device_type!r} is neither cuda nor cpu: choose one of the 2")
        check(self.gpu_ranks and len(set(self.gpu_ranks)) == len(self.gpu_ranks) and min(self.gpu_ranks) >= 0,
              f"gpu_ranks={self.gpu_ranks} must name at least 1 GPU, none twice: (0,) is the first one")


@dataclass(frozen=True)
class ModelConfig:
    name: str                       # a Hugging Face model's name or folder; a folder of our checkpoints (~/.cache/nanochat/chatsft_checkpoints/d8);
                                    # or tiny-gpt, tiny-qwen2: fresh and random, their tokenizer trained on the SFT mixture
    dtype: str                      # of the activations, float32 or bfloat16; the weights that are trained are float32
    compile: bool                   # fuse each block with torch.compile

    def __post_init__(self):
        check(self.name, "model.name is empty, so there are 0 models to train: give a name or a folder")
        check(self.dtype in ("float32", "bfloat16"), f"dtype={self.dtype!r} is neither float32 nor bfloat16: choose one of the 2")


@dataclass(frozen=True)
class DatasetSpec:
    """One part of a mixture."""
    name: str                       # a data set of the Hub (openai/gsm8k), a task of this project (ALGEBRA), custom_json, or synthetic
    split: str
    subset: str | None              # the Hub's configuration (main, ARC-Easy); the kind of a synthetic problem
    max_samples: int | None         # at most so many of its first rows (None = all)
    filepath: str | None            # custom_json: the file. Others: a local folder (or file) with the split, instead of the Hub
    size: int | None                # synthetic, ALGEBRA: how many problems are made. No other has a size to choose
    repeat: int                     # so often in one pass over the mixture

    def __post_init__(self):
        check(self.repeat >= 1, f"repeat={self.repeat} of {self.name}: 1 or more, or leave the data set out")
        check(self.max_samples is None or self.max_samples >= 1, f"max_samples={self.max_samples} of {self.name}: 1 or more, or None for all")
        check(self.name != "custom_json" or self.filepath, "custom_json has filepath=None, so there are 0 rows: name its file")
        check(self.name != "synthetic" or (self.size or 0) >= 1, f"synthetic has size={self.size}: say how many problems are to be made, 1 or more")


@dataclass(frozen=True)
class DataConfig:
    sft_mixture: tuple[DatasetSpec, ...]
    sft_eval_mixture: tuple[DatasetSpec, ...]   # held out: loss, and accuracy where its answers can be checked
    rl_mixture: tuple[DatasetSpec, ...]         # answers must be checkable
    rl_eval_mixture: tuple[DatasetSpec, ...]
    max_length: int                 # tokens of a packed row, and of a prompt with its completion
    shuffle_seed: int               # of the mixtures' order, anew in each epoch, and of every draw

    def __post_init__(self):
        check(self.max_length >= 16, f"max_length={self.max_length} holds no conversation: 16 or more, 512 is common")


@dataclass(frozen=True)
class SFTConfig:
    num_epochs: int                 # passes over the mixture
    num_iterations: int             # optimizer steps instead (-1 = off)
    batch_size: int                 # packed rows per rank per forward pass; does not change the result
    target_examples_per_step: int   # conversations per optimizer step over all ranks
    optimizer: str                  # adamw: for all tensors. muon: for the matrices inside the blocks, AdamW for the others
    embedding_lr: float
    unembedding_lr: float           # of the head, and of vectors (norms, biases); tied weights count as embedding
    matrix_lr: float
    weight_decay: float             # decoupled; not on vectors
    init_lr_frac: float             # factor on all rates
    warmup_ratio: float             # share of the steps over which they rise first
    lr_decay_style: str             # linear, cosine: to 0 at the last step; constant
    adam_beta1: float
    adam_beta2: float
    adam_eps: float
    clip_grad: float                # largest gradient norm (0 = off)
    eval_every: int                 # steps between evaluations (-1 = off)
    eval_steps: int                 # conversations per evaluation, at most one pass
    eval_max_new_tokens: int        # longest answer in it, where answers can be checked
    checkpoint_every: int           # steps between checkpoints (-1 = only the last, which is always saved)
    log_every: int                  # steps between lines of metrics

    def __post_init__(self):
        check_training("sft", self)
        check_positive("sft", self, "batch_size", "target_examples_per_step", "eval_steps", "eval_max_new_tokens", "log_every")


@dataclass(frozen=True)
class RLConfig:
    num_epochs: int                 # passes over the problems
    num_iterations: int             # optimizer steps instead (-1 = off)
    examples_per_step: int          # problems per step over all ranks
    num_samples: int                # completions per problem: a group
    batch_size: int                 # rollouts per rank per forward pass of the gradient; does not change the result
    max_new_tokens: int
    temperature: float              # of sampling, and of the log-probabilities that are trained
    top_k: int | None               # sample among the likeliest tokens only, and train on them renormalised (None = all)
    algorithm: str                  # of nanochat/rl/algorithm.py: reinforce (reward less the mean of its own group), rloo, grpo, dr_grpo, dapo, ...
    optimizer: str
    embedding_lr: float
    unembedding_lr: float
    matrix_lr: float
    weight_decay: float
    init_lr_frac: float
    warmup_ratio: float
    lr_decay_style: str
    adam_beta1: float
    adam_beta2: float
    adam_eps: float
    clip_grad: float
    eval_every: int
    eval_examples: int              # problems per evaluation, answered greedily
    save_every: int                 # steps between checkpoints (-1 = only the last, which is always saved)
    log_every: int

    def __post_init__(self):
        check_training("rl", self)
        check_positive("rl", self, "batch_size", "examples_per_step", "max_new_tokens", "eval_examples", "log_every")
        check(self.num_samples >= 2, f"num_samples={self.num_samples}: a group of one has no mean to differ from; 8 to 16 work well")
        check(self.temperature > 0, f"temperature={self.temperature}: at 0 a group is one answer many times; 1.0 works well")
        check(self.top_k is None or self.top_k >= 2, f"top_k={self.top_k} leaves nothing to choose: 2 or more, or None for all")


@dataclass(frozen=True)
class OutputConfig:
    save_dir: str                   # results go to save_dir/experiment_name; relative to dev/integration_training
    log_level: str                  # warning: no lines of progress. info. debug: also each logged step's rollouts, to read
    experiment_name: str
    use_wandb: bool                 # the JSONL is written in any case
    wandb_project: str | None
    mode: str                       # sft, rl or sft+rl: decides what is run
    source_checkpoint: str | None   # a checkpoint of this folder's to start from (None = the model itself; for rl the newest of the SFT here, if any)

    def __post_init__(self):
        check(self.mode in MODES, f"mode={self.mode!r} is not one of the {len(MODES)} modes {', '.join(MODES)}: choose one")
        check(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", self.experiment_name, re.ASCII),
              f"experiment_name={self.experiment_name!r} becomes a folder's name: use letters, digits and _ . -")
        check(self.log_level in ("debug", "info", "warning"), f"log_level={self.log_level!r} is not one of the 3 levels debug, info, warning")
        check(not self.use_wandb or self.wandb_project, "use_wandb=True with wandb_project=None: name the project")


@dataclass(frozen=True)
class Config:
    target: TargetConfig
    model: ModelConfig
    data: DataConfig
    sft: SFTConfig | None           # None where the mode has no such stage
    rl: RLConfig | None
    output: OutputConfig

    def __post_init__(self):
        for stage in self.output.mode.split("+"):
            check(getattr(self, stage) is not None, f"mode={self.output.mode!r}, but config.{stage} is None: write that stage's values")
            for mixture in (f"{stage}_mixture", f"{stage}_eval_mixture") if getattr(self, stage).eval_every > 0 else (f"{stage}_mixture",):
                check(getattr(self.data, mixture), f"mode={self.output.mode!r}, but data.{mixture} has 0 data sets: name at least one")
        check(not self.rl or self.rl.max_new_tokens < self.data.max_length,
              f"max_new_tokens={self.rl and self.rl.max_new_tokens} leaves no room for a prompt in max_length={self.data.max_length}: raise max_length")

    def save(self, path):
        from nanochat.common import write_atomic
        write_atomic(path, json.dumps(dataclasses.asdict(self), indent=1) + "\n")


def load(path):
    """A JSON file -> Config. ValueError names what is missing, unknown or of another type."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a configuration ({error}): it must be what Config.save wrote") from error
    return from_dict(Config, values, "config")


# -- checks -----------------------------------------------------------------------------------------------------------

def check(condition, problem):
    if not condition:
        raise ValueError(problem)


def check_positive(stage, config, *names):
    for name in names:
        check(getattr(config, name) >= 1, f"{stage}.{name}={getattr(config, name)} must be 1 or more")


def check_training(stage, config):
    check(config.num_iterations >= 1 or config.num_iterations == -1 and config.num_epochs >= 1,
          f"{stage}.num_epochs={config.num_epochs} and num_iterations={config.num_iterations} make 0 steps: give epochs, or steps and -1 = off")
    check(config.optimizer in ("adamw", "muon"), f"{stage}.optimizer={config.optimizer!r} is neither adamw nor muon: choose one of the 2")
    check(config.lr_decay_style in ("linear", "cosine", "constant"), f"{stage}.lr_decay_style={config.lr_decay_style!r}: use linear, cosine or constant")
    check(0 <= config.warmup_ratio < 1, f"{stage}.warmup_ratio={config.warmup_ratio} is no share of the steps: 0 or more, less than 1")
    check(0 < config.init_lr_frac <= 1, f"{stage}.init_lr_frac={config.init_lr_frac}: more than 0, at most 1, since it scales the rates down")
    check(config.clip_grad >= 0 and config.weight_decay >= 0, f"{stage}.clip_grad={config.clip_grad} and weight_decay={config.weight_decay} must be 0 or more")
    check(0 <= config.adam_beta1 < 1 and 0 <= config.adam_beta2 < 1 and config.adam_eps > 0,
          f"{stage}: adam betas {config.adam_beta1}, {config.adam_beta2} must lie in [0, 1), eps {config.adam_eps} above 0: 0.9, 0.95, 1e-8 are common")
    limits = {"embedding_lr": EMBEDDING_LIMIT, "unembedding_lr": ADAMW_LIMIT, "matrix_lr": MUON_LIMIT if config.optimizer == "muon" else ADAMW_LIMIT}
    for name, limit in limits.items():
        optimizer = "Muon" if name == "matrix_lr" and config.optimizer == "muon" else "AdamW"
        check(0 < getattr(config, name) <= limit, f"{stage}.{name}={getattr(config, name)} is no learning rate for {optimizer}, which takes more than 0 and at most {limit}: "
              "1e-5 suits a pretrained model of 0.5B, 1e-3 a fresh one of width 64")


# -- JSON -------------------------------------------------------------------------------------------------------------

def from_dict(kind, value, where):
    """A JSON value -> an instance of a type hint; ValueError says where it is not one."""
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        given = set(value) if isinstance(value, dict) else None
        if given != set(hints):
            problem = f"is {type(value).__name__}, not an object" if given is None else f"lacks {sorted(set(hints) - given)} and has the unknown {sorted(given - set(hints))}"
            raise ValueError(f"{where} {problem}: a configuration has all of the {len(hints)} values {', '.join(hints)}")
        return kind(**{name: from_dict(hint, value[name], f"{where}.{name}") for name, hint in hints.items()})
    if typing.get_origin(kind) is tuple:
        if isinstance(value, list):
            return tuple(from_dict(typing.get_args(kind)[0], item, f"{where}[{place}]") for place, item in enumerate(value))
    elif isinstance(kind, types.UnionType):
        return None if value is None else from_dict(typing.get_args(kind)[0], value, where)
    elif type(value) is kind:
        return value
    elif kind is float and type(value) is int:
        return float(value)
    raise ValueError(f"{where} is {value!r}, not of type {kind}: repair the file")
