"""Pin every transitive dependency: read the resolution in uv.lock, write it into [tool.uv] constraint-dependencies.

    uv lock --upgrade && python dev/pin.py

uv.lock itself stays out of git because it records the hosts of whatever registry resolved it.
"""
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def pinned_versions(lock):
    """Parsed uv.lock -> sorted "name==version" lines, the lowest version where markers fork the resolution."""
    versions = {}
    for package in lock["package"]:
        if "registry" not in package.get("source", {}):
            continue  # the project itself
        known = versions.get(package["name"])
        key = [int(part) for part in re.findall(r"\d+", package["version"])]
        if known is None or key < known[0]:
            versions[package["name"]] = (key, package["version"])
    return [f"{name}=={version}" for name, (_, version) in sorted(versions.items())]


def main():
    pyproject = ROOT / "pyproject.toml"
    lines = pinned_versions(tomllib.loads((ROOT / "uv.lock").read_text()))
    block = "constraint-dependencies = [\n" + "".join(f'    "{line}",\n' for line in lines) + "]\n"
    text = re.sub(r"constraint-dependencies = \[\n.*?\n\]\n", "", pyproject.read_text(), flags=re.DOTALL)
    pyproject.write_text(text.replace("[tool.uv]\n", "[tool.uv]\n" + block))
    print(f"pinned {len(lines)} packages in {pyproject.name}")


if __name__ == "__main__":
    main()
