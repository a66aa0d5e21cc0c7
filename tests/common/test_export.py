"""The exported folder: opened by plain transformers and peft, in a process that has nothing of ours."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import BertModel, DistilBertConfig, DistilBertModel

from common.adapter import write_vector
from common.errors import ModelError
from common.export import PrivacyClaim, export_adapter, model_card
from common.models import AdaptedModel
from tests.conftest import KINDS, World, moved, save_tokenizer, tiny_config, tiny_model

Worlds = Callable[..., World]
CLAIM = PrivacyClaim(2.94321, 2.5, 1e-5, secure_aggregation=False, read_from_data=(), repeatable_noise=False)

# Runs the code of each model card in its own folder, and leaves the logits beside it.
OUTSIDER = """
import os, re, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"common", "client", "server", "simulations", "confide"}:
            raise ImportError(name + " is not to be had here")

sys.meta_path.insert(0, Refuse())
import numpy as np
import torch

torch.set_num_threads(1)
for folder in sys.argv[1:]:
    os.chdir(folder)
    (code,) = re.findall(r"```python\\n(.*?)```", open("README.md", encoding="utf-8").read(), re.S)
    if "padding=True" in code:  # then it must also do for texts of unlike lengths
        code = code.replace('["some text"]', '["some text", "this is some good text"]')
    names = {}
    exec(code, names)
    with torch.no_grad():
        logits = names["logits"] if "logits" in names else names["model"](**names["batch"]).logits
    inputs = {name: names["batch"][name].numpy() for name in ("input_ids", "attention_mask")}
    np.savez("outsider.npz", logits=logits.detach().numpy(), **inputs)
"""


def open_as_an_outsider(*folders: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", OUTSIDER, *map(str, folders)],
        cwd=folders[0],
        env={**os.environ, "PYTHONPATH": "", "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def agrees(model: AdaptedModel, folder: Path) -> bool:
    """Whether our model, with the adapter that was exported, gives the logits that the outsider found."""
    with np.load(folder / "outsider.npz") as found:
        logits = found["logits"]
        inputs = {name: torch.from_numpy(found[name]) for name in ("input_ids", "attention_mask")}
    first = inputs["input_ids"][0][inputs["attention_mask"][0] == 1]
    assert first.tolist() == model.tokenizer("some text")["input_ids"]
    write_vector(model.parameters, model.layout, moved(model))
    with torch.no_grad():
        want = model.logits(inputs).numpy()
    return want.shape == logits.shape and np.allclose(logits, want, atol=1e-5)


def test_the_card_s_code_gives_the_same_logits_without_us(
    world: Worlds, data_file: Path, tmp_path: Path
) -> None:
    models = {}
    cases = [
        ("bert-mean", "ffa"),
        ("bert-default", "lora"),
        ("gpt2-causal", "ffa"),
        ("llama-causal", "rolora"),
    ]
    for kind, method in cases:
        this = world(kind, method)
        export_adapter(this.model, moved(this.model), this.config, CLAIM, tmp_path / kind)
        models[kind] = this.model
    # DistilBERT has two layers above its encoder, both made up when a classifier is first loaded.
    wide = DistilBertConfig(
        vocab_size=save_tokenizer(tmp_path / "base", encoder=True),
        dim=16,
        n_layers=1,
        n_heads=2,
        hidden_dim=32,
        max_position_embeddings=64,
    )
    DistilBertModel(wide).save_pretrained(tmp_path / "base")
    config = tiny_config(tmp_path / "base", data_file)
    models["distilbert"] = tiny_model(config)
    export_adapter(models["distilbert"], moved(models["distilbert"]), config, CLAIM, tmp_path / "distilbert")
    open_as_an_outsider(*(tmp_path / kind for kind in models))
    for kind, model in models.items():
        assert agrees(model, tmp_path / kind), kind


# The same for every other task: what the card calls the model with, and what it answers.
OUTSIDER_TASKS = (
    OUTSIDER.split("for folder in")[0]
    + """
for folder in sys.argv[1:]:
    os.chdir(folder)
    (code,) = re.findall(r"```python\\n(.*?)```", open("README.md", encoding="utf-8").read(), re.S)
    names = {}
    exec(code, names)
    inputs = dict(names["batch"])
    if "Seq2Seq" in code:
        inputs["decoder_input_ids"] = torch.tensor([[0, 8, 9]])
    with torch.no_grad():
        if "logits =" in code:
            outputs = {"logits": names["logits"]}
        else:
            outputs = dict(names["model"](**inputs))
    kept = {name: value.detach().numpy() for name, value in outputs.items() if "logits" in name}
    np.savez("outsider.npz", **kept, **{"in_" + name: value.numpy() for name, value in inputs.items()})
