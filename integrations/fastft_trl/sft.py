"""``python -m fastft_trl.sft --config FILE``: what ``trl sft`` does, with ``fastft`` and ``fastft_config`` understood.

``accelerate launch -m fastft_trl.sft --config FILE`` works as well. The report is printed when training has ended.
"""

from __future__ import annotations

import sys

from fastft_plugins.errors import FastFTError


def main() -> None:
    """Parse the command line and the YAML file, and hand over to TRL's own script.

    An error that the user can mend is printed without a traceback, with exit code 2.
    """
    from trl.scripts import sft

    from fastft_trl.flag import announced
    from fastft_trl.parser import parse

    try:
        configs = parse(sys.argv[1:])
        with announced():
            sft.main(*configs)
    except FastFTError as error:
        print(f"fastft_trl.sft: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
