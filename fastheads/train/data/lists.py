"""Lists of images (CSV or JSON: path, domain, class), and files that name classes."""

import csv
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

SUFFIXES = (".csv", ".json")
FIELDS = ("path", "domain", "class")

Found = dict[str, dict[str, list[str]]]  # domain → class → files


def read_list(file: Path) -> Found:
    """The images a list names, by domain and class, in the order in which the same folders would be read.

    Relative paths are relative to the list's folder; `~` is the user's home. Raises ValueError, with the line, for a
    missing column, an empty field, a domain or class that can't be a folder's name and a file listed twice;
    FileNotFoundError for files that aren't there.
    """
    found: Found = {}
    lines: dict[str, str] = {}
    for line, row in _csv_rows(file) if file.suffix.lower() == ".csv" else _json_rows(file):
        path, domain, label = (_field(row, name, f"{file}: {line}") for name in FIELDS)
        path = os.path.join(file.parent, os.path.normpath(os.path.expanduser(path)))
        if (first := lines.setdefault(os.path.abspath(path), line)) != line:
            raise ValueError(f"{file}: {line}: path: {path} is listed already ({first})")
        found.setdefault(domain, {}).setdefault(label, []).append(path)
    if not lines:
        raise ValueError(f"{file}: lists no image; takes a path, a domain and a class for each")
    gone = [path for path in lines if not os.path.isfile(path)]
    if gone:
        raise FileNotFoundError(
            f"{file}: {len(gone)} of {len(lines)} files are not there, the first {gone[0]} ({lines[gone[0]]})"
        )
    for by_class in found.values():
        for paths in by_class.values():
            paths.sort(key=os.path.split)
    return found


def _field(row: dict[Any, Any], name: str, where: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: {name}: {'is empty' if value in (None, '') else f'got {value!r}'}; takes text")
    value = value.strip()
    if name != "path" and ("/" in value or value in (".", "..")):
        raise ValueError(f"{where}: {name}: got {value!r}; takes a name that a folder can have")
    return value


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: is not UTF-8 text ({error.reason} at byte {error.start})") from error


def _csv_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(_text(file), newline=""), skipinitialspace=True, strict=True)
    try:
        header = [name.strip() for name in reader.fieldnames or ()]
        missing = [name for name in FIELDS if name not in header]
        if missing:
            raise ValueError(
                f"{file}: line 1: no column {', '.join(missing)}, got {', '.join(header) or 'none'}; "
                f"takes {', '.join(FIELDS)} in any order"
            )
        reader.fieldnames = header
        for row in reader:
            yield f"line {reader.line_num}", row
    except csv.Error as error:
        raise ValueError(f"{file}: line {reader.line_num}: {error}") from error


def _json_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    content = _json(file)
    if not isinstance(content, list):
        raise ValueError(f"{file}: got {type(content).__name__}; takes a list of objects with {', '.join(FIELDS)}")
    for at, row in enumerate(content, 1):
        if not isinstance(row, dict):
            raise ValueError(f"{file}: entry {at}: got {row!r}; takes an object with {', '.join(FIELDS)}")
        yield f"entry {at}", row


def _json(file: Path) -> Any:
    try:
        return json.loads(_text(file))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: line {error.lineno}: is not JSON ({error.msg})") from error


def read_class_names(file: str | Path, classes: Sequence[str]) -> tuple[str, ...]:
    """What prompts call `classes`: from a JSON object {class: name}, or a text file with a line for each, in order.

    Raises ValueError for a class that is missing or unknown, another number of lines, an empty name, one name for two.
    """
    file = Path(file).expanduser()
    where = f"class_names: {file}"
    if not file.is_file():
        raise FileNotFoundError(f"{where}: is not a file")
    if file.suffix.lower() == ".json":
        named = _json(file)
        if not isinstance(named, dict):
            raise ValueError(f"{where}: got {type(named).__name__}; takes an object {{class: name}}")
        odd = [f"no name for {label!r}" for label in classes if label not in named]
        odd += [f"no class {label!r} in the data" for label in named if label not in classes]
        if odd:
            raise ValueError(f"{where}: {odd[0]}{f' (and {len(odd) - 1} more such)' if odd[1:] else ''}")
        names = [named[label] for label in classes]
    else:
        names = _text(file).rstrip().splitlines()
        if len(names) != len(classes):
            raise ValueError(
                f"{where}: got {len(names)} lines; takes one for each of the {len(classes)} classes, in the order "
                f"{', '.join(classes[:5])}{' …' if classes[5:] else ''}"
            )
    empty = [label for label, name in zip(classes, names, strict=True) if not isinstance(name, str) or not name.strip()]
    if empty:
        raise ValueError(f"{where}: the name of {empty[0]!r} is empty or no text")
    names = [name.strip() for name in names]
    twice = sorted(name for name in set(names) if names.count(name) > 1)
    if twice:
        raise ValueError(f"{where}: {twice[0]!r} names two classes; takes a name of its own for each")
    return tuple(names)
