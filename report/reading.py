"""From records, and from what a manifest names, to the typed rows of `report/runs.py`."""

import sys
from collections import Counter, defaultdict
from dataclasses import replace
from typing import Any

from dass.errors import DassError, one_line, told
from dass.fingerprint import hashed
from dass.manifests import Manifest
from dass.pruning.blocks import ROLES
from dass.records import identity_of
from dass.soundness import require_sound
from report.runs import DENSE, NO_OPTIONS, RANDOM, RELEASED, Pattern, Run, Setting, place_of


def runs_of(records: list[dict[str, Any]]) -> list[Run]:
    """One run per record, whatever it measured; a record that is not sound is named on stderr and left out."""
    runs = []
    for record in records:
        try:
            with told(f"{record['id']}.json is not a sound record", "run it again", Exception):
                require_sound(record)
                runs.append(_run(record["id"], record["config"], "calibration" in record["stages"], record))
        except DassError as error:
            print(f"left out: {one_line(error)}", file=sys.stderr)
    return _alike(runs)


def planned_runs(manifest: Manifest, runs: list[Run]) -> list[Run]:
    """The runs of a manifest, each once: those that have a record, and the missing ones with the reason.

    A run whose config could not be composed is named on stderr and left out.
    """
    by_id = {run.id: run for run in runs}
    found = {one.fingerprint: by_id[one.fingerprint] for one in manifest.runs if one.fingerprint in by_id}
    missing = []
    for number, planned in enumerate(manifest.runs, 1):
        if planned.fingerprint in found:
            continue
        if not planned.config:
            print(f"left out: run {number} of the manifest {manifest.name}: {planned.why}", file=sys.stderr)
            continue
        run_id = planned.fingerprint or f"{manifest.name}#{number}"
        why = planned.why or "not run yet"
        missing.append(missing_run(run_id, planned.config, planned.calibrates, why, list(found.values())))
    return [*found.values(), *missing]


def missing_run(run_id: str, config: dict[str, Any], calibrates: bool, why: str, found: list[Run]) -> Run:
    """A run without a record: what its config does not tell (identities, a dtype) is that of a `found` run alike."""
    run = _run(run_id, config, calibrates, None, why)
    models = [other for other in found if _recipe(other.config["model"]) == _recipe(config["model"])]
    known = {name: getattr(models[0].setting, name) for name in ("model", "dtype") if models}
    for name in ("evaluation", "calibration"):
        alike = [other for other in models + found if _given(name, other.config[name]) == _given(name, config[name])]
        identities = [getattr(other.setting, name) for other in alike if getattr(other.setting, name)]
        if getattr(run.setting, name) and identities:
            known[name] = identities[0]
    return replace(run, setting=run.setting._replace(**known))


