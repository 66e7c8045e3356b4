"""A runner as lm-eval sees a model: the requests and the tokens of lm-eval's own HFLM, answered by a runner."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from functools import cached_property
from operator import is_
from typing import Any

import jinja2
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from kvbench.runners.base import GenerateRequest, Progress, Runner, ScoreRequest, ScoreRequests, Scores


@dataclass
class Encoded:
    """Tokens that are kept from cell to cell, in 4 bytes each.

    texts: by text, and whether that begins with the tokenizer's prefix. asked: what was scored last.
    """

    texts: dict[tuple[str, bool], array[int]] = field(default_factory=dict)
    asked: Asked | None = None


@dataclass(frozen=True)
class Asked:
    """instances: of lm-eval. truncated: how many of their requests were cut to max_length tokens."""

    instances: list[Instance]
    requests: ScoreRequests
    max_length: int
    truncated: int

    def are(self, instances: list[Instance], max_length: int) -> bool:
        """Whether these are the same instances, of a model that takes as many tokens."""
        if (self.max_length, len(self.instances)) != (max_length, len(instances)):
            return False
        return all(map(is_, self.instances, instances))


MAX_GEN_TOKENS = 256
GENERATION_OPTIONS = {"do_sample", "temperature", "top_k", "top_p"}


class RunnerLM(TemplateLM):  # type: ignore[misc]
    """Answers lm-eval's requests through a runner.

    Tokenization, truncation and the cutting of generated text are those of `lm_eval.models.huggingface.HFLM` 0.4.13 for
    decoder-only models, so that with an exact cache the scores are HFLM's.
    encoded: texts that this tokenizer has encoded already; new ones are added.
    truncated: how many requests were cut from the left so far.
    """

    def __init__(
        self, runner: Runner, progress: Progress | None = None, seed: int = 0, encoded: Encoded | None = None
    ) -> None:
        super().__init__()
        self.runner = runner
        self.tokenizer = runner.tokenizer
        self.max_length = runner.info.max_length
        self._progress = progress
        self._seed = seed
        self._encoded = encoded or Encoded()
        self._scored: ScoreRequests | None = None
        self.truncated = 0

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token."""
        return int(self.runner.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is: the tokenizer's bos token, or its end-of-text token."""
        bos = self.runner.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's name, for lm-eval's records."""
        return str(self.runner.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids, with the tokenizer's own special tokens unless told otherwise or the text has its bos already."""
        if add_special_tokens is not None:
            return list(self.runner.tokenizer.encode(string, add_special_tokens=add_special_tokens))
        key = string, has_bos_prefix(string, self._prefix)
        if key not in self._encoded.texts:
            self._encode_all([string], self._prefix)
        return self._encoded.texts[key].tolist()

    @cached_property
    def _prefix(self) -> str:
        return str(self.runner.tokenizer.decode(self.prefix_token_id))

    def _encode_all(self, strings: list[str], prefix: str | None) -> list[tuple[str, bool]]:
        """Encodes what is new of these strings, without special tokens where one begins with `prefix`.

        By one call, since the tokenizer encodes several texts in parallel. Returns each string's key.
        """
        keys = [(string, has_bos_prefix(string, prefix)) for string in strings]
        known = self._encoded.texts
        new = dict.fromkeys(key for key in keys if key not in known)
        for has_prefix in (False, True):
            texts = [string for string, has in new if has == has_prefix]
            if texts:
                ids = self.runner.tokenizer(
                    texts,
                    add_special_tokens=not has_prefix,
                    return_attention_mask=False,
                    return_token_type_ids=False,
                )["input_ids"]
                for text, tokens in zip(texts, ids, strict=True):
                    known[text, has_prefix] = array("i", tokens)
        return keys

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy decoding gives it) of each continuation."""
        asked = self._encoded.asked
        if asked and asked.are(requests, self.max_length):
            self.truncated += asked.truncated
            return self._loglikelihood_tokens(asked.requests)
        # lm-eval encodes, a text at a time, a context without its last spaces and the whole
        both, kept = [request.args for request in requests if request.args[0]], set(self._encoded.texts)
        texts = [text for context, continuation in both for text in (context.rstrip(), context + continuation)]
        self._encode_all(texts, self._prefix)
        truncated = self.truncated
        scores = super().loglikelihood(requests, disable_tqdm=True)
        for key in self._encoded.texts.keys() - kept:
            del self._encoded.texts[key]
        assert self._scored is not None, "they were scored by `_loglikelihood_tokens`"
        self._encoded.asked = Asked(requests, self._scored, self.max_length, self.truncated - truncated)
        return list(scores)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, Any, Any]] | ScoreRequests, **_: Any
    ) -> list[tuple[float, bool]]:
        self._scored = requests if isinstance(requests, ScoreRequests) else self._score_requests(requests)
        scores = Scores.of(self.runner.score(self._scored, self._progress))
        return list(zip(scores.sums(), scores.greedy.tolist(), strict=True))

    def _score_requests(self, requests: list[tuple[Any, Any, Any]]) -> ScoreRequests:
        wanted = []
        for _strings, context, continuation in requests:
            if not context or not continuation or len(continuation) > self.max_length:
                raise ValueError(
                    f"a continuation of {len(continuation)} tokens after {len(context)}: both need one token at least, "
                    f"and the model takes {self.max_length}"
                )
            # the last token is only predicted, so one more than max_length fits
            tokens = (context + continuation)[-(self.max_length + 1) :]
            self.truncated += len(tokens) < len(context) + len(continuation)
            cut = len(tokens) - len(continuation)
            wanted.append(ScoreRequest(tuple(tokens[:cut]), tuple(tokens[cut:])))
        return ScoreRequests.of(wanted)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """The log-probability of each whole text, in windows of the model's length that score each token once."""
        windows: list[tuple[Any, list[int], list[int]]] = []
        owners: list[int] = []
        for owner, (string,) in enumerate(request.args for request in requests):
            pieces = get_rolling_token_windows(
                token_list=self.tok_encode(string),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, pieces):
                windows.append((None, context, continuation))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (logprob, _greedy) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += logprob
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Text after each prompt, cut before the first stop string."""
        eos = self.runner.tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
        # HFLM looks for bos itself here, where tok_encode looks for the prefix token
        bos = getattr(self.runner.tokenizer, "bos_token", None)
        keys, texts = self._encode_all([request.args[0] for request in requests], bos), self._encoded.texts
        wanted = [
            self._generate_request(i, eos, texts[key].tolist(), request.args[1])
            for i, (request, key) in enumerate(zip(requests, keys, strict=True))
        ]
        return [made.text for made in self.runner.generate(wanted, self._progress)]

    def _generate_request(self, number: int, eos: str, tokens: list[int], given: dict[str, Any]) -> GenerateRequest:
        options = normalize_gen_kwargs(given, MAX_GEN_TOKENS)
        stop = handle_stop_sequences(options.pop("until"), eos=eos)
        max_new_tokens = options.pop("max_gen_toks")
        if options.pop("num_beams", 1) != 1:
            raise ValueError("num_beams is not 1: beam search is not offered")
        unknown = options.keys() - GENERATION_OPTIONS
        if unknown:
            raise ValueError(f"generation option {min(unknown)!r} is not offered: only {', '.join(GENERATION_OPTIONS)}")
        room = self.max_length - max_new_tokens
        if room <= 0:
            raise ValueError(f"{max_new_tokens} tokens to generate leave no room in the model's {self.max_length}")
        self.truncated += len(tokens) > room
        sampled = bool(options.get("do_sample"))
        return GenerateRequest(
            prompt=tuple(tokens[-room:]),
            max_new_tokens=max_new_tokens,
            stop=tuple(stop),
            temperature=float(options.get("temperature", 1.0)) if sampled else 0.0,
            top_k=int(options["top_k"]) if "top_k" in options else None,
            top_p=float(options["top_p"]) if "top_p" in options else None,
            seed=self._seed + number,
        )

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation in the model's template; without its system turn where the template refuses one."""

        def apply(history: list[dict[str, str]]) -> str:
            return str(
                self.runner.tokenizer.apply_chat_template(
                    history,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                )
            )

        try:
            return apply(chat_history)
        except jinja2.exceptions.TemplateError:
            return apply([message for message in chat_history if message["role"] != "system"])
