"""What is handed on: adapters as they are, merged models and GGUF files, opened without us."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common import release as release_module
from common.adapter import write_vector
from common.config import RunConfig
from common.errors import ConfigError, ModelError
from common.export import PrivacyClaim, export_adapter
from common.exported import Form
from common.models import AdaptedModel
from common.prediction import open_adapter
from common.release import release
from common.tasks import collate
from tests.conftest import KINDS, World, moved, tiny_config, tiny_model

Worlds = Callable[..., World]
CLAIM = PrivacyClaim(2.94321, 2.5, 1e-5, secure_aggregation=False, read_from_data=(), repeatable_noise=False)
CAUSAL = {"task": {"kind": "causal-lm"}}

# Runs the card's code of each folder where we cannot be had, without peft, and leaves the logits beside it.
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
    assert "peft" not in code
    names = {}
    exec(code, names)
    inputs = dict(names["batch"])
    if "generate" in code:
        inputs["decoder_input_ids"] = torch.tensor([[0, 8, 9]])
    with torch.no_grad():
        outputs = {"logits": names["logits"]} if "logits =" in code else dict(names["model"](**inputs))
    kept = {name: value.detach().numpy() for name, value in outputs.items() if "logits" in name}
    np.savez("outsider.npz", **kept, **{"in_" + name: value.numpy() for name, value in inputs.items()})
"""


def adapter(model: AdaptedModel, config: RunConfig, folder: Path) -> Path:
    export_adapter(model, moved(model), config, CLAIM, folder)
    write_vector(model.parameters, model.layout, moved(model))
    return folder


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
    """Whether the adapter on its base gives what the outsider found in `folder`."""
    write_vector(model.parameters, model.layout, moved(model))
    with np.load(folder / "outsider.npz") as found, torch.no_grad():
        output = model.module(
            **{n[3:]: torch.from_numpy(found[n]) for n in found.files if n.startswith("in_")}
        )
        wanted = {"logits": output} if isinstance(output, torch.Tensor) else output
        names = [n for n in found.files if "logits" in n]
        return bool(names) and all(np.allclose(found[n], wanted[n].numpy(), atol=1e-4) for n in names)


