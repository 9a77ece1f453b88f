"""The manifests in kubernetes/, taken apart."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parents[1] / "kubernetes"
FILES = sorted(FOLDER.glob("*.yaml"))


@dataclass(frozen=True)
class Workload:
    """A Job, alone or in a JobSet.

    Attributes:
        file: its name.
        first_pod: the name that its first pod has; empty where names are drawn.
        subdomain: the headless service's name.
        job: the spec of the Job.
    """

    file: str
    first_pod: str
    subdomain: str
    job: dict[str, Any]

    @property
    def labels(self) -> dict[str, str]:
        return self.job["template"]["metadata"]["labels"]

    @property
    def pod(self) -> dict[str, Any]:
        return self.job["template"]["spec"]

    @property
    def container(self) -> dict[str, Any]:
        (only,) = self.pod["containers"]
        return only

    @property
    def options(self) -> dict[str, str]:
        """The options of ``run``, without their dashes."""
        found = [arg.removeprefix("--").partition("=") for arg in self.arguments()[1:-2]]
        return {name: value for name, _, value in found}

    def arguments(self, **values: str) -> list[str]:
        """Return the arguments as the kubelet writes variables into them."""
        env = self.container["env"]
        known = {one["name"]: one.get("value", one["name"].lower()) for one in env} | values
        return [
            re.sub(r"\$\((\w+)\)", lambda found: known[found[1]], arg)
            for arg in self.container["args"]
        ]


def documents(path: Path) -> list[dict[str, Any]]:
    """Return what a file has kubectl apply."""
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def of_kind(kind: str) -> list[dict[str, Any]]:
    """Return all documents of a kind."""
    return [one for path in FILES for one in documents(path) if one["kind"] == kind]


def workloads() -> list[Workload]:
    """Return all that runs a job."""
    found = []
    for path in FILES:
        for one in documents(path):
            name, spec = one["metadata"]["name"], one["spec"]
            if one["kind"] == "Job":
                subdomain = spec["template"]["spec"].get("subdomain", "")
                indexed = spec.get("completionMode") == "Indexed"
                found.append(Workload(path.name, f"{name}-0" if indexed else "", subdomain, spec))
            if one["kind"] == "JobSet":
                (replicated,) = spec["replicatedJobs"]
                first = f"{name}-{replicated['name']}-0-0"
                subdomain = spec["network"]["subdomain"]
                found.append(Workload(path.name, first, subdomain, replicated["template"]["spec"]))
    return found
