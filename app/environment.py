"""The environment of processes that read untrusted files: what they need, without keys and passwords."""

import os
import re
from collections.abc import Mapping
from urllib.parse import urlsplit

from app.settings import Settings

_NAMES = ("PATH", "HOME", "USER", "LOGNAME", "LANG", "LANGUAGE", "TZ", "TMPDIR", "TMP", "TEMP", "VIRTUAL_ENV")
# Prefixes of variables of the system, Python, fonts, linear algebra and GPUs.
_PREFIXES = (
    "LC_", "LD_", "PYTHON", "CONDA_", "XDG_", "FONTCONFIG_",
    "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "BLIS_", "ATEN_", "MALLOC_", "DNNL_", "ONEDNN_",
    "TORCH", "PYTORCH", "TRITON_", "CUDA", "CUBLAS", "CUDNN", "NVIDIA_", "NCCL_",
    "HF_HOME", "HF_HUB_CACHE", "HF_MODULES_CACHE", "TRANSFORMERS_", "TOKENIZERS_", "TIMM_", "INTERPLAY_",
)  # fmt: skip
_OURS_SECRET = ("INTERPLAY_API_KEY", "INTERPLAY_DATABASE_URL")
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL|AUTH", re.IGNORECASE)
# No library downloads anything by itself, and none sends telemetry.
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}
# How variables begin that obstore reads: for a store, by the scheme of its URL, and for its HTTP client.
STORES = {"s3": "AWS_", "gs": "GOOGLE_", "az": "AZURE_"}
_HTTP = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR")


def plain_environment(
    settings: Settings | None = None, *, given: Mapping[str, str] | None = None, storage: bool = False
) -> dict[str, str]:
    """Return the environment of a process that reads untrusted files.

    Args:
        settings: the service's settings; their `child_environment` names further variables to pass on.
        given: the variables to choose from. Default: this process's own.
        storage: whether the process reaches the storage by itself; if that is remote, its address and credentials are
            passed on as well.

    Returns:
        Variables by name, including those that keep libraries offline.
    """
    given = os.environ if given is None else given
    named = set(settings.child_environment.split(",")) if settings else set()
    found = {
        name: value
        for name, value in given.items()
        if name in named
        or ((name in _NAMES or name.startswith(_PREFIXES)) and name not in _OURS_SECRET and not _SECRET.search(name))
    }
    if storage and settings is not None:
        scheme = urlsplit(settings.effective_storage_url).scheme
        if prefix := STORES.get(scheme):
            opens = (prefix, *_HTTP)
            found |= {name: value for name, value in given.items() if name.upper().startswith(opens)}
    return found | _OFFLINE
