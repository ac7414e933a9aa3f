"""Model configuration, the ATLAS shape table, and the parameter count."""

import csv
import dataclasses
import difflib
import functools
import importlib.resources
from dataclasses import dataclass
from typing import NamedTuple

ATTENTION_KINDS = ("dense", "gated", "sparse", "gated_sparse")
DTYPES = ("float32", "bfloat16", "float64")
REMAT_POLICIES = ("none", "dots", "full")
K_RULES = ("fixed", "paper", "inverse")
OUTPUT_GATES = ("elementwise", "headwise", "none")
VALUE_GATES = ("elementwise", "none")
SELECTIONS = ("token", "block")
ROPE_SCALINGS = ("none", "linear", "llama3")

ATLAS_VOCAB_SIZE = 64512  # 64,000 pieces and 512 special tokens

_POSITIVE = ("d_model", "layers", "heads", "kv_heads", "head_width", "d_ff", "vocab_size", "rope_base")
_POSITIVE_SPARSE = (
    "indexer_heads",
    "indexer_width",
    "indexer_temperature",
    "k_base",
    "k_min",
    "k_max",
    "block",
)
_NOT_NEGATIVE = ("loss_chunk", "query_chunk", "indexer_scale", "keep_first", "keep_local")


class Family(NamedTuple):
    """What the name of an architecture fixes.

    norms: vectors a layer. 1 is the parallel block x + attention(n) + feed_forward(n); 2 are two blocks in
      sequence, each behind a norm; 4 also normalise what each block adds. Only the first goes without a scale
      in the final norm.
    qkv_bias: a bias on queries, keys and values.
    qk_norm: RMSNorm over every head's query and key, before their rotation.
    gemma: norms multiply by 1 + scale, in float32; embeddings are multiplied by sqrt(M) on their way in; the
      feed-forward's gate is the approximate GELU.
    """

    norms: int = 2
    qkv_bias: bool = False
    qk_norm: bool = False
    gemma: bool = False


FAMILIES = {
    "atlas": Family(norms=1),
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(qk_norm=True),
    "gemma2": Family(norms=4, gemma=True),
    "gemma3": Family(norms=4, qk_norm=True, gemma=True),
}


# Hashed, since a module keeps its architecture as a part of its structure. It keeps a copy.
@dataclass(unsafe_hash=True)
class RopeScaling:
    """How rotary wavelengths are stretched for contexts longer than those of the first training.

    kind: "none"; "linear" multiplies all by `factor`; "llama3" only long ones: those above
      original_context / low_frequency_factor by `factor`, those below original_context / high_frequency_factor
      not at all, and between the two by what interpolates their frequencies.
    """

    kind: str = "none"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_context: int = 8192


@dataclass(unsafe_hash=True)
class Architecture:
    """What off-the-shelf decoders do otherwise. The defaults are our own decoder.

    family: a name in `FAMILIES`, which lists what it fixes.
    norm_epsilon: added to the mean square in every norm.
    tied_head: the embedding also gives the logits; False is a head of its own.
    rope_scaling: see `RopeScaling`.
    window: a query sees so many latest keys, itself included; 0 is all of its document.
    full_layers: indices of the layers without that window.
    window_rope_base: base of the rotary wavelengths, unscaled, in layers with the window; 0 is like the others.
    query_width: products of queries and keys are divided by its root; 0 is head_width.
    attention_softcap, logit_softcap: c in c · tanh(x / c), applied to these products and to the logits of the
      vocabulary; 0 is none.
    """

    family: str = "atlas"
    norm_epsilon: float = 1e-6
    tied_head: bool = True
    rope_scaling: RopeScaling = dataclasses.field(default_factory=RopeScaling)
    window: int = 0
    full_layers: tuple[int, ...] = ()
    window_rope_base: float = 0.0
    query_width: int = 0
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0

    @property
    def fixed(self) -> Family:
        return FAMILIES[self.family]

    def has_window(self, layer: int) -> bool:
        return self.window > 0 and layer not in self.full_layers


