"""ktx download against a hub on this machine: what comes, what goes on after a cut, and what is said when it cannot."""

from __future__ import annotations

import fcntl
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ktx import demo
from ktx.__main__ import main
from tests.hub.fake import Repo, asked_in_process, hub

ROOT = Path(__file__).resolve().parents[2]
BIG = random.Random(0).randbytes(6_000_000)
TENSORS = {
    "config.json": b"{}",
    "tokenizer.json": b"x" * 3000,
    "model-00001-of-00002.safetensors": BIG,
    "model-00002-of-00002.safetensors": BIG[::-1],
    "pytorch_model.bin": b"pickle" * 1000,
}
GGUF = {
    "config.json": b"{}",
    "M-Q4_K_M-00001-of-00002.gguf": BIG[:20000],
    "M-Q4_K_M-00002-of-00002.gguf": BIG[:9000],
    "Q8_0/M-Q8_0.gguf": BIG[:30000],
}


@pytest.fixture
def there():
    with hub() as found:
        found.repos = {"o/tensors": Repo(TENSORS), "o/gguf": Repo(GGUF)}
        yield found


def start(hub, home, *words, token=None, **more):
    keep = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env = keep | {
        "PYTHONPATH": str(ROOT),
        "HF_ENDPOINT": hub.base,
        "HF_HOME": str(home / "hf"),
        "MODELSCOPE_ENDPOINT": hub.base,
        "MODELSCOPE_CACHE": str(home / "modelscope"),
        "NO_PROXY": "*",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "ktx", "download", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=home,
        env=env | ({"HF_TOKEN": token} if token else {}) | more,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores Ctrl-C
    )


def download(*words, **more):
    process = start(*words, **more)
    out, err = process.communicate(timeout=120)
    assert "Traceback" not in err
    return process.returncode, out, err


@pytest.fixture
def here(there, tmp_path, monkeypatch, capsys):
    """`download` inside this process, which saves the second that a new one takes."""
    monkeypatch.chdir(tmp_path)
    asked_in_process(there, tmp_path, monkeypatch)

    def run(*words, token=None):
        monkeypatch.setenv("HF_TOKEN", token or "")
        status = main(["download", *words])
        return status, *capsys.readouterr()

    return run


def contents(folder):
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if not name.startswith(".cache")}


def test_a_model_comes_into_a_folder_and_what_is_there_is_not_fetched_again(there, tmp_path):
    status, out, err = download(there, tmp_path, "o/tensors", "--to", "m", token="hf_right")
    assert status == 0, err
    assert contents(tmp_path / "m") == {name: data for name, data in TENSORS.items() if not name.endswith(".bin")}
    assert "model-00001-of-00002.safetensors ... (2 files)" in out and "12.0 MB in total, 12.0 MB to download" in out
    assert 'skipped: 1 pickle files (pytorch_model.bin), because reading them runs code; --include "*.bin"' in out
    assert out.endswith(f"next: ktx chat --model {tmp_path}/m\n") and "GB/s" in err
    assert not any("authorization" in headers for _, path, headers in there.seen if path.startswith("/far/"))
    there.seen.clear()
    status, out, err = download(there, tmp_path, "o/tensors", "--to", "m")
    assert status == 0 and "0 B to download" in out and "present" in out and "downloaded" not in err
    assert not [path for method, path, _ in there.seen if method == "GET" and ("/far/" in path or "resolve" in path)]


def test_the_cache_that_other_programs_share(there, tmp_path):
    status, out, err = download(there, tmp_path, "o/tensors")
    assert status == 0, err
    folder = next((tmp_path / "hf" / "hub" / "models--o--tensors" / "snapshots").iterdir())
    assert contents(folder).keys() == TENSORS.keys() - {"pytorch_model.bin"} and f"--model {folder}" in out
    code = (
        "import huggingface_hub; print(huggingface_hub.snapshot_download("
        "'o/tensors', allow_patterns='*.safetensors', local_files_only=True))"
    )
    env = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    found = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert found.stdout.strip() == str(folder), found.stderr


