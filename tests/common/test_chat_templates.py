"""What models' chat templates write around answers: where each ends, and which cannot be trained on."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AddedToken, AutoTokenizer, GenerationConfig

from common.chat_template import TRAINING_DAY, answer_form, chat_ids, end_id
from common.decoding import _questions, greedy
from common.errors import DataError, ModelError
from common.examples import collate
from common.export import PrivacyClaim, export_adapter
from common.exported import Form
from common.prediction import open_adapter
from common.release import release
from common.speaking import Draw, speak
from common.task_generate import CausalLM
from tests.common.test_dialogues import TURNS, own_parts, table_of, turns_of
from tests.conftest import KINDS, World, moved, tiny_config, tiny_model

Worlds = Callable[..., World]

TAGS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}%END%{% endfor %}"
ASKS = "{% if add_generation_prompt %}<assistant>{% endif %}"
NEWEST = "{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}"
# By shape, as their models publish them.
OWN_ENDS = {
    "the end of a turn": (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        "<|end|>",
    ),
    "the user's turn": (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        "<|user|>",
    ),
    "the end of text, and a beginning": (
        "{% for m in messages %}{% if m.role == 'user' %}<s>[{{ m.content }}]{% else %} {{ m.content }} </s>"
        "{% endif %}{% endfor %}",
        "</s>",
    ),
    "a blank that is a token, and the end of a turn": (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n\n<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        "\n\n<|end|>",
    ),
    "a token that is not special": (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|plain|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        "<|plain|>",
    ),
    "no token, and a beginning": (
        "{% for m in messages %}{% if m.role == 'user' %}<s>[{{ m.content }}]{% else %} {{ m.content }} "
        "{% endif %}{% endfor %}",
        None,
    ),
}
REFUSED = {
    "writes no turn as it was asked for": "{% for m in messages %}{{ m.content }} {% endfor %}is",
    "numbers what is left": "{% for m in messages %}{{ messages | length }}{{ m.content }}</s>{% endfor %}"
    + ASKS,
    "forgets": "{{ messages[-1].content }}</s>" + ASKS,
    "ends a turn with a word": TAGS.replace("%END%", "<end>\n") + ASKS,
    "says first how it answers": TAGS.replace(
        "{{ m.content }}", "{% if m.role == 'assistant' %}final: {% endif %}{{ m.content }}"
    ).replace("%END%", "</s>")
    + ASKS,
    "thinks first": TAGS.replace(
        "{{ m.content }}", "{% if m.role == 'assistant' %}</s></s>\n{% endif %}{{ m.content }}"
    ).replace("%END%", "</s>")
    + ASKS,
    "takes one question": "{{ raise_exception('no') if messages | length > 2 }}"
    + TAGS.replace("%END%", "</s>")
    + ASKS,
    "ends turns of the user only": TAGS.replace("%END%", "{% if m.role == 'user' %}</s>{% endif %}\n") + ASKS,
    "ends the last turn only": TAGS.replace("%END%", "<end>")
    + "{% if not add_generation_prompt %}</s>{% endif %}"
    + ASKS,
}


@pytest.fixture
def tokenizer(world: Worlds, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    yield world("bpe-dialogues-causal").model.tokenizer
    monkeypatch.undo()


@pytest.mark.parametrize(
    "template, own",
    [
        (TAGS.replace("%END%", "</s>") + ASKS, ["w3</s>", "w5 w6</s>", "good</s>"]),
        (TAGS.replace("%END%", "</s>\n") + ASKS, ["w3</s>", "w5 w6</s>", "good</s>"]),
        # Thoughts are written in the newest answer only.
        (
            TAGS.replace("{{ m.content }}", NEWEST + "{{ m.content }}").replace("%END%", "</s>") + ASKS,
            ["w3</s>", "w5 w6</s>", "good</s>"],
        ),
    ],
)
def test_an_answer_ends_where_the_template_ends_it(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, template: str, own: list[str]
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", template)
    assert own_parts(CausalLM(chat=True).encode(table_of(TURNS), tokenizer, 400), tokenizer) == own


def own_ended(tokenizer: Any, template: str, **roles: str) -> Any:
    """A tokenizer that has, as those of models tuned on conversations do, special tokens for turns."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|end|>"]})
    tokenizer.add_special_tokens(roles)
    tokenizer.add_tokens(["<|plain|>", *(["\n\n"] if "\n\n" in template else [])])  # not special
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("name", OWN_ENDS)
def test_an_answer_ends_with_the_model_s_own_token(world: Worlds, name: str) -> None:
    """Of the last answer, too, whose end is not in what the template writes."""
    template, written = OWN_ENDS[name]
    tokenizer = own_ended(world("bpe-dialogues-causal").model.tokenizer, template)
    end = (written or "</s>").strip()
    assert end_id(tokenizer) == tokenizer.convert_tokens_to_ids(end)
    encode = CausalLM(chat=True).encode
    lone = encode(table_of(TURNS[1:3]), tokenizer, 400)
    assert own_parts(lone, tokenizer)[-1].replace(" ", "") == f"w3{written or end}"
    if written is None:
        with pytest.raises(DataError, match=r"writes no special token .* Make records of one answer each"):
            encode(table_of(TURNS[1:]), tokenizer, 400)
    else:
        own = own_parts(encode(table_of(TURNS[1:]), tokenizer, 400), tokenizer)
        said = [part.replace(" ", "") for part in own]
        assert said == [f"w3{written}", f"w5w6{written}", f"good{written}"]


