"""Recognise which columns hold the prompt and the answer, by the names that public data sets use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from neko_lean.data.example_types import COLUMNS, STATED_COLUMNS, Kind
from neko_lean.data.files import Record, shorten_name
from neko_lean.errors import NekoLeanError, did_you_mean

COLUMN_KEYS = ("prompt", "answer", "text", "messages", "id", "group", "kind", "document")

GROUP_COLUMNS = ("group", "task", "topic", "category", "subject", "author")  # in order of preference


@dataclass(frozen=True)
class Layout:
    """Which columns of a data set hold what. Columns that it does not name are ignored.

    Attributes:
        name: What to call the layout in a message, such as "question/answer".
        prompt: The column with the prompt. `answer` is then set as well.
        answer: The column with the answer.
        context: An optional column whose text follows the prompt's, as `input` follows `instruction`.
        messages: The column with a whole conversation, instead of prompt and answer.
        text: The column with a whole document, instead of prompt and answer.
        conversational: Whether prompt and answer may be lists of messages.
        kind: The kind of the examples, or None if it follows from the prompt.
        id: The column with the ids, if there is one.
        group: The column with the groups, if there is one.
        kind_column: The column that states the kind of each row, if the user named one.
        document: The column that states the document of each row, if the user named one.
        lume: Whether the columns are those of LUME, whose ids state kind and document.
        stated: Whether rows may also have the columns of `Example.row`.
    """

    name: str
    prompt: str = ""
    answer: str = ""
    context: str = ""
    messages: str = ""
    text: str = ""
    conversational: bool = False
    kind: Kind | None = None
    id: str = ""
    group: str = ""
    kind_column: str = ""
    document: str = ""
    lume: bool = False
    stated: bool = False

    @property
    def required(self) -> tuple[str, ...]:
        """The columns that every row must have."""
        return tuple(name for name in (self.prompt, self.answer, self.messages, self.text) if name)


LAYOUTS = (
    Layout("input/output", "input", "output"),
    Layout("question/answer", "question", "answer", kind="qa"),
    Layout("prompt/completion", "prompt", "completion", conversational=True),
    Layout("prompt/response", "prompt", "response", kind="qa"),
    Layout("instruction/output", "instruction", "output", context="input", kind="qa"),
    Layout("prompt/gt", "prompt", "gt"),
    Layout("messages", messages="messages", kind="qa"),
    Layout("conversations", messages="conversations", kind="qa"),
    Layout("text", text="text", kind="document"),
    Layout("document", text="document", kind="document"),
)

_USED = {name for layout in LAYOUTS for name in (*layout.required, layout.context) if name}

_ADVICE = "choose the columns with --columns prompt=NAME,answer=NAME"


def known_columns(columns: Mapping[str, str] | None) -> list[str]:
    """Every column that a layout or `columns` may read."""
    return list(dict.fromkeys([*sorted(_USED), "id", *GROUP_COLUMNS, *STATED_COLUMNS, *(columns or {}).values()]))


def parse_columns(text: str) -> dict[str, str]:
    """Parse the value of --columns, such as "prompt=q,answer=a,group=topic".

    Raises:
        NekoLeanError: If a part is not KEY=COLUMN, or a key is unknown or occurs twice.

    Example:
        >>> parse_columns("prompt=q, answer=a")
        {'prompt': 'q', 'answer': 'a'}
    """
    columns: dict[str, str] = {}
    for part in text.split(","):
        key, separator, column = (piece.strip() for piece in part.partition("="))
        if not separator or not key or not column:
            raise NekoLeanError(
                f"--columns contains {part.strip()!r}; expected KEY=COLUMN pairs, such as prompt=q,answer=a."
            )
        if key in columns:
            raise NekoLeanError(f"--columns names {key!r} twice; remove one.")
        columns[key] = column
    _check_keys(columns)
    return columns


def recognise(records: Sequence[Record], columns: Mapping[str, str] | None = None) -> Layout:
    """Find the layout of a data set.

    Args:
        records: All rows, at least one. Rows may lack optional columns.
        columns: Columns that the user named, by the keys of `COLUMN_KEYS`.

    Raises:
        NekoLeanError: If no layout or more than one matches, or a column that the user named does not exist.
    """
    columns = dict(columns or {})
    _check_keys(columns)
    names: dict[str, None] = {}
    for record in records:
        names.update(dict.fromkeys(record.values))

    where = records[0].where
    for key, column in columns.items():
        if column not in names:
            raise NekoLeanError(
                f"{where}: column '{shorten_name(column)}' is missing; --columns names it as the {key}, so write the "
                f"name of a column that the data has."
            )
    layout = _named_layout(columns) or _matching_layout(records, list(names), where)
    lume = layout.name == "input/output" and all(name in names for name in COLUMNS) and not columns
    group = columns.get("group") or _group_column(records, [name for name in names if name not in layout.required])
    return replace(
        layout,
        id=columns.get("id") or ("id" if "id" in names and "id" not in layout.required else ""),
        group="task" if lume else group,
        kind_column=columns.get("kind", ""),
        document=columns.get("document", ""),
        context=layout.context if layout.context in names else "",
        lume=lume,
        stated=lume and all(name in names for name in STATED_COLUMNS),
    )


def _check_keys(columns: Mapping[str, str]) -> None:
    for key in columns:
        if key not in COLUMN_KEYS:
            raise NekoLeanError(f"--columns contains the unknown key {key!r}{did_you_mean(key, COLUMN_KEYS)}")


def _named_layout(columns: Mapping[str, str]) -> Layout | None:
    """The layout of the columns that the user named, or None if they name neither text, messages nor prompt."""
    given = [key for key in ("prompt", "answer", "text", "messages") if key in columns]
    if not given:
        return None
    if given == ["text"]:
        return Layout(columns["text"], text=columns["text"], kind="document")
    if given == ["messages"]:
        return Layout(columns["messages"], messages=columns["messages"], kind="qa")
    if given != ["prompt", "answer"]:
        raise NekoLeanError(
            f"--columns names {' and '.join(given)}; expected prompt and answer together, or text, or messages."
        )

    prompt, answer = columns["prompt"], columns["answer"]
    if prompt == answer:
        raise NekoLeanError("--columns names the same column as prompt and as answer; name two columns.")
    for layout in LAYOUTS:
        if (layout.prompt, layout.answer) == (prompt, answer):
            return layout
    kind: Kind | None = "qa" if prompt in ("question", "instruction") else None
    return Layout(f"{prompt}/{answer}", prompt, answer, kind=kind, conversational=True)


def _matching_layout(records: Sequence[Record], names: Sequence[str], where: str) -> Layout:
    if all(name in names for name in COLUMNS):
        return LAYOUTS[0]

    matches = _without_subsets([layout for layout in LAYOUTS if all(name in names for name in layout.required)])
    if len(matches) > 1:
        # Columns without any value, as a union of data sets has them, do not count.
        filled = {name for name in _USED if any(record.values.get(name) not in (None, "") for record in records)}
        matches = _without_subsets([layout for layout in matches if filled.issuperset(layout.required)]) or matches
    if len(matches) == 1:
        return matches[0]
    if matches:
        found = " and ".join(layout.name for layout in matches)
        raise NekoLeanError(f"{where}: columns of several layouts are present ({found}); {_ADVICE}.")
    raise NekoLeanError(_missing(names, where))


def _without_subsets(matches: list[Layout]) -> list[Layout]:
    """Drop each layout whose columns another layout also reads: instruction + input + output beats input + output."""
    sets = [{*layout.required, layout.context} for layout in matches]
    return [
        layout
        for layout, own in zip(matches, sets, strict=True)
        if not any({*layout.required} < s for s in sets if s != own)
    ]


def _missing(names: Sequence[str], where: str) -> str:
    """The error message if no layout matches. It quotes no unknown name: without a header, it would be private data."""
    similar = {name.strip().lower(): name for name in names if name not in _USED and name.strip().lower() in _USED}

    def present(layout: Layout) -> float:
        count = sum(name in names or (name in similar) * 0.9 for name in layout.required)
        return count / len(layout.required)

    nearest = max(LAYOUTS, key=present)
    if present(nearest) == 0:
        layouts = ", ".join(layout.name for layout in LAYOUTS)
        return f"{where}: no column has a known name; expected one of {layouts}, or {_ADVICE}."

    missing = next(name for name in nearest.required if name not in names)
    hint = f"rename '{shorten_name(similar[missing])}' to '{missing}'" if missing in similar else _ADVICE
    return f"{where}: column '{missing}' is missing; expected the columns {', '.join(nearest.required)}, or {hint}."


def _group_column(records: Sequence[Record], names: Sequence[str]) -> str:
    """The first column of `GROUP_COLUMNS` that contains strings, or "" if there is none."""
    for name in GROUP_COLUMNS:
        if name not in names:
            continue
        values = [value for record in records if (value := record.values.get(name)) not in (None, "")]
        # "group" and "task" can only mean this, so another type in them is an error, which reading the row reports.
        if values and (name in ("group", "task") or all(isinstance(value, str) for value in values)):
            return name
    return ""
