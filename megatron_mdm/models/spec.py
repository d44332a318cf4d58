"""Our model section → megatron-core's TransformerConfig and layer spec."""

from functools import partial

import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from megatron_mdm.config.schema import ModelConfig, ParallelConfig
from megatron_mdm.models.attention import BidirectionalAttention
from megatron_mdm.models.norms import RMSNorm
from megatron_mdm.parallel import platform


def transformer_config(model: ModelConfig, parallel: ParallelConfig) -> TransformerConfig:
    """Weights are left uninitialised: models/initialize.py fills them, independent of the layout."""
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_heads,
        num_query_groups=model.num_kv_heads,
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.sequence,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        use_cpu_initialization=not platform.is_cuda(),
        perform_initialization=False,
    )


def layer_spec(recompute_attention: bool) -> TransformerLayerSubmodules:
    """megatron-core's pre-norm layer with bidirectional attention on torch's kernels."""
    spec = get_gpt_layer_local_spec(normalization="RMSNorm").submodules
    spec.self_attention.params["attn_mask_type"] = AttnMaskType.padding
    spec.self_attention.submodules.core_attention = partial(BidirectionalAttention, recompute=recompute_attention)
    spec.input_layernorm = spec.pre_mlp_layernorm = RMSNorm
    return spec
