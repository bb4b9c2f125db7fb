"""Everything of Megatron and torch that this package replaces at run time, in the order in which it does, and why.

Written against megatron-core 0.19.2. `digests.json` beside the tests says what each target's source was; a test names the
targets that another Megatron has changed, the replacements that are not listed here, and the lines that replace nothing.
`python -m megatron_opt.patches` prints the table of docs/architecture.md.
"""

import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from megatron_opt.report import markdown
from megatron_opt.report.blocks import Table


class Patch(NamedTuple):
    """One replacement: of what, in which file of this package, what for. Wrappers of one target apply in table order."""

    target: str
    file: str
    why: str


_TABLE = """
plugin.py
  megatron.training.arguments.parse_args: our flags in an unmodified Megatron-LM
  megatron.training.arguments.validate_args: our optimizers' names are checked by us, and are adam to Megatron meanwhile
  megatron.core.optimizer.get_megatron_optimizer: builds our optimizers in an unmodified Megatron-LM
  megatron.training.training.get_megatron_optimizer: the same, under the name that the loop has imported
  megatron.training.training.initialize_megatron: on CPU: allows no CUDA
training/flags/vocabulary.py
  megatron.core.tokenizers.utils.build_tokenizer.vocab_size_with_padding: one padded vocabulary for all TP sizes
training/record.py
  megatron.training.global_vars._set_wandb_writer: opens the W&B run with the record as its config
training/arguments.py
  megatron.training.training.get_model: errors of building the model name their flags
  megatron.training.arguments.parse_args: fault-tolerance hooks parse once more, without our flags and presets
training/job.py
  megatron.training.training.initialize_megatron: on CPU: allows no CUDA
checkpointing/resuming.py
  megatron.training.training.load_checkpoint: looks at a checkpoint first: whole, same model, same run, our optimizer's state
checkpointing/other_layers.py
  megatron.core.dist_checkpointing.load: checkpoints of local layers and of Transformer Engine's load into each other
checkpointing/resuming.py
  megatron.core.dist_checkpointing.validation.validate_sharding_integrity: what rank 0 refuses at a load, every rank refuses
  megatron.core.dist_checkpointing.state_dict_utils.validate_sharding_integrity: the same at a save
  megatron.core.dist_checkpointing.strategies.fully_parallel.validate_sharding_integrity: the same for saves shared by ranks
  megatron.training.checkpointing._build_sharded_state_dict_metadata: state stored by whole-matrix coordinates loads on any layout
training/job.py
  megatron.training.training.get_megatron_optimizer: builds our optimizers, watched by the monitor
  megatron.training.training.clip_qk: the optimizer's step has clipped, and knows the largest logit of all ranks
training/stragglers.py
  torch.distributed.Work.wait: on CPU: time spent waiting for asynchronous collectives
  torch.distributed.*: on CPU: time spent waiting in twelve collectives
  megatron.training.training.train_step: on CPU: a rank's own time
training/monitoring.py
  megatron.training.training.training_log: metrics of a step
  megatron.training.training.evaluate: evaluation losses, and its time kept out of the steps'
  megatron.training.training.evaluate_and_print_results: which split is being evaluated
  megatron.training.training.print_rank_last: TFLOP/s that are not rounded to zero
  megatron.training.training.train: the first look at the loop; inside the signals'
  megatron.training.training.get_forward_backward_func: time of forward and backward passes
training/sinks.py
  megatron.core.timers.SummaryWriter: the timers' class check knows the one writer
  megatron.training.training.get_tensorboard_writer: one writer for TensorBoard and W&B
  megatron.training.training.get_wandb_writer: likewise
  megatron.training.training.write_args_to_tensorboard: the record is written instead
  megatron.training.global_vars._GLOBAL_WANDB_WRITER: the run that we opened
training/signals.py
  megatron.training.training.train: listens to SIGTERM and SIGUSR1 from the first step on
  megatron.training.global_vars._GLOBAL_SIGNAL_HANDLER: a handler of two signals, and an exit code that says so
checkpointing/saving.py
  megatron.training.checkpointing.get_checkpoint_name: writes aside, where no reader looks
  megatron.training.checkpointing.get_checkpoint_tracker_filename: the tracker is written after the checkpoint is published
  megatron.training.wandb_utils.on_save_checkpoint_success: announces a checkpoint once it is published
  megatron.training.training.save_checkpoint: room, digests, publication, retention, failed saves
  megatron.training.training.load_checkpoint: picks the newest checkpoint that is whole and harmless; outside resuming's
  megatron.training.checkpointing.schedule_async_save: --async-save: hands a save to our writer
  megatron.core.dist_checkpointing.strategies.filesystem_async._results_queue: a queue in this process; Megatron's outlives it
  megatron.core.dist_checkpointing.strategies.filesystem_async.FileSystemWriterAsync.finish: an error is noted
  megatron.core.dist_checkpointing.serialization.save_config: likewise
checkpointing/snapshot.py
  megatron.core.dist_checkpointing.strategies.filesystem_async._results_queue: --async-save: not used
  megatron.training.initialize.init_persistent_async_worker: --async-save: Megatron's worker is not started
  megatron.core.dist_checkpointing.strategies.torch.TorchDistSaveShardedStrategy.async_save: --async-save: a plan that lasts
  megatron.core.dist_checkpointing.strategies.torch.MCoreSavePlanner.resolve_data: --async-save: where each item of the plan comes from
  megatron.training.checkpointing.generate_state_dict: --async-save: a repeated save describes only what is not a tensor
  megatron.training.training.get_forward_backward_func: --async-save: the optimizer waits for the copy; outside the monitor's
checkpointing/saving.py
  megatron.training.training.maybe_finalize_async_save: hears how a background save ended
training/faults.py
  megatron.training.training.train_step: leaves the update of a spike out; outside the stragglers' clock
  megatron.training.training.checkpoint_and_decide_exit: the hang watch sees steps end
training/curvature.py
  megatron.training.training.train_step: estimates curvature before steps that want it
training/activations.py
  megatron.training.training.train_step: µP check: records activations
migrate/checkpoint.py
  megatron.training.training.setup_model_and_optimizer: warm start: writes the new state instead of training
plugin.py
  megatron.core.optimizer._megatron_opt: marks that the plugin is in
launch.py
  torch.distributed.launcher.api.LocalElasticAgent: tells restarts from refusals, and ends ranks with their agent
platform/transformer_engine/layers.py
  torch.cuda.get_device_capability: on CPU: Transformer Engine asks for Hopper's
  megatron.core.extensions.transformer_engine.TEDotProductAttention.forward: on CPU: torch's attention, gathering under CP
  megatron.core.dist_checkpointing.strategies.torch.MCoreSavePlanner.resolve_data: on CPU: weights in FP8 are saved as numbers
  megatron.core.distributed.param_and_grad_buffer.dist_all_gather_func: on CPU: gathers bytes, as gloo mixes no types
platform/megatron_patches.py
  megatron.core.datasets.utils.compile_helpers: on CPU: the wheel's helper is compiled already
  megatron.core.tensor_parallel.random._set_cuda_rng_state: on CPU: the CPU's generator
  megatron.core.tensor_parallel.random._get_cuda_rng_state: on CPU: the CPU's generator
  megatron.core.tensor_parallel.random.CudaRNGStatesTracker.fork: on CPU: the CPU's generator
  megatron.core.tensor_parallel.mappings._gather_along_first_dim: on CPU: uneven gathers by gloo
  megatron.core.tensor_parallel.mappings._reduce_scatter_along_first_dim: on CPU: uneven reduce-scatters by gloo
  megatron.core.transformer.moe.moe_utils.maybe_move_tensor_to_cpu: on CPU: split sizes as lists
  megatron.core.transformer.moe.token_dispatcher.maybe_move_tensor_to_cpu: the same, under an imported name
platform/local_layers.py
  megatron.core.transformer.dot_product_attention.DotProductAttention.forward: torch's scaled-dot-product attention in local layers
  megatron.core.transformer.dot_product_attention.DotProductAttention.__init__: multi-latent attention's arguments
  megatron.core.transformer.torch_norm.WrappedTorchNorm.__new__: sequence parallelism with torch's norms in local layers
platform/latent_attention.py
  megatron.core.transformer.dot_product_attention.DotProductAttention.__init__: multi-latent attention in local layers
platform/single_rank.py
  torch.distributed.all_reduce: on CPU: a group of one rank has nothing to reduce
platform/hybrid_stack.py
  megatron.core.models.hybrid.hybrid_block.TENorm: on CPU: the last norm of a hybrid stack
platform/megatron_faults.py
  megatron.core.extensions.transformer_engine._initialize_affine_weight_cpu: weights in FP8 remember what was drawn
  megatron.core.transformer.moe.router.TopKRouter.attach_and_log_load_balancing_loss: the global loss not divided by DP
platform/cuda_answers.py
  torch.compile: on CPU: off
  torch.cuda.*: on CPU: torch.cuda answers for the processor
  torch.nn.Module.to: on CPU: `cuda` means the processor
  torch.nn.Module.cuda: on CPU: `cuda` means the processor
"""


