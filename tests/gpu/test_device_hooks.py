"""What goes from one device to another, and how often."""

from __future__ import annotations

import pytest
import torch

from ktx.cache.batch import BatchMetadata, SequenceSpan
from ktx.cache.forward_context import ForwardContext
from ktx.cache.kv import KVCache
from ktx.devices import Device
from ktx.ops import device_hooks
from ktx.ops.embed import Embedding
from ktx.ops.fusion import layer_group
from ktx.ops.fusion.layer import Layer
from ktx.ops.masks import Intervals
from ktx.ops.mlp import MLP
from ktx.ops.norm import RMSNorm
from ktx.ops.rope import RotaryEmbedding
from ktx.utils.versions import installed_version, release_components
from tests.gpu.helpers import Twins

LAYERS = {"num_hidden_layers": 4, "first_k_dense_replace": 4}


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    return Twins(tmp_path_factory.mktemp("deepseek_v3"), "deepseek_v3", **LAYERS)


class Journeys(list):
    """Shapes and devices of tensors that were moved. A pretended GPU's tensors lie in the CPU's memory: their modules
    say where they are.
    """

    def __init__(self, really):
        super().__init__()
        self.really, self.places = really, {}

    def moved(self, tensor, home):
        there, device = self.really(tensor, home), home.device
        if isinstance(there, Intervals) or not tensor.numel() or self.place(tensor) == device.name:
            return there
        self.append((tuple(tensor.shape), device.name))
        return self.put(there.clone(), device.name)

    def place(self, tensor):
        return self.places.get(id(tensor), ("cpu", tensor))[0]

    def put(self, tensor, name):
        self.places[id(tensor)] = name, tensor
        return tensor

    def run(self, model):
        """Logits, and the journeys to them."""
        self.clear()

        def tag(module, args, out):
            for part in out if isinstance(out, tuple) else (out,):
                self.put(part, module.placement.name)

        hooks = [m.register_forward_hook(tag, prepend=True) for m in model.modules() if isinstance(m, STATIONS)]
        try:
            return run(model)
        finally:
            for hook in hooks:
                hook.remove()


STATIONS = (Layer, Embedding, RotaryEmbedding, RMSNorm, MLP)


@pytest.fixture
def journeys(monkeypatch):
    found = Journeys(device_hooks.move_to)
    monkeypatch.setattr(device_hooks, "move_to", found.moved)
    return found


def hooked(model):
    return {
        path
        for path, module in model.named_modules()
        if any(isinstance(hook, device_hooks.ToDevice) for hook in module._forward_pre_hooks.values())
    }


def run(model, cache=None):
    with torch.inference_mode():
        return model(input_ids=torch.tensor([[5, 6, 7]]), past_key_values=cache).logits


def test_a_model_on_the_cpu_has_no_hooks(twins):
    assert hooked(twins.cpu) == set()


def test_a_model_on_one_gpu_takes_its_tokens_there_and_has_no_hook_inside(twins, journeys):
    model = twins.on()
    assert hooked(model) == {"model.embed_tokens", "model.rotary_emb"}
    journeys.run(model)
    assert journeys == [((1, 3), "cuda:0"), ((1, 3), "cuda:0")]  # tokens and positions


def test_each_region_gets_states_and_tables_once(twins, journeys):
    model = twins.on(layers={2: "cuda:1", 3: "cuda:1"}, Embedding="cpu", head="cpu")
    assert (journeys.run(model) - run(twins.cpu)).abs().max() < 3e-5
    ids, states, tables = (1, 3), (1, 3, 64), (1, 3, 16)
    once = [
        (ids, "cuda:0"),  # positions, to the tables
        (states, "cuda:0"),
        (states, "cuda:1"),
        (tables, "cuda:1"),
        (tables, "cuda:1"),
        (ids, "cuda:1"),
        (states, "cuda:0"),  # to the last norm; what the output layer gets is a slice, whose place this does not know
    ]
    # Up to 5.17 layers are given the very positions that the tables are made of, which are there already.
    assert journeys == (
        once
        if release_components(installed_version("transformers"))[:2] == (5, 17)
        else [*once[:2], (ids, "cuda:0"), *once[2:]]
    )
    assert hooked(model) >= {"model.layers.0", "model.layers.2", "model.norm", "lm_head"}
    assert "model.layers.1" not in hooked(model)


