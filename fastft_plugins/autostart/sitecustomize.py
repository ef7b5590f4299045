"""Python runs this file when it starts, where ``fastft run`` has put the folder it is in first in PYTHONPATH.

Python imports one module of this name only. So this one hands over to the one that would have been found without it.
"""

from __future__ import annotations

import os
import sys

_FOLDER = os.path.dirname(os.path.abspath(__file__))

# This process finds the modules it would find without fastft; its children find this folder in PYTHONPATH again.
sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != _FOLDER]
try:
    from fastft_plugins.auto import wait_for_frameworks
except ImportError as error:
    print(f"fastft: {sys.executable} does not have fastft_plugins ({error}): stock training there", file=sys.stderr)
else:
    wait_for_frameworks()

_ours = sys.modules.pop("sitecustomize")
try:
    import sitecustomize  # type: ignore[import-not-found]  # noqa: F401
except ImportError as error:
    if error.name != "sitecustomize":
        raise
    sys.modules["sitecustomize"] = _ours
