"""A curriculum over the levels of a task: the next level opens when the newest open one is answered right often enough."""


class Curriculum:
    """`open` levels are asked, equally often each. What it must remember is `state`, JSON-able, to be kept in the checkpoint.

    A level counts as mastered when over its last `window` groups the mean accuracy of the rollouts reaches `threshold`."""

    def __init__(self, tasks, levels, threshold, window, state=None):
        if not 0 < threshold <= 1 or window < 1:
            raise ValueError(f"curriculum_accuracy={threshold} and curriculum_window={window}: use a share above 0 and up to 1, and 1 group or more")
        self.tasks = set(tasks)                         # names; the other tasks of a mixture have no part in it
        self.levels, self.threshold, self.window = tuple(sorted(levels)), threshold, window
        self.state = {"open": 1, "recent": []} if state is None else state

    @classmethod
    def over(cls, tasks, threshold, window, state=None):
        """A curriculum over the levels of those tasks {name: task} that have some; ValueError where none has."""
        levels = {name: task.levels for name, task in tasks.items() if hasattr(task, "with_levels")}
        if not levels:
            raise ValueError(f"curriculum: not one of the {len(tasks)} tasks {', '.join(tasks)} has levels: leave it out, or use ALGEBRA, which has four")
        return cls(levels, set().union(*levels.values()), threshold, window, state)

    @property
    def open(self):
        return self.levels[:self.state["open"]]

    def record(self, groups, compute):
        """Groups of Rollouts on this rank, whose conversations say their "level" -> metrics. The same on every rank."""
        newest, recent = self.open[-1], self.state["recent"]
        mine = [(group[0].place, sum(rollout.rewards["correct"] > 0 for rollout in group) / len(group)) for group in groups
                if group[0].conversation["task"] in self.tasks and group[0].conversation["level"] == newest]
        recent += [accuracy for _, accuracy in sorted(entry for rank in compute.gather_objects(mine) for entry in rank)]
        del recent[:-self.window]
        metrics = {"curriculum/level": newest}
        if recent:
            metrics["curriculum/accuracy"] = sum(recent) / len(recent)
        if len(recent) == self.window and sum(recent) / self.window >= self.threshold and self.state["open"] < len(self.levels):
            self.state.update(open=self.state["open"] + 1, recent=[])
        return metrics