def _run(run_id: str, config: dict[str, Any], calibrates: bool, record: dict[str, Any] | None, why: str = "") -> Run:
    """A run by its config and, if there is one, its record."""
    method, model, evaluation, sparsity = (config[key] for key in ("method", "model", "evaluation", "sparsity"))
    trained, dense = model.get("trained"), method["name"] == "dense"
    options = {key: value for key, value in method.items() if key not in NO_OPTIONS}
    order = method.get("order", RELEASED)
    if order not in (RELEASED, RANDOM):
        options["order"] = order
    axis = method.get("axis") or {}
    by_role = axis if isinstance(axis, dict) else dict.fromkeys(ROLES, axis)  # one for all
    options |= {f"axis.{role}": one for role, one in by_role.items() if role != "qkv"}
    setting = Setting(
        model=identity_of(_recipe(model)),
        dtype=None,
        evaluation=_given("evaluation", evaluation) or "none",
        pruned=None if dense else config["targets"] + (f" without {config['exclude']}" if config["exclude"] else ""),
        calibration=_given("calibration", config["calibration"]) if calibrates else None,
    )
    identity: dict[str, Any] = {}
    found: dict[str, Any] = {}  # fields that only a record tells
    method_identity = None
    if record is not None:
        identity = record["identity"]
        setting = setting._replace(
            model=setting.model if trained else identity["model"],
            dtype=config.get("resolved", model)["dtype"],  # the model's own may be "auto"
            evaluation=identity["evaluation"] or "none",
        )
        if calibrates:  # draws of one text are replicates
            text = _without("seed", record["determinants"]["calibration"])
            setting = setting._replace(calibration=identity_of(hashed("calibration", text)))
        if not dense:
            method_identity = f"{_method_identity(record, order)}, numerics {identity['numerics']}"
            found = {f"sparsity_{name}": record["sparsity"][name] for name in ("targeted", "linear")}
            found["pruning_seconds"] = record["stages"]["pruning"]["seconds"]
        for metric in record["metrics"]:
            if metric["metric"] == "perplexity":
                found |= {key: metric[key] for key in ("dataset", "seq_len", "tokens", "stderr")}
                found |= {"perplexity": metric["value"], "losses": tuple(map(float, record["windows"]))}
        why = record.get("failed", {}).get("evaluation", "")
    return Run(
        id=run_id,
        config=config,
        model=model["name"],
        setting=setting,
        model_identity=identity.get("model"),
        method_identity=method_identity,
        calibrates=calibrates,
        method=method["name"],
        update=method.get("update"),
        options=options | {"update": method.get("update")},
        pattern=DENSE if dense else Pattern.of(**{key: sparsity[key] for key in ("ratio", "n", "m")}),
        order=order,
        order_seed=method["order_seed"] if order == RANDOM else None,
        seed=config["seed"],
        training_seed=trained["seed"] if trained else None,
        record=record,
        why=why,
        **{"dataset": evaluation["name"], "seq_len": evaluation["seq_len"]} | found,
    )


def _method_identity(record: dict[str, Any], order: str) -> str:
    """The identity of its method; the same for all orders of the neurons that are draws of one kind."""
    method = record["determinants"].get("method")
    if method is None or order not in (RELEASED, RANDOM):
        return record["identity"]["method"]
    return identity_of(hashed("method", _without("order", method)))


def _without(name: str, tree: Any) -> Any:
    """A tree without all keys of a name."""
    if not isinstance(tree, dict):
        return tree
    return {key: _without(name, value) for key, value in tree.items() if key != name}


def _alike(runs: list[Run]) -> list[Run]:
    """Without the runs that have other numbers of windows or items than most of the same model and evaluation.

    Models need not have as many windows of a text: each has its own tokenizer.
    """
    sizes: dict[tuple[str, str], Counter[tuple[tuple[str, int], ...]]] = defaultdict(Counter)
    for run in runs:
        sizes[run.setting.model, run.setting.evaluation][_sizes(run)] += bool(run.samples)
    usual = {scored: counts.most_common(1)[0][0] for scored, counts in sizes.items()}
    scored = [run for run in runs if run.samples]
    strange = [run for run in scored if _sizes(run) != usual[run.setting.model, run.setting.evaluation]]
    for run in strange:
        why = "windows or items than other runs of its model and evaluation"
        print(f"left out: {one_line(run.id)}.json has more or fewer {why}: run it again.", file=sys.stderr)
    return [run for run in runs if run not in strange]


def _sizes(run: Run) -> tuple[tuple[str, int], ...]:
    """What its samples are of, and how many there are, in their order."""
    tasks = [task for task in run.accuracies if task != "mean"] or ["windows"]
    return tuple(zip(tasks, map(len, run.samples), strict=False))


def _recipe(model: dict[str, Any]) -> dict[str, Any]:
    """What its config says of a model; of a trained one all but the seed."""
    trained = {key: value for key, value in (model.get("trained") or {}).items() if key != "seed"}
    return {"name": model["name"], **place_of(model), "trained": trained}


def _given(name: str, text: dict[str, Any]) -> str | None:
    """An identity of what its config says of a calibration or an evaluation; None where there is none.

    Without the values of the baseline: those that came after a record was made are not in its config.
    """
    given = {key: value for key, value in hashed(name, text).items() if value is not None}
    return None if text["name"] == "none" else identity_of(given)
