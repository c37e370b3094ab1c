"""Names of configs: presets, model folders, and neither."""

import pytest

from variant.checkpoints.named_configs import configs_of, is_preset
from variant.errors import UserError
from variant.models.presets import VAR_PRESETS, vqvae_of


def test_a_preset_is_known_by_its_name_and_a_folder_of_that_name_precedes_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = next(iter(VAR_PRESETS))
    assert is_preset(name)
    assert configs_of(name) == (VAR_PRESETS[name], vqvae_of(VAR_PRESETS[name]))
    (tmp_path / name).mkdir()
    assert not is_preset(name)
    with pytest.raises(UserError, match=r"config\.json"):
        configs_of(name)


def test_what_is_neither_a_preset_nor_a_model_names_the_presets():
    assert not is_preset("no-such-model")
    with pytest.raises(UserError, match=f"no-such-model.*presets: {next(iter(VAR_PRESETS))}"):
        configs_of("no-such-model")
