"""The engine benchmark: counted work, interleaved timing, the machine's description, the table."""

import itertools
import json
import sys
import time

import pytest
import torch
from small_models import small_model

from variant.bench import device, original_var, roofline
from variant.bench.engine_bench import BenchConfig, measure
from variant.bench.environment import ENVIRONMENT, caches, command_line, environment, machine_slug
from variant.bench.interleaved import SelfTimed, quartiles, ratios, time_interleaved
from variant.bench.peak_memory import Job, peak
from variant.bench.roofline import Peaks, drift, measure_peaks
from variant.cli.main import main
from variant.errors import UserError
from variant.models.flops import attention_flop, ceiling, linear_flop, linears, weight_bytes
from variant.models.presets import VAR_PRESETS
from variant_kernels import DepthSchedule

D16 = VAR_PRESETS["var-d16"]
D30 = VAR_PRESETS["var-d30"]
PLAIN_LOOPS = [f"plain loop {setting}" for setting in device.peer_settings("cpu")]


def schedule(config, depth):
    return DepthSchedule(config.depth, 10, depth, 6)


# --- work ---------------------------------------------------------------------------------------


def test_ceilings_of_the_published_sizes():
    def blocks(depth):
        products = linears(D30, schedule(D30, depth), batch=1)
        return sum(x.flop for x in products if x.name in ("mat_qkv", "proj", "fc1", "fc2"))

    shares = {d: round(blocks(d) / blocks(30), 3) for d in (16, 8, 4, 2)}
    assert shares == {16: 0.596, 8: 0.365, 4: 0.249, 2: 0.192}
    # With the head, which every depth runs at every scale.
    assert round(ceiling(D16, schedule(D16, 2)), 2) == 3.88
    assert ceiling(D16, DepthSchedule.full(16, 10)) == 1


def test_work_of_one_image_is_that_of_the_paper():
    full = DepthSchedule.full(30, 10)
    linear, attention = linear_flop(D30, full), attention_flop(D30, full)
    assert linear + attention == pytest.approx(3.75e12, rel=0.02)
    assert attention / (linear + attention) == pytest.approx(0.035, abs=0.003)


def test_every_product_of_a_generation_is_listed():
    config = small_model().var.config
    products = linears(config, DepthSchedule.full(4, 3), batch=5)
    assert sum(x.name == "ada_lin" for x in products) == 4
    assert [x.rows for x in products if x.name == "head"] == [5, 10 * 4, 10 * 9]
    assert [x.rows for x in products if x.name == "word_embed"] == [5 * 4, 5 * 9]
    assert sum(x.name == "fc1" for x in products) == 4 * 3
    shallow = linears(config, DepthSchedule(4, 3, (0, 3), 1), batch=5, guidance=False)
    assert sum(x.name == "mat_qkv" for x in shallow) == 4 + 2 + 2
    assert max(x.rows for x in shallow) == 5 * 9


def test_weights_are_counted_once_for_every_product_that_reads_them():
    width, once = D30.embed_dim, 6 * 30 + 2
    full = DepthSchedule.full(30, 10)
    every_scale = 30 * 12 * width**2 + D30.vocab_size * width
    words = 9 * D30.vae_channels * width
    assert weight_bytes(D30, full, 2) == 2 * (10 * every_scale + once * width**2 + words)


# --- interleaved --------------------------------------------------------------------------------


def test_calls_take_turns_and_each_round_begins_with_another():
    order = []
    calls = {name: lambda n=name: order.append(n) or SelfTimed(1.0) for name in "abc"}
    samples = time_interleaved(calls, rounds=3, min_seconds=0)
    assert "".join(order[-9:]) == "abcbcacab"
    assert {name: len(s.seconds) for name, s in samples.items()} == {"a": 3, "b": 3, "c": 3}


