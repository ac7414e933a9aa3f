"""A fit on disk, as plans read it: what it holds is checked, and what it does not hold is fitted again."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from atlas.scaling.joint.draws import DRAWS, joint_draws, refitted
from atlas.scaling.joint.fitted import JointFit
from atlas.scaling.law import JointLaw
from atlas.scaling.single.draws import law_draws
from atlas.scaling.single.library import law_named
from atlas.scaling.table.runs import Runs, load_runs
from checked import UserError, unknown
from checked.files import read_json

_REMEDY = "give a study's workdir, or fit its runs again"
_KINDS = {
    "law": str,
    "converged": bool,
    "warnings": list,
    "n_rows": int,
    "joint_law": dict,
    "options": dict,
    "source": dict,
    "reading": dict,
    "unique_tokens": dict,
}
_LAW_DRAWS = 1000  # of one law, whose draws are nearly free


def caution(converged: bool, warnings: Sequence[str]) -> dict[str, str]:
    """The fact that stands first where an answer rests on a fit that did not converge, with what would mend it."""
    return {} if converged else {"do not trust this": f"the fit did not converge; {'; '.join(warnings[:1])}"}


class Fitted:
    """A fit on disk: a workdir with fit.json or capacity.json and, for bands and mixtures, runs.csv; or one JSON file.

    `caution` belongs first among the facts of every answer from it.

    Args:
      path: the workdir or the file.
      name: of the file within the workdir.

    Raises:
      UserError: there is no such file, or it is no fit.
    """

    def __init__(self, path: str | pathlib.Path, name: str = "fit.json") -> None:
        path = pathlib.Path(path)
        self.folder, self.file = (path, path / name) if path.is_dir() else (path.parent, path)
        self.document = read_json(self.file, "fit", _REMEDY)
        if not isinstance(self.document.get("parameters"), dict):
            raise UserError(f"{str(self.file)!r} is no fit: it has no 'parameters'; {_REMEDY}")
        self._check_kinds()
        self.caution = caution(self.document.get("converged", True), self.document.get("warnings", []))

    def _check_kinds(self) -> None:
        """Raises UserError for what a person has made of another kind."""
        estimates = {f"parameters.{name}": estimate for name, estimate in self.document["parameters"].items()}
        values = {f"{name}.value": e.get("value", "") for name, e in estimates.items() if isinstance(e, dict)}
        checked = (
            *((name, self.document[name], kind) for name, kind in _KINDS.items() if name in self.document),
            *((name, estimate, dict) for name, estimate in estimates.items()),
            *((name, value, (int, float, type(None))) for name, value in values.items()),
        )
        for name, value, kind in checked:
            if not isinstance(value, kind):
                raise UserError(f"{str(self.file)!r}: {name} is of another kind than a fit leaves; {_REMEDY}")
        for name, U in self.document.get("unique_tokens", {}).items():
            if not (U is None or (isinstance(U, int | float) and U > 0)):
                raise UserError(f"{str(self.file)!r}: unique_tokens.{name} is {U!r}, no positive number; {_REMEDY}")

    def joint_law(self) -> JointLaw:
        """The law of all languages.

        Raises:
          UserError: the fit is of another law.
        """
        if "joint_law" not in self.document:
            raise UserError(f"{str(self.file)!r} is no law of all languages; fit its runs again, with --law=atlas")
        try:
            law = JointLaw.from_json(self.document["joint_law"])
        except UserError as error:
            raise UserError(f"{str(self.file)!r}: {error}") from None
        self._check_finite(law.named())
        for name in law.named().keys() - self.document["parameters"].keys():
            raise UserError(f"{str(self.file)!r}: 'parameters' lack {name}; {_REMEDY}")
        return law

    def law(self, language: str = "") -> dict[str, float]:
        """Parameters of the law of one language, which a joint fit needs the name of; UserError for another one."""
        if "joint_law" in self.document:
            joint = self.joint_law()
            if not language:
                raise UserError(f"the fit is of several languages: give --language, one of {', '.join(joint.targets)}")
            return {name: float(value) for name, value in joint.language(language).items()}
        self.check_language(language)
        found = {name: estimate["value"] for name, estimate in self.document["parameters"].items()}
        self._check_finite(found)
        return found

    @property
    def language(self) -> str:
        """Of the rows that a law of one language is of; "" where the fit does not say."""
        return self.document.get("reading", {}).get("language", "")

    def check_language(self, name: str) -> None:
        """Raises UserError for another language than that of a law of one; "" is any."""
        if name and self.language and name != self.language:
            raise unknown("language of this fit", name, [self.language])

    @property
    def repeats(self) -> bool:
        """Whether the law reads unique tokens."""
        if "joint_law" in self.document or "law" not in self.document:
            return "joint_law" in self.document or "lambda" in self.document["parameters"]
        return any(column.name == "U" for column in law_named(self.document["law"]).columns)

    def unique_tokens(self, language: str = "") -> tuple[float, str]:
        """U of a language alone as the fit's runs had it, infinite where that is not known; and in words why not.

        language: of a joint fit. A law of one language in all tokens of a mixture takes those of all its languages.
        """
        try:
            known = self.runs().unique_tokens() if "joint_law" in self.document else self.document.get("unique_tokens")
        except UserError as error:
            return np.inf, str(error)
        if known is None:
            return np.inf, "the fit does not tell them; fit the runs again"
        total = self.document.get("reading", {}).get("tokens") == "total"
        of = [U or np.inf for name, U in known.items() if total or name == (language or self.language)]
        return float(sum(of)) if of else np.inf, "the runs do not state them"

    def open(self, language: str = "", repeats: bool = True) -> dict[str, str]:
        """The fact which parameters of a law of one language, or of that one, the runs leave open.

        repeats: whether λ counts.
        """
        of = f"[{language}]" if "joint_law" in self.document else ""
        told = {name: estimate.get("identified", True) for name, estimate in self.document["parameters"].items()}
        names = [n for n, known in told.items() if not known and n.endswith(of) and (repeats or "lambda" not in n)]
        return {"not identified": ", ".join(names)} if names else {}

    def check_form(self, values: Mapping[str, float], best: Mapping[str, float], U: float) -> None:
        """Raises UserError for a law that at its optimum is not the E + A/N^alpha + B/D^beta which was minimised."""
        if "joint_law" in self.document or "law" not in self.document:
            return
        law = law_named(self.document["law"])
        batch = {c.name: c.default for c in law.columns} | {"N": best["params"], "D": best["tokens"], "U": U}
        needed = [c.name for c in law.columns if batch[c.name] is None]
        with jax.enable_x64(True):
            same = not needed and np.isclose(float(law.loss(values, batch)), best["loss"], rtol=1e-9)
        if not same:
            where = f" where it repeats {U:.4g} tokens {best['epochs']:.3g} times" if best["epochs"] > 1 else ""
            how = "use predict" + (", or give more by --unique" if where else "")
            raise UserError(f"allocate knows E + A/N^alpha + B/D^beta, and the {law.name} law is another{where}; {how}")

    def _check_finite(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if value is None or not np.isfinite(value):
                raise UserError(f"{str(self.file)!r}: {name} is {value}, no finite number; {_REMEDY}")

    def run_noise(self) -> float | None:
        """How far new runs lie off a law of all languages, see `JointFit.run_noise`; None where the fit is older."""
        known = [self.document.get(name) for name in ("sigma", "misfit")]
        return None if None in known else float(np.hypot(*known))

    def runs(self) -> Runs:
        """The rows that the fit is of: of the table that it names, or of the runs.csv beside it."""
        source = self.document.get("source") or {"runs": self.folder / "runs.csv", "columns": {}, "where": ""}
        path, columns, where = (source.get(name) for name in ("runs", "columns", "where"))
        if not (isinstance(path, str | pathlib.Path) and isinstance(columns, dict) and isinstance(where, str)):
            raise UserError(f"{str(self.file)!r}: 'source' does not name its runs; fit them again")
        runs = load_runs(path, columns)
        return (runs.where(where) if where else runs).comparable()

    def refitted(self) -> tuple[JointFit | None, str]:
        """The fit of all languages with its posterior, None where there is none; and in words what bands then are."""
        try:
            fit = refitted(self.document, self.runs())
        except UserError as error:
            return None, f"none: {error}"
        return fit, f"90 %, over {DRAWS} laws drawn from the fit's posterior"

    def joint_draws(self) -> tuple[JointLaw | None, str]:
        """Laws of all languages that the runs allow, None where they cannot be had; and in words which they are."""
        fit, bands = self.refitted()
        return None if fit is None else joint_draws(fit), bands

    def draws(self, language: str) -> tuple[Mapping | None, str]:
        """`joint_draws` for the law of one language, or draws of a fit of one law."""
        if "joint_law" in self.document:
            draws, bands = self.joint_draws()
            return None if draws is None else draws.language(language), bands
        if draws := law_draws(self.document, _LAW_DRAWS):
            return draws, f"90 %, over {_LAW_DRAWS} laws drawn from the covariance of the fit"
        return None, "none: the fit holds no finite covariance; fit the runs again"
