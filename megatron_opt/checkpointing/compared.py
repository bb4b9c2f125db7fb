"""Which flags a checkpoint and the run that resumes from it must share, what differs, and how it is said.

Every flag of Megatron's parser is in one of these sets or in tests/checkpointing/free_flags.yaml, which says that it
changes only the layout, or neither the function nor the place in the data; a test holds the two together.
"""

import argparse
import enum
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_opt.errors import UserError, did_you_mean

# the function that the weights stand for
FUNCTION = tuple(
    """
    num_layers mtp_num_layers mtp_use_repeated_layer mtp_hybrid_override_pattern hidden_size num_attention_heads
    softmax_type num_query_groups ffn_hidden_size kv_channels apply_residual_connection_post_layernorm
    layernorm_epsilon layernorm_zero_centered_gamma add_bias_linear add_qkv_bias glu_linear_offset
    activation_func_clamp_value rotary_interleaved normalization qk_layernorm qk_l2_norm attention_output_gate
    multi_latent_attention experimental_attention_variant dsa_indexer_n_heads dsa_indexer_head_dim dsa_indexer_topk
    dsa_indexer_topk_freq dsa_indexer_skip_topk_offset dsa_indexer_rope_interleaved dsa_indexer_rotate_activation
    dsa_indexer_scoring_relu dsa_indexer_k_norm_epsilon linear_conv_kernel_dim linear_key_head_dim
    linear_value_head_dim linear_num_key_heads linear_num_value_heads use_mup mup_width_mult mup_base_hidden_size
    mup_embedding_mult mup_output_mult mup_base_head_dim mup_attn_scale_power apply_query_key_layer_scaling
    moe_shared_expert_intermediate_size moe_shared_expert_gate moe_shared_expert_glu_interleave_size
    moe_ffn_hidden_size moe_router_topk moe_router_num_groups moe_router_group_topk moe_router_pre_softmax
    moe_router_topk_scaling_factor moe_router_score_function moe_router_enable_expert_bias
    moe_router_force_load_balancing moe_router_force_biased moe_expert_capacity_factor
    moe_pad_expert_input_to_capacity moe_token_drop_policy moe_apply_probs_on_input moe_latent_size
    moe_mlp_glu_interleave_size moe_expert_rank_capacity_factor mrope_section is_hybrid_model mamba_state_dim
    mamba_head_dim mamba_num_groups mamba_num_heads  group_query_attention
    window_size window_attn_skip_freq position_embedding_type yarn_original_max_position_embeddings yarn_beta_fast
    yarn_beta_slow yarn_correction_range_round_to_int relative_attention_num_buckets relative_attention_max_distance
    use_rotary_position_embeddings rotary_base rotary_percent rotary_seq_len_interpolation_factor use_rope_scaling
    rope_scaling_factor no_rope_freq add_position_embedding openai_gelu squared_relu swiglu quick_geglu
    bias_gelu_fusion bert_binary_head untie_embeddings_and_output_weights rope_type vocab_size padded_vocab_size num_experts
    moe_layer_freq q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim rotary_scaling_factor mscale
    mscale_all_dim linear_attention_freq heterogeneous_layers_config_encoded_json hybrid_layer_pattern
    hybrid_override_pattern
""".split()
)
# what is trained on and for, where in it, and its random numbers: of no matter to --finetune, which begins another run
RUN = tuple(
    """
    mtp_loss_scaling_factor mtp_detach_heads hidden_dropout attention_dropout qk_clip qk_clip_alpha
    qk_clip_threshold ema_decay calculate_per_token_loss dsa_indexer_loss_coeff dsa_indexer_use_sparse_loss
    moe_router_bias_update_rate moe_router_quantile_balancing_ema moe_z_loss_coeff z_loss_coeff moe_input_jitter_eps
    dataloader_type seed train_epochs freeze_all_layers data_path phase_transition_iterations split train_data_path
    data_args_path per_split_data_args_path mock_data seq_length sample_rate mask_prob short_seq_prob
    reset_position_ids reset_attention_mask dataloader_inter_document_masking eod_mask_loss
    mid_level_dataset_surplus allow_ambiguous_pad_tokens fim_data fim_rate fim_spm_rate fim_split_sample
    fim_fragment_rate fim_no_prefix fim_prefix_token fim_middle_token fim_suffix_token fim_pad_token fim_eod_token
    vocab_extra_ids tokenizer_type special_tokens moe_router_load_balancing_type moe_aux_loss_coeff logits_load_dir
    logits_load_kd_loss_alpha sft sft_tokenizer_prompt_format
""".split()
)
# what Megatron's own optimizers would silently take from the checkpoint; ours compare their groups besides
OPTIMIZER = tuple(
    """
    apply_wd_to_qk_layernorm adam_beta1 adam_beta2 adam_eps sgd_momentum muon_split_qkv muon_scalar_optimizer
    no_weight_decay_cond_type decoupled_lr decoupled_min_lr scalar_lr_ratio decay_mode split_heads
""".split()
)
COMPARED = (*FUNCTION, *RUN, *OPTIMIZER)
_HYBRID = ("hybrid_layer_pattern", "is_hybrid_model", "num_layers")  # Megatron loads a GPT model into a hybrid one
_SHOWN = 4


