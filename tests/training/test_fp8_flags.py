"""FP8 flags that no run can mean are refused at start, by name."""

from types import SimpleNamespace

import pytest

from megatron_opt.errors import UserError
from megatron_opt.training.flags import fp8

GOOD = {
    "fp8": "hybrid", "fp4": None, "fp8_recipe": "tensorwise", "fp8_output_proj": False, "first_last_layers_bf16": False,
    "num_layers_at_start_in_bf16": 1, "num_layers_at_end_in_bf16": 1, "num_layers": 4, "hidden_size": 64,
    "num_attention_heads": 4, "kv_channels": 16, "num_query_groups": 2, "group_query_attention": True, "ffn_hidden_size": 128,
    "multi_latent_attention": False, "attention_output_gate": False, "num_experts": None, "micro_batch_size": 2,
    "moe_shared_expert_intermediate_size": None, "expert_tensor_parallel_size": None, "seq_length": 16,
    "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "context_parallel_size": 1, "sequence_parallel": False,
    "fp8_param_gather": False, "reuse_grad_buf_for_mxfp8_param_ag": False, "bf16": True, "use_distributed_optimizer": True,
    "overlap_param_gather": False, "megatron_init": False, "async_save": False, "no_load_optim": None, "finetune": False,
    "optimizer": "muon",
}  # fmt: skip


def _args(**changed):
    return SimpleNamespace(**(GOOD | changed))


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise", "mxfp8"])
def test_sizes_that_fp8_takes_pass(recipe):
    fp8.check_recipe(_args(fp8_recipe=recipe))
    fp8.check_sizes(_args(fp8_recipe=recipe))


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"hidden_size": 72}, "--hidden-size 72 is 72"),
        ({"ffn_hidden_size": 136, "tensor_model_parallel_size": 2}, "--ffn-hidden-size 136 / --tensor-model-parallel"),
        ({"kv_channels": 10}, "--num-attention-heads 4 × head size 10 is 40"),
        ({"num_experts": 2, "moe_ffn_hidden_size": 40}, "--moe-ffn-hidden-size 40 is 40"),
        ({"seq_length": 12}, "--micro-batch-size 2 × --seq-length 12 is 24"),
        ({"context_parallel_size": 4}, "--seq-length 16 / --context-parallel-size 4 is 8"),
        ({"sequence_parallel": True, "tensor_model_parallel_size": 4, "hidden_size": 128}, "is 16|is 8"),
    ],
)
def test_sizes_that_are_no_multiple_of_16_are_refused(changed, said):
    with pytest.raises(UserError, match=said):
        fp8.check_sizes(_args(**changed))


def test_mxfp8_takes_multiples_of_32():
    fp8.check_sizes(_args(hidden_size=48, num_attention_heads=3, group_query_attention=False))
    with pytest.raises(UserError, match=r"--hidden-size 48 is 48.*--fp8-recipe mxfp8 takes in multiples of 32"):
        fp8.check_sizes(_args(hidden_size=48, num_attention_heads=3, group_query_attention=False, fp8_recipe="mxfp8"))
    with pytest.raises(UserError, match="--seq-length 8 is 16"):
        fp8.check_sizes(_args(seq_length=8, fp8_recipe="mxfp8"))
    fp8.check_sizes(_args(seq_length=8, fp8=None, fp8_recipe="mxfp8"))


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"fp8": None, "fp4": "e2m1"}, "--fp4-format is not emulated on CPU: NVFP4 rounds .* stochastically"),
        ({"fp8_recipe": "custom"}, "--fp8-recipe custom"),
        ({"fp8_output_proj": True}, "--fp8-output-proj is for --fp8-recipe mxfp8"),
        ({"fp8_output_proj": True, "fp8_recipe": "mxfp8"}, "--fp8-output-proj is not emulated"),
        ({"first_last_layers_bf16": True, "fp8_recipe": "delayed"}, "--first-last-layers-bf16 .* --fp8-recipe delayed"),
        ({"first_last_layers_bf16": True, "num_layers_at_end_in_bf16": 5}, "--num-layers-at-end-in-bf16 5 is above the 4"),
    ],
)  # fmt: skip
def test_recipes_and_their_options_that_do_not_fit_are_refused(changed, said):
    with pytest.raises(UserError, match=said):
        fp8.check_recipe(_args(**changed))


GATHER, REUSE = {"fp8_param_gather": True}, {"reuse_grad_buf_for_mxfp8_param_ag": True}


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"bf16": False}, "fp32 training"),
        ({"use_distributed_optimizer": False}, "--use-distributed-optimizer"),
        ({"moe_single_grouped_weight": True}, "--moe-single-grouped-weight"),
        ({"fp8_recipe": "mxfp8"}, "needs --reuse-grad-buf-for-mxfp8-param-ag"),
        (REUSE, "--fp8-recipe tensorwise takes no --reuse-grad-buf-for-mxfp8-param-ag"),
    ],
)
def test_what_weights_in_fp8_do_not_go_with_is_refused(changed, said):
    with pytest.raises(UserError, match=f"--fp8-param-gather.*{said}"):
        fp8.check_recipe(_args(**(GATHER | changed)))
    fp8.check_recipe(_args(**GATHER))
    fp8.check_recipe(_args(**(GATHER | REUSE | {"fp8_recipe": "mxfp8", "overlap_param_gather": True})))
    fp8.check_recipe(_args(**(GATHER | {"fp8_recipe": "delayed", "async_save": True, "finetune": True})))


def test_the_mxfp8_buffer_without_weights_in_fp8_is_refused():
    with pytest.raises(UserError, match="--reuse-grad-buf-for-mxfp8-param-ag has no effect without --fp8-param-gather"):
        fp8.check_recipe(_args(**REUSE))


@pytest.mark.parametrize(
    "recipe, capability, cuda, said",
    [
        ("mxfp8", (9, 0), "13.0", "capability 9.0; give delayed or tensorwise or blockwise"),
        ("mxfp8", (12, 0), "13.0", "capability 12.0; give delayed"),
        ("blockwise", (8, 9), "13.0", "capability 8.9; give delayed or tensorwise"),
        ("tensorwise", (8, 0), "13.0", "capability 8.0; leave out --fp8-format"),
        ("blockwise", (9, 0), "12.8", "needs CUDA 12.9, torch was built with 12.8"),
    ],
)
def test_recipes_that_the_hardware_lacks_are_refused(recipe, capability, cuda, said):
    with pytest.raises(UserError, match=said):
        fp8.check_hardware(recipe, capability, cuda)


def test_recipes_that_the_hardware_has_pass():
    fp8.check_hardware("blockwise", (9, 0), "12.9")
    fp8.check_hardware("mxfp8", (10, 0), "13.0")
    fp8.check_hardware("delayed", (8, 9), "12.4")
