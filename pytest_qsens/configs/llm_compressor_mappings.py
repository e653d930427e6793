"""llm-compressor: which layers ``SmoothQuantModifier`` smooths where a recipe does not say it, by architecture.

Those of llmcompressor 0.14, ``modifiers/transform/smoothquant/utils.py`` and ``dynamic_mappings.py``.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pytest_qsens.module_tree import ModuleTree


class Mapping(NamedTuple):
    """Layers whose inputs are smoothed, and the one before them that takes the scales up; targets as of ``ignore``."""

    balance: tuple[str, ...]
    smooth: str


_QKV = ("re:.*q_proj", "re:.*k_proj", "re:.*v_proj")
_OF_INPUT, _AFTER_ATTENTION = "re:.*input_layernorm", "re:.*post_attention_layernorm"

DEFAULT = (Mapping(_QKV, _OF_INPUT), Mapping(("re:.*gate_proj", "re:.*up_proj"), _AFTER_ATTENTION))
_MIXTRAL = DEFAULT[:1]
_BLOOM = (
    Mapping(("re:.*query_key_value",), _OF_INPUT),
    Mapping(("re:.*dense_h_to_4h",), _AFTER_ATTENTION),
)
_PHI3 = (Mapping(("re:.*qkv_proj",), _OF_INPUT), Mapping(("re:.*gate_up_proj",), _AFTER_ATTENTION))
_WHISPER = (
    Mapping(("re:.*k_proj", "re:.*v_proj", "re:.*q_proj"), "re:.*self_attn_layer_norm"),
    Mapping(("re:.*fc1",), "re:.*final_layer_norm"),
)
_DEEPSEEK_V2 = (Mapping(("re:.*q(_a)?_proj$", "re:.*kv_a_proj_with_mqa"), _OF_INPUT),)
_QWEN_MOE = (Mapping(tuple(f"{target}$" for target in _QKV), f"{_OF_INPUT}$"),)
_OF_SELF_ATTENTION = tuple(rf"re:.*self_attn\.{part}_proj" for part in "qkv")
_COHERE = (
    Mapping(
        tuple(f"{target}$" for target in (*_OF_SELF_ATTENTION, r"re:.*mlp\.gate_proj", r"re:.*mlp\.up_proj")),
        f"{_OF_INPUT}$",
    ),
)
_COHERE2_MOE = (
    Mapping(tuple(f"{target}$" for target in (*_OF_SELF_ATTENTION, "re:.*gate_proj", "re:.*up_proj")), f"{_OF_INPUT}$"),
)
_AFMOE = (
    Mapping((*_OF_SELF_ATTENTION, r"re:.*self_attn\.gate_proj"), _OF_INPUT),
    Mapping(("re:.*mlp.*gate_proj", "re:.*mlp.*up_proj"), "re:.*pre_mlp_layernorm"),
)

BY_ARCHITECTURE: dict[str, tuple[Mapping, ...]] = {
    **dict.fromkeys(("BloomForCausalLM", "ChatGLMForConditionalGeneration"), _BLOOM),
    **dict.fromkeys(
        ("CohereForCausalLM", "Cohere2ForCausalLM", "Cohere2VisionForConditionalGeneration"),
        _COHERE,
    ),
    "Cohere2MoeForCausalLM": _COHERE2_MOE,
    **dict.fromkeys(
        ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "Glm4MoeLiteForCausalLM", "GlmMoeDsaForCausalLM"),
        _DEEPSEEK_V2,
    ),
    **dict.fromkeys(("Ernie4_5_MoeForCausalLM", "MixtralForCausalLM"), _MIXTRAL),
    **dict.fromkeys(("Phi3ForCausalLM", "Phi3VForCausalLM"), _PHI3),
    **dict.fromkeys(("Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM"), _QWEN_MOE),
    "WhisperForConditionalGeneration": _WHISPER,
    "AfmoeForCausalLM": _AFMOE,
}
"""Architectures that have not `DEFAULT`; Qwen3.5 is not among them, see `mappings_of`."""

_HYBRID = {
    **dict.fromkeys(("Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration"), "mlp"),
    **dict.fromkeys(("Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration"), "mlp.shared_expert"),
}
"""Architectures with layers without queries → module of the feed-forward layers that are smoothed."""

_WITH_QUERIES = re.compile(r".*layers\.(\d+)\.self_attn\.q_proj")


def mappings_of(tree: ModuleTree) -> tuple[Mapping, ...]:
    """Return the mappings of a model for which a recipe gives none."""
    if tree.architecture not in _HYBRID:
        return BY_ARCHITECTURE.get(tree.architecture, DEFAULT)
    found = (_WITH_QUERIES.fullmatch(name) for name, _ in tree.modules)
    layers = "|".join(dict.fromkeys(match[1] for match in found if match is not None))
    scope = _HYBRID[tree.architecture].replace(".", r"\.")
    return (
        Mapping(tuple(f"{target}$" for target in _OF_SELF_ATTENTION), rf"re:.*layers\.({layers})\.input_layernorm$"),
        Mapping((rf"re:.*{scope}\.gate_proj$", rf"re:.*{scope}\.up_proj$"), f"{_AFTER_ATTENTION}$"),
    )
