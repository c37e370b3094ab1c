"""The work of a training step."""

import pytest
import torch
from small_models import small_model
from torch.utils.flop_counter import FlopCounterMode

from variant.models.flops import attention_flop, training_flop
from variant.models.presets import VAR_PRESETS
from variant_kernels import DepthSchedule


@pytest.mark.parametrize("depth", [None, 2])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_linear_work_of_a_step_is_what_torch_counts(depth, batch):
    model = small_model()
    var, schedule = model.var, model.var.schedule(depth)
    config = var.config
    length = var.layout.total - var.layout.tokens[0]
    x_teacher = torch.zeros(batch, length, config.vae_channels)
    labels_B = torch.zeros(batch, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        var(labels_B, x_teacher, schedule).sum().backward()
    # torch's counter does not know the operator of our attention.
    attention = 3 * attention_flop(config, schedule, batch, guidance=False)
    assert training_flop(config, schedule, batch) == counter.get_total_flops() + attention


def test_a_step_of_d30_takes_5_7_tflop_an_image():
    config = VAR_PRESETS["var-d30"]
    full = training_flop(config, DepthSchedule.full(30, 10))
    assert full == pytest.approx(5.68e12, rel=0.01)
    assert training_flop(config, DepthSchedule.full(30, 10), 128) == 128 * full
