"""Models of every structure, by their flags; the tests of the description and of the plan build them all."""

BASE = (
    "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --padded-vocab-size 128 "
    "--position-embedding-type rope --normalization RMSNorm --disable-bias-linear --swiglu"
)
UNTIED = f"{BASE} --untie-embeddings-and-output-weights"
MOE = f"{UNTIED} --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 48"
MLA = (
    f"{UNTIED} --multi-latent-attention --kv-lora-rank 16 --qk-head-dim 8 --qk-pos-emb-head-dim 4 --v-head-dim 12 "
    "--position-embedding-type rope"
)
HYBRID = f"{UNTIED} --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 48 --hybrid-layer-pattern"
MAMBA = "--mamba-head-dim 8 --mamba-num-groups 2 --mamba-state-dim 4"

MODELS = {
    "dense": UNTIED,
    "tied": BASE,
    "gpt2": "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --padded-vocab-size 128",
    "wide-heads": f"{UNTIED} --kv-channels 16",
    "gqa": f"{UNTIED} --group-query-attention --num-query-groups 2",
    "qkv-bias": f"{UNTIED} --add-qkv-bias",
    "qk-norm": f"{UNTIED} --qk-layernorm",
    "output-gate": f"{UNTIED} --attention-output-gate --group-query-attention --num-query-groups 2",
    "geglu": f"{UNTIED.replace('--swiglu', '--quick-geglu')}",
    "mla": MLA,
    "mla-q": f"{MLA} --q-lora-rank 24 --qk-layernorm",
    "mtp": f"{UNTIED} --mtp-num-layers 2",
    "mtp-tied": f"{BASE} --mtp-num-layers 1",
    "mtp-moe": f"{MOE} --mtp-num-layers 1",
    "moe": MOE,
    "moe-bias": MOE.replace(" --disable-bias-linear", ""),
    "moe-shared": f"{MOE} --moe-shared-expert-intermediate-size 64",
    "moe-shared-gate": f"{MOE} --moe-shared-expert-intermediate-size 64 --moe-shared-expert-gate",
    "moe-every-2nd": f"{MOE} --moe-layer-freq 2",
    "moe-list": f"{MOE} --moe-layer-freq ([0]*1+[1]*3)",
    "hybrid": f"{HYBRID} *-*-",
    "hybrid-moe": f"{HYBRID} *E*-",
    "hybrid-pipes": f"{HYBRID} *-|*E",
    "hybrid-mamba": f"{HYBRID} M*M- {MAMBA}",
    "hybrid-mtp": f"{HYBRID} *-M-/*-/*- {MAMBA}",
}
