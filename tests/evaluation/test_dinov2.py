"""DINOv2's networks beside the published code, with seeded random weights.

The expected values come from make_dinov2_values.py. A test with the published weights of ViT-L/14
runs where VARIANT_DINOV2 names their file.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from seeded import fill, images, layout_sha256, noise

from variant.errors import UserError
from variant.evaluation.dinov2 import SIZES, DINOv2, Size, SwiGLU, size_of
from variant.evaluation.features import load_network
from variant.paths import file_sha256

VALUES = json.loads(Path(__file__).with_name("dinov2_values.json").read_text())
SMALL = SIZES[0]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("dinov2") / "weights.pth"
    torch.save(fill(DINOv2(SMALL)).state_dict(), path)
    return path


def test_features_are_those_of_the_published_code(weights):
    network = load_network("dinov2", weights)
    for place, (size, expected) in enumerate(zip(VALUES["sizes"], VALUES["features"], strict=True)):
        features = network.run(images(300 + 10 * place, 1, *size)).features_BD[0, ::7]
        values = torch.tensor(expected)
        assert values.std() > 0.1, "the expected features must not be constant"
        torch.testing.assert_close(features, values, rtol=1e-4, atol=1e-4)


def test_a_batch_gives_the_features_of_its_images(weights):
    network = load_network("dinov2", weights)
    batch = images(340, 2, 40, 30)
    alone = torch.cat([network.run(image).features_BD for image in batch.split(1)])
    torch.testing.assert_close(network.run(batch).features_BD, alone, rtol=1e-4, atol=1e-4)


def test_names_and_shapes_of_every_size_are_those_of_the_published_code():
    with torch.device("meta"):
        layouts = {size.name: layout_sha256(DINOv2(size)) for size in SIZES}
        found = {size.name: size_of(DINOv2(size).state_dict()).name for size in SIZES}
    assert layouts == VALUES["layouts"]
    assert found == {name: name for name in layouts}


def test_the_gated_mlp_is_that_of_the_published_code():
    gated = fill(SwiGLU(96))
    output = gated(torch.from_numpy(noise(350, 2, 96)).float())
    torch.testing.assert_close(output.flatten(), torch.tensor(VALUES["gated"]))


def test_the_distance_is_named_by_its_network(weights):
    network = load_network("dinov2", weights)
    assert network.distance == "FD-DINOv2 (ViT-S/14)"
    assert network.sha256 == file_sha256(weights)


def test_other_files_are_refused_by_name(tmp_path, weights):
    with pytest.raises(UserError, match=r"must name the file dinov2_vitl14_pretrain\.pth"):
        load_network("dinov2")
    state = torch.load(weights)
    cases = [
        ({"a": torch.zeros(1)}, r"none of DINOv2's networks .*: 0 blocks of width None"),
        ({1: torch.zeros(1)}, "0 blocks of width None"),
        (DINOv2(Size("other", 1, 64)).state_dict(), r"none of .*: 1 blocks of width 64"),
        (state | {"register_tokens": torch.zeros(1, 4, 384)}, "it has register tokens"),
        ({k: v for k, v in state.items() if k != "norm.bias"}, r"norm\.bias missing"),
        (state | {"norm.bias": torch.zeros(3)}, r"norm\.bias of another shape"),
    ]
    for place, (content, message) in enumerate(cases):
        path = tmp_path / f"{place}.pth"
        torch.save(content, path)
        with pytest.raises(UserError, match=message):
            load_network("dinov2", path)


def test_images_of_another_kind_are_refused(weights):
    with pytest.raises(TypeError, match=r"must be uint8, 0 to 255; got torch.float32"):
        load_network("dinov2", weights).run(torch.zeros(1, 3, 8, 8))


@pytest.mark.skipif("VARIANT_DINOV2" not in os.environ, reason="VARIANT_DINOV2 names no file")
def test_the_published_weights_load():
    network = load_network("dinov2", os.environ["VARIANT_DINOV2"])
    assert network.distance == "FD-DINOv2"
    features = network.run(images(1, 2, 256, 256)).features_BD
    assert features.shape == (2, 1024)
    assert features.isfinite().all()
