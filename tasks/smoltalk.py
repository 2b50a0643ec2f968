"""SmolTalk: general conversation, the part of it made for small models (https://huggingface.co/datasets/HuggingFaceTB/smol-smoltalk).

    user       Write a short poem about the sea.
    assistant  The sea is wide, the sea is deep, ...

460,341 conversations to train on and 24,229 held out; some open with a system message. Trained on, not scored.
"""
from tasks.common import Task, register
from tasks.jsonl_chat import check_messages
from tasks.splits import load_split

SPLITS = ("train", "test")


@register("SmolTalk")
class SmolTalk(Task):
    """One split, from data_dir/{split}.jsonl or from the Hub."""

    def __init__(self, split="train", data_dir=None, **kwargs):
        super().__init__(**kwargs)
        self.split = split
        self.rows = load_split("HuggingFaceTB/smol-smoltalk", "default", split, SPLITS, data_dir, f"{split}.jsonl")

    def num_examples(self):
        return len(self.rows)

    def get_example(self, index):
        messages = self.rows[index]["messages"]
        reason = check_messages(messages)
        # checked when it is used: looking at all 460,341 first would take a minute at every start
        if reason:
            raise ValueError(f"row {index} of SmolTalk {self.split} cannot be trained on ({reason}): leave it out by start and stop, or mend the file")
        return {"messages": messages}
