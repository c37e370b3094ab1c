"""Shared by all tests: the helpers beside them can be imported, torch uses one or two threads."""

import contextlib
import gc
import os
import signal
import sys
import threading
from pathlib import Path

# Set before torch loads OpenMP. Idle threads wait for work in a loop otherwise, which takes the
# processor from the other test processes: some kernel and model tests took 55 s of CPU instead of
# 23 s, with two threads too.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

from variant_kernels.dispatch.support import triton_interprets
from variant_kernels.ops.registry import forget_signatures

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "kernels"))
from tests.recording import function_of, unrecorded_functions

torch.set_num_threads(2)

if triton_interprets():
    from tests.quick_interpreter import leave_out_repeated_patches

    leave_out_repeated_patches()

# A shell's background job ignores Ctrl-C, and so would every process that the tests start and stop.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Their tests share one costly fixture, so one process runs all tests of such a file.
ONE_PROCESS = {
    "test_run.py",
    "test_digits.py",
    "test_original_var.py",
    "test_distributed.py",
    "test_shared_checkpoints.py",
    "test_checkpoint_folder.py",
    "test_export.py",
    "test_gpu.py",
    "test_predict.py",
    "test_study.py",
    "test_trainer.py",
    "test_zone_ranks.py",
}

# Without a record of their branches, also of the processes that they start: other tests take those
# branches too (all but 1 % of them), and a training takes twice as long with a record, small
# models 1.15 to 1.4 times (coverage 7.17, Python 3.11).
NOT_RECORDED = {
    "test_adaln.py",
    "test_benchmarks_report.py",
    "test_block_causal_attention.py",
    "test_checkpoint_schedule.py",
    "test_convert.py",
    "test_cpu_launchers.py",
    "test_digits.py",
    "test_distillation.py",
    "test_documents.py",
    "test_ema.py",
    "test_examples.py",
    "test_export.py",
    "test_generate_batches.py",
    "test_gpu.py",
    "test_gradcheck.py",
    "test_instruction_sets.py",
    "test_killed_runs.py",
    "test_kv8_engine.py",
    "test_layering.py",
    "test_loader.py",
    "test_machine_code.py",
    "test_memory_plan.py",
    "test_model_folder.py",
    "test_original_var.py",
    "test_own_images.py",
    "test_phase_ends.py",
    "test_predict.py",
    "test_recorded_path.py",
    "test_reproducibility.py",
    "test_resume_rules.py",
    "test_run.py",
    "test_run_setup.py",
    "test_samples.py",
    "test_shared_checkpoints.py",
    "test_study.py",
    "test_study_report.py",
    "test_study_verdicts.py",
    "test_torchrun.py",
    "test_trainer.py",
    "test_untraced.py",
    "test_visible_gpus.py",
    "test_zone_ranks.py",
    "test_zone_training.py",
    "test_zone_weights.py",
}


# Folders whose subject are kernels that share their work between threads.
OF_THREADS = {"kernels", "gpu"}

# So many are given to processes one by one; before, a process has one more at hand.
LAST_TESTS = 100

# Tests of tests/robustness that have a timeout of their own run a generator. They begin first, in
# this order of files, so that no process waits for a long one at the end.
LONGEST = ("test_random_kills.py", "test_random_files.py", "test_random_signals.py")


def order(item):
    if item.path.parent.name != "robustness" or item.get_closest_marker("timeout") is None:
        return len(LONGEST) + 1
    return LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST)


def pytest_collection_modifyitems(items):
    items.sort(key=order)
    if not os.environ.get("VARIANT_NIGHTLY"):
        for item in items:
            if item.get_closest_marker("nightly") is not None:
                item.add_marker(pytest.mark.skip(reason="takes long; VARIANT_NIGHTLY=1 runs it"))


def pytest_collection_finish():
    """What exists by now, some millions of objects, lives as long as the process: collections of
    garbage need not look at it again (3 % of the time of the tests).
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # else nanobind lists everything of triton's as leaked


# Of the other files, the functions that take long and no branch alone: tests/recording.py.
UNRECORDED = unrecorded_functions()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    plugins = item.config.pluginmanager
    listed = function_of(item.nodeid) in UNRECORDED and not plugins.has_plugin("tests.recording")
    left_out = listed or item.path.name in NOT_RECORDED
    # Mutation tests take from the record which tests reach a line.
    left_out = left_out and not plugins.has_plugin("tests.mutation")
    with not_recorded() if left_out else contextlib.nullcontext():
        return (yield)


@contextlib.contextmanager
def not_recorded():
    """Within it coverage.py, where it runs, records nothing, nor in processes started from here."""
    own, of_threads = sys.gettrace(), threading.gettrace()
    config = os.environ.pop("COVERAGE_PROCESS_CONFIG", None)
    sys.settrace(None)
    threading.settrace(None)
    try:
        yield
    finally:
        threading.settrace(of_threads)
        sys.settrace(own)
        if config is not None:
            os.environ["COVERAGE_PROCESS_CONFIG"] = config


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Gives processes single tests, but the files of ONE_PROCESS as a whole, and those first.

    pytest-xdist's own groups (``--dist loadgroup``) have no effect in version 3.8 with pytest 9.2.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file, _, _ = nodeid.partition("::")
            return file if Path(file).name in ONE_PROCESS else nodeid

        def _reschedule(self, node):
            """Of the last tests one waits behind the one that runs, not two as before.

            They would wait for a long one while another process idles. A process begins a test
            when it knows the next one.
            """
            last = len(self.workqueue) <= LAST_TESTS
            if node.shutting_down or not (last and self.workqueue):
                super()._reschedule(node)
            elif self._pending_of(self.assigned_work[node]) < 2:
                self._assign_work_unit(node)

    return Scheduling(config, log)


@pytest.fixture(autouse=True)
def nothing_is_remembered():
    """A test may change the conditions of a choice: other tests must not use its result."""
    forget_signatures()
    yield
    forget_signatures()


@pytest.fixture(scope="module", autouse=True)
def threads(request):
    """One thread; two in tests of kernels, under ThreadSanitizer and in ``make nightly``.

    Two threads that share the small products of the other tests take 1.5 to 2.4 times as much CPU,
    and 16-bit convolutions six times.
    """
    before = torch.get_num_threads()
    if not (
        request.path.parent.name in OF_THREADS
        or "VARIANT_TSAN_EXTENSION" in os.environ
        or os.environ.get("VARIANT_NIGHTLY")
    ):
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def two_threads(threads):
    """Two threads, for tests that results are those of two, too."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
