"""`python -m daruma_trainer.bench WHAT`, which `daruma bench WHAT` becomes."""

import sys

if __name__ == "__main__":
    # Each has imports of its own; a process that computes for one is spawned from here.
    match sys.argv[1:2]:
        case ["availability"]:
            from daruma_trainer.bench.availability import command as availability

            sys.exit(availability.main(sys.argv[2:]))
        case ["checkpoint"]:
            from daruma_trainer.bench import checkpoint

            sys.exit(checkpoint.main(sys.argv[2:]))
        case ["memory"]:
            from daruma_trainer.bench import memory

            sys.exit(memory.main(sys.argv[2:]))
        case ["recovery"]:
            from daruma_trainer.bench import recovery

            sys.exit(recovery.main(sys.argv[2:]))
        case ["replay"]:
            from daruma_trainer.bench import replay

            sys.exit(replay.main(sys.argv[2:]))
        case ["replication"]:
            from daruma_trainer.bench import replication

            sys.exit(replication.main(sys.argv[2:]))
        case ["rework"]:
            from daruma_trainer.bench.rework import command

            sys.exit(command.main(sys.argv[2:]))
        case _:
            sys.exit(
                "daruma bench: there are `availability`, `checkpoint`, `memory`, `recovery`, "
                "`replay`, `replication` and `rework`"
            )