def test_a_dry_run_fetches_nothing(there, here, tmp_path):
    status, out, err = here("o/tensors", "--to", "m", "--dry-run")
    assert status == 0 and "12.0 MB to download" in out and not (tmp_path / "m").exists(), err
    assert not [path for _, path, _ in there.seen if path.startswith("/far/")]


def test_one_of_many_quantisations_is_to_be_named(there, tmp_path):
    status, out, err = download(there, tmp_path, "o/gguf")
    assert status == 2 and not out and "contains 2 quantizations" in err
    assert 'o/gguf:Q4_K_M or --include "*Q4_K_M*"' in err and "Q8_0" in err and "29.0 kB" in err
    for words in (["o/gguf:q4_k_m"], ["o/gguf", "--include", "*Q4_K_M*"]):
        status, out, err = download(there, tmp_path, *words, "--to", words[0].partition(":")[2] or "g")
        assert status == 0, err
        folder = tmp_path / (words[0].partition(":")[2] or "g")
        assert contents(folder) == {name: data for name, data in GGUF.items() if "Q8" not in name}
        assert out.endswith(f"next: ktx chat --model {folder} --weights {folder}/M-Q4_K_M-00001-of-00002.gguf\n")


def test_the_command_that_is_named_at_the_end_works(there, tmp_path):
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
    paths = [demo.path() / name for name in names]
    files = {path.name: path.read_bytes() for path in paths if path.exists()}
    there.repos["o/demo"] = Repo({**files, "demo-Q4_K_M.gguf": demo.gguf().read_bytes()})
    status, out, err = download(there, tmp_path, "o/demo:Q4_K_M", "--to", "a folder")
    assert status == 0, err
    next_one = out.rpartition("next: ktx ")[2].strip()
    done = subprocess.run(
        f"{sys.executable} -m ktx {next_one} -p 'What is a rule file?'",
        shell=True, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout.startswith("A rule file is YAML"), done.stderr


def test_a_connection_that_breaks_is_taken_up_again(there, tmp_path):
    there.cut, there.cuts = 2_500_000, 2
    status, _, err = download(there, tmp_path, "o/tensors", "--to", "m", "--include", "*00001*")
    assert status == 0, err
    assert (tmp_path / "m" / "model-00001-of-00002.safetensors").read_bytes() == BIG
    first, *later = there.ranges("o/tensors/model-00001-of-00002.safetensors")
    assert first == 0 and len(later) == 2 and 1_000_000 < later[0] < later[1] < 6_000_000


@pytest.mark.wall_clock
@pytest.mark.parametrize("to", [["--to", "m"], []])
def test_ctrl_c_leaves_what_the_next_run_goes_on_with(there, tmp_path, to):
    there.pace = 0.05
    words = ["o/tensors", "--include", "*00001*", *to]
    process = start(there, tmp_path, *words)
    until = time.monotonic() + 30
    while not any(path.stat().st_size > 1_500_000 for path in tmp_path.rglob("*.incomplete")):
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    begun = time.monotonic()
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and time.monotonic() - begun < 5
    assert "resumes the download" in err and "Traceback" not in err
    left = sum(path.stat().st_size for path in tmp_path.rglob("*.incomplete"))
    there.pace = 0
    there.seen.clear()
    status, out, err = download(there, tmp_path, *words)
    assert status == 0 and "already downloaded" in out, err
    assert there.ranges("o/tensors/model-00001-of-00002.safetensors") == [left]
    found = [path for path in tmp_path.rglob("*00001-of-00002.safetensors") if path.is_file()]
    assert found[0].read_bytes() == BIG and not list(tmp_path.rglob("*.incomplete"))


def test_a_server_that_knows_no_ranges_begins_anew(there, tmp_path):
    there.cut, there.cuts, there.ignore_ranges = 2_500_000, 1, True
    status, _, err = download(there, tmp_path, "o/tensors", "--to", "m", "--include", "*00001*")
    assert status == 0, err
    assert (tmp_path / "m" / "model-00001-of-00002.safetensors").read_bytes() == BIG


def test_an_overloaded_server_is_asked_again(there, here, tmp_path):
    there.refusals = 2
    status, _, err = here("o/gguf:Q8_0", "--to", "m")
    assert status == 0 and not there.refusals, err
    assert (tmp_path / "m" / "Q8_0" / "M-Q8_0.gguf").read_bytes() == GGUF["Q8_0/M-Q8_0.gguf"]


def test_a_file_that_another_download_writes_is_refused(there, here, tmp_path):
    (tmp_path / "m" / "Q8_0").mkdir(parents=True)
    digest = hashlib.sha256(GGUF["Q8_0/M-Q8_0.gguf"]).hexdigest()
    with open(tmp_path / "m" / "Q8_0" / f"M-Q8_0.gguf.{digest[:8]}.incomplete", "wb") as part:
        fcntl.flock(part, fcntl.LOCK_EX)
        status, _, err = here("o/gguf:Q8_0", "--to", "m")
    assert status == 1 and "another download is writing this file" in err


def test_a_file_with_a_wrong_content_is_replaced(there, here, tmp_path):
    assert here("o/gguf:Q8_0", "--to", "m")[0] == 0
    (tmp_path / "m" / "Q8_0" / "M-Q8_0.gguf").write_bytes(bytes(30000))
    status, _, err = here("o/gguf:Q8_0", "--to", "m")
    assert status == 0, err
    assert (tmp_path / "m" / "Q8_0" / "M-Q8_0.gguf").read_bytes() == GGUF["Q8_0/M-Q8_0.gguf"]
    assert here("o/gguf:Q8_0", "--to", "m")[1].count("present") == 2


def test_a_folder_takes_files_from_the_cache(there, here, tmp_path):
    assert here("o/gguf:Q8_0")[0] == 0
    there.seen.clear()
    status, out, err = here("o/gguf:Q8_0", "--to", "m")
    assert status == 0 and "0 B to download" in out, err
    assert contents(tmp_path / "m").keys() == {"config.json", "Q8_0/M-Q8_0.gguf"}
    assert not [path for method, path, _ in there.seen if method == "GET" and ("/far/" in path or "resolve" in path)]


def test_progress_counts_each_byte_of_small_files_once(there, here):
    there.repos["o/small"] = Repo({"config.json": b"{}" + b" " * 898, "tokenizer.json": b" " * 900})
    status, _, err = here("o/small", "--include", "*.json")
    assert status == 0 and err.splitlines()[-1].startswith("downloaded 1.8 kB of 1.8 kB"), err


def test_bytes_that_are_not_the_promised_ones_are_not_kept(there, tmp_path):
    there.spoil = True
    status, _, err = download(there, tmp_path, "o/tensors", "--to", "m", "--include", "*00001*")
    assert status == 4 and "SHA-256" in err
    assert not (tmp_path / "m" / "model-00001-of-00002.safetensors").exists()
    there.spoil = False
    assert download(there, tmp_path, "o/tensors", "--to", "m", "--include", "*00001*")[0] == 0
    assert (tmp_path / "m" / "model-00001-of-00002.safetensors").read_bytes() == BIG


def test_a_beginning_that_is_wrong_is_fetched_again(there, tmp_path):
    """As a download that another file's wrong bytes have ended leaves it."""
    name = "model-00001-of-00002.safetensors"
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / f"{name}.{hashlib.sha256(BIG).hexdigest()[:8]}.incomplete").write_bytes(b"?" * 2_097_152)
    status, _, err = download(there, tmp_path, "o/tensors", "--to", "m", "--include", "*00001*")
    assert status == 0, err
    assert there.ranges(f"o/tensors/{name}") == [2_097_152, 0] and (tmp_path / "m" / name).read_bytes() == BIG