def test_a_ratio_compares_within_rounds_only():
    steps = itertools.count()
    # The machine becomes ten times slower meanwhile; the ratio stays.
    samples = time_interleaved(
        {
            "slow": lambda: SelfTimed(3 * (1 + next(steps) // 8 * 9)),
            "fast": lambda: SelfTimed(1 * (1 + next(steps) // 8 * 9)),
        },
        rounds=6,
        min_seconds=0,
        every=lambda name, seconds: 2 if name == "slow" else 1,
    )
    assert set(samples["slow"].by_round) == {0, 2, 4}
    assert len(ratios(samples["slow"], samples["fast"])) == 3
    assert sorted(ratios(samples["slow"], samples["fast"]))[1] == pytest.approx(3, rel=0.4)


def test_short_calls_are_repeated_until_a_sample_is_long_enough():
    samples = time_interleaved({"short": lambda: None}, rounds=2, min_seconds=1e-3)["short"]
    assert samples.iterations > 100
    assert samples.median < 1e-4
    slept = time_interleaved({"long": lambda: time.sleep(2e-3)}, rounds=3, min_seconds=1e-3)["long"]
    assert slept.iterations == 1
    assert 2e-3 <= slept.quartiles[0] <= slept.median <= slept.quartiles[1]


def test_quartiles_of_one_value_are_that_value():
    assert quartiles([2.0]) == (2.0, 2.0)
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 4.0)


def test_the_limit_is_the_slower_of_products_and_copies():
    peaks = Peaks({"float32": 100.0}, 10.0)
    assert peaks.seconds("float32", 1000, 10) == (10, "compute")
    assert peaks.seconds("float32", 0, 50) == (5, "memory")
    assert drift(peaks, Peaks({"float32": 50.0}, 20.0)) == {"gemm float32": 0.5, "copy": 2.0}


def test_only_the_dtypes_that_were_asked_for_are_measured():
    measured = measure_peaks("cpu", [torch.float32], quick=True)
    assert set(measured.gemm) == {"float32"}
    assert measured.gemm["float32"] > 1e9
    assert measured.copy > 1e8


def test_a_slow_dtype_is_measured_on_fewer_rows(monkeypatch):
    rows_of_calls = []

    def slow_product(left, right):
        rows_of_calls.append(left.shape[0])
        time.sleep(0.05)

    monkeypatch.setattr(torch, "mm", slow_product)
    # A little over 0.05 s for 32 rows: 128 rows would take a little over 0.2 s.
    assert roofline._rows_within_budget(512, torch.zeros(8, 8)) == 64
    assert rows_of_calls == [32, 32]
    monkeypatch.setattr(torch, "mm", lambda left, right: None)
    assert roofline._rows_within_budget(512, torch.zeros(8, 8)) == 512


# --- the machine --------------------------------------------------------------------------------


def test_environment_names_machine_versions_and_commit():
    description = environment(
        ["/somewhere/bin/tool", "--repo", "/a/b/clone", "--json=/x/y.json", "8"]
    )
    assert description["command"].endswith("tool --repo PATH/clone --json=PATH/y.json 8")
    assert "/somewhere" not in json.dumps(description)
    assert description["threads"] == torch.get_num_threads()
    assert description["torch"] == torch.__version__
    assert description["isa"]
    assert description["memory_bytes"] > 2**28
    assert {"commit", "dirty", "cpu", "cores", "caches", "triton", "gpu", "gpu_driver"} <= set(
        description
    )
    machine = {**description, "cpu": "A (TM) 3.5", "isa": "avx2", "threads": 2, "gpu": None}
    assert machine_slug(machine) == "a-tm-3-5-avx2-2-threads"
    assert machine_slug({**machine, "gpu": "NVIDIA H100"}) == "nvidia-h100"


def test_peers_use_only_the_products_that_the_processor_has(monkeypatch):
    for has, settings in (
        (True, {"float32": False, "bfloat16 autocast": True}),
        (False, {"float32": False}),
    ):
        monkeypatch.setattr(device, "has_products", lambda where, dtype, has=has: has)
        assert device.peer_settings("cpu") == settings
    monkeypatch.setattr(device, "has_products", lambda where, dtype: True)
    assert device.peer_settings("cuda") == {"float16 autocast": True}


def test_a_forced_instruction_set_is_part_of_the_command(monkeypatch):
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VARIANT_CPU_ISA", "portable")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert command_line(["tool"]) == "VARIANT_CPU_ISA=portable ONEDNN_MAX_CPU_ISA=AVX2 tool"


def test_caches_are_read_as_the_system_lists_them(tmp_path):
    for index, (level, kind, size) in enumerate(
        [("1", "Data", "32K"), ("1", "Instruction", "32K"), ("3", "Unified", "8M")]
    ):
        folder = tmp_path / "cpu0" / "cache" / f"index{index}"
        folder.mkdir(parents=True)
        for name, value in (("level", level), ("type", kind), ("size", size)):
            (folder / name).write_text(value + "\n")
    assert caches(tmp_path) == {"L1 data": "32K", "L3": "8M"}
    assert caches(tmp_path / "none") == {}


# --- the comparison -----------------------------------------------------------------------------


def test_rows_compare_ours_with_a_loop_that_draws_the_same():
    model = small_model()
    names = []
    result = measure(
        model.var, model.vae, BenchConfig(2, torch.float32, (4, 2), runs=2, top_k=9, decoder=True),
        names.append,
    )  # fmt: skip
    full, shallow = result["rows"]
    assert [full["depth"], shallow["depth"]] == [4, 2]
    for row in (full, shallow):
        assert row["same_tokens"] is True
        assert row["kv_allocated_bytes"] == row["kv_planned_bytes"] > 0
        assert [peer["peer"] for peer in row["against"]] == PLAIN_LOOPS
        assert all(peer["ratio"] > 0 and not peer["full_depth"] for peer in row["against"])
        assert len(row["scale_ms"]) == 3
        assert row["ms"]["rounds"] == 2
        assert row["beyond_gemms"] < 1
    assert full["weight_bytes"] > shallow["weight_bytes"] > 0
    assert full["speed_up"] == 1
    assert full["ceiling"] == 1 < shallow["ceiling"]
    assert result["decoder"][0]["against"][0]["peer"] == "plain modules float32"
    assert result["logits"] == []
    (switch,) = result["switch"]
    assert (switch["depth"], switch["to"], switch["rounds"]) == (4, 2, 2)
    assert switch["generation_ms"] > 0
    assert [(row["depth"], row["ms"]["rounds"]) for row in result["images"]] == [(4, 2), (2, 2)]
    # Both depths with their products and peers, the decoder and its peers, both with the decoder.
    peers = len(PLAIN_LOOPS)
    assert len(names) == 3 * (2 * (2 + peers) + 1 + peers + 2)


def test_the_command_prints_the_table_and_writes_everything(tmp_path, capsys, monkeypatch):
    # Memory of one peer: each is measured in a process of its own, in the same way.
    name, autocast = list(device.peer_settings("cpu").items())[-1]
    monkeypatch.setattr("variant.cli.bench.peer_settings", lambda kind: {name: autocast})
    folder, out = tmp_path / "model", tmp_path / "new" / "result.json"
    small_model().save_pretrained(folder)
    words = ["bench", "--model", folder, "--batch", 1, "--depths", 2, "--runs", 1]
    words += ["--dtype", "bfloat16", "--kv-dtype", "fp8", "--json", out, "--memory"]
    code = main([str(word) for word in words])
    printed = capsys.readouterr()
    assert (code, printed.err) == (0, "")
    for text in (
        *(
            "beyond",
            "work alone",
            "equal",
            PLAIN_LOOPS[-1].removesuffix(" autocast"),
            "GFLOP/s",
            f"wrote {out}",
        ),
        *("8-bit K/V beside exact K/V (bfloat16)", "switch from depth 4 to 2, bfloat16, batch 1"),
    ):
        assert text in printed.out, text
    result = json.loads(out.read_text())
    (row,) = result["rows"]
    kv8 = row["kv8"]
    assert kv8["kv_allocated_bytes"] == kv8["kv_planned_bytes"]
    # Heads are 16 wide: one byte a value and one a head, where bfloat16 takes two a value.
    assert kv8["kv_allocated_bytes"] * 32 == row["kv_allocated_bytes"] * 17
    assert kv8["ratio"] > 0
    assert 0 <= kv8["greedy_changed"] <= 1
    assert result["complete"] is True
    assert result["weights"] == "trained"
    assert [row["depth"] for row in result["rows"]] == [2]
    assert {"start", "end", "drift"} == set(result["limits"])
    # Only the dtype that was asked for: others can take minutes where they are emulated.
    assert set(result["limits"]["start"]["gemm"]) == {"bfloat16"}
    assert [one["who"] for one in result["memory"]] == ["ours bfloat16", PLAIN_LOOPS[-1]]
    assert all(one["peak"] >= one["loaded"] > 2**26 for one in result["memory"])


def test_wrong_requests_are_named_before_the_work(tmp_path, capsys):
    for words, message in (
        (["--batch", "0"], "bench: --batch must be an integer in [1, 65536]; got 0"),
        (["--runs", "0"], "bench: --runs must be an integer in [1, 1000000]; got 0"),
        (["--depths", "3"], "bench: --depths must be one that the model was trained at"),
        (["--json", str(tmp_path)], f"{tmp_path}: cannot be written"),
        (["--var-repo", str(tmp_path)], "is no clone of FoundationVision/VAR: it has no models"),
    ):
        assert main(["bench", "--model", "digits", *words]) == 1
        assert message in capsys.readouterr().err


def test_the_error_of_a_child_is_reported():
    with pytest.raises(UserError, match=r"measures memory failed: .*nowhere"):
        peak(Job("ours", "nowhere", 1, 4, "float32"))


# --- the original code --------------------------------------------------------------------------


def test_importing_a_clone_leaves_no_module_behind(tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    (tmp_path / "dist.py").write_text("__device = 'cuda'\ndef get_device(): return __device\n")
    (tmp_path / "models" / "__init__.py").write_text("from models.var import VAR, VQVAE\n")
    (tmp_path / "models" / "vqvae.py").write_text("")
    (tmp_path / "models" / "var.py").write_text(
        "import dist\nclass VAR: device = staticmethod(dist.get_device)\nclass VQVAE: pass\n"
    )
    mine = object()
    monkeypatch.setitem(sys.modules, "models", mine)
    path = list(sys.path)
    kind, _ = original_var.classes(tmp_path)
    assert kind.device() == "cpu"
    assert sys.modules["models"] is mine
    assert "dist" not in sys.modules
    assert "models.var" not in sys.modules
    assert sys.path == path
    (tmp_path / "dist.py").write_text("import no_such_module_anywhere\n")
    with pytest.raises(UserError, match="cannot be imported: No module named"):
        original_var.classes(tmp_path)


def test_a_model_that_the_original_cannot_be_is_refused():
    with pytest.raises(UserError, match=r"always has ch_mult \(1, 1, 2, 2, 4\)"):
        original_var.check_sizes(small_model().vae.config)
