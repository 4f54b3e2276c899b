"""`python -m daruma_trainer.bench WHAT`, which `daruma bench WHAT` becomes."""

import sys

from daruma_trainer.bench import checkpoint, recovery

if __name__ == "__main__":
    benches = {"checkpoint": checkpoint.main, "recovery": recovery.main}
    if sys.argv[1:2] == [] or sys.argv[1] not in benches:
        sys.exit("daruma bench: there are " + " and ".join(f"`{b}`" for b in sorted(benches)))
    sys.exit(benches[sys.argv[1]](sys.argv[2:]))
