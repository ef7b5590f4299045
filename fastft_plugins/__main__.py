"""``python -m fastft_plugins`` is ``fastft``."""

from __future__ import annotations

from fastft_plugins.cli import main

if __name__ == "__main__":
    main()
