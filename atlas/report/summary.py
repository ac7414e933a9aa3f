"""What a report shows: everything a study found, any of it possibly missing."""

import dataclasses
from collections.abc import Mapping

import pandas as pd

from atlas.scaling import CapacityFit, Estimate, JointFit, JointLaw, MixturePlan, Runs


@dataclasses.dataclass(frozen=True)
class StudySummary:
    """One study, as it goes into a report; what is None or empty is reported as missing.

    Attributes:
      title: of the report.
      runs: all rows of the runs table.
      fit: the joint fit of `runs.comparable()`, with which the figures of the law compare it.
      transfer: as `bilingual_transfer_scores` returns.
      capacity: the fit of the capacity law.
      heldout: a row per split and law, with columns split, law, r2, are, … as `heldout` returns them.
      heldout_rows: rows predicted by a fit that had not seen them: split, language, loss, predicted.
      relatedness: (target, source) → how related they are, by `relatedness_name`; more is closer.
      mixture: the best mixture for a budget.
      facts: hardware, time, command, configuration: anything short, in the order to show.
      draws: laws that the runs allow, as `joint_draws` gives them, for the bands of the planner.
      warnings: to show first, beside those of the fits.
      conclusions: what the transfer matrix says of its languages, a sentence each.
      missing: why a part is None, or a held-out score absent, by its name.
    """

    title: str
    runs: Runs
    fit: JointFit
    transfer: pd.DataFrame | None = None
    capacity: CapacityFit | None = None
    heldout: pd.DataFrame = dataclasses.field(default_factory=pd.DataFrame)
    heldout_rows: pd.DataFrame | None = None
    relatedness: Mapping[tuple[str, str], float] | None = None
    relatedness_name: str = "known relatedness"
    mixture: MixturePlan | None = None
    draws: JointLaw | None = None
    facts: Mapping[str, object] = dataclasses.field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    conclusions: tuple[str, ...] = ()
    missing: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def loss_unit(self) -> str:
        """Name of the unit of the losses, in words for an axis."""
        return self.runs.loss_unit.replace("_", " ") or "loss"

    @property
    def fitted(self) -> Runs:
        """The rows that the joint law describes: comparable ones, on a language that their run trains."""
        runs = self.runs.comparable()
        return runs.where(runs.own(runs.D) > 0)

    def phi_in_words(self) -> list[str]:
        """Each estimate of the capacity exponent, whose it is and what it decides; of two, why they may differ."""
        found = []
        if phi := self.fit.parameters.get("phi"):
            found.append(_in_words(phi, "joint law: decides predictions, mixtures and next runs"))
        if self.capacity is not None:
            found.append(_in_words(self.capacity.parameters["phi"], "capacity law: decides what more languages cost"))
        if len(found) == 2:
            found.append(
                "The two may differ: the capacity law sees even mixtures only and counts the target's own tokens "
                "alone, so its phi and psi also carry what the joint law ascribes to transfer between the languages."
            )
        return found


def _in_words(phi: Estimate, use: str) -> str:
    known = "" if phi.identified else ", not identified"
    return f"phi = {phi.value:.3f} [{phi.low:.3f}, {phi.high:.3f}]{known} ({use})"