"""
)


def test_the_card_asks_as_the_template_wants_it(world: Worlds, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code failed where the template wants a system turn."""
    this = world("bpe-chat-causal")
    wants = "{{ raise_exception('no') if messages[0].role != 'system' }}"
    monkeypatch.setattr(this.model.tokenizer, "chat_template", wants + this.model.tokenizer.chat_template)
    (code,) = re.findall(r"```python\n(.*?)```", model_card(this.model, this.config, CLAIM), re.S)
    call = code[code.index("batch = ") : code.index("print(")]
    names: dict[str, Any] = {"tokenizer": this.model.tokenizer}
    exec(call, names)
    assert names["batch"]["input_ids"].shape[1] > 8


def test_the_card_s_code_of_every_task(world: Worlds, tmp_path: Path) -> None:
    kinds = [k for k in KINDS if k not in ("bert-mean", "bert-default", "gpt2-causal", "llama-causal")]
    for kind in kinds:
        this = world(kind)
        export_adapter(this.model, moved(this.model), this.config, CLAIM, tmp_path / kind)
    done = subprocess.run(
        [sys.executable, "-c", OUTSIDER_TASKS, *(str(tmp_path / kind) for kind in kinds)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": "", "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for kind in kinds:
        model = world(kind).model
        write_vector(model.parameters, model.layout, moved(model))
        with np.load(tmp_path / kind / "outsider.npz") as found:
            inputs = {n[3:]: torch.from_numpy(found[n]) for n in found.files if n.startswith("in_")}
            with torch.no_grad():
                output = model.module(**inputs)
            wanted = {"logits": output} if isinstance(output, torch.Tensor) else output
            names = [n for n in found.files if "logits" in n]
            assert names, kind
            for name in names:
                assert np.allclose(found[name], wanted[name].numpy(), atol=1e-5), (kind, name)


def test_a_base_without_the_default_head_s_pooler(bert_folder: Path, data_file: Path, tmp_path: Path) -> None:
    """The pooler would start at random, differently for whoever loads the base again."""
    folder = tmp_path / "base"
    save_tokenizer(folder, encoder=True)
    BertModel.from_pretrained(bert_folder, add_pooling_layer=False).save_pretrained(folder)
    with pytest.raises(ModelError, match="pooler"):
        tiny_model(tiny_config(folder, data_file))
    tiny_model(tiny_config(folder, data_file, model={"head": "mean"}))


@pytest.mark.parametrize("kind", KINDS)
def test_what_lies_in_the_folder(world: Worlds, kind: str, tmp_path: Path) -> None:
    this = world(kind)
    export_adapter(this.model, moved(this.model), this.config, CLAIM, tmp_path / "out")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    reader = "preprocessor_config.json" if kind == "vit-images" else "tokenizer.json"
    assert {"adapter_model.safetensors", "adapter_config.json", reader, "README.md"} <= names
    assert ("head.safetensors" in names) is kind.startswith("bert-mean")
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in names)
    described = json.loads((tmp_path / "out" / "confide.json").read_text())
    assert described["task"] == this.config.task.kind.value
    assert described["labels"] == list(this.model.task.labels)
    assert described["privacy"] == CLAIM.sentence()
    # Every number that trained is there, as it was trained.
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    total = sum(v.size for n, v in stored.items() if "lora_A" not in n)
    head = load_file(tmp_path / "out" / "head.safetensors") if kind.startswith("bert-mean") else {}
    assert total + sum(v.size for v in head.values()) == this.model.layout.size


def test_an_older_export_is_replaced_whole(world: Worlds, tmp_path: Path) -> None:
    this, folder = world("bert-mean"), tmp_path / "out"
    folder.mkdir()
    (folder / "left over").touch()
    export_adapter(this.model, moved(this.model), this.config, CLAIM, folder)
    assert not (folder / "left over").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_failed_export_leaves_the_older_one(
    world: Worlds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    this, folder = world("bert-mean"), tmp_path / "out"
    export_adapter(this.model, moved(this.model), this.config, CLAIM, folder)
    before = (folder / "head.safetensors").read_bytes()

    def fail(*_: object) -> str:
        raise OSError("no space left")

    monkeypatch.setattr("common.export.model_card", fail)
    with pytest.raises(OSError):
        export_adapter(this.model, moved(this.model, 1), this.config, CLAIM, folder)
    assert (folder / "head.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_claim_says_what_holds() -> None:
    sentence = CLAIM.sentence()
    for part in ("(2.944, 1e-05)", "each single training record", "the server included", "2.500"):
        assert part in sentence
    assert CLAIM.holds
    for unsafe in (
        dataclasses.replace(CLAIM, epsilon_rdp=None, epsilon_pld=None),
        dataclasses.replace(CLAIM, repeatable_noise=True),
    ):
        assert unsafe.sentence().startswith("NOT PRIVATE") and not unsafe.holds
