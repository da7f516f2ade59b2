"""Page: runs side by side as one HTML page that needs no other file. Knows the files of a run; computes no figure."""

import base64
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from matplotlib.figure import Figure

from memserve.metrics.comparison import comparison_rows
from memserve.metrics.figure_text import NONE, format_figure
from memserve.metrics.output import RunFiles
from memserve.metrics.plots import draw_latencies, draw_occupancy, draw_placement

MAX_REQUESTS = 2000  # rows of a run's table of requests; more are in its requests.jsonl
_REQUEST_COLUMNS = {  # heading: key of a record, unit
    "request": ("request_id", ""),
    "session": ("session_id", ""),
    "class": ("class", ""),
    "priority": ("priority", "count"),
    "arrival": ("arrival_s", "seconds"),
    "instance": ("instance", ""),
    "why there": ("why", ""),
    "predicted": ("predicted_s", "seconds"),
    "soonest": ("predicted_soonest_s", "seconds"),
    "elsewhere": ("predicted_elsewhere_s", "seconds"),
    "decode": ("decode_instance", ""),
    "attempt": ("attempt", "count"),
    "prompt": ("num_prompt", "count"),
    "cached": ("num_cached_local", "count"),
    "generated": ("num_generated", "count"),
    "TTFT": ("ttft_s", "seconds"),
    "TPOT": ("tpot_s", "seconds"),
    "JCT": ("jct_s", "seconds"),
    "end": ("finish_reason", ""),
    "detail": ("detail", ""),
}
_INSTANCE_COLUMNS = {
    "instance": ("id", ""),
    "role": ("role", ""),
    "requests": ("num_requests", "count"),
    "busy": ("busy_s", "seconds"),
    "util": ("utilisation", "share"),
    "KV peak": ("peak_used_share", "share"),
    "hits": ("hit_ratio", "share"),
    "steps": ("num_steps", "count"),
    "preempted": ("preemptions", "count"),
    "evicted blocks": ("num_evicted_blocks", "count"),
    "most blocks used": ("peak_used_blocks", "count"),
}
_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 84em; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: .6em 0 }
th, td { padding: .15em .7em; text-align: right; border-bottom: 1px solid #e4e4e4; font-variant-numeric: tabular-nums }
th:first-child, td:first-child { text-align: left }
thead th { border-bottom: 2px solid #888; cursor: pointer; position: sticky; top: 0; background: #fff }
img { max-width: 100% }
.scroll { max-height: 32em; overflow: auto; border: 1px solid #e4e4e4 }
pre { background: #f6f6f6; padding: .8em; overflow: auto }
"""
_SORT = """
for (const head of document.querySelectorAll("thead th")) head.onclick = () => {
  const body = head.closest("table").tBodies[0], at = head.cellIndex, rows = [...body.rows];
  const key = row => { const raw = row.cells[at].dataset.value; return raw === undefined ? null : JSON.parse(raw); };
  const order = (a, b) => (a === null) - (b === null) || (a > b) - (a < b);
  const sign = head.dataset.sign = head.dataset.sign === "1" ? "-1" : "1";
  rows.sort((a, b) => sign * order(key(a), key(b))).forEach(row => body.append(row));
};
"""


def page_of(runs: Mapping[str, RunFiles], differences: Mapping[str, Sequence[str]]) -> str:
    """The page. runs: under the names that are shown.  differences: of each option that differs, its value in each."""
    reports = {name: run.report for name, run in runs.items()}
    sections = [
        "<h1>memserve: " + escape(", ".join(runs)) + "</h1>",
        _table(["option that differs", *runs], [[option, *values] for option, values in differences.items()])
        if differences
        else "",
        "<h2>Figures</h2>",
        _table(["", *runs], comparison_rows(reports)),
        _image(draw_latencies({name: run.records for name, run in runs.items()}), "latencies"),
        *(_run(name, run) for name, run in runs.items()),
    ]
    return _document("memserve: " + ", ".join(runs), sections)


def _run(name: str, run: RunFiles) -> str:
    env = run.environment
    revision = (env.get("git") or {}).get("revision", "not in a repository")
    ran = f"{' '.join(env['command_line'])} — revision {revision}, {env['cpu']['model']}, {env['platform']}"
    shown = run.records[:MAX_REQUESTS]
    columns = _REQUEST_COLUMNS | ({"measured": ("measured", "")} if run.report.get("measured") else {})
    parts = [
        f"<h2>{escape(name)}</h2><p>{escape(ran)}</p>",
        _keyed_table(_INSTANCE_COLUMNS, run.report["instances"]),
        "<h3>Which request went where</h3>",
        _image(draw_placement(shown), "requests by instance") if _any_computed(shown) else "<p>none was computed</p>",
        f"<p>{len(shown)} of {len(run.records)} requests; a click on a heading sorts by it. Predicted: until the first "
        "token, by the cost model, of the instance that was chosen, of the soonest one, and of the others' mean</p>",
        f'<div class="scroll">{_keyed_table(columns, shown)}</div>',
        "<h3>Who held the blocks</h3>",
        _image(draw_occupancy({name: run.occupancy}), "blocks by holder") if run.occupancy else "<p>no samples</p>",
        f"<details><summary>configuration</summary><pre>{escape(run.config_yaml)}</pre></details>",
        f"<details><summary>environment</summary><pre>{escape(json.dumps(env, indent=2))}</pre></details>",
    ]
    return "\n".join(parts)


def _any_computed(records: Iterable[Mapping[str, Any]]) -> bool:
    return any(r["first_scheduled_s"] is not None and r["finished_s"] is not None for r in records)


def _document(title: str, sections: Iterable[str]) -> str:
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    body = "\n".join(section for section in sections if section)
    body += f"\n<script>{_SORT}</script>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = ([(text, text) for text in row] for row in rows)
    return _rows(headings, cells)


def _keyed_table(columns: Mapping[str, tuple[str, str]], rows: Iterable[Mapping[str, Any]]) -> str:
    """A row for each mapping: what is under a column's key, in its unit; sorted by the value, not by the text."""
    cells = ([(row.get(key), _text(row.get(key), unit)) for key, unit in columns.values()] for row in rows)
    return _rows(list(columns), cells)


def _rows(headings: Sequence[str], rows: Iterable[Sequence[tuple[Any, str]]]) -> str:
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "\n".join("<tr>" + "".join(_cell(value, text) for value, text in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"


def _cell(value: Any, text: str) -> str:
    sorts = "" if value is None else f' data-value="{escape(json.dumps(value))}"'
    return f"<td{sorts}>{escape(text)}</td>"


def _text(value: Any, unit: str) -> str:
    if unit:
        return format_figure(value, unit)
    return NONE if value in (None, "") else str(value)


def _image(figure: Figure, alt: str) -> str:
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=130)
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{base64.b64encode(drawn.getvalue()).decode()}">'
