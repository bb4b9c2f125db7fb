"""FP8 before a run: recipes that the machine lacks, flags that belong to another recipe, sizes that FP8 products do not take."""

from collections.abc import Iterator
from typing import Any

from megatron_opt import platform
from megatron_opt.errors import UserError

# recipe: lowest compute capability, the first above that lacks it again, CUDA
_HARDWARE = {
    "delayed": ((8, 9), None, "12.1"),
    "tensorwise": ((8, 9), None, "12.1"),
    "blockwise": ((9, 0), None, "12.9"),
    "mxfp8": ((10, 0), (12, 0), "12.8"),
}  # transformer_engine/pytorch/quantization.py, check_recipe_support


def check_recipe(args: Any) -> None:
    """Refuse number formats and recipes that this machine does not compute, and options of other recipes."""
    if args.fp4:
        _check_fp4(args)
    if not args.fp8:
        return
    if args.fp8_recipe == "custom":
        raise UserError(
            "--fp8-recipe custom takes quantizers from code that a checkpoint's reader does not know; give delayed, "
            "tensorwise, blockwise or mxfp8."
        )
    if args.fp8_recipe != "mxfp8" and args.fp8_output_proj:
        raise UserError(f"--fp8-output-proj is for --fp8-recipe mxfp8, not {args.fp8_recipe}; leave it out.")
    if platform.on_cpu() and args.fp8_output_proj:
        raise UserError("--fp8-output-proj is not emulated on CPU; leave it out there.")
    _check_bf16_layers(args)
    _check_weights(args)
    if not platform.on_cpu():
        import torch

        check_hardware(args.fp8_recipe, torch.cuda.get_device_capability(), torch.version.cuda or "0.0")


def _check_fp4(args: Any) -> None:
    if platform.on_cpu():
        raise UserError(
            "--fp4-format is not emulated on CPU: NVFP4 rounds gradients stochastically by the GPU's own generator, after a "
            "random Hadamard transform, so that nothing here could repeat it; give --fp8-format."
        )


def _check_bf16_layers(args: Any) -> None:
    """Megatron's own conditions on the layers kept in bf16, with the flags' names."""
    if not args.first_last_layers_bf16:
        return
    if args.fp8_recipe == "delayed":
        raise UserError(
            "--first-last-layers-bf16 does not go with --fp8-recipe delayed, whose amax histories are reduced over the "
            "layers of one region; give tensorwise, blockwise or mxfp8."
        )
    most = args.num_layers // args.pipeline_model_parallel_size
    for flag in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
        if getattr(args, flag) > most:
            raise UserError(
                f"--{flag.replace('_', '-')} {getattr(args, flag)} is above the {most} layers of a pipeline stage; lower it."
            )


def _check_weights(args: Any) -> None:
    """Conditions of weights that stay in FP8."""
    mx, reuses = args.fp8_recipe == "mxfp8", args.reuse_grad_buf_for_mxfp8_param_ag
    if not args.fp8_param_gather:
        if reuses:
            raise UserError(
                "--reuse-grad-buf-for-mxfp8-param-ag has no effect without --fp8-param-gather; give both or neither."
            )
        return
    from megatron_opt.training.optimizer_flags import MEGATRON_OWN

    if args.optimizer in MEGATRON_OWN:
        return
    if mx != reuses:
        raise UserError(
            f"--fp8-param-gather with --fp8-recipe {args.fp8_recipe} "
            + (
                "needs --reuse-grad-buf-for-mxfp8-param-ag; give it."
                if mx
                else "takes no --reuse-grad-buf-for-mxfp8-param-ag; leave it out."
            )
        )
    refused = {
        "fp32 training (without --bf16)": not args.bf16,
        "whole parameters on every rank (without --use-distributed-optimizer)": not args.use_distributed_optimizer,
        "--moe-single-grouped-weight": bool(getattr(args, "moe_single_grouped_weight", False)),
    }
    for what in [name for name, given in refused.items() if given]:
        raise UserError(f"--fp8-param-gather does not go with {what}; remove one of them.")
    args.stream_ckpt_dequant = False  # FP8 weights come from main copies, those from whole tensors of the checkpoint


