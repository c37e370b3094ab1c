"""``torch.compile`` around a generation: nothing of the engine is traced, the result is equal."""

import pytest
import torch
from small_models import small_model

LABELS = [1, 2, 0]


def generate(model):
    return model.generate(LABELS, seed=3).tokens * 2


def batches(model):
    return sum(part.tokens * 2 for part in model.generate_batches([1, 2], seed=3, max_batch=1))


def forced(model):
    return model.engine().forced_logits(torch.tensor([1]), model.vae_tokens) * 2


def log_probs(model):
    return model.engine().forced_log_probs(torch.tensor([1]), model.vae_tokens) * 2


def decode(model):
    return model.engine().decode(model.vae_tokens) * 2


@pytest.mark.parametrize("use", [generate, batches, forced, log_probs, decode])
def test_compiled_code_around_the_engine_calls_it_as_it_is(use):
    model = small_model()
    model.vae_tokens = model.generate([1], seed=0).tokens
    expected = use(model)
    code = []

    def backend(graph, inputs):
        code.extend(node for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    torch.compiler.reset()
    try:
        compiled = torch.compile(use, backend=backend)
        assert torch.equal(compiled(model), expected)
        assert torch.equal(compiled(model), expected)
    finally:
        torch.compiler.reset()
    # The function's own products, of the second batch and of sums too; no layer of the model.
    assert len(code) <= 4, code


def test_a_compiled_method_is_the_method():
    model = small_model()
    expected = model.generate(LABELS, seed=3).tokens
    counts = torch._dynamo.testing.CompileCounter()
    torch.compiler.reset()
    try:
        assert torch.equal(
            torch.compile(model.generate, backend=counts)(LABELS, seed=3).tokens, expected
        )
    finally:
        torch.compiler.reset()
    assert counts.frame_count == 0
