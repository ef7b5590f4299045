"""TRL's configs, each with the fields ``fastft`` and ``fastft_config``.

They are dataclasses, so `TrlParser` reads the two from YAML files and command lines like any other field.
"""

import copyreg
import json
import logging
from dataclasses import dataclass, field
from typing import Any

import trl

from fastft_plugins.config import FastFTConfig
from fastft_plugins.errors import FastFTConfigError
from fastft_trl.flag import register

logger = logging.getLogger("fastft")


@dataclass
class Flag:
    """The fields added to each config.

    Raises:
        FastFTConfigError: when the config is built, if ``fastft_config`` is wrong.
    """

    fastft: bool = field(default=False, metadata={"help": "Train faster with fastft-plugins, with the stock trainer."})
    fastft_config: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": 'Fields of FastFTConfig, as a mapping or as JSON, such as \'{"packing": "on"}\'.'},
    )

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]
        if isinstance(self.fastft_config, str):
            try:
                self.fastft_config = json.loads(self.fastft_config)
            except json.JSONDecodeError as error:
                raise FastFTConfigError(
                    f"fastft_config={self.fastft_config!r} is not valid JSON ({error}); allowed: an object such as "
                    '{"packing": "on"}'
                ) from error
        try:
            FastFTConfig.coerce(self.fastft_config)  # type: ignore[arg-type]
        except FastFTConfigError as error:
            raise FastFTConfigError(f"fastft_config: {error}") from error
        if self.fastft:
            register()
        elif self.fastft_config is not None:
            logger.warning("fastft: fastft_config is ignored, because fastft=True is not set")

    def __reduce__(self) -> Any:
        """Pickle as TRL's own class: a checkpoint's ``training_args.bin`` loads where this project is missing."""
        stock = next(base for base in type(self).__mro__ if base.__module__.startswith("trl."))
        return copyreg._reconstructor, (stock, object, None), vars(self)  # type: ignore[attr-defined]


@dataclass
class SFTConfig(Flag, trl.SFTConfig):
    __doc__ = trl.SFTConfig.__doc__


@dataclass
class DPOConfig(Flag, trl.DPOConfig):
    __doc__ = trl.DPOConfig.__doc__


@dataclass
class GRPOConfig(Flag, trl.GRPOConfig):
    __doc__ = trl.GRPOConfig.__doc__


@dataclass
class KTOConfig(Flag, trl.KTOConfig):
    __doc__ = trl.KTOConfig.__doc__


@dataclass
class RewardConfig(Flag, trl.RewardConfig):
    __doc__ = trl.RewardConfig.__doc__
