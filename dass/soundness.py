"""Whether a record can be believed: it fits the schema, and its numbers do not contradict each other."""

import math
import statistics
from typing import Any

from dass.fingerprint import BASELINE, Fingerprint
from dass.record_schema import Evaluation, Metric, Record
from dass.records import require_writable_again
from dass.schema_types import CLOSE, in_words

SAME = {"calibration": ("n_sequences", "seq_len"), "evaluation": ("n_windows", "seq_len", "limit")}
"""Numbers that stand both in the config and among the determinants."""
COARSE = 1 / 8  # a group of few weights loses floor(ratio * length) of them


def require_sound(tree: dict[str, Any]) -> None:
    """Raise ValueError, in words, where a tree is no record or contradicts itself."""
    require_writable_again(tree)
    with in_words():
        record = Record.model_validate(tree)
    for contradiction in filter(None, (check(record) for check in (_metrics, _pruning, _determinants))):
        raise ValueError(contradiction)


def _metrics(record: Record) -> str | None:
    """What contradicts in the metrics; None: nothing."""
    found = {(one.dataset, one.metric): one for one in record.metrics}
    perplexities = [one for one in record.metrics if one.metric == "perplexity"]
    accuracies = [one for one in record.metrics if one.metric == "acc"]
    if len(found) < len(record.metrics) or len(perplexities) > 1:
        return "it has several values of one metric"
    if not found and not record.failed and record.config.evaluation.name != "none":
        return "it has no metric, and no reason why"
    for one in record.metrics:
        if one.items is not None and not _close(one.stderr, math.sqrt(one.value * (1 - one.value) / (one.n - 1))):
            return f"its items contradict the standard error of its accuracy on {one.dataset}"
    for one in perplexities:
        if contradiction := _perplexity(one, record.windows, record.config.evaluation):
            return contradiction
    if not accuracies:
        return None
    tasks, mean = [one for one in accuracies if one.dataset != "mean"], found.get(("mean", "acc"))
    if mean is None or not tasks or any(one.items is None for one in tasks):
        return "its accuracies are not whole"
    stderr = math.hypot(*(one.stderr or 0.0 for one in tasks)) / len(tasks)
    agrees = math.isclose(mean.value, statistics.fmean(one.value for one in tasks), abs_tol=CLOSE)
    return None if agrees and _close(mean.stderr, stderr) else "its accuracies contradict their mean"


def _perplexity(metric: Metric, losses: list[float], evaluation: Evaluation) -> str | None:
    lengths = {metric.seq_len, evaluation.seq_len} - {None}
    if not losses or metric.n != len(losses) or len(lengths) != 1 or metric.tokens != metric.n * (metric.seq_len or 0):
        return "its numbers of windows and tokens contradict each other"
    if len(losses) > (evaluation.n_windows or math.inf):
        return "it has more windows than were asked for"
    if metric.value <= 0 or not math.isclose(math.log(metric.value), statistics.fmean(losses), abs_tol=CLOSE):
        return "its windows contradict its perplexity"
    alone = len(losses) == 1
    expected = None if alone else metric.value * statistics.stdev(losses) / math.sqrt(len(losses))
    return None if _close(metric.stderr, expected) else "its windows contradict the standard error of its perplexity"


def _pruning(record: Record) -> str | None:
    """What contradicts in what was pruned; None: nothing."""
    method, sparsity = record.config.method, record.config.sparsity
    if method.name == "dense":
        return "it is dense, but projections were pruned" if record.sparsity.projections else None
    if "pruning" not in record.stages:
        return "it lacks the stage pruning"
    if method.methods is not None:
        return "its diagnostics are missing" if record.diagnostics is None else None
    least = sparsity.pruned - (CLOSE if sparsity.n else COARSE)
    for name, one in record.sparsity.projections.items():
        if one.sparsity < least or one.pattern not in (None, str(sparsity)):
            return f"the zeros or the pattern of {name} contradict {sparsity}"
    return f"its sparsity contradicts {sparsity}" if record.sparsity.targeted < least else None


def _determinants(record: Record) -> str | None:
    """What contradicts between the identity, what determines it and the config; None: nothing."""
    parts, config = record.determinants, record.config
    if "calibration" in record.stages and not parts.get("calibration"):
        return "it does not tell what it was calibrated on"
    if set(parts) != set(BASELINE):
        return None  # nothing to reckon it from
    fingerprint = Fingerprint(parts, record.identity.numerics)
    if fingerprint.id != record.id or fingerprint.as_dict() != record.identity.model_dump():
        return "its identity is not that of its determinants"
    model, method, calibration = (parts[name] or {} for name in ("model", "method", "calibration"))
    pattern = config.sparsity.model_dump(include={"ratio", "n", "m"}, exclude_none=True)
    twice: list[tuple[Any, Any]] = [(method.get("name"), config.method.name), (method.get("pattern"), pattern)]
    twice += [(calibration.get("seed"), config.seed), (model.get("dtype"), config.resolved and config.resolved.dtype)]
    for part, keys in SAME.items():
        twice += [((parts[part] or {}).get(key), getattr(getattr(config, part), key)) for key in keys]
    disagree = any(None not in (one, other) and one != other for one, other in twice)
    if disagree or (config.method.name == "dense") != (parts["method"] is None):
        return "its config is not that of its determinants"
    return None


def _close(value: float | None, expected: float | None) -> bool:
    """Whether a standard error is the expected one."""
    if value is None or expected is None:
        return value is expected
    return math.isclose(value, expected, rel_tol=1e-4, abs_tol=1e-9)
