"""One run: load, calibrate, prune, save, evaluate, record.

python -m experiments.prune method=dass sparsity=2of4
python -m experiments.prune -m method=dense,magnitude,wanda,sparsegpt,dass sparsity=unstructured,4of8,2of4
python -m experiments.prune -m experiment=table1_perplexity scale=small
"""

import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from transformers import PreTrainedModel

from dass.claims import Claim
from dass.data.calibration import calibration_tokens, facts_of
from dass.data.tokens import require_in_vocabulary, require_positions
from dass.distributed import everyone, first, first_before_others, rank, together, world
from dass.errors import DassError, told
from dass.evaluation import door
from dass.memory import note_halved
from dass.models import load_tokenizer, resolve_dtype
from dass.pruning.comparison import diagnostics
from dass.pruning.method import Method
from dass.records import (
    code_sha256,
    git_state,
    identity_of,
    machine_description,
    package_versions,
    read_record,
    record_path,
    write_record,
)
from dass.resume import Kept
from dass.saving import round_to
from dass.stages import Stages, release_freed_memory
from dass.streaming import Shelf
from dass.tracking import log_record, track
from experiments.app import run_app, sentence
from experiments.fingerprint import source_of
from experiments.loading import downloads, load, require_unchanged
from experiments.methods import name_by_file
from experiments.notes import note_idle
from experiments.outputs import command_of, is_ready, is_skipped, save, save_masks, write_metrics
from experiments.public import public, public_text
from experiments.resolve import Plan, brought, check, loads, require_alike
from experiments.scratch import claimed_run, scratch_folder
from experiments.training import dense_of, text_of, train_on
from experiments.walked import Log, Walked, audited, counted, prune


def main(config: DictConfig) -> str | None:
    """Run what the composed config says, unless its record exists; returns its identity, or None if it is to come."""
    advice = "keep the model on disk (memory=stream), use fewer or shorter sequences, or a larger GPU"
    with told("The GPU's memory does not suffice", advice, torch.OutOfMemoryError), together():
        if HydraConfig.initialized():
            name_by_file(config, HydraConfig.get().overrides.task)
        plan = check(config)
        if HydraConfig.initialized():  # of an experiment's own settings, each is there for some of its runs
            given = {argument.partition("=")[0] for argument in sys.argv[1:]}
            note_idle(plan, [one for one in HydraConfig.get().overrides.task if one.partition("=")[0] in given])
        if plan.config.dry_run:
            print(dry_run(plan))
            return None
        with first_before_others():
            plan = plan.pinned()
            label = f"{label_of(plan)} {plan.run_id}"
        require_alike(plan)
        if first(partial(is_ready, plan, label)):
            return plan.run_id
        results_dir = Path(plan.config.results_dir)
        with claimed_run(results_dir, plan.run_id) as claim:
            is_busy = first(lambda: claim is None)
            if claim is None or is_busy:
                print(f"{label}: another process is at it, so it comes after the others")
                return None
            if not first(partial(is_skipped, plan, label)):
                run_and_record(plan, label, claim)
    return plan.run_id


def dry_run(plan: Plan) -> str:
    """A run in one line: its identity, what it is, what it would do, and what it would load.

    Where the identity hangs on a model that is not there (its dtype, its trained weights), the line says so.
    """
    try:
        run_id = plan.run_id
    except DassError as error:
        run_id = f"(identity not known yet: {error})"
    methods = dict.fromkeys(in_words(pruner.method) for pruner in plan.pruners.values())
    return f"{run_id} {label_of(plan)}: {'; '.join([*methods, *loads(plan)])}"


def in_words(method: Method) -> str:
    """What the name of a method leaves open."""
    settings = dict(method.parameters) | ({"order_seed": method.order_seed} if method.order != "released" else {})
    return ", ".join([f"update {method.update}", *(f"{name}={value}" for name, value in settings.items())])


def label_of(plan: Plan) -> str:
    """A run in a few words: model, method, pattern."""
    patterns = dict.fromkeys(str(pruner.method.pattern) for pruner in plan.pruners.values())
    orders = {pruner.method.order for pruner in plan.pruners.values()} - {"released"}
    return " ".join([plan.config.model.name, plan.config.method["name"], *patterns, *orders])


def run_and_record(plan: Plan, label: str, claim: Claim) -> None:
    """Run, record what was measured, print the outcome in one line; then raise what saving or evaluating raised."""
    tracking = vars(plan.config.tracking) | ({"name": "none"} if rank() > 0 else {})
    tracked = track(**tracking, run_id=plan.run_id, config=public(plan.composed))
    with tracked as mirror, scratch_folder(Path(plan.config.results_dir), plan.run_id, claim) as scratch:

        def log(values: dict[str, float]) -> None:
            claim.require()
            mirror.log(values)

        record, problems = run(plan, log, scratch)
        path = first(partial(written, Path(plan.config.results_dir), record))
        log_record(mirror, record)
        values = "".join(f", {m['dataset']} {m['metric']} {m['value']:.4g}" for m in record["metrics"])
        print(f"{label}: sparsity {record['sparsity']['targeted']:.4f} of the targeted weights{values}; {path}")
        for problem in problems[1:]:
            print(f"error: {sentence(problem)}", file=sys.stderr, flush=True)
        if problems:
            raise problems[0]


def written(folder: Path, record: dict[str, Any]) -> Path:
    """Where the record of a run is: one whose evaluation failed does not take the place of one that holds numbers."""
    path = record_path(folder, record["id"])
    if "evaluation" in record["failed"]:
        with suppress(DassError):
            if read_record(path)["metrics"]:
                return path
    return write_record(folder, record)


