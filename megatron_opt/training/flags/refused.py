"""Flags of Megatron-LM 0.19.2 that this job refuses: reason → names (`*` any ending, `name=value` that value alone).

REFUSED always; NEEDS_GPU on a machine without CUDA; NEEDS_TE where Transformer Engine is not installed or not chosen;
BY_OPTIMIZER and OF_MEGATRONS_OPTIMIZERS with this project's optimizers (Megatron's adam and sgd keep them).
"""

REFUSED = {
    "it trains by reinforcement learning, which this job does not do": """
        perform-rl-step rl-* no-rl-* grpo-* langrl-env-config refit-method""",
    "it serves or samples a model, which this job does not do": """
        inference-* no-inference-* max-tokens-to-oom use-legacy-static-engine decode-only-cuda-graphs
        enable-chunked-prefill num-speculative-tokens use-same-sampling-seed-across-dp-ranks flash-decode
        mamba-inference-conv-states-dtype mamba-inference-ssm-states-dtype symmetric-ar-type nccl-all-reduce-for-prefill
        mlp-chunks-for-prefill moe-pad-experts-for-cuda-graph-inference transformer-impl=inference_optimized test-mode
        inference-rng-tracker cache-mla-latents""",
    "it belongs to BERT, T5, retrieval or vision models, and this job trains GPT models": """
        bert-no-binary-head output-bert-embeddings bert-embedder-type bert-load encoder-num-layers decoder-num-layers
        encoder-seq-length decoder-seq-length mask-prob short-seq-prob vocab-extra-ids sample-rate ict-head-size ict-load
        biencoder-projection-dim biencoder-shared-query-context-model titles-data-path query-in-block-prob
        use-one-sent-docs evidence-data-path retriever-report-topk-accuracies retriever-score-scaling block-data-path
        embedding-path indexer-batch-size indexer-log-interval num-classes img-h img-w num-channels patch-dim
        classes-fraction data-per-class-fraction no-data-sharding head-lr-mult vision-pretraining vision-pretraining-type
        vision-backbone-type swin-backbone-type mask-type mask-factor iter-per-epoch dino-* mrope-section
        position-embedding-type=mrope position-embedding-type=relative relative-attention-num-buckets
        relative-attention-max-distance tokenizer-type=MultimodalTokenizer tokenizer-type=NullMultimodalTokenizer""",
    "--hybrid-layer-pattern says it": """
        hybrid-override-pattern mtp-hybrid-override-pattern is-hybrid-model mamba-training-ssm-states-dtype""",
    "its layers have weights that no line of the table of logical matrices declares, so no optimizer would know them": """
        experimental-attention-variant dsa-* no-dsa-* linear-conv-kernel-dim linear-key-head-dim linear-value-head-dim
        linear-num-key-heads linear-num-value-heads linear-attention-freq moe-latent-size
        heterogeneous-layers-config-path heterogeneous-layers-config-encoded-json moe-single-grouped-weight
        moe-single-grouped-bias""",
    "this job's datasets are GPTDataset's, which never read it; prepare the text by `megatron-opt data`": """
        sft sft-tokenizer-prompt-format tokenizer-type=SFTTokenizer fim-data fim-rate fim-spm-rate fim-split-sample
        fim-fragment-rate fim-no-prefix fim-prefix-token fim-middle-token fim-suffix-token fim-pad-token fim-eod-token
        per-dataset-sequences-path dataloader-fast-cache-load dataloader-defer-npy-index-mmap object-storage-cache-path
        dataloader-inter-document-masking""",
    "a run has one validation set, which its results name; give one by --valid-data-path": """
        multiple-validation-sets validation-set-names""",
    "datasets are built once, for the whole run; start the next phase as a run of its own": """
        phase-transition-iterations dataloader-type=external""",
    "Megatron reads it nowhere": """
        apply-residual-connection-post-layernorm onnx-safe openai-gelu rope-scaling-factor use-flash-attn
        use-ring-exchange-p2p enable-full-sharding-in-hsdp moe-router-padding-for-fp8""",
    "this job's loss function does not look; metrics.jsonl and --on-bad-matrix tell what is not finite": """
        check-for-spiky-loss error-injection-rate error-injection-type""",
    'Megatron\'s batches do not grow by it in this version; --step-batch-size-schedule "0:N TOKENS:N …" does': """
        rampup-batch-size""",
    "the batch would depend on the number of ranks; give a --global-batch-size that they divide": """
        decrease-batch-size-if-needed""",
    "weights are a function of --seed and their name; every replica starts from the same": """
        data-parallel-random-init no-initialization init-model-with-meta-device embedding-init-method-std""",
    "nothing would be trained": """
        freeze-all-layers""",
    "distillation needs a loss function that this job does not have": """
        logits-*""",
    "it dumps tensors from inside Megatron's own optimizer step; --log-interval and --output-dir give norms": """
        save-params-interval save-activations-interval save-tokens-per-expert-interval save-wgrads-interval
        save-dgrads-interval dump-param-to-param-group-map""",
    "a checkpoint is of the whole run here; use --save-interval, --async-save and --keep-last": """
        non-persistent-ckpt-type=local non-persistent-ckpt-type=in_memory non-persistent-local-ckpt-dir
        non-persistent-local-ckpt-algo replication replication-jump replication-factor""",
    "checkpoints are converted by `megatron-opt`'s own commands and load into every layout as they are": """
        ckpt-convert-format ckpt-convert-save ckpt-convert-update-legacy-dist-opt-format dist-ckpt-save-pre-mcore-014""",
    "flags come from the command line and from --preset; write the file as a preset": """
        yaml-cfg""",
    "a dead rank is answered by `megatron-opt train --max-restarts`, a signal by a save (--exit-signal-handler)": """
        inprocess-* enable-ft-package calc-ft-timeouts ft-num-warmup-iters adlr-autoresume adlr-autoresume-interval""",
    "it is a tool for testing Megatron itself": """
        fault-injector-* fake-process-group moe-enable-routing-replay run-workload-inspector-server""",
    "its schedule of the backward pass needs a forward step of Megatron's own": """
        overlap-moe-expert-parallel-comm delay-wgrad-compute overlap-dispatch-backward-with-experts-wgrad
        ep-overlap-early-attn-memory-release defer-embedding-wgrad-compute wgrad-deferral-limit
        high-priority-a2a-comm-stream mtp-standalone hybrid-context-parallel max-seqlen-per-dp-cp-rank""",
    "process groups are laid out once, in Megatron's order tp-cp-ep-dp-pp, before the model is built": """
        use-tp-pp-dp-mapping lazy-mpu-init""",
    "only a package that is not public (Kitchen) reads it": """
        use-kitchen-attention kitchen-attention-backend fp8-quantizer-factory fp4-quantizer-factory""",
    "experts would start as copies of one; start them from --seed": """
        moe-use-upcycling moe-upcycling-granularity""",
    "the batch is written --micro-batch-size and --global-batch-size": "batch-size",
    "the warm-up is written --lr-warmup-fraction, -iters or -samples": "warmup",
    "the layout is written --tensor-model-parallel-size": "model-parallel-size",
    "recomputation is written --recompute-granularity and --recompute-method": "checkpoint-activations",
    "the vocabulary of a layout would be padded anew; give --padded-vocab-size N": "no-pad-vocab-size",
    "the captured step would hide losses and gradients from the checks of every step": "cuda-graph-impl=full_iteration",
}