def test_a_module_inside_a_layer_gives_its_result_back(twins, journeys):
    model = twins.on(rest="cpu", MLP="cuda:0")
    assert (journeys.run(model) - run(twins.cpu)).abs().max() < 3e-5
    assert hooked(model) == {f"model.layers.{i}.mlp" for i in range(4)}
    assert journeys == [((1, 3, 64), "cuda:0"), ((1, 3, 64), "cpu")] * 4


def test_first_layers_on_the_cpu_and_attention_on_a_gpu_inside_one(twins):
    expected = run(twins.cpu)
    assert (run(twins.on(layers={0: "cpu", 2: "cuda:1"})) - expected).abs().max() < 3e-5
    assert (run(twins.on(rest="cpu", MLA="cuda:1")) - expected).abs().max() < 3e-5
    assert (run(twins.on(MLA="cpu")) - expected).abs().max() < 3e-5


def test_masks_that_are_intervals_stay_and_lengths_go_along():
    mask = torch.zeros(1, 1, 3, 2, dtype=torch.int32)
    elsewhere = device_hooks.DevicePlacement(Device("cuda:0", torch.device("meta"), True), torch.float32)
    assert device_hooks.move_to(mask, elsewhere) is mask
    context = ForwardContext(BatchMetadata([SequenceSpan(0, 0, 2, [0]), SequenceSpan(1, 5, 1, [1])]))
    there = device_hooks.move_to(context.batch.position_ids, elsewhere)
    assert there.device.type == "meta" and context.row_counts(there) == [2, 1]


@pytest.fixture(scope="module")
def halves(twins):
    """In bf16, the first two layers on a GPU, the others and both ends on the CPU."""
    return twins.load(twins.rules(layers={2: "cpu", 3: "cpu"}, Embedding="cpu", RMSNorm="cpu", head="cpu"), dtype=None)


def test_layers_on_the_cpu_beside_a_gpu_compute_in_f32_by_their_blocks(twins, halves, monkeypatch):
    found, together, really = {}, [], layer_group.run_steps

    def recorded(x, steps, outs, *args):
        together.append(len(outs))
        return really(x, steps, outs, *args)

    monkeypatch.setattr(layer_group, "run_steps", recorded)
    for i, layer in enumerate(halves.model.layers):
        layer.register_forward_hook(lambda module, args, out, i=i: found.update({i: out.dtype}))
    logits = run(halves, KVCache(halves.config, "f32"))
    assert halves.dtype is torch.bfloat16 and logits.dtype is torch.float32
    assert [found[i] for i in range(4)] == [torch.bfloat16] * 2 + [torch.float32] * 2
    assert together == [2] and halves.model.layers[2].fused_group.num_unused == 0
    assert (logits - run(twins.cpu)).abs().max() < 2e-2 * run(twins.cpu).abs().max()


def test_a_module_left_to_transformers_keeps_its_layer_in_the_models_type(twins, halves):
    layer = halves.model.layers[2]

    def homes():
        placements = {m: m.placement for m in halves.modules() if hasattr(m, "placement")}
        return device_hooks._assign_placements(halves, placements, halves.dtype)

    assert homes()[layer].dtype is torch.float32
    layer.mlp.kept = torch.nn.Linear(4, 4, dtype=torch.bfloat16)
    assert homes()[layer].dtype is homes()[layer.mlp.kept].dtype is torch.bfloat16
    del layer.mlp.kept
