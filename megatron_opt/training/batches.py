"""Datasets, batches and the language-model loss: what Megatron-LM's pretrain_gpt.py does, for the pip package."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_opt.errors import UserError
from megatron_opt.training import data_flags, epochs, samples, validation
from megatron_opt.training.index_cache import whole_arrays

BATCH_KEYS = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")


class Replay:
    """Keeps the batches of a step, so that a second pass over them takes none from the data."""

    def __init__(self) -> None:
        self.recording = self.replaying = False
        self._kept: dict[int | None, list[Any]] = {}

    def record(self) -> None:
        """Keep what is loaded from now on, and forget what was."""
        self.recording, self.replaying, self._kept = True, False, {}

    def replay(self) -> None:
        """Hand out what was kept, in order."""
        self.recording, self.replaying = False, True

    def stop(self) -> None:
        """Back to the data."""
        self.recording, self.replaying, self._kept = False, False, {}

    def keep(self, stage: int | None, batch: Any) -> None:
        if self.recording:
            self._kept.setdefault(stage, []).append(batch)

    def pop(self, stage: int | None) -> Any:
        return self._kept[stage].pop(0)


REPLAY = Replay()


def build_datasets(num_samples: tuple[int | None, ...], vp_stage: int | None = None) -> Any:
    """Train, validation and test `GPTDataset`s for the data flags; `num_samples` are Megatron's target sizes."""
    from megatron.core import mpu
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
    from megatron.training import get_args, get_tokenizer

    from megatron_opt.training.dataset import GPTDataset

    args = get_args()
    epochs_wanted = getattr(args, "train_epochs", None)  # a script of Megatron's does not know the flag
    if epochs_wanted is not None:
        num_samples = (epochs.unique_samples(num_samples[0], epochs_wanted), *num_samples[1:])
    sources = data_flags.resolve(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=sources.joint and sources.joint.for_megatron(),
        blend_per_split=sources.apart and [blend and blend.for_megatron() for blend in sources.apart],
        split=sources.split,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
        sequence_parallel_size=args.tensor_model_parallel_size * args.sequence_parallel,
    )

    def on_this_rank() -> bool:
        return bool(mpu.get_tensor_model_parallel_rank() == 0)

    kind = MockGPTDataset if args.mock_data else GPTDataset
    try:
        with whole_arrays():
            datasets = validation.build(
                lambda config, sizes: BlendedMegatronDatasetBuilder(kind, sizes, on_this_rank, config).build(),
                config, list(num_samples), args,
            )  # fmt: skip
    except (AssertionError, ValueError, OSError, IndexError, KeyError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"the dataset could not be opened: {text} (is it a Megatron .bin/.idx pair?)") from error
    if epochs_wanted is not None:
        assert num_samples[0] is not None
        datasets = [epochs.repeat(datasets[0], num_samples[0], epochs_wanted, args.seed), *datasets[1:]]
    if getattr(args, "log_samples", False) and datasets[0] is not None:  # a script of Megatron's does not know the flag
        return samples.Numbered(datasets[0]), *datasets[1:]
    return datasets


build_datasets.is_distributed = True  # type: ignore[attr-defined]  # every rank calls it, for its barriers


def get_batch(data_iterator: Iterator[Any], vp_stage: int | None) -> tuple[Tensor | None, ...]:
    """Tokens, labels, loss mask, attention mask and position ids, each (b, s), on the stages that need them."""
    from megatron.core import mpu
    from megatron.core.pipeline_parallel.utils import is_vp_first_stage, is_vp_last_stage
    from megatron.core.utils import get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
    from megatron.training import get_args

    args = get_args()
    vp_size = args.virtual_pipeline_model_parallel_size
    first = mpu.is_pipeline_first_stage(ignore_virtual=True) and is_vp_first_stage(vp_stage, vp_size)
    last = mpu.is_pipeline_last_stage(ignore_virtual=True) and is_vp_last_stage(vp_stage, vp_size)
    if not first and not last:
        return (None,) * len(BATCH_KEYS)
    tp_rank = mpu.get_tensor_model_parallel_rank()
    batch: dict[str, Any] = {}
    if tp_rank == 0:
        loaded = REPLAY.pop(vp_stage) if REPLAY.replaying else next(data_iterator)
        if first and samples.KEY in loaded and not REPLAY.replaying:
            samples.log(args, loaded[samples.KEY].tolist())
        REPLAY.keep(vp_stage, loaded)
        batch = {key: loaded[key].cuda(non_blocking=True) if key in loaded else None for key in BATCH_KEYS}
    if mpu.get_tensor_model_parallel_world_size() > 1:
        batch = get_batch_on_this_tp_rank(
            batch,
            broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
            broadcast_group=mpu.get_tensor_model_parallel_group(),
            has_cu_seqlens=False,
            is_hybrid_cp=False,
            create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
            cp_size=args.context_parallel_size,
            tp_rank=tp_rank,
            micro_batch_size=args.micro_batch_size,
            seq_length=args.seq_length,
            mtp_on_this_rank=False,
            pipeline_model_parallel_size=args.pipeline_model_parallel_size,
            is_pipeline_first_stage=first,
            is_pipeline_last_stage=last,
        )
    if args.context_parallel_size > 1:
        batch["cu_seqlens"] = None
        batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group())
    return tuple(batch.get(key) for key in BATCH_KEYS)


def loss_function(loss_mask: Tensor, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of the masked token losses, their number, and both for the log."""
    mask = loss_mask.reshape(-1).float()
    loss = torch.sum(output.reshape(-1).float() * mask)
    count = mask.sum().detach().to(torch.int)
    report = torch.cat([loss.detach().view(1), count.view(1).float()])
    return loss, count, {"lm loss": report}


def forward_step(data_iterator: Iterator[Any], model: Any) -> tuple[Tensor, Any]:
    """One microbatch through this stage of the model."""
    from megatron.core.utils import get_attr_wrapped_model
    from megatron.training import get_timers

    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    vp_stage = get_attr_wrapped_model(model, "vp_stage")
    tokens, labels, loss_mask, attention_mask, position_ids = get_batch(data_iterator, vp_stage)
    timers("batch-generator").stop()
    output = model(tokens, position_ids, attention_mask, labels=labels)
    return output, partial(loss_function, loss_mask)  # type: ignore[arg-type]  # the last stage has the mask
