"""`python -m daruma_trainer.bench WHAT`, which `daruma bench WHAT` becomes."""

import sys

from daruma_trainer.bench import recovery

if __name__ == "__main__":
    if sys.argv[1:2] != ["recovery"]:
        sys.exit("daruma bench: there is `recovery`")
    sys.exit(recovery.main(sys.argv[2:]))
