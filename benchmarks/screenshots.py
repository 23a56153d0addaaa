"""Screenshots of the server's web page for the docs: `ktx serve` with the demo model in a headless Chromium.

    python benchmarks/screenshots.py --output docs

Needs chromium, chromium-driver and selenium, which `pip install -e '.[dev]'` installs.
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
COUNT_ANSWERS = "return !document.querySelector('[aria-busy=true]') && document.querySelectorAll('.answer').length"


@contextmanager
def server(port: int) -> Iterator[str]:
    """Runs a server with the demo model; yields its base URL once it answers."""
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
    """Yields the driver of a headless Chromium."""
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
    """Enters a question and waits until its answer is complete."""
    num_before = driver.execute_script(COUNT_ANSWERS)
    driver.find_element("id", "question").send_keys(question + "\n")
    WebDriverWait(driver, 120).until(lambda _: driver.execute_script(COUNT_ANSWERS) == num_before + 1)


def save_screenshots(driver: Any, name: str, output: Path) -> None:
    """Saves a PNG for each theme."""
    viewport = {"width": WIDTH, "height": HEIGHTS[name], "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", viewport)
    for theme in THEMES:
        media = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        time.sleep(1.5)  # the machine tab is redrawn once per second
        path = output / (f"{name}.png" if theme == "light" else f"{name}-{theme}.png")
        driver.save_screenshot(str(path))
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def main() -> None:
    """Starts a server of the demo model and writes the pictures of its page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=Path("docs"), metavar="DIR", help="folder for the PNG files (default docs)"
    )
    parser.add_argument("--port", type=int, default=10077, metavar="N", help="port of the server (default 10077)")
    args = parser.parse_args()
    with server(args.port) as base, chromium() as driver:
        driver.get(base)
        WebDriverWait(driver, 60).until(lambda _: driver.find_element("id", "send").is_enabled())
        for questions in CONVERSATIONS:
            driver.find_element("id", "new").click()
            for question in questions:
                ask(driver, question)
        driver.find_element("id", "question").click()
        save_screenshots(driver, "page-chat", args.output)
        driver.find_element("id", "tab-machine").click()
        time.sleep(3)
        driver.find_element("id", "tab-chat").click()
        ask(driver, CONVERSATIONS[0][0])  # gives the charts of the last minute some data
        driver.find_element("id", "tab-machine").click()
        save_screenshots(driver, "page-machine", args.output)


if __name__ == "__main__":
    main()
