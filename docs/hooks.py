"""MkDocs hooks: what pages link to outside of docs/ becomes part of the site, in its own place.

On disk and on a forge `../experiments/x.csv` is the file of the repository; on the site it is a
copy of it at experiments/x.csv. Links to folders, which a site does not have, become plain text.
"""

import posixpath
import re
from pathlib import Path

import griffe
from mkdocs.structure.files import File

LINK = re.compile(r"\[([^\]]*)\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")


class Plain(griffe.Extension):
    """Docstrings are text with shapes in it: where indented lines say something they stay as they
    are, and elsewhere "[B, S]" or x["loss"]["val"] are no links."""

    def on_object(self, *, obj, **_):
        if obj.docstring:
            paragraphs = re.split(r"\n\n(?! )", obj.docstring.value)
            obj.docstring.value = "\n\n".join(map(_as_markdown, paragraphs))


def _as_markdown(paragraph: str) -> str:
    if re.search(r"^ ", paragraph, re.M):
        return f"```text\n{paragraph}\n```"
    parts = re.split(r"(`[^`]*`)", paragraph)
    parts[::2] = [re.sub(r"\](\s?)\[", r"]\1\\[", part) for part in parts[::2]]
    return "".join(parts)


def on_files(files, config):
    """Adds the linked files; a Markdown file among them becomes a page."""
    docs = Path(config.docs_dir)
    for page in list(files.documentation_pages()):
        for _, target, _ in LINK.findall(Path(page.abs_src_path).read_text()):
            path = _repository_path(page.src_uri, target)
            source = docs.parent / path
            if path.startswith("docs/") or not source.is_file() or files.get_file_from_path(path):
                continue
            files.append(File.generated(config, path, abs_src_path=str(source)))
    return files


def on_page_markdown(markdown, page, config, **_):
    """Points links that leave docs/ at the copies."""
    root, name = Path(config.docs_dir).parent, page.file.src_uri
    if not Path(config.docs_dir, name).exists():  # itself a copy: what it links to is not there
        return LINK.sub(r"\1", markdown)

    def moved(link):
        text, target, anchor = link.groups()
        path = _repository_path(name, target)
        if path.startswith("docs/"):
            return link[0]
        if (root / path).is_dir():
            return text
        there = posixpath.relpath(path, posixpath.dirname(name) or ".")
        return f"[{text}]({there}{anchor or ''})"

    return LINK.sub(moved, markdown)


def _repository_path(page: str, target: str) -> str:
    """From the repository's root: where a link of a page leads."""
    return posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target))
