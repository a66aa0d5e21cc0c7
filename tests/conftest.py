"""What the tests share: tiny models with random weights, a small table, and a configuration for them.

Nothing here needs a network. Models are built once a session, from a config and a seed.
"""
# ruff: noqa: E402 - the environment comes first: torch reads it when it is imported

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

os.environ.update({"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"})
for name, value in {
    "OMP_WAIT_POLICY": "PASSIVE",  # read when torch is first imported
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
}.items():
    os.environ.setdefault(name, value)

import hypothesis
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, Whitespace
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MBartConfig,
    MBartForConditionalGeneration,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from common.adapter import Vector
from common.config import RunConfig, TaskKind, parse_config
from common.datasets import read_table
from common.models import AdaptedModel, load_model
from common.targets import columns_of
from common.tasks import Examples, make_task

torch.set_num_threads(1)
hypothesis.settings.register_profile("confide", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("confide")

LABELS = ("bad", "good")
WORDS = (*(f"w{i}" for i in range(40)), "some", "text", "good", "bad", "is", "this")
SEVERAL = {"fine": ("good",), "poor": ("bad",), "low": WORDS[:12]}  # of multi-label, and what tells them
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[BOS]", "[EOS]")


def save_tokenizer(folder: Path, *, encoder: bool, writes: bool = False) -> int:
    """A whole-word tokenizer, with an encoder's special tokens, a decoder's, or those of a model that has
    both (`writes`); its vocabulary's size."""
    vocabulary = {token: i for i, token in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    if encoder:
        tokenizer.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
        )
        special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    elif writes:
        tokenizer.post_processor = TemplateProcessing(
            single="$A [EOS]", special_tokens=[("[EOS]", vocabulary["[EOS]"])]
        )
        special = {"pad_token": "[PAD]", "eos_token": "[EOS]"}
    else:
        special = {"bos_token": "[BOS]", "eos_token": "[EOS]"}  # no padding token, as with GPT-2
    inputs = ["input_ids", *(["token_type_ids"] if encoder else []), "attention_mask"]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", model_input_names=inputs, **special
    )
    fast.save_pretrained(str(folder))
    return len(vocabulary)


def save_vision_model(folder: Path) -> Path:
    """A vision transformer for images of 16 by 16 pixels, and its image processor."""
    vit = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16,
        patch_size=8, initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        ViTModel(vit).save_pretrained(str(folder))
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(str(folder))
    return folder