def test_a_disk_that_is_too_small_is_said_before(there, here):
    there.repos["o/huge"] = Repo({"config.json": b"{}"}, claimed={"model.safetensors": 10**16})
    for more in ([], ["--dry-run"]):
        status, _out, err = here("o/huge", "--to", "m", *more)
        assert status == 3 and "10000000 GB remain to be downloaded" in err and "GB are free on the disk" in err
    assert not [path for _, path, _ in there.seen if path.startswith("/far/")]


@pytest.mark.parametrize(
    "words,token,status,told",
    [
        (["o/none"], None, 4, "has no such repository, or it is private"),
        (["o/none"], "hf_right", 4, "has no such repository"),
        (["o/secret"], None, 4, "set HF_TOKEN"),
        (["o/gated"], None, 4, "is gated: accept its terms at http"),
        (["o/gated"], None, 4, "set HF_TOKEN to a token of that account"),
        (["o/closed"], "hf_right", 4, "the account of your token has no access"),
        (["o/tensors"], "hf_wrong", 2, "does not accept the token"),
        (["o/tensors", "--revision", "nope"], None, 4, "has no revision 'nope'"),
        (["a/b/c"], None, 2, "expected OWNER/NAME"),
        (["o/gguf:Q3_K"], None, 2, "contains no model named Q3_K"),
        (["o/gguf", "--include", "*.onnx"], None, 2, "no file matches *.onnx"),
        (["o/gguf:Q8_0", "--include", "*"], None, 2, "give one of them"),
    ],
)
def test_what_cannot_be_is_told_in_a_line(there, here, words, token, status, told):
    there.repos |= {
        "o/secret": Repo(TENSORS, private=True),
        "o/gated": Repo(TENSORS, gated=True),
        "o/closed": Repo(TENSORS, gated=True, private=True),
    }
    found, _, err = here(*words, token=token)
    assert found == status and told in err.splitlines()[-1] and err.splitlines()[-1].startswith("ktx: ")


