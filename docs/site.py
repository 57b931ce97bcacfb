"""What `make docs` does beside mkdocs.

The repository's own pages (README.md …) and the command line's help join the site, links between them and docs/ lead
where their targets lie in it, and a public name without a docstring, or on no page of the reference, is a warning: in
strict mode the build fails.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

from fastheads.cli import arguments

ROOT = Path(__file__).parents[1]
LOG = logging.getLogger("mkdocs.hooks.fastheads")

PAGES = {name: f"repository/{name.lower()}" for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")}
# What pages link to that is no page: copied as it is.
COPIED = (
    "bench/results/*.json",
    "examples/*.py",
    "examples/*.ipynb",
    "LICENSE",
    "CITATION.cff",
    "fastheads/demo/NOTICE",
)
PUBLIC = ("fastheads", "fastheads.losses")  # packages all of whose `__all__` is public

COMMANDS = """# Command line

What `--help` says of each command. A shell completes commands, options and paths by what `shtab` makes of them:

```bash
pip install shtab
shtab --shell=bash fastheads.cli.arguments.parser > ~/.local/share/bash-completion/completions/fastheads
```

`--shell=zsh` and `--shell=tcsh` likewise.

"""

LINK = re.compile(r'(\]\(|src="|href=")(?![a-z]+:|#|/)([^)"#\s]+)')


def _in_site(path: str) -> str:
    """Where a file of the repository lies in the site."""
    return PAGES.get(path) or path.removeprefix("docs/")


def help_of_commands() -> str:
    """A page of what `--help` says, of each command."""
    main = arguments.parser()
    (commands,) = (action for action in main._actions if isinstance(action, argparse._SubParsersAction))
    parsers = {"": main, **commands.choices}
    parts = [f"## fastheads {name}\n\n```text\n{parser.format_help()}```\n" for name, parser in parsers.items()]
    return COMMANDS + "\n".join(parts)


def on_files(files: Files, config: Any) -> Files:
    """The repository's pages, the command line's, and the files that are linked to."""
    os.environ["COLUMNS"] = "100"
    files.append(File.generated(config, "api/commands.md", content=help_of_commands()))
    for name, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / name)))
    for path in sorted(found for pattern in COPIED for found in ROOT.glob(pattern)):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as they are in the repository, to where their targets lie in the site."""
    source = page.file.src_uri
    here = next((name for name, place in PAGES.items() if place == source), f"docs/{source}")

    def moved(link: re.Match[str]) -> str:
        target = os.path.normpath(PurePosixPath(here).parent / link[2])
        return link[1] + os.path.relpath(_in_site(target), PurePosixPath(source).parent)

    return LINK.sub(moved, markdown)


def undocumented(package: griffe.Module) -> list[str]:
    """Of a package's public names, and the methods and properties of its classes, those without a docstring."""
    found = []
    for name in package.exports or ():
        item: Any = package[str(name)]
        item = item.final_target if item.is_alias else item
        members = item.members.items() if item.is_class else ()
        parts = {str(name): item} | {f"{name}.{own}": part for own, part in members if own[0] != "_"}
        described = {own: part for own, part in parts.items() if part.is_function or part.is_class or own == name}
        described |= {own: part for own, part in parts.items() if "property" in part.labels}
        found += [f"{package.path}.{own}" for own, part in described.items() if not part.has_docstring]
    return found


def on_env(env: Any, config: Any, files: Files) -> Any:
    """Once all pages are rendered: is every public name documented, and on one of them?"""
    shown = "".join(file.page.content or "" for file in files.documentation_pages() if file.page)
    loaded = griffe.load("fastheads", search_paths=[str(ROOT)], resolve_aliases=True)
    for path in PUBLIC:
        package: Any = loaded if path == "fastheads" else loaded[path.removeprefix("fastheads.")]
        for name in undocumented(package):
            LOG.warning("%s has no docstring", name)
        for name in package.exports:
            if f'id="fastheads.{name}"' not in shown:
                LOG.warning("%s.%s is on no page of the reference", path, name)
    return env