def check_hardware(recipe: str, capability: tuple[int, int], cuda: str | None = None) -> None:
    """Refuse a recipe that a GPU of this compute capability, or torch's CUDA where it matters, lacks."""
    lowest, missing, oldest = _HARDWARE[recipe]
    if capability < lowest or (missing is not None and capability >= missing):
        has = [
            name
            for name, (low, gone, _) in _HARDWARE.items()
            if low <= capability and not (gone and capability >= gone)
        ]
        raise UserError(
            f"--fp8-recipe {recipe} is not computed by GPUs of compute capability {capability[0]}.{capability[1]}; "
            + (f"give {' or '.join(has)}." if has else "leave out --fp8-format.")
        )
    if cuda is not None and tuple(map(int, cuda.split(".")[:2])) < tuple(map(int, oldest.split("."))):
        raise UserError(f"--fp8-recipe {recipe} needs CUDA {oldest}, torch was built with {cuda}; give another recipe.")


def check_sizes(args: Any) -> None:
    """Refuse sizes of FP8 products that are no multiple of 16, with mxfp8 of its 32, on a tensor-parallel rank."""
    if not args.fp8:
        return
    unit = 32 if args.fp8_recipe == "mxfp8" else 16
    for size, said in _sizes(args):
        if size % unit:
            raise UserError(
                f"{said} is {size} in FP8 products, which --fp8-recipe {args.fp8_recipe} takes in multiples of {unit}; "
                "change it, or leave out --fp8-format."
            )


def _sizes(args: Any) -> Iterator[tuple[int, str]]:
    """(size on a rank, the flags that make it) of every side of an FP8 matrix, and the tokens of a pass."""
    tp = args.tensor_model_parallel_size
    of_tp = f" / --tensor-model-parallel-size {tp}" if tp > 1 else ""
    yield args.hidden_size, f"--hidden-size {args.hidden_size}"
    heads, head = args.num_attention_heads, args.kv_channels or args.hidden_size // args.num_attention_heads
    groups = args.num_query_groups if args.group_query_attention else heads
    if args.multi_latent_attention:
        yield from _latent(args, tp, of_tp)
    else:
        yield heads * head // tp, f"--num-attention-heads {heads} × head size {head}{of_tp}"
        whole = heads * (2 if args.attention_output_gate else 1) + 2 * max(groups, tp)
        yield whole * head // tp, f"(heads {heads} + 2 × groups {groups}) × head size {head}{of_tp}"
    yield args.ffn_hidden_size // tp, f"--ffn-hidden-size {args.ffn_hidden_size}{of_tp}"
    if args.num_experts:
        etp = args.expert_tensor_parallel_size or tp
        over = f" / --expert-tensor-parallel-size {etp}" if etp > 1 else ""
        yield args.moe_ffn_hidden_size // etp, f"--moe-ffn-hidden-size {args.moe_ffn_hidden_size}{over}"
        if args.moe_shared_expert_intermediate_size:
            size = args.moe_shared_expert_intermediate_size
            yield size // tp, f"--moe-shared-expert-intermediate-size {size}{of_tp}"
    cp, sp = args.context_parallel_size, tp if args.sequence_parallel else 1
    shared = f" / --context-parallel-size {cp}" * (cp > 1) + of_tp * (sp > 1)
    tokens = f"--micro-batch-size {args.micro_batch_size} × --seq-length {args.seq_length}{shared}"
    yield args.micro_batch_size * args.seq_length // (cp * sp), tokens


def _latent(args: Any, tp: int, of_tp: str) -> Iterator[tuple[int, str]]:
    heads = args.num_attention_heads
    query, rotary = args.qk_head_dim, args.qk_pos_emb_head_dim
    yield heads * args.v_head_dim // tp, f"--num-attention-heads {heads} × --v-head-dim {args.v_head_dim}{of_tp}"
    yield heads * (query + rotary) // tp, f"heads {heads} × (--qk-head-dim + --qk-pos-emb-head-dim){of_tp}"
    yield heads * (query + args.v_head_dim) // tp, f"heads {heads} × (--qk-head-dim + --v-head-dim){of_tp}"
    yield args.kv_lora_rank, f"--kv-lora-rank {args.kv_lora_rank}"
    yield args.kv_lora_rank + rotary, f"--kv-lora-rank {args.kv_lora_rank} + --qk-pos-emb-head-dim {rotary}"
    if args.q_lora_rank:
        yield args.q_lora_rank, f"--q-lora-rank {args.q_lora_rank}"
