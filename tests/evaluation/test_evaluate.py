"""``variant eval``: metrics, their record, what differs, and what bad input gets."""

import dataclasses
import io
import json
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from seeded import images as seeded_images
from small_models import small_model

from variant.cli import evaluate as evaluate_module
from variant.cli import evaluate_depths
from variant.cli.evaluate import reference_of
from variant.cli.main import main
from variant.cli.options import Eval
from variant.cli.output import _Console
from variant.data.config import DataSection
from variant.data.digits import DigitsData
from variant.errors import UserError
from variant.evaluation import report
from variant.evaluation.classifier import load_classifier, save_classifier, train_classifier
from variant.evaluation.features import FeatureNetwork, Features
from variant.evaluation.frechet import FeatureStatistics, Gaussian, frechet_distance, total
from variant.evaluation.image_sets import Reference, array_images, open_images, open_reference
from variant.evaluation.report import Metric, evaluate
from variant.evaluation.scores import PrecisionRecall, precision_recall
from variant.folder_lock import saving
from variant.paths import file_sha256
from variant.training.recipe import load_recipe
from variant_kernels import DepthSchedule

CPU = torch.device("cpu")


def patches(images_B3YX):
    """Means of 2 x 2 parts of an image: 12 features."""
    return torch.nn.functional.adaptive_avg_pool2d(images_B3YX.float(), 2).flatten(1) / 255


NETWORK = FeatureNetwork(
    "patches", "FD (patches)", "", lambda images: Features(patches(images)), CPU
)


def array(seed, count, side=16):
    return seeded_images(seed, count, side, side).permute(0, 2, 3, 1).numpy()


def write_folder(folder, pixels, name="{index:05d}_class{label}.png", classes=4):
    folder.mkdir(exist_ok=True)
    for index, image in enumerate(pixels):
        path = folder / name.format(index=index, label=index % classes)
        Image.fromarray(image).save(path)
    return folder


def write_tar(path, pixels):
    with tarfile.open(path, "w") as archive:
        for index, image in enumerate(pixels):
            content = io.BytesIO()
            Image.fromarray(image).save(content, "PNG")
            entry = tarfile.TarInfo(f"{index:06d}.png")
            entry.size = len(content.getvalue())
            archive.addfile(entry, io.BytesIO(content.getvalue()))
    return path


def metric(result, name):
    return next(metric for metric in result.metrics if metric.name == name)


def test_every_form_of_the_same_images_gives_the_same_metrics(tmp_path):
    pixels, real = array(1, 40), array(2, 50)
    np.savez(tmp_path / "a.npz", pixels, np.arange(40) % 4)
    np.savez(tmp_path / "real.npz", arr_0=real)
    paths = [
        tmp_path / "a.npz",
        write_folder(tmp_path / "folder", pixels),
        write_tar(tmp_path / "a.tar", pixels),
    ]
    reference = tmp_path / "real.npz"
    results = [evaluate(open_images(path), open_reference(reference), NETWORK) for path in paths]
    assert len({result.images_sha256 for result in results}) == 1
    assert results[0].metrics == results[1].metrics
    # A .tar without labels has other blocks, and therefore another interval.
    values = [[(each.name, each.value) for each in result.metrics] for result in results]
    for one, other in zip(values[0], values[2], strict=True):
        assert other == (one[0], pytest.approx(one[1], abs=1e-12))
    features = [patches(torch.from_numpy(x).permute(0, 3, 1, 2)) for x in (pixels, real)]
    expected = frechet_distance(*(FeatureStatistics.of(x).gaussian() for x in features))
    result = metric(results[0], "FD (patches)")
    assert result.value == pytest.approx(expected, abs=1e-9)
    assert result.low <= result.value <= result.high
    assert (result.count, result.floor_count) == (40, 25)


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_the_batch_size_changes_no_metric(batch):
    def run(images_B3YX):
        features = patches(images_B3YX)
        return Features(features, features[:, :7] ** 2, 3 * features)

    network = FeatureNetwork("inception-2015", "FID", "", run, CPU)
    images, reference = array_images("a", array(1, 40)), array(2, 50)
    results = [
        evaluate(images, Reference("r", array_images("r", reference)), network, batch=size)
        for size in (batch, 40)
    ]
    names = [each.name for each in results[0].metrics]
    assert names == ["FID", "sFID", "Inception Score", "precision", "recall"]
    for one, other in zip(results[0].metrics, results[1].metrics, strict=True):
        assert one.value == pytest.approx(other.value, abs=1e-9)


