"""ktx bench: what is measured, in which order, against whom. The peer is a made-up llama_cpp with a set speed."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
from pathlib import Path

import pytest

from ktx.cli import bench, bench_ktx, bench_llama_cpp, bench_process
from ktx.errors import KtxError, UsageError
from ktx.hardware import ISAS
from tests.support import preloaded_process, random_model

ROOT = Path(__file__).resolve().parents[2]
FAKE = '''
"""llama_cpp as bench_llama_cpp uses it: prompts are slow without repacking, single tokens with it; calls are logged."""
import ctypes, os, time
from types import SimpleNamespace

IK = __name__.startswith("ik")
llama_token = ctypes.c_int32
def log(text):
    with open(os.environ["FAKE_LOG"], "a") as file:
        file.write(text + "\\n")
def llama_backend_init(): pass
def llama_model_default_params(): return SimpleNamespace()
def llama_model_load_from_file(path, params):
    params.repack = params.repack_tensors if IK else params.use_extra_bufts
    log(f"load {os.path.basename(path.decode())} {params.repack}")
    return params
def llama_context_default_params(): return SimpleNamespace(mla_attn=3)
def llama_init_from_model(model, context):
    model.ubatch = context.n_ubatch
    assert context.n_batch == context.n_ubatch
    log(f"threads {context.n_threads} {context.n_threads_batch} context {context.n_ctx}")
    return model
def llama_model_get_vocab(model): return 512
def llama_vocab_n_tokens(vocab): return vocab
def llama_print_system_info(): return b"CPU : SSE3 = 1 | AVX2 = 1 | AVX512 = 0 | REPACK = 1 | "
def llama_get_memory(state): return state
def llama_memory_clear(memory, data): pass
def llama_batch_get_one(tokens, count): return list(tokens)
def llama_synchronize(state): pass
def llama_decode(state, batch):
    one = len(batch) == 1
    assert len(batch) <= state.ubatch
    time.sleep(0.04 if one == state.repack else 0.005)
    log(f"decode {len(batch)} {sum(batch)}")
    return 0
'''
FAKE_IK = (
    FAKE
    + """
cached = 0
def llama_kv_cache_clear(state):
    global cached
    cached = 0
def llama_batch(n_tokens, token, all_pos_0, all_pos_1, all_seq_id):
    global cached
    assert (all_pos_0, all_pos_1, all_seq_id) == (cached, 1, 0) and len(token) == n_tokens
    cached += n_tokens
    return list(token)
