"""Reinforcement learning on a mixture of tasks: GRPO and its kin, several updates per rollout, a frozen reference, a curriculum.

    python -m scripts.chat_grpo --tasks="AQUA:0.7,GSM8K:0.3" --num_steps=200
    python -m scripts.chat_grpo --tasks=ALGEBRA --curriculum --algorithm=dapo --dynamic_sampling
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_grpo -- --run=demo --kl_coef=0.02 --kl_mode=exact

chat_rl's loop, line by line, where the papers do not differ. `--algorithm` chooses advantage, loss and denominator together: reinforce,
rloo, grpo, dr_grpo, dapo, gspo, cispo (nanochat/rl/algorithm.py names their papers), and expert, which is supervised training on
one's own right answers: the control arm, with the same problems and the same samples. A killed run resumed ends at the same weights.
"""
from dataclasses import dataclass

from nanochat.checkpoint_manager import load_model, refuse_own_parent, save_checkpoint, start_or_resume
from nanochat.common import base_dir, print0
from nanochat.compute import compute_cleanup, compute_init
from nanochat.configurator import config_dict, inherit, parse
from nanochat.engine import Engine
from nanochat.interpretability.attention_metrics import attention_metrics
from nanochat.interpretability.plots import save_attention_pictures
from nanochat.interpretability.rollout_log import log_rollouts
from nanochat.optim import MuonAdamW
from nanochat.report import add_section
from nanochat.rl.curriculum import Curriculum
from nanochat.rl.letter_metrics import letter_metrics
from nanochat.rl.metrics import Clock, rollout_metrics
from nanochat.rl.preflight import preflight
from nanochat.rl.reference import load_reference
from nanochat.rl.rollout import Sampler, make_batches
from nanochat.rl.safety import batch_keeper, check_finite, check_sizes, count_silence, stop_if_silent, warn_of_kl, watch_entropy
from nanochat.rl.update import Objective, learn, prepare
from nanochat.run_logger import RunLogger
from nanochat.schedules import between, linear_decay, warmup
from nanochat.sharding import refill, whole_model
from nanochat.training import every, seed_everything, steps
from tasks.aqua import extract_answer
from tasks.common import message_text
from tasks.problems import Problems, accuracies, load_tasks, parse_weights
from tasks.rewards import length_penalty


