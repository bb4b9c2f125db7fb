"""Flags of Megatron-LM 0.19.2 that this job honours (SUPPORTED) or that change no number that it computes (FREE).

Names without the leading hyphens, by the subject; a test looks for a reader of each in what the job runs.
"""

SUPPORTED = """
tensor-model-parallel-size pipeline-model-parallel-size context-parallel-size expert-model-parallel-size
expert-tensor-parallel-size sequence-parallel num-layers-per-virtual-pipeline-stage num-virtual-stages-per-pipeline-rank
microbatch-group-size-per-virtual-pipeline-stage pipeline-model-parallel-layout decoder-first-pipeline-num-layers
decoder-last-pipeline-num-layers account-for-embedding-in-pipeline-split account-for-loss-in-pipeline-split
use-distributed-optimizer num-distributed-optimizer-instances overlap-grad-reduce overlap-param-gather ddp-num-buckets ddp-bucket-size
ddp-reduce-scatter-with-fp32-accumulation ddp-average-in-collective grad-reduce-in-bf16
accumulate-allreduce-grads-in-fp32 distributed-backend disable-gloo-process-groups

fp16 bf16 deterministic-mode cross-entropy-loss-fusion cross-entropy-fusion-impl calculate-per-token-loss
loss-scale initial-loss-scale min-loss-scale loss-scale-window hysteresis fp16-lm-cross-entropy
attention-softmax-in-fp32 transformer-impl

num-layers hidden-size num-attention-heads num-query-groups group-query-attention ffn-hidden-size kv-channels
hidden-dropout attention-dropout fp32-residual-connection norm-epsilon apply-layernorm-1p disable-bias-linear
add-qkv-bias glu-linear-offset activation-func-clamp-value rotary-interleaved normalization qk-layernorm
softmax-type attention-output-gate multi-latent-attention apply-query-key-layer-scaling init-method-std window-size
window-attn-skip-freq max-position-embeddings position-embedding-type yarn-original-max-position-embeddings
yarn-beta-fast yarn-beta-slow yarn-correction-range-round-to-int no-yarn-correction-range-round-to-int
use-rotary-position-embeddings rotary-base rotary-percent rotary-seq-len-interpolation-factor use-rope-scaling
no-rope-freq no-position-embedding squared-relu swiglu quick-geglu untie-embeddings-and-output-weights rope-type
q-lora-rank kv-lora-rank qk-head-dim qk-pos-emb-head-dim v-head-dim rotary-scaling-factor mscale mscale-all-dim
use-mup mup-width-mult mup-base-hidden-size mup-embedding-mult mup-output-mult mup-base-head-dim mup-attn-scale-power
qk-clip qk-clip-alpha qk-clip-threshold log-max-attention-logit
mtp-num-layers mtp-loss-scaling-factor mtp-use-repeated-layer mtp-detach-heads
recompute-granularity recompute-method recompute-num-layers recompute-modules recompute-activations
distribute-saved-activations init-method-xavier-uniform spec
hybrid-layer-pattern mamba-state-dim mamba-head-dim mamba-num-groups mamba-num-heads

num-experts moe-layer-freq moe-ffn-hidden-size moe-shared-expert-intermediate-size moe-shared-expert-gate
moe-router-topk moe-router-num-groups moe-router-group-topk moe-router-pre-softmax moe-router-topk-scaling-factor
moe-router-score-function moe-router-dtype moe-router-enable-expert-bias moe-router-bias-update-rate
moe-router-load-balancing-type moe-router-quantile-balancing-ema moe-router-force-load-balancing moe-router-force-biased
moe-aux-loss-coeff moe-z-loss-coeff moe-input-jitter-eps moe-token-dispatcher-type moe-expert-capacity-factor
moe-pad-expert-input-to-capacity moe-token-drop-policy moe-apply-probs-on-input moe-layer-recompute

optimizer optimizer-cpu-offload optimizer-offload-fraction
weight-decay clip-grad adam-beta1 adam-beta2 adam-eps lion-beta1 lion-beta2 muon-momentum
muon-nesterov muon-scale-mode muon-fp32-matmul-prec muon-coefficient-type muon-num-ns-steps muon-extra-scale-factor
lr min-lr lr-decay-style lr-wsd-decay-style lr-decay-iters lr-decay-samples lr-wsd-decay-iters lr-wsd-decay-samples
lr-warmup-fraction lr-warmup-iters lr-warmup-samples lr-warmup-init start-weight-decay end-weight-decay
weight-decay-incr-style override-opt-param-scheduler use-checkpoint-opt-param-scheduler
no-check-for-nan-in-loss-and-grad check-for-large-grads seed

micro-batch-size global-batch-size step-batch-size-schedule train-iters train-samples exit-interval
exit-duration-in-mins exit-signal-handler exit-signal iterations-to-skip result-rejected-tracker-filename
check-weight-hash-across-dp-replicas-interval eval-iters eval-interval start-eval-at-iter eval-global-batch-size
eval-micro-batch-size skip-train full-validation

data-path split train-data-path valid-data-path test-data-path data-args-path per-split-data-args-path mock-data
seq-length reset-position-ids reset-attention-mask eod-mask-loss
mid-level-dataset-surplus allow-ambiguous-pad-tokens no-create-attention-mask-in-dataloader dataloader-type
data-cache-path vocab-size padded-vocab-size make-vocab-size-divisible-by vocab-file merge-file tokenizer-type
tokenizer-model tokenizer-metadata tokenizer-special-tokens tiktoken-pattern tiktoken-num-special-tokens
tokenizer-sentencepiece-legacy no-tokenizer-sentencepiece-ignore-extra-whitespaces tokenizer-hf-no-use-fast
tokenizer-hf-no-include-special-tokens trust-remote-code null-tokenizer-eod-id null-tokenizer-pad-id

save save-interval save-retain-interval load non-persistent-save-interval non-persistent-ckpt-type
non-persistent-global-ckpt-dir finetune pretrained-checkpoint ckpt-step use-checkpoint-args
use-mp-args-from-checkpoint-args no-use-tokenizer-model-from-checkpoint-args exit-on-missing-checkpoint ckpt-format
auto-detect-ckpt-format async-save async-strategy ckpt-fully-parallel-load no-ckpt-fully-parallel-save
ckpt-fully-parallel-save-process-group ckpt-fully-parallel-load-process-group dist-ckpt-strictness verify-integrity
dist-ckpt-optim-fully-reshardable no-save-optim no-save-rng no-load-optim no-load-rng override-ckpt-iteration
no-ckpt-load-validate-sharding-integrity
"""

