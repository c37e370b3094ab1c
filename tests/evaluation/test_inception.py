"""The Inception network of 2015 beside torch-fidelity's, with seeded random weights.

The expected values come from make_torch_fidelity_values.py. A test with the published weights runs
where VARIANT_INCEPTION names their file.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from seeded import fill, images

from variant.errors import UserError
from variant.evaluation.features import INCEPTION_SHA256, inception_network, load_network
from variant.evaluation.frechet import FeatureStatistics, frechet_distance
from variant.evaluation.inception import Inception2015, resize_as_tensorflow
from variant.evaluation.scores import inception_score, precision_recall
from variant.paths import file_sha256

VALUES = json.loads(Path(__file__).with_name("torch_fidelity_values.json").read_text())


@pytest.fixture(scope="module")
def network():
    return fill(Inception2015())


def run(network, pixels):
    outputs = [network(batch) for batch in pixels.split(3)]
    return [
        torch.cat([getattr(output, name) for output in outputs])
        for name in ("features_BD", "spatial_BD", "logits_BC")
    ]


def test_activations_are_those_of_torch_fidelity(network):
    for place, (size, expected) in enumerate(
        zip(VALUES["sizes"], VALUES["activations"], strict=True)
    ):
        outputs = run(network, images(100 + 10 * place, 1, *size))
        for output, values in zip(outputs, expected, strict=True):
            values = torch.tensor(values)
            assert values.std() > 0.1, "the expected activations must not be constant"
            # Convolutions of other instruction sets round differently, by up to 1.4e-5.
            torch.testing.assert_close(output.flatten()[::97], values, rtol=1e-5, atol=5e-5)


def test_metrics_are_those_of_torch_fidelity(network):
    count, expected = VALUES["count"], VALUES["network"]
    generated = run(network, images(500, count, 32, 32))
    real = run(network, images(600, count, 32, 32))
    distances = [
        frechet_distance(*(FeatureStatistics.of(part).gaussian() for part in pair))
        for pair in zip(generated[:2], real[:2], strict=True)
    ]
    assert distances[0] == pytest.approx(expected["fid"], abs=0.01)
    assert distances[1] == pytest.approx(expected["sfid"], abs=0.05)
    score = inception_score(generated[2], VALUES["split"])
    assert score.mean == pytest.approx(expected["inception_score_mean"], abs=1e-4)
    shares = precision_recall(generated_ND=generated[0], real_MD=real[0])
    assert shares.precision == pytest.approx(expected["precision"], abs=0.001)
    assert shares.recall == pytest.approx(expected["recall"], abs=0.001)


def test_the_resize_is_that_of_tensorflow_1():
    """Pixel i of the output lies at i times the ratio: the first one is the first of the input."""
    line = torch.tensor([0.0, 10.0, 20.0, 30.0]).reshape(1, 1, 1, 4).expand(1, 1, 4, 4)
    wide = resize_as_tensorflow(line, 8)[0, 0, 0]
    assert wide.tolist() == [0.0, 5.0, 10.0, 15.0, 20.0, 25.0, 30.0, 30.0]
    narrow = resize_as_tensorflow(line.contiguous(), 2)[0, 0, 0]
    assert narrow.tolist() == [0.0, 20.0]


def test_images_of_another_kind_are_refused(network):
    with pytest.raises(TypeError, match=r"must be uint8, 0 to 255; got torch.float32"):
        network(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"must be \(B, 3, Y, X\); got \(1, 1, 8, 8\)"):
        network(torch.zeros(1, 1, 8, 8, dtype=torch.uint8))


def test_weights_are_checked(network, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(network.state_dict(), path)
    device = torch.device("cpu")
    with pytest.raises(UserError, match=f"SHA-256 must be {INCEPTION_SHA256}"):
        load_network("inception", path)
    with pytest.raises(UserError, match="--weights must name the file weights-inception"):
        load_network("inception")
    loaded = inception_network(path, device, file_sha256(path))
    pixels = images(1, 1, 32, 32)
    assert loaded.run(pixels).features_BD.equal(network(pixels).features_BD)
    state = network.state_dict()
    del state["Mixed_6d.branch1x1.conv.weight"]
    torch.save(state, path)
    with pytest.raises(UserError, match=r"Mixed_6d.branch1x1.conv.weight missing"):
        inception_network(path, device, file_sha256(path))


@pytest.mark.skipif("VARIANT_INCEPTION" not in os.environ, reason="VARIANT_INCEPTION is not set")
def test_the_published_weights_load():
    network = load_network("inception", os.environ["VARIANT_INCEPTION"])
    output = network.run(images(1, 2, 299, 299))
    assert network.distance == "FID"
    assert output.features_BD.shape == (2, 2048)
    # Classes of ImageNet: features are not negative, and the classes differ.
    assert output.features_BD.min() >= 0
    assert output.logits_BC.softmax(1).max() > 0.01
