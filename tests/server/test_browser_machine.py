"""The machine tab in a browser: what it draws of /machine, and when it asks."""

from __future__ import annotations

import json

import pytest

from tests.server.browser import Page, chromium, talkative
from tests.server.conftest import serving

LAYERS, EXPERTS, HOT = [1, 2, 3], 8, 5


def modules():
    found = [
        {
            "name": "model.embed_tokens",
            "layer": None,
            "operator": "Embedding",
            "device": "cpu",
            "types": "Q4_K",
            "bytes": 4_000_000,
        },
        {
            "name": "lm_head",
            "layer": None,
            "operator": "Linear",
            "device": "cuda:0",
            "types": "Q6_K",
            "bytes": 6_000_000,
        },
    ]
    for layer in range(4):
        found.append(
            {
                "name": f"model.layers.{layer}.self_attn",
                "layer": layer,
                "operator": "MLA",
                "device": "cuda:0",
                "types": "Q4_K",
                "bytes": 1_000_000,
            }
        )
        if layer:
            found.append(
                {
                    "name": f"model.layers.{layer}.mlp.experts",
                    "layer": layer,
                    "operator": "Experts",
                    "device": "cpu",
                    "types": "Q4_K/Q6_K",
                    "bytes": 30_000_000,
                }
            )
    return found


TOLD = {
    "model": "made-up",
    "cpu": "A processor",
    "isa": "avx2",
    "threads": 4,
    "nodes": 2,
    "uptime_seconds": 100.0,
    "modules": modules(),
    "memory": {"weights_bytes": 104e6, "cache_bytes": 20e6, "rss_bytes": 150e6, "total_bytes": 1e9, "free_bytes": 6e8},
    "cache": {"pages": 100, "used": 25, "idle": 10, "page_tokens": 64, "queries": 1000, "hits": 640},
    "experts": {
        "layers": LAYERS,
        "count": EXPERTS,
        "top": 2,
        "activations": [[10] * EXPERTS for _ in LAYERS],
        "seconds": [1.5, 1.25],
    },
    "bandwidth": {"measured_gbps": 20.0, "bytes": 5e9, "seconds": 1.0, "expert_bytes": 4e9, "expert_seconds": 0.5},
    "requests": {"running": 2, "waiting": 3, "prompt_tokens": 500, "answer_tokens": 300},
}
UNKNOWN = {
    "model": "made-up",
    "cpu": None,
    "isa": None,
    "threads": None,
    "nodes": None,
    "uptime_seconds": 1.0,
    "modules": [],
    "memory": None,
    "cache": None,
    "experts": None,
    "bandwidth": None,
    "requests": None,
}
# Each second 10 GB are read in half a second of forwards, 30 tokens are said, and expert HOT of each layer is used 40 times.
GROWING = """{
const told = %s;
const plain = window.fetch;
let second = 0;
window.fetch = (path, options) => {
  if (path !== "machine") return plain(path, options);
  second += 1;
  window.asked = second;
  const now = structuredClone(told);
  now.uptime_seconds += second;
  if (now.bandwidth) now.bandwidth.bytes += 5e9 * second, now.bandwidth.seconds += 0.5 * second;
  if (now.requests) now.requests.answer_tokens += 30 * second;
  for (const row of now.experts?.activations ?? []) row[%d] += 40 * second;
  return Promise.resolve(new Response(JSON.stringify(now)));
};
}"""


@pytest.fixture(scope="module")
def driver():
    with chromium() as made:
        yield made


@pytest.fixture(scope="module")
def base():
    with serving(talkative({})) as (address, _):
        yield address


@pytest.fixture
def page(driver, base):
    made = Page(driver, base)
    yield made
    made.close()
    assert made.complaints() == []


def shown(page, told=TOLD, fragment="#machine"):
    """The tab once two answers have come, of which it makes rates."""
    page.open(GROWING % (json.dumps(told), HOT), fragment=fragment)
    if fragment:
        page.until("window.asked > 2")
    return page


