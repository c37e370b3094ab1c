"""Triton launchers run up to the launch, for a GPU that is not there; nothing is compiled.

Triton's own binder checks names and number of the arguments and decides on what a kernel is
specialised. Tensors have no values, so the sizes are those of VAR-d30.
"""

import importlib
import pkgutil
from dataclasses import dataclass
from unittest.mock import patch

import pytest
import torch
from absent_gpu import Indexing

pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks.offline_triton import gpu
from variant_kernels import triton_ops
from variant_kernels.dispatch.support import triton_interprets
from variant_kernels.kv_quantization import KV8_DTYPE

pytestmark = pytest.mark.skipif(
    triton_interprets(), reason="TRITON_INTERPRET=1: kernels are interpreted"
)

MAX_GRID, MAX_THREADS = 2**31 - 1, 1024
BATCH, TOKENS, HEADS, WIDTH = 3, 256, 30, 64
LENGTHS = (1, 4, 9, 16, 25, 36, 64, 100, 169, 256)
PAGES, PAGE_SIZE, ENTRIES = 50, 16, 43


@dataclass
class Launch:
    """What Triton would get: arguments by name, what it assumes of each, grid, warps."""

    name: str
    arguments: dict
    assumed: dict
    grid: tuple
    num_warps: int


def recorded(call, layout):
    """The launches of one launcher, every candidate of its block sizes included."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    launches = []

    def run(kernel, *args, grid, warmup, **options):
        assert not warmup
        *_, binder = kernel.device_caches[driver.active.get_current_device()]
        arguments, assumed, parsed = binder(*args, debug=False, **options)
        own = {name: value for name, value in arguments.items() if name in kernel.arg_names}
        by_name = dict(zip(own, assumed, strict=True))
        launches.append(
            Launch(kernel.fn.__name__, own, by_name, (*grid, 1, 1)[:3], parsed["num_warps"])
        )

    with gpu(), Indexing(), patch.object(JITFunction, "run", run):
        call(layout)
    assert launches
    return launches


class Layout:
    """Makes inputs. Every stride of a tensor differs from its others; ``aligned`` or none is."""

    def __init__(self, aligned, dtype=torch.bfloat16):
        self.aligned, self.dtype = aligned, dtype

    def tensor(self, *shape, dtype=None, row=None):
        """A view whose rows lie apart: a slice of a larger tensor, 16 or 1 elements longer."""
        more = 16 if self.aligned else 1
        whole = torch.empty(*shape[:-1], shape[-1] + more, dtype=dtype or self.dtype, device="cuda")
        # Aligned: from the start. Otherwise one element behind it, at an odd address.
        return torch.narrow(whole, -1, 0 if self.aligned else 1, shape[-1])

    def plain(self, *shape, dtype=None):
        return torch.empty(shape, dtype=dtype or self.dtype, device="cuda")

    def packed(self, tokens=TOKENS):
        """q, k and v as parts of one projection, as models compute them; or strided views."""
        if not self.aligned:
            return tuple(self.tensor(BATCH, tokens, HEADS, WIDTH) for _ in range(3))
        return torch.unbind(self.plain(BATCH, tokens, 3, HEADS, WIDTH), 2)

    def row(self, dtype=None):
        return self.tensor(BATCH, TOKENS, HEADS * WIDTH, dtype=dtype)

    def condition(self):
        return self.tensor(BATCH, HEADS * WIDTH)

    def pages(self, kv8):
        shape = (PAGES, PAGE_SIZE, HEADS, WIDTH)
        pages = {
            "k_pages_PNHD": self.plain(*shape, dtype=KV8_DTYPE if kv8 else None),
            "v_pages_PNHD": self.plain(*shape, dtype=KV8_DTYPE if kv8 else None),
        }
        if kv8:
            for name in ("k_scales_PNH", "v_scales_PNH"):
                pages[name] = self.plain(*shape[:-1], dtype=torch.uint8)
        return pages

    def slots(self):
        return self.plain(BATCH, TOKENS, dtype=torch.int64)

    def scale_mul(self):
        return self.plain(1, HEADS, 1, 1, dtype=torch.float32)

    def statistics(self):
        return self.plain(BATCH, TOKENS, dtype=torch.float32)


def launcher(module, name):
    return getattr(importlib.import_module(f"variant_kernels.triton_ops.{module}"), name)


def adaln(name, layout):
    gated, backward = "gated" in name, "backward" in name
    tensors = {"scale_BC": layout.condition()}
    stream = "x_out_BTC" if gated and backward else "x_BTC"
    tensors[stream] = layout.row(torch.float32)
    if gated:
        tensors |= {"y_BTC": layout.row(), "gate_BC": layout.condition()}
    if backward:
        tensors |= {"mean_BT": layout.statistics(), "rstd_BT": layout.statistics()}
        if gated:
            tensors |= {"grad_x_out_BTC": layout.row(torch.float32), "grad_h_BTC": layout.row()}
        else:
            tensors |= {"grad_y_BTC": layout.row()}
        launcher("adaln", name)(**tensors)
    else:
        launcher("adaln", name)(**tensors, shift_BC=layout.condition(), eps=1e-6)


def block_causal(name, layout, qk_norm=False):
    q, k, v = layout.packed(sum(LENGTHS))
    tensors = {"q_BLHD": q, "k_BLHD": k, "v_BLHD": v}
    module = "block_causal_attention"
    if qk_norm:
        tensors["scale_mul_1H11"] = layout.scale_mul()
    if "backward" in name:
        module += "_backward"
        tensors["out_BLHD"] = layout.plain(*q.shape)
        tensors["grad_out_BLHD"] = layout.tensor(*q.shape)
        tensors["lse_BHL"] = layout.plain(BATCH, HEADS, sum(LENGTHS), dtype=torch.float32)
    launcher(module, name)(**tensors, scale_lengths=LENGTHS, softmax_scale=0.125)


def paged(layout, kv8=False, **more):
    launcher("paged_attention", "launch_paged_attention_forward")(
        q_BTHD=layout.packed()[0],
        **layout.pages(kv8),
        page_table_BM=layout.plain(BATCH, ENTRIES, dtype=torch.int32),
        kv_lens_B=layout.plain(BATCH, dtype=torch.int32),
        softmax_scale=0.125,
        **more,
    )


def append(layout, kv8=False):
    _, k, v = layout.packed()
    launcher("append_paged_kv", "launch_append_paged_kv")(
        k_BTHD=k, v_BTHD=v, **layout.pages(kv8), slots_BT=layout.slots()
    )


def norm_append(layout, kv8=False, norm=True):
    launcher("qk_norm_append_paged_kv", "launch_qk_norm_append_paged_kv")(
        qkv_BT3HD=layout.tensor(BATCH, TOKENS, 3, HEADS, WIDTH),
        scale_mul_1H11=layout.scale_mul() if norm else None,
        **layout.pages(kv8),
        slots_BT=layout.slots(),
    )


def qk_norm(name, layout):
    q, k, _ = layout.packed()
    tensors = {"k_BTHD": k}
    if name != "launch_unit_keys":
        tensors |= {"q_BTHD": q, "scale_mul_1H11": layout.scale_mul()}
    if "backward" in name:
        tensors |= {"grad_q_BTHD": layout.tensor(*q.shape), "grad_k_BTHD": layout.tensor(*k.shape)}
    launcher("qk_norm", name)(**tensors)


def group_norm(layout):
    launcher("group_norm", "launch_group_norm_silu")(
        x_BYXC=layout.plain(BATCH, 16, 16, 160),
        weight_C=layout.tensor(160),
        bias_C=layout.tensor(160),
        num_groups=32,
        eps=1e-6,
        silu=True,
    )


def sample(layout, in_graph=False):
    launcher("sample_tokens", "launch_sample_tokens")(
        logits_2BTV=layout.tensor(2 * BATCH, TOKENS, 4096),
        guidance=layout.plain(dtype=torch.float64) if in_graph else 1.5,
        top_k=900,
        top_p=0.96,
        seed=layout.plain(dtype=torch.int64) if in_graph else 2**40,
        image_ids_B=layout.plain(BATCH, dtype=torch.int64),
        position=424,
        exponential_RV=None,
    )


_ADALN = ("launch_adaln_forward", "launch_adaln_backward",
          "launch_gated_adaln_forward", "launch_gated_adaln_backward")  # fmt: skip
_BLOCK_CAUSAL = "launch_block_causal_attention_"
# By the launcher's name, with what differs between calls of it.
CALLS = {
    **{name: lambda layout, name=name: adaln(name, layout) for name in _ADALN},
    _BLOCK_CAUSAL + "forward": lambda x: block_causal(_BLOCK_CAUSAL + "forward", x),
    _BLOCK_CAUSAL + "forward, qk_norm": lambda x: block_causal(
        _BLOCK_CAUSAL + "forward", x, qk_norm=True
    ),
    _BLOCK_CAUSAL + "backward": lambda x: block_causal(_BLOCK_CAUSAL + "backward", x),
    _BLOCK_CAUSAL + "qk_norm_backward": lambda x: block_causal(
        _BLOCK_CAUSAL + "qk_norm_backward", x, qk_norm=True
    ),
    "launch_paged_attention_forward": paged,
    "launch_paged_attention_forward, 8 bits": lambda x: paged(x, kv8=True),
    "launch_append_paged_kv": append,
    "launch_append_paged_kv, 8 bits": lambda x: append(x, kv8=True),
    "launch_qk_norm_append_paged_kv": norm_append,
    "launch_qk_norm_append_paged_kv, 8 bits": lambda x: norm_append(x, kv8=True),
    "launch_qk_norm_append_paged_kv, no norm": lambda x: norm_append(x, norm=False),
    **{
        name: lambda layout, name=name: qk_norm(name, layout)
        for name in ("launch_qk_norm_forward", "launch_qk_norm_backward", "launch_unit_keys")
    },
    "launch_group_norm_silu": group_norm,
    "launch_sample_tokens": sample,
    "launch_sample_tokens, for a graph": lambda x: sample(x, in_graph=True),
}


def test_every_launcher_is_called():
    names = {
        name
        for module in pkgutil.iter_modules(triton_ops.__path__, "variant_kernels.triton_ops.")
        for name in vars(importlib.import_module(module.name))
        if name.startswith("launch_")
    }
    assert names == {call.partition(",")[0] for call in CALLS}


every_call = pytest.mark.parametrize("call", CALLS)
every_layout = pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "unaligned"])


def strides(launch):
    """(tensor's name, its strides among the arguments by axis) for every tensor that has some."""
    found = {}
    for name, value in launch.arguments.items():
        owner, middle, axis = name.rpartition("_stride_")
        if middle and launch.arguments[f"{owner}_ptr"] is not None:
            found.setdefault(owner, {})[axis] = value
    return found


@every_layout
@every_call
def test_strides_belong_to_their_tensors_in_order(call, aligned):
    checked = 0
    for launch in recorded(CALLS[call], Layout(aligned)):
        for owner, by_axis in strides(launch).items():
            tensor = launch.arguments[f"{owner}_ptr"]
            expected = tensor.stride()[: len(by_axis)]
            assert tuple(by_axis.values()) == expected, (launch.name, owner, list(by_axis))
            checked += 1
    # The strides of logits have names of their own; feature maps are contiguous.
    assert checked or "sample" in call or "group_norm" in call


def address(tensor):
    """As of an allocation that starts at a multiple of 512."""
    return tensor.storage_offset() * tensor.element_size()


@every_layout
@every_call
def test_what_triton_assumes_is_true(call, aligned):
    """Divisible by 16: the address in bytes, the number itself. Then accesses are 16 bytes wide."""
    for launch in recorded(CALLS[call], Layout(aligned)):
        for name, (kind, key) in launch.assumed.items():
            value = launch.arguments[name]
            if kind == "constexpr" or key is None or key == "":
                continue
            number = address(value) if isinstance(value, torch.Tensor) else value
            assert "D" not in str(key) or number % 16 == 0, (launch.name, name, number)


@every_call
def test_packed_inputs_are_assumed_aligned(call):
    """Otherwise loads would be narrower, and no result would show it."""
    for launch in recorded(CALLS[call], Layout(aligned=True)):
        for name, (kind, key) in launch.assumed.items():
            value = launch.arguments[name]
            if isinstance(value, torch.Tensor) and value.numel() > 1:
                assert "D" in str(key), (launch.name, name, kind, key)
        for owner, by_axis in strides(launch).items():
            if owner.endswith("scales") or owner == "slots":
                continue  # bytes, and one number for each token
            for axis in by_axis:
                name = f"{owner}_stride_{axis}"
                assert "D" in str(launch.assumed[name][1]), (launch.name, name)


@every_layout
@every_call
def test_grid_and_threads_are_within_the_gpus_limits(call, aligned):
    for launch in recorded(CALLS[call], Layout(aligned)):
        x, y, z = launch.grid
        assert 0 < x <= MAX_GRID
        assert (y, z) == (1, 1)
        assert 0 < 32 * launch.num_warps <= MAX_THREADS


@every_call
def test_what_is_compiled_in_advance_is_what_is_launched(call):
    """The compile cases assume what Triton does: the same types and divisors of the arguments."""
    from variant_kernels.triton_ops.compile_cases import COMPILE_CASES

    launches = recorded(CALLS[call], Layout(aligned=True))
    for launch in launches:
        similar = [
            case
            for case in COMPILE_CASES
            if case.kernel.__name__ == launch.name
            and "sm_90" in case.targets
            and case.num_warps == launch.num_warps
            and all(launch.arguments.get(n) == v for n, v in case.constants.items() if is_size(n))
        ]
        assert similar, (launch.name, launch.num_warps)
        differences = [differing(case, launch) for case in similar]
        assert min(differences, key=len) == [], launch.name


def is_size(name):
    return name in ("D", "BLOCK_Q", "BLOCK_K", "H", "C", "V", "KV8", "NORM", "GATED", "QK_NORM")


# Without a split, paged attention writes its own dtype and no statistics; the loops are the same.
# The strides of scales are bytes: whether they are divisible widens no access.
VARIES = ("out_ptr", "lse_ptr", "statistics_ptr", "k_scales_stride_p", "k_scales_stride_n",
          "v_scales_stride_p", "v_scales_stride_n")  # fmt: skip


def differing(case, launch):
    """Arguments of which a case and a launch assume different things."""
    found = []
    for name, expected in case.arguments.items():
        kind, _, divisor = expected.partition(":")
        got, key = launch.assumed[name]
        kind = "*bf16" if kind == "*T" else kind
        if name not in VARIES and (got, "D" in str(key)) != (kind, bool(divisor)):
            found.append((name, expected, got, key))
    return found
