"""Checks shapes and types as analysis annotates them, in all tests of this folder.

Modules of analysis that were imported before stay unchecked; `test_annotations_are_checked` notices.
"""

from jaxtyping import install_import_hook

install_import_hook("analysis", "beartype.beartype")
