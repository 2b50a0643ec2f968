"""AQuA-RAT: a word problem, five options, a rationale, one letter (Ling et al. 2017, https://arxiv.org/abs/1705.04146).

    user       A train runs 60 km in 2 hours. What is its speed?
               - 20 km/h=A
               - 30 km/h=B
               ...
               Reason, then end with the line "Answer: <letter>".
    assistant  60 / 2 = 30
               Answer: B

The only file that knows how an answer ends: every task with this ending (tasks/algebra.py) is a LetterTask.
"""
import json
import random
import re
from collections import Counter
from pathlib import Path

from nanochat.common import base_dir, env
from tasks.common import Task, balanced, load_hub_dataset, load_jsonl, message_text, no_collection, register, render_choices

INSTRUCTION = 'Reason, then end with the line "Answer: <letter>".'
MAX_LETTERS = "ABCDEFGH"                                # options per question: 2 to 8
FILES = {"train": ("train.jsonl", "train.json"), "validation": ("validation.jsonl", "dev.jsonl", "dev.json"),
         "test": ("test.jsonl", "test.json")}           # ours first, then the names of the original release
RAW_FIELDS = ("question", "options", "rationale", "correct")
COUNTS_FILE = "counts.json"                             # written by the preparing scripts: {split: {"rows": ...}}


# ---------------------------------------------------------------------------------------------------------------------
# Judging

def extract_answer(text, letters="ABCDE"):
    """The letter that a completion answers with, or None. Only its last non-empty line counts, and it must be, as a whole,

        Answer: X        with X one of `letters`; "answer" in any case, blanks allowed after the colon
        Answer: (X)      the letter in parentheses; a period may follow either
        Answer: **X**    markdown bold around the letter, around "Answer:", or around the line

    A lower-case letter, two letters, more words or a letter without "Answer:" are no answer: a fallback to lone letters would
    reward the article "a"."""
    if not letters:
        return None
    one = f"[{re.escape(''.join(letters))}]"
    X = rf"(?:{one}|\({one}\))\.?"
    ANSWER = "(?i:answer):"                              # any case here, but not for the letters
    line = rf"{ANSWER}[ \t]*(?:{X}|\*\*{X}\*\*\.?)|\*\*{ANSWER}\*\*[ \t]*{X}|\*\*{ANSWER}[ \t]*{X}\*\*\.?"
    last = text.rstrip().rpartition("\n")[2].strip()
    if not re.fullmatch(line, last, re.ASCII):          # ASCII: else (?i:s) would match the long s, ſ
        return None
    return re.search(one, last.partition(":")[2])[0]


class LetterTask(Task):
    """A task whose conversations carry "letters" and "answer_letter" and are answered by a last line "Answer: X"."""
    eval_type = "generative"

    def __init__(self, format_bonus=0.1, **slicing):
        super().__init__(**slicing)
        self.format_bonus = format_bonus                # reward for any valid letter; 0 switches it off

    def question(self, conversation):
        prompt = super().question(conversation)
        try:
            return split_choices(prompt, conversation["letters"])[0]
        except ValueError:                              # a prepared row that shows its options in another way
            return prompt

    def find_answer(self, conversation, text):
        return extract_answer(text, conversation["letters"])

    def is_correct(self, conversation, completion):
        return extract_answer(completion, conversation["letters"]) == conversation["answer_letter"]

    def rewards(self, conversation, completion):
        letter = extract_answer(completion, conversation["letters"])
        return {"correct": float(letter == conversation["answer_letter"]), "format": self.format_bonus * (letter is not None)}


# ---------------------------------------------------------------------------------------------------------------------
# Rows become conversations

def render_prompt(question, letters, choices):
    return f"{render_choices(question, letters, choices)}\n{INSTRUCTION}"


def answer_parts(rationale, letter):
    """The reference answer as two text parts: the reasoning, and the answer on its own line."""
    if not rationale:
        return [{"type": "text", "text": f"Answer: {letter}"}]
    return [{"type": "text", "text": rationale}, {"type": "text", "text": f"\nAnswer: {letter}"}]


def build_conversation(question, choices, rationale, letter):
    letters = list(MAX_LETTERS[:len(choices)])
    return {"messages": [{"role": "user", "content": render_prompt(question, letters, choices)},
                         {"role": "assistant", "content": answer_parts(rationale, letter)}],
            "letters": letters, "answer_letter": letter}


