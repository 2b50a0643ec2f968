"""ARC: grade-school science questions with mostly four choices (Clark et al. 2018, https://arxiv.org/abs/1803.05457).

    user       Which technology was developed most recently?
               - cellular telephone=A
               - television=B
               - refrigerator=C
               - airplane=D
               End with the line "Answer: <letter>".
    assistant  Answer: A

There is no rationale to learn from, so the letter is compared by its probability (eval_type "categorical").
"""
from tasks.aqua import MAX_LETTERS, LetterTask, answer_parts
from tasks.common import register, render_choices
from tasks.splits import load_split

PROMPT_END = 'End with the line "Answer: <letter>".'
SPLITS = ("train", "validation", "test")


class PlainChoices(LetterTask):
    """A LetterTask whose reference answer is the letter alone. Children fill self.rows with (question, choices, position of the answer)."""
    eval_type = "categorical"

    def num_examples(self):
        return len(self.rows)

    def get_example(self, index):
        question, choices, answer = self.rows[index]
        letters = list(MAX_LETTERS[:len(choices)])
        # one line per choice: a line break inside a choice would hide the others from whoever reads the list back
        prompt = render_choices(question.strip(), letters, [" ".join(str(choice).split()) for choice in choices])
        return {"messages": [{"role": "user", "content": f"{prompt}\n{PROMPT_END}"}, {"role": "assistant", "content": answer_parts("", letters[answer])}],
                "letters": letters, "answer_letter": letters[answer]}


@register("ARC-Easy", random_accuracy=0.25, subset="ARC-Easy")
@register("ARC-Challenge", random_accuracy=0.25, subset="ARC-Challenge")
class ARC(PlainChoices):
    """One split of ARC-Easy or ARC-Challenge, from data_dir/arc_{easy,challenge}_{split}.jsonl or from the Hub."""

    def __init__(self, subset="ARC-Easy", split="train", data_dir=None, **kwargs):
        super().__init__(**kwargs)
        if subset not in ("ARC-Easy", "ARC-Challenge"):
            raise ValueError(f"ARC has no subset {subset!r}: the 2 subsets are ARC-Easy and ARC-Challenge")
        rows = load_split("allenai/ai2_arc", subset, split, SPLITS, data_dir, f"{subset.lower().replace('-', '_')}_{split}.jsonl")
        self.rows = []
        for row in rows:
            labels = row["choices"]["label"]            # A, B, C, D in most rows, 1, 2, 3, 4 in some
            self.rows.append((row["question"], row["choices"]["text"], labels.index(row["answerKey"])))