class Difference(NamedTuple):
    """A flag, by Megatron's name of its value, with the checkpoint's value and this run's."""

    name: str
    theirs: Any
    ours: Any


def differences(saved: Any, args: Any, names: Sequence[str] = COMPARED) -> list[Difference]:
    """Values of `names` that are not the same; one that a checkpoint does not record is not compared."""
    if getattr(saved, "hybrid_layer_pattern", None) is None and getattr(args, "hybrid_layer_pattern", None):
        names = [name for name in names if name not in _HYBRID]
    both = (
        Difference(name, value(saved, name), value(args, name))
        for name in names
        if hasattr(saved, name) and hasattr(args, name)
    )
    return [one for one in both if one.theirs != one.ours]


def check(folder: Path, saved: Any, args: Any) -> None:
    """Refuse what a resume would change unsaid; --accept-changed names what it may."""
    names = list(FUNCTION)
    if not args.finetune:
        names += [*RUN, *(() if args.no_load_optim else OPTIMIZER)]
    accepted = set(getattr(args, "accept_changed", None) or ())
    differing = [one for one in differences(saved, args, names) if not accepted & {one.name, option(one.name)}]
    if not differing:
        return
    kind = "model" if differing[0].name in FUNCTION else "run"
    said = "; ".join(
        f"its --{option(one.name)} is {one.theirs}, this run's is {one.ours}" for one in differing[:_SHOWN]
    )
    more = f" and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
    wanted = " ".join(option(one.name) for one in differing)
    raise UserError(
        f"the checkpoint {folder} is of another {kind}: {said}{more}; give the same flags, or want the change by "
        f"--accept-changed {wanted}{'' if kind == 'model' else ', or begin another run from its weights by --finetune'}."
    )


def value(args: Any, name: str) -> Any:
    """A flag's value such that equal ones compare equal in any run: folders of data may have moved."""
    given = getattr(args, name)
    if name == "num_query_groups" and not getattr(args, "group_query_attention", False):
        return getattr(args, "num_attention_heads", None)  # Megatron leaves 1 or the number of heads there
    if name == "bias_gelu_fusion":  # tanh's GELU in place of the exact one, where there is a GELU
        return bool(given) and not any(getattr(args, one, False) for one in ("swiglu", "squared_relu"))
    if name == "hybrid_layer_pattern" and given:
        return given.replace("|", "")  # bars are where pipeline stages meet
    if isinstance(given, (list, tuple)):
        return [_plain(one) for one in given]
    return _plain(given)


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.name
    return Path(value).name if isinstance(value, str) and "/" in value else value


_options: dict[str, str] = {}


def know(actions: Iterable[argparse.Action]) -> None:
    """Learn from the job's parser which flag sets which value."""
    for action in actions:
        long = [name.removeprefix("--") for name in action.option_strings if name.startswith("--")]
        exact = [name for name in long if name.replace("-", "_") == action.dest]
        if long and (exact or action.dest not in _options):
            _options[action.dest] = (exact or long)[0]


def option(name: str) -> str:
    """The flag, without dashes, that sets Megatron's value `name`."""
    return _options.get(name, name.replace("_", "-"))


def check_accepted(names: Sequence[str]) -> None:
    """Refuse words after --accept-changed that name no flag which is compared."""
    known = {*COMPARED, *map(option, COMPARED)} if names else set()
    for name in names:
        if name not in known:
            raise UserError(
                f"--accept-changed {name}: no flag of that name is compared with a checkpoint's; name those of the refusal."
                f"{did_you_mean(name, known)}"
            )