def save_model(folder: Path, kind: str) -> Path:
    """A model of two layers and sixteen dimensions: weights in safetensors, tokenizer beside them."""
    if kind == "vit":
        return save_vision_model(folder)
    size = save_tokenizer(folder, encoder=kind == "bert", writes=kind in ("t5", "mbart"))
    wide = {"vocab_size": size, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        match kind:
            case "bert":
                # Weights ten times the usual, so that layers of this size say something.
                bert = BertConfig(
                    **wide, intermediate_size=32, max_position_embeddings=64, initializer_range=0.2
                )
                BertModel(bert).save_pretrained(str(folder))
            case "gpt2":
                gpt2 = GPT2Config(
                    vocab_size=size, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.2
                )
                gpt2.bos_token_id = SPECIAL.index("[BOS]")
                gpt2.eos_token_id = SPECIAL.index("[EOS]")
                GPT2LMHeadModel(gpt2).save_pretrained(str(folder))
            case "llama":
                llama = LlamaConfig(
                    **wide,
                    intermediate_size=32,
                    max_position_embeddings=64,
                    num_key_value_heads=1,
                    initializer_range=0.2,
                    bos_token_id=SPECIAL.index("[BOS]"),
                    eos_token_id=SPECIAL.index("[EOS]"),
                )
                LlamaForCausalLM(llama).save_pretrained(str(folder))
            case "t5":
                t5 = T5Config(
                    vocab_size=size, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
                    pad_token_id=0, eos_token_id=SPECIAL.index("[EOS]"), decoder_start_token_id=0,
                )  # fmt: skip
                T5ForConditionalGeneration(t5).save_pretrained(str(folder))
            case "mbart":
                mbart = MBartConfig(
                    vocab_size=size, d_model=16, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=32,
                    decoder_ffn_dim=32, encoder_attention_heads=2, decoder_attention_heads=2,
                    max_position_embeddings=64, init_std=0.2, pad_token_id=0,
                    bos_token_id=SPECIAL.index("[BOS]"), eos_token_id=SPECIAL.index("[EOS]"),
                    forced_eos_token_id=None,
                )  # fmt: skip
                MBartForConditionalGeneration(mbart).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("bert"), "bert")


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("gpt2"), "gpt2")


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="session")
def bpe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama whose tokenizer pairs bytes, as those of Llama 3 and SmolLM do."""
    folder = tmp_path_factory.mktemp("bpe")
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(str(folder))
    config = LlamaConfig(
        vocab_size=len(fast) + 5, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, intermediate_size=48, max_position_embeddings=4096, initializer_range=0.2,
        bos_token_id=0, eos_token_id=1, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        LlamaForCausalLM(config).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("t5"), "t5")


@pytest.fixture(scope="session")
def mbart_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("mbart"), "mbart")


@pytest.fixture(scope="session")
def vit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("vit"), "vit")


@pytest.fixture(scope="session")
def image_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """160 arrays of pixels; good ones are bright on the left."""
    path = tmp_path_factory.mktemp("images") / "records.jsonl"
    rng = np.random.default_rng(5)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(160):
            label = LABELS[int(rng.integers(2))]
            pixels = rng.integers(0, 128, (12, 16))
            pixels[:, :8] += 120 * (label == "good")
            file.write(json.dumps({"text": pixels.tolist(), "label": label}) + "\n")
    return path


@pytest.fixture(scope="session")
def dialogue_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """160 dialogues of one to three answers; an answer follows from what was asked."""
    path = tmp_path_factory.mktemp("dialogues") / "records.jsonl"
    rng = np.random.default_rng(11)
    with path.open("w", encoding="utf-8") as file:
        for i in range(160):
            turns = [{"role": "system", "content": f"n{i}"}] if i % 3 == 0 else []
            for _ in range(1 + i % 3):
                label = LABELS[int(rng.integers(2))]
                turns.append({"role": "user", "content": f"w{rng.integers(40)} {label}"})
                turns.append({"role": "assistant", "content": label})
            file.write(json.dumps({"turns": turns, "group": f"g{i % 8}"}) + "\n")
    return path


@pytest.fixture(scope="session")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """160 records of one to nine words in eight groups; every kind of label follows from the words."""
    path = tmp_path_factory.mktemp("data") / "records.csv"
    rng = np.random.default_rng(3)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "prompt", "group", "tags", "several", "number"])
        for i in range(160):
            label = LABELS[int(rng.integers(2))]
            words = [*rng.choice(WORDS[:40], size=rng.integers(1, 9)), label, f"w{i % 40}", f"n{i}"]
            tags = ["B-kind" if w == label else "B-low" if w in WORDS[:8] else "O" for w in words]
            several = [name for name, part in SEVERAL.items() if set(part) & set(words)]
            number = 2 + 6 * (label == "good") + i % 2
            row = [" ".join(words), label, "is this", f"g{i % 8}", " ".join(tags), "|".join(several), number]
            writer.writerow(row)
    return path


def tiny_config(folder: Path, train: Path, /, **sections: dict[str, Any]) -> RunConfig:
    """A configuration for a tiny model; `sections` add to or replace keys, as `adapter={"rank": 2}`."""
    data: dict[str, dict[str, Any]] = {
        "run": {"name": "tiny", "rounds": 2, "threads": 1, "device": "cpu"},
        "model": {"name": str(folder), "max_length": 32},
        "adapter": {"rank": 2},
        "data": {"train": str(train)},
        "sites": {"count": 3},
        "privacy": {"sample_rate": 0.2, "nominal_records": 40, "delta": 1e-3},
        "training": {"local_steps": 2},
    }
    for section, keys in sections.items():
        data[section] = {**data.get(section, {}), **keys}
    return parse_config(data, source="a test")


def tiny_model(config: RunConfig) -> AdaptedModel:
    names = {
        TaskKind.SEQUENCE_CLASSIFICATION: LABELS,
        TaskKind.IMAGE_CLASSIFICATION: LABELS,
        TaskKind.MULTI_LABEL: tuple(SEVERAL),
        TaskKind.TOKEN_CLASSIFICATION: ("O", "B-kind", "B-low"),
    }
    return load_model(config, make_task(config.task.kind, names.get(config.task.kind, ()), config.task))


CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}is\n{{ m['content'] + eos_token }}"
    "{% else %}{{ m['content'] }} {% endif %}{% endfor %}{% if add_generation_prompt %}is\n{% endif %}"
)


@dataclass(frozen=True)
class World:
    """A tiny model and the records of `data_file`, tokenised for it. Shared by tests, as by sites: whoever
    uses the model first writes the adapter that they want."""

    config: RunConfig
    model: AdaptedModel
    examples: Examples


# model and task: which folder, and the sections of its configuration
KINDS: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "bert-mean": ("bert", {"model": {"head": "mean"}}),
    "bert-default": ("bert", {"model": {"head": "default"}}),
    "gpt2-classify": ("gpt2", {}),
    "gpt2-causal": ("gpt2", {"task": {"kind": "causal-lm"}, "data": {"prompt": "prompt"}}),
    "bpe-chat-causal": ("bpe", {"task": {"kind": "causal-lm", "chat": True}, "data": {"prompt": "prompt"}}),
    "bpe-dialogues-causal": ("bpe", {"task": {"kind": "causal-lm", "chat": True}, "data": {"text": "turns"}}),
    "llama-causal": ("llama", {"task": {"kind": "causal-lm"}}),
    "bert-pair": ("bert", {"data": {"prompt": "prompt"}}),
    "bert-mean-pair": ("bert", {"model": {"head": "mean"}, "data": {"prompt": "prompt"}}),
    "bert-several": ("bert", {"task": {"kind": "multi-label"}, "data": {"label": "several"}}),
    "bert-number": ("bert", {"task": {"kind": "regression", "range": [0, 10]}, "data": {"label": "number"}}),
    "bert-tags": ("bert", {"task": {"kind": "token-classification"}, "data": {"label": "tags"}}),
    "vit-images": ("vit", {"task": {"kind": "image-classification"}}),
    "bert-answers": ("bert", {"task": {"kind": "question-answering"}, "data": {"prompt": "prompt"}}),
    "t5-writes": (
        "t5",
        {"task": {"kind": "sequence-to-sequence"}, "data": {"prompt": "tags", "text": "text"}},
    ),
    "mbart-writes": (
        "mbart",
        {"task": {"kind": "sequence-to-sequence"}, "data": {"prompt": "tags", "text": "text"}},
    ),
}


@pytest.fixture(scope="session")
def world(
    bert_folder: Path,
    gpt2_folder: Path,
    llama_folder: Path,
    bpe_folder: Path,
    t5_folder: Path,
    mbart_folder: Path,
    vit_folder: Path,
    data_file: Path,
    image_file: Path,
    dialogue_file: Path,
) -> Callable[..., World]:
    """`world(kind, method)`: see KINDS; built once for each."""
    folders = {
        "bert": bert_folder,
        "gpt2": gpt2_folder,
        "llama": llama_folder,
        "bpe": bpe_folder,
        "t5": t5_folder,
        "mbart": mbart_folder,
        "vit": vit_folder,
    }

    @cache
    def build(kind: str, method: str = "ffa") -> World:
        folder, sections = KINDS[kind]
        records = {"vit-images": image_file, "bpe-dialogues-causal": dialogue_file}.get(kind, data_file)
        config = tiny_config(folders[folder], records, **sections, adapter={"rank": 2, "method": method})
        model = tiny_model(config)
        table = read_table(records, columns_of(config.data, config.task.kind, config.task.chat))
        return World(config, model, model.task.encode(table, model.tokenizer, config.model.max_length))

    return build


def moved(model: AdaptedModel, seed: int = 0) -> Vector:
    """An adapter at a generic point: at the injected one, B = 0 hides every fault behind it."""
    return (0.05 + 0.1 * np.random.default_rng(seed).normal(size=model.layout.size)).astype(np.float32)
