"""What the families offer to loading: mypy compares each module with its protocol here.

Not in `analysis`, whose users would have mypy read all of these libraries.
"""

from analysis.networks import builtin, custom, exported, timm, torchvision, transformers
from analysis.networks.family import Family, Listed, OfGraphs, OwnLoading
from analysis.networks.loading import FAMILIES

MODULES: tuple[Family, ...] = (builtin, custom, exported, timm, torchvision, transformers)
LISTED: tuple[Listed, ...] = (custom, exported, timm, torchvision)
OF_GRAPHS: tuple[OfGraphs, ...] = (exported,)
OWN_LOADING: tuple[OwnLoading, ...] = (exported, transformers)


def test_each_family_is_compared_with_its_protocol() -> None:
    """A module that gains a protocol at run time has it in the types as well."""
    names = {module.__name__.rpartition(".")[2]: module for module in MODULES}  # type: ignore[attr-defined]
    assert set(names) == set(FAMILIES)
    assert {module for module in MODULES if isinstance(module, Listed)} == set(LISTED)
    assert {module for module in MODULES if isinstance(module, OwnLoading)} == set(OWN_LOADING)
    assert {module for module in MODULES if isinstance(module, OfGraphs)} == set(OF_GRAPHS)
