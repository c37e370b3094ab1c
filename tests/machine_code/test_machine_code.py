"""Kernels compile to the machine code that the table describes, and keep the rules.

``VARIANT_MACHINE_CODE=all`` compiles every case; by default one of each kind (REPRESENTATIVES).
"""

import os

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import triton

from tests.machine_code import figures, rules, table

CASES = {} if triton.knobs.runtime.interpret else figures.shipped_cases()
VERSION = triton.__version__
EXPECTED = table.read(VERSION)
EXCEPTIONS = rules.read_exceptions(rules.EXCEPTIONS.read_text())
# The first case that begins so: block sizes may change without this list.
REPRESENTATIVES = (
    "block_causal_attention_forward/D 64",
    "block_causal_attention_forward/D 128",
    "block_causal_attention_dq/D 64",
    "block_causal_attention_dkv/D 64",
    "paged_attention/D 64, 128",
    "paged_attention/D 64, 64 x 64, 8 bits",
    "paged_attention_combine/",
    "adaln_forward/C 1920 gated",
    "adaln_backward/C 1920 gated",
    "qk_norm_append_paged_kv/H 30, D 64",
    "append_paged_kv/H 30",
    "sample_tokens/V 4096, filtered, for a graph",
)


def chosen():
    if os.environ.get("VARIANT_MACHINE_CODE") == "all":
        return list(CASES)
    return [next(key for key in CASES if key.startswith(one)) for one in REPRESENTATIVES if CASES]


@pytest.fixture(scope="module")
def compiler():
    if not CASES:
        pytest.skip("TRITON_INTERPRET=1: kernels are interpreted, not compiled")
    if not EXPECTED:
        pytest.skip(f"there is no table for Triton {VERSION}: python -m tests.machine_code --write")


@pytest.mark.parametrize("key", chosen())
def test_machine_code_is_what_the_table_says(compiler, key):
    got = figures.measure(CASES[key])
    assert key in EXPECTED, table.complaint(key, VERSION, ["the table has no such case"])
    lines = table.differences(EXPECTED[key], got)
    assert not lines, table.complaint(key, VERSION, lines)
    broken = rules.violations(key, figures.elements_per_thread(CASES[key]), got)
    assert not rules.unexcused(broken, EXCEPTIONS, VERSION)


def test_the_tables_keep_the_rules_and_need_every_exception():
    """From the committed figures of each version, without compiling."""
    if not CASES:
        pytest.skip("TRITON_INTERPRET=1: the cases have no kernels that can be compiled")
    versions = [path.stem.removeprefix("triton-") for path in table.FOLDER.glob("triton-*.json")]
    assert versions
    needed = set()
    for version in versions:
        # Cases that a change added or renamed: `make sass` asks for them.
        figures_by_key = {k: v for k, v in table.read(version).items() if k in CASES}
        found = [
            one
            for key, figures_ in figures_by_key.items()
            for one in rules.violations(key, figures.elements_per_thread(CASES[key]), figures_)
        ]
        assert rules.unexcused(found, EXCEPTIONS, version) == [], version
        broken = {(one.rule, one.key) for one in found}
        for e in EXCEPTIONS:
            covered = {key for key in figures_by_key if e.holds_for(e.rule, key, version)}
            kept = sorted(key for key in covered if (e.rule, key) not in broken)
            assert not kept, f"{e}: Triton {version} keeps the rule in {kept}"
            needed |= {e} if covered else set()
    assert [e for e in EXCEPTIONS if e not in needed] == [], "kept now: remove them"


# --- the comparison and the rules themselves ----------------------------------------------------

KEY = "paged_attention/D 64, 128 x 64, 8 warps, 5 stages"
GOOD = {
    "registers": 128, "stack": 0, "shared": 65536, "programs": 2, "instructions": 1000, "local": 0,
    "global": {"load 128": 8, "load 32": 2}, "waits": [3, 3],
    "loops": [{"instructions": 340, "HGMMA": 8, "MUFU": 34},
              {"instructions": 400, "HGMMA": 8, "ISETP": 60}],
}  # fmt: skip


def changed(**quantities):
    return {**GOOD, **quantities}