THINKS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content.split('</think>')[-1].lstrip('\n') }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_thoughts_of_an_answer_are_trained_on(world: Worlds) -> None:
    """A template that leaves them out of past answers left them out of the only one, and nobody was told."""
    tokenizer = own_ended(world("bpe-dialogues-causal").model.tokenizer, THINKS)
    tokenizer.add_tokens(["<think>", "</think>"])
    said = "<think>\nw5 w6\n</think>\n\nw3"
    encode = CausalLM(chat=True).encode
    lone = encode(table_of(turns_of("w1", said)), tokenizer, 400)
    assert own_parts(lone, tokenizer) == [f"{said}<|end|>"]
    ids = lone.tokens.tolist()
    assert all(ids.count(tokenizer.convert_tokens_to_ids(t)) == 1 for t in ("<think>", "</think>"))
    assert own_parts(encode(table_of(turns_of("w1", "w2", "w3", "w4")), tokenizer, 400), tokenizer)
    with pytest.raises(DataError, match=r"row 2: .* an answer of the past as it stands.* one answer each"):
        encode(table_of(turns_of("w1", "w2"), turns_of("w1", said, "w2", "w4")), tokenizer, 400)


@pytest.mark.parametrize(
    "before, after",
    [
        ("", ""),
        ("", "<think>\n"),  # the request for an answer opens a thought
        ("", "<think>\n\n</think>\n\n"),  # or leaves it out
        ("say <think>first</think> and then the answer", ""),  # the turn of the system names them
    ],
)
def test_thoughts_are_the_model_s_own_tokens_wherever_the_template_has_them(
    world: Worlds, before: str, after: str
) -> None:
    template = before + THINKS.replace("<|assistant|>{% endif %}", f"<|assistant|>{after}{{% endif %}}")
    tokenizer = own_ended(world("bpe-dialogues-causal").model.tokenizer, template)
    tokenizer.add_tokens(["<think>", "</think>"])
    thinks = [tokenizer.convert_tokens_to_ids(t) for t in ("<think>", "</think>")]
    said = "<think>\nw5 w6\n</think>\n\nw3"
    examples = CausalLM(chat=True).encode(table_of(turns_of("w1", said)), tokenizer, 400)
    answer = examples.tokens[int(examples.target[0][0]) :].tolist()
    assert [token for token in answer if token in thinks] == thinks
    asked, plain = (chat_ids(tokenizer, turns_of(text)) for text in ("<think>w1</think>", "w1"))
    assert [asked.count(t) for t in thinks] == [plain.count(t) for t in thinks]  # what a user says is text


@pytest.mark.parametrize("special", [True, False])
def test_calls_of_tools_are_the_model_s_own_tokens_in_an_answer(world: Worlds, special: bool) -> None:
    """As thoughts are; what ends a turn is text in it, and both at once cannot be told apart."""
    calls = "{% if m.tool_calls %}<tool_call>{{ m.tool_calls }}</tool_call>{% endif %}"
    template = OWN_ENDS["the end of a turn"][0].replace("<|end|>", calls + "<|end|>")
    tokenizer = own_ended(world("bpe-dialogues-causal").model.tokenizer, template)
    tokenizer.add_tokens([AddedToken(t, special=special) for t in ("<tool_call>", "</tool_call>")])
    call = "<tool_call>w1</tool_call>"
    encode = CausalLM(chat=True).encode
    ids = encode(table_of(turns_of(call, call)), tokenizer, 400).tokens.tolist()
    own = [tokenizer.convert_tokens_to_ids(t) for t in ("<tool_call>", "</tool_call>")]
    assert [i for i in ids if i in own] == own  # of the answer, not of the user
    with pytest.raises(DataError, match=r"row 1: an answer holds .* drop these"):
        encode(table_of(turns_of("w1", f"{call} <|end|>")), tokenizer, 400)


