"""Spelling: write a word letter by letter, and count a letter in a word. Tokens hide letters, so a model must learn both.

    SimpleSpelling   user       Spell the word: garden
                     assistant  garden: g,a,r,d,e,n
    SpellingBee      user       How many e are in the word "seventeen"?
                     assistant  s,e,v,e,n,t,e,e,n
                                e at 2, 4, 7, 8, so 4.
                                With a tool: [python "seventeen".count("e")][output 4]
                                #### 4

The words are a list of our own; the hash of a word decides which split it belongs to, so no test word is ever trained on.
"""
import hashlib
import random

from tasks.common import Task, message_text, register
from tasks.gsm8k import NumberTask
from tasks.spelling_words import WORDS

SPLITS = ("train", "test")
ALPHABET = "abcdefghijklmnopqrstuvwxyz"
ASK = ("How many {letter} are in the word {word}?", "How many {letter} are in {word}?", "how many {letter} in {word}", "Count the letter {letter} in {word}.",
       "How often does {letter} appear in the word {word}?", "What is the number of {letter} in {word}?", "In {word}, how many {letter} are there?",
       "Count how many times {letter} occurs in {word}.", "How many times is the letter {letter} used in {word}?", "Tell me the count of {letter} in {word}.")
QUOTES = ("{}", "{}", '"{}"', "'{}'")


def words_of(split):
    """The words of a split: one in eight is kept for test."""
    if split not in SPLITS:
        raise ValueError(f"the spelling tasks have no split {split!r}: the {len(SPLITS)} splits are {', '.join(SPLITS)}")
    return [word for word in WORDS if (hashlib.blake2b(word.encode(), digest_size=1).digest()[0] % 8 == 0) == (split == "test")]


class SpellingTask:
    """`size` examples drawn from the words of a split: the same index and seed give the same example."""

    def __init__(self, split="train", size=None, seed=42, **kwargs):
        super().__init__(**kwargs)
        self.words, self.split, self.seed = words_of(split), split, seed
        self.size = size if size is not None else {"train": 100_000, "test": 256}[split]

    def num_examples(self):
        return self.size

    def draw(self, index):
        """-> (random generator, word) of an example. The first pass takes every word once."""
        r = random.Random(f"{self.seed}|{self.split}|{index}")
        if index < len(self.words):
            return r, self.words[index]
        return r, r.choice(self.words)


@register("SimpleSpelling")
class SimpleSpelling(SpellingTask, Task):
    """Right is the reference answer to the letter, upper or lower case and blanks aside."""

    def get_example(self, index):
        _, word = self.draw(index)
        return {"messages": [{"role": "user", "content": f"Spell the word: {word}"},
                             {"role": "assistant", "content": f"{word}: {','.join(word)}"}]}

    def find_answer(self, conversation, text):
        return normalize(text) or None

    def is_correct(self, conversation, completion):
        return normalize(completion) == normalize(message_text(conversation["messages"][-1]))


def normalize(text):
    return "".join(text.lower().split())


@register("SpellingBee")
class SpellingBee(SpellingTask, NumberTask):
    """Two counts that must agree: by hand, letter for letter, and by the calculator, which knows "text".count("part")."""

    def get_example(self, index):
        r, word = self.draw(index)
        # the count is drawn before the letter: of random letters of a word, three in four stand there once
        wanted = 0 if r.random() < 0.25 else r.choice(sorted({word.count(other) for other in word}))
        letter = r.choice([other for other in ALPHABET if word.count(other) == wanted])
        question = r.choice(ASK).format(letter=r.choice(QUOTES).format(letter), word=r.choice(QUOTES).format(word))
        places = [str(place) for place, other in enumerate(word, start=1) if other == letter]
        count = str(len(places))
        by_hand = f"{letter} at {', '.join(places)}, so {count}." if places else f"{letter} is not there, so 0."
        return {"messages": [{"role": "user", "content": question},
                             {"role": "assistant", "content": [
                                 {"type": "text", "text": f"{','.join(word)}\n{by_hand}\nWith a tool: "},
                                 {"type": "python", "text": f'"{word}".count("{letter}")'}, {"type": "python_output", "text": count},
                                 {"type": "text", "text": f"\n#### {count}"}]}]}
