"""Test the page in Chromium without a head, over a stub of the engine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .served import Served
from .stub_engine import Add, Cancel

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
ANSWER = """<think>
The user wants a **loop**.
</think>

# Loops

Use `for`, *not* **goto** — see [docs](https://docs.python.org/3/):

```python
for i in range(3):
    print(i)
```

1. first
2. second

| a | b |
|---|---|
| 1 | <img src=x onerror="document.title='hacked'"> |

<script>document.title = 'hacked'</script> [bad](javascript:alert(1))
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def open_page(browser: Any, served: Served) -> Iterator[Callable[..., Any]]:
    contexts = []

    def start(**options: Any) -> Any:
        context = browser.new_context(**options)
        context.set_default_timeout(20_000)
        contexts.append(context)
        page = context.new_page()
        page.foreign, page.errors = [], []
        page.on("request", lambda request: None if request.url.startswith(served.url) else page.foreign.append(request))
        page.on("console", lambda message: page.errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.goto(served.url)
        playwright.expect(page.locator("#model")).not_to_have_text("Chat")
        return page

    yield start
    for context in contexts:
        context.close()


def ask(page: Any, text: str) -> None:
    page.fill("#input", text)
    page.press("#input", "Enter")
    page.wait_for_selector("article.assistant .regenerate")
    page.wait_for_selector("#send:visible")


def asked(served: Served) -> list[Add]:
    return [request for request in served.engine.requests if isinstance(request, Add)]


def test_an_answer_is_markdown_and_never_html(open_page: Callable[..., Any], served: Served) -> None:
    served.engine.reply = lambda request: ANSWER
    page = open_page()
    ask(page, "How do I <b>loop</b>?")
    assert page.locator("article.user .text").inner_text() == "How do I <b>loop</b>?"
    answer = page.locator("article.assistant .text")
    assert answer.locator("h2").inner_text() == "Loops"
    assert answer.locator("pre code").inner_text() == "for i in range(3):\n    print(i)"
    assert answer.locator("li").all_inner_texts() == ["first", "second"]
    assert answer.locator("strong").inner_text() == "goto"
    assert answer.locator("a").evaluate_all("links => links.map(link => link.href)") == ["https://docs.python.org/3/"]
    assert answer.locator("img, script").count() == 0
    assert "onerror" in answer.locator("td").nth(1).inner_text()
    assert "hacked" not in page.title()
    page.locator("summary").click()
    assert page.locator("details div").inner_text() == "The user wants a **loop**."
    assert page.foreign == []
    assert page.errors == []


def test_the_conversation_goes_on_and_begins_anew(open_page: Callable[..., Any], served: Served) -> None:
    page = open_page()
    ask(page, "one")
    ask(page, "two")
    template = served.context.model.tokenizer.apply_chat_template
    reply = served.engine.reply(asked(served)[0])
    conversation = [{"role": "user", "content": "one"}, {"role": "assistant", "content": reply}]
    assert asked(served)[1].prompt == template([*conversation, {"role": "user", "content": "two"}])
    page.click("#new")
    assert page.locator("article").count() == 0
    ask(page, "three")
    assert asked(served)[2].prompt == template([{"role": "user", "content": "three"}])


def test_regenerate_asks_again(open_page: Callable[..., Any], served: Served) -> None:
    page = open_page()
    ask(page, "one")
    served.engine.reply = lambda request: "Something else."
    page.click(".regenerate")
    playwright.expect(page.locator("article.assistant .text")).to_contain_text("else")
    assert page.locator("article.assistant").count() == 1
    first, second = asked(served)
    assert first.prompt == second.prompt
    assert first.sampling["seed"] != second.sampling["seed"]


@pytest.mark.parametrize("how", ["#stop", "Escape"])
def test_stop_ends_the_request(open_page: Callable[..., Any], served: Served, how: str) -> None:
    served.engine.holds = True
    page = open_page()
    page.fill("#input", "one")
    page.press("#input", "Enter")
    playwright.expect(page.locator("article.assistant .text")).not_to_be_empty()
    page.keyboard.press(how) if how == "Escape" else page.click(how)
    page.wait_for_selector("#send:visible")
    for _ in range(100):
        if any(isinstance(request, Cancel) for request in served.engine.requests):
            break
        page.wait_for_timeout(20)
    assert any(isinstance(request, Cancel) for request in served.engine.requests)
    assert page.locator("article.error").count() == 0


def test_settings_are_sent(open_page: Callable[..., Any], served: Served) -> None:
    page = open_page()
    page.click("#open-settings")
    page.fill("#system", "Be brief.")
    page.fill("#temperature", "0.3")
    page.fill("#top_p", "0.8")
    page.fill("#max_tokens", "7")
    ask(page, "one")
    [request] = asked(served)
    assert request.sampling["temperature"] == 0.3
    assert request.sampling["top_p"] == 0.8
    assert request.max_new_tokens == 7
    conversation = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "one"}]
    assert request.prompt == served.context.model.tokenizer.apply_chat_template(conversation)


def test_an_error_is_said(open_page: Callable[..., Any], served: Served) -> None:
    served.engine.refusal = (429, "too many requests wait")
    page = open_page()
    ask(page, "one")
    assert "too many requests wait" in page.locator("article.error[role=alert]").inner_text()
    served.engine.refusal = None
    page.click(".regenerate")
    playwright.expect(page.locator("article.assistant .text")).to_contain_text("think")
    assert page.locator("article.error").count() == 0


def test_all_is_reached_by_keyboard(open_page: Callable[..., Any], served: Served) -> None:
    page = open_page()
    reached = set()
    page.evaluate("document.activeElement.blur()")
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id"))
    assert {"new", "theme", "open-settings", "input", "send"} <= reached
    page.focus("#open-settings")
    page.keyboard.press("Enter")
    assert page.get_attribute("#open-settings", "aria-expanded") == "true"
    page.focus("#input")
    page.keyboard.type("a")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("b")
    assert page.input_value("#input") == "a\nb"
    assert asked(served) == []


def test_a_narrow_screen_and_the_dark(open_page: Callable[..., Any], served: Served) -> None:
    served.engine.reply = lambda request: ANSWER + "\n" + "x" * 500 + "\n```\n" + "y" * 500 + "\n```\n"
    page = open_page(viewport={"width": 360, "height": 640}, color_scheme="dark")
    ask(page, "one")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    for name in ("#input", "#send"):
        box = page.locator(name).bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 360
        assert box["y"] + box["height"] <= 640
    background = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(background)
    assert dark == "rgb(22, 24, 27)"
    page.click("#theme")
    assert page.evaluate(background) == "rgb(255, 255, 255)"


@pytest.mark.skipif("QWEN_MODEL_SCREENSHOTS" not in os.environ, reason="writes the pictures of docs/serving.md")
def test_screenshots(open_page: Callable[..., Any], served: Served) -> None:
    served.engine.reply = lambda request: ANSWER.partition("\n| a")[0]
    folder = Path(os.environ["QWEN_MODEL_SCREENSHOTS"])
    for name, width, height, scheme in (("page", 900, 620, "light"), ("page_narrow", 380, 620, "dark")):
        page = open_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        ask(page, "How do I write a loop?")
        page.screenshot(path=folder / f"{name}.png")
