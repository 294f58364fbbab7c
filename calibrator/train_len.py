"""The length a model was trained at: from a table of published families, or measured."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from torch import Tensor

from calibrator.evaluation.perplexity import tail_losses, take_ends
from calibrator.model import StockModel
from calibrator.text import Text
from converter.errors import TextError
from converter.reporting import Reporter

SHORTEST, LONGEST = 128, 16 << 10
PLACES, TAIL = 64, 64

# Training lengths as the papers, model cards and training configurations of these families state them.
FAMILIES = (
    (r"demo|demo:mamba2?", 256),
    (r"demo:recall", 512),
    (r"state-spaces/(mamba2?|transformerpp)-.*", 2048),
    (r"tiiuae/falcon-mamba-.*", 8192),
    (r"Zyphra/Zamba2?-.*", 4096),
    (r"ibm-(ai-platform|fms)/Bamba-.*", 4096),
    (r"mistralai/Mamba-Codestral-.*", 256 * 1024),
    (r"ai21labs/(AI21-)?Jamba-.*", 256 * 1024),
)


def find_train_len(
    stock: StockModel, name: str, kind: str, texts: Sequence[Text], reporter: Reporter
) -> tuple[int, str]:
    """A model's training length in tokens, and whether it is from the ``family table`` or ``measured``."""
    if known := look_up_train_len(name, kind):
        return known, "family table"
    with stock.recurrence:
        return measure_train_len(stock, texts, reporter), "measured"


def look_up_train_len(name: str, kind: str) -> int | None:
    """Training length in tokens of a published model, else None: the name of a local folder tells nothing.

    Args:
        name, kind: of the source, as its record in the manifest has them.
    """
    if kind == "folder":
        return None
    return next((length for pattern, length in FAMILIES if re.fullmatch(pattern, name)), None)


def measure_train_len(stock: StockModel, texts: Sequence[Text], reporter: Reporter) -> int:
    """The length of context past which the unscaled model's loss stops falling, a power of two.

    The last predictions of windows are compared that end at the same places and start earlier and earlier, so that
    the same tokens are predicted after every length. A fall of less than one standard error counts as none.

    Args:
        stock: its recurrences are open.

    Raises:
        TextError: the longest document is too short for that.
    """
    text = Text("", tuple(document for text in texts for document in text.documents))
    room = max(map(len, text.documents)) // 4
    if room < 2 * SHORTEST:
        raise TextError(
            f"The longest document has {4 * room} tokens; {8 * SHORTEST} are needed to measure that length.",
            "Give a longer text with --data, or the length with --train-len.",
        )
    reporter.line("The training length is not known, so it is measured; --train-len saves that.")
    longest = min(LONGEST, 1 << int(math.log2(room)))
    windows = take_ends(text, longest, PLACES)
    best: Tensor | None = None
    length = SHORTEST
    while length <= longest:
        with reporter.task(f"Windows of {length} tokens", 1) as task:
            losses = tail_losses(stock, windows[:, -length:], TAIL)
            task.advance()
        if best is not None:
            gain = best - losses
            if float(gain.mean()) < float(gain.std()) / math.sqrt(PLACES):
                break
        best = losses
        length *= 2
    return length // 2
