"""Small models with random weights, for the tasks of `tasks.py` that no sample model fits.

Adapters of full rank on every layer can make of random weights what training would.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
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
    _save(T5ForConditionalGeneration, config, folder)
    return folder


def save_decoder(folder: Path) -> Path:
    size = save_tokenizer(folder, ends=False)
    config = GPT2Config(
        vocab_size=size, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=32, initializer_range=0.2,
        eos_token_id=2, bos_token_id=2,
    )  # fmt: skip
    _save(GPT2LMHeadModel, config, folder)
    return folder


def save_vision(folder: Path) -> Path:
    config = ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, intermediate_size=2 * WIDTH,
        image_size=8, patch_size=2, initializer_range=0.1,
    )  # fmt: skip
    _save(ViTModel, config, folder)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(str(folder))
    return folder


def _save(kind: type[PreTrainedModel], config: PreTrainedConfig, folder: Path) -> None:
    """The same random weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        kind(config).save_pretrained(str(folder))
