"""Natural text for the benchmarks: Debian's documentation packages as JSONL, one document a file or page.

python benchmarks/corpus.py --output build/benchmarks/corpus.jsonl [--megabytes 120]
Needs Debian's apt-get and dpkg. Nothing of the text is ever committed.
"""

import argparse
import gzip
import html.parser
import json
import random
import subprocess
import tempfile
from pathlib import Path

PACKAGES = (
    "linux-doc-6.1",
    "python3.11-doc",
    "postgresql-doc-15",
    "git-doc",
    "debian-policy",
)
# With these as well, about 500 MB, of which more is the text of API references.
MORE_PACKAGES = (
    "openjdk-17-doc",
    "rust-doc",
    "qtbase5-doc-html",
    "python-pandas-doc",
    "python-scipy-doc",
    "libboost1.81-doc",
    "erlang-doc",
    "perl-doc",
    "python-django-doc",
    "ghc-doc",
    "libstdc++-12-doc",
    "octave-doc",
)
MINIMUM_CHARACTERS = 50


class _Text(html.parser.HTMLParser):
    """The text of a page, a line a block."""

    SKIPPED = frozenset({"script", "style", "head", "nav"})
    BLOCKS = frozenset({"p", "div", "li", "tr", "pre", "br", "h1", "h2", "h3", "h4", "h5", "dt", "dd", "td", "section"})

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []
        self._skipping = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._skipping += tag in self.SKIPPED
        if tag in self.BLOCKS:
            self.pieces.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self._skipping -= tag in self.SKIPPED and self._skipping > 0
        if tag in self.BLOCKS:
            self.pieces.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._skipping:
            self.pieces.append(data)

    @staticmethod
    def of(page: str) -> str:
        parser = _Text()
        parser.feed(page)
        lines = (line.strip() for line in "".join(parser.pieces).splitlines())
        return "\n".join(line for line in lines if line)


def documents(folder: Path) -> list[tuple[str, str]]:
    """(name, text) of every page and text file below `folder`."""
    found = []
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.is_symlink():
            continue
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        name = path.name.removesuffix(".gz")
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            continue
        if name.endswith((".html", ".htm")):
            text = _Text.of(text)
        elif not name.endswith((".txt", ".rst", ".md", ".adoc")):
            continue
        if len(text) >= MINIMUM_CHARACTERS:
            found.append((str(path.relative_to(folder)), text))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--more", action="store_true", help="further packages, for a corpus of about 500 MB")
    parser.add_argument("--megabytes", type=float, default=1000.0, help="stop at this much text")
    arguments = parser.parse_args()
    subprocess.run(["apt-get", "update", "-q"], check=True, stdout=subprocess.DEVNULL)
    found: list[tuple[str, str]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for package in (*PACKAGES, *(MORE_PACKAGES if arguments.more else ())):
            got = subprocess.run(["apt-get", "download", "-q", package], cwd=folder, capture_output=True, text=True)
            if got.returncode:
                print(f"{package}: not to be had ({got.stderr.strip().splitlines()[-1:]})")
        for package in sorted(folder.glob("*.deb")):
            unpacked = folder / "unpacked" / package.name.split("_")[0]
            unpacked.mkdir(parents=True)
            subprocess.run(["dpkg", "-x", str(package), str(unpacked)], check=True)
        found = documents(folder / "unpacked")
    random.Random(0).shuffle(found)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    size = written = 0
    with open(arguments.output, "w") as output:
        for name, text in found:
            if size > arguments.megabytes * 1e6:
                break
            output.write(json.dumps({"id": name, "text": text}, ensure_ascii=False) + "\n")
            size += len(text.encode())
            written += 1
    print(f"{arguments.output}: {written:,} documents, {size / 1e6:.1f} MB of text")


if __name__ == "__main__":
    main()
