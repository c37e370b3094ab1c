"""Expected features of the published DINOv2 code for seeded random weights, committed beside this.

Not a test: run it in an environment that has torch and torchvision, with a checkout of
facebookresearch/dinov2.

    python -m venv dino && dino/bin/pip install torch torchvision
    PYTHONPATH=CHECKOUT dino/bin/python tests/evaluation/make_dinov2_values.py
"""

import json
import sys
from pathlib import Path

import torch
import torchvision
from dinov2.hub import backbones
from dinov2.layers import SwiGLUFFNFused
from torchvision.transforms import Compose, InterpolationMode, Normalize, Resize, ToTensor
from torchvision.transforms.functional import to_pil_image

sys.path.insert(0, str(Path(__file__).parent))
from seeded import fill, images, layout_sha256, noise

OUT = Path(__file__).with_name("dinov2_values.json")
# Sizes below, at and above that of the network, and not square.
SIZES = [(32, 48), (224, 224), (256, 301)]


def main():
    torch.set_num_threads(2)
    network = fill(backbones.dinov2_vits14(pretrained=False)).eval()
    # As dgm-eval (Stein et al. 2023) prepares images.
    prepare = Compose(
        [
            Resize((224, 224), InterpolationMode.BICUBIC),
            ToTensor(),
            Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    features = []
    for place, size in enumerate(SIZES):
        picture = to_pil_image(images(300 + 10 * place, 1, *size)[0])
        with torch.no_grad():
            features.append([float(value) for value in network(prepare(picture)[None])[0, ::7]])
    layouts = {}
    for letter in "sblg":
        with torch.device("meta"):
            network = getattr(backbones, f"dinov2_vit{letter}14")(pretrained=False)
        layouts[f"ViT-{letter.upper() if letter != 'g' else 'g'}/14"] = layout_sha256(network)
    gated = fill(SwiGLUFFNFused(96, 4 * 96))
    values = {
        "made_with": f"torch {torch.__version__}, torchvision {torchvision.__version__}",
        "sizes": SIZES,
        "features": features,
        "layouts": layouts,
        "gated": gated(torch.from_numpy(noise(350, 2, 96)).float()).flatten().tolist(),
    }
    OUT.write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    main()
