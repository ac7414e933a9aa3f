"""What serving a model costs: long limits, long prompts, many lengths of prompts, large models.

One row a measurement. Those of memory, of compilation and of large models run in a process of their own. The peer,
where torch and transformers are installed, reads the same weights.

  measure, case       what, and of which size or limit
  milliseconds        of a token, or of a round of lookup on the host; medians
  mebibytes           of memory that the process took at most beyond what it had
  ratio               to the first row of the measure; for loading, of memory to the model's size
  programs            compiled
"""

import concurrent.futures
import json
import multiprocessing
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from models import Decoder, ModelConfig, array_shapes
from models.config import Architecture
from models.decoding import Sampling, Voice, make_voice
from models.decoding.proposers import Lookup
from models.decoding.tokenizers import byte_tokenizer
from models.decoding.writing import writing
from models.pretrained import load_pretrained
from models.pretrained.names import NAMES, is_stacked, stored_name
from models.pretrained.settings import write_config

_MIB = 1 << 20
_ROUNDS = 5
_WRITTEN = 64  # tokens that are timed, whatever the limit
_LIMITS = (64, 512, 2000, 8000)
_PROMPTS = (64, 1024, 4096)
_LENGTHS = (10, 40, 90, 160)  # of prompts that may be compiled for
_TEXTS = (512, 131_072)  # of lookup
_SMALL = {"d_model": 64, "layers": 3, "heads": 4, "kv_heads": 2, "head_width": 16, "d_ff": 256}
_LARGE = {"d_model": 2048, "layers": 16, "heads": 32, "kv_heads": 8, "head_width": 64, "d_ff": 8192}
_VOCABULARY = 64_000  # of the large one, which has 1.1e9 parameters

Row = dict[str, Any]


def run() -> tuple[list[Row], dict[str, Any]]:
    """Rows of all measurements; see the module."""
    rows = [*_limits(), *_lookups()]
    rows += [_alone(_prompt, length) for length in _PROMPTS]
    rows.append(_alone(_compilations))
    with tempfile.TemporaryDirectory() as temporary:
        directory = pathlib.Path(temporary)
        size = _write_large(directory)
        rows.append(_alone(_large, str(directory), size))
        rows.append(_alone(_large_peer, str(directory), size))
    return [row for row in rows if row], {"written": _WRITTEN, "rounds": _ROUNDS, "small": _SMALL, "large": _LARGE}


def _alone(measure: Callable[..., Row], *arguments: Any) -> Row:
    """A measurement by a fresh process."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(measure, *arguments).result()


def _small() -> Voice:
    config = ModelConfig(**_SMALL, vocab_size=256, architecture=Architecture(family="llama"))
    return make_voice(Decoder(config, rngs=nnx.Rngs(0)), byte_tokenizer())


def _write(voice: Voice, prompt: list[int], limit: int, tokens: int) -> float:
    """Milliseconds a token of the first tokens behind a prompt, but for those of the first round."""
    first, began = 0, 0.0
    for written in writing(voice, [prompt], limit, method="ar", stop=(), sampling=Sampling()):
        if not first:
            first, began = len(written[0]), time.perf_counter()
        if len(written[0]) >= tokens:
            return 1e3 * (time.perf_counter() - began) / (len(written[0]) - first)
    return float("nan")


def _limits() -> Iterator[Row]:
    voice, times = _small(), {limit: [] for limit in _LIMITS}
    for round_number in range(1 + _ROUNDS):
        for limit in _LIMITS:
            milliseconds = _write(voice, [1] * 32, limit, _WRITTEN)
            times[limit] += [milliseconds] if round_number else []
    medians = {limit: statistics.median(some) for limit, some in times.items()}
    for limit, median in medians.items():
        ratio = median / medians[_LIMITS[0]]
        yield {"measure": "limit of new tokens", "case": limit, "milliseconds": median, "ratio": ratio}


def _lookups() -> Iterator[Row]:
    first = None
    for length in _TEXTS:
        lookup, text = Lookup(), np.random.default_rng(0).integers(0, 1000, length).tolist()
        lookup.draft(4, [text], [True])
        times = []
        for _ in range(_ROUNDS * 20):
            text += [1, 2]
            began = time.perf_counter()
            lookup.draft(4, [text], [True])
            times.append(1e3 * (time.perf_counter() - began))
        median = statistics.median(times)
        first = first or median
        yield {"measure": "lookup on the host", "case": length, "milliseconds": median, "ratio": median / first}


def _peak() -> float:
    """MiB of memory that this process has had at most; getrusage would count what its parent had before it began."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def _prompt(length: int) -> Row:
    voice = _small()
    _write(voice, [1] * 8, 16, 16)
    before = _peak()
    milliseconds = _write(voice, [1] * length, 16, 16)
    return {"measure": "prompt", "case": length, "milliseconds": milliseconds, "mebibytes": _peak() - before}


