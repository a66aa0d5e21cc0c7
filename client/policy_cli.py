"""`confide client policy`: show, explain and change what a site allows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from client.cli_options import (
    AsJson,
    AskPassphrase,
    Folder,
    PassphraseFile,
    WitnessFile,
    print_json,
    read_passphrase,
    say,
)
from client.ledger_cli import open_ledger
from common.errors import ConfigError

if TYPE_CHECKING:
    from client.identity import SiteFolder
    from client.policy import SitePolicy


def policy(
    folder: Folder,
    explain: Annotated[
        bool, typer.Option("--explain", help="Each key: its value here, its default, and what it stops.")
    ] = False,
    new: Annotated[
        Path | None,
        typer.Option(
            "--set",
            metavar="FILE",
            help="Put FILE in force: sign it into the ledger, and keep it as policy.toml.",
            show_default=False,
        ),
    ] = None,
    write: Annotated[
        bool, typer.Option("--write", help="Write the strict default to policy.toml, if there is none.")
    ] = False,
    passphrase_file: PassphraseFile = None,
    ask_passphrase: AskPassphrase = False,
    witness: WitnessFile = None,
    as_json: AsJson = False,
) -> None:
    """Show, explain or change what a site allows.

    The server never sees the policy, and nothing that it sends can widen one. Without a policy.toml the
    strict default holds, which allows nothing. A site refuses what its policy does not allow before it looks
    at a record and before it charges anything, and its log names the key. Exit code 2: not a policy.
    """
    from client.identity import SiteFolder, own_card
    from client.policy import STRICT
    from common.files import write_atomically

    place = SiteFolder(folder)
    own_card(place)
    if write and new is not None:
        raise ConfigError("--set and --write exclude each other: give one")
    if write:
        if place.policy.exists():
            raise ConfigError(f"{place.policy} is there already: change it, then put it in force with --set")
        write_atomically(place.policy, STRICT.to_toml().encode())
    before = _in_force(place, witness)
    if new is not None:
        _put_in_force(place, new, read_passphrase(passphrase_file, ask_passphrase), witness)
    shown = _shown(place, witness)
    if as_json:
        print_json(shown.to_json(explain))
        return
    if new is not None:
        say(f"in force: {place.policy}, {shown.standing}", *_changes(before, shown.policy))
        return
    typer.echo(f"{shown.name}: {shown.standing}", err=True)
    if explain:
        _explain(shown.policy)
    else:
        print(shown.text, end="")


@dataclass(frozen=True)
class _Shown:
    """A policy for people. origin: file, ledger or default. entry: of the ledger, if it is in force there."""

    text: str
    policy: SitePolicy
    name: str
    entry: int | None
    origin: str

    @property
    def standing(self) -> str:
        if self.origin == "default":
            return "the strict default, which allows nothing; --write puts it here to be changed"
        if self.entry is None:
            return "not in the ledger yet: --set puts it in force"
        return f"in force since entry {self.entry} of the ledger"

    def to_json(self, explain: bool) -> dict[str, Any]:
        from client.policy import explained

        more = {"explained": [vars(one) for one in explained(self.policy)]} if explain else {}
        policy = self.policy.model_dump(mode="json")
        return {"name": self.name, "from": self.origin, "entry": self.entry, "policy": policy, **more}


def _recorded(place: SiteFolder, witness: Path | None) -> tuple[int, str] | None:
    """The policy that the ledger has last, with the number of its entry."""
    if not place.ledger.is_file():
        return None
    from client.ledger_view import look

    found = look(place, witness).policy
    return None if found is None else (found[0], found[1].text)


def _in_force(place: SiteFolder, witness: Path | None) -> SitePolicy:
    """By the ledger; without one, or where another version has written it, the strict default."""
    from client.policy import STRICT, parse_policy

    recorded = _recorded(place, witness)
    try:
        return STRICT if recorded is None else parse_policy(recorded[1], "the ledger", simulated=True)
    except ConfigError:
        return STRICT


def _shown(place: SiteFolder, witness: Path | None) -> _Shown:
    """The site's file; without one what the ledger has, as at a simulated site; or the strict default."""
    from client.policy import STRICT, parse_policy, read_text

    recorded = _recorded(place, witness)
    if place.policy.exists():
        text = read_text(place.policy)
        entry = recorded[0] if recorded is not None and recorded[1] == text else None
        return _Shown(text, parse_policy(text, str(place.policy)), str(place.policy), entry, "file")
    if recorded is not None:
        entry, text = recorded
        policy = parse_policy(text, "the ledger", simulated=True)
        return _Shown(text, policy, str(place.path), entry, "ledger")
    return _Shown(STRICT.to_toml(), STRICT, str(place.path), None, "default")


def _put_in_force(place: SiteFolder, new: Path, passphrase: bytes | None, witness: Path | None) -> None:
    """Into the ledger first: a policy that is in the folder alone would be recorded before it is used."""
    from client.policy import parse_policy, read_text
    from common.files import write_atomically

    text = read_text(new)
    parse_policy(text, str(new))
    with open_ledger(place, passphrase, witness) as ledger:
        ledger.record_policy(text)
    write_atomically(place.policy, text.encode())


def _changes(before: SitePolicy, after: SitePolicy) -> list[str]:
    """Each key that is another now."""
    from client.policy import explained

    old, new = ({one.key: one.value for one in explained(p)} for p in (before, after))
    return [
        f"  {key}: {old.get(key, 'none')} → {new.get(key, 'none')}"
        for key in dict.fromkeys((*old, *new))
        if old.get(key) != new.get(key)
    ]


def _explain(policy: SitePolicy) -> None:
    """Each key in three lines: its value, what it says, what it stops. In bold what is not the default."""
    from client.policy import explained

    out = Console(highlight=False)
    for one in explained(policy):
        here, default = (_plain(value) for value in (one.value, one.default))
        beside = "no default" if one.default is None else f"default {default}"
        line = Text(f"{one.key} = ").append(here, "" if here == default else "bold").append(f"  ({beside})")
        out.print(line, soft_wrap=True)
        first = one.says[0] if one.says[0] in "εδ" else one.says[0].upper()  # Greek letters stand for numbers
        says = f"{first}{one.says[1:]}."
        for text in (says, f"Stops: {one.stops[0].lower()}{one.stops[1:]}"):
            out.print(Padding(Text(text), (0, 0, 0, 4)))


def _plain(value: Any) -> str:
    match value:
        case bool():
            return str(value).lower()
        case list():
            return ", ".join(map(str, value)) or "none"
        case _:
            return f"{value:g}" if isinstance(value, float) else str(value)
