"""The walk as the reference codes have it (Wanda, SparseGPT, glu_dass), written plainly: the benchmark's baseline.

Every block runs twice over all sequences, one at a time; each projection keeps its own statistics; N:M masks come from
a loop over groups of M with topk. Not used outside the benchmark and its test.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dass.pruning.calls import enter_first_block
from dass.pruning.layout import find_blocks


@torch.no_grad()
def reference_walk(model: PreTrainedModel, input_ids: Tensor, method: str, n: int, m: int) -> Iterator[None]:
    """Prune the MLPs of a LLaMA-like model in place, with a pause in each block once it is pruned.

    Args:
        input_ids: `(n_sequences, seq_len)`.
        method: wanda, dass (alpha 0.5) or sparsegpt.
        n: weights kept
        m: of so many consecutive ones.
    """
    entering = enter_first_block(model, find_blocks(model), input_ids.split(1))
    inputs, keywords = torch.cat([*entering.batches]), entering.calls[0][0].keywords
    outputs = torch.zeros_like(inputs)
    for block in model.model.layers:
        projections = {"gate": block.mlp.gate_proj, "up": block.mlp.up_proj, "down": block.mlp.down_proj}
        gathered = {}
        for role, linear in projections.items():
            d = linear.in_features
            gathered[role] = torch.zeros((d, d) if method == "sparsegpt" else (d,), device=linear.weight.device)
        hooks = [linear.register_forward_hook(partial(gather, gathered[r])) for r, linear in projections.items()]
        for j in range(len(inputs)):
            outputs[j] = block(inputs[j : j + 1], **keywords)[0]
        for hook in hooks:
            hook.remove()
        for role, linear in projections.items():
            if method == "sparsegpt":
                linear.weight.copy_(sparsegpt_layer(linear.weight.float().clone(), gathered[role], n, m))
            elif method == "dass" and role != "down":
                scores = linear.weight.abs() * gathered["down"].sqrt().pow(0.5)[:, None]
                linear.weight[loop_mask(scores.T, n, m).T] = 0
            else:
                linear.weight[loop_mask(linear.weight.abs() * gathered[role].sqrt(), n, m)] = 0
        yield
        for j in range(len(inputs)):
            outputs[j] = block(inputs[j : j + 1], **keywords)[0]
        inputs, outputs = outputs, inputs


def gather(into: Tensor, linear: nn.Module, given: tuple[Tensor], output: Tensor) -> None:
    """Add the squares of each feature (Wanda) or the Hessian (SparseGPT) of a layer's input `(1, seq_len, d)`."""
    x = given[0][0].float().T
    into += x.matmul(x.T) if into.ndim == 2 else torch.norm(x, p=2, dim=1) ** 2


def loop_mask(scores: Tensor, n: int, m: int) -> Tensor:
    """True where a weight is pruned: a loop over groups of m columns."""
    pruned = torch.zeros_like(scores, dtype=torch.bool)
    for i in range(0, scores.shape[1], m):
        group = scores[:, i : i + m].float()
        pruned.scatter_(1, i + torch.topk(group, m - n, dim=1, largest=False)[1], True)
    return pruned


def sparsegpt_layer(weight: Tensor, hessian: Tensor, n: int, m: int, damping: float = 0.01, width: int = 128) -> Tensor:
    """SparseGPT's solver for one layer, a column at a time."""
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    weight[:, dead] = 0
    index = torch.arange(len(hessian), device=weight.device)
    hessian[index, index] += damping * hessian.diagonal().mean()
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    for start in range(0, weight.shape[1], width):
        stop = min(start + width, weight.shape[1])
        block, local = weight[:, start:stop].clone(), factor[start:stop, start:stop]
        done, errors = torch.zeros_like(block), torch.zeros_like(block)
        pruned = torch.zeros_like(block, dtype=torch.bool)
        for i in range(stop - start):
            if i % m == 0:
                scores = block[:, i : i + m] ** 2 / local.diagonal()[i : i + m].reshape(1, -1) ** 2
                pruned.scatter_(1, i + torch.topk(scores, m - n, dim=1, largest=False)[1], True)
            kept = block[:, i].clone()
            kept[pruned[:, i]] = 0
            done[:, i] = kept
            error = (block[:, i] - kept) / local[i, i]
            block[:, i:] -= error[:, None].matmul(local[i, i:][None])
            errors[:, i] = error
        weight[:, start:stop] = done
        weight[:, stop:] -= errors.matmul(factor[start:stop, stop:])
    return weight
