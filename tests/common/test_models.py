"""Loading: what trains, what does not, the same start for everyone, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from common.adapter import read_vector, write_vector
from common.errors import ConfigError, ModelError
from common.models import AdaptedModel, Part, load_model, load_tokenizer, model_path, pick_device
from common.tasks import collate
from tests.conftest import KINDS, LABELS, World, moved, tiny_config, tiny_model

EVERY = [(kind, method) for kind in KINDS for method in ("ffa", "rolora", "lora")]


def kinds_of(names: list[str] | dict[str, object]) -> set[str]:
    """Which kinds of parameters there are: A, B, head."""
    return {"A" if ".lora_A." in n else "B" if ".lora_B." in n else "head" for n in names}


def states(model: AdaptedModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.module.named_parameters()}


@pytest.mark.parametrize(("kind", "method"), EVERY)
def test_what_trains(world: Callable[..., World], kind: str, method: str) -> None:
    model = world(kind, method).model
    head = set() if kind.endswith(("causal", "writes")) else {"head"}
    assert kinds_of(list(model.parameters)) == head | ({"B"} if method == "ffa" else {"A", "B"})
    assert list(model.parameters) == sorted(model.parameters)
    assert all(p.dtype == torch.float32 for p in model.parameters.values())
    assert not any(p.requires_grad for p in model.module.parameters())
    assert not any(layer.training for layer in model.module.modules())


@pytest.mark.parametrize(("kind", "method"), EVERY)
def test_the_parts(world: Callable[..., World], kind: str, method: str) -> None:
    model = world(kind, method).model
    head = set() if kind.endswith(("causal", "writes")) else {"head"}
    assert model.active(Part.ALL) == dict(model.parameters)
    assert kinds_of(list(model.active(Part.HEAD))) == head
    assert kinds_of(list(model.active(Part.B_AND_HEAD))) == head | {"B"}
    assert kinds_of(list(model.active(Part.A_AND_HEAD))) == head | (set() if method == "ffa" else {"A"})


@pytest.mark.parametrize(("kind", "method"), EVERY)
def test_only_the_active_part_trains_inside_training(
    world: Callable[..., World], kind: str, method: str
) -> None:
    model = world(kind, method).model
    for part in Part:
        active = model.active(part)
        with model.training(active):
            chosen = {n for n, p in model.module.named_parameters() if p.requires_grad}
            assert chosen == set(active)
            for layer in model.module.modules():
                own = list(layer.parameters(recurse=False))
                assert not own or layer.training == any(p.requires_grad for p in own)
        assert not any(p.requires_grad for p in model.module.parameters())
        assert not any(m.training for m in model.module.modules())


def test_an_error_inside_training_is_undone(world: Callable[..., World]) -> None:
    model = world("bert-mean").model
    with pytest.raises(RuntimeError), model.training(model.active(Part.ALL)):
        raise RuntimeError
    assert not any(p.requires_grad for p in model.module.parameters())
    assert not any(m.training for m in model.module.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_every_trainable_number_moves_the_loss(world: Callable[..., World], kind: str) -> None:
    this = world(kind, "lora")
    model = this.model
    write_vector(model.parameters, model.layout, moved(model))
    with model.training(model.parameters):
        batch = collate(this.examples, range(8), model.pad_id, model.device)
        model.task.record_losses(model.logits(batch.inputs), batch).sum().backward()
        for name, p in model.parameters.items():
            if "qa_outputs" in name and name.endswith("bias"):
                continue  # moves all places alike, which a softmax over places does not see
            assert p.grad is not None and float(p.grad.norm()) > 0, name


def test_questions_are_told_from_texts(world: Callable[..., World]) -> None:
    """peft's own class for question answering keeps the token types to itself."""
    this = world("bert-answers")
    batch = collate(this.examples, [0], this.model.pad_id, this.model.device)
    alike = {**batch.inputs, "token_type_ids": torch.zeros_like(batch.inputs["token_type_ids"])}
    with torch.no_grad():
        assert not torch.allclose(this.model.logits(batch.inputs), this.model.logits(alike))


