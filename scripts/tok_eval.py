"""How well the tokenizer compresses: bytes per token by kind of text, against GPT-2 and GPT-4 where their vocabularies can be had.

    python -m scripts.tok_eval
"""
import threading
from dataclasses import dataclass
from itertools import islice

import tiktoken

from nanochat.common import print0
from nanochat.configurator import config_dict, parse
from nanochat.dataset import iter_documents, list_shards
from nanochat.report import add_section
from nanochat.tokenizer import get_tokenizer

REFERENCES = {"GPT-2": "gpt2", "GPT-4": "cl100k_base"}


@dataclass(frozen=True)
class Config:
    """Compare the tokenizer's compression with GPT-2's and GPT-4's."""
    data_dir: str | None = None   # folder of parquet files (None = where the pretraining looks)
    documents: int = 200          # documents taken from the head of each split
    doc_cap: int = 10_000         # characters of a document, at most
    wait_seconds: float = 20.0    # how long to wait for a reference vocabulary that is not on this machine (0 = do not compare)


def main(config):
    tokenizer = get_tokenizer()
    texts = {kind: [sample] for kind, sample in SAMPLES.items()} | shard_texts(config)
    references, absent = load_references(config.wait_seconds)

    # Count tokens, and check on the way that nothing is lost
    rows = []
    for kind, documents in texts.items():
        encoded = tokenizer.encode(documents)
        for text, ids in zip(documents, encoded):
            if tokenizer.decode(ids) != text:
                raise ValueError(f"a text of {len(text)} characters ({kind}) does not survive encoding and decoding in {len(ids)} ids: "
                                 "the tokenizer is damaged, train another with `python -m scripts.tok_train`")
        row = {"kind": kind, "bytes": sum(len(text.encode()) for text in documents), "tokens": sum(map(len, encoded))}
        for name, reference in references.items():
            row[name] = sum(map(len, reference.encode_ordinary_batch(documents, num_threads=1)))
        rows.append(row)

    # Tell
    table = markdown_table(rows, tokenizer.vocab_size, references)
    notes = [f"{name} is not compared: its vocabulary is not on this machine and could not be fetched ({reason})." for name, reason in absent.items()]
    print0(table)
    for note in notes:
        print0(note)
    legend = "Bytes per token: more is better, and a larger vocabulary makes it easier. In brackets: how much more one of our tokens holds."
    add_section("tok_eval", "\n".join([legend, "", table, "", *notes]).rstrip(),
                {"config": config_dict(config), "vocab_size": tokenizer.vocab_size, "rows": rows, "absent": absent})


def shard_texts(config):
    """{"train shards": documents, "val shard": documents}, less what is not there."""
    texts = {}
    for split, kind in (("train", "train shards"), ("val", "val shard")):
        try:
            shards = list_shards(split, config.data_dir)
        except ValueError as error:
            print0(f"{kind}: not measured, {error}")
            continue
        texts[kind] = [text[:config.doc_cap] for text in islice(iter_documents(shards), config.documents)]
    return texts


