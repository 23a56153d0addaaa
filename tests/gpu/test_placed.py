"""What rules put on a GPU: what it holds, what is refused, and what other parts of ktx make of it."""

from __future__ import annotations

import pytest
import torch

import ktx.devices
from ktx.errors import DoesNotFit, UsageError
from ktx.injection.rules import Rule
from ktx.kernels import reference
from ktx.kernels.gpu import norm
from ktx.ops.gpu.kv_view import causal_spec, view_of_states
from ktx.ops.registry import GPU_OPERATORS, OPERATORS, resolve
from tests.gpu.helpers import Twins, rules

pytestmark = pytest.mark.filterwarnings("ignore:.*matched no module")
IDS = torch.tensor([[5, 9, 200, 31]])


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """Dense, with biases, and an output layer without weights of its own."""
    config = {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}
    return Twins(tmp_path_factory.mktemp("llama"), "llama", **config)


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    return Twins(tmp_path_factory.mktemp("deepseek_v3"), "deepseek_v3")


def logits(model, ids=IDS):
    with torch.inference_mode():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("embedding,head", [("cuda:0", "cuda:0"), ("cpu", "cuda:1"), ("cuda:1", "cpu")])
def test_a_tied_output_layer_shares_the_matrix_where_it_lies_with_it(tied, embedding, head):
    placed = tied.on(Embedding=embedding, head=head)
    assert (logits(placed) - logits(tied.cpu)).abs().max() < 3e-5
    rows = placed.model.embed_tokens.packed
    assert (placed.lm_head.parts[0] is rows) == (embedding == head)
    assert torch.allclose(placed.lm_head.weight, tied.cpu.lm_head.weight)
    assert torch.allclose(placed.model.embed_tokens.weight, tied.cpu.model.embed_tokens.weight)
    assert (placed.ktx.nbytes > tied.cpu.ktx.nbytes) == (embedding != head)


def test_operators_hold_and_read_as_many_bytes_as_on_the_cpu(moe):
    placed = moe.on()
    own = dict(moe.cpu.named_modules())
    for path, module in placed.named_modules():
        if hasattr(module, "weight_bytes") and not path.endswith("self_attn"):  # there W_UK is held once, not twice
            assert module.weight_bytes() == own[path].weight_bytes(), path
    first, second = placed.model.layers[0].self_attn.weight_bytes(), own["model.layers.0.self_attn"].weight_bytes()
    assert first[0] == first[1] == second[1] < second[0]


def test_every_operator_but_the_recurrent_one_has_a_form():
    assert set(OPERATORS) - set(GPU_OPERATORS) == {"Recurrent"}
    for name, path in GPU_OPERATORS.items():
        assert issubclass(resolve(path), resolve(name)) and resolve(path) is not resolve(name)


def test_what_has_no_form_says_so(tmp_path):
    with pytest.raises(UsageError, match="Recurrent has no GPU implementation; place the module on the CPU"):
        Twins(tmp_path, "qwen3_next", num_experts=4, moe_intermediate_size=32).on()


def test_the_same_errors_as_on_the_cpu(moe):
    wrong = [
        Rule(r"self_attn$", replace="Attention", device="cuda:0"),
        Rule(r"\.layers\.0$", replace="MLA", device="cuda:0"),
    ]
    with pytest.raises(UsageError, match="MLA needs an attention with a compressed latent"):
        moe.load(wrong)
    with pytest.raises(UsageError, match="MLA has no option 'absorb'.*its options: absorb_for_prefill rope"):
        moe.load([Rule("self_attn$", replace="MLA", device="cuda:0", kwargs={"absorb": True})])


@pytest.mark.slow
def test_prompts_can_stay_absorbed(moe):
    one = [Rule("self_attn$", replace="MLA", kwargs={"absorb_for_prefill": True})]
    placed = moe.load([*one, *rules("deepseek_v3", Experts="cpu")])
    ids = torch.arange(70)[None] + 3
    assert placed.model.layers[0].self_attn.absorb_for_prefill
    assert (logits(placed, ids) - logits(moe.cpu, ids)).abs().max() < 3e-5


