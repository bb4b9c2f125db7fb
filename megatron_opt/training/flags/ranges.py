"""The values that a numeric flag can mean: finite, and in its range; the flag's name stands in the sentence."""

import argparse
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from megatron_opt.errors import UserError


@dataclass(frozen=True)
class Range:
    """Numbers from `low` (or above it, if `open`) to `high` (or below it, if `below`)."""

    low: float = -math.inf
    high: float = math.inf
    open: bool = False
    below: bool = False
    or_zero: bool = False  # 0 turns it off

    def holds(self, value: float) -> bool:
        """Whether a finite number is in the range."""
        if self.or_zero and value == 0:
            return True
        above = value > self.low if self.open else value >= self.low
        return above and (value < self.high if self.below else value <= self.high)

    def said(self, value: float) -> str:
        """The limits in words; a high one that only keeps out the absurd is named to those who pass it."""
        words = []
        if self.low > -math.inf:
            words.append(f"{'greater than' if self.open else 'at least'} {self.low:g}")
        if self.high < math.inf and (self.high <= 1 or value > self.high):
            words.append(f"{'less than' if self.below else 'at most'} {self.high:g}")
        return ("0, or " if self.or_zero else "") + " and ".join(words)


SIZE = Range(1, 2**31)  # of a dimension, a group, an interval: Megatron keeps most of them in 32 bits
COUNT = Range(0, 2**40)
POSITIVE = Range(0, open=True)
NOT_NEGATIVE = Range(0)
FRACTION = Range(0, 1)
BELOW_ONE = Range(0, 1, below=True)
PROBABILITY = BELOW_ONE  # of dropping: 1 would drop everything
RATE = Range(0, 1e4)  # a learning rate; the largest in use are of the order of 10 (Scion, SGD on tiny models)
DEVIATION = Range(0, 100, open=True)
FACTOR = Range(0, 1e6, open=True)