@pytest.mark.parametrize("kind", KINDS)
def test_everyone_starts_alike(kind: str, world: Callable[..., World], data_file: Path) -> None:
    """The start is a function of the seed, whatever torch has drawn before."""
    sections, path = KINDS[kind][1], Path(world(kind).config.model.name)

    def load(seed: int) -> dict[str, torch.Tensor]:
        torch.rand(seed + 3)
        return states(tiny_model(tiny_config(path, data_file, **sections, run={"seed": seed})))

    before = torch.random.get_rng_state()
    one, two, other = load(1), load(1), load(2)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    frozen = [name for name in one if ".lora_A." in name]
    assert frozen and not any(torch.equal(one[name], other[name]) for name in frozen)
    torch.random.set_rng_state(before)


def test_loading_leaves_torch_s_randomness_alone(bert_folder: Path, data_file: Path) -> None:
    before = torch.random.get_rng_state()
    tiny_model(tiny_config(bert_folder, data_file))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_at_its_start_changes_nothing(world: Callable[..., World], kind: str) -> None:
    fresh = tiny_model(world(kind).config)
    batch = collate(world(kind).examples, range(4), fresh.pad_id, fresh.device)
    with torch.no_grad():
        adapted = fresh.logits(batch.inputs)
        with fresh.peft.disable_adapter():
            base = fresh.logits(batch.inputs)
    assert torch.allclose(adapted, base, atol=1e-6)
    if kind.startswith("bert-mean"):  # our head starts at zero
        assert torch.equal(adapted, torch.zeros_like(adapted))


def test_the_mean_head_reads_the_mean_over_the_record_s_own_tokens(
    world: Callable[..., World], bert_folder: Path
) -> None:
    model = tiny_model(world("bert-mean").config)
    plain = AutoModel.from_pretrained(bert_folder).eval()
    examples = world("bert-mean").examples
    batch = collate(examples, range(5), model.pad_id, model.device)
    with torch.no_grad():
        features = model.module.features(**batch.inputs)  # type: ignore[operator]
        for row in range(5):
            ids = torch.from_numpy(examples.tokens[examples.starts[row] : examples.starts[row + 1]]).long()
            hidden = plain(input_ids=ids[None]).last_hidden_state[0]
            assert torch.allclose(features[row], hidden.mean(dim=0), atol=1e-5)


def test_a_decoder_s_padding_is_its_end_token_and_changes_nothing(world: Callable[..., World]) -> None:
    this = world("gpt2-classify")
    model = this.model
    assert model.pad_id == model.tokenizer.eos_token_id
    short = int(this.examples.lengths.argmin())
    with torch.no_grad():
        alone = model.logits(collate(this.examples, [short], model.pad_id, model.device).inputs)
        beside = model.logits(
            collate(
                this.examples, [short, int(this.examples.lengths.argmax())], model.pad_id, model.device
            ).inputs
        )
    assert torch.allclose(alone[0], beside[0], atol=1e-5)


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("bert_folder", ["dense", "key", "query", "value"]),
        ("gpt2_folder", ["c_attn", "c_fc", "c_proj"]),
        ("llama_folder", ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]),
    ],
)
def test_an_unknown_target_module_lists_the_candidates(
    request: pytest.FixtureRequest, data_file: Path, folder: str, expected: list[str]
) -> None:
    path = request.getfixturevalue(folder)
    with pytest.raises(ModelError) as caught:
        tiny_model(tiny_config(path, data_file, adapter={"target_modules": ["quary"]}))
    assert "['quary'] not found" in str(caught.value) and str(expected) in str(caught.value)


def test_target_modules_are_taken(bert_folder: Path, data_file: Path) -> None:
    model = tiny_model(tiny_config(bert_folder, data_file, adapter={"target_modules": ["key"], "rank": 3}))
    lora = [n for n in model.parameters if ".lora_" in n]
    assert len(lora) == 2 and all(".key." in n for n in lora)
    assert all(model.parameters[n].shape == (16, 3) for n in lora)


@pytest.mark.parametrize("kind", ["bert-default", "bert-mean", "gpt2-causal", "llama-causal"])
@pytest.mark.parametrize(("layers", "index"), [([-1], 1), ([0], 0), ([1, -1], 1)])
def test_layers(
    kind: str, layers: list[int], index: int, request: pytest.FixtureRequest, data_file: Path
) -> None:
    folder, sections = KINDS[kind]
    path = request.getfixturevalue(f"{folder}_folder")
    model = tiny_model(tiny_config(path, data_file, **sections, adapter={"layers": layers}))
    lora = [n for n in model.parameters if ".lora_" in n]
    assert lora and all(f".{index}." in n for n in lora)