@pytest.mark.parametrize("order", ["in turn", "sorted", "mixed"])
def test_the_interval_is_that_of_classes_of_equal_share_whatever_their_order(order, monkeypatch):
    """Ten far classes, in turn as `variant sample` writes them: every tenth image is one class."""
    generator = torch.Generator().manual_seed(0)
    centres = 3 * torch.randn(10, 6, generator=generator)
    classes = torch.arange(500) % 10

    def draw():
        return centres[classes] + torch.randn(500, 6, generator=generator)

    monkeypatch.setattr(report, "precision_recall", lambda **sets: PrecisionRecall(0, 0))
    real = torch.cat([draw() for _ in range(4)])
    labels = {
        "in turn": classes,
        "sorted": classes.sort().values,
        "mixed": classes[torch.randperm(500, generator=generator)],
    }[order]
    # The features travel in the pixels' place; a batch is the whole set.
    results = []
    for _ in range(30):
        own = draw()[classes.argsort(stable=True)][labels.argsort(stable=True).argsort()]
        given = iter((own, real))
        network = FeatureNetwork(
            "f", "FD", "", lambda images, given=given: Features(next(given)), CPU
        )
        images = array_images("a", array(1, 500, side=1), labels.numpy())
        reference = Reference("r", array_images("r", array(2, 2000, side=1)))
        results.append(metric(evaluate(images, reference, network, batch=2000), "FD"))
    half = np.mean([result.high - result.value for result in results])
    spread = 1.96 * np.std([result.value for result in results])
    assert 0.6 * spread < half < 1.7 * spread
    limits = [result.infinite for result in results]
    assert abs(np.mean(limits)) < 0.5 * np.mean([result.value for result in results])


def test_every_value_has_its_interval_and_what_is_compared_a_floor():
    """The Inception Score of one split, by 40 draws; precision and recall of real halves."""
    generator = torch.Generator().manual_seed(0)
    scores, halves = [], []
    pixels = torch.from_numpy(array(2, 90)).permute(0, 3, 1, 2)
    real = patches(pixels)
    for _ in range(40):

        def run(images_B3YX):
            logits = 2 * torch.randn(len(images_B3YX), 5, generator=generator)
            return Features(patches(images_B3YX), None, logits)

        network = FeatureNetwork("c", "FD (c)", "", run, CPU)
        images, reference = (array_images("a", array(seed, 90)) for seed in (1, 2))
        result = evaluate(images, Reference("r", reference), network, batch=90)
        score = metric(result, "class score (c)")
        scores.append(score.value)
        halves.append(score.high - score.value)
    assert 0.6 < np.mean(halves) / (1.96 * np.std(scores)) < 1.7
    order = torch.randperm(90, generator=torch.Generator().manual_seed(0))
    expected = precision_recall(generated_ND=real[order[:45]], real_MD=real[order[45:]])
    for name in ("precision", "recall"):
        found = metric(result, name)
        assert (found.floor, found.floor_count) == (getattr(expected, name), 45)
    for each in result.metrics:
        assert each.low <= each.value <= each.high


