"""Values and combinations that no run can mean: one sentence that names the flag, before anything is built."""

import pytest

from tests.training.refusing import MODEL, parsed, refusal

# flags -> what the sentence must hold; `N ranks:` in front gives the number of ranks
NUMBERS = """
--lr inf; --lr nan; --lr 1e30; --lr -1; --weight-decay inf; --weight-decay nan; --weight-decay -0.1; --clip-grad -1
--clip-grad nan; --clip-grad inf; --min-lr -1e-3; --min-lr nan; --adam-beta1 1.0; --adam-beta2 1.5; --adam-beta1 -0.1
--adam-eps -1; --adam-eps 0; --adam-beta2 nan; --lr-warmup-iters -1; --lr-warmup-fraction 1.0; --lr-warmup-fraction nan
--lr-decay-iters 0; --lr-warmup-init -1; --lr-warmup-init nan; --init-method-std -1; --init-method-std inf
--hidden-dropout 1.5; --attention-dropout nan; --hidden-dropout 1; --seed -1; --norm-epsilon 0; --norm-epsilon -1e-5
--num-layers 0; --hidden-size 0; --hidden-size -32; --num-attention-heads 0; --seq-length 0; --seq-length -4
--micro-batch-size 0; --micro-batch-size -1; --global-batch-size 0; --train-iters -1; --eval-interval 0; --eval-iters -1
--log-interval 0; --exit-interval 0; --exit-duration-in-mins -1; --num-workers -1; --kv-channels 0; --ffn-hidden-size 0
--make-vocab-size-divisible-by 0; --vocab-size 0; --vocab-size -5; --padded-vocab-size 0; --distributed-timeout-minutes 0
--tensor-model-parallel-size 0; --pipeline-model-parallel-size -1; --expert-model-parallel-size 0; --rotary-percent 0
--rotary-base -1; --plan-world-size 0; --exchange-bucket-mb 0; --exchange-bucket-mb nan; --matrix-balance nan
--scalar-lr-ratio -1; --scalar-lr-ratio nan; --num-experts -2; --moe-aux-loss-coeff nan; --moe-aux-loss-coeff -1
--moe-router-topk 0; --moe-z-loss-coeff inf; --moe-expert-capacity-factor 0; --mtp-num-layers -1; --mtp-loss-scaling-factor nan
--recompute-num-layers 0; --ckpt-step -1; --ddp-bucket-size 0; --start-eval-at-iter -1; --tensorboard-log-interval 0
--save-interval 0; --kv-lora-rank 0; --q-lora-rank -1; --mup-base-hidden-size 0; --num-query-groups 0
--hang-timeout 1e-9; --hang-timeout nan; --straggler-factor 1; --straggler-factor 0.5; --num-workers 1000000; --num-layers 1000000
--eval-iters 1000000000000; --vocab-size 2000000000; --hidden-size 2000000; --num-experts 1000000; --init-method-std 0
--init-method-std 900; --rotary-base 1; --seed 4294967296; --keep-last -1; --rollback-steps -1; --loss-spike-factor 1
--lr-wsd-decay-iters 0; --end-weight-decay nan; --start-weight-decay -1; --loss-scale nan; --muon-momentum nan
"""
WORDS = """--train-iters many; --train-iters 2.5; --lr abc; --lr; --hidden-size 3e2; --bf16=yes; --split"""
CASES = {
    # shapes and layouts
    "--hidden-size 33": "--hidden-size 33 is not divisible by --num-attention-heads 4",
    "--num-attention-heads 5": "--num-attention-heads 5",
    "--micro-batch-size 3": "--global-batch-size 2 is not divisible by --micro-batch-size 3",
    "--group-query-attention --num-query-groups 3": "--num-query-groups 3",
    "--num-query-groups 2": "has no effect without --group-query-attention",
    "--position-embedding-type rope --kv-channels 7": "--position-embedding-type rope turns pairs",
    "--max-position-embeddings 8": "--max-position-embeddings 8 is below --seq-length 16",
    "--recompute-granularity full --recompute-method block --recompute-num-layers 9": "--recompute-num-layers 9 is above",
    "--recompute-granularity full": "--recompute-method is not given",
    "--recompute-method uniform": "has no effect without --recompute-granularity full",
    "--recompute-granularity selective --recompute-modules foo": "--recompute-modules",
    "--swiglu --squared-relu": "are three activations",
    "2 ranks: --pipeline-model-parallel-size 2 --num-layers 3": "--num-layers 3 is not divisible",
    "2 ranks: --pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2": "--num-layers 2 is not divisible",
    "--num-virtual-stages-per-pipeline-rank 2": "without --pipeline-model-parallel-size above 1",
    "2 ranks: --tensor-model-parallel-size 2 --num-attention-heads 1": "--num-attention-heads 1 is not divisible",
    "2 ranks: --tensor-model-parallel-size 2 --ffn-hidden-size 33": "--ffn-hidden-size 33 is not divisible",
    "2 ranks: --tensor-model-parallel-size 2 --sequence-parallel --seq-length 15": "--seq-length 15 is not divisible",
    "--context-parallel-size 2": "--context-parallel-size 2",
    "--multi-latent-attention --group-query-attention --num-query-groups 2": "--group-query-attention is on",
    "2 ranks: --tensor-model-parallel-size 2 --multi-latent-attention --disable-bias-linear": "loses a part of a gradient",
    # experts
    "--num-experts 4 --moe-router-topk 5": "--moe-router-topk 5 is above --num-experts 4",
    "--num-experts 4 --expert-model-parallel-size 3": "--num-experts 4 is not divisible",
    "--expert-model-parallel-size 1 --moe-router-topk 2": "has no effect without --num-experts",
    "--num-experts 4 --moe-layer-freq [1,0,1]": "--moe-layer-freq",
    "--num-experts 4 --moe-layer-freq abc": "--moe-layer-freq",
    "--num-experts 4 --moe-layer-freq 0": "--moe-layer-freq is 0",
    "--num-experts 4 --moe-router-num-groups 3": "--moe-router-num-groups 3",
    "--num-experts 4 --moe-router-enable-expert-bias": "--moe-router-score-function",
    "--num-experts 4 --moe-router-topk 1": "--moe-router-pre-softmax",
    "--num-experts 4 --moe-token-dispatcher-type flex": "needs a GPU",
    "2 ranks: --tensor-model-parallel-size 2 --num-experts 4": "--disable-bias-linear is off",
    # schedule
    "--min-lr 1": "--min-lr 1 is above --lr 0.001",
    "--lr-warmup-init 1": "--lr-warmup-init 1 is above --lr",
    "--lr-warmup-iters 20": "--lr-warmup-iters 20 is not below the 20 iters",
    "--lr-warmup-samples 5": "--lr-warmup-samples does not go with --train-iters",
    "--lr-decay-style WSD": "needs --lr-wsd-decay-iters",
    "--lr-decay-style WSD --lr-wsd-decay-iters 30": "--lr-wsd-decay-iters 30 is above the 20",
    "--lr-decay-style cosin": "Did you mean cosine?",
    "--train-samples 5": "--train-iters and --train-samples",
    "--weight-decay 2000": "--weight-decay 2000 times --lr 0.001 is 2",
    "--weight-decay 1 --decay-mode independent": "--weight-decay 1 is 1",
    "--start-weight-decay 0.1": "without --weight-decay-incr-style",
    "--weight-decay-incr-style linear": "--start-weight-decay is not given",
    "--rampup-batch-size 2 2 40": "--step-batch-size-schedule",
    "--step-batch-size-schedule 0:2": "--step-batch-size-schedule and --global-batch-size",
    "--decrease-batch-size-if-needed": "--decrease-batch-size-if-needed",
    # without effect, on this platform or at all
    "--fp8-format hybrid": "needs Transformer Engine",
    "--fp8-format hybrid --fp8-recipe delayed": "needs Transformer Engine",
    "--fp8-param-gather": "needs Transformer Engine",
    "--fp4-format e2m1": "needs Transformer Engine",
    "--transformer-impl transformer_engine": "--transformer-impl local",
    "--attention-backend flash": "needs a GPU",
    "--tp-comm-overlap": "needs a GPU",
    "--cuda-graph-impl local": "needs a GPU",
    "--profile": "needs a GPU",
    "--sft": "--sft is refused",
    "--fim-data": "--fim-data is refused",
    "--check-for-spiky-loss": "--check-for-spiky-loss is refused",
    "--qk-l2-norm": "--qk-l2-norm",
    "--apply-wd-to-qk-layernorm": "--optimizer-groups",
    "--data-parallel-random-init": "--data-parallel-random-init is refused",
    "--init-method-xavier-uniform": "--megatron-init",
    "--perform-rl-step": "reinforcement learning",
    "--position-embedding-type mrope": "--position-embedding-type mrope is refused",
    "--experimental-attention-variant dsa": "logical matrices",
    "--adlr-autoresume": "--max-restarts",
    "--yaml-cfg f.yaml": "--yaml-cfg",
    "--batch-size 4": "--micro-batch-size",
    "--no-pad-vocab-size": "--padded-vocab-size",
    # parameters, gradients, optimizer, checkpoint
    "--qk-clip --qk-layernorm": "--qk-layernorm takes their length away",
    "--qk-clip --optimizer adam": "give an optimizer of this project",
    "--log-max-attention-logit --optimizer sgd": "give an optimizer of this project",
    "--qk-clip --qk-clip-alpha 1": "--qk-clip-alpha is 1.0",
    "--qk-clip --qk-clip-threshold 0": "--qk-clip-threshold is 0.0",
    "--qk-clip-threshold 50": "no effect without --qk-clip",
    "--fp4-param-gather": "--fp4-format",
    "--tensor-parallel-num-weight-shards 2": "--tensor-parallel-num-weight-shards",
    "--optimizer-offload-fraction 0.5": "without --optimizer-cpu-offload",
    "--optimizer-cpu-offload --optimizer-offload-fraction 1.5": "--optimizer-offload-fraction",
    "--optimizer-cpu-offload --overlap-cpu-optimizer-d2h-h2d": "--overlap-cpu-optimizer-d2h-h2d",
    "--num-distributed-optimizer-instances 2": "has no effect without --use-distributed-optimizer",
    "2 ranks: --use-distributed-optimizer --num-distributed-optimizer-instances 3": "2 data- and context-parallel ranks",
    "2 ranks: --num-experts 4 --expert-model-parallel-size 2 --use-distributed-optimizer --disable-bias-linear "
    "--num-distributed-optimizer-instances 2": "1 expert-data-parallel ranks are not divisible",
    "2 ranks: --use-distributed-optimizer --num-distributed-optimizer-instances 2 --ddp-reduce-scatter-with-fp32-accumulation":
        "does not go with --ddp-reduce-scatter-with-fp32-accumulation",
    "--matrix-instances within": "--matrix-instances has no effect without",
    "--use-megatron-fsdp": "--use-megatron-fsdp",
    "--use-torch-fsdp2": "--use-torch-fsdp2",
    "--exp-avg-dtype bf16": "--exp-avg-dtype",
    "--overlap-param-gather": "--use-distributed-optimizer is off",
    "--ckpt-format torch": "--ckpt-format torch_dist",
    "--freeze-all-layers": "--freeze-all-layers",
    "--async-save": "without --save",
    "--use-checkpoint-args": "--load",
    "--load /nowhere --use-checkpoint-args": "--use-checkpoint-args takes flags from a checkpoint",
    "--load /nowhere --exit-on-missing-checkpoint": "--load /nowhere is no folder",
    "--save /etc/passwd": "--save /etc/passwd",
    "--save /proc/x": "--save /proc/x cannot be made",
    "--ckpt-step 3": "without --load",
    "--fp16": "--fp16 does not work",
    # what nothing reads
    "--keep-every 2": "--keep-every has no effect without --save",
    "--keep-last 2": "--keep-last has no effect without --save",
    "--on-save-failure continue": "--on-save-failure has no effect without --save",
    "--save x --keep-last 2 --keep-every 3 --save-interval 2": "--keep-every 3 is not a multiple of --save-interval 2",
    "--save x --keep-every 4 --save-interval 2": "--keep-every 4 adds to --keep-last",
    "--trust-checkpoint": "--trust-checkpoint has no effect without --load",
    "--accept-changed norm-epsilon": "--accept-changed has no effect without --load",
    "--load x --save x --accept-changed norm-eps": "Did you mean norm-epsilon?",
    "--override-opt_param-scheduler": "has no effect without --load",
    "--loss-spike-factor 3": "--loss-spike-factor has no effect without --on-loss-spike",
    "--on-loss-spike skip --rollback-steps 5": "--rollback-steps has no effect without --on-loss-spike rollback",
    "--on-loss-spike rollback": "give --save",
    "--log-fp8-ranges": "--log-fp8-ranges has no effect without --fp8-format",
    "--log-samples": "--log-samples has no effect without --output-dir",
    "--wandb-exp-name e": "--wandb-exp-name has no effect without --wandb-project",
    "--lr-decay-style constant --min-lr 1e-4": "--min-lr has no effect without",
    "--optimizer schedule_free --lr-decay-style cosine": "give --lr-decay-style constant",
    "--optimizer schedule_free --lr-decay-style constant --ema-decay 0.9": "--ema-decay would average",
    "--optimizer schedule_free --lr-decay-style constant --qk-clip": "--qk-clip scales the weights",
    "--optimizer prodigy --use-mup --mup-base-hidden-size 16": "train without --use-mup",
    "--optimizer adam --muon-momentum 0.9": "--muon-momentum has no effect on --optimizer adam",
    "--optimizer adam --split-heads": "--split-heads has no effect on --optimizer adam",
    "--optimizer adam --optimizer-groups g.yaml": "--optimizer-groups has no effect on --optimizer adam",
    "--optimizer sgd --decay-mode cautious": "--decay-mode has no effect on --optimizer sgd",
    "--distributed-backend nccl": "--distributed-backend nccl needs GPUs",
    # empty words, and folders that are none
    **{f"{flag}=": flag for flag in ("--output-dir", "--save", "--load", "--tensorboard-dir", "--tokenizer-model", "--wandb-project",
                                     "--optimizer-groups", "--preset", "--lr")},
    "--data-path": "--data-path is given without a value",
    "--load /etc/passwd": "--load /etc/passwd is no folder",
    "--load /nowhere": "--load /nowhere is no folder",
    "--load /proc": "--load /proc holds no checkpoint",
    "--pretrained-checkpoint /nowhere": "--pretrained-checkpoint /nowhere is no folder",
    "--load /nowhere --finetune": "--load /nowhere is no folder",
    "--data-cache-path /etc/passwd": "--data-cache-path /etc/passwd: /etc/passwd is a file",
    "--optimizer-groups /tmp": "--optimizer-groups /tmp cannot be read",
    # tokenizer
    "--tokenizer-type SentencePieceTokenizer": "--tokenizer-model is missing",
    "--tokenizer-type SentencePieceTokenizer --tokenizer-model none": "--tokenizer-model none is not there",
    "--tokenizer-type SentencePieceTokenizer --tokenizer-model /etc/passwd": "--tokenizer-model /etc/passwd",
    "--tokenizer-type SentencePieceTokenizer --tokenizer-model /etc": "is a folder",
    "--padded-vocab-size 5": "--padded-vocab-size 5 is below",
    # typos
    "--optimizer muno": "Did you mean muon?",
    "--optimiser adamw": "Did you mean --optimizer?",
    "--learning-rate 1": "Did you mean --lr?",
    "--lr-warmup 5": "Did you mean --lr-warmup-",
    "--preset lama": "Did you mean llama?",
    "extra": "'extra' belongs to no flag",
}  # fmt: skip