NEEDS_GPU = {
    "it moves or schedules work on a GPU": """
        tp-comm-overlap no-tp-comm-* tp-comm-overlap-rs-dgrad tp-comm-overlap-cfg hierarchical-context-parallel-sizes
        cp-comm-type gpu-sniff-test-interval moe-shared-expert-overlap high-priority-stream-groups
        disable-bf16-reduced-precision-matmul batch-invariant-mode attention-backend flash-attention-version""",
    "it captures CUDA graphs": """
        enable-cuda-graph external-cuda-graph cuda-graph-* optimizer-cuda-graph""",
    "it configures NCCL": """
        nccl-communicator-config-path use-sharp sharp-enabled-group use-nccl-ub disable-symmetric-registration""",
    "it moves activations between a GPU and its host": """
        cpu-offloading-num-layers cpu-offloading-retain-pinned-cpu-buffers fine-grained-activation-offloading
        offload-modules min-offloaded-tensor-size delay-offload-until-cuda-graph delta-offload-bytes-across-pp-ranks
        activation-offload-fraction moe-paged-stash moe-paged-stash-page-size moe-paged-stash-buffer-size-factor-cuda
        moe-paged-stash-buffer-size-factor-cpu fine-grained-offloading-max-inflight-offloads""",
    "it follows CUDA kernels or memory": """
        profile profile-step-start profile-step-end use-pytorch-profiler pytorch-profiler-collect-shapes
        pytorch-profiler-collect-callstack pytorch-profiler-collect-chakra profile-ranks record-memory-history
        memory-snapshot-path record-shapes nvtx-ranges log-device-memory-used log-energy log-straggler
        straggler-ctrlr-port straggler-minmax-count disable-straggler-on-startup""",
    "its kernels (DeepEP, HybridEP, NCCL-EP) run on GPUs alone": """
        moe-token-dispatcher-type=flex moe-enable-deepep moe-flex-dispatcher-backend moe-flex-dispatcher-num-sms
        moe-permute-fusion-into-hybridep moe-hybridep-* moe-deepep-num-sms moe-ncclep-*
        moe-expert-rank-capacity-factor""",
}

