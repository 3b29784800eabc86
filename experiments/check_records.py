"""Check records that come from elsewhere, one line for each, and rebuild their tables if all can be believed.

python -m experiments.check_records results/runs   the tables and figures go to the folder above, here to results
"""

import math
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import OmegaConf

from dass.errors import DassError, one_line, told
from dass.fingerprint import BASELINE, Fingerprint, hashed
from dass.manifests import FOLDER, read_manifests
from dass.pruning import NUMERICS
from dass.pruning.adaptive import AdaptivePruner
from dass.pruning.blocks import MLP_ROLES
from dass.pruning.masks import NM
from dass.record_schema import Machine, Record
from dass.records import PACKAGES, RECORD_KEYS, paths_in, read_record
from dass.soundness import require_sound
from dass.terminal import printing
from experiments.app import CONF, sentence
from experiments.fingerprint import assembled, model_identity, text_identity, texts_read
from experiments.private import private_in
from experiments.report import ReportConfig, report
from experiments.resolve import Plan, check
from report.reading import runs_of
from report.rows import differing, read_published
from report.runs import AS_PUBLISHED, Run

NEAR = 0.02  # a dense perplexity may differ by so much, as a share, from a published one
COMMIT = re.compile(r"[0-9a-f]{40}")
VERSIONS = {"python", *PACKAGES}
FIRST = {"lm-eval"}  # which our first records did not tell
KEYS: dict[str, set[str]] = {  # parts in which nothing else may stand: another key may tell whose machine it was
    "": {*RECORD_KEYS, *Record.model_fields, "calibration", "experts"},
    "git": {"commit", "dirty"},
    "versions": VERSIONS,
    "machine": {*Machine.model_fields, "platform", "device"},
}
ONLY = ["targets"]  # in which an MLP-only result differs from one of all linear layers that bounds it
PUBLISHED = CONF.parent / "results" / "published"


def faults_of(path: Path, published: pd.DataFrame) -> list[str]:
    """What is wrong with a record; nothing: it can be believed."""
    try:
        record = read_record(path)
        with told("it is not sound", "run it again", Exception):  # whatever a foreign tree makes of the checks
            require_sound(record)
            commit = dict(record["git"]).get("commit")
    except DassError as error:
        return [str(error)]
    faults = private_in(record)
    for part, known in KEYS.items():
        found = record[part] if part else record
        faults += [f"{part or 'it'} holds {key}, which no record does" for key in sorted(set(found) - known)]
    missing = [name for name in sorted(VERSIONS - FIRST) if not re.match(r"\d", record["versions"].get(name, ""))]
    faults += [f"the version of {name} is missing" for name in missing]
    if not COMMIT.fullmatch(str(commit)):
        faults.append("the commit is missing: run it in a checkout")
    if record["identity"]["numerics"] != NUMERICS:
        faults.append(f"it is of numerics {record['identity']['numerics']}, and this version of {NUMERICS}")
    if set(record["determinants"]) != set(BASELINE):
        return [*faults, "its determinants are not whole, so that its identity cannot be reckoned again"]
    [run] = runs_of([record])
    return faults + _config(record) + _beside_published(run, published)


def check_folder(folder: Path) -> bool:
    """Check the records of a folder, a line for each, and its manifests; returns whether all are as they should be.

    Raises:
        DassError: there is no record, or a manifest cannot be read.
    """
    published = read_published(PUBLISHED)
    if not (paths := paths_in(folder, ".json")):
        raise DassError(f"No records in {folder}: name the folder that holds them.")
    faults = {path.stem: faults_of(path, published) for path in paths}
    sound = [read_record(path) for path in paths if not faults[path.stem]]
    for strange in {record["id"] for record in sound} - {run.id for run in runs_of(sound)}:
        faults[strange] = ["it has more or fewer windows or items than most of its model and evaluation"]
    manifests = {f"{FOLDER}/{one.name}": private_in(asdict(one)) for one in read_manifests(folder)}
    for name, found in (faults | {name: found for name, found in manifests.items() if found}).items():
        print(one_line(f"{name}: {'; '.join(found) or 'ok'}"))
    return not any((faults | manifests).values())


def rebuild(folder: Path) -> None:
    """Write the tables and figures of the folder's sweeps, or of all its records, into the folder above."""
    whole = [one for one in read_manifests(folder) if one.name == f"{one.experiment}-{one.scale}"]
    places: dict[str, Any] = {"records": str(folder), "output": str(folder.resolve().parent)}
    places |= {"published": str(PUBLISHED)}
    for scale in sorted({str(one.scale) for one in whole}):
        report(ReportConfig(experiment="all", scale=scale, **places))
    if not whole:
        report(ReportConfig(**places))


def main(arguments: list[str]) -> None:
    """Check the folder that the command line names; exit 1 where a record cannot be believed."""
    with printing():
        try:
            if len(arguments) != 1:
                raise DassError("Give one folder: python -m experiments.check_records FOLDER.")
            folder = Path(arguments[0])
            if not check_folder(folder):
                raise DassError(f"Not all of {folder} can be believed, so no table was built: see the lines above.")
            rebuild(folder)
        except DassError as error:
            print(f"error: {sentence(error)}", file=sys.stderr)
            sys.exit(1)


