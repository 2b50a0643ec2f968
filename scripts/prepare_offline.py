"""Write all the data that the pipeline needs without a network: pretraining text, algebra as AQuA splits, and small talk.

    python -m scripts.prepare_offline
    python -m scripts.prepare_offline --only=identity
    python -m scripts.prepare_offline --seed=7 --text-chars=5_000_000 --output-dir=data

Everything is made from the seed by the templates below and by tasks/algebra.py. No validation or test problem occurs in the
pretraining text or in the train rows. A second run with the same configuration does nothing.
"""
import hashlib
import io
import json
import random
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import base_dir, print0, write_atomic
from nanochat.configurator import parse
from nanochat.workers import num_cores, workers
from tasks.algebra import SIZES, draw_problem, make_problem, prepared, split_of
from tasks.algebra_kinds import LARGEST, LEVELS, NAMES, THINGS
from tasks.aqua import INSTRUCTION

SOURCES = ("scripts/prepare_offline.py", "tasks/algebra.py", "tasks/algebra_kinds.py")
MANIFEST = "offline_manifest.json"
FIRST_LOOKUPS = 0.08          # share of the text, at its beginning, that is lookup lists alone
SHARD_CHARS, VAL_SHARE, ROW_GROUP = 4_000_000, 0.02, 1_000  # text per shard; validation text in addition; documents per row group
ROWS_AT_ONCE, ROW_CHARS = 5_000, 600  # train problems that one process makes at a time; characters of one, about
# What can be made on its own, and the knobs that it depends on
PARTS = {"text": ("seed", "text_chars"), "aqua": ("seed", "train_rows", "validation_rows", "test_rows"), "identity": ("seed", "identity_rows")}


@dataclass(frozen=True)
class Config:
    """Make the embedded data: pretraining shards, algebra in AQuA's form, identity conversations."""
    seed: int = 42                # another seed gives other text and other problems, but never moves a problem to another split
    only: str = ""                # make one part alone: text, aqua or identity ("" = all three)
    text_chars: int = 20_000_000  # characters of pretraining text
    train_rows: int = 60_000      # algebra problems in aqua/train.jsonl
    validation_rows: int = 1_000  # different problems in aqua/validation.jsonl
    test_rows: int = 3_000        # different problems in aqua/test.jsonl
    identity_rows: int = 400      # conversations about the model and small talk
    output_dir: str | None = None  # where base_data/, aqua/ and identity_conversations.jsonl go (None = the base directory)


