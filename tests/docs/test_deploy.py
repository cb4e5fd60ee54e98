"""The files to run a server from agree with each other and with what a server reads."""

import re
import tomllib
from pathlib import Path
from typing import Any

import yaml

from twostep.serve.config import ServeSettings, read_settings
from twostep.serve.gate import OPEN_PATHS
from twostep.serve.start import KEY_VARIABLE

DEPLOY = Path(__file__).parents[2] / "deploy"


def documents() -> dict[str, Any]:
    """The Kubernetes objects by kind."""
    text = (DEPLOY / "kubernetes.yaml").read_text()
    return {each["kind"]: each for each in yaml.safe_load_all(text)}


def instructions() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile, with their arguments on one line."""
    text = re.sub(r"^#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.M)
    lines = re.sub(r"\\\n\s*", "", text).split("\n")
    return [(line.split()[0], line.partition(" ")[2]) for line in lines if line]


def test_the_image_runs_as_nobody_special_and_says_how_it_is() -> None:
    last = dict(instructions())
    assert int(last["USER"]) > 0
    kinds = [kind for kind, _ in instructions()]
    assert kinds.index("USER") < len(kinds) - 1 - kinds[::-1].index("RUN")  # it draws as that user
    assert "/readyz" in last["HEALTHCHECK"]
    assert last["ENTRYPOINT"] == '["twostep", "serve", "--config", "/etc/twostep/serve.toml"]'
    settings = read_settings(DEPLOY / "serve.toml", {})
    assert settings.port == int(last["EXPOSE"])
    assert settings.jobs is not None
    assert str(settings.jobs.parent) == last["VOLUME"]
    made = next(words for kind, words in instructions() if kind == "RUN" and "mkdir" in words)
    for folder in (*settings.model_folders, *settings.lora_folders):
        assert str(folder) in made
    assert settings.models == ("nano",)  # which the build replaces by its own
    assert re.search(r"^models = .*$", (DEPLOY / "serve.toml").read_text(), re.M)


def test_what_the_image_copies_is_not_ignored() -> None:
    kept = (DEPLOY.parent / ".dockerignore").read_text().splitlines()
    for kind, words in instructions():
        if kind == "COPY" and not words.startswith("--from"):
            for name in words.split()[:-1]:
                assert f"!{name}" in kept
                assert (DEPLOY.parent / name).exists()


def test_kubernetes_gives_jobs_time_and_reads_the_key_from_a_secret() -> None:
    found = documents()
    settings = ServeSettings.model_validate(tomllib.loads(found["ConfigMap"]["data"]["serve.toml"]))
    pod = found["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    # uvicorn waits for connections that long, and then the engine for jobs.
    assert pod["terminationGracePeriodSeconds"] >= pause + 2 * settings.drain_seconds
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["path"] in OPEN_PATHS
    assert container["livenessProbe"]["httpGet"]["path"] == "/healthz"
    assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"
    (variable,) = container["env"]
    assert variable["name"] == KEY_VARIABLE
    assert set(variable["valueFrom"]["secretKeyRef"]) == {"name", "key"}
    assert container["ports"][0]["containerPort"] == settings.port
    assert settings.host == "0.0.0.0"
    assert container["resources"]["limits"]["memory"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["runAsUser"] == int(dict(instructions())["USER"])
    assert container["securityContext"]["readOnlyRootFilesystem"]
    labels = found["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert found["Service"]["spec"]["selector"].items() <= labels.items()


def test_compose_gives_jobs_time_and_reads_the_key_from_a_secret() -> None:
    found = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    service = found["services"]["twostep"]
    settings = read_settings(DEPLOY / "serve.toml", {})
    assert int(service["stop_grace_period"].rstrip("s")) >= 2 * settings.drain_seconds
    (secret,) = service["secrets"]
    assert service["command"] == ["--key-file", f"/run/secrets/{secret}"]
    assert secret in found["secrets"]
    assert [port.split(":")[0] for port in service["ports"]] == ["127.0.0.1"]
    targets = [volume.split(":")[1] for volume in service["volumes"]]
    assert settings.jobs is not None
    assert str(settings.jobs.parent) in targets
    assert {str(folder) for folder in settings.model_folders} <= set(targets)
