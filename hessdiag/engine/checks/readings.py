"""Which reading of a language model's labels gives the loss that the model itself returned."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from hessdiag.criteria import IGNORE_INDEX, is_index

SAME_LOSS = 1e-3  # relative: half-precision models are off by that, another reading by far more

Reading = Literal["as is", "shifted", "masked by attention_mask", "shifted, masked by attention_mask", "other"]


def reading_of(logits: Tensor, labels: Tensor, loss: float, attention_mask: Tensor | None = None) -> Reading:
    """Which reading of the labels gives the loss that a language model itself returned.

    Args:
        logits: (batch, tokens, words).
        labels: (batch, tokens), -100 where a position does not count.
        loss: the model's own, a mean over the tokens that count.
        attention_mask: (batch, tokens), 1 where there is a token.

    Returns:
        "as is": position t is compared with label t (criterion="cross_entropy"). "shifted": with label t + 1
        (criterion="causal_lm"). "masked by attention_mask", alone or with the shift: padding does not count,
        though its labels are not -100. "other": none of these.
    """
    if logits.dim() != 3 or labels.shape != logits.shape[:2] or not is_index(labels):
        return "other"
    logits, labels = logits.detach().double(), labels.long()
    masked = None
    if attention_mask is not None and attention_mask.shape == labels.shape:
        masked = labels.masked_fill(attention_mask == 0, IGNORE_INDEX)
    readings: list[tuple[Reading, Tensor | None, bool]] = [
        ("as is", labels, False),
        ("shifted", labels, True),
        ("masked by attention_mask", masked, False),
        ("shifted, masked by attention_mask", masked, True),
    ]
    off: dict[Reading, float] = {}
    for name, some, moved in readings:
        if some is None:
            continue
        z, y = (logits[:, :-1], some[:, 1:]) if moved else (logits, some)
        if bool((y != IGNORE_INDEX).any()):
            mean = F.cross_entropy(z.reshape(-1, z.shape[-1]), y.reshape(-1), ignore_index=IGNORE_INDEX)
            off[name] = abs(float(mean) - loss)
    limit = SAME_LOSS * max(abs(loss), SAME_LOSS)
    best = min(off, key=lambda name: off[name], default=None)  # of equals the first
    return best if best is not None and off[best] <= limit else "other"
