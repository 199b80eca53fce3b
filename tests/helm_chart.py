"""The chart as Helm renders it, without a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

CHART = Path("charts/trimtab")
VALUES = {path.stem: yaml.safe_load(path.read_text()) for path in sorted(CHART.glob("ci/*.yaml"))}
CASES: dict[str, dict[str, Any]] = {"defaults": {}, **VALUES}


def rendered(
    values: dict[str, Any] | None = None, *, name: str = "trimtab", namespace: str = "trimtab"
) -> dict[str, str]:
    """Render each template to text, by its name. Raises helm_python.HelmError."""
    # Helm is a library in Go, whose threads would be in the way of `cluster.network`.
    from helm_python import Chart  # noqa: PLC0415  # see above

    with Chart.load(CHART) as chart:
        texts = chart.render(values or {}, name=name, namespace=namespace, is_install=True)
    return {Path(path).name: text for path, text in texts.items()}


def objects(
    values: dict[str, Any] | None = None, *, name: str = "trimtab", namespace: str = "trimtab"
) -> list[dict[str, Any]]:
    """Render to the objects that an installation creates."""
    texts = rendered(values, name=name, namespace=namespace)
    texts.pop("NOTES.txt")
    return [each for text in texts.values() for each in yaml.safe_load_all(text) if each]


def of_kind(kind: str, among: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [each for each in among if each["kind"] == kind]
