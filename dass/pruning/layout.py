"""Find the blocks of a language model and their MLPs.

By structure: which matrices are there, what their shapes say, and which of them stand together. The walk checks it by
what runs through them. A layout that structure does not tell can be given as regular expressions.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import takewhile

from torch import nn

from dass.errors import DassError
from dass.pruning.blocks import MLP_ROLES, Block, Projection, Unit
from dass.pruning.matrices import Matrix, matrices_of, views_of

MIXER = re.compile(r"^(?!.*norm).*(attn|attention|mamba|rwkv|temporal|shortconv|deltanet)|^conv$", re.IGNORECASE)
"""Names of what mixes tokens, and so is no MLP; no norm is meant by them."""
NORM = re.compile(r"norm[_\d]*$", re.IGNORECASE)
"""Names of norms: what they hold is no MLP of the block, whatever its shape."""
DOWN = re.compile(r"down|w2|out|4h_to_h|c_proj|fc2")
GATE = re.compile(r"gate|w1")
"""Names decide only between matrices of the same shape."""


def find_blocks(model: nn.Module, projections: Mapping[str, str] | None = None) -> list[Block]:
    """The decoder blocks of a language model, in order: the longest outermost list of modules that all hold an MLP.

    Of several lists, as where images are read, too, those that stand nearest to the embedding of the tokens.

    Args:
        projections: regular expressions by role (gate, up, down) for the names of an MLP's matrices, where structure
            alone does not tell; and by the word `dense` for matrices that are knowingly left as they are.

    Raises:
        DassError: no such list, or a matrix beside an MLP that is not understood; names what was found.
    """
    width = _hidden_size(model)
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():  # an outer module comes before what it holds
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in lists):
            lists[name] = module
    found: dict[str, list[Block]] = {}
    without: dict[str, int] = {}
    for name, modules in lists.items():
        blocks = [_map_block(f"{name}.{i}", module, width, projections or {}) for i, module in enumerate(modules)]
        without[name] = next((i for i, (block, _) in enumerate(blocks) if not block.units), 0)
        if blocks and all(block.units for block, _ in blocks):
            for block, unknown in blocks:
                if unknown:
                    raise DassError(
                        f"{block.name} has an unknown layout: {', '.join(unknown)} stands beside the MLP that was "
                        f"found ({', '.join(unit.name for unit in block.units[:3])}); say with `projections` which "
                        f"matrices are gate, up and down, and which stay dense.",
                        field="model.projections",
                    )
            found[name] = [block for block, _ in blocks]
    if not found:
        raise DassError(
            f"{type(model).__name__} has an unknown layout: no list of blocks that all hold an MLP (gate, up and down; "
            f"gate and up in one; or up and down); found {_describe(lists, without)}; say with `projections` which "
            f"matrices are gate, up and down, or use another model.",
            field="model.projections",
        )
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    beside = next((name for name, module in model.named_modules() if module is embedding), "").split(".")

    def nearness(name: str) -> tuple[int, int]:
        shared = takewhile(lambda pair: pair[0] == pair[1], zip(name.split("."), beside, strict=False))
        return len(list(shared)), len(found[name])

    return found[max(found, key=nearness)]


def _hidden_size(model: nn.Module) -> int | None:
    configs = (module.config for module in model.modules() if hasattr(module, "config"))
    texts = (config.get_text_config() for config in configs if hasattr(config, "get_text_config"))
    return next((config.hidden_size for config in texts if hasattr(config, "hidden_size")), None)


def _map_block(name: str, module: nn.Module, width: int | None, given: Mapping[str, str]) -> tuple[Block, list[str]]:
    """A block, and the names of its matrices that are neither of an MLP nor of what mixes tokens nor of a router."""
    mixers = _mixers(module)
    inside: list[Matrix] = []
    outside: list[Matrix] = []
    for matrix in matrices_of(name, module):
        path = matrix.name.removeprefix(f"{name}.")
        (inside if any(f"{path}.".startswith(f"{mixer}.") for mixer in mixers) else outside).append(matrix)
    norms = tuple(f"{name}.{path}." for path, part in module.named_modules() if path and _is_norm(path, part))
    places: dict[str, list[Matrix]] = {}
    for matrix in outside:
        if not matrix.full_name.startswith(norms):
            places.setdefault(matrix.place, []).append(matrix)
    experts = {matrix.shape[0] for matrix in outside if len(matrix.shape) == 3}
    experts |= {len(m) for m in module.modules() if isinstance(m, nn.ModuleList)}
    roles_given = bool(set(given) - {"dense"})
    units: list[Unit] = []
    used: set[str] = set()
    for place, matrices in places.items():
        routers = [m for m in matrices if len(m.shape) == 2 and (m.shape[0] == 1 or m.shape[0] in experts)]
        rest = [m for m in matrices if m not in routers]
        unit_name = ".".join(part for part in (name, place) if part)
        own: list[Unit] = []
        for some in (rest, matrices):  # an MLP, too, may have as many rows as there are experts
            own = own or (_given_unit(unit_name, some, given) if roles_given else _units(unit_name, some, width))
        if (
            place or len(places) == 1 or roles_given
        ):  # linear layers of the block itself are its MLP only if nothing else is
            units += own
        used.update(m.name for m in (matrices if own and units and units[-1] is own[-1] else routers))
    dense = _expression(given.get("dense", r"(?!)"))
    unknown = [f"{m.name} {m.shape}" for m in outside if m.name not in used and not dense.search(m.name)]
    left = tuple(m.full_name for m in outside if m.name not in used and dense.search(m.name))
    for p in (p for unit in units for p in unit.projections.values()):
        if not roles_given and dense.search(p.name):
            raise DassError(
                f"{given['dense']} names {p.name} of an MLP that is understood: to leave it dense, set exclude.",
                field="model.projections",
            )
    units = [_labelled(unit, name, len(units) > 1, module) for unit in units]
    mixer = module.get_submodule(mixers[0]) if len(mixers) == 1 else None
    return Block(name, module, mixer, tuple(units), _attention(inside, width), left), unknown


def _mixers(block: nn.Module) -> list[str]:
    """The names of the outermost children that mix tokens and hold weights, by their name or that of their class."""
    found: list[str] = []
    for path, module in block.named_modules():
        if not path or any(path.startswith(f"{outer}.") for outer in found) or isinstance(module, nn.ModuleList):
            continue
        named = MIXER.search(path.rpartition(".")[2]) or MIXER.search(type(module).__name__)
        if named and any(p.ndim > 1 for p in module.parameters()):
            found.append(path)
    return found


def _is_norm(path: str, module: nn.Module) -> bool:
    return bool(NORM.search(path.rpartition(".")[2]) or NORM.search(type(module).__name__))


def _units(name: str, matrices: list[Matrix], width: int | None) -> list[Unit]:
    """The MLP that these matrices of one place make up, or one for each expert; none if they make up none."""
    if not matrices or len({len(m.shape) for m in matrices}) != 1:
        return []
    if len(matrices[0].shape) == 2:
        roles = _roles(matrices, width)
        return [Unit(name, views_of(roles))] if roles else []
    if len({m.shape[0] for m in matrices}) != 1:
        return []
    for transposed in (False, True):
        turned = [
            replace(m, shape=(m.shape[2], m.shape[1]) if transposed else m.shape[1:], transposed=transposed)
            for m in matrices
        ]
        if roles := _roles(turned, width):
            return [Unit(f"{name}.{e}", views_of(roles, e), routed=True) for e in range(matrices[0].shape[0])]
    return []


def _roles(matrices: list[Matrix], width: int | None) -> dict[str, Matrix] | None:
    """Which of two or three matrices is which; a fused gate and up is both. None if their shapes are of no MLP."""
    downs = [
        down
        for down in matrices
        if (width is None or down.shape[0] == width)
        and all(m.shape[1] == down.shape[0] for m in matrices if m is not down)
        and (
            all(m.shape[0] == down.shape[1] for m in matrices if m is not down)
            or (len(matrices) == 2 and all(m.shape[0] == 2 * down.shape[1] for m in matrices if m is not down))
        )
    ]
    if not downs or len(matrices) not in (2, 3):
        return None
    # of several that fit, the width equals that of the intermediate activation, and the name decides
    down = next((m for m in downs if len(downs) == 1 or DOWN.search(m.leaf)), downs[-1])
    first, *second = [m for m in matrices if m is not down]
    if not second:
        return {"up": first, "down": down} if first.shape[0] == down.shape[1] else dict(gate=first, up=first, down=down)
    gate = next((m for m in (first, *second) if GATE.search(m.leaf)), first)
    return {"gate": gate, "up": next(m for m in (first, *second) if m is not gate), "down": down}


def _labelled(unit: Unit, block: str, several: bool, module: nn.Module) -> Unit:
    """The unit with inputs that no other unit of the block shares a name with, and whether a router feeds it."""
    path = unit.name.removeprefix(block).removeprefix(".")
    steps = path.split(".")
    parents = [".".join(steps[:i]) for i in range(1, len(steps))]
    listed = any(isinstance(module.get_submodule(p), nn.ModuleList) for p in parents if not unit.routed)
    prefix = f"{path}: " if several else ""
    views = {role: replace(p, reads=prefix + p.reads) for role, p in unit.projections.items()}
    return Unit(unit.name, views, unit.routed or listed)


def _expression(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise DassError(
            f"{text} is not a regular expression ({error}): correct it.", field="model.projections"
        ) from error


def _given_unit(name: str, matrices: list[Matrix], given: Mapping[str, str]) -> list[Unit]:
    """The MLP that regular expressions by role make of the matrices of one place."""
    if unknown := set(given) - {*MLP_ROLES, "dense"}:
        raise DassError(f"The role {min(unknown)} is unknown: give gate, up, down, dense.", field="model.projections")
    if not {"up", "down"} <= set(given):
        raise DassError("The roles up and down are needed at least: give both.", field="model.projections")
    found: dict[str, Matrix] = {}
    for role in (role for role in MLP_ROLES if role in given):
        named = [m for m in matrices if _expression(given[role]).search(m.name)]
        if len(named) > 1:
            raise DassError(
                f"{given[role]} names {' and '.join(m.name for m in named[:2])}: give an expression that names one.",
                field="model.projections",
            )
        if named:
            found[role] = named[0]
    if set(found) != set(given) - {"dense"}:
        return []
    up, down = found["up"], found["down"]
    gate = found.get("gate", up)
    rows = up.shape[0] // 2 if found.get("gate") is up else up.shape[0]
    flat = all(len(m.shape) == 2 for m in found.values())
    if not flat or gate.shape != up.shape or (rows, up.shape[1]) != (down.shape[1], down.shape[0]):
        shapes = ", ".join(f"{role} {m.name} {m.shape}" for role, m in found.items())
        raise DassError(
            f"The MLP of {name} is none by its shapes: {shapes}; gate and up must read what down writes, and down must "
            f"read what they write.",
            field="model.projections",
        )
    return [Unit(name, views_of(found))]


def _attention(matrices: list[Matrix], width: int | None) -> dict[str, Projection]:
    """q, k, v and o, or one qkv and o; nothing where attention has other matrices."""
    if any(len(m.shape) != 2 for m in matrices):
        return {}
    roles: dict[str, Matrix] = {}
    if len(matrices) == 2:
        qkv, o = sorted(matrices, key=lambda m: -m.shape[0])
        if qkv.shape[1] == o.shape[0] and qkv.shape[0] > o.shape[1]:
            roles = {"qkv": qkv, "o": o}
    elif len(matrices) == 4:
        named = {re.sub(r"^[Ww]_?|_proj.*|_?lin.*", "", m.leaf)[:1]: m for m in matrices}
        q, k, v = (named.pop(letter, None) for letter in "qkv")
        rest = list(named.values())
        if q and k and v and len(rest) == 1 and q.shape[1] == k.shape[1] == v.shape[1] == rest[0].shape[0]:
            roles = {"q": q, "k": k, "v": v, "o": rest[0]}
    if width is not None and any(m.shape[1 if role != "o" else 0] != width for role, m in roles.items()):
        return {}
    return {role: m.view(role, "attention output" if role == "o" else "attention input") for role, m in roles.items()}


def _describe(lists: dict[str, nn.ModuleList], without: Mapping[str, int]) -> str:
    """What a model holds instead, for the error of an unknown layout: of each list one block without an MLP."""
    if not lists:
        return "no list of modules at all"
    name, blocks = max(lists.items(), key=lambda item: len(item[1]))
    if not len(blocks):
        return f"an empty list {name}"
    odd = blocks[without[name]]
    leaves = [f"{n} {tuple(p.shape)}" for n, p in odd.named_parameters() if p.ndim > 1]
    return f"{name}: {len(blocks)} x {type(odd).__name__}, {name}.{without[name]} with {', '.join(leaves)}"
