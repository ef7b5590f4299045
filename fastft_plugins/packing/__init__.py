"""Packed sequences: the metadata of a row, the collator that makes the row, and attention that uses both."""

from fastft_plugins.packing.attention import packed_attention
from fastft_plugins.packing.collator import METADATA_KEY, PaddingFreeCollator
from fastft_plugins.packing.metadata import PackedMetadata

__all__ = ["METADATA_KEY", "PackedMetadata", "PaddingFreeCollator", "packed_attention"]
