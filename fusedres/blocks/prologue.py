"""Recipe `prologue`: as `separate`, and no activation is stored that the next convolution can make as it reads.

A plain 3x3 or 1x1 convolution behind a BN and ReLU applies both in its prologue, where a backend has one, and so does
its weight gradient; where that has none, the activation is made again for it. BN's backward is part of a 3x3
convolution's input gradient where a backend has that. A basic block keeps, besides its input x, the raw outputs c1 and
c2 and one mask bit per element of y, where `separate` keeps a1 too. What no backend makes is stored; only a compiled
graph, which has to know what it keeps before it knows who serves, makes it again.
"""

from __future__ import annotations

from functools import partial

from fusedres.blocks import separate

KEEPS_ACTIVATIONS = True  # those that are stored
MAKES_ACTIVATIONS = True

forward = partial(separate.forward, in_prologues=True)
backward = partial(separate.backward, in_prologues=True)
