"""From the composed config to a checked run: nothing heavy has been loaded yet."""

import os
import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import DictConfig, OmegaConf

from dass.distributed import everyone, world
from dass.errors import DassError
from dass.evaluation.door import ZERO_SHOT
from dass.models import DTYPES, free_memory, resolve_device, resolve_dtype
from dass.pruning.blocks import MLP_ROLES, ROLES, Block
from dass.pruning.comparison import check_comparison
from dass.pruning.pruner import BlockPruner
from dass.pruning.update import UPDATES
from dass.sizes import Needed, memory_needed
from experiments.app import typed
from experiments.bounds import require_plain
from experiments.fingerprint import Fingerprint, calibrates, fingerprint_of, pinned, source_of
from experiments.methods import Pruner, pruners_of
from experiments.schema import PruneConfig

MEMORY = ("auto", "resident", "stream")
MODEL_SOURCES = ("packaged", "trained", "hub_id", "path")


@dataclass(frozen=True)
class Plan:
    """A config that means something; the files and the model that it names are looked at when they are asked for."""

    config: PruneConfig
    composed: dict[str, Any]  # as plain values, for the record
    pruners: Mapping[str, Pruner]  # by the method's name: none for the dense model, several where only compared

    @property
    def compares(self) -> bool:
        """Whether methods are compared on every block, and the model stays dense."""
        return len(self.pruners) > 1

    @property
    def compared(self) -> dict[str, BlockPruner]:
        """The methods that are compared."""
        return {name: pruner for name, pruner in self.pruners.items() if isinstance(pruner, BlockPruner)}

    @property
    def keeps_masks(self) -> bool:
        """Whether the masks are needed behind the walk, to be written or trained under."""
        return self.config.masks is not None or self.config.finetune.steps > 0

    @property
    def calibrates(self) -> bool:
        """Whether the run reads any calibration tokens."""
        return calibrates(self.config, self.pruners)

    def check_blocks(self, blocks: list[Block]) -> None:
        """Refuse what does not fit the shapes of the blocks, whether or not they hold numbers yet."""
        _require_excluded(self.config, blocks)
        for pruner in self.pruners.values():
            pruner.check(blocks)

    @cached_property
    def device(self) -> torch.device:
        """Where the run computes."""
        return resolve_device(self.config.device)

    @cached_property
    def dtype(self) -> str:
        """What is computed in; on the CPU, and of a model trained here, known without its folder."""
        model = self.config.model
        if model.dtype != "auto":
            return resolve_dtype(model.dtype, "", None)
        known = self.device.type == "cpu" or model.trained is not None
        return "float32" if known else resolve_dtype("auto", source_of(model), model.revision)

    @property
    def stored(self) -> torch.dtype:
        """What the weights are rounded to once they are pruned."""
        model = self.config.model
        return DTYPES[resolve_dtype(model.dtype, source_of(model), model.revision)]

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """What determines the result; DassError where a file is not there."""
        return fingerprint_of(self.config, self.pruners, self.dtype)

    def pinned(self) -> "Plan":
        """The same at the commits that the hub's branches stand for now, so that all of a run reads what it is."""
        config, composed = pinned(self.config, self.calibrates), dict(self.composed)
        for part in ("calibration", "evaluation"):
            composed[part] = composed[part] | {"bos": getattr(config, part).bos}
        return replace(self, config=config, composed=composed)

    @property
    def run_id(self) -> str:
        """The identity in 16 hex digits."""
        return self.fingerprint.id


