"""Settings of the site of documentation, which

    sphinx-build -E -W --keep-going docs docs/_build/html

builds of these pages, offline. ``extension.py`` has what is our own.
"""

import os
import sys
from pathlib import Path

import fastopt

sys.path.insert(0, str(Path(__file__).resolve().parent))
os.environ.setdefault("KERAS_BACKEND", "torch")  # fastopt.keras has no other

project = "fastopt"
author = "the fastopt authors"
copyright = f"2026, {author}"
release = version = fastopt.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "extension"]
exclude_patterns = ["_build"]
nitpicky = True  # a link that leads nowhere is a warning
show_warning_types = True

# Pages are GitHub's Markdown.
myst_fence_as_directive = ["math"]
myst_heading_anchors = 4
html_math_renderer = "mathml"

# The docstrings say what arguments are; other packages' types have no pages here.
autodoc_typehints = "none"
autodoc_inherit_docstrings = False
napoleon_google_docstring = False
napoleon_use_param = napoleon_use_rtype = False
napoleon_custom_sections = [("Attributes", "params_style")]
nitpick_ignore_regex = [(r"py:.*", r"(numpy|numba|jax)\..*|TypingError")]
autodoc_member_order = "bysource"
python_display_short_literal_types = True
toc_object_entries_show_parents = "hide"
add_module_names = True

html_theme = "furo"
pygments_dark_style = "github-dark"
html_title = f"fastopt {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}

# `sphinx-build -b linkcheck docs docs/_build/links` needs the net.
linkcheck_timeout = 20
linkcheck_workers = 4
linkcheck_anchors = False
