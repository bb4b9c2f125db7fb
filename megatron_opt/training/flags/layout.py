"""Shapes of the model against the layout: every division that Megatron makes, with the flags on both sides."""

from typing import Any

from megatron_opt.errors import UserError


def _divides(value: int | None, flag: str, by: int, other: str, remedy: str = "") -> None:
    if value and by and value % by:
        raise UserError(f"{flag} {value} is not divisible by {other} {by}; {remedy or 'change one of them'}.")


def check_layout(args: Any) -> None:
    """Refuse rank counts, parallel sizes and shapes that do not divide."""
    world, tp, pp = args.world_size, args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    cp, ep = args.context_parallel_size, args.expert_model_parallel_size
    if cp > 1 and args.transformer_impl != "transformer_engine":
        raise UserError(
            f"--context-parallel-size {cp} needs Transformer Engine's attention; give --transformer-impl transformer_engine."
        )
    if world % (tp * pp * cp):
        raise UserError(
            f"{world} ranks are not divisible by --tensor-model-parallel-size {tp} × "
            f"--pipeline-model-parallel-size {pp} × --context-parallel-size {cp}; change one of them or the rank count."
        )
    tp_flag = "--tensor-model-parallel-size"
    _divides(args.num_attention_heads, "--num-attention-heads", tp, tp_flag)
    if args.kv_channels is None:
        _divides(args.hidden_size, "--hidden-size", args.num_attention_heads, "--num-attention-heads",
                 "change one, or give --kv-channels")  # fmt: skip
    _divides(args.hidden_size, "--hidden-size", tp, tp_flag)
    _divides(args.ffn_hidden_size, "--ffn-hidden-size", tp, tp_flag)
    if args.multi_latent_attention and tp > 1:
        # Megatron sums the gradient of the shared positional key over TP only where sequence parallelism gathers it
        if args.transformer_impl == "local":
            raise UserError(
                f"--multi-latent-attention on local layers loses a part of a gradient under {tp_flag} {tp} (a fault of "
                "Megatron's); use 1 and pipeline, expert or data parallelism."
            )
        if not args.sequence_parallel:
            raise UserError(
                f"--multi-latent-attention loses a part of a gradient under {tp_flag} {tp} without --sequence-parallel "
                "(a fault of Megatron's); give it."
            )
    if args.group_query_attention:
        groups = args.num_query_groups
        _divides(args.num_attention_heads, "--num-attention-heads", groups, "--num-query-groups")
        if groups % tp and tp % groups:
            raise UserError(f"--num-query-groups {groups} and {tp_flag} {tp}: one must divide the other.")
    if args.sequence_parallel:
        _divides(args.seq_length, "--seq-length", tp, f"--sequence-parallel over {tp_flag}")
    head = args.kv_channels or args.hidden_size // args.num_attention_heads
    if (
        args.position_embedding_type == "rope" or args.use_rotary_position_embeddings
    ) and not args.multi_latent_attention:
        rotated = int(head * args.rotary_percent)
        if rotated < 2 or rotated % 2:
            raise UserError(
                f"--position-embedding-type rope turns pairs, and {rotated} of the {head} elements of a head are turned; "
                "choose --hidden-size, --num-attention-heads, --kv-channels or --rotary-percent so that they are even."
            )
    if not args.hybrid_layer_pattern:  # whose stages Megatron cuts by the pattern
        _check_stages(args, pp)
    _check_batch(args, world // (tp * pp * cp))
    _check_experts(args, world, pp, ep)
    _check_instances(args, world)


def _check_stages(args: Any, pp: int) -> None:
    if not _uneven(args):
        layers = (
            args.num_layers + args.account_for_embedding_in_pipeline_split + args.account_for_loss_in_pipeline_split
        )
        _divides(layers, "--num-layers", pp, "--pipeline-model-parallel-size",
                 "change one, or give --decoder-first-pipeline-num-layers or --pipeline-model-parallel-layout")  # fmt: skip
    stages = args.num_virtual_stages_per_pipeline_rank
    if args.num_layers_per_virtual_pipeline_stage and stages:
        raise UserError(
            "--num-layers-per-virtual-pipeline-stage and --num-virtual-stages-per-pipeline-rank say the same; give one."
        )
    if stages and not _uneven(args):
        _divides(args.num_layers, "--num-layers", pp * stages,
                 "--pipeline-model-parallel-size × --num-virtual-stages-per-pipeline-rank =")  # fmt: skip
    if per_stage := args.num_layers_per_virtual_pipeline_stage:
        _divides(args.num_layers, "--num-layers", pp * per_stage,
                 "--pipeline-model-parallel-size × --num-layers-per-virtual-pipeline-stage =")  # fmt: skip
    if (args.recompute_num_layers or 0) > args.num_layers:
        raise UserError(
            f"--recompute-num-layers {args.recompute_num_layers} is above --num-layers {args.num_layers}; lower it."
        )


def _uneven(args: Any) -> bool:
    return any(
        getattr(args, name) is not None
        for name in ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers",
                     "pipeline_model_parallel_layout")
    )  # fmt: skip


