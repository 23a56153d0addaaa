"""Names of ktx 0.1: each still imports, gives the object of today, and warns."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import queue
import sys
import warnings

import pytest
import torch

import ktx
from ktx import demo
from ktx.loader.build import OLD_ARGUMENTS
from ktx.utils import deprecation
from ktx.utils.old_names import ELSEWHERE, MODULES, NAMES


def imported(name):
    """An old module as at its first import."""
    sys.modules.pop(name, None)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        module = importlib.import_module(name)
    return module, [str(warning.message) for warning in seen if warning.category is DeprecationWarning]


@pytest.mark.parametrize("old", MODULES)
def test_an_old_module_is_the_new_one(old):
    module, messages = imported(old)
    new = importlib.import_module(MODULES[old])
    assert messages == [f"{old} is called {MODULES[old]} since ktx 0.2; the old name ends with 0.3"]
    for name in (name for name in vars(new) if not name.startswith("_")):
        assert getattr(module, name) is getattr(new, name)
    with pytest.raises(AttributeError, match="no_such_name"):
        module.no_such_name  # noqa: B018


@pytest.mark.parametrize("new,old,now", [(new, old, now) for new, names in NAMES.items() for old, now in names.items()])
def test_an_old_name_is_the_new_one(new, old, now):
    module = imported(next(name for name, moved in MODULES.items() if moved == new))[0]
    with pytest.warns(DeprecationWarning, match=f"{old} is called .*{now}"):
        found = getattr(module, old)
    assert found is getattr(importlib.import_module(new), now)


@pytest.mark.parametrize(
    "name,old,now",
    [
        ("ktx.engine.request", "Piece", "TokenEvent"),
        ("ktx.engine.request", "Prompt", "PromptLogprobs"),
        ("ktx.engine.prompt", "Prompts", "PromptRenderer"),
        ("ktx.engine.prompt", "Rendered", "RenderedPrompt"),
        ("ktx.ops.lora", "Use", "AdapterUse"),
    ],
)
def test_an_old_name_in_a_module_that_stayed(name, old, now, seen):
    module = importlib.import_module(name)
    assert getattr(module, old) is getattr(module, now)
    warned(seen, f"{name}.{old} is called {name}.{now}")
    with pytest.raises(AttributeError, match=f"module '{name}' has no attribute 'no_such_name'"):
        module.no_such_name  # noqa: B018


@pytest.mark.parametrize("old,name", ELSEWHERE)
def test_a_name_that_moved_to_a_third_module(old, name):
    assert getattr(imported(old)[0], name) is getattr(importlib.import_module(ELSEWHERE[old, name]), name)


@pytest.mark.parametrize(
    "old,new", [("ktx.dialects.parser", "ktx.chat_formats.parser"), ("ktx.commands.plan", "ktx.cli.plan")]
)
def test_modules_of_a_moved_package(old, new):
    assert imported(old)[0].__getattr__("__doc__") is importlib.import_module(new).__doc__


def test_a_module_that_never_was():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("ktx.no_such_module")


def warned(seen, *messages):
    """Checks that the recorded warnings are one for each message, in order, and clears them."""
    texts = [str(warning.message) for warning in seen if warning.category is DeprecationWarning]
    assert texts == [f"{message} since ktx 0.2; the old name ends with 0.3" for message in messages]
    assert all(warning.filename == __file__ for warning in seen)
    seen.clear()


@pytest.fixture
def seen():
    with warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("always")
        yield recorded


OLD_VALUES = {
    "weight_dtype": "int8",
    "moe_dtype": "int4",
    "moe_experts": 1,
    "shared_device": "cpu",
    "stream_experts": "off",
    "cache_dir": "there",
}


@pytest.mark.parametrize("old", OLD_ARGUMENTS)
def test_an_old_argument_is_the_new_one(old, seen):
    new, value = OLD_ARGUMENTS[old], OLD_VALUES[old]
    config = ktx.KtxConfig(**{old: value})
    warned(seen, f"KtxConfig: the argument {old} is called {new}")
    assert getattr(config, new) == value and config.to_dict() == ktx.KtxConfig(**{new: value}).to_dict()
    assert getattr(config, old) == value
    warned(seen, f"KtxConfig.{old} is called KtxConfig.{new}")
    with pytest.raises(TypeError, match=f"KtxConfig.* got both '{old}' and '{new}'"):
        ktx.KtxConfig(**{old: value, new: value})
    assert new in inspect.signature(ktx.load).parameters and old not in inspect.signature(ktx.load).parameters
    if old == "cache_dir":  # which plans do not have
        return
    before = ktx.plan(demo.path(), demo.safetensors(), **{old: value})
    warned(seen, f"plan: the argument {old} is called {new}")
    assert str(before) == str(ktx.plan(demo.path(), demo.safetensors(), **{new: value}))


def test_old_arguments_load_a_model(seen, tmp_path):
    model, _ = ktx.load(
        demo.path(), demo.safetensors(), progress=False, weight_dtype="int8", moe_experts=1, cache_dir=tmp_path
    )
    warned(
        [warning for warning in seen if "load: the argument" in str(warning.message)],
        "load: the argument weight_dtype is called quantize",
        "load: the argument moe_experts is called num_experts_per_tok",
        "load: the argument cache_dir is called packed_cache_dir",
    )
    assert "INT8_128" in str(model) and model.config.num_experts_per_tok == 1 and any(tmp_path.iterdir())
    with pytest.raises(TypeError, match="weights_dtype"):
        ktx.load(demo.path(), weights_dtype="int8")


@pytest.fixture(scope="module")
def model():
    return ktx.load(demo.path(), demo.gguf(), progress=False)[0]


def test_a_program_with_an_engine_of_ktx_0_1(model, seen):
    from ktx.engine.sampling import Sampling
    from ktx.engine.text import Session

    from ktx.engine.request import Finished, Piece

    with model.ktx.engine(max_batch_size=2, cache_lens=1024) as engine:
        warned(
            [warning for warning in seen if "cache_lens" in str(warning.message)],
            "engine: the argument cache_lens is called kv_cache_tokens",
        )
        seen.clear()
        assert engine.options.kv_cache_tokens == 1024 and engine.options.cache_lens == 1024
        events = [event for _, event in engine.generate(["What is a rule file?"], Sampling(max_new_tokens=4))]
        assert [event.choice.token for event in events if isinstance(event, Piece)] == events[-1].ids
        assert isinstance(events[-1], Finished) and events[-1].refused is False
        assert events[-1].usage.prompt_speed > 0 and events[-1].usage.answer_speed > 0
        done = engine.activity.done()
        assert done.prompt_tokens and done.gpu_wait_seconds == 0 and engine.submitted == 1 and not engine.stuck
        heard: queue.SimpleQueue = queue.SimpleQueue()
        request = engine.submit(engine.ids("What is ktx?"), Sampling(max_new_tokens=1), sink=heard.put)
        while not isinstance(heard.get(timeout=60), Finished):
            pass
        assert request.answered == 1

        async def listen():
            return [event async for event in engine.listen("What is ktx?", Sampling(max_new_tokens=2))]

        assert asyncio.run(listen())[-1].reason == "length"
        session = Session(engine)
        prompt = session.prompt([{"role": "user", "content": "What is a rule file?"}])
        assert list(session.answer(prompt, Sampling(max_new_tokens=2)))[-1].usage.cached >= 0
        session.forget()
        engine.clear()
    texts = [str(warning.message) for warning in seen]
    for old, new in (
        ("Options.cache_lens", "Options.kv_cache_tokens"),
        ("TokenEvent.choice", "TokenEvent.token"),
        ("Finished.refused", "Finished.client_error"),
        ("Usage.prompt_speed", "Usage.prompt_tokens_per_s"),
        ("Usage.answer_speed", "Usage.output_tokens_per_s"),
        ("Engine.activity", "Engine.stats"),
        ("EngineStats.done", "EngineStats.snapshot"),
        ("StatsSnapshot.gpu_wait_seconds", "StatsSnapshot.gpu_wait_s"),
        ("Engine.submitted", "Engine.num_submitted"),
        ("Engine.stuck", "Engine.stalled"),
        ("Engine.ids", "Engine.tokenize"),
        ("submit: the argument sink", "on_event"),
        ("Request.answered", "Request.num_output"),
        ("Engine.listen", "Engine.stream"),
        ("Session.prompt", "Session.render"),
        ("Session.answer", "Session.stream"),
        ("Session.forget", "Session.reset"),
        ("Engine.clear", "Engine.reset_prefix_cache"),
    ):
        assert f"{old} is called {new} since ktx 0.2; the old name ends with 0.3" in texts, old


OPERATOR = '''
import torch
import ktx
from ktx.kernels import cpu
from ktx.ops.experts import Experts
from ktx.ops.floats import Floats


class SkipLow(Experts):  # the example of docs/operators.md
    @classmethod
    def from_hf(cls, old, ctx, threshold=0.05):
        new = super().from_hf(old, ctx)
        new.threshold = threshold
        return new

    def forward(self, hidden, ids, weights):
        return super().forward(hidden, torch.where(weights < self.threshold, -1, ids), weights)  # -1: skipped


@ktx.register("PlainLinear")
class PlainLinear(ktx.Operator, torch.nn.Module):
    """The documented protocol, by its names in ktx 0.1."""

    consumes = ()
    remade = ("transposed",)

    @classmethod
    def from_hf(cls, old, ctx):
        new = cls()
        new.name, new.shape = f"{ctx.path}.weight", tuple(old.weight.shape)
        return new

    def tensors(self):
        return [self.name]

    def load(self, source):
        parts = source.parts(self.name)
        assert not self.home.gpu and not self.home.pretended
        values = torch.cat([part.dequantize() for part in parts]).to(self.home.torch)
        self.register_buffer("matrix", values, persistent=False)

    def ready(self):
        self.transposed = self.matrix.T

    def floats(self):
        return {"weight": Floats(self.shape, lambda first, last: self.matrix[first:last], place=self.matrix.data_ptr())}

    def take(self, values):
        self.matrix = values["weight"].float()
        self.ready()

    def weight_bytes(self):
        return self.matrix.nbytes, self.matrix.nbytes

    def forward(self, x):
        return x @ self.transposed
'''
RULES = r"""
devices: {all: cpu}
stream_experts: 'off'
rules:
- match: {name: '\.mlp\.experts$'}
  replace: {class: old_operators.SkipLow, kwargs: {threshold: 0.0}}
  recursive: false
