"""The page in a real Chromium, over the real server with tiny random models. Whatever a test does, the page must break no policy, ask no
other host for anything, and throw nothing."""
import json
import shutil
import threading
import time
from itertools import accumulate, count
from pathlib import Path

import httpx
import pytest

from nanochat.checkpoint_manager import load_model
from nanochat.engine import Engine, Request
from nanochat.serving import completions, driver
from nanochat.serving.render import render
from nanochat.serving.text import Speech
from scripts import chat_web
from tests.serving import SECONDS, Pace, make_base, serve, wait_until_idle

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
expect = playwright.expect
PAGE = Path(chat_web.__file__).with_name("chat_web.html")
ATTACKS = ["<img src=x onerror=hacked=1>", "<script>hacked=1</script>", "<svg onload=hacked=1>", "[a](javascript:hacked=1)", "![x](https://example.test/x.png)",
           "<iframe srcdoc='<script>parent.hacked=1</script>'>", "<math><mi href='javascript:hacked=1'>x</mi></math>", "$\\href{javascript:hacked=1}{x}$",
           "$\\text{<img src=x onerror=hacked=1>}$", "```html\n<img src=x onerror=hacked=1>\n```", "<a href='https://example.test' style='position:fixed'>a</a>",
           "</div></section><style>*{display:none}</style>", "<form action=//example.test><button formaction=javascript:hacked=1>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("paged")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        for name in ("AQUA_DATA_DIR", "NANOCHAT_AQUA_DIR", "NANOCHAT_API_KEY"):
            patch.delenv(name, raising=False)
        make_base(folder, sequence_len=768)
        yield folder


@pytest.fixture(scope="module")
def server(folder):
    with serve(page=PAGE, routers=(chat_web.router,)) as server:
        yield server


@pytest.fixture(scope="module")
def long_answer(folder):
    """(a question whose greedy answer has 40 tokens, what has been said after so many of them)"""
    model, tokenizer, _ = load_model("rl", "cpu", dtype="float32")
    engine = Engine(model, tokenizer)
    for text in ("a", "b", "c", "Ann", "10", "8", "cups", "boxes", "how", "many"):
        prompt = tokenizer.render_prompt([{"role": "user", "content": text}])
        tokens = engine.generate([Request(prompt, max_new_tokens=40, temperature=0.0)])[0][0].tokens
        speech = Speech(tokenizer, hides_tools=True)
        said = list(accumulate(map(speech.add, tokens)))
        if len(tokens) == 40 and said[5].strip() and said[5].strip() != said[15].strip() != said[-1].strip():
            return text, lambda count: said[count - 1]
    raise AssertionError("every answer ends early")


@pytest.fixture(scope="module")
def question(long_answer):
    return long_answer[0]


@pytest.fixture(scope="module")
def browser():
    expect.set_options(timeout=1000 * SECONDS)
    with playwright.sync_playwright() as run:
        browser = run.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"], timeout=1000 * SECONDS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, server):
    """visit(server, **context) -> a page in a context of its own, at temperature 0 and 40 tokens at most."""
    contexts, wrongs, requests = [], [], []

    def watch(page):
        page.on("pageerror", lambda error: wrongs.append(str(error)))
        page.on("console", lambda message: wrongs.append(message.text) if "Content Security Policy" in message.text else None)
        page.on("request", lambda request: requests.append(request.url))

    def visit(at=server, max_tokens=40, **options):
        context = browser.new_context(**options)
        context.set_default_timeout(1000 * SECONDS)
        context.add_init_script("window.violations = []; addEventListener('securitypolicyviolation', event => violations.push(event.violatedDirective));"
                                f"if (location.host) localStorage['nanochat.settings'] ??= JSON.stringify({{temperature: '0', max_tokens: '{max_tokens}'}});")
        context.on("page", watch)
        contexts.append(context)
        page = context.new_page()
        page.goto(at.url)
        return page

    yield visit
    for context in contexts:
        wrongs += [directive for page in context.pages for directive in page.evaluate("window.violations ?? []")]
        context.close()
    assert not wrongs, wrongs
    assert requests and all(url.startswith(("http://127.0.0.1:", "data:", "blob:")) for url in requests), "a request left the origin"


def answers_say(monkeypatch, said):
    """The models' tokens become the pieces of `said`, whatever they are; all else is as ever."""
    class Saying:
        def __init__(self, tokenizer, hides_tools):
            self.place = count()

        def add(self, token):
            start = 5 * next(self.place)
            return said[start:start + 5]

        def flush(self):
            return said[5 * next(self.place):]
    monkeypatch.setattr(completions, "Speech", Saying)
    monkeypatch.setattr(driver, "message_parts", lambda *_: [])


def expected_answer(server, *messages, model="rl", max_tokens=40):
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * len(messages), messages)]
    body = {"model": model, "messages": turns, "temperature": 0, "max_tokens": max_tokens}
    return httpx.post(server.url + "/v1/chat/completions", json=body, timeout=SECONDS).json()["choices"][0]["message"]["content"]


