"""Nothing in the recorded path waits for the device or copies to or from the host.

A CUDA graph's capture fails at such an operation. Here the engine records with a double: after the
warm-up run the second run, which a GPU would capture, is watched op by op. Twice: with the CPU's
kernels, and with Triton's launchers on tensors of a GPU that is not there (shapes and devices
without values), where copies between devices can be seen.
"""

import itertools
import sys
from contextlib import contextmanager, nullcontext
from unittest.mock import MagicMock, patch

import pytest
import torch
from absent_gpu import Indexing
from small_models import small_model
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from variant.engine.cuda_graphs import Recording
from variant.engine.engine import Engine
from variant_kernels.dispatch.support import triton_interprets

# Their result or its shape depends on values, which the host must wait for.
WAITS = frozenset({
    "aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal", "aten::allclose",
    "aten::nonzero", "aten::nonzero_numpy", "aten::masked_select", "aten::_unique",
    "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::bincount",
    "aten::histc", "aten::repeat_interleave", "aten::combinations", "aten::pin_memory",
})  # fmt: skip
# They read a tensor on the host, or copy numbers of the host from memory that is not pinned.
HOST_CALLS = frozenset({
    torch.Tensor.cpu, torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__,
    torch.Tensor.item, torch.tensor, torch.as_tensor, torch.from_numpy, torch.frombuffer,
})  # fmt: skip
# What graphs may not contain, and what makes the host wait.
CUDA_CALLS = (
    "Event", "synchronize", "mem_get_info", "memory_snapshot", "empty_cache", "ipc_collect",
    "current_blas_handle",
)  # fmt: skip


def on_the_cpu():
    """Whether a launcher of the CPU's kernels calls: it may read a number, a GPU's may not."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("variant_kernels.cpu_ops"):
            return True
        frame = frame.f_back
    return False


class Watch(TorchDispatchMode):
    """Raises AssertionError at the first op that waits for the device or copies across devices."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func._schema.name, kwargs or {}
        if name in WAITS and not on_the_cpu():
            raise AssertionError(f"{name} in the recorded path: the host would wait, or copy")
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if name in ("aten::index", "aten::index_put_", "aten::index_put"):
            masks = [x for x in inputs[1:] if x.dtype in (torch.bool, torch.uint8)]
            assert not masks, f"{name} by a mask in the recorded path: the host would wait"
        result = func(*args, **kwargs)
        outputs = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        # A number of the host may take part: it is part of the kernel's arguments.
        devices = {x.device.type for x in (*inputs, *outputs) if x.dim() or x.device.type != "cpu"}
        copied = (
            name in ("aten::copy_", "aten::copy", "aten::_to_copy")
            and len({x.device.type for x in (*inputs, *outputs)}) > 1
        )
        assert len(devices) < 2, f"{name} in the recorded path: a copy between {sorted(devices)}"
        assert not copied, f"{name} in the recorded path: a copy to or from the host"
        return result


