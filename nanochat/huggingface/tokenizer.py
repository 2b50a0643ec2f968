"""Our tokenizer as Hugging Face's three files, and back: tokenizer.json, tokenizer_config.json, chat_template.jinja.

The ids are equal, which takes four things that are easy to miss. (1) tiktoken joins any two neighbours whose union is a token, however
that token was made, so every such pair is a merge, not only the one that was trained. (2) A piece that is a token is that token:
ignore_merges. (3) Text in a conversation never becomes a special token: the chat template puts U+FDD0, a noncharacter that no text
holds, into every "<|" of a message, and the normalizer takes it out again behind the place where special tokens are looked for.
(4) Two texts in a row are encoded each for itself: the template puts a break between them, at which the first split cuts.

Outside conversations Hugging Face's convention stands: "<|bos|>" in a text is the special token, unless split_special_tokens=True.
"""
import json
from pathlib import Path

from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer

GUARD = "\ufdd0"                # stands between "<" and "|" of a message's text
BREAK = "\ufdd2\ufdd2"         # stands between two texts in a row
SAME_BYTES = "\ufdd1"           # begins the name of a token whose bytes an earlier one has: no text can produce it
# takes out the guard alone: were "<|" put in place of all three, its token would lose its place in the text, and the assistant's mask with it
NORMALIZER = {"type": "Replace", "pattern": {"Regex": f"(?<=<){GUARD}(?=\\|)"}, "content": ""}
BREAK_SPLIT = {"type": "Split", "pattern": {"String": BREAK}, "behavior": "Removed", "invert": False}

CHAT_TEMPLATE = """\
{#- <|bos|> (<|user_start|> text <|user_end|> <|assistant_start|> parts <|assistant_end|>)*; the system's text begins the first question.
    A part is {"type": "text", "python" or "python_output", "text": ...}. In a message's "<|" a noncharacter follows the "<", so that
    text never becomes a special token, and two others stand between two texts in a row; the tokenizer takes them out again. What the
    assistant says up to an output is one generation block: of a character of several tokens at a block's end only the first would count. #}
{%- macro plain(text) -%}
    {{- text | replace('<|', '<GUARD|') -}}
{%- endmacro -%}
{%- macro words(message, glue) -%}
    {%- if message.content is string -%}
        {{- message.content -}}
    {%- else -%}
        {%- for part in message.content -%}
            {%- if part.type != 'text' -%}
                {{- raise_exception('a message of the ' ~ message.role ~ ' has a part of type ' ~ part.type ~ ': only the assistant has parts other than text') -}}
            {%- endif -%}
            {{- ('' if loop.first else glue) ~ part.text -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- set system = namespace(text='', first=0) -%}
{%- if messages[0].role == 'system' -%}
    {%- set system.text = words(messages[0], '') ~ '\\n\\n' -%}
    {%- set system.first = 1 -%}
{%- endif -%}
{{- '<|bos|>' -}}
{%- for message in messages[system.first:] -%}
    {%- set expected = 'user' if loop.index0 % 2 == 0 else 'assistant' -%}
    {%- if message.role != expected -%}
        {{- raise_exception('message ' ~ (loop.index0 + system.first) ~ ' has the role ' ~ message.role ~ ', but it is the turn of the ' ~ expected
                            ~ ': roles alternate, the user begins, and only message 0 may be the system') -}}
    {%- endif -%}
    {%- if not message.content -%}
        {{- raise_exception('message ' ~ (loop.index0 + system.first) ~ ' (' ~ message.role ~ ') is empty: drop it or give it content') -}}
    {%- endif -%}
    {%- if message.role == 'user' -%}
        {{- '<|user_start|>' ~ plain(system.text ~ words(message, '') if loop.first else words(message, 'BREAK')) ~ '<|user_end|>' -}}
    {%- else -%}
        {{- '<|assistant_start|>' -}}
        {%- set said = namespace(text='') -%}
        {%- for part in ([{'type': 'text', 'text': message.content}] if message.content is string else message.content) -%}
            {%- if part.type == 'python_output' -%}
                {%- if said.text -%}
                    {%- generation -%}{{- said.text -}}{%- endgeneration -%}
                {%- endif -%}
                {{- '<|output_start|>' ~ plain(part.text) ~ '<|output_end|>' -}}
                {%- set said.text = '' -%}
            {%- elif part.type == 'python' -%}
                {%- set said.text = said.text ~ '<|python_start|>' ~ plain(part.text) ~ '<|python_end|>' -%}
            {%- elif part.type == 'text' -%}
                {%- set said.text = said.text ~ ('BREAK' if not loop.first and loop.previtem.type == 'text' else '') ~ plain(part.text) -%}
            {%- else -%}
                {{- raise_exception('a part of type ' ~ part.type ~ ' is none of text, python and python_output') -}}
            {%- endif -%}
        {%- endfor -%}
        {%- generation -%}{{- said.text ~ '<|assistant_end|>' -}}{%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant_start|>' -}}
{%- endif -%}
""".replace("GUARD", GUARD).replace("BREAK", BREAK)


