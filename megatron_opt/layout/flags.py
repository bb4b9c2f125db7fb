"""The flags that decide which parameters a model has, and those that this project does not describe and refuses."""

from collections.abc import Mapping
from typing import Any

from megatron_opt.errors import UserError

# Flags that decide which parameters a model has, and the kind of their value.
FLAGS: dict[str, type] = {
    **dict.fromkeys(
        "num-layers hidden-size ffn-hidden-size num-attention-heads num-query-groups kv-channels seq-length vocab-size "
        "padded-vocab-size make-vocab-size-divisible-by max-position-embeddings num-experts moe-router-topk "
        "moe-ffn-hidden-size moe-shared-expert-intermediate-size moe-layer-freq moe-first-dense-layers q-lora-rank "
        "kv-lora-rank qk-head-dim qk-pos-emb-head-dim v-head-dim mtp-num-layers mamba-state-dim mamba-head-dim "
        "mamba-num-groups mamba-num-heads".split(),
        float,
    ),
    **dict.fromkeys(
        "normalization position-embedding-type transformer-impl hybrid-layer-pattern softmax-type".split(), str
    ),
    **dict.fromkeys(
        "swiglu quick-geglu group-query-attention multi-latent-attention untie-embeddings-and-output-weights "
        "disable-bias-linear add-qkv-bias qk-layernorm attention-output-gate moe-shared-expert-gate "
        "mtp-use-repeated-layer".split(),
        bool,
    ),
}
# Flags that change parameters in ways that are not described here.
REFUSED: dict[str, type] = {
    **dict.fromkeys(
        "experimental-attention-variant heterogeneous-layers-config-path heterogeneous-layers-config-encoded-json "
        "moe-latent-size spec yaml-cfg hybrid-override-pattern mtp-hybrid-override-pattern".split(),
        str,
    ),
    "mla-down-proj-fusion": bool,
}
_UNKNOWN_LAYERS = {"G": "gated delta net", "D": "sparse attention", "+": "MLA"}


def structural(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Those flags that decide the parameters, numbers given as words turned into numbers; `true`/`false` into switches."""
    fields: dict[str, Any] = {}
    for name, value in flags.items():
        kind = {**FLAGS, **REFUSED}.get(name)
        if kind is None or value is None:
            continue
        if kind is bool and isinstance(value, str):
            value = value.lower() not in ("false", "0", "no", "none")
        elif kind is float and isinstance(value, str) and value.isdigit():
            value = int(value)
        elif kind is float and not isinstance(value, int) and name != "moe-layer-freq":
            raise UserError(f"--{name} is {value!r}; it must be a whole number.")
        fields[name] = value
    return fields


def refuse_unknown(flags: Mapping[str, Any]) -> None:
    """Raise UserError for a flag whose parameters are not described here."""
    for name in REFUSED:
        if flags.get(name):
            raise UserError(f"--{name} changes the model in a way that is not described here; leave it out.")
    if str(flags.get("softmax-type") or "vanilla") == "learnable":
        raise UserError("--softmax-type learnable adds parameters that are not described here; use another.")


def hybrid_pattern(text: str) -> tuple[str, str, str, int]:
    """Megatron's --hybrid-layer-pattern: whole main part, its layers, the layers of one MTP depth, depths."""
    main, *rest = text.split("/")
    depths = [part for part in rest if part]
    for symbol in main.replace("|", "") + "".join(depths):
        if symbol in _UNKNOWN_LAYERS:
            raise UserError(
                f"--hybrid-layer-pattern {text}: layers of {_UNKNOWN_LAYERS[symbol]} ({symbol}) are not described here."
            )
        if symbol not in "M*-E":
            raise UserError(f"--hybrid-layer-pattern {text}: {symbol!r} is no layer; use M, *, - and E.")
    if len(set(depths)) > 1:
        raise UserError(f"--hybrid-layer-pattern {text}: all depths of MTP must be equal.")
    return main, main.replace("|", ""), depths[0] if depths else "", len(depths)


def expert_layers(flags: Mapping[str, Any], layers: int) -> frozenset[int]:
    """Megatron's --moe-layer-freq: every n-th layer, or a list such as ([0]*1+[1]*26)."""
    every = flags.get("moe-layer-freq") or 1
    if isinstance(every, int):
        chosen = frozenset(range(0, layers, every))
    elif isinstance(every, (list, tuple)):
        chosen = frozenset(index for index, one in enumerate(_checked(list(every), str(every), layers)) if one)
    else:
        chosen = frozenset(index for index, one in enumerate(_pattern_list(str(every), layers)) if one)
    return chosen - frozenset(range(flags.get("moe-first-dense-layers") or 0))


def _pattern_list(text: str, layers: int) -> list[int]:
    """[0]*3+[1]*58 without eval."""
    pattern: list[int] = []
    for term in text.strip("()").replace(" ", "").split("+"):
        inside, _, times = term.strip("()").partition("*")
        try:
            pattern += [int(item) for item in inside.strip("[]").split(",")] * int(times or 1)
        except ValueError:
            raise UserError(f"--moe-layer-freq {text!r} is not a number nor like [0]*1+[1]*26.") from None
    return _checked(pattern, text, layers)


def _checked(pattern: list[int], text: str, layers: int) -> list[int]:
    if len(pattern) != layers:
        raise UserError(f"--moe-layer-freq {text!r} names {len(pattern)} layers, the model has {layers}.")
    return pattern