def test_equal_figures_have_no_difference():
    assert table.differences(GOOD, GOOD) == []
    assert rules.violations(KEY, 32, GOOD) == []


@pytest.mark.parametrize(
    ("figures_", "line"),
    [
        (changed(programs=1), "programs: expected 2, got 1 (-50.0%)"),
        (changed(registers=135), "registers: expected 128, got 135 (+5.5%)"),
        (changed(stack=16), "stack: expected 0, got 16"),
        (changed(waits=[3, 0]), "waits[1]: expected 3, got 0 (-100.0%)"),
        (changed(waits=[3]), "number of waits: expected 2, got 1 (-50.0%)"),
        (
            changed(loops=[{**GOOD["loops"][0], "instructions": 358}, GOOD["loops"][1]]),
            "loops[0].instructions: expected 340, got 358 (+5.3%)",
        ),
        (
            changed(loops=[GOOD["loops"][0], {**GOOD["loops"][1], "ISETP": 61}]),
            "loops[1].ISETP: expected 60, got 61 (+1.7%)",
        ),
        (
            changed(**{"global": {"load 32": 10}}),
            "global.load 128: expected 8, got 0 (-100.0%)",
        ),
    ],
)
def test_a_change_is_named_with_both_values(figures_, line):
    assert line in table.differences(GOOD, figures_)
    message = table.complaint(KEY, "3.9.0", [line])
    assert message.splitlines()[0] == f"{KEY} (Triton 3.9.0):"
    assert f"make sass SASS='{KEY}' WRITE=1" in message


def test_few_instructions_and_registers_more_are_no_difference():
    loops = [{**GOOD["loops"][0], "instructions": 356}, GOOD["loops"][1]]
    assert table.differences(GOOD, changed(registers=130, instructions=1049, loops=loops)) == []
    assert len(table.differences(GOOD, changed(registers=130), tolerance=0)) == 1


@pytest.mark.parametrize(
    ("rule", "figures_"),
    [
        ("fits", changed(shared=232_449, programs=0)),
        ("tensor-cores", changed(loops=[{"instructions": 300, "HMMA": 32}])),
        ("tensor-cores", changed(loops=[])),
        ("registers-only", changed(loops=[{"instructions": 300, "HGMMA": 8, "LDL": 1}])),
        ("registers-only", changed(loops=[{"instructions": 300, "HGMMA": 8, "STL": 2}])),
        ("no-stack", changed(stack=8)),
        ("compares", changed(loops=[{"instructions": 300, "HGMMA": 8, "ISETP": 65}])),
        (
            "compares",
            changed(loops=[{"instructions": 300, "HGMMA": 8, "LDGSTS": 12, "ISETP": 69}]),
        ),
        ("loads-ahead", changed(waits=[0, 3])),
        ("loads-ahead", changed(waits=[])),
        ("wide-loads", changed(**{"global": {"load 32": 40}})),
    ],
)
def test_every_rule_can_be_broken(rule, figures_):
    (broken,) = rules.violations(KEY, 32, figures_)
    assert (broken.rule, broken.key) == (rule, KEY)
    excuse = rules.read_exceptions(f"# why\n{rule} | paged_attention/* 5 stages | 3.9.* | a test")
    assert rules.unexcused([broken], excuse, "3.9.0") == []
    assert rules.unexcused([broken], excuse, "3.6.0") == [broken]


def test_tiles_of_few_rows_may_use_other_products():
    figures_ = changed(loops=[{"instructions": 300, "HMMA": 32}])
    assert rules.violations("paged_attention/D 64, 32 x 64, 4 warps, 5 stages", 32, figures_) == []
    dkv = "block_causal_attention_dkv/D 128, 32 x 128, 8 warps, 3 stages"
    assert [one.rule for one in rules.violations(dkv, 32, figures_)] == ["tensor-cores"]


def test_an_exception_needs_a_known_rule_and_a_reason():
    for line in ("no-stack | x | *", "no-stack | x | * | ", "nothing | x | * | why", "no-stack"):
        with pytest.raises(ValueError, match="a line is"):
            rules.read_exceptions(line)
