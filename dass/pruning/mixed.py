"""What the mixer of a block gave for each batch, so that it need not run again for the pruned MLP."""

from typing import Any

import torch
from torch import Tensor

from dass.errors import DassError
from dass.forward import replaced_forward
from dass.pruning.blocks import Block
from dass.pruning.call import Call
from dass.pruning.parked import Parked

TRIED = 4
"""Tokens on which is seen how a block computes; behind its mixer nothing mixes them."""


class Mixed:
    """The output m of a block's mixer for each batch, to be replayed beside x that enters the block.

    What comes behind the mixer is mostly computed from x + m alone. There x + m takes the place of x, and the mixer is
    replayed as one that gives 0: half the memory, and the same bits.
    """

    def __init__(self, batches: Parked, calls: list[list[Call]], index: int, block: Block, may_add: bool) -> None:
        """Nothing is kept yet.

        Args:
            batches, calls: of the activations.
            index: of the block.
            may_add: whether x may go, as nobody changes the mixer.
        """
        self._batches, self._calls, self._index, self._block = batches, calls, index, block
        self._adds = None if may_add else False
        """Whether x + m stands for x; None before the first batch."""
        self._added = 0  # in so many of the first sequences; batches may be cut
        self._nothing: Any = None  # what a mixer returns that adds nothing
        self._beside: Parked | None = None  # each m, where it is kept

    def __getitem__(self, i: int) -> Any:
        """What the mixer is to return for batch `i`; None where it has to run."""
        if self._adds:
            return self._nothing if sum(shape[0] for shape in self._batches.shapes[:i]) < self._added else None
        return self._beside[i] if self._beside is not None and i < len(self._beside) else None

    def keep(self, i: int, output: Any) -> None:
        """Keep what the mixer returned for batch `i`, behind those before it; None: nothing is known."""
        if output is None or self[i] is not None:
            return
        m = output[0] if isinstance(output, tuple) else output
        if self._adds is None:
            self._adds = computes_from_sum(self._block, self._calls[i][self._index], self._batches[i], output)
            self._nothing = _returned(m.new_zeros(()), output) if self._adds else None
        if self._adds:
            hidden = self._batches[i]
            self._batches[i] = hidden.to(m.device) + m
            self._added += len(hidden)
        else:
            self._beside = self._batches.beside(()) if self._beside is None else self._beside
            self._beside.append(output)

    def drop(self, i: int) -> None:
        """Batch `i` does not need it any more."""
        if self._beside:
            self._beside[i] = None

    def cut(self) -> None:
        """Batches are cut: what is kept beside them would not fit any more."""
        if self._beside is not None:
            self._beside.clear()

    def forget(self) -> None:
        """The mixer was changed, and has to run again.

        Raises:
            DassError: it cannot, as what entered the block is no longer there.
        """
        if self._added:
            raise DassError(
                f"The attention of {self._block.name} was changed, but what it reads is not among the needs: name it "
                f"there, or walk with fixed_mixers=False."
            )
        self.cut()


def computes_from_sum(block: Block, call: Call, hidden: Tensor, output: Any) -> bool:
    """Whether a block computes from x + m alone what comes behind its mixer, tried bit by bit on a few tokens.

    Args:
        hidden: like what enters it, `(batch, seq_len, d)`.
        output: like what its mixer returns.
    """
    given = output[0] if isinstance(output, tuple) else output
    if block.mixer is None or not isinstance(given, Tensor) or given.shape != hidden.shape:
        return False
    # numbers of our own: those at hand may be zeros, as of padding, which any block adds alike
    width = hidden.shape[-1]
    numbers = torch.arange(2 * TRIED * width, device=given.device).sin().view(2, 1, TRIED, width)
    x, m = numbers[0].to(hidden.dtype), numbers[1].to(given.dtype)
    if (x + m).dtype != x.dtype:
        return False
    found = []
    for entering, added in ((x, m), (x + m, m.new_zeros(()))):
        returned = _returned(added, output)
        try:
            with replaced_forward(block.mixer, lambda *_, returned=returned, **__: returned):
                found.append(call(block, entering))
        except torch.OutOfMemoryError:
            raise  # the batches are too large
        except (
            RuntimeError,
            ValueError,
            TypeError,
            IndexError,
        ):  # what follows takes whole sequences, or more than a number
            return False
    return torch.equal(*found)


def _returned(m: Tensor, output: Any) -> Any:
    """A tensor as what a mixer returns, like an output of it."""
    return (m, *output[1:]) if isinstance(output, tuple) else m
