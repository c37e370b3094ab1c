"""The progressive training schedule."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from variant.training.schedule import (
    Phases,
    ScheduleSection,
    choose_depth,
    paper_phases,
    subnet_probability,
)


@pytest.mark.parametrize(
    ("depth", "refinement", "total"), [(16, 5, 25), (8, 8, 28), (4, 12, 32), (2, 15, 35)]
)
def test_phases_are_those_of_table_7(depth, refinement, total):
    assert paper_phases([depth]) == Phases(5, 15, refinement)
    assert paper_phases([depth]).total == total


def test_several_depths_take_the_refinement_of_the_shallowest():
    assert paper_phases([2, 4, 8, 16]) == Phases(5, 15, 15)


def test_depths_that_the_paper_does_not_list_are_refused():
    with pytest.raises(ValueError, match=r"got \[2, 3\]. Give the three phases explicitly"):
        paper_phases([2, 3])
    with pytest.raises(ValueError, match="refinement must be >= 0; got -1"):
        Phases(1, 1, -1)


@pytest.mark.parametrize(
    ("epoch", "expected"),
    [(0, 0.2), (4.999, 0.2), (5, 0.2), (12.5, 0.6), (20, 1.0), (34.9, 1.0)],
)
def test_probability_is_flat_then_linear_then_one(epoch, expected):
    assert subnet_probability(epoch, 0.2, 5, 15) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("epoch", "expected"), [(0, 0.2), (5, 0.2), (12.5, 0.5), (20, 0.8), (34.9, 0.8)]
)
def test_probability_ends_at_the_final_one(epoch, expected):
    assert subnet_probability(epoch, 0.2, 5, 15, 0.8) == pytest.approx(expected)
    section = ScheduleSection(
        depths=(2,), bridge=1, final_probability=0.8, joint=5, transition=15, refinement=15
    )
    assert section.probability(epoch) == pytest.approx(expected)


def test_a_final_probability_may_be_lower_than_the_first():
    assert subnet_probability(6, 0.8, 5, 2, 0.2) == pytest.approx(0.5)
    with pytest.raises(ValueError, match=r"p1 must be in \[0, 1\]; got -1"):
        subnet_probability(6, 0.8, 5, 2, -1)


def test_phases_of_no_length_are_skipped():
    assert subnet_probability(0, 0.2, 0, 0) == 1.0
    assert subnet_probability(0, 0.2, 0, 10) == pytest.approx(0.2)
    assert subnet_probability(3, 0.2, 3, 0) == 1.0


@given(st.floats(0, 60), st.floats(0, 60), st.floats(0, 1), st.floats(0, 9), st.floats(0, 9))
def test_probability_never_falls(first, second, p0, t1, t2):
    low, high = sorted((first, second))
    before, after = (subnet_probability(epoch, p0, t1, t2) for epoch in (low, high))
    assert p0 - 1e-12 <= before <= after + 1e-12 <= 1 + 2e-12


@pytest.mark.parametrize("arguments", [(0, 1.5, 5, 15), (-1, 0.2, 5, 15), (0, 0.2, -5, 15)])
def test_probability_refuses_values_out_of_range(arguments):
    with pytest.raises(ValueError, match="subnet_probability: "):
        subnet_probability(*arguments)


def test_choice_is_a_function_of_seed_and_step():
    first = [choose_depth(3, step, 0.5, (2, 4)) for step in range(50)]
    later = [choose_depth(3, step, 0.5, (2, 4)) for step in reversed(range(50))]
    assert first == later[::-1]
    assert first != [choose_depth(4, step, 0.5, (2, 4)) for step in range(50)]


def test_choice_follows_the_probability_and_is_uniform_among_depths():
    steps = 4000
    chosen = [choose_depth(0, step, 0.6, (2, 4, 8)) for step in range(steps)]
    # Five standard deviations of a binomial: 0.04.
    assert sum(depth is not None for depth in chosen) / steps == pytest.approx(0.6, abs=0.04)
    for depth in (2, 4, 8):
        assert chosen.count(depth) / steps == pytest.approx(0.2, abs=0.04)


def test_probabilities_0_and_1_and_no_depths():
    assert all(choose_depth(0, step, 1.0, (2,)) == 2 for step in range(200))
    assert all(choose_depth(0, step, 0.0, (2,)) is None for step in range(200))
    assert choose_depth(0, 0, 1.0, ()) is None


def test_a_long_list_of_depths_is_shortened():
    with pytest.raises(ValueError, match=r"got \[3, 3, .{,60}\.\.\.\. Give the three phases"):
        paper_phases([3] * 1000)
    with pytest.raises(TypeError, match="depths must be a list of integers; got 5"):
        paper_phases(5)
