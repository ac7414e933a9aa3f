"""Loss curves: loss as a decreasing function of training tokens, and its inverse."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from checked import UserError


@dataclass(frozen=True)
class LossCurve:
    """A loss curve made monotone and interpolated in log tokens.

    Attributes:
      tokens: training tokens, increasing, float64 [n].
      loss: isotonic (non-increasing) regression of the observed losses, float64 [n].
      trend: coefficients, highest power first, of the polynomial of log loss in log tokens (degree ≤ 2).
      noise: standard deviation of the observed log loss around that trend; NaN with fewer than four points.
    """

    tokens: np.ndarray
    loss: np.ndarray
    trend: np.ndarray
    noise: float

    def at(self, tokens: float) -> float:
        """Loss after `tokens`; NaN outside the observed range."""
        if not self.tokens[0] <= tokens <= self.tokens[-1]:
            return float("nan")
        return float(self.loss[0] if len(self.tokens) == 1 else self._interpolant(np.log(tokens)))

    @functools.cached_property
    def _interpolant(self) -> Callable[[float], np.ndarray]:
        from scipy.interpolate import PchipInterpolator  # takes half a second, which a fit need not wait for

        return PchipInterpolator(np.log(self.tokens), self.loss)

    def reach(self, loss: float) -> float:
        """Tokens at which `loss` is first reached: inf if never in the data, 0 if before its first point."""
        if loss < self.loss[-1]:
            return float("inf")
        if loss > self.loss[0]:
            return 0.0
        if loss == self.loss[0]:
            return float(self.tokens[0])
        segment = int(np.argmax(self.loss <= loss)) - 1
        low, high = np.log(self.tokens[segment]), np.log(self.tokens[segment + 1])
        for _ in range(60):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if self._interpolant(middle) > loss else (low, middle)
        return float(np.exp(high))

    def elasticity(self, tokens: float) -> float:
        """d log loss / d log tokens of the smooth trend: negative while the loss still falls."""
        return float(np.polyval(np.polyder(self.trend), np.log(tokens))) if len(self.trend) > 1 else 0.0


def loss_curve(tokens: np.ndarray, loss: np.ndarray) -> LossCurve:
    """A monotone curve from observed (tokens, loss) [n], in any order; equal tokens are averaged in log loss.

    Noise is removed by isotonic regression of log loss; between points the curve is
    a monotone cubic (Fritsch and Butland) in log tokens.

    >>> curve = loss_curve([1e6, 1e7, 1e8], [3.0, 2.0, 1.5])
    >>> round(curve.at(1e7), 3), round(curve.reach(2.0) / 1e7, 6), curve.reach(1.0)
    (2.0, 1.0, inf)
    """
    from scipy.optimize import isotonic_regression  # takes half a second, which a fit need not wait for

    tokens, loss = np.asarray(tokens, np.float64), np.asarray(loss, np.float64)
    if tokens.shape != loss.shape or tokens.ndim != 1 or not len(tokens):
        raise UserError(f"a loss curve needs equally many tokens and losses; got {tokens.shape} and {loss.shape}")
    if not (np.all(np.isfinite(tokens) & (tokens > 0)) and np.all(np.isfinite(loss) & (loss > 0))):
        raise UserError("a loss curve needs positive finite tokens and losses; drop the other rows first")
    unique, inverse, counts = np.unique(tokens, return_inverse=True, return_counts=True)
    log_loss = np.bincount(inverse, np.log(loss)) / counts
    x = np.log(unique)
    trend = np.polyfit(x, log_loss, min(2, len(x) - 1))
    spread = np.log(loss) - np.polyval(trend, np.log(tokens))
    freedom = len(loss) - len(trend)
    noise = float(np.sqrt(np.sum(spread**2) / freedom)) if freedom else float("nan")
    smooth = np.exp(isotonic_regression(log_loss, weights=counts, increasing=False).x)
    return LossCurve(unique, smooth, trend, noise)


def annealing_areas(rates: np.ndarray, decay: float = 0.999) -> tuple[np.ndarray, np.ndarray]:
    """Areas S1 and S2 [T] after each step of a learning-rate schedule [T] (Tissue et al., arXiv 2408.11029).

    S1 is the sum of the rates so far. S2 sums over steps the momentum m_i = decay·m_{i−1} + (η_{i−1} − η_i) of
    the rate's fall; the warm-up, up to the first peak, has none.

    >>> S1, S2 = annealing_areas([1.0, 2.0, 2.0, 1.0, 0.0], decay=0.5)
    >>> S1.tolist(), S2.tolist()
    ([1.0, 3.0, 5.0, 6.0, 6.0], [0.0, 0.0, 0.0, 1.0, 2.5])
    """
    rates = np.asarray(rates, np.float64)
    fall = np.concatenate([[0.0], -np.diff(rates)])
    fall[: int(np.argmax(rates >= rates.max())) + 1] = 0.0
    momentum = np.zeros(len(rates))
    for i in range(1, len(rates)):
        momentum[i] = decay * momentum[i - 1] + fall[i]
    return np.cumsum(rates), np.cumsum(momentum)
