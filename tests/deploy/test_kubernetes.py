"""deploy/kubernetes: rendered by kubectl, checked against schemas of Kubernetes and KEDA, and a running service."""

import copy
import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import kubernetes_validate
import pytest
from prometheus_client.parser import text_string_to_metric_families
from ruamel.yaml import YAML

from app.settings import Settings
from tests.services import OPERATORS, Service, until
from tests.test_containers import arguments_of, image_variables

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
# The oldest that Kubernetes still mends, and the newest whose schemas there are.
VERSIONS = ("1.34", "1.37")
Object = dict[str, Any]


@cache
def rendered(folder: str = "example") -> list[Object]:
    """The objects that `kubectl apply --kustomize` of a folder would send."""
    kubectl = Path(sys.executable).parent / "kubectl"
    ran = subprocess.run([kubectl, "kustomize", KUBERNETES / folder], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert "deprecated" not in ran.stderr
    return list(YAML(typ="safe").load_all(ran.stdout))


def named(kind: str, name: str) -> Object:
    """The rendered object of a kind and name."""
    (found,) = [one for one in rendered() if (one["kind"], one["metadata"]["name"]) == (kind, name)]
    return found


def pods() -> dict[str, Object]:
    """The pods that the objects describe, by the name of their Deployment or Job."""
    return {
        one["metadata"]["name"]: one["spec"]["template"] for one in rendered() if one["kind"] in ("Deployment", "Job")
    }


def containers() -> dict[str, Object]:
    """The only container of each pod."""
    found = {}
    for name, pod in pods().items():
        (found[name],) = pod["spec"]["containers"]
    return found


def selects(selector: Object, pod: Object) -> bool:
    return bool(selector.items() <= pod["metadata"]["labels"].items())


def check(one: Object, version: str) -> None:
    """Check an object against its schema, which knows no other keys."""
    if one["apiVersion"].startswith("keda.sh/"):
        schema = json.loads((KUBERNETES / "schemas" / f"{one['kind'].lower()}-keda-v1alpha1.json").read_text())
        jsonschema.Draft202012Validator(schema).validate(one)
    else:
        kubernetes_validate.validate(one, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("folder", ["example", "base", "classes/cpu", "classes/gpu"])
def test_objects_fit_their_schemas(folder: str, version: str) -> None:
    assert rendered(folder)
    for one in rendered(folder):
        check(one, version)


@pytest.mark.parametrize(
    ("kind", "name", "place", "key"),
    [
        ("Deployment", "interplay-api", ("spec", "template", "spec"), "terminationGraceSeconds"),
        ("Job", "interplay-migrate", ("spec",), "ttlSeconds"),
        ("Ingress", "interplay", ("spec",), "className"),
        ("ScaledObject", "interplay-worker-gpu", ("spec",), "cooldown"),
        ("ScaledObject", "interplay-worker-gpu", ("spec", "advanced", "horizontalPodAutoscalerConfig"), "scaling"),
        ("TriggerAuthentication", "interplay", ("spec",), "secretRef"),
    ],
)
def test_the_check_can_fail(kind: str, name: str, place: tuple[str, ...], key: str) -> None:
    """A key that the schema does not know is refused, at any depth."""
    wrong = copy.deepcopy(named(kind, name))
    inner = wrong
    for step in place:
        inner = inner[step]
    inner[key] = "wrong"
    with pytest.raises(jsonschema.ValidationError, match=key):
        check(wrong, VERSIONS[-1])


def test_the_base_names_no_namespace() -> None:
    for folder in ("base", "classes/cpu", "classes/gpu"):
        assert not any("namespace" in one["metadata"] for one in rendered(folder))
    assert {one["metadata"].get("namespace") for one in rendered() if one["kind"] != "Namespace"} == {"interplay"}


def test_settings_exist_and_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every INTERPLAY_ variable is a setting, and what each container gets is a configuration that starts."""
    for path in KUBERNETES.rglob("*"):
        if path.suffix in (".yaml", ".env"):
            names = set(re.findall(r"INTERPLAY_([A-Z0-9_]+)", path.read_text()))
            assert names <= {field.upper() for field in Settings.model_fields}, path
    (settings,) = [one for one in rendered() if one["kind"] == "ConfigMap"]
    given = {"database-url": "postgresql://interplay:secret@postgres/interplay", "api-key": "secret"}
    shared = set()
    for name, container in containers().items():
        with monkeypatch.context() as patch:
            for key, value in settings["data"].items():
                patch.setenv(key, value)
            for variable in container["env"]:
                source = variable.get("valueFrom", {})
                if "secretKeyRef" in source:
                    patch.setenv(variable["name"], given[source["secretKeyRef"]["key"]])
                elif "value" in variable:
                    patch.setenv(variable["name"], variable["value"])
                elif "resourceFieldRef" in source:
                    resource = source["resourceFieldRef"]["resource"].partition(".")
                    patch.setenv(variable["name"], container["resources"][resource[0]][resource[2]])
            found = Settings()
            assert found.database_url == given["database-url"]
            assert (found.api_key is not None) == (name == "interplay-api")
            # A cache, and what is fetched beside it, have room in the volume.
            if name.startswith("interplay-worker"):
                (data,) = [volume for volume in pods()[name]["spec"]["volumes"] if volume["name"] == "data"]
                room = int(data["emptyDir"]["sizeLimit"].removesuffix("Gi")) * 2**30
                assert found.cache_bytes + 2 * found.max_fetch_bytes < room
            shared.add((found.storage_url, found.log_format, found.memory_patience_seconds))
    assert shared == {("s3://models/interplay", "json", 900)}


def test_secrets_are_named_and_never_written() -> None:
    """No Secret is rendered; keys and the database's address come from one, and their absence stops a container."""
    assert not any(one["kind"] == "Secret" for one in rendered())
    for name, container in containers().items():
        sources = {variable["name"]: variable.get("valueFrom", {}) for variable in container["env"]}
        assert sources["INTERPLAY_DATABASE_URL"]["secretKeyRef"] == {"name": "interplay", "key": "database-url"}
        if name == "interplay-api":
            assert sources["INTERPLAY_API_KEY"]["secretKeyRef"] == {"name": "interplay", "key": "api-key"}
        if name != "interplay-migrate":
            assert "optional" not in sources["INTERPLAY_STORAGE_URL"]["configMapKeyRef"]
    assert not any("password" in json.dumps(one).lower() for one in rendered())


def test_what_is_referred_to_is_there() -> None:
    """Selectors select pods of ours, and names are those of rendered objects."""
    maps = {one["metadata"]["name"] for one in rendered() if one["kind"] == "ConfigMap"}
    for container in containers().values():
        named_maps = {source["configMapRef"]["name"] for source in container["envFrom"] if "configMapRef" in source}
        named_maps |= {
            variable["valueFrom"]["configMapKeyRef"]["name"]
            for variable in container["env"]
            if "configMapKeyRef" in variable.get("valueFrom", {})
        }
        assert named_maps == maps
    everything = set(pods())
    for kind, name, selected in (
        ("Service", "interplay", {"interplay-api"}),
        ("PodDisruptionBudget", "interplay-api", {"interplay-api"}),
        ("NetworkPolicy", "interplay-api", {"interplay-api"}),
        ("NetworkPolicy", "interplay", everything),
        ("Deployment", "interplay-worker-cpu", {"interplay-worker-cpu"}),
        ("Deployment", "interplay-worker-gpu", {"interplay-worker-gpu"}),
        ("Deployment", "interplay-api", {"interplay-api"}),
    ):
        spec = named(kind, name)["spec"]
        selector = spec["podSelector"] if kind == "NetworkPolicy" else spec["selector"]
        selector = selector.get("matchLabels", selector)
        assert {pod for pod, template in pods().items() if selects(selector, template)} == selected, (kind, name)
    for one in rendered():
        if one["kind"] == "ScaledObject":
            assert one["spec"]["scaleTargetRef"]["name"] in pods()
            assert "replicas" not in named("Deployment", one["spec"]["scaleTargetRef"]["name"])["spec"]
            (trigger,) = one["spec"]["triggers"]
            assert named("TriggerAuthentication", trigger["authenticationRef"]["name"])
            assert trigger["metadata"]["url"] == "http://interplay.interplay.svc/metrics"
    (path,) = named("Ingress", "interplay")["spec"]["rules"][0]["http"]["paths"]
    ports = {port["name"] for port in named("Service", "interplay")["spec"]["ports"]}
    assert path["backend"]["service"] == {"name": "interplay", "port": {"name": "http"}}
    assert ports == {"http"} == {port["name"] for port in containers()["interplay-api"]["ports"]}


def test_pods_may_do_little() -> None:
    """They are the image's user, write into volumes alone, and know nothing of the cluster."""
    image = dict(entry.split("=", 1) for entry in image_variables())
    (added,) = [run for run in arguments_of("RUN") if "useradd" in run]
    for name, pod in pods().items():
        spec, container = pod["spec"], containers()[name]
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert f"--uid {spec['securityContext']['runAsUser']} " in added
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {mount["mountPath"] for mount in container["volumeMounts"]} == {image["INTERPLAY_DATA_DIR"], "/tmp"}
        assert all("emptyDir" in volume for volume in spec["volumes"])
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
        assert "memory" in container["resources"]["limits"]
    assert containers()["interplay-worker-gpu"]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert [containers()[name]["args"] for name in sorted(pods())] == [["api"], ["migrate"], ["worker"], ["worker"]]
    assert containers()["interplay-api"]["ports"][0]["containerPort"] == int(image["INTERPLAY_PORT"])


def test_probes_and_the_trigger_ask_for_what_there_is(service: Service) -> None:
    """Each probe's address answers 200 on a running service; KEDA's figure is on /metrics, once and without labels."""
    api = containers()["interplay-api"]
    for name in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert service.client.get(api[name]["httpGet"]["path"]).status_code == 200, name
    # Liveness must not follow the database.
    assert api["livenessProbe"]["httpGet"]["path"] == "/healthz"
    metrics = service.client.get("/metrics").text
    samples = [sample for family in text_string_to_metric_families(metrics) for sample in family.samples]
    for one in rendered():
        if one["kind"] == "ScaledObject":
            (trigger,) = one["spec"]["triggers"]
            (sample,) = [sample for sample in samples if sample.name == trigger["metadata"]["valueLocation"]]
            assert not sample.labels


# What a container's runtime does: nothing to write to but the volumes, and no capabilities.
_CONFINED = """
set -e
mount --make-rprivate /
mount --bind "$VOLUMES" /srv
mount -o remount,ro,bind /
exec setpriv --no-new-privs --inh-caps=-all --bounding-set=-all "$@"
"""


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="only root may make a root read-only")
def test_a_root_that_is_read_only_is_enough(tmp_path: Path, mlp_checkpoint_file: Path, digits_probe_file: Path) -> None:
    """An evaluation, its chart and its page come from a service that may write to its volumes alone."""
    for volume in ("data", "tmp"):
        (tmp_path / volume).mkdir()
    # Python's own folder of temporary files; the home of the image's user does not exist here.
    places = {"HOME": "/home/interplay", "TMPDIR": "/srv/tmp", "INTERPLAY_DATA_DIR": "/srv/data", "VOLUMES": tmp_path}
    environment = {**os.environ, **{name: str(place) for name, place in places.items()}, "INTERPLAY_THREADS": "1"}
    environment["PYTHONPATH"] = str(OPERATORS)
    confined = ["unshare", "--mount", "sh", "-c", _CONFINED, "confined"]
    tries = [*confined, sys.executable, "-c", f"open({str(ROOT / 'written')!r}, 'w')"]
    refused = subprocess.run(tries, env=environment, capture_output=True, text=True)
    assert "Read-only file system" in refused.stderr
    command = [*confined, sys.executable, "-m", "app", "serve", "--port", "0"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().split()[-1]
            with httpx.Client(base_url=url, timeout=30, trust_env=False) as client:
                service = Service(url, tmp_path, process, environment, client)
                until(lambda: client.get("/readyz").status_code == 200)
                ids = {
                    f"{noun}_id": service.post(f"/v1/{noun}s", {"name": noun}, file).json()["id"]
                    for noun, file in (("checkpoint", mlp_checkpoint_file), ("probe", digits_probe_file))
                }
                report = service.report(service.wait(service.analyze(**ids)["id"]))
                for path in (f"/v1/reports/{report['id']}/charts/overview.png", f"/reports/{report['id']}"):
                    assert client.get(path).status_code == 200
        finally:
            process.terminate()
            process.wait(30)
