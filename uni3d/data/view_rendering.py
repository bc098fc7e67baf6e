"""`uni3d teacher render`: a library of 3D models into view shards.

Per asset: read it, find its dominant colours from unlit probe views, then render views under one world-fixed
light and mark where the main colour is, so that training can recolour it. What the evaluator trains on also
shows variations of its shape. Assets run in parallel processes with a time limit each; what fails is listed
with its reason; a second run does only what is missing.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from uni3d.data.asset_library import ROLES, Asset, Skipped, library_summary, load_asset, scan_assets
from uni3d.data.colours import DominantColours, dominant_colours
from uni3d.data.naming import noun_table
from uni3d.data.shape_variation import sample_shape_change
from uni3d.data.view_shards import EncodedView, ViewRecord, ViewShardWriter, encode_image, encode_mask
from uni3d.errors import Uni3DError, UsageError
from uni3d.mesh.raycaster import Light, Raycaster, RenderedView
from uni3d.mesh.renderable import RenderableMesh
from uni3d.scene.camera import Cameras
from uni3d.training.checkpoint import atomic_write

logger = logging.getLogger(__name__)

PROBE_SIZE = 64
MIN_COVERAGE = 0.003
# Those the evaluator trains on; what measures it keeps its shape, and so does what the teacher learns.
VARIED_ROLES = frozenset({"evaluator", "both"})

# Word of a caption <- what material, texture and asset names say.
_MATERIAL_WORDS: list[tuple[str, str]] = [
    ("wooden", r"wood(?!land)|oak|timber|plank|teak|pine(?!tree|apple)|bamboo_|birch_wood|walnut|parquet"),
    ("golden", r"\bgold"),
    ("metal", r"metal|steel|iron|chrome|alumin|copper|brass|inox|silver"),
    ("stone", r"stone|rock|brick|marble|granite|concrete|cement"),
    ("leather", r"leather|cuir"),
    ("glass", r"\bglass|verre"),
    ("ceramic", r"ceramic|porcelain"),
    ("fabric", r"fabric|cloth\b|textile|tissu"),
    ("plastic", r"plastic"),
    ("wicker", r"rattan|wicker"),
]


@dataclass(frozen=True)
class ViewSettings:
    """How views are drawn. Light varies per asset and shape, so that views of one asset agree.

    `key_range` and the key's azimuth and elevation ranges bound the random key light; elevations, radii as in
    the documentation of the data; `quality` is WebP's. Beside `num_views` of its own shape an asset with one
    of VARIED_ROLES gets `views_per_shape` of each of `num_shapes` variations of it, drawn with the deviations
    of `sample_shape_change`.
    """

    num_views: int = 24
    size: int = 128
    supersample: int = 2
    quality: int = 90
    elevation_range_deg: tuple[float, float] = (-15.0, 50.0)
    overhead_range_deg: tuple[float, float] = (60.0, 90.0)
    overhead_share: float = 0.2
    radius_range: tuple[float, float] = (2.0, 2.9)
    fov_y_deg: float = 40.0
    sky_range: tuple[float, float] = (0.70, 0.78)
    ground_range: tuple[float, float] = (0.48, 0.56)
    key_range: tuple[float, float] = (0.24, 0.36)
    key_azimuth_range_deg: tuple[float, float] = (-50.0, 50.0)
    key_elevation_range_deg: tuple[float, float] = (35.0, 65.0)
    max_texture: int = 512
    max_faces: int = 400_000
    time_limit_s: float = 60.0
    num_shapes: int = 0
    views_per_shape: int = 3
    scale_deviation: float = 0.2
    taper_deviation: float = 0.2
    lean_deviation: float = 0.06


TEACHER_VIEWS = ViewSettings()
EVALUATOR_VIEWS = ViewSettings(
    num_views=12,
    elevation_range_deg=(-12.0, 55.0),
    overhead_range_deg=(60.0, 85.0),
    radius_range=(1.9, 2.7),
    sky_range=(0.60, 0.74),
    ground_range=(0.38, 0.50),
    key_range=(0.32, 0.50),
    key_azimuth_range_deg=(-110.0, 110.0),
    key_elevation_range_deg=(20.0, 75.0),
    num_shapes=4,
)


@dataclass(frozen=True)
class RenderReport:
    """What a run did: ids rendered now, already there, failed (with reasons) and left out by tables."""

    rendered: list[str]
    already_done: list[str]
    failed: list[Skipped]
    skipped: list[Skipped]
    num_views: int
    seconds: float


def render_library(
    assets: Sequence[str | Path],
    output: str | Path,
    *,
    metadata: str | Path | None = None,
    roles: Sequence[str] | None = None,
    settings: ViewSettings = TEACHER_VIEWS,
    seed: int = 1,
    num_workers: int | None = None,
    assets_per_shard: int = 100,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> RenderReport:
    """Render the library under `assets` into view shards in the folder `output`.

    `assets`: folders, .glb/.obj/.ply files, .zip and .sh3f archives, "procedural:vases[:N]". `metadata`: a
    CSV or JSON table. `roles`: render only assets with these roles (default all). `limit`: only the first
    assets, in the order of a hash, for a quick look. `progress(done, total)` is called after each asset.
    Besides the shards, `library.json` (names, roles, licences, creators) and `failures.json` are written. A
    run into a folder with shards renders only what is missing, and needs the same settings and seed.
    Raises UsageError.
    """
    started = time.monotonic()
    if roles is not None and not set(roles) <= set(ROLES):
        raise UsageError(f"roles {sorted(roles)}: expected some of {', '.join(ROLES)}")
    found, skipped = scan_assets(assets, metadata=metadata)
    chosen = [asset for asset in found if roles is None or asset.role in roles]
    chosen.sort(key=lambda asset: zlib.crc32(asset.asset_id.encode()))
    chosen = chosen[:limit]
    folder = Path(output)
    _check_settings(folder, settings, seed)
    writer = ViewShardWriter(folder, assets_per_shard=assets_per_shard)
    _write_json(folder / "library.json", library_summary(found))
    finished = writer.finished_assets()
    missing = [asset for asset in chosen if asset.asset_id not in finished]
    rendered: list[str] = []
    failed: list[Skipped] = []
    num_views = 0
    for number, (asset, outcome) in enumerate(_run_all(missing, settings, seed, num_workers), start=1):
        if isinstance(outcome, str):
            failed.append(Skipped(asset.asset_id, outcome))
            logger.warning("%s: %s", asset.asset_id, outcome)
        else:
            writer.add_asset(outcome)
            rendered.append(asset.asset_id)
            num_views += len(outcome)
        if progress is not None:
            progress(number, len(missing))
    writer.flush()
    _write_json(
        folder / "failures.json",
        {"failed": [asdict(item) for item in failed], "skipped": [asdict(item) for item in skipped]},
    )
    done_before = sorted(finished & {asset.asset_id for asset in chosen})
    return RenderReport(rendered, done_before, failed, skipped, num_views, time.monotonic() - started)


def _write_json(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=1, ensure_ascii=False)
    atomic_write(path, lambda target: target.write_text(text, encoding="utf-8"))


def _check_settings(folder: Path, settings: ViewSettings, seed: int) -> None:
    """Refuse to mix two kinds of views in one folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "render_settings.json"
    wanted = json.loads(json.dumps({"seed": seed, **asdict(settings)}))
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        # Files of before a setting existed leave it out: their views were made as by its default.
        before = json.loads(json.dumps(asdict(ViewSettings()))) | before
        different = sorted(k for k in wanted if before.get(k) != wanted[k])
        if different:
            raise UsageError(
                f"'{folder}' holds views made with other settings ({', '.join(different)}); "
                "choose another output folder or the same settings"
            )
    else:
        _write_json(path, wanted)