def _check_batch(args: Any, dp: int) -> None:
    for kind in ("", "eval_"):
        micro = getattr(args, f"{kind}micro_batch_size") or args.micro_batch_size
        batch = getattr(args, f"{kind}global_batch_size") or (args.global_batch_size if kind else None)
        flag = kind.replace("_", "-")
        if batch and batch % (micro * dp):
            raise UserError(
                f"--{flag}global-batch-size {batch} is not divisible by --{flag}micro-batch-size {micro} × {dp} "
                f"data-parallel rank{'s' * (dp > 1)}; change one of them."
            )


def _check_instances(args: Any, world: int) -> None:
    """Every instance of the distributed optimizer holds all of a stage's dense parameters, and all of each of its experts."""
    count, flag = args.num_distributed_optimizer_instances, "--num-distributed-optimizer-instances"
    if count == 1:
        return
    if not args.use_distributed_optimizer and not args.use_megatron_fsdp:
        raise UserError(f"{flag} {count} has no effect without --use-distributed-optimizer; give both or neither.")
    if args.ddp_reduce_scatter_with_fp32_accumulation:
        raise UserError(
            f"{flag} {count} does not go with --ddp-reduce-scatter-with-fp32-accumulation; leave one of them out."
        )
    stage = world // args.pipeline_model_parallel_size
    tp, ep = args.tensor_model_parallel_size, args.expert_model_parallel_size
    expert = (args.expert_tensor_parallel_size or tp) * ep
    for ranks, what in ((stage // tp, "data- and context-parallel"), (stage // expert, "expert-data-parallel")):
        if ranks % count:
            raise UserError(f"{ranks} {what} ranks are not divisible by {flag} {count}; change one of them.")


def _check_experts(args: Any, world: int, pp: int, ep: int) -> None:
    if not args.num_experts:
        if ep > 1:
            raise UserError(
                f"--expert-model-parallel-size {ep} has no effect without --num-experts; give both or neither."
            )
        return
    tp = args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    _divides(args.num_experts, "--num-experts", ep, "--expert-model-parallel-size")
    if world % (tp * pp * ep):
        raise UserError(
            f"{world} ranks are not divisible by --expert-tensor-parallel-size {tp} × --pipeline-model-parallel-size {pp} "
            f"× --expert-model-parallel-size {ep}; change one of them or the rank count."
        )
    if args.moe_router_topk > args.num_experts:
        raise UserError(
            f"--moe-router-topk {args.moe_router_topk} is above --num-experts {args.num_experts}; lower it."
        )
    if isinstance(args.moe_layer_freq, list):
        pattern, layers = args.moe_layer_freq, args.num_layers
        if len(pattern) != layers or not set(pattern) <= {0, 1}:
            raise UserError(f"--moe-layer-freq {pattern} must hold a 0 or a 1 for each of --num-layers {layers}.")
    elif args.moe_layer_freq < 1:
        raise UserError(f"--moe-layer-freq is {args.moe_layer_freq}; it must be at least 1 or a list of 0 and 1.")
    if args.moe_router_num_groups:
        _divides(args.num_experts, "--num-experts", args.moe_router_num_groups, "--moe-router-num-groups")
        if (args.moe_router_group_topk or 0) > args.moe_router_num_groups:
            raise UserError(
                f"--moe-router-group-topk {args.moe_router_group_topk} is above --moe-router-num-groups "
                f"{args.moe_router_num_groups}; lower it."
            )
