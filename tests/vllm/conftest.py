"""Real vLLM servers are started only where they are asked for: ``make test-vllm``."""

from __future__ import annotations

import os

if os.environ.get("FEDLLM_TEST_VLLM") != "1":
    collect_ignore_glob = ["test_*.py"]
