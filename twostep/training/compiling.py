"""Compiling the blocks of which networks consist, while they train.

A network of a few hundred layers takes minutes to compile as one graph. Its blocks are alike: each
kind is compiled once for every shape that it meets, in seconds, and what lies between them is
little.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

_SHAPES = 128
"""Shapes of one kind of block that are compiled; torch gives up after eight."""


REPEATED = (
    "TransformerBlock",
    "Resnet",
    "TinyBlock",
    "BasicTransformerBlock",
    "ResnetBlock2D",
    "AutoencoderTinyBlock",
)
"""The blocks of which UNets, ControlNets and autoencoders consist, by the names of their class.

Those of the lean networks come first, then those of diffusers.
"""


def compile_blocks(network: nn.Module, kinds: Collection[str]) -> int:
    """Let the blocks of a network be compiled when they are first called; return how many.

    They keep their weights and their names.

    Args:
        network: changed in place.
        kinds: names of the blocks' classes.
    """
    torch._dynamo.config.recompile_limit = max(_SHAPES, torch._dynamo.config.recompile_limit)
    # Several processes exchange gradients after every block anyway: none is to be cut for that.
    torch._dynamo.config.optimize_ddp = False
    blocks = [module for module in network.modules() if type(module).__name__ in kinds]
    for block in blocks:
        block.compile(dynamic=False)
    return len(blocks)


def run_as_written(network: nn.Module) -> None:
    """Let the blocks of a network, in place, never be compiled again."""
    for module in network.modules():
        module._compiled_call_impl = None


def uncompiled() -> AbstractContextManager[None]:
    """Let everything that is compiled run as it is for the block, as a context manager.

    Pictures are drawn in batches of other sizes than those of training, and each would be compiled
    anew.
    """
    if "torch._dynamo" not in sys.modules:
        # Nothing was compiled, and to load what compiles takes seconds.
        return nullcontext()
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance
