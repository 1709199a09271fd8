"""How Sphinx builds the documentation: `python3 -m sphinx -W -b html docs build/docs`, without network."""

import inspect
import re

import keras
from sphinx.util.inspect import stringify_signature

import keras_proxynorm

project = "keras_proxynorm"
author = "The keras_proxynorm authors"
copyright = f"{author}, Apache License 2.0"
version = release = keras_proxynorm.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

html_theme = "furo"
html_title = "keras_proxynorm"

# The pages are Markdown that GitHub shows, too: links to headings are as there.
myst_heading_anchors = 3

# In docstrings, a name in single backticks is a link if it is public, and code if not.
default_role = "py:obj"
maximum_signature_line_length = 90
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
# Methods without a docstring are those that Keras defines.
autodoc_inherit_docstrings = False
# Docstrings say types, with shapes and units.
autodoc_typehints = "none"
napoleon_numpy_docstring = False
napoleon_attr_annotations = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Call arguments", "params_style"), "Output", "Reference", "State and cost"]

_LINK = re.compile(r"\[([^][]+)\]\((https?://[^()\s]+)\)")
_NO_NAME = re.compile(r"(?<![`:\w])`(?!`)(?![A-Za-z_][\w.]*`)([^`]+)`(?![`_])")


def markdown_to_rst(app, what, name, obj, options, lines):
    """Turns the Markdown of docstrings into reStructuredText: links, code in single backticks, indented code."""
    converted = []
    paragraph, gap = "", False
    for line in lines:
        if line.startswith("    ") and gap and paragraph and not paragraph.startswith((" ", "-", ">>>")):
            converted += ["::", ""]
        if line:
            paragraph = line
        gap = not line
        converted.append(_NO_NAME.sub(r"``\1``", _LINK.sub(r"`\1 <\2>`__", line)))
    lines[:] = converted


def signature_of_init(app, what, name, obj, options, signature, return_annotation):
    """The signature of `__init__` for classes of Keras, whose `__new__` takes anything."""
    if what == "class" and issubclass(obj, (keras.layers.Layer, keras.callbacks.Callback)):
        parameters = list(inspect.signature(obj.__init__).parameters.values())[1:]
        return stringify_signature(inspect.Signature(parameters), show_annotation=False), return_annotation
    return None


def setup(app):
    """Called by Sphinx."""
    # Before napoleon, whose priority is the default, 500.
    app.connect("autodoc-process-docstring", markdown_to_rst, priority=400)
    app.connect("autodoc-process-signature", signature_of_init)