def send(page, text):
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def settle(page, answers=1):
    """Wait until so many answers are there, and none is running."""
    expect(page.locator(".answer")).to_have_count(answers)
    expect(page.locator("#log")).to_have_attribute("aria-busy", "false")


def chats(page):
    """What the browser keeps, the newest first."""
    kept = page.evaluate("Object.entries(localStorage).filter(([name]) => name.startsWith('nanochat.chat.')).map(([, value]) => value)")
    return sorted(map(json.loads, kept), key=lambda chat: -chat["changed"])


def kept_answers(page):
    return [answer["text"] for turn in chats(page)[0]["turns"] for answer in turn["answers"]]


def is_as_wide_as_the_window(page):
    return page.evaluate("document.documentElement.scrollWidth <= innerWidth && document.body.scrollWidth <= innerWidth")


# ---------------------------------------------------------------------------------------------------------------------

def test_an_answer_streams_stops_and_comes_whole_on_retry(visit, server, long_answer, monkeypatch):
    question, said_after = long_answer
    whole = expected_answer(server, question)
    pace = Pace(monkeypatch)
    page = visit()
    send(page, question)
    said = page.locator(".said")
    expect(said).to_have_class("said plain running")
    for steps, tokens in ((5, 6), (10, 16)):
        pace.give(steps)
        expect(said).to_have_text(said_after(tokens))
    page.keyboard.press("Escape")
    settle(page)
    expect(page.locator(".answer .told").last).to_contain_text("stopped")
    wait_until_idle(server)
    assert kept_answers(page) == [said_after(16)] != [whole]
    page.get_by_label("Retry the answer of rl/d2").click()
    page.get_by_role("button", name="Stop").click()  # the button stops as Esc does
    settle(page)
    wait_until_idle(server)
    pace.free()
    page.get_by_label("Retry the answer of rl/d2").click()
    settle(page)
    assert kept_answers(page) == [whole]
    expect(page.locator("#live")).to_contain_text("End of the answer.")
    wait_until_idle(server)


def test_a_conversation_survives_a_reload_and_can_be_edited_and_copied(visit, server):
    page = visit(max_tokens=8, permissions=["clipboard-read", "clipboard-write"])
    send(page, "Ann")
    settle(page)
    page.get_by_label("Message", exact=True).fill("has")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("10")
    page.keyboard.press("Enter")
    settle(page, 2)
    first = expected_answer(server, "Ann", max_tokens=8)
    second = expected_answer(server, "Ann", first, "has\n10", max_tokens=8) if first else expected_answer(server, "has\n10", max_tokens=8)
    assert kept_answers(page) == [first, second]
    page.reload()
    settle(page, 2)
    assert page.locator(".question .plain").all_text_contents() == ["Ann", "has\n10"] and kept_answers(page) == [first, second]
    page.get_by_label("Copy the answer of rl/d2").first.click()
    expect(page.get_by_text("Copied", exact=True)).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == first
    page.get_by_label("Edit your message").first.click()
    page.get_by_label("Your message, edited").fill("boxes")
    page.keyboard.press("Escape")
    settle(page, 2)
    page.get_by_label("Edit your message").first.click()
    expect(page.get_by_text("Sending drops the 1 later turn.")).to_be_visible()
    page.get_by_label("Your message, edited").fill("boxes")
    page.keyboard.press("Enter")
    expect(page.locator(".question .plain")).to_have_text(["boxes"])
    settle(page)
    assert kept_answers(page) == [expected_answer(server, "boxes", max_tokens=8)]
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".answer")).to_have_count(0)
    page.locator("#chats a").click()
    settle(page)
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete the chat Ann").click()
    expect(page.locator("#chats a")).to_have_count(0)
    assert not chats(page)


