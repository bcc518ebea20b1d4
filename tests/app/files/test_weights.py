"""Wrapper prefixes of names and tensors beside weights, recognised by their names."""

import doctest

import pytest

from app.files import weights
from app.files.weights import weight_names


def test_the_example_in_the_docstring_holds() -> None:
    """The example in the docstring holds."""
    assert doctest.testmod(weights).failed == 0


@pytest.mark.parametrize(
    ("names", "prefix", "ignored"),
    [
        (["head.weight", "head.bias"], "", {}),
        (["module.head.weight", "module.layers.0.weight"], "module.", {}),
        (["_orig_mod.module.head.weight", "_orig_mod.module.fc.weight"], "_orig_mod.module.", {}),
        (["model.vit.x", "model.classifier.weight"], "model.", {}),
        (["state_dict.model.a", "state_dict.model.b"], "state_dict.model.", {}),
        (["model.layers.0.q", "score.weight"], "", {}),
        (["model.a", "ema_model.a", "optimizer.state.0", "optimizer.b"], "model.", {"ema_model.": 1, "optimizer.": 2}),
        (["ema.a", "ema.b"], "ema.", {}),
        (["optimal.weight", "emaciated.weight"], "", {}),
        (["module.", "module.a"], "", {}),
        (["n_averaged", "module.a.b"], "module.", {"n_averaged": 1}),
        (["model.a.b", "criterion.weight"], "model.", {"criterion.": 1}),
        (["ema_model.a.b", "initted", "step"], "ema_model.", {"initted": 1, "step": 1}),
        (["base_model.model.a", "base_model.model.b"], "base_model.model.", {}),
        (["step.weight", "a.weight"], "", {}),
        ([], "", {}),
    ],
)
def test_names_as_training_leaves_them(names: list[str], prefix: str, ignored: dict[str, int]) -> None:
    """A prefix is one that all weights share; other tensors are listed as ignored, unless there are no others."""
    found = weight_names(names)
    assert (found.prefix, found.ignored) == (prefix, ignored)
