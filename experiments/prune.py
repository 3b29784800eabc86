"""One run: load, calibrate, prune, evaluate, record.

python -m experiments.prune method=dass sparsity=2of4
python -m experiments.prune -m method=dense,magnitude,wanda,sparsegpt,dass sparsity=unstructured,4of8,2of4
python -m experiments.prune -m experiment=table1_perplexity scale=small
"""

import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dass.data.calibration import calibration_tokens, require_in_vocabulary
from dass.errors import DassError, first_line
from dass.models import (
    batch_size_for,
    card_id,
    load_model,
    load_tokenizer,
    require_own_folder,
    save_model,
)
from dass.progress import progress, say
from dass.pruning.blocks import find_blocks
from dass.pruning.comparison import Comparison
from dass.pruning.walk import FinishedBlock, Pruner, prune_model
from dass.records import (
    failure_path,
    git_state,
    machine_description,
    package_versions,
    read_record,
    record_path,
    require_writable,
    write_failure,
    write_record,
)
from dass.sparsity import PackedMasks, masks_id, sparsity_report
from dass.stages import Stages, release_freed_memory
from dass.tracking import Tracker, track
from experiments.app import run_app
from experiments.evaluation import evaluate, prepare_evaluation
from experiments.identity import design_of
from experiments.resolve import Checked, Plan, check, loads, resolve, source_of
from experiments.schema import typed


def main(config: DictConfig) -> None:
    """Run what the composed config says, unless its record exists; a run of an experiment that fails records why."""
    if config.get("dry_run"):
        print(dry_run(config))
        return
    try:
        plan = resolve(config)
        _run_unless_done(plan)
    except Exception as error:
        if config.get("report") is not None:
            _record_failure(config, error)
        raise
    failure_path(Path(plan.config.results_dir), design_of(plan.config)).unlink(missing_ok=True)


def dry_run(config: DictConfig) -> str:
    """A run in one line: its identity, what it is, and what it would load.

    Where the identity hangs on a model that is not there (its dtype, its trained weights), the line says so.
    """
    checked = check(config)
    try:
        run_id = resolve(config).run_id
    except DassError as error:
        run_id = f"(identity not known yet: {error})"
    return f"{run_id} {label_of(checked)}: {'; '.join(loads(checked))}"


def _record_failure(config: DictConfig, error: Exception) -> None:
    """Say in the records' folder why a run of an experiment is missing; a config that means nothing has no place."""
    with suppress(DassError, OmegaConfBaseException):
        design = design_of(typed(config))
        composed = OmegaConf.to_container(config, resolve=True)
        write_failure(
            Path(config.results_dir), {"design": design, "why": str(error) or type(error).__name__, "config": composed}
        )


def label_of(checked: Checked) -> str:
    """A run in a few words: model, method, pattern."""
    patterns = {str(pruner.method.pattern) for pruner in checked.pruners.values()}
    return " ".join([checked.config.model.name, checked.config.method["name"], *patterns])


def _run_unless_done(plan: Plan) -> None:
    """Run and record what a plan says, unless that was done before."""
    results_dir = Path(plan.config.results_dir)
    for folder in (results_dir, plan.config.save_model, plan.config.masks):
        if folder is not None:
            require_writable(Path(folder))
    if plan.config.save_model is not None:
        require_own_folder(Path(plan.config.save_model))
    label = f"{label_of(plan)} {plan.run_id}"
    if not plan.config.rerun and is_done(plan):
        print(f"{label}: already done, skipping: {record_path(results_dir, plan.run_id)} (rerun=true runs it again)")
        return
    try:
        _run_and_record(plan, label)
    except torch.OutOfMemoryError as error:
        raise DassError(
            f"The GPU's memory does not suffice ({first_line(error)}): set a smaller `batch_size` or "
            f"`calibration.n_sequences`, or use a larger GPU."
        ) from error


def _run_and_record(plan: Plan, label: str) -> None:
    """Run, write the record, tell the tracker, and print the outcome in one line."""
    tracking = plan.config.tracking
    with track(tracking.name, tracking.project, tracking.group, plan.run_id, tracking.folder, plan.composed) as tracker:
        record = run(plan, tracker)
        path = write_record(Path(plan.config.results_dir), record)
        tracker.log_record(record)
    values = "".join(f", {m['dataset']} {m['metric']} {m['value']:.4g}" for m in record["metrics"])
    print(f"{label}: sparsity {record['sparsity']['targeted']:.4f} of the targeted weights{values}; {path}")


def is_done(plan: Plan) -> bool:
    """Whether the record is there, and the model and the masks that are asked for are there and of this run."""
    try:
        read_record(record_path(Path(plan.config.results_dir), plan.run_id))
    except DassError:
        return False
    saved, masks = plan.config.save_model, plan.config.masks
    return (saved is None or card_id(Path(saved)) == plan.run_id) and (
        masks is None or masks_id(Path(masks)) == plan.run_id
    )