def test_two_tabs_at_once_keep_their_own_chats(visit, server, question, monkeypatch):
    whole = expected_answer(server, question)
    pace = Pace(monkeypatch)
    first = visit()
    second = first.context.new_page()
    second.goto(server.url)
    send(first, question)
    send(second, question)
    for page in (first, second):
        expect(page.get_by_role("button", name="Stop")).to_be_visible()
    pace.free()
    for page in (first, second):
        settle(page)
    assert [[answer["text"] for turn in chat["turns"] for answer in turn["answers"]] for chat in chats(first)] == [[whole], [whole]]
    for page in (first, second):
        expect(page.locator("#chats a")).to_have_count(2)


def test_a_server_that_goes_and_comes_back_is_waited_for(visit, folder, server, question, monkeypatch):
    whole = expected_answer(server, question)
    pace = Pace(monkeypatch)
    with serve(page=PAGE) as before:
        page = visit(before)
        send(page, question)
        pace.give(5)
        expect(page.locator(".said")).not_to_have_text("")
    expect(page.locator("#banner")).to_contain_text("does not answer")
    expect(page.locator(".answer")).to_contain_text("asked again when the server is back")
    pace.free()
    with serve(page=PAGE, port=int(before.url.rpartition(":")[2])):
        settle(page)
        assert kept_answers(page) == [whole]
        expect(page.locator("#banner")).to_be_hidden()


def test_a_reload_in_the_middle_of_an_answer_keeps_what_there_is(visit, server, long_answer, monkeypatch):
    question, said_after = long_answer
    whole = expected_answer(server, question)
    pace = Pace(monkeypatch)
    page = visit()
    send(page, question)
    pace.give(5)
    expect(page.locator(".said")).to_have_text(said_after(6))
    page.reload()
    expect(page.locator(".answer .told").last).to_contain_text("not finished")
    assert kept_answers(page) == [said_after(6)]
    wait_until_idle(server)
    pace.free()
    page.get_by_label("Retry the answer of rl/d2").click()
    settle(page)
    assert kept_answers(page) == [whole]


@pytest.mark.parametrize("attacks", [ATTACKS[:7], ATTACKS[7:]])
def test_nothing_that_is_said_acts(visit, server, attacks, monkeypatch):
    """As the user's words, as the model's while they stream and once they are rendered, in the list of chats, after a reload."""
    attack = "\n\n".join(attacks)
    answers_say(monkeypatch, attack)
    page = visit(max_tokens=90)
    send(page, attack)
    settle(page)
    (said,) = kept_answers(page)
    assert said and attack.startswith(said)
    for _ in range(2):
        expect(page.locator(".said")).to_have_class("said")
        expect(page.locator(".question .plain")).to_have_text(attack, use_inner_text=True)
        assert page.locator(".said").evaluate("(said, html) => said.innerHTML.replaceAll(' target=\"_blank\"', '') === "
                                              "new DOMParser().parseFromString(html, 'text/html').body.innerHTML", render(said))
        assert page.locator("#log :is(img, script, svg, iframe, style, form, object, [onerror], [onload], [href^=javascript], [style*=fixed])").count() == 0
        assert page.evaluate("typeof hacked") == "undefined"
        page.reload()


def test_markdown_and_maths_are_drawn(visit, monkeypatch):
    answers_say(monkeypatch, "**So** $x^2$ and 4*7*2=56\n\n- `a*b*c`")
    page = visit()
    send(page, "cups")
    settle(page)
    said = page.locator(".said")
    expect(said.locator("strong")).to_have_text("So")
    expect(said.locator("li code")).to_have_text("a*b*c")
    assert said.locator("msup").bounding_box()["height"] > 5 and "4*7*2=56" in said.inner_text()