@pytest.mark.parametrize("flags", [case.strip() for line in NUMBERS.strip().split("\n") for case in line.split(";")])
def test_number(flags):
    flag, _ = flags.split()
    said = refusal(flags)
    assert said.startswith(f"{flag} is ") and "; it must be " in said and said.endswith("."), said


@pytest.mark.parametrize("flags", [case.strip() for case in WORDS.split(";")])
def test_word(flags):
    assert refusal(flags).startswith(flags.split()[0].split("=")[0])


@pytest.mark.parametrize("flags", CASES)
def test_combination(flags):
    ranks, sign, rest = flags.partition(" ranks: ")
    said = refusal(rest if sign else flags, int(ranks) if sign else 1)
    assert CASES[flags] in said
    assert said[-1] in ".?" and "\n" not in said and ".py:" not in said and "argument(s)" not in said


_IDS = "--tokenizer-type NullTokenizer --vocab-size 127"
MISSING = {
    "--preset llama": "--num-layers is missing",
    f"--preset llama --num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --train-iters 10 {_IDS}": (
        "--micro-batch-size is missing"
    ),
    "--preset demo": "--tokenizer-type is missing",
    "--preset demo --tokenizer-type NullTokenizer": "--vocab-size is missing",
}


@pytest.mark.parametrize("flags", MISSING)
def test_missing(flags):
    from megatron_opt.errors import UserError

    with pytest.raises(UserError, match=MISSING[flags]):
        parsed(flags.split())


