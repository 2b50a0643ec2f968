"""HumanEval: complete a Python function; judged by running its tests in the sandbox (Chen et al. 2021, https://arxiv.org/abs/2107.03374).

    user       Complete this Python function:
               ```python
               def add(x: int, y: int):
                   \"\"\"Add two numbers x and y\"\"\"
               ```
    assistant  ```python
               def add(x: int, y: int):
                   \"\"\"Add two numbers x and y\"\"\"
                   return x + y
               ```
"""
import re
import secrets

from nanochat.execution import run_python
from tasks.common import Task, register
from tasks.splits import load_split

FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
SECONDS = 10.0                                          # the slowest of the 164 reference answers takes less than half a second


def extract_code(text):
    """The code of the first fenced block, or the whole text where nothing is fenced."""
    fenced = FENCE.search(text)
    return fenced[1] if fenced else text


def judged_program(prompt, code, entry_point, test, mark):
    """The program that prints `mark` exactly when the code passes the test.

    The prompt stands first, with a body that is only its docstring: its imports and helper functions are needed, and a whole
    function in the code replaces it. Code that does not define the function is taken as the rest of its body."""
    if not re.search(rf"^(?:async\s+)?def\s+{re.escape(entry_point)}\b", code, re.MULTILINE):
        program = f"{prompt}{code}"
    else:
        program = f"{prompt}    pass\n\n{code}"
    # The mark is drawn anew each time: leaving by exit(0) or printing a guess passes no test.
    return f"{program}\n\n{test}\n\ncheck({entry_point})\nprint({mark!r})\n"


@register("HumanEval")
class HumanEval(Task):
    """The one split, test, from data_dir/HumanEval.jsonl or from the Hub."""

    def __init__(self, split="test", data_dir=None, allow_weak=False, **kwargs):
        super().__init__(**kwargs)
        self.allow_weak = allow_weak                    # run the model's code without a sandbox where there is none
        self.rows = load_split("openai/openai_humaneval", "openai_humaneval", split, ("test",), data_dir, "HumanEval.jsonl")

    def num_examples(self):
        return len(self.rows)

    def get_example(self, index):
        row = self.rows[index]
        return {"messages": [{"role": "user", "content": f"Complete this Python function:\n```python\n{row['prompt'].rstrip()}\n```"},
                             {"role": "assistant", "content": f"```python\n{row['prompt']}{row['canonical_solution'].rstrip()}\n```"}],
                "question": row["prompt"], "entry_point": row["entry_point"], "prompt": row["prompt"], "test": row["test"]}

    def is_correct(self, conversation, completion):
        code = extract_code(completion)
        if not code.strip():
            return False
        mark = secrets.token_hex(16)
        program = judged_program(conversation["prompt"], code, conversation["entry_point"], conversation["test"], mark)
        result = run_python(program, timeout_s=SECONDS, allow_weak=self.allow_weak)
        return result.success and result.stdout.rstrip().endswith(mark)