def _read(text: str) -> Iterator[Patch]:
    file = ""
    for line in text.strip().splitlines():
        if line.startswith(" "):
            target, why = line.strip().split(": ", 1)
            yield Patch(target, file, why)
        else:
            file = line


PATCHES = tuple(_read(_TABLE))
_applied: dict[str, int] = {}  # line of the last wrapper of a target


def wrap(target: str, file: str, make: Callable[[Any], Any]) -> None:
    """Put `make(original)` in the place of `target`; RuntimeError where the table does not list it, or lists it earlier."""
    line = next((n for n, patch in enumerate(PATCHES) if (patch.target, patch.file) == (target, file)), None)
    if line is None:
        raise RuntimeError(f"{file} replaces {target}, which megatron_opt/patches.py does not list")
    if line < _applied.get(target, line):
        raise RuntimeError(f"{file} replaces {target} after {PATCHES[_applied[target]].file}, which is to come later")
    owner, name = _owner(target)
    setattr(owner, name, make(getattr(owner, name)))
    _applied[target] = line


def _owner(target: str) -> tuple[Any, str]:
    parts = target.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            owner: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for name in parts[cut:-1]:
            owner = getattr(owner, name)
        return owner, parts[-1]
    raise RuntimeError(f"there is no {target}")


def table() -> str:
    """Markdown, in the order of the table."""
    rows = [[f"`{patch.target}`", f"`{patch.file}`", patch.why] for patch in PATCHES]
    return "\n".join(markdown.table(Table(["replaced", "by", "why"], rows)))


if __name__ == "__main__":
    print(table())
