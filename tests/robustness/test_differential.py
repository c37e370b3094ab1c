"""Random good cases of every op against float64; and the errors that must be found."""

import os

import pytest
import torch

from tests.robustness import differential
from tests.robustness.command import run_generator
from tests.robustness.forked import Failed, option, rng_of
from variant_kernels.ops import tables

CASES = option("CASES", 500)


@pytest.mark.timeout(10_000)
def test_backends_are_as_exact_as_plain_torch():
    run_generator("differential", "--cases", CASES)


@pytest.mark.timeout(10_000)
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
def test_triton_kernels_are_as_exact_as_plain_torch():
    # The interpreter takes about a second for a case.
    run_generator("differential", "--backend", "triton", "--cases", max(10, CASES // 20))


def test_every_op_has_cases():
    covered = {*differential.OPS, "append_paged_kv", "qk_norm_append_paged_kv", "sample_tokens"}
    assert covered == set(tables())


@pytest.mark.parametrize("name", differential.OPS)
def test_an_error_of_a_hundredth_is_found(name):
    rng = rng_of(0, 0)
    state = rng.getstate()

    def build(backend, factor=1.0):
        rng.setstate(state)
        case = differential.OPS[name](differential.Draw(rng, torch.float32), backend)
        ours = case.ours
        case.ours = lambda *inputs: tuple(factor * x for x in ours(*inputs))
        return case

    assert differential.check_case(build, "reference")
    with pytest.raises(Failed, match="error"):
        differential.check_case(lambda backend: build(backend, 1.01), "reference")


def test_the_worst_of_many_cases_is_judged():
    # In a single case three times plain torch's error may be chance; in the worst of all it is not.
    errors = [[("op cpu float32 out", 3e-6, 1e-6)]] * differential.LEAST_CASES
    assert len(differential.worst_of(errors)) == 1
    assert not differential.worst_of(errors[1:])
    assert not differential.worst_of([[("op cpu float32 out", 1.9e-6, 1e-6)]] * 50)
    assert not differential.worst_of([[("op cpu float32 dx", 2.9e-6, 1e-6)]] * 50)


@pytest.mark.parametrize("wrong", ["shift", "neighbour"])
def test_a_wrong_append_is_found(monkeypatch, wrong):
    def append(k, v, *, k_pages_PNHD, v_pages_PNHD, slots_BT, backend, **scales):
        slots = slots_BT[slots_BT >= 0]
        flat = k_pages_PNHD.flatten(0, 1) if wrong == "shift" else v_pages_PNHD.flatten(0, 1)
        flat[slots] = flat[slots] + 1

    for name in ("append_paged_kv", "qk_norm_append_paged_kv"):
        monkeypatch.setattr(differential, name, append)
    with pytest.raises((Failed, TypeError, RuntimeError)):
        check_all(differential.check_append)


def check_all(check):
    for number in range(20):
        check(differential.Draw(rng_of(0, number), torch.float32), "reference")


def test_a_wrong_token_is_found(monkeypatch):
    original = differential.sample_tokens

    def sample(logits, **options):
        drawn = original(logits, **options)
        return (drawn + 1) % logits.shape[-1]

    monkeypatch.setattr(differential, "sample_tokens", sample)
    with pytest.raises(Failed, match="sample_tokens"):
        check_all(differential.check_sampling)
