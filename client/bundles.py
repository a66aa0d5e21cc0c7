"""Which jobs a site's people have approved. The approval is in the policy, which the ledger signs; here lie
the bundles themselves, and the last one that came and was not approved, to be looked at. None is ever run.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from client.identity import SiteFolder
from client.policy import STRICT, SitePolicy, parse_policy, read_text
from common.bundle import MAX_BUNDLE_BYTES, Bundle, read_bundle
from common.errors import ConfigError, PolicyRefusedError
from common.files import write_atomically
from common.identity import make_folder, read_limited

_NAME = re.compile(r"([0-9a-f]{64})\.fab")


def pending(folder: SiteFolder) -> Path:
    """The last bundle that the server has sent and nobody has approved."""
    return folder.bundles / "pending.fab"


def approved(folder: SiteFolder) -> list[Path]:
    """The bundles that were approved and kept, the newest last."""
    found = [path for path in folder.bundles.glob("*.fab") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.name))


def own_policy(folder: SiteFolder) -> SitePolicy:
    """The rules in the site's folder; without a file the strict ones.

    Raises:
        ConfigError: the file is no policy.
    """
    if not folder.policy.exists():
        return STRICT
    return parse_policy(read_text(folder.policy), str(folder.policy))


def admit(folder: SiteFolder, data: bytes, said: str) -> Bundle:
    """The bundle, if this site has approved exactly these bytes.

    said: the hash that the server gave with them. What is refused is kept to be looked at.

    Raises:
        PolicyRefusedError: nobody here has approved it. ConfigError: it is no job, or another than it says.
    """
    digest = hashlib.sha256(data).hexdigest()
    if digest != said:
        raise PolicyRefusedError(
            f"the server sent a bundle of SHA-256 {digest} as {said[:64]}: it was changed on its way. "
            "Nothing was computed"
        )
    if digest not in own_policy(folder).code.bundles:
        keep_pending(folder, data)
        raise PolicyRefusedError(
            f"nobody at this site has approved the job whose bundle is {digest}. Nothing was computed or "
            f"charged. To look at it, and to approve it: confide client approve {folder.path}"
        )
    return read_bundle(data)


def keep_pending(folder: SiteFolder, data: bytes) -> None:
    """So that people can see what was asked; of many only the last, and none that is too long for a job."""
    path = pending(folder)
    if len(data) > MAX_BUNDLE_BYTES or (path.exists() and path.read_bytes() == data):
        return
    make_folder(folder.bundles)
    write_atomically(path, data)


def keep_approved(folder: SiteFolder, data: bytes) -> None:
    make_folder(folder.bundles)
    write_atomically(folder.bundles / f"{hashlib.sha256(data).hexdigest()}.fab", data)
    if pending(folder).exists() and pending(folder).read_bytes() == data:
        pending(folder).unlink()


def load_bundle(path: Path) -> tuple[bytes, Bundle]:
    """Raises ConfigError: there is none, or it is no job."""
    data = read_limited(path, MAX_BUNDLE_BYTES)
    return data, read_bundle(data)


def last_approved(folder: SiteFolder) -> Bundle | None:
    """What a new job is compared with. A file that no longer reads is passed over: the policy decides."""
    for path in reversed(approved(folder)):
        try:
            return load_bundle(path)[1]
        except ConfigError:
            continue
    return None
