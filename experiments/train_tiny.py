"""Train the small models that compare activations of the gate, one after the other; those that exist are skipped.

python -m experiments.train_tiny
python -m experiments.train_tiny activations=[relu] seeds=[3] recipe.steps=1000
"""

import time
from dataclasses import dataclass, field, replace

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from dass.errors import DassError
from dass.training.tiny import Recipe, model_folder, train
from experiments.app import run_app


@dataclass
class TrainTinyConfig:
    """conf/train_tiny.yaml."""

    activations: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    recipe: Recipe = field(default_factory=Recipe)
    debug: bool = False


ConfigStore.instance().store(name="train_tiny_schema", node=TrainTinyConfig)


def main(config: DictConfig) -> None:
    """Train every activation with every seed, and print one line per model.

    Raises:
        DassError: a recipe that cannot be trained, found before the first is.
    """
    typed: TrainTinyConfig = OmegaConf.to_object(config)  # type: ignore[assignment]
    if (typed.recipe.activation, typed.recipe.seed) != (Recipe.activation, Recipe.seed):
        raise DassError("recipe.activation and recipe.seed have no effect: set `activations` and `seeds`.")
    recipes = [replace(typed.recipe, activation=a, seed=seed) for seed in typed.seeds for a in typed.activations]
    if not recipes:
        raise DassError("There is nothing to train: give at least one of `activations` and one of `seeds`.")
    for recipe in recipes:
        folder = model_folder(recipe)
        if folder.exists():
            print(f"{folder}: exists, skipping", flush=True)
            continue
        start = time.perf_counter()
        print(f"{folder}: {train(recipe)}, {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    run_app(main, "train_tiny")
