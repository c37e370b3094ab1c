"""Arguments ``dtype`` and ``device``: names, and what is refused."""

import pytest
import torch
from small_models import small_model

from variant import Engine, VARiant
from variant.models.placement import DTYPES, check_device, check_dtype


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("bfloat16", torch.bfloat16),
        ("torch.bfloat16", torch.bfloat16),
        (torch.float16, torch.float16),
        ("half", torch.float16),
        ("float", torch.float32),
        (None, None),
        ("auto", None),
    ],
)
def test_a_dtype_is_given_as_itself_or_by_name(given, expected):
    assert check_dtype("op", given) is expected


@pytest.mark.parametrize("given", ["bf17", "", "int8", torch.int8, torch.float64, "float64"])
def test_another_dtype_is_refused_and_the_known_ones_are_listed(given):
    with pytest.raises(ValueError, match=r"^op: dtype must be one of float32, bfloat16, float16; "):
        check_dtype("op", given)


@pytest.mark.parametrize("given", [16, float, ["float32"], torch.zeros(1)])
def test_what_is_no_dtype_is_refused_by_its_type(given):
    with pytest.raises(TypeError, match=r"^op: torch_dtype must be .*a torch.dtype or its name"):
        check_dtype("op", given, name="torch_dtype")


@pytest.mark.parametrize("dtype", DTYPES)
def test_engines_take_the_name_of_every_dtype(dtype):
    model = small_model()
    name = str(dtype).removeprefix("torch.")
    assert model.engine(name) is model.engine(dtype)
    assert Engine(model.var, model.vae, dtype=name).dtype is dtype
    assert model.generate(0, seed=0, dtype=name).stats.dtype == name


def test_an_engine_refuses_other_dtypes_also_those_of_the_weights():
    model = small_model()
    for dtype in ("float64", torch.int8):
        with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16"):
            model.generate(0, dtype=dtype)
        with pytest.raises(ValueError, match="Engine: dtype must be one of"):
            Engine(model.var, model.vae, dtype=dtype)
    model.var.double()
    with pytest.raises(ValueError, match="the weights are float64, in which no engine runs"):
        model.generate(0)


def test_a_device_that_is_here_is_taken():
    assert check_device("op", None) is None
    for given in ("cpu", torch.device("cpu")):
        assert check_device("op", given) == torch.device("cpu")


@pytest.mark.parametrize("given", ["cuda", "cuda:0", "cuda:7", torch.device("cuda"), 0])
@pytest.mark.parametrize(
    ("built", "reason"), [(False, "torch was built without CUDA"), (True, "torch sees no GPU")]
)
def test_a_gpu_that_is_not_there_is_refused_with_a_remedy(monkeypatch, given, built, reason):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: built)
    with pytest.raises(ValueError, match=rf'^op: device "cuda.*{reason}; give "cpu"$'):
        check_device("op", given)


def test_an_index_beyond_the_gpus_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match='torch has 2 GPUs; give "cuda:0" to "cuda:1" or "cpu"'):
        check_device("op", "cuda:2")


@pytest.mark.parametrize("given", ["banana", "cpu:x", "vulkan", "privateuseone", -3])
def test_no_such_device(given):
    with pytest.raises(ValueError, match=r"^op: device "):
        check_device("op", given)


@pytest.mark.parametrize("given", [1.5, True, ["cpu"], {"cuda:0": "cpu"}])
def test_what_is_no_device_is_refused_by_its_type(given):
    with pytest.raises(TypeError, match=r"^op: device must be a device such as"):
        check_device("op", given)


def test_a_pair_of_other_classes_is_refused():
    model = small_model()
    with pytest.raises(TypeError, match=r"^VARiant: vae must be of type VQVAE; got 3 \(int\)"):
        VARiant(model.var, 3)
    with pytest.raises(TypeError, match=r"^VARiant: var must be of type VAR.*variant.accelerate"):
        VARiant(torch.nn.Linear(2, 2), model.vae)
    with pytest.raises(TypeError, match=r"^Engine: var must be of type VAR"):
        Engine(model.vae, model.var)
