"""``python -m fastft_trl.sft --config FILE``: what ``trl sft`` does, with ``fastft`` and ``fastft_config`` understood.

``accelerate launch -m fastft_trl.sft --config FILE`` works as well.
"""

from __future__ import annotations

from fastft_trl import SFTConfig


def main() -> None:
    """Parse the command line and the YAML file, and hand over to TRL's own script."""
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser
    from trl.scripts import sft

    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig), prog="python -m fastft_trl.sft")
    sft.main(*parser.parse_args_and_config(fail_with_unknown_args=False))


if __name__ == "__main__":
    main()
