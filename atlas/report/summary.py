"""What a report shows: everything a study found, any of it possibly missing."""

import dataclasses
from collections.abc import Mapping

import pandas as pd

from atlas.scaling.joint.fit import JointFit
from atlas.scaling.planning.mixtures import MixturePlan
from atlas.scaling.transfer.capacity import CapacityFit


@dataclasses.dataclass(frozen=True)
class StudySummary:
    """One study, as it goes into a report; what is None or empty is reported as missing.

    Attributes:
      title: of the report.
      runs: the runs table.
      fit: the joint fit; the figures of the law compare it with the rows of `runs` that it can predict.
      fitted_rows: pandas query over `runs` that selects the rows the fit was made on, "" for all.
      transfer: as `bilingual_transfer_scores` returns.
      capacity: the fit of the capacity law.
      heldout: a row per split and law, with columns split, law, r2, are, … as `heldout` returns them.
      heldout_rows: rows predicted by a fit that had not seen them: split, language, loss, predicted.
      relatedness: (target, source) → how related they are, by `relatedness_name`; more is closer.
      expansion: as `expansion_table` returns; by default made from `capacity` or the published law.
      mixture: the best mixture for a budget.
      tables: further tables by heading, shown as they are.
      facts: hardware, time, command, configuration: anything short, in the order to show.
      warnings: to show first, beside those of the fits.
      missing: why a part is None, by its name, where more can be said than that it was not computed.
    """

    title: str
    runs: pd.DataFrame
    fit: JointFit | None = None
    fitted_rows: str = ""
    transfer: pd.DataFrame | None = None
    capacity: CapacityFit | None = None
    heldout: pd.DataFrame | None = None
    heldout_rows: pd.DataFrame | None = None
    relatedness: Mapping[tuple[str, str], float] | None = None
    relatedness_name: str = "known relatedness"
    expansion: pd.DataFrame | None = None
    mixture: MixturePlan | None = None
    tables: Mapping[str, pd.DataFrame] = dataclasses.field(default_factory=dict)
    facts: Mapping[str, object] = dataclasses.field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    missing: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def loss_unit(self) -> str:
        """Name of the unit of the losses, in words for an axis."""
        units = self.runs["loss_unit"].dropna().unique() if "loss_unit" in self.runs else []
        return str(units[0]).replace("_", " ") if len(units) == 1 else "loss"
