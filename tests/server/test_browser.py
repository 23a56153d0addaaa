"""The page in a browser: asking, stopping, asking again, what is kept, keys, settings, keyboard and screen readers."""

from __future__ import annotations

import json

import pytest

from ktx.server.auth import AccessPolicy
from tests.server.browser import Page, chromium, talkative
from tests.server.conftest import NAME, serving, settled

ANSWERS = {
    "greet": "Good day, to you!",
    "think": "<think>Let me **see**.</think>It is four.",
    "count": "answer number %d",
    "long story": "word " * 400,
    "long thought": "<think>" + "hm " * 600,
}


@pytest.fixture(scope="module")
def driver():
    with chromium() as made:
        yield made


@pytest.fixture(scope="module")
def slow(driver):
    """A hundred tokens a second."""
    with serving(talkative(ANSWERS, pace=0.01)) as (base, served):
        yield base, served


@pytest.fixture
def visit(driver):
    """Makes pages of a server's."""
    made = []

    def visited(base):
        made.append(Page(driver, base))
        return made[-1]

    yield visited
    for one in made:
        one.close()


@pytest.fixture
def page(visit, slow):
    """The page, freshly opened. The console must have had nothing to say against it."""
    made = visit(slow[0])
    yield made.open()
    assert made.complaints() == []


WATCH = """window.shown = [];
const look = () => {
  const one = (selector) => document.querySelector(selector)?.textContent.trim() ?? "";
  window.shown.push([one("summary"), one(".answer > .text")]);
};
document.addEventListener("DOMContentLoaded", () => new MutationObserver(look).observe(document.body, {childList: true, subtree: true, characterData: true}));"""


def test_an_answer_comes_word_by_word_with_its_reasoning_folded(page):
    page.open(WATCH)
    page.ask("think")
    page.until("/It is four/.test(document.querySelector('.answer > .text')?.textContent)")
    page.until("!document.querySelector('[aria-busy=true]')")
    shown = [tuple(one) for one in page.js("return window.shown")]
    assert ("Thinking", "") in shown
    parts = {text for _, text in shown} - {"", "It is four."}
    assert len(parts) > 2 and all("It is four.".startswith(part) for part in parts)
    assert page.text(".answer > .text") == "It is four."
    assert not page.one("details").get_attribute("open") and page.text("summary").startswith("Thought for ")
    assert not page.one("details .text").is_displayed()
    page.one("summary").click()
    assert page.one("details .text strong").text == "see"


def test_numbers_of_an_answer_are_the_servers(page):
    page.answered("greet")
    first = page.text(".numbers")
    assert "tok/s" in first and f"{len(ANSWERS['greet'])} tokens · 8 prompt tokens" in first
    page.answered("g" * 200)
    page.answered("greet")
    last = page.texts(".numbers")[-1]
    assert "cached" in last and "first token after" in last
    assert page.text("#context-usage").endswith("of 32,768 tokens of context used.")


@pytest.mark.parametrize("how", ["button", "escape"])
@pytest.mark.parametrize("question", ["long story", "long thought"])
def test_stopping_frees_what_the_request_held(page, slow, how, question):
    page.ask(question)
    page.until("document.querySelector('.answer').textContent.length > 40")
    assert slow[1].engine.outputs
    if how == "button":
        page.button("Stop").click()
    else:
        page.one("#question").send_keys("\ue00c")
    assert settled(slow[1])
    page.until("!document.querySelector('[aria-busy=true]')")
    assert page.text(".answer > .notice") == "Stopped." and page.button("Send").is_displayed()
    assert 0 < len(page.text(".answer")) < 1500
    page.answered("greet")
    assert page.texts(".answer > .text")[-1] == "Good day, to you!"


