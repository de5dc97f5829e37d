"""A document as tokens: what a tokenizer makes, and blocks are cut from."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, eq=False)
class Encoded:
    """A document as tokens.

    Attributes:
        document_id: as in Document.
        source: as in Document.
        ids: token ids, int32 [tokens], at least one.
        mask: which tokens count, bool [tokens], one at least; None: all.
    """

    document_id: str
    source: str
    ids: npt.NDArray[np.int32]
    mask: npt.NDArray[np.bool_] | None = None