def permuted(conversation, permutation):
    """The conversation with its choices in another order: letter i now stands behind the choice that was at permutation[i].

    An int is a cyclic shift: the choice at position i moves to i + shift. The result says in "permutation" what was done, so
    that an evaluator can tell which choice a letter meant. In a rationale only a closing option line is changed."""
    letters = conversation["letters"]
    n = len(letters)
    if isinstance(permutation, int):
        permutation = [(i - permutation) % n for i in range(n)]
    if sorted(permutation) != list(range(n)):
        raise ValueError(f"{permutation} is not an order of the {n} choices: give each of 0..{n - 1} once, or an int to shift by")
    user = next(i for i in reversed(range(len(conversation["messages"]))) if conversation["messages"][i]["role"] == "user")
    before, choices, after = split_choices(message_text(conversation["messages"][user]), letters)
    letter = letters[permutation.index(letters.index(conversation["answer_letter"]))]
    messages = list(conversation["messages"])
    messages[user] = {**messages[user], "content": render_choices(before, letters, [choices[i] for i in permutation]) + after}
    answer = message_text(messages[-1])
    assert extract_answer(answer, letters) == conversation["answer_letter"], f"the reference answer ends with {answer[-40:]!r}"
    rationale, line = answer.rstrip().rpartition("\n")[0], f"{choices[letters.index(conversation['answer_letter'])]}="
    if rationale.endswith(line + conversation["answer_letter"]):  # it ends with the option's line, as the embedded algebra's do
        rationale = rationale[:-1] + letter
    messages[-1] = {**messages[-1], "content": answer_parts(rationale, letter)}
    return {**conversation, "messages": messages, "answer_letter": letter, "permutation": list(permutation)}


def split_choices(prompt, letters):
    """A rendered prompt -> (text before, choices, text after); ValueError if the lines `- choice=LETTER` are not there."""
    lines = prompt.split("\n")
    for start in reversed(range(len(lines) - len(letters) + 1)):
        block = lines[start:start + len(letters)]
        if all(line.startswith("- ") and line.endswith(f"={letter}") for line, letter in zip(block, letters)):
            choices = [line[2:-len(letter) - 1] for line, letter in zip(block, letters)]
            return "\n".join(lines[:start]), choices, "".join(f"\n{line}" for line in lines[start + len(letters):])
    raise ValueError(f"the prompt has no lines '- choice=LETTER' for the {len(letters)} letters {''.join(letters)}: "
                     f"render it by tasks.common.render_choices ({prompt[:60]!r}...)")


LABEL = re.compile(r"\s*[(\[]?\s*([A-Ha-h])\s*[)\].:]\s*(.*)", re.DOTALL)


def parse_options(options):
    """["A)21", "(b) x", ...] -> the choice texts in letter order. A label counts only if it is the letter of its place, or if
    the labels of all options together are the first letters in some order; any other beginning belongs to the text."""
    texts = [" ".join(str(option).split()) for option in options]
    labels = [LABEL.fullmatch(text) for text in texts]
    expected = MAX_LETTERS[:len(texts)]
    if all(labels) and sorted(label[1].upper() for label in labels) == list(expected):
        return [label[2] for label in sorted(labels, key=lambda label: label[1].upper())]
    return [label[2] if label and label[1].upper() == letter else text for text, label, letter in zip(texts, labels, expected)]


# The ways in which 85 % of the rationales say the letter at their end. It is said again, once and in one style, by answer_parts.
NOUN = r"(?:answers?|answe|anwer|asnwer|ans|option|choice|opt|oa|imo)\b"
LINK = r"(?:[\s:;\-–—=.,(\[{*\"'“‘]|\b(?:is|are|was|be|will|would|must|should|hence|option|choice|letter|answer|ans|the|correct)\b)*"
TAIL = r"(?:[\s.!)\]}*\"'”’]*|\s*[)\]:.,=][^\n]{0,100}|\s+\([^\n]{0,60}\)\W*|\s+[$₹]?\d[\d.,%]*\W*)"
STATEMENTS = tuple(re.compile(pattern, re.IGNORECASE) for pattern in (
    rf"(?<![a-z]){NOUN}{LINK}(?<![a-z])([A-H]){TAIL}$",                                          # the answer is B. / Ans: (B) 42
    r"(?<![a-z])[(\[]?([A-H])[)\]]?\s+is\s+(?:(?:the|our)\s+)?"                                   # B is the right option.
    r"(?:correct|right|best|required|answer|option|choice)(?:\s+(?:answer|option|choice|one))?[.!\s]*$",
    r"^[(\[]?([A-H])[\s.)\]]*$|(?:[\n⇒→∴]|(?<=[.!?;])\s|[=\-]>|\s(?:hence|so|thus|therefore))[\s,:]*[(\[]?([A-H])[\s.)\]]*$",  # the letter alone
))
WEAK = re.compile(r"(?<=\d)\s*=\s*([A-H])\.?$|(?<=\d)\s+([B-H])\.?$")  # 50+20=70=D, 12-5=7 C
DANGLING = re.compile(r"(?:\s|[,;:(\[\-–—*]|∴|⇒|→|=+>|\b(?:so|hence|thus|therefore|and|i\.e\.?|is|the|our|my|correct|right|final|required|best|only|option|choice"
                      r"|answer|ans)\b)+$", re.IGNORECASE)
