"""Model configuration and the ATLAS shape table."""

import csv
import dataclasses
import functools
import importlib.resources
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from checked import Checked, UserError, field

ATTENTION_KINDS = ("dense", "gated", "sparse", "gated_sparse")
ATTENTION_NAMES = [*ATTENTION_KINDS]  # and those that `attention_kind` adds
DTYPES = ("float32", "bfloat16", "float64")
REMAT = ("none", "dots", "full")
K_RULES = ("fixed", "paper", "inverse")
OUTPUT_GATES = ("elementwise", "headwise", "none")
VALUE_GATES = ("elementwise", "none")
SELECTIONS = ("token", "block")
ROPE_SCALINGS = ("none", "linear", "llama3", "yarn", "longrope")
QK_NORMS = ("", "head", "whole")

ATLAS_VOCAB_SIZE = 64512  # 64,000 pieces and 512 special tokens


class Family(NamedTuple):
    """What the name of an architecture fixes.

    parallel: the block x + attention(n) + feed_forward(n), with one norm a layer and no scale in the final norm; else
      two blocks in sequence.
    norm_inputs, norm_outputs: whether norms stand before these two, and behind them.
    qkv_bias: a bias on queries, keys and values.
    qk_norm: RMSNorm of queries and keys before their rotation: of every head, or of all heads as a whole.
    gemma: norms multiply by 1 + scale, in float32; embeddings are multiplied by sqrt(M) on their way in; the
      feed-forward's gate is the approximate GELU.
    """

    parallel: bool = False
    norm_inputs: bool = True
    norm_outputs: bool = False
    qkv_bias: bool = False
    qk_norm: str = ""
    gemma: bool = False


FAMILIES = {
    "atlas": Family(parallel=True),
    "llama": Family(),
    "mistral": Family(),
    "phi3": Family(),
    "smollm3": Family(),
    "granite": Family(),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(qk_norm="head"),
    "olmo2": Family(norm_inputs=False, norm_outputs=True, qk_norm="whole"),
    "gemma2": Family(norm_outputs=True, gemma=True),
    "gemma3": Family(norm_outputs=True, qk_norm="head", gemma=True),
}


@dataclass(frozen=True)
class RopeScaling(Checked, section="model.architecture.rope_scaling"):
    """How rotary wavelengths are stretched for contexts longer than those of the first training.

    "linear" multiplies all by `factor`; "llama3" only long ones: those above original_context / low_frequency_factor
    by `factor`, those below original_context / high_frequency_factor not at all, and between the two by what
    interpolates their frequencies. "yarn" (arXiv 2309.00071) does so with an interpolation that is linear in the
    number of the wavelength. "longrope" (arXiv 2402.13753) has a factor for each.
    """

    kind: str = field("none", "which wavelengths are stretched", choices=ROPE_SCALINGS)
    factor: float = field(1.0, "of the stretch", above=0)
    low_frequency_factor: float = field(1.0, "bounds the long wavelengths of llama3 and yarn", above=0)
    high_frequency_factor: float = field(4.0, "bounds the short wavelengths of llama3 and yarn", above=0)
    original_context: int = field(8192, "context of the first training", unit="tokens", least=1)
    factors: tuple[float, ...] = field((), "of longrope, for every wavelength", above=0)
    attention_factor: float = field(1.0, "on rotated queries and keys", above=0)