def tile(page, name):
    return page.js(
        "return [...document.querySelectorAll('.tile')].find((one) => one.querySelector('h3').textContent === arguments[0]).innerText",
        name,
    )


def colour(page, row, expert):
    """Red, green and blue in the middle of a cell of the heat map."""
    return page.js(
        """
        const [row, expert, rows, experts] = arguments;
        const canvas = document.querySelector("canvas");
        const sharp = canvas.width / canvas.clientWidth;
        const [wide, high] = [(canvas.clientWidth - 36) / experts, (canvas.clientHeight - 18) / rows];
        const [x, y] = [36 + (expert + 0.5) * wide, 18 + (row + 0.4) * high];
        return [...canvas.getContext("2d").getImageData(x * sharp, y * sharp, 1, 1).data].slice(0, 3);
        """,
        row,
        expert,
        len(LAYERS),
        EXPERTS,
    )


def test_the_heat_map_shows_which_experts_are_used(page):
    shown(page)
    hot, cold = colour(page, 1, HOT), colour(page, 1, 0)
    assert sum(hot) < sum(cold) - 150  # light theme: the more, the darker
    assert cold == colour(page, 2, 7)
    page.one("[value=start]").click()
    even = colour(page, 1, 0)
    assert sum(even) < sum(cold) - 50  # since the start the others were used too
    words = page.text(".experts .below")
    assert (
        "24 of 24 experts" in words
        and f"The busiest is expert {HOT} of layer 1" in words
        and "a token activates 2" in words
    )
    assert "0: 1.5 s, 1: 1.3 s" in page.text(".experts")
    page.one("[value=minute]").click()
    assert "3 of 24 experts" in page.text(".experts .below")


def test_single_experts_are_read_by_keyboard_and_pointer(page):
    shown(page)
    page.one("[value=start]").click()
    canvas = page.one("canvas")
    page.js("arguments[0].focus()", canvas)
    canvas.send_keys("\ue015")
    assert page.text("output").startswith("Layer 1, expert 0: 10 activations")
    canvas.send_keys("\ue015", *["\ue014"] * HOT)
    assert page.text("output").startswith(f"Layer 2, expert {HOT}: ")
    canvas.send_keys(*["\ue014"] * 9)  # the edge holds
    assert page.text("output").startswith(f"Layer 2, expert {EXPERTS - 1}: 10 activations")
    page.js(
        "arguments[0].dispatchEvent(new PointerEvent('pointermove', {clientX: arguments[0].getBoundingClientRect().left + 40, clientY: arguments[0].getBoundingClientRect().bottom - 3}))",
        canvas,
    )
    assert page.text("output").startswith("Layer 3, expert 0: 10 activations")


def test_rates_are_of_the_last_seconds(page):
    shown(page)
    page.until("/^(29|30|31)/.test(document.querySelector('.tile .value').textContent)")
    assert "tok/s" in tile(page, "Generation")
    assert page.text(".gauge .big") == "10.0 GB/s" and page.text(".gauge .small") == "50 % of 20.0"
    assert len(page.one(".spark polyline").get_attribute("points").split()) >= 2
    assert "20.0 GB/s were measured" in page.text(".bandwidth")


def test_requests_cache_and_memory_are_told(page):
    shown(page)
    assert "2 running" in tile(page, "Requests") and "3 waiting" in tile(page, "Requests")
    cache, memory = tile(page, "KV cache"), tile(page, "Memory")
    assert (
        "25 % in use" in cache
        and "25 of 100 pages of 64 tokens, 10 cached" in cache
        and "64 % of prompt tokens" in cache
    )
    assert "150 MB" in memory and "104 MB weights · 20.0 MB KV cache · 600 MB free · of 1.0 GB" in memory
    assert "made-up · A processor · avx2 kernels · 4 threads · 2 NUMA nodes · up " in page.text(".facts")


