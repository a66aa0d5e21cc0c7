"""Metrics of texts and tags, against what the usual packages say of the same texts (tests/vectors)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sacrebleu.metrics import BLEU, CHRF

from common.text_metrics import bleu, bleu_sums, chrf, chrf_sums, entities, exact, f1, rouge_l, word_f1

VECTORS: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "vectors" / "text_metrics.json").read_text("utf-8")
)


def test_entities_are_seqeval_s() -> None:
    for case in VECTORS["tags"]:
        assert sorted(map(list, entities(case["tags"]))) == case["entities"], case["tags"]


def test_entity_f1_from_sums_is_seqeval_s() -> None:
    corpus = VECTORS["tagged_corpus"]
    both = said = wanted = 0
    for ours, theirs in zip(corpus["said"], corpus["wanted"], strict=True):
        a, b = entities(ours), entities(theirs)
        both, said, wanted = both + len(a & b), said + len(a), wanted + len(b)
    assert f1(both, said, wanted) == pytest.approx(corpus["f1"])
    assert both / said == pytest.approx(corpus["precision"])
    assert both / wanted == pytest.approx(corpus["recall"])


def test_rouge_l_is_rouge_score_s() -> None:
    for case in VECTORS["texts"]:
        assert rouge_l(case["said"], case["wanted"]) == pytest.approx(case["rouge_l"], abs=1e-9), case


def test_chrf_is_sacrebleu_s() -> None:
    total = np.zeros(18)
    for case in VECTORS["texts"]:
        sums = chrf_sums(case["said"], case["wanted"])
        total += sums
        assert chrf(sums) == pytest.approx(case["chrf"], abs=1e-6), case
    assert chrf(total.tolist()) == pytest.approx(VECTORS["chrf_of_all"], abs=1e-6)


@pytest.mark.parametrize("first", [0, 1, 40, 79])
def test_sums_make_sacrebleu_s_bleu_and_chrf_of_a_corpus(first: int) -> None:
    """Any part of the texts, added up record by record, is what sacrebleu says of that corpus."""
    said, wanted = ([case[key] for case in VECTORS["texts"][first:]] for key in ("said", "wanted"))
    words = np.sum([bleu_sums(a, b) for a, b in zip(said, wanted, strict=True)], axis=0)
    letters = np.sum([chrf_sums(a, b) for a, b in zip(said, wanted, strict=True)], axis=0)
    assert bleu(words.tolist()) == pytest.approx(BLEU().corpus_score(said, [wanted]).score, abs=1e-9)
    assert chrf(letters.tolist()) == pytest.approx(CHRF().corpus_score(said, [wanted]).score, abs=1e-6)


def test_bleu_of_what_says_nothing() -> None:
    assert bleu(bleu_sums("", "")) == bleu(bleu_sums("", "a b")) == bleu(bleu_sums("a b", "")) == 0.0
    assert bleu(bleu_sums("the cat sat on it", "the cat sat on it")) == pytest.approx(100)


@pytest.mark.parametrize(
    ("said", "wanted", "match", "overlap"),
    [
        ("The Denver Broncos", "denver broncos.", 1, 1),
        ("Broncos", "Denver Broncos", 0, 2 / 3),
        ("", "", 1, 1),
        ("the", "a", 1, 1),  # articles alone: nothing is left of either
        ("the", "x", 0, 0),
        ("x x y", "x y y", 0, 2 / 3),
    ],
)
def test_answers_are_compared_as_squad_does(said: str, wanted: str, match: float, overlap: float) -> None:
    assert exact(said, wanted) == match
    assert word_f1(said, wanted) == pytest.approx(overlap)
