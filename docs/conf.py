"""The site: `make docs` builds it from the Markdown of this repository into build/docs/html.

The pages are the files that GitHub shows. Their formulas become MathML, their links to files lead
to the files' own pages, and the API reference is made of docstrings (docs/extensions).
"""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "extensions")]

import execute  # noqa: E402
import reference  # noqa: E402

import refimpl  # noqa: E402
from refimpl.ops import choices  # noqa: E402

project = "DeepSeek-V3/R1 refimpl"
copyright = "its authors; MIT license"
version = release = refimpl.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.linkcode"]
extensions += ["mathematics", "sources", "reference"]
root_doc = "docs/index"
include_patterns = ["*.md", "derivations/*.md", "kernels/*.md", "examples/*.md", "docs/**"]
include_patterns += ["benchmarks/results/recipe/report.md"]
exclude_patterns = [".*", "build", "docs/extensions", "**/__pycache__"]

myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]
myst_heading_anchors = 4
myst_links_external_new_tab = False
suppress_warnings = ["ref.python"]  # a name of two modules, in a docstring of a third

default_role = "py:obj"
highlight_language = "text"
python_maximum_signature_line_length = 88
add_module_names = False
autodoc_type_aliases = {
    "Array": "Array",
    **{x: f"refimpl.ops.choices.{x}" for x in choices.__all__[:-1]},
}
python_use_unqualified_type_names = True
toc_object_entries = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "furo"
pygments_dark_style = "github-dark"
html_title = "refimpl"
html_math_renderer = "mathml"
html_static_path = ["style.css"]
html_css_files = ["style.css"]
html_extra_path = ["extra"]  # the way from / to docs/index.html
html_copy_source = False
html_show_sphinx = False
nb_execution_mode = "cache" if execute.cached() else "off"  # `make notebooks` executes them
nb_execution_cache_path = str(execute.KEPT)
linkcode_resolve = reference.source
