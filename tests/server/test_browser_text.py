"""Answers as the page draws them: markdown of a model's, which may be hostile, and which comes in pieces."""

from __future__ import annotations

import random

import pytest

from tests.server.browser import Page, chromium, talkative
from tests.server.conftest import serving

HOSTILE = """\
<script>window.hit = 1</script><img src=x onerror="window.hit = 2"><svg onload="window.hit = 3"></svg>
[a](javascript:window.hit=4) [b](JaVaScRiPt:window.hit=5) [c](  javascript:window.hit=6) [d](data:text/html,<script>window.hit=7</script>)
[e](vbscript:x) [f](//evil.example/x) [g](/v1/models) [h](java\tscript:window.hit=8) [i](&#106;avascript:window.hit=9)
<javascript:window.hit=10> ![j](javascript:window.hit=11) ![k](https://evil.example/pixel.png) <iframe src=https://evil.example>
[l](https://good.example/" onmouseover="window.hit=12) [m](https://good.example/x "t\\" onclick=window.hit=13")
| <b onmouseover=window.hit=14>x</b> | <a href=javascript:window.hit=15>y</a> |
|---|---|
| `<i>` | **<u>** |

```html" onclick="window.hit=16
</code></pre><script>window.hit = 17</script>
```
# <style>*{display:none}</style> heading
> <form action=https://evil.example><input name=x></form>
https://good.example/<script>window.hit=18</script>
<base href=https://evil.example><meta http-equiv=refresh content="0;url=https://evil.example"><link rel=stylesheet href=https://evil.example>
"""

PLAIN = r"""# Title #

Some *emphasis*, **strong**, ***both***, `co*de*`, ``a ` b``, ~~gone~~, snake_case_name, 2 * 3 * 4, \*kept\*.
A line of its own. See https://example.org/a_(b) and <https://example.org/c>, or [a *link*](https://example.org/d "title").

1. first
   - nested **a**
     - deeper
   - nested b

     with a paragraph
2. second
* star

> quote
> - with a list

| name | GB/s | note |
|:---|---:|:-:|
| Q4_K | 17.2 | a \| b |
| Q6_K | 16.9 |

```python
def f(x):
    return "<b>" + x   # *no* emphasis
```
~~~
```
~~~

---
The year
1986. was no list.
"""

WORDS = [
    "*",
    "**",
    "_",
    "`",
    "```",
    "~~~",
    "\n",
    "\n\n",
    "[",
    "](https://a.example/)",
    "](",
    ")",
    "!",
    "#",
    "# ",
    "> ",
    "- ",
    "  - ",
    "1. ",
    "|",
    "---",
    "|-|-|",
    "<b>",
    "\\",
    " ",
    "    ",
    "\t",
    "\r\n",
    "https://b.example",
    "word",
    "é",
    "🙂",
    "~~",
    ":-:",
]
LONG = {
    "stars": "*a **b " * 20_000,
    "closing stars": "a* b** " * 20_000,
    "brackets": "[" * 100_000,
    "pictures": "![" * 50_000,
    "targets": "[a](" * 4_000,  # of 30,000 the browser's own layout takes 20 s
    "open targets": "[a](http://x (" * 10_000,
    "back ticks": "".join("`" * (i % 300) + "x" for i in range(1000)),
    "addresses": "http://" * 20_000,
    "quotes": "> " * 50_000,
    "lists": "- " * 50_000,
    "blank lines of a list": "- a\n" + "\n" * 50_000 + "  b",
    "spaces": "#" + " " * 100_000 + "x",
    "hashes": "# " + "#" * 100_000 + "x",
    "fences": "```" + " " * 100_000 + "`",
    "pipes": "|" * 50_000 + "\n" + "|-" * 50_000,
    "rules": "- " * 30_000 + "x",
    "nested": "".join("  " * i + "- x\n" for i in range(1000)),
}


@pytest.fixture(scope="module")
def page():
    """Drawn on by the tests; the console must have nothing to say against any of it."""
    with chromium() as driver, serving(talkative({"hostile": HOSTILE, "plain": PLAIN})) as (base, _):
        made = Page(driver, base).open().ready()
        yield made
        made.close()
        assert made.complaints() == []


def drawn(page, text):
    """What a text looks like when it comes at once, as HTML."""
    return page.run(
        """
        const { MarkdownView } = await import("/page/markdown.js");
        const place = document.createElement("div");
        new MarkdownView(place).update(given[0]);
        return place.innerHTML;
        """,
        text,
    )


def test_a_hostile_answer_runs_nothing_and_leads_nowhere(page):
    page.answered("hostile")
    assert page.js("return window.hit ?? null") is None
    allowed = "p, br, em, strong, del, code, a, ul, ol, li, h3, h4, h5, h6, hr, blockquote, div, pre, table, thead, tbody, tr, th, td, span, button"
    strange = page.js(
        "return [...document.querySelectorAll('.answer > .text *')].filter((one) => !one.matches(arguments[0])).map((one) => one.outerHTML)",
        allowed,
    )
    assert strange == []
    names = page.js(
        "return [...new Set([...document.querySelectorAll('.answer > .text *')].flatMap((one) => one.getAttributeNames()))].sort()"
    )
    assert set(names) <= {"href", "rel", "target", "class", "type", "aria-label", "scope", "start"}
    links = page.all(".answer > .text a")
    assert links and all(one.get_attribute("href").startswith("https://") for one in links)
    assert all({"noopener", "noreferrer"} <= set(one.get_attribute("rel").split()) for one in links)
    for one in links:
        assert page.js("return new URL(arguments[0].href).hostname", one) in (
            "good.example",
            "evil.example",
        )  # shown as links, never fetched
    page.js(
        "document.querySelectorAll('.answer > .text *').forEach((one) => one.dispatchEvent(new MouseEvent('mouseover', { bubbles: true })))"
    )
    fetched = page.js("return performance.getEntriesByType('resource').map((one) => new URL(one.name).origin)")
    assert set(fetched) == {page.base}
    assert "<script>window.hit = 1</script>" in page.text(".answer > .text")
    assert page.js("return window.hit ?? null") is None and page.complaints() == []


