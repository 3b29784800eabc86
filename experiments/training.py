"""The stage of training: the pruned model under its mask, which is chosen anew at each evaluation."""

from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from dass.data.calibration import calibration_tokens
from dass.data.tokens import Tokenizer
from dass.errors import DassError
from dass.evaluation import door
from dass.pruning.blocks import kept_of_parameters
from dass.pruning.layout import find_blocks
from dass.pruning.walk import prune_model
from dass.resume import Kept
from dass.training.masked import Recipe, require_batch, train
from dass.training.stability import Dense, dense_weights, judged, put_back
from experiments.resolve import Plan
from experiments.walked import Log, Walked


def text_of(plan: Plan, tokenizer: Tokenizer | None) -> Tensor | None:
    """What is trained on: another draw of the calibration's text; None where nothing is. DassError where too little."""
    config = plan.config
    if not config.finetune.steps:
        return None
    if plan.dtype != "float32":
        raise DassError(f"Weights are trained in fp32, not in {plan.dtype}: set model.dtype=float32.", "model.dtype")
    drawn = {key: value for key, value in vars(config.calibration).items() if key != "min_expert_tokens"}
    drawn["n_sequences"] = config.finetune.n_sequences
    text = calibration_tokens(tokenizer=tokenizer, seed=config.seed + 1, **drawn)
    require_batch(text, config.finetune)
    return text


def dense_of(plan: Plan, model: PreTrainedModel) -> Dense:
    """Copies of the weights that are pruned, where training is to follow."""
    (pruner,) = plan.pruners.values()
    return dense_weights(pruner, find_blocks(model, plan.config.model.projections))


def train_on(
    plan: Plan,
    model: PreTrainedModel,
    dense: Dense,
    walked: Walked,
    calibration: Tensor | None,
    text: Tensor,
    evaluation: door.Evaluation,
    kept: Kept,
    log: Log,
) -> tuple[list[dict[str, Any]], float]:
    """Train the pruned model; what was said at each evaluation, see `judged`, and earlier processes' seconds."""
    config, (pruner,) = plan.config, plan.pruners.values()
    blocks = find_blocks(model, config.model.projections)
    targets = [p for block in blocks for p in pruner.projections(block)]
    fixed = {p.name: walked.masks.keep(p.name).to(p.weight.device) for p in targets}
    keep = kept_of_parameters((p, fixed[p.name]) for p in targets)

    def losses(one: PreTrainedModel) -> list[float]:
        return door.evaluate(evaluation, one, config.batch_size)[1]

    choose = partial(
        prune_model,
        pruner=pruner.storing(plan.stored),
        input_ids=calibration,
        batch_size=walked.halved or walked.batch_size,
        projections=config.model.projections,
        min_expert_tokens=config.calibration.min_expert_tokens,
    )
    judge = judged(model, fixed, choose, losses)

    def logged(step: int) -> dict[str, Any]:
        found = judge(step)
        log({f"training/{key}": found[key] for key in ("loss", "overlap", "exchanged")} | {"training/step": step})
        return found

    recipe = Recipe(**{key: value for key, value in vars(config.finetune).items() if key != "n_sequences"})
    put_back(dense, keep)
    return train(model, keep, text, recipe, logged, Path(kept.folder), f"{plan.run_id} {kept.by}")
