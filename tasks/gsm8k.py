"""GSM8K: grade-school word problems with calculator calls in the reference answers (Cobbe et al. 2021, https://arxiv.org/abs/2110.14168).

    user       Weng earns $12 an hour for babysitting. Yesterday, she just did 50 minutes of babysitting. How much did she earn?
    assistant  Weng earns 12/60 = $[python 12/60][output 0.2]0.2 per minute.
               Working 50 minutes, she earned 0.2 x 50 = $[python 0.2*50][output 10]10.
               #### 10
"""
import re

from tasks.common import Task, message_text, register
from tasks.rewards import parse_number, same_number
from tasks.splits import load_split

SPLITS = ("train", "test")
CALL = re.compile(r"<<([^<>=]*)=([^<>]*)>>")            # <<12/60=0.2>>: what the calculator is asked, what it says


def extract_number(text):
    """The number, as written, of a last non-empty line `#### number`; None where the text ends in any other way."""
    last = text.rstrip().rpartition("\n")[2].strip()
    number = last.removeprefix("####").strip()
    return number if last.startswith("####") and parse_number(number) is not None else None


class NumberTask(Task):
    """A task whose answers end with a line `#### number`. Equal values are equal answers: 1,000 is 1000.0."""

    def find_answer(self, conversation, text):
        number = extract_number(text)
        return None if number is None else str(parse_number(number))

    def is_correct(self, conversation, completion):
        number = extract_number(completion)
        return number is not None and same_number(number, extract_number(message_text(conversation["messages"][-1])))


def answer_parts(answer):
    """GSM8K's text with <<expression=result>> -> text, python and python_output parts."""
    parts, end = [], 0
    for call in CALL.finditer(answer):
        if call.start() > end:
            parts.append({"type": "text", "text": answer[end:call.start()]})
        parts += [{"type": "python", "text": call[1]}, {"type": "python_output", "text": call[2]}]
        end = call.end()
    return parts + ([{"type": "text", "text": answer[end:]}] if end < len(answer) else [])


@register("GSM8K")
class GSM8K(NumberTask):
    """One split, from data_dir/{split}.jsonl or from the Hub. Guessing scores nothing: the answer is any number."""

    def __init__(self, split="train", data_dir=None, **kwargs):
        super().__init__(**kwargs)
        self.rows = load_split("openai/gsm8k", "main", split, SPLITS, data_dir, f"{split}.jsonl")

    def num_examples(self):
        return len(self.rows)

    def get_example(self, index):
        row = self.rows[index]
        return {"messages": [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": answer_parts(row["answer"])}]}
