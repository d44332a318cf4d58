"""Our model section → megatron-core's TransformerConfig and layer spec."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import (
    HAVE_TE,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import ModelConfig, ParallelConfig
from megatron_mdm.models.activation import SwiGLU
from megatron_mdm.models.attention import CoreAttention
from megatron_mdm.models.fp8 import fp8_settings
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
        kv_channels=model.kv_channels,
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.sequence,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        use_te_activation_func=True,  # the layer spec's activation module, which need not be Transformer Engine's
        add_bias_linear=False,
        add_qkv_bias=model.qkv_bias,
        qk_layernorm=model.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        use_cpu_initialization=not platform.is_cuda(),
        perform_initialization=False,
        **fp8_settings(model),
    )


def torch_layers(model: ModelConfig, recompute_attention: bool) -> TransformerLayerSubmodules:
    """megatron-core's local pre-norm layer, torch's RMSNorm and attention kernels."""
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=model.qk_norm).submodules
    spec.input_layernorm = RMSNorm
    spec.pre_mlp_layernorm = RMSNorm
    if model.qk_norm:
        attention = spec.self_attention.submodules
        attention.q_layernorm = RMSNorm
        attention.k_layernorm = RMSNorm
    return _with_our_kernels(spec, recompute_attention)


def transformer_engine_layers(model: ModelConfig, recompute_attention: bool) -> TransformerLayerSubmodules:
    """Transformer Engine's fused norm + linear modules. Not run by the authors: it needs CUDA.

    Parameter names differ from the torch layers' in the norms: FUSED_NORMS.
    """
    spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=model.qk_norm).submodules
    return _with_our_kernels(spec, recompute_attention)


def _with_our_kernels(spec: TransformerLayerSubmodules, recompute: bool) -> TransformerLayerSubmodules:
    spec.self_attention.params["attn_mask_type"] = AttnMaskType.padding
    spec.self_attention.submodules.core_attention = partial(CoreAttention, recompute=recompute)
    spec.mlp.submodules.activation_func = SwiGLU
    return spec


LAYER_SPECS: dict[str, Callable[[ModelConfig, bool], TransformerLayerSubmodules]] = {
    "torch": torch_layers,
    "transformer_engine": transformer_engine_layers,
}
FUSED_NORMS = {  # of a layer's norms: Transformer Engine's names, in the linear maps they are fused with → the table's
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


def use_kernels_for_any_length() -> None:
    """Keep cuDNN out of torch's choice of attention kernels: it makes a plan for every new shape, which takes longer
    than attention itself, and the lengths of micro-batches vary. launch/gpu_check.sh (`shapes`) measures both."""
    torch.backends.cuda.enable_cudnn_sdp(False)


def resolve_kernels(model: ModelConfig) -> str:
    """The kernels that 'auto' stands for: torch's, as Transformer Engine's have not been run with this code. Raises
    UserError where those asked for cannot run."""
    if model.kernels == "transformer_engine" and not (HAVE_TE and platform.is_cuda()):
        missing = "it is not installed" if not HAVE_TE else "there is no CUDA device"
        raise UserError(f"'model.kernels' transformer_engine: {missing}; use auto or torch")
    return "torch" if model.kernels == "auto" else model.kernels
