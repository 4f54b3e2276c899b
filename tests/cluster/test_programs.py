"""The programs that no other test of a cluster runs, side by side, each losing a server once."""

import parts
from members import kill
from testjobs import JobNamespace

from daruma_trainer.contract import Role

PROGRAMS = {
    "mf": (["--data", "synthetic:60,50,3,1500", "--iterations", "30", "--rank", "3"], 0.5),
    "lda": (["--data", "synthetic:60,100,4,30", "--sweeps", "60", "--topics", "4"], 4.2),
    "cnn": (["--data", "synthetic:400,8,4", "--steps", "80", "--lr", "0.004"], 1.2),
}
"""Arguments, and a loss above that of every end, below that of every beginning."""


def test_each_program_goes_on_after_it_lost_a_server(jobs: JobNamespace) -> None:
    jobs.cluster.apply(
        *(
            jobs.manifest(
                name,
                servers=2,
                workers=1,
                program={
                    "image": parts.tag("worker"),
                    "command": ["python", "-m", f"daruma_trainer.programs.{name}"],
                    "args": [*arguments, "--think-ms", "200"],
                },
            )
            for name, (arguments, _) in PROGRAMS.items()
        )
    )
    left = set(PROGRAMS)

    def hurt() -> bool:
        for name in sorted(left):
            if jobs.reached(name, 5):
                kill(jobs, name, Role.SERVER, 1)
                left.discard(name)
        return not left

    jobs.cluster.until(hurt, "each lost a server", 180)
    for name, (_, loss) in PROGRAMS.items():
        status = jobs.ended(name)
        assert [r["outcome"] for r in status["recoveries"]] == ["Succeeded"]
        assert status["restarts"]["workers"] == 0
        assert status["progress"]["loss"] < loss