def test_modules_stand_in_a_picture_and_a_table_by_layer(page):
    shown(page)
    assert "104 MB in 9 modules: 94.0 MB on cpu, 10.0 MB on cuda:0." in page.text(".modules")
    rows = page.js(
        "return [...document.querySelectorAll('.modules tbody tr')].map((row) => [...row.cells].map((cell) => cell.innerText.replaceAll('\\n', ' ')))"
    )
    assert rows == [
        ["outside layers 10.0 MB", "Linear", "cuda:0", "Q6_K", "1", "6.0 MB"],
        ["Embedding", "cpu", "Q4_K", "1", "4.0 MB"],
        ["0 1.0 MB", "MLA", "cuda:0", "Q4_K", "1", "1.0 MB"],
        ["1–3 31.0 MB × 3", "Experts", "cpu", "Q4_K/Q6_K", "1", "30.0 MB"],
        ["MLA", "cuda:0", "Q4_K", "1", "1.0 MB"],
    ]
    boxes = page.js(
        "return [...document.querySelectorAll('.areas g')].map((one) => [one.querySelector('title').textContent, one.querySelector('rect').getBBox()])"
    )
    areas = {title: (box["width"] + 2) * (box["height"] + 2) for title, box in boxes}
    experts = next(
        area for title, area in areas.items() if title.startswith("Experts on cpu: 90.0 MB (87 %) in 3 modules")
    )
    assert experts / sum(areas.values()) == pytest.approx(90 / 104, abs=0.01)
    assert len(areas) == 4


def test_what_is_not_known_is_told_in_words(page):
    shown(page, UNKNOWN)
    for words in ("No routed experts", "no modules to show", "uses no bandwidth", "no paged KV cache"):
        assert words in page.text("#machine"), words
    assert page.texts(".tile .value") == ["unknown"] * 4
    assert not page.one("canvas").is_displayed()


def test_it_asks_only_while_it_is_seen(page):
    shown(page, fragment="").ready()
    assert page.js("return window.asked ?? 0") == 0
    page.one("#tab-machine").click()
    page.until("window.asked > 1")
    page.one("#tab-chat").click()
    stopped = page.js("return window.asked")
    page.run("await new Promise((resolve) => setTimeout(resolve, 2500)); return 1")
    assert page.js("return window.asked") <= stopped + 1  # one may have been on its way
    page.one("#tab-machine").click()
    page.until(f"window.asked > {stopped + 1}")


def test_counters_that_begin_anew_are_no_negative_rates(page):
    shown(page)
    page.js(
        "const before = fetch; let once = 0; window.fetch = async (path, options) => { const answer = await before(path, options); if (path !== 'machine') return answer; const told = await answer.json(); told.uptime_seconds = once; told.bandwidth.bytes = told.requests.answer_tokens = once += 1; told.bandwidth.seconds = once / 10; for (const row of told.experts.activations) row.fill(once); window.again = once; return new Response(JSON.stringify(told)); }"
    )
    page.until("window.again > 2")
    assert "-" not in page.text(".tiles") + page.text(".gauge") + page.text(".experts .below")


def test_the_picture_follows_the_theme_and_a_phones_width(page):
    shown(page)
    light = colour(page, 0, 0)
    page.emulate("prefers-color-scheme", "dark")
    page.until("window.asked > 3")
    assert sum(colour(page, 0, 0)) < sum(light) - 300
    page.width(360)
    page.until("document.querySelector('canvas').clientWidth < 360")
    assert page.js("return document.scrollingElement.scrollWidth") <= 360
    assert page.js("return document.getElementById('machine').scrollWidth") <= 360
    assert page.unnamed() == []
    assert (
        page.js(
            "return [...document.querySelectorAll('svg')].map((one) => one.getAttribute('aria-label')).filter((name) => !name)"
        )
        == []
    )
