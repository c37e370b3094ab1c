"""Plain arguments: what counts as an integer or a number, and what the refusals say."""

import math

import numpy as np
import pytest
import torch

from variant_kernels.arguments import (
    boolean,
    choice,
    instance,
    integer,
    integers,
    real,
    sequence,
    shown,
    typed,
)

FIVES = (5, np.int64(5), np.uint8(5), torch.tensor(5), torch.tensor(5, dtype=torch.int16))
NO_INTEGERS = (
    5.0, True, np.bool_(True), torch.tensor(True), "5", b"5", None, [5], np.array([5, 6]),
    torch.tensor([5, 6]), torch.tensor(5.0), np.float32(5), 5j, object,
)  # fmt: skip
NO_NUMBERS = (
    True, np.bool_(True), torch.tensor(True), "0.5", b"1", None, [0.5], np.array([0.5, 1]),
    torch.tensor([0.5, 1]), torch.tensor([]), 1j, object,
    # float() takes these: it drops imaginary parts, and reads text.
    np.complex64(0.5), np.complex128(0.5 + 2j), torch.tensor(0.5 + 0j), np.array(0.5 + 2j),
    np.array("0.5"), np.array(True, dtype=object), np.timedelta64(3), bytearray(b"3"),
)  # fmt: skip


@pytest.mark.parametrize("value", FIVES, ids=repr)
def test_integers_of_python_numpy_and_torch(value):
    result = integer("op", "n", value, 0, 5)
    assert type(result) is int
    assert result == 5


@pytest.mark.parametrize("value", NO_INTEGERS, ids=repr)
def test_other_values_are_no_integers(value):
    with pytest.raises(TypeError, match=r"^op: n must be an integer in \[0, 9\] \(0 is all\); got"):
        integer("op", "n", value, 0, 9, "(0 is all)")


@pytest.mark.parametrize("value", [*FIVES, 5.0, np.float32(5), torch.tensor(5.0)], ids=repr)
def test_numbers_of_python_numpy_and_torch(value):
    result = real("op", "x", value, 0, 5)
    assert type(result) is float
    assert result == 5


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_other_values_are_no_numbers(value):
    with pytest.raises(TypeError, match=r"^op: x must be a finite number >= 0; got"):
        real("op", "x", value, 0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.1, 1.1, 10**400], ids=repr)
def test_numbers_out_of_range(value):
    with pytest.raises(ValueError, match=r"^op: x must be a finite number in \[0, 1\]; got"):
        real("op", "x", value, 0, 1)


def test_both_ends_of_a_range_are_within_it():
    assert [integer("op", "n", n, 2, 4) for n in (2, np.int64(2), 4, np.int64(4))] == [2, 2, 4, 4]
    assert [real("op", "x", x, 0.5, 1.5) for x in (0.5, 1.5)] == [0.5, 1.5]
    for value in (1, 5, np.int64(1), np.int64(5)):
        with pytest.raises(ValueError, match=rf"^op: n must be .* in \[2, 4\]; got {value}$"):
            integer("op", "n", value, 2, 4)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("inf")], ids=repr)
def test_what_is_not_finite_is_out_of_every_range(value):
    for bounds in ((), (0,), (None, 0)):
        with pytest.raises(ValueError, match=r"^op: x must be a finite number.*; got -?(inf|nan)$"):
            real("op", "x", value, *bounds)


def test_refusals_name_the_range_the_value_and_its_type():
    with pytest.raises(ValueError, match=r"^op: n must be an integer >= 1; got 0$"):
        integer("op", "n", 0, 1)
    with pytest.raises(
        ValueError, match=r"an integer in \[0, 2\^63 - 1\]; got 9223372036854775808"
    ):
        integer("op", "n", 2**63, 0, 2**63 - 1)
    with pytest.raises(TypeError, match=r"got '5' \(str\)$"):
        integer("op", "n", "5")
    with pytest.raises(TypeError, match=r"got Tensor of shape \(2,\) torch.float32$"):
        real("op", "x", torch.zeros(2))


def test_choices_and_instances():
    assert choice("op", "mode", "a", ("a", "b")) == "a"
    with pytest.raises(ValueError, match=r"^op: mode must be one of 'a', 'b'; got 'c'"):
        choice("op", "mode", "c", ("a", "b"))
    with pytest.raises(TypeError, match=r"^op: mode must be one of 'a', 'b'; got None"):
        choice("op", "mode", None, ("a", "b"))
    assert instance("op", "t", 3, int) == 3
    with pytest.raises(TypeError, match=r"^op: t must be of type int; got 'x' \(str\)$"):
        instance("op", "t", "x", int)
    with pytest.raises(
        TypeError, match=r"^op: t must be of type int; got 'x' \(str\)\. Convert it$"
    ):
        instance("op", "t", "x", int, "Convert it")


@pytest.mark.parametrize(
    "value", [True, np.bool_(True), torch.tensor(True), np.array(True)], ids=repr
)
def test_booleans_of_python_numpy_and_torch(value):
    assert boolean("op", "flag", value) is True


@pytest.mark.parametrize("value", [1, 0, None, "True", torch.tensor(1), np.array([True])], ids=repr)
def test_other_values_are_no_booleans(value):
    with pytest.raises(TypeError, match=r"^op: flag must be True or False; got"):
        boolean("op", "flag", value)


