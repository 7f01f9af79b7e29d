"""`python -m effnet`: the command, for where its script is not on the path (`torchrun -m effnet train ...`)."""

import sys

from effnet.cli import main

if __name__ == "__main__":
    sys.exit(main())
