"""Show the notebooks of notebooks/ as pages, with the outputs that the files have (a mkdocs hook).

Nothing is executed. The Markdown goes through the site's own theme, as that of all other pages.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

# Outputs are code blocks of their own class, so that site.css can tell them from the code.
TEMPLATE = """
{%- extends 'markdown/index.md.j2' -%}
{%- block stream %}{{ block(output.text) }}{% endblock stream -%}
{%- block data_text %}{{ block(output.data['text/plain']) }}{% endblock data_text -%}
{%- macro block(text) %}
``` {.text .output}
{{ text.rstrip() }}
```
{% endmacro -%}
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page per notebook, and its pictures, to the files of the site."""
    exporter = MarkdownExporter(raw_template=TEMPLATE)
    for path in sorted(Path(config.config_file_path).parent.glob("notebooks/*.ipynb")):
        names = {"output_files_dir": path.stem, "unique_key": path.stem}
        page, resources = exporter.from_filename(str(path), resources=names)
        contents = {f"{path.stem}.md": page} | resources["outputs"]
        for name, content in contents.items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Turn links to the files into links to their pages."""
    return re.sub(r"\]\(\.\./notebooks/(\w+)\.ipynb\)", r"](notebooks/\1.md)", markdown)
