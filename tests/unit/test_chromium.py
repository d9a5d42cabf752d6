"""The step of `make test` that installs a browser, on made-up machines: a folder of programs that write down how they were called."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
INSTALLS = 'case "$*" in *install*) printf "#!/bin/sh\\n" > $HERE/chromium; chmod +x $HERE/chromium;; esac'
SUDO = 'shift; [ "$*" = true ] || exec "$@"'


def step(folder: Path, programs: dict[str, str], user: int = 0) -> tuple[str, str]:
    """(what apt-get was asked for, what was said) on a machine with these programs beside the ordinary ones."""
    folder.mkdir()
    for name in ("env", "timeout", "chmod"):
        (folder / name).symlink_to(str(shutil.which(name)))
    log = folder / "log"
    log.touch()
    for name, body in (programs | {"id": f"echo {user}"}).items():
        note = f'echo "{name} $*" >> {log}\n' if name in ("apt-get", "sudo") else ""
        (folder / name).write_text(f"#!/bin/sh\n{note}{body}\n")
        (folder / name).chmod(0o755)
    done = subprocess.run(
        ["/bin/sh", ROOT / "requirements/chromium.sh"],
        env={"PATH": str(folder), "HERE": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == ""
    return log.read_text(), done.stderr


def test_root_installs_it_once(tmp_path: Path) -> None:
    asked, said = step(tmp_path / "a", {"apt-get": INSTALLS})
    update, install = asked.splitlines()
    assert update.endswith(" update") and " install -y " in install and " chromium" in install and "skipped" not in said
    assert step(tmp_path / "b", {"apt-get": INSTALLS, "chromium": ""}) == ("", ""), "it is there already"


def test_another_user_goes_through_sudo_without_a_password(tmp_path: Path) -> None:
    asked, said = step(tmp_path / "a", {"apt-get": INSTALLS, "sudo": SUDO}, user=1000)
    assert sum(line.startswith("apt-get") for line in asked.splitlines()) == 2 and "skipped" not in said
    assert all(line.startswith("sudo -n ") for line in asked.splitlines() if line.startswith("sudo"))


@pytest.mark.parametrize(
    ("programs", "user", "reason"),
    [
        ({}, 0, "no apt-get here"),
        ({"apt-get": INSTALLS}, 1000, "not root"),
        ({"apt-get": INSTALLS, "sudo": "exit 1"}, 1000, "not root"),
        ({"apt-get": "exit 100"}, 0, "update failed"),
        ({"apt-get": 'case "$*" in *install*) exit 100;; esac'}, 0, "install failed"),
        ({"apt-get": "exit 0"}, 0, "no program called chromium"),
    ],
)
def test_where_it_cannot_be_had_it_says_so_and_goes_on(tmp_path: Path, programs: dict[str, str], user: int, reason: str) -> None:
    _, said = step(tmp_path / "machine", programs, user)
    assert reason in said and "will be skipped" in said and "apt-get install chromium" in said


def test_make_test_takes_the_step_first() -> None:
    lines = (ROOT / "Makefile").read_text("utf-8").splitlines()
    assert "browser" in next(line for line in lines if line.startswith("unit:") and "export" not in line).split()
    assert lines[lines.index("browser:") + 1].strip() == "requirements/chromium.sh"