@pytest.mark.parametrize(("left_out", "said"), [
    ("--micro-batch-size", "--micro-batch-size is missing"), ("--train-iters", "--train-iters is missing"),
    ("--lr", "--lr is missing"), ("--hidden-size", "--hidden-size is missing"), ("--seq-length", "--seq-length is missing"),
    ("--vocab-size", "--vocab-size is missing"), ("--tokenizer-type", "--tokenizer-type is missing"),
])  # fmt: skip
def test_left_out(left_out, said):
    from megatron_opt.errors import UserError

    place = MODEL.index(left_out)
    with pytest.raises(UserError, match=said):
        parsed([*MODEL[:place], *MODEL[place + 2 :]])


def test_eval_interval_is_wanted_where_something_is_evaluated():
    from megatron_opt.errors import UserError

    place = MODEL.index("--eval-interval")
    without = [*MODEL[:place], *MODEL[place + 2 :]]
    assert parsed(without).eval_interval == 20
    place = without.index("--eval-iters")
    silent = [*without[:place], *without[place + 2 :]]
    assert parsed(silent).eval_iters == 0, "nothing of evaluation was said"
    with pytest.raises(UserError, match="--eval-interval is missing"):
        parsed([*silent, "--full-validation"])
    with pytest.raises(UserError, match="--eval-interval is missing"):
        parsed([*without, "--eval-iters", "2"])


