"""The status as a page: what is going on now, sites as last seen, curves. Every value is escaped."""

from __future__ import annotations

import time

from common.report_plots import Line, plot_metric
from common.report_style import STYLE, alarm, figure, fixed, pairs, safe, table
from server.jobs import Standing
from server.status import JobStatus, ServerStatus, SiteStatus, size

SCRIPT = """\
// Takes a new look every three seconds, in place, so that the page does not jump.
setInterval(async () => {
  try {
    const answer = await fetch("/part");
    if (answer.ok) document.querySelector("main").innerHTML = await answer.text();
    document.body.classList.toggle("away", !answer.ok);
  } catch { document.body.classList.add("away"); }
}, 3000);
"""
_STYLE = """
.bar { background: var(--shade); border-radius: 4px; height: 10px; overflow: hidden; max-width: 460px; }
.bar span { display: block; height: 100%; background: var(--first); }
.dot { display: inline-block; width: 9px; height: 9px; border-radius: 50%; margin-right: 7px;
  background: var(--faint); }
.dot.online { background: #2e8b57; } .dot.offline { background: var(--alarm); }
.away main { opacity: .45; }
"""


def whole(found: ServerStatus) -> str:
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{safe(found.federation)}: status</title>\n<style>{STYLE}{_STYLE}</style>\n"
        '<script src="/page.js" defer></script>\n'
        '<noscript><meta http-equiv="refresh" content="5"></noscript>\n'
        f"</head>\n<body>\n<main>\n{body(found)}</main>\n</body>\n</html>\n"
    )


def body(found: ServerStatus) -> str:
    newest = found.jobs[-1] if found.jobs else None
    parts = [
        f'<p class="over">Confide federation</p>\n<h1>{safe(found.federation)}</h1>\n',
        "" if found.serving else alarm("The server does not run, or SuperLink does not answer."),
        *(
            alarm(f"{safe(name)} says that it does not serve.")
            for name, healthy in found.healthy.items()
            if found.serving and not healthy
        ),
        _facts(found),
        *([_job(newest)] if newest else ["<h2>Jobs</h2><p>None was submitted yet.</p>"]),
        _sites(found.sites),
        _earlier(found.jobs[:-1]),
    ]
    return "".join(parts)


def _facts(found: ServerStatus) -> str:
    online = sum(site.node == "online" for site in found.sites)
    again = ", ".join(f"{safe(name)} {count}×" for name, count in found.restarts.items() if count)
    return pairs(
        [
            ("Sites there", f"{online}<small>of {len(found.sites)} members</small>"),
            ("Processes", f"{len(found.processes)}<small>{again or 'none was restarted'}</small>"),
            ("Roster", f"{found.roster_version}<small>version</small>"),
            ("Certificate", f"{safe(found.certificate_until)}<small>last day</small>"),
        ],
        "tiles",
    )


def _job(job: JobStatus) -> str:
    share = 100 * job.round / job.rounds if job.rounds else 0
    doing = f"{safe(job.stage)}, {max(0.0, time.time() - job.since):.0f} s" if job.stage else "–"
    if job.stage == "training":
        doing += f", {job.answered} of {job.asked} sites answered"
    told = alarm(safe(job.ended)) if job.ended else ""
    said = pairs(
        [
            ("Standing", safe(job.standing)),
            ("Round", f"{job.round} of {job.rounds}"),
            *([("Now", doing)] if job.standing == Standing.RUNNING.value else []),
            ("Rounds without a sum", str(sum(not counted for counted in job.counted))),
        ]
    )
    filled = f'<span style="width:{share:.1f}%"></span>'
    bar = f'<div class="bar" role="img" aria-label="{share:.0f} %">{filled}</div>'
    return (
        f"<h2>Job {safe(job.name)} <code>{safe(job.id)}</code></h2>\n{told}{bar}\n{said}"
        f'<div class="plots">{_curve("Metric", job.accuracy)}{_curve("Loss", job.loss)}</div>\n'
    )


def _curve(title: str, values: list[float | None]) -> str:
    points = [(number, value) for number, value in enumerate(values) if value is not None]
    if len(points) < 2:
        return ""
    line = Line(title.lower(), [x for x, _ in points], [y for _, y in points])
    return figure(f"{title} by round", "on public records", plot_metric(f"{title} by round", line, warmup=0))


def _sites(sites: list[SiteStatus]) -> str:
    columns = [
        ("id", ""),
        ("name", "text"),
        ("node", "text"),
        ("last activated", "text"),
        ("last round", "text"),
        ("in sums", ""),
        ("up", ""),
        ("down", ""),
        ("ledger entries", ""),
    ]
    rows = [
        (
            "out" if site.absent or site.fate not in ("", "ok") else "",
            [
                str(site.id),
                safe(site.name),
                f'<span class="dot {safe(site.node)}"></span>{safe(site.node)}',
                safe(site.last_seen[:19].replace("T", " ")) or "–",
                safe(site.absent or site.fate) or "–",
                str(site.rounds),
                size(site.bytes_up),
                size(site.bytes_down),
                f"{site.receipts:,}",
            ],
        )
        for site in sites
    ]
    note = (
        '<p class="small">"Ledger entries": those under the newest head that a site has signed and sent.</p>'
    )
    return f"<h2>Sites</h2>\n{table(columns, rows)}{note}\n"


def _earlier(jobs: list[JobStatus]) -> str:
    if not jobs:
        return ""
    columns = [("job", "text"), ("name", "text"), ("standing", "text"), ("round", ""), ("metric", "")]
    rows = [
        (
            "",
            [
                f"<code>{safe(job.id)}</code>",
                safe(job.name),
                safe(job.standing),
                f"{job.round}/{job.rounds}",
                fixed(next((value for value in reversed(job.accuracy) if value is not None), None)),
            ],
        )
        for job in reversed(jobs)
    ]
    return f"<h2>Earlier jobs</h2>\n{table(columns, rows)}"
