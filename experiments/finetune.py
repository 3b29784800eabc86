"""Masked continued training: python -m experiments.finetune model=smollm2_135m masks=DIR save_model=tuned."""

import copy
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedModel

from dass.checkpoint import model_contents
from dass.claims import claimed
from dass.data.calibration import calibration_tokens
from dass.data.tokens import require_in_vocabulary, require_positions
from dass.errors import DassError
from dass.evaluation import door
from dass.folders import is_saved, require_own_folder
from dass.models import load_model, load_tokenizer, resolve_device, resolve_dtype
from dass.pruning.blocks import kept_of_parameters
from dass.pruning.layout import find_blocks
from dass.records import code_sha256, file_sha256, identity_of, machine_description, package_versions, require_writable
from dass.saving import model_card, save_model, source_licence
from dass.sparsity import MASKS_FILE, apply_masks, read_masks
from dass.tracking import Mirror, track
from dass.training.masked import Diverged, Recipe, require_batch, train
from dass.training.zeros import kept_weights
from experiments.app import run_app, typed
from experiments.bounds import require_plain
from experiments.fingerprint import model_identity, pinned, source_of, text_identity
from experiments.outputs import command_of, destination
from experiments.public import public
from experiments.resolve import MODEL_SOURCES, require_separate
from experiments.schema import CalibrationConfig, EvaluationConfig, ModelConfig, TrackingConfig


@dataclass
class FinetuneConfig:
    """conf/finetune.yaml."""

    model: ModelConfig = field(default_factory=ModelConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    finetune: Recipe = field(default_factory=Recipe)
    masks: str | None = None
    save_model: str | None = None
    teacher: str | None = None
    seed: int = 0
    device: str = "auto"
    debug: bool = False


ConfigStore.instance().store(name="finetune_schema", node=FinetuneConfig)


def main(config: DictConfig) -> None:
    """Train, tell the loss at each evaluation, and save the model; what is done already is skipped."""
    composed: dict[str, Any] = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)  # type: ignore
    require_plain(composed)
    plain = typed(FinetuneConfig, composed)
    _check(plain)
    plain = pinned(plain, True)
    hidden: dict[str, Any] = {part: text_identity(part, getattr(plain, part)) for part in ("calibration", "evaluation")}
    hidden |= {
        "model": model_identity(plain.model),
        "teacher": plain.teacher and model_contents(Path(plain.teacher).expanduser()),
        "masks": plain.masks and file_sha256(Path(plain.masks) / MASKS_FILE),
    }
    given: dict[str, Any] = {name: asdict(getattr(plain, name)) for name in ("calibration", "evaluation", "finetune")}
    for part in ("calibration", "evaluation"):
        del given[part]["path"]
    given |= {"dtype": plain.model.dtype, "seed": plain.seed}
    run_id = identity_of({"hidden": hidden, "given": given})
    folder = destination(str(plain.save_model), run_id)
    beside, claim = (folder.parent / f".{folder.name}.{what}" for what in ("training", "claim"))
    if is_saved(folder, run_id):
        with claimed(claim, wait=False) as own:
            if own is not None:  # what a process left that was killed at the very end
                shutil.rmtree(beside, ignore_errors=True)
        print(f"{folder}: already done, skipping")
        return
    require_writable(folder.parent)
    require_own_folder(folder)
    with claimed(claim):
        if is_saved(folder, run_id):  # by the process that was waited for
            print(f"{folder}: already done, skipping")
            return
        with track(**vars(plain.tracking), run_id=run_id, config=public(composed)) as mirror:
            tune(plain, folder, beside, run_id, mirror)
        shutil.rmtree(beside, ignore_errors=True)  # while no other process can have begun anew in it


