"""Makes the peers' own environment, benchmarks/peers/.venv: python benchmarks/peers/install.py (standard library only).

timm and torchvision never enter effnet's environment: torchvision has no build beside our torch and fails at import.
"""

import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
ENVIRONMENT = HERE / ".venv"
CONSTRAINTS = HERE.parent.parent / "constraints.txt"


def main() -> None:
    venv.create(ENVIRONMENT, with_pip=True, clear=True)
    pip = [str(ENVIRONMENT / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "-c", str(CONSTRAINTS), "-r", str(HERE / "requirements.txt")], check=True)
    subprocess.run([*pip, "--no-deps", "-r", str(HERE / "requirements-no-deps.txt")], check=True)
    print(f"now: {ENVIRONMENT / 'bin' / 'python'} -m benchmarks.peers.compare")


if __name__ == "__main__":
    sys.exit(main())
