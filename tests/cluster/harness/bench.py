"""Run `daruma bench recovery --cluster` on a cluster made for it: bench.py [OPTIONS of bench]."""

import argparse
import sys
from pathlib import Path

import yaml
from testcluster import cluster, install
from testjobs import job_namespace, mlr

from daruma_trainer.bench.local import RECOVERY

BIN = Path(sys.executable).parent


def main() -> int:
    """Measure; returns the benchmark's exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--placement", choices=tuple(RECOVERY), default="Replace")
    own, others = parser.parse_known_args()
    with cluster() as made:
        install(made)
        with job_namespace(made, "bench") as jobs:
            manifest = jobs.manifest(
                "bench",
                servers=3,
                workers=2,
                program=mlr(1_000_000),
                runPolicy={"backoffLimit": 100},
                recovery=dict(RECOVERY[own.placement]),
            )
            file = jobs.scratch / "job.yaml"
            file.write_text(yaml.safe_dump(manifest))
            command = [str(BIN / "daruma"), "bench", "recovery", "--cluster", str(file)]
            # Where the cluster can be reached, this is not the current folder.
            options = [a if a.startswith("-") else str(Path(a).resolve()) for a in others]
            done = made.run(*command, *options, check=False, seconds=600.0)
            sys.stdout.write(done.stdout)
            sys.stderr.write(done.stderr)
            return done.returncode


if __name__ == "__main__":
    sys.exit(main())