@dataclass(frozen=True)
class Config:
    """Reinforcement learning on a mixture of tasks: GRPO and its kin, several updates per rollout, a frozen reference, a curriculum."""
    run: str = "dummy"                  # name of the wandb run ("dummy" = no wandb)
    tasks: str = "AQUA"                 # tasks to learn with their weights, as in "AQUA:0.5,GSM8K:0.3,ALGEBRA:0.2"
    source: str = "sft"                 # stage to start from: mid, sft or rl
    model_tag: str | None = None        # folder of the parent checkpoint (None = the one saved last)
    output_tag: str | None = None       # folder of the result (None = the parent's)
    step: int | None = None             # step of the parent checkpoint (None = the newest)
    ref_source: str | None = None       # stage of the frozen reference (None = the model training starts from, for all three)
    ref_model_tag: str | None = None    # folder of the reference's checkpoint (None = the parent's)
    ref_step: int | None = None         # step of the reference's checkpoint (None = the parent's, or the newest of another stage or folder)
    device_type: str = ""               # cuda, mps or cpu ("" = the best there is)
    dtype: str = ""                     # float32 or bfloat16 ("" = bfloat16 where the hardware has it)
    shard: str = "none"                 # full: divide weights, gradients and optimizer over the ranks (FSDP2); each keeps a whole copy in `dtype` to sample with
    seed: int = 42                      # seed of the order of problems and of every draw
    data_dir: str | None = None         # folder of a task's splits, or one that holds aqua/, gsm8k/, ... (None = where the tasks look by themselves)
    permute_options: bool = True        # multiple choice: options stand in another order at every visit, the right letters balanced; a group shares one
    num_steps: int = 1000               # steps, each with its own rollouts
    # Rollouts
    examples_per_step: int = 16         # problems per step over all ranks
    num_samples: int = 16               # completions per problem
    max_prompt_tokens: int = -1         # longer prompts are left out, never cut (-1 = as long as max_new_tokens, or half the context, stay free)
    max_new_tokens: int = 256           # longest completion; 128 tokens hold 94 % of AQuA's own answers, 256 hold 99 %
    temperature: float = 1.0            # of sampling, and of the log-probabilities that are trained, where temp_schedule is none
    temp_schedule: str = "none"         # linear or cosine: the temperature goes from temp_start to temp_end over the run
    temp_start: float = 1.0             # temperature at the first step of a schedule
    temp_end: float = 1.0               # temperature at the last step of a schedule
    top_k: int | None = None            # sample among the likeliest tokens only, and train on them renormalised; with one update a step (None = all)
    dynamic_sampling: bool = False      # ask new problems for groups that came back without signal
    dynamic_rounds: int = 4             # at most so many rounds of asking; then the step goes on with what there is
    device_batch_size: int = 8          # rows per rank per forward pass of the gradient; does not change the result
    rows_in_flight: int = 256           # rows per rank that the engine decodes at once; does not change the result
    # Curriculum, for tasks with levels (ALGEBRA)
    curriculum: bool = False            # begin with the first level; the next opens when the newest open one is mastered
    curriculum_accuracy: float = 0.8    # mean accuracy that counts as mastered
    curriculum_window: int = 64         # groups of the newest level over which it is taken
    # Reward
    reward_mode: str = "task"           # task: the sum of the task's parts; dapo: 1 for a right answer, else 0
    format_bonus: float = 0.1           # multiple choice: reward for any valid letter (0 = off); it never makes a group count as signal
    length_penalty_mode: str = "none"   # linear: minus coef for each token beyond target; dapo: minus coef times a ramp from target to the limit
    length_penalty_coef: float = 0.001  # how much it weighs
    length_penalty_target: int = 256    # tokens that are free
    length_penalty_floor: float = 0.0   # linear: the largest penalty (0 = no limit)
    # Objective
    algorithm: str = "grpo"             # reinforce, rloo, grpo, dr_grpo, dapo, gspo, cispo, or expert (the control arm)
    grpo_epochs: int = 1                # passes over a step's rollouts
    minibatches: int = 1                # optimizer steps per pass; groups stay whole
    clip_ratio_low: float | None = None   # how far a token's probability may fall before its pull ends (None = the algorithm's paper)
    clip_ratio_high: float | None = None  # how far it may rise (None = the algorithm's paper)
    advantage_clip: float = 5.0         # largest advantage, either way (-1 = off)
    kl_coef: float = 0.0                # weight of the KL to the reference (0 = off; it is measured all the same)
    kl_mode: str = "k3"                 # k1: sampled, into the reward; k3: sampled, times ratio, into the loss; exact: whole vocabulary, into the loss
    kl_max_threshold: float = 50.0      # a token whose log-probability is this far from the reference's is worth a warning
    # Optimizer
    embedding_lr: float = 0.2           # AdamW learning rate of the embedding, at width 768
    unembedding_lr: float = 0.004       # AdamW learning rate of the head, at width 768
    matrix_lr: float = 0.02             # Muon learning rate of the matrices in the blocks
    init_lr_frac: float = 0.05          # factor on all learning rates
    warmup_steps: int = 15              # steps over which it rises first, while the optimizer's averages fill (0 = off)
    lr_schedule: str = "linear"         # linear: falls to 0 at the last step; constant
    weight_decay: float = 0.0           # decoupled weight decay
    grad_clip: float = 1.0              # largest gradient norm (0 = off)
    # Watching
    preflight: int = 32                 # groups sampled before the first step, to see whether there is anything to learn (-1 = no preflight)
    stop_without_signal: int = 50       # steps in a row without a group of right and wrong answers that end the run (-1 = never)
    eval_every: int = 60                # steps between accuracies on the validation split (-1 = off)
    eval_examples: int = 400            # problems per accuracy
    eval_samples: int = 1               # completions per problem: 1 = greedy; more are sampled at `temperature`, for pass@k and maj@k
    kl_every: int = 20                  # steps between KL to the reference, letter margin, exact entropy (-1 = off)
    attn_every: int = 60                # steps between attention metrics and pictures (-1 = off)
    rollouts_every: int = 20            # steps between rollouts written to the run's log (-1 = off)
    save_every: int = 60                # steps between checkpoints (-1 = only the last)
    keep_last: int = 1                  # checkpoints kept (-1 = all)
    resume: bool = False                # go on from the newest whole checkpoint, if there is one: of this very run, or it is refused
    overwrite: bool = False             # delete the checkpoints of an earlier run under this model tag; with resume only where they are of another run


