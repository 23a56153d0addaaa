"""Pages on disk: what one engine has computed another one finds, and what does not fit is not used."""

from __future__ import annotations

import json
import stat

import pytest

import ktx
from ktx.engine.sampler import SamplingParams
from ktx.errors import UsageError
from tests.engine.test_batching import answers
from tests.support.tiny_chat_model import write_model

PROMPTS = [[(i * 37 + j * j) % 250 + 9 for j in range(length)] for i, length in enumerate((200, 130, 64, 20))]
SHORT = SamplingParams(max_new_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module", params=["llama", "deepseek_v3"])
def model(request, tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("disk") / request.param, request.param)
    return ktx.load(folder, folder / "model.gguf", progress=False)[0]


def asked(model, prompts, sampling=SHORT, **options):
    with model.ktx.engine(**options) as engine:
        return answers(engine, prompts, sampling)


def files(folder):
    return sorted(folder.rglob("*.safetensors"))


def test_a_second_engine_finds_what_the_first_has_computed(model, tmp_path):
    plain = asked(model, PROMPTS)
    first = asked(model, PROMPTS, prefix_cache_dir=tmp_path)
    second = asked(model, PROMPTS, prefix_cache_dir=tmp_path)
    assert [event.usage.cached for event in first] == [0] * 4
    assert [event.usage.cached for event in second] == [192, 128, 0, 0]
    assert [event.ids for event in second] == [event.ids for event in first] == [event.ids for event in plain]
    assert len(files(tmp_path)) == 3 + 2 + 1  # the page of 64 tokens is whole, but its last token's logits are wanted


def test_an_answer_is_kept_too(model, tmp_path):
    sampling = SamplingParams(max_new_tokens=100, ignore_eos=True)
    (first,) = asked(model, PROMPTS[:1], sampling, prefix_cache_dir=tmp_path)
    (second,) = asked(model, [PROMPTS[0] + first.ids + [9]], prefix_cache_dir=tmp_path)
    assert second.usage.cached == (200 + 100) // 64 * 64


def test_the_folder_is_its_owners_alone(model, tmp_path):
    asked(model, PROMPTS[:1], prefix_cache_dir=tmp_path)
    (folder,) = tmp_path.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize("harm", ["cut", "other", "gone", "empty"])
def test_a_file_of_no_use_is_computed_again(model, tmp_path, harm):
    plain = asked(model, PROMPTS[:1], prefix_cache_dir=tmp_path)
    for file in files(tmp_path):
        data = file.read_bytes()
        if harm == "cut":
            file.write_bytes(data[:-10])
        elif harm == "empty":
            file.write_bytes(b"")
        elif harm == "other":
            length = int.from_bytes(data[:8], "little")
            header = json.loads(data[8 : 8 + length])
            header["0.9"] = header.pop("0.0")
            raw = json.dumps(header).encode()
            file.write_bytes(len(raw).to_bytes(8, "little") + raw + data[8 + length :])
    with model.ktx.engine(prefix_cache_dir=tmp_path) as engine:
        if harm == "gone":
            for file in files(tmp_path):
                file.unlink()
        found = answers(engine, PROMPTS[:1], SHORT)
        assert found[0].usage.cached == 0
    assert found[0].ids == plain[0].ids
    assert asked(model, PROMPTS[:1], prefix_cache_dir=tmp_path)[0].usage.cached == 192  # written anew


def test_other_settings_have_other_folders(tmp_path_factory, tmp_path):
    folder = write_model(tmp_path_factory.mktemp("disk") / "other")
    for kind in ("f16", "q8_0"):
        model, _ = ktx.load(folder, folder / "model.gguf", progress=False, kv_dtype=kind)
        assert asked(model, PROMPTS[:1], prefix_cache_dir=tmp_path)[0].usage.cached == 0
        assert asked(model, PROMPTS[:1], prefix_cache_dir=tmp_path)[0].usage.cached == 192
    assert len(list(tmp_path.iterdir())) == 2


def test_the_oldest_go_when_there_is_too_much(model, tmp_path):
    asked(model, PROMPTS[:1], prefix_cache_dir=tmp_path)
    size = files(tmp_path)[0].stat().st_size
    asked(model, PROMPTS[1:2], prefix_cache_dir=tmp_path, prefix_cache_gb=2.5 * size / 1e9)
    left = files(tmp_path)
    assert len(left) == 2
    assert asked(model, PROMPTS[1:2], prefix_cache_dir=tmp_path)[0].usage.cached == 128


def test_a_cache_too_small_for_all_and_salts(model, tmp_path):
    plain = asked(model, PROMPTS * 2, kv_cache_tokens=320, max_batch_size=3)
    for _ in range(2):
        found = asked(model, PROMPTS * 2, kv_cache_tokens=320, max_batch_size=3, prefix_cache_dir=tmp_path)
        assert [event.ids for event in found] == [event.ids for event in plain]
    with model.ktx.engine(prefix_cache_dir=tmp_path) as engine:
        done = []
        engine.submit(PROMPTS[0], SHORT, done.append, salt=b"somebody else's")
        while not (done and hasattr(done[-1], "usage")):
            pass
        assert done[-1].usage.cached == 0


def test_guesses_beside(model, tmp_path):
    plain = asked(model, PROMPTS)
    for _ in range(2):
        found = asked(model, PROMPTS, prefix_cache_dir=tmp_path, speculative="prompt_lookup")
        assert [event.ids for event in found] == [event.ids for event in plain]


def test_a_folder_that_cannot_be(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="prefix_cache_dir .*cannot be used"):
        model.ktx.engine(prefix_cache_dir=tmp_path / "file")
    with pytest.raises(UsageError, match="which is off"):
        model.ktx.engine(prefix_cache_dir=tmp_path, prefix_cache=False)
    with pytest.raises(UsageError, match="more than 0"):
        model.ktx.engine(prefix_cache_dir=tmp_path, prefix_cache_gb=0)


def test_states_that_are_no_pages_are_not_kept(tmp_path):
    folder = write_model(tmp_path / "next", "qwen3_next")
    model, _ = ktx.load(folder, folder / "model.gguf", progress=False)
    with pytest.raises(UsageError, match="not stored in pages"):
        model.ktx.engine(prefix_cache_dir=tmp_path / "pages")
