"""How right a text is, next to the one that was wanted. Every figure is a mean of, or made from, sums."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

from sacrebleu.metrics.bleu import BLEU

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_CHRF_ORDER = 6  # character n-grams up to this length
_CHRF_BETA = 2  # recall weighs twice as much as precision
_BLEU = BLEU(
    effective_order=True
)  # counts the same as of a corpus; only its unused score of one text differs
_BLEU_ORDER = 4

Entity = tuple[str, int, int]  # type, first word, last word


def normalised(text: str) -> str:
    """As SQuAD compares answers (Rajpurkar et al. 2016): lower case, no punctuation, no articles."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact(found: str, wanted: str) -> float:
    return float(normalised(found) == normalised(wanted))


def word_f1(found: str, wanted: str) -> float:
    """SQuAD's F1: the words that both have, with repeats."""
    ours, theirs = normalised(found).split(), normalised(wanted).split()
    if not ours or not theirs:
        return float(ours == theirs)
    return f1(sum((Counter(ours) & Counter(theirs)).values()), len(ours), len(theirs))


def rouge_l(found: str, wanted: str) -> float:
    """F of the longest common subsequence of words (Lin 2004), as the package rouge-score has it."""
    ours, theirs = (re.findall(r"[a-z0-9]+", text.lower()) for text in (found, wanted))
    if not ours or not theirs:
        return 0.0
    row = [0] * (len(theirs) + 1)
    for word in ours:
        before = 0  # row[j - 1] as it was for the word before
        for j, other in enumerate(theirs, start=1):
            kept = row[j]
            row[j] = before + 1 if word == other else max(row[j], row[j - 1])
            before = kept
    return f1(row[-1], len(ours), len(theirs))


def chrf_sums(found: str, wanted: str) -> list[int]:
    """For n = 1 … 6: character n-grams found, wanted, and in both. Sums over records make `chrf`."""
    ours, theirs = ("".join(text.split()) for text in (found, wanted))
    sums: list[int] = []
    for n in range(1, _CHRF_ORDER + 1):
        a, b = (Counter(t[i : i + n] for i in range(len(t) - n + 1)) for t in (ours, theirs))
        # As sacrebleu has it: where nothing of this length was wanted, nothing counts as found.
        sums += [a.total() if b else 0, b.total(), (a & b).total()]
    return sums


def chrf(sums: Sequence[float]) -> float:
    """chrF2 (Popović 2015) of a corpus, 0 to 100, from the sums of its records."""
    orders = [(f, w, b) for f, w, b in zip(sums[0::3], sums[1::3], sums[2::3], strict=True) if f and w]
    if not orders:
        return 0.0
    precision = sum(both / found for found, _, both in orders) / len(orders)
    recall = sum(both / wanted for _, wanted, both in orders) / len(orders)
    if not precision + recall:
        return 0.0
    factor = _CHRF_BETA**2
    return 100 * (1 + factor) * precision * recall / (factor * precision + recall)


def bleu_sums(found: str, wanted: str) -> list[int]:
    """For n = 1 … 4: n-grams in both, then those found; words found, words wanted. Sums over records make
    `bleu`."""
    one = _BLEU.sentence_score(found, [wanted])
    return [int(n) for n in (*one.counts, *one.totals, one.sys_len, one.ref_len)]


def bleu(sums: Sequence[float]) -> float:
    """BLEU (Papineni et al. 2002) of a corpus, 0 to 100, from the sums of its records; tokens and smoothing
    are sacrebleu's."""
    whole = [int(n) for n in sums]
    score: float = BLEU.compute_bleu(
        correct=whole[:_BLEU_ORDER],
        total=whole[_BLEU_ORDER : 2 * _BLEU_ORDER],
        sys_len=whole[-2],
        ref_len=whole[-1],
        smooth_method="exp",
    ).score
    return score


def entities(tags: Sequence[str]) -> set[Entity]:
    """The entities that BIO tags name. An I that continues nothing begins an entity, as in CoNLL's script."""
    found: set[Entity] = set()
    kind, first = "", 0
    for i, tag in enumerate([*tags, "O"]):
        mark, _, name = tag.partition("-")
        continues = mark == "I" and name == kind
        if kind and not continues:
            found.add((kind, first, i - 1))
            kind = ""
        if mark in ("B", "I") and not continues:
            kind, first = name, i
    return found


def f1(both: float, found: float, wanted: float) -> float:
    """F1 from sums: what is right, what was said, what was wanted."""
    return 2 * both / (found + wanted) if both else 0.0