def test_a_tool_call_is_shown_as_code_and_goes_back_as_a_call(visit, server, monkeypatch):
    parts = [{"type": "text", "text": "Each costs "}, {"type": "python", "text": "12/60"}, {"type": "python_output", "text": "0.2"}, {"type": "text", "text": "0.2 dollars."}]
    answers_say(monkeypatch, "Each costs 0.2 dollars.")
    monkeypatch.setattr(driver, "message_parts", lambda *_: parts)
    page = visit(max_tokens=8)
    send(page, "cups")
    settle(page)
    expect(page.locator(".said code")).to_have_text(["12/60", "0.2"])
    assert page.locator(".said").inner_text() == "Each costs 12/60 → 0.2 0.2 dollars."
    with page.expect_request("**/v1/chat/completions") as asked:
        send(page, "boxes")
    assert asked.value.post_data_json["messages"][1] == {"role": "assistant", "content": parts}
    settle(page, 2)


def test_models_answer_side_by_side_and_one_more_can_be_asked(visit, server):
    page = visit(max_tokens=8)
    for name in ("base/d2", "mid/d2"):
        page.get_by_role("checkbox", name=name).check()
    send(page, "Ann has 10")
    settle(page, 3)
    names = page.locator(".answer h3").all_text_contents()
    assert sorted(names) == ["base/d2", "mid/d2", "rl/d2"]
    assert kept_answers(page) == [expected_answer(server, "Ann has 10", model=name, max_tokens=8) for name in names]
    tops = {round(page.locator(".answer").nth(index).bounding_box()["y"]) for index in range(3)}
    assert len(tops) == 1, "they do not stand side by side"
    page.get_by_role("checkbox", name="sft/d2").check()
    page.get_by_role("button", name="Ask sft/d2 too").click()
    settle(page, 4)
    page.reload()
    expect(page.get_by_role("checkbox", name="sft/d2")).to_be_checked()


@pytest.mark.parametrize("width", [360, 1100])
def test_an_aqua_problem_shows_its_letters_and_its_attention(visit, server, width):
    page = visit(max_tokens=4, viewport={"width": width, "height": 740})
    if width == 360:
        page.get_by_role("button", name="Try a maths problem").click()
        expect(page.get_by_label("Message", exact=True)).not_to_have_value("")
    else:
        page.get_by_role("button", name="AQuA", exact=True).click()
    expect(page.get_by_role("button", name="AQuA", exact=True)).to_have_attribute("aria-pressed", "true")
    page.get_by_label("or number").fill("2")
    page.get_by_role("button", name="Draw a problem").click()
    expect(page.get_by_text("Problem 2 of 10")).to_be_visible()
    prompt = page.get_by_label("Message", exact=True).input_value()
    page.get_by_role("button", name="Send").click()
    settle(page)
    rows = page.locator(".letters tr")
    expect(rows).to_have_count(6)
    said = httpx.post(server.url + "/aqua/letters", json={"model": "rl", "messages": [{"role": "user", "content": prompt}], "text": kept_answers(page)[0]},
                      timeout=SECONDS).json()
    track = rows.first.locator(".track").bounding_box()["width"]
    for row, (letter, p) in zip(rows.all(), said["probs"].items()):
        assert row.locator("th").text_content() == letter + (" (right)" if letter == "B" else "") and row.locator("td").last.text_content() == f"{100 * p:.1f} %"
        assert row.locator(".bar").bounding_box()["width"] == pytest.approx(track * p, abs=1)
    assert float(rows.last.locator("td").last.text_content()) == pytest.approx(said["margin"], abs=0.006)
    page.get_by_role("button", name="Attention").click()
    canvas = page.locator("canvas")
    expect(page.locator(".look .told").first).to_contain_text("looks at")
    colors = "canvas => new Set(new Uint32Array(canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data.buffer)).size"
    assert canvas.evaluate(colors) > 20
    assert page.locator(".rows").bounding_box()["x"] == pytest.approx(page.locator(".scroll").bounding_box()["x"] + 1, abs=1), "the rows' names stay in view"
    expect(page.locator(".rows .at")).to_have_count(1)
    page.locator("[name=layer]").select_option("0")
    page.locator("[name=head]").select_option("1")
    expect(page.locator("[name=head]")).to_have_value("1")
    before = page.locator(".look .told").first.text_content()
    canvas.focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator(".look .told").first).not_to_have_text(before)
    assert is_as_wide_as_the_window(page)


