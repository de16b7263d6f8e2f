"""The GPU's kernels compile for a GPU that this machine does not have: the interpreter also runs what no GPU could."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "kernel_resources.py"
KERNELS = {"attend", "value_gradient", "compare", "all_gradients", "key_gradients", "query_gradient", "row_dots"}


def test_kernels_compile_and_fit(tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}  # else an older kernel could pass in its place
    command = [sys.executable, str(BENCHMARK), "--bias", "--first", "--arch", "90"]
    printed = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout
    rows = re.findall(r"^(\w+)_kernel .* (\d+) programs$", printed, flags=re.MULTILINE)
    assert {name for name, _ in rows} == {*KERNELS, "bias_gradient"}
    assert [name for name, programs in rows if programs == "0"] == []
