"""One process of a comparison that measures Unsloth, imported before transformers and TRL, which it changes."""

import sys

import unsloth  # noqa: F401  # isort: skip

from benchmarks.worker import main

if __name__ == "__main__":
    main(*sys.argv[1:])