def check(config: DictConfig) -> Plan:
    """Check the composed config and turn it into library values; DassError where it means nothing."""
    composed: dict[str, Any] = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)  # type: ignore
    require_plain(composed)
    plain = typed(PruneConfig, composed)
    model, words = plain.model, plain.model.projections
    size, experts, scores = plain.batch_size, plain.calibration.min_expert_tokens, plain.evaluation.name != "none"
    spreads, one_place = model.device_map is not None, plain.memory == "stream" or plain.device != "auto"
    given = [name for name in MODEL_SOURCES if getattr(model, name) is not None]
    plan = Plan(plain, composed, pruners_of(plain))
    if not plan.pruners:
        plain.masks = None  # in a sweep with methods the dense model has none to write
    writes = " and ".join(name for name in ("masks", "save_model") if getattr(plain, name) is not None)
    known_words = words is None or (isinstance(words, dict) and all(isinstance(word, str) for word in words.values()))
    trains, tuning = plain.finetune.steps > 0, f"finetune.steps={plain.finetune.steps}"
    orders = {pruner.method.order for pruner in plan.pruners.values()}
    for fits, sentence in (
        (model.name != "local" or model.path is not None, "model=local needs a folder: give `model.path=DIR`."),
        (len(given) == 1, f"model={model.name} must set one of {', '.join(MODEL_SOURCES)}; it sets {given or 'none'}."),
        (known_words, "model.projections must be {gate: REGEX, up: REGEX, down: REGEX, dense: REGEX}."),
        (0 <= plain.seed < 2**63, f"seed={plain.seed} must be between 0 and 2^63 - 1."),
        (size is None or size >= 1, f"batch_size={size} must be at least 1, or null for one that fits the memory."),
        (plain.memory in MEMORY, f"memory={plain.memory} is unknown: choose {', '.join(MEMORY)}."),
        (model.device_map in (None, "auto"), f"model.device_map={model.device_map} is unknown: choose auto or null."),
        (not (spreads and one_place), "model.device_map=auto takes all GPUs and no disk: leave out device and memory."),
        (experts is None or experts >= 1, f"calibration.min_expert_tokens={experts} must be at least 1."),
        (not (plan.compares and writes), f"{writes} has nothing to write where methods are only compared: choose one."),
        (not trains or (plan.pruners and not plan.compares), f"{tuning} has no mask to train under: choose a method."),
        (
            not trains or (scores and plain.evaluation.name not in ZERO_SHOT),
            f"{tuning} is judged by a text: give one.",
        ),
        (not trains or "released" in orders, f"{tuning} follows a mask in the released order: set method.order."),
        (
            not trains or (plain.finetune.loss == "next" and not plain.finetune.lora_rank),
            f"{tuning} trains the weights on the text here: distillation and LoRA are for experiments.finetune.",
        ),
        (not (plan.compares and scores), "method=compare leaves the model dense: set evaluation=none."),
    ):
        if not fits:
            raise DassError(sentence)
    if plain.save_model is not None:
        places = {"masks": plain.masks, "results_dir": plain.results_dir, "model.path": plain.model.path}
        require_separate(plain.save_model, places)
    if plan.compares:
        check_comparison(plan.compared)
    return plan


def require_alike(plan: Plan) -> None:
    """Raise DassError where the processes of a run would do different things, or get into each other's way."""
    if len(set(everyone(plan.run_id))) > 1:
        raise DassError("The processes of this run find different files: give all of them the same.")
    if world() == 1:
        return
    if plan.config.memory == "stream":
        raise DassError(f"Each of {world()} processes holds the whole model: memory=stream is for one.", "memory")
    if any(UPDATES.find(pruner.method.update).whole for pruner in plan.pruners.values()):
        raise DassError("MLPs are trained by one process (method.update): start one.", "method.update")
    if plan.config.finetune.steps:
        raise DassError("A model is trained on by one process (finetune.steps): start one.", "finetune.steps")
    if plan.config.model.device_map is not None:
        raise DassError("One process spreads a model over GPUs: start one, or remove model.device_map.")
    if plan.device.type == "cuda" and len(set(everyone((platform.node(), str(plan.device))))) < world():
        raise DassError("Several processes would share a GPU: start one for each, with device=auto.", "device")


def loads(plan: Plan) -> list[str]:
    """In words what a run would load: the model, and the texts that it reads."""
    config, model = plan.config, plan.config.model
    source = next(f"{name} {value}" for name in MODEL_SOURCES if (value := getattr(model, name)) is not None)
    found = [f"model {source}" + (f" @ {model.revision}" if model.revision else "") + f" in {model.dtype}"]
    if plan.calibrates:
        calibration = config.calibration
        size = f"{calibration.n_sequences or 'all'} x {calibration.seq_len or 'all'} tokens"
        found.append(f"calibration {calibration.path or calibration.name}, {size}")
    if config.evaluation.name != "none":
        found.append(f"evaluation {config.evaluation.path or config.evaluation.name}")
    return found


