"""The lines of docs/reproducibility.md that no other test holds; each line has its test."""

import ast
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from variant import VARiant
from variant.engine.engine import Engine

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reproducibility.md"
LABELS = [*range(10), 3, 7]
SETTINGS = {"seed": 7, "top_p": 0.96}
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def digits():
    return VARiant.from_pretrained("digits")


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("depth", [8, 2])
def test_the_same_call_again_gives_the_same_bits(digits, dtype, depth):
    engine = digits.engine(dtype)
    first, again = (engine.generate(LABELS, depth=depth, **SETTINGS) for _ in range(2))
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.images, again.images)


def test_another_process_gives_the_same_bits(digits, threads):
    program = (
        "import sys, torch; from variant import VARiant; torch.set_num_threads(2)\n"
        "r = VARiant.from_pretrained('digits').generate([1, 2], seed=7, top_p=0.96)\n"
        "torch.save((r.tokens, r.images), sys.stdout.buffer)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    tokens, images = torch.load(io.BytesIO(done.stdout))
    threads(2)
    here = digits.generate([1, 2], **SETTINGS)
    assert torch.equal(here.tokens, tokens)
    assert torch.equal(here.images, images)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_give_the_same_tokens(digits, dtype, threads):
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(digits.engine(dtype).generate(LABELS, **SETTINGS))
    for other in results[1:]:
        assert torch.equal(results[0].tokens, other.tokens)
        torch.testing.assert_close(results[0].images, other.images, rtol=0, atol=0.02)


def tokens_by_id(engine, order, max_batch):
    """Tokens of each image of LABELS, generated in another order and batch."""
    labels = [LABELS[i] for i in order]
    result = engine.generate(labels, image_ids=order, max_batch=max_batch, decode=False, **SETTINGS)
    return result.tokens[torch.tensor(order).argsort()]


def test_float32_tokens_do_not_depend_on_the_batch(digits):
    engine = digits.engine(torch.float32)
    forward, backward = list(range(12)), list(range(11, -1, -1))
    expected = tokens_by_id(engine, forward, 12)
    for order, size in ((forward, 5), (forward, 2), (forward, 1), (backward, 12), (backward, 1)):
        assert torch.equal(tokens_by_id(engine, order, size), expected), (order[0], size)


def test_16_bit_tokens_do_not_depend_on_the_batch_from_two_images_on(digits):
    engine = digits.engine(torch.bfloat16)
    forward, backward = list(range(12)), list(range(11, -1, -1))
    expected = tokens_by_id(engine, forward, 12)
    for order, size in ((forward, 6), (forward, 4), (forward, 2), (backward, 12)):
        assert torch.equal(tokens_by_id(engine, order, size), expected), (order[0], size)


def test_16_bit_logits_of_one_image_differ_by_rounding_only(digits):
    engine = digits.engine(torch.bfloat16)
    tokens = engine.generate(LABELS, decode=False, **SETTINGS).tokens
    together = engine.forced_logits(LABELS, tokens)
    alone = torch.cat([engine.forced_logits(LABELS[i], tokens[i : i + 1]) for i in range(12)])
    exact = digits.engine(torch.float32).forced_logits(LABELS, tokens)
    rounding = (together - exact).std()
    assert (alone - together).std() < 2 * rounding
    assert (alone - exact).std() < 1.5 * rounding
    assert rounding < 0.05 * exact.std()


def test_backends_and_packing_change_logits_by_rounding_only(digits):
    engines = [
        Engine(digits.var, digits.vae, dtype=torch.float32, **options)
        for options in ({}, {"pack": False}, {"backend": "reference"})
    ]
    tokens = engines[0].generate(LABELS, decode=False, **SETTINGS).tokens
    first, *others = (engine.forced_logits(LABELS, tokens) for engine in engines)
    for other in others:
        torch.testing.assert_close(first, other, rtol=0, atol=1e-4 * float(first.std()))


def test_every_line_of_the_page_names_a_test_that_exists():
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row.startswith(("| what changes", "|---"))]
    assert len(rows) >= 20
    for row in rows:
        found = re.search(r"`(tests/[\w/]+\.py)::(test_\w+)` \|$", row)
        assert found, row
        tree = ast.parse((ROOT / found[1]).read_text())
        names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert found[2] in names, row