def test_regenerating_puts_another_answer_in_the_place_of_the_last(page):
    page.answered("count")
    first = page.text(".answer > .text")
    page.button("Regenerate").click()
    page.until(
        f"/number/.test(document.querySelector('.answer > .text').textContent) && document.querySelector('.answer > .text').textContent !== {first!r}"
    )
    page.until("!document.querySelector('[aria-busy=true]')")
    assert len(page.all("article")) == 2 and page.text(".answer > .text").startswith("answer number ")


def test_the_last_question_can_be_edited(page):
    page.answered("greet")
    page.answered("good mornign")
    page.button("Edit").click()
    assert page.one("#question").get_attribute("value") == "good mornign"
    page.button("Cancel").click()
    assert page.one("#question").get_attribute("value") == "" and len(page.all("article")) == 4
    page.button("Edit").click()
    page.one("#question").clear()
    page.ask("good morning")
    page.until("document.querySelectorAll('.answer > .text')[1]?.textContent === 'You said: good morning'")
    assert page.texts(".question p") == ["greet", "good morning"]


def test_conversations_are_kept_named_and_deleted(page):
    page.answered("greet")
    page.button("New chat").click()
    assert not page.all("article")
    page.answered("think")
    page.driver.refresh()
    page.ready()
    assert page.texts(".choose") == ["think", "greet"]
    assert page.text(".question p") == "think" and page.text(".answer > .text") == "It is four."
    page.all(".choose")[1].click()
    assert page.text(".answer > .text") == "Good day, to you!"
    page.js("document.querySelectorAll('[aria-label^=Rename]')[1].click()")
    page.one("#list input").send_keys("Manners\n")
    assert page.texts(".choose") == ["think", "Manners"]
    page.js("document.querySelectorAll('[aria-label^=Delete]')[1].click()")
    assert page.texts(".choose") == ["think"] and not page.all("article")
    page.button("Undo").click()
    assert set(page.texts(".choose")) == {"think", "Manners"} and page.text(".question p") == "greet"
    page.driver.refresh()
    page.ready()
    assert set(page.texts(".choose")) == {"think", "Manners"}


def test_an_answer_goes_on_while_another_conversation_is_shown(page):
    page.ask("long thought")
    page.until("document.querySelector('summary')?.textContent === 'Thinking'")
    page.button("New chat").click()
    page.answered("greet")
    assert page.texts(".answer > .text") == ["Good day, to you!"]
    page.all(".choose")[1].click()
    assert page.text(".question p") == "long thought" and page.button("Stop").is_displayed()
    page.driver.refresh()  # leaves in the middle
    page.ready()
    assert page.text(".question p") == "long thought" and page.text(".answer > .notice") == "Stopped."


def test_what_is_kept_is_bounded(page):
    kept = page.run(
        """
        const store = await import("/page/store.js");
        const talk = (id, letters) => ({ id: String(id), title: `t${id}`, messages: [{ role: "user", text: "x".repeat(letters) }] });
        for (let i = 0; i < 120; i += 1) store.write(talk(i, 10));
        const many = store.list().length;
        for (let i = 0; i < 8; i += 1) store.write(talk(`large${i}`, 900000));
        const ids = store.list().map((one) => one.id);
        const talks = Object.keys(localStorage).filter((name) => name.startsWith("ktx.talk."));
        const whole = store.write(talk("huge", 20_000_000));
        return [many, ids, talks.length, whole, store.read("huge").messages[0].text.length];
        """
    )
    assert kept == [100, ["large7", "large6", "large5", "large4"], 4, False, 20_000_000]


