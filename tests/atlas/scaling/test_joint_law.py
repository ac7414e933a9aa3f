"""The one form in which a fitted joint law travels."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from atlas.scaling import law as laws
from atlas.scaling.law import JointLaw
from checked import UserError

TARGETS, SOURCES = ("en", "fr"), ("en", "fr", "sw")


def law_of(by_source=False, draws=(), seed=0):
    rng = np.random.default_rng(seed)
    tau = rng.uniform(-0.1, 0.5, (*draws, 2, 3))
    tau[..., [0, 1], [0, 1]] = 1.0
    shape = (*draws, 1, 3) if by_source else (*draws, 2, 1)
    bounds = (0.5, 1), (100, 500), (0.3, 0.4), (100, 500), (0.3, 0.4)
    levels = [rng.uniform(*pair, (*draws, 2)) for pair in bounds]
    return JointLaw(TARGETS, SOURCES, *levels, rng.uniform(0.05, 0.3, shape), tau, rng.uniform(0, 0.1, draws))


N, D, U = np.array([1e8, 1e9]), np.array([[1e10, 2e9, 0.0], [4e9, 4e9, 4e9]]), np.array([3e9, np.inf, 1e9])


@pytest.mark.parametrize("by_source", [False, True])
def test_losses_are_the_formula_of_every_target(by_source):
    law = law_of(by_source)
    found = law.loss(N, D, U)
    assert found.shape == (2, 2) and found.dtype == np.float64
    for r in range(2):
        for t in range(2):
            rate = law.lam[0] if by_source else law.lam[t]
            with jax.enable_x64(True):
                alone = [getattr(law, name)[t] for name in ("E", "A", "alpha", "B", "beta")]
                one = laws.atlas(N[r], D[r], U, *alone, law.tau[t], rate, law.phi)
                z = laws.effective_share(D[r], U, law.tau[t], rate)
            np.testing.assert_allclose(found[r, t], one, rtol=1e-14)
            np.testing.assert_allclose(law.effective_share(D, U)[r, t], z, rtol=1e-14)
    target = np.array([1, 0])
    np.testing.assert_array_equal(law.loss(N, D, U, target), [found[0, 1], found[1, 0]])
    np.testing.assert_array_equal(law.loss(N[0], D[0], U, 1), found[0, 1])


@pytest.mark.parametrize("by_source", [False, True])
def test_leading_axes_are_draws(by_source):
    law = law_of(by_source, (5,))
    found = np.asarray(law.loss(1e8, D[0], U))
    each = [jax.tree.map(lambda leaf, i=i: leaf[i], law).loss(1e8, D[0], U) for i in range(5)]
    np.testing.assert_allclose(found, each, rtol=1e-14)
    np.testing.assert_allclose(law.loss(1e8, D[0], U, 1), found[:, 1], rtol=1e-14)
    with jax.enable_x64(True):
        mapped = jax.vmap(lambda law: law.loss(N, D, U))(law)
    assert mapped.shape == (5, 2, 2)
    np.testing.assert_allclose(mapped[:, 0], found, rtol=1e-14)


def test_names():
    law = law_of()
    own = ["E", "A", "alpha", "B", "beta", "lambda"]
    names = [f"{key}[en]" for key in own] + ["tau[en<-fr]", "tau[en<-sw]"]
    names += [f"{key}[fr]" for key in own] + ["tau[fr<-en]", "tau[fr<-sw]", "phi"]
    assert list(law.named()) == names
    assert law.named()["tau[fr<-sw]"] == law.tau[1, 2] and law.named()["lambda[fr]"] == law.lam[1, 0]
    rates = law_of(by_source=True)
    assert [name for name in rates.named() if "lambda" in name] == [f"lambda[<-{name}]" for name in SOURCES]
    assert rates.language("fr")["lambda"] == rates.lam[0, 1] and law.language("fr")["lambda"] == law.lam[1, 0]
    with pytest.raises(UserError, match="unknown target language 'sw'"):
        law.language("sw")


@pytest.mark.parametrize("by_source", [False, True])
def test_json_both_ways(by_source):
    law = law_of(by_source)
    again = JointLaw.from_json(json.loads(json.dumps(law.to_json(), allow_nan=False)))
    assert jax.tree.structure(again) == jax.tree.structure(law)
    for ours, theirs in zip(jax.tree.leaves(law), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    "damage",
    [
        lambda document: document.pop("tau"),
        lambda document: document.update(sources=["en"]),
        lambda document: document.update(E="x"),
        lambda document: document.update(phi=[[1]]),
    ],
)
def test_another_document_is_refused(damage):
    document = law_of().to_json()
    damage(document)
    with pytest.raises(UserError, match="no law of all languages"):
        JointLaw.from_json(document)


def test_a_law_that_is_not_finite_survives_json():
    law = dataclasses.replace(law_of(), phi=np.float64(np.nan))
    document = json.loads(json.dumps(law.to_json(), allow_nan=False))
    assert document["phi"] is None and np.isnan(JointLaw.from_json(document).phi)