FREE = """
help local-rank use-cpu-initialization use-mcore-models no-masked-softmax-fusion no-bias-gelu-fusion
no-bias-swiglu-fusion no-bias-dropout-fusion no-rope-fusion no-persist-layer-norm no-gradient-accumulation-fusion
disable-jit-fuser no-overlap-p2p-communication overlap-p2p-communication-warmup-flush no-align-grad-reduce
no-align-param-gather ddp-pad-buckets-for-high-nccl-busbw disable-mamba-mem-eff-path
no-clone-scatter-output-in-embedding mlp-chunks-for-training empty-unused-memory-level train-sync-interval manual-gc
manual-gc-interval no-manual-gc-eval exit-signal-handler-for-dataloader exit-signal-handler-for-training
rerun-mode config-logger-dir enable-experimental chat-template num-workers num-dataset-builder-threads
no-mmap-bin-files te-rng-tracker distributed-timeout-minutes distributed-timeout-seconds-after-init
flight-recorder-* no-flight-recorder-* create-all-gather-group
log-interval log-params-norm log-throughput log-progress log-timers-to-tensorboard no-log-loss-scale-to-tensorboard
log-validation-ppl-to-tensorboard log-memory-to-tensorboard log-memory-interval log-num-zeros-in-grad
log-world-size-to-tensorboard timing-log-* tensorboard-* wandb-* no-barrier-with-level-1-timing logging-level moe-per-layer-logging
moe-routing-trace-*
no-one-logger one-logger-* app-tag-run-* enable-msc disable-msc
use-persistent-ckpt-worker async-ckpt-cpu-priority async-ckpt-io-priority async-ckpt-use-cpu-shm dist-ckpt-workers
ckpt-fully-parallel-load-exchange-algo ckpt-assume-constant-structure distrib-optim-fully-reshardable-mem-efficient
use-dist-ckpt dist-ckpt-format ckpt-fully-parallel-save no-stream-ckpt-dequant no-strict-fsdp-dtensor-load
tp-comm-bootstrap-backend pipeline-model-parallel-comm-backend
"""