@pytest.mark.parametrize(
    "values",
    [[1, 2], (1, 2), range(1, 3), np.array([1, 2]), torch.tensor([1, 2]), [np.int64(1), 2]],
    ids=repr,
)
def test_lists_of_integers(values):
    assert list(sequence(values)) == [1, 2]
    result = integers("op", "sizes", values, 1, 2)
    assert result == (1, 2)
    assert {type(item) for item in result} == {int}


@pytest.mark.parametrize(
    "values",
    ["12", b"12", bytearray(b"12"), 12, None, {1, 2}, np.array(1), torch.tensor(1),
     np.array([1, 2], "m8")],
)  # fmt: skip
def test_other_values_are_no_lists_of_integers(values):
    assert sequence(values) is None
    with pytest.raises(TypeError, match=r"^op: sizes must be a list of integers; got"):
        integers("op", "sizes", values)


def test_refusals_of_lists_name_the_item():
    with pytest.raises(ValueError, match=r"^op: sizes\[1\] must be .* in \[1, 4\]; got 5$"):
        integers("op", "sizes", [4, 5], 1, 4)
    with pytest.raises(TypeError, match=r"^op: sizes\[0\] must be .* >= 1; got 'a' \(str\)"):
        integers("op", "sizes", ["a", 5], 1)


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [
        # The form 2^n - 1 is for limits that are hard to read otherwise.
        (0, 2**31 - 1, r"in \[0, 2\^31 - 1\]"),
        (0, 2**31, r"in \[0, 2147483648\]"),
        (0, 2**31 + 1, r"in \[0, 2147483649\]"),
        (0, 2**30 - 1, r"in \[0, 1073741823\]"),
        (0, 7, r"in \[0, 7\]"),
        (None, 7, "<= 7"),
        (7, None, ">= 7"),
    ],
)
def test_ranges_in_refusals(low, high, text):
    with pytest.raises(TypeError, match=rf"^op: n must be an integer {text}; got None"):
        integer("op", "n", None, low, high)


@pytest.mark.parametrize(
    ("bound", "text"),
    [
        (2.0**20, "1048576"),
        (1e-4, "0.0001"),
        (1e4, "10000"),
        (1.2345678, "1.2345678"),
        (1e300, "1e\\+300"),
    ],
)
def test_no_refused_number_lies_within_the_range_that_is_named(bound, text):
    with pytest.raises(ValueError, match=rf"in \[-{text}, {text}\]; got "):
        real("op", "x", math.nextafter(bound, math.inf), -bound, bound)


def test_long_values_are_cut_in_refusals():
    for length, text in ((58, repr("x" * 58)), (59, "'" + "x" * 56 + "...")):
        with pytest.raises(TypeError) as caught:
            integer("op", "n", "x" * length)
        assert str(caught.value).endswith(f"; got {text} (str)")
    array = np.zeros((2, 3))
    with pytest.raises(TypeError, match=r"got ndarray of shape \(2, 3\) float64$"):
        integer("op", "n", array)

    class Shaped:
        """An object with a shape that has no dtype."""

        shape = (2,)

    with pytest.raises(TypeError, match=r"got Shaped of shape \(2,\)$"):
        integer("op", "n", Shaped())


class _TwoLines:
    def __repr__(self):
        return "first\nsecond"


class _Broken:
    """An object of which nothing works."""

    def __index__(self):
        raise RuntimeError("first\nsecond")

    __float__ = __repr__ = __index__


@pytest.mark.parametrize("check", [integer, real, boolean, integers])
@pytest.mark.parametrize(
    "value",
    [
        _TwoLines(),
        _Broken(),
        torch.tensor(1, device="meta"),
        torch.ones(3, device="meta"),
        torch.ones(3, dtype=torch.int64).to_sparse(),
        torch.nn.Parameter(torch.ones(2, 2)),
        torch.tensor(1j),
        np.ma.masked,
    ],
    ids=lambda value: type(value).__name__,
)
def test_any_object_is_refused_in_one_line_that_names_the_argument(check, value):
    if check is real and value is np.ma.masked:
        pytest.skip("float() of it is nan, which is out of range")
    with pytest.raises(TypeError, match=r"^op: name(\[0\])? must be ") as raised:
        check("op", "name", value)
    assert "\n" not in str(raised.value)


def test_an_element_is_named_by_its_position():
    with pytest.raises(TypeError, match=r"^op: name\[1\] must be an integer; got 'x'"):
        integers("op", "name", [1, "x"])


def test_integers_of_many_digits_are_shown_by_their_bits():
    with pytest.raises(ValueError, match=r"got an integer of 200 bits"):
        integer("op", "n", 2**199, 0, 1)
    with pytest.raises(ValueError, match=rf"got {2**199 - 1}"[:40]):
        integer("op", "n", 2**199 - 1, 0, 1)


def test_values_are_shown_by_their_shape_only_if_they_have_one():
    class Shaped:
        def __init__(self, shape):
            self.shape = shape

        def __repr__(self):
            return "text"

    assert shown(Shaped((2, 3))) == "Shaped of shape (2, 3)"
    for none in ((), [2, 3], None, 4):
        assert shown(Shaped(none)) == "text"
    assert shown(np.zeros((2, 3), "f4")) == "ndarray of shape (2, 3) float32"
    assert shown(torch.tensor(5)) == "tensor(5)"
    assert typed(3) == "3 (int)"
    assert typed(np.zeros(2)) == "ndarray of shape (2,) float64"
