"""Activation functions by name: those that transformers knows, and any other of torch.nn.functional."""

import warnings

import torch
from torch import nn
from transformers.activations import ACT2FN


def know_activation(name: str) -> bool:
    """Let transformers know the function of this name, such as softplus; whether there is one, element by element."""
    if name in ACT2FN:
        return True
    function = getattr(nn.functional, name, None)
    if function is None or not _is_elementwise(function):
        return False
    ACT2FN[name] = type(name, (nn.Module,), {"forward": staticmethod(function)})
    return True


def _is_elementwise(function: object) -> bool:
    """Whether a function of one tensor gives each element the same value wherever the element stands."""
    x = torch.linspace(-3, 3, 12)
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            parts = torch.stack([function(one) for one in x.view(6, 2)])  # type: ignore[operator]
            return torch.equal(function(x), parts.flatten())  # type: ignore[operator]
    except Exception:  # it wants other arguments
        return False
