"""Block selection on TPUs, as Pallas kernels: `attend` gives what `oracle.attend` gives, with its gradients, and
`extend` what `cache.attend` gives.

A tile of queries reads the blocks of its list, for all heads at once; lists are known before a kernel starts, so that
blocks are on their way while those before them are worked on. Logits stand with their keys below each other and their
queries side by side: maxima and sums over keys are elementwise, and what belongs to a query fills the lanes of a TPU.

    listed     the seam: arrays of the model, lists, and the gradient's rule
    scores     the lists, from the largest score of every block
    forward    attention over the lists, and the divergence that trains the indexer
    backward   of queries, tile by tile over its list; of keys, block by block over the tiles that list it
    pieces     what these compute of a tile and a block, and how arrays are cut into both

Axes beside the legend's, as in `models.attention.selection` and `.tiles`: C queries of a tile and K keys of a block
(W tokens both), P tiles of a row, A entries of a list, M heads side by side; N = H/G · C, the queries of a group.
"""

from models.attention.kernels.listed import attend, extend, refusal, refusal_of_extension

__all__ = ["attend", "extend", "refusal", "refusal_of_extension"]
