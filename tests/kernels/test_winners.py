"""backend="auto" goes by a measured table."""

import json

import pytest
import torch

from variant_kernels import adaln_modulate, explain, ops, paged_attention, use_backend, winners
from variant_kernels.dispatch import select
from variant_kernels.dispatch.request import Request
from variant_kernels.dispatch.select import Impl, choose_backward, choose_name

SMALL, LARGE = {"row": 64, "rows": 8}, {"row": 64, "rows": 1024}
FLOATS = (torch.float32, torch.float32)


def case(ranking, sizes, source="kernels-planted.json"):
    return {"ranking": list(ranking), "sources": [source], "sizes": sizes}


def entry(op, dtypes, *cases, kind=None, device="cpu", gradient=False, kv_dtype=None):
    kind = winners.device_kind("cpu") if kind is None else kind
    return {"op": op, "device": device, "kind": kind, "dtypes": list(dtypes),
            "kv_dtype": kv_dtype, "gradient": gradient, "cases": list(cases)}  # fmt: skip


@pytest.fixture
def plant(tmp_path, monkeypatch):
    """plant(entries): the table for this test; a text is written as it is."""

    def write(entries):
        path = tmp_path / "winners.json"
        made = {"format": winners.FORMAT, "sources": {}, "entries": entries}
        path.write_text(entries if isinstance(entries, str) else json.dumps(made))
        monkeypatch.setattr(winners, "PATH", path)
        winners.forget()

    monkeypatch.delenv("VARIANT_BACKEND", raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    yield write
    monkeypatch.undo()
    winners.forget()


@pytest.fixture
def planted(plant):
    """Plain torch wins on few rows, the C++ kernel on many."""
    few, many = case(("reference", "cpu"), SMALL), case(("cpu", "reference"), LARGE)
    plant([entry("adaln_modulate", ("float32", "float32"), few, many)])


@pytest.fixture
def ran(monkeypatch):
    """(backend, "forward" or "backward") of each launch of adaln_modulate."""
    found = []
    for name, impl in backends_of("adaln_modulate").items():
        for part in ("forward", "backward"):
            launch = getattr(impl, part)

            def spy(launch=launch, what=(name, part), **given):
                found.append(what)
                return launch(**given)

            monkeypatch.setitem(vars(impl), part, spy)
    return found


def chosen(rows, dtypes=FLOATS, op="adaln_modulate", backend="auto", impls=None):
    table = backends_of(op) if impls is None else impls
    return choose_name(op, table, backend, Request("cpu", dtypes, row=64, rows=rows))


def backends_of(op):
    return ops.tables()[op]


def test_the_nearest_size_decides(planted):
    # The middle of 8 and 1024, in powers of two, is 90.5.
    assert [chosen(rows) for rows in (0, 1, 8, 90, 91, 1024, 10**6)] == [
        *("reference", "reference", "reference", "reference"),
        *("cpu", "cpu", "cpu"),
    ]


def test_the_op_runs_where_the_table_says_and_its_gradient_too(planted, ran):
    for tokens, name in ((4, "reference"), (512, "cpu")):
        x, row = torch.randn(2, tokens, 64, requires_grad=True), torch.randn(2, 64)
        ran.clear()
        out = adaln_modulate(x, row, row)
        with use_backend("cpu" if name == "reference" else "reference"):
            out.sum().backward()
        assert ran == [(name, "forward"), (name, "backward")]


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_call_and_its_gradient_agree_with_the_table(planted, ran, dynamic):
    torch.compiler.reset()
    compiled = torch.compile(adaln_modulate, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens, name in ((4, "reference"), (512, "cpu"), (5, "reference")):
        x, row = torch.randn(2, tokens, 64, requires_grad=True), torch.randn(2, 64)
        ran.clear()
        compiled(x, row, row).sum().backward()
        assert ran == [(name, "forward"), (name, "backward")]


def test_sizes_that_are_symbols_leave_the_choice_to_the_run_only_where_sizes_decide(planted):
    many = Request("cpu", FLOATS, row=64, rows="a symbol stands here")
    table = backends_of("adaln_modulate")
    assert choose_backward("adaln_modulate", table, "auto", many) == "auto"
    assert choose_backward("adaln_modulate", table, "reference", many) == "reference"
    with use_backend("cpu"):
        assert choose_backward("adaln_modulate", table, "auto", many) == "cpu"
    table = backends_of("gated_residual_adaln")
    assert choose_backward("gated_residual_adaln", table, "auto", many) == "cpu"


def test_a_winner_that_cannot_serve_falls_to_the_next(plant):
    ranking = ("flash", "cuda", "triton", "reference")
    plant([entry("adaln_modulate", ("float32",), case(ranking, {}), kind="sm_90", device="cuda")])
    refusing = Impl(print, unsupported=lambda request: "page_size 16 is too small")
    impls = {"triton": Impl(print), "cuda": Impl(print), "reference": Impl(print)}
    request = Request("cuda", (torch.float32,), row=64, rows=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winners, "device_kind", lambda device: "sm_90")
        with_all = {**impls, "flash": Impl(print)}
        assert choose_name("adaln_modulate", with_all, "auto", request) == "flash"
        assert choose_name("adaln_modulate", impls, "auto", request) == "cuda"
        less = {**impls, "flash": refusing, "cuda": refusing}
        assert choose_name("adaln_modulate", less, "auto", request) == "triton"
        avoiding = choose_name("adaln_modulate", with_all, "auto", request, avoid=("flash",))
        assert avoiding == "cuda"


def test_what_was_not_measured_comes_before_plain_torch_unless_that_won():
    default = ("triton", "cuda", "cpu", "reference")
    assert winners.merge(("cuda", "reference"), default) == ("cuda", "triton", "cpu", "reference")
    assert winners.merge(("reference", "cuda"), default) == ("reference", "cuda", "triton", "cpu")
    assert winners.merge(("flex",), default) == default


def test_other_ops_dtypes_devices_and_pages_keep_the_preference_order(plant):
    wins = case(("reference", "cpu"), {})
    plant([
        entry("adaln_modulate", ("float32", "bfloat16"), wins),
        entry("gated_residual_adaln", ("float32", "float32"), wins, kind="z80"),
        entry("paged_attention", ("float32",), wins, kv_dtype="float8_e4m3fn"),
        entry("block_causal_attention", ("float32",), wins, gradient=True),
        entry("no_such_op", ("float32",), wins),
    ])  # fmt: skip
    assert chosen(8) == "cpu"
    assert chosen(8, dtypes=(torch.float32, torch.bfloat16)) == "reference"
    assert chosen(8, op="gated_residual_adaln") == "cpu"
    assert chosen(8, op="paged_attention") == "cpu"
    assert chosen(8, op="sample_tokens") == "cpu"
    assert chosen(8, op="block_causal_attention") == "cpu"
    trained = Request("cpu", (torch.float32,), 64, gradient=True)
    name = choose_name("block_causal_attention", backends_of("block_causal_attention"), "auto",
                       trained)  # fmt: skip
    assert name == "reference"
    assert winners.order("adaln_modulate", Request("cuda", FLOATS)) == winners.PREFERENCE


def test_a_size_that_is_not_given_is_not_compared_and_most_of_the_nearest_decide(plant):
    plant([
        entry(
            "adaln_modulate", ("float32", "float32"),
            case(("reference", "cpu"), {"row": 64, "rows": 8}, "a.json"),
            case(("reference", "cpu"), {"row": 64, "rows": 16}, "b.json"),
            case(("cpu", "reference"), {"row": 64, "rows": 32}, "c.json"),
            case(("cpu", "reference"), {"row": 4096, "rows": 32}, "d.json"),
        )
    ])  # fmt: skip
    found = winners.find("adaln_modulate", Request("cpu", FLOATS, row=64))
    assert (found.ranking, found.sources) == (("reference", "cpu"), ("a.json", "b.json"))
    # One against one, at the same distance: the preference order.
    even = winners.find("adaln_modulate", Request("cpu", FLOATS, row=512, rows=32))
    assert even.ranking == ("cpu", "reference")


def test_a_named_backend_wins_over_the_table(planted, monkeypatch):
    assert chosen(8, backend="cpu") == "cpu"
    with use_backend("cpu"):
        assert chosen(8) == "cpu"
        assert chosen(1024, backend="reference") == "reference"
    monkeypatch.setenv("VARIANT_BACKEND", "reference")
    assert chosen(1024) == "reference"
    assert explain("adaln_modulate").startswith("reference (asked for by name")


def test_explain_says_where_the_choice_comes_from(planted):
    few = explain("adaln_modulate", row=64, rows=8)
    assert few.startswith("reference (measured: kernels-planted.json; ")
    assert few.endswith("; cpu: measured slower)")
    assert explain("adaln_modulate", row=64, rows=1024).startswith("cpu (measured: kernels-planted")
    assert explain("sample_tokens").startswith("cpu (preference order")
    with pytest.raises(ValueError, match=r"explain: sizes must be among .*; got 'colour'"):
        explain("adaln_modulate", colour=3)


BROKEN = {
    "no JSON": ("{", "is no table of winners"),
    "newer": ('{"format": "variant-winners-2"}', "\"format\" must be 'variant-winners-1'"),
    "a list": ("[]", "got None"),
    "no entries": ('{"format": "variant-winners-1"}', "is broken as a table of winners"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_table_is_an_error_that_names_the_file(plant, kind):
    content, message = BROKEN[kind]
    plant(content)
    x, row = torch.zeros(1, 1, 64), torch.zeros(1, 64)
    with pytest.raises(ValueError) as error:
        adaln_modulate(x, row, row)
    assert str(winners.PATH) in str(error.value)
    assert message in str(error.value)
    adaln_modulate(x, row, row, backend="cpu")  # needs no table


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("ranking", ["warp"]),
        ("ranking", []),
        ("ranking", ["cpu", "cpu"]),
        ("sizes", {"colour": 1}),
        ("sizes", {"rows": 0}),
        ("sources", "one.json"),
    ],
)
def test_a_case_that_makes_no_sense_is_refused(plant, part, value):
    wrong = {**case(("cpu", "reference"), SMALL), part: value}
    plant([entry("adaln_modulate", ("float32", "float32"), wrong)])
    with pytest.raises(ValueError, match=r"winners\.json: is broken as a table of winners"):
        winners.read(winners.PATH)


def test_the_keys_of_paged_attention_are_those_its_table_has_room_for(plant, monkeypatch):
    asked = []
    monkeypatch.setattr(winners, "deciding", lambda device: {"paged_attention"})
    monkeypatch.setattr(
        winners, "order", lambda op, request: asked.append(request) or winners.ON_CPU
    )
    q, pages = torch.randn(3, 5, 2, 16), torch.randn(2, 9, 4, 2, 16)
    table = torch.arange(9, dtype=torch.int32).view(3, 3)
    paged_attention(q, *pages.unbind(0), table, torch.full((3,), 10, dtype=torch.int32))
    (request,) = asked
    assert (request.rows, request.queries, request.keys) == (6, 5, 12)
    assert (request.head_dim, request.page_size) == (16, 4)


def test_the_preference_order_is_one():
    assert select.PREFERENCE == winners.PREFERENCE
