"""Rollouts in a run's log: written by the RL scripts, read by scripts/rl_show.

Two tables a step, row by row about the same rollouts: "rollouts" is for people (question, completion, letter, the parts of the reward,
advantage, finish reason), "rollout_tokens" holds the ids that were sampled, which the text encoded again need not give.
"""
from dataclasses import dataclass, field

from nanochat.run_logger import read_log

READABLE, TOKENS = "rollouts", "rollout_tokens"


@dataclass
class LoggedRollout:
    """One row of both tables. What an older log does not hold is None, or empty."""
    completion: str
    letter: str | None
    rewards: dict
    advantage: float
    finish: str
    question: str | None = None
    answer: str | None = None                # the right letter
    prompt: list = field(default_factory=list)    # ids
    tokens: list = field(default_factory=list)    # ids
    mask: list = field(default_factory=list)      # 1 = sampled, 0 = forced by a tool
    logprobs: list = field(default_factory=list)  # when it was sampled, at the run's temperature

    @property
    def reward(self):
        return sum(self.rewards.values())


def log_rollouts(logger, step, groups, conversations, extract):
    """Groups of Rollouts with their advantages, and the conversation of each group -> both tables of a step. `extract(text)` gives the
    answer's letter or None."""
    of_rollouts = [(rollout, conversation) for group, conversation in zip(groups, conversations) for rollout in group]
    logger.log_text(step, TOKENS, [{"prompt": rollout.prompt, "tokens": rollout.tokens, "mask": rollout.mask,
                                    "logprobs": [round(value, 5) for value in rollout.logprobs]} for rollout, _ in of_rollouts])
    # the readable table comes last: the report shows a run's last text
    logger.log_text(step, READABLE, [
        {"question": question_of(conversation), "completion": rollout.text, "letter": extract(rollout.text) or "none",
         "answer": conversation.get("answer_letter"), **{f"reward/{name}": value for name, value in rollout.rewards.items()},
         "advantage": round(rollout.advantage, 4), "finish": rollout.finish_reason} for rollout, conversation in of_rollouts])


def question_of(conversation):
    """The last message before the reference answer, as text."""
    content = conversation["messages"][-2]["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def read_rollouts(path):
    """A run's JSONL -> (its header, {step: [group of LoggedRollouts, ...]}, {step: its metrics}). A step that a resumed run logged
    again counts once, as it was logged last."""
    header, tables, metrics = {"config": {}}, {}, {}
    for record in read_log(path):
        if isinstance(record.get("config"), dict):
            header = record
        elif isinstance(record.get("text"), dict):
            for name, rows in record["text"].items():
                tables.setdefault(record["step"], {})[name] = rows
        elif "step" in record and "image" not in record:
            metrics.setdefault(record["step"], {}).update({name: value for name, value in record.items() if name not in ("step", "time", "non_finite")})
    steps = {step: group_rows(found[READABLE], found.get(TOKENS), header["config"].get("num_samples")) for step, found in sorted(tables.items())
             if isinstance(found.get(READABLE), list)}
    return header, steps, metrics


def group_rows(rows, token_rows, num_samples):
    """Rows of both tables -> groups: rows in a row with the same prompt, or every `num_samples` where no prompt was logged."""
    token_rows = token_rows if isinstance(token_rows, list) and len(token_rows) == len(rows) else [{}] * len(rows)
    groups, keys = [], []
    for place, (row, ids) in enumerate(zip(rows, token_rows)):
        key = row.get("question") or tuple(ids.get("prompt", ())) or place // (num_samples or len(rows))
        if not groups or key != keys[-1] or len(groups[-1]) == num_samples:
            groups.append([])
            keys.append(key)
        groups[-1].append(LoggedRollout(
            row["completion"], None if row.get("letter") in (None, "none") else row["letter"],
            {name.removeprefix("reward/"): value for name, value in row.items() if name.startswith("reward/")}, row.get("advantage", 0.0),
            row.get("finish", "?"), row.get("question"), row.get("answer"),
            *(list(ids.get(name, ())) for name in ("prompt", "tokens", "mask", "logprobs"))))
    return groups


def has_signal(group):
    """Whether the group holds both right and wrong answers; without that it gave no gradient, whatever its advantages are."""
    return len({rollout.rewards.get("correct", rollout.reward) > 0 for rollout in group}) > 1