def byte_letters():
    """GPT-2's 256 printable stand-ins: byte -> character, those of the printable bytes being themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + place) for place, byte in enumerate(others)}


LETTERS = byte_letters()
BYTES = {letter: byte for byte, letter in LETTERS.items()}


def spell(token):
    return "".join(LETTERS[byte] for byte in token)


# -- ours -> Hugging Face -----------------------------------------------------------------------------------------------

def tokenizer_json(tokenizer):
    """Tokenizer -> the content of Hugging Face's tokenizer.json."""
    first = {}                                          # bytes -> the first token that has them, the only one that encoding gives
    for rank, token in enumerate(tokenizer.tokens):
        first.setdefault(token, rank)
    vocab = {spell(token) if first[token] == rank else f"{SAME_BYTES}{rank}={first[token]}": rank for rank, token in enumerate(tokenizer.tokens)}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": token_id, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
                         for name, token_id in tokenizer.special_ids.items()],
        "normalizer": NORMALIZER,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            BREAK_SPLIT, {"type": "Split", "pattern": {"Regex": tokenizer.pattern}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": False, "byte_fallback": False, "ignore_merges": True, "vocab": vocab,
                  "merges": [[spell(left), spell(right)] for left, right in merges(first)]},
    }


def merges(first):
    """{bytes: rank} -> every pair of tokens whose union is a token, by the rank of the union."""
    for token in sorted(first, key=first.get):
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token)) if token[:cut] in first and token[cut:] in first]
        yield from sorted(pairs, key=lambda pair: (first[pair[0]], first[pair[1]]))


def tokenizer_config(tokenizer, sequence_len):
    """The content of tokenizer_config.json. Padding is <|bos|>, not the end: who ignores padding in a loss must still learn to end."""
    others = [name for name in tokenizer.special_tokens if name not in ("<|bos|>", "<|assistant_end|>")]
    return {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|bos|>", "eos_token": "<|assistant_end|>", "pad_token": "<|bos|>",
            "extra_special_tokens": others, "model_max_length": sequence_len, "clean_up_tokenization_spaces": False, "padding_side": "left"}


# -- Hugging Face -> ours -----------------------------------------------------------------------------------------------

def read_tokenizer(path):
    """A tokenizer.json of Hugging Face's, made here or elsewhere -> Tokenizer with the same ids. ValueError says which part of the
    file our tokenizer has no equal for."""
    path = Path(path)
    try:
        content = json.loads(path.read_bytes())
        return from_content(content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} cannot be read as the tokenizer of a nanochat model: {reason}. It must be a byte-level BPE with one split "
                         f"pattern and the {len(SPECIAL_TOKENS)} special tokens behind its vocabulary: restore it, or fetch the folder again") from error


def from_content(content):
    model, special = content["model"], {entry["content"]: entry["id"] for entry in content["added_tokens"]}
    if model.get("type", "BPE") != "BPE" or model.get("byte_fallback") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise ValueError(f"its model is {model.get('type')!r}, or a BPE with byte fallback, prefixes or suffixes")
    if content.get("normalizer") not in (None, NORMALIZER):
        raise ValueError(f"it has a normalizer ({content['normalizer'].get('type')}) that changes text before it is split")
    ranks = {spelled: rank for spelled, rank in model["vocab"].items() if spelled not in special}
    by_rank = sorted(ranks, key=ranks.get)
    names = sorted(special, key=special.get)
    if [ranks[spelled] for spelled in by_rank] != list(range(len(ranks))) or [special[name] for name in names] != list(range(len(ranks), len(ranks) + len(names))):
        raise ValueError(f"the ids of its {len(ranks)} tokens and {len(names)} special tokens are not 0, 1, 2, ... in this order")
    tokens = []
    for spelled in by_rank:
        same = int(spelled.rpartition("=")[2]) if spelled.startswith(SAME_BYTES) else None
        if same is not None and not 0 <= same < len(tokens):
            raise ValueError(f"token {len(tokens)} claims to be token {same} once more")
        tokens.append(bytes(BYTES[letter] for letter in spelled) if same is None else tokens[same])
    check_merges(model["merges"], ranks)
    return Tokenizer(tokens, split_of(content["pre_tokenizer"]), names)


def split_of(pre_tokenizer):
    """The one split pattern of a pre-tokenizer: Split by a regex, then bytes."""
    steps = pre_tokenizer.get("pretokenizers", []) if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    steps = steps[1:] if steps[:1] == [BREAK_SPLIT] else steps
    kinds = [step["type"] for step in steps]
    if kinds != ["Split", "ByteLevel"] or steps[0]["behavior"] != "Isolated" or steps[0].get("invert") or steps[1].get("add_prefix_space") \
            or steps[1].get("use_regex", True) or "Regex" not in steps[0]["pattern"]:
        raise ValueError(f"it splits text by {', '.join(kinds)} with settings other than one regex and bytes")
    return steps[0]["pattern"]["Regex"]


def check_merges(pairs, ranks):
    """ValueError unless merging by this list is merging by the ranks of the unions: in their order, and none missing."""
    last, reached = -1, set()
    for pair in pairs:
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        rank = ranks.get(left + right)
        if left not in ranks or right not in ranks or rank is None or rank < last:
            raise ValueError(f"its merge {left!r} + {right!r} is not in the order of the vocabulary")
        last = rank
        reached.add(left + right)
    lost = [spelled for spelled in ranks if len(spelled) > 1 and spelled not in reached and not spelled.startswith(SAME_BYTES)]
    if lost:
        raise ValueError(f"no merge makes {len(lost)} of its {len(ranks)} tokens, {lost[0]!r} the first of them")
