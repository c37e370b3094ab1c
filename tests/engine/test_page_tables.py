"""Which page tables are kept for the next batch."""

import torch
from small_models import small_model

from variant.engine import page_tables
from variant.engine.engine import Engine
from variant.engine.page_tables import PageTableCache
from variant.models.config import VARConfig, VQVAEConfig
from variant.models.var import VAR
from variant.models.vqvae import VQVAE
from variant_kernels import DepthSchedule, ScaleLayout

CPU = torch.device("cpu")
FULL = DepthSchedule.full(4, 3)
SQUARES = ScaleLayout.from_patch_nums((1, 2, 4))


def tables_of(cache, num_sequences):
    return cache.get(SQUARES, FULL, num_sequences, 16, CPU)


def test_as_many_tables_as_allowed_are_kept_and_the_last_used_ones(monkeypatch):
    monkeypatch.setattr(page_tables, "MAX_PAGE_TABLES", 3)
    cache = PageTableCache()
    kept = {n: tables_of(cache, n) for n in (1, 2, 3)}
    for n, tables in kept.items():
        tables["filled"] = n
    assert all(tables_of(cache, n) is kept[n] for n in (2, 3, 1))
    assert tables_of(cache, 4) == {}  # 2 was used longest ago
    assert all(tables_of(cache, n) is kept[n] for n in (3, 1))
    assert tables_of(cache, 2) == {}


def test_every_part_of_the_key_has_tables_of_its_own():
    cache = PageTableCache()
    keys = [
        (SQUARES, FULL, 2, 16, CPU),
        (SQUARES, FULL, 4, 16, CPU),
        (SQUARES, FULL, 2, 8, CPU),
        (SQUARES, FULL, 2, 16, torch.device("meta")),
        (SQUARES, DepthSchedule(4, 3, 2, 1), 2, 16, CPU),
        (ScaleLayout.from_patch_nums((1, 3, 4)), FULL, 2, 16, CPU),
    ]
    tables = [cache.get(*key) for key in keys]
    assert len({id(table) for table in tables}) == len(keys)
    assert all(cache.get(*key) is table for key, table in zip(keys, tables, strict=True))


def test_an_engine_with_models_of_another_layout_writes_into_their_slots():
    """The tables of the first layout, of as many scales and layers, have other slots."""
    model, other = small_model(), small_model()
    sizes = {"patch_nums": (1, 3, 4)}
    other_var = VAR(VARConfig.from_dict({**other.var.config.to_dict(), **sizes})).eval()
    other_vae = VQVAE(VQVAEConfig.from_dict({**other.vae.config.to_dict(), **sizes})).eval()
    engine = Engine(model.var, model.vae)
    engine.generate([1, 2], seed=0, decode=False)
    engine.var, engine.vae = other_var, other_vae
    found = engine.generate([1, 2], seed=0, decode=False)
    expected = Engine(other_var, other_vae).generate([1, 2], seed=0, decode=False)
    assert torch.equal(found.tokens, expected.tokens)