@dataclass(frozen=True)
class Architecture(Checked, section="model.architecture"):
    """What off-the-shelf decoders do otherwise. The defaults are our own decoder; `FAMILIES` lists what each fixes."""

    family: str = field("atlas", "the block, its norms and biases", choices=tuple(FAMILIES))
    norm_epsilon: float = field(1e-6, "added to the mean square in every norm", above=0)
    tied_head: bool = field(True, "the embedding also gives the logits; False is a head of its own")
    rope_scaling: RopeScaling = dataclasses.field(default_factory=RopeScaling)
    window: int = field(0, "latest keys that a query sees, itself included; 0: all", unit="keys", least=0)
    full_layers: tuple[int, ...] = field((), "indices of the layers without that window", least=0)
    window_rope_base: float = field(0.0, "unscaled rotary base in layers with it; 0: as in others", least=0)
    query_width: float = field(0.0, "products of queries and keys are divided by its root; 0: head_width", least=0)
    rotary_width: int = field(0, "first numbers of a head that are rotated; 0: all", least=0)
    unrotated_layers: tuple[int, ...] = field((), "indices of the layers without rotary positions", least=0)
    attention_bias: bool = field(False, "a bias on queries, keys, values and output of the attention")
    embedding_scale: float = field(1.0, "on embeddings on their way in", above=0)
    residual_scale: float = field(1.0, "on what a block adds to the residual stream", above=0)
    logit_scale: float = field(1.0, "divides the logits of the vocabulary", above=0)
    attention_softcap: float = field(0.0, "c in c tanh(x / c) on these products; 0: none", least=0)
    logit_softcap: float = field(0.0, "the same on the logits of the vocabulary; 0: none", least=0)

    @property
    def fixed(self) -> Family:
        return FAMILIES[self.family]

    def sight(self, layer: int) -> tuple[bool, bool]:
        """Whether a layer has the window, and whether it has rotary positions."""
        return self.window > 0 and layer not in self.full_layers, layer not in self.unrotated_layers


@dataclass(frozen=True)
class ModelConfig(Checked, section="model"):
    """The shape and the choices of a `Decoder`. The defaults are a small byte-level model for windows of 256.

    The defaults of k are 1/4, 1/32 and 1/2 of that window: choose them with the window. Scores of the indexer lie in
    (0, J), so exp(J / indexer_temperature) bounds the contrast of the softmax in its loss. The plain equation of gated
    sparse attention (arXiv 2601.15305) is local_share=0: its indexer knows no positions, so that it cannot ask for the
    last few tokens, which say most about the next one. k counts all keys, the latest included. Parameters, norms,
    softmax, scores, logits and loss are float32 whatever `dtype` says; only "float64", under jax_enable_x64, makes all
    but the parameters so: two ways to compute one thing then agree so closely that greedy decoding by both gives one
    text.
    """

    d_model: int = field(64, "M, width of the residual stream", least=1)
    layers: int = field(3, "L", least=1)
    heads: int = field(4, "H, query heads", least=1)
    kv_heads: int = field(2, "G, key/value heads; query head h reads number h / (heads / kv_heads)", least=1)
    head_width: int = field(16, "E, even for the rotation", least=2)
    d_ff: int = field(256, "F, feed-forward width", least=1)
    vocab_size: int = field(288, "V; in training that of the tokenizer takes its place", unit="tokens", least=1)
    attention: str = field("dense", "with gates, an indexer that selects keys, or both", choices=ATTENTION_NAMES)
    rope_base: float = field(10000.0, "of the rotary wavelengths", above=0)
    output_gate: str = field("elementwise", "gate after attention, per head", choices=OUTPUT_GATES)
    value_gate: str = field("elementwise", "gate on the values, per key/value head", choices=VALUE_GATES)
    gate_bias: float = field(0.5, "initial bias of both gates: sigmoid(0.5) = 0.62")
    indexer_heads: int = field(2, "J", least=1)
    indexer_width: int = field(16, "I", least=1)
    indexer_rotary_width: int = field(0, "how much of I has the heads' rotary positions; 0: none", least=0)
    indexer_scale: float = field(0.0, "factor on the indexer's products; 0: 1/sqrt(indexer_width); paper: 1", least=0)
    indexer_temperature: float = field(0.25, "divides the scores in the softmax of the indexer's loss", above=0)
    k_rule: str = field("paper", "k_base, or more (paper) or fewer (inverse) where scores vary more", choices=K_RULES)
    k_base: int = field(64, "keys that a query selects on average", unit="keys", least=1)
    k_min: int = field(8, "least keys of the adaptive rules", unit="keys", least=1)
    k_max: int = field(128, "most keys of the adaptive rules", unit="keys", least=1)
    selection: str = field("token", "what is selected; block: tiles of queries select blocks", choices=SELECTIONS)
    block: int = field(16, "queries of a tile and keys of a block", unit="tokens", least=1)
    variance_decay: float = field(0.99, "of the running variance that adaptive rules compare with", least=0, below=1)
    keep_first: int = field(0, "first tokens of the document that are always selected, in k", unit="keys", least=0)
    local_share: float = field(0.5, "of k_base, spent on the latest keys whatever they score", least=0, most=1)
    dtype: str = field("float32", "of activations and matrix products", choices=DTYPES)
    remat: str = field("none", "what the backward pass recomputes: all but the projections, or all", choices=REMAT)
    scan_layers: bool = field(True, "scan (fast to compile) or unroll (faster on a CPU); results are the same")
    loss_chunk: int = field(0, "chunk of the vocabulary loss; 0: all logits at once", unit="tokens", least=0)
    query_chunk: int = field(0, "tile of attention in linear memory; 0: all scores at once", unit="queries", least=0)
    architecture: Architecture = dataclasses.field(default_factory=Architecture)

    @property
    def is_gated(self) -> bool:
        return self.attention in ("gated", "gated_sparse")

    @property
    def is_sparse(self) -> bool:
        return self.attention in ("sparse", "gated_sparse")

    def check(self) -> None:
        self.require(self.head_width % 2 == 0, "head_width", "must be even (rotary positions)")
        self.require(self.heads % self.kv_heads == 0, "kv_heads", f"must divide heads={self.heads}")
        if self.is_sparse and self.k_rule != "fixed":
            self.require(self.k_min <= self.k_max, "k_min", f"must not exceed k_max={self.k_max}")
            limits = f"must lie between k_min={self.k_min} and k_max={self.k_max}"
            self.require(self.k_min <= self.k_base <= self.k_max, "k_base", limits)
        rotated, rotary = self.architecture.rotary_width or self.head_width, self.indexer_rotary_width
        fits = rotary % 2 == 0 and rotary <= self.indexer_width and (not rotary or rotated % rotary == 0)
        limits = f"must be even, at most indexer_width={self.indexer_width}, and divide the {rotated} rotated of a head"
        self.require(fits, "indexer_rotary_width", limits)
        a = self.architecture
        for name in ("full_layers", "unrotated_layers"):
            a.require(max(getattr(a, name), default=0) < self.layers, name, f"must be from 0 to {self.layers - 1}")
        rotary = a.rotary_width or self.head_width
        a.require(
            rotary % 2 == 0 and rotary <= self.head_width, "rotary_width", f"must be even, up to {self.head_width}"
        )
        given, wanted = a.rope_scaling.factors, rotary // 2 if a.rope_scaling.kind == "longrope" else 0
        a.rope_scaling.require(len(given) == wanted, "factors", f"must be {wanted} numbers for {a.rope_scaling.kind!r}")
        kind = f"must be 0 for attention={self.attention!r}"
        a.require(not (a.window and self.is_sparse), "window", kind)
        capped = a.attention_softcap and (self.is_sparse or self.query_chunk)
        a.require(not capped, "attention_softcap", f"{kind} with query_chunk={self.query_chunk}")
        wide = jax.dtypes.canonicalize_dtype(self.dtype) == self.dtype
        self.require(wide, "dtype", "needs JAX_ENABLE_X64=1 in the environment")


