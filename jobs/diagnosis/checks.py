"""From what the nodes say to findings. Pure: no Ray, no clock, no disk."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from jobs.diagnosis.finding import Finding, worst
from jobs.diagnosis.node import NodeFacts

# Of these, other versions on other nodes can stop a job; of the rest, they can change what it answers.
_MUST_EQUAL = ("python", "ray")
_OURS = "mone-video"
_UNKNOWN = "unknown"
_GIB = 1 << 30

# A worker holds part of one while clips are decoded for it.
_LEAST_CPUS_TO_TRAIN = 2
# Ray Data takes about half of the object store; of a decoding core, one block is made while the last one waits. A core
# has a second task, for the moments between two; Ray Data does without it where its blocks find no room.
_STORE_BLOCKS_PER_CPU, _STORE_SHARE = 2, 0.5
# Object stores and certificates refuse clocks that are minutes apart; seconds mix up logs.
_SKEW_WARNING_S, _SKEW_ERROR_S = 2.0, 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeResources:
    """What Ray schedules on a node."""

    cpus: float
    gpus: float
    memory_bytes: float
    object_store_bytes: float


def check_versions(versions: Mapping[str, Mapping[str, str]]) -> list[Finding]:
    """Python and packages are the same everywhere; of a flavour such as +cpu or +cu128 each node may have its own.

    Args:
        versions: Of each node, by package.
    """
    findings = []
    for package in dict.fromkeys(package for found in versions.values() for package in found):
        nodes = defaultdict[str, list[str]](list)
        for node, found in versions.items():
            nodes[found.get(package, _UNKNOWN).partition("+")[0]].append(node)
        if package == _OURS and _UNKNOWN in nodes:  # runs from a working directory, the same for all nodes
            del nodes[_UNKNOWN]
        if _UNKNOWN in nodes:
            missing = ", ".join(nodes[_UNKNOWN])
            remedy = f"pip install --constraint constraints.txt {package}"
            findings.append(_error("versions", f"{package} is not installed on {missing}", remedy))
        elif len(nodes) > 1:
            seen = "; ".join(f"{version} on {', '.join(names)}" for version, names in nodes.items())
            must = package in _MUST_EQUAL
            why = "nodes cannot work together" if must else "results depend on the node"
            remedy = "install from one image, or with constraints.txt"
            findings.append(_error("versions", f"{package} differs, {why}: {seen}", remedy))
    first = next(iter(versions.values()), {})
    shown = ", ".join(f"{package} {version}" for package, version in first.items() if version != _UNKNOWN)
    return worst("versions", f"{shown} on {_nodes(len(versions))}", findings)


def check_decoders(facts: Mapping[str, NodeFacts]) -> list[Finding]:
    """Every decoder decodes a clip on every node; one of them, which is optional, had better."""
    findings = [
        _warning("decoders", f"{name} fails on {', '.join(nodes)}: {reason}", "install FFmpeg's libraries there")
        if name == "torchcodec"
        else _error("decoders", f"{name} fails on {', '.join(nodes)}: {reason}", "reinstall av and decord2 there")
        for (name, reason), nodes in _by_reason(
            (node, (name, reason)) for node, found in facts.items() for name, reason in found.decoders.items() if reason
        ).items()
    ]
    names = sorted({name for found in facts.values() for name in found.decoders})
    return worst("decoders", f"{', '.join(names)} decode on {_nodes(len(facts))}", findings)


def check_gpus(facts: Mapping[str, NodeFacts], resources: Mapping[str, NodeResources]) -> list[Finding]:
    """GPUs that Ray schedules can be used, and with them Triton and NVDEC."""
    findings = list[Finding]()
    for node, found in facts.items():
        scheduled = int(resources[node].gpus)
        if found.cuda:
            findings.append(_error("gpu", f"torch cannot compute on {node}: {found.cuda}", "check driver, torch build"))
        elif scheduled > len(found.gpus):
            message = f"Ray schedules {scheduled} GPUs on {node}, torch sees {len(found.gpus)}"
            findings.append(_error("gpu", message, "install a CUDA build of torch there, or check nvidia-smi"))
        elif scheduled < len(found.gpus):
            message = f"{node} has {len(found.gpus)} GPUs, Ray schedules {scheduled}"
            findings.append(_warning("gpu", message, "start Ray there with --num-gpus"))
        if found.kernels:
            message = f"Triton kernels fail on {node}, the model runs slower: {found.kernels}"
            findings.append(_warning("triton", message, "Triton needs an Ampere GPU or newer and a C compiler (gcc)"))
        if found.nvdec:
            message = f"NVDEC does not decode on {node}, CPUs do: {found.nvdec}"
            findings.append(_warning("nvdec", message, "give its containers NVIDIA_DRIVER_CAPABILITIES=video"))
    names = [name for found in facts.values() for name in found.gpus]
    shown = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    return worst("gpu", shown or "none, the model runs on CPUs", findings)


def check_capacity(resources: Mapping[str, NodeResources], block_bytes: int, task_memory_bytes: int) -> list[Finding]:
    """CPUs, and the memory that they need to decode at the same time.

    Args:
        resources: Of each node.
        block_bytes: Of the frames that one decoding task puts into the object store.
        task_memory_bytes: Heap of a decoding task.
    """
    findings, cpus = list[Finding](), int(sum(node.cpus for node in resources.values()))
    if not cpus:
        findings.append(_error("cpu", "no CPUs, and a job waits for ever", "start workers (min_workers)"))
    elif cpus < _LEAST_CPUS_TO_TRAIN:
        message, remedy = f"{cpus} CPU annotates, but does not train", f"at least {_LEAST_CPUS_TO_TRAIN} CPUs"
        findings.append(_warning("cpu", message, remedy))
    else:
        findings.append(Finding(check="cpu", level="ok", message=f"{cpus} CPUs on {_nodes(len(resources))}"))
    for name, node in resources.items():
        if (fits := int(node.memory_bytes // task_memory_bytes)) < int(node.cpus):
            message = f"memory for {fits} decoding tasks on {name}, which has {int(node.cpus)} CPUs"
            remedy = f"{task_memory_bytes / _GIB:g} GiB for each CPU, or fewer CPUs (--num-cpus)"
            findings.append(_warning("memory", message, remedy))
    return findings + _check_stores(resources, block_bytes)


def _check_stores(resources: Mapping[str, NodeResources], block_bytes: int) -> list[Finding]:
    findings = list[Finding]()
    for name, node in resources.items():
        need = node.cpus * block_bytes * _STORE_BLOCKS_PER_CPU / _STORE_SHARE
        if node.object_store_bytes < need:
            message = f"{node.object_store_bytes / _GIB:.1f} GiB on {name}, {need / _GIB:.1f} GiB keep its CPUs busy"
            findings.append(_warning("object store", message, "--object-store-memory, and as much /dev/shm"))
    sizes = [node.object_store_bytes / _GIB for node in resources.values()]
    return worst("object store", f"{min(sizes):.1f} GiB or more on {_nodes(len(sizes))}", findings)


def check_shared_memory(facts: Mapping[str, NodeFacts], resources: Mapping[str, NodeResources]) -> list[Finding]:
    """The object store fits into /dev/shm; else Ray puts it on a disk."""
    return [
        _warning(
            "shared memory",
            f"/dev/shm of {node} has {found.shared_memory_bytes / _GIB:.1f} GiB, less than its object store",
            "docker --shm-size, or in Kubernetes a volume of medium Memory at /dev/shm",
        )
        for node, found in facts.items()
        if found.shared_memory_bytes < resources[node].object_store_bytes
    ]


def check_clocks(offsets_s: Mapping[str, float], uncertain_s: float = 0.0) -> list[Finding]:
    """Clocks agree.

    Args:
        offsets_s: Of each node's clock from that of this process.
        uncertain_s: By so much the offsets may be wrong.
    """
    spread_s = max(0.0, max(offsets_s.values()) - min(offsets_s.values()) - 2 * uncertain_s)
    first, last = (pick(offsets_s, key=lambda node: offsets_s[node]) for pick in (min, max))
    message = f"{last} is {spread_s:.1f} s ahead of {first}"
    if spread_s > _SKEW_ERROR_S:
        return [_error("clock", message, "run chrony or another NTP client: storage refuses its requests")]
    if spread_s > _SKEW_WARNING_S:
        return [_warning("clock", message, "run chrony or another NTP client")]
    return [Finding(check="clock", level="ok", message=f"within {_SKEW_WARNING_S:g} s on {_nodes(len(offsets_s))}")]


def check_output(unwritten: Mapping[str, str], unread: Mapping[str, list[str]], folder: str) -> list[Finding]:
    """The output folder is one and the same on all nodes.

    Args:
        unwritten: Of each node why it cannot write there, "" where it can.
        unread: Of each node the others whose files it cannot read.
        folder: Its name.
    """
    findings = [
        _error("output", f"{node} cannot write to {folder}: {reason}", "mount the shared disk there, writable")
        for node, reason in unwritten.items()
        if reason
    ]
    for node, missing in unread.items():
        others = [other for other in missing if not unwritten[other]]  # what is not written cannot be read
        if others and not unwritten[node]:
            message = f"{node} does not see in {folder} what {', '.join(others)} wrote"
            findings.append(_error("output", message, "it must be one disk for all nodes (NFS, EFS, Filestore)"))
    return worst("output", f"{folder} is written and read by {_nodes(len(unwritten))}", findings)


def check_archive(unlike: Mapping[str, str], archive: str, num_videos: int) -> list[Finding]:
    """All nodes see the archive's files as the driver does.

    Args:
        unlike: Of each node what it sees otherwise, "" where it sees the same.
        archive: Its name.
        num_videos: Looked at.
    """
    findings = [
        _error("archive", f"{node} sees {archive} otherwise: {reason}", "mount the disk, or give its credentials")
        for node, reason in unlike.items()
        if reason
    ]
    return worst("archive", f"{num_videos} videos of {archive} are the same on {_nodes(len(unlike))}", findings)


def check_answers(silent: Mapping[str, str]) -> list[Finding]:
    """Every node answers.

    Args:
        silent: Of each node why it does not, "" where it does.
    """
    remedy = "submit with --working-dir ., and install what pyproject.toml names on every node"
    findings = [_error("nodes", f"{node}: {reason}", remedy) for node, reason in silent.items() if reason]
    return worst("nodes", f"{_nodes(len(silent))} asked, all answer", findings)


def _by_reason(pairs: Iterable[tuple[str, tuple[str, str]]]) -> dict[tuple[str, str], list[str]]:
    grouped = defaultdict[tuple[str, str], list[str]](list)
    for node, reason in pairs:
        grouped[reason].append(node)
    return grouped


def _nodes(count: int) -> str:
    return f"{count} node" + "s" * (count != 1)


def _error(check: str, message: str, remedy: str) -> Finding:
    return Finding(check=check, level="error", message=message, remedy=remedy)


def _warning(check: str, message: str, remedy: str) -> Finding:
    return Finding(check=check, level="warning", message=message, remedy=remedy)
