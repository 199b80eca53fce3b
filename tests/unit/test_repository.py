"""What the tree itself promises to those who install it."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_folder_operator_is_no_package() -> None:
    """It would shadow the standard library's module of that name for all who run from the root."""
    assert not (ROOT / "operator" / "__init__.py").exists()


def test_the_lock_has_hashes_and_no_addresses() -> None:
    """Users behind mirrors install from it, and verify what they get."""
    lock = (ROOT / "requirements.lock").read_text()
    assert "://" not in lock
    packages = [line for line in lock.splitlines() if "==" in line and not line.startswith("#")]
    assert packages
    assert all(line.endswith("\\") for line in packages)
    assert lock.count("--hash=sha256:") >= len(packages)
