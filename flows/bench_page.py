"""The page of a benchmark from its `result.json` and plots: one HTML file that needs no other."""

import base64
import html
from collections.abc import Callable, Mapping, Sequence

from perennial.flows.processes import Json

_FIGURES: Mapping[str, tuple[str, str]] = {
    "ap": ("AP, points", "all tasks after the last round"),
    "ap_over_joint": ("AP / AP of joint", ""),
    "bwt": ("BWT, points", "each task after the last round minus right after its own"),
    "la": ("LA, points", "each task right after its own round"),
    "la_over_single": ("LA / LA of single", ""),
    "forgetting": ("Forgetting, points", "best so far minus after the last round"),
    "fwt": ("FWT, points", "each task before its round, arm minus base"),
    "general_points_delta": ("General, points", "ROUGE-L on the probe, arm minus base"),
    "general_nll_delta": ("General NLL, nats a token", "on the probe, arm minus base"),
    "kl_to_base": ("KL to the base, nats a token", "on the probe"),
    "stale_rate": ("Stale answers, %", "what an override has superseded"),
    "tokens": ("Tokens", "trained in one run through the stream"),
    "wall_s": ("Training, s", "of one run; rounds that were interrupted are not timed"),
    "wall_over_naive": ("Training / naive", ""),
    "peak_rss_mb": ("Peak memory, MB", "the largest training"),
}
_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Continual benchmark</title>
<style>body{{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:76rem;padding:0 1rem;
color:#1f2933}}table{{border-collapse:collapse;margin:1rem 0;display:block;overflow-x:auto}}
td,th{{padding:.3rem .8rem;text-align:right;vertical-align:top;border-bottom:1px solid #d9dee3}}
td:first-child,th:first-child{{text-align:left}}small{{color:#6b7680;font-weight:normal;
display:block}}img{{max-width:100%}}figure{{display:inline-block;margin:0 1rem 1rem 0;
max-width:34rem}}</style>
<h1>Continual benchmark</h1>{body}</html>
"""


def page(result: Json, plots: Mapping[str, bytes]) -> str:
    """The whole page; pictures are inside it."""
    matrices = "".join(_figure(name, png) for name, png in plots.items() if name != "front")
    body = [
        f"<p>{html.escape(_said(result))}</p>",
        _table(result["arms"], _measured, lambda arm: arm["says"]),
        "<p>In brackets 95% intervals over seeds, orders and rows.</p>",
        _figure("front", plots["front"]),
    ]
    if result["paired"]:
        body += [
            "<h2>Full minus the others</h2>",
            "<p>On the same rows and seeds. Bold: the 95% interval leaves out zero.</p>",
            _table(_others(result["paired"]), _difference, lambda _: ""),
        ]
    body += [f"<h2>Scores on each task after each round</h2>{matrices}"]
    body += [f"<h2>Tasks</h2>{_tasks(result['tasks'])}"]
    return _PAGE.format(body="\n".join(body))


def _said(result: Json) -> str:
    seeds, orders = (", ".join(map(str, result[name])) for name in ("seeds", "orders"))
    said = [
        f"{result['base_model']} on {result['stream']}",
        f"seeds {seeds}",
        f"order {orders}",
        f"{result['num_general']} general rows",
        f"{result['num_probe']} rows of the general probe",
        f"answers of at most {result['max_new_tokens']} tokens",
    ]
    said += [f"{name} {value}" for name, value in result["overrides"].items()]
    too_long = result["left_out_as_too_long"]
    said += [f"{num} rows of the {name} too long" for name, num in too_long.items() if num]
    return " · ".join(said)


def _others(paired: Json) -> Json:
    """The differences by the other arm's name."""
    return {name.removeprefix("full-minus-"): row for name, row in paired.items()}


def _table(
    arms: Mapping[str, Json], cell: Callable[[Json, str], str], says: Callable[[Json], str]
) -> str:
    """A row for each figure that some arm has, a column for each arm."""
    heads = (
        f"<th>{html.escape(name)}<small>{html.escape(says(arm))}</small></th>"
        for name, arm in arms.items()
    )
    lines = [f"<tr><th></th>{''.join(heads)}</tr>"]
    for metric, (title, meaning) in _FIGURES.items():
        if all(arm.get(metric) is None for arm in arms.values()):
            continue
        cells = "".join(f"<td>{cell(arm, metric)}</td>" for arm in arms.values())
        lines.append(f"<tr><td>{title}<small>{meaning}</small></td>{cells}</tr>")
    return f"<table>{''.join(lines)}</table>"


def _measured(arm: Json, metric: str) -> str:
    return _cell(arm.get(metric), arm["intervals"].get(metric))


def _difference(row: Json, metric: str) -> str:
    found = row.get(metric)
    if not found:
        return _cell(None, None)
    told = _cell(found["value"], (found["low"], found["high"]))
    return f"<b>{told}</b>" if found["low"] > 0 or found["high"] < 0 else told


def _cell(value: float | None, bounds: Sequence[float] | None) -> str:
    if value is None:
        return "–"
    span = f"<small>[{bounds[0]:.3g}, {bounds[1]:.3g}]</small>" if bounds else ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}{span}"


def _figure(name: str, png: bytes) -> str:
    source = base64.b64encode(png).decode()
    return f'<figure><img alt="{html.escape(name)}" src="data:image/png;base64,{source}"></figure>'


def _tasks(tasks: Mapping[str, Json]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(task['grader'])}</td>"
        f"<td>{task['num_train']}</td><td>{task['num_test']}</td></tr>"
        for name, task in tasks.items()
    )
    heads = "<tr><th>task</th><th>grader</th><th>train rows</th><th>test rows</th></tr>"
    return f"<table>{heads}{rows}</table>"