def test_settings_are_asked_for_and_left_out_when_empty(page):
    page.answered("greet")
    bare = json.loads(page.js("return sent.findLast((one) => one[0] === 'v1/chat/completions')[1]"))
    assert set(bare) == {"model", "messages", "stream", "stream_options"}
    page.button("Settings").click()
    given = {"temperature": "0.5", "top_p": "0.9", "top_k": "40", "min_p": "0.05", "max_tokens": "7", "seed": "42"}
    for name, value in given.items():
        page.one(f"#settings [name={name}]").send_keys(value)
    page.one("#settings [name=system]").send_keys("Be brief.")
    page.one("#settings [name=thinking]").send_keys("off")
    page.button("Done").click()
    page.driver.refresh()
    page.answered("greet")
    full = json.loads(page.js("return sent.findLast((one) => one[0] === 'v1/chat/completions')[1]"))
    assert {name: full[name] for name in given} == {name: json.loads(value) for name, value in given.items()}
    assert full["messages"][0] == {"role": "system", "content": "Be brief."}
    assert full["chat_template_kwargs"] == {"enable_thinking": False, "thinking": False}
    assert (
        page.texts(".answer > .text")[-1] == "Good da"
        and "maximum number of tokens" in page.texts(".answer > .notice")[-1]
    )
    page.button("Settings").click()
    page.button("Reset").click()
    page.button("Done").click()
    page.answered("greet")
    assert page.texts(".answer > .text")[-1] == "Good day, to you!"


def test_errors_are_told_in_words(visit, slow):
    page = visit(slow[0]).open().ready()
    page.js("document.getElementById('question').value = 'long '.repeat(9000)")
    page.ask("")
    page.until("document.querySelector('.notice.bad:not([hidden])')")
    assert "context holds 32768 tokens" in page.text(".notice.bad") and page.button("Try again").is_displayed()
    assert settled(slow[1])
    assert all("400" in complaint for complaint in page.complaints())


def test_a_server_that_is_gone_is_told(visit):
    with serving(talkative(ANSWERS)) as (base, _):
        page = visit(base).open().ready()
    page.ask("greet")
    page.until("document.querySelector('.notice.bad:not([hidden])')")
    assert page.text(".notice.bad") == "The server cannot be reached."
    page.complaints()


def test_a_key_is_asked_for_and_kept_in_this_tab_alone(visit):
    with serving(talkative(ANSWERS), AccessPolicy(("right-key",))) as (base, _):
        page = visit(base).open()
        page.until("document.querySelector('#key[open]')")
        assert page.js("return document.activeElement.id") == "key-field" and not page.text("#model")
        page.one("#key-field").send_keys("wrong-key\n")
        page.until("/rejected/.test(document.getElementById('key-text').textContent)")
        page.one("#key-field").send_keys("right-key\n")
        page.until(f"document.getElementById('model').textContent === {NAME!r}")
        page.answered("greet")
        assert page.text(".answer > .text") == "Good day, to you!"
        assert "right-key" not in page.js("return JSON.stringify(localStorage)")
        page.driver.refresh()
        page.answered("greet")
        page.js("sessionStorage.clear()")
        page.driver.refresh()
        page.until("document.querySelector('#key[open]')")
        page.button("Not now").click()
        page.until("!document.getElementById('state').hidden")
        assert "requires an API key" in page.text("#state-text") and page.button("Try again").is_displayed()
        assert all("401" in complaint for complaint in page.complaints())


def test_loading_is_shown_until_it_is_over(visit):
    with serving() as (base, served):
        served.progress.total, served.progress.done = 1000, 250
        page = visit(base).open()
        page.until("document.getElementById('state-progress').value === 25")
        assert (
            page.text("#state-text").startswith("Loading the model: 25 %, about ")
            and not page.button("Send").is_enabled()
        )
        served.load_error = "no such file"
        page.until("/no such file/.test(document.getElementById('state-text').textContent)")
        served.load_error = ""
        served.set_engine(talkative(ANSWERS))
        page.ready()
        assert not page.one("#state").is_displayed() and page.text("#announcer") == "The server is ready."
        page.answered("greet")
        assert all("503" in complaint for complaint in page.complaints())


