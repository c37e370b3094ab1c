"""Good arguments for every public name: what ``bad_calls`` spoils.

A subject is named ``function``, ``Class`` (its constructor) or ``Class.method``. Its maker draws
good arguments. A public name without a maker fails a test.
"""

from __future__ import annotations

import inspect
import random
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import variant
import variant_kernels as vk
from variant_kernels.kv_quantization import KV8_DTYPE
from variant_kernels.ops import tables

# The models beside the tests.
TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(TESTS), str(TESTS / "integrations")]

GUARD = 64  # bytes on either side of a pool


class Draw:
    """The random numbers of one case, and the memory around its pools."""

    def __init__(self, rng: random.Random, backends: tuple[str, ...]) -> None:
        self.rng, self.backends = rng, backends
        self.generator = torch.Generator().manual_seed(rng.getrandbits(60))
        # (all bytes, first byte of the pool, bytes of the pool)
        self.pools: list[tuple[Tensor, int, int]] = []

    def int(self, low: int, high: int) -> int:
        return self.rng.randint(low, high)

    def dtype(self) -> torch.dtype:
        return self.rng.choice((torch.float32, torch.bfloat16, torch.float16))

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(dtype)

    def pool(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """A pool of random bytes (finite numbers) inside a larger buffer of known bytes."""
        if dtype.is_floating_point:
            values = torch.randn(shape, generator=self.generator).to(dtype)
        else:
            values = torch.randint(110, 140, shape, generator=self.generator).to(dtype)
        size = values.numel() * values.element_size()
        base = torch.full((size + 2 * GUARD,), 0xA5, dtype=torch.uint8)
        inner = base[GUARD : GUARD + size]
        inner.copy_(values.view(-1).view(torch.uint8))
        self.pools.append((base, GUARD, size))
        return inner.view(dtype).view(shape)

    def backend(self) -> str:
        return self.rng.choice(self.backends)

    def some(self, **optional: Any) -> dict[str, Any]:
        """A random part of optional arguments."""
        return {name: value for name, value in optional.items() if self.rng.random() < 0.5}


Made = tuple[Callable[..., Any], dict[str, Any]]
MAKERS: dict[str, Callable[[Draw], Made]] = {}
# Public names that are not called, and why.
NOT_CALLED = {
    "VARiant.push_to_hub": "it talks to the network",
    "VARiant.forward": "it only says which method to call",
    "variant.UserError": "an exception: any arguments make one",
}
# Parts of a model's computation, called within loops: torch's own errors for odd tensors may pass.
PARTS = {
    "Sampling.check_run",
    "Sampling.guidance",
    "Sampling.temperature_at",
    "VAR.shared_condition",
    "VARiantAttention.forward",
    "VQVAE.accumulate",
    "VQVAE.accumulate_codes",
    "VQVAE.decode_features",
    "VQVAE.features",
    "VQVAE.new_features",
    "VQVAE.next_scale_input",
}
# Arguments that are never given: they talk to the network.
NOT_GIVEN = {"push_to_hub", "repo_id"}
# Records that functions return: plain dataclasses, which check nothing by design.
RECORDS = {"KVLifetime", "KVStep", "Generation", "PartialResult", "Stats"}


def maker(name: str) -> Callable[[Callable[[Draw], Made]], Callable[[Draw], Made]]:
    def add(function: Callable[[Draw], Made]) -> Callable[[Draw], Made]:
        MAKERS[name] = function
        return function

    return add


def public_names() -> set[str]:
    """Every function, class and public method of the two packages, by introspection."""
    names = set()
    for package in (vk, variant):
        for name in package.__all__:
            value = getattr(package, name)
            if not inspect.isclass(value):
                names.add(name)
                continue
            if issubclass(value, BaseException):
                names.add(f"{package.__name__}.{name}")
                continue
            names.add(name)
            for base in value.__mro__:
                if not base.__module__.startswith("variant"):
                    continue
                for attribute, raw in vars(base).items():
                    function = raw.__func__ if isinstance(raw, classmethod | staticmethod) else raw
                    if inspect.isfunction(function) and not attribute.startswith("_"):
                        names.add(f"{name}.{attribute}")
    return names


def warm_up() -> None:
    """Make one good call of each name: what is imported or built at a first call is then there."""
    draw = Draw(random.Random(0), called_backends())
    for make in MAKERS.values():
        target, arguments = make(draw)
        with suppress(ValueError, TypeError, variant.UserError):
            target(**arguments)


def called_backends() -> tuple[str, ...]:
    """``auto`` and the backends that run here on CPU tensors."""
    served = [n for n in vk.available_backends() if n in ("triton", "cuda", "cpu", "reference")]
    return ("auto", *served)


def is_op(name: str) -> bool:
    return name in tables()


def _consumed(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The function, which returns an iterator, called and run to its end."""

    def run(*args: Any, **options: Any) -> Any:
        return list(function(*args, **options))

    run.__name__ = name
    run.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    return run


# --- ops ------------------------------------------------------------------------------------------


@maker("adaln_modulate")
def _adaln(d: Draw) -> Made:
    batch, tokens, width, narrow = d.int(1, 3), d.int(1, 5), d.int(1, 70), d.dtype()
    wide = d.rng.choice((narrow, torch.float32))
    rows = d.normal(batch, 2, width, dtype=narrow)
    arguments = {
        "x_BTC": d.normal(batch, tokens, width, dtype=wide),
        "scale_BC": rows[:, 0],
        "shift_BC": rows[:, 1],
        "backend": d.backend(),
    }
    return vk.adaln_modulate, arguments | d.some(eps=1e-6)


@maker("gated_residual_adaln")
def _gated(d: Draw) -> Made:
    batch, tokens, width, narrow = d.int(1, 3), d.int(1, 5), d.int(1, 70), d.dtype()
    rows = d.normal(batch, 3, width, dtype=narrow)
    arguments = {
        "x_BTC": d.normal(batch, tokens, width, dtype=d.rng.choice((narrow, torch.float32))),
        "y_BTC": d.normal(batch, tokens, width, dtype=narrow),
        "gate_BC": rows[:, 0],
        "scale_BC": rows[:, 1],
        "shift_BC": rows[:, 2],
        "backend": d.backend(),
    }
    return vk.gated_residual_adaln, arguments | d.some(eps=1e-6)


def _heads(d: Draw) -> tuple[int, int, int, int]:
    return d.int(1, 3), d.int(1, 5), d.int(1, 3), d.rng.choice((16, 24, 64))


def _scale_mul(d: Draw, heads: int, dtype: torch.dtype) -> Tensor:
    return d.normal(1, heads, 1, 1, dtype=d.rng.choice((dtype, torch.float32)))


@maker("qk_norm")
def _qk_norm(d: Draw) -> Made:
    batch, tokens, heads, width = _heads(d)
    dtype = d.dtype()
    qkv = d.normal(batch, tokens, 3, heads, width, dtype=dtype)
    return vk.qk_norm, {
        "q_BTHD": qkv[:, :, 0],
        "k_BTHD": qkv[:, :, 1],
        "scale_mul_1H11": _scale_mul(d, heads, dtype),
        "backend": d.backend(),
    }


@maker("block_causal_attention")
def _block_causal(d: Draw) -> Made:
    layout = vk.ScaleLayout.from_patch_nums(range(1, d.int(2, 4)))
    batch, _, heads, width = _heads(d)
    dtype = d.dtype()
    qkv = d.normal(batch, layout.total, 3, heads, width, dtype=dtype)
    arguments = dict(zip(("q_BLHD", "k_BLHD", "v_BLHD"), qkv.unbind(2), strict=True))
    arguments |= {"layout": layout, "backend": d.backend()}
    return vk.block_causal_attention, arguments | d.some(
        scale_mul_1H11=_scale_mul(d, heads, dtype), softmax_scale=0.3
    )


def _pools(d: Draw, batch: int, tokens: int, heads: int, width: int, dtype: torch.dtype):
    """Pools of 8 or of more bits, and slots."""
    page_size = d.rng.choice((1, 3, 4, 16))
    num_pages = -(-2 * batch * tokens // page_size)
    eight_bits = d.rng.random() < 0.3
    kind = KV8_DTYPE if eight_bits else dtype
    pools: dict[str, Any] = {
        name: d.pool(num_pages, page_size, heads, width, dtype=kind)
        for name in ("k_pages_PNHD", "v_pages_PNHD")
    }
    if eight_bits:
        for name in ("k_scales_PNH", "v_scales_PNH"):
            pools[name] = d.pool(num_pages, page_size, heads, dtype=torch.uint8)
    return pools, num_pages, page_size


def _slots(d: Draw, batch: int, tokens: int, total: int) -> Tensor:
    slots = torch.randperm(total, generator=d.generator)[: batch * tokens].view(batch, tokens)
    if d.rng.random() < 0.3:
        slots[-1, -1] = -1
    return slots


@maker("append_paged_kv")
def _append(d: Draw) -> Made:
    batch, tokens, heads, width = _heads(d)
    dtype = d.dtype()
    pools, num_pages, page_size = _pools(d, batch, tokens, heads, width, dtype)
    qkv = d.normal(batch, tokens, 3, heads, width, dtype=dtype)
    return vk.append_paged_kv, {
        "k_BTHD": qkv[:, :, 1],
        "v_BTHD": qkv[:, :, 2],
        "slots_BT": _slots(d, batch, tokens, num_pages * page_size),
        "backend": d.backend(),
        **pools,
    }


@maker("qk_norm_append_paged_kv")
def _qk_norm_append(d: Draw) -> Made:
    batch, tokens, heads, width = _heads(d)
    dtype = d.dtype()
    pools, num_pages, page_size = _pools(d, batch, tokens, heads, width, dtype)
    return vk.qk_norm_append_paged_kv, {
        "qkv_BT3HD": d.normal(batch, tokens, 3, heads, width, dtype=dtype),
        "scale_mul_1H11": d.rng.choice((None, _scale_mul(d, heads, dtype))),
        "slots_BT": _slots(d, batch, tokens, num_pages * page_size),
        "backend": d.backend(),
        **pools,
    }


@maker("paged_attention")
def _paged(d: Draw) -> Made:
    batch, tokens, heads, width = _heads(d)
    dtype = d.dtype()
    pools, num_pages, page_size = _pools(d, batch, tokens, heads, width, dtype)
    entries = -(-num_pages // batch)
    table = torch.randint(num_pages, (batch, entries), generator=d.generator).int()
    lens = torch.randint(entries * page_size + 1, (batch,), generator=d.generator).int()
    arguments = {
        "q_BTHD": d.normal(batch, tokens, heads, width, dtype=dtype),
        "page_table_BM": table,
        "kv_lens_B": lens,
        "backend": d.backend(),
        **pools,
    }
    return vk.paged_attention, arguments | d.some(softmax_scale=0.3)


@maker("sample_tokens")
def _sample(d: Draw) -> Made:
    batch, tokens, entries = d.int(1, 3), d.int(1, 4), d.int(1, 50)
    arguments = {
        "logits_2BTV": d.normal(2 * batch, tokens, entries, dtype=d.dtype()),
        "guidance": 1.5,
        "backend": d.backend(),
    }
    drawn = {"seed": 3} if d.rng.random() < 0.7 else {"generator": torch.Generator().manual_seed(3)}
    return (
        vk.sample_tokens,
        arguments
        | drawn
        | d.some(
            top_k=d.int(0, 9), top_p=0.9, position=d.int(0, 9), image_ids=torch.arange(batch) + 5
        ),
    )


@maker("explain")
def _explain(d: Draw) -> Made:
    arguments = {"op": d.rng.choice(list(tables()))}
    return vk.explain, arguments | d.some(
        device="cpu", dtype=d.dtype(), head_dim=64, row_width=32, page_size=16, backend="auto"
    )


@maker("use_backend")
def _use_backend(d: Draw) -> Made:
    def use_backend(*args: Any, **options: Any) -> None:
        with vk.use_backend(*args, **options):
            pass

    return use_backend, {"name": d.backend()}


@maker("available_backends")
def _available(d: Draw) -> Made:
    return vk.available_backends, {}


# --- plans and the cache --------------------------------------------------------------------------


def _layout(d: Draw) -> vk.ScaleLayout:
    return vk.ScaleLayout.from_patch_nums(sorted({d.int(1, 6) for _ in range(d.int(1, 4))}))


def _schedule(d: Draw, scales: int, full: int | None = None) -> vk.DepthSchedule:
    full = full or d.int(2, 8)
    return vk.DepthSchedule(full, scales, d.int(2, full), d.int(0, scales))


def _plan(d: Draw) -> vk.CachePlan:
    layout = _layout(d)
    return vk.CachePlan(layout, _schedule(d, layout.num_scales), d.rng.choice((1, 4, 16)))


def _cache(d: Draw) -> vk.PagedKVCache:
    return vk.PagedKVCache(_plan(d), 2, 2, 16, torch.float32)


@maker("ScaleLayout")
def _make_layout(d: Draw) -> Made:
    return vk.ScaleLayout, {"shapes": tuple((d.int(1, 5), d.int(1, 5)) for _ in range(3))}


@maker("ScaleLayout.from_patch_nums")
def _from_patch_nums(d: Draw) -> Made:
    return vk.ScaleLayout.from_patch_nums, {"patch_nums": (1, 2, d.int(3, 9))}


for _name, _argument in (("slice", "scale"), ("visible", "scale")):
    MAKERS[f"ScaleLayout.{_name}"] = lambda d, name=_name, argument=_argument: (
        getattr(_layout(d), name),
        {argument: 0},
    )


@maker("ScaleLayout.prefix")
def _prefix(d: Draw) -> Made:
    return _layout(d).prefix, {"num_scales": 1}


@maker("select_layers")
def _select_layers(d: Draw) -> Made:
    full = d.int(2, 40)
    arguments = {"full_depth": full, "depth": d.int(2, full)}
    return vk.select_layers, arguments | d.some(selection=d.rng.choice(("nested", "equidistant")))


@maker("DepthSchedule")
def _depth_schedule(d: Draw) -> Made:
    full, scales = d.int(2, 12), d.int(1, 6)
    depth: Any = d.rng.choice((d.int(2, full), (0, full - 1)))
    arguments = {"full_depth": full, "num_scales": scales, "depth": depth, "bridge": 1}
    return vk.DepthSchedule, arguments | d.some(selection="equidistant")


@maker("DepthSchedule.from_depths")
def _from_depths(d: Draw) -> Made:
    return vk.DepthSchedule.from_depths, {"depths": [8, 8, 4]} | d.some(
        full_depth=8, selection="nested"
    )


@maker("DepthSchedule.from_dict")
def _from_dict(d: Draw) -> Made:
    return vk.DepthSchedule.from_dict, {"values": _schedule(d, d.int(1, 4)).to_dict()}


@maker("DepthSchedule.to_dict")
def _to_dict(d: Draw) -> Made:
    return _schedule(d, d.int(1, 4)).to_dict, {}


@maker("load_schedule")
def _load_schedule(d: Draw) -> Made:
    return variant.load_schedule, {"source": "4-3-2"} | d.some(config=small().var.config)


@maker("DepthSchedule.full")
def _full(d: Draw) -> Made:
    return vk.DepthSchedule.full, {"full_depth": d.int(1, 9), "num_scales": d.int(1, 5)}


@maker("DepthSchedule.switched")
def _switched(d: Draw) -> Made:
    return vk.DepthSchedule.full(8, 4).switched, {"scale": 2, "depth": 4} | d.some(
        selection="nested"
    )


@maker("DepthSchedule.active_layers")
def _active_layers(d: Draw) -> Made:
    return vk.DepthSchedule.full(8, 4).active_layers, {"scale": d.int(0, 3)}


@maker("DepthSchedule.is_active")
def _is_active(d: Draw) -> Made:
    return vk.DepthSchedule.full(8, 4).is_active, {"layer": d.int(0, 7), "scale": d.int(0, 3)}


@maker("DepthSchedule.last_scale")
def _last_scale(d: Draw) -> Made:
    return vk.DepthSchedule.full(8, 4).last_scale, {"layer": d.int(0, 7)}


@maker("CachePlan")
def _cache_plan(d: Draw) -> Made:
    layout = _layout(d)
    schedule = _schedule(d, layout.num_scales)
    return vk.CachePlan, {"layout": layout, "schedule": schedule} | d.some(page_size=4)


@maker("CachePlan.peak_bytes")
def _peak_bytes(d: Draw) -> Made:
    dtype = d.rng.choice((torch.float32, "bfloat16", "float8_e4m3fn"))
    arguments = {"batch": d.int(1, 9), "num_heads": 2, "head_dim": 16, "dtype": dtype}
    return _plan(d).peak_bytes, arguments | d.some(guidance=False)


@maker("CachePlan.paper_bytes")
def _paper_bytes(d: Draw) -> Made:
    arguments = {"batch": d.int(1, 9), "num_heads": 2, "head_dim": 16}
    return _plan(d).paper_bytes, arguments | d.some(k_bytes=2, v_bytes=2, guidance=False)


@maker("CachePlan.table")
def _table(d: Draw) -> Made:
    return _plan(d).table, {}


@maker("CachePlan.layer_scale_order")
def _order(d: Draw) -> Made:
    return _consumed(_plan(d).layer_scale_order, "layer_scale_order"), {}


@maker("PagedKVCache")
def _paged_cache(d: Draw) -> Made:
    arguments = {"plan": _plan(d), "batch": 2, "num_heads": 2, "head_dim": 16, "dtype": d.dtype()}
    return vk.PagedKVCache, arguments | d.some(device="cpu", page_tables={})


@maker("PagedKVCache.open")
def _open(d: Draw) -> Made:
    return _cache(d).open, {"layer": 0, "scale": 0}


@maker("PagedKVCache.close")
def _close(d: Draw) -> Made:
    cache = _cache(d)
    cache.open(0, 0)
    return cache.close, {"layer": 0, "scale": 0}


@maker("PagedKVCache.switch")
def _switch(d: Draw) -> Made:
    cache = _cache(d)
    return cache.switch, {"schedule": cache.schedule}


@maker("PagedKVCache.reset")
def _reset(d: Draw) -> Made:
    return _cache(d).reset, {}


@maker("KVLifetime")
def _lifetime(d: Draw) -> Made:
    return vk.KVLifetime, {"layer": 0, "scale": 1, "tokens": 2, "dies": 3}


@maker("KVStep")
def _kv_step(d: Draw) -> Made:
    slots, lens = torch.zeros(1, 1).long(), torch.ones(1).int()
    return vk.KVStep, {"slots_BT": slots, "page_table_BM": slots.int(), "kv_lens_B": lens}


# --- the attention module, and other codebases' models --------------------------------------------


@maker("VARiantAttention")
def _attention(d: Draw) -> Made:
    arguments = {"block_idx": 0, "embed_dim": 64, "num_heads": 2}
    return vk.VARiantAttention, arguments | d.some(
        attn_drop=0.1, proj_drop=0.1, attn_l2_norm=True, flash_if_available=False
    )


@maker("VARiantAttention.forward")
def _attention_forward(d: Draw) -> Made:
    module = vk.VARiantAttention(0, 64, 2, attn_l2_norm=d.rng.random() < 0.5).eval()
    module.kv_caching(d.rng.random() < 0.5)
    bias = d.rng.choice((None, d.normal(5, 5)))
    return torch.no_grad()(module.forward), {"x": d.normal(2, 5, 64), "attn_bias": bias}


@maker("VARiantAttention.kv_caching")
def _kv_caching(d: Draw) -> Made:
    return vk.VARiantAttention(0, 64, 2).kv_caching, {"enable": True}


@maker("VARiantAttention.extra_repr")
def _extra_repr(d: Draw) -> Made:
    return vk.VARiantAttention(0, 64, 2).extra_repr, {}


@maker("patch")
def _patch(d: Draw) -> Made:
    from lookalike_var import LookalikeVAR

    arguments = {"model": LookalikeVAR(depth=3, width=32)}
    depth = d.rng.choice((2, vk.DepthSchedule.from_depths([3, 3, 2, 2])))
    return vk.patch, arguments | d.some(depth=depth, bridge=1, keep_copies=True)


@maker("accelerate")
def _accelerate(d: Draw) -> Made:
    from lookalike_var import LookalikeVAR

    config = variant.VQVAEConfig(
        vocab_size=32,
        z_channels=8,
        ch=32,
        ch_mult=(1, 1),
        num_res_blocks=1,
        patch_nums=(1, 2, 3, 4),
    )
    return variant.accelerate, {
        "var": LookalikeVAR(depth=2, width=32),
        "vae": variant.VQVAE(config),
    }


# --- models ---------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def small() -> variant.VARiant:
    """The model that most cases share; those that change one build their own."""
    from small_models import small_model

    return small_model()


def _tokens(d: Draw, batch: int) -> Tensor:
    return torch.randint(24, (batch, small().var.layout.total), generator=d.generator)


VAR_VALUES = {
    "depth": 4,
    "embed_dim": 32,
    "num_heads": 2,
    "num_classes": 5,
    "patch_nums": (1, 2, 3),
    "vocab_size": 24,
    "vae_channels": 8,
}
VQVAE_VALUES = {"vocab_size": 24, "z_channels": 8, "ch": 32}


@maker("VARConfig")
def _var_config(d: Draw) -> Made:
    return variant.VARConfig, VAR_VALUES | d.some(
        mlp_ratio=2.0,
        norm_eps=1e-5,
        shared_aln=True,
        attn_l2_norm=False,
        cond_drop_rate=0.2,
        drop_path_rate=0.1,
        bridge=1,
    )


@maker("VARConfig.from_dict")
def _var_from_dict(d: Draw) -> Made:
    return _from_dict(d, variant.VARConfig, VAR_VALUES)


@maker("VQVAEConfig.from_dict")
def _vqvae_from_dict(d: Draw) -> Made:
    return _from_dict(d, variant.VQVAEConfig, VQVAE_VALUES)


def _from_dict(d: Draw, kind: Any, values: dict[str, Any]) -> Made:
    """Sometimes with one wrong value inside."""
    from tests.robustness.mutations import plain

    values = dict(values)
    if d.rng.random() < 0.7:
        key = d.rng.choice(list(values))
        values[key] = plain(d.rng, values[key], "any").value
    return kind.from_dict, {"values": values}


@maker("VARConfig.to_dict")
def _var_to_dict(d: Draw) -> Made:
    return small().var.config.to_dict, {}


@maker("VQVAEConfig.to_dict")
def _vqvae_to_dict(d: Draw) -> Made:
    return small().vae.config.to_dict, {}


@maker("VQVAEConfig")
def _vqvae_config(d: Draw) -> Made:
    return variant.VQVAEConfig, VQVAE_VALUES | d.some(
        ch_mult=(1, 2),
        num_res_blocks=1,
        patch_nums=(1, 2, 3),
        share_quant_resi=2,
        quant_resi=0.5,
        quant_conv_ks=3,
        using_znorm=True,
        beta=0.25,
        in_channels=3,
    )


@maker("VAR")
def _var(d: Draw) -> Made:
    return variant.VAR, {"config": small().var.config}


@maker("VQVAE")
def _vqvae(d: Draw) -> Made:
    return variant.VQVAE, {"config": small().vae.config}


@maker("VAR.forward")
def _var_forward(d: Draw) -> Made:
    model = small()
    labels = torch.randint(5, (2,), generator=d.generator)
    arguments = {"labels_B": labels, "x_teacher": model.vae.teacher_input(_tokens(d, 2))}
    arguments |= d.some(schedule=model.var.schedule(2))
    if d.rng.random() < 0.3:
        arguments |= {"mixed_labels_B": labels.flip(0), "mix_B": torch.tensor([0.3, 0.7])}
    return torch.no_grad()(model.var.forward), arguments


for _name in ("layers", "position_embedding"):
    MAKERS[f"VAR.{_name}"] = lambda d, name=_name: (getattr(small().var, name), {})


@maker("VAR.shared_condition")
def _shared_condition(d: Draw) -> Made:
    return small().var.shared_condition, {"cond_BC": d.normal(2, 32)}


@maker("VAR.schedule")
def _var_schedule(d: Draw) -> Made:
    depth = d.rng.choice((2, vk.DepthSchedule.from_depths([4, 3, 2])))
    return small().var.schedule, d.some(depth=depth, bridge=1)


@maker("VAR.layers_of")
def _layers_of(d: Draw) -> Made:
    return small().var.layers_of, {"depth": d.rng.choice((2, 3, 4, (0, 3)))}


@maker("VAR.init_weights")
def _init_weights(d: Draw) -> Made:
    var = variant.VAR(small().var.config)
    return var.init_weights, d.some(gate_scale=1e-5, modulation_scale=0.5, head_scale=0.02)


def _images(d: Draw) -> Tensor:
    return d.normal(2, 3, 6, 6).clamp(-1, 1)


for _name in ("features", "encode"):
    MAKERS[f"VQVAE.{_name}"] = lambda d, name=_name: (
        torch.no_grad()(getattr(small().vae, name)),
        {"images_BIYX": _images(d)},
    )
for _name in ("teacher_input", "decode", "decode_by_scale"):
    MAKERS[f"VQVAE.{_name}"] = lambda d, name=_name: (
        getattr(small().vae, name),
        {"tokens_BL": _tokens(d, 2)},
    )


@maker("VQVAE.forward")
def _vqvae_forward(d: Draw) -> Made:
    return torch.no_grad()(small().vae.forward), {"images_BIYX": _images(d)} | d.some(num_scales=2)


@maker("VQVAE.new_features")
def _new_features(d: Draw) -> Made:
    return small().vae.new_features, {"batch": 2}


@maker("VQVAE.accumulate")
def _accumulate(d: Draw) -> Made:
    features, k = d.normal(2, 8, 3, 3), d.int(0, 2)
    layout = small().vae.layout
    return small().vae.accumulate, {
        "f_hat_BCHW": features,
        "tokens_BN": _tokens(d, 2)[:, layout.slice(k)],
        "k": k,
    }


@maker("VQVAE.accumulate_codes")
def _accumulate_codes(d: Draw) -> Made:
    k = d.int(0, 2)
    codes = d.normal(2, small().vae.layout.tokens[k], 8)
    arguments = {"f_hat_BCHW": d.normal(2, 8, 3, 3), "codes_BNC": codes, "k": k}
    return small().vae.accumulate_codes, arguments


@maker("VQVAE.next_scale_input")
def _next_scale_input(d: Draw) -> Made:
    return small().vae.next_scale_input, {"f_hat_BCHW": d.normal(2, 8, 3, 3), "k": d.int(0, 1)}


@maker("VQVAE.decode_features")
def _decode_features(d: Draw) -> Made:
    return small().vae.decode_features, {"f_hat_BCHW": d.normal(2, 8, 3, 3)}


# --- engine and supernet --------------------------------------------------------------------------


@lru_cache(maxsize=1)
def small_engine() -> variant.Engine:
    return variant.Engine(small().var, small().vae)


@maker("Sampling")
def _sampling(d: Draw) -> Made:
    return variant.Sampling, d.some(cfg=1.5, top_k=3, top_p=0.9, seed=5)


@maker("Sampling.with_tensors")
def _with_tensors(d: Draw) -> Made:
    return variant.Sampling(seed=1).with_tensors, {
        "cfg": torch.tensor(1.5).double(),
        "seed": torch.tensor(3),
    }


@maker("Sampling.check_run")
def _check_run(d: Draw) -> Made:
    return variant.Sampling(seed=1).check_run, {
        "num_scales": 3,
        "device": torch.device("cpu"),
    }


@maker("Sampling.guidance")
def _guidance(d: Draw) -> Made:
    return variant.Sampling(seed=1).guidance, {"scale": 1, "num_scales": 3}


@maker("Sampling.temperature_at")
def _temperature_at(d: Draw) -> Made:
    return variant.Sampling(seed=1).temperature_at, {"scale": 1}


@maker("Engine")
def _engine(d: Draw) -> Made:
    arguments = {"var": small().var, "vae": small().vae}
    return variant.Engine, arguments | d.some(
        dtype=d.dtype(), backend="auto", page_size=4, kv_dtype="fp8", pack=False, capture=False
    )


def _generation(d: Draw) -> dict[str, Any]:
    return {"labels": d.rng.choice((3, [0, 4], torch.tensor([1, 2])))} | d.some(
        depth=2, bridge=1, max_batch=1, kv_dtype="fp8", on_scale=lambda k, partial: None
    )


@maker("Engine.generate")
def _engine_generate(d: Draw) -> Made:
    return small_engine().generate, _generation(d) | d.some(
        cfg=1.5, top_k=3, top_p=0.9, seed=3, decode=False
    )


@maker("Engine.generate_with")
def _generate_with(d: Draw) -> Made:
    sampling = {"sampling": variant.Sampling(seed=3)}
    return small_engine().generate_with, _generation(d) | sampling | d.some(decode=False)


@maker("Engine.generate_batches")
def _generate_batches(d: Draw) -> Made:
    function = _consumed(small_engine().generate_batches, "generate_batches")
    return function, _generation(d) | d.some(cfg=1.5, top_k=3, top_p=0.9, seed=3, decode=False)


@maker("Engine.generate_batches_with")
def _generate_batches_with(d: Draw) -> Made:
    function = _consumed(small_engine().generate_batches_with, "generate_batches_with")
    return function, _generation(d) | {"sampling": variant.Sampling(seed=3)}


@maker("VARiant.generate_batches")
def _variant_batches(d: Draw) -> Made:
    function = _consumed(small().generate_batches, "generate_batches")
    return function, _generation(d) | d.some(cfg=1.5, top_k=3, top_p=0.9, seed=3)


@maker("Engine.forced_logits")
def _forced_logits(d: Draw) -> Made:
    arguments = {"labels_B": torch.tensor([0, 4]), "tokens_BL": _tokens(d, 2)}
    return small_engine().forced_logits, arguments | d.some(depth=2, bridge=1, kv_dtype="fp8")


@maker("Engine.forced_log_probs")
def _forced_log_probs(d: Draw) -> Made:
    arguments = {"labels_B": torch.tensor([0, 4]), "tokens_BL": _tokens(d, 2)}
    return small_engine().forced_log_probs, arguments | d.some(
        depth=2, bridge=1, cfg=1.5, max_batch=1, kv_dtype="fp8"
    )


@maker("Engine.decode")
def _engine_decode(d: Draw) -> Made:
    return small_engine().decode, {"tokens_BL": _tokens(d, 2)}


@maker("Engine.image_bytes")
def _image_bytes(d: Draw) -> Made:
    model = small()
    plan = vk.CachePlan(model.var.layout, model.var.schedule(2))
    return small_engine().image_bytes, {"plan": plan} | d.some(guidance=False, kv_dtype="fp8")


for _name in ("decoder_bytes", "refresh"):
    MAKERS[f"Engine.{_name}"] = lambda d, name=_name: (getattr(small_engine(), name), {})


@maker("VARiant")
def _variant(d: Draw) -> Made:
    return variant.VARiant, {"var": small().var, "vae": small().vae}


@maker("VARiant.engine")
def _variant_engine(d: Draw) -> Made:
    return small().engine, d.some(dtype=d.dtype())


@maker("VARiant.generate")
def _variant_generate(d: Draw) -> Made:
    return small().generate, _generation(d) | d.some(cfg=1.5, top_k=3, top_p=0.9, seed=3)


@maker("VARiant.from_pretrained")
def _from_pretrained(d: Draw) -> Made:
    return variant.VARiant.from_pretrained, {"name": "digits"} | d.some(
        dtype=d.dtype(), device="cpu"
    )


@maker("VARiant.from_var_checkpoint")
def _from_var_checkpoint(d: Draw) -> Made:
    return variant.VARiant.from_var_checkpoint, {
        "var_path": "missing-var.pth",
        "vae_path": "missing-vae.pth",
    } | d.some(num_heads=2, dtype=d.dtype(), device="cpu")


@maker("VARiant.save_pretrained")
def _save_pretrained(d: Draw) -> Made:
    return small().save_pretrained, {"folder": "saved"} | d.some(extra={"a": 1})


@maker("VARiant.generate_model_card")
def _generate_model_card(d: Draw) -> Made:
    return small().generate_model_card, d.some(model_id="m")


@maker("Generation")
def _generation_record(d: Draw) -> Made:
    tensor = torch.zeros(1)
    names = variant.Generation.__dataclass_fields__
    return variant.Generation, dict.fromkeys(names, tensor)


@maker("Generation.pil")
def _pil(d: Draw) -> Made:
    return small().generate([1], seed=0).pil, {}


@maker("PartialResult")
def _partial(d: Draw) -> Made:
    return variant.PartialResult, {"scale": 0, "tokens": torch.zeros(1), "_decode": lambda: None}


@maker("PartialResult.images")
def _partial_images(d: Draw) -> Made:
    return variant.PartialResult(0, torch.zeros(1), lambda: torch.zeros(1)).images, {}


@maker("Stats")
def _stats(d: Draw) -> Made:
    names = variant.Stats.__dataclass_fields__
    return variant.Stats, dict.fromkeys(names, 1)
