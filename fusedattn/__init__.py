"""Additive attention and feature-wise conditioning (FiLM) for PyTorch, fused."""

from fusedattn import dropin
from fusedattn._dispatch import UnsupportedError
from fusedattn._export import decompositions
from fusedattn._library import empty_cache
from fusedattn.modules.attention import AdditiveAttention, BahdanauAttention
from fusedattn.modules.attention_pool import GatedAttentionPool
from fusedattn.modules.blocks import FiLMResBlock, GatedConditionalConv2d, MultiHopFiLM, SqueezeExcite
from fusedattn.modules.causal_attention import CausalAdditiveAttention
from fusedattn.modules.concat import ConcatConditioning
from fusedattn.modules.concat_attention import ConcatAttention
from fusedattn.modules.conditioning import ConditionalBias, ConditionalGate, ConditionalScale
from fusedattn.modules.coverage_attention import CoverageAttention
from fusedattn.modules.film import FiLM
from fusedattn.modules.forward_attention import ForwardAttention
from fusedattn.modules.hard_attention import HardAttention
from fusedattn.modules.location_sensitive_attention import LocationSensitiveAttention, LocationState
from fusedattn.modules.multi_hop_attention import MultiHopAttention
from fusedattn.modules.normalization import (
    AdaGroupNorm,
    AdaIN,
    AdaLayerNorm,
    AdaLayerNormSingle,
    AdaLayerNormZero,
    ConditionalBatchNorm,
    ConditionalInstanceNorm,
)
from fusedattn.modules.pointer_attention import PointerAttention
from fusedattn.modules.projected_keys import ProjectedKeys
from fusedattn.modules.spatial_attention import SpatialAttention
from fusedattn.ops.additive_attention import additive_attention, additive_attention_ref
from fusedattn.ops.additive_attention_varlen import additive_attention_varlen, additive_attention_varlen_ref
from fusedattn.ops.additive_scores import additive_scores, additive_scores_ref
from fusedattn.ops.attention_pool import attention_pool, attention_pool_ref
from fusedattn.ops.film import film, film_ref
from fusedattn.ops.gated_film import gated_film, gated_film_ref
from fusedattn.ops.hard_additive_attention import (
    HardAttentionOutput,
    hard_additive_attention,
    hard_additive_attention_ref,
)
from fusedattn.ops.location_attention import location_attention, location_attention_ref
from fusedattn.ops.merge_attention import merge_attention, merge_attention_ref
from fusedattn.ops.norm_film import norm_film, norm_film_ref

__version__ = "0.1.0"

__all__ = [
    "AdaGroupNorm",
    "AdaIN",
    "AdaLayerNorm",
    "AdaLayerNormSingle",
    "AdaLayerNormZero",
    "AdditiveAttention",
    "BahdanauAttention",
    "CausalAdditiveAttention",
    "ConcatAttention",
    "ConcatConditioning",
    "ConditionalBatchNorm",
    "ConditionalBias",
    "ConditionalGate",
    "ConditionalInstanceNorm",
    "ConditionalScale",
    "CoverageAttention",
    "FiLM",
    "FiLMResBlock",
    "ForwardAttention",
    "GatedAttentionPool",
    "GatedConditionalConv2d",
    "HardAttention",
    "HardAttentionOutput",
    "LocationSensitiveAttention",
    "LocationState",
    "MultiHopAttention",
    "MultiHopFiLM",
    "PointerAttention",
    "ProjectedKeys",
    "SpatialAttention",
    "SqueezeExcite",
    "UnsupportedError",
    "additive_attention",
    "additive_attention_ref",
    "additive_attention_varlen",
    "additive_attention_varlen_ref",
    "additive_scores",
    "additive_scores_ref",
    "attention_pool",
    "attention_pool_ref",
    "decompositions",
    "dropin",
    "empty_cache",
    "film",
    "film_ref",
    "gated_film",
    "gated_film_ref",
    "hard_additive_attention",
    "hard_additive_attention_ref",
    "location_attention",
    "location_attention_ref",
    "merge_attention",
    "merge_attention_ref",
    "norm_film",
    "norm_film_ref",
]