@functools.cache
def shape_table() -> tuple[dict[str, int], ...]:
    """The 53 shapes of ATLAS (arXiv 2510.22037, Table B.3), indexed by scale.

    Columns: scale, heads, layers, d_model, d_ff, d_kv (the head width) and params, the table's own total.
    """
    text = importlib.resources.files("models").joinpath("shapes.csv").read_text(encoding="utf-8")
    return tuple({k: int(v) for k, v in row.items()} for row in csv.DictReader(text.splitlines()))


def shape(scale: int) -> dict[str, Any]:
    """The fields of ModelConfig that an ATLAS scale sets, with the paper's vocabulary of 64,512.

    As in the table every head has its own key and value. The indexer's width is in proportion to that of
    gated sparse attention (arXiv 2601.15305): one indexer head per four heads, half as wide.

    Raises:
      UserError: scale is not a row of the table.

    >>> ModelConfig(**shape(8)).d_model
    640
    """
    table = shape_table()
    if scale not in range(len(table)):
        raise UserError(f"scale={scale!r} must be an integer from 0 to {len(table) - 1}")
    row = table[scale]
    return {
        "d_model": row["d_model"],
        "layers": row["layers"],
        "heads": row["heads"],
        "kv_heads": row["heads"],
        "head_width": row["d_kv"],
        "d_ff": row["d_ff"],
        "vocab_size": ATLAS_VOCAB_SIZE,
        "indexer_heads": max(2, row["heads"] // 4),
        "indexer_width": row["d_kv"] // 2,
    }