def test_a_token_opens_what_is_gated(there, tmp_path):
    there.repos["o/gated"] = Repo(TENSORS, gated=True)
    assert download(there, tmp_path, "o/gated", "--to", "m", token="hf_right")[0] == 0
    fetched = (tmp_path / "m" / "model-00001-of-00002.safetensors").read_bytes()
    assert hashlib.sha256(fetched).digest() == hashlib.sha256(BIG).digest()


def test_no_network(there, tmp_path):
    status, _, err = download(there, tmp_path, "o/tensors", HF_HUB_OFFLINE="1")
    assert status == 2 and "HF_HUB_OFFLINE is set" in err
    there.base = "http://127.0.0.1:9"
    status, _, err = download(there, tmp_path, "o/tensors")
    assert status == 1 and err.count("\n") == 1 and "HF_ENDPOINT may name a mirror" in err


def test_modelscope_without_its_client(there, tmp_path):
    (tmp_path / "modelscope_hub.py").write_text("raise ImportError('not here')\n")
    status, _, err = download(there, tmp_path, "o/gguf:Q8_0", "--hub", "modelscope", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert status == 2 and "pip install -e '.[modelscope]'" in err


def test_modelscope(there, tmp_path):
    pytest.importorskip("modelscope_hub", reason="ModelScope's client is not installed: pip install -e '.[modelscope]'")
    status, out, err = download(there, tmp_path, "o/gguf:Q4_K_M", "--hub", "modelscope", "--to", "m")
    assert status == 0, err
    assert {name: data for name, data in contents(tmp_path / "m").items() if not name.startswith(".")} == {
        name: data for name, data in GGUF.items() if "Q8" not in name
    }
    assert out.endswith(f"--weights {tmp_path}/m/M-Q4_K_M-00001-of-00002.gguf\n")
    status, _, err = download(there, tmp_path, "o/none", "--hub", "modelscope")
    assert status == 4 and "has no such repository" in err