def test_the_browser_itself_refuses_markup_and_scripts_from_text(page):
    later = "await new Promise((resolve) => setTimeout(resolve));"  # out of the driver's own script, which may evaluate
    for attempt in ("document.body.innerHTML = '<b>x</b>'", "eval('1')", "new Function('return 1')()"):
        tried = page.run(f"{later} try {{ {attempt}; return 'done'; }} catch (error) {{ return error.name; }}")
        assert tried in ("TypeError", "EvalError"), attempt
    page.run(
        "const one = document.createElement('img'); one.src = 'https://evil.example/x.png'; document.body.append(one); return 1"
    )
    refused = page.until("(document.querySelector('body > img').complete) || true") and page.complaints()
    assert any("Content Security Policy" in one for one in refused)


def test_markdown_becomes_elements(page):
    html = drawn(page, PLAIN)
    for part in (
        "<h3>Title</h3>",
        "<em>emphasis</em>, <strong>strong</strong>",
        "<code>co*de*</code>, <code>a ` b</code>, <del>gone</del>, snake_case_name, 2 * 3 * 4, *kept*.<br>",
        '<a href="https://example.org/a_(b)" rel="noopener noreferrer" target="_blank">https://example.org/a_(b)</a> and',
        '<a href="https://example.org/d" rel="noopener noreferrer" target="_blank">a <em>link</em></a>.',
        "<ol><li><p>first</p><ul><li><p>nested <strong>a</strong></p><ul><li>deeper</li></ul></li>",
        "<p>with a paragraph</p>",
        "<ul><li>star</li></ul>",
        "<blockquote><p>quote</p><ul><li>with a list</li></ul></blockquote>",
        '<th scope="col">name</th><th class="right" scope="col">GB/s</th><th class="middle" scope="col">note</th>',
        '<td>Q4_K</td><td class="right">17.2</td><td class="middle">a | b</td>',
        '<td class="right">16.9</td><td class="middle"></td>',
        '<code>def f(x):\n    return "&lt;b&gt;" + x   # *no* emphasis</code>',
        "<pre><code>```</code></pre>",
        "<hr><p>The year<br>1986. was no list.</p>",
    ):
        assert part in html, part
    assert "<em><strong>both</strong></em>" in html


def test_code_can_be_copied(page):
    page.driver.execute_cdp_cmd(
        "Browser.grantPermissions", {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    )
    page.answered("plain")
    page.js("[...document.querySelectorAll('.answer')].at(-1).querySelector('.copy').click()")
    page.until("document.getElementById('toast').textContent === 'Copied.'")
    assert page.run("return navigator.clipboard.readText()") == 'def f(x):\n    return "<b>" + x   # *no* emphasis'


def test_a_growing_text_looks_as_the_whole_does(page):
    """Whatever the pieces are, and of texts of noise."""
    chance = random.Random(7)
    texts = [PLAIN, HOSTILE] + ["".join(chance.choices(WORDS, k=chance.randint(5, 60))) for _ in range(400)]
    wrong = page.run(
        """
        const { MarkdownView } = await import("/page/markdown.js");
        const wrong = [];
        for (const [text, cuts] of given[0]) {
          const [whole, parts] = [document.createElement("div"), document.createElement("div")];
          new MarkdownView(whole).update(text);
          const growing = new MarkdownView(parts);
          for (const cut of cuts) growing.update(text.slice(0, cut));
          growing.update(text);
          if (whole.innerHTML !== parts.innerHTML) wrong.push([text, whole.innerHTML, parts.innerHTML]);
        }
        return wrong.slice(0, 3);
        """,
        [[text, sorted(chance.choices(range(len(text) + 1), k=30))] for text in texts],
    )
    assert wrong == []


def test_what_is_settled_is_not_drawn_again(page):
    kept = page.run(
        """
        const { MarkdownView } = await import("/page/markdown.js");
        const place = document.createElement("div");
        const growing = new MarkdownView(place);
        growing.update("first *one*\\n\\n```\\ncode");
        const [paragraph, code] = [place.children[0], place.querySelector("code").firstChild];
        growing.update("first *one*\\n\\n```\\ncode\\nmore\\n");
        const same = [paragraph === place.children[0], code === place.querySelector("code").firstChild, code.data];
        let text = growing.text + "```\\n";
        const started = performance.now();
        for (let i = 0; i < 3000; i += 1) growing.update((text += `paragraph ${i} with some words\\n\\n`));
        return [...same, place.children.length, performance.now() - started];
        """
    )
    assert kept[:4] == [True, True, "code\nmore\n", 3002]
    assert kept[4] < 5000  # milliseconds: all of it anew each time would take minutes


@pytest.mark.parametrize("name", LONG)
def test_a_long_hostile_text_takes_a_moment(page, name):
    took = page.run(
        """
        const { MarkdownView } = await import("/page/markdown.js");
        const place = document.createElement("div");
        const started = performance.now();
        const growing = new MarkdownView(place);
        growing.update(given[0]);
        growing.update(given[0] + "\\nend");
        const took = performance.now() - started;
        document.body.append(place);
        place.getBoundingClientRect(); // elements too deep within each other would end the tab
        place.remove();
        return took;
        """,
        LONG[name],
    )
    assert took < 4000  # milliseconds, twice 100,000 letters