def run(plan: Plan, tracker: Tracker) -> dict[str, Any]:
    """Do all the stages of a run and return its record; texts are checked before the model is loaded."""
    config, stages = plan.config, Stages(plan.device)
    torch.manual_seed(config.seed)
    source, revision = source_of(config.model), config.model.revision
    needs_text = config.evaluation.name != "none" or (plan.calibrates and config.calibration.name != "tokens_file")
    tokenizer = load_tokenizer(source, revision) if needs_text else None
    calibration = None
    if plan.calibrates:
        with stages.measure("calibration"):
            calibration = calibration_tokens(tokenizer=tokenizer, seed=config.seed, **vars(config.calibration))
    evaluation = prepare_evaluation(config.evaluation, tokenizer)
    # a tokenizer takes as much memory as some models: kept only where it is to be saved
    tokenizer = tokenizer_if_any(source, revision) if config.save_model is not None else None
    with stages.measure("load"):
        model = load_model(source, revision, plan.dtype, plan.device)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    for what, tokens in (("The calibration tokens", calibration), ("The evaluation windows", evaluation.windows)):
        if tokens is not None:
            require_in_vocabulary(tokens, vocabulary, what)

    report: dict[str, Any] = {}
    masks = PackedMasks()
    pruner = pruner_of(plan)
    if pruner is not None:
        with stages.measure("pruning"):
            report = prune(plan, pruner, model, calibration, masks, tracker)
        calibration = None
        release_freed_memory()
    sparsity = sparsity_report(model, targeted_projections(plan, model))
    for name, facts in report.items():
        sparsity["projections"][name] |= facts

    metrics: list[dict[str, Any]] = []
    losses: list[float] = []
    if config.evaluation.name != "none":
        with stages.measure("evaluation"):
            metrics, losses = evaluate(evaluation, model, config.batch_size)
    record = {
        "id": plan.run_id,
        "config": plan.composed | {"resolved": {"dtype": plan.dtype}},
        "git": git_state(),
        "versions": package_versions(),
        "machine": machine_description(plan.device),
        "stages": stages.as_dict(),
        "sparsity": sparsity,
        "metrics": metrics,
        "windows": losses,
    }
    if isinstance(pruner, Comparison):
        record["diagnostics"] = pruner.as_dict()
    if config.masks is not None:
        masks.write(Path(config.masks), {key: record[key] for key in ("id", "config", "git", "versions")})
    if config.save_model is not None:
        save_model(model, tokenizer, Path(config.save_model), model_card(record))
    return record


def tokenizer_if_any(source: str, revision: str | None) -> Any:
    """The tokenizer to save beside the pruned model; None, and a note, where the source has none."""
    try:
        return load_tokenizer(source, revision)
    except DassError as error:
        print(f"note: the model is saved without a tokenizer: {error}", file=sys.stderr)
        return None


def pruner_of(plan: Plan) -> Pruner | None:
    """What the walk applies to each block; None for the dense model."""
    return Comparison(plan.pruners) if plan.compares else next(iter(plan.pruners.values()), None)


def targeted_projections(plan: Plan, model: torch.nn.Module) -> list[Any]:
    """The projections that the run prunes; none for the dense model and where methods are only compared."""
    pruners = [] if plan.compares else plan.pruners.values()
    return [p for pruner in pruners for block in find_blocks(model) for p in pruner.projections(block)]


def prune(
    plan: Plan,
    pruner: Pruner,
    model: Any,
    calibration: torch.Tensor | None,
    masks: PackedMasks,
    tracker: Tracker,
) -> dict[str, dict[str, Any]]:
    """Prune the model in place; collects masks where they are asked for. Returns what each projection went through."""
    report: dict[str, dict[str, Any]] = {}
    bar = progress(None, "pruning", "block", len(find_blocks(model)))

    def on_block(finished: FinishedBlock) -> None:
        zeros = weights = 0
        for pruned in finished.pruned:
            mask, name = pruned.mask, pruned.projection.name
            report[name] = {"pattern": str(mask.pattern), "axis": mask.axis}
            if pruned.damping is not None:
                report[name] |= {"damping": pruned.damping, "damping_attempts": pruned.damping_attempts}
            if plan.config.masks is not None:
                masks.add(name, mask)
            zeros += mask.keep.numel() - int(mask.keep.sum())
            weights += mask.keep.numel()
        sparsity = zeros / max(weights, 1)
        tracker.log_block(finished.index, finished.seconds, sparsity)
        say(bar, f"{finished.block.name}: {finished.seconds:.1f} s, sparsity {sparsity:.4f}")
        bar.update()

    size = plan.config.batch_size or (batch_size_for(model, calibration.shape[1]) if calibration is not None else 1)
    prune_model(model, pruner, calibration, size, on_block)
    bar.close()
    return report


def model_card(record: dict[str, Any]) -> str:
    """The README.md of a saved model; its header line `dass_run` is how we know our own folders."""
    config = OmegaConf.to_yaml(OmegaConf.create(record["config"]))
    results = "\n".join(f"- {m['dataset']} {m['metric']}: {m['value']:.4f} (n = {m['n']})" for m in record["metrics"])
    return f"""---
library_name: transformers
tags: [pruning, dass]
dass_run: {record["id"]}
---

# {record["config"]["model"]["name"]} pruned by {record["config"]["method"]["name"]}

{record["sparsity"]["targeted"]:.4f} of the targeted weights are zero, {record["sparsity"]["total"]:.4f} of all.

{results or "Not evaluated."}

Made by [the DaSS reproduction](https://arxiv.org/abs/2405.01943) from this config:

```yaml
{config}```
"""


if __name__ == "__main__":
    run_app(main, "prune")