def run(plan: Plan, log: Log, scratch: Path) -> tuple[dict[str, Any], list[Exception]]:
    """Do all the stages of a run; texts are checked before the model is loaded, the model saved before it is scored.

    Args:
        scratch: a folder that may be made, for what a killed run goes on from, and blocks that do not fit the memory.

    Returns:
        The record, and what went wrong in saving or evaluating: neither loses the other.
    """
    config, stages = plan.config, Stages(plan.device)
    torch.manual_seed(config.seed)
    source, revision = source_of(config.model), config.model.revision
    in_memory = first(partial(brought, plan))
    if fetches := downloads(plan):
        with stages.measure("download"), first_before_others():
            for fetch in fetches:
                fetch()
    needs_text = config.evaluation.name != "none" or (plan.calibrates and config.calibration.name != "tokens_file")
    tokenizer = load_tokenizer(source, revision) if needs_text else None
    calibration = None
    if plan.calibrates:
        drawn = {key: value for key, value in vars(config.calibration).items() if key != "min_expert_tokens"}
        with stages.measure("calibration"):
            calibration = first(partial(calibration_tokens, tokenizer=tokenizer, seed=config.seed, **drawn))
    with first_before_others():
        evaluation = door.prepare(tokenizer=tokenizer, **vars(config.evaluation))
        text = text_of(plan, tokenizer)
    tokenizer = None  # it takes as much memory as some models
    with stages.measure("load"):
        model, shelf = load(plan, source, scratch, in_memory)
        require_unchanged(plan)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    read = {"calibration tokens": calibration, "training tokens": text, "evaluation windows": evaluation.windows}
    for what, tokens in read.items():
        if tokens is not None:
            require_in_vocabulary(tokens, vocabulary, f"The {what}")
            require_positions(model, tokens.shape[1], f"The {what}")

    machine, versions = machine_description(plan.device), package_versions()
    if world() > 1:
        machine["processes"] = world()
    computes = identity_of({"machine": machine, "versions": versions, "code": code_sha256()})
    kept = Kept(scratch, first(lambda: computes))
    if len(set(everyone(kept.state and kept.state.model_dump_json()))) > 1:  # not all see the folder
        kept.forget()
    walked, drawn_facts = Walked(), None if calibration is None else facts_of(calibration)
    dense = dense_of(plan, model) if text is not None else {}
    if plan.pruners:
        with stages.measure("pruning"):
            walked = prune(plan, model, shelf, kept, calibration, log)
        if kept.state is not None:
            stages.add("pruning", kept.state.seconds)
    require_unchanged(plan)
    record: dict[str, Any] = {
        "id": plan.run_id,
        "identity": plan.fingerprint.as_dict(),
        "determinants": plan.fingerprint.parts,
        "command": command_of(),
        "config": public(plan.composed) | {"resolved": {"dtype": plan.dtype} | walked.resolved()},
        "git": git_state(),
        "versions": versions,
        "machine": machine,
        "stages": {},
        "sparsity": {},
        "metrics": [],
        "windows": [],
        "files": {},
        "failed": {},
    }
    # here, as a training that fails ends the run, and its masks are good all the same
    problems = attempt(record, "masks", partial(first, partial(save_masks, plan, walked.masks, record)))
    if text is not None:
        with stages.measure("training"):
            record["training"], earlier = train_on(plan, model, dense, walked, calibration, text, evaluation, kept, log)
        stages.add("training", earlier)
        require_unchanged(plan)
    if plan.pruners:
        calibration = text = None
        release_freed_memory()
        # what is scored is what is saved, in the source's own dtype
        round_to(model, resolve_dtype(config.model.dtype, source, revision))
    record |= {"stages": stages.as_dict(), "sparsity": counted(plan, model, shelf, walked)}
    if drawn_facts is not None:
        record["calibration"] = drawn_facts
    if walked.rare:
        record["experts"] = walked.rare
    if (audit := audited(plan, model, shelf)) is not None:
        record["audit"] = audit
    if plan.compares:
        record["diagnostics"] = diagnostics(walked.measured)
    problems += attempt(record, "save", partial(first, partial(save, plan, model, shelf, record)))
    if config.evaluation.name != "none":
        with stages.measure("evaluation"):
            problems += attempt(record, "evaluation", partial(score, evaluation, model, shelf, kept, record))
        record["stages"] = stages.as_dict()
        if config.save_model is not None and not {"save", "evaluation"} & set(record["failed"]):
            problems += attempt(record, "save", partial(first, partial(write_metrics, plan, source, record)))
    require_unchanged(plan)
    return record, problems


def attempt(record: dict[str, Any], what: str, work: Callable[[], object]) -> list[Exception]:
    """Do a part of a run whose failure must not lose the rest; the record says why."""
    try:
        with together():
            work()
    except Exception as error:
        why = sentence(error) if isinstance(error, DassError) else f"{type(error).__name__}: {error}"
        record["failed"][what] = public_text(why)
        return [error]
    return []


def score(
    evaluation: door.Evaluation, model: PreTrainedModel, shelf: Shelf | None, kept: Kept, record: dict[str, Any]
) -> None:
    """Evaluate the model, and put the metrics into the record, and the size of the batches."""
    resolved = record["config"]["resolved"]
    size = record["config"]["batch_size"] or door.batch_size_of(evaluation, model)
    sizes = [size]

    def halved(smaller: int) -> None:
        note_halved(smaller)
        sizes.append(smaller)

    resolved["evaluation_batch_size"] = size
    own = kept if rank() == 0 else None
    record["metrics"], record["windows"] = door.evaluate(evaluation, model, size, shelf, own, halved)
    if (smallest := min(everyone(sizes[-1]))) < size:
        resolved["evaluation_batch_size"] = smallest
        resolved.setdefault("halved_from", {})["evaluation"] = size


if __name__ == "__main__":
    run_app(main, "prune")
