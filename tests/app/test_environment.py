"""The environment of processes that read untrusted files."""

import pytest

from app.environment import plain_environment
from app.settings import Settings

GIVEN = {
    "PATH": "/bin",
    "LC_ALL": "C",
    "CUDA_VISIBLE_DEVICES": "1",
    "OMP_NUM_THREADS": "2",
    "PYTHONPATH": "x",
    "INTERPLAY_DEVICE": "cpu",
    "INTERPLAY_API_KEY": "secret",
    "INTERPLAY_DATABASE_URL": "postgresql://u:secret@h/d",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_REGION": "x",
    "HF_TOKEN": "secret",
    "WANDB_API_KEY": "secret",
    "PGPASSWORD": "secret",
    "TORCH_PRIVATE_TOKEN": "secret",
    "SOMETHING": "else",
}


def test_no_key_and_no_password_is_passed_on() -> None:
    """Variables needed for computing are passed on; secrets by name are not, whatever else the name begins with."""
    found = plain_environment(Settings(), given=GIVEN, storage=True)
    assert "secret" not in " ".join(found.values())
    kept = {"PATH", "LC_ALL", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "PYTHONPATH", "INTERPLAY_DEVICE"}
    assert kept == found.keys() & GIVEN.keys()
    assert found["HF_HUB_OFFLINE"] == "1"


def test_what_is_named_is_passed_on() -> None:
    """Variables named in the settings are passed on, as an operator's own network may need more."""
    found = plain_environment(Settings(child_environment="SOMETHING,MISSING"), given=GIVEN)
    assert found["SOMETHING"] == "else"
    assert "MISSING" not in found


@pytest.mark.parametrize(("storage", "passed"), [(True, True), (False, False)])
def test_a_remote_storage_is_opened_by_whoever_reaches_it(storage: bool, passed: bool) -> None:
    """Processes that access a remote storage get its credentials, and those of no other store."""
    given = {**GIVEN, "GOOGLE_SERVICE_ACCOUNT_KEY": "secret"}
    found = plain_environment(Settings(storage_url="s3://bucket/x"), given=given, storage=storage)
    assert ("AWS_SECRET_ACCESS_KEY" in found) is passed
    assert not found.keys() & {"GOOGLE_SERVICE_ACCOUNT_KEY", "INTERPLAY_API_KEY", "HF_TOKEN"}
