"""Byte pair encoding as slowly and plainly as it can be said: what rustbpe must equal."""
from collections import Counter

import regex


def split(text, pattern):
    """Text -> its pieces, by the `regex` package."""
    return [match.group() for match in regex.finditer(pattern, text) if match.group()]


def train(texts, vocab_size, pattern):
    """Texts -> the bytes of every token. Each round counts all neighbours anew and merges the most frequent pair of ids;
    of several, the one with the smallest left, then right id."""
    words = Counter(tuple(piece.encode()) for text in texts for piece in split(text, pattern))
    tokens = [bytes([byte]) for byte in range(256)]
    while len(tokens) < vocab_size:
        counts = Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:]):
                counts[pair] += count
        if not counts:
            break
        pair = min(counts, key=lambda pair: (-counts[pair], pair))
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        merged = Counter()
        for word, count in words.items():
            merged[merge(word, pair, len(tokens) - 1)] += count
        words = merged
    return tokens


def merge(word, pair, new):
    """A word with every occurrence of the pair replaced, from left to right."""
    result, at = [], 0
    while at < len(word):
        if word[at:at + 2] == pair:
            result.append(new)
            at += 2
        else:
            result.append(word[at])
            at += 1
    return tuple(result)


def encode(text, tokens, pattern):
    """Text -> ids: a piece that is a token is that token; otherwise join the neighbours whose union ranks lowest, leftmost first."""
    ranks = {}
    for rank, token in enumerate(tokens):
        ranks.setdefault(token, rank)
    ids = []
    for piece in split(text, pattern):
        piece = piece.encode()
        parts = [piece] if piece in ranks else [bytes([byte]) for byte in piece]
        while True:
            unions = [(ranks[left + right], at) for at, (left, right) in enumerate(zip(parts, parts[1:])) if left + right in ranks]
            if not unions:
                break
            at = min(unions)[1]
            parts[at:at + 2] = [parts[at] + parts[at + 1]]
        ids += [ranks[part] for part in parts]
    return ids