NEEDS_TE = {
    "low precision is Transformer Engine's": """
        fp8-format fp8-recipe fp8-margin fp8-interval fp8-amax-history-len fp8-amax-compute-algo no-fp8-wgrad
        fp8-output-proj first-last-layers-bf16 num-layers-at-start-in-bf16 num-layers-at-end-in-bf16 fp4-format fp4-recipe
        te-precision-config-file fp8-param-gather reuse-grad-buf-for-mxfp8-param-ag keep-fp8-transpose-cache
        moe-router-padding-for-quantization""",
    "it overlaps communication inside Transformer Engine's layers, or chooses among their attention kernels": """
        tp-comm-overlap tp-comm-overlap-* no-tp-comm-* cp-comm-type attention-backend
        flash-attention-version batch-invariant-mode""",
    "its kernels are Transformer Engine's": """
        use-transformer-engine-op-fuser fused-residual-rmsnorm use-te-activation-func
        use-fused-weighted-squared-relu
        qk-l2-norm moe-grouped-gemm use-grouped-gemm-for-shared-expert
        use-grouped-gemm-for-dense-mlp moe-permute-fusion
        moe-router-fusion moe-mlp-glu-interleave-size moe-shared-expert-glu-interleave-size mla-down-proj-fusion""",
}

# with this project's optimizers: flag -> (values that are fine beside unset, why others are not)
BY_OPTIMIZER: dict[str, tuple[tuple[object, ...], str]] = {
    "use-megatron-fsdp": ((), "Megatron-FSDP shards parameters in a way of its own; use --use-distributed-optimizer."),
    "use-torch-fsdp2": ((), "FSDP2 shards parameters in a way of its own; use --use-distributed-optimizer."),
    "tensor-parallel-num-weight-shards": ((1,), "shards of one weight would be taken for whole copies; leave it out."),
    "expert-tensor-parallel-num-weight-shards": ((1,), "shards of one weight would be taken for copies; leave it out."),
    "use-precision-aware-optimizer": ((), "set the state's type by --OPTIMIZER-state-dtype or -momentum-dtype."),
    "overlap-param-gather-with-optimizer-step": ((), "use --overlap-param-gather."),
    "fp4-param-gather": ((), "main copies are written back in bf16; remove the flag."),
    "ckpt-format": (("torch_dist",), "state is stored by logical matrix, which needs --ckpt-format torch_dist."),
    "optimizer-cuda-graph": (
        (),
        "clipping and skipped matrices are the host's decisions between exchanges; remove it.",
    ),
    "use-layer-wise-distributed-optimizer": ((), "matrices have owners already; use --use-distributed-optimizer."),
    "load-main-params-from-ckpt": ((), "main copies come from the checkpoint's state or weights; leave it out."),
    "apply-wd-to-qk-layernorm": ((), "weight_decay in a file for --optimizer-groups says which norms are decayed."),
}

# of no use without a flag of the table above, or only to Megatron's own optimizers
OF_MEGATRONS_OPTIMIZERS = {
    "it belongs to an optimizer, a sharding or an offload of Megatron's own (--optimizer adam or sgd)": """
        data-parallel-sharding-strategy outer-dp-sharding-strategy no-gradient-reduce-div-fusion fsdp-double-buffer
        fsdp-manual-registration fsdp-db-use-persist-buf-on-alloc-fail suggested-communication-unit-size megatron-fsdp-*
        torch-fsdp2-no-reshard-after-forward use-torch-optimizer-for-cpu-offload
        overlap-cpu-optimizer-d2h-h2d no-pin-cpu-grads no-pin-cpu-params main-grads-dtype main-params-dtype exp-avg-dtype
        exp-avg-sq-dtype no-use-layer-wise-param-layout
        ddp-param-name-patterns-for-fp32-local-accumulation no-weight-decay-cond-type""",
}

# said by another flag of ours
WITHOUT_MEANING = {
    "muon-tp-mode": "every layout computes the whole matrix; --matrix-mode says how.",
    "muon-no-split-qkv": "q, k and v are matrices of their own; --optimizer-groups can treat them apart.",
    "muon-scalar-optimizer": "say it in a file for --optimizer-groups.",
    "sgd-momentum": "it is for --optimizer sgd.",
    "decoupled-lr": "--scalar-lr-ratio or lr_scale in a file for --optimizer-groups says it.",
    "decoupled-min-lr": "every group's learning rate decays by the same factor.",
}
