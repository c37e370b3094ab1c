"""The drop-in benchmark on a look-alike: it compares outputs and writes results."""

import json

import torch
from lookalike_var import lookalike

from benchmarks import dropin
from benchmarks.dropin_case import DropinCase

LABELS = torch.tensor([1, 3])


def case(model):
    def run(seed, greedy):
        options = {"top_k": 1} if greedy else {"top_k": 10}
        return model.autoregressive_infer_cfg(2, LABELS, g_seed=seed, cfg=2.0, **options)[0]

    return DropinCase(
        model=model,
        run=run,
        logits=lambda: model.autoregressive_infer_cfg(2, LABELS, g_seed=0, cfg=2.0, top_k=1)[1],
        loss=None,
        scales=tuple(pn**2 for pn in model.patch_nums),
        layers=len(model.blocks),
    )


def test_answers_are_compared_and_times_written_with_the_environment(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dropin, "build", lambda *args: case(lookalike()))
    file = tmp_path / "dropin.json"
    arguments = ["--repo", "nowhere", "--family", "var", "--small", "--depth", "2"]
    arguments += ["--rounds", "1", "--dtype", "float32", "--json", str(file)]
    assert dropin.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "same     " in printed
    assert "DIFFERS" not in printed
    written = json.loads(file.read_text())
    assert written["environment"]["torch"] == torch.__version__
    (result,) = written["results"]
    assert set(result["implementations"]) == {"original", "patch", "patch, depth 2"}
    assert result["implementations"]["original"]["ratio_to_original"] == 1
    patched = result["implementations"]["patch"]
    assert patched["quartiles"][0] <= patched["median"] <= patched["quartiles"][1]
    assert result["depth"]["ceiling"] > 1
    assert [path.name for path in tmp_path.iterdir()] == ["dropin.json"]


def test_a_different_answer_is_named_and_nothing_is_timed(tmp_path, monkeypatch, capsys):
    model = lookalike()
    broken = case(model)
    answers = iter(range(100))
    monkeypatch.setattr(
        dropin,
        "build",
        lambda *args: DropinCase(
            **{**vars(broken), "run": lambda seed, greedy: torch.tensor([next(answers)])}
        ),
    )
    file = tmp_path / "dropin.json"
    code = dropin.main(["--repo", "nowhere", "--family", "var", "--json", str(file)])
    assert code == 1
    assert "DIFFERS" in capsys.readouterr().out
    assert not file.exists()
