"""MBPP: mostly basic Python problems, each with three asserts that are shown and then run (Austin et al. 2021, https://arxiv.org/abs/2108.07732).

    user       Write a function to find the minimum of two numbers.
               Your code must pass these tests:
               ```python
               assert minimum(1, 2) == 1
               ```
    assistant  ```python
               def minimum(a, b):
                   return a if a <= b else b
               ```

google-research-datasets/mbpp on the Hub (CC BY 4.0): 974 problems, of which the 427 of the sanitized part were read over by hand.
"""
import json
import secrets
from pathlib import Path

from nanochat.execution import run_python
from tasks.common import Task, load_jsonl, register
from tasks.humaneval import SECONDS, extract_code
from tasks.splits import load_split

# the split of a problem by its number, in both parts, as in the paper
SPLITS = {"prompt": range(1, 11), "test": range(11, 511), "validation": range(511, 601), "train": range(601, 975)}
RELEASE = {"full": "mbpp.jsonl", "sanitized": "sanitized-mbpp.json"}  # file names of the original release, all splits in one


@register("MBPP", subset="full")
@register("MBPP-Sanitized", subset="sanitized")
class MBPP(Task):
    """One split of the full or the sanitized part, from data_dir/{split}.jsonl, from the release's own file there, or from the Hub."""

    def __init__(self, split="train", subset="full", data_dir=None, allow_weak=False, **slicing):
        super().__init__(**slicing)
        if subset not in RELEASE:
            raise ValueError(f"MBPP has no subset {subset!r}: the 2 subsets are {', '.join(RELEASE)}")
        self.allow_weak = allow_weak
        release = None if data_dir is None else Path(data_dir).expanduser() / RELEASE[subset]
        if release and release.is_file() and split in SPLITS and not (release.parent / f"{split}.jsonl").is_file():
            rows = load_jsonl(release) if release.suffix == ".jsonl" else json.loads(release.read_text(encoding="utf-8"))
            self.rows = [row for row in rows if row["task_id"] in SPLITS[split]]
        else:
            self.rows = load_split("google-research-datasets/mbpp", subset, split, tuple(SPLITS), data_dir, f"{split}.jsonl")

    def num_examples(self):
        return len(self.rows)

    def get_example(self, index):
        row = self.rows[index]
        question = (row.get("text") or row["prompt"]).strip()
        tests = "\n".join(row["test_list"])
        setup = "\n".join(filter(None, [*(row.get("test_imports") or ()), row.get("test_setup_code")]))
        code = row["code"].replace("\r", "").strip()
        return {"messages": [{"role": "user", "content": f"{question}\nYour code must pass these tests:\n```python\n{tests}\n```"},
                             {"role": "assistant", "content": f"```python\n{code}\n```"}],
                "question": question, "setup": setup, "tests": tests}

    def is_correct(self, conversation, completion):
        code = extract_code(completion)
        if not code.strip():
            return False
        # Printed behind the last assert: leaving by exit(0) or printing a guess passes no test. The setup comes first, since the code may use it.
        mark = secrets.token_hex(16)
        program = f"{conversation['setup']}\n\n{code}\n\n{conversation['tests']}\nprint({mark!r})\n"
        result = run_python(program, timeout_s=SECONDS, allow_weak=self.allow_weak)
        return result.success and result.stdout.rstrip().endswith(mark)