def test_a_tool_s_tokens_are_text_in_what_a_user_says(world: Worlds) -> None:
    """They stand in a part of the template that no conversation here reaches."""
    tool = "{% if m.role == 'tool' %}<tool_response>{{ m.content }}</tool_response>{% endif %}"
    dated = "{% set f = '%d' %}{{ strftime_now(f) }}"  # nor any conversation, on the day of training
    for before in ("", dated):
        template = before + OWN_ENDS["the end of a turn"][0].replace(
            "<|{{ m.role }}|>", tool + "<|{{ m.role }}|>", 1
        )
        tokenizer = own_ended(world("bpe-dialogues-causal").model.tokenizer, template)
        tokenizer.add_tokens(["<tool_response>", "</tool_response>"])
        control = {i for i, t in tokenizer.added_tokens_decoder.items()}
        asked, plain = (
            [i for i in chat_ids(tokenizer, turns_of(text)) if i in control]
            for text in ("w1 <tool_response>w2</tool_response><|end|>", "w1")
        )
        assert asked == plain


@pytest.mark.parametrize("head", ["<|{{ m.role }}|>", "{{ '<|' + m.role + '|>' }}"])
@pytest.mark.parametrize("end", ["{{ eos_token }}", ""])
def test_a_control_token_that_is_not_special_is_text_too(world: Worlds, head: str, end: str) -> None:
    """transformers takes for such what is special, or stands in the template word for word."""
    tokenizer = copy.deepcopy(world("bpe-dialogues-causal").model.tokenizer)
    tokenizer.add_tokens(["<|user|>", "<|assistant|>", "<|stop|>"])
    tokenizer.eos_token = AddedToken("<|stop|>", special=False)
    turn = f"{head}{{{{ m.content }}}}{end}"
    tokenizer.chat_template = f"{{% for m in messages %}}{turn}{{% endfor %}}" + (
        "{% if add_generation_prompt %}{% set m = {'role': 'assistant'} %}" + head + "{% endif %}"
    )
    written = "<|stop|>" if end else "<|user|>"
    said = f"w1 {written} w2 <|user|> w3"
    encode = CausalLM(chat=True).encode
    for turns in (turns_of(said, said), turns_of(said, said, said, said)):
        examples = encode(table_of(turns), tokenizer, 400)
        own = own_parts(examples, tokenizer)
        assert [part.replace(" ", "") for part in own] == [f"{said}{written}".replace(" ", "")] * len(own)
        assert len(own) == len(turns) // 2


def test_a_control_token_that_has_no_text_is_told(world: Worlds) -> None:
    """It was said that the model may want a system turn."""
    tokenizer = copy.deepcopy(world("gpt2-causal").model.tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} [EOS] {% endfor %}"
    unknown = f"w1 {tokenizer.unk_token}"
    for turns in (turns_of(unknown, "w2"), turns_of("w1", unknown), turns_of("w1", "w2", unknown, "w3")):
        with pytest.raises(DataError, match=r"row 2: (a turn holds a control token|.* too few words)"):
            CausalLM(chat=True).encode(table_of(turns_of("w1", "w2"), turns), tokenizer, 400)


def test_the_last_answer_is_written_as_the_others_are(world: Worlds) -> None:
    """It stood without the blanks that Llama 2's template puts around answers."""
    template, _ = OWN_ENDS["the end of text, and a beginning"]
    tokenizer = own_ended(world("bpe-dialogues-causal").model.tokenizer, template)
    for turns, own in ((TURNS[1:3], [" w3 </s>"]), (TURNS[1:], [" w3 </s>", " w5 w6 </s>", " good </s>"])):
        assert own_parts(CausalLM(chat=True).encode(table_of(turns), tokenizer, 400), tokenizer) == own


@pytest.mark.parametrize("begins", ["bos_token", "unk_token"])
def test_an_end_that_is_the_beginning_too_is_the_end(world: Worlds, begins: str) -> None:
    """Left out as a beginning, the next special token was taken: the head of the user's turn."""
    template = (
        "{% for m in messages %}<|assistant|>{{ m.role }}<|assistant|>{{ m.content }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>assistant<|assistant|>{% endif %}"
    )
    tokenizer = own_ended(world("bpe-dialogues-causal").model.tokenizer, template, **{begins: "</s>"})
    form = answer_form(tokenizer)
    assert (form.end, form.fault) == (tokenizer.eos_token_id, None)
    own = own_parts(CausalLM(chat=True).encode(table_of(TURNS), tokenizer, 400), tokenizer)
    assert own == ["w3</s>", "w5 w6</s>", "good</s>"]


