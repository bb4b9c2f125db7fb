"""Flags that have an effect only beside another one, and flags that contradict each other."""

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

from megatron_opt.errors import UserError

Condition = Callable[[Any], bool]

# names (`*`: any ending), the flags that give them an effect, whether those are given
NEEDS: tuple[tuple[str, str, Condition], ...] = (
    ("moe-*", "--num-experts", lambda a: bool(a.num_experts)),
    ("num-query-groups", "--group-query-attention", lambda a: a.group_query_attention),
    ("q-lora-rank kv-lora-rank qk-head-dim qk-pos-emb-head-dim v-head-dim rope-type", "--multi-latent-attention",
     lambda a: a.multi_latent_attention),
    ("mtp-loss-scaling-factor mtp-detach-heads mtp-use-repeated-layer", "--mtp-num-layers", lambda a: bool(a.mtp_num_layers)),
    ("fp8-* first-last-layers-bf16 log-fp8-ranges", "--fp8-format", lambda a: bool(a.fp8)),
    ("fp8-margin fp8-interval fp8-amax-history-len fp8-amax-compute-algo no-fp8-wgrad", "--fp8-recipe delayed",
     lambda a: a.fp8_recipe == "delayed"),
    ("num-layers-at-start-in-bf16 num-layers-at-end-in-bf16", "--first-last-layers-bf16", lambda a: a.first_last_layers_bf16),
    ("fp4-recipe fp4-param-gather", "--fp4-format", lambda a: bool(a.fp4)),
    ("recompute-method recompute-num-layers", "--recompute-granularity full",
     lambda a: a.recompute_granularity == "full"),
    ("recompute-modules", "--recompute-granularity selective",
     lambda a: a.recompute_granularity == "selective" or a.recompute_activations),
    ("lr-wsd-decay-*", "--lr-decay-style WSD", lambda a: a.lr_decay_style == "WSD"),
    ("start-weight-decay end-weight-decay", "--weight-decay-incr-style linear or cosine",
     lambda a: a.weight_decay_incr_style != "constant"),
    ("yarn-* no-yarn-*", "--position-embedding-type yarn or --multi-latent-attention",
     lambda a: a.position_embedding_type == "yarn" or a.multi_latent_attention),
    ("rotary-base rotary-percent rotary-interleaved rotary-seq-len-interpolation-factor use-rope-scaling no-rope-freq",
     "--position-embedding-type rope",
     lambda a: a.position_embedding_type in ("rope", "yarn") or a.use_rotary_position_embeddings or a.multi_latent_attention),
    ("loss-scale initial-loss-scale min-loss-scale loss-scale-window hysteresis fp16-lm-cross-entropy", "--fp16",
     lambda a: a.fp16),
    ("init-method-xavier-uniform embedding-init-method-std", "--megatron-init (this project's initialization has one deviation)",
     lambda a: a.megatron_init),
    ("init-style", "this project's initialization; leave out --megatron-init", lambda a: not a.megatron_init),
    ("window-attn-skip-freq", "--window-size", lambda a: a.window_size is not None),
    ("glu-linear-offset", "--swiglu or --quick-geglu", lambda a: a.swiglu or a.quick_geglu),
    ("qk-clip-alpha qk-clip-threshold", "--qk-clip", lambda a: a.qk_clip),
    ("ckpt-step finetune no-load-optim no-load-rng exit-on-missing-checkpoint dist-ckpt-strictness override-ckpt-iteration",
     "--load", lambda a: a.load is not None or a.pretrained_checkpoint is not None),
    ("save-interval save-retain-interval non-persistent-save-interval async-save no-save-optim no-save-rng", "--save",
     lambda a: a.save is not None),
    ("decoder-first-pipeline-num-layers decoder-last-pipeline-num-layers num-layers-per-virtual-pipeline-stage "
     "num-virtual-stages-per-pipeline-rank", "--pipeline-model-parallel-size above 1",
     lambda a: a.pipeline_model_parallel_size > 1),
    ("manual-gc-interval no-manual-gc-eval", "--manual-gc", lambda a: a.manual_gc),
    ("min-lr", "a --lr-decay-style that decays", lambda a: a.lr_decay_style != "constant" or not a.min_lr),
    ("optimizer-offload-fraction", "--optimizer-cpu-offload", lambda a: a.optimizer_cpu_offload),
    ("matrix-instances", "--num-distributed-optimizer-instances above 1",
     lambda a: a.num_distributed_optimizer_instances > 1),
    ("matrix-balance", "--matrix-mode auto", lambda a: a.matrix_mode == "auto"),
    ("sgd-momentum", "--optimizer sgd", lambda a: a.optimizer == "sgd"),
    ("keep-last keep-every on-save-failure", "--save", lambda a: a.save is not None),
    ("accept-changed trust-checkpoint use-checkpoint-opt_param-scheduler override-opt_param-scheduler", "--load",
     lambda a: a.load is not None or a.pretrained_checkpoint is not None),
    ("loss-spike-factor", "--on-loss-spike skip or rollback", lambda a: a.on_loss_spike != "ignore"),
    ("rollback-steps", "--on-loss-spike rollback", lambda a: a.on_loss_spike == "rollback"),
    ("log-samples", "--output-dir", lambda a: a.output_dir is not None),
    ("wandb-exp-name wandb-entity wandb-save-dir", "--wandb-project", lambda a: bool(a.wandb_project)),
)  # fmt: skip


def check_needs(args: Any, given: set[str]) -> None:
    """Refuse flags that the user gave and that another flag leaves without effect."""
    for words, other, holds in NEEDS:
        patterns = words.split()
        for name in sorted(given):
            if any(fnmatchcase(name, pattern) for pattern in patterns) and not holds(args):
                raise UserError(f"--{name} has no effect without {other}; give both or neither.")


def check_schedule(args: Any) -> None:
    """Refuse learning rates and decays that contradict each other, naming both."""
    lr, decay = args.lr, args.weight_decay
    if lr is None:
        return
    for flag in ("min_lr", "lr_warmup_init"):
        value = getattr(args, flag)
        if value > lr:
            raise UserError(f"--{flag.replace('_', '-')} {value:g} is above --lr {lr:g}; lower it.")
    independent = getattr(args, "decay_mode", None) == "independent"
    shrunk = decay * (1 if independent else lr)
    if shrunk >= 1 and args.optimizer != "sgd":
        said = f"--weight-decay {decay:g}" + ("" if independent else f" times --lr {lr:g}")
        raise UserError(f"{said} is {shrunk:g}, which turns the sign of every weight in a step; it must be below 1.")
    if args.lr_decay_style == "WSD" and args.lr_wsd_decay_iters is None and args.lr_wsd_decay_samples is None:
        raise UserError("--lr-decay-style WSD needs --lr-wsd-decay-iters (or -samples), the length of the decay.")
