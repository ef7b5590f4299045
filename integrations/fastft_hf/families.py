"""Which model types are packed, and why the others are not. `tests/test_families.py` holds this table to reality: it
trains every causal language model of the installed transformers and fails for one that is missing here.

`python -m fastft_hf.families` prints docs/families.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

FULL = frozenset({"full_attention"})
WINDOWED = FULL | {"sliding_attention"}


@dataclass(frozen=True)
class Family:
    """What tests found out about one model type.

    Attributes:
        layers: the kinds of layer for which a packed run is stock's, to rounding; none if the model type declines.
        moves_positions: whether that holds where padding stands before a document; if not, such a batch stays padded.
        reason: why the model type declines, or why its positions must not move.
    """

    layers: frozenset[str] = frozenset()
    moves_positions: bool = True
    reason: str = ""


# Reasons why positions must not move.
ABSOLUTE = "this model's position embeddings are absolute"
SCALED = "this model scales queries by their absolute position"
NORM_AFTER_ROPE = "this model normalises queries and keys after rotating them, so that a position counts by itself"
STOCK_NAN = "this model's own gradients are NaN for rows that begin with padding"

# Reasons to decline.
OUTSIDE = "its attention does not go through transformers' attention interface"
STATE = "it has layers whose state runs on from document to document (recurrent, convolutional or linear attention)"
OWN_MASK = "its attention adds masks or biases of its own (indexed, compressed, chunked or relative attention)"
OWN_POSITIONS = "it numbers positions by the columns of the batch or the ids of its tokens, not by position_ids"
RANDOM = "its router draws random numbers in training, so no two runs are alike"
MULTIMODAL = "it is, or belongs to, a model of images or sound"
COUNTED = "stock's Trainer counts first labels in its loss that it never trains, which a packed row cannot reproduce"
VERSIONS = "packed runs are not stock's in every supported version of transformers"
UNTRIED = "no tiny model of it can be made, so nothing is known"


def _group(names: str, family: Family) -> dict[str, Family]:
    return dict.fromkeys(names.split(), family)


FAMILIES: dict[str, Family] = {
    **_group(
        """
        apertus apertus1p5_text lara_mini
        arcee aria_text axk1 bitnet cohere deepseek_v2 deepseek_v3 diffllama emu3_text_model ernie4_5
        ernie4_5_moe flex_olmo gemma glm glm4 glm4_moe glm4_moe_lite gpt_neox granite granitemoe granitemoeshared helium
        hrm_text hy_v3 hyperclovax jais2 jetmoe llama longcat_flash minicpm3 minimax_m2 minimax_m3_vl_text
        mllama_text_model nanochat nemotron olmo olmo2 olmoe opt persimmon phi qwen2_moe seed_oss solar_open stablelm
        youtu
        """,
        Family(FULL),
    ),
    **_group(
        """
        afmoe cohere2 cohere2_moe cwm dots1 exaone4 exaone_moe flint gemma2 gemma3_text gemma4_text gemma4_unified_text
        gpt_oss granite_swa granitemoe_swa kolibri1 laguna mellum mimo_v2_flash ministral mistral mixtral
        modernbert-decoder olmo3 phi3 qwen2 qwen3 qwen3_moe smollm3 starcoder2 vaultgemma
        """,
        Family(WINDOWED),
    ),
    **_group("biogpt electra ernie gpt_bigcode", Family(FULL, False, ABSOLUTE)),
    **_group("beam ministral3", Family(WINDOWED, False, SCALED)),
    **_group("hunyuan_v1_dense hunyuan_v1_moe", Family(FULL, False, NORM_AFTER_ROPE)),
    **_group("gemma3n_text", Family(WINDOWED, False, STOCK_NAN)),
    **_group(
        """
        big_bird bloom cpmant falcon gpt_neo gpt_neox_japanese megatron-bert mpt mvp openai-gpt prophetnet
        reformer rembert roformer rwkv trocr xglm xlm xlnet
        """,
        Family(reason=OUTSIDE),
    ),
    **_group(
        """
        bailing_hybrid bamba falcon_h1 falcon_mamba granitemoehybrid jamba kimi_linear lfm2 lfm2_moe lfm3 mamba mamba2
        minimax nemotron_h olmo_hybrid qwen3_5_moe_text qwen3_5_text qwen3_next qwen4_exp_text recurrent_gemma xlstm
        zamba zamba2 zaya
        """,
        Family(reason=STATE),
    ),
    **_group(
        """
        axk2 deepseek_v32 deepseek_v4 doge dory dots3_note_text glm_moe_dsa hy_v4 inkling2_text inkling_text llama4_text
        """,
        Family(reason=OWN_MASK),
    ),
    **_group(
        """
        bart bigbird_pegasus blenderbot blenderbot-small camembert data2vec-text marian mbart pegasus plbart roberta
        roberta-prelayernorm xlm-roberta xlm-roberta-xl
        """,
        Family(reason=OWN_POSITIONS),
    ),
    **_group("phimoe", Family(reason=RANDOM)),
    **_group(
        """
        fuyu gemma3 gemma3n gemma4 gemma4_unified git got_ocr2 moss_transcribe_diarize musicgen_decoder
        musicgen_melody_decoder phi4_multimodal whisper
        """,
        Family(reason=MULTIMODAL),
    ),
    **_group("bert gpt2", Family(reason=COUNTED)),
    **_group("codegen gptj moshi", Family(reason=VERSIONS)),
    **_group(
        """
        bert-generation blt cohere_compass_text ctrl dbrx gemma4_assistant gemma4_unified_assistant inkling2_loop_text
        roc_bert xmod
        """,
        Family(reason=UNTRIED),
    ),
}


def as_markdown() -> str:
    """The table as a page for people."""
    return "\n".join(_lines())


def _lines() -> Iterator[str]:
    packed = {name: family for name, family in FAMILIES.items() if family.layers}
    yield "# Model families"
    yield ""
    yield f"{len(packed)} model types train packed, with the loss, gradients and weights of the padded run: each is"
    yield "trained both ways by `tests/test_families.py`, and no document sees another there. The others train stock."
    yield "This page is printed by `python -m fastft_hf.families`."
    yield ""
    yield "Windows: layers with a sliding window are covered. Left padding: a batch in which padding stands before a"
    yield "document is packed; where it is not, such a batch stays padded, because of what the last column says."
    yield ""
    yield "| model type | windows | left padding | |"
    yield "|---|---|---|---|"
    for name, family in sorted(packed.items()):
        windows = "yes" if family.layers == WINDOWED else ""
        yield f"| {name} | {windows} | {'packed' if family.moves_positions else 'stays padded'} | {family.reason} |"
    yield ""
    yield "| stays stock | because |"
    yield "|---|---|"
    for name, family in sorted(FAMILIES.items()):
        if not family.layers:
            yield f"| {name} | {family.reason} |"


if __name__ == "__main__":
    print(as_markdown())
