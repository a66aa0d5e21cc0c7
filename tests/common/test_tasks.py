"""Tasks: a record's loss is its own, prompts bear none, and batches lose nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertTokenizer

from client.training import per_sample_gradients
from common.adapter import write_vector
from common.config import TaskKind, TaskSection
from common.decoding import greedy
from common.errors import ConfigError, DataError
from common.examples import Ragged
from common.models import AdaptedModel
from common.tables import Table
from common.task_tokens import first_tokens
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
        ids, prompt = tokens(examples, index), int(examples.target[index][0])
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
    logits[0, : int(batch.target[0, 0]) - 1] = torch.randn(int(batch.target[0, 0]) - 1, 52)
    assert torch.equal(this.model.task.record_losses(logits, batch), before)
    logits[0, int(batch.target[0, 0]) - 1, 0] = 5
    assert not torch.equal(this.model.task.record_losses(logits, batch), before)


def test_without_a_prompt_all_but_the_first_token_count(world: Worlds) -> None:
    this = world("llama-causal")
    assert (this.examples.targets(range(160)) == 1).all()
    encoded = this.model.task.encode(table(["w1 w2"]), this.model.tokenizer, 32)
    assert len(tokens(encoded, 0)) == 4  # begin, two words, end


def test_a_long_prompt_keeps_its_end_and_leaves_room_for_the_answer(world: Worlds) -> None:
    this = world("gpt2-causal")
    words = [f"w{i}" for i in range(30)]
    encode = this.model.task.encode
    vocabulary = this.model.tokenizer.get_vocab()
    for length in (8, 9, 16):
        examples = encode(table(["w5 " * 40], prompt=[" ".join(words)]), this.model.tokenizer, length)
        ids, prompt = tokens(examples, 0), int(examples.target[0][0])
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
    assert 2 * (len(tokens(examples, 0)) - int(examples.target[0][0])) >= length


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
    with pytest.raises(DataError, match="row 2, label column: expected one of 2 labels"):
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
        torch.tensor([[3]]),
    )
    logits = torch.zeros(1, 3, 52, requires_grad=True)
    loss = task.record_losses(logits, batch)
    loss.sum().backward()
    assert loss.tolist() == [0] and logits.grad is not None and float(logits.grad.abs().sum()) == 0


# The kinds one by one


def test_a_pair_is_told_apart_in_training_as_in_the_exported_tokenizer(world: Worlds) -> None:
    this = world("bert-pair")
    batch = collate(this.examples, [0, 1], this.model.pad_id, this.model.device)
    encoded = this.model.tokenizer(["is this"], ["w1"], return_tensors="pt")
    one = this.model.task.encode(table(["w1"], ["good"], ["is this"]), this.model.tokenizer, 32)
    alone = collate(one, [0], this.model.pad_id, this.model.device)
    for name, value in encoded.items():
        assert torch.equal(alone.inputs[name], value), name
    assert alone.inputs["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1]]
    longer = batch.inputs["attention_mask"].sum(dim=1)
    assert (batch.inputs["token_type_ids"] <= batch.inputs["attention_mask"]).all() and len(longer) == 2
    # They are read: without them the answer is another.
    write_vector(this.model.parameters, this.model.layout, moved(this.model))
    with torch.no_grad():
        told = this.model.logits(batch.inputs)
        batch.inputs.pop("token_type_ids")
        assert not torch.allclose(told, this.model.logits(batch.inputs))


def test_a_single_text_has_no_token_types(world: Worlds) -> None:
    assert world("bert-default").examples.types is None


@pytest.mark.parametrize("kind", ["bert-default", "bert-several", "bert-tags"])
def test_class_weights_scale_a_record_s_own_loss(world: Worlds, kind: str) -> None:
    """Twice the weight is twice the loss, whatever else is in the batch."""
    this = world(kind)
    task: Any = this.model.task
    batch = collate(this.examples, range(20), this.model.pad_id, torch.device("cpu"))
    with torch.no_grad():
        logits = this.model.logits(batch.inputs)
    plain, count = task.record_losses(logits, batch), len(task.labels)
    even = replace(task, weights=(1.0,) * count).record_losses(logits, batch)
    assert torch.allclose(even, plain)
    heavy = replace(task, weights=(1.0,) * (count - 1) + (3.0,)).record_losses(logits, batch)
    assert (heavy >= plain - 1e-6).all() and (heavy > plain + 1e-3).any() and not (heavy > plain + 1e-3).all()
    part = collate(this.examples, [3], this.model.pad_id, torch.device("cpu"))
    with torch.no_grad():
        alone = replace(task, weights=(1.0,) * (count - 1) + (3.0,)).record_losses(
            this.model.logits(part.inputs), part
        )
    assert float(alone[0]) == pytest.approx(float(heavy[3]), rel=1e-4)


def test_classes_are_scored_apart(world: Worlds) -> None:
    """Macro F1 class by class, in fractions; a class that neither occurs nor is said is left out."""
    rng = np.random.default_rng(0)
    task = make_task(TaskKind.SEQUENCE_CLASSIFICATION, ["a", "b", "c", "d"])
    logits = torch.from_numpy(rng.normal(size=(50, 4)))
    logits[:, 3] = -9
    target = torch.from_numpy(rng.integers(0, 3, 50))
    sums = task.record_sums(logits, Batch({}, target), world("bert-default").model.tokenizer)
    assert sums.shape == (50, 12)
    scores = task.scores(sums.sum(dim=0).double().numpy(), 50)
    pairs = list(zip(target.tolist(), logits.argmax(dim=-1).tolist(), strict=True))
    right = [Fraction(2 * sum(t == s == c for t, s in pairs)) for c in range(3)]
    named = [sum(t == c for t, _ in pairs) + sum(s == c for _, s in pairs) for c in range(3)]
    f1 = sum((r / n for r, n in zip(right, named, strict=True)), Fraction(0)) / 3
    assert scores["accuracy"] == pytest.approx(sum(t == s for t, s in pairs) / 50)
    assert scores["macro F1"] == pytest.approx(float(f1))


def test_numbers_are_scored_on_the_label_s_scale(world: Worlds) -> None:
    task = make_task(TaskKind.REGRESSION, [], TaskSection(kind=TaskKind.REGRESSION, range=(0, 10)))
    rng = np.random.default_rng(1)
    said, true = rng.uniform(-1, 1, (2, 60)).astype(np.float32)
    said += true
    batch = Batch({}, torch.from_numpy(true))
    sums = task.record_sums(torch.from_numpy(said)[:, None], batch, world("bert-number").model.tokenizer)
    scores = task.scores(sums.sum(dim=0).numpy(), 60)
    assert scores["Pearson"] == pytest.approx(float(np.corrcoef(said, true)[0, 1]), abs=1e-6)
    assert scores["mean squared error"] == pytest.approx(float(((said - true) ** 2).mean()) * 25, rel=1e-5)
    assert scores["mean absolute error"] == pytest.approx(float(np.abs(said - true).mean()) * 5, rel=1e-5)
    constant = task.record_sums(torch.zeros(60, 1), batch, world("bert-number").model.tokenizer)
    assert task.scores(constant.sum(dim=0).numpy(), 60)["Pearson"] == 0


def pieces(texts: list[str], tags: list[str], length: int = 32) -> tuple[Examples, Any]:
    """Tags on a tokenizer that cuts words into pieces."""
    vocabulary = {
        t: i for i, t in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "new", "##port", "is", "big"])
    }
    tokenizer = BertTokenizer(vocab=vocabulary)
    task = make_task(TaskKind.TOKEN_CLASSIFICATION, ["O", "B-loc", "I-loc"])
    return task.encode(table(texts, tags), tokenizer, length), task


def test_the_first_piece_of_a_word_bears_its_tag() -> None:
    examples, _ = pieces(["newport is big", "newport newport"], ["B-loc O O", "B-loc I-loc"])
    target = collate(examples, [0, 1], 0, torch.device("cpu")).target
    assert target.tolist() == [[-100, 1, -100, 0, 0, -100], [-100, 1, -100, 2, -100, -100]]


def test_words_cut_off_bear_no_loss() -> None:
    examples, task = pieces(["newport is big"], ["B-loc O O"], length=4)
    batch = collate(examples, [0], 0, torch.device("cpu"))
    assert batch.target.tolist() == [[-100, 1, -100, -100]]
    cut = examples.contents([0])
    assert len(list(cut)) == 1
    nothing = Batch(batch.inputs, torch.full_like(batch.target, -100))
    logits = torch.zeros(1, 4, 3, requires_grad=True)
    loss = task.record_losses(logits, nothing)
    loss.sum().backward()
    assert loss.tolist() == [0] and logits.grad is not None and float(logits.grad.abs().sum()) == 0


@pytest.mark.parametrize(
    ("offsets", "first"),
    [
        ([(0, 0), (0, 3), (3, 7), (8, 10), (0, 0)], [None, 0, None, 1, None]),  # pieces, special tokens
        ([(0, 7), (7, 10)], [0, 1]),  # the blank counts to the token after it
        ([(0, 7), (7, 8), (8, 10)], [0, None, 1]),  # a token for the blank alone
    ],
)
def test_first_tokens_in_every_style(offsets: list[tuple[int, int]], first: list[int | None]) -> None:
    assert first_tokens("newport is", offsets) == first


def test_an_answer_s_tokens(world: Worlds) -> None:
    this = world("bert-answers")
    tokenizer, task = this.model.tokenizer, this.model.task
    rows = Table(
        "t", ("w1 w2 good w3", "w1 good"), ("good w3", "good"), ("is this", "is"), None, (1, 2), start=(6, 3)
    )
    examples = task.encode(rows, tokenizer, 32)
    # [CLS] is this [SEP] w1 w2 good w3 [SEP]
    assert collate(examples, [0, 1], 0, torch.device("cpu")).target.tolist() == [[6, 7, 4, 7], [4, 4, 3, 4]]
    ids = tokens(examples, 0)
    assert tokenizer.decode(ids[6:8]) == "good w3"


def test_an_answer_that_is_cut_off_bears_no_loss_and_is_wrong(world: Worlds) -> None:
    this = world("bert-answers")
    task, tokenizer = this.model.task, this.model.tokenizer
    texts = ("w1 w2 w3 w4 w5 w6 w7 good", "good w1 w2")
    rows = Table("t", texts, ("good", "good"), ("is", "is"), None, (1, 2), start=(21, 0))
    assert rows.text[0][21:][-4:] == "good"
    rows = replace(rows, start=(rows.text[0].index("good"), 0))
    examples = task.encode(rows, tokenizer, 8)
    batch = collate(examples, [0, 1], 0, torch.device("cpu"))
    assert batch.target[0].tolist() == [-100, -100, 3, 6]
    logits = torch.randn(2, 8, 2, requires_grad=True)
    losses = task.record_losses(logits, batch)
    losses.sum().backward()
    assert float(losses[0]) == 0 and float(losses[1]) > 0
    assert logits.grad is not None and float(logits.grad[0].abs().sum()) == 0
    assert task.record_sums(logits, batch, tokenizer)[0].tolist() == [0, 0, 0]
    with pytest.raises(DataError, match=r"every answer lies beyond.*model.max_length"):
        task.encode(rows.take([0]), tokenizer, 8)


def test_the_best_answer_lies_in_the_context_in_order(world: Worlds) -> None:
    this = world("bert-answers")
    task: Any = this.model.task
    logits = torch.zeros(1, 8, 2)
    logits[0, 1, 0] = 9  # in the question
    logits[0, 6, 0], logits[0, 4, 1] = 5, 5  # the end before the beginning
    logits[0, 5, 0], logits[0, 7, 1] = 3, 3
    batch = Batch({"input_ids": torch.arange(8)[None] + 6}, torch.tensor([[5, 7, 4, 7]]))
    assert task.answers(logits, batch).tolist() == [[6, 7]]
    logits[0, 6, 0] = 0
    assert task.answers(logits, batch).tolist() == [[5, 7]]
    assert task.correct(logits, batch).tolist() == [1]
    assert task.record_sums(logits, batch, this.model.tokenizer).tolist() == [[1, 1, 1]]


def test_a_seq2seq_loss_is_the_mean_over_the_record_s_own_text(world: Worlds) -> None:
    this = world("t5-writes")
    batch = collate(this.examples, range(6), this.model.pad_id, torch.device("cpu"))
    lengths = (batch.target != -100).sum(dim=1).tolist()
    assert len(set(lengths)) > 2 and len(set(this.examples.lengths[:6].tolist())) > 2
    logits = torch.randn(*batch.target.shape, 52)
    losses = this.model.task.record_losses(logits, batch)
    scores = logits.log_softmax(dim=-1)
    for row, length in enumerate(lengths):
        assert int(batch.target[row, length - 1]) == 5  # the end token
        own = scores[row, range(length), batch.target[row, :length]]
        assert float(losses[row]) == pytest.approx(-float(own.mean()), rel=1e-5)


@pytest.mark.parametrize("kind", ["t5-writes", "mbart-writes"])
def test_what_is_decoded_is_what_the_model_itself_would_train_on(world: Worlds, kind: str) -> None:
    """Our loss against transformers' own, which is the mean over tokens: of one record, the same."""
    this = world(kind)
    batch = collate(this.examples, [4], this.model.pad_id, torch.device("cpu"))
    with torch.no_grad():
        ours = this.model.task.record_losses(this.model.logits(batch.inputs), batch)
        theirs = this.model.peft(**batch.inputs).loss
    assert float(ours[0]) == pytest.approx(float(theirs), rel=1e-5)


