"""Every family: the injected model is the transformers model on the weights that the file holds."""

from __future__ import annotations

import pytest
import torch

from ktx.cache.batch import BatchMetadata, SequenceSpan
from ktx.cache.kv import KVCache
from ktx.cache.paged import PagedCache
from ktx.errors import BadFile
from ktx.kernels.check import multiplies_in_bf16
from tests.support.gguf_writer import write_gguf
from tests.support.tiny_models import FAMILIES, LLAMA3, MEMBERS, tiny

IDS = torch.randint(3, 320, (1, 150), generator=torch.Generator().manual_seed(3))
FLOATS = ("F32", "BF16")
IN_BF16 = multiplies_in_bf16()  # where BF16 weights and half precision caches are multiplied so


def mixed(name: str) -> str:
    """A Q4_K_M-like file: other types for some tensors."""
    return "Q6_K" if "down" in name or "attn_v" in name or name == "output.weight" else "Q4_K"


class Pair:
    """A family's model in ktx and in transformers, on the same weights."""

    def __init__(self, folder, family, quant, config=None, **options):
        original = tiny(family, **(config or {}))
        original.config.save_pretrained(folder)
        oracle = write_gguf(folder / "model.gguf", original, quant, **options)
        original.load_state_dict(oracle, strict=False)
        self.reference = original
        self.model = load(folder, folder / "model.gguf")


def load(folder, weights, **more):
    """ktx.load without a tokenizer, which these folders do not have."""
    import ktx.loader.load

    keep = ktx.loader.load.read_tokenizer
    ktx.loader.load.read_tokenizer = lambda *args, **kwargs: None
    try:
        return ktx.load(folder, weights, progress=False, **more)[0]
    finally:
        ktx.loader.load.read_tokenizer = keep


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    return Pair(tmp_path_factory.mktemp(request.param), request.param, "F32")


def logits(model, ids=IDS, **more):
    with torch.inference_mode():
        return model(input_ids=ids, **more).logits


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_float_logits(pair):
    assert (logits(pair.model) - logits(pair.reference)).abs().max() < 1e-4


def test_token_by_token_is_prefill(pair):
    whole = logits(pair.model, IDS[:, :40])
    with torch.inference_mode():
        cache = KVCache(pair.model.config, dtype=None)
        steps = [pair.model(input_ids=IDS[:, i : i + 1], past_key_values=cache).logits for i in range(40)]
    assert (torch.cat(steps, 1) - whole).abs().max() < 1e-4


def test_chunks_are_whole(pair):
    whole = logits(pair.model)[:, -1]
    cache = KVCache(pair.model.config, dtype=None)
    with torch.inference_mode():
        for at in (0, 1, 30):
            end = {0: 1, 1: 30, 30: 150}[at]
            out = pair.model(input_ids=IDS[:, at:end], past_key_values=cache).logits
    assert (out[:, -1] - whole).abs().max() < 1e-4


def test_half_precision_cache_is_close(pair):
    cache = KVCache(pair.model.config)
    with torch.inference_mode():
        pair.model(input_ids=IDS[:, :100], past_key_values=cache)
        out = pair.model(input_ids=IDS[:, 100:], past_key_values=cache).logits
    whole = logits(pair.model)[:, 100:]
    assert per_token(out, whole) < (1e-2 if IN_BF16 else 2e-3)


def test_left_padded_batch_is_single(pair):
    rows = [IDS[:, :20], IDS[:, 50:61]]
    ids, mask = torch.zeros(2, 20, dtype=torch.long), torch.zeros(2, 20, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, 20 - row.shape[1] :], mask[i, 20 - row.shape[1] :] = row, 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    batch = logits(pair.model, ids, attention_mask=mask, position_ids=positions)
    for i, row in enumerate(rows):
        assert (batch[i, -1] - logits(pair.model, row)[0, -1]).abs().max() < 1e-4


STEPS = [
    ((1, 3), (2, 20)),
    ((2, 1), (1, 30), (0, 140)),
    ((0, 1), (1, 1), (2, 1)),
    ((1, 2), (0, 5), (2, 100)),
]  # sequence, tokens


