"""With keys and values kept, texts go on as without: token for token, for one text and for a batch of several lengths."""

from array import array
from functools import partial

import pytest
import torch

from megatron_opt import platform
from megatron_opt.evaluation import ranks
from megatron_opt.evaluation.scoring import Prompt, Scorer
from megatron_opt.export import kv_cache, model
from megatron_opt.export.generating import sample
from megatron_opt.export.kv_cache import Reader, is_kept
from tests.export import models

MLA = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 24 --max-position-embeddings 24 --rotary-base 500 "
    "--multi-latent-attention --q-lora-rank 16 --kv-lora-rank 8 --qk-head-dim 8 --qk-pos-emb-head-dim 4 --v-head-dim 12 "
    "--normalization RMSNorm --disable-bias-linear --untie-embeddings-and-output-weights"
)
KEPT = {
    "learned": models.CASES["gpt2-exact"],
    "rope-gqa": models.CASES["llama-gqa-tied"],
    "rope-scaled": models.CASES["llama-scaled-rope"],
    "experts": models.CASES["mixtral"],
    "latent": MLA,
    "window": models.CASES["llama"] + " --window-size 3,0",
}
OTHER = {
    "softmax": models.CASES["llama"] + " --softmax-type off-by-one",
    "capacity": models.CASES["mixtral"] + " --moe-expert-capacity-factor 1",
}


def built(words):
    """A model of random weights of these flags; in `one_process` or a world of one."""
    platform.activate()
    from megatron.core import tensor_parallel

    from megatron_opt.distributed.meta_model import build_chunks

    tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    args = models.flags(words)
    args.pipeline_model_parallel_size, args.virtual_pipeline_model_parallel_size = 1, None
    (made,) = build_chunks(args, 0, device="cpu")
    generator = torch.Generator().manual_seed(3)
    for name, parameter in made.named_parameters():
        value = torch.randn(parameter.shape, generator=generator) * 0.3
        parameter.data.copy_(value + ("norm" in name and name.endswith("weight")))
    return made.eval(), args


@pytest.mark.parametrize("case", [*KEPT, *OTHER])
def test_a_text_goes_on_as_without(case, monkeypatch) -> None:
    with model.one_process():
        made, args = built((KEPT | OTHER)[case])
        assert is_kept(args) == (case in KEPT)
        reads: list[int] = []

        def forward(ids, start, context):
            reads.append(ids.shape[1])
            return model.logits(made, ids, start, context)

        def drawn(temperature):
            reads.clear()
            reader = Reader(forward, args, 1, 24)
            return list(sample(reader, [3, 14, 15, 9], 19, temperature, 0.9, 1, models.IDS, None))

        kept = [drawn(0.0), drawn(1.0)]
        assert reads == ([4] + [1] * 18 if case in KEPT else list(range(4, 23)))
        with monkeypatch.context() as without:
            without.setattr(kv_cache, "is_kept", lambda flags: False)
            assert kept == [drawn(0.0), drawn(1.0)] and reads == list(range(4, 23))
        assert len(set(kept[0])) > 3


@pytest.mark.parametrize("case", ["rope-gqa", "learned"])
def test_a_batch_of_several_lengths_goes_on_as_each_alone(case) -> None:
    class Words:
        vocab_size, eod = models.IDS, 7

        @staticmethod
        def decode(ids):
            return " ".join(map(str, ids))

    asked = [[5, 8, 1], [2], [11, 4, 6, 30, 12, 9, 1], [88], [40, 2, 2]]
    prompts = [Prompt(array("i", one), 6 + number, ("13",)) for number, one in enumerate(asked)]
    with ranks.world(1, 1):
        made, args = built(KEPT[case])

        class Model:
            last, flags = True, args

            @staticmethod
            def reader(rows, length):
                return Reader(partial(model.logits, made), args, rows, length)

        together = Scorer(Model(), Words(), 3).continue_(prompts)
        alone = []
        for prompt in prompts:
            text = list(prompt.inputs)
            while not (new := text[len(prompt.inputs) :]) or not (
                new[-1] == 7 or len(new) == prompt.most or "13" in Words.decode(new)
            ):
                text.append(int(model.logits(made, torch.tensor([text]))[0, -1, : models.IDS].argmax()))
            alone.append(new)
    assert together == alone and len({len(one) for one in alone}) > 1
