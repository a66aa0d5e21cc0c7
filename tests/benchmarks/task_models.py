"""Small models for the tasks of `tasks.py` that no sample model fits.

They are trained here, on public records that are not quite like the private ones: sentences in another order
of words, digits in a mirror.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from common.examples import collate
from common.tables import Table
from common.task_generate import CausalLM, Seq2Seq

LESSONS = 400
WORDS = 20  # of each part of a sentence, in each language
ENGLISH = [[f"{part}{i}" for i in range(WORDS)] for part in ("who", "does", "what")]
FOREIGN = [[f"{part}{i}" for i in range(WORDS)] for part in ("qui", "fait", "quoi")]
WIDTH = 64


def save_tokenizer(folder: Path, *, ends: bool) -> int:
    """Whole words of both languages; `ends`: an end token after each text. Its vocabulary's size."""
    special = ["[PAD]", "[UNK]", "[EOS]"]
    listed = [word for part in (*ENGLISH, *FOREIGN) for word in part]
    vocabulary = {word: i for i, word in enumerate([*special, *listed])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    if ends:
        tokenizer.post_processor = TemplateProcessing(
            single="$A [EOS]", special_tokens=[("[EOS]", vocabulary["[EOS]"])]
        )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", eos_token="[EOS]"
    ).save_pretrained(str(folder))
    return len(vocabulary)


def save_translator(folder: Path) -> Path:
    size = save_tokenizer(folder, ends=True)
    config = T5Config(
        vocab_size=size, d_model=WIDTH, d_kv=16, d_ff=2 * WIDTH, num_layers=2, num_heads=4, pad_token_id=0,
        eos_token_id=2, decoder_start_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    return _teach_order(_new(T5ForConditionalGeneration, config), Seq2Seq(), folder)


def save_decoder(folder: Path) -> Path:
    size = save_tokenizer(folder, ends=False)
    config = GPT2Config(
        vocab_size=size, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=32, initializer_range=0.2,
        eos_token_id=2, bos_token_id=2,
    )  # fmt: skip
    return _teach_order(_new(GPT2LMHeadModel, config), CausalLM(), folder)


def save_vision(folder: Path, images: NDArray[np.int64], digits: NDArray[np.int64]) -> Path:
    """images: `(n, 8, 8)`, from 0 to 255, of the `digits`; they are learnt in a mirror."""
    config = ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, intermediate_size=2 * WIDTH,
        image_size=8, patch_size=2, initializer_range=0.1,
    )  # fmt: skip
    model = _new(ViTModel, config)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(str(folder))
    seen = torch.tensor(images[:, :, ::-1].copy(), dtype=torch.float32)[:, None].expand(-1, 3, -1, -1)
    pixels, targets = seen / 127.5 - 1, torch.tensor(digits)
    head = torch.nn.Linear(WIDTH, 10)
    for parameter in head.parameters():
        torch.nn.init.zeros_(parameter)

    def loss(chosen: NDArray[np.int64]) -> torch.Tensor:
        outputs = model(pixel_values=pixels[chosen]).last_hidden_state[:, 0]
        return torch.nn.functional.cross_entropy(head(outputs), targets[chosen])

    _teach(model, [*model.parameters(), *head.parameters()], len(pixels), loss)
    model.save_pretrained(str(folder))
    return folder


def sentences(places: Iterable[Sequence[int]], order: Sequence[int]) -> Table:
    """Subject, verb, object; and in the other language the same in another order."""
    chosen = [list(place) for place in places]
    return Table(
        "sentences",
        label=None,
        group=None,
        rows=tuple(range(1, len(chosen) + 1)),
        text=tuple(" ".join(FOREIGN[part][place[part]] for part in order) for place in chosen),
        prompt=tuple(" ".join(words[i] for words, i in zip(ENGLISH, place, strict=True)) for place in chosen),
    )


def _new(kind: type[PreTrainedModel], config: PreTrainedConfig) -> Any:
    """The same random weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return kind(config)


def _teach_order(model: Any, task: Seq2Seq | CausalLM, folder: Path) -> Path:
    """The language, with its words in the order of the first one."""
    places = np.random.default_rng(7).integers(0, WORDS, (4000, 3))
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    examples = task.encode(sentences(places, (0, 1, 2)), tokenizer, 16)

    def loss(chosen: NDArray[np.int64]) -> torch.Tensor:
        batch = collate(examples, chosen, 0, torch.device("cpu"))
        return task.record_losses(model(**batch.inputs).logits, batch).mean()

    _teach(model, list(model.parameters()), len(examples), loss)
    model.save_pretrained(str(folder))
    return folder


def _teach(
    model: Any,
    parameters: list[torch.nn.Parameter],
    count: int,
    loss: Callable[[NDArray[np.int64]], torch.Tensor],
) -> None:
    """Train all weights. loss: of so many of the `count` records."""
    rng = np.random.default_rng(7)
    optimizer = torch.optim.Adam(parameters, lr=2e-3)
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)  # of dropout
        for _ in range(LESSONS):
            optimizer.zero_grad()
            loss(rng.integers(0, count, 128)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    model.eval()