def brought(plan: Plan) -> Literal["whole", "blocks", "experts"]:
    """What of the model is in memory at once: all of it; or its blocks come from disk, or its experts, too.

    As `memory` says, or as it must be. Known from the configuration alone, before weights are downloaded; DassError
    where the model fits no way.
    """
    config, model, free = plan.config, plan.config.model, free_memory(plan.device)
    if model.device_map is not None:
        return "whole"
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if plan.device.type == "cpu" else 1  # processes in this memory
    free //= here
    needs = next((pruner.needs for pruner in plan.pruners.values()), None)
    check = plan.check_blocks if plan.pruners else None
    needed = memory_needed(source_of(model), model.revision, plan.dtype, model.projections, needs, check)
    whole, streamed = needed.whole, needed.by_expert
    is_streamed = config.memory == "stream"
    if config.memory == "auto" and whole + whole // 2 > free and world() > 1:
        raise DassError(
            f"Each of {world()} processes needs {1.5 * whole / 1e9:.1f} GB for the model, and {free / 1e9:.1f} GB are "
            f"free for it: start fewer, or one alone, which streams it.",
            "memory",
        )
    # a half more: for what is made of the weights, and activations
    if config.memory == "auto" and whole + whole // 2 > free:
        is_streamed = True
        print(
            f"note: the model needs {1.5 * whole / 1e9:.1f} GB of {free / 1e9:.1f} GB that are free: its blocks are "
            f"brought from disk one at a time (memory=resident keeps it whole)",
            file=sys.stderr,
        )
    if (streamed if is_streamed else whole) > free:
        raise DassError(
            f"{model.name} does not fit: its weights in {plan.dtype} take {whole / 1e9:.1f} GB, with "
            f"memory=stream {streamed / 1e9:.1f} GB at a time, and {free / 1e9:.1f} GB are free on {plan.device}: "
            f"{'set memory=stream' if streamed <= free else 'use a machine with more memory or a smaller dtype'}.",
            "memory" if streamed <= free else "device",
        )
    if is_streamed and config.finetune.steps:
        raise DassError(
            f"finetune.steps={config.finetune.steps} needs the whole model in memory: set memory=resident.", "memory"
        )
    if not is_streamed:
        return "whole"
    at_once = needed.streamed + (needed.statistics if needed.by_expert < needed.streamed else 0)
    if at_once <= free:
        return "blocks"
    _require_one_by_one(plan, needed, free)
    print(
        f"note: the blocks, with what is known of them, need {at_once / 1e9:.1f} GB of {free / 1e9:.1f} GB that are "
        f"free: their experts are brought from disk one at a time, in every forward, so that a larger batch_size reads "
        f"less",
        file=sys.stderr,
    )
    return "experts"


def _require_one_by_one(plan: Plan, needed: Needed, free: int) -> None:
    """Raise DassError where a method needs all experts of a block at once, or what is known of them does not fit."""
    pruners = plan.pruners.values()
    why = f"{plan.config.model.name} fits expert by expert alone, in {needed.by_expert / 1e9:.1f} GB"
    if plan.compares or any(not isinstance(p, BlockPruner) or UPDATES.find(p.method.update).whole for p in pruners):
        raise DassError(
            f"{why}, and method={plan.config.method['name']} works on a block at once, which takes "
            f"{needed.streamed / 1e9:.1f} GB of {free / 1e9:.1f} GB that are free on {plan.device}: choose another "
            f"method, or use a machine with more memory.",
            "method",
        )
    if needed.by_expert + needed.statistics > free:
        raise DassError(
            f"{why}, and the calibration statistics of one block, of all its experts at once, take "
            f"{needed.statistics / 1e9:.1f} GB more, of {free / 1e9:.1f} GB that are free on {plan.device}: choose a "
            f"method without Hessians, such as wanda or dass, or use a machine with more memory.",
            "method",
        )


def _require_excluded(config: PruneConfig, blocks: list[Block]) -> None:
    """Raise DassError where one of the two `exclude` matches nothing, which the other would hide."""
    roles = ROLES if config.targets == "all" else MLP_ROLES
    names = [p.name for block in blocks for p in block.projections if p.role in roles]
    for key, exclude in (("exclude", config.exclude), ("method.exclude", config.method.get("exclude"))):
        if exclude and not any(re.search(exclude, name) for name in names):
            raise DassError(f"{key}={exclude} matches none of {names[0]} to {names[-1]}: correct or remove it.", key)


def require_separate(save_model: str, others: Mapping[str, str | None]) -> None:
    """Raise DassError where a saved model, which replaces its folder, would replace one of others, by their setting."""
    for name, other in others.items():
        own, place = Path(save_model).expanduser().resolve(), Path(other or "").expanduser().resolve()
        if other is not None and own in (place, *place.parents):
            raise DassError(f"save_model={save_model} would replace {name}={other}: choose another folder.")