@pytest.mark.parametrize("splits", [1, 2, 3])
def test_the_interval_of_the_inception_score_covers_with_few_splits(splits, monkeypatch):
    """80 draws; the deviation of two splits covered 70 % in place of 95 %."""
    count = 60
    monkeypatch.setattr(report, "SPLIT", -(-count // splits))
    generator = torch.Generator().manual_seed(0)
    images = array_images("a", array(1, count, side=1))
    found = []
    for _ in range(80):
        logits = 3 * torch.randn(count, 5, generator=generator)
        found += report._class_metrics(images, NETWORK, logits)
    truth = np.mean([each.value for each in found])
    assert np.mean([each.low <= truth <= each.high for each in found]) >= 0.88
    # The jackknife leaves images out of the same splits.
    halves = np.mean([each.high - each.value for each in found])
    assert halves < 1.3 * 2.262157 * np.std([each.value for each in found])


@pytest.mark.parametrize("count", [50, 36, 500])
def test_real_halves_have_the_same_share_of_each_class(count):
    """So do generated images, whose classes take turns."""
    labels = [0] * 30 + [1] * 44 + [2] * 26
    rng = np.random.default_rng(0)
    order = rng.permutation(100)
    labels = [labels[index] for index in order]
    # Features that tell the class and the image.
    real = torch.stack((torch.tensor(labels).double(), torch.arange(100.0).double()), 1)
    one, other = report._halves(real, count, labels)
    wanted = min(count, 50)
    assert len(one) == len(other) == wanted
    assert not set(one[:, 1].tolist()) & set(other[:, 1].tolist())
    for label, share in enumerate((0.3, 0.44, 0.26)):
        for half in (one, other):
            assert abs(int((half[:, 0] == label).sum()) - share * wanted) <= 1
    # The shares of random halves are no part of the floor, nor of its bound.
    noise = torch.from_numpy(rng.normal(size=100))
    far = torch.stack((100 * torch.tensor(labels).double(), noise), 1)
    assert report.floor_of(far, 50, labels) < 1 < 10 < report.floor_of(far, 50)


def test_the_labels_of_the_reference_reach_its_halves():
    labels = [index // 20 for index in range(40)]
    pixels = array(2, 40) // 2 + np.array(labels, np.uint8)[:, None, None, None] * 120
    with_labels = Reference("r", array_images("r", pixels, np.array(labels)))
    result = evaluate(array_images("a", array(1, 40)), with_labels, NETWORK)
    real = patches(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    distance, precision = metric(result, "FD (patches)"), metric(result, "precision")
    assert distance.floor == pytest.approx(report.floor_of(real, 20, labels))
    one, other = report._halves(real, 40, labels)
    assert precision.floor == precision_recall(generated_ND=one, real_MD=other).precision
    held_out = reference_of("digits")
    labels = DigitsData(DataSection("digits"), 16, 3, 0).held_out_labels
    assert held_out.images.labels == labels.tolist()


def test_the_interval_of_a_share_has_a_length_where_all_images_agree():
    """The score interval: the shares p with |share - p| at most 1.96 (p (1 - p) / n)^0.5."""
    for hits, n in ((0, 20), (1, 20), (50, 100), (100, 100)):
        value = hits / n
        found = report.share("x", value, n)
        assert (found.value, found.count) == (value, n)
        assert found.high - found.low > 1 / n
        for end in (found.low, found.high):
            if 0 < end < 1:
                assert abs(value - end) == pytest.approx(1.96 * (end * (1 - end) / n) ** 0.5)
    assert report.share("x", 1.0, 100).low == pytest.approx(0.963, abs=1e-3)
    wide = report.share("recall", 0.5, 100, 20)
    assert (wide.count, wide.low) == (100, report.share("x", 0.5, 20).low)


def test_pairs_are_left_out_together():
    """Classes by labels, whose blocks the reference has too."""
    labels = np.arange(60) % 4
    pixels = array(1, 60)
    images, reference = (array_images(name, pixels, labels) for name in "ab")
    same = evaluate(images, Reference("r", reference), NETWORK, paired=True).metrics[0]
    assert same.low == 0
    assert same.value == pytest.approx(0, abs=1e-9)
    assert [same.high, same.infinite] == pytest.approx([0, 0], abs=1e-9)
    assert evaluate(images, Reference("r", reference), NETWORK).metrics[0].high > 1e-6
    few = Reference("r", array_images("few", array(1, 50)))
    with pytest.raises(UserError, match="needs as many images"):
        evaluate(images, few, NETWORK, paired=True)


def test_labels_of_another_order_are_warned_about():
    """Classes by brightness; a classifier that gives each class the number of another."""
    labels = np.arange(40) % 4
    pixels = (60 * labels[:, None, None, None] + array(1, 40) // 8).astype(np.uint8)
    images, reference = array_images("a", pixels, labels), array_images("real", array(2, 40))

    def network(numbers):
        def run(images_B3YX):
            found = (images_B3YX.float().mean((1, 2, 3)) / 60 - 0.25).round().long().clamp(0, 3)
            logits = torch.nn.functional.one_hot(torch.tensor(numbers)[found], 4).float()
            return Features(patches(images_B3YX), None, logits)

        return FeatureNetwork("c", "FD (c)", "", run, CPU)

    assert warnings_of(images, reference, network([0, 1, 2, 3])) == []
    assert warnings_of(images, reference, network([2, 2, 2, 2])) == []  # all alike
    (heard,) = warnings_of(images, reference, network([0, 2, 3, 1]))
    assert heard.startswith("eval: recognised: most images of a class are recognised as another")
    assert "those of 1 as 2, 2 as 3, 3 as 1: the labels" in heard


def test_other_classes_than_the_references_are_warned_about():
    pixels, real = array(1, 40), array(2, 40)
    labels = np.arange(40)
    pairs = [
        (array_images("a", pixels, labels % 4), array_images("real", real, labels % 8)),
        (array_images("a", pixels, labels % 8), array_images("real", real, labels % 4)),
    ]
    ends = "has none of (4, 5, 6, 7): distances compare other mixtures of classes"
    assert warnings_of(*pairs[0], NETWORK) == [f"eval: real has images of 4 classes that a {ends}"]
    assert warnings_of(*pairs[1], NETWORK) == [f"eval: a has images of 4 classes that real {ends}"]
    one, other = array_images("a", pixels, labels % 4), array_images("real", real, labels % 4 + 4)
    assert len(warnings_of(one, other, NETWORK)) == 2
    assert warnings_of(one, array_images("real", real), NETWORK) == []


def test_a_classifier_of_fewer_classes_is_refused_before_it_runs():
    def run(images_B3YX):
        raise AssertionError("features of refused images")

    network = FeatureNetwork("classifier of c", "c-FD", "", run, CPU, num_classes=3)
    images = array_images("a", array(1, 40), np.arange(40) % 4)
    text = "eval: the classifier of c has 3 classes, and a has images of class 3; give"
    with pytest.raises(UserError, match=text):
        evaluate(images, Reference("real", array_images("real", array(2, 40))), network)


@pytest.mark.parametrize("count", [20, 23, 29, 500])
def test_blocks_without_labels_are_disjoint_and_of_one_size(count):
    place = torch.arange(float(count))[:, None]
    blocks = report.blocks_of(place)
    assert {block.count for block in blocks} <= {count // 10, -(-count // 10)}
    whole = total(blocks)
    assert whole.count == count
    assert whole.scatter_DD.item() == pytest.approx(((place - place.mean()) ** 2).sum().item())
    # Images sorted by class give equal blocks, classes in turn mixed ones.
    ordered = [block.mean_D.item() for block in report.blocks_of(place)]
    assert max(ordered) - min(ordered) < 10
    in_turn = [block.scatter_DD.item() for block in report.blocks_of(place % 10)]
    assert count < 100 or min(in_turn) > 0


def test_the_statistics_of_a_reference_file_are_taken(tmp_path):
    """FID of ADM: mu and sigma of the file, not those of its few images."""
    generator = np.random.default_rng(0)
    width = 12
    root = generator.normal(size=(width, width))
    file = {"mu": generator.normal(size=width), "sigma": root @ root.T, "arr_0": array(2, 30)}
    np.savez(tmp_path / "reference.npz", **file)
    network = FeatureNetwork("inception-2015", "FID", "", NETWORK.run, CPU)
    images = array_images("a", array(1, 40))
    result = metric(evaluate(images, open_reference(tmp_path / "reference.npz"), network), "FID")
    own = FeatureStatistics.of(patches(images.read(range(40)))).gaussian()
    given = Gaussian(torch.from_numpy(file["mu"]), torch.from_numpy(file["sigma"]))
    assert result.value == pytest.approx(frechet_distance(own, given), abs=1e-9)
    # For another network these statistics are nothing: its own are taken.
    other = evaluate(images, open_reference(tmp_path / "reference.npz"), NETWORK)
    assert metric(other, "FD (patches)").value != pytest.approx(result.value)


def test_the_record_tells_the_statistics_of_one_file_from_those_of_another(tmp_path):
    network = FeatureNetwork("inception-2015", "FID", "", NETWORK.run, CPU)
    images, hashes = array_images("a", array(1, 40)), []
    for factor in (1.0, 2.0, 1.0):
        statistics = {"mu": np.zeros(12), "sigma": factor * np.eye(12), "arr_0": array(2, 30)}
        np.savez(tmp_path / "r.npz", **statistics)
        reference = open_reference(tmp_path / "r.npz")
        hashes.append(evaluate(images, reference, network).statistics_sha256)
    assert hashes[0] == hashes[2] != hashes[1]
    # Those of another network are not taken.
    assert evaluate(images, reference, NETWORK).statistics_sha256 is None


def test_labels_are_those_of_the_files_and_not_of_their_folder(tmp_path):
    folder = write_folder(tmp_path / "depth_class3.v2", array(1, 8))
    assert open_images(folder).labels == [0, 1, 2, 3] * 2


def test_repeats_and_sorted_classes_are_warned_about(tmp_path):
    pixels = array(1, 40)
    pixels[5] = pixels[3]
    images = array_images("a", pixels)
    images.labels = sorted(index % 10 for index in range(40))

    def classes(images_B3YX):
        return Features(patches(images_B3YX), None, 5 * patches(images_B3YX)[:, :10])

    network = FeatureNetwork("c", "FD (c)", "", classes, CPU)
    np.savez(tmp_path / "r.npz", arr_0=array(2, 40))
    reference = open_reference(tmp_path / "r.npz")
    with pytest.warns(RuntimeWarning, match="1 of 40 images of a equal an earlier one"):
        evaluate(images, reference, network)
    np.savez(tmp_path / "twice.npz", arr_0=np.concatenate([pixels[:5]] * 5))
    with pytest.warns(RuntimeWarning, match="20 of 25 images of twice.npz equal an earlier one"):
        evaluate(images, open_reference(tmp_path / "twice.npz"), network)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "SPLIT", 8)
        with pytest.warns(RuntimeWarning, match="sorted by class: images 0 to 7 show 2 of 10"):
            evaluate(images, reference, network)
        patch.setattr(report, "SPLIT", 20)
        images.labels = [0] * 20 + [1] * 20
        with pytest.warns(RuntimeWarning, match="sorted by class: images 0 to 19 show 1 of 2"):
            evaluate(images, reference, network)


def warnings_of(images, reference, network=NETWORK):
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        evaluate(images, Reference("r", reference), network)
    return [str(warning.message) for warning in heard]


def test_a_wrong_uint8_rule_and_few_reference_images_are_warned_about():
    images, reference = array_images("a", array(1, 40)), array_images("real", array(2, 40))
    assert warnings_of(images, reference) == []
    floats = (array(1, 40) / 255).astype(np.uint8) + (array(1, 40) > 127)
    message = "eval: no pixel of {} is above 1 of 255; images in [0, 1] must be multiplied by 255"
    (heard,) = warnings_of(array_images("floats", floats), reference)
    assert heard.startswith(message.format("floats"))
    (heard,) = warnings_of(images, array_images("floats", floats))
    assert heard.startswith(message.format("floats"))
    (heard,) = warnings_of(
        array_images("many", array(1, 60, side=4)),
        array_images("few", array(2, 40, side=4)),
        FeatureNetwork("n", "FD", "", lambda x: Features(x.float().flatten(1)[:, :45]), CPU),
    )
    assert heard.startswith("FD: the reference r has 40 images for 45 features: its covariance is")


def read(path, opener):
    opened = opener(path)
    list((opened if opener is open_images else opened.images).batches(8))


def test_bad_sets_get_one_line(tmp_path):
    def refusal(path, opener=open_images):
        with pytest.raises(UserError) as caught:
            read(path, opener)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "not found" in refusal(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert "holds no image" in refusal(tmp_path / "empty")
    folder = write_folder(tmp_path / "damaged", array(1, 20))
    for index in (3, 12, 19, 7):
        (folder / f"{index:05d}_class{index % 4}.png").write_bytes(b"no image")
    message = refusal(folder)
    assert "4 of 20 images cannot be read" in message
    assert "00003_class3.png" in message
    mixed = write_folder(tmp_path / "mixed", array(1, 3))
    write_folder(mixed, array(1, 1, side=8), name="zz.png")
    assert "must have one size, 16 x 16; this one has 8 x 8" in refusal(mixed)
    for name, value in (("floats", array(1, 4) / 255), ("gray", array(1, 4)[..., 0])):
        np.savez(tmp_path / f"{name}.npz", value)
        assert "arr_0 must be uint8 (N, Y, X, 3)" in refusal(tmp_path / f"{name}.npz")
    write_tar(write_folder(tmp_path / "both", array(1, 2)) / "a.tar", array(1, 2))
    assert "holds shards (a.tar) and images (00000_class0.png)" in refusal(tmp_path / "both")
    (tmp_path / "wide").mkdir()
    Image.fromarray(array(1, 1)[0, ..., 0].astype(np.uint16) * 257).save(tmp_path / "wide/a.png")
    assert "a.png: must have 8 bits per channel; its pixels are of mode I;16" in refusal(
        tmp_path / "wide"
    )
    np.savez(tmp_path / "other.npz", weights=np.zeros(3))
    assert "neither images (arr_0) nor statistics" in refusal(
        tmp_path / "other.npz", open_reference
    )
    np.savez(tmp_path / "code.npz", np.array([{}], dtype=object))
    assert "is no readable .npz" in refusal(tmp_path / "code.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "floats.npz").read_bytes()[:200])
    assert "is no readable .npz" in refusal(tmp_path / "cut.npz")
    np.savez(tmp_path / "shape.npz", mu=np.zeros(3), sigma=np.zeros((2, 2)))
    with pytest.raises(UserError, match=r"mu and sigma: .*covariance \(D, D\)"):
        open_reference(tmp_path / "shape.npz")


def test_references_that_do_not_fit_are_refused(tmp_path):
    images = array_images("a", array(1, 40))
    np.savez(tmp_path / "small.npz", arr_0=array(2, 40, side=8))
    with pytest.raises(UserError, match=r"one size; a has 16 x 16 pixels, small.npz 8 x 8"):
        evaluate(images, open_reference(tmp_path / "small.npz"), NETWORK)
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(5), sigma=np.eye(5))
    with pytest.raises(UserError, match="needs the images of the reference"):
        evaluate(images, open_reference(tmp_path / "statistics.npz"), NETWORK)
    network = FeatureNetwork("inception-2015", "FID", "", NETWORK.run, CPU)
    with pytest.raises(UserError, match=r"compares 12 features; .* has statistics of 5"):
        evaluate(images, open_reference(tmp_path / "statistics.npz"), network)
    np.savez(tmp_path / "spatial.npz", mu_s=np.zeros(12), sigma_s=np.eye(12), arr_0=array(2, 3))
    unused = FeatureNetwork("n", "FID", "", lambda images: pytest.fail("features of refused"), CPU)
    with pytest.raises(UserError, match=r"at least 20 reference images .* spatial.npz has 3"):
        evaluate(images, open_reference(tmp_path / "spatial.npz"), unused)
    with pytest.raises(UserError, match="at least 20 images are needed; a has 19"):
        evaluate(array_images("a", array(1, 19)), open_reference(tmp_path / "small.npz"), NETWORK)


def test_nothing_is_trained_for_images_that_do_not_fit(tmp_path, monkeypatch, capsys):
    def refused(*args, **rest):
        raise AssertionError("a classifier was trained")

    monkeypatch.setattr(evaluate_module, "train_classifier", refused)
    monkeypatch.chdir(tmp_path)
    for side in (16, 8):
        write_folder(tmp_path / f"side{side}", array(1, 24, side))
    write_folder(tmp_path / "few", array(1, 5))
    words = ["eval", "--reference", "digits", "--features"]
    for features, source, message in (
        ("classifier:digits", ["--images", "few"], "at least 20 images are needed; few has 5"),
        ("classifier:digits", ["--images", "side8"], "side8 has 8 x 8 pixels"),
        ("classifier:my.toml", ["--images", "side16"], "my.toml: no such"),
        ("classifier:imagenet-vqvae", ["--images", "side16"], "256 x 256 pixels; those that are"),
        ("classifier:imagenet-vqvae", ["--model", "digits"], "256 x 256 pixels; those that are"),
        ("classifier:digits", ["--model", "digits", "--depths", "9"], "--depths must be"),
        ("classifier:digits", ["--model", "digits", "--num", "5"], "--num must be"),
        ("classifier:digits", ["--model", "nothing"], "nothing: no such model"),
    ):
        assert main([*words, features, *source]) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_a_classifier_is_trained_saved_and_recognises(tmp_path):
    data = DigitsData(DataSection("digits"), 16, 1, seed=0)
    classifier, record = train_classifier(data, steps=60)
    assert record.accuracy > 0.8
    twice = [train_classifier(data, steps=3)[0] for _ in range(2)]
    for one, other in zip(*(each.parameters() for each in twice), strict=True):
        assert one.equal(other)
    path = tmp_path / "classifier.safetensors"
    save_classifier(path, classifier, record)
    network, loaded = load_classifier(path, "digits", CPU)
    assert loaded == record
    assert (network.distance, network.num_classes) == ("digits-FD", 10)
    pixels = seeded_images(1, 4, 16, 16)
    assert network.run(pixels).features_BD.equal(classifier(pixels).features_BD)
    path.with_suffix(".json").write_text("{}")
    with pytest.raises(UserError, match='"format" must be'):
        load_classifier(path, "digits", CPU)


def test_unreadable_images_of_a_recipe_count_against_its_limit(tmp_path, monkeypatch):
    for part in ("train", "held_out"):
        for label in "ab":
            (tmp_path / part).mkdir(exist_ok=True)
            write_folder(tmp_path / part / label, array(ord(label), 10))
    (tmp_path / "held_out" / "a" / "00003_class3.png").write_bytes(b"no image")
    (tmp_path / "train" / "b" / "00004_class0.png").write_bytes(b"no image")
    recipe = dataclasses.replace(
        load_recipe("digits"),
        data=DataSection(
            "folder", str(tmp_path / "train"), str(tmp_path / "held_out"), workers=0, max_bad=0.0
        ),
    )
    few = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, max_bad=2 / 40))
    monkeypatch.setattr(evaluate_module, "load_recipe", lambda name: recipe)
    # Another image of its class would take its place, without a word.
    with pytest.raises(UserError, match=r"00003_class3.png: is not .* 1 of 40 samples .*max_bad"):
        list(reference_of("own").images.batches(7))
    path = tmp_path / "classifier.safetensors"
    command = Eval(reference="own", features="classifier:own", weights=path)
    monkeypatch.setattr(evaluate_module, "STEPS", 1)
    monkeypatch.setattr(
        evaluate_module,
        "train_classifier",
        lambda data, **options: train_classifier(data, **{**options, "steps": 1}),
    )
    side = recipe.vae.image_size
    with pytest.raises(UserError, match=r"is not a readable image.* data.max_bad = 0 allows"):
        evaluate_module.network_of(command, Console(file=io.StringIO()), (side, side))
    assert not path.exists()
    monkeypatch.setattr(evaluate_module, "load_recipe", lambda name: few)
    images = reference_of("own").images
    with pytest.warns(RuntimeWarning, match=r"00003_class3.png: .* Skipped: 1 of 40 samples"):
        assert sum(len(batch) for batch in images.batches(7)) == 20
    assert images.repeats == 1


def test_weights_and_record_of_a_classifier_are_of_one_save(tmp_path):
    with saving(tmp_path), pytest.raises(UserError, match="is writing into this folder"):
        save_classifier(tmp_path / "classifier.safetensors", None, None)


def test_the_command_writes_and_compares(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(
        "def features(images):\n    return images.float().mean((2, 3)) / 255\n"
    )
    monkeypatch.chdir(tmp_path)
    np.savez("real.npz", array(2, 60))
    for name, seed in (("a", 1), ("b", 3)):
        write_folder(tmp_path / name, array(seed, 40))
        words = ["eval", "--images", name, "--reference", "real.npz", "--features", "mine:features"]
        assert main([*words, "--json", f"{name}.json"]) == 0
    printed = capsys.readouterr().out
    assert "FD (mine:features)" in printed
    assert "two real halves" in printed
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["format"] == "variant-eval-1"
    assert result["num_images"] == 40
    assert {"images_sha256", "reference_sha256", "network", "environment"} <= set(result)
    assert result["network_sha256"] == file_sha256(tmp_path / "mine.py")
    assert main(["eval", "--compare", "a.json", "b.json", "--json", "-"]) == 0
    compared = json.loads(capsys.readouterr().out)
    assert set(compared["differing"]) == {"images", "images_sha256"}
    assert main(["eval", "--compare", "a.json", "real.npz"]) == 1
    assert "cannot be read" in capsys.readouterr().err
    assert main(["eval", "--images", "a"]) == 1
    assert "--reference" in capsys.readouterr().err
    assert main(["eval", "--images", "a", "--reference", "real.npz"]) == 1
    assert "--weights must name the file" in capsys.readouterr().err
    Path("widths.py").write_text("def features(x):\n    return x.float()[:, 0, 0, : len(x)]\n")
    words = ["eval", "--images", "a", "--reference", "real.npz", "--batch", "16", "--features"]
    assert main([*words, "widths:features"]) == 1
    assert "must return as many features for every batch; got 8 and 16" in capsys.readouterr().err
    for option, value in (("--num", "20"), ("--plot", "p.png"), ("--kv-dtypes", "fp8")):
        assert main([*words, "mine:features", option, value]) == 1
        assert f"{option} is for --model" in capsys.readouterr().err
    assert main(["eval", "--images", "a", "--reference", "nothing"]) == 1
    assert "or a recipe, whose held-out images are taken" in capsys.readouterr().err


def test_results_are_written_where_the_table_cannot_be_printed(tmp_path, monkeypatch, capsys):
    (tmp_path / "closed_output.py").write_text(
        "def features(images):\n    return images.float().mean((2, 3)) / 255\n"
    )
    monkeypatch.chdir(tmp_path)
    np.savez("real.npz", array(2, 60, side=6))
    small_model().save_pretrained("model")
    plain = _Console.print

    def fail(self, *objects, **options):
        if any(isinstance(item, Table) for item in objects):
            self.on_broken_pipe()
        plain(self, *objects, **options)

    monkeypatch.setattr(_Console, "print", fail)
    words = ["--reference", "real.npz", "--features", "closed_output:features"]
    write_folder(tmp_path / "images", array(1, 40, side=6))
    model = ["eval", "--model", "model", "--depths", "2", "--num", "20", "--out", "out"]
    for name, command in (
        ("images", ["eval", "--images", "images", *words]),
        ("model", [*model, *words]),
        ("one", ["generate", "--model", "model", "--out", "one.png"]),
    ):
        assert main([*command, "--json", f"{name}.json"]) == 1
        assert "standard output: Broken pipe" in capsys.readouterr().err
        assert json.loads(Path(f"{name}.json").read_text())["format"].startswith("variant-")


def test_a_cell_of_the_table_has_the_longer_side_of_its_interval():
    assert evaluate_depths._with_interval(Metric("recall", 0.99, 100, 0.94, 0.998)) == "0.99 ± 0.05"
    assert evaluate_depths._with_interval(Metric("FD", 0.25, 100, 0.0, 0.75)) == "0.25 ± 0.5"
    assert evaluate_depths._with_interval(Metric("PSNR", float("inf"), 100)) == "inf"


def test_a_table_by_depth_bridge_and_lever(tmp_path, monkeypatch, capsys):
    (tmp_path / "gray.py").write_text(
        "def features(images):\n    return images.float().mean((2, 3)) / 255\n"
    )
    monkeypatch.chdir(tmp_path)
    small_model().save_pretrained("model")
    np.savez("real.npz", array(2, 60, side=6))
    words = ["eval", "--model", "model", "--reference", "real.npz", "--features", "gray:features"]
    words += ["--num", "20", "--depths", "4", "2", "--bridges", "1", "2"]
    words += ["--kv-dtypes", "exact", "fp8"]
    assert main([*words, "--plot", "front.png", "--json", "front.json"]) == 0
    printed = capsys.readouterr().out
    assert "two real halves of 20" in printed
    result = json.loads((tmp_path / "front.json").read_text())
    rows = [(row["depth"], row["bridge"], row["kv_dtype"]) for row in result["settings"]]
    assert rows == [(*one, kv) for kv in ("exact", "fp8") for one in ((4, 1), (2, 1), (2, 2))]
    assert all(row["seconds_per_image"] > 0 for row in result["settings"])
    sizes = {row[:]: entry["kv_bytes"] for row, entry in zip(rows, result["settings"], strict=True)}
    assert sizes[2, 1, "exact"] <= sizes[2, 2, "exact"] <= sizes[4, 1, "exact"]
    assert all(sizes[row] < sizes[*row[:2], "exact"] for row in rows if row[2] == "fp8")
    with Image.open("front.png") as picture:
        assert picture.size[0] > 1000
    # Schedules alone: that of depth 2 and bridge 1 has its images; other layers have a folder.
    Path("schedule.json").write_text(
        json.dumps(DepthSchedule.from_depths([[0, 1, 2, 3], [0, 1, 3], [0, 3]]).to_dict())
    )
    words = [*words[:9], "--schedules", "4-2x2", "schedule.json"]
    assert main([*words, "--plot", "other.png", "--json", "schedules.json"]) == 0
    by_scale = json.loads((tmp_path / "schedules.json").read_text())["settings"]
    assert [(row["source"], row["depth"], row["bridge"]) for row in by_scale] == [
        ("4-2x2", 2, 1), ("schedule.json", 2, 1)
    ]  # fmt: skip
    assert by_scale[0]["metrics"] == result["settings"][1]["metrics"]
    assert by_scale[0]["kv_bytes"] == sizes[2, 1, "exact"]
    assert by_scale[1]["layers"] == [[0, 1, 2, 3], [0, 1, 3], [0, 3]]
    # Foreign images in a folder of a setting would be counted: refused, before any work.
    foreign = Path("runs/eval/depth2-bridge2-fp8/mine.png")
    foreign.write_bytes(Path("runs/eval/depth2-bridge1-exact/000000_class0.png").read_bytes())
    every = [*words[:9], "--depths", "4", "2", "--bridges", "1", "2", "--kv-dtypes", "exact", "fp8"]
    with monkeypatch.context() as patch:
        patch.setattr(evaluate_depths, "_one", lambda *_: pytest.fail("evaluated"))
        capsys.readouterr()
        assert main(every) == 1
    message = f"{foreign.parent}: holds {foreign.name}, which is none of this run's images"
    assert message in capsys.readouterr().err
    # One setting is that of its own images.
    assert main(
        ["eval", "--images", "runs/eval/depth2-bridge1-exact", "--reference", "real.npz",
         "--features", "gray:features", "--json", "one.json"]
    ) == 0  # fmt: skip
    one = json.loads((tmp_path / "one.json").read_text())
    assert one["metrics"] == result["settings"][1]["metrics"]
    assert one["generated"]["depth"] == 2
    # The record of a setting is that of its images, and names all that they depend on.
    recorded = {key: value for key, value in one["generated"].items() if key != "format"}
    assert result["settings"][1]["generated"] == recorded
    assert {"weights", "classes", "cfg", "top_k", "top_p", "dtype", "backend"} <= recorded.keys()
    assert result["settings"][1]["warnings"] == one["warnings"]
    np.savez("large.npz", array(2, 60, side=8))
    words = ["eval", "--model", "model", "--features", "gray:features", "--out", "none"]
    for rest, message in (
        (["--reference", "large.npz"], "model has 6 x 6 pixels, large.npz 8 x 8"),
        (["--reference", "real.npz", "--num", "19"], "--num must be an integer >= 20; got 19"),
        (["--reference", "real.npz", "--paired"], "--paired is for --images"),
    ):
        assert main([*words, "--bridges", "1", *rest]) == 1
        assert message in capsys.readouterr().err
    assert not Path("none").exists()
