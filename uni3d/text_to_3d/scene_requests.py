"""What many scenes are asked for: prompts with seeds, and the folder in which each gets a run directory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uni3d.errors import UsageError
from uni3d.outputs import check_output_folder
from uni3d.prompts import check_prompt, prompt_slug

PLAN_FILE = "scenes.json"
SUMMARY_FILE = "summary.json"
SHEET_FILE = "contact_sheet.png"
MAX_SCENES = 10_000
_OWN_FILES = (PLAN_FILE, SUMMARY_FILE, SHEET_FILE)


@dataclass(frozen=True)
class SceneRequest:
    """What one scene is to become."""

    prompt: str
    seed: int


@dataclass(frozen=True)
class ScenePlan:
    """Scenes by the name of their run directory in `folder`, in the order in which they are made."""

    folder: Path
    scenes: dict[str, SceneRequest]
    at_once: int

    @classmethod
    def of(cls, requests: Sequence[SceneRequest], folder: Path, at_once: int) -> ScenePlan:
        """Name the scenes by prompt and seed. UsageError for none, too many, or the same one twice."""
        if not requests:
            raise UsageError("there is no prompt; write one a line")
        if len(requests) > MAX_SCENES:
            raise UsageError(f"{len(requests)} scenes are asked for; expected at most {MAX_SCENES}")
        scenes: dict[str, SceneRequest] = {}
        for request in requests:
            if request in scenes.values():
                raise UsageError(
                    f"'{request.prompt}' with seed {request.seed} is asked for twice; leave one out"
                )
            stem = f"{prompt_slug(request.prompt)}-{request.seed}"
            name, number = stem, 1
            while name in scenes:  # prompts that differ in punctuation
                number += 1
                name = f"{stem}-{number}"
            scenes[name] = request
        return cls(folder, scenes, at_once)

    @classmethod
    def load(cls, folder: Path) -> ScenePlan:
        """The plan of a folder to go on with; UsageError if it holds none."""
        file = folder / PLAN_FILE
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            scenes = {
                str(scene["directory"]): SceneRequest(check_prompt(scene["prompt"]), int(scene["seed"]))
                for scene in content["scenes"]
            }
            at_once = int(content["at_once"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UsageError(
                f"'{file}' does not say which scenes were to be made ({' '.join(str(error).split())[:100]}); "
                f"start anew"
            ) from error
        if any(Path(name).name != name for name in scenes):
            raise UsageError(f"'{file}' names a run outside of its folder; start anew")
        return cls(folder, scenes, at_once)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form, which `load` reads."""
        scenes = [
            {"directory": name, "prompt": request.prompt, "seed": request.seed}
            for name, request in self.scenes.items()
        ]
        return {"scenes": scenes, "at_once": self.at_once}

    def check_folder(self, *, overwrite: bool) -> None:
        """Raise UsageError if the folder cannot be written to, or holds results that are not to go."""
        check_output_folder(self.folder)
        if is_planned(self.folder) and not overwrite:
            raise UsageError(
                f"'{self.folder}' holds scenes already; go on with --resume {self.folder}, choose another "
                f"folder, or pass --overwrite"
            )
        taken = [name for name in self.scenes if (self.folder / name).exists()]
        if taken and not overwrite:
            raise UsageError(f"'{self.folder / taken[0]}' exists; choose another folder, or pass --overwrite")
        for name in taken:
            if not (self.folder / name / "config.yaml").is_file():
                raise UsageError(
                    f"'{self.folder / name}' is no run directory and stays; choose another folder"
                )

    def clear_folder(self) -> None:
        """Remove what an earlier run left: its scenes, and the directories that this plan needs."""
        earlier = ScenePlan.load(self.folder).scenes if is_planned(self.folder) else {}
        for name in {*earlier, *self.scenes}:
            directory = self.folder / name
            if (directory / "config.yaml").is_file():
                shutil.rmtree(directory)
        for name in _OWN_FILES:
            (self.folder / name).unlink(missing_ok=True)


def is_planned(folder: Path) -> bool:
    """Whether many scenes were begun in this folder."""
    return (folder / PLAN_FILE).is_file()