def tune(config: FinetuneConfig, folder: Path, beside: Path, run_id: str, mirror: Mirror) -> None:
    """Read text, model and masks, train, and write the folder; texts are checked before the model is loaded."""
    source, revision = source_of(config.model), config.model.revision
    device, stored = resolve_device(config.device), resolve_dtype(config.model.dtype, source, revision)
    tokenizer = load_tokenizer(source, revision)
    drawn = {key: value for key, value in vars(config.calibration).items() if key != "min_expert_tokens"}
    sequences = calibration_tokens(tokenizer=tokenizer, seed=config.seed, **drawn)
    require_batch(sequences, config.finetune)
    evaluation = door.prepare(tokenizer=tokenizer, **vars(config.evaluation))
    assert evaluation.windows is not None  # it is a text
    model = load_model(source, revision, "float32", device)
    for what, tokens in (("The training tokens", sequences), ("The evaluation windows", evaluation.windows)):
        require_in_vocabulary(tokens, model.get_input_embeddings().weight.shape[0], what)
        require_positions(model, tokens.shape[1], what)
    teacher = _teacher(config, model, device)
    blocks = find_blocks(model, config.model.projections)
    if config.masks is None:
        keep = kept_weights(blocks)
    else:  # a weight that is kept may be 0
        masks = read_masks(Path(config.masks))[0]
        apply_masks(model, masks, config.model.projections)
        units = [unit for block in blocks for unit in block.units]
        dense = [u.name for u in units if not any(p.name in masks for p in u.projections.values())]
        if dense:
            print(f"note: {len(dense)} of {len(units)} MLPs have no mask, such as {dense[0]}: dense", file=sys.stderr)
        keep = kept_of_parameters((p, masks[p.name].keep) for b in blocks for p in b.projections if p.name in masks)

    def judge(step: int) -> dict[str, Any]:
        (metric,), losses = door.evaluate(evaluation, model)
        found = {"loss": sum(losses) / len(losses), "perplexity": metric["value"], "stderr": metric["stderr"]}
        print(
            f"step {step}: {metric['dataset']} loss {found['loss']:.4f}, perplexity {metric['value']:.4g}", flush=True
        )
        mirror.log({"step": step, "loss": found["loss"], "perplexity": metric["value"]})
        return found

    by = identity_of(
        {"run": run_id, "machine": machine_description(device), "code": code_sha256()} | package_versions()
    )
    # products in 16 bits where the model's own dtype has them, on the CPU only if asked for; in fp16 gradients vanish
    in_16_bits = stored in ("bfloat16", "float16") and (config.model.dtype != "auto" or device.type == "cuda")
    products = torch.bfloat16 if in_16_bits else torch.float32

    def written(place: Path, fingerprint: str, history: list[dict[str, Any]]) -> None:
        """Save the model as it is now."""
        done, steps = history[-1]["step"], config.finetune.steps
        name = f"{config.model.name}, trained under its mask"
        name += "" if done == steps else f" for {done} of {steps} steps, behind which it diverged"
        facts = {"training": ", ".join(f"{key}={value}" for key, value in vars(config.finetune).items())}
        facts |= {"text": f"{config.calibration.name}, {len(sequences)} x {sequences.shape[1]} tokens"}
        facts |= {f"loss after {one['step']} steps": f"{one['loss']:.4f}" for one in history}
        base, licence = config.model.hub_id or config.model.name, source_licence(source, revision)
        command = command_of().replace("experiments.prune", "experiments.finetune")
        save_model(model, place, model_card(name, base, licence, command, facts), fingerprint, stored, source, revision)

    try:
        history, _ = train(model, keep, sequences, config.finetune, judge, beside, by, teacher, products)
    except Diverged as error:
        kept = _set_aside(folder, run_id, error.history, written)
        raise DassError(f"{str(error).rstrip('.')}{kept}.", error.field) from error
    written(folder, run_id, history)
    print(f"{folder}: loss {history[0]['loss']:.4f} before, {history[-1]['loss']:.4f} after")


def _set_aside(
    folder: Path,
    run_id: str,
    history: list[dict[str, Any]],
    written: Callable[[Path, str, list[dict[str, Any]]], None],
) -> str:
    """Save what a training was before it diverged, as the next one replaces its checkpoint; the end of a sentence."""
    step = history[-1]["step"]
    if step == 0:  # it is what the training began with
        return ""
    own, place = identity_of({"run": run_id, "step": step}), folder.parent / f"{folder.name}-step{step}"
    if place.exists() and not is_saved(place, own):  # another training's
        place = folder.parent / f"{place.name}-{run_id}"
    try:
        if not is_saved(place, own):
            written(place, own, history)
    except DassError as error:
        print(f"note: what the training was at step {step} is not saved as a model: {error}", file=sys.stderr)
        return ""
    return f", and as a model in {place}"


def _check(config: FinetuneConfig) -> None:
    """Raise DassError where the settings mean nothing, or the model would replace what it is made from."""
    given = [name for name in MODEL_SOURCES if getattr(config.model, name) is not None]
    for fits, sentence in (
        (len(given) == 1, f"model={config.model.name} must set one of {', '.join(MODEL_SOURCES)}; it sets {given}."),
        (config.finetune.steps >= 1, f"finetune.steps={config.finetune.steps} trains nothing: give at least 1."),
        (config.save_model is not None, "The trained model needs a folder: give `save_model=DIR`."),
        (
            config.evaluation.name != "none" and config.evaluation.name not in door.ZERO_SHOT,
            f"evaluation={config.evaluation.name} gives no loss to judge by: choose a text.",
        ),
    ):
        if not fits:
            raise DassError(sentence)
    read = {"model.path": config.model.path, "masks": config.masks, "teacher": config.teacher}
    require_separate(str(config.save_model), read)
    require_writable(Path(str(config.save_model)).expanduser().parent)
    if config.masks is not None:
        read_masks(Path(config.masks))  # before anything heavy is loaded


def _teacher(config: FinetuneConfig, model: PreTrainedModel, device: torch.device) -> PreTrainedModel | None:
    """The dense model, for `loss=distill`."""
    if config.finetune.loss != "distill":
        return None
    if config.teacher is not None:
        teacher = load_model(str(Path(config.teacher).expanduser()), None, "float32", device)
        words, own = (one.get_input_embeddings().weight.shape[0] for one in (teacher, model))
        if words != own:
            raise DassError(f"The teacher knows {words} tokens, and the model {own}: give the dense model.", "teacher")
        return teacher
    if config.masks is None:
        raise DassError("loss=distill of a pruned folder needs the dense model: give `teacher=DIR`.", "teacher")
    return copy.deepcopy(model)


if __name__ == "__main__":
    run_app(main, "finetune")
