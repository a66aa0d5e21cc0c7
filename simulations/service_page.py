"""The page on which a person tries what was trained. It loads nothing from anywhere."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from common.config import TaskKind
from common.report_style import STYLE, safe

_STYLE = """
main { max-width: 780px; padding-bottom: 24px; }
form { margin: 18px 0; } label { display: block; font-weight: 600; font-size: 15px; margin: 12px 0 4px; }
textarea, input { width: 100%; font: inherit; color: inherit; background: var(--paper); padding: 8px 10px;
  border: 1px solid var(--faint); border-radius: 6px; }
textarea { resize: vertical; min-height: 4.6em; }
:focus-visible { outline: 3px solid var(--first); outline-offset: 1px; }
button { font: inherit; font-weight: 600; padding: 8px 18px; border-radius: 6px; cursor: pointer;
  border: 1px solid var(--first); background: var(--first); color: var(--paper); }
button.second { background: transparent; color: var(--first); }
button:disabled { opacity: .45; cursor: default; }
.row { display: flex; flex-wrap: wrap; gap: 10px; margin-top: 12px; align-items: center; }
.fields p { margin: 0; }
.fields { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 0 16px; }
.turn { border: 1px solid var(--line); border-radius: 8px; padding: 8px 14px; margin: 10px 0;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.turn.user { background: var(--panel); margin-left: 12%; } .turn.assistant { margin-right: 12%; }
.turn b { display: block; font-size: 13px; font-weight: 500; color: var(--faint); }
.turn small { display: block; margin-top: 4px; color: var(--faint); }
.privacy { font-size: 14px; border-left: 5px solid var(--first); background: var(--panel); padding: 8px 16px;
  border-radius: 0 6px 6px 0; } .privacy p { margin: 0; max-width: none; }
#error:empty, #log:empty, [hidden] { display: none; }
.bar { background: var(--shade); border-radius: 4px; height: 10px; } .bar i { display: block; height: 100%;
  background: var(--first); border-radius: 4px; }
#answer { font-size: 19px; } #answer:empty { display: none; } #answer .small { font-size: 14px; }
@media (max-width: 600px) { .turn.user { margin-left: 0; } .turn.assistant { margin-right: 0; } }
"""


@dataclass(frozen=True)
class About:
    """What the page tells of the service."""

    name: str
    task: TaskKind
    base: str
    labels: tuple[str, ...]
    pairs: bool
    privacy: str
    conversation: bool  # the model reads the turns so far
    longest: int
    needs_token: bool


@dataclass(frozen=True)
class Page:
    html: str
    policy: str  # Content-Security-Policy: this page's own script and style, and this service


@cache
def _part(name: str) -> str:
    return (files("simulations") / name).read_text("utf-8")


def page(about: About) -> Page:
    script, style = _part("page.js"), STYLE + _STYLE
    told = {
        "model": about.name,
        "chat": about.task is TaskKind.CAUSAL_LM,
        "conversation": about.conversation,
        "token": about.needs_token,
    }
    base = about.base.rstrip("/").rpartition("/")[2] if about.base.startswith("/") else about.base
    values = {
        "STYLE": style,
        "SCRIPT": script,
        "ABOUT": json.dumps(told).replace("<", "\\u003c"),
        "NAME": safe(about.name),
        "FACTS": safe(f"{about.task.value} on {base}" + _labels(about.labels)),
        "PRIVACY": safe(about.privacy),
        "KIND": "alarm" if about.privacy.startswith("NOT PRIVATE") else "privacy",
        "FORM": _chat(about) if told["chat"] else _record(about),
        "TOKEN": _TOKEN if about.needs_token else "",
    }
    html = _part("page.html")
    for name, value in values.items():
        html = html.replace(f"[[{name}]]", value)
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src 'unsafe-inline'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return Page(html, policy)


def _labels(labels: tuple[str, ...]) -> str:
    shown = ", ".join(labels[:12]) + (" …" if len(labels) > 12 else "")
    return f" · {shown}" if labels else ""


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


_TOKEN = (
    '<label for="token">Token of this service</label>\n'
    '<input id="token" type="password" autocomplete="off" required>\n'
)


def _chat(about: About) -> str:
    alone = "" if about.conversation else '<p class="small">Each question stands alone, as in training.</p>\n'
    more = (
        '<button class="second" type="button" id="anew">New conversation</button>\n'
        if about.conversation
        else ""
    )
    return f"""{alone}<label for="text">Question</label>
<textarea id="text" rows="3" required></textarea>
<details><summary>How it answers</summary><div class="fields">
<p><label for="temperature">Temperature</label>
<input id="temperature" type="number" min="0" max="2" step="0.1" value="0"></p>
<p><label for="longest">Tokens at most</label>
<input id="longest" type="number" min="1" max="{about.longest}" value="{min(200, about.longest)}"></p>
</div></details>
<div class="row"><button id="send">Ask</button>
<button class="second" type="button" id="stop" disabled>Stop</button>
{more}</div>
"""


def _record(about: About) -> str:
    send = '<div class="row"><button id="send">Answer</button></div>\n'
    match about.task:
        case TaskKind.IMAGE_CLASSIFICATION:
            field = '<input id="image" type="file" accept="image/*" required>'
            return f'<label for="image">Image</label>\n{field}\n{send}'
        case TaskKind.QUESTION_ANSWERING:
            names = ("Question", "Text that answers it")
        case _ if about.pairs:
            names = ("First text", "Second text")
        case _:
            names = ("", "Text")
    first = f'<label for="prompt">{names[0]}</label>\n<textarea id="prompt" rows="2" required></textarea>\n'
    return (
        first if names[0] else ""
    ) + f'<label for="text">{names[1]}</label>\n<textarea id="text" rows="5" required></textarea>\n{send}'
