"""Benchmarks, each behind a correctness gate: ``python -m benchmarks --quick``, or one module by its name."""

import os

# Before numpy or torch load their thread pools: every figure here is of one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
