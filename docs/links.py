"""A hook of mkdocs: makes links that are right on GitHub right on the site, too.

Pages link to files of the repository by relative paths, which GitHub follows. On the site, pictures in bench/results/
are served under ``results/``, CONTRIBUTING.md and CHANGELOG.md are pages, and links to other files outside docs/ lead
to the repository. A link to a file that does not exist is a warning, which a strict build makes an error.
"""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

log = logging.getLogger("mkdocs.hooks.links")
ROOT = Path(__file__).parents[1]
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md")  # as pages of the same names in lower case
RESULTS = "bench/results"
PICTURES = (RESULTS, f"{RESULTS}/paper")  # folders
LINK = re.compile(r"(\]\()(?![a-z]+:|#)([^)\s#]+)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages and pictures that live outside docs/."""
    for source in PAGES:
        files.append(File.generated(config, source.lower(), abs_src_path=str(ROOT / source)))
    for picture in sorted(picture for folder in PICTURES for picture in (ROOT / folder).glob("*.png")):
        inside = picture.relative_to(ROOT / RESULTS).as_posix()
        files.append(File.generated(config, f"results/{inside}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Rewrites the links of a page that leave docs/."""
    source = Path(page.file.abs_src_path).relative_to(ROOT).as_posix()
    folder = posixpath.dirname(source)

    def rewrite(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, found[2]))
        return found[1] + _on_the_site(target, found[2], source, page.file.src_uri, config)

    return LINK.sub(rewrite, markdown)


def _on_the_site(target: str, written: str, source: str, page: str, config: Any) -> str:
    if not (ROOT / target).exists():
        log.warning(f"{source} links to {written!r}, which is not in the repository")
        return written
    if target in PAGES:
        inside = target.lower()
    elif posixpath.dirname(target) in PICTURES and target.endswith(".png"):
        inside = f"results/{posixpath.relpath(target, RESULTS)}"
    elif target.startswith("docs/") and target.endswith(".md"):
        inside = target.removeprefix("docs/")
    else:
        kind = "tree" if (ROOT / target).is_dir() else "blob"
        return f"{config.repo_url.rstrip('/')}/{kind}/main/{target}"
    return posixpath.relpath(inside, posixpath.dirname(page) or ".")
