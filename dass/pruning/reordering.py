"""The neurons of a block, put in a method's order before masks are chosen: of MLPs, and inside attention's heads."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dass.errors import DassError
from dass.pruning.blocks import Block, Projection, Unit
from dass.pruning.heads import heads_of, known_heads
from dass.pruning.masks import NM
from dass.pruning.method import Method
from dass.pruning.order import ORDERS, Neurons, move, reorder, seeded
from dass.pruning.statistics import Streams

Scores = Callable[[Projection], Tensor]
"""The importance of each weight of a projection, `(out_features, in_features)`, by its method's criterion."""


@torch.no_grad()
def put_in_order(
    block: Block, method: Method, projections: list[Projection], streams: Streams, scores: Scores
) -> dict[str, Tensor]:
    """Permute the neurons of each MLP in place, with what is known of them, and heads where the order is `matched`.

    Args:
        projections: those of the block that are pruned.

    Returns:
        By the name of each projection that was permuted: what stands at place i now stood at `permutation[i]`; `(f,)`
        of an MLP, of v (or the qkv that holds it) the rows and of o the columns.

    Raises:
        DassError: an MLP has other parameters with one value for each neuron, or a number that M does not divide.
    """
    orders: dict[str, Tensor] = {}
    for unit in block.units if method.order != "released" else ():
        own = [p for p in projections if block.unit_of(p) is unit]
        if not own:
            continue  # a dense MLP stays as it is
        permutation = _neurons(block, unit, method, own, streams, scores)
        orders |= {p.name: permutation for p in unit.projections.values()}
    return orders | _heads(block, method, {p.role: p for p in projections}, streams, scores)


def require_orders(block: Block, orders: dict[str, Tensor]) -> None:
    """Raise DassError unless permutations from elsewhere, by projection, leave the dense function as it is.

    All of an MLP have one; v and o have one inside each head, alike; others have none. That of a qkv must fit one of
    two ways to stack it: weights alone do not tell which is the model's.
    """
    for unit in block.units:
        count = unit.projections["down"].weight.shape[1]
        own = [orders[p.name] for p in unit.projections.values() if p.name in orders]
        if any(len(one) != count or not torch.equal(one, own[0]) for one in own):
            raise DassError(f"The masks of {unit.name} hold several orders of its {count} neurons: load its own.")
    given = {role: orders[p.name] for role, p in block.attention.items() if p.name in orders}
    keeps = [one.keep(given[one.v.role], given["o"]) for one in heads_of(block, 1) if set(given) == {one.v.role, "o"}]
    if given and (_read_along(block) or not any(keeps)):
        raise DassError(f"The masks of {block.name} move values between the heads of its attention: load its own.")


def _neurons(
    block: Block, unit: Unit, method: Method, own: list[Projection], streams: Streams, scores: Scores
) -> Tensor:
    """Put the neurons of an MLP in the method's order; the permutation, `(f,)`."""
    seen, count = streams.get(unit.intermediate), unit.projections["down"].weight.shape[1]

    if ORDERS.find(method.order).needs and isinstance(method.pattern, NM) and count % method.pattern.m:
        raise DassError(
            f"M={method.pattern.m} does not divide the {count} neurons of {unit.name}: use order=released or random.",
            "method.order",
        )

    def competing() -> Tensor:
        lines = [_lines(p, method, scores) for p in own]
        return torch.cat([torch.empty(0, count, device=own[0].weight.device), *lines])

    norm = seen.norm if seen else lambda: torch.empty(0)
    neurons = Neurons(count, method.pattern, seeded(method.order_seed, unit.name), norm, competing)
    permutation: Tensor = ORDERS.find(method.order).function(neurons)
    reorder(block, unit, permutation)
    if seen:
        seen.reorder(permutation)
    return permutation


def _heads(
    block: Block, method: Method, chosen: dict[str, Projection], streams: Streams, scores: Scores
) -> dict[str, Tensor]:
    """Put what each head of v writes, and o reads, in a matched order; the permutations by projection."""
    v, o = chosen.get("v", chosen.get("qkv")), chosen.get("o")
    if method.order != "matched" or not isinstance(method.pattern, NM) or v is None or o is None or _read_along(block):
        return {}
    heads = known_heads(block, method.pattern.m, streams)
    if heads is None:
        return {}
    norm, of_v, of_o = streams[o.reads].norm(), _lines(v, method, scores), _lines(o, method, scores)
    at_v, at_o = torch.arange(v.weight.shape[0]), torch.arange(o.weight.shape[1])
    for rows, columns in zip(heads.rows, heads.columns, strict=True):
        own = [of_v[:, rows], *(of_o[:, one] for one in columns)]
        seed = seeded(method.order_seed, f"{v.name} {rows[0]}")
        together = partial(torch.Tensor.sum, norm[columns], 0)
        neurons = Neurons(len(rows), method.pattern, seed, together, partial(torch.cat, own))
        found = ORDERS.find(method.order).function(neurons)
        at_v[rows], at_o[columns] = rows[found], columns[:, found]
    move(v, at_v)
    move(o, at_o)
    streams[o.reads].reorder(at_o)
    return {v.name: at_v, o.name: at_o}


def _read_along(block: Block) -> bool:
    """Whether attention has a vector, stored as a matrix, that may run along what v writes (`heads_of` sees others)."""
    v, o, mixer = block.attention.get("v", block.attention.get("qkv")), block.attention.get("o"), block.mixer
    if v is None or o is None or mixer is None:
        return False
    lengths = {v.weight.shape[0], o.weight.shape[1], getattr(mixer, "head_dim", getattr(mixer, "head_size", None))}
    ours = {id(getattr(p.module, p.parameter_name)) for p in block.attention.values()}
    return any(
        p.ndim > 1 and id(p) not in ours and lengths & set(p.shape)
        for name, p in mixer.named_parameters()
        if not name.endswith("bias") and not name.startswith(("q_", "k_"))
    )


def _lines(p: Projection, method: Method, scores: Scores) -> Tensor:
    """The scores of a projection in which weights of several neurons compete, `(lines, neurons)`; perhaps none."""
    reads_them = p.role in ("down", "o")
    axis = method.axis_for(p.role)
    if axis != "both" and (axis == "out") == reads_them:
        return p.weight.new_empty(0, p.weight.shape[1 if reads_them else 0], dtype=torch.float32)
    found = scores(p)
    return found if reads_them else found.T
