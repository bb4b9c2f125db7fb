"""Sampled labels: from the model's distribution, the same for a sequence wherever it is, others at another step."""

import torch

from megatron_opt.training.batches import Replay
from megatron_opt.training.curvature import counted_tokens, sample_labels


def draws(logits, labels, step=1, seed=1):
    return sample_labels(logits, labels, seed, step)


def test_frequencies_are_the_softmax():
    torch.manual_seed(0)
    s, b, v = 64, 256, 7
    row = torch.randn(v)
    labels = torch.randint(0, v, (b, s))
    counts = torch.bincount(draws(row.expand(s, b, v), labels).flatten(), minlength=v).double()
    expected = torch.softmax(row.double(), 0) * s * b
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    assert chi2 < 22.5  # 6 degrees of freedom: 1 in 1,000


def test_a_sequence_gets_its_labels_in_any_batch(monkeypatch):
    torch.manual_seed(1)
    logits, labels = torch.randn(16, 6, 50), torch.randint(0, 50, (6, 16))
    whole = draws(logits, labels)
    order = torch.tensor([4, 1, 5])
    assert torch.equal(draws(logits[:, order], labels[order]), whole[order])
    monkeypatch.setattr("megatron_opt.training.curvature._ELEMENTS", 700)
    assert torch.equal(draws(logits, labels), whole)


def test_steps_seeds_and_sequences_differ():
    torch.manual_seed(2)
    logits, labels = torch.zeros(64, 4, 100), torch.randint(0, 100, (4, 64))
    one = draws(logits, labels)
    for other in (draws(logits, labels, step=2), draws(logits, labels, seed=2), one.roll(1, 0)):
        assert float((one == other).double().mean()) < 0.1


def test_replay_hands_out_what_was_kept_by_stage():
    replay = Replay()
    replay.record()
    for stage, batch in ((0, "a"), (1, "b"), (0, "c")):
        replay.keep(stage, batch)
    replay.replay()
    replay.keep(0, "not kept")
    assert [replay.pop(0), replay.pop(1), replay.pop(0)] == ["a", "b", "c"]
    replay.stop()
    assert not replay.recording and not replay.replaying


def test_n_is_what_the_loss_counts(monkeypatch):
    from megatron.core import parallel_state

    monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_world_size", lambda: 2)
    monkeypatch.setattr("torch.cuda.current_device", lambda: "cpu")
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 4)

    def all_reduce(tensor):
        tensor.mul_(4)  # two tensor-parallel copies of two data-parallel ranks

    monkeypatch.setattr("torch.distributed.all_reduce", all_reduce)
    masked = [{"lm loss": torch.tensor([30.0, 64.0])}, {"lm loss": torch.tensor([2.0, 51.0])}]
    assert counted_tokens(masked) == 2 * (64 + 51)
