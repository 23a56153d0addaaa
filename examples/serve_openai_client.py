"""Starts `ktx serve` with the demo model in a process of its own, and streams an answer with the openai client.

    python examples/serve_openai_client.py

Needs the server's packages and the client: pip install 'ktx-moe[serve]' openai
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

START_TIMEOUT_S = 120


def wait_until_ready(url: str, server: subprocess.Popen[bytes]) -> None:
    """Polls the server's health route until the model is loaded."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
    sys.exit(f"ktx serve did not answer on {url}: see its messages above")


def main() -> None:
    try:
        import openai
    except ImportError:
        sys.exit("this example needs the openai client: pip install openai")
    with socket.socket() as listener:  # a port that no process listens on
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen([sys.executable, "-m", "ktx", "serve", "--port", str(port)])
    try:
        wait_until_ready(url, server)
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        name = client.models.list().data[0].id
        messages = [{"role": "user", "content": "What is a rule file?"}]
        for chunk in client.chat.completions.create(model=name, messages=messages, max_tokens=40, stream=True):
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        print()
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