_WORDS: tuple[tuple[Range, str], ...] = (
    (SIZE, """
        tensor-model-parallel-size pipeline-model-parallel-size context-parallel-size expert-model-parallel-size
        expert-tensor-parallel-size num-layers-per-virtual-pipeline-stage num-virtual-stages-per-pipeline-rank
        microbatch-group-size-per-virtual-pipeline-stage decoder-first-pipeline-num-layers
        decoder-last-pipeline-num-layers ddp-num-buckets ddp-bucket-size num-distributed-optimizer-instances
        tensor-parallel-num-weight-shards expert-tensor-parallel-num-weight-shards hierarchical-context-parallel-sizes
        yarn-original-max-position-embeddings rotary-seq-len-interpolation-factor q-lora-rank kv-lora-rank
        mamba-state-dim mamba-head-dim mamba-num-groups mamba-num-heads eval-samples rollback-steps
        qk-head-dim qk-pos-emb-head-dim v-head-dim mup-base-hidden-size recompute-num-layers mlp-chunks-for-training
        moe-ffn-hidden-size moe-shared-expert-intermediate-size moe-router-topk moe-router-num-groups
        moe-router-group-topk micro-batch-size global-batch-size eval-global-batch-size
        eval-micro-batch-size train-sync-interval exit-interval exit-duration-in-mins eval-interval log-interval
        tensorboard-log-interval tensorboard-queue-size log-memory-interval save-interval save-retain-interval
        non-persistent-save-interval check-weight-hash-across-dp-replicas-interval gpu-sniff-test-interval
        adlr-autoresume-interval make-vocab-size-divisible-by num-dataset-builder-threads
        loss-scale-window hysteresis distributed-timeout-minutes distributed-timeout-seconds-after-init
        flight-recorder-trace-buffer-size dist-ckpt-workers fp8-interval fp8-amax-history-len moe-mlp-glu-interleave-size
        moe-shared-expert-glu-interleave-size moe-flex-dispatcher-num-sms moe-deepep-num-sms moe-hybridep-num-sms
        moe-hybridep-num-blocks-permute moe-hybridep-num-blocks-unpermute moe-hybridep-num-sms-preprocessing
        moe-paged-stash-page-size min-offloaded-tensor-size straggler-minmax-count ft-num-warmup-iters
        plan-world-size train-epochs muon-num-ns-steps lr-decay-iters lr-decay-samples lr-wsd-decay-iters lr-wsd-decay-samples"""),
    (COUNT, """
        train-iters train-samples mtp-num-layers
        lr-warmup-iters lr-warmup-samples start-eval-at-iter manual-gc-interval
        tiktoken-num-special-tokens null-tokenizer-eod-id iterations-to-skip ckpt-step override-ckpt-iteration
        cpu-offloading-num-layers num-layers-at-start-in-bf16 num-layers-at-end-in-bf16 fp8-margin profile-step-start
        profile-step-end profile-ranks cuda-graph-warmup-steps delta-offload-bytes-across-pp-ranks
        fine-grained-offloading-max-inflight-offloads moe-routing-trace-max-training-iters local-rank
        keep-last keep-every straggler-window"""),
    (Range(0, 2**32 - 1), "seed"),
    (Range(-1, 2**31), "null-tokenizer-pad-id"),
    (Range(0, 65535), "straggler-ctrlr-port"),
    (Range(-20, 19), "async-ckpt-cpu-priority"),
    (Range(0, 7), "async-ckpt-io-priority"),
    (Range(0, 50), "logging-level"),
    (RATE, "lr min-lr lr-warmup-init decoupled-lr decoupled-min-lr"),
    (Range(0, 1e4), "weight-decay start-weight-decay end-weight-decay"),
    (NOT_NEGATIVE, "clip-grad"),
    (FRACTION, "mid-level-dataset-surplus"),
    (BELOW_ONE, "adam-beta1 adam-beta2 sgd-momentum lion-beta1 lion-beta2 muon-momentum lr-warmup-fraction"),
    (Range(0, 1, open=True), "adam-eps norm-epsilon moe-router-bias-update-rate activation-offload-fraction"),
    (Range(0, 1, open=True), "optimizer-offload-fraction"),
    (PROBABILITY, "hidden-dropout attention-dropout moe-input-jitter-eps moe-router-quantile-balancing-ema"),
    (BELOW_ONE, "ema-decay"),
    (DEVIATION, "init-method-std embedding-init-method-std"),
    (Range(0, 1, open=True), "rotary-percent"),
    (Range(0, 1, open=True, below=True), "qk-clip-alpha"),
    (POSITIVE, "qk-clip-threshold"),
    (FACTOR, """
        rotary-scaling-factor mscale yarn-beta-fast yarn-beta-slow mup-width-mult mup-embedding-mult mup-output-mult
        mup-base-head-dim scalar-lr-ratio muon-extra-scale-factor moe-router-topk-scaling-factor activation-func-clamp-value
        moe-expert-capacity-factor moe-expert-rank-capacity-factor moe-paged-stash-buffer-size-factor-cuda
        exchange-bucket-mb"""),
    (Range(0, 1e6), """
        mtp-loss-scaling-factor moe-aux-loss-coeff moe-z-loss-coeff z-loss-coeff mscale-all-dim
        moe-paged-stash-buffer-size-factor-cpu mup-attn-scale-power"""),
    (Range(1, 1e6, or_zero=True), "hang-timeout"),
    (Range(1, 1e6, open=True, or_zero=True), "straggler-factor"),
    (Range(2, 1e12), "rotary-base"),
    (Range(1, 10_000), "num-layers"),
    (Range(1, 1e6), "hidden-size num-attention-heads num-query-groups kv-channels"),
    (Range(1, 1e8), "ffn-hidden-size seq-length max-position-embeddings vocab-size padded-vocab-size"),
    (Range(0, 100_000), "num-experts"),
    (Range(0, 1024), "num-workers"),
    (Range(0, 2**31), "eval-iters"),
    (Range(-1e6, 1e6), "glu-linear-offset moe-router-force-biased"),
    (POSITIVE, "loss-scale initial-loss-scale min-loss-scale"),
    (Range(1), "matrix-balance"),
    (Range(1, open=True), "loss-spike-factor"),
)  # fmt: skip
# numbers of the path without a range: why
NO_RANGE = {
    "flash-attention-version": "it has choices",
    "timing-log-level": "it has choices",
    "empty-unused-memory-level": "it has choices",
}
RANGES: dict[str, Range] = {name: limits for limits, words in _WORDS for name in words.split()}


def check_ranges(args: Any, actions: Iterable[argparse.Action]) -> None:
    """Refuse numbers that no run can mean; what is not set (None) is fine, what has no range must be finite."""
    for action in actions:
        names = [word.removeprefix("--") for word in action.option_strings]
        value = getattr(args, action.dest, None)
        if value == action.default:
            continue
        limits = next((RANGES[name] for name in names if name in RANGES), Range())
        for number in value if isinstance(value, list | tuple) else [value]:
            if not isinstance(number, int | float) or isinstance(number, bool):
                continue
            if not math.isfinite(number) or not limits.holds(number):
                words = [limits.said(number)] if limits.said(number) else []
                if isinstance(number, float):
                    words.insert(0, "a finite number")
                raise UserError(f"--{names[0]} is {number}; it must be {', '.join(words)}.")
