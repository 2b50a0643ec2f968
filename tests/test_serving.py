"""The parts of the server that need no HTTP: text with stop strings, scoring, rendering, the page's policy, the metrics' format."""
import base64
import hashlib
import os
import re
import time
from html.parser import HTMLParser

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanochat.engine import Engine, Request, TextStream, message_parts
from nanochat.serving import scoring
from nanochat.serving.generate import Choice
from nanochat.serving.metrics import Metrics
from nanochat.serving.page import Page
from nanochat.serving.protocol import ApiError
from nanochat.serving.render import ATTRIBUTES, MATH_TAGS, TEXT_TAGS, render
from nanochat.serving.text import Answer, Speech, StopText, text_offsets, token_text
from nanochat.tokenizer import SPECIAL_TOKENS
from tests.test_engine import END, OUTPUT_END, OUTPUT_START, PYTHON_END, PYTHON_START, ByteTokenizer, make_model, prompts

short = st.text("ab\n", max_size=12)


def reference_cut(text, stops):
    """Character by character: the answer ends when its end is a stop string, the longest of those that fit."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if stop and text[:end].endswith(stop)]
        if found:
            return text[:end - max(map(len, found))], True
    return text, False


@given(st.lists(short, max_size=8), st.lists(st.text("ab\n", max_size=5), max_size=4))
@example(["a", "b", "ab", "c"], ["abc", "b"])
def test_a_stop_string_cuts_at_the_same_place_however_the_text_comes(pieces, stops):
    cutter, shown = StopText(stops), ""
    for piece in pieces:
        shown += cutter.add(piece)
        assert reference_cut("".join(pieces), stops)[0].startswith(shown), "something was shown that belongs to a stop string"
        if cutter.is_cut:
            break
    else:
        shown += cutter.flush()
    assert (shown, cutter.is_cut) == reference_cut("".join(pieces), stops)


@given(st.binary(max_size=30), st.lists(st.text("aé東b", min_size=1, max_size=3), max_size=3))
@example("é東🙂".encode(), [])
@example(b"ab\xe6\x9d", ["b\ufffd"])
def test_an_answer_is_its_bytes_decoded_and_cut_and_every_token_has_its_place(data, stops):
    answer, shown, released = Answer(TextStream(ByteTokenizer()), stops), "", []
    for byte in data:
        shown += answer.add(byte)
        if answer.is_cut:
            break
        released += answer.release(finished=False)[0]
    if not answer.is_cut:
        shown += answer.finish()
    released += answer.release(finished=True)[0]
    expected, is_cut = reference_cut(data.decode(errors="replace"), stops)
    assert (shown, answer.whole, answer.is_cut) == (expected, expected, is_cut)
    assert released == list(data[:len(released)]) and (is_cut or len(released) == len(data))
    assert answer.offsets == sorted(answer.offsets)


def test_offsets_count_characters_and_tokens_have_distinct_names():
    text, offsets = text_offsets(ByteTokenizer(), [*"aé東b".encode()])
    assert text == "aé東b" and offsets == [0, 1, 1, 2, 2, 2, 3]
    names = [token_text(ByteTokenizer(), token) for token in range(265)]
    assert len(set(names)) == 265 and names[97] == "a" and names[0xe2] == "bytes:\\xe2" and names[END] == "<|assistant_end|>"


CALL = [PYTHON_START, *b"1+1", PYTHON_END, OUTPUT_START, *b"2", OUTPUT_END]


def spoken(tokens, hides_tools):
    """All that is shown of tokens."""
    speech = Speech(ByteTokenizer(), hides_tools)
    pieces = [speech.add(token) for token in tokens]
    return "".join([*pieces, speech.flush()])


@pytest.mark.parametrize("tokens, chat, text", [
    ([*b"so ", *CALL, *b"two"], "so two", "so 1+12two"), (CALL, "", "1+12"), ([256, *b"a", 257], "a", "a"),
    ([*b"a", PYTHON_START, *b"1+"], "a1+", "a1+"),                                      # the answer ends inside of a call
    ([PYTHON_START, *b"1", PYTHON_START, *b"2", PYTHON_END], "1", "12"), ([PYTHON_START, *b"1", OUTPUT_END, *b"2"], "12", "12"),
    ([PYTHON_END, *b"a", OUTPUT_END], "a", "a"), ([OUTPUT_START, *b"x", PYTHON_END], "x", "x"),
    ([0xc3, PYTHON_START, *b"1", PYTHON_END, 0xa9], "\ufffd\ufffd", "\ufffd1\ufffd"), ([0xc3, 257, 0xa9], "\ufffd\ufffd", "é")])
def test_special_tokens_are_no_text_and_whole_tool_calls_none_of_a_chats(tokens, chat, text):
    assert (spoken(tokens, True), spoken(tokens, False)) == (chat, text)


@given(st.lists(st.one_of(st.sampled_from([*b"ab<|>", 0xc3, 0xa9]), st.integers(256, 264)), max_size=30))
def test_what_is_said_is_the_text_of_the_parts_where_no_call_is_torn(tokens):
    """A torn call is one that is not ended by its own end: its words stay, and message_parts drops them."""
    said, parts = spoken(tokens, True), message_parts(ByteTokenizer(), tokens)
    names = [(place, token) for place, token in enumerate(tokens) if token >= 256] + [(len(tokens), None)]
    ends = {PYTHON_START: PYTHON_END, OUTPUT_START: OUTPUT_END}
    torn = any(token in ends and after != ends[token] and place + 1 < next_place for (place, token), (next_place, after) in zip(names, names[1:]))
    if not torn:
        assert said == "".join(part["text"] for part in parts if part["type"] == "text")
    assert not any(name in said for name in SPECIAL_TOKENS)
    assert spoken(tokens, False) == bytes(token for token in tokens if token < 256).decode(errors="replace")


# ---------------------------------------------------------------------------------------------------------------------
# Scoring

@pytest.mark.parametrize("top", [0, 1, 7])
def test_scores_are_the_log_softmax_of_the_logits_whatever_is_scored_with_them(top):
    model = make_model()
    items = [scoring.Item(prompt, first, top) for prompt in prompts(9, seed=3) for first in {0, 1, len(prompt)}]
    together = [score for batch in scoring.batches(items, "cpu") for score in zip(batch, scoring.score(model, [items[i] for i in batch]))]
    assert sorted(place for place, _ in together) == list(range(len(items)))
    for place, score in together:
        tokens, first, _ = items[place]
        with torch.no_grad():
            logprobs = torch.log_softmax(model(torch.tensor([tokens]))[0], dim=-1)  # (T, V)
        assert len(score.logprobs) == len(score.top) == len(tokens) - first
        for t in range(first, len(tokens)):
            if t == 0:
                assert score.logprobs[0] is None and score.top[0] is None
                continue
            assert score.logprobs[t - first] == pytest.approx(logprobs[t - 1, tokens[t]].item(), abs=1e-5)
            assert [token for token, _ in score.top[t - first]] == logprobs[t - 1].topk(top).indices.tolist()
            if top:  # to the last bit: harnesses compare the token's value with the greatest
                assert (score.logprobs[t - first] == score.top[t - first][0][1]) == (logprobs[t - 1].argmax().item() == tokens[t])
        assert score.next[0] == logprobs[-1].argmax() and score.next[1] == pytest.approx(logprobs[-1].max().item(), abs=1e-5)


def test_a_pass_of_scoring_is_bounded():
    items = [scoring.Item([0] * length, 0, 1) for length in (500, 3, 700, 90, 20, 2000, 45, 400)]
    batches = scoring.batches(items, "cpu")
    for batch in batches:
        lengths = [len(items[i].tokens) for i in batch]
        assert len(batch) == 1 or (max(lengths) * len(batch) <= scoring.PASS_TOKENS["cpu"] and min(lengths) * 2 >= max(lengths))


def test_the_likeliest_next_token_is_the_engines_greedy_one():
    model = make_model(seed=4)
    engine = Engine(model, ByteTokenizer(), tools=False)
    for prompt in prompts(5, seed=5):
        ((completion,),) = engine.generate([Request(prompt, max_new_tokens=1, temperature=0.0)])
        (score,) = scoring.score(model, [scoring.Item(prompt, len(prompt), 0)])
        assert completion.tokens == [score.next[0]]


def test_a_choice_forgets_what_has_been_looked_at():
    choice = Choice(0, [1])
    choice.new_text, choice.tokens = "x", [1, 2]
    choice.look_away()
    assert (choice.new_text, choice.first_new, choice.score) == ("", 2, None)


# ---------------------------------------------------------------------------------------------------------------------
# Rendering

class Checker(HTMLParser):
    """Fails at whatever is not on the list."""

    def handle_starttag(self, tag, attributes):
        assert tag in TEXT_TAGS | MATH_TAGS, tag
        for name, value in attributes:
            assert name in ATTRIBUTES.get(tag, ()) or (tag, name) == ("a", "rel"), (tag, name)
            assert name != "href" or re.match(r"(https?:|mailto:|[^:]*$)", value or "", re.IGNORECASE), value
            assert name != "class" or re.fullmatch(r"math-error|language-[\w+#-]{1,30}", value, re.ASCII), value

    def handle_comment(self, data):
        raise AssertionError(data)

    handle_decl = handle_pi = unknown_decl = handle_comment


ATTACKS = ["<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "[x](javascript:alert(1))", "[x](data:text/html,<script>alert(1)</script>)",
           "![x](http://evil.test/x.png)", "<svg/onload=alert(1)>", "$\\text{<img src=x onerror=alert(1)>}$", "$\\href{javascript:alert(1)}{x}$",
           "$$\\text{</mtext></math><script>alert(1)</script>}$$", "<math><mtext><table><mglyph><style><img src=x onerror=alert(1)>",
           "```\"><script>\nx\n```", "[x]: javascript:alert(1)\n[x]", "<http://a.b/\"onmouseover=alert(1)>", "$\\style{x:y}{<b>}$", "\\(<script>\\)",
           "\\begin{align}<script>&\\end{align}", "&lt;script&gt;", "$\\unicode{x3c}script>$", "$&lt;img src=x onerror=alert(1)&gt;$", "<!-- x -->", "<a href=x style=y>",
           "[a](vbscript:x \"t\")", "$\\class{x\" onload=\"alert(1)}{y}$", "[x](JaVaScRiPt&colon;alert(1))", "\0<scr\0ipt>"]


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_that_a_model_writes_can_act(attack):
    for text in (attack, f"a {attack} b", f"> {attack}", f"| {attack} |\n|---|\n| {attack} |", f"**{attack}**", f"$ {attack} $"):
        check(render(text))


def check(html):
    checker = Checker(convert_charrefs=True)
    checker.feed(html)
    checker.close()


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(st.sampled_from([*ATTACKS, "$", "$$", "\\(", "\\)", "\\[", "\\]", "\\frac", "{", "}", "^", "_", "`", "```", "\n", "|", "[", "](", ")", "<", ">", "\"",
                                            "\\left", "\\right.", "\\begin{matrix}", "\\end{matrix}", "&", "\\sqrt", "\\text{", "\\mathbb", "\\hline", "\\color{red}"]),
                         st.text(max_size=6)), max_size=14))
def test_any_text_is_rendered_and_stays_harmless(pieces):
    check(render("".join(pieces)))


def test_markdown_and_formulas_become_what_they_mean():
    html = render("**b** $x<y$ costs $5 and $6\n\n\\[\\frac{1}{2}\\]\n\n|a|\n|-|\n|$z$|\n\n```python\n1<2\n```\nin \\(k\\) and $$m$$")
    for part in ("<strong>b</strong>", "<mi>x</mi><mo>&lt;</mo><mi>y</mi>", "costs $5 and $6", "<mfrac>", "<td><math", 'class="language-python">1&lt;2',
                 '<math display="inline"><mrow><mi>k</mi>', '<math display="block"><mrow><mi>m</mi>'):
        assert part in html, part
    assert "math-error" in render("${$") and "<mi>" not in render("$" + "x" * 3000 + "$")


@pytest.mark.parametrize("unit", ["[", "*a ", "$x$ ", "> ", "`", "![](", "\\(", "|a", "- ", "{", "<a ", "$\\frac{", "\\begin{a}", "**"])
def test_long_repetitions_take_no_long_time(unit):
    began = time.process_time()
    check(render((unit * 20_000)[:20_000]))
    assert time.process_time() - began < 5


# ---------------------------------------------------------------------------------------------------------------------
# The page's policy, the metrics' format

def test_the_policy_names_every_script_and_style_of_the_page_by_its_hash(tmp_path):
    path = tmp_path / "page.html"
    path.write_bytes(b"<html><style>\nb{}\r\n</style><script>one()</script><SCRIPT type=module>two()</SCRIPT></html>")
    page = Page(path)
    html, policy = page.read()
    assert html == path.read_bytes() and "unsafe" not in policy and "default-src 'none'" in policy
    for source in (b"one()", b"two()", b"\nb{}\n"):
        assert base64.b64encode(hashlib.sha256(source).digest()).decode() in policy
    path.write_bytes(b"<p>")
    os.utime(path, ns=(1, 1))
    assert page.read()[0] == b"<p>" and "script-src 'none'" in page.read()[1]
    for missing in (Page(None), Page(tmp_path / "none.html")):
        with pytest.raises(ApiError, match="no page"):
            missing.read()


def test_metrics_are_prometheus_text():
    metrics = Metrics()
    metrics.count("nanochat_requests_total", endpoint="/x", status=200)
    metrics.count("nanochat_requests_total", 2, endpoint="/x", status=200)
    for seconds in (0.001, 0.02, 999):
        metrics.observe("nanochat_request_seconds", seconds, endpoint="/x")
    text = metrics.text({("nanochat_rows", (("worker", 0),)): 3})
    assert 'nanochat_requests_total{endpoint="/x",status="200"} 3\n' in text and 'nanochat_rows{worker="0"} 3\n' in text
    assert 'nanochat_request_seconds_bucket{endpoint="/x",le="0.025"} 2\n' in text and 'le="+Inf"} 3\n' in text
    assert all(re.fullmatch(r'# (HELP|TYPE) \w+ .+|\w+(\{(\w+="[^"]*",?)+\})? [-+.e\d]+', line) for line in text.splitlines())
    assert metrics.mean("nanochat_request_seconds") == pytest.approx(999.021 / 3)