# ---------------------------------------------------------------- processes


def _run_all(
    assets: Sequence[Asset], settings: ViewSettings, seed: int, num_workers: int | None
) -> Iterator[tuple[Asset, list[EncodedView] | str]]:
    """Outcome of every asset, as it comes: its views, or the reason it failed."""
    num_workers = num_workers if num_workers is not None else os.cpu_count() or 1
    if num_workers <= 0 or len(assets) <= 1:
        for asset in assets:
            yield asset, render_asset_or_reason(asset, settings, seed)
        return
    remaining = list(assets)
    while remaining:
        done: set[str] = set()
        try:
            for asset, outcome in _run_pool(remaining, settings, seed, num_workers):
                done.add(asset.asset_id)
                yield asset, outcome
            return
        except BrokenProcessPool:
            # One asset took its process down. Those in flight are tried alone to find which.
            remaining = [asset for asset in remaining if asset.asset_id not in done]
            suspects, remaining = remaining[: 2 * num_workers], remaining[2 * num_workers :]
            for asset in suspects:
                try:
                    yield from _run_pool([asset], settings, seed, 1)
                except BrokenProcessPool:
                    yield (
                        asset,
                        "the process reading it was killed (out of memory, or a crash in a native library)",
                    )


def _run_pool(
    assets: Sequence[Asset], settings: ViewSettings, seed: int, num_workers: int
) -> Iterator[tuple[Asset, list[EncodedView] | str]]:
    """As `_run_all`, in a pool that never has more than twice `num_workers` assets under way."""
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, mp_context=context, initializer=_start_worker) as pool:
        queue = iter(assets)
        running: dict[Future[list[EncodedView] | str], Asset] = {}
        while True:
            while len(running) < 2 * num_workers and (asset := next(queue, None)) is not None:
                running[pool.submit(render_asset_or_reason, asset, settings, seed)] = asset
            if not running:
                return
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                asset = running.pop(future)
                yield asset, future.result()