class WatchHost(TorchFunctionMode):
    """Raises AssertionError at calls that ``Watch`` does not see where the device is the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in HOST_CALLS and not on_the_cpu():
            raise AssertionError(f"{func.__name__} in the recorded path: the host reads or copies")
        return func(*args, **(kwargs or {}))


def forbidden(name):
    def call(*args, **kwargs):
        raise AssertionError(f"torch.cuda.{name} in the recorded path")

    return call


@contextmanager
def watched():
    calls = {name: forbidden(name) for name in CUDA_CALLS}
    with Watch(), WatchHost(), patch.multiple(torch.cuda, **calls):
        yield


class WatchedRecorder:
    """Records as a graph does: a warm-up run, then the run that is captured, under the watch."""

    def __init__(self):
        self.recorded = 0

    def serialized(self):
        return nullcontext()

    def record(self, function):
        first = function()
        with watched():
            outputs = function()
        self.recorded += 1
        return Recording(lambda: None, outputs, first)

    def clear(self):
        pass


@pytest.fixture
def recorder(monkeypatch):
    recorder = WatchedRecorder()
    monkeypatch.setattr("variant.engine.engine.new_recorder", lambda device: recorder)
    return recorder


# What Python decides about a recording, one thing at a time: arguments of the engine and of a call.
MODES = {
    "plain": ({}, {}),
    "unguided": ({}, {"cfg": 0.0}),
    "filtered": ({}, {"top_k": 5, "top_p": 0.8}),
    "a subnet": ({}, {"depth": 2}),
    "without a decoder": ({}, {"decode": False}),
    "8-bit pixels": ({}, {"image_dtype": torch.uint8}),
    "8-bit K and V": ({"kv_dtype": "fp8"}, {}),
    "8-bit K and V, a subnet": ({"kv_dtype": "fp8"}, {"depth": 2, "top_k": 3}),
    "16-bit weights": ({"dtype": torch.bfloat16}, {}),
    "16-bit weights, 8-bit K and V": ({"dtype": torch.bfloat16, "kv_dtype": "fp8"}, {}),
    "small pages": ({"page_size": 3}, {}),
    "packed": ({"pack": True}, {}),
    "not packed": ({"pack": False}, {}),
    "own image numbers": ({}, {"image_ids": [7, 2**40]}),
}


CPU_MODES = ("packed", "not packed", "filtered", "8-bit K and V, a subnet", "16-bit weights")


@pytest.mark.parametrize("mode", CPU_MODES)
def test_cpu_kernels_do_not_wait(recorder, mode):
    construction, call = MODES[mode]
    model = small_model()
    engine = Engine(model.var, model.vae, **construction)
    result = engine.generate([1, 2], seed=0, **call)
    assert result.stats.captured
    assert recorder.recorded == 1 + call.get("decode", True)


def test_editing_is_not_recorded_but_its_decoder_is(recorder):
    model = small_model()
    engine = Engine(model.var, model.vae)
    tokens = torch.zeros(2, model.var.layout.total, dtype=torch.int64)
    mask = torch.arange(model.var.layout.total) < 5
    result = engine.generate([1, 2], seed=0, tokens=tokens, mask=mask)
    assert not result.stats.captured
    assert recorder.recorded == 1


def test_every_mode_of_the_engine_is_covered():
    """An argument of the engine that is not here may open a path that is not watched."""
    from inspect import signature

    known = {"self", "var", "vae", "backend", "capture"} | set(
        itertools.chain.from_iterable(construction for construction, _ in MODES.values())
    )
    assert set(signature(Engine.__init__).parameters) == known


# --- a GPU that is not there --------------------------------------------------------------------


class AnyValue(TorchDispatchMode):
    """Tensors without values say 1 where their value is read, outside the recorded path."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in ("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero"):
            return True if args[0].dtype == torch.bool else 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def h200(monkeypatch):
    """A context in which models move to "cuda", where tensors have no values.

    Triton's launchers run in it, and no kernel is compiled. The context gives the kernels' names.
    """
    pytest.importorskip("triton", reason="Triton is not installed")
    if triton_interprets():
        pytest.skip("TRITON_INTERPRET=1: launchers would run the interpreter")
    from triton.runtime.jit import JITFunction

    from benchmarks.offline_triton import gpu

    @contextmanager
    def on_gpu(*models):
        launched = []

        def run(kernel, *args, grid, warmup, **kwargs):
            launched.append(kernel.fn.__name__)

        monkeypatch.setattr("variant.engine.engine.free_bytes", lambda device: 2**40)
        for name in ("Event", "current_stream", "Stream", "stream"):
            monkeypatch.setattr(torch.cuda, name, MagicMock())
        with gpu(every_config=False), patch.object(JITFunction, "run", run):
            for module in itertools.chain.from_iterable(model.modules() for model in models):
                for own in (module._parameters, module._buffers):
                    for name, tensor in own.items():
                        if tensor is not None:
                            moved = torch.empty_like(tensor, device="cuda")
                            is_weight = isinstance(tensor, torch.nn.Parameter)
                            own[name] = torch.nn.Parameter(moved) if is_weight else moved
            with AnyValue(), Indexing():
                yield launched

    return on_gpu


@pytest.mark.parametrize("mode", [*(mode for mode in MODES if "packed" not in mode), "no qk_norm"])
def test_triton_launchers_on_a_gpu_do_not_wait(recorder, h200, mode):
    construction, call = MODES.get(mode, ({}, {}))
    model = small_model(**({"attn_l2_norm": False} if mode == "no qk_norm" else {}))
    if "dtype" in construction:
        # Modules of tensors without values cannot be cast; the CPU's case records this decoder.
        call = {**call, "decode": False}
    with h200(model.var, model.vae) as launched:
        engine = Engine(model.var, model.vae, backend="triton", **construction)
        result = engine.generate([1, 2], seed=0, **call)
    assert result.stats.captured
    assert recorder.recorded == 1 + call.get("decode", True)
    assert {"paged_attention_kernel", "sample_tokens_kernel"} <= set(launched)


