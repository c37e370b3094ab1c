"""Python programs in children of a process that has imported torch: no seconds of imports for each.

A process of pytest starts one such server when a test first needs it. The server has imported
libraries alone, nothing of this repository, and has no thread of OpenMP. It is for programs that
need one such thread, of which a test examines the work and not the start.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import types
from functools import cache
from pathlib import Path
from typing import IO, Any

# torch.distributed and every optimizer import torch._dynamo at first use.
LIBRARIES = (
    "numpy.ma",
    "PIL.PngImagePlugin",
    "huggingface_hub.repocard_data",
    "pydantic.dataclasses",
    "rich.console",
    "safetensors.torch",
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "yaml",
)


def run_forked(
    *words: object,
    input: bytes = b"",
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float = 600,
) -> subprocess.CompletedProcess[str]:
    """Run ``python WORDS`` (a file, ``-c CODE`` or ``-m MODULE``, then arguments) to its end.

    Args:
        input: its standard input.
        env: all its variables; without it those of this process.
    """
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(tempfile.NamedTemporaryFile()) for _ in range(3)]
        streams[0].write(input)
        streams[0].flush()
        program = ForkedProgram(*words, streams=[file.name for file in streams], env=env, cwd=cwd)
        code = program.wait(timeout)
        out, err = (Path(file.name).read_text() for file in streams[1:])
    return subprocess.CompletedProcess([str(word) for word in words], code, out, err)


class ForkedProgram:
    """A program that runs; a server has one at a time: the one before is killed.

    streams: files for its standard input, output and error.
    """

    _last: ForkedProgram | None = None

    def __init__(
        self,
        *words: object,
        streams: list[str],
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        if ForkedProgram._last is not None:
            ForkedProgram._last.kill()  # of a test that was interrupted
        ForkedProgram._last = self
        self.pid = 0
        self.code: int | None = None
        self._input, self._output = _server()
        request = {
            "words": [str(word) for word in words],
            "env": dict(os.environ) if env is None else env,
            "cwd": str(cwd or Path.cwd()),
            "streams": streams,
        }
        self._input.write(json.dumps(request).encode() + b"\n")
        self._input.flush()
        self.pid = int(self._output.readline())

    def poll(self, seconds: float = 0.0) -> int | None:
        """The exit code, minus the number of a signal; None if it still runs after the seconds."""
        if self.code is None and select.select([self._output], [], [], seconds)[0]:
            self.code = int(self._output.readline())
        return self.code

    def wait(self, seconds: float = 600.0) -> int:
        """The exit code; a program that takes longer is killed."""
        code = self.poll(seconds)
        if code is None:
            self.kill()
            raise TimeoutError(f"the program took more than {seconds:g} s")
        return code

    def kill(self) -> None:
        if self.pid and self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self.poll(60)


@cache
def _server() -> tuple[IO[bytes], IO[bytes]]:
    """Where requests are written, and where answers are read, of the server of this process."""
    from tests.unrecorded import unrecorded  # not in the server, a script

    variables = {
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        "PYTHONPATH": "",
        "TRITON_INTERPRET": "0",
    }
    process = subprocess.Popen(
        [sys.executable, __file__],
        bufsize=0,  # an answer is not read before it is asked for
        env=unrecorded() | variables,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    atexit.register(_end, process)
    assert process.stdin is not None
    assert process.stdout is not None
    return process.stdin, process.stdout


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    process.wait()


def serve() -> dict[str, Any]:
    """Fork a child for each request, and write its id and then its exit code.

    Returns in a child, the request; the server itself ends with its input.
    """
    for name in LIBRARIES:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    for line in iter(sys.stdin.buffer.readline, b""):
        child = os.fork()
        if child == 0:
            return json.loads(line)
        os.write(1, b"%d\n" % child)
        os.write(1, b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    sys.exit()


def execute(words: list[str], env: dict[str, str], cwd: str, streams: list[str]) -> None:
    """As the interpreter does with these words and variables."""
    for descriptor, path in enumerate(streams):
        flags = os.O_RDONLY if descriptor == 0 else os.O_WRONLY | os.O_APPEND
        opened = os.open(path, flags)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.stdin = os.fdopen(0, closefd=False)  # without what the server has read ahead
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    if "COVERAGE_PROCESS_CONFIG" in env:
        importlib.import_module("coverage").process_startup()
    kind, *rest = words
    first = "" if kind == "-c" else cwd if kind == "-m" else str(Path(kind).parent)
    sys.path[:1] = [first, *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    if kind == "-c":
        main = types.ModuleType("__main__")
        sys.argv = ["-c", *rest[1:]]
        sys.modules["__main__"] = main
        exec(compile(rest[0], "<string>", "exec"), vars(main))
    elif kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    execute(**serve())
