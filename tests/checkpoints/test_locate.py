"""Where a named model lies."""

import pytest

from variant import UserError
from variant.checkpoints.locate import ASSETS, locate, packaged_models


@pytest.mark.parametrize("name", packaged_models())
def test_a_model_of_the_package_is_found_by_its_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert locate(name) == ASSETS / name
    assert (locate(name) / "model.safetensors").is_file()
    assert locate(name, subfolder="inner") == ASSETS / name / "inner"
    # A folder of that name in the working folder comes first.
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.json").write_text("{}")
    assert str(locate(name)) == name


def test_a_preset_is_no_model():
    with pytest.raises(UserError, match=r"^var-d16: is a preset of `variant plan` .* without wei"):
        locate("var-d16")
