"""The adapter, put into a base model by peft: which modules it stands in, and that nothing else trains."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

from common.config import AdapterSection, Head, RunConfig, TaskKind
from common.errors import ModelError

HEADS = ("classifier", "score", "pre_classifier", "classification_head", "lm_head", "qa_outputs")

# How attention names its query and value, for architectures that peft's own table leaves out.
_QUERY_VALUE = (("q_proj", "v_proj"), ("query", "value"), ("q_lin", "v_lin"), ("q", "v"))


def inject(base: nn.Module, config: RunConfig, kind: TaskKind) -> PeftModel:
    """`base` with the adapter of `config`; a head of transformers' own trains where the settings say so.

    Raises:
        ModelError: the adapter does not fit the model.
    """
    adapter = config.adapter
    mean = config.model.head is Head.MEAN
    needed = "FEATURE_EXTRACTION" if mean else kind.needs.peft
    lora = LoraConfig(
        task_type=needed,
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=list(_targets(base, adapter)),
        layers_to_transform=_layers(base.config, adapter),
        # peft finds the head itself where it knows the task.
        modules_to_save=None if needed else [h for h in ("classifier", "qa_outputs") if hasattr(base, h)],
    )
    try:
        peft: PeftModel = get_peft_model(base, lora)
    except ValueError as error:
        raise ModelError(f"the adapter does not fit the model: {str(error)[:300]}") from None
    if not (mean or adapter.train_head):
        for name, p in peft.named_parameters():
            if "modules_to_save" in name:
                p.requires_grad_(False)
    return peft


def _targets(base: nn.Module, adapter: AdapterSection) -> tuple[str, ...]:
    """The module names to adapt, checked against the model."""
    candidates = sorted(
        {
            name.rsplit(".", 1)[-1]
            for name, module in base.named_modules()
            if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        }
        - set(HEADS)
    )
    model_type: str = base.config.model_type  # type: ignore[union-attr,assignment]
    targets = adapter.target_modules
    if not targets:
        known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type)
        guesses = (pair for pair in _QUERY_VALUE if set(pair) <= set(candidates))
        targets = tuple(known) if isinstance(known, list) else next(guesses, ())
        if not targets:
            raise ModelError(
                f"no default target modules for the architecture {model_type!r}: set adapter.target_modules "
                f"to some of {candidates}"
            )
    unknown = [t for t in targets if t not in candidates]
    if unknown:
        raise ModelError(
            f"adapter.target_modules: {unknown} not found in the model ({model_type}); "
            f"candidates: {candidates}"
        )
    return targets


def _layers(model_config: Any, adapter: AdapterSection) -> list[int] | None:
    if not adapter.layers:
        return None
    depth = int(getattr(model_config, "num_hidden_layers", 0))
    if bad := [i for i in adapter.layers if not -depth <= i < depth]:
        raise ModelError(f"adapter.layers: {bad} are not among the {depth} layers of the model")
    return sorted({i % depth for i in adapter.layers})


def check_trainable(peft: PeftModel, adapter: AdapterSection) -> None:
    """Refuse what per-sample clipping would miss or what would train more than it says."""
    for name, p in peft.named_parameters():
        if not p.requires_grad:
            continue
        if "lora_embedding" in name or "lora_magnitude" in name:
            raise ModelError(
                f"{name}: adapters on embeddings and DoRA magnitudes have no per-sample gradients here; "
                "choose linear layers in adapter.target_modules"
            )
        if "modules_to_save" in name and "lm_head" in name:
            raise ModelError(f"{name}: a trained copy would untie the language-model head; leave it out")
        if ".lora_" not in name and "modules_to_save" not in name:
            raise ModelError(f"{name} would train, but belongs neither to the adapter nor to its head")
