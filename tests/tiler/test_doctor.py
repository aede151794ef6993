"""The doctor notices what will not work, says the way out, and sees in a slide what the readers see."""

import dataclasses
import importlib.util
import json
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tifffile

import tiler.doctor.decoding
import tiler.doctor.machine
import tiler.doctor.storage
import tiler.guard
from manifests import Manifest
from tests.tiler import formats
from tiler import TilerConfig, TilerError, open_slide
from tiler.doctor import (
    build_sample,
    examine_machine,
    examine_slide,
    find_shadows,
    measure_decoding,
    measure_storage,
)
from tiler.doctor.machine import find_driver, gpu_problems, limit_cores, limit_memory, list_gpus
from tiler.doctor.storage import find_file_system, find_pieces
from tiler.doctor.words import count, duration, in_words, storage_in_words
from tiler.tiff_tables import read_tables


def _distribution(folder: Path, name: str, package: str) -> None:
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "top_level.txt").write_text(f"{package}\n")


def test_nothing_is_amiss_here() -> None:
    assert find_shadows() == []


def test_another_distribution_with_our_package_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _distribution(tmp_path, "floor-tiler", "tiler")
    _distribution(tmp_path, "harmless", "tilers")
    monkeypatch.syspath_prepend(tmp_path)
    assert find_shadows() == ["package 'tiler' is also installed by floor-tiler; pip uninstall floor-tiler"]
    assert find_shadows()[0] in examine_machine()["problems"]


def test_a_package_that_python_finds_elsewhere_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "services").mkdir()
    (tmp_path / "services" / "__init__.py").touch()
    monkeypatch.delitem(sys.modules, "services", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    (sentence,) = find_shadows()
    assert f"package 'services' is found at {tmp_path}/services/__init__.py, not beside the tiler" in sentence


def test_a_machine_without_cucim_is_told_what_it_loses(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "cucim" else find_spec(name))
    (problem,) = examine_machine()["problems"]
    assert "cucim is not installed: OpenSlide reads all slides" in problem
    assert "pip install 'slidegrad[cu13]'" in problem


def test_both_builds_of_cucim_are_one_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiler.doctor.machine, "_version", lambda _name: "26.10")
    assert any("overwrite each other; uninstall one" in problem for problem in examine_machine()["problems"])


def _groups(folder: Path, own: str, files: dict[str, str]) -> tuple[Path, Path]:
    """A list of a process's control groups, and the tree of them."""
    for name, text in files.items():
        (folder / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "groups" / name).write_text(text + "\n")
    (folder / "own").write_text(own + "\n")
    return folder / "own", folder / "groups"


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        ("0::/job/step", {"job/cpu.max": "250000 100000", "job/step/cpu.max": "max 100000"}, 2.5),
        ("0::/job/step", {"job/cpu.max": "250000 100000", "job/step/cpu.max": "50000 100000"}, 0.5),
        ("0::/", {"cpu.max": "max 100000", "other/cpu.max": "50000 100000"}, None),
        # Version 1, in a container that sees its own group as the root, under a name of the host's.
        ("4:cpu,cpuacct:/docker/ab", {"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ("4:cpu,cpuacct:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("4:cpuset:/", {"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, None),
    ],
)
def test_the_control_groups_cores_are_the_fewest_of_all_groups(
    own: str, files: dict[str, str], cores: float | None, tmp_path: Path
) -> None:
    assert limit_cores(*_groups(tmp_path, own, files)) == cores


def test_the_control_groups_memory_is_found_in_both_versions(tmp_path: Path) -> None:
    files = {"job/memory.max": "4000000000", "job/step/memory.max": "max", "memory/memory.limit_in_bytes": "3000000000"}
    groups = _groups(tmp_path, "0::/job/step", files)
    assert limit_memory(*groups) == 4_000_000_000
    assert limit_memory(*_groups(tmp_path, "8:memory:/docker/ab\n0::/job/step", files)) == 3_000_000_000
    assert limit_memory(tmp_path / "none", groups[1]) is None


def test_limits_that_get_in_the_way_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(16)))
    monkeypatch.setattr(tiler.doctor.machine, "limit_cores", lambda: 3.5)
    monkeypatch.setattr(tiler.doctor.machine, "limit_memory", lambda: 2_000_000_000)
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (256, 4096))
    found = examine_machine()
    assert (found["cores"], found["cores_limit"], found["memory_limit_gb"], found["open_files"]) == (16, 3.5, 2, 256)
    cores, files = found["problems"]
    assert cores.startswith("the control group gives this process 3.5 of 16 cores")
    assert "--workers 3, --threads 3, --machine.reader-threads 3" in cores
    assert files == "at most 256 open files, expected 1,024 or more; ulimit -n 4096"


