"""Pictures of the server's page for the docs: the bundled demo model, served by `ktx serve`, in a headless Chromium.

    python benchmarks/screenshots.py --output docs

needs chromium and chromium-driver, and selenium, which `pip install -e '.[dev]'` brings.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait

WIDTH = 1200
HEIGHTS = {"page-chat": 720, "page-machine": 1010}
CONVERSATIONS = (("What is MLA?",), ("What is Q4_K_M?",), ("What is a mixture of experts?", "What does the router do?"))
THEMES = ("light", "dark")
ANSWERED = "return !document.querySelector('[aria-busy=true]') && document.querySelectorAll('.answer').length"


@contextmanager
def server(port: int) -> Iterator[str]:
    """The address of the demo model's server once it answers."""
    base = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "ktx", "serve", "--port", str(port), "--temperature", "0"]
    with subprocess.Popen(command) as process:
        try:
            for _ in range(300):
                if process.poll() is not None:
                    sys.exit(f"ktx serve ended with {process.returncode}")
                try:
                    urllib.request.urlopen(f"{base}/health").close()
                    break
                except OSError:
                    time.sleep(0.2)
            yield base
        finally:
            process.terminate()


@contextmanager
def chromium() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(flag)
    driver = webdriver.Chrome(service=webdriver.ChromeService(shutil.which("chromedriver")), options=options)
    try:
        yield driver
    finally:
        driver.quit()


def ask(driver: Any, question: str) -> None:
    """Types it and waits for the end of the answer."""
    before = driver.execute_script(ANSWERED)
    driver.find_element("id", "question").send_keys(question + "\n")
    WebDriverWait(driver, 120).until(lambda _: driver.execute_script(ANSWERED) == before + 1)


def picture(driver: Any, name: str, output: Path) -> None:
    """One PNG for each theme."""
    sized = {"width": WIDTH, "height": HEIGHTS[name], "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", sized)
    for theme in THEMES:
        emulated = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", emulated)
        time.sleep(1.5)  # the machine tab draws once a second
        path = output / (f"{name}.png" if theme == "light" else f"{name}-{theme}.png")
        driver.save_screenshot(str(path))
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs"), metavar="DIR", help="(default docs)")
    parser.add_argument("--port", type=int, default=10077, metavar="N", help="(default 10077)")
    args = parser.parse_args()
    with server(args.port) as base, chromium() as driver:
        driver.get(base)
        WebDriverWait(driver, 60).until(lambda _: driver.find_element("id", "send").is_enabled())
        for questions in CONVERSATIONS:
            driver.find_element("id", "new").click()
            for question in questions:
                ask(driver, question)
        driver.find_element("id", "question").click()
        picture(driver, "page-chat", args.output)
        driver.find_element("id", "tab-machine").click()
        time.sleep(3)
        driver.find_element("id", "tab-chat").click()
        ask(driver, CONVERSATIONS[0][0])  # something to see over the last minute
        driver.find_element("id", "tab-machine").click()
        picture(driver, "page-machine", args.output)


if __name__ == "__main__":
    main()
