"""The command line, ``fastft``. Each command imports what it needs when it is called, so that help comes at once."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; an error that the user can mend is printed without a traceback, with exit code 2."""
    from fastft_plugins.cli.app import app
    from fastft_plugins.errors import FastFTError

    try:
        app(prog_name="fastft")
    except FastFTError as error:
        print(f"fastft: {error}", file=sys.stderr)
        sys.exit(2)
    except ImportError as error:
        # The errors about a missing extra name the command that installs it; others are bugs, and keep their traceback.
        if "pip install" not in str(error):
            raise
        print(f"fastft: {error}", file=sys.stderr)
        sys.exit(2)