NAMES_LETTER = re.compile(r"\b(?:[Oo]ption|OPTION|[Cc]hoice|CHOICE|[Aa]nswer|ANSWER|[Aa]ns|ANS)s?\b[\s:.=\-(]*(?:(?:is|are|IS)\b[\s:(]*)?[A-Hb-h]\b(?!['’])"
                          r"|(?<![\w'’])[A-H]\)?\s+is\s+(?:the\s+)?(?:correct|right|answer)|^[(]?[A-H][).:]\s", re.MULTILINE)


def clean_rationale(text, letter):
    """A rationale -> (the reasoning without its closing answer statements, the letters those statements named).

    A lone final letter is taken off only if it is the key (`letter`): it could be a person or an unknown."""
    text = "\n".join(line for line in (" ".join(line.split()) for line in text.replace("\r", "\n").split("\n")) if line)
    stated = []
    while True:
        tail = text[-160:]                              # no statement is longer, and the patterns stay cheap
        for is_certain, pattern in ((True, STATEMENTS[0]), (True, STATEMENTS[1]), (False, STATEMENTS[2]), (False, WEAK)):
            found = pattern.search(tail)
            if found and (is_certain or found[found.lastindex].upper() == letter):
                break
        else:
            return text, stated
        stated.append(found[found.lastindex].upper())
        text = text[:len(text) - len(tail)] + DANGLING.sub("", tail[:found.start()])


def parse_row(row):
    """A raw row {question, options, rationale, correct} -> (question, choices, rationale, letter, flags), or the reason (str) to skip it."""
    question, options, rationale, correct = (row.get(key) for key in ("question", "options", "rationale", "correct"))
    if not isinstance(question, str) or not question.strip():
        return "no question"
    if not isinstance(options, (list, tuple)) or not 2 <= len(options) <= len(MAX_LETTERS):
        return f"not 2 to {len(MAX_LETTERS)} options"
    choices = parse_options(options)
    if not all(choices) or None in options:
        return "an option is empty"
    key = re.fullmatch(r"\W*([A-Za-z])\W*", correct) if isinstance(correct, str) else None
    if not key or key[1].upper() not in MAX_LETTERS[:len(choices)]:
        return "the key is not a letter of an option"
    letter = key[1].upper()
    rationale, stated = clean_rationale(rationale if isinstance(rationale, str) else "", letter)
    flags = []
    folded = [choice.casefold() for choice in choices]
    if len(set(folded)) < len(folded):
        flags.append("two options are equal")
        if folded.count(folded[MAX_LETTERS.index(letter)]) > 1:
            flags.append("the right option stands twice")
    if not rationale:
        flags.append("no rationale")
    if any(other != letter for other in stated):
        flags.append("the rationale states another letter")
    if NAMES_LETTER.search(rationale):
        flags.append("the rationale names a letter")
    question = "\n".join(filter(None, (" ".join(line.split()) for line in question.split("\n"))))
    return question, choices, rationale, letter, flags


