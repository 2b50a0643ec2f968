"""OpenThoughts: questions with long reasoning traces (Guha et al. 2025, https://arxiv.org/abs/2506.04178).

    user       What is the sum of the first 8 odd numbers?
    assistant  <think>
               The sum of the first n odd numbers is n squared, so 8 squared.
               </think>

               Final Answer: 64

1.2 million rows by QwQ-32B, 16 answers to each question: about 850,000 of mathematics, 250,000 of code, 100,000 of science; 28 GB.
"""
import random
from pathlib import Path

from tasks.common import load_hub_dataset, register
from tasks.reasoning import JsonLines, ReasoningTask, final_answer, in_mode, read_messages


@register("OpenThoughts")
class OpenThoughts(ReasoningTask):
    """The train split, from the Hub or a local JSON-lines file, in the seed's order. Mode cot keeps <think>...</think>,
    answer_only leaves the final answer alone. Rows that cannot be used are counted by reason in `skipped`."""

    def __init__(self, split="train", dataset_id="open-thoughts/OpenThoughts3-1.2M", local_path=None, mode="cot", shuffle=True, seed=42, **kwargs):
        super().__init__(mode, **kwargs)
        if local_path is None:
            rows = load_hub_dataset(dataset_id, None, split)
        else:
            if split != "train":
                raise ValueError(f"{local_path} is 1 split, train, and has no {split!r}: hold rows out by start and stop")
            if not Path(local_path).expanduser().is_file():
                raise ValueError(f"local_path={str(local_path)!r} is not a file, so there are 0 traces: give a JSON-lines file, or leave it out to use the Hub")
            rows = JsonLines(local_path)
        order = list(range(len(rows)))
        if shuffle:
            random.Random(seed).shuffle(order)
        self.use(rows, order)

    def read(self, row):
        messages, reason = read_messages(row)
        if reason is None:
            messages, reason = in_mode(messages, self.mode, final_answer)
        return (None, reason) if reason else ({"messages": messages}, None)
