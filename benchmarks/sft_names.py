"""The stacks of TRL's SFTTrainer, made from the parts of their names. Without TRL, so that --help needs none."""

from __future__ import annotations

import re
from dataclasses import dataclass

HELP = """\
trl-ATTENTION[-liger][-nocheckpoint | -every-N]: SFTTrainer, packing with bfd into 2 rows of half the tokens each
    sdpa, flex       stock, with sdpa, as a plain install has it, or flex_attention
    fastft           the same trainer with SFTConfig(fastft=True), sdpa; checkpointing="off", so it stays torch's own
    fastft-planned   and checkpointing="on": fastft decides which layers to keep
    fastft-off       and every feature "off": what it costs to have us there, against sdpa
    -liger           use_liger_kernel=True, in stock stacks and ours alike
    -nocheckpoint    activation checkpointing off;  -every-N: every N-th layer only (every_n_layers)
trl-unsloth[-nocheckpoint]: the same with Unsloth's FastLanguageModel, its own checkpointing or none"""

_NAME = re.compile(
    r"trl-(?P<kind>sdpa|flex|fastft|fastft-planned|fastft-off|unsloth)(?P<liger>-liger)?"
    r"(?:-(?P<off>nocheckpoint)|-every-(?P<every>[1-9]\d*))?"
)


@dataclass(frozen=True)
class SftStack:
    """One way to train: what `HELP` says, taken apart."""

    kind: str
    liger: bool = False
    checkpointing: bool = True
    every_n_layers: int = 1

    @classmethod
    def from_name(cls, name: str) -> SftStack:
        """Raises ValueError for a name that is none of these stacks."""
        match = _NAME.fullmatch(name)
        if match is None or (match["kind"] == "unsloth" and (match["liger"] or match["every"])):
            raise ValueError(f"{name!r} is not a stack of SFTTrainer")
        return cls(
            kind=match["kind"],
            liger=match["liger"] is not None,
            checkpointing=match["off"] is None,
            every_n_layers=int(match["every"] or 1),
        )


def is_unsloth(name: str) -> bool:
    """Whether the stack of this name needs a process in which Unsloth is imported first."""
    return name.startswith("trl-unsloth")
