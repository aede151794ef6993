"""What this machine has for the work, and what is installed on it. Asks the system and the files of packages alone.

torch is not imported: that takes seconds, and without a recipe nobody needs it.
"""

import importlib.util
import math
import os
import platform
import re
import resource
import runpy
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import Any

from tiler.version import VERSION

_OURS = ("manifests", "tiler", "trainer", "services")
_CODECS = {"libjpeg_turbo": "libjpeg-turbo", "openjpeg": "OpenJPEG", "libdeflate": "libdeflate", "zstd": "zstd"}
"""imagecodecs' names of the libraries that decode tiles, and their own."""
_LEAST_FILES = 1_024
_LEAST_SHARED_BYTES = 1_000_000_000
"""Docker gives 64 MB, with which NCCL does not start; `docker/compose.yaml` asks for 8 GB."""
_LEAST_DRIVER = {11: 450, 12: 525, 13: 580}
"""By CUDA's major version: https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html."""
_DRIVER = Path("/proc/driver/nvidia")
_DEVICES = Path("/dev")


def examine_machine() -> dict[str, Any]:
    """Versions, readers, codecs, devices, limits; `problems` lists what will not work, each with the way out.

    Sizes in GB are 1e9 bytes. `cores` are those this process may run on, `cores_limit` what its control group gives it
    of them, and `memory_limit_gb` of the memory; None where it sets no limit. `load` is the mean
    number of processes of the whole machine, in the last minute, that ran or waited for storage.
    """
    cores, memory = len(os.sched_getaffinity(0)), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    cores_limit, memory_limit = limit_cores(), limit_memory()
    shared = os.statvfs("/dev/shm") if os.path.isdir("/dev/shm") else None
    shared_bytes = shared.f_frsize * shared.f_blocks if shared is not None else 0
    num_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    gpus, driver, cuda = list_gpus(), find_driver(), _find_torch_cuda()
    problems = [
        *find_shadows(),
        *_reader_problems(),
        *_limit_problems(cores, cores_limit, num_files),
        *(gpu_problems(_version("torch"), cuda, driver, len(gpus), shared_bytes) if gpus else ()),
    ]
    return {
        "slidegrad": VERSION,
        "python": platform.python_version(),
        "cores": cores,
        "cores_limit": cores_limit if cores_limit is not None and cores_limit < cores else None,
        "load": round(os.getloadavg()[0], 1),
        "memory_gb": round(memory / 1e9, 1),
        "memory_limit_gb": round(memory_limit / 1e9, 1) if memory_limit is not None and memory_limit < memory else None,
        "shared_memory_gb": round(shared_bytes / 1e9, 1),
        "open_files": None if num_files == resource.RLIM_INFINITY else num_files,
        "torch": _version("torch"),
        "torch_cuda": cuda,
        "gpus": gpus,
        "driver": driver,
        "cucim": _version("cucim-cu13") or _version("cucim-cu12"),
        "openslide": _version("openslide-python"),
        "codecs": _list_codecs(),
        "problems": problems,
    }


def find_shadows() -> list[str]:
    """Sentences on our import packages that another distribution also provides, or that Python finds elsewhere."""
    sentences = []
    owners = packages_distributions()
    for package in _OURS:
        others = sorted(set(owners.get(package, [])) - {"slidegrad"})
        if others:
            sentences.append(f"package {package!r} is also installed by {', '.join(others)}; pip uninstall {others[0]}")
        spec = importlib.util.find_spec(package)
        home = Path(__file__).resolve().parents[2]
        if spec is None or spec.origin is None or Path(spec.origin).resolve().parent.parent != home:
            found = spec.origin if spec else None
            sentences.append(
                f"package {package!r} is found at {found}, not beside the tiler in {home}; mend PYTHONPATH"
            )
    return sentences