def ragged(model, rows, dtype):
    """Logits of three sequences, computed in the same forwards on scattered pages."""
    cache, pages = PagedCache(model.config, 12, dtype), torch.randperm(12).view(3, 4).tolist()
    done, found = [0, 0, 0], [[], [], []]
    for step in STEPS:
        spans = [
            SequenceSpan(which, done[which], count, pages[which], count * (done[which] == 0)) for which, count in step
        ]
        batch = BatchMetadata(spans)
        ids = torch.cat([rows[s.owner][:, s.past : s.past + s.count] for s in spans], 1)
        with torch.inference_mode(), cache.forward(batch):
            out = model(input_ids=ids, position_ids=batch.position_ids, past_key_values=cache).logits
        for span, part in zip(spans, out.split([span.count for span in spans], 1), strict=True):
            found[span.owner].append(part)
            done[span.owner] += span.count
    return [torch.cat(parts, 1) for parts in found]


ROWS = [IDS, IDS.flip(1), IDS.roll(40, 1)]


def check_ragged(model):
    for found, row in zip(ragged(model, ROWS, torch.float32), ROWS, strict=True):
        assert (found - logits(model, row[:, : found.shape[1]])).abs().max() < 1e-4


def test_several_sequences_in_one_forward_are_as_they_are_alone(pair):
    check_ragged(pair.model)
    for found, row in zip(ragged(pair.model, ROWS, "f16"), ROWS, strict=True):
        whole = logits(pair.model, row[:, : found.shape[1]])
        assert per_token(found, whole) < (2e-2 if IN_BF16 else 2e-3)


@pytest.mark.parametrize("how", ["dynamic", "static", "beams"])
def test_generate(pair, how):
    if how == "static" and pair.model.config.model_type == "qwen3_next":
        how = "dynamic"  # transformers has no static cache for linear attention in every version we support
    options = {
        "dynamic": {},
        "static": {"cache_implementation": "static", "disable_compile": True},
        "beams": {"num_beams": 3},
    }[how]
    ids = IDS[:, :12].repeat(2, 1)
    ids[1, :4] = 0
    mask = (ids != 0).long()
    kwargs = {"max_new_tokens": 8, "do_sample": False, "attention_mask": mask, "pad_token_id": 0, **options}
    with torch.inference_mode():
        assert torch.equal(pair.model.generate(ids, **kwargs), pair.reference.generate(ids, **kwargs))


def test_generate_with_our_cache_and_streamer(pair):
    class Streamer:
        def __init__(self):
            self.seen = []

        def put(self, value):
            self.seen += value.reshape(-1).tolist()

        def end(self):
            self.seen.append("end")

    streamer = Streamer()
    kwargs = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with torch.inference_mode():
        mine = pair.model.generate(
            IDS[:, :9], past_key_values=KVCache(pair.model.config, dtype=None), streamer=streamer, **kwargs
        )
        assert torch.equal(mine, pair.reference.generate(IDS[:, :9], **kwargs))
    assert streamer.seen == [*mine[0].tolist(), "end"]


def per_token(a, b):
    """Median: a rounding may send a token to another expert, and that token alone then differs."""
    return ((a - b).norm(dim=-1) / b.norm(dim=-1)).median().item()


def response_to_noise(model):
    """What noise of int8 activations' size (0.55 % of each linear layer's input) does to transformers' own logits.

    Qwen3-Next's delta rule subtracts nearly equal numbers: with random weights it answers 0.55 % with 7 %.
    """
    clean = logits(model)
    noisy = [
        m.register_forward_pre_hook(
            lambda m, i: (i[0] + torch.randn_like(i[0]) * i[0].square().mean(-1, keepdim=True).sqrt() * 0.0055,)
        )
        for m in model.modules()
        if isinstance(m, torch.nn.Linear)
    ]
    answer = per_token(logits(model), clean)
    for hook in noisy:
        hook.remove()
    return answer


@pytest.mark.parametrize("quant", ["BF16", "Q8_0", mixed], ids=["BF16", "Q8_0", "Q4_K_M"])
@pytest.mark.parametrize("family", FAMILIES)
def test_quantised_logits(tmp_path, family, quant):
    pair = Pair(tmp_path, family, quant)
    mine, theirs = logits(pair.model), logits(pair.reference)
    if quant == "BF16" and not IN_BF16:
        assert (mine - theirs).abs().max() < 1e-4
        return
    # A router turns a small error into another expert, which random weights punish: the median token must be near, and
    # where the margin is clear the greedy token is the same.
    error = per_token(mine, theirs)
    assert error < 0.03 or error < 1.5 * response_to_noise(pair.reference)
    top = theirs.topk(2, -1)[0]
    clear = (
        top[..., 0] - top[..., 1] > 6 * (mine - theirs).square().mean(-1).sqrt()
    )  # over four sigma of a difference of two logits
    assert clear.any() and (mine.argmax(-1) == theirs.argmax(-1))[clear].all()


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_unsplit_kv_b(tmp_path, family):
    pair = Pair(tmp_path, family, "F32", split_kvb=False)
    assert (logits(pair.model) - logits(pair.reference)).abs().max() < 1e-4