@pytest.mark.parametrize("layers", [[2], [-3], [0, 7]])
def test_layers_that_the_model_lacks(bert_folder: Path, data_file: Path, layers: list[int]) -> None:
    with pytest.raises(ModelError, match="not among the 2 layers"):
        tiny_model(tiny_config(bert_folder, data_file, adapter={"layers": layers}))


def test_a_head_that_does_not_train(bert_folder: Path, data_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"adapter\.train_head"):
        tiny_config(bert_folder, data_file, model={"head": "mean"}, adapter={"train_head": False})
    model = tiny_model(tiny_config(bert_folder, data_file, adapter={"train_head": False}))
    assert kinds_of(list(model.parameters)) == {"B"}
    assert model.active(Part.HEAD) == {}


def copied(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


def test_pickled_weights_are_refused_unless_allowed(
    bert_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    folder = copied(bert_folder, tmp_path / "pickled")
    weights = AutoModel.from_pretrained(bert_folder).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"safetensors unless model\.allow_pickle"):
        tiny_model(tiny_config(folder, data_file))
    allowed = tiny_model(tiny_config(folder, data_file, model={"allow_pickle": True}))
    original = tiny_model(tiny_config(bert_folder, data_file))
    pairs = zip(states(allowed).values(), states(original).values(), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)


@pytest.mark.parametrize("name", ["no/such-model", "nowhere", "./missing"])
def test_a_model_that_is_not_there(data_file: Path, name: str) -> None:
    with pytest.raises(ModelError, match=r"cannot load model\.name"):
        tiny_model(tiny_config(Path(name), data_file))


def test_a_folder_that_holds_no_model(data_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot load model\.name"):
        tiny_model(tiny_config(tmp_path, data_file))


def test_a_model_that_is_loaded_otherwise(t5_folder: Path, data_file: Path, tmp_path: Path) -> None:
    """The first showed the names of two hundred architectures, the second did not say what to set."""
    causal = {"task": {"kind": "causal-lm", "labels": ()}, "data": {"label": None}}
    with pytest.raises(ModelError, match=r"family T5, which cannot do this task .*another task\.kind"):
        tiny_model(tiny_config(t5_folder, data_file, **causal))
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"For m\.gguf, which is there, set model\.gguf_file"):
        tiny_model(tiny_config(tmp_path, data_file))


def test_weights_cut_short(bert_folder: Path, data_file: Path, tmp_path: Path) -> None:
    folder = copied(bert_folder, tmp_path / "short")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"cannot load model\.name"):
        tiny_model(tiny_config(folder, data_file))


def test_weights_that_are_not_finite(bert_folder: Path, data_file: Path, tmp_path: Path) -> None:
    folder = copied(bert_folder, tmp_path / "damaged")
    weights = load_file(folder / "model.safetensors")
    weights["pooler.dense.bias"][3] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="not finite"):
        tiny_model(tiny_config(folder, data_file))


def test_weights_of_another_shape(bert_folder: Path, data_file: Path, tmp_path: Path) -> None:
    folder = copied(bert_folder, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    with pytest.raises(ModelError, match=r"cannot load model\.name"):
        tiny_model(tiny_config(folder, data_file))


def test_code_beside_a_model_is_not_run(bert_folder: Path, data_file: Path, tmp_path: Path) -> None:
    folder = copied(bert_folder, tmp_path / "code")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "ours", "auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ModelError):
        tiny_model(tiny_config(folder, data_file))
    assert not (tmp_path / "ran").exists()


def test_sample_models() -> None:
    with pytest.raises(ModelError, match="all-minilm-l6-v2"):
        model_path("sample:gpt5")
    assert model_path("somewhere/else") == "somewhere/else"


@pytest.mark.parametrize("name", ["tpu9", "cuda:99" if not torch.cuda.is_available() else "gpu"])
def test_devices(name: str) -> None:
    assert pick_device("cpu").type == "cpu"
    with pytest.raises(ModelError, match=r"run\.device"):
        pick_device(name)


def test_padding_is_on_the_right(bert_folder: Path, data_file: Path) -> None:
    assert load_tokenizer(tiny_config(bert_folder, data_file).model).padding_side == "right"


def test_labels_name_the_outputs(world: Callable[..., World]) -> None:
    model = load_model(world("bert-default").config, world("bert-default").model.task)
    assert list(model.peft.config.id2label.values()) == list(LABELS)
    assert read_vector(model.parameters, model.layout).shape == (model.layout.size,)