def test_limits_above_what_there_is_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiler.doctor.machine, "limit_cores", lambda: 1e3)
    monkeypatch.setattr(tiler.doctor.machine, "limit_memory", lambda: 9_223_372_036_854_771_712)
    found = examine_machine()
    assert (found["cores_limit"], found["memory_limit_gb"], found["problems"]) == (None, None, [])
    assert found["memory_gb"] > 0


def test_guards_that_do_not_work_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiler.guard, "missing_guards", lambda: ["memory is not filled"])
    assert examine_machine()["problems"] == ["memory is not filled"]


def test_the_drivers_own_list_names_devices_and_version(tmp_path: Path) -> None:
    assert (list_gpus(tmp_path), find_driver(tmp_path)) == ([], None)
    for bus, model in (("0000:01:00.0", "NVIDIA H100 80GB HBM3"), ("0000:02:00.0", "NVIDIA A40")):
        (tmp_path / "gpus" / bus).mkdir(parents=True)
        (tmp_path / "gpus" / bus / "information").write_text(f"Model: \t\t {model}\nIRQ:   \t\t 55\n")
    assert list_gpus(tmp_path) == ["NVIDIA H100 80GB HBM3", "NVIDIA A40"]
    for text, expected in (
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023", "535.129.03"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build", "580.65.06"),
    ):
        (tmp_path / "version").write_text(f"{text}\nGCC version:  gcc version 11.4.0\n")
        assert find_driver(tmp_path) == expected


@pytest.mark.parametrize(
    ("torch", "cuda", "driver", "num_gpus", "shared_bytes", "sentence"),
    [
        ("2.14.1", "13.0", "580.65.06", 8, 8e9, ""),
        ("2.14.1", "12.8", "535.129.03", 1, 64e6, ""),
        (None, None, "470.1", 8, 0, ""),
        ("2.14.1", None, "580.65.06", 1, 8e9, "torch 2.14.1 is built without CUDA"),
        ("2.14.1", "13.0", "535.129.03", 1, 8e9, "CUDA 13.0 and needs NVIDIA driver 580 or newer, this is 535.129.03"),
        ("2.14.1", "12.8", "470.57.02", 1, 8e9, "needs NVIDIA driver 525 or newer"),
        ("2.14.1", "13.0", "580.65.06", 2, 64e6, "shared memory is 0.064 GB, expected 1 GB or more"),
    ],
)
def test_what_keeps_torch_from_the_gpus_is_told(
    torch: str | None,
    cuda: str | None,
    driver: str,
    num_gpus: int,
    shared_bytes: int,
    sentence: str,
    tmp_path: Path,
) -> None:
    (tmp_path / "nvidia0").touch()
    problems = gpu_problems(torch, cuda, driver, num_gpus, shared_bytes, tmp_path)
    assert len(problems) == bool(sentence)
    assert sentence in "".join(problems)


def test_gpus_that_are_not_given_to_the_container_are_told(tmp_path: Path) -> None:
    (tmp_path / "nvidiactl").touch()
    (problem,) = gpu_problems("2.14.1", "13.0", "580.65.06", 8, 8_000_000_000, tmp_path)
    assert "none is given to this container or job; docker run --gpus all" in problem