@pytest.mark.parametrize("family", ["qwen3_moe", "glm4_moe", "deepseek_v3"])
def test_fused_gate_up(tmp_path, family):
    pair = Pair(tmp_path, family, "F32", fuse_gate_up=True)
    assert (logits(pair.model) - logits(pair.reference)).abs().max() < 1e-4


@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral"])
def test_fused_qkv(tmp_path, family):
    pair = Pair(tmp_path, family, "F32", fuse_qkv=True)
    assert (logits(pair.model) - logits(pair.reference)).abs().max() < 1e-4


@pytest.mark.parametrize("family,config", MEMBERS)
def test_other_members_of_the_families(tmp_path, family, config):
    pair = Pair(tmp_path, family, "F32", config)
    whole = logits(pair.model, IDS[:, :40])
    assert (whole - logits(pair.reference, IDS[:, :40])).abs().max() < 1e-4
    cache = KVCache(pair.model.config, dtype=None)
    with torch.inference_mode():
        steps = [pair.model(input_ids=IDS[:, i : i + 1], past_key_values=cache).logits for i in range(40)]
    assert (torch.cat(steps, 1) - whole).abs().max() < 1e-4
    check_ragged(pair.model)


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + i / 16 for i in range(32)],
    "long_factor": [2.0 + i / 8 for i in range(32)],
    "original_max_position_embeddings": 128,
}
SILENT = {"sliding_window", "rope_interleave"}  # what a file does not say, of other families than phi3
ALONE = ["deepseek_v2", "deepseek_v3", "qwen2_moe", "qwen3_moe", "mixtral", "llama", "qwen2", "qwen3", "phi3"]


def test_a_long_sequence_does_not_change_the_rotation_of_a_short_one(tmp_path):
    config = {"rope_parameters": LONGROPE, "original_max_position_embeddings": 128}
    model = Pair(tmp_path, "phi3", "F32", config).model
    cache = PagedCache(model.config, 12, torch.float32)
    batch = BatchMetadata([SequenceSpan(1, 0, 30, [2, 3]), SequenceSpan(0, 0, 150, [5, 6, 7], 150)])
    ids = torch.cat([ROWS[1][:, :30], ROWS[0]], 1)
    with torch.inference_mode(), cache.forward(batch):
        out = model(input_ids=ids, position_ids=batch.position_ids, past_key_values=cache).logits
    assert (out[:, 30:] - logits(model, ROWS[0])).abs().max() < 1e-4
    assert (out[:, :30] - logits(model, ROWS[1][:, :30])).abs().max() < 1e-4


@pytest.mark.parametrize(
    "family,config",
    [
        *((family, {}) for family in ALONE),
        *((f, c) for f, c in MEMBERS if f in ALONE and (f == "phi3" or not SILENT & set(c)) and f != "qwen2_moe"),
        ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 128}),
    ],
)
def test_a_file_alone_says_what_the_folder_says(tmp_path, family, config):
    original = tiny(family, **config)
    original.load_state_dict(write_gguf(tmp_path / "model.gguf", original, "F32"), strict=False)
    assert (logits(load(tmp_path / "model.gguf", None)) - logits(original)).abs().max() < 1e-4


def test_what_a_file_alone_cannot_say_is_refused(tmp_path):
    original = tiny("llama", rope_parameters=LLAMA3)
    write_gguf(tmp_path / "scaled.gguf", original, "F32", mangle={"rope.scaling.type": "su"})
    assert load(tmp_path / "scaled.gguf", None) is not None  # the table counts, as for llama.cpp
    plain = tiny("llama")
    write_gguf(tmp_path / "su.gguf", plain, "F32", mangle={"rope.scaling.type": "su"})
    with pytest.raises(BadFile, match="rope scaling 'su' is not supported; pass the Hugging Face folder to --model"):
        load(tmp_path / "su.gguf", None)
    write_gguf(tmp_path / "oss.gguf", tiny("gpt_oss"), "F32")
    with pytest.raises(BadFile, match="a gpt-oss file cannot be used alone"):
        load(tmp_path / "oss.gguf", None)
