"""The modules that are mutated, and the tests that hold each of them."""

from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def _kernels(*stems: str) -> tuple[str, ...]:
    return tuple(f"tests/kernels/test_{stem}.py" for stem in stems)


_PLANS = _kernels("cache_plan", "depth_schedule", "plan_arguments")
_CHECKS = _kernels("refusals", "derivatives")


def _engine(*stems: str) -> tuple[str, ...]:
    return tuple(f"tests/engine/test_{stem}.py" for stem in stems)


def _checkpoints(*stems: str) -> tuple[str, ...]:
    return tuple(f"tests/checkpoints/test_{stem}.py" for stem in stems)


# Of modules that only a whole generation reaches; without Triton's interpreter.
_ENGINE = _engine(
    "engine",
    "editing",
    "generate_batches",
    "kv8_engine",
    "cuda_graphs",
    "recorded_path",
    "zone_weights",
    "slow_products",
    "packed_layers",
    "page_tables",
)
_PLANNING = ("tests/cli/test_plan.py", "tests/test_schedule_files.py")

# module: files of tests.
TARGETS: dict[str, tuple[str, ...]] = {
    "variant_kernels.plans.scale_layout": _PLANS,
    "variant_kernels.plans.depth_schedule": _PLANS,
    "variant_kernels.plans.cache_plan": _PLANS,
    "variant_kernels.kv_cache": _kernels("kv_cache", "plan_arguments", "kv8"),
    "variant_kernels.arguments": _kernels("arguments"),
    "variant_kernels.tensors": _kernels("tensors"),
    "variant_kernels.dispatch.select": _kernels("dispatch"),
    "variant_kernels.dispatch.support": _kernels("dispatch", "library_backends"),
    "variant_kernels.dispatch.explain": _kernels("dispatch"),
    "variant_kernels.ops.contract": _kernels("contract"),
    "variant_kernels.ops.pages": (*_kernels("paged_attention", "kv8"), *_CHECKS),
    "variant_kernels.ops.derivatives": _CHECKS,
    "variant_kernels.ops.library": (*_kernels("dispatch"), *_CHECKS),
    "variant_kernels.ops.registry": (*_kernels("dispatch"), *_CHECKS),
    "variant_kernels.ops.adaln": (*_kernels("adaln"), *_CHECKS),
    "variant_kernels.ops.qk_norm": (*_kernels("qk_norm"), *_CHECKS),
    "variant_kernels.ops.append_paged_kv": (*_kernels("paged_attention", "kv8"), *_CHECKS),
    "variant_kernels.ops.qk_norm_append_paged_kv": (*_kernels("qk_norm_append_paged_kv"), *_CHECKS),
    "variant_kernels.ops.block_causal_attention": (*_kernels("block_causal_attention"), *_CHECKS),
    "variant_kernels.ops.paged_attention": (*_kernels("paged_attention", "kv8"), *_CHECKS),
    "variant_kernels.ops.sample_tokens": (*_kernels("sample_tokens"), *_CHECKS),
    "variant.engine.arguments": _engine("request_arguments"),
    "variant.engine.batches": _engine("batches", "generate_batches"),
    "variant.engine.cast_models": _engine("slow_products", "packed_layers", "kv8_engine"),
    "variant.engine.cuda_graphs": _ENGINE,
    "variant.engine.drawing": _engine("drawing"),
    "variant.engine.engine": _ENGINE,
    "variant.engine.generation": _engine("sampling", "images_and_plans"),
    "variant.engine.graph_replay": _ENGINE,
    "variant.engine.grid": _engine("grid"),
    "variant.engine.images": _engine("images_and_plans"),
    "variant.engine.kernels": _ENGINE,
    "variant.engine.kv_dtype": _ENGINE,
    "variant.engine.memory": _engine("memory"),
    "variant.engine.packed_layers": _engine("packed_layers", "slow_products"),
    "variant.engine.page_tables": _ENGINE,
    "variant.engine.planning": (*_engine("images_and_plans"), *_PLANNING),
    "variant.engine.runs": _engine("runs"),
    "variant.engine.step_loop": _ENGINE,
    "variant.engine.weights": _ENGINE,
    "variant.checkpoints.config_file": _checkpoints("loading_options", "original_var"),
    "variant.checkpoints.locate": _checkpoints("locate"),
    "variant.checkpoints.model_card": _checkpoints("model_card"),
    "variant.checkpoints.model_folder": _checkpoints(
        "model_folder", "model_card", "zone_weight_files", "hostile_files"
    ),
    "variant.checkpoints.named_configs": _checkpoints("named_configs", "loading_options"),
    "variant.checkpoints.original_var": _checkpoints("original_var", "loading_options"),
    "variant.checkpoints.settings": _checkpoints("settings"),
    "variant.checkpoints.sharded": _checkpoints("sharded"),
    "variant.checkpoints.state_dict_forms": _checkpoints("state_dict_forms"),
    "variant.files": ("tests/test_files.py",),
    "variant.tensor_files": ("tests/test_tensor_files.py", "tests/test_files.py"),
}
