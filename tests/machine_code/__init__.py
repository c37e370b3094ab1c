"""Machine code of the kernels as a test: no GPU is needed, the compilers run on any machine.

Every Triton kernel that ships for sm_90 (head widths 64 and 128 in bfloat16, and the row kernels)
is compiled, disassembled and compared with ``expected/triton-VERSION.json``. Rules that hold in
every version are in ``rules.py``; exceptions to them, with their reasons, in ``exceptions.txt``.

After a change of a kernel::

    make sass SASS=paged_attention/            # what differs, of cases that begin so
    make sass SASS=paged_attention/ WRITE=1    # accept it: write the tables anew

Commit the tables with the change, and what ``python -m benchmarks.shipped_choices`` and
``make docs-results`` then predict from them. Without
SASS all cases are compiled, some minutes on two cores.
Both commands run with the Triton that is installed and with torch 2.11's, which make installs into
``build``. In an environment that make did not create, the same for one version::

    python -m tests.machine_code paged_attention/ --write
    PYTHONPATH=build/triton-3.6.0 python -m tests.machine_code paged_attention/ --write

CI compiles one case of each kernel; ``make nightly`` all of them.
"""