@pytest.mark.parametrize("flags", ["--bf16", "--num-experts 4 --moe-aux-loss-coeff 0.01", "--lr 0", "--clip-grad 0",
                                   "--min-lr 0", "--weight-decay 20", "--optimizer muon --muon-momentum 0",
                                   "--lr-decay-style WSD --lr-wsd-decay-iters 4", "--optimizer adam",
                                   "--optimizer schedule_free --lr-decay-style constant"])  # fmt: skip
def test_accepted(flags):
    parsed([*MODEL, *flags.split()])


@pytest.mark.parametrize(("tp", "divisor", "size"), [(1, None, 2048), (2, None, 2048), (4, None, 2048), (1, 384, 2304),
                                                      (3, 384, 2304), (6, 384, 2304), (1, 1024, 2048), (4, 1024, 2048)])  # fmt: skip
def test_one_padded_vocabulary_for_all_layouts(tp, divisor, size):
    shape = "--hidden-size 96 --num-attention-heads 12 --ffn-hidden-size 384 --vocab-size 2047 --global-batch-size 12"
    given = f" --make-vocab-size-divisible-by {divisor}" if divisor else ""
    args = parsed([*MODEL, *f"{shape} --tensor-model-parallel-size {tp}{given}".split()], ranks=tp)
    assert args.padded_vocab_size == size


@pytest.mark.parametrize("tp", [3, 6, 12])
def test_a_vocabulary_that_tensor_parallelism_cannot_cut_names_the_divisor(tp):
    shape = "--hidden-size 96 --num-attention-heads 12 --ffn-hidden-size 384 --vocab-size 2047 --global-batch-size 12"
    assert "--make-vocab-size-divisible-by 384" in refusal(f"{shape} --tensor-model-parallel-size {tp}", ranks=tp)
