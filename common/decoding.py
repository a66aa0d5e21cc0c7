"""Answers written in full on public records: costly, so few of them, and only before and after a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from common.adapter import Vector, write_vector
from common.config import TaskKind
from common.examples import Examples, IntArray, Ragged
from common.models import AdaptedModel
from common.text_metrics import bleu, bleu_sums, chrf, chrf_sums, exact, rouge_l

_MICRO_BATCH = 16


def decoded_scores(
    model: AdaptedModel, vector: Vector, examples: Examples, indices: IntArray, longest: int
) -> dict[str, float]:
    """Exact match, ROUGE-L, chrF and BLEU of greedy answers of at most `longest` tokens; empty where the task
    writes none."""
    questions, wanted = _questions(model, examples, indices)
    if not questions:
        return {}
    write_vector(model.parameters, model.layout, vector)
    matches = overlap = 0.0
    characters, words = np.zeros(18), np.zeros(10)
    for start in range(0, len(questions), _MICRO_BATCH):
        part = slice(start, start + _MICRO_BATCH)
        for said, true in zip(greedy(model, questions[part], longest), wanted[part], strict=True):
            matches += exact(said, true)
            overlap += rouge_l(said, true)
            characters += chrf_sums(said, true)
            words += bleu_sums(said, true)
    return {
        "exact match": matches / len(questions),
        "ROUGE-L": overlap / len(questions),
        "chrF": chrf(characters.tolist()),
        "BLEU": bleu(words.tolist()),
        "answers written": float(len(questions)),
    }


def _questions(
    model: AdaptedModel, examples: Examples, indices: IntArray
) -> tuple[list[list[int]], list[str]]:
    """What is read and what should be written, of a dialogue its first answer; shortest first."""
    questions, wanted = [], []
    for i in sorted(indices.tolist(), key=lambda i: int(examples.lengths[i])):
        ids = examples.tokens[examples.starts[i] : examples.starts[i + 1]]
        match model.task.kind:
            case TaskKind.CAUSAL_LM if int(examples.target[i][0]) > 1:
                begin, *more = (int(place) for place in examples.target[i])
                question, answer = ids[:begin], ids[begin : more[0] if more else None]
            case TaskKind.SEQ2SEQ if isinstance(examples.target, Ragged):
                question, answer = ids, examples.target[i]
            case _:
                continue
        questions.append(question.tolist())
        wanted.append(_text(model, answer.tolist()))
    return questions, wanted


@torch.no_grad()
def greedy(model: AdaptedModel, questions: Sequence[Sequence[int]], longest: int) -> list[str]:
    """The likeliest next token until the end token, at most `longest` of them, for each question."""
    width = max(map(len, questions))
    reads_all = model.task.kind is TaskKind.SEQ2SEQ
    ids = np.full((len(questions), width), model.pad_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, question in enumerate(questions):
        # What is continued must end where the answer begins; an encoder's padding stands as in training.
        place = slice(0, len(question)) if reads_all else slice(width - len(question), width)
        ids[row, place] = question
        mask[row, place] = 1
    peft: Any = model.peft
    written = peft.generate(
        input_ids=torch.from_numpy(ids).to(model.device),
        attention_mask=torch.from_numpy(mask).to(model.device),
        max_new_tokens=longest,
        do_sample=False,
        num_beams=1,
        pad_token_id=model.pad_id,
    )
    answers = written[:, 1 if reads_all else width :]  # a decoder begins with a token that may be an end, too
    return [_text(model, row) for row in answers.tolist()]


def _text(model: AdaptedModel, answer: Sequence[int]) -> str:
    """Up to its end: that may be no special token, nor the padding after it."""
    ends = model.ends
    end = next((i for i, token in enumerate(answer) if token in ends), len(answer))
    return str(model.tokenizer.decode(answer[:end], skip_special_tokens=True))
