"""Attention of the decoder: dense, gated, sparse and gated sparse, behind one module.

Which keys a query reads is one question, how they are attended another, and `keys` holds the seam between them:
`Reads` and `Selection` say which, `Attended` is what comes back.

    which   keys         all that a query sees of its document, or of a window of it
            selection    of these the tokens or the blocks that the indexer scores highest (`indexer`, `topk`)
    how     oracle       all scores at once: the definition of correct, and the fastest for short windows
            streamed     online softmax over tiles of queries and blocks of keys (`tiles`), memory linear in T
            kernels      selected blocks on TPUs, in Pallas; `fused` says which kernel serves which devices
            cache        few queries against the keys that decoding keeps
            kinds        functions of your own, by `attention_kind`

`oracle.attend`, `streamed.attend` and `kernels.attend` answer one call, (q, k, v, Reads, Selection) → Attended: no
probabilities come back. `module` picks one by the config and the devices; what needs probabilities computes them again
in `measure`, in evaluation alone.
"""

from models.attention.keys import Attended, Reads, visible_keys
from models.attention.kinds import attention_kind
from models.attention.module import Attention, RunningVariance

__all__ = ["Attended", "Attention", "Reads", "RunningVariance", "attention_kind", "visible_keys"]
