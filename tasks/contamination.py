"""Do training texts hold evaluation questions? The questions are indexed once; the texts stream by and nothing of them is kept.

    exact         the question, character for character, blanks around it aside
    normalised    the same words, numbers and operators, whatever the case, blanks and punctuation
    number_blind  the same with every number replaced: another variant of the problem
    jaccard       more than half of the 5-word grams of both questions together are in both
    ngram         13 words of the question in a row, or all of 8 to 12, stand anywhere in the text (Brown et al. 2020, arXiv 2005.14165, appendix C)
"""
import re
from collections import Counter, defaultdict
from itertools import compress, count

from tasks.common import message_text

MEASURES = ("exact", "normalised", "number_blind", "jaccard", "ngram")
GRAM, SIMILAR = 5, 0.5                                  # words per gram; similarity from which two questions count as alike
LONG_GRAM, SHORTEST = 13, 8                             # words of the longer gram; a question of fewer than SHORTEST is common speech
MAX_EXAMPLES = 5
# Operators and the brackets of formulas are words: 3 + 5 is not 3 - 5, and 2(x + 1) is not 2x + 1. Hyphens and the brackets of prose are not.
WORD = re.compile(r"[a-z]+|\d+(?:[.,]\d+)*|[+*/^=<>]|(?<=[\da-z)])\s*-\s*(?=[\d(])|(?<=[\w)+*/^=-])\(|\)(?=\s*[-+*/^=])")
NUMBER = re.compile(r"\d[\d.,]*")


def words(text):
    found = WORD.findall(text.lower())
    return [word.strip() for word in found] if "-" in text else found  # only a minus brings its blanks along


def normalised(text):
    return " ".join(words(text))


def forms(question, tokens):
    """(measure, key) of a question with these words: equal questions have equal keys."""
    plain = " ".join(tokens)
    return [("exact", hash(question.strip())), ("normalised", hash(plain)), ("number_blind", hash(NUMBER.sub("#", plain)))]


def gram_set(tokens, size):
    """The set of a text's grams of so many words, as hashes; a shorter text is one gram."""
    return set(windows(tokens, size)) if len(tokens) > size else {hash(tuple(tokens))}


def windows(tokens, size):
    """The hash of each run of so many words, in order. No line of Python runs for each: a mixture has millions."""
    return map(hash, zip(*(tokens[i:] for i in range(size))))


class Entry:
    """The questions that share one form or one gram, and whether a training row has had it."""
    __slots__ = ("targets", "splits", "is_hit")

    def __init__(self):
        self.targets, self.splits, self.is_hit = [], set(), False


class HeldOut:
    """{split: questions} indexed; `see` each training row, then `report`. Memory grows with the questions alone."""

    def __init__(self, splits):
        self.targets = [(split, question) for split, questions in splits.items() for question in questions]
        self.sizes = {split: len(questions) for split, questions in splits.items()}
        self.entries = {name: defaultdict(Entry) for name in ("exact", "normalised", "number_blind", "ngram")}
        self.grams, self.long_sizes, self.beginnings = [], set(), set()
        for target, (split, question) in enumerate(self.targets):
            tokens = words(question)
            self.grams.append(gram_set(tokens, GRAM) if tokens else set())
            if not tokens:                              # an empty text is no question
                continue
            keys = forms(question, tokens)
            if len(tokens) >= SHORTEST:
                size = min(LONG_GRAM, len(tokens))
                self.long_sizes.add(size)
                keys += [("ngram", gram) for gram in gram_set(tokens, size)]
                # A long gram can only begin where its first words stand: looking for those is one pass over a text for all sizes
                self.beginnings.update(windows(tokens[:len(tokens) - size + SHORTEST], SHORTEST))
            for name, key in keys:
                self.entries[name][key].targets.append(target)
                self.entries[name][key].splits.add(split)
        # Sets of similarity above 1/2 share more than half of either's grams, so one of the rarer half is shared: only those are indexed.
        frequency = Counter(gram for own in self.grams for gram in own)
        self.rare = defaultdict(list)
        for target, own in enumerate(self.grams):
            for gram in sorted(own, key=frequency.get)[:len(own) - int(SIMILAR * len(own))]:
                self.rare[gram].append(target)
        self.hits = {name: set() for name in MEASURES}  # questions that any training row held
        self.rows = {name: Counter() for name in MEASURES}  # split -> training rows that held a question of it
        self.examples, self.closest, self.seen = defaultdict(list), {}, 0

    def see(self, questions, text=""):
        """A training row: what it asks (texts), and all of it. -> the measures by which it holds a held-out question."""
        self.seen += 1
        splits = {name: set() for name in MEASURES}     # of the questions that this row holds

        def take(name, key, asked):
            entry = self.entries[name].get(key)
            if entry is not None:
                splits[name] |= entry.splits
                if not entry.is_hit:                    # a form that thousands of rows have is worked through once
                    entry.is_hit = True
                    for target in entry.targets:
                        self.hit(name, target, asked)

        for question in questions:
            tokens = words(question)
            for name, key in forms(question, tokens):
                take(name, key, question)
            splits["jaccard"] |= self.similar(question, tokens)
        tokens = words(text or "\n".join(questions))
        starts = list(compress(count(), map(self.beginnings.__contains__, windows(tokens, SHORTEST))))
        for size in self.long_sizes if starts else ():
            for start in starts:
                if start + size <= len(tokens):
                    take("ngram", hash(tuple(tokens[start:start + size])), text)
        found = {name for name in MEASURES if splits[name]}
        for name in found:
            self.rows[name].update(splits[name])
        return found

    def similar(self, question, tokens):
        """Compare a training question and its words with the held-out ones that it may be like -> the splits of those that it is like."""
        own, splits = gram_set(tokens, GRAM), set()
        for target in {target for gram in filter(self.rare.__contains__, own) for target in self.rare[gram]}:
            split, held_out = self.targets[target]
            shared = len(own & self.grams[target])
            similarity = shared / (len(own) + len(self.grams[target]) - shared)
            if similarity > SIMILAR:
                splits.add(split)
                self.hit("jaccard", target, question)
                if similarity > self.closest.get(split, {"similarity": 0})["similarity"]:
                    self.closest[split] = {"similarity": similarity, split: held_out, "train": question}
        return splits

    def hit(self, name, target, asked):
        split, question = self.targets[target]
        if target not in self.hits[name] and len(self.examples[split, name]) < MAX_EXAMPLES:
            self.examples[split, name].append({"held_out": question, "train": asked[:500]})
        self.hits[name].add(target)

    def report(self):
        """{split: {"questions": how many, measure: how many of them were hit, "train_rows": {measure: rows that hit}, "examples", "closest"}}."""
        result = {}
        for split, size in self.sizes.items():
            result[split] = {"questions": size, **{name: sum(self.targets[target][0] == split for target in self.hits[name]) for name in MEASURES},
                             "train_rows": {name: self.rows[name][split] for name in MEASURES},
                             "examples": {name: self.examples[split, name] for name in MEASURES if self.examples[split, name]}}
            if split in self.closest:
                result[split]["closest"] = {**self.closest[split], "similarity": round(self.closest[split]["similarity"], 3)}
        return result


def training_texts(task, conversation):
    """A conversation to train on -> (what it asks, all its text)."""
    messages = conversation["messages"]
    asked = [message_text(message) for message in messages if message["role"] == "user"]
    if "letters" in conversation or "question" in conversation:
        asked[-1] = task.question(conversation)         # without options and instructions
    return asked, "\n".join(message_text(message) for message in messages)
