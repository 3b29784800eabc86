"""What determines a run, as one hash: a report reckons it again from what a record says of itself.

Values that equal the documented `BASELINE` are left out, so that a new setting with a default changes no old identity.
"""

from dataclasses import dataclass
from typing import Any

from dass.pruning import NUMERICS
from dass.records import identity_of

BASELINE: dict[str, dict[str, Any]] = {
    "model": {"dtype": "float32"},
    "method": {"update": "none", "parameters": {}, "targets": "mlp", "exclude": None, "projections": {}, "order": None}
    | {"rounded": True},
    "calibration": {"bos": "tokenizer", "join": False, "seed": 0, "n_sequences": None, "seq_len": None}
    | {"min_expert_tokens": None, "field": "text"},
    "evaluation": {"bos": "tokenizer", "seq_len": None, "n_windows": None, "limit": None, "field": "text"},
}
"""What is not hashed: a value that is not named here is."""


@dataclass(frozen=True)
class Fingerprint:
    """What determines a run, part by part."""

    parts: dict[str, dict[str, Any] | None]  # model, method, calibration, evaluation; None where the run has none
    numerics: int = NUMERICS  # of the core that ran

    @property
    def id(self) -> str:
        """16 hex digits for the whole."""
        parts = {name: hashed(name, part) for name, part in self.parts.items()}
        return identity_of({"numerics": self.numerics, **parts})

    def as_dict(self) -> dict[str, Any]:
        """For the record: 16 hex digits for each part, so that runs are compared that read the same."""
        parts = {name: part and identity_of(hashed(name, part)) for name, part in self.parts.items()}
        return {"numerics": self.numerics, **parts}


def hashed(name: str, part: dict[str, Any] | None) -> dict[str, Any]:
    """A part without the values of the baseline."""
    baseline = BASELINE[name]
    return {key: value for key, value in (part or {}).items() if key not in baseline or baseline[key] != value}