def main(config):
    for name, value in asdict(config).items():
        if name.endswith(("_rows", "_chars")) and value < 1:
            raise ValueError(f"{name}={value} leaves nothing to train or judge on: give at least 1")
    if config.only and config.only not in PARTS:
        raise ValueError(f"only={config.only!r} is not one of the {len(PARTS)} parts {', '.join(PARTS)}: leave it out to make all")
    folder = Path(config.output_dir).expanduser() if config.output_dir else base_dir()
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8")) if (folder / MANIFEST).is_file() else {}
    # The templates are part of the recipe: edited code must not pass for the old data.
    sources = b"".join((Path(__file__).parents[1] / name).read_bytes() for name in SOURCES)
    generator = hashlib.sha256(sources).hexdigest()

    parts, todo = [config.only] if config.only else list(PARTS), []
    for part in parts:
        wanted = {"generator": generator, **{knob: getattr(config, knob) for knob in PARTS[part]}}
        entry = manifest.get(part, {"files": {}})
        # What an earlier run wrote may be replaced, unless somebody did so before, with the real AQuA for example
        ours = [name for name, facts in entry["files"].items() if facts is None or is_intact(folder / name, facts)]
        if entry.get("wanted") != wanted or len(ours) < len(entry["files"]):
            todo.append((part, wanted, ours))
            refuse_foreign_files(folder, part, config, ours)

    is_small = config.text_chars + ROW_CHARS * config.train_rows < SHARD_CHARS  # made sooner than other processes have started
    with workers(1 if is_small else num_cores()) as run:
        made = [MAKERS[part](config, run) for part, _, _ in todo]
        for (part, wanted, ours), contents in zip(todo, made):
            for name in ours:
                (folder / name).unlink(missing_ok=True)
            # Until the part is finished, the manifest only says whose the files are that a killed run leaves
            manifest[part] = {"files": dict.fromkeys(file_names(part, config))}
            write_atomic(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")
            files = {}
            for name, data, facts in contents:
                write_atomic(folder / name, data)
                files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), **facts}
            assert list(files) == file_names(part, config), f"{part} wrote {list(files)}"
            manifest[part] = {"wanted": wanted, "files": files}
            write_atomic(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    files = {name: facts for part in parts for name, facts in manifest[part]["files"].items()}
    if todo:
        print_summary(folder, files)
    else:
        print0(f"{folder} already holds the data of this configuration ({len(files)} files): nothing to do")
    return files


def file_names(part, config):
    if part == "text":
        return [f"base_data/shard_{shard:05d}.parquet" for shard in range(max(1, round(config.text_chars / SHARD_CHARS)))] + ["base_data/shard_val.parquet"]
    return ["aqua/counts.json", *(f"aqua/{split}.jsonl" for split in SIZES)] if part == "aqua" else ["identity_conversations.jsonl"]


# A maker -> (name, content, facts) of each of its files. What takes long is given to `run` (nanochat/workers.py) at once, for all parts before the
# first file is written, so that no core waits for a part's last piece.
def make_text(config, run):
    *train, val = names = file_names("text", config)
    sizes = [config.text_chars // len(train)] * len(train) + [max(20_000, int(VAL_SHARE * config.text_chars))]
    first_lookups = [int(FIRST_LOOKUPS * config.text_chars)] + [0] * len(train)
    shards = run(text_shard, [(chars, config.seed, name, lookups) for chars, name, lookups in zip(sizes, names, first_lookups)])
    return ((name, data, facts) for name, (data, facts) in zip(names, shards))


def text_shard(*arguments):
    documents = make_documents(*arguments)
    return parquet(documents), {"rows": len(documents), "chars": sum(map(len, documents))}


def make_aqua(config, run):
    pieces = [("train", first, min(first + ROWS_AT_ONCE, config.train_rows)) for first in range(0, config.train_rows, ROWS_AT_ONCE)]
    pieces += [(split, 0, getattr(config, f"{split}_rows")) for split in SIZES if split != "train"]
    return join_aqua(pieces, run(algebra_lines, [(*piece, config.seed) for piece in pieces]))


def join_aqua(pieces, made):
    data, facts = dict.fromkeys(SIZES, b""), {split: {"rows": 0, "letters": Counter(), "levels": Counter()} for split in SIZES}
    for (split, _, _), (lines, counts) in zip(pieces, made):
        data[split] += lines
        for name, count in counts.items():
            facts[split][name] += count
    counts = {"source": "scripts.prepare_offline"} | {
        split: {name: count if name == "rows" else dict(sorted(count.items())) for name, count in facts[split].items()} for split in SIZES}
    # First the counts: AQUA refuses a folder whose splits do not fit them, so half a set is never taken for the whole
    yield "aqua/counts.json", (json.dumps(counts, indent=2) + "\n").encode(), {}
    for split in SIZES:
        yield f"aqua/{split}.jsonl", data[split], {"rows": facts[split]["rows"], "chars": len(data[split])}


def algebra_lines(*arguments):
    """Problems as JSON lines, and what is counted of them."""
    rows = algebra_rows(*arguments)
    return jsonl(rows), {"rows": len(rows), "letters": Counter(row["correct"] for row in rows), "levels": Counter(str(row["level"]) for row in rows)}


def make_identity(config, run):
    rows = [identity_conversation(random.Random(f"{config.seed}|identity|{i}")) for i in range(config.identity_rows)]
    data = jsonl(rows)
    yield "identity_conversations.jsonl", data, {"rows": len(rows), "chars": len(data)}


MAKERS = {"text": make_text, "aqua": make_aqua, "identity": make_identity}


def is_intact(path, entry):
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == entry["sha256"]


def refuse_foreign_files(folder, part, config, ours):
    """Generated text must not be mixed into downloaded shards, nor overwrite the real AQuA or somebody's conversations."""
    there = {name for name in file_names(part, config) if (folder / name).is_file()}
    if part == "text":
        there |= {f"base_data/{path.name}" for path in (folder / "base_data").glob("*.parquet")}
    foreign = sorted(there - set(ours))
    if foreign:
        raise ValueError(f"{folder} holds {len(foreign)} files that this script did not write, or that changed since ({', '.join(foreign[:3])}): "
                         "choose another --output-dir, or remove them first")


def parquet(documents):
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": documents}), buffer, row_group_size=ROW_GROUP, compression="zstd")
    return buffer.getvalue()


def jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def print_summary(folder, files):
    print0(f"{folder}\n{'file':36} {'rows':>9} {'chars':>12} {'bytes':>12}  sha256")
    for name, facts in files.items():
        print0(f"{name:36} {facts.get('rows', ''):>9} {facts.get('chars', ''):>12} {facts['bytes']:>12}  {facts['sha256'][:12]}")


def algebra_rows(split, first, last, seed):
    """The problems of a split from the first to before the last; held-out ones all differ, so that no question counts twice in an accuracy."""
    if split == "train":
        return [prepared(make_problem(split, index, seed=seed)) for index in range(first, last)]
    rows = {}
    for index in range(20 * last):
        row = make_problem(split, index, seed=seed)
        rows.setdefault(row["question"], row)
        if len(rows) == last:
            return list(map(prepared, rows.values()))
    raise ValueError(f"{split} has only about {len(rows)} different problems, not {last}: ask for fewer --{split}-rows")


# ---------------------------------------------------------------------------------------------------------------------
# Pretraining text

def make_documents(num_chars, seed, shard, first_lookups=0):
    """Documents of all five kinds, num_chars characters in all (to within a few); the shard's name is part of the seed.

    The first `first_lookups` characters are lookup lists alone, a small curriculum: looking back is learned within 200 steps on
    lists alone, and not within 800 when they are a third of the text (dev/LOG.md).
    """
    documents, chars, number = [], 0, 0
    makers, weights = zip(*((worked_problems, 55), (lookup_lists, 15), (number_facts, 18), (story, 8), (spelling, 4)))
    # a maker gives about the same number of characters whatever its kind, so that the weights are shares of the text
    while chars < num_chars:
        r = random.Random(f"{seed}|{shard}|{number}")
        made = lookup_lists(r) if chars < first_lookups else r.choices(makers, weights)[0](r)
        made = [made] if isinstance(made, str) else made
        documents += made
        chars, number = chars + sum(map(len, made)), number + 1
    return documents


def worked_problems(r):
    """Train problems with their solutions, as prose: the rationale's steps, no options, no letters."""
    levels = r.choice((LEVELS, LEVELS, (r.choice(LEVELS),)))
    frame = r.choice(("{question} {steps}.", "{question}\n{steps}\n", "Question: {question}\nSolution: {steps}\n",
                      "{question} We write {steps}. The result is {value}.", "Problem. {question}\n{steps}\nIt is {value}.\n"))
    lines = []
    for _ in range(r.randint(4, 6)):
        _, question, rationale, answer, _ = draw_problem(r, "train", r.choice(levels))
        lines.append(frame.format(question=question, steps=rationale, value=answer))
    return "\n".join(lines)


COLORS = ("red", "blue", "green", "black", "white", "brown", "pink", "gray")
ANIMALS = ("cat", "dog", "cow", "pig", "hen", "fox", "owl", "bee", "ant", "fish", "bird", "horse", "sheep", "goat", "mouse", "frog")
PLACES = ("park", "school", "shop", "farm", "river", "garden", "forest", "market", "beach", "library")
WORDS = COLORS + ANIMALS + PLACES + THINGS


def lookup_lists(r):
    """Five documents, each a list like a prompt's options and the same lines again in another order: what follows a number is found
    by looking back, which is how a solution ends ("so 82=E"). One list to a document: two would contradict each other. Plain lines
    of numbers on purpose: with words among them and several phrasings the looking-back was not learned at all (dev/LOG.md)."""
    documents = []
    for _ in range(5):
        n = r.choice((3, 4, 5, 5, 5))
        lines = [f"{number}={label}" for number, label in zip(r.sample(range(LARGEST + 1), n), "ABCDE")]
        again = r.sample(lines, n)
        if r.random() < 0.1:                            # in the words of the AQuA prompt, so that the tokenizer learns them too
            again = [INSTRUCTION, again[0], f"Answer: {again[0][-1]}"]
        documents.append("\n".join([f"- {line}" for line in lines] + again))
    return documents


def number_facts(r):
    """Sums, differences, products and quotients up to 99 in many forms."""
    return r.choice((single_facts, single_facts, single_facts, fact_table, counting))(r)


def single_facts(r):
    forms = {"+": ("{a}+{b}={c}", "{a} plus {b} is {c}.", "If you add {b} to {a} you get {c}.", "{b} more than {a} is {c}."),
             "-": ("{a}-{b}={c}", "{a} minus {b} is {c}.", "Take {b} from {a} and {c} is left.", "{b} less than {a} is {c}."),
             "*": ("{a}*{b}={c}", "{a} times {b} is {c}.", "{a} groups of {b} make {c}."),
             "/": ("{a}/{b}={c}", "{a} divided by {b} is {c}.", "{a} shared by {b} gives {c} each.")}
    facts = []
    for _ in range(r.randint(14, 22)):
        sign = r.choice("++--**/")
        if sign in "+-":
            total = r.randint(0, LARGEST)
            one = r.randint(0, total)
            a, b, c = (one, total - one, total) if sign == "+" else (total, one, total - one)
        else:
            one, other = r.randint(1, 33), r.randint(1, 12)
            while one * other > LARGEST:
                one, other = r.randint(1, 33), r.randint(1, 12)
            one, other = r.choice(((one, other), (other, one)))
            a, b, c = (one, other, one * other) if sign == "*" else (one * other, other, one)
        facts.append(r.choice(forms[sign]).format(a=a, b=b, c=c))
    return r.choice((" ", "\n")).join(fact if fact.endswith(".") else fact + "," for fact in facts)


def fact_table(r):
    """A few rows of the addition, subtraction or multiplication table."""
    lines = []
    for _ in range(4):
        a, start, sign = r.randint(2, 12), r.randint(1, 40), r.choice("+-*")
        if sign == "*":
            lines.append(", ".join(f"{a}*{b}={a * b}" for b in range(1, LARGEST // a + 1)[:10]))
        elif sign == "+":
            lines.append(", ".join(f"{a}+{b}={a + b}" for b in range(start, start + 10)))
        else:
            lines.append(", ".join(f"{b}-{a}={b - a}" for b in range(start + a, start + a + 10)))
    return ".\n".join(lines) + "."


def counting(r):
    """Number sequences with a constant step, none of which contains a held-out problem of the kind "sequence"."""
    lines = []
    while len(lines) < 6:
        start, step = r.randint(0, 60), r.choice((1, 2, 3, 4, 5, 6, 7, 8, 9, 10, -1, -2, -3, -5))
        numbers = [start + step * i for i in range(10) if 0 <= start + step * i <= LARGEST]
        if len(numbers) >= 5 and all(split_of("sequence", numbers[i:i + 4]) == "train" for i in range(len(numbers) - 3)):
            lines.append(f"Count by {step}: " * (step > 0) + ", ".join(map(str, numbers)) + ".")
    return "\n".join(lines)


def story(r):
    """A few sentences about two people, a thing and a place, each named again later."""
    one, other = r.sample(NAMES, 2)
    he = "she" if one in ("Ann", "Sue", "Kim", "Eva") else "he"
    thing, animal, place, color = r.choice(THINGS)[:-1], r.choice(ANIMALS), r.choice(PLACES), r.choice(COLORS)
    a, b = r.randint(2, 20), r.randint(2, 9)
    sentences = [
        r.choice((f"One day {one} went to the {place}.", f"{one} and {other} met at the {place}.", f"It was a sunny day and {one} was at the {place}.",
                  f"In the morning {one} walked to the {place} with {other}.")),
        r.choice((f"There {he} saw a {color} {animal}.", f"A {color} {animal} sat under a tree.", f"{he.capitalize()} found a {color} {thing} there.")),
        r.choice((f'"Look, a {animal}!" said {one}.', f'"What a nice {color} {animal}," said {other}.', f"The {animal} looked at {one}.")),
        r.choice((f"{one} had {a} {thing}s in a bag.", f"{other} had a bag with {a} {thing}s.", f"There were {a} {thing}s on the ground.")),
        r.choice((f"Then {other} gave {one} {b} more.", f"{one} picked up {b} more.", f"{other} brought {b} more {thing}s.")),
        r.choice((f"Now there were {a + b} {thing}s, because {a}+{b}={a + b}.", f"{a}+{b}={a + b}, so there were {a + b} {thing}s now.")),
        r.choice((f"The {color} {animal} was happy and ran away.", f"The {animal} came home with {one}.", f"Everyone liked the {color} {animal}.")),
        r.choice((f"{one} thanked {other} and went home.", f'"Thank you," said {one} to {other}.', f"{one} told {other} a story about the {animal}.")),
        r.choice((f"In the evening {he} was tired but glad.", f"At night {one} dreamed of the {place}.", f"They will go to the {place} again.")),
    ]
    return " ".join(sentences)


def spelling(r):
    """Words and their letters."""
    lines = []
    for _ in range(r.randint(7, 10)):
        word = r.choice(WORDS + NAMES).lower()
        letter = r.choice(word)
        lines.append(r.choice((f"The word {word} is spelled {', '.join(word)}.", f"{word} has {len(word)} letters: {' '.join(word)}.",
                               f"The first letter of {word} is {word[0]} and the last is {word[-1]}.", f"Backwards {word} is {word[::-1]}.",
                               f"The letter {letter} is {word.count(letter)} times in {word}.")))
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Conversations about the model, and small talk

TOPICS = (
    (("Hello!", "Hi!", "Hey there.", "Good morning.", "Hi, are you there?"),
     ("Hello! How can I help you?", "Hi! What can I do for you?", "Hello! Do you have a problem for me?")),
    (("Who are you?", "What are you?", "What is your name?", "Tell me about yourself.", "Do you have a name?", "What should I call you?"),
     ("I am nanochat, a small language model trained from scratch.", "My name is nanochat. I am a small language model.",
      "I am nanochat, a little model that learned to solve algebra problems.")),
    (("What can you do?", "What are you good at?", "How can you help me?", "What do you know?"),
     ("I can solve small algebra problems with five options.", "I can reason about simple algebra and choose an answer.",
      "I solve short number problems step by step.")),
    (("Who made you?", "Who built you?", "Where do you come from?", "Who trained you?"),
     ("I was trained by the person who runs this repository.", "Someone ran the nanochat pipeline, and that made me.",
      "The person at this computer trained me.")),
    (("How were you trained?", "How did you learn?", "How do you work?"),
     ("First I read text, then I saw conversations, and then I learned from rewards.",
      "I learned to guess the next word, and later I was rewarded for right answers.",
      "I was pretrained, then finetuned, then improved by reinforcement learning.")),
    (("Are you a human?", "Are you a person?", "Are you real?", "Do you have a body?", "Are you alive?"),
     ("No, I am a computer program.", "No, I am a language model.", "I am not a person, I am a small model.")),
    (("How big are you?", "Are you a large model?", "How many parameters do you have?"),
     ("I am very small compared with other language models.", "I am a small model, made for a small computer.")),
    (("Do you make mistakes?", "Are you always right?", "Can I trust you?", "Can you be wrong?"),
     ("I make mistakes. Please check my answers.", "No, I am often wrong. Please check the steps.", "I can be wrong, because I am small.")),
    (("Can you use the internet?", "Can you search the web?", "What is the news today?", "What day is it?"),
     ("I cannot look that up. I only know what I learned in training.", "No, I have no internet. I only know my training text.")),
    (("How are you?", "How do you feel?", "Are you well?", "How is it going?"),
     ("I am fine, thank you. How can I help?", "Good, thank you! What can I do for you?")),
    (("What is algebra?", "What is an equation?", "What does x mean?"),
     ("Algebra is finding unknown numbers from what is known.", "An equation says that two things are equal. x is the number we look for.")),
    (("Tell me a joke.", "Say something funny.", "Make me laugh."),
     ("Why was six afraid of seven? Because seven ate nine.", "Parallel lines have so much in common. It is a pity they never meet.")),
    (("Thank you!", "Thanks a lot.", "That was helpful.", "Great, thanks."),
     ("You are welcome!", "I am glad to help.", "You are welcome. Come back with more problems!")),
    (("Goodbye!", "Bye.", "See you later.", "I have to go."), ("Goodbye!", "Bye, see you soon.", "Goodbye, and good luck!")),
)


def identity_conversation(r):
    """One to three questions about the model with answers, in the order of TOPICS: greetings first, goodbyes last."""
    messages = []
    for topic in sorted(r.sample(range(len(TOPICS)), r.choice((1, 1, 2, 3)))):
        question, answer = (r.choice(texts) for texts in TOPICS[topic])
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages}


if __name__ == "__main__":
    main(parse(Config))