def test_the_keyboard_is_enough(page):
    tab, enter, right, home, shift, release = "\ue004", "\ue007", "\ue014", "\ue011", "\ue008", "\ue000"

    def focused():
        return page.driver.switch_to.active_element

    def go_to(name):
        for _ in range(20):
            focused().send_keys(tab)
            ring = page.js("const s = getComputedStyle(document.activeElement); return [s.outlineStyle, s.boxShadow]")
            assert ring != ["none", "none"], f"the focus of {focused().accessible_name} cannot be seen"
            if focused().get_attribute("id") == name:
                return
        pytest.fail(f"{name} cannot be reached")

    page.ready().js(
        "document.querySelector('a, button, input, textarea, [tabindex=\"0\"]').focus()"
    )  # the first of all
    assert focused().text == "Skip to the content" and focused().is_displayed()
    go_to("tab-chat")
    focused().send_keys(right)
    assert focused().accessible_name == "Machine" and page.one("#machine").is_displayed()
    assert page.js("return [...document.querySelectorAll('[role=tab]')].map((one) => one.tabIndex)") == [-1, 0]
    focused().send_keys(home)
    assert page.one("#chat").is_displayed() and not page.one("#machine").is_displayed()
    go_to("question")
    focused().send_keys("two", shift + enter + release, "lines", enter)
    page.until("document.querySelector('.answer > .text')?.textContent.includes('lines')")
    assert page.text(".question p") == "two\nlines"
    assert all("/machine" in complaint for complaint in page.complaints())  # there may be none to tell of


def test_dark_follows_the_system_and_a_switch(page):
    ground = "getComputedStyle(document.body).backgroundColor"
    page.emulate("prefers-color-scheme", "light")
    light = page.js(f"return {ground}")
    page.emulate("prefers-color-scheme", "dark")
    dark = page.js(f"return {ground}")
    assert sum(map(int, light[4:-1].split(","))) > 700 and sum(map(int, dark[4:-1].split(","))) < 100
    page.button("Theme: system").click()
    assert page.js(f"return {ground}") == light
    page.driver.refresh()
    assert page.js(f"return {ground}") == light
    page.button("Theme: light").click()
    page.emulate("prefers-color-scheme", "light")
    assert page.js(f"return {ground}") == dark and page.button("Theme: dark").is_displayed()


@pytest.mark.parametrize("view", ["", "#machine"])
def test_a_phones_width_is_enough(visit, slow, view):
    page = visit(slow[0])
    page.width(360)
    page.open(fragment=view).ready()
    if not view:
        page.answered("x" * 90)
        assert not page.one("#conversations").is_displayed()
        page.button("Chats").click()
        page.all(".choose")[0].click()
        assert page.one("#question").is_displayed() and not page.one("#conversations").is_displayed()
    assert page.js("return document.scrollingElement.scrollWidth") <= 360


def test_screen_readers_hear_names_landmarks_and_whole_answers(page):
    page.answered("think")
    assert page.one("html").get_attribute("lang") == "en" and len(page.all("h1")) == 1
    assert [len(page.all(landmark)) for landmark in ("header", "main", "nav")] == [1, 1, 1]
    assert page.one("#tab-chat").aria_role == "tab" and page.one("#chat").aria_role == "tabpanel"
    assert page.one("#announcer").get_attribute("aria-live") == "polite" and page.text("#announcer") == "It is four."
    assert page.one("#messages").get_attribute("aria-live") == "off"
    assert page.js("return new Set([...document.querySelectorAll('[id]')].map((one) => one.id)).size") == len(
        page.all("[id]")
    )
    page.button("Edit").click()
    assert page.unnamed() == []
    page.js("document.querySelector('[aria-label^=Rename]').click()")
    assert page.one("#list input").is_displayed() and page.unnamed() == []
    for opened in ("settings", "key"):
        page.js("document.getElementById(arguments[0]).showModal()", opened)
        assert page.one(f"#{opened} input").is_displayed() and page.unnamed(f"#{opened}") == []
        assert page.one(f"#{opened}").accessible_name
        page.js("document.getElementById(arguments[0]).close()", opened)