@dataclass
class ModelConfig:
    """The shape and the choices of a `Decoder`. The defaults are a small byte-level model for windows of 256.

    Width and depth:
      d_model, layers, heads, kv_heads, head_width, d_ff: M, L, H, G, E and F. Query head h reads key/value
        head h // (heads / kv_heads). `head_width` must be even, for the rotation.
      vocab_size: V.
      architecture: the block, norms and positions, where they are not our own; see `Architecture`.
    Attention:
      attention: "dense"; "gated" adds the value gate and the output gate; "sparse" adds the indexer, which
        selects k keys a query; "gated_sparse" has both.
      rope_base: base of the rotary wavelengths.
      output_gate: after attention, per head: "elementwise", "headwise" (one scalar a head) or "none".
      value_gate: on the values, before attention, per key/value head: "elementwise" or "none".
      gate_bias: initial bias of both gates (sigmoid(0.5) = 0.62).
      indexer_heads, indexer_width: J and I.
      indexer_scale: factor on the indexer's dot products; 0 means 1/sqrt(indexer_width), 1 is the paper's
        equation.
      indexer_gate_bias: adds a bias to the indexer's head weights (the paper's equation has none).
      indexer_temperature: divides the scores in the softmax of the indexer's loss. Scores lie in (0, J),
        which bounds the contrast of that softmax by exp(J / temperature).
      k_rule: how many keys a query selects: "fixed" (k_base), "paper" (more where the scores vary more) or
        "inverse" (fewer); see `models.attention.selection.adaptive_k`.
      k_base, k_min, k_max: keys. The defaults are 1/4, 1/32 and 1/2 of a window of 256: choose them with the
        window.
      selection: "token", the paper's, or "block", a variant whose tiles of `block` queries select whole blocks of
        `block` keys; see `models.attention.selection`.
      variance_decay: decay of the running variance of the scores that the adaptive rules compare with.
      keep_first, keep_local: so many first tokens of the document and so many latest ones are always
        selected; they count towards k.
    Computation:
      dtype: of activations and matrix products, "float32" or "bfloat16". Parameters, norms, softmax, scores,
        logits and loss are float32. "float64", under jax_enable_x64, makes all but the parameters so: two ways
        to compute one thing then agree so closely that greedy decoding by both gives one text.
      remat: what the backward pass recomputes: "none", "dots" (all but the projections) or "full" (the whole
        layer).
      scan_layers: scans over the layers (fast to compile); False unrolls them (faster to run on a CPU).
        Parameters and results are the same.
      loss_chunk: tokens per chunk of the vocabulary loss; 0 computes all logits at once.
      query_chunk: queries per tile of attention in memory that grows with T (see `models.attention.streamed`);
        0 computes all scores at once, which is faster for windows of a few hundred tokens. Block selection is
        always in tiles.
    """

    d_model: int = 64
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    head_width: int = 16
    d_ff: int = 256
    vocab_size: int = 288
    attention: str = "dense"
    rope_base: float = 10000.0
    output_gate: str = "elementwise"
    value_gate: str = "elementwise"
    gate_bias: float = 0.5
    indexer_heads: int = 2
    indexer_width: int = 16
    indexer_scale: float = 0.0
    indexer_gate_bias: bool = False
    indexer_temperature: float = 0.25
    k_rule: str = "paper"
    k_base: int = 64
    k_min: int = 8
    k_max: int = 128
    selection: str = "token"
    block: int = 16
    variance_decay: float = 0.99
    keep_first: int = 0
    keep_local: int = 0
    dtype: str = "float32"
    remat: str = "none"
    scan_layers: bool = True
    loss_chunk: int = 0
    query_chunk: int = 0
    architecture: Architecture = dataclasses.field(default_factory=Architecture)

    @property
    def is_gated(self) -> bool:
        return self.attention in ("gated", "gated_sparse")

    @property
    def is_sparse(self) -> bool:
        return self.attention in ("sparse", "gated_sparse")

    def validate(self) -> None:
        """Raises a ValueError of one line that names the field, its value and the constraint."""
        _require_choice("attention", self.attention, ATTENTION_KINDS)
        _require_choice("dtype", self.dtype, DTYPES)
        _require_choice("remat", self.remat, REMAT_POLICIES)
        for field in _POSITIVE:
            _require(getattr(self, field) > 0, field, getattr(self, field), "must be positive")
        for field in _NOT_NEGATIVE:
            _require(getattr(self, field) >= 0, field, getattr(self, field), "must not be negative")
        _require(self.head_width % 2 == 0, "head_width", self.head_width, "must be even (rotary positions)")
        divides = self.heads % self.kv_heads == 0
        _require(divides, "kv_heads", self.kv_heads, f"must divide heads={self.heads}")
        self._validate_architecture()
        if self.is_gated:
            self._validate_gates()
        if self.is_sparse:
            self._validate_selection()

    def _validate_architecture(self) -> None:
        a = self.architecture
        _require_choice("architecture.family", a.family, tuple(FAMILIES))
        _require_choice("architecture.rope_scaling.kind", a.rope_scaling.kind, ROPE_SCALINGS)
        _require(a.norm_epsilon > 0, "architecture.norm_epsilon", a.norm_epsilon, "must be positive")
        factor = a.rope_scaling.factor
        _require(factor > 0, "architecture.rope_scaling.factor", factor, "must be positive")
        for name in ("window", "window_rope_base", "query_width", "attention_softcap", "logit_softcap"):
            _require(getattr(a, name) >= 0, f"architecture.{name}", getattr(a, name), "must not be negative")
        exist = all(0 <= i < self.layers for i in a.full_layers)
        _require(exist, "architecture.full_layers", a.full_layers, f"must be from 0 to {self.layers - 1}")
        for name in ("window", "attention_softcap") if self.is_sparse or self.query_chunk else ():
            limit = f"must be 0 for attention={self.attention!r} with query_chunk={self.query_chunk}"
            _require(not getattr(a, name), f"architecture.{name}", getattr(a, name), limit)

    def _validate_gates(self) -> None:
        _require_choice("output_gate", self.output_gate, OUTPUT_GATES)
        _require_choice("value_gate", self.value_gate, VALUE_GATES)

    def _validate_selection(self) -> None:
        _require_choice("k_rule", self.k_rule, K_RULES)
        _require_choice("selection", self.selection, SELECTIONS)
        for field in _POSITIVE_SPARSE:
            _require(getattr(self, field) > 0, field, getattr(self, field), "must be positive")
        decay = self.variance_decay
        _require(0 <= decay < 1, "variance_decay", decay, "must be at least 0 and below 1")
        if self.k_rule != "fixed":
            _require(self.k_min <= self.k_max, "k_min", self.k_min, f"must not exceed k_max={self.k_max}")
            in_range = self.k_min <= self.k_base <= self.k_max
            limits = f"must lie between k_min={self.k_min} and k_max={self.k_max}"
            _require(in_range, "k_base", self.k_base, limits)