def main(config):
    compute = compute_init(config.device_type, config.dtype)
    seed_everything(config.seed)
    check(config, compute)

    # Policy, optimizer, engine: one set of weights, which samples and is trained; divided over the ranks, it is trained, and its whole copy samples
    model, tokenizer, parent = load_model(config.source, compute, "train", config.model_tag, config.step, shard=config.shard)
    config = inherit(config, {"model_tag": parent["model_tag"], "output_tag": parent["model_tag"], "step": parent["step"]}, "model_tag", "output_tag", "step")
    optimizer = MuonAdamW(model, compute, config.embedding_lr, config.unembedding_lr, config.matrix_lr, config.weight_decay)
    refuse_own_parent("rl", config.source, config)
    state = start_or_resume("rl", config.output_tag, config, compute, model, optimizer, tokenizer, parent)
    policy = whole_model(model, compute)
    engine = Engine(policy, tokenizer, max_rows=config.rows_in_flight)
    reference, is_parent = None, False
    if config.kl_every > 0 or config.kl_coef > 0:
        reference, is_parent = load_reference((config.ref_source, config.ref_model_tag, config.ref_step), (config.source, config.model_tag, config.step), compute)

    # Problems
    weights = parse_weights(config.tasks)
    train_tasks, val_tasks = load_tasks(weights, config.data_dir, config.format_bonus)
    problems = Problems(train_tasks, weights, config.seed, config.permute_options)
    letters = sorted({letter for task in train_tasks.values() for letter in task[0].get("letters", ())})
    sampler = Sampler(engine, tokenizer, problems, compute, config.num_samples, config.max_new_tokens, config.top_k, config.max_prompt_tokens)
    curriculum = None
    if config.curriculum:
        curriculum = Curriculum.over(train_tasks, config.curriculum_accuracy, config.curriculum_window, state.extra.get("curriculum"))
        state.extra["curriculum"] = curriculum.state
    place = state.extra.get("place", 0)  # dynamic sampling asks more problems in some steps than in others
    print0(f"grpo {config.model_tag}: {config.algorithm} on {', '.join(f'{name} {weight:.0%}' for name, weight in weights.items())}, {config.num_steps} steps of "
           f"{config.examples_per_step} problems x {config.num_samples} samples, {config.grpo_epochs * config.minibatches} updates each")

    logger = RunLogger("rl", config, compute, config.num_steps, resume_step=state.step - 1 if state.step else None, model_tag=config.output_tag)
    if config.preflight > 0 and state.step == 0:
        rows, metrics = preflight(problems, lambda conversation: message_text(conversation["messages"][-1]), sampler, reference, is_parent,
                                  config.preflight, temperature_at(0, config), config.seed, config.device_batch_size, curriculum and curriculum.open)
        logger.log_text(0, "preflight", rows)
        logger.log(0, metrics)
    accuracy = {}

    def save(finished=False):
        save_checkpoint("rl", config.output_tag, state, config, compute, model, optimizer, tokenizer, config.keep_last, finished, parent)

    for step in steps(state, config.num_steps, compute, save):  # the extra pass only evaluates and saves
        clock = Clock(compute)
        if every(config.eval_every, step, config.num_steps):
            accuracy = accuracies(val_tasks, weights, engine, tokenizer, compute, config.eval_examples, config.max_new_tokens, config.eval_samples, config.temperature)
            logger.log(step, {**accuracy, "time/eval_s": clock.lap()})
        if step > 0 and every(config.save_every, step, config.num_steps) or step == config.num_steps:
            save(finished=step == config.num_steps)
        if step == config.num_steps:
            break

        # Rollouts of this rank's share of the step's problems
        clock.lap()
        temperature, first = temperature_at(step, config), place
        groups, place = sampler.sample_step(first, config.examples_per_step, temperature, config.dynamic_rounds if config.dynamic_sampling else 1,
                                            curriculum and curriculum.open)
        state.extra["place"] = place
        for rollout in sum(groups, []) if config.length_penalty_mode != "none" else ():
            rollout.rewards["length"] = length_penalty(config.length_penalty_mode, len(rollout.tokens), config.max_new_tokens, config.length_penalty_coef,
                                                       config.length_penalty_target, config.length_penalty_floor)
        metrics = rollout_metrics(groups, compute, extract_answer, letters, config.num_samples, by_task=True)
        metrics |= {"rl/problems": place - first, "rl/temperature": temperature, "rl/group_size": config.num_samples, "time/generate_s": clock.lap()}
        keep = batch_keeper("rl", config.output_tag, step, compute, tokenizer)
        conversations = [group[0].conversation for group in groups]
        objective = objective_of(config, temperature)

        # Telemetry of the policy that sampled, before it moves
        if every(config.kl_every, step, config.num_steps):
            watched = letter_metrics(policy, reference, tokenizer, groups, conversations, compute, config.device_batch_size, temperature)
            check_finite(step, watched, lambda: make_batches(sum(groups, []), config.device_batch_size, tokenizer.bos_id, compute.device), keep)
            watch_entropy(state, watched)
            metrics |= watched
        if every(config.attn_every, step, config.num_steps) and compute.is_master and groups:
            some = sum(groups, [])[:8]
            metrics |= attention_metrics(policy, tokenizer, [rollout.prompt + rollout.tokens for rollout in some], [len(rollout.prompt) for rollout in some])
            folder = base_dir() / "runs" / f"rl_{config.output_tag}_attention" / f"step_{step:06d}"
            for path in save_attention_pictures(policy, tokenizer, some[0].prompt + some[0].tokens, len(some[0].prompt), folder):
                logger.log_image(step, f"attn/{path.stem}", path)
        metrics["time/watch_s"] = clock.lap()

        # Updates on the groups that hold both right and wrong answers
        minibatches = prepare(groups, objective, policy, reference, compute, config.device_batch_size, tokenizer.bos_id, config.minibatches,
                              f"minibatches|{config.seed}|{step}")
        if every(config.rollouts_every, step, config.num_steps):
            log_rollouts(logger, step, groups[:2], conversations[:2], extract_answer)
        decay = linear_decay(step, config.num_steps) if config.lr_schedule == "linear" else 1.0
        lr_mult = config.init_lr_frac * warmup(step, config.warmup_steps) * decay
        learned = learn(model, optimizer, minibatches, objective, compute, step, lr_mult, config.grad_clip, config.grpo_epochs, reference, keep)
        refill(policy, model)
        engine.refresh()
        if curriculum:
            metrics |= curriculum.record(groups, compute)
        metrics |= {**learned, "time/train_s": clock.lap()}
        warn_of_kl(step, metrics, config.kl_max_threshold)
        sampled = compute.sum(sum(len(rollout.tokens) for group in groups for rollout in group))
        state.tokens += learned.get("train/tokens", 0)
        state.seconds += metrics["time/generate_s"] + metrics["time/train_s"]
        silent = count_silence(state, bool(learned))
        metrics |= {"num_tokens": sampled, "tokens_per_s/generate": sampled / metrics["time/generate_s"], **silent,
                    "tokens_per_s/train": learned.get("train/tokens", 0) / metrics["time/train_s"]}
        logger.log(step, metrics)
        stop_if_silent(state, config.stop_without_signal)

    if compute.is_master:
        add_section("rl", f"Reinforcement learning ({config.algorithm}) of `{config.model_tag}` on {config.tasks}: {config.num_steps} steps, {state.seconds:.0f} s, "
                    f"{state.extra.get('steps_without_signal', 0)} steps without signal.",
                    {"config": config_dict(config), "tokens": state.tokens, "seconds": state.seconds, **accuracy})
    logger.close()
    compute_cleanup()


