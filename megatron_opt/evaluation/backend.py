"""This project's model as lm-evaluation-harness asks for one; imported where the harness is wanted, not before.

Tokens are cut where the harness cuts them for its own `hf` models, so that a checkpoint and its export answer alike.
"""

from array import array
from typing import Any

from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from megatron_opt.errors import UserError
from megatron_opt.evaluation.scoring import Prompt, Request, Scorer

_MOST = 256  # new tokens where a task does not say, as the harness has it


@register_model("megatron_opt")
class MegatronOptLM(TemplateLM):
    """Rank 0's face of a `Scorer`; the other ranks serve it, so that to the harness there is one process."""

    def __init__(self, scorer: Scorer):
        """`scorer`: of rank 0, with its model and tokenizer."""
        super().__init__()
        self.scorer = scorer
        self.words: Any = scorer.words
        # what a tokenizer puts before a text of itself; the harness's `hf` models take their bos, or else eos
        self._before = self.words.encode("")
        self._prefix = self._before[0] if self._before else self.words.eod

    @property
    def eot_token_id(self) -> int:
        return int(self.words.eod)

    @property
    def prefix_token_id(self) -> int:
        return int(self._prefix)

    @property
    def max_length(self) -> int:
        """Positions of the model."""
        return self.scorer.max_length

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text; what the tokenizer puts before one is left out where the harness asks for it."""
        ids = self.words.encode(string)
        before = len(self._before)
        again = before and string.startswith(self.words.decode([self._prefix]))
        if before and (add_special_tokens is False or again) and ids[:before] == self._before:
            ids = ids[before:]
        return ids

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log p, whether greedy) of each (context, continuation); without the harness's bar, ours tells more."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        return [(one.loglikelihood, one.greedy) for one in self.scorer.score([self._request(*one) for one in requests])]

    def _request(self, texts: Any, context: list[int], continuation: list[int]) -> Request:
        if not context or not continuation or len(continuation) > self.max_length:
            what = "has no token" if not (context and continuation) else f"has {len(continuation)} tokens"
            raise UserError(
                f"an answer of a task ({str(texts)[:80]!r}) {what}; the model scores from 1 to its {self.max_length} positions."
            )
        seen = (context + continuation)[-(self.max_length + 1) :]
        return Request(array("i", seen[:-1]), array("i", continuation))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts: each token is predicted once, with as much before it as fits."""
        windows, owners = [], []
        for number, (text,) in enumerate(one.args for one in requests):
            for window in utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append(self._request(text, *utils.make_disjoint_window(window)))
                owners.append(number)
        sums = [0.0] * len(requests)
        for number, answer in zip(owners, self.scorer.score(windows), strict=True):
            sums[number] += answer.loglikelihood
        return sums

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, cut before the first stop."""
        end = self.words.decode([self.words.eod])
        prompts, stops = [], []
        for context, options in (one.args for one in requests):
            wanted: Any = normalize_gen_kwargs(options, _MOST)
            if wanted["do_sample"] and wanted.get("temperature", 1.0) > 0:
                raise UserError(f"a task wants samples ({options}); only the likeliest continuation is computed here.")
            stop = handle_stop_sequences(wanted["until"], end)
            room = self.max_length - wanted["max_gen_toks"]
            if room < 1:
                raise UserError(
                    f"a task wants up to {wanted['max_gen_toks']} new tokens; the model has {self.max_length} positions."
                )
            ids = (self.tok_encode(context) or [self.prefix_token_id])[-room:]
            prompts.append(Prompt(array("i", ids), wanted["max_gen_toks"], tuple(one for one in stop if one)))
            stops.append(stop)
        texts = [self._text(ids) for ids in self.scorer.continue_(prompts)]
        return [postprocess_generated_text(text, stop, None) for text, stop in zip(texts, stops, strict=True)]

    def _text(self, ids: list[int]) -> str:
        return self.words.decode(ids[:-1] if ids and ids[-1] == self.words.eod else ids)
