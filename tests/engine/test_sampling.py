"""How tokens are drawn: the limits of every number, and guidance and temperature by scale."""

import re

import numpy as np
import pytest
import torch

from variant.engine.generation import Sampling

CPU = torch.device("cpu")


def test_the_first_and_the_last_value_of_each_range():
    low = Sampling(cfg=0, top_k=0, top_p=0, seed=0, temperature=1e-4)
    assert (low.cfg, low.top_k, low.top_p, low.seed, low.temperature) == (0, 0, 0, 0, 1e-4)
    high = Sampling(cfg=1e4, top_k=2**31 - 1, top_p=1, seed=2**63 - 1, temperature=1e4)
    assert (high.cfg, high.top_k, high.top_p) == (1e4, 2**31 - 1, 1)
    assert (high.seed, high.temperature) == (2**63 - 1, 1e4)
    for name, below, above, text in (
        ("cfg", -0.1, 10000.1, "cfg must be a finite number in [0, 10000]"),
        ("top_k", -1, 2**31, "top_k must be an integer in [0, 2^31 - 1] (0 keeps all)"),
        ("top_p", -0.1, 1.1, "top_p must be a finite number in [0, 1] (0 keeps all)"),
        ("seed", -1, 2**63, "seed must be an integer in [0, 2^63 - 1]"),
        ("temperature", 0, 10000.1, "temperature must be a finite number in [0.0001, 10000] "
         "(top_k=1 draws the likeliest token)"),
    ):  # fmt: skip
        for value in (below, above):
            with pytest.raises(ValueError, match=re.escape(f"generate: {text}; got {value}")):
                Sampling(**{name: value})
    for name, value in (("cfg", [1, "2"]), ("temperature", [1.0, None]), ("more_smooth", 1)):
        with pytest.raises(TypeError, match=f"generate: {name}"):
            Sampling(**{name: value})


def test_numbers_are_kept_as_those_of_python():
    sampling = Sampling(
        cfg=np.float32(2), top_k=torch.tensor(3), seed=np.int64(4), temperature=np.array([1, 2.0])
    )
    assert (sampling.cfg, sampling.top_k, sampling.seed) == (2, 3, 4)
    assert sampling.temperature == (1.0, 2.0)
    assert {type(sampling.cfg), *map(type, sampling.temperature)} == {float}
    assert {type(sampling.top_k), type(sampling.seed)} == {int}


def test_a_seed_is_drawn_where_none_is_given():
    torch.manual_seed(1)
    first, second = Sampling(), Sampling()
    assert 0 <= first.seed != second.seed < 2**63
    torch.manual_seed(1)
    assert Sampling().seed == first.seed
    generator = torch.Generator()
    assert Sampling(generator=generator).seed is None
    with pytest.raises(ValueError, match="seed and generator exclude each other"):
        Sampling(seed=0, generator=generator)
    with pytest.raises(TypeError, match="generator must be of type Generator; got 3"):
        Sampling(generator=3)


def test_guidance_rises_linearly_and_a_list_is_used_as_it_is():
    rising = Sampling(cfg=3.0, seed=0)
    assert [rising.guidance(k, 4) for k in range(4)] == [0, 1, 2, 3]
    assert rising.guidance(0, 1) == 0
    listed = Sampling(cfg=[2, 0, 1], seed=0)
    assert [listed.guidance(k, 3) for k in range(3)] == [2, 0, 1]
    none = Sampling(cfg=0, seed=0)
    assert [none.guidance(k, 3) for k in range(3)] == [0, 0, 0]
    guided = [Sampling(cfg=cfg, seed=0).guided for cfg in (3.0, 0, [0, 0], [0, 1], 0.1)]
    assert guided == [True, False, False, True, True]


def test_one_temperature_for_all_scales_or_one_for_each():
    assert [Sampling(temperature=0.5).temperature_at(k) for k in range(2)] == [0.5, 0.5]
    assert [Sampling(temperature=[1, 2]).temperature_at(k) for k in range(2)] == [1, 2]


def test_lists_must_be_as_long_as_the_model_has_scales():
    Sampling(cfg=[1, 2, 3], temperature=[1, 2, 3]).check_run(3, CPU)
    Sampling(cfg=1.0).check_run(3, CPU)
    for name in ("cfg", "temperature"):
        text = rf"generate: {name} must be one number, or one per scale \(3\); got a list of 2"
        with pytest.raises(ValueError, match=text):
            Sampling(**{name: [1, 2]}).check_run(3, CPU)
        with pytest.raises(ValueError, match=f"{name} must be .* per scale; got an empty list"):
            Sampling(**{name: []})
    Sampling(generator=torch.Generator()).check_run(3, CPU)
    with pytest.raises(ValueError, match=r"on the device of the weights \(cuda:0\); got cpu"):
        Sampling(generator=torch.Generator()).check_run(3, torch.device("cuda", 0))


def test_a_graph_reads_guidance_and_seed_from_tensors():
    cfg, seed = torch.tensor(2.0), torch.tensor(5)
    plain = Sampling(cfg=1.0, seed=1, top_k=3)
    given = plain.with_tensors(cfg, seed)
    assert given.cfg is cfg
    assert given.seed is seed
    assert (plain.cfg, plain.seed, given.top_k, given.guided) == (1.0, 1, 3, True)
    assert given.guidance(1, 3) == 1.0
    listed = Sampling(cfg=[1, 2], seed=1).with_tensors(cfg, seed)
    assert (listed.cfg, listed.seed) == ((1.0, 2.0), seed)


def test_what_a_graph_fixes_and_what_it_cannot_draw():
    assert Sampling(cfg=2.0, top_k=3, top_p=0.5).recorded == (True, 3, 0.5, 1.0, None)
    assert Sampling(cfg=[0, 0], temperature=2).recorded == (False, 0, 0, 2, (0, 0))
    assert Sampling(seed=1).can_be_captured
    assert not Sampling(generator=torch.Generator()).can_be_captured
    assert not Sampling(more_smooth=True).can_be_captured