def _require(condition: bool, field: str, value: object, constraint: str) -> None:
    if not condition:
        raise ValueError(f"model.{field}={value!r} {constraint}")


def _require_choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    nearest = difflib.get_close_matches(str(value), choices, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    _require(value in choices, field, value, f"must be one of {', '.join(choices)}{hint}")


@functools.cache
def shape_table() -> tuple[dict[str, int], ...]:
    """The 53 shapes of ATLAS (arXiv 2510.22037, Table B.3), indexed by scale.

    Columns: scale, heads, layers, d_model, d_ff, d_kv (the head width) and params, the table's own total.
    """
    text = importlib.resources.files("models").joinpath("shapes.csv").read_text(encoding="utf-8")
    return tuple({k: int(v) for k, v in row.items()} for row in csv.DictReader(text.splitlines()))


def shape_config(scale: int) -> ModelConfig:
    """The dense ModelConfig of an ATLAS scale, with the paper's vocabulary of 64,512.

    As in the table every head has its own key and value. The indexer's width is in proportion to that of
    gated sparse attention (arXiv 2601.15305): one indexer head per four heads, half as wide.

    Raises:
      ValueError: scale is not a row of the table.

    >>> shape_config(8).d_model, count_params(shape_config(8))["total"]
    (640, 146155520)
    """
    table = shape_table()
    if scale not in range(len(table)):
        raise ValueError(f"scale={scale!r} must be an integer from 0 to {len(table) - 1}")
    row = table[scale]
    return ModelConfig(
        d_model=row["d_model"],
        layers=row["layers"],
        heads=row["heads"],
        kv_heads=row["heads"],
        head_width=row["d_kv"],
        d_ff=row["d_ff"],
        vocab_size=ATLAS_VOCAB_SIZE,
        indexer_heads=max(2, row["heads"] // 4),
        indexer_width=row["d_kv"] // 2,
    )


def count_params(config: ModelConfig) -> dict[str, int]:
    """Parameters of `Decoder(config)`, without building it: {"total", "non_embedding"}.

    A dense model with as many key/value heads as heads has V·M + L·(4·M·H·E + 3·M·F + M), the formula behind
    the totals of ATLAS (arXiv 2510.22037, Table B.3): tied embeddings, gated feed-forward, one norm a layer,
    and no parameters in the final norm. It gives the table's totals exactly for scales 0 to 51; the table's
    own row 52 is off. `non_embedding` is the N of scaling laws; a head that is not tied is no part of it either.
    """
    c, fixed = config, config.architecture.fixed
    attention = 2 * c.d_model * c.head_width * (c.heads + c.kv_heads)
    attention += (c.heads + 2 * c.kv_heads) * c.head_width if fixed.qkv_bias else 0
    attention += 2 * c.head_width if fixed.qk_norm else 0
    layer = attention + 3 * c.d_model * c.d_ff + fixed.norms * c.d_model
    layer += _count_gates(c) if c.is_gated else 0
    layer += _count_indexer(c) if c.is_sparse else 0
    non_embedding = c.layers * layer + (c.d_model if fixed.norms > 1 else 0)
    embeddings = c.vocab_size * c.d_model * (1 if c.architecture.tied_head else 2)
    return {"total": embeddings + non_embedding, "non_embedding": non_embedding}


def _count_gates(c: ModelConfig) -> int:
    outputs = {"elementwise": c.heads * c.head_width, "headwise": c.heads, "none": 0}[c.output_gate]
    values = {"elementwise": c.kv_heads * c.head_width, "none": 0}[c.value_gate]
    return (c.d_model + 1) * (outputs + values)


def _count_indexer(c: ModelConfig) -> int:
    projections = c.d_model * (c.indexer_heads * c.indexer_width + c.indexer_width + c.indexer_heads)
    biases = c.indexer_heads * (2 if c.indexer_gate_bias else 1)
    return projections + biases
