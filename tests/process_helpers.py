"""Scripts run by two CPU processes of torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
ROOT = TESTS.parent

# The interpreter's own end now and then aborts: "terminate called without an active exception". Threads of the process
# group, which a DDP model keeps alive beyond destroy_process_group, then still drop tensors (pytorch#179291).
END = """
import os
import sys
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)
"""


def run_in_two_processes(folder: Path, script: str) -> None:
    (folder / "script.py").write_text(script + END)
    path = os.pathsep.join(map(str, [folder, ROOT, ROOT / "integrations", TESTS, *filter(None, sys.path)]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, folder / "script.py", folder],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
