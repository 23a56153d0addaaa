"""A real Chromium on the server's page, driven over WebDriver. Tests that want it are skipped where there is none."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from ktx.engine.engine import Options
from tests.server.conftest import QWEN
from tests.support.scripted_engine import scripted_engine
from tests.support.tiny_chat_model import tokenizer

FLAGS = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--window-size=1280,900")
WAIT = 20.0  # seconds for what should take a fraction of one
STORED = "localStorage.clear(); sessionStorage.clear()"
RECORD = """{
window.sent = [];
const plain = window.fetch;
window.fetch = (path, options) => {
  window.sent.push([String(path), options?.body ?? ""]);
  return plain(path, options);
};
}"""


def found(*names: str) -> str | None:
    return next((path for name in names if (path := shutil.which(name))), None)


@contextlib.contextmanager
def chromium(*flags: str) -> Iterator[Any]:
    """A WebDriver. Skips the test, and says why, where something is missing."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install -e '.[dev]'")
    browser = found("chromium", "chromium-browser", "google-chrome")
    driver = found("chromedriver")
    if browser is None or driver is None:
        pytest.skip(f"no {'chromium' if browser is None else 'chromedriver'}: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (*FLAGS, *flags):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    made = webdriver.Chrome(service=webdriver.ChromeService(driver), options=options)
    try:
        yield made
    finally:
        made.quit()


def talkative(answers: dict[str, str], pace: float = 0.0, **options: Any) -> Any:
    """An engine that answers the last question by a table; what is not in it is told back. "%d" counts the answers."""
    words = tokenizer()
    words.chat_template = QWEN
    told = []

    def script(prompt: Any) -> Any:
        question = words.decode(prompt, skip_special_tokens=False).rpartition("<|user|>")[2].partition("<|end|>")[0]
        told.append(question)
        answer = answers.get(question, f"You said: {question}").replace("%d", str(len(told)))
        return words(answer, add_special_tokens=False)["input_ids"]

    return scripted_engine(words, Options(**options), script, pace)


class Page:
    """The page in a browser, and what tests do to it."""

    def __init__(self, driver: Any, base: str):
        self.driver, self.base = driver, base
        self.scripts: list[str] = []

    def open(self, *scripts: str, fragment: str = "") -> Page:
        """Anew, with nothing kept from before; `scripts` run ahead of the page's own."""
        self.driver.get(f"{self.base}/page/icon.svg")  # the same origin and no page of ours
        self.driver.execute_script(STORED)
        self.driver.get_log("browser")
        for script in (RECORD, *scripts):
            added = self.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": script})
            self.scripts.append(added["identifier"])
        self.driver.get(f"{self.base}/{fragment}")
        return self

    def close(self) -> None:
        for identifier in self.scripts:
            self.driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", {"identifier": identifier})
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
        self.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})

    def js(self, body: str, *arguments: Any) -> Any:
        return self.driver.execute_script(body, *arguments)

    def run(self, body: str, *arguments: Any) -> Any:
        """The value of an async function's body."""
        source = "const [done, ...given] = [[...arguments].at(-1), ...[...arguments].slice(0, -1)];"
        wrapped = f"{source} (async () => {{ {body} }})().then(done, (error) => done('error: ' + error.stack));"
        value = self.driver.execute_async_script(wrapped, *arguments)
        assert not str(value).startswith("error: "), value
        return value

    def until(self, expression: str, seconds: float = WAIT) -> Any:
        """Waits until a JavaScript expression is true, and returns it."""
        from selenium.webdriver.support.ui import WebDriverWait

        wait = WebDriverWait(self.driver, seconds, poll_frequency=0.02)
        return wait.until(lambda _: self.js(f"return {expression}"), f"{expression} did not come true")

    def one(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)

    def text(self, selector: str) -> str:
        return self.js("return document.querySelector(arguments[0])?.textContent ?? ''", selector)

    def texts(self, selector: str) -> list[str]:
        return self.js("return [...document.querySelectorAll(arguments[0])].map((one) => one.textContent)", selector)

    def button(self, name: str, within: str = "body") -> Any:
        """The button of this accessible name that can be seen."""
        named = [one for one in self.one(within).find_elements("css selector", "button") if one.accessible_name == name]
        return next(one for one in named if one.is_displayed())

    def ready(self) -> Page:
        self.until("!document.getElementById('send').disabled")
        return self

    def ask(self, text: str) -> None:
        """Types a question and sends it with Enter."""
        self.ready().one("#question").send_keys(text + "\n")

    def answered(self, text: str) -> None:
        """Asks, and waits for the whole answer."""
        before = len(self.all(".answer"))
        self.ask(text)
        self.until(
            f"document.querySelectorAll('.answer').length > {before} && !document.querySelector('[aria-busy=true]')"
        )

    def unnamed(self, within: str = "body") -> list[str]:
        """What can be operated, is seen, and has no name that a screen reader could say."""
        kinds = "button, input, select, textarea, summary, a, canvas, nav, dialog, [role=tab], [role=tabpanel]"
        controls = self.one(within).find_elements("css selector", kinds)
        return [one.get_attribute("outerHTML") for one in controls if one.is_displayed() and not one.accessible_name]

    def emulate(self, feature: str, value: str) -> None:
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": feature, "value": value}]})

    def width(self, pixels: int) -> None:
        sized = {"width": pixels, "height": 800, "deviceScaleFactor": 1, "mobile": True}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", sized)

    def complaints(self) -> list[str]:
        """What the console says that is wrong since the last call: errors, and what the policy refused."""
        said = [entry for entry in self.driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
        return [entry["message"] for entry in said if "getImageData" not in entry["message"]]  # the tests read pixels
