"""A colour image set that anybody may use, from a package registry: 3D emoji in eight groups, 256 px.

Images: npm package @lobehub/fluent-emoji-3d 1.1.0 (MIT; Microsoft's Fluent Emoji), one WebP for every code point; the
groups are those of Unicode (npm package unicode-emoji-json 0.9.0, MIT). Drawn, not photographed. Flags are left out,
and so are skin tones, which the list of groups does not name.

Command   python experiments/emoji.py FOLDER      (needs npm; 16 MB; a folder for every group, 1,599 images)
"""

import argparse
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PACKAGES = ("@lobehub/fluent-emoji-3d@1.1.0", "unicode-emoji-json@0.9.0")
LEFT_OUT = ("Flags",)


def fetch(folder: Path) -> list[Path]:
    """The two packages as npm packs them."""
    found = []
    for package in PACKAGES:
        packed = subprocess.run(["npm", "pack", "--silent", package], cwd=folder, capture_output=True, text=True)
        if packed.returncode:
            sys.exit(f"npm cannot fetch {package}: {packed.stderr.strip().splitlines()[-1:]}")
        found.append(folder / packed.stdout.strip().splitlines()[-1])
    return found


def groups(archive: Path) -> dict[str, str]:
    """Group by file name: code points in hexadecimal, joined by hyphens."""
    with tarfile.open(archive) as tar:
        listed = json.load(tar.extractfile("package/data-by-emoji.json"))
    return {"-".join(f"{ord(c):04x}" for c in emoji): entry["group"] for emoji, entry in listed.items()}


def write(images: Path, group_of: dict[str, str], root: Path) -> dict[str, int]:
    """`root/group/code.webp` for every image whose group is known and wanted; returns the counts."""
    counts: dict[str, int] = {}
    with tarfile.open(images) as tar:
        for member in tar:
            path = Path(member.name)
            group = group_of.get(path.stem)
            if path.suffix != ".webp" or group is None or group in LEFT_OUT:
                continue
            folder = root / group.lower().replace(" & ", "-and-").replace(" ", "-")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / path.name).write_bytes(tar.extractfile(member).read())
            counts[folder.name] = counts.get(folder.name, 0) + 1
    return dict(sorted(counts.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    root = parser.parse_args().folder
    if root.exists() and any(root.iterdir()):
        sys.exit(f"{root} is not empty")
    with tempfile.TemporaryDirectory() as folder:
        images, listing = fetch(Path(folder))
        counts = write(images, groups(listing), root)
    print(f"{sum(counts.values())} images in {root}: {', '.join(f'{name} {n}' for name, n in counts.items())}")


if __name__ == "__main__":
    main()