- match: {name: 'o_proj$'}
  replace: {class: PlainLinear}
- match: {class: torch.nn.Linear}
  replace: {class: ktx.ops.linear.Linear}
- match: {name: '^model\.layers\.\d+$'}
  replace: {class: ktx.ops.layer.Layer}
"""


def test_operators_and_a_rule_file_of_ktx_0_1(model, seen, tmp_path, monkeypatch):
    (tmp_path / "old_operators.py").write_text(OPERATOR)
    (tmp_path / "rules.yaml").write_text(RULES)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("ktx.ops.floats", "ktx.ops.layer"):
        sys.modules.pop(name, None)
    importlib.import_module("old_operators")
    mine, tokenizer = ktx.load(demo.path(), demo.gguf(), tmp_path / "rules.yaml", progress=False)
    texts = [str(warning.message) for warning in seen]
    for old, new in (
        ("ktx.ops.floats", "ktx.ops.float_views"),
        ("ktx.ops.layer", "ktx.ops.fusion.layer"),
        ("Operator.home", "Operator.placement"),
        ("Device.pretended", "Device.fake"),
        ("GGUFSource.parts", "GGUFSource.get_parts"),
        (f"{tmp_path / 'rules.yaml'}:3: stream_experts", "stream_experts_min_tokens"),
    ):
        assert f"{old} is called {new} since ktx 0.2; the old name ends with 0.3" in texts, old
    assert type(mine.model.layers[1].self_attn.o_proj).__name__ == "PlainLinear"
    assert type(mine.model.layers[1].mlp.experts).__name__ == "SkipLow"
    assert type(mine.model.layers[1]).__name__ == type(model.model.layers[1]).__name__
    ids = tokenizer("What is a rule file?", return_tensors="pt").input_ids
    with torch.no_grad():
        difference = (mine(ids).logits - model(ids).logits).abs().max()
    assert difference < 0.2 * model(ids).logits.std()
    state = mine.state_dict()
    mine.load_state_dict({name: tensor.clone() for name, tensor in state.items() if "o_proj" in name}, strict=False)
    assert "Floats: the argument place is called memory_id since ktx 0.2; the old name ends with 0.3" in [
        str(warning.message) for warning in seen
    ]


def test_submodules_of_the_package_that_moved(seen):
    assert ktx.rules.load_rules("deepseek-v3") and ktx.loading.Handle is ktx.loader.load.LoadInfo
    assert ktx.notes.Note is importlib.import_module("ktx.model.notes").Note
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        ktx.no_such_name  # noqa: B018


def old_members():
    """Each member that has an old name: its class, the old and the current name."""
    modules = ("chat_session", "client", "engine", "prompt", "request", "sampler", "stats")
    for name in (
        "ktx.loader.load",
        "ktx.injection.rules",
        "ktx.weights.safetensors",
        *(f"ktx.engine.{m}" for m in modules),
    ):
        importlib.import_module(name)
    classes = {
        value
        for name, module in list(sys.modules.items())
        if name.startswith("ktx.") and module is not None
        for value in vars(module).values()
        if isinstance(value, type)
    }
    return sorted(
        (
            (cls, old, member.new.rpartition(".")[2])
            for cls in classes
            for old, member in vars(cls).items()
            if isinstance(member, deprecation._OldMember)
        ),
        key=str,
    )


@pytest.mark.parametrize("cls,old,new", old_members(), ids=lambda part: getattr(part, "__name__", part))
def test_a_member_with_an_old_name_exists(cls, old, new):
    assert hasattr(cls, new) or new in cls.__annotations__ or f"self.{new}" in inspect.getsource(cls)
    assert old not in getattr(cls, "__annotations__", {}) and f"def {old}(" not in inspect.getsource(cls)
