"""Train the small models that differ in one thing each, one after the other; those that exist are skipped.

Several of these processes share the work: a model is trained by the one that has claimed it.

python -m experiments.train_tiny
python -m experiments.train_tiny gates=[softplus] no_gates=[] experts=[] seeds=[3] recipe.steps=400
"""

import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import pandas as pd
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from dass.claims import claimed
from dass.errors import DassError
from dass.records import write_atomically
from dass.tracking import track
from dass.training.fit import train, training_curve
from dass.training.tiny import Recipe, model_folder
from experiments.app import run_app
from experiments.schema import TrackingConfig
from report.figures import write_figure
from report.variants import training_figure

NAME = "training"  # of the figure and of its numbers


@dataclass
class TrainTinyConfig:
    """conf/train_tiny.yaml."""

    gates: list[str] = field(default_factory=list)
    no_gates: list[str] = field(default_factory=list)
    experts: list[int] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    recipe: Recipe = field(default_factory=Recipe)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    output: str = "results"
    debug: bool = False


ConfigStore.instance().store(name="train_tiny_schema", node=TrainTinyConfig)


def main(config: DictConfig) -> None:
    """Train every variant with every seed, print one line per model, and draw the curves of those that are done.

    Raises:
        DassError: a recipe that cannot be trained, found before the first is.
    """
    typed: TrainTinyConfig = OmegaConf.to_object(config)  # type: ignore[assignment]
    recipes = recipes_of(typed)
    for recipe in recipes:
        folder, start = model_folder(recipe), time.perf_counter()
        if folder.exists():
            print(f"{folder}: exists, skipping", flush=True)
            continue
        with claimed(folder.with_name(f".{folder.name}.claim"), wait=False) as claim:
            if claim is None:
                print(f"{folder}: another process trains it, skipping", flush=True)
            elif not folder.exists():
                where, name = typed.tracking, recipe.name
                with track(where.name, where.project, "train_tiny", name, where.folder, asdict(recipe)) as mirror:
                    ended = train(recipe, mirror.log)
                print(f"{folder}: {ended}, {time.perf_counter() - start:.0f} s", flush=True)
    done = [recipe for recipe in recipes if model_folder(recipe).exists()]
    if done:
        curves = pd.concat([training_curve(recipe).assign(**asdict(recipe)) for recipe in done])
        output = Path(typed.output)
        write_atomically(output / "figures" / f"{NAME}.csv", curves.to_csv(index=False, lineterminator="\n"))
        write_figure(lambda: training_figure(curves), output / "figures", NAME)


def recipes_of(config: TrainTinyConfig) -> list[Recipe]:
    """All variants of the first seed, then those of the next."""
    varied = ("activation", "gate", "experts", "seed")
    if any(getattr(config.recipe, name) != getattr(Recipe, name) for name in varied):
        raise DassError(f"{', '.join(varied)} of the recipe have no effect: set gates, no_gates, experts and seeds.")
    recipes = []
    for seed in config.seeds:
        recipes += [replace(config.recipe, activation=name, seed=seed) for name in config.gates]
        recipes += [replace(config.recipe, activation=name, gate=False, seed=seed) for name in config.no_gates]
        width = config.recipe.intermediate_size // 4  # 15 million parameters by default
        recipes += [replace(config.recipe, experts=n, intermediate_size=width, seed=seed) for n in config.experts]
    if not recipes:
        raise DassError("There is nothing to train: give one of `gates`, `no_gates` or `experts`, and one of `seeds`.")
    return recipes


if __name__ == "__main__":
    run_app(main, "train_tiny")
