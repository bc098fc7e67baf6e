"""The README's commands exist, its set-up lines are what .ci/run runs, and packaging agrees with the code."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from uni3d import cli

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def shell_lines(section: str | None = None) -> list[str]:
    """Lines of the shell blocks of the README, or of one of its sections."""
    text = README if section is None else README.partition(f"## {section}\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```sh\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line]


def test_set_up_is_two_complete_lines() -> None:
    first, second = shell_lines("Set-up")
    for line in (first, second):
        assert line.startswith("python3 -m venv .venv && .venv/bin/python -m pip install -e ")
    assert first.endswith('.venv/bin/uni3d generate "a red wooden chair" --output chair.glb')
    assert '-e ".[test]"' in second and second.endswith("-m pytest")


def test_ci_takes_its_line_from_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "set -euo pipefail" in script
    program = re.search(r"awk '(.*)' README.md", script)
    assert program is not None
    found = subprocess.run(["awk", program[1], "README.md"], capture_output=True, text=True, cwd=ROOT)
    assert found.stdout.splitlines() == [shell_lines("Set-up")[1]]
    subprocess.run(["bash", "-n", ".ci/run"], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    "line", [line for line in shell_lines() if "uni3d " in line and "pytest" not in line]
)
def test_every_command_of_the_readme_exists(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = re.search(r"uni3d ((?:teacher |evaluator )?[\w-]+)", line)
    assert words is not None and words[1] in {command.words for command in cli.COMMANDS}, line
    assert cli.main([*words[1].split(), "--help"]) == 0
    out = capsys.readouterr().out
    known = set(re.findall(r"--[\w.-]+", out))
    assert set(re.findall(r"(?<!\S)--[\w.-]+", line)) <= known, line


def test_requirements_are_what_pyproject_says() -> None:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    listed = [line for line in lines if line and not line.startswith("#")]
    assert listed == PROJECT["dependencies"] + PROJECT["optional-dependencies"]["demo"]
    assert set(PROJECT["optional-dependencies"]) == {"browser", "cuda", "demo", "eval", "test", "usd"}
    assert PROJECT["optional-dependencies"]["cuda"] == ["nerfacc==0.5.3"]


# What brings a module, where its name differs; None is on no registry and found by probing.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "yaml": "pyyaml",
    "skimage": "scikit-image",
    "fast_simplification": "fast-simplification",
    "huggingface_hub": "diffusers",
    "starlette": "gradio",
    "imageio_ffmpeg": "imageio-ffmpeg",
    "pxr": "usd-core",
    "tinycudann": None,
    "nvdiffrast": None,
}


def test_every_import_is_declared() -> None:
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    declared = {re.split(r"[<>=!\[ ]", entry)[0].lower() for group in groups for entry in group}
    for file in [*(ROOT / "uni3d").rglob("*.py"), ROOT / "app.py"]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            else:
                continue
            for root in {name.split(".")[0] for name in names}:
                if root in sys.stdlib_module_names or root == "uni3d":
                    continue
                distribution = DISTRIBUTIONS.get(root, root)
                assert distribution is None or distribution.lower() in declared, f"{file.name} imports {root}"


def test_licence_and_notice_are_there() -> None:
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in licence and "END OF TERMS AND CONDITIONS" in licence
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    assert "credits: begin" in notice and "credits: end" in notice


def test_the_project_speaks_of_itself_alone() -> None:
    """No paths of one machine in what is shipped."""
    shipped = [*ROOT.glob("uni3d/**/*.py"), *ROOT.glob("configs/**/*.yaml")]
    texts = [*shipped, ROOT / "README.md", ROOT / "NOTICE"]
    for file in texts:
        found = re.search(r"/(work|root|home)/\w+", file.read_text(encoding="utf-8"))
        assert found is None, f"{file.name}: {found and found[0]}"
