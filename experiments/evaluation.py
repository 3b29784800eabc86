"""What a run is scored by: the perplexity of windows of text, or zero-shot tasks."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from dass.data.calibration import Tokenizer
from dass.evaluation.perplexity import evaluation_windows, perplexity
from dass.evaluation.zero_shot import mean_accuracy, zero_shot, zero_shot_tasks
from dass.models import batch_size_for
from dass.progress import progress
from experiments.schema import EvaluationConfig

ZERO_SHOT_SOURCES = {"zero_shot": "hub", "zero_shot_packaged": "packaged", "zero_shot_folder": "folder"}
ZERO_SHOT_TOKENS = 128  # of a request, about: what a batch size is reckoned from


@dataclass(frozen=True)
class Evaluation:
    """An evaluation whose text is there and checked, before the model is loaded."""

    config: EvaluationConfig
    windows: Tensor | None = None
    """`(n_windows, seq_len)` int64; of a perplexity."""
    tokenizer: Tokenizer | None = None
    tasks: dict[str, Any] = field(default_factory=dict)
    """lm-eval's task objects by name; of zero-shot tasks."""


def prepare_evaluation(config: EvaluationConfig, tokenizer: Tokenizer | None) -> Evaluation:
    """Read what an evaluation needs; DassError where it is not there."""
    if config.name == "none":
        return Evaluation(config)
    if config.name in ZERO_SHOT_SOURCES:
        source: Any = ZERO_SHOT_SOURCES[config.name]
        return Evaluation(config, None, tokenizer, zero_shot_tasks(source, config.path, config.limit))
    path, seq_len = config.path, config.seq_len
    windows = evaluation_windows(config.name, tokenizer, path, seq_len, config.n_windows, config.bos)  # type: ignore[arg-type]
    return Evaluation(config, windows=windows)


def evaluate(
    evaluation: Evaluation, model: PreTrainedModel, batch_size: int | None
) -> tuple[list[dict[str, Any]], list[float]]:
    """The metrics of a record, and the loss of each window (nats per token; none for zero-shot tasks)."""
    config, windows = evaluation.config, evaluation.windows
    if windows is not None:
        batches = windows.split(batch_size or batch_size_for(model, windows.shape[1]))
        result = perplexity(model, progress(batches, "evaluation", "batch"))
        metric = {
            "dataset": config.name,
            "metric": "perplexity",
            "value": result.value,
            "stderr": result.stderr,
            "n": len(result.losses),
            "seq_len": result.seq_len,
            "tokens": result.tokens,
        }
        return [metric], result.losses
    size = batch_size or batch_size_for(model, ZERO_SHOT_TOKENS)
    scores = zero_shot(model, evaluation.tokenizer, evaluation.tasks, size, config.bos)  # type: ignore[arg-type]
    metrics = [
        {
            "dataset": score.task,
            "metric": score.metric,
            "value": score.value,
            "stderr": score.stderr,
            "n": score.n,
            "seq_len": None,
            "items": score.items,
        }
        for score in scores
    ]
    mean, stderr = mean_accuracy(scores)
    n = sum(score.n for score in scores if score.metric == "acc")
    metrics.append({"dataset": "mean", "metric": "acc", "value": mean, "stderr": stderr, "n": n, "seq_len": None})
    return metrics, []
