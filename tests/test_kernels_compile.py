"""The Triton kernels compile for every architecture they may be launched on, fit its shared memory and do not spill.

No GPU is needed: the host functions run as they are, and what they would launch is compiled instead (see
compile_helpers.py). Each architecture has a process and a cache of its own, and two run at a time. Everywhere: one
launch of each kernel, every product of LoRA, and a large product with its rows indexed. Also:

* "products": all layouts, indexed operands and accumulation in bf16, fp16, and widths that are not multiples of 8;
* "rest": every kind and layout of the activation, with and without bias and scaled output, every variant of the
  combination and of the segment sum, 1 to 300 experts, and one launch of each kernel in fp16.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent
KB = 1024
# By compute capability: what is compiled, and the shared memory of one block.
ARCHITECTURES = {
    80: ("products", 163 * KB),
    86: ("products", 99 * KB),
    89: ("one", 99 * KB),
    90: ("products,rest", 227 * KB),
    100: ("products", 227 * KB),
    120: ("one", 99 * KB),
}
SPILLED = 64  # bytes a thread; a few are harmless


def helper(cache, script, *arguments):
    """The lines of JSON that a script in this folder prints. Triton compiles into ``cache``."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment["TRITON_CACHE_DIR"] = str(cache)
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(ROOT / "tests" / script), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def compilations(tmp_path_factory):
    cache = tmp_path_factory.mktemp("triton")
    with ThreadPoolExecutor(2) as pool:
        yield {
            capability: pool.submit(helper, cache / str(capability), "compile_helpers.py", capability, what)
            for capability, (what, _) in ARCHITECTURES.items()
        }


@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_compiles_within_shared_memory_and_registers(compilations, capability):
    kernels = compilations[capability].result()
    names = {kernel["kernel"] for kernel in kernels}
    assert len(names) == (13 if capability == 90 else 12), names
    limit = ARCHITECTURES[capability][1]
    assert [kernel for kernel in kernels if kernel["shared"] > limit] == []
    assert [kernel for kernel in kernels if kernel["spilled"] > SPILLED] == []


def test_batch_sizes_cause_no_compilation(tmp_path):
    """Numbers and addresses that differ from batch to batch are not specialised on."""
    ((one_batch, many_batches),) = helper(tmp_path, "compile_helpers.py", 90, "keys")
    assert one_batch == many_batches


def test_a_launch_never_takes_a_kernel_that_triton_would_not(tmp_path):
    (counts,) = helper(tmp_path, "launch_helpers.py")
    assert counts["theirs"] > 300
    assert counts["several"] == 0
