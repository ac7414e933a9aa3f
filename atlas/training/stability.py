"""How stable a training run was, from the losses it logged: spikes, divergence, the largest stable learning rate.

The losses of a run are those of consecutive training steps, in nats per token, as in `metrics.jsonl`; a step whose loss
was not finite was logged as null and counts as None or NaN here.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

Losses = Sequence[float | None]

SPIKE_DEVIATIONS = 7.0
SPIKE_WINDOW = 1000
SPIKE_HISTORY = 100
EVENT_GAP = 100
DIVERGED_ABOVE = 0.1  # of the lowest mean loss


def losses_of(records: Iterable[Mapping[str, Any]]) -> list[float | None]:
    """The losses of a run's longest branch and of the trunk before it, from the records of its `metrics.jsonl`.

    >>> trunk = [{"phase": "trunk", "step": step, "loss": 9.0 - step} for step in (1, 2, 3)]
    >>> short, long = ({"phase": f"cooldown-{end}", "step": end, "loss": 1.0 / end} for end in (2, 4))
    >>> losses_of([*trunk, short, long])
    [8.0, 7.0, 6.0, 0.25]
    """
    records = list(records)
    ends = [int(r["phase"].partition("-")[2]) for r in records if "-" in r["phase"]]
    wanted = {"trunk", f"cooldown-{max(ends)}"} if ends else {"trunk"}
    return [r["loss"] for r in sorted(records, key=lambda r: r["step"]) if r["phase"] in wanted]


def spikes(losses: Losses) -> np.ndarray:
    """Which steps are spikes, bool [steps].

    The definition of OLMo 2's spike score (arXiv 2501.00656, section 3): a loss at least 7 standard deviations above
    the mean of the 1000 steps before it. At the beginning it is the mean of all steps before it, and the first 100
    steps, which have too few, are never spikes. Deviations are the population's; earlier spikes stay in the mean; a
    loss that is not finite is a spike, and enters no mean. A loss that falls fast widens the deviation, so the
    measure is lenient at the beginning of a run.

    >>> np.flatnonzero(spikes([2.0, 2.2] * 60 + [2.9, 2.0, None]))
    array([120, 122])
    """
    values = np.array(losses, float)
    found = ~np.isfinite(values)
    for step in range(SPIKE_HISTORY, len(values)):
        before = values[max(0, step - SPIKE_WINDOW) : step]
        before = before[np.isfinite(before)]
        if len(before) >= SPIKE_HISTORY:
            found[step] |= values[step] >= before.mean() + SPIKE_DEVIATIONS * before.std()
    return found


def spike_events_per_100k(losses: Losses) -> float:
    """Spike events per 100,000 steps; spikes at most 100 steps apart are one event.

    >>> spike_events_per_100k([2.0, 2.2] * 60 + [2.9, 2.9] + [2.0, 2.2] * 39)
    500.0
    """
    steps = np.flatnonzero(spikes(losses))
    events = min(len(steps), 1) + int(np.sum(np.diff(steps) > EVENT_GAP))
    return 1e5 * events / max(len(losses), 1)


def diverged(losses: Losses) -> bool:
    """Whether a run has lost what it had learnt, or numbers altogether.

    A run diverges if a loss is not finite, or if the mean loss of its last tenth is more than 10 % above the lowest
    mean of any tenth (of so many consecutive steps) before.

    >>> diverged([5.0, 4.0, 3.0, 3.1]), diverged([5.0, 3.0, 3.0, 3.4]), diverged([3.0, None, 3.0])
    (False, True, True)
    """
    values = np.array(losses, float)
    if not np.isfinite(values).all():
        return True
    width = max(1, len(values) // 10)
    means = np.convolve(values, np.full(width, 1 / width), mode="valid")
    return bool(means[-1] > (1 + DIVERGED_ABOVE) * means.min())


def largest_stable_rate(runs: Mapping[float, bool]) -> float | None:
    """The largest learning rate of a sweep up to which no run diverges; None if the smallest does.

    runs: whether the run at each rate `diverged`. A rate above one that diverges does not count, even where its own
    run came through. Where the answer is the largest rate of the sweep, the sweep gives a lower bound only.

    >>> largest_stable_rate({1e-2: True, 1e-3: False, 3e-3: False, 3e-2: False})
    0.003
    """
    stable = list(itertools.takewhile(lambda rate: not runs[rate], sorted(runs)))
    return stable[-1] if stable else None
