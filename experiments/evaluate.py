"""Evaluate a model as it is: python -m experiments.evaluate model=local model.path=DIR evaluation=wikitext2."""

from omegaconf import DictConfig

from dass.errors import DassError
from experiments.app import run_app
from experiments.prune import main


def evaluate(config: DictConfig) -> str | None:
    """A run of the dense method under another name; DassError where a method or no evaluation is asked for."""
    if config.method.name != "dense":
        raise DassError(
            f"experiments.evaluate prunes nothing, so method={config.method.name} is for experiments.prune."
        )
    if config.evaluation.name == "none":
        raise DassError("evaluation=none evaluates nothing: choose one of the files in conf/evaluation.")
    return main(config)


if __name__ == "__main__":
    run_app(evaluate, "evaluate")
