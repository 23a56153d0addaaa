"""Which files of a repository are fetched."""

from __future__ import annotations

import pytest

from ktx.errors import BadFile, UsageError
from ktx.hub.file_selection import AmbiguousQuant, File, list_quantizations, select_files


def files(*paths, size=10):
    return [File(path, size) for path in paths]


def chosen(paths, **more):
    return [file.path for file in select_files("o/r", files(*paths), **more).files]


SAFETENSORS = (
    "config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    "model.safetensors.index.json", "tokenizer.json", "pytorch_model.bin", "original/model.safetensors",
    "consolidated.safetensors", "tf_model.h5", "picture.png", "modeling_x.py", "README.md",
)  # fmt: skip
GGUF = (
    "M-Q4_K_M.gguf", "M-Q8_0.gguf", "BF16/M-BF16-00002-of-00002.gguf", "BF16/M-BF16-00001-of-00002.gguf",
    "UD-Q2_K_XL/M-UD-Q2_K_XL-00001-of-00001.gguf", "M.i1-IQ2_XXS.gguf", "mmproj-F16.gguf", "M-imatrix.gguf",
    "config.json",
)  # fmt: skip


def test_safetensors_come_once_and_pickles_never():
    assert chosen(SAFETENSORS) == [
        *SAFETENSORS[1:3],
        "README.md", "config.json", "model.safetensors.index.json", "modeling_x.py", "tokenizer.json",
    ]  # fmt: skip
    assert [file.path for file in select_files("o/r", files(*SAFETENSORS)).pickles] == ["pytorch_model.bin"]


def test_pickles_that_are_asked_for():
    assert "pytorch_model.bin" in chosen(SAFETENSORS, include=["*.bin"])
    assert "pytorch_model.bin" not in chosen(SAFETENSORS, include=["*"])
    with pytest.raises(UsageError, match=r'run code when they are read.*--include "\*\.bin"'):
        select_files("o/r", files("config.json", "pytorch_model.bin"))


@pytest.mark.parametrize(
    "paths,names",
    [
        (GGUF, {"Q4_K_M", "Q8_0", "BF16", "UD-Q2_K_XL", "IQ2_XXS"}),
        (("gpt-oss-20b-mxfp4.gguf", "gpt-oss-20b-F16.gguf"), {"MXFP4", "F16"}),
        (("Qwen3-30B-A3B.gguf",), {"Qwen3-30B-A3B"}),
        (("Q5_K_S/model-00001-of-00001.gguf",), {"Q5_K_S"}),
        (("big-Q4_0.gguf", "small-Q4_0.gguf"), {"big-Q4_0", "small-Q4_0"}),
        (("M.Q4_0_4_4.gguf", "M.TQ1_0.gguf"), {"Q4_0_4_4", "TQ1_0"}),
    ],
)
def test_quantisations_go_by_their_names(paths, names):
    assert {one.name for one in list_quantizations(files(*paths))} == names


def test_many_quantisations_and_none_named():
    with pytest.raises(AmbiguousQuant) as told:
        select_files("o/r", files(*GGUF))
    assert len(told.value.found) == 5
    assert chosen(["only-Q4_K_M.gguf", "mmproj-F16.gguf", "config.json"]) == ["only-Q4_K_M.gguf", "config.json"]


@pytest.mark.parametrize(
    "tag,first", [("Q4_K_M", GGUF[0]), ("bf16", GGUF[3]), ("Q2_K_XL", GGUF[4]), ("iq2_xxs", GGUF[5])]
)
def test_the_short_name_of_a_quantisation(tag, first):
    found = chosen(GGUF, tag=tag)
    assert found[0] == first and found[-1] == "config.json" and len(found) == (3 if tag == "bf16" else 2)


def test_a_short_name_that_fits_none_or_two():
    with pytest.raises(AmbiguousQuant, match="contains no model named Q3_K") as told:
        select_files("o/r", files(*GGUF), tag="Q3_K")
    assert len(told.value.found) == 5
    with pytest.raises(AmbiguousQuant, match="contains 2 models") as told:
        select_files("o/r", files("a-Q4_0.gguf", "b-Q4_0.gguf", "c-Q8_0.gguf"), tag="Q4_0")
    assert [one.name for one in told.value.found] == ["a-Q4_0", "b-Q4_0"]
    assert chosen(["a-Q4_0.gguf", "b-Q4_0.gguf"], tag="b-q4_0") == ["b-Q4_0.gguf"]
    with pytest.raises(UsageError, match="contains no GGUF"):
        select_files("o/r", files(*SAFETENSORS), tag="Q4_K_M")
    with pytest.raises(BadFile, match="contains 1 of the 3 parts of Q4_0"):
        select_files("o/r", files("a-Q4_0-00001-of-00003.gguf"), tag="Q4_0")


def test_globs():
    assert chosen(GGUF, include=["*Q4_K_M*"]) == ["M-Q4_K_M.gguf", "config.json"]
    assert chosen(GGUF, include=["BF16/"])[:2] == [GGUF[2], GGUF[3]]
    assert chosen(GGUF, include=["*.json"]) == ["config.json"]
    assert chosen(GGUF, include=["*Q4_K_M*"], exclude=["*.json"]) == ["M-Q4_K_M.gguf"]
    with pytest.raises(UsageError, match=r"no file matches \*Q9\*; it contains M-Q4_K_M.gguf, M-Q8_0.gguf"):
        select_files("o/r", files(*GGUF), include=["*Q9*"])


@pytest.mark.parametrize("path", ["../x.gguf", "/etc/x.gguf", "a/../../x.gguf", "a\\..\\x.gguf"])
def test_a_name_that_leads_out_of_the_folder_is_refused(path):
    with pytest.raises(BadFile, match="is outside of the repository"):
        select_files("o/r", files("x.gguf", path))