def _config(record: dict[str, Any]) -> list[str]:
    """In what the identity of its config, reckoned again with the equations of this version, is not its own."""
    config, found = record["config"], record["determinants"]
    try:
        plan = check(OmegaConf.create({key: value for key, value in config.items() if key != "resolved"}))
        dtype = config["resolved"]["dtype"] if plan.config.model.dtype == "auto" else plan.dtype
        expected = _reckoned(plan, dtype, found).parts
    except Exception as error:  # whatever a foreign config makes of them
        return [f"its config means nothing here: {sentence(error)}"]
    faults = [
        f"its perplexity is of {one['dataset']}, and its config names {config['evaluation']['name']}"
        for one in record["metrics"]
        if one["metric"] == "perplexity" and one["dataset"] != config["evaluation"]["name"]
    ]
    wanted, count = plan.config.evaluation.n_windows, len(record["windows"])
    if count and wanted not in (None, count):
        faults.append(f"it has {count} windows, and its config asks for {wanted}")
    if count and "evaluation" not in record["stages"]:
        faults.append("it has windows without the stage evaluation")
    faults += _projections(record, plan)
    for part in BASELINE:
        ours, theirs = hashed(part, expected[part]), hashed(part, found[part])
        differing = [key for key in sorted({*ours, *theirs}) if ours.get(key, ...) != theirs.get(key, ...)]
        if differing and part == "method":
            faults.append("its method is not what its config and the equations of this version make of it")
        elif differing:
            trees = (expected[part] or {}, found[part] or {})
            it_is, it_was = (", ".join(f"{key} {tree.get(key)}" for key in differing) for tree in trees)
            faults.append(f"its {part} has {it_is} by its config, but it ran with {it_was}")
    file = CONF / "model" / f"{config['model']['name']}.yaml"
    known: Any = OmegaConf.load(file) if file.is_file() else {}
    for key in ("hub_id", "packaged"):
        if known.get(key) is not None and config["model"].get(key) != known[key]:
            faults.append(f"it is called {config['model']['name']}, but is of {config['model'].get(key)}")
    return faults


def _projections(record: dict[str, Any], plan: Plan) -> list[str]:
    """In what the patterns, axes and orders of its projections are not those of its method."""
    found = []
    for name, one in record["sparsity"]["projections"].items():
        pruner = next(iter(plan.pruners.values()), None)
        if isinstance(pruner, AdaptivePruner) and one["role"] in MLP_ROLES:
            pruner = pruner.candidates.get(one.get("chosen", ""))
        elif isinstance(pruner, AdaptivePruner):
            pruner = pruner.first
        if pruner is None:
            found.append(f"{name} is of no method of its config")
            continue
        method, axis = pruner.method, str(pruner.method.axis_for(one["role"]))
        whole_rows = axis == "layer" and isinstance(method.pattern, NM)  # whose groups lie within them
        expected = {"pattern": str(method.pattern), "axis": "in" if whole_rows else axis}
        if "order" in one:  # older records do not tell
            expected["order"] = method.order
        found += [f"{name} has {key} {one[key]}, and its method {v}" for key, v in expected.items() if one[key] != v]
    return found[:1]


def _reckoned(plan: Plan, dtype: str, found: dict[str, Any]) -> Fingerprint:
    """The identity of a config; of files and branches, which lie elsewhere, that which the record tells."""

    def at_commit(part: Any, known: dict[str, Any]) -> Any:
        return part if COMMIT.fullmatch(part.revision or "") else replace(part, revision=known.get("revision"))

    config, known = plan.config, found["model"] or {}
    config = replace(config, model=at_commit(config.model, known))
    hidden = {"model": model_identity(config.model, known.get("contents") or "unknown")}
    for part in texts_read(config, plan.pruners):
        known = found[part] or {}
        text = at_commit(getattr(config, part), known)
        text = replace(text, bos=text.bos or known.get("bos"))
        config = replace(config, **{part: text})
        of_file = {key: value for key, value in known.items() if key not in vars(text)}
        hidden[part] = text_identity(part, text) if text.path is None else of_file
    return assembled(config, plan.pruners, dtype, hidden)


def _beside_published(run: Run, published: pd.DataFrame) -> list[str]:
    """What contradicts published numbers of the same data, length and whole text; only these can be compared."""
    if run.perplexity is None:
        return []
    rows = [one for one in published[published.model == run.model].itertuples() if differing(one, run) in ([], ONLY)]
    dense = [one.value for one in rows if one.method == "dense"]
    if not dense:
        return []
    if run.method == "dense":
        if any(abs(run.perplexity / value - 1) <= NEAR for value in dense):
            return []
        values = ", ".join(f"{value:g}" for value in dense)
        return [f"its perplexity {run.perplexity:.2f} is more than {NEAR:.0%} off the published {values}"]
    highest = math.inf
    if run.setting.pruned == "mlp" and run.method in AS_PUBLISHED and run.as_published:
        of_pattern = [one for one in rows if one.pattern == str(run.pattern) and one.targets == "all"]
        own = [one for one in of_pattern if one.method == run.method] or of_pattern
        highest = max((one.value for one in own), default=math.inf)
    bounded = math.isfinite(highest)
    if min(dense) * (1 - (0 if bounded else NEAR)) <= run.perplexity <= highest:
        return []
    band = f"band, {min(dense):g} (dense) to {highest:g} (attention pruned too)"
    where = f"outside of the published {band}" if bounded else f"below the published dense value, {min(dense):g}"
    return [f"its perplexity {run.perplexity:.2f} is {where}"]


if __name__ == "__main__":
    main(sys.argv[1:])
