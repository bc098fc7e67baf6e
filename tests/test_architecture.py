"""Who may import whom, and what must stand nowhere: read from the source, so nothing is imported."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "uni3d"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 600

# Light modules that any room but `losses` may use; of them device_clock and timing_program know torch.
PLAIN = {"errors", "resources", "device_clock", "timing_program"}
ATOMIC_WRITE = {"training.checkpoint"}
# Torch alone: what lets several scenes share one pass, and a GPU draw without being waited for.
STACKS = {"random_streams", "parameter_stack", "device_draws"}

# Room or module -> what of uni3d it may import, "losses" standing for everything below uni3d.losses.
MAY_IMPORT: dict[str, set[str]] = {
    "losses": set(),
    "diffusion": {"losses.noise_schedule", "pickle_reader", *STACKS, *PLAIN, *ATOMIC_WRITE},
    "scene": {*STACKS, *PLAIN, *ATOMIC_WRITE},
    "mesh": {"scene", "outputs", *PLAIN, *ATOMIC_WRITE},
    "data": {"pickle_reader", "scene.camera", "mesh.raycaster", "mesh.renderable", *PLAIN, *ATOMIC_WRITE},
    "training": {"losses", "diffusion", *STACKS, *PLAIN},
    "evaluation": {
        "data",
        "mesh",
        "scene.camera",
        "diffusion",
        "training.stop",
        "training.run_log",
        *PLAIN,
        *ATOMIC_WRITE,
    },
    "teacher": {
        "diffusion",
        "data",
        "training",
        "scene.camera",
        "losses.noise_schedule",
        "config.text_to_3d",
        "config.values",
        *PLAIN,
    },
    # The server takes the plain layer alone; what its worker process runs is imported inside functions.
    "web": {
        "config",
        "prompts",
        "text_to_3d.pipeline",
        "data.captions",
        "mesh.gltf_validator",
        "scene.camera",
        "__version__",
        "outputs",
        *PLAIN,
        *ATOMIC_WRITE,
    },
    "distillation": {
        "losses",
        "diffusion",
        "data",
        "training",
        "config",
        *PLAIN,
    },
    # The plain layer: settings and checks, standard library and YAML only.
    "random_streams": set(),
    "device_draws": {"random_streams"},
    "device_clock": set(),
    "timing_program": ATOMIC_WRITE,
    "parameter_stack": set(),
    "errors": set(),
    "pickle_reader": {"errors"},
    "config": {"resources", "errors"},
    "resources": {"errors"},
    "prompts": {"errors"},
    "outputs": {"errors"},
    # The command line: programs and rooms only inside command functions.
    "cli": {"config.values", "errors"},
    "__main__": {"cli"},
    "__init__": set(),
}
# Rooms that put the others together: they may import everything but the command line.
PROGRAMS = ("text_to_3d", "benchmark")
# Import at the top only plain modules; what they run is imported inside functions.
COMMANDS = "commands"
PLAIN_LAYER = {
    "cli",
    "commands",
    "config",
    "errors",
    "outputs",
    "prompts",
    "resources",
    "text_to_3d.scene_requests",
    "teacher.settings",
    "evaluation.settings",
    "distillation.settings",
    "benchmark.settings",
}
WITHOUT_TORCH = (
    "errors",
    *(f"config/{file.stem}" for file in (PACKAGE / "config").glob("*.py")),
    "resources",
    "prompts",
    "outputs",
    "pickle_reader",
    "text_to_3d/scene_requests",
)


def module_name(file: Path) -> str:
    """ "losses.divergence" for uni3d/losses/divergence.py; a room's __init__ is the room."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imports(tree: ast.AST, *, only_top: bool = False) -> list[tuple[str, int]]:
    """Every imported module with its line; `from a import b` counts as a.b. Imports for types count too."""
    nodes = list(ast.walk(tree))
    if only_top:
        inside = {
            child
            for node in nodes
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            for child in ast.walk(node)
            if child is not node
        }
        nodes = [node for node in nodes if node not in inside]
    found: list[tuple[str, int]] = []
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}: write uni3d..."
            found += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
    return found


def own_imports(file: Path, *, only_top: bool = False) -> list[tuple[str, int]]:
    """Imports of uni3d, without the prefix."""
    found = imports(ast.parse(file.read_text()), only_top=only_top)
    return [(name.removeprefix("uni3d."), line) for name, line in found if name.startswith("uni3d.")]