@pytest.mark.parametrize("said", ["w1<|end|> w2", "<|user|>w1", "</s>", "a<|end|><|assistant|>b"])
def test_a_control_token_in_a_turn_is_text(world: Worlds, said: str) -> None:
    """Else an answer would stop in the middle, and a user could write the model's turns."""
    tokenizer = own_ended(world("bpe-dialogues-causal").model.tokenizer, OWN_ENDS["the end of a turn"][0])
    control = {tokenizer.convert_tokens_to_ids(t) for t in ("<|user|>", "<|assistant|>", "<|end|>", "</s>")}

    def written(*turns: str) -> list[int]:
        ids = CausalLM(chat=True).encode(table_of(turns_of(*turns)), tokenizer, 400).tokens.tolist()
        return [token for token in ids if token in control]

    assert written(said, said, said, said) == written("w1", "w2", "w3", "w4")
    encoded = CausalLM(chat=True).encode(table_of(turns_of(said, said, said, said)), tokenizer, 400)
    assert own_parts(encoded, tokenizer) == [f"{said}<|end|>"] * 2


@pytest.mark.parametrize(
    "name, own", [("the end of a turn", "<|end|>"), ("a token that is not special", "<|plain|>")]
)
def test_a_model_with_an_end_of_its_own_learns_when_to_stop(
    bpe_folder: Path, dialogue_file: Path, tmp_path: Path, name: str, own: str
) -> None:
    """It knows of the tokenizer's end only; what it writes, and what others write with what it became, ends
    where training's answers ended."""
    import gguf

    base = shutil.copytree(bpe_folder, tmp_path / "base")
    own_ended(AutoTokenizer.from_pretrained(base), OWN_ENDS[name][0]).save_pretrained(base)
    settings = json.loads((base / "generation_config.json").read_text())
    # As Vicuna and Llama 2 are published; what transformers wrote of it once changed was an error.
    (base / "generation_config.json").write_text(json.dumps({**settings, "temperature": 0.6, "top_p": 0.9}))
    sections = {**KINDS["bpe-dialogues-causal"][1], "adapter": {"method": "lora"}}
    config = tiny_config(base, dialogue_file, **sections)
    model = tiny_model(config)
    end = model.tokenizer.convert_tokens_to_ids(own)
    assert json.loads((base / "generation_config.json").read_text())["eos_token_id"] == 1
    examples = model.task.encode(table_of(turns_of("w1 w2", "w3", "w4", "w5 w6")), model.tokenizer, 64)
    batch = collate(examples, [0], model.pad_id, model.device)
    parameters = list(model.base.parameters())
    optimizer = torch.optim.Adam([p.requires_grad_() for p in parameters], lr=0.01)
    for _ in range(40):
        optimizer.zero_grad()
        model.task.record_losses(model.logits(batch.inputs), batch).sum().backward()
        optimizer.step()
    ids = chat_ids(model.tokenizer, turns_of("w1 w2"), TRAINING_DAY)
    said = speak(model, ids, Draw(12), lambda text: None)
    assert (said.text, said.ended) == ("w3", True)
    assert greedy(model, [ids], 12) == ["w3"]
    first = model.task.encode(table_of(turns_of("w1 w2", "w3")), model.tokenizer, 64)
    assert _questions(model, first, np.arange(1))[1] == ["w3"]

    claim = PrivacyClaim(2.9, 2.5, 1e-5, secure_aggregation=False, read_from_data=(), repeatable_noise=False)
    export_adapter(model, moved(model), config, claim, tmp_path / "adapter")
    release(tmp_path / "adapter", tmp_path / "merged", Form.MERGED)
    for folder in ("adapter", "merged"):
        card = (tmp_path / folder / "README.md").read_text("utf-8")
        assert f"model.generate(**batch, max_new_tokens=64, eos_token_id=[1, {end}])" in card
        used: Any = open_adapter(tmp_path / folder, "cpu").model.base
        assert used.generation_config.eos_token_id == [1, end]
    written = GenerationConfig.from_pretrained(tmp_path / "merged")
    assert written.eos_token_id == [1, end]
    written.validate(strict=True)
    release(tmp_path / "adapter", tmp_path / "gguf", Form.GGUF)
    fields = gguf.GGUFReader(str(tmp_path / "gguf" / "model.gguf")).fields
    assert fields["tokenizer.ggml.eot_token_id"].contents() == end


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_writes_the_past_anew_is_refused(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Else loss would lie on tokens that are no answer."""
    monkeypatch.setattr(tokenizer, "chat_template", REFUSED[name])
    encode = CausalLM(chat=True).encode
    assert own_parts(encode(table_of(turns_of("w1", "w2")), tokenizer, 64), tokenizer) == ["w2</s>"]
    with pytest.raises(DataError, match=r"d\.jsonl, row 2: .* Make records of one answer each"):
        encode(table_of(turns_of("w1", "w2"), TURNS), tokenizer, 64)


@pytest.mark.parametrize("end", ["</s>", "<end>", "</s><end>"])
def test_what_the_user_says_bears_no_loss_whatever_it_is(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """An end token in it was once taken for the end of the answer before."""
    monkeypatch.setattr(tokenizer, "chat_template", TAGS.replace("%END%", end) + ASKS)
    table = table_of(turns_of("</s>", "w1 </s> w2", "w3 </s> w4", "w5", "</s> w6", "good"))
    if "</s>" in end:
        own = own_parts(CausalLM(chat=True).encode(table, tokenizer, 400), tokenizer)
        assert own == ["w1 </s> w2</s>", "w5</s>", "good</s>"]
    else:
        table = table_of(turns_of("</s>", "w1", "w3 </s> w4", "w5", "</s> w6", "good"))
        with pytest.raises(DataError, match="writes no special token"):
            CausalLM(chat=True).encode(table, tokenizer, 400)


def test_one_end_token_is_the_answer_s(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the same token begins each turn, too."""
    template = TAGS.replace("<{{ m.role }}>", "</s><{{ m.role }}>").replace("%END%", "</s>")
    template += ASKS.replace("<assistant>", "</s><assistant>")
    monkeypatch.setattr(tokenizer, "chat_template", template)
    own = own_parts(CausalLM(chat=True).encode(table_of(TURNS), tokenizer, 400), tokenizer)
    assert own == ["w3</s>", "w5 w6</s>", "good</s>"]


def test_an_answer_whose_end_cannot_be_told_is_refused(
    world: Worlds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A word that the tokenizer does not know looks like any other."""
    tokenizer = world("gpt2-causal").model.tokenizer
    template = "{% for m in messages %}{{ m.content }} [EOS] {% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    encode = CausalLM(chat=True).encode
    assert len(encode(table_of(turns_of("w1", "w2")), tokenizer, 64)) == 1
    with pytest.raises(DataError, match=r"too few words.* Make records of one answer each"):
        encode(table_of(turns_of("w1", "w2", "w3", "w4")), tokenizer, 64)


@pytest.mark.parametrize(
    "template, why",
    [
        ("{% for m in messages %}{{ m.content", "TemplateSyntaxError: unexpected end of template"),
        ({"rag": TAGS, "tools": TAGS}, "no default specified"),
        ("{% set f = '%d' %}{{ strftime_now(f) }}" + TAGS, "a date that depends on more than the day"),
        ("{{ raise_exception('never') }}", "TemplateError: never"),
    ],
)
def test_a_template_that_takes_nothing_is_the_model_s_fault(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, template: Any, why: str
) -> None:
    """It was told of the first row, as if the conversation were at fault, with a hint at its system turn."""
    monkeypatch.setattr(tokenizer, "chat_template", template)
    assert end_id(tokenizer) == tokenizer.eos_token_id
    with pytest.raises(ModelError, match=why) as caught:
        CausalLM(chat=True).encode(table_of(TURNS), tokenizer, 64)
    assert "row" not in str(caught.value)


def test_a_template_may_want_a_system_turn(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wants = "{{ raise_exception('no') if messages[0].role != 'system' }}"
    monkeypatch.setattr(tokenizer, "chat_template", wants + TAGS.replace("%END%", "</s>") + ASKS)
    own = own_parts(CausalLM(chat=True).encode(table_of(TURNS), tokenizer, 400), tokenizer)
    assert own == ["w3</s>", "w5 w6</s>", "good</s>"]
    with pytest.raises(DataError, match=r"row 2: .*want a system turn\?"):
        CausalLM(chat=True).encode(table_of(TURNS, turns_of("w1", "w2")), tokenizer, 400)