@pytest.mark.parametrize("kind", ["llama-causal", "gpt2-causal", "t5-writes", "mbart-writes"])
def test_greedy_answers_do_not_depend_on_the_others(world: Worlds, kind: str) -> None:
    this = world(kind)
    write_vector(this.model.parameters, this.model.layout, moved(this.model))
    questions = [tokens(this.examples, i)[:n] for i, n in ((0, 3), (1, 5), (2, 2))]
    together = greedy(this.model, questions, 5)
    assert together == [greedy(this.model, [question], 5)[0] for question in questions]


def test_greedy_is_the_likeliest_next_token(world: Worlds) -> None:
    this = world("llama-causal")
    write_vector(this.model.parameters, this.model.layout, moved(this.model))
    ids = tokens(this.examples, 0)[:3]
    written: list[int] = []
    for _ in range(4):
        with torch.no_grad():
            row = torch.tensor([ids + written])
            written.append(
                int(
                    this.model.logits({"input_ids": row, "attention_mask": torch.ones_like(row)})[
                        0, -1
                    ].argmax()
                )
            )
    assert greedy(this.model, [ids], 4) == [this.model.tokenizer.decode(written, skip_special_tokens=True)]


def test_perplexity_is_of_all_tokens(world: Worlds) -> None:
    this = world("gpt2-causal")
    task = this.model.task
    batch = collate(this.examples, range(9), this.model.pad_id, torch.device("cpu"))
    with torch.no_grad():
        logits = this.model.logits(batch.inputs)
    sums = task.record_sums(logits, batch, this.model.tokenizer)
    lengths = this.examples.lengths[:9] - this.examples.targets(range(9))[:, 0].numpy()
    assert sums[:, 2].tolist() == lengths.tolist()
    losses = task.record_losses(logits, batch).double().numpy()
    scores = task.scores(sums.sum(dim=0).numpy(), 9)
    assert scores["perplexity"] == pytest.approx(
        float(np.exp((losses * lengths).sum() / lengths.sum())), rel=1e-5
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_digest_sees_every_part_of_a_record(world: Worlds, kind: str) -> None:
    examples = world(kind).examples
    assert len(set(examples.contents(range(len(examples))))) > 100
    before = next(examples.contents([0]))
    target = examples.target
    if isinstance(target, Ragged):
        other = replace(examples, target=Ragged(target.values + 1, target.starts))
    else:
        other = replace(examples, target=target + 1)
    assert next(other.contents([0])) != before
    assert next(replace(examples, tokens=examples.tokens + 1).contents([0])) != before