def test_torchs_cuda_is_read_from_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _distribution(tmp_path, "torch", "torch")
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text("from typing import Optional\ncuda: Optional[str] = '14.2'\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = examine_machine()
    assert (found["torch"], found["torch_cuda"]) == ("1.0", "14.2")


def test_looking_at_the_machine_imports_no_torch() -> None:
    lines = "import sys; from tiler.doctor import examine_machine; examine_machine(); print('torch' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=True)
    assert told.stdout == "False\n"


def test_who_decodes_is_told() -> None:
    codecs = examine_machine()["codecs"]
    assert {"OpenSlide", "imagecodecs", "libjpeg-turbo", "OpenJPEG", "libdeflate"} <= set(codecs)
    assert all(re.match(r"\d+\.\d", version) for version in codecs.values())


def test_what_is_seen_in_a_slide(small_cohort: Path) -> None:
    found = examine_slide(small_cohort / "slides" / "synth_0000.svs")
    assert (found["backend"], found["vendor"], found["mpp"], found["mpp_source"]) == (
        "cucim",
        "aperio",
        (0.5, 0.5),
        "vendor",
    )
    assert found["why"] == "cuCIM reads this format, and is the fastest"
    assert [level[2] for level in found["levels"]] == [1, 4]
    assert (found["file_tile"], found["compression"]) == ((256, 256), "JPEG")
    assert [name for name, told in found["readers"].items() if told == "opens"] == ["cucim", "openslide", "tifffile"]
    assert set(found["readers"]) == {"cucim", "openslide", "tifffile"}
    assert set(found["parity"]) == {"cucim-openslide", "cucim-tifffile", "openslide-tifffile"}
    for differences in found["parity"].values():
        assert len(differences) == 2
        assert max(differences) < 1.5
    assert found["problems"] == []
    assert json.loads(json.dumps(found))["backend"] == "cucim"


def test_real_slides_look_alike_to_all_readers(real_slides: Path) -> None:
    found = examine_slide(real_slides / "CMU-1-Small-Region.svs")
    assert len(found["parity"]) == 3
    assert max(max(differences) for differences in found["parity"].values()) < 1
    assert (found["file_tile"], found["problems"]) == ((240, 240), [])
    found = examine_slide(real_slides / "TCGA-CR-7395-01A-01-TS1.svs")
    assert found["mpp"] is None
    assert found["mpp_source"] == "none (MPP, XResolution tried)"
    assert found["compression"] == "APERIO JP2000 RGB"
    assert max(max(differences) for differences in found["parity"].values()) < 1
    (problem,) = found["problems"]
    assert problem == (
        "the slide does not say its scale; give --default-mpp or --mpp-csv to `slidegrad tile`, and --default-mpp to "
        "`slidegrad doctor`"
    )
    assert examine_slide(real_slides / "TCGA-CR-7395-01A-01-TS1.svs", default_mpp=0.25)["problems"] == []


def test_a_reader_with_wrong_pixels_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = formats.write_philips(tmp_path / "case.tiff", formats.draw_picture(), more=1)
    monkeypatch.setattr("tiler.slide._same_grid", lambda *_: True)  # The guard that keeps cuCIM off such a slide.
    found = examine_slide(path)
    assert found["backend"] == "cucim"
    assert max(found["parity"]["cucim-openslide"]) == found["parity"]["cucim-openslide"][1] > 3
    assert found["parity"]["openslide-tifffile"] == [pytest.approx(0, abs=0.1), None]  # tifffile sees the white columns
    (problem,) = (sentence for sentence in found["problems"] if sentence.startswith("cucim-openslide"))
    assert re.fullmatch(
        r"cucim-openslide differ by [0-9.]+ grey levels at level 1, expected at most 3: .* `slidegrad tile` --backend",
        problem,
    )


def test_a_scale_in_doubt_is_told(tmp_path: Path) -> None:
    head = "Aperio Image Library v12.0.0 \r\n512x384 [0,0 512x384] (128x128) JPEG/RGB Q=95"
    for text, expected, other in (
        ("0.5", "scale: vendor says 0.5 mpp, another field 0.25", pytest.approx(0.25)),
        ("0", "scale: MPP = 0 is absurd; check the slide, or give `slidegrad tile` --mpp-csv", None),
    ):
        with tifffile.TiffWriter(tmp_path / "case.svs") as tiff:
            formats.write_page(
                tiff,
                formats.draw_picture(),
                description=f"{head}|AppMag = 40|MPP = {text}",
                resolution=(40_000, 40_000),
                resolutionunit="CENTIMETER",
            )
        found = examine_slide(tmp_path / "case.svs")
        (problem,) = found["problems"]
        assert problem.startswith(expected)
        assert found["mpp_other"] == other


def test_a_folder_is_examined_too(tmp_path: Path) -> None:
    found = examine_slide(formats.write_ome_zarr(tmp_path / "case.zarr", formats.draw_picture()))
    assert (found["backend"], found["file_tile"], found["compression"], found["parity"]) == ("zarr", (128, 128), "", {})
    assert found["problems"] == []


def test_a_damaged_slide_is_a_problem_and_no_error(real_slides: Path, tmp_path: Path) -> None:
    source, path = real_slides / "CMU-1-Small-Region.svs", tmp_path / "case.svs"
    table, content = read_tables(source)[0], bytearray(source.read_bytes())
    for offset, size in zip(table.offsets.ravel().tolist(), table.num_bytes.ravel().tolist(), strict=True):
        content[offset + size // 3 : offset + size] = bytes(size - size // 3)
    path.write_bytes(content)
    found = examine_slide(path)
    assert found["parity"]["cucim-openslide"] == [None]
    (problem,) = (sentence for sentence in found["problems"] if sentence.startswith("it cannot be read everywhere"))
    assert "level 0" in problem
    assert str(tmp_path) not in problem


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures shorter; what is tested is what is measured."""
    monkeypatch.setattr(tiler.doctor.decoding, "_LEAST_S", 0.01)
    monkeypatch.setattr(tiler.doctor.storage, "_WARM_S", 0.01)
    monkeypatch.setattr(tiler.doctor.storage, "_ENOUGH_S", 0.01)


@pytest.fixture(scope="module")
def sample(small_cohort: Path) -> tuple[Any, Manifest]:
    path = small_cohort / "slides" / "synth_0000.svs"
    return open_slide(path), build_sample(path, TilerConfig(tile_px=100, mpp=1.0))


def test_storage_is_read_as_tiles_need_it(sample: tuple[Any, Manifest]) -> None:
    slide, manifest = sample
    table, record = read_tables(slide.path)[0], manifest.slide
    needed = set()
    for x, y in zip(manifest.x_l0.tolist(), manifest.y_l0.tolist(), strict=True):
        for row in range(y // 256, (y + record.read_h - 1) // 256 + 1):
            for column in range(x // 256, (x + record.read_w - 1) // 256 + 1):
                if row < table.shape[0] and column < table.shape[1]:
                    needed.add((int(table.offsets[0, row, column]), int(table.num_bytes[0, row, column])))
    pieces = find_pieces(slide, manifest)
    assert pieces is not None
    read = [piece for group in pieces.groups for piece in group]
    assert len(needed) > 4
    assert sorted(read) == sorted(needed)  # Each once.
    assert pieces.bytes_per_tile == sum(size for _, size in needed) / len(manifest)


@pytest.mark.usefixtures("quick")
def test_storage_is_measured_by_one_thread_and_by_all(sample: tuple[Any, Manifest]) -> None:
    storage = measure_storage(*sample, num_threads=3)
    assert storage is not None
    assert storage["kind"] == "compressed tiles"
    assert storage["file_system"] == find_file_system(sample[0].path) != "unknown"
    pieces = find_pieces(*sample)
    assert pieces is not None
    assert storage["num_bytes"] == sum(size for group in pieces.groups for _, size in group)
    assert [rate["threads"] for rate in storage["rates"]] == [1, 3]
    assert all(rate["warm_bytes_per_s"] > 0 for rate in storage["rates"])
    assert len(measure_storage(*sample, num_threads=1)["rates"]) == 1  # type: ignore[index]
    assert json.loads(json.dumps(storage)) == storage


@pytest.mark.usefixtures("quick")
def test_each_cold_pass_has_a_part_of_the_file_to_itself(
    sample: tuple[Any, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    time_cold = tiler.doctor.storage._time_cold
    monkeypatch.setattr(tiler.doctor.storage, "_time_cold", lambda *a: asked.append(a[1]) or time_cold(*a))
    measure_storage(*sample, num_threads=2)
    pieces = find_pieces(*sample)
    assert pieces is not None
    assert len(asked) == 2
    assert min(map(len, asked)) >= 1
    assert [*asked[0], *asked[1]] == pieces.groups


@pytest.mark.usefixtures("quick")
def test_one_read_is_enough_to_measure(sample: tuple[Any, Manifest]) -> None:
    slide, manifest = sample
    record = dataclasses.replace(manifest.slide, num_tiles=1)
    one = Manifest(record, np.zeros(1, np.int32), np.zeros(1, np.int32), np.ones(1, np.float32))
    pieces = find_pieces(slide, one)
    assert pieces is not None
    assert len(pieces.groups) == 1
    storage = measure_storage(slide, one, 2)
    assert storage is not None
    assert all(rate["warm_bytes_per_s"] > 0 for rate in storage["rates"])
    assert all(rate["cold_bytes_per_s"] != 0 for rate in storage["rates"])


@pytest.mark.usefixtures("quick")
def test_a_file_that_stays_in_memory_has_no_cold_rate(
    sample: tuple[Any, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "posix_fadvise", lambda *_: None)  # As where another process holds the file.
    storage = measure_storage(*sample, num_threads=1)
    assert storage is not None
    assert storage["rates"][0]["cold_bytes_per_s"] is None
    assert any("cold cannot be measured" in line for line in storage_in_words(storage))


@pytest.mark.usefixtures("quick")
def test_slow_storage_is_not_read_to_the_end(sample: tuple[Any, Manifest], monkeypatch: pytest.MonkeyPatch) -> None:
    asked, preadv, warm = [], os.preadv, []
    monkeypatch.setattr(tiler.doctor.storage, "_time_warm", lambda _, groups, *__: warm.extend(groups) or 1.0)

    def slow(descriptor: int, buffers: list[Any], offset: int, flags: int = 0) -> int:
        if not flags:
            asked.append(offset)
            time.sleep(0.05)
        return preadv(descriptor, buffers, offset, flags)

    monkeypatch.setattr(os, "preadv", slow)
    monkeypatch.setattr(tiler.doctor.storage, "_COLD_S", 0.02)
    measure_storage(*sample, num_threads=1)
    pieces = find_pieces(*sample)
    assert pieces is not None
    assert len(pieces.groups) > 1
    assert len(set(asked)) == len(pieces.groups[0])
    assert warm == pieces.groups[:1]


@pytest.mark.parametrize(("most", "expected"), [(100, [0, 1, 2, 3, 4]), (30, [1, 2, 3]), (29, [1, 2]), (1, [2])])
def test_a_large_slides_sample_is_its_middle(most: int, expected: list[int]) -> None:
    groups = [[(i, 6), (i, 4)] for i in range(5)]
    assert [group[0][0] for group in tiler.doctor.storage._bound(groups, most)] == expected
    assert tiler.doctor.storage._bound(groups[:1], most) == groups[:1]


def test_a_slide_without_tables_is_read_in_blocks_of_its_largest_file(tmp_path: Path) -> None:
    path = tmp_path / "case.mrxs"
    path.write_bytes(b"JPEG" * 100)
    (tmp_path / "case").mkdir()
    (tmp_path / "case" / "Data0000.dat").write_bytes(bytes(150_000))
    (tmp_path / "case" / "Slidedat.ini").write_bytes(bytes(900_000))
    slide = SimpleNamespace(path=path, levels=[SimpleNamespace(width=1000, height=1000)])
    pieces = find_pieces(slide, SimpleNamespace(slide=SimpleNamespace(level=0)))  # type: ignore[arg-type]
    assert pieces is not None
    assert (pieces.path.name, pieces.kind, pieces.bytes_per_tile) == ("Data0000.dat", "blocks of 64 KiB", None)
    assert pieces.groups == [[(0, 65_536)], [(65_536, 65_536)], [(131_072, 18_928)]]


def test_a_file_lies_on_the_file_system_mounted_deepest_and_last(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "/dev/sda / ext4 rw 0 0\n"
        "server:/a /data nfs4 rw 0 0\n"
        "server:/b /data/our\\040slidés lustre rw 0 0\n"
        "tmpfs /scratch tmpfs rw 0 0\n"
        "/dev/sdb /scratch xfs rw 0 0\n"
    )
    for path, kind in (
        ("/home/a.svs", "ext4"),
        ("/data/a.svs", "nfs4"),
        ("/data2/a.svs", "ext4"),
        ("/data/our slidés/a.svs", "lustre"),
        ("/scratch/a.svs", "xfs"),
    ):
        assert find_file_system(Path(path), mounts) == kind
    assert find_file_system(Path("/a.svs"), tmp_path / "none") == "unknown"


@pytest.mark.usefixtures("quick")
def test_decoding_is_measured_by_one_thread_and_by_all(
    sample: tuple[Any, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def read(slide: Any, manifest: Manifest, rows: Any, out: Any, num_threads: int) -> Any:
        asked.append((rows.tolist(), num_threads))
        return read_tiles(slide, manifest, rows, out, num_threads)

    read_tiles = tiler.doctor.decoding.read_tiles
    monkeypatch.setattr(tiler.doctor.decoding, "read_tiles", read)
    monkeypatch.setattr(tiler.doctor.decoding, "_MOST_TILES", 5)
    decoding = measure_decoding(*sample, num_threads=2)
    first = (len(sample[1]) - 5) // 2
    assert {tuple(rows) for rows, _ in asked} == {tuple(range(first, first + 5))}
    assert {threads for _, threads in asked} == {1, 2}
    assert [rate["threads"] for rate in decoding["rates"]] == [1, 2]
    assert all(rate["tiles_per_s"] > 0 for rate in decoding["rates"])
    assert (decoding["tile_px"], decoding["num_tiles"], decoding["num_tiles_of_slide"]) == (100, 5, len(sample[1]))


def test_a_slide_that_changed_is_not_measured(sample: tuple[Any, Manifest]) -> None:
    slide, manifest = sample
    other = dataclasses.replace(manifest, slide=dataclasses.replace(manifest.slide, fingerprint="other"))
    with pytest.raises(TilerError, match="changed since it was tiled"):
        measure_decoding(slide, other, num_threads=1)


def test_without_tissue_every_tile_is_the_sample(tmp_path: Path) -> None:
    path = tmp_path / "case.svs"
    white = np.full((512, 512, 3), 245, np.uint8)
    with tifffile.TiffWriter(path) as tiff:
        formats.write_page(
            tiff,
            white,
            description="Aperio Image Library v12.0.0 \r\n512x512 [0,0 512x512] (128x128) JPEG/RGB|MPP = 0.5",
        )
    assert len(build_sample(path, TilerConfig(tile_px=128))) == 16
    with pytest.raises(TilerError, match=r"no tile of 600 px at 0\.5 mpp fits in; give a smaller --tile-px"):
        build_sample(path, TilerConfig(tile_px=600))


def test_numbers_are_told_for_people() -> None:
    assert [duration(s) for s in (0.0132, 95, 121, 7_100, 8_000, 1e6)] == [
        "0.013 s",
        "95 s",
        "2 min",
        "120 min",
        "2.2 h",
        "12 days",
    ]
    assert (count(1, "process", "processes"), count(2_000, "thread")) == ("1 process", "2,000 threads")
    assert in_words([(10, 20, 1.0), (5, 10, 2.0)]) == "10 x 20 x 1.0, 5 x 10 x 2.0"
    assert in_words({"a": None, "b": []}) == "a: none; b: none"


def test_what_a_cold_number_leaves_open_is_told() -> None:
    rates = [{"threads": 1, "cold_bytes_per_s": 120e6, "warm_bytes_per_s": 2.5e9}]
    storage = {"file_system": "nfs4", "is_remote": True, "kind": "compressed tiles", "num_bytes": 20e6, "rates": rates}
    rate, server = storage_in_words(storage)
    assert rate == "nfs4, 20.0 MB of compressed tiles: 1 thread cold 120 MB/s, warm 2,500 MB/s"
    assert "its server may have had it in memory" in server
    assert "rough" in storage_in_words(storage | {"num_bytes": 1e6, "is_remote": False})[1]


@pytest.mark.slow  # starts a process
def test_the_command_line_exits_with_1_where_there_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slidegrad: Callable[..., Any]
) -> None:
    _distribution(tmp_path, "floor-tiler", "tiler")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    ended = slidegrad("doctor")
    assert ended.code == 1
    assert "pip uninstall floor-tiler" in ended.result["problems"][0]
    assert "floor-tiler" in ended.stderr
