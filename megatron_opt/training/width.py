"""µP flags are Megatron's own (`--use-mup`, `--mup-…`); this checks them and says how wide the model is over its base."""

from typing import Any

from megatron_opt.errors import UserError

_MULTIPLIERS = ("mup-base-hidden-size", "mup-embedding-mult", "mup-output-mult", "mup-base-head-dim",
                "mup-attn-scale-power")  # fmt: skip


def check_mup(args: Any) -> None:
    """Refuse µP flags that would have no effect, and models that µP's multipliers would not reach."""
    given: set[str] = args.given_flags
    if "mup-width-mult" in given:
        raise UserError("--mup-width-mult is --hidden-size over --mup-base-hidden-size; give those two.")
    if not getattr(args, "use_mup", False):
        for flag in _MULTIPLIERS:
            if flag in given:
                raise UserError(f"--{flag} has no effect without --use-mup; give both or neither.")
        return
    base = args.mup_base_hidden_size
    if base is None:
        raise UserError(
            "--use-mup needs --mup-base-hidden-size, the width that hyperparameters were tuned at (when tuning: "
            "the model's own)."
        )
    if base < 1:
        raise UserError(f"--mup-base-hidden-size {base} is not a width; give the one that was tuned at.")
    if getattr(args, "multi_latent_attention", False):
        raise UserError("--use-mup does not reach --multi-latent-attention's softmax scale; remove one of the two.")


def width_ratio(config: Any) -> float:
    """Hidden size over the base's, 1 without µP, from a Megatron TransformerConfig."""
    return float(config.mup_width_mult) if getattr(config, "use_mup", False) else 1.0