def test_weights_that_do_not_fit_on_a_gpu_are_told_with_the_numbers(moe, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("its memory is what it is")
    monkeypatch.setattr(ktx.devices, "FAKE_GPU_BYTES", 1 << 20)
    with pytest.raises(
        DoesNotFit, match=r"cuda:1: the weights need 2\d\d.* MB of memory, 1.0 MB of 1.0 MB are free; put less"
    ):
        moe.on(rest="cpu", MLA="cuda:1")


def test_pretended_gpus_need_the_interpreter(moe, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("nothing is pretended")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(UsageError, match="KTX_GPU=fake:2: .*set TRITON_INTERPRET=1 before Python starts"):
        moe.on()


@pytest.mark.slow
def test_packed_weights_are_kept_on_disk_for_what_is_on_the_cpu(moe, tmp_path):
    for _ in range(2):
        placed = moe.load(moe.rules(Experts="cpu"), packed_cache_dir=tmp_path)
        assert (logits(placed) - logits(moe.cpu)).abs().max() < 3e-5
    assert len(list(tmp_path.iterdir())) == 1
    moe.load(moe.rules(rest="cpu"), packed_cache_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("plus_one", [False, True])
def test_norms(dtype, plus_one):
    x, weight = torch.randn(3, 7, 72).to(dtype), torch.randn(72)
    found = norm.rms_norm(x.transpose(0, 1), weight, 1e-5, plus_one)
    wanted = reference.rms_norm(x.transpose(0, 1), weight, 1e-5, plus_one)
    torch.testing.assert_close(
        found, wanted, rtol=1e-6 if dtype is torch.float32 else 2e-2, atol=1e-6
    )  # the interpreter cuts bf16 off


def interval(*rows):
    return torch.tensor(rows, dtype=torch.int32)[:, None]


def test_masks_in_numbers():
    assert (
        causal_spec(None, 2, 1, 5).keys == (5, 5)
        and causal_spec(None, 2, 5, 5).keys == (5, 5)
        and causal_spec(None, 1, 3, 2) is None
    )
    assert causal_spec(None, 2, 3, 5) is None  # transformers' SDPA leaves the mask of a prompt in a static cache out
    plain = interval([(0, 4), (0, 5)], [(0, 4), (0, 5)])
    assert causal_spec(plain, 2, 2, 5).keys == (5, 5) and causal_spec(plain, 2, 2, 5).window == 0
    sliding = interval([(0, 3), (1, 4), (2, 5)])
    assert causal_spec(sliding, 1, 3, 5).window == 3
    assert causal_spec(interval([(2, 4), (2, 5)]), 1, 2, 5) is None  # padded on the left
    assert causal_spec(interval([(0, 5), (0, 5)]), 1, 2, 5) is None  # both ways
    assert causal_spec(interval([(0, 0), (0, 1)]), 1, 2, 5) is None  # a token that sees nothing
    assert causal_spec(torch.ones(1, 1, 2, 5, dtype=torch.bool), 1, 2, 5) is None


def test_a_buffer_of_whole_pages_is_read_in_place_and_any_other_is_copied():
    buffer = torch.randn(2, 3, 128, 8)
    both = interval(*[[(0, 69), (0, 70)]] * 2)
    grown = view_of_states(buffer[:, :, :70], buffer[:, :, :70], 2, both)
    assert grown.pools[0].data_ptr() == buffer.data_ptr()
    for sequence, head, position in ((0, 0, 5), (0, 2, 69), (1, 0, 64), (1, 2, 1)):
        page = grown.tables.pages[sequence, position // 64]
        assert torch.equal(grown.pools[0][page, head, position % 64], buffer[sequence, head, position])
    assert grown.tables.slots.tolist() == [68, 69, 3 * 128 + 68, 3 * 128 + 69]
    other = torch.randn(1, 2, 70, 8)
    copied = view_of_states(other, other, 1, None)
    assert torch.equal(copied.pools[0][copied.tables.pages[0, 1], 1, 3], other[0, 1, 67])
