"""Plain and assisted generation of the transformers library, as a peer of `models.decoding`."""

import pathlib
import time
from typing import Any

import torch
import transformers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.generation.streamers import BaseStreamer

from experiments.benchmarks.timing import cores
from models.decoding import Written

VERSIONS = {"torch": torch.__version__, "transformers": transformers.__version__}


class Assisted:
    """A target and its drafter, from the files that ours read."""

    def __init__(self, target: pathlib.Path, draft: pathlib.Path, length: int):
        torch.set_num_threads(cores())
        transformers.logging.set_verbosity_error()
        self.target, self.calls = _model(target), []
        self.target.register_forward_pre_hook(
            lambda _, args, kwargs: self.calls.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        # Sampling with two vocabularies replaces the head of the drafter that it is given.
        self.drafters = {method: _model(draft) for method in ("slem", "tli")}
        for drafter in self.drafters.values():
            constant = {"num_assistant_tokens": length, "num_assistant_tokens_schedule": "constant"}
            drafter.generation_config.update(**constant, assistant_confidence_threshold=0.0)
        self.tokenizers = {"tokenizer": _Sorted(target), "assistant_tokenizer": _Sorted(draft)}
        self.length = length

    def write(self, prompt: list[int], seed: int, new: int, method: str, temperature: float) -> Written:
        """Continues one prompt: method "ar", "slem" (greedy), "tli" (sampled) or "lookup"."""
        torch.manual_seed(seed)
        prompt_1T, clock = torch.tensor([prompt]), _Clock()
        sampled = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        self.calls.clear()
        began = time.perf_counter()
        with torch.inference_mode():
            output = self.target.generate(
                prompt_1T, attention_mask=torch.ones_like(prompt_1T), max_new_tokens=new, streamer=clock,
                **(sampled if temperature else {"do_sample": False}), **self._options(method),
            )  # fmt: skip
        tokens = output[0, len(prompt) :].tolist()
        # The first call reads the prompt with the first drafts.
        drafted = sum(self.calls) - len(self.calls) - (len(prompt) - 1)
        ended = time.perf_counter()
        # It never drafts the last token that is wanted, so that every call adds one of the target's own.
        counts = ([len(self.calls)], [drafted], [len(tokens) - len(self.calls)])
        return Written([tokens], method, *counts, clock.first - began, ended - clock.first, clock.tokens)

    def _options(self, method: str) -> dict[str, Any]:
        if method == "lookup":
            return {"prompt_lookup_num_tokens": self.length, "max_matching_ngram_size": 3}
        return {} if method == "ar" else {"assistant_model": self.drafters[method]} | self.tokenizers


class _Sorted(PreTrainedTokenizerFast):
    """A tokenizer that lists its vocabulary by id.

    Two tables of the library's drafter are in the order of the list and of the ids: in any other order its sampling
    does not have the law of the target.
    """

    def __init__(self, directory: pathlib.Path):
        super().__init__(tokenizer_file=str(directory / "tokenizer.json"))

    def get_vocab(self) -> dict[str, int]:
        return dict(sorted(super().get_vocab().items(), key=lambda item: item[1]))


class _Clock(BaseStreamer):
    """When the first new tokens came, and how many."""

    def __init__(self):
        self.first, self.tokens, self.puts = 0.0, 0, 0

    def put(self, value: torch.Tensor) -> None:
        self.puts += 1  # the first is the prompt
        if self.puts == 2:
            self.first, self.tokens = time.perf_counter(), value.numel()

    def end(self) -> None:
        """All has come."""


def _model(directory: pathlib.Path) -> LlamaForCausalLM:
    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    # No token ends a text: all runs write the same number.
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model
