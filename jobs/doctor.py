"""Ask whether this cluster can do the work, before a long job finds out that it cannot.

python -m jobs.doctor [--address ADDRESS] [--archive ARCHIVE --output DIR]
"""

import dataclasses
import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.cli import JobFailed, UserError, checking_input, run
from jobs.cluster import connected
from jobs.diagnosis import checks
from jobs.diagnosis.finding import Finding
from jobs.inputs import BUNDLED_MODEL, load_model, make_output
from mone.config import ModelConfig
from pipelines.archive import Video, list_videos
from pipelines.ingest import CLIPS_TOGETHER, DECODE_MEMORY_BYTES
from pipelines.storage.address import public_address

_NUM_VIDEOS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Doctor:
    """Look at every node that is up: versions, decoders, GPUs, memory, clocks, storage. Takes about a minute.

    One line for each finding, with its remedy; the last line of stdout is one JSON object. Status 1 where there is an
    error. Takes no CPU and no GPU from jobs that run.
    """

    archive: str = ""
    """ARCHIVE that all nodes have to see: its first videos are read on each."""
    output: str = ""
    """DIR that all nodes have to write to: a file of each node is read by all others, then removed."""
    model: str = str(BUNDLED_MODEL)
    """Model folder: its clips have to fit into the object store."""
    limit_s: float = 60.0
    """Seconds that a node may take to answer."""
    address: str = ""
    """Ray cluster; default RAY_ADDRESS, else a Ray that starts here, which says something of this machine alone."""


def doctor(config: Doctor) -> None:
    """Run the job."""
    if not 0 < config.limit_s < float("inf"):
        raise UserError(f"--limit-s must be positive, got {config.limit_s:g}")
    model = load_model(config.model).config
    with checking_input():
        videos = list(itertools.islice(list_videos(config.archive), _NUM_VIDEOS)) if config.archive else []
    output = make_output(config.output) if config.output else None
    with connected(config.address):
        diagnosis = _diagnose(config, model, videos, output)
    findings: list[Finding] = diagnosis.pop("findings")
    for finding in findings:
        print(finding)
    errors = sum(finding.level == "error" for finding in findings)
    warnings = sum(finding.level == "warning" for finding in findings)
    record = {"errors": errors, "warnings": warnings, "findings": [dataclasses.asdict(found) for found in findings]}
    print(json.dumps(record | diagnosis, allow_nan=False))
    if errors:
        raise JobFailed(f"{errors} errors, {warnings} warnings")


def _diagnose(config: Doctor, model: ModelConfig, videos: list[Video], output: Path | None) -> dict[str, Any]:
    """Findings, and what each node said."""
    from jobs.diagnosis.examiners import Examiners, sights, unlike
    from jobs.diagnosis.shared_folder import probe_folder

    examiners = Examiners(config.limit_s)
    resources = examiners.resources
    answers = examiners.ask("facts")
    facts, silent = answers.given, dict.fromkeys(resources, "") | answers.silent
    later = list[Finding]()
    if videos:
        seen = examiners.ask("sights", videos)
        silent |= seen.silent
        later += checks.check_archive(unlike(sights(videos), seen.given), public_address(config.archive), len(videos))
    if output:
        with probe_folder(output) as folder:
            written = examiners.ask("write", folder, own_name=True)
            read = examiners.ask("unread", folder, list(written.given))
        silent |= written.silent | read.silent
        later += checks.check_output(written.given, read.given, config.output)
    block_bytes = CLIPS_TOGETHER * model.num_frames * model.height_px * model.width_px * 3
    findings = checks.check_answers(silent)
    findings += checks.check_capacity(resources, block_bytes, DECODE_MEMORY_BYTES)
    if facts:
        findings += checks.check_versions({node: found.versions for node, found in facts.items()})
        findings += checks.check_decoders(facts) + checks.check_gpus(facts, resources)
        findings += checks.check_shared_memory(facts, resources)
    offsets_s, uncertain_s = examiners.clocks_s()
    if offsets_s:
        findings += checks.check_clocks(offsets_s, uncertain_s)
    nodes = {
        node: {"resources": dataclasses.asdict(resources[node]), "silent": silent[node]}
        | ({"facts": dataclasses.asdict(facts[node])} if node in facts else {})
        for node in resources
    }
    return {"findings": findings + later, "nodes": nodes}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run("doctor", Doctor, doctor, argv)


if __name__ == "__main__":
    sys.exit(main())
