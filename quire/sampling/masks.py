"""What grammars let the rows of a step have: a bit for each token, which the host makes anew for each step."""

import functools

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding

from quire.grammar.matchers import Allowed
from quire.kernels.dispatch import op
from quire.parallel.vocabulary import Vocabulary
from quire.sampling import native
from quire.sampling.slots import upload


class Masks:
    """Those of one step at a time.

    Attributes:
        allowed: they, and the rows that have one.
        addresses: [most rows] int64 on the host, where each row's words are; 0 for none. They stay where they are, so
            that a recorded step serves masks that are made later.
    """

    def __init__(self, most_rows: int):
        self.allowed = Allowed([], np.zeros((0, 0), np.int32), {})
        self.addresses = torch.zeros(most_rows, dtype=torch.int64)

    def put(self, allowed: Allowed) -> None:
        """The next step's; their words stay as they are until then."""
        words, addresses = allowed.words, self.addresses.numpy()
        addresses[:] = 0
        addresses[allowed.rows] = words.ctypes.data + words.strides[0] * np.arange(len(words))
        self.allowed = allowed


@op
def exclude(logits: Tensor, masks: Masks, vocabulary: Vocabulary) -> None:
    """Exclude from `logits` [R, own] float32 what rows may not have. A NaN stays, and infinity turns to one."""
    own, device, words = vocabulary.own, logits.device, masks.allowed.words.view(np.uint8)
    first = own.start // 8
    part = upload(torch.from_numpy(words[:, first : -(-own.stop // 8)]), torch.int32, device)
    bars, skipped = embedding(part, _bars(device)).flatten(1), own.start - first * 8
    rows = upload(masks.allowed.rows, torch.int64, device)
    logits.index_add_(0, rows, bars[:, skipped : skipped + len(own)])


@exclude.on("cpu", torch.float32)
def exclude_native(logits: Tensor, masks: Masks, vocabulary: Vocabulary) -> None:
    """The compiled kernel, where there is one."""
    if not native.exclude(logits, masks.addresses, vocabulary.own):
        exclude.reference(logits, masks, vocabulary)


@functools.cache
def _bars(device: torch.device) -> Tensor:
    """[256, 8] float32: what to add to the logits of eight tokens, by their bits."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return torch.from_numpy(np.where(bits == 1, 0.0, -np.inf)).to(device, torch.float32)
