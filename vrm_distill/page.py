"""``report.html``: one file with everything in it, that a browser shows without a network."""

import base64
import html
import platform
import time
from collections.abc import Sequence

import accelerate
import kornia
import torch

from vrm_distill import recipe
from vrm_distill.data import ImageData
from vrm_distill.settings import Settings
from vrm_kernels import __version__, backends

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --quiet: #888; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { text-align: left; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
.results td:nth-child(n+3), .results th:nth-child(n+3) { text-align: right; }
.results tr:last-child td { font-weight: 600; }
.columns { columns: 2; } .columns tr { break-inside: avoid; }
img { max-width: 100%; background: #fff; border: 1px solid var(--line); }
.quiet { color: var(--quiet); } .warning { border-left: 4px solid #E69F00; padding-left: .8rem; }
"""


def write(
    settings: Settings, data: ImageData, processes: int, columns: Sequence[Sequence[str]], sentences: Sequence[str]
) -> None:
    """Write the page of a run, its pictures in it, into the run's folder.

    Args:
        columns: the table of the results, its heads first.
        sentences: what is said of it; warnings begin with that word.
    """
    folder = settings.output_dir
    heads, *rows = columns
    said = [f"<p{_kind(sentence)}>{html.escape(sentence)}</p>" for sentence in sentences]
    pictures = [
        f'<h2>{title}</h2>\n<img alt="{title}" src="data:image/png;base64,{_base64(folder / name)}">'
        for title, name in (("Curves", recipe.CURVES), ("Relations, before and after", recipe.RELATIONS))
        if (folder / name).exists()
    ]
    body = (
        f"<h1>{html.escape(folder.name)}: {html.escape(settings.student)} from {html.escape(settings.teacher)}</h1>",
        f'<p class="quiet">{html.escape(data.summary)}</p>',
        _table(rows, heads, "results"),
        *said,
        *pictures,
        "<h2>Settings</h2>",
        _table([(name, _plain(value)) for name, value in settings.plain().items()]),
        "<h2>Environment</h2>",
        _table(_environment(settings, processes)),
    )
    (folder / recipe.REPORT).write_text(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>{html.escape(folder.name)}</title>'
        f"<style>{_STYLE}</style></head><body>\n" + "\n".join(body) + "\n</body></html>\n",
        encoding="utf-8",
    )


def _kind(sentence: str) -> str:
    return ' class="warning"' if sentence.startswith("Warning") else ""


def _plain(value) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "" if value is None else str(value)


def _table(rows, heads: Sequence[str] = (), kind: str = "") -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    lines = [line(heads, "th")] if heads else []
    return f'<table class="{kind}">\n' + "\n".join([*lines, *(line(row, "td") for row in rows)]) + "\n</table>"


def _environment(settings: Settings, processes: int) -> list[tuple[str, str]]:
    device = torch.device(settings.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return [
        ("finished", time.strftime("%Y-%m-%d %H:%M")),
        ("machine", f"{platform.system()} {platform.release()}, {name}"),
        ("processes and threads", f"{processes} of {torch.get_num_threads()} CPU threads each"),
        ("loss", f"vrm_kernels {__version__}, {backends.describe()}"),
        ("versions", f"Python {platform.python_version()}, torch {torch.__version__}, "
         f"accelerate {accelerate.__version__}, kornia {kornia.__version__}"),
    ]  # fmt: skip


def _base64(path) -> str:
    return base64.b64encode(path.read_bytes()).decode()
