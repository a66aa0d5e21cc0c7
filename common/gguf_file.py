"""A causal language model of the Llama family as one GGUF file.

What llama.cpp's own converter does, for what can be read back and compared: see common.release.
Weights stay 32-bit, so that nothing is lost; `llama-quantize` makes the file smaller.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.chat_template import end_id
from common.errors import ModelError

FAMILY = "llama"  # transformers' `model_type`, and the name of the architecture in GGUF

_INSTEAD = "use --format merged, and llama.cpp's convert_hf_to_gguf.py on that folder"

# How text is split before bytes are paired, and what llama.cpp calls it.
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write_gguf(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    file: Path,
    *,
    name: str,
    description: str,
    tokenizer_of: Path | None = None,
) -> None:
    """Write the model with its tokenizer. `tokenizer_of`: a GGUF file whose tokenizer it is; it is copied.

    Raises:
        ModelError: the model is of another family, or its tokenizer is none that GGUF can hold.
    """
    config: Any = model.config
    if config.model_type != FAMILY:
        raise ModelError(
            f"--format gguf is for models of the Llama family (model_type {FAMILY!r}), found "
            f"{config.model_type!r}: {_INSTEAD}"
        )
    rope: dict[str, Any] = config.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise ModelError(
            f"--format gguf cannot write scaled rotary positions ({rope['rope_type']}): {_INSTEAD}"
        )
    writer = gguf.GGUFWriter(str(file), FAMILY)
    writer.add_name(name)
    writer.add_description(description)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if tokenizer_of is not None:
        _copy_tokenizer(writer, tokenizer_of, end_id(tokenizer))
    else:
        _write_tokenizer(writer, tokenizer, config.vocab_size)
    for tensor_name, tensor in _tensors(model, config):
        writer.add_tensor(tensor_name, tensor.detach().cpu().float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(model: PreTrainedModel, config: Any) -> Iterator[tuple[str, torch.Tensor]]:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue  # the embedding is read again
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if known is None:
            raise ModelError(f"--format gguf knows no place for the weights {name}: use --format merged")
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        projection = name.split(".")[-2]
        yield known, _interleaved(tensor, heads[projection]) if projection in heads else tensor


def _interleaved(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp turns neighbouring rows as pairs, transformers a head's first half with its second."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _copy_tokenizer(writer: Any, source: Path, end: int | None) -> None:
    """As it is in `source`; there is `end` where that does not say what ends an answer."""
    fields = gguf.GGUFReader(str(source)).fields
    for field in fields.values():
        if field.name.startswith("tokenizer."):
            kind = field.types[0]
            inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)

    if end is not None and gguf.Keys.Tokenizer.EOT_ID not in fields:
        writer.add_eot_token_id(end)


def _write_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
    fast: Any = getattr(tokenizer, "backend_tokenizer", None)
    parts: dict[str, Any] = json.loads(fast.to_str()) if fast is not None else {}
    split = _split_name(parts)
    if split is None:
        raise ModelError(
            "--format gguf needs a byte-level BPE tokenizer that splits text as GPT-2's or Llama 3's does, "
            f"or a base model that is a GGUF file itself: {_INSTEAD}"
        )
    by_id = {i: token for token, i in tokenizer.get_vocab().items()}
    added = {token["id"]: token["special"] for token in parts["added_tokens"]}
    kinds = {None: gguf.TokenType.NORMAL, True: gguf.TokenType.CONTROL, False: gguf.TokenType.USER_DEFINED}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list([by_id.get(i, f"[PAD{i}]") for i in range(vocabulary)])
    writer.add_token_types(
        [kinds[added.get(i)] if i in by_id else gguf.TokenType.UNUSED for i in range(vocabulary)]
    )
    merges = parts["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    for add, token in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_eot_token_id, end_id(tokenizer)),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if token is not None:
            add(token)
    first = tokenizer("a")["input_ids"][0]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and first == tokenizer.bos_token_id)
    with contextlib.suppress(ValueError):  # none, or several and none by default
        writer.add_chat_template(tokenizer.get_chat_template())


def _split_name(parts: dict[str, Any]) -> str | None:
    """What llama.cpp calls the way in which this tokenizer.json splits text; None: it has no name for it."""
    if parts.get("normalizer") is not None or parts.get("model", {}).get("type") != "BPE":
        return None
    match parts.get("pre_tokenizer"):
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return "gpt-2"
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        } if pattern == _LLAMA_3:
            return "llama-bpe"
    return None
