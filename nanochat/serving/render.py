"""What a model writes -> HTML that cannot act. Markdown by markdown-it-py, LaTeX to MathML by latex2mathml, and whatever comes out
goes through nh3 (ammonia), which keeps only the elements and attributes named here."""
import functools
import html
import re
from xml.etree import ElementTree

import nh3
from latex2mathml.converter import convert_to_element
from markdown_it import MarkdownIt
from mdit_py_plugins.amsmath import amsmath_plugin
from mdit_py_plugins.dollarmath import dollarmath_plugin

MAX_FORMULA = 2000  # characters
MAX_NESTING = 50    # braces, \left and \begin inside one another
MAX_BRACKETS = 500  # looking for a link's end costs the square of the open brackets: with more of them there are no links
TIMES = re.compile(r"(?<=[\w)])\*(?=[\w(])")
TEXT_TAGS = {"p", "br", "hr", "h1", "h2", "h3", "h4", "h5", "h6", "em", "strong", "s", "del", "code", "pre", "blockquote", "ul", "ol", "li",
             "table", "thead", "tbody", "tr", "th", "td", "a", "span", "div", "sup", "sub"}
# Presentation MathML. No annotation, semantics, mglyph or maction: they reach out of MathML or act.
MATH_TAGS = {"math", "mi", "mn", "mo", "ms", "mtext", "mspace", "mrow", "mfrac", "msqrt", "mroot", "mstyle", "merror", "mpadded", "mphantom",
             "mfenced", "menclose", "msub", "msup", "msubsup", "munder", "mover", "munderover", "mmultiscripts", "mprescripts", "mtable", "mtr", "mtd"}
MATH_ATTRIBUTES = {"display", "mathvariant", "stretchy", "fence", "form", "separator", "largeop", "movablelimits", "minsize", "maxsize", "lspace", "rspace",
                   "accent", "accentunder", "linethickness", "columnalign", "rowspacing", "columnspacing", "scriptlevel", "displaystyle", "notation"}
ATTRIBUTES = {**{tag: MATH_ATTRIBUTES for tag in MATH_TAGS}, "mspace": MATH_ATTRIBUTES | {"width", "height", "depth"},
              "mpadded": {"width", "height", "depth", "lspace", "voffset"}, "a": {"href", "title"}, "ol": {"start"}, "code": {"class"}}
CLASSES = re.compile(r"math-error|language-[A-Za-z0-9_+#-]{1,30}")


def render(text):
    """Markdown with $...$, $$...$$, \\(...\\), \\[...\\] -> safe HTML. Never raises on any text."""
    markdown = parser(text.count("[") <= MAX_BRACKETS)
    return nh3.clean(markdown.render(text.replace("\0", "�")), tags=TEXT_TAGS | MATH_TAGS, attributes=ATTRIBUTES, url_schemes={"http", "https", "mailto"},
                     attribute_filter=keep_attribute, link_rel="noopener noreferrer nofollow", strip_comments=True, clean_content_tags={"script", "style"})


def keep_attribute(tag, name, value):
    return value if name != "class" or CLASSES.fullmatch(value) else None


@functools.cache
def parser(has_links):
    """HTML in the text stays text; pictures become links, since loading one would tell its host who reads."""
    markdown = MarkdownIt("commonmark", {"html": False, "breaks": True, "linkify": False, "maxNesting": 40}).enable(["table", "strikethrough"])
    markdown.use(dollarmath_plugin, allow_labels=False, allow_space=False, allow_digits=False, double_inline=True, renderer=formula_of_options)
    markdown.inline.ruler.before("escape", "math_brackets", math_brackets)
    markdown.inline.ruler.before("emphasis", "times", times)
    markdown.use(amsmath_plugin, renderer=lambda content: formula(content, True))
    markdown.disable(["image"] if has_links else ["image", "link", "reference"])
    for name, is_block in (("math_inline", False), ("math_single", False), ("math_block", True), ("math_block_eqno", True), ("math_inline_double", True)):
        markdown.add_render_rule(name, math_rule(is_block))
    return markdown


def math_brackets(state, silent):
    """The inline rule for \\( ... \\) and \\[ ... \\], wherever they stand in a paragraph."""
    opening = state.src[state.pos:state.pos + 2]
    closing = {"\\(": "\\)", "\\[": "\\]"}.get(opening)
    end = state.src.find(closing, state.pos + 2, min(state.posMax, state.pos + MAX_FORMULA)) if closing else -1
    if end < 0:
        return False
    if not silent:
        token = state.push("math_inline" if closing == "\\)" else "math_inline_double", "math", 0)
        token.content = state.src[state.pos + 2:end]
    state.pos = end + 2
    return True


def times(state, silent):
    """The inline rule for the * of 4*7, which multiplies: two of them in a line are no emphasis."""
    if not TIMES.match(state.src, state.pos):
        return False
    if not silent:
        state.pending += "*"
    state.pos += 1
    return True


def math_rule(is_block):
    return lambda self, tokens, index, options, env: formula(tokens[index].content, is_block)


def formula_of_options(content, options):
    return formula(content, options["display_mode"])


def formula(latex, is_block):
    """LaTeX -> MathML, or the LaTeX itself as code where the converter cannot read it."""
    try:
        if len(latex) > MAX_FORMULA or depth(latex) > MAX_NESTING:
            raise ValueError("too long or too deep")
        element = convert_to_element(latex.strip(), display="block" if is_block else "inline")
        for part in element.iter():
            part.text = html.unescape(part.text or "")  # the converter writes its symbols as entities, and what stands in \text as it is
        return ElementTree.tostring(element, encoding="unicode", short_empty_elements=False)
    except Exception:  # untrusted text: failure is a value, and the converter names its errors in many ways
        return f'<code class="math-error">{html.escape(latex)}</code>'


def depth(latex):
    deepest = level = 0
    for found in re.finditer(r"\\left(?![a-z])|\\right(?![a-z])|\\begin|\\end|[{}^_]|\\(?:frac|sqrt)", latex):
        token = found[0]
        level += -1 if token in ("}", "\\right", "\\end") else 1
        deepest = max(deepest, level)
        if token in ("^", "_") or token.startswith(("\\frac", "\\sqrt")):
            level -= 1
    return deepest