def load_references(wait_seconds):
    """-> ({name: tiktoken.Encoding}, {name: why it is absent}). tiktoken looks into its cache, then asks the network, and has
    no time limit of its own: a thread that outstays `wait_seconds` is left behind."""
    if wait_seconds <= 0:
        return {}, {name: "not asked for" for name in REFERENCES}
    loaded, reasons = {}, {}

    def load(name):
        try:
            loaded[name] = tiktoken.get_encoding(REFERENCES[name])
        except Exception as error:  # whatever the network, the cache or the checksum has to say
            reasons[name] = type(error).__name__

    threads = [threading.Thread(target=load, args=(name,), daemon=True) for name in REFERENCES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(wait_seconds)
    found = {name: loaded[name] for name in REFERENCES if name in loaded}
    return found, {name: reasons.get(name, f"no answer in {wait_seconds:g} s") for name in REFERENCES if name not in found}


def markdown_table(rows, vocab_size, references):
    """Rows of counts -> a table of bytes per token; behind a reference, how many more (or fewer) bytes our tokens hold."""
    lines = [f"| text | bytes | ours ({vocab_size:,}) |" + "".join(f" {name} ({encoding.n_vocab:,}) |" for name, encoding in references.items()),
             "| --- | ---: | ---: |" + " ---: |" * len(references)]
    for row in rows:
        ours = row["bytes"] / max(row["tokens"], 1)
        cells = [f"{row['bytes'] / row[name]:.2f} ({row[name] / row['tokens'] - 1:+.1%})" for name in references]
        lines.append("| " + " | ".join([row["kind"], f"{row['bytes']:,}", f"{ours:.2f}", *cells]) + " |")
    return "\n".join(lines)


SAMPLES = {
    "English": """\
The ferry left a little after six, when the fog had thinned enough for the captain to see the second buoy. Most of the
passengers stayed below, where the heaters worked, but an old man with a canvas bag stood at the rail and counted the gulls.
"Forty-one," he told the deckhand, who hadn't asked. "There were fifty last week. They're moving up the river again."
By the time they reached the island the sun was out. Children ran ahead along the pier; someone's dog barked at the ropes.
Nobody noticed that the lighthouse, for the first time in twenty-three years, had been left burning through the morning.
""",
    "algebra": """\
Question: A train 150 metres long passes a signal post in 12 seconds. How long will it take to cross a bridge of 250 metres?
- 20 seconds=A
- 28 seconds=B
- 32 seconds=C
- 36 seconds=D
- 40 seconds=E
The speed of the train is 150 / 12 = 12.5 m/s. To cross the bridge it must travel 150 + 250 = 400 m.
The time is 400 / 12.5 = 32 seconds.
Answer: C

Question: If 3x + 7 = 2(x + 11), what is the value of x^2 - 5?
- 215=A
- 220=B
- 225=C
- 230=D
- 235=E
Expand: 3x + 7 = 2x + 22, so x = 15. Then x^2 - 5 = 225 - 5 = 220.
Answer: B
""",
    "code": """\
def longest_run(values, tolerance=1e-9):
    \"\"\"The longest stretch of `values` that never falls, as (start, length).\"\"\"
    best_start, best_length, start = 0, 0, 0
    for i in range(1, len(values) + 1):
        if i == len(values) or values[i] < values[i - 1] - tolerance:
            if i - start > best_length:
                best_start, best_length = start, i - start
            start = i
    return best_start, best_length


class Ledger {
    private final Map<String, Long> balances = new HashMap<>();

    void transfer(String from, String to, long cents) {
        if (cents <= 0 || balances.getOrDefault(from, 0L) < cents) throw new IllegalArgumentException("not enough");
        balances.merge(from, -cents, Long::sum);
        balances.merge(to, cents, Long::sum);
    }
}
""",
    "LaTeX": r"""\begin{theorem}\label{thm:mean}
Let $a_1, \dots, a_n$ be positive real numbers. Then
\[
  \frac{a_1 + a_2 + \cdots + a_n}{n} \;\geq\; \sqrt[n]{a_1 a_2 \cdots a_n},
\]
with equality if and only if $a_1 = a_2 = \cdots = a_n$.
\end{theorem}
\begin{proof}
Scale so that $\prod_{i=1}^{n} a_i = 1$. Since $\log$ is concave, $\frac{1}{n}\sum_{i} \log a_i \leq \log\bigl(\frac{1}{n}\sum_{i} a_i\bigr)$,
and the left-hand side is $0$. Hence $\sum_{i} a_i \geq n$, as claimed. \qedhere
\end{proof}
""",
    "other scripts": """\
Утром над рекой стоял туман, и лодки казались нарисованными углём на серой бумаге.
我们每天早上六点起床，先去河边跑步，然后回家吃早饭。今天的天气比昨天好得多。
朝ごはんのあとで、犬をつれて公園まで散歩しました。風が少し冷たかったです。
في الصباح الباكر ذهبنا إلى السوق واشترينا الخبز والزيتون وبعض الفاكهة الطازجة.
सुबह होते ही बच्चे मैदान में खेलने निकल पड़े और शाम तक घर नहीं लौटे।
Το πρωί η θάλασσα ήταν ήσυχη και τα καΐκια γύριζαν αργά στο λιμάνι.
아침에 비가 그치자 아이들이 우산을 접고 학교로 뛰어갔다.
""",
}


if __name__ == "__main__":
    main(parse(Config))
