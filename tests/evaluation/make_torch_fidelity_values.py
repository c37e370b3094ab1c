"""Expected values of torch-fidelity for seeded random weights, committed beside this file.

Not a test: run it in an environment that has torch-fidelity, which this project does not need.

    python -m venv fidelity && fidelity/bin/pip install torch torchvision torch-fidelity
    fidelity/bin/python tests/evaluation/make_torch_fidelity_values.py
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch_fidelity
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

sys.path.insert(0, str(Path(__file__).parent))
from seeded import feature_sets, fill, images

OUT = Path(__file__).with_name("torch_fidelity_values.json")
# Sizes below, at and above that of the network, and not square.
SIZES = [(32, 48), (256, 256), (320, 301)]
COUNT = 8
SPLIT = 4
# Of the features that the formulas alone are given.
ROWS, WIDTH, CLASSES = 300, 12, 20


def extractor():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pth"
        # The constructor loads a file: it is given one with its own names, made from a bare module.
        bare = FeatureExtractorInceptionV3.__new__(FeatureExtractorInceptionV3)
        original = FeatureExtractorInceptionV3.load_state_dict
        FeatureExtractorInceptionV3.load_state_dict = lambda self, state: None
        try:
            torch.save({}, path)
            bare.__init__("inception", ["2048", "logits_unbiased"], str(path))
        finally:
            FeatureExtractorInceptionV3.load_state_dict = original
    return fill(bare)


def run(network, pixels):
    spatial = {}
    hook = network.Mixed_6d.branch1x1.register_forward_hook(
        lambda module, given, output: spatial.update(output=output)
    )
    parts = []
    for batch in pixels.split(4):
        features, logits = network(batch)
        channels = spatial["output"][:, :7].permute(0, 2, 3, 1).flatten(1)
        parts.append((features, channels, logits))
    hook.remove()
    return [torch.cat(part) for part in zip(*parts, strict=True)]


def some(values):
    """Every 97th value of a matrix, flattened."""
    return [float(value) for value in values.flatten()[::97]]


def frechet(one, two):
    statistics = [fid_features_to_statistics(part.double()) for part in (one, two)]
    return fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]


def formulas(generated, real, split):
    """Metrics of (features, spatial features, logits) of generated and real images."""
    score = isc_features_to_metric(generated[2], len(generated[2]) // split, shuffle=False)
    options = {"prc_neighborhood": 3, "prc_batch_size": 10000}
    options |= {"save_cpu_ram": False, "verbose": False}
    shares = prc_features_to_metric(generated[0].double(), real[0].double(), **options)
    return {
        "fid": frechet(generated[0], real[0]),
        "sfid": frechet(generated[1], real[1]),
        "inception_score_mean": score["inception_score_mean"],
        "inception_score_std": score["inception_score_std"],
        "precision": shares["precision"],
        "recall": shares["recall"],
    }


def main():
    torch.set_num_threads(2)
    network = extractor()
    activations = []
    for place, (height, width) in enumerate(SIZES):
        outputs = run(network, images(100 + 10 * place, 1, height, width))
        activations.append([some(part) for part in outputs])
    network_values = formulas(
        run(network, images(500, COUNT, 32, 32)), run(network, images(600, COUNT, 32, 32)), SPLIT
    )
    features = [torch.from_numpy(part) for part in feature_sets(ROWS, WIDTH, CLASSES)]
    formula_values = formulas(features[:3], [*features[3:], features[2]], ROWS // 3)
    values = {
        "made_with": f"torch-fidelity {torch_fidelity.__version__}, torch {torch.__version__}, "
        f"numpy {np.__version__}",
        "sizes": SIZES,
        "count": COUNT,
        "split": SPLIT,
        "activations": activations,
        "network": network_values,
        "rows": [ROWS, WIDTH, CLASSES],
        "formulas": formula_values,
    }
    OUT.write_text(json.dumps(values, indent=1) + "\n")
    print({key: value for key, value in values.items() if key != "activations"})


if __name__ == "__main__":
    main()