def _compilations() -> Row:
    voice, programs = _small(), []

    def count(event: str, *_: Any, **__: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            programs.append(event)

    jax.monitoring.register_event_duration_secs_listener(count)
    for length in _LENGTHS:
        for _ in writing(voice, [[1] * length], _WRITTEN, stop=()):
            pass
    return {"measure": "lengths of prompts", "case": len(_LENGTHS), "programs": len(programs)}


def _write_large(directory: pathlib.Path) -> int:
    """A large model of random weights in Hugging Face's layout, in shards; bytes of its parameters."""
    config = ModelConfig(**_LARGE, vocab_size=_VOCABULARY, architecture=Architecture(family="llama"))
    (directory / "config.json").write_text(json.dumps(write_config(config, 4096)))
    rng, total, shapes = np.random.default_rng(0), 0, array_shapes(config)
    for number, (key, shape) in enumerate(shapes.items()):
        source, tensors = NAMES["llama"][key], {}
        for layer in range(config.layers) if is_stacked(key) else [None]:
            own = source.stored_shape(shape[1:] if is_stacked(key) else shape)
            scale = 1.0 if len(own) == 1 else own[-1] ** -0.5
            numbers = rng.standard_normal(own, np.float32) * scale
            tensors[stored_name(key, source, layer)] = numbers.astype(ml_dtypes.bfloat16)
            total += numbers.size * 2
        save_file(tensors, directory / f"model-{number + 1:05d}-of-{len(shapes):05d}.safetensors", {"format": "pt"})
        names = dict.fromkeys(tensors, f"model-{number + 1:05d}-of-{len(shapes):05d}.safetensors")
        index = directory / "model.safetensors.index.json"
        known = json.loads(index.read_text())["weight_map"] if index.exists() else {}
        index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": known | names}))
    return total


def _large(directory: str, size: int) -> Row:
    before = _peak()
    pretrained = load_pretrained(directory, "bfloat16", stacked=False)
    voice = make_voice(pretrained.model, byte_tokenizer())
    jax.block_until_ready(voice.params)
    taken = _peak() - before
    milliseconds = _write(voice, [1] * 32, 17, 17)
    row = {"measure": "large model, bfloat16", "case": "atlas", "milliseconds": milliseconds}
    return row | {"mebibytes": taken, "ratio": taken * _MIB / size}


def _large_peer(directory: str, size: int) -> Row:
    try:
        import torch
        from transformers import LlamaForCausalLM
    except ImportError:
        return {}
    before = _peak()
    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
    taken = _peak() - before
    model.generation_config.eos_token_id = None
    times = []
    for new in (1, 17):
        began = time.perf_counter()
        with torch.inference_mode():
            model.generate(torch.ones((1, 32), dtype=torch.long), max_new_tokens=new, do_sample=False, pad_token_id=0)
        times.append(time.perf_counter() - began)
    row = {"measure": "large model, bfloat16", "case": "transformers", "milliseconds": 1e3 * (times[1] - times[0]) / 16}
    return row | {"mebibytes": taken, "ratio": taken * _MIB / size}
