"""`confide client serve`: let auditors look at a site's ledger over the network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from client.cli_options import AskPassphrase, Folder, PassphraseFile, WitnessFile, read_passphrase


def serve(
    folder: Folder,
    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where to listen.")],
    cert: Annotated[Path, typer.Option(help="This end's TLS certificate, PEM, with its chain.")],
    key: Annotated[Path, typer.Option(help="Its private key, PEM, mode 0600.")],
    ca: Annotated[
        Path,
        typer.Option(help="The authority of those who may look: who shows no certificate of it, may not."),
    ],
    rate: Annotated[float, typer.Option(help="Calls a second of each certificate, in the long run.")] = 1.0,
    burst: Annotated[float, typer.Option(min=1, help="Calls that each may make at once.")] = 20.0,
    passphrase_file: PassphraseFile = None,
    ask_passphrase: AskPassphrase = False,
    witness: WitnessFile = None,
) -> None:
    """Show the ledger, and nothing else, to auditors: read-only, over mutual TLS. Off unless you start it.

    They look with confide audit remote. The signed head comes from the witness, so that no secret of the
    site is needed; where there is none the identity signs it. Stops at Ctrl-C or a TERM signal. Exit codes:
    2 a certificate or the address cannot be used, or there is no ledger; 5 the ledger is damaged, another
    site's, or older than its witness; a key that others may read.
    """
    import logging
    import signal
    import threading
    import time

    from client import look
    from client.identity import MAX_PEM_BYTES, SiteFolder, load_identity, own_card
    from client.ledger_reader import LedgerReader
    from client.ledger_view import look as look_once
    from client.ledger_witness import Witness
    from common.identity import read_limited, read_private

    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    logging.getLogger("confide.look").setLevel(logging.INFO)
    certificates = look.Certificates(
        chain=read_limited(cert, look.MAX_CERTIFICATES_BYTES),
        key=read_private(key, MAX_PEM_BYTES),
        authority=read_limited(ca, look.MAX_CERTIFICATES_BYTES),
    )
    place = SiteFolder(folder)
    view = look_once(place, witness)
    public = own_card(place).public
    reader = LedgerReader(place.ledger, view.site, public)
    if view.witness is not None:
        path = place.witness if witness is None else witness
        show = look.witnessed(reader, Witness(path, ledger=place.ledger, site=view.site, public=public))
    else:
        identity = load_identity(place.identity, read_passphrase(passphrase_file, ask_passphrase))
        show = look.signed(reader, identity, view.site)
    show()
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    server = look.LookServer(listen, certificates, show, look.TokenBuckets(rate, burst, time.monotonic))
    signer = "the witness has the signed head" if view.witness else "the head is signed here"
    print(
        f"site {view.site}: {len(view.entries):,} entries, to be looked at on port {server.port}; {signer}",
        flush=True,
    )
    ended.wait()
    server.stop()