def check(config, compute):
    """ValueError for what cannot be."""
    check_sizes(config, compute)
    for name, allowed in (("temp_schedule", ("none", "linear", "cosine")), ("lr_schedule", ("linear", "constant")), ("reward_mode", ("task", "dapo")),
                          ("length_penalty_mode", ("none", "linear", "dapo"))):
        if getattr(config, name) not in allowed:
            raise ValueError(f"{name}={getattr(config, name)!r} is not one of {', '.join(allowed)}: choose one of them")
    if min(config.num_steps, config.grpo_epochs, config.minibatches, config.dynamic_rounds) < 1:
        raise ValueError(f"num_steps={config.num_steps}, grpo_epochs={config.grpo_epochs}, minibatches={config.minibatches} and "
                         f"dynamic_rounds={config.dynamic_rounds} must each be 1 or more: raise what is too small")
    if config.top_k is not None and config.grpo_epochs * config.minibatches > 1:
        raise ValueError(f"top_k={config.top_k} with {config.grpo_epochs * config.minibatches} updates a step: after the first one other tokens are the likeliest, and "
                         "a ratio of two distributions over different sets says nothing; leave top_k out, or use --grpo-epochs=1 --minibatches=1")
    if config.length_penalty_mode != "none":
        length_penalty(config.length_penalty_mode, 0, config.max_new_tokens, config.length_penalty_coef, config.length_penalty_target)
    for step in (0, config.num_steps):
        objective_of(config, temperature_at(step, config))


def objective_of(config, temperature):
    clip = {"clip_low": config.clip_ratio_low, "clip_high": config.clip_ratio_high}
    return Objective(temperature, config.algorithm, config.top_k, {name: value for name, value in clip.items() if value is not None}, config.advantage_clip,
                     config.reward_mode == "dapo", config.max_new_tokens, config.kl_coef, config.kl_mode)


def temperature_at(step, config):
    if config.temp_schedule == "none":
        return config.temperature
    return between(config.temp_start, config.temp_end, step, config.num_steps, config.temp_schedule)


if __name__ == "__main__":
    main(parse(Config))
