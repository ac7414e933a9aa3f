"""Random inputs of attention, and what is compared of its results."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from models.attention.keys import IndexInputs, Selection, in_documents

SHAPE = {"B": 2, "T": 29, "H": 4, "G": 2, "E": 6, "J": 2, "I": 5}


def make_inputs(seed=0, dtype=jnp.float32, ties=False, **shape):
    """q, k, v and the index; `shape` replaces entries of SHAPE."""
    B, T, H, G, E, J, I = (SHAPE | shape).values()
    rng, precise = np.random.default_rng(seed), jnp.promote_types(dtype, jnp.float32)

    def normal(*shape, dtype=precise):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    q, k, v = normal(B, T, H, E, dtype=dtype), normal(B, T, G, E, dtype=dtype), normal(B, T, G, E, dtype=dtype)
    query, key, gate, bias = normal(B, T, J, I), normal(B, T, I), jax.nn.sigmoid(normal(B, T, J)), normal(J)
    if ties:
        query, key, gate = jnp.round(query), jnp.round(key), jnp.round(4 * gate) / 4
    return q, k, v, IndexInputs(query, key, gate, bias)


def make_segments(kind, B, T):
    """The first rows are one document each, the last one is of a kind."""
    late, later = (np.arange(T) > T // 3).astype(int), (np.arange(T) > T // 2).astype(int)
    last = {"one": 0 * late, "documents": late + later, "padded": -later}[kind]
    return jnp.asarray([*[0 * late] * (B - 1), last], jnp.int32)


def make_selection(**fields):
    base = {"scale": 0.4, "temperature": 0.5, "k_rule": "paper", "k_base": 5, "k_min": 1, "k_max": 9}
    return Selection(**base | fields)


def run(how, inputs, segments, selection=None, running=0.01):
    """What a way of attending gives: `how` is a function of q, k, v, Reads and the selection."""
    q, k, v, index = inputs
    reads = in_documents(segments)
    if selection is not None:
        reads = reads._replace(index=index, running_variance=jnp.asarray(running, index.query.dtype))
    return how(q, k, v, reads, selection)


@functools.partial(jax.jit, static_argnames=("how", "selection"))
def value_and_gradients(how, inputs, segments, selection=None, running=0.01):
    """What attention gives, and the gradients of a random linear function of output and loss."""
    q = inputs[0]
    weight = jax.random.normal(jax.random.key(8), q.shape, q.dtype)
    loss_weight = jax.random.normal(jax.random.key(9), q.shape[:2], inputs[3].query.dtype)

    def loss(inputs):
        attended = run(how, inputs, segments, selection, running)
        total = jnp.sum(attended.output * weight)
        if selection is not None:
            total += jnp.sum(attended.indexer_loss * loss_weight)
        return total, attended

    (_, attended), gradients = jax.value_and_grad(loss, has_aux=True)(inputs)
    return attended, gradients


def assert_near(actual, expected, bound):
    """The largest error of each array is within `bound` of its largest entry; counts and sets are equal.

    The index's bias is measured by its gates: its gradient sums over tokens what theirs holds token by token, and as
    every query's terms add up to nothing but for the sigmoid's slope, most of the sum cancels and rounding does not.
    """
    paths = jax.tree.leaves_with_path(expected)
    assert len(jax.tree.leaves(actual)) == len(paths)
    largest = {jax.tree_util.keystr(path): np.max(np.abs(np.asarray(e, np.float64))) for path, e in paths}
    for a, (path, e) in zip(jax.tree.leaves(actual), paths, strict=True):
        assert a.dtype == e.dtype, path
        exact = not jnp.issubdtype(e.dtype, jnp.floating)
        error = np.abs(np.asarray(a, np.float64) - np.asarray(e, np.float64))
        scale = largest[jax.tree_util.keystr(path).replace(".bias", ".gate")]
        assert np.max(error) <= (0 if exact else bound * scale), path


def splice(inputs, others, length):
    """The first tokens of `inputs`, then the later ones of `others`."""

    def join(a, b):
        # By numpy, which compiles no program for every length.
        return jnp.asarray(np.concatenate([np.asarray(a)[:, :length], np.asarray(b)[:, length:]], axis=1))

    index = IndexInputs(*map(join, inputs[3][:3], others[3][:3]), inputs[3].bias)
    return (*map(join, inputs[:3], others[:3]), index)