def is_allowed(name: str, allowed: set[str]) -> bool:
    return any(name == entry or name.startswith(f"{entry}.") for entry in allowed)


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_imports_follow_the_table(file: Path) -> None:
    module = module_name(file)
    room = module.split(".")[0]
    if room in PROGRAMS:
        wrong = [hit for hit in own_imports(file) if is_allowed(hit[0], {"cli", COMMANDS})]
    elif room == COMMANDS:
        wrong = [hit for hit in own_imports(file, only_top=True) if not is_allowed(hit[0], PLAIN_LAYER)]
    else:
        assert room in MAY_IMPORT, f"{file.name}: add the room or module '{room}' to the table of this test"
        is_lazy = room in ("cli", "__init__")
        hits = own_imports(file, only_top=is_lazy)
        allowed = MAY_IMPORT[room] | ({room} if file.parent != PACKAGE else {"__version__"})
        if room == "__init__":
            allowed = {"text_to_3d.pipeline"}  # for type checkers only
        wrong = [hit for hit in hits if not is_allowed(hit[0], allowed)]
    assert not wrong, f"{module} may not import {wrong}"


def test_losses_need_torch_only() -> None:
    standard = sys.stdlib_module_names - {"os", "io", "pathlib", "shutil", "json", "subprocess", "socket"}
    for file in sorted((PACKAGE / "losses").glob("*.py")):
        for name, line in imports(ast.parse(file.read_text())):
            root = name.split(".")[0]
            assert root in {*standard, "torch", "uni3d"}, f"{file.name}:{line} imports {root}"


def test_losses_place_nothing_and_write_nothing() -> None:
    for file in sorted((PACKAGE / "losses").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                called = (
                    node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                )
                assert called not in ("cuda", "open", "save", "load", "print"), f"{file.name}:{node.lineno}"


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_the_plain_layer_is_light(module: str) -> None:
    """Also true of what they import: the table above keeps them among themselves."""
    heavy = {"torch", "numpy", "diffusers", "transformers", "trimesh", "tyro", "PIL"}
    roots = {name.split(".")[0] for name, _ in imports(ast.parse((PACKAGE / f"{module}.py").read_text()))}
    assert not roots & heavy


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_nothing_that_runs_foreign_code(file: Path) -> None:
    tree = ast.parse(file.read_text())
    for name, line in imports(tree):
        root = name.split(".")[0]
        assert root not in ("pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"), (
            f"line {line}: {name}"
        )
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        where = f"{module_name(file)} line {node.lineno}"
        assert "trust_remote_code" not in keywords, where
        text = ast.unparse(node.func)
        assert text not in (
            "eval",
            "exec",
            "yaml.load",
            "yaml.unsafe_load",
            "torch.save",
            "torch.hub.load",
        ), where
        if text == "torch.load":
            value = keywords.get("weights_only")
            assert isinstance(value, ast.Constant) and value.value is True, f"{where}: weights_only=True"
        if text in ("np.load", "numpy.load"):
            value = keywords.get("allow_pickle")
            assert value is None or (isinstance(value, ast.Constant) and value.value is False), where
        if "from_pretrained" in text and "use_safetensors" in keywords:
            value = keywords["use_safetensors"]
            assert isinstance(value, ast.Constant) and value.value is True, where


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_no_file_outgrows_its_reader(file: Path) -> None:
    num_lines = len(file.read_text().splitlines())
    assert num_lines <= MAX_LINES, f"{file.name} has {num_lines} lines; split it"


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_every_module_says_what_it_is(file: Path) -> None:
    text = file.read_text()
    assert not text.strip() or ast.get_docstring(ast.parse(text)), "the module docstring is missing"


def test_no_rooms_of_odds_and_ends() -> None:
    vague = {"utils", "util", "helpers", "common", "misc", "core"}
    names = {file.stem for file in FILES} | {file.parent.name for file in FILES}
    assert not names & vague


def test_the_table_can_fail(tmp_path: Path) -> None:
    file = tmp_path / "bad.py"
    file.write_text("def f():\n    from uni3d.mesh import export\n")
    assert own_imports(file) == [("mesh.export", 2)]
    assert own_imports(file, only_top=True) == []
    assert not is_allowed("mesh.export", MAY_IMPORT["losses"])
    assert not is_allowed("losses.divergence", MAY_IMPORT["diffusion"])
