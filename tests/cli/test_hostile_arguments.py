"""Arguments that nobody gives on purpose: one line, quickly, and nothing is written."""

import time
import zlib

import pytest

from variant.cli import bench

LONG, HUGE = "x" * 5000, 10**12
# The slowest takes half a second on an idle core.
SECONDS = 20

MODELS = ["generate", "info", "plan", "bench"]
CASES = [
    *[(command, "--model", LONG) for command in MODELS],
    *[(command, "--model", f"{LONG}/{LONG}") for command in MODELS],
    *[(command, "--model", "a/" * 2500) for command in MODELS],
    *[(command, "--model", "\x1b[31m\nred") for command in MODELS],
    *[(command, "--model", "/dev/null") for command in MODELS],
    *[(command, "--model", ".") for command in MODELS],
    *[(command, "--json", LONG) for command in MODELS],
    *[(command, "--json", "/dev/null/x") for command in MODELS],
    *[(command, "--json", "/dev/null") for command in MODELS],
    *[(command, "--json", "/dev/stdout") for command in MODELS],
    *[(command, "--json", "folder") for command in MODELS],
    *[(command, "--json", ".") for command in MODELS],
    *[("generate", "--count", n) for n in (0, -1, HUGE, -HUGE, 2**63, 10**30)],
    *[("generate", "--temperature", x) for x in ("nan", "inf", 0, -1, 1e9)],
    *[("generate", "--labels", n) for n in (11, HUGE, -2, 2**63, 10**30)],
    *[("generate", "--depth", n) for n in (0, 1, 3, 9, -2, HUGE, 10**30)],
    *[("generate", "--bridge", n) for n in (-1, 7, HUGE, 10**30)],
    *[("generate", "--max-batch", n) for n in (0, -1)],
    *[("generate", "--seed", n) for n in (-1, 2**63, 10**30)],
    *[("generate", "--device", d) for d in ("banana", "cuda:99", "cpu:x", "meta", "meta:-1",
                                             LONG)],
    *[("generate", "--backend", b) for b in ("nope", "AUTO", LONG)],
    *[("generate", "--out", o) for o in (LONG, "y" * 250, "/dev/null", "/dev/null/x", "x.gif",
                                         "folder.png", f"{'a/' * 2500}b", "/dev/null/x.png")],
    *[(command, "--cfg", x) for command in ("generate", "bench") for x in ("nan", "inf", -1, 1e9)],
    *[(command, "--top-k", k) for command in ("generate", "bench") for k in (-1, 2**31, 10**30)],
    *[(command, "--top-p", p) for command in ("generate", "bench") for p in ("nan", "inf", -1, 2)],
    *[("plan", "--batch", n) for n in (0, -1, HUGE, 10**400)],
    *[("plan", "--page-size", n) for n in (0, -1, HUGE, 10**30)],
    *[("plan", "--bridge", n) for n in (-1, 11, HUGE)],
    *[("plan", "--memory", x) for x in ("nan", "inf", 0, -1, "1e300", "1e400")],
    *[("info", "--kv-dtype", "fp8", "--images", n) for n in (0, -1, HUGE, 10**30)],
    *[("bench", "--batch", n) for n in (0, -1, HUGE, 60000)],
    *[("bench", "--runs", n) for n in (0, -1, HUGE)],
    *[("bench", "--threads", n) for n in (0, -1, HUGE)],
    *[("bench", "--depths", n) for n in (0, 3, 9, HUGE)],
    *[("bench", "--bridge", n) for n in (-1, 7, HUGE)],
    *[("bench", "--var-repo", p) for p in (".", LONG, "/dev/null")],
    ("bench", "--batch"),
    ("bench", "--dtype"),
    *[("train", "--recipe", r) for r in (LONG, "/dev/null", ".", "no such recipe")],
    *[(command, "--seed", n) for command in ("train", "train-vae") for n in (-1, 2**63, 10**30)],
    ("train", "--out", "/dev/null/x"),
    ("convert", "--var", LONG, "--vae", LONG, "--out", "o"),
    ("convert", "--var", "/dev/null", "--vae", "/dev/null", "--out", "o"),
    ("convert", "--var", "folder", "--vae", "folder", "--out", "o"),
]  # fmt: skip


def name_of(case):
    text = " ".join(ascii(word)[:12].strip("'") for word in map(str, case))
    return f"{text}-{zlib.crc32(repr(case).encode()) % 1000}" if "xxx" in text else text


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_is_refused_by_one_line(case, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for folder in ("folder", "folder.png"):
        (tmp_path / folder).mkdir()

    def measure(*arguments, **options):
        pytest.fail("a measurement began")

    for name in ("build", "measure_peaks"):
        monkeypatch.setattr(bench, name, measure)
    begun = time.monotonic()
    code, _, error = run(*case)
    assert code in (1, 2)
    assert error.startswith("variant: error: ")
    assert error.count("\n") == 1
    assert error.strip().isprintable()
    assert len(error) < 3000
    assert "--debug shows where" not in error, error
    assert time.monotonic() - begun < SECONDS
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "folder.png"}
