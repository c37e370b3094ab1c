"""Progress where standard error is no terminal."""

from variant.cli import progress as module
from variant.cli.progress import progress


def test_a_line_every_few_seconds(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with progress("bench", "measuring", 2000) as advance:
        for step in range(1, 1301):
            now[0] += 0.01
            advance(1, f"ours {step}")
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out == "bench: 1,000 of 2,000: ours 1000\n"