def check_prepared(row):
    """None if a row {messages, letters, answer_letter} can be used as it is, else the reason to skip it."""
    letters, messages = row.get("letters"), row["messages"]
    if not isinstance(letters, list) or not 2 <= len(letters) <= len(MAX_LETTERS) or letters != list(MAX_LETTERS[:len(letters)]):
        return "prepared: letters are not A, B, ..."
    if row.get("answer_letter") not in letters:
        return "prepared: answer_letter is not one of the letters"
    if not isinstance(messages, list) or len(messages) < 2 or not all(isinstance(message, dict) for message in messages):
        return "prepared: messages are not a list of user and assistant"
    roles = [message.get("role") for message in messages]
    if roles[roles[0] == "system":] != ["user", "assistant"] * (len(messages) // 2):
        return "prepared: messages are not a list of user and assistant"
    try:
        texts = [message_text(message) for message in messages]
    except (KeyError, TypeError):
        return "prepared: a message has no text"
    return None if extract_answer(texts[-1], letters) == row["answer_letter"] else "prepared: the last message does not give answer_letter"


# ---------------------------------------------------------------------------------------------------------------------
# The task

@register("AQUA", random_accuracy=0.2)
class AQUA(LetterTask):
    """One split of AQuA-RAT. permute_options gives every question its own order of the options, the right letters balanced.

    Rows that cannot be used are counted by reason in `skipped`, odd ones that are used in `flagged`. The files are looked for in
    data_dir, $NANOCHAT_AQUA_DIR, $AQUA_DATA_DIR, base_dir()/aqua, and last on the Hub; the first folder there is must hold the split."""

    @no_collection()
    def __init__(self, split="train", data_dir=None, shuffle=False, permute_options=False, seed=42, **kwargs):
        super().__init__(**kwargs)
        if split not in FILES:
            raise ValueError(f"AQUA has no split {split!r}: the {len(FILES)} splits are {', '.join(FILES)}")
        self.split, self.permute_options, self.seed = split, permute_options, seed
        self.skipped, self.flagged, self.rows = Counter(), Counter(), []
        rows, self.source = load_rows(split, data_dir, self.skipped)
        for row in rows:
            parsed = self._parse(row)
            if isinstance(parsed, str):
                self.skipped[parsed] += 1
            else:
                self.rows.append(parsed)
                self.flagged.update(parsed[-1])
        if not self.rows:
            raise ValueError(f"none of the {self.skipped.total()} rows of AQUA {split} in {self.source} can be used "
                             f"({dict(self.skipped)}): prepare the data again by python -m scripts.prepare_aqua")
        if shuffle:
            random.Random(seed).shuffle(self.rows)

    @staticmethod
    def _parse(row):
        """-> ((question, choices, rationale, letter) or a conversation, its other fields, flags), or the reason to skip the row."""
        extras = {key: value for key, value in row.items() if key not in RAW_FIELDS}    # level, kind, source, ...
        if "messages" not in row:
            parsed = parse_row(row)
            return parsed if isinstance(parsed, str) else (parsed[:-1], extras, parsed[-1])
        reason = check_prepared(row)
        if reason:
            return reason
        rationale = message_text(row["messages"][-1]).rstrip().rpartition("\n")[0]
        return None, extras, ["the rationale names a letter"] if NAMES_LETTER.search(rationale) else []

    def num_examples(self):
        return len(self.rows)

    def get_example(self, index):
        fields, extras, flags = self.rows[index]
        conversation = {**build_conversation(*fields), **extras} if fields else extras
        # a rationale that speaks of "option B" would become wrong in another order
        if not self.permute_options or "the rationale names a letter" in flags:
            return conversation
        return in_new_order(conversation, index, self.seed)


def in_new_order(conversation, visit, seed):
    """The conversation with its choices in an order that the visit's number decides; over visits the right letters are balanced."""
    n = len(conversation["letters"])
    order = random.Random(f"{seed}|{visit}").sample(range(n), n)
    right = conversation["letters"].index(conversation["answer_letter"])
    target = balanced(range(n), visit, seed)            # where the right option shall stand
    order[order.index(right)], order[target] = order[target], right
    return permuted(conversation, order)


def load_rows(split, data_dir, skipped):
    """-> (the rows of a split, where they come from)."""
    named = [("data_dir", data_dir), ("NANOCHAT_AQUA_DIR", env("NANOCHAT_AQUA_DIR")), ("AQUA_DATA_DIR", env("AQUA_DATA_DIR"))]
    origin, folder = next(((origin, Path(folder).expanduser()) for origin, folder in named if folder), (None, base_dir() / "aqua"))
    path = next((folder / name for name in FILES[split] if (folder / name).is_file()), None)
    if path is None:
        others = [name for names in FILES.values() for name in names if (folder / name).is_file()]
        # Half a folder is no reason to fetch the other half elsewhere: the splits might not belong together.
        if origin or others:
            raise ValueError(f"{folder} (from {origin or 'the base directory'}) has no {FILES[split][0]}, only {len(others)} other splits {others}: "
                             "run python -m scripts.prepare_aqua or scripts.prepare_offline to write all three")
        return load_hub_dataset("deepmind/aqua_rat", "raw", split), "the Hugging Face Hub"
    rows = load_jsonl(path, skipped)
    if (folder / COUNTS_FILE).is_file():
        expected = json.loads((folder / COUNTS_FILE).read_text(encoding="utf-8")).get(split, {}).get("rows")
        if expected is not None and expected != len(rows):
            raise ValueError(f"{path} has {len(rows)} rows, but {COUNTS_FILE} beside it says {expected}: the file is cut off or was edited, "
                             "so prepare it again (or delete the counts file to use it as it is)")
    return rows, str(path)