def test_a_phone_scrolls_in_one_direction_only(visit, monkeypatch):
    answers_say(monkeypatch, "word" * 30 + "\n\n$$" + "x+" * 60 + "x$$\n\n```\n" + "code " * 40)
    page = visit(max_tokens=90, viewport={"width": 320, "height": 640}, has_touch=True, is_mobile=True)
    send(page, "w" * 300)
    settle(page)
    expect(page.locator(".said")).to_have_class("said")
    assert is_as_wide_as_the_window(page)
    page.get_by_role("button", name="Chats").tap()
    expect(page.get_by_role("button", name="New chat")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="New chat")).to_be_hidden()
    page.get_by_role("button", name="Settings").tap()
    assert is_as_wide_as_the_window(page)


def test_a_busy_server_is_asked_again(visit, folder, question, monkeypatch):
    pace = Pace(monkeypatch)
    with serve(page=PAGE, max_rows=1, max_queue=0) as server:
        page = visit(server)
        expect(page.get_by_role("checkbox", name="rl/d2")).to_be_checked()
        thread = threading.Thread(target=expected_answer, args=(server, question))
        thread.start()
        while not server.pool.drivers[0].load:
            time.sleep(0.01)
        send(page, question)
        expect(page.locator(".answer")).to_contain_text("The server is busy: again in")
        pace.free()
        thread.join()
        settle(page)
        assert kept_answers(page) == [expected_answer(server, question)]


def test_a_key_is_asked_for_and_a_wrong_one_again(visit, folder):
    with serve(page=PAGE, api_key="sesame") as server:
        page = visit(server, max_tokens=4)
        dialog = page.get_by_role("dialog", name="API key")
        for key in ("wrong", "sesame"):
            expect(dialog).to_be_visible()
            page.get_by_label("Key", exact=True).fill(key)
            page.get_by_role("button", name="Use it").click()
        expect(page.get_by_role("checkbox", name="rl/d2")).to_be_checked()
        send(page, "Ann")
        settle(page)
        page.reload()
        expect(page.get_by_role("checkbox", name="rl/d2")).to_be_checked()
        assert page.evaluate("localStorage['nanochat.key'] === undefined"), "a key is kept only where the user said so"


def test_a_refusal_is_told_and_a_bad_setting_never_sent(visit, server):
    page = visit(max_tokens=4)
    send(page, "cups " * 1000)
    expect(page.locator(".answer .error")).to_contain_text("context of 768")
    settle(page)
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Temperature").fill("3")
    page.get_by_role("button", name="Done").click()
    send(page, "Ann")
    expect(page.locator("#problem")).to_contain_text("Temperature")
    assert page.get_by_label("Message", exact=True).input_value() == "Ann", "what was typed is not lost"
    assert len(chats(page)[0]["turns"]) == 1


def test_the_keyboard_reaches_everything_in_order_and_dark_is_dark(visit):
    page = visit(color_scheme="dark")
    expect(page.get_by_role("checkbox", name="rl/d2")).to_be_checked()
    seen = []
    for _ in range(30):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.id || document.activeElement.value"))
        if seen[-1] == "send":
            break
    wanted = ["skip", "new", "rl/d2", "aqua", "open-settings", "theme", "text", "send"]
    assert [name for name in seen if name in wanted] == wanted
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(ground)
    page.get_by_role("button", name="Theme").click()
    assert page.evaluate(ground) != dark and page.evaluate("document.documentElement.dataset.theme") == "light"
    page.reload()
    assert page.evaluate(ground) != dark
    unnamed = "[...document.querySelectorAll('button, input, select, textarea')].filter(e => !(e.ariaLabel || e.labels?.length || e.textContent.trim())).length"
    assert page.evaluate(unnamed) == 0
