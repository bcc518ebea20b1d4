"""A training script in a project whose packages have the same names as the server's."""

import shutil
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.packages import wheels

OWN = ("analysis", "app", "migrations", "workers")


@pytest.mark.slow
def test_a_project_with_packages_of_the_same_names(built: tuple[Path, Path], tmp_path: Path) -> None:
    """The script trains with InterplayLoss and saves checkpoint and features with the wheel and its extra `train`."""
    project, environment = tmp_path / "project", tmp_path / "environment"
    for name in OWN:
        (project / name).mkdir(parents=True)
        (project / name / "__init__.py").write_text('"""The project\'s."""\n')
    shutil.copy(Path(__file__).with_name("training.py"), project / "train.py")
    # The torch of this environment: the extra's requirements, and no other package.
    python = wheels.environment(environment, has=wheels.needed(built[0], extras=["train"]))
    installed = wheels.run([python, "-m", "pip", "install", built[0]])
    assert installed.returncode == 0, installed.stderr

    done = wheels.run([python, "-W", "error", project / "train.py", project])
    assert (done.returncode, done.stdout) == (0, "trained\n"), done.stderr
    with safe_open(project / "net.safetensors", "pt") as file:
        assert sorted(file.keys()) == ["head.bias", "head.weight", "layers.0.bias", "layers.0.weight"]
        assert "mlp" in file.metadata()["architecture"]
    with safe_open(project / "features.safetensors", "pt") as file:
        assert file.get_tensor("features").shape == (60, 16)
    converted = wheels.run(
        [environment / "bin" / "interplay", "convert", project / "net.pt", "-o", project / "c.safetensors"]
    )
    assert converted.returncode == 0, converted.stderr
    with safe_open(project / "c.safetensors", "pt") as file:
        assert "head.weight" in file.keys()  # noqa: SIM118  it is no dictionary
