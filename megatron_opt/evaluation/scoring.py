"""Log-likelihoods and greedy continuations of token ids, in batches by length that data-parallel ranks share."""

import contextlib
import math
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_opt.errors import UserError
from megatron_opt.evaluation import ranks

_STOP = "stop"


class Request(NamedTuple):
    """Ids that the model reads, and those it should say at its last len(targets) positions; arrays of 32-bit integers."""

    inputs: array
    targets: array


class Prompt(NamedTuple):
    """Ids to continue by at most `most` tokens, until the text holds one of `until`."""

    inputs: array
    most: int
    until: tuple[str, ...]


class Answer(NamedTuple):
    """log p(targets | what stands before each), and whether every target is the likeliest id."""

    loglikelihood: float
    greedy: bool


class Scorer:
    """A model with its tokenizer on all ranks: rank 0 calls `score` and `continue_`, the others `serve`."""

    def __init__(self, model: Any, words: Any, batch: int):
        """`model`: a `RankModel`; `words`: the tokenizer; `batch`: sequences that a rank computes at once."""
        from megatron.core import mpu

        self._model, self.words, self._batch = model, words, batch
        self._share, self._shares = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
        self._answers = model.last and mpu.get_tensor_model_parallel_rank() == 0
        self.progress: Callable[[int], None] = lambda done: None

    @property
    def max_length(self) -> int:
        """Tokens that the model reads at most: the positions that its config.json would say."""
        return int(self._model.flags.max_position_embeddings)

    def score(self, requests: Sequence[Request]) -> list[Answer]:
        """An answer to each request, in their order; on rank 0."""
        return self._ask(self._score, list(requests))

    def continue_(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """The likeliest continuation of each prompt, token by token; on rank 0."""
        return self._ask(self._continue, list(prompts))

    def _ask(self, work: Callable[[list[Any]], dict[int, Any]], requests: list[Any]) -> list[Any]:
        ranks.from_first((work.__name__, requests))
        answers: dict[int, Any] = {}
        for part in ranks.to_first(work(requests)):
            answers |= part
        if any(isinstance(one, Answer) and not math.isfinite(one.loglikelihood) for one in answers.values()):
            raise UserError(
                "the model's log-likelihoods are not finite: its training has diverged; take an earlier checkpoint."
            )
        return [answers[number] for number in range(len(requests))]

    def serve(self) -> None:
        """Compute what rank 0 asks for until it closes."""
        while (asked := ranks.from_first())[0] != _STOP:
            ranks.to_first(getattr(self, asked[0])(asked[1]))
        if asked[1]:
            raise UserError(asked[1])

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """On rank 0: a block in which the others serve; what it refuses they refuse."""
        try:
            yield
        except UserError as error:
            ranks.from_first((_STOP, str(error)))
            raise
        ranks.from_first((_STOP, None))

    def _batches(self, sequences: Sequence[Sequence[int]]) -> list[list[int]]:
        """Numbers of this rank's sequences, batch by batch: the longest first, dealt out in turn."""
        order = sorted(range(len(sequences)), key=lambda number: (-len(sequences[number]), number))
        batches = [order[start : start + self._batch] for start in range(0, len(order), self._batch)]
        return batches[self._share :: self._shares]

    def _score(self, requests: list[Request]) -> dict[int, Answer]:
        # choices of one token share what the model reads, so that it is read once
        sharing: dict[bytes, list[int]] = {}
        for number, request in enumerate(requests):
            sharing.setdefault(request.inputs.tobytes(), []).append(number)
        groups = list(sharing.values())
        sequences = [requests[group[0]].inputs for group in groups]
        answers: dict[int, Answer] = {}
        for batch in self._batches(sequences):
            logits = self._model.logits(_padded([sequences[number] for number in batch]))
            if self._answers:
                for row, number in enumerate(batch):
                    asked = [requests[one].targets for one in groups[number]]
                    longest = max(map(len, asked))
                    end = len(sequences[number])
                    said = torch.log_softmax(logits[row, end - longest : end, : self.words.vocab_size].double(), -1)
                    answers.update(zip(groups[number], (_answer(said, targets) for targets in asked), strict=True))
            self.progress(sum(len(groups[number]) for number in batch))
        return answers

    def _continue(self, prompts: list[Prompt]) -> dict[int, list[int]]:
        import torch.distributed as dist
        from megatron.core import mpu

        continuations: dict[int, list[int]] = {}
        for batch in self._batches([prompt.inputs for prompt in prompts]):
            texts = [list(prompts[number].inputs) for number in batch]
            new: list[list[int]] = [[] for _ in batch]
            going = set(range(len(batch)))
            read = self._model.reader(len(batch), max(len(prompts[n].inputs) + prompts[n].most for n in batch))
            start, end = 0, min(map(len, texts))
            while going:
                # all read as far as the shortest; a longer prompt goes on with its own ids where the others take the likeliest
                logits = read(torch.tensor([text[start:end] for text in texts]))
                chosen = torch.zeros(len(batch), dtype=torch.int64)
                if logits is not None:
                    chosen = logits[:, -1, : self.words.vocab_size].argmax(-1).to("cpu")
                dist.broadcast(
                    chosen,
                    mpu.get_pipeline_model_parallel_last_rank(),
                    group=mpu.get_pipeline_model_parallel_group(),
                )
                for row, token in enumerate(chosen.tolist()):
                    if len(texts[row]) > end:
                        continue
                    texts[row].append(token)
                    if row in going:
                        new[row].append(token)
                        if self._ends(prompts[batch[row]], new[row]):
                            going.remove(row)
                start, end = end, end + 1
            if self._answers:
                continuations.update(zip(batch, new, strict=True))
            self.progress(len(batch))
        return continuations

    def _ends(self, prompt: Prompt, new: list[int]) -> bool:
        if new[-1] == self.words.eod or len(new) >= prompt.most:
            return True
        text = self.words.decode(new) if prompt.until else ""
        return any(stop in text for stop in prompt.until)


def _padded(sequences: Sequence[Sequence[int]]) -> Tensor:
    """(batch, longest), padded at the right, where causal attention does not look."""
    ids = torch.zeros(len(sequences), max(map(len, sequences)), dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
    return ids


def _answer(said: Tensor, targets: array) -> Answer:
    """Of log-probabilities (positions, vocabulary), whose last positions say the targets."""
    wanted = torch.tensor(targets, dtype=torch.int64).to(said.device)
    mine = said[-len(wanted) :]
    return Answer(float(mine.gather(1, wanted[:, None]).sum()), bool(torch.equal(mine.argmax(-1), wanted)))
