"""The command line: fast help, one sentence for every mistake, exit codes, and results alone on stdout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import uni3d
from uni3d import cli
from uni3d.commands import information
from uni3d.commands.parsing import fold_box, option_value
from uni3d.config.loader import config_to_yaml
from uni3d.config.presets import quality_preset
from uni3d.config.text_to_3d import TextTo3DConfig
from uni3d.errors import Interrupted, MissingWeightsError, UsageError
from uni3d.outputs import check_output_file, check_output_folder
from uni3d.prompts import MAX_PROMPT_LENGTH, check_prompt, prompt_slug

ALL_COMMANDS = [command.words for command in cli.COMMANDS]


def run(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80"}
    return subprocess.run(
        [sys.executable, "-m", "uni3d", *words], capture_output=True, text=True, cwd=cwd, env=environment
    )


def test_help_is_fast_and_imports_nothing_heavy() -> None:
    probe = (
        "import sys, time\nbegun = time.perf_counter()\n"
        "from uni3d.cli import main\ncode = main(['--help'])\n"
        "heavy = {'torch', 'numpy', 'tyro', 'diffusers', 'yaml'} & set(sys.modules)\n"
        "print(code, sorted(heavy), time.perf_counter() - begun, file=sys.stderr)"
    )
    # The best of three: the machine may be busy with something else.
    seconds = []
    for _ in range(3):
        result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
        code, heavy, elapsed = result.stderr.split()
        assert (code, heavy) == ("0", "[]")
        seconds.append(float(elapsed))
    assert min(seconds) < 1.0
    assert "generate" in result.stdout and max(map(len, result.stdout.splitlines())) <= 80


def test_the_help_of_generate_needs_no_torch() -> None:
    probe = (
        "import sys\nfrom uni3d.cli import main\ncode = main(['generate', '--help'])\n"
        "assert 'torch' not in sys.modules and code == 0"
    )
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for flag in ("--output", "--seed", "--quality", "--resume", "--guidance.guidance-scale"):
        assert flag in result.stdout


@pytest.mark.parametrize("words", ALL_COMMANDS)
def test_every_command_has_help(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*words.split(), "--help"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"usage: uni3d {words}") and err == ""


def test_version_and_module_and_group_help(capsys: pytest.CaptureFixture[str]) -> None:
    result = run("--version")
    assert (result.returncode, result.stdout) == (0, f"uni3d {uni3d.__version__}\n")
    assert cli.main(["teacher", "--help"]) == 0
    out = capsys.readouterr().out
    assert "teacher train" in out and "doctor" not in out
    assert cli.main([]) == 2


def fails(capsys: pytest.CaptureFixture[str], code: int, *words: str) -> str:
    """Run, expect the code, an empty stdout and exactly one line on stderr; return the line."""
    assert cli.main(list(words)) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("uni3d: error: ") and err.count("\n") == 1, err
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["genrate", "x"], "unknown command 'genrate'; did you mean 'generate'?"),
        (["teacher"], "'teacher' needs a second word"),
        (["teacher", "trian"], "unknown command 'teacher trian'; did you mean 'train'?"),
        (["generate"], "the prompt is empty; say what to make"),
        (["generate", "   "], "the prompt is empty"),
        (["generate", "x" * 1025], "the prompt has 1025 characters; shorten it to at most 1024"),
        (["generate", "a\x07b"], "holds the control character U+0007 at position 2; remove it"),
        (["generate", "red\u202echair"], "holds the invisible character U+202E at position 4; remove it"),
        (["generate", "\u200d\ufe0f"], "the prompt is empty"),
        (["generate", "caf\udce9"], "the prompt is not UTF-8 text (U+DCE9 at position 4)"),
        (["generate", "a\nb"], "holds the control character U+000A"),
        (
            ["generate", "a", "--negative-prompt", "\x1b[31m"],
            "the negative prompt holds the control character",
        ),
        (["generate", "a", "--method", "vds"], "unknown method 'vds'; did you mean 'vsd'?"),
        (["generate", "a", "--divergence", "kl"], "unknown divergence 'kl'"),
        (["generate", "a", "--method", "VDS"], "did you mean 'vsd'?"),
        (["generate", "a", "--divergence", "0.4*js+"], "divergence '0.4*js+': a name is missing"),
        (["generate", "a", "--divergence", "1e+2*jss"], "unknown divergence 'jss'; did you mean 'js'?"),
        (["generate", "a", "--divergence", "1e300*js"], "'1e300' is not a positive weight up to 1e+09"),
        (["generate", "a", "--seed", "9" * 5000], "--seed: the number is far too long"),
        (["generate", "a", "--guidance.guidance-scale", "nan"], "guidance_scale is nan; expected a number"),
        (["generate", "a", "--guidance.guidance-scale", "0", "9", "1"], "got 0 9 1; expected one number, or"),
        (
            ["generate", "a", "--guidance.guidance-scale=x"],
            "got x; expected one number, or pairs of fraction",
        ),
        (
            ["generate", "a", "--config", "c.glb", "--output", "./c.glb", "--overwrite"],
            "is the file of --conf",
        ),
        (["generate", "a", "--config", "."], "error: configuration '.' is not a file; pass a YAML file"),
        (["teacher", "render", "x", "--output", "o", "--seed", "-1"], "--seed is -1; expected"),
        (["teacher", "render", "x", "--output", "o", "--metadata", "no"], "--metadata 'no' is not a file"),
        (
            ["teacher", "sample", "a", "--output", "x.png", "--guidance-scale", "nan"],
            "--guidance-scale is nan",
        ),
        (["teacher", "train", ".", "--output", "o", "--max-minutes", "nan"], "--max-minutes is nan"),
        (["teacher", "train", ".", "--output", "o"], "'.' holds no view shards"),
        (["teacher", "vocabulary", "--teacher", "."], "'.' holds no vocabulary.json"),
        (["generate", "a", "--quality", "best"], "unknown quality 'best'; expected one of default, draft"),
        (["generate", "a", "--seed", "-1"], "seed is -1; expected a number from 0"),
        (["generate", "a", "--seed", "x"], "--seed: 'x' is not a whole number; see uni3d generate --help"),
        (["generate", "a", "--guidance.gudance-scale", "3"], "did you mean --guidance.guidance-scale?"),
        (["generate", "a", "--config", "none.yaml"], "configuration file 'none.yaml' does not exist"),
        (
            ["generate", "a", "--output", "none/a.glb"],
            "the folder 'none' of output 'none/a.glb' does not exist",
        ),
        (["generate", "a", "--output", "a.fbx"], "output 'a.fbx' has the suffix '.fbx'; use one of .glb"),
        (
            ["generate", "a", "--output", "old.glb"],
            "output 'old.glb' exists; choose another name or pass --ov",
        ),
        (["generate", "a", "--output", "."], "output '.' is a folder"),
        (["generate", "a", "--output", "b" * 300 + ".glb"], "is no usable path (File name too long)"),
        (["generate", "a", "--runs-folder", "old.glb"], "'old.glb' is a file where a folder is needed"),
        (["generate", "--resume", "none"], "'none' is not the directory of a run (it has no config.yaml)"),
        (["generate", "--resume", "none", "--config", "x"], "--resume takes the settings of its run"),
        (["inspect", "none.glb"], "'none.glb' does not exist or is not a file"),
        (["inspect"], "missing: PATH; see uni3d inspect --help"),
        (["methods", "--jsn"], "unrecognized options: --jsn; did you mean --json?"),
        (["teacher", "render", "--output", "x"], "no assets were given"),
        (
            ["teacher", "train", "none", "--output", "x"],
            "'none' is not a folder; pass one that `uni3d teacher",
        ),
        (["teacher", "train", "."], "missing: --output PATH"),
        (["teacher", "sample", "a", "--output", "x.jpg"], "has the suffix '.jpg'; use one of .png"),
    ],
)
def test_bad_input_is_one_sentence_and_code_2(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.glb").write_text("old")
    (tmp_path / "c.glb").write_text("steps: 3\n")
    before = "torch" in sys.modules
    assert message in fails(capsys, 2, *words)
    assert (
        sorted(os.listdir(tmp_path)) == ["c.glb", "old.glb"] and (tmp_path / "old.glb").read_text() == "old"
    )
    assert before or "torch" not in sys.modules


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that nobody can write to")
def test_a_read_only_folder_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "cannot be written to" in fails(capsys, 2, "generate", "a", "--output", "/proc/a.glb")
    assert "cannot be written to" in fails(capsys, 2, "generate", "a", "--runs-folder", "/proc/outputs")


def test_missing_weights_have_code_3(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    line = fails(capsys, 3, "teacher", "vocabulary", "--teacher", str(tmp_path / "none"))
    assert "is not a folder; pass one that `uni3d teacher train` wrote" in line


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> list[TextTo3DConfig]:
    """Stands in for the text-to-3D program: records the settings that it is called with."""
    calls: list[TextTo3DConfig] = []

    def generate(config: TextTo3DConfig) -> Any:
        calls.append(config)
        print("a library that chats on stdout")
        return SimpleNamespace(output=Path("mesh.glb"), as_dict=lambda: {"output": "mesh.glb", "seed": 1})

    monkeypatch.setitem(sys.modules, "uni3d.text_to_3d.pipeline", SimpleNamespace(generate=generate))
    return calls


def test_only_results_reach_stdout(
    program: list[TextTo3DConfig],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["generate", "a chair"]) == 0
    out, err = capsys.readouterr()
    assert out == "mesh.glb\n" and "chats" in err
    assert cli.main(["generate", "a chair", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"output": "mesh.glb", "seed": 1}
    assert program[0] == TextTo3DConfig(prompt="a chair")


def test_flags_win_over_file_and_file_over_quality(program: list[TextTo3DConfig], tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("steps: 7\nseed: 5\nmesh:\n  texture_size: 256\n")
    words = ["generate", "a", "--config", str(file), "--quality=draft", "--seed", "6"]
    assert (
        cli.main([*words, "--guidance.guidance-scale", "0", "9", "1", "3", "--runs-folder", str(tmp_path)])
        == 0
    )
    config = program[0]
    draft = quality_preset("draft")
    assert (config.steps, config.seed, config.mesh.texture_size) == (7, 6, 256)
    assert config.mesh.max_triangles == draft.mesh.max_triangles and config.quality == "draft"
    assert config.guidance.guidance_scale == ((0.0, 9.0), (1.0, 3.0))


def test_a_schedule_may_be_one_number(program: list[TextTo3DConfig], tmp_path: Path) -> None:
    words = ["generate", "a", "--runs-folder", str(tmp_path), "--guidance.guidance-scale", "7"]
    assert cli.main([*words, "--regularisers.opacity=.1"]) == 0
    assert program[0].guidance.guidance_scale == ((0.0, 7.0),)
    assert program[0].regularisers.opacity == ((0.0, 0.1),)


def test_help_shows_the_effective_defaults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("seed: 4321\n")
    assert cli.main(["generate", "--config", str(file), "--help"]) == 0
    assert "(default: 4321)" in " ".join(capsys.readouterr().out.split())


def test_resume_takes_the_settings_of_its_run(
    program: list[TextTo3DConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = TextTo3DConfig(prompt="a lamp", steps=9, seed=3, output=tmp_path / "a.glb")
    (tmp_path / "config.yaml").write_text(config_to_yaml(saved))
    assert cli.main(["generate", "--resume", str(tmp_path), "--quiet"]) == 0
    config = program[0]
    assert (config.prompt, config.steps, config.seed, config.quiet) == ("a lamp", 9, 3, True)
    assert config.resume == tmp_path
    capsys.readouterr()
    line = fails(capsys, 2, "generate", "--resume", str(tmp_path), "--steps", "10", "--seed", "4")
    assert "seed, steps would change; leave that out" in line


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UsageError("no such thing; do that"), 2, "uni3d: error: no such thing; do that\n"),
        (MissingWeightsError("no weights"), 3, "uni3d: error: no weights\n"),
        (Interrupted("saved; resume", signal_number=15), 143, "uni3d: saved; resume\n"),
        (KeyboardInterrupt(), 130, "uni3d: interrupted\n"),
        (OSError(28, "No space left on device", "x/mesh.glb"), 1, "'x/mesh.glb': No space left on device\n"),
        (MemoryError(), 1, "uni3d: error: out of memory; lower"),
        (RuntimeError("two\nlines"), 1, "RuntimeError: two lines; this is a fault of uni3d: pass --debug"),
    ],
)
def test_errors_become_codes(
    error: BaseException,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(arguments: list[str]) -> int:
        raise error

    monkeypatch.setattr(information, "methods", fail)
    assert cli.main(["methods"]) == code
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1
    assert cli.main(["methods", "--debug"]) == code
    assert "Traceback" in capsys.readouterr().err


def test_debug_is_a_word_after_two_dashes(program: list[TextTo3DConfig], tmp_path: Path) -> None:
    assert cli.main(["generate", "--runs-folder", str(tmp_path), "--", "--debug"]) == 0
    assert program[0].prompt == "--debug"


def test_a_reader_that_leaves_is_no_error() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "uni3d", "methods"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()  # before it had time to start
    assert "Traceback" not in process.stderr.read() and process.wait() in (0, 1)
    process.stderr.close()


def test_methods_and_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["methods"]) == 0
    out = capsys.readouterr().out
    assert out.split()[:4] == ["method", "divergence", "terms", "cost"]
    assert any(line.startswith("uni-instruct ") for line in out.splitlines())
    assert cli.main(["methods", "--json"]) == 0
    assert {"vsd", "sds"} <= {row["method"] for row in json.loads(capsys.readouterr().out)}
    code = cli.main(["doctor", "--json"])
    findings = json.loads(capsys.readouterr().out)
    assert code == (0 if findings["ready"] else 3)
    assert findings["packages"]["torch"][0].isdigit() and "cpu" in findings["devices"]


@pytest.mark.parametrize("package", ["torch", "tyro", "yaml"])
def test_a_missing_package_is_one_sentence_and_code_3(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lacks(module: str) -> Any:
        raise ModuleNotFoundError(f"No module named '{package}.nn'", name=f"{package}.nn")

    monkeypatch.setattr(cli.importlib, "import_module", lacks)
    assert f"the package '{package}' is not installed; install" in fails(capsys, 3, "methods")


def test_the_text_of_a_box_becomes_a_sentence() -> None:
    box = "╭─ Parsing error ─╮\n│ Error parsing │\n│ --x: bad │\n│ ────── │\n│ For full help │\n╰──╯\n"
    assert fold_box(box) == "--x: bad"
    assert fold_box("nothing boxed") == "nothing boxed"
    assert option_value(["--config", "a", "--config=b", "--", "--config", "c"], "config") == "b"
    assert option_value(["--config"], "config") is None


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters(codec=None), max_size=60))
def test_any_prompt_is_accepted_or_refused_in_one_sentence(prompt: str) -> None:
    try:
        clean = check_prompt(prompt)
    except UsageError as error:
        assert "\n" not in str(error) and error.exit_code == 2
        str(error).encode("utf-8")
        return
    assert clean == check_prompt(clean) and 0 < len(clean) <= MAX_PROMPT_LENGTH
    slug = prompt_slug(clean)
    assert slug and len(slug) <= 48 and slug.isascii() and not set(slug) & set("/\\. \0")


def test_slugs_tell_prompts_apart() -> None:
    assert prompt_slug("A red, wooden chair!") == "a-red-wooden-chair"
    long = "a very " * 20
    assert prompt_slug(long + "red chair") != prompt_slug(long + "blue chair")
    assert prompt_slug("椅子") != prompt_slug("花瓶")
    assert prompt_slug("../../etc/passwd") == "etc-passwd"


def test_output_checks_change_nothing(tmp_path: Path) -> None:
    target = tmp_path / "a.GLB"
    assert check_output_file(target, overwrite=False) == target
    target.write_text("old")
    assert check_output_file(target, overwrite=True) == target
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["a.GLB"]
    assert check_output_folder(tmp_path / "new" / "deep") == tmp_path / "new" / "deep"
    assert not (tmp_path / "new").exists()
    with pytest.raises(UsageError, match="no usable path"):
        check_output_file("a\0.glb", overwrite=False)


@pytest.mark.parametrize("companion", ["my_chair.mtl", "my_chair.png"])
def test_what_an_obj_brings_along_is_not_replaced_either(companion: str, tmp_path: Path) -> None:
    target = tmp_path / "my chair.obj"
    assert check_output_file(target, overwrite=False) == target
    (tmp_path / companion).write_text("of another model")
    with pytest.raises(UsageError, match=f"would replace '.*{companion}'; .* --overwrite"):
        check_output_file(target, overwrite=False)
    assert check_output_file(target, overwrite=True) == target
    assert check_output_file(target.with_suffix(".glb"), overwrite=False)
    (tmp_path / companion).unlink()
    (tmp_path / companion).mkdir()
    with pytest.raises(UsageError, match="is a folder; choose another name"):
        check_output_file(target, overwrite=True)
