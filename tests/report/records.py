"""Hand-made records for the tests of the report."""

from pathlib import Path
from typing import Any

import numpy as np

from dass.manifests import Manifest, PlannedRun, write_manifest
from dass.records import identity_of, write_record

PATTERNS: dict[str, dict[str, Any]] = {
    "50%": {"name": "unstructured", "ratio": 0.5, "n": None, "m": None},
    "4:8": {"name": "4of8", "ratio": None, "n": 4, "m": 8},
    "2:4": {"name": "2of4", "ratio": None, "n": 2, "m": 4},
}


def make_record(
    run_id: str, method: str, losses: Any, pattern: str = "2:4", seed: int = 0, model: str = "toy", **options: Any
) -> dict[str, Any]:
    """A record of a run whose windows have the given mean losses (nats); `options` go to the config of the method."""
    losses = np.asarray(losses, dtype=float)
    perplexity = float(np.exp(losses.mean()))
    sparsity = 0.0 if method == "dense" else 0.5
    calibrates = method != "dense" and (method != "magnitude" or options.get("update") == "obs")
    stages = ["load", "evaluation", *["pruning"] * (method != "dense"), *["calibration"] * calibrates]
    record: dict[str, Any] = {
        "id": run_id,
        "command": [],
        "files": {},
        "failed": {},
        "config": {
            "model": {"name": model, "dtype": "auto"},
            "method": {"name": method, **options},
            "sparsity": PATTERNS[pattern],
            "targets": "mlp",
            "exclude": None,
            "seed": seed,
            "resolved": {"dtype": "float32"},
            "calibration": {"name": "c4_sample", "path": None, "n_sequences": 8, "seq_len": 128, "bos": "none"},
            "evaluation": {"name": "wiki", "path": None, "seq_len": 256, "n_windows": len(losses), "bos": "tokenizer"},
        },
        "git": {"commit": "0" * 40, "dirty": False},
        "versions": {"python": "3.11"},
        "machine": {"platform": "L", "cpu": "Some CPU", "threads": 2, "memory_gb": 8.0, "device": "cpu", "gpu": None},
        "stages": {name: {"seconds": 12.34, "peak_memory_gb": 1.0} for name in stages},
        "sparsity": {"projections": {}, "targeted": sparsity, "linear": 0.75 * sparsity, "total": 0.5 * sparsity},
        "metrics": [
            {
                "dataset": "wiki",
                "metric": "perplexity",
                "value": perplexity,
                "stderr": perplexity * float(losses.std(ddof=1)) / len(losses) ** 0.5 if len(losses) > 1 else None,
                "n": len(losses),
                "seq_len": 256,
                "tokens": 256 * len(losses),
            }
        ],
        "windows": losses.tolist(),
    }
    return identify(record)


def identify(record: dict[str, Any], **contents: str) -> dict[str, Any]:
    """Give a record the identities that its config tells; `contents` of a model or evaluation that it does not."""
    config = record["config"]
    calibrates = "calibration" in record["stages"]
    drawn = config["calibration"] | {"seed": config["seed"]} if calibrates else None
    parts = {"model": config["model"] | config["resolved"], "evaluation": config["evaluation"]}
    found: dict[str, Any] = {name: identity_of(part | {"contents": contents.get(name)}) for name, part in parts.items()}
    method = {key: config[key] for key in ("method", "sparsity", "targets", "exclude")}
    found["method"] = None if config["method"]["name"] == "dense" else identity_of(method)
    found["calibration"] = drawn and identity_of(drawn)
    record["identity"] = found | {"numerics": 1}
    record["determinants"] = {"calibration": drawn}
    return record


def plan(name: str, records: list[dict[str, Any]], report: str = "perplexity", **whys: str) -> Manifest:
    """The manifest of a sweep of these records; `whys` of those that have none, by their id."""
    runs = [PlannedRun(r["id"], r["config"], "calibration" in r["stages"], whys.get(r["id"])) for r in records]
    return Manifest(name, name.removesuffix("-small"), "small", report, [f"experiment={name}"], runs)


def losses(shift: float, noise: float = 0.0, n: int = 16) -> np.ndarray:
    """(n,) losses that share their ups and downs, moved by `shift`, each window by up to `noise` to either side."""
    windows = 3 + 0.3 * np.sin(np.arange(n))
    return windows + shift + noise * np.cos(3.7 * np.arange(n))


def write_example(folder: Path) -> None:
    """Records and manifest of two patterns, a cell of which was not run.

    Under 2:4 dass wins clearly, under 50% dass and sparsegpt are in a draw.
    """
    records = [
        make_record("0d", "dense", losses(0.0)),
        make_record("1m", "magnitude", losses(2.5, 0.3), criterion="magnitude", update="none"),
        make_record("2w", "wanda", losses(0.40, 0.02), axis={"gate": "in"}),
        make_record("3s", "sparsegpt", losses(0.35, 0.05)),
        make_record("4d", "dass", losses(0.25, 0.03), alpha=0.5),
        make_record("5w", "wanda", losses(0.20, 0.02), "50%", axis={"gate": "in"}),
        make_record("6s", "sparsegpt", losses(0.101, 0.05), "50%"),
        make_record("7d", "dass", losses(0.10, -0.05), "50%", alpha=0.5),
    ]
    for record in records:
        write_record(folder, record)
    write_manifest(folder, plan("example-small", records))