_lib = SimpleNamespace(llama_synchronize=lambda state: None, llama_print_system_info=lambda: llama_print_system_info())
del llama_batch_get_one, llama_get_memory, llama_memory_clear
"""
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    random_model.write(folder)
    return folder


@pytest.fixture
def fake(tmp_path, monkeypatch) -> Path:
    """A folder with the made-up llama_cpp and ik_llama_cpp; their log."""
    (tmp_path / "llama_cpp.py").write_text(FAKE)
    (tmp_path / "ik_llama_cpp").mkdir()
    (tmp_path / "ik_llama_cpp" / "__init__.py").touch()
    (tmp_path / "ik_llama_cpp" / "_ctypes_api.py").write_text(FAKE_IK)
    monkeypatch.setenv("KTX_PEER_PATH", str(tmp_path))
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
    return tmp_path / "log"


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return preloaded_process.run("ktx", "bench", *words)


@pytest.mark.parametrize("peer_name", ["llama.cpp", "ik_llama.cpp"])
def test_a_long_prompt_finds_the_peers_better_ubatch(model, fake, peer_name):
    """The bench takes the larger ubatch for a prompt that is longer than the smaller one.

    Each call of the made-up peer takes as long as any other, so the larger is better; a prompt that is not longer than
    the smaller one is left to that.
    """
    done = run("--model", model, "-p", "700,64", "-n", "2", "-t", "2", "-r", "1", "--peer", peer_name, "--json")
    assert done.returncode == 0, done.stderr
    engines = {
        line["test"]: line["engine"] for line in map(json.loads, done.stdout.splitlines())
    }  # the peer's is the last
    on, off = f"{peer_name} (repack on, -ub", f"{peer_name} (repack off, -ub"
    assert engines == {"pp700": f"{on} 2048)", "pp64": f"{on} 512)", "tg2": f"{off} 512)"}
    log = fake.read_text().splitlines()
    assert any(line.startswith("decode 700 ") for line in log) and any(line.startswith("decode 188 ") for line in log)


def test_alone_one_record_a_test(model, tmp_path):
    record = tmp_path / "results.jsonl"
    record.write_text("{}\n")
    done = run(
        "--model", model, "-p", "16,40", "-n", "3", "-d", "0,30", "-t", "2", "-r", "2", "--json", "--record", record
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["test"] for line in lines] == ["pp16", "pp16@d30", "pp40", "pp40@d30", "tg3", "tg3@d30"]
    assert [json.loads(line) for line in record.read_text().splitlines()] == [{}, *lines]
    for line in lines:
        assert line["engine"] == "ktx" and line["threads"] == 2 and line["commit"] and line["machine"]
        assert line["isa"] in ISAS
        assert 0 < line["spread"][0] <= line["tok_s"] <= line["spread"][1] and "ratio" not in line
        assert 0 < line["share"] < 2 and line["limit"] > 0
        assert (
            min(line[f"{what}_gb_s"] for what in ("load", "cat", "pack", "fresh")) > 0
            and line["peak_rss"] < line["rss_bound"]
        )
        assert line["probe_bytes"] >= 2 * line["cache_bytes"] >= 0 and line["probe_bytes"] >= 1 << 28
    assert [line["limit_unit"] for line in lines] == ["GOPS int8"] * 4 + ["GB/s read"] * 2


@pytest.mark.parametrize("peer_name", ["llama.cpp", "ik_llama.cpp"])
def test_the_peer_runs_in_its_better_form_for_each_test(model, fake, peer_name):
    done = run("--model", model, "-p", "32", "-n", "3", "-t", "2", "-r", "2", "--peer", peer_name, "--json")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(line["test"], line["engine"]) for line in lines] == [
        ("pp32", "ktx"), ("pp32", f"{peer_name} (repack on, -ub 512)"),
        ("tg3", "ktx"), ("tg3", f"{peer_name} (repack off, -ub 512)"),
    ]  # fmt: skip
    for mine, peer in (lines[:2], lines[2:]):
        assert mine["ratio"] == pytest.approx(mine["tok_s"] / peer["tok_s"])
        assert peer["isa"] == "AVX2" and peer["best_alone"] >= peer["tok_s"] * 0.5
    assert lines[3]["tok_s"] < 1 / 0.005  # three sleeps: nothing is counted that was not computed
    log = fake.read_text().splitlines()
    assert log.count("threads 2 2 context 48") == 4  # on and off alone, then the better of each test
    name = next(model.glob("*.gguf")).name
    assert [line for line in log if line.startswith("load")] == [
        f"load {name} {on}" for on in (True, False, True, False)
    ]
    assert f"decode 32 {sum(bench_process.token_ids(32, 512))}" in log


def test_table_has_a_row_an_engine_and_test(model, fake):
    out = run("--model", model, "-p", "16", "-n", "2", "-r", "1", "--peer", "llama.cpp").stdout
    rows = [line for line in out.splitlines() if line.startswith(("pp16", "tg2"))]
    assert len(rows) == 4 and "GOPS int8" in rows[0] and "GB/s read" in rows[2]
    assert rows[0].split()[4].endswith("x") and "alone" in rows[1]
    assert "measured before each round: read " in out and "MiB, last-level cache " in out
    assert "peak RSS" in out and "; alone on 2 threads: cat" in out and "engine" in out and "in memory" in out


@pytest.mark.parametrize("peer_name,module", [("llama.cpp", "llama_cpp"), ("ik_llama.cpp", "ik_llama_cpp")])
def test_without_the_peer_the_remedy_is_told(model, tmp_path, monkeypatch, peer_name, module):
    (tmp_path / f"{module}.py").write_text("raise ImportError('no such library')")
    monkeypatch.setenv("KTX_PEER_PATH", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = run("--model", model, "-p", "16", "-n", "2", "--peer", peer_name)
    assert (
        done.returncode == 1
        and f"pip install {module.replace('_', '-')}-python" in done.stderr
        and "Traceback" not in done.stderr
    )


@pytest.mark.parametrize(
    "words,status", [(("--model", "/nowhere"), 4), (("--model", "/nowhere", "--peer", "llama.cpp"), 2)]
)
def test_what_cannot_be_loaded_is_one_line(words, status):
    done = run(*words)
    assert done.returncode == status and "/nowhere" in done.stderr and "Traceback" not in done.stderr


class Recorded(bench_process.BenchProcess):
    """An engine that writes down when it starts, measures and stops."""

    def __init__(self, name: str, log: list[str]):
        super().__init__(name, "none", [])
        self.log, self.up = log, False

    def measure(self, test: str) -> dict[str, float]:
        if not self.up:
            self.log.append(f"{self.name} starts")
        self.up = True
        self.log.append(f"{self.name} {test}")
        return {"tok_s": len(self.log)}

    def stop(self) -> None:
        if self.up:
            self.log.append(f"{self.name} stops")
        self.up = False


def test_together_they_alternate_test_by_test():
    log: list[str] = []
    found = bench.alternate([Recorded("a", log), Recorded("b", log)], ["pp1", "tg1"], 2, all_fit=True)
    assert [entry for entry in log if "starts" not in entry] == ["a pp1", "b pp1", "a tg1", "b tg1"] * 2
    assert all(len(rows) == 2 for engines in found.values() for rows in engines.values())


def test_apart_only_one_is_in_memory():
    log: list[str] = []
    bench.alternate([Recorded("a", log), Recorded("b", log)], ["pp1", "tg1"], 2, all_fit=False)
    up: set[str] = set()
    for entry in log:
        name, what = entry.split()
        up = up | {name} if what == "starts" else up - {name} if what == "stops" else up
        assert len(up) <= 1
    assert [e for e in log if "pp1" in e] == ["a pp1", "b pp1"] * 2


@pytest.mark.parametrize("free,together", [(1 << 20, False), (1 << 40, True)])
def test_room_for_two_is_decided_by_free_memory(model, monkeypatch, free, together):
    monkeypatch.setattr("ktx.hardware.memory", lambda: (free, free))
    args = argparse.Namespace(weights=None, model=str(model), peer="llama.cpp")
    decided, words = bench._both_fit(bench.gguf_path(args).stat().st_size)
    assert decided is together and ("one engine in memory at a time" in words) is not together


def test_an_engine_that_dies_is_an_error_not_a_hang():
    with pytest.raises(KtxError, match=r"toy ended without a result \(exit status 0\)"):
        bench_process.BenchProcess("toy", "keyword", []).start()


def test_a_peer_refuses_what_it_cannot_read(tmp_path):
    with pytest.raises(UsageError, match="GGUF files only"):
        bench.gguf_path(argparse.Namespace(weights=str(tmp_path), model="x", peer="llama.cpp"))


def test_token_ids_are_the_same_everywhere_and_various():
    assert bench_process.token_ids(5, 512) == bench_process.token_ids(9, 512)[:5]
    ids = bench_process.token_ids(512, 100000)
    assert len(set(ids)) > 500 and min(ids) >= 3 and max(ids) < 100000
    assert statistics.mean(ids) == pytest.approx(50000, rel=0.1)


def test_cat_speed_reads_every_byte(tmp_path, monkeypatch):
    file = tmp_path / "data"
    file.write_bytes(bytes(5 << 20))
    monkeypatch.setattr(bench_ktx, "CAT_CHUNK_BYTES", 1 << 20)
    counter = iter([0.0, 1.0, 1.0, 3.0])
    monkeypatch.setattr(bench_ktx.time, "perf_counter", lambda: next(counter))
    assert bench_ktx.measure_cat_speed([str(file)], 2) == (5 << 20) / 1e9  # the better pass took a second


def test_active_parameters_count_the_chosen_experts(model):
    import ktx

    loaded, _ = ktx.load(model, progress=False)
    c = loaded.config
    attention = (
        c.hidden_size * c.num_attention_heads * (128 + 64)
        + c.hidden_size * (512 + 64)
        + 512 * c.num_attention_heads * 256
    )
    attention += c.hidden_size * c.num_attention_heads * 128
    dense, expert = 3 * c.hidden_size * c.intermediate_size, 3 * c.hidden_size * c.moe_intermediate_size
    wanted = 2 * attention + dense + expert * (c.num_experts_per_tok + c.n_shared_experts)
    assert bench_ktx.active_params(loaded) == wanted


def test_instruction_sets_of_llama_cpps_own_words():
    text = "CPU : SSE3 = 1 | AVX2 = 1 | AVX512 = 1 | AVX512_VNNI = 0 | LLAMAFILE = 1 | "
    assert bench_llama_cpp.instruction_sets(text) == "AVX2 AVX512"


def installed(module: str) -> bool:
    path = os.environ.get("KTX_PEER_PATH", "").split(os.pathsep)
    return importlib.util.find_spec(module) is not None or any(part and (Path(part) / module).is_dir() for part in path)


@pytest.mark.parametrize(
    "peer_name,module,preset",
    [
        ("llama.cpp", "llama_cpp", "v2lite"),
        ("llama.cpp", "llama_cpp", "qwen3-30b"),
        ("ik_llama.cpp", "ik_llama_cpp", "qwen3-30b"),  # without q_a_proj it reads DeepSeek-V2 of 26 or 27 layers only
    ],
)
def test_the_real_peers_read_our_random_models(tmp_path, peer_name, module, preset):
    if not installed(module):
        pytest.skip(f"{module} is not installed")
    random_model.write(tmp_path, preset)
    done = run("--model", tmp_path, "-p", "16", "-n", "2", "-r", "1", "--peer", peer_name, "--json")
    assert done.returncode == 0, done.stderr
    engines = [json.loads(line)["engine"].split()[0] for line in done.stdout.splitlines()]
    assert engines == ["ktx", peer_name] * 2


def test_depths_and_their_tests():
    assert bench.lengths("0,8192") == [0, 8192]
    assert bench_process.parse_test("pp512") == ("pp", 512, 0)
    assert bench_process.parse_test("tg32@d8192") == ("tg", 32, 8192)
