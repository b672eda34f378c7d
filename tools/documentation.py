"""What the documentation site does beside MkDocs; mkdocs.yml names this file twice, for the hooks and the extension.

- Pages link to files anywhere in the repository, as they are seen there. Such a file becomes a part of the site, and
  the link is turned towards it.
- README.md, CONTRIBUTING.md and CHANGELOG.md are pages of the site.
- A fence ``math`` becomes MathML, which browsers show without a script.
- Docstrings keep the roles that editors know (``:func:`name```); on the site they are links.
"""

import os
import re
from pathlib import Path, PurePosixPath

import griffe
from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(\]\()([^)#\s]+)(#[^)\s]*)?(\))")
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def on_config(config):
    fence = {"name": "math", "class": "math", "format": math}
    config.mdx_configs["pymdownx.superfences"] = {"custom_fences": [fence]}
    return config


def on_files(files: Files, config) -> Files:
    """Adds the pages above, and every file that a page links to."""
    for name, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / name)))
    waiting = list(files.documentation_pages())
    while waiting:
        page = waiting.pop()
        for _, link, _, _ in LINK.findall(page.content_string):
            target = _target(page, link)
            if target and (ROOT / target).is_file() and files.get_file_from_path(_on_site(target)) is None:
                added = File.generated(config, _on_site(target), abs_src_path=str(ROOT / target))
                files.append(added)
                if added.is_documentation_page():
                    waiting.append(added)
    return files


def on_page_markdown(markdown: str, page, files: Files, **_) -> str:
    """Turns the links of a page from places in the repository to places on the site."""

    def turned(match: re.Match) -> str:
        before, link, anchor, after = match.groups()
        target = _target(page.file, link)
        if target is None or files.get_file_from_path(_on_site(target)) is None:
            return match.group()  # MkDocs says what is wrong with it
        folder = PurePosixPath(page.file.src_uri).parent
        return f"{before}{os.path.relpath(_on_site(target), folder)}{anchor or ''}{after}"

    return LINK.sub(turned, markdown)


def _target(page: File, link: str) -> str | None:
    """The path in the repository that ``link`` means on ``page``; ``None`` for an address."""
    if ":" in link or link.startswith("/"):
        return None
    here = Path(page.abs_src_path).parent.relative_to(ROOT)
    return PurePosixPath(os.path.normpath(here / link)).as_posix()


def _on_site(target: str) -> str:
    return PAGES.get(target) or (target[len("docs/") :] if target.startswith("docs/") else f"repository/{target}")


def math(source: str, *_, **__) -> str:
    """A fence of LaTeX as MathML, a formula for each paragraph."""
    return "".join(convert(part, display="block") for part in source.split("\n\n"))


class Roles(griffe.Extension):
    """Turns the roles of docstrings into links, or into code where the site does not have the name."""

    def on_object(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring:
            text = re.sub(
                r":\w+:`~?([^`]+)`",
                lambda role: f'<autoref optional identifier="{role[1]}"><code>{role[1]}</code></autoref>',
                obj.docstring.value,
            )
            obj.docstring.value = re.sub(r"\.\. math:: (.+)", r"```math\n\1\n```", text)