def limit_cores(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Cores' worth of time that this process's control groups give it; None where they set no limit.

    Args:
        groups: which groups it is in.
        root: where they are mounted.
    """
    quotas = [read.split() for read in _read_groups("cpu", "cpu.max", groups, root)]
    pairs = [(quota, period) for quota, period in quotas if quota != "max"]
    first = _read_groups("cpu", "cpu.cfs_quota_us", groups, root)
    pairs += zip(first, _read_groups("cpu", "cpu.cfs_period_us", groups, root), strict=False)
    return min((int(quota) / int(period) for quota, period in pairs if int(quota) > 0), default=None)


def limit_memory(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes of memory that they give it; version 1 says a number beyond any memory where it sets no limit."""
    names = ("memory.max", "memory.limit_in_bytes")
    found = [read for name in names for read in _read_groups("memory", name, groups, root)]
    return min((int(read) for read in found if read != "max"), default=None)


def _read_groups(controller: str, name: str, groups: Path, root: Path) -> Iterator[str]:
    """What a file of the controller says in this process's groups, version 2 or 1, and in all groups above them.

    In a container the groups' own names may be those of the host, which it does not see; the topmost is its own.
    """
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, own = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / controller if controllers else root
        group = top / own.strip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(top) and (folder / name).is_file():
                yield (folder / name).read_text().strip()


def list_gpus(driver: Path = _DRIVER) -> list[str]:
    """Names of the NVIDIA devices, by the driver's own list."""
    files = sorted(driver.glob("gpus/*/information"))
    lines = [line for file in files for line in file.read_text().splitlines()]
    return [line.split(":", 1)[1].strip() for line in lines if line.startswith("Model:")]


def find_driver(driver: Path = _DRIVER) -> str | None:
    """The version of the NVIDIA driver; None without one."""
    file = driver / "version"
    found = re.search(r"Kernel Module\D.*?\s(\d{3,}\.[\d.]+)", file.read_text()) if file.is_file() else None
    return found[1] if found else None


def gpu_problems(
    torch: str | None, cuda: str | None, driver: str | None, num_gpus: int, shared_bytes: int, devices: Path = _DEVICES
) -> list[str]:
    """What keeps torch from the GPUs of this machine, each with the way out; nothing where torch is not installed.

    Args:
        torch: its version.
        cuda: the CUDA version it is built for; None for none.
        driver: the NVIDIA driver's version.
        num_gpus: how many the driver lists.
        shared_bytes: size of /dev/shm.
        devices: where the system lists devices.
    """
    if torch is None:
        return []
    if cuda is None:
        return [f"torch {torch} is built without CUDA and uses no GPU; pip install 'slidegrad[train]' anew"]
    sentences = []
    if not any(devices.glob("nvidia[0-9]*")):
        sentences.append(
            "the driver lists GPUs, but none is given to this container or job; docker run --gpus all, or ask the "
            "scheduler for one"
        )
    least = _LEAST_DRIVER.get(int(cuda.split(".")[0]), 0)
    if driver is not None and int(driver.split(".")[0]) < least:
        sentences.append(
            f"torch {torch} is built for CUDA {cuda} and needs NVIDIA driver {least} or newer, this is {driver}; "
            "update the driver, or install a torch that is built for an older CUDA"
        )
    if num_gpus > 1 and shared_bytes < _LEAST_SHARED_BYTES:
        sentences.append(
            f"shared memory is {shared_bytes / 1e9:.2g} GB, expected 1 GB or more for ranks on several GPUs; "
            "docker run --shm-size=8g"
        )
    return sentences


def _reader_problems() -> list[str]:
    from tiler.guard import missing_guards

    both = [name for name in ("cucim-cu12", "cucim-cu13") if _version(name)]
    if importlib.util.find_spec("cucim") is None:
        return [
            "cucim is not installed: OpenSlide reads all slides, several times slower; pip install 'slidegrad[cu13]'"
        ]
    clash = "cucim-cu12 and cucim-cu13 are both installed and overwrite each other; uninstall one"
    return [*([clash] if len(both) == 2 else []), *missing_guards()]


def _limit_problems(cores: int, cores_limit: float | None, num_files: int) -> list[str]:
    sentences = []
    if cores_limit is not None and math.ceil(cores_limit) < cores:
        wanted = max(1, math.floor(cores_limit))
        sentences.append(
            f"the control group gives this process {cores_limit:g} of {cores} cores, and commands start a process or "
            f"thread for each core; give --workers {wanted}, --threads {wanted}, --machine.reader-threads {wanted}"
        )
    if num_files != resource.RLIM_INFINITY and num_files < _LEAST_FILES:
        sentences.append(f"at most {num_files} open files, expected {_LEAST_FILES:,} or more; ulimit -n 4096")
    return sentences


def _list_codecs() -> dict[str, str]:
    """Who decodes tiles, with versions. cuCIM's own decoders are built into it and not told."""
    import imagecodecs
    import openslide

    known = imagecodecs.version(dict)
    ours = {name: str(known[key]).split("/")[0] for key, name in _CODECS.items() if key in known}
    return {"OpenSlide": openslide.__library_version__, "imagecodecs": str(known["imagecodecs"]), **ours}


def _find_torch_cuda() -> str | None:
    """The CUDA version that torch is built for, from the one small file of its that says so."""
    try:
        file = Distribution.from_name("torch").locate_file("torch/version.py")
        cuda = runpy.run_path(str(file)).get("cuda")
    except (PackageNotFoundError, OSError):
        return None
    return None if cuda is None else str(cuda)


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
