"""Random bad calls of every public name; and the faults that the generator must find."""

import os

import pytest
import torch

from tests.robustness import bad_calls, subjects
from tests.robustness.command import part, run_generator
from tests.robustness.forked import Failed, option
from tests.robustness.mutations import Spoilt

CALLS = option("CALLS", 5000)


@pytest.mark.timeout(10_000)
@pytest.mark.parametrize("index", range(2))
def test_bad_calls_are_refused_by_name(index):
    run_generator("bad_calls", *part(CALLS, index, 2))


@pytest.mark.timeout(10_000)
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
def test_bad_calls_of_triton_kernels_are_refused_by_name():
    # The interpreter takes seconds for a call that it accepts.
    run_generator("bad_calls", "--backend", "triton", "--only", ops(), "--cases", CALLS // 100)


def ops():
    return ",".join(name for name in subjects.MAKERS if subjects.is_op(name))


def test_every_public_name_has_a_generator():
    assert subjects.public_names() - set(subjects.NOT_CALLED) == set(subjects.MAKERS)


@pytest.mark.filterwarnings("ignore:.*assumed")
def test_good_arguments_are_taken(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    generator = bad_calls.Generator()
    draw = subjects.Draw(bad_calls.forked.rng_of(0, 0), generator.backends)
    torch.manual_seed(0)
    for name, make in subjects.MAKERS.items():
        target, arguments = make(draw)
        # Its files are missing; and dictionaries are spoilt by their makers.
        if name != "VARiant.from_var_checkpoint" and not name.endswith(".from_dict"):
            target(**arguments)


# --- faults that must be found --------------------------------------------------------------------


def check_with(monkeypatch, target, arguments, pools=(), name="qk_norm", **known):
    """Check a call of ``target``, one of whose arguments is spoilt, in place of an op's."""
    generator = bad_calls.Generator()
    key = next(iter(arguments))
    spoilt = [(key, Spoilt(arguments[key], "spoilt", **known))]
    call = bad_calls.Call(name, target, dict(arguments), list(pools), spoilt)
    monkeypatch.setattr(generator, "call", lambda seed, case: call)
    bad_calls.check(generator, 0, 0)


def raising(error):
    def qk_norm(**arguments):
        raise error

    return qk_norm


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (AttributeError("qk_norm: no"), "AttributeError"),
        (IndexError("qk_norm: no"), "IndexError"),
        (RuntimeError("qk_norm: no"), "RuntimeError"),
        (MemoryError("qk_norm: no"), "MemoryError"),
        (ValueError("x must be positive"), "does not name it"),
        (TypeError("qk_norm: x must\nbe"), "several lines"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_wrong_error_is_found(monkeypatch, error, text):
    with pytest.raises(Failed, match=text):
        check_with(monkeypatch, raising(error), {"x": 1})


def test_a_right_error_holds(monkeypatch):
    check_with(monkeypatch, raising(ValueError("qk_norm: x must be positive; got 1")), {"x": 1})
    gradient = raising(RuntimeError("qk_norm: has no gradient"))
    check_with(monkeypatch, gradient, {"x": 1}, gradient=True)


def test_a_value_that_is_taken_in_silence_is_found(monkeypatch):
    with pytest.raises(Failed, match="accepted; expected TypeError or ValueError about x"):
        check_with(monkeypatch, lambda x: None, {"x": "2"}, refuse=True)


def test_a_write_outside_a_pool_is_found(monkeypatch):
    draw = subjects.Draw(bad_calls.forked.rng_of(0, 0), ("auto",))
    pool = draw.pool(2, 2, 1, 16, dtype=torch.float32)

    def write_after(k_pages_PNHD):
        k_pages_PNHD.as_strided((1,), (1,), k_pages_PNHD.storage_offset() + 64).fill_(1)

    with pytest.raises(Failed, match="wrote outside a pool"):
        check_with(monkeypatch, write_after, {"k_pages_PNHD": pool}, draw.pools)


def test_a_write_before_an_error_is_found(monkeypatch):
    draw = subjects.Draw(bad_calls.forked.rng_of(0, 0), ("auto",))
    pool = draw.pool(2, 2, 1, 16, dtype=torch.float32)

    def write_and_raise(k_pages_PNHD):
        k_pages_PNHD[0] = 7
        raise ValueError("qk_norm: no")

    with pytest.raises(Failed, match="wrote to a pool, then raised"):
        check_with(monkeypatch, write_and_raise, {"k_pages_PNHD": pool}, draw.pools)


def test_a_write_to_an_input_is_found(monkeypatch):
    with pytest.raises(Failed, match="wrote to x, which is an input"):
        check_with(monkeypatch, lambda x: x.zero_(), {"x": torch.ones(3)})


def test_a_result_that_is_not_the_references_is_found(monkeypatch):
    generator = bad_calls.Generator("qk_norm", "cpu")
    number = next(n for n in range(1000) if good(generator, n))
    bad_calls.check(generator, 0, number)
    original = generator.call

    def wrong(seed, case):
        call = original(seed, case)
        target = call.target

        def qk_norm(**arguments):
            q, k = target(**arguments)
            return (q * 1.2, k) if arguments["backend"] == "cpu" else (q, k)

        call.target = qk_norm
        return call

    monkeypatch.setattr(generator, "call", wrong)
    with pytest.raises(Failed, match="differs from the reference backend"):
        bad_calls.check(generator, 0, number)


def good(generator, number):
    """Whether a case is an unspoilt float32 call of ``qk_norm``."""
    call = generator.call(0, number)
    same = call.name == "qk_norm" and not call.spoilt
    return same and call.arguments["q_BTHD"].dtype == torch.float32
