"""Tasks: a record's loss is its own, prompts bear none, and batches lose nothing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from client.training import per_sample_gradients
from common.adapter import write_vector
from common.config import TaskKind
from common.errors import ConfigError, DataError
from common.models import AdaptedModel
from common.tables import Table
from common.tasks import Batch, Examples, by_length, collate, make_task
from tests.conftest import KINDS, LABELS, World, moved

Worlds = Callable[..., World]


def table(text: list[str], label: list[str] | None = None, prompt: list[str] | None = None) -> Table:
    def column(values: list[str] | None) -> tuple[str, ...] | None:
        return None if values is None else tuple(values)

    return Table("test", tuple(text), column(label), column(prompt), None, tuple(range(1, len(text) + 1)))


def tokens(examples: Examples, index: int) -> list[int]:
    return examples.tokens[examples.starts[index] : examples.starts[index + 1]].tolist()


def first_gradient(model: AdaptedModel, examples: Examples, indices: list[int]) -> torch.Tensor:
    """The per-sample gradient of the first of `indices`, in a batch of all of them."""
    write_vector(model.parameters, model.layout, moved(model))
    with model.training(model.parameters), per_sample_gradients(model.module):
        batch = collate(examples, indices, model.pad_id, model.device)
        model.task.record_losses(model.logits(batch.inputs), batch).sum().backward()
        samples = [p.grad_sample for p in model.parameters.values()]
        for p in model.parameters.values():
            p.grad_sample = None
    assert all(len(g) == len(indices) for g in samples)
    return torch.cat([g[0].reshape(-1) for g in samples])


@pytest.mark.parametrize("kind", KINDS)
def test_a_record_s_gradient_does_not_depend_on_the_others(world: Worlds, kind: str) -> None:
    """Else no clipping bounds what one record does."""
    this = world(kind, "lora")
    longest = int(this.examples.lengths.argmax())
    alone = first_gradient(this.model, this.examples, [0])
    assert float(alone.norm()) > 0
    for others in ([1], [longest], [2, 3, longest]):
        beside = first_gradient(this.model, this.examples, [0, *others])
        assert float((beside - alone).norm()) <= 1e-5 * float(alone.norm()), others


def test_the_batch_s_token_mean_would_be_caught(world: Worlds, monkeypatch: pytest.MonkeyPatch) -> None:
    this = world("gpt2-causal", "lora")
    task = type(this.model.task)

    def token_mean(values: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        return (values * own).sum(dim=1) / own.sum()

    monkeypatch.setattr(task, "_own_mean", staticmethod(token_mean))
    alone = first_gradient(this.model, this.examples, [0])
    beside = first_gradient(this.model, this.examples, [0, 1])
    assert float((beside - alone).norm()) > 0.1 * float(alone.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_answers_are_those_of_one_record_at_a_time(world: Worlds, kind: str) -> None:
    this = world(kind)
    model = this.model
    write_vector(model.parameters, model.layout, moved(model))

    def of(indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        batch = collate(this.examples, indices, model.pad_id, model.device)
        with torch.no_grad():
            logits = model.logits(batch.inputs)
            return model.task.record_losses(logits, batch), model.task.correct(logits, batch)

    losses, correct = of(list(range(12)))
    assert losses.shape == correct.shape == (12,)
    for i in range(12):
        loss, right = of([i])
        assert float(losses[i]) == pytest.approx(float(loss[0]), abs=1e-5)
        assert float(correct[i]) == pytest.approx(float(right[0]))


def test_a_causal_loss_is_the_mean_over_the_answer(world: Worlds) -> None:
    """Against a loop over tokens: what follows the prompt counts, the end token too, the prompt not."""
    this = world("gpt2-causal")
    task, examples = this.model.task, this.examples
    rng = torch.Generator().manual_seed(0)
    batch = collate(examples, [0, 5, 9], this.model.pad_id, torch.device("cpu"))
    logits = torch.randn(*batch.inputs["input_ids"].shape, 52, generator=rng)
    losses, correct = task.record_losses(logits, batch), task.correct(logits, batch)
    for row, index in enumerate([0, 5, 9]):
        ids, prompt = tokens(examples, index), int(examples.target[index])
        assert ids[0] == 4 and ids[-1] == 5  # begin, end
        assert prompt == 3  # begin and "is this"
        expected, hits = [], []
        for position in range(prompt, len(ids)):
            scores = logits[row, position - 1].log_softmax(dim=-1)
            expected.append(-float(scores[ids[position]]))
            hits.append(float(scores.argmax() == ids[position]))
        assert float(losses[row]) == pytest.approx(float(np.mean(expected)), rel=1e-5)
        assert float(correct[row]) == pytest.approx(float(np.mean(hits)))


def test_the_prompt_bears_no_loss(world: Worlds) -> None:
    this = world("gpt2-causal")
    batch = collate(this.examples, [0], this.model.pad_id, torch.device("cpu"))
    logits = torch.zeros(*batch.inputs["input_ids"].shape, 52)
    before = this.model.task.record_losses(logits, batch)
    logits[0, : int(batch.target[0]) - 1] = torch.randn(int(batch.target[0]) - 1, 52)
    assert torch.equal(this.model.task.record_losses(logits, batch), before)
    logits[0, int(batch.target[0]) - 1, 0] = 5
    assert not torch.equal(this.model.task.record_losses(logits, batch), before)


def test_without_a_prompt_all_but_the_first_token_count(world: Worlds) -> None:
    this = world("llama-causal")
    assert (this.examples.target == 1).all()
    encoded = this.model.task.encode(table(["w1 w2"]), this.model.tokenizer, 32)
    assert len(tokens(encoded, 0)) == 4  # begin, two words, end


def test_a_long_prompt_keeps_its_end_and_leaves_room_for_the_answer(world: Worlds) -> None:
    this = world("gpt2-causal")
    words = [f"w{i}" for i in range(30)]
    encode = this.model.task.encode
    vocabulary = this.model.tokenizer.get_vocab()
    for length in (8, 9, 16):
        examples = encode(table(["w5 " * 40], prompt=[" ".join(words)]), this.model.tokenizer, length)
        ids, prompt = tokens(examples, 0), int(examples.target[0])
        assert len(ids) == length
        kept = words[-(length // 2 - 1) :]
        assert ids[1:prompt] == [vocabulary[w] for w in kept]
        assert set(ids[prompt:]) == {vocabulary["w5"]}
    short = encode(table(["w5"], prompt=["w1"]), this.model.tokenizer, 16)
    assert tokens(short, 0) == [vocabulary[t] for t in ("[BOS]", "w1", "w5", "[EOS]")]


@pytest.mark.parametrize("length", [8, 9, 16])
def test_half_of_the_length_is_the_answer_s(world: Worlds, length: int) -> None:
    this = world("gpt2-causal")
    prompt, text = " ".join(["w1"] * 30), " ".join(["w2"] * 30)
    examples = this.model.task.encode(table([text], prompt=[prompt]), this.model.tokenizer, length)
    assert 2 * (len(tokens(examples, 0)) - int(examples.target[0])) >= length


def test_a_classified_pair_is_prompt_then_text(world: Worlds) -> None:
    this = world("bert-default")
    rows = table(["w1", "w2"], ["good", "bad"], ["w8", "w9"])
    examples = this.model.task.encode(rows, this.model.tokenizer, 32)
    vocabulary = this.model.tokenizer.get_vocab()
    assert tokens(examples, 0) == [vocabulary[t] for t in ("[CLS]", "w8", "[SEP]", "w1", "[SEP]")]
    assert examples.target.tolist() == [LABELS.index("good"), LABELS.index("bad")]


def test_long_texts_are_cut(world: Worlds) -> None:
    this = world("bert-default")
    rows = table([" ".join(["w1"] * 100)], ["good"])
    assert this.model.task.encode(rows, this.model.tokenizer, 10).lengths.tolist() == [10]


def test_an_unknown_label_names_its_row(world: Worlds) -> None:
    this = world("bert-default")
    with pytest.raises(DataError, match="ugly"):
        this.model.task.encode(table(["w1", "w2"], ["good", "ugly"]), this.model.tokenizer, 10)


RAGGED = Examples(
    np.arange(10, dtype=np.int32), np.array([0, 3, 3, 4, 10]), np.array([7, 8, 9, 10])
)  # lengths 3, 0, 1, 6


def test_collate_pads_on_the_right_to_the_longest_asked_for() -> None:
    batch = collate(RAGGED, np.array([2, 0]), 99, torch.device("cpu"))
    assert batch.inputs["input_ids"].tolist() == [[3, 99, 99], [0, 1, 2]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert batch.target.tolist() == [9, 7] and len(batch) == 2
    assert collate(RAGGED, [1], 99, torch.device("cpu")).inputs["input_ids"].tolist() == [[99]]


def test_by_length_gives_every_record_once_in_like_sizes() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 50, 200)
    examples = Examples(
        np.zeros(lengths.sum(), np.int32), np.concatenate([[0], np.cumsum(lengths)]), np.zeros(200, np.int64)
    )
    indices = rng.permutation(200)[:77]
    parts = by_length(examples, indices, 10)
    assert [len(p) for p in parts] == [10] * 7 + [7]
    assert sorted(np.concatenate(parts).tolist()) == sorted(indices.tolist())
    assert (np.diff(lengths[np.concatenate(parts)]) >= 0).all()
    assert by_length(examples, indices[:0], 10) == []


def test_tasks_say_what_they_need() -> None:
    with pytest.raises(ConfigError, match="at least two labels"):
        make_task(TaskKind.SEQUENCE_CLASSIFICATION, ["only"])
    assert make_task(TaskKind.CAUSAL_LM, []).labels == ()


def test_a_causal_task_needs_an_end_token(world: Worlds) -> None:
    with pytest.raises(DataError, match="end-of-sequence"):
        make_task(TaskKind.CAUSAL_LM, []).encode(table(["w1"]), world("bert-mean").model.tokenizer, 8)


def test_a_record_without_an_answer_has_no_loss_and_no_gradient(world: Worlds) -> None:
    """Not NaN: one such record must not stop a site."""
    task = world("gpt2-causal").model.task
    batch = Batch(
        {"input_ids": torch.tensor([[4, 6, 6]]), "attention_mask": torch.ones(1, 3, dtype=torch.int64)},
        torch.tensor([3]),
    )
    logits = torch.zeros(1, 3, 52, requires_grad=True)
    loss = task.record_losses(logits, batch)
    loss.sum().backward()
    assert loss.tolist() == [0] and logits.grad is not None and float(logits.grad.abs().sum()) == 0
