"""The engines that a model keeps."""

import threading
import time

from small_models import small_model

from variant import supernet


def test_of_threads_that_need_an_engine_first_one_builds_it(monkeypatch):
    """Each of several would keep packed weights of its own."""
    model, built, got, begin = small_model(), [], [], threading.Barrier(4, timeout=20)
    engine = supernet.Engine

    def build(*models, **options):
        built.append(models)
        time.sleep(0.02)
        return engine(*models, **options)

    def need():
        begin.wait()
        got.append(model.engine())

    monkeypatch.setattr(supernet, "Engine", build)
    threads = [threading.Thread(target=need) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1
    assert len(got) == 4
    assert len({id(one) for one in got}) == 1


def test_an_engine_that_cannot_be_built_keeps_no_other_thread_waiting(monkeypatch):
    model = small_model()

    def fail(*models, **options):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(supernet, "Engine", fail)
        for _ in range(2):
            try:
                model.engine()
            except MemoryError:
                continue
            raise AssertionError("it was built")
    assert model.engine() is model.engine()
