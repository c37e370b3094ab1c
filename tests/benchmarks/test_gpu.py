"""The command for a GPU machine: a part that fails or hangs does not affect the others."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import ROOT, Part, main, missing, parts, run

OK = "open({path!r}, 'w').write('1'); print('done')"


def python(code):
    return (sys.executable, "-c", code)


def test_every_part_is_run_and_has_its_own_outcome(tmp_path, capsys):
    chosen = [
        Part("fails", python("print('why it failed'); raise SystemExit(3)"), 20),
        Part("hangs", python("import time; time.sleep(60)"), 1),
        Part("absent", ("true",), 20, needs="no-such-program"),
        Part("good", python(OK.format(path=str(tmp_path / "good.json"))), 20),
    ]
    outcomes = {outcome.name: outcome for outcome in run(chosen, tmp_path, budget=100)}
    assert outcomes["fails"].status == "failed with exit code 3"
    assert outcomes["hangs"].status == "timed out after 1 s"
    assert outcomes["absent"].status == "left out: no-such-program is not installed"
    assert outcomes["good"].status == "ok"
    assert outcomes["good"].results == ["good.json"]
    assert "why it failed" in capsys.readouterr().out
    written = json.loads((tmp_path / "summary.json").read_text())
    assert [one["status"] for one in written] == [o.status for o in outcomes.values()]


def test_a_part_runs_with_its_variables_and_the_summary_lists_them(tmp_path):
    code = "import os; assert os.environ['VARIANT_TEST_DEVICE'] == 'cuda'"
    part = Part("set", python(code), 20, environment=(("VARIANT_TEST_DEVICE", "cuda"),))
    (outcome,) = run([part], tmp_path, budget=100)
    assert outcome.status == "ok"
    assert outcome.command.startswith("VARIANT_TEST_DEVICE=cuda python -c ")


def test_a_part_keeps_the_python_path_that_it_was_started_with(tmp_path, monkeypatch):
    (tmp_path / "only_here.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    part = Part("path", python("import only_here, benchmarks.gpu"), 20)
    (outcome,) = run([part], tmp_path, budget=100)
    assert outcome.status == "ok"


def test_kernel_benchmarks_fit_the_time_left_or_do_not_start(tmp_path):
    (kernels,) = [part for part in parts(Path(), None) if part.name == "kernels"]
    show = Part("kernels", (*python("import sys; print(sys.argv[1:])"), *kernels.command[3:]), 400)
    (outcome,) = run([show], tmp_path, budget=220)
    # 220 less the overtime, for five files.
    assert "'--seconds', '19'" in (tmp_path / outcome.log).read_text()
    (outcome,) = run([kernels], tmp_path, budget=100)
    assert outcome.status == "left out: the budget is spent"


def test_a_spent_budget_leaves_the_rest_out(tmp_path):
    (outcome,) = run([Part("late", python("pass"), 20)], tmp_path, budget=1)
    assert outcome.status == "left out: the budget is spent"


def test_names_are_unique_and_an_unknown_one_is_named(tmp_path, capsys):
    names = [part.name for part in parts(tmp_path, None)]
    assert len(set(names)) == len(names)
    with pytest.raises(SystemExit, match="2"):
        main(["nonsense"])
    assert "no part 'nonsense'" in capsys.readouterr().err


def test_only_cases_on_the_gpu_are_chosen():
    """An implementation of that name takes part on the CPU too."""
    (kernels,) = [part for part in parts(Path(), None) if part.name == "kernels"]
    chosen = kernels.command[kernels.command.index("-k") + 1]
    assert chosen in "test_adaln_modulate[cuda-d16-large-stream-float32-rows-float32-op]"
    assert chosen not in "test_adaln_modulate[cpu-d16-large-stream-float32-rows-float32-cuda]"
    files = [Path(word).name for word in kernels.command if "bench_" in word]
    assert sorted(files) == sorted(path.name for path in (ROOT / "benchmarks").glob("bench_*.py"))


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert missing() is None
    monkeypatch.setattr("benchmarks.gpu.PACKAGES", ("json", "no_such_package"))
    assert missing() == "not installed: no_such_package"


def test_every_part_can_be_imported_without_the_command_lines_library(tmp_path):
    commands = [part.command for part in parts(tmp_path, None)]
    modules = {c[c.index("-m") + 1] for c in commands if "-m" in c} - {"pytest"}
    assert "benchmarks.gpu_engine" in modules
    code = f"import sys; sys.modules['tyro'] = None; import {', '.join(sorted(modules))}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