def test_every_merged_model_opens_without_peft_and_us(world: Worlds, tmp_path: Path) -> None:
    targets = {}
    for kind in KINDS:
        this = world(kind, "lora")
        source = adapter(this.model, this.config, tmp_path / f"{kind}-adapter")
        targets[kind] = tmp_path / kind
        done = release(source, targets[kind], Form.MERGED)
        assert done.difference is not None and done.difference < 1e-4
    open_as_an_outsider(*targets.values())
    for kind, target in targets.items():
        assert agrees(world(kind, "lora").model, target), kind
        assert not (target / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_model_answers_as_its_adapter(world: Worlds, kind: str, tmp_path: Path) -> None:
    this = world(kind)
    source = adapter(this.model, this.config, tmp_path / "adapter")
    release(source, tmp_path / "merged", Form.MERGED)
    batch = collate(this.examples, [0, 1, 2], this.model.pad_id, this.model.device)
    with torch.no_grad():
        ours, theirs = (
            this.model.logits(batch.inputs),
            open_adapter(tmp_path / "merged", "cpu").model.logits(batch.inputs),
        )
    assert torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("form", [Form.PEFT, Form.MERGED])
@pytest.mark.parametrize("kind", ["bert-mean", "llama-causal"])
def test_the_claim_travels(world: Worlds, kind: str, form: Form, tmp_path: Path) -> None:
    this = world(kind)
    source = adapter(this.model, this.config, tmp_path / "adapter")
    (source / "README.md").write_text("# A card that somebody cut short\n")
    release(source, tmp_path / "out", form)
    assert json.loads((tmp_path / "out" / "confide.json").read_text())["privacy"] == CLAIM.sentence()
    if form is Form.MERGED:
        assert CLAIM.sentence() in (tmp_path / "out" / "README.md").read_text("utf-8")


def test_an_adapter_without_a_claim_is_none(world: Worlds, tmp_path: Path) -> None:
    this = world("bert-mean")
    source = adapter(this.model, this.config, tmp_path / "adapter")
    told = json.loads((source / "confide.json").read_text())
    del told["privacy"]
    (source / "confide.json").write_text(json.dumps(told))
    with pytest.raises(ModelError, match="is no adapter"):
        release(source, tmp_path / "out", Form.MERGED)


def test_gguf_reads_back_as_the_adapter(
    bpe_folder: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gguf

    monkeypatch.setattr("common.gguf_file.end_id", lambda tokenizer: None)  # as older files are
    config = tiny_config(bpe_folder, data_file, **CAUSAL, adapter={"method": "lora"})
    model = tiny_model(config)
    done = release(adapter(model, config, tmp_path / "adapter"), tmp_path / "out", Form.GGUF)
    assert done.difference is not None and done.difference < 1e-4
    open_as_an_outsider(tmp_path / "out")
    assert agrees(model, tmp_path / "out")
    fields = gguf.GGUFReader(str(tmp_path / "out" / "model.gguf")).fields
    assert fields["general.description"].contents() == CLAIM.sentence()
    assert fields["tokenizer.chat_template"].contents() == model.tokenizer.chat_template
    assert CLAIM.sentence() in (tmp_path / "out" / "README.md").read_text("utf-8")

    # A GGUF file is a base model, too: its tokenizer is copied then.
    again = tiny_config(
        tmp_path / "out", data_file, **CAUSAL, model={"gguf_file": "model.gguf"}, adapter={"method": "lora"}
    )
    monkeypatch.undo()
    second = tiny_model(again)
    assert second.tokenizer.eos_token == "</s>" and second.tokenizer.chat_template
    release(adapter(second, again, tmp_path / "adapter2"), tmp_path / "out2", Form.GGUF)
    release(tmp_path / "adapter2", tmp_path / "merged2", Form.MERGED)
    open_as_an_outsider(tmp_path / "merged2")
    assert agrees(second, tmp_path / "merged2")
    copied = gguf.GGUFReader(str(tmp_path / "out2" / "model.gguf")).fields
    for name in fields:
        if name.startswith("tokenizer."):
            assert copied[name].contents() == fields[name].contents(), name
    assert set(copied) - set(fields) == {"tokenizer.ggml.eot_token_id"}
    assert copied["tokenizer.ggml.eot_token_id"].contents() == second.tokenizer.eos_token_id


def test_gguf_with_another_tokenizer_is_not_written(
    bpe_folder: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokenizer that lies beside the file was read for the one in it."""
    import gguf

    whole = gguf.GGUFWriter.add_token_merges
    monkeypatch.setattr(gguf.GGUFWriter, "add_token_merges", lambda self, merges: whole(self, merges[:1]))
    config = tiny_config(bpe_folder, data_file, **CAUSAL, adapter={"method": "lora"})
    with pytest.raises(ModelError, match=r"the tokenizer in the GGUF file reads .* Nothing was written"):
        release(adapter(tiny_model(config), config, tmp_path / "adapter"), tmp_path / "out", Form.GGUF)
    assert not (tmp_path / "out").exists()


def test_gguf_keeps_the_template_of_several_that_is_the_default(
    bpe_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    """It was left out, so that llama.cpp took another; the end of answers was the default one's."""
    import gguf

    config = tiny_config(bpe_folder, data_file, **CAUSAL, adapter={"method": "lora"})
    model = tiny_model(config)
    default = model.tokenizer.chat_template
    model.tokenizer.chat_template = {"default": default, "tools": "{{ messages }}"}
    release(adapter(model, config, tmp_path / "adapter"), tmp_path / "out", Form.GGUF)
    fields = gguf.GGUFReader(str(tmp_path / "out" / "model.gguf")).fields
    assert fields["tokenizer.chat_template"].contents() == default


def test_gguf_says_for_what_it_is(world: Worlds, tmp_path: Path) -> None:
    for kind, reason in (
        ("bert-mean", "is for causal-lm"),
        ("gpt2-causal", "Llama family"),
        ("llama-causal", "byte-level BPE"),
    ):
        this = world(kind)
        source = adapter(this.model, this.config, tmp_path / kind)
        with pytest.raises(ModelError, match=reason):
            release(source, tmp_path / "out", Form.GGUF)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bert-mean", "gpt2-causal", "llama-causal"]


def test_a_model_that_is_not_what_was_trained_is_not_written(
    world: Worlds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    this = world("llama-causal", "lora")
    source = adapter(this.model, this.config, tmp_path / "adapter")

    def stale(folder: Path, device: str = "auto") -> Any:
        """As if merging had lost the adapter."""
        opened = open_adapter(source if folder != source else folder, device)
        if folder != source:
            for name, p in opened.model.module.named_parameters():
                if ".lora_B." in name:
                    p.data.zero_()
        return opened

    monkeypatch.setattr(release_module, "open_adapter", stale)
    with pytest.raises(ModelError, match="does not give the adapter's logits"):
        release(source, tmp_path / "out", Form.MERGED)
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_a_target_that_cannot_be(world: Worlds, tmp_path: Path) -> None:
    this = world("bert-mean")
    source = adapter(this.model, this.config, tmp_path / "run" / "adapter")
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match="there already"):
        release(source, tmp_path / "there", Form.PEFT)
    with pytest.raises(ConfigError, match="inside the adapter"):
        release(source, source / "merged", Form.MERGED)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot write to"):
        release(source, tmp_path / "file" / "out", Form.MERGED)
    with pytest.raises(ModelError, match="is no adapter"):
        release(tmp_path / "nothing", tmp_path / "out", Form.MERGED)
    release(tmp_path / "run", tmp_path / "deep" / "er" / "out", Form.PEFT)  # the run's folder will do
    with pytest.raises(ModelError, match="merged already"):
        release(source, tmp_path / "merged", Form.MERGED)
        release(tmp_path / "merged", tmp_path / "again", Form.MERGED)
