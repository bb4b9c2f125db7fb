"""Megatron's HybridModel without Transformer Engine: its stack of layers from the local ones.

Megatron 0.19.2 builds hybrid layers from Transformer Engine's modules alone. The same layers are specified here with the
local modules that its GPT has; norms that Transformer Engine fuses into linear layers stand before them, and keep the
fused names in model checkpoints.
"""

from functools import partial
from typing import Any


def local_stack(config: Any) -> Any:
    """The `hybrid_stack_spec` of local layers for a TransformerConfig: Mamba, attention, MLP, experts and MTP."""
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.models.hybrid import hybrid_block
    from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
    from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
    from megatron.core.ssm.mlp_layer import MLPLayer
    from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.multi_token_prediction import (
        MultiTokenPredictionBlock,
        MultiTokenPredictionBlockSubmodules,
        get_mtp_layer_spec_for_backend,
    )
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import (
        MoETransformerLayer,
        TransformerLayer,
        TransformerLayerSubmodules,
    )

    local = LocalSpecProvider()
    norm = local.layer_norm(rms_norm=config.normalization == "RMSNorm")
    column, row = local.column_parallel_linear(), local.row_parallel_linear()
    hybrid_block.TENorm = norm  # HybridStack makes its last norm by this name
    mixer = ModuleSpec(module=MambaMixer, submodules=MambaMixerSubmodules(in_proj=column, out_proj=row))
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(linear_qkv=column, core_attention=local.core_attention(), linear_proj=row),
    )

    def layer(module: Any, parts: Any, before: str, name: str, inner: Any, bda: str, fused: str | None) -> Any:
        """norm, inner module, bias-dropout-add; `fused`: the linear layer whose name the norm's weights have in checkpoints."""
        named = {f"{before}.": f"{name}.{fused}.layer_norm_"} if fused else {}
        given = {before: norm, name: inner, bda: get_bias_dropout_add, "sharded_state_dict_keys_map": named}
        return ModuleSpec(module=module, submodules=parts(**given))

    mlp = partial(MLP.as_mlp_submodule, submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row))
    mtp = MultiTokenPredictionBlockSubmodules(layer_specs=[get_mtp_layer_spec_for_backend(None, local)])
    plain = TransformerLayerSubmodules
    layers = {
        "mamba_layer": layer(MambaLayer, MambaLayerSubmodules, "norm", "mixer", mixer, "mamba_bda", "in_proj"),
        "attention_layer": layer(
            TransformerLayer, plain, "input_layernorm", "self_attention", attention, "self_attn_bda", "linear_qkv"
        ),
        "mlp_layer": layer(MLPLayer, plain, "pre_mlp_layernorm", "mlp", mlp, "mlp_bda", "linear_fc1"),
        "mtp_block_spec": ModuleSpec(module=MultiTokenPredictionBlock, submodules=mtp),
    }
    if config.num_moe_experts:
        experts = get_moe_module_spec(use_te=False, num_experts=config.num_moe_experts)
        layers["moe_layer"] = layer(MoETransformerLayer, plain, "pre_mlp_layernorm", "mlp", experts, "mlp_bda", None)
    return ModuleSpec(module=hybrid_block.HybridStack, submodules=hybrid_block.HybridStackSubmodules(**layers))