def _start_worker() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    logging.disable(logging.WARNING)


class _TooSlow(BaseException):
    """Not an Exception: readers of third parties that catch everything must not swallow it."""


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise _TooSlow after `seconds`, where the platform has alarms and this is the main thread."""
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: object) -> None:
        raise _TooSlow

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def render_asset_or_reason(asset: Asset, settings: ViewSettings, seed: int) -> list[EncodedView] | str:
    """`render_asset`, with any failure turned into one line: one bad file must not stop a library."""
    try:
        with _time_limit(settings.time_limit_s):
            return render_asset(asset, settings, seed)
    except _TooSlow:
        return f"took longer than {settings.time_limit_s:g} s"
    except Uni3DError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001 - third-party readers raise anything on damaged files
        return f"{type(error).__name__}: {error}"


# ---------------------------------------------------------------- one asset


def render_asset(asset: Asset, settings: ViewSettings, seed: int) -> list[EncodedView]:
    """Render all views of one asset. Deterministic in (asset id, settings, seed)."""
    mesh = load_asset(asset, max_texture=settings.max_texture, max_faces=settings.max_faces)
    caster = Raycaster(mesh)
    colours, material = _probe(caster, mesh)
    rng = np.random.default_rng([seed, zlib.crc32(asset.asset_id.encode())])
    words = colours.words()
    base = {
        **{k: getattr(asset, k) for k in ("asset_id", "name", "noun", "category", "tags", "role")},
        **{k: getattr(asset, k) for k in ("source", "creator", "licence")},
        "colours": words,
        "materials": material_words(asset, material, words[0]),
        "main_colour": tuple(round(float(c), 4) for c in colours.centres[0]),
    }
    views = []
    for shape, light, cameras in _sample_shapes(caster, asset, settings, rng):
        for azimuth, elevation, radius in cameras:
            camera = Cameras.from_lists([azimuth], [elevation], radius=radius, fov_y_deg=settings.fov_y_deg)
            view = shape.render(camera, settings.size, supersample=settings.supersample, light=light)
            rgba, mask = _picture_and_mask(view, colours)
            record = ViewRecord(
                **base,
                azimuth_deg=azimuth,
                elevation_deg=elevation,
                radius=radius,
                fov_y_deg=settings.fov_y_deg,
            )
            views.append(EncodedView(encode_image(rgba, quality=settings.quality), encode_mask(mask), record))
    return views


def _sample_shapes(
    caster: Raycaster, asset: Asset, settings: ViewSettings, rng: np.random.Generator
) -> Iterator[tuple[Raycaster, Light, list[tuple[float, float, float]]]]:
    """The asset itself and then its variations, each with a light and cameras of its own.

    The first one is the same whether variations follow or not.
    """
    yield caster, _sample_light(settings, rng), _sample_cameras(settings, settings.num_views, rng)
    if asset.role not in VARIED_ROLES or not settings.num_shapes:
        return
    # Sampled together, since each alone has too few views to be spread over the circle and overhead.
    cameras = _sample_cameras(settings, settings.num_shapes * settings.views_per_shape, rng)
    order = rng.permutation(len(cameras)).reshape(settings.num_shapes, -1)
    for row in order:
        change = sample_shape_change(
            rng,
            scale_deviation=settings.scale_deviation,
            taper_deviation=settings.taper_deviation,
            lean_deviation=settings.lean_deviation,
        )
        light = _sample_light(settings, rng)
        yield Raycaster(change.apply(caster.mesh)), light, [cameras[index] for index in row]


def _sample_light(settings: ViewSettings, rng: np.random.Generator) -> Light:
    ground = rng.uniform(*settings.ground_range)
    return Light(
        sky=rng.uniform(*settings.sky_range),
        ground=ground,
        key=rng.uniform(*settings.key_range),
        key_azimuth_deg=rng.uniform(*settings.key_azimuth_range_deg),
        key_elevation_deg=rng.uniform(*settings.key_elevation_range_deg),
    )


def _sample_cameras(
    settings: ViewSettings, num_views: int, rng: np.random.Generator
) -> list[tuple[float, float, float]]:
    """(azimuth, elevation, radius) of each view: level and overhead views each stratified over the circle."""
    num_overhead = round(num_views * settings.overhead_share)
    cameras: list[tuple[float, float, float]] = []
    for num, elevations in (
        (num_views - num_overhead, settings.elevation_range_deg),
        (num_overhead, settings.overhead_range_deg),
    ):
        offset = rng.random()
        # Elevations are stratified as well, in an order of their own.
        strata = rng.permutation(num) if num else np.zeros(0)
        for index in range(num):
            azimuth = (index + offset + rng.uniform(-0.5, 0.5)) / num * 360.0
            height = (strata[index] + rng.random()) / num
            elevation = elevations[0] + (elevations[1] - elevations[0]) * height
            radius = rng.uniform(*settings.radius_range)
            cameras.append((float((azimuth + 180) % 360 - 180), float(elevation), float(radius)))
    return cameras


def _probe(caster: Raycaster, mesh: RenderableMesh) -> tuple[DominantColours, str]:
    """Dominant base colours over six unlit views, and the name of the material most of the main colour is."""
    cameras = Cameras.from_lists([30.0, 90.0, 150.0, 210.0, 270.0, 330.0], [20.0, 0.0, 45.0, 20.0, 0.0, 45.0])
    views = [
        caster.render(cameras[torch.tensor([i])], PROBE_SIZE, supersample=1, light=None)
        for i in range(len(cameras))
    ]
    albedo = np.concatenate([view.hit_albedo for view in views])
    material = np.concatenate([view.hit_material for view in views])
    if len(albedo) < MIN_COVERAGE * PROBE_SIZE**2 * len(views):
        raise UsageError("nearly nothing of it is visible")
    colours = dominant_colours(albedo)
    counts = np.bincount(material[colours.is_main(albedo)], minlength=len(mesh.materials))
    return colours, mesh.materials[int(counts.argmax())].name


def material_words(asset: Asset, material_name: str, main_colour: str) -> tuple[str, ...]:
    """At most one adjective ("wooden"), when the names say so or brown furniture makes it likely."""
    if asset.noun in noun_table().no_material:
        return ()
    spoken = re.sub(r"(?<=[a-z])(?=[A-Z])|[_\-.]", " ", f"{asset.name} | {material_name}").lower()
    for word, pattern in _MATERIAL_WORDS:
        if re.search(pattern, spoken):
            return (word,)
    is_wood_coloured = main_colour in ("brown", "beige")
    return ("wooden",) if is_wood_coloured and asset.noun in noun_table().wooden_when_brown else ()


def _picture_and_mask(view: RenderedView, colours: DominantColours) -> tuple[np.ndarray, np.ndarray]:
    """RGBA uint8 [H, W, 4] with colours carried on outside the silhouette, and the main colour's mask [H, W].

    Lossy chroma would bleed black into the edge otherwise, and constant surroundings compress best.
    """
    from scipy.ndimage import distance_transform_edt

    main_share = view.coverage_of(colours.is_main(view.hit_albedo)) if len(view.hit_pixel) else view.alpha
    inside = view.alpha > 0
    mask = main_share > 0.5 * view.alpha
    rgb = view.rgb
    if inside.any() and not inside.all():
        nearest = distance_transform_edt(~inside, return_distances=False, return_indices=True)
        rows, columns = np.asarray(nearest)
        rgb, mask = rgb[rows, columns], mask[rows, columns]
    rgba = np.concatenate([rgb, view.alpha[..., None]], axis=-1)
    return (np.clip(rgba, 0, 1) * 255 + 0.5).astype(np.uint8), mask
