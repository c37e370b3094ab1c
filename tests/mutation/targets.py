"""The modules that are mutated, and the tests that hold each of them."""

from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def _kernels(*stems: str) -> tuple[str, ...]:
    return tuple(f"tests/kernels/test_{stem}.py" for stem in stems)


_PLANS = _kernels("cache_plan", "plan_arguments")
_CHECKS = _kernels("refusals", "derivatives")
_ENGINE = tuple(
    f"tests/engine/test_{stem}.py"
    for stem in ("engine", "editing", "generate_batches", "kv8_engine", "memory", "slow_products")
)
_LOADING = tuple(
    f"tests/checkpoints/test_{stem}.py"
    for stem in ("model_folder", "loading_options", "settings", "state_dict_forms", "model_card")
)

# module: files of tests.
TARGETS: dict[str, tuple[str, ...]] = {
    "variant_kernels.plans.scale_layout": _PLANS,
    "variant_kernels.plans.depth_schedule": _PLANS,
    "variant_kernels.plans.cache_plan": _PLANS,
    "variant_kernels.kv_cache": _kernels("kv_cache", "plan_arguments", "kv8"),
    "variant_kernels.arguments": _kernels("arguments"),
    "variant_kernels.tensors": _kernels("tensors"),
    "variant_kernels.dispatch.select": _kernels("dispatch"),
    "variant_kernels.dispatch.support": _kernels("dispatch"),
    "variant_kernels.dispatch.explain": _kernels("dispatch"),
    "variant_kernels.ops.contract": _kernels("contract"),
    "variant_kernels.ops.pages": (*_kernels("paged_attention", "kv8"), *_CHECKS),
    "variant_kernels.ops.registry": (*_kernels("dispatch"), *_CHECKS),
    "variant_kernels.ops.adaln": (*_kernels("adaln"), *_CHECKS),
    "variant_kernels.ops.qk_norm": (*_kernels("qk_norm"), *_CHECKS),
    "variant_kernels.ops.append_paged_kv": (*_kernels("paged_attention", "kv8"), *_CHECKS),
    "variant_kernels.ops.qk_norm_append_paged_kv": (*_kernels("qk_norm_append_paged_kv"), *_CHECKS),
    "variant_kernels.ops.block_causal_attention": (*_kernels("block_causal_attention"), *_CHECKS),
    "variant_kernels.ops.paged_attention": (*_kernels("paged_attention", "kv8"), *_CHECKS),
    "variant_kernels.ops.sample_tokens": (*_kernels("sample_tokens"), *_CHECKS),
    "variant.engine.arguments": _ENGINE,
    "variant.engine.batches": _ENGINE,
    "variant.engine.drawing": _ENGINE,
    "variant.engine.engine": _ENGINE,
    "variant.engine.generation": _ENGINE,
    "variant.engine.kernels": _ENGINE,
    "variant.engine.memory": ("tests/engine/test_memory.py",),
    "variant.engine.page_tables": _ENGINE,
    "variant.engine.planning": (*_ENGINE, "tests/cli/test_plan.py"),
    "variant.engine.runs": _ENGINE,
    "variant.engine.step_loop": _ENGINE,
    "variant.engine.weights": (*_ENGINE, "tests/engine/test_packed_layers.py"),
    "variant.engine.packed_layers": ("tests/engine/test_packed_layers.py",),
    "variant.checkpoints.config_file": _LOADING,
    "variant.checkpoints.locate": _LOADING,
    "variant.checkpoints.model_card": ("tests/checkpoints/test_model_card.py",),
    "variant.checkpoints.model_folder": _LOADING,
    "variant.checkpoints.original_var": (*_LOADING, "tests/checkpoints/test_original_var.py"),
    "variant.checkpoints.settings": _LOADING,
    "variant.checkpoints.sharded": _LOADING,
    "variant.checkpoints.state_dict_forms": _LOADING,
    "variant.files": ("tests/test_files.py", *_LOADING),
}
