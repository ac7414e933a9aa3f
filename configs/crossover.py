"""Pretraining against fine-tuning: each language from scratch, and from a model of all of them, over growing numbers of
tokens.

    python -m experiments.sweep --config=configs/crossover.py --config.data.input=DIR --workdir=WORKDIR
    python -m experiments.plan crossover --runs=WORKDIR/runs.csv

DIR holds a directory for each language, as for configs/own_text.py, whose middle size this is. Time and expected
result: experiments/results/eight_languages/.
"""

import dataclasses

from atlas.data import languages_of
from atlas.training import RunConfig, Study
from configs import own_text

STEPS = (75, 150, 300, 600, 1200)  # where the curves are read


def get_config() -> RunConfig:
    """The model of all languages, as a study of the same text trains it."""
    base = own_text.get_config()
    train = dataclasses.replace(base.train, steps=base.train.steps[-1:], evaluate_every=0)
    return dataclasses.replace(base, name="multilingual", train=train)


def get_sweep(base: RunConfig) -> Study:
    """That model, and two runs a language."""
    runs = [{"name": base.name}]
    for language in languages_of(base.data):
        alone = {"mixture": language, "train.steps": STEPS}
        runs.append(alone | {"name": f"{language}_pretrained", "group": "pretrained"})
        runs.append(alone | {"name": f"{language}_finetuned", "group": "finetuned", "initialize": base.name})
    return Study("Pretraining against fine-tuning", base, runs)