@pytest.mark.parametrize("mode", ["plain", "8-bit K and V, a subnet"])
def test_cuda_launchers_on_a_gpu_do_not_wait(recorder, h200, mode, monkeypatch):
    launched = set()

    def launch(op, name, *arguments):
        launched.add(name)

    monkeypatch.setattr("variant_kernels.cuda_ops.library.is_built", lambda: True)
    # Not kept for other tests, as the functions themselves would.
    monkeypatch.setattr("variant_kernels.dispatch.support._least_capability", lambda: (9, 0))
    monkeypatch.setattr("variant_kernels.cuda_ops.common.num_processors", lambda device: 132)
    monkeypatch.setattr("variant_kernels.cuda_ops.common.launch", launch)
    construction, call = MODES[mode]
    model = small_model()
    with h200(model.var, model.vae) as of_triton:
        engine = Engine(model.var, model.vae, backend="cuda", **construction)
        result = engine.generate([1, 2], seed=0, **call)
    assert result.stats.captured
    assert recorder.recorded == 2
    assert "sample_tokens" in launched
    assert {name.startswith("paged_attention") for name in launched} == {True, False}
    assert "sample_tokens_kernel" not in of_triton


def test_what_is_compiled_for_a_gpu_run_has_the_kernels_of_graphs(h200):
    """A graph gets seed and guidance as tensors: Triton compiles these kernels apart."""
    from triton.runtime.jit import JITFunction

    from benchmarks.gpu import artefacts

    sampled = set()

    def run(kernel, logits, guidance=None, seed=None, *args, grid, warmup, **options):
        if kernel.fn.__name__ == "sample_tokens_kernel":
            sampled.add((guidance is not None, seed is not None))

    model = small_model()
    on_gpu, double = h200(model.var, model.vae), artefacts._double_of_torch()
    with on_gpu, double, patch.object(JITFunction, "run", run):
        for engine in artefacts._engines(model.var, model.vae, backend="triton"):
            engine.generate([1], seed=0, decode=False)
    assert sampled == {(False, False), (True, True), (False, True)}


# --- the watch itself ---------------------------------------------------------------------------

PLANTED = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.any()),
    "float": lambda x: float(x[0]),
    "tolist": lambda x: x.tolist(),
    "nonzero": lambda x: x.nonzero(),
    "masked_select": lambda x: x.masked_select(x > 0),
    "index by a mask": lambda x: x[x > 0],
    "assignment by a mask": lambda x: x.index_put_((x > 0,), x[:1]),
    "unique": lambda x: x.unique(),
    "a tensor from numbers": lambda x: x + torch.tensor([1.0, 2.0, 3.0]),
    "equal": lambda x: torch.equal(x, x),
    "free memory": lambda x: torch.cuda.mem_get_info(),
    "synchronize": lambda x: torch.cuda.synchronize(),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_wait_is_found(planted):
    x = torch.arange(3.0)
    with pytest.raises(AssertionError, match="recorded path"), watched():
        PLANTED[planted](x)


def test_what_a_graph_may_contain_passes():
    x = torch.arange(3.0)
    with watched():
        x.copy_(torch.full((), 2.0) * x.where(x > 1, 0.0).cumsum(0).masked_fill(x > 1, 3.0))
        x[torch.zeros(1, dtype=torch.int64)] = 4.0


@pytest.mark.parametrize(
    "copy",
    [
        lambda host, device: host.to("cuda"),
        lambda host, device: device.cpu(),
        lambda host, device: device.copy_(host),
        lambda host, device: device[torch.zeros(2, dtype=torch.int64)],
    ],
    ids=["to the device", "to the host", "copy_", "an index on the host"],
)
def test_a_planted_copy_is_found(h200, copy):
    with h200():
        host, device = torch.empty(3), torch.empty(3, device="cuda")
        with pytest.raises(AssertionError, match="recorded path"), watched():
            copy(host, device)


def test_a_wait_planted_in_the_step_loop_is_found(recorder, monkeypatch):
    from variant.engine.step_loop import BatchState

    hidden = BatchState.hidden

    def waiting(self, x_RTC, scale):
        h_RTC = hidden(self, x_RTC, scale)
        return h_RTC * h_RTC.sum().item()

    monkeypatch.setattr(BatchState, "hidden", waiting)
    model = small_model()
    with pytest.raises(AssertionError, match="item in the recorded path"):
        Engine(model.var, model.vae).generate([1, 2], seed=0)
